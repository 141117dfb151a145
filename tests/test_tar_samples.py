"""Which members of a tar are a sample: preparing, training and evaluation give one answer."""

import bz2
import gzip
import io
import json
import lzma
import random
import shutil
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image
from sources_for_tests import prepare, rejects, texts

from mlip_cli.data import plain_tars
from mlip_cli.data.dataset import ShardDataset
from mlip_cli.data.open import open_sources
from mlip_cli.data.prepare import parts
from mlip_cli.data.sources.listing import PassedOver
from mlip_cli.data.sources.records import checked_captions
from mlip_cli.data.sources.tar_samples import Columns, TarNotes
from mlip_cli.data.sources.tars import tar_records
from mlip_cli.errors import RunError, UsageError
from mlip_cli.evaluate.datasets.benchmark import Benchmark
from mlip_cli.evaluate.datasets.clip_benchmark import labelled_pictures, open_web_shards
from mlip_cli.recipe.config import Cache, Source


def picture(i: int, format: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (20 * i, 250 - 20 * i, 90)).save(file, format)
    return file.getvalue()


A, B, MASK = picture(1), picture(2), picture(9, "PNG")
Members = Sequence[tuple[str, bytes | str]]


def as_tar(members: Members, *, format: int = tarfile.PAX_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if name.endswith("/"):
                info.type = tarfile.DIRTYPE
            elif isinstance(content, str) and content.startswith("link:"):
                info.type, info.linkname, content = tarfile.LNKTYPE, content.removeprefix("link:"), b""
            data = content.encode() if isinstance(content, str) else content
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


class Case(NamedTuple):
    """Members of a tar, and what becomes of them."""

    members: Members
    found: list[tuple[bytes, list[str]]]
    """Picture and captions of each sample. All have a .cls."""
    rejects: list[str] = []  # noqa: RUF012 - never changed
    """Reasons for the other samples, sorted."""
    notes: str = ""
    columns: Columns = Columns()


def sample(key: str, image: bytes, text: str, *, jpg: str = "jpg", txt: str = "txt") -> list[tuple[str, bytes | str]]:
    return [(f"{key}.{jpg}", image), (f"{key}.{txt}", text), (f"{key}.cls", "1")]


TWO = [(A, ["one"]), (B, ["two"])]
PAIRED = [*sample("a", A, "one"), *sample("b", B, "two")]
FIRST_DOT = "1 tars whose keys end at the first dot of the name (first: 0.tar)"
JSON = {"a": "1", "text": "a text", "re_caption": "a better text"}
CASES = {
    "neighbours": Case(PAIRED, TWO),
    "keys with dots": Case([*sample("a.0", A, "one"), *sample("a.1", B, "two")], TWO),
    "two-part endings": Case(
        [
            *sample("a", A, "one", jpg="input.jpg", txt="out.txt"),
            *sample("b", B, "two", jpg="input.jpg", txt="out.txt"),
        ],
        TWO,
        notes=FIRST_DOT,
    ),
    "a mask beside the picture": Case(
        [*sample("a", A, "one"), ("a.mask.png", MASK), *sample("b", B, "two"), ("b.mask.png", MASK)],
        TWO,
        notes=FIRST_DOT,
    ),
    "two masks beside the picture": Case(
        [*sample("a", A, "one"), ("a.mask.png", MASK), ("a.depth.png", MASK)], TWO[:1], notes=FIRST_DOT
    ),
    "dots in folders": Case([*sample("v1.0/a", A, "one"), *sample("v1.0/b", B, "two")], TWO),
    "one without a text among keys with dots": Case(
        [*sample("a.0", A, "one"), ("a.1.jpg", B)], TWO[:1], ["no caption"]
    ),
    "pictures of equal rank": Case(
        [("a.1.jpg", A), ("a.2.jpg", B), ("a.txt", "one"), ("a.cls", "1")], [], ["several pictures"], FIRST_DOT
    ),
    "pictures of equal rank, one named": Case(
        [("a.1.jpg", A), ("a.2.jpg", B), ("a.txt", "one"), ("a.cls", "1")],
        [(B, ["one"])],
        notes=FIRST_DOT,
        columns=Columns(image="2.jpg"),
    ),
    "texts of equal rank": Case(
        [("a.jpg", A), ("a.x.txt", "one"), ("a.y.txt", "two"), ("a.z.cls", "1")],
        [],
        ["several texts"],
        FIRST_DOT,
    ),
    "texts of equal rank, one named": Case(
        [("a.jpg", A), ("a.x.txt", "one"), ("a.y.txt", "two"), ("a.cls", "1")],
        [(A, ["two"])],
        notes=FIRST_DOT,
        columns=Columns(caption="y.txt"),
    ),
    "members in no order": Case([PAIRED[i] for i in (5, 0, 4, 2, 3, 1)], TWO[::-1]),
    "folders and ./": Case([("./", ""), ("./p/", ""), *(("./p/" + name, content) for name, content in PAIRED)], TWO),
    "./ before some names": Case([("./" * (i % 2) + name, content) for i, (name, content) in enumerate(PAIRED)], TWO),
    "hidden members": Case(
        [("__MACOSX/a.jpg", B), *PAIRED, ("._a.jpg", B), (".DS_Store", "x"), ("x/.git/b.jpg", A), ("Thumbs.db", "x")],
        TWO,
    ),
    "names that lead out": Case([("../" + name, content) for name, content in PAIRED], TWO),
    "unread members": Case(
        [*PAIRED, ("a.heic", "x"), ("b.heic", "x"), ("a.npy", "x"), ("README", "x"), ("c.jpg", "link:a.jpg")],
        TWO,
        notes="2 .heic members (first: a.heic), 1 .npy member (first: a.npy), 1 links, devices or sparse files "
        "(first: c.jpg), 1 member without ending (first: README)",
    ),
    "the same keys again": Case(
        [*PAIRED, *sample("a", B, "three")],
        [*TWO, (B, ["three"])],
        notes="1 sample whose key was there before (first: 0.tar: a)",
    ),
    "the same field twice": Case([("a.jpg", A), ("a.jpg", B), ("a.txt", "one")], [], ["a field twice under one key"]),
    "the same keys again, in no order": Case(
        [("a.jpg", A), ("b.jpg", B), ("a.jpg", B), ("b.txt", "two"), ("b.cls", "1"), ("a.txt", "one")],
        TWO[1:],
        ["no caption", "no caption", "no picture"],
        "2 samples whose key was there before (first: 0.tar: a)",
    ),
    "img and cap": Case([*sample("a", A, "one", jpg="img", txt="cap"), *sample("b", B, "two", jpg="image")], TWO),
    "every format": Case(
        [
            member
            for i, end in enumerate(("gif", "bmp", "tiff"))
            for member in sample(end, picture(i, end), end, jpg=end)
        ],
        [(picture(i, end), [end]) for i, end in enumerate(("gif", "bmp", "tiff"))],
    ),
    "a caption a line": Case(
        sample("a", A, "one\n two \r\nthree\n"),
        [(A, ["one", "two", "three"])],
        notes="1 sample with several captions in KEY.txt (first: 0.tar: a)",
    ),
    "paragraphs": Case(sample("a", A, "one\n\ntwo\n"), [(A, ["one\n\ntwo"])]),
    "a key of KEY.json": Case(
        [("a.jpg", A), ("a.txt", "short"), ("a.json", json.dumps(JSON)), ("a.cls", "1")],
        [(A, ["a better text"])],
        columns=Columns(caption="re_caption"),
    ),
    "a list in KEY.json": Case([("a.jpg", A), ("a.json", '["one", "two"]'), ("a.cls", "1")], [(A, ["one", "two"])]),
    "a list as a text in KEY.json": Case(
        [("a.jpg", A), ("a.json", json.dumps({"caption": "['one', 'two']"})), ("a.cls", "1")], [(A, ["one", "two"])]
    ),
    "a list in KEY.txt": Case(
        sample("a", A, '["one", "two"]'),
        [(A, ["one", "two"])],
        notes="1 sample with several captions in KEY.txt (first: 0.tar: a)",
    ),
    "a talk in KEY.json": Case(
        [("a.jpg", A), ("a.json", json.dumps({"talk": [{"from": "gpt", "value": "one"}]})), ("a.cls", "1")],
        [(A, ["one"])],
        columns=Columns(caption="talk"),
    ),
    "a key that is not there": Case(
        [("a.jpg", A), ("a.json", json.dumps(JSON)), ("a.cls", "1")],
        [],
        ["no caption"],
        columns=Columns(caption="best"),
    ),
}


def by_preparing(path: Path, columns: Columns, notes: TarNotes) -> tuple[list[tuple[bytes, list[str]]], list[str]]:
    found, reasons = [], []
    for record in map(checked_captions, tar_records(path.parent, [path.name], columns, notes)):
        if record.reject:
            reasons.append(record.reject)
            continue
        assert record.picture is not None
        content = path.read_bytes()[record.picture.offset :][: record.picture.size]
        found.append((content, [caption.text for caption in record.captions]))
    return found, sorted(reasons)


def opened(path: Path, cache: Path, **columns: str | None) -> ShardDataset:
    [dataset] = open_sources(
        [Source(path=str(path), format="webdataset", **columns)],  # type: ignore[arg-type]
        cache=Cache(folder=str(cache)),
    )
    return dataset


def read_all(dataset: ShardDataset) -> list[tuple[bytes, list[str]]]:
    found = map(dataset.read, range(dataset.num_samples))
    return [(sample.image, [caption.text for caption in sample.captions]) for sample in found]


@pytest.mark.parametrize("name", CASES)
def test_three_readers_give_one_answer(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members, expected, reasons, words, columns = CASES[name]
    path = tmp_path / "in" / "0.tar"
    path.parent.mkdir()
    path.write_bytes(as_tar(members))
    notes = TarNotes()
    assert by_preparing(path, columns, notes) == (expected, reasons)
    both = [found.in_words() for found in (notes.read_as, notes.passed_over) if found.counts]
    assert both == ([words] if words else [])
    said: list[str] = []
    monkeypatch.setattr(plain_tars, "say", said.append)
    monkeypatch.setattr(plain_tars, "warn", lambda _: None)
    named = {"image_column": columns.image, "caption_column": columns.caption}
    if expected:
        assert read_all(opened(path, tmp_path / "cache", **named)) == expected
        assert [line.replace(str(path), "0.tar") for line in said[1:]] == (
            [f"0.tar: {'not read: ' if notes.passed_over.counts else ''}{words}"] if words else []
        )
    else:
        with pytest.raises(UsageError, match=rf"no sample of 1 tar can be used: .*{reasons[0]}"):
            opened(path, tmp_path / "cache", **named)
    if columns == Columns():
        pictures = [
            path.read_bytes()[at : at + size] for _, at, size, _ in labelled_pictures(path, TarNotes(), PassedOver())
        ]
        assert pictures == [image for image, _ in expected]


def test_pictures_without_a_class_number_are_counted(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(as_tar([*PAIRED, ("c.jpg", A), ("d.cls", "1")]))
    left_out = PassedOver()
    assert len(list(labelled_pictures(tmp_path / "0.tar", TarNotes(), left_out))) == 2
    assert left_out == PassedOver(
        {"samples without a class number": 1, "samples with no picture": 1},
        {"samples without a class number": "0.tar: c", "samples with no picture": "0.tar: d"},
    )


def test_a_large_tar_in_no_order_is_read_in_place(tmp_path: Path) -> None:
    """Long names too: parts lie far from each other, and each has headers of its own before it."""
    key = "folder/" * 20
    members = [(f"{key}{i:03}.jpg", picture(i % 12) + bytes(9_000)) for i in range(200)]
    members += [(f"{key}{i:03}.txt", f"number {i}".encode()) for i in range(200)]
    random.Random(0).shuffle(members)
    for format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        path = tmp_path / f"{format}" / "0.tar"
        path.parent.mkdir()
        path.write_bytes(as_tar(members, format=format))
        dataset = opened(path, tmp_path / "cache")
        assert dataset.num_samples == 200
        for id in range(200):
            found = dataset.read(id)
            number = int(found.key[-3:])
            assert (found.image[:-9_000], found.captions[0].text) == (picture(number % 12), f"number {number}")


COMPRESSED = {
    "0.tar": gzip.compress,
    "0.tar.gz": gzip.compress,
    "0.tgz": lambda content: gzip.compress(content[:5000]) + gzip.compress(content[5000:]),
    "0.tar.bz2": bz2.compress,
    "0.TAR.XZ": lzma.compress,
}


@pytest.mark.parametrize("name", COMPRESSED)
@pytest.mark.parametrize("workers", [1, 2])
def test_compressed_tars_are_prepared_and_refused_by_training(
    name: str, workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Members in no order too: still each part of the source reads the file once, from start to end."""
    path, plain = tmp_path / "in" / name, tmp_path / "plain" / "0.tar"
    members = [member for i in range(60) for member in sample(f"{i:03}", picture(i % 12), f"number {i}")]
    random.Random(1).shuffle(members)
    for folder in (path.parent, plain.parent):
        folder.mkdir()
    plain.write_bytes(as_tar(members))
    path.write_bytes(COMPRESSED[name](as_tar(members)))
    reads: list[int] = []
    read = parts.read_decompressed
    monkeypatch.setattr(parts, "read_decompressed", lambda path, size, at: reads.append(at) or read(path, size, at))
    prepare(path.parent, tmp_path / "out", workers=workers)
    assert sorted(texts(tmp_path / "out")) == sorted([f"number {i}"] for i in range(60))
    assert reads == sorted(reads)
    prepare(plain.parent, tmp_path / "expected")
    shards = [next((tmp_path / out / "train").glob("*.tar")) for out in ("out", "expected")]
    if name == "0.tar":
        assert shards[0].read_bytes() == shards[1].read_bytes()
    with pytest.raises(UsageError) as error:
        opened(path.parent, tmp_path / "cache")
    tool = {"2": "bzip2", "Z": "xz"}.get(name[-1], "xz" if name.endswith("XZ") else "gzip")
    assert str(error.value) == (
        f"{path}: is {tool}, and training needs random access; unpack it: {tool} -dc < {path} > UNPACKED.tar"
    )


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        (gzip.compress(as_tar(PAIRED))[:-30], RunError, "damaged gzip: Compressed file ended before the end-of-stream"),
        (gzip.compress(as_tar(PAIRED))[:-8] + bytes(8), RunError, "damaged gzip: CRC check failed"),
        (gzip.compress(as_tar(PAIRED)[:700]), RunError, "no tar header at byte"),
        (lzma.compress(as_tar(PAIRED))[:-60], RunError, "damaged lzma: "),
        (b"\x28\xb5\x2f\xfd" + bytes(99), UsageError, "is zstd, which is not read; unpack it: zstd -dc < "),
        (gzip.compress(b"not a tar" * 200), RunError, "no tar header at byte 0"),
    ],
    ids=["cut", "wrong checksum", "cut tar", "cut xz", "zstd", "no tar"],
)
def test_what_cannot_be_decompressed_is_named(
    content: bytes, error: type[Exception], words: str, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.tar.gz").write_bytes(content)
    with pytest.raises(error, match=rf"^{tmp_path}/in/0.tar.gz: {words}"):
        prepare(tmp_path / "in", tmp_path / "out")


def web_shards(root: Path, content: bytes) -> Path:
    (root / "test").mkdir(parents=True)
    (root / "test" / "0.tar").write_bytes(content)
    for name, text in (
        ("classnames.txt", "a\nb"),
        ("zeroshot_classification_templates.txt", "{c}"),
        ("test/nshards.txt", "1"),
    ):
        (root / name).write_text(text)
    return root


def test_evaluation_names_a_compressed_shard(tmp_path: Path) -> None:
    root = web_shards(tmp_path / "wds", gzip.compress(as_tar(PAIRED)))
    with pytest.raises(
        UsageError, match=r"0\.tar: is gzip, and evaluation needs random access; unpack it: gzip -dc < "
    ):
        open_web_shards(Benchmark("x", "x", root, ""))


def test_an_index_knows_its_columns(tmp_path: Path) -> None:
    """Another caption_column is another data set: neither index nor fingerprint is that of the first."""
    members: list[tuple[str, bytes | str]] = []
    for i in range(3):
        fields = {"caption": "buy now", "re_caption": f"a card with {i} and more words"}
        members += [(f"{i}.jpg", picture(i)), (f"{i}.json", json.dumps(fields))]
    (tmp_path / "0.tar").write_bytes(as_tar(members))
    first = opened(tmp_path / "0.tar", tmp_path / "cache")
    second = opened(tmp_path / "0.tar", tmp_path / "cache", caption_column="re_caption")
    assert [texts for _, texts in read_all(first)] == [["buy now"]] * 3
    assert [texts for _, texts in read_all(second)] == [[f"a card with {i} and more words"] for i in range(3)]
    assert first.fingerprint != second.fingerprint
    assert first.num_tokens([0]) < second.num_tokens([0])


def test_what_prepare_data_says_of_tars_without_captions(tmp_path: Path) -> None:
    fields = json.dumps({"text": "a card", "width": 3, "url": "x"})
    members = [member for i in range(60) for member in ((f"{i}.jpg", picture(i % 12)), (f"{i}.json", fields))]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.tar").write_bytes(as_tar(members))
    keys = "KEY.json has text, url; name one by --caption-column, or caption_column in a recipe"
    with pytest.raises(RunError, match=rf"no caption \(first: 0.tar row 0: 0: {keys}\)"):
        prepare(tmp_path / "in", tmp_path / "out")
    with pytest.raises(UsageError, match=rf"60 no caption \(first: .*: {keys}\)"):
        opened(tmp_path / "in", tmp_path / "cache")
    prepare(tmp_path / "in", tmp_path / "out", caption_column="text")
    assert texts(tmp_path / "out") == [["a card"]] * 60


def test_most_samples_must_be_usable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training, preparing and evaluation end where more than half of the samples fail for one reason."""
    words: list[str] = []
    monkeypatch.setattr(plain_tars, "warn", words.append)
    for num_bare, ends in ((30, False), (31, True)):
        path = tmp_path / f"{num_bare}.tar"
        members = [member for i in range(30) for member in sample(f"{i:03}", A, "words")]
        path.write_bytes(as_tar([*members, *((f"{i}.jpg", A) for i in range(100, 100 + num_bare))]))
        if not ends:
            assert opened(path, tmp_path / "cache").num_samples == 30
            assert words == [
                f"{path}: 30 samples cannot be used and 30 can: 30 no caption (first: {path}: sample 100: no caption)"
            ]
            continue
        with pytest.raises(RunError) as error:
            opened(path, tmp_path / "cache")
        assert str(error.value) == (
            f"{path}: 31 of 61 samples fail for the same reason: no caption (first: {path}: sample 100: no caption)"
        )
        with pytest.raises(RunError, match=r"31 of the 61 rows fail for the same reason: no caption"):
            prepare(path, tmp_path / "out")
        root = web_shards(tmp_path / "wds", path.read_bytes())
        with pytest.raises(RunError) as error:
            open_web_shards(Benchmark("x", "x", root, ""))
        assert str(error.value) == (
            f"{root}/test: 31 samples without a class number (first: 0.tar: 100); only 30 others have a picture and a "
            "class"
        )


@pytest.mark.parametrize(
    "content",
    [b"[1, ", b'{"a": ' + b"9" * 5000 + b"}", b"[" * 100_000, b"\xff", b'"text"', b"{}"],
    ids=["cut", "number too long", "too deep", "not UTF-8", "no object", "empty"],
)
def test_damaged_json_is_a_reject_everywhere(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.tar").write_bytes(as_tar([*PAIRED, ("c.jpg", A), ("c.json", content)]))
    prepare(tmp_path / "in", tmp_path / "out")
    [(_, row, reason, _)] = rejects(tmp_path / "out")
    assert row == 2
    assert reason in ("KEY.json is not JSON", "KEY.json is not a JSON object", "caption is not UTF-8", "no caption")
    assert read_all(opened(tmp_path / "in", tmp_path / "cache")) == TWO


def test_parts_of_tars_at_random_are_samples_or_rejects(tmp_path: Path) -> None:
    """Members with names of few letters, whole or damaged tars: rows in = samples + rejects, and no pair is wrong."""
    generator = random.Random(5)
    for number in range(150):
        members: dict[str, bytes | str] = {}
        for _ in range(generator.randrange(1, 14)):
            key = generator.choice(("a", "b", "a.b", "x/a", ".a", "./b", "c"))
            ending = generator.choice(("jpg", "png", "txt", "json", "cls", "m.png", "n.txt", "npy", ""))
            owner = key.removeprefix("./")
            content: bytes | str = f"{owner} of {ending}"
            if ending == "json":
                content = json.dumps({"caption": content}) if generator.random() < 0.8 else "{"
            members[f"{key}.{ending}".rstrip(".")] = content
        items = list(members.items())
        generator.shuffle(items)
        tar = as_tar(items)
        if generator.random() < 0.3:
            at = generator.randrange(len(tar))
            tar = tar[:at] + generator.randbytes(generator.randrange(1, 600)) + tar[at:]
        check_random_tar(tar, tmp_path / f"{number}", members)


def check_random_tar(content: bytes, folder: Path, members: Mapping[str, bytes | str]) -> None:
    folder.mkdir()
    path = folder / "0.tar"
    path.write_bytes(content)
    try:
        found, _ = by_preparing(path, Columns(), TarNotes())
    except RunError as error:
        assert str(error).startswith(f"{path}: ")  # noqa: PT017
        found = None
    try:
        trained = read_all(opened(path, folder / "cache"))
    except UsageError:
        trained = []
    assert found is None or trained == found
    for image, captions in trained:
        key, _, _ = image.decode().partition(" of ")
        assert all(caption.partition(" of ")[0].partition(".")[0] == key.partition(".")[0] for caption in captions)
    shutil.rmtree(folder)
