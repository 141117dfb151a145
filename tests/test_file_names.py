"""The files of a source without an object for each: the same names, order and fingerprint, in little memory."""

import hashlib
import json
import os
import random
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from sources_for_tests import write_files, write_sidecars

from mlip_cli.data.sources import captions, file_names, formats, picture_paths
from mlip_cli.data.sources.file_names import FileNames, KeyIndex, names_below
from mlip_cli.data.sources.find import find_source
from mlip_cli.data.sources.listing import MOST_KINDS, PassedOver
from mlip_cli.data.sources.sidecars import sidecars_of
from mlip_cli.data.sources.survey import passed_over, surveyed

ODD = ["a", "a.jpg", "a-b", "a0", "é", "e\u0301", "\U0001f600", "\ufffd", "line\nbreak", os.fsdecode(b"\xe9.jpg"), "Z"]


def odd_tree(root: Path) -> list[str]:
    """Files in folders of odd names, three levels deep; returns their names, sorted as texts."""
    generator, names = random.Random(3), set[str]()
    for _ in range(300):
        parts = [generator.choice(ODD) for _ in range(generator.randrange(1, 4))]
        path = root.joinpath(*parts)
        if not any(parent.is_file() for parent in path.parents) and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            names.add("/".join(parts))
    return sorted(names)


def test_names_are_walked_in_the_order_of_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_names, "CHUNK", 7)
    expected = odd_tree(tmp_path)
    names = FileNames(names_below(tmp_path))
    assert len(expected) > 50
    assert list(names) == expected
    assert [names[place] for place in range(len(names))] == expected
    assert names[5:9] == expected[5:9]
    assert all(name in names and f"{name}x" not in names for name in expected)
    assert 5 not in names
    with pytest.raises(IndexError):
        names[len(names)]
    assert list(FileNames()) == []


def test_links_in_circles_and_broken_links(tmp_path: Path) -> None:
    write_files(tmp_path, {"a/x.jpg": b"", "b/y.jpg": b"", ".hidden/z.jpg": b"", "__MACOSX/z.jpg": b""})
    (tmp_path / "a" / "b").symlink_to(tmp_path / "b")
    (tmp_path / "b" / "a").symlink_to(tmp_path / "a")
    (tmp_path / "b" / "up").symlink_to(tmp_path)
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "self.jpg").symlink_to(tmp_path / "self.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    assert list(names_below(tmp_path)) == ["a/b/y.jpg", "a/x.jpg", "b/a/x.jpg", "b/y.jpg", "gone.jpg", "self.jpg"]


def test_names_beside_one(tmp_path: Path) -> None:
    ordered = sorted(["a/x.jpg", "a/x.caption", "a/x.jpg.txt", "a/x.txt", "a/x0.txt", "a/x/y.jpg", "a/xx.jpg", "x.txt"])
    names = FileNames(ordered)
    for start in ("a/x.", "a/x", "a/"):
        expected = {name: place for place, name in enumerate(ordered) if name.startswith(start)}
        assert names.beside(ordered.index("a/x.jpg"), start) == expected


@pytest.mark.parametrize("num_files", [0, 1, 3, 4, 9])
def test_the_fingerprint_is_that_of_one_json(num_files: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Earlier versions wrote it into prepared.json, from one list of all files."""
    monkeypatch.setattr(formats, "CHUNK", 3)
    for i in range(num_files):
        write_files(tmp_path, {f"é/{i}.jpg": bytes(i)})
        os.utime(tmp_path / f"é/{i}.jpg", ns=(5, 10**18 + i))
    if num_files:
        (tmp_path / os.fsdecode(b"\xff.jpg")).symlink_to("nowhere")
    source = formats.DataSource("x", "sidecar", tmp_path, file_names.listed(tmp_path, names_below(tmp_path)))
    listing = [[f"é/{i}.jpg", i, 10**18 + i] for i in range(num_files)] + [["\\udcff.jpg", 0, 0]] * bool(num_files)
    expected = json.dumps(["sidecar", listing, []], ensure_ascii=False, separators=(",", ":")).encode()
    assert source.fingerprint() == hashlib.sha256(expected).hexdigest()


def test_a_key_leads_to_all_its_places() -> None:
    keys = [str(random.Random(1).randrange(9)) for _ in range(3)] + ["a", "b", "a", "a"]
    index = KeyIndex(zip(keys, range(10, 17), strict=True))
    assert index.places_of("a") == [13, 15, 16]
    assert index.places_of("nothing") == []
    assert KeyIndex([]).places_of("a") == []


def stem(name: str) -> str:
    return name.rpartition(".")[0]


def by_the_rules(names: list[str]) -> dict[str, str]:
    """What `sidecars_of` finds, by comparing every picture with every text."""
    pictures = [name for name in names if name.lower().endswith((".jpg", ".png"))]
    texts = [name for name in names if name.lower().endswith((".txt", ".caption"))]
    wanted = {name: [start + end for end in (".txt", ".caption") for start in (stem(name), name)] for name in pictures}
    found = {name: min(fits, key=wanted[name].index) for name in pictures if (fits := set(wanted[name]) & set(texts))}
    free = [text for text in texts if text not in found.values()]
    for name in [name for name in pictures if name not in found]:
        spelled = {stem(text) + "." + text.rpartition(".")[2].lower(): text for text in free}
        if fits := set(wanted[name]) & spelled.keys():
            found[name] = spelled[min(fits, key=wanted[name].index)]
    free = [text for text in free if text not in found.values() and "labels" not in text.split("/")]

    def is_apart(picture: str, text: str) -> bool:
        one, other = picture.split("/"), text.split("/")
        ends = (stem(one[-1]), one[-1])
        same_depth = len(one) == len(other) and stem(other[-1]) in ends
        return same_depth and sum(a != b for a, b in zip(one[:-1], other[:-1], strict=True)) == 1

    lonely = [name for name in pictures if name not in found]
    apart = {name: [text for text in free if is_apart(name, text)] for name in lonely}
    single = {name: fits[0] for name, fits in apart.items() if len(fits) == 1}
    owners = Counter(single.values())
    return found | {name: text for name, text in single.items() if owners[text] == 1}


def test_texts_are_found_as_comparing_all_with_all_finds_them() -> None:
    generator, num_found = random.Random(4), Counter[int]()
    folders = ("", "a/", "images/", "captions/", "images/a/", "captions/a/", "labels/")
    for _ in range(400):
        bases = ("x", "y", "x.1", "x.jpg", "X")
        endings = ("jpg", "png", "txt", "TXT", "caption", "json")
        made = {
            f"{generator.choice(folders)}{generator.choice(bases)}.{generator.choice(endings)}"
            for _ in range(generator.randrange(1, 16))
        }
        if any(name[:-3] + "txt" in made for name in made if name.endswith("TXT")):
            continue  # either is right
        sidecars = sidecars_of(FileNames(sorted(made)))
        found = {picture: text for picture, text in sidecars.pairs() if text is not None}
        assert found == by_the_rules(sorted(made))
        assert len(sidecars) == len(found)
        used = {name for name, is_used in zip(sidecars.names, sidecars.is_used, strict=True) if is_used}
        assert used == set(found.values())
        num_found[len(found)] += 1
    assert num_found[2] > 20


def as_sidecars(folder: Path, n: int) -> Path:
    return write_sidecars(folder, n)


def as_captions_apart(folder: Path, n: int) -> Path:
    images = {f"images/{i:07d}.jpg": b"" for i in range(n)}
    return write_files(folder, images | {f"captions/{i:07d}.txt": b"a text" for i in range(n)})


def as_classes(folder: Path, n: int) -> Path:
    return write_files(folder, {f"{'cat' if i % 2 else 'dog'}/{i:07d}.jpg": b"" for i in range(n)})


def as_table(folder: Path, n: int) -> Path:
    rows = "".join(f"{i:07d}.jpg,picture number {i}\n" for i in range(n))
    return write_files(folder, {f"{i:07d}.jpg": b"" for i in range(n)} | {"metadata.csv": f"file_name,text\n{rows}"})


@pytest.mark.parametrize("write", [as_sidecars, as_captions_apart, as_classes, as_table])
def test_memory_does_not_grow_by_more_than_100_bytes_a_file(
    write: Callable[[Path, int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (file_names, formats):
        monkeypatch.setattr(module, "CHUNK", 64)  # what is decoded together must not count
    monkeypatch.setattr(captions, "MOST_LOOKED_AT", 64)  # nor the first captions
    interned = [sys.intern(f"interned {i}") for i in range(100_000)]  # nor Python's own table, which doubles at times
    least: dict[int, int] = {}  # peak by number of files; other threads of the process may add to one of them
    for attempt in range(3):  # the first ones pay for imports
        for n in (300, 2000):
            source = write(tmp_path / f"{attempt}-{n}", n)
            tracemalloc.start()
            found = find_source(str(source))
            found.fingerprint()
            passed_over(found, surveyed(found))
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            least[len(found.names)] = min(peak, least.get(len(found.names), peak))
    assert len(interned) == 100_000
    (few, small), (many, large) = sorted(least.items())
    assert (large - small) / (many - few) < 100


def test_kinds_of_files_are_limited() -> None:
    passed = PassedOver()
    for i in range(1000):
        passed.add(f".{i:04d} files", f"x.{i:04d}")
    assert len(passed.counts) == MOST_KINDS + 1
    assert sum(passed.counts.values()) == 1000
    assert passed.in_words().startswith("900 files of other kinds (first: x.0100), 1 .0000 file (first: x.0000), ")


def test_a_missing_picture_costs_little_memory(tmp_path: Path) -> None:
    names = [f"{i:08d}_picture.jpg" for i in range(4_000)]
    write_files(tmp_path, dict.fromkeys(names, b""))
    finder = picture_paths.PathFinder(tmp_path)
    finder.find("gone.jpg")  # imports what it needs
    finder.listings.clear()
    tracemalloc.start()
    assert finder.find("also_gone.jpg").path == ""
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 80 * len(names)
    assert finder.find("00000007_PICTURE.jpg").path == str(tmp_path / names[7])
    assert finder.find("00003999_picture").path == str(tmp_path / names[-1])


@pytest.mark.parametrize(("name", "most"), [("MOST_FOLDERS", 3), ("MOST_NAMES", 12)])
def test_listings_that_are_kept_are_limited(
    name: str, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names in another case are found in as many folders as there are, whatever is kept of their listings."""
    monkeypatch.setattr(picture_paths, name, most)
    write_files(tmp_path, {f"{i}/{k}.jpg": b"" for i in range(8) for k in range(2)})
    finder = picture_paths.PathFinder(tmp_path)
    for i in (*range(8), *range(8)):
        found = finder.find(f"{i}/1.JPG")
        assert found.path == str(tmp_path / f"{i}/1.jpg")
        assert finder.same(found.path) == os.path.realpath(found.path)
        assert 0 < len(finder.listings) <= 3
        assert len(finder.real_folders) <= (3 if name == "MOST_FOLDERS" else 8)
