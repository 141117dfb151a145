"""Paths in tables: which file a name means, and what is said where it means none."""

import unicodedata
from pathlib import Path

import pytest
from sources_for_tests import picture, prepare, rejects, samples, write_files

from mlip_cli.data.sources import picture_paths
from mlip_cli.data.sources.picture_paths import PathFinder
from mlip_cli.errors import RunError, UsageError

NFC, NFD = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
FILES = {
    "i/p0.jpg": "",
    f"i/caf{NFD} 1.png": "",
    f"i/th{NFC}.jpeg": "",
    "i/dots.v2.webp": "",
    "i/100%25.png": "",
    "i/a#1": "",
    "i/Two.jpg": "",
    "i/two.JPG": "",
    "i/both.jpg": "",
    "i/both.png": "",
    "i/notes.txt": "",
    "Up/Per/x.gif": "",
    "r.jpg": "",
}


@pytest.mark.parametrize(
    ("name", "found", "is_guess"),
    [
        ("i/p0.jpg", "i/p0.jpg", False),
        ("./i/../i/p0.jpg", "./i/../i/p0.jpg", False),
        ("i/100%25.png", "i/100%25.png", False),
        ("i/a#1", "i/a#1", False),
        ("i\\p0.jpg", "i/p0.jpg", True),
        (".\\i\\P0.JPG", "i/p0.jpg", True),
        ("i/p0", "i/p0.jpg", True),
        ("i/dots.v2", "i/dots.v2.webp", True),
        ("i/p0.jpg#3", "i/p0.jpg", True),
        ("/i/p0.jpg", "i/p0.jpg", True),
        ("//i//p0.jpg", "i/p0.jpg", True),
        ("file:///i/p0.jpg", "i/p0.jpg", True),
        (f"i/caf{NFC} 1.png", f"i/caf{NFD} 1.png", True),
        (f"i/caf{NFD}%201.png", f"i/caf{NFD} 1.png", True),
        (f"I/TH{NFD.upper()}.JPEG", f"i/th{NFC}.jpeg", True),
        ("up/per/X.gif", "Up/Per/x.gif", True),
        ("i/Two.jpg", "i/Two.jpg", False),
        ("r", "r.jpg", True),
    ],
)
def test_the_one_file_that_a_name_means(tmp_path: Path, name: str, found: str, is_guess: bool) -> None:
    folder = write_files(tmp_path, FILES)
    place = PathFinder(folder).find(name)
    assert (place.path, place.is_guess, place.near) == (f"{folder}/{found}", is_guess, "")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("i/TWO.jpg", "Two.jpg and two.JPG could be meant"),
        ("i/both", "both.jpg and both.png could be meant"),
        ("i/p00.jpg", "the nearest is p0.jpg"),
        ("i/zzzzz.jpg", ""),
        ("i/notes", ""),
        ("i", ""),
        ("I", ""),
        ("i/p0.jpg\0", "the nearest is p0.jpg"),
        ("%00", ""),
        ("..%2f%2e%2e/secret.jpg", ""),
        ("..\\SECRET.jpg", ""),
        ("../SECRET", ""),
        ("\\..\\secret.jpg", ""),
        ("x" * 5_000, ""),
    ],
)
def test_a_name_that_means_no_file_is_not_guessed(tmp_path: Path, name: str, near: str) -> None:
    write_files(tmp_path, {"secret.jpg": ""})
    folder = write_files(tmp_path / "in", FILES)
    place = PathFinder(folder).find(name)
    assert place.path in ("", f"{folder}/i")
    assert place.near == near


@pytest.mark.parametrize("names", [["p0.jpg", "P0.jpg"], ["P0.jpg", "p0.jpg"]])
def test_the_nearest_does_not_depend_on_the_order_in_which_a_disk_lists_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str]
) -> None:
    monkeypatch.setattr(picture_paths, "_names_in", lambda folder: iter(names))
    assert PathFinder(tmp_path).find("p00.jpg").near == "the nearest is p0.jpg"


def test_what_is_said_of_other_spellings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = {f"i/caf{NFD} {i}.png": picture(i) for i in range(3)} | {"i/A.png": picture(3), "i/a.PNG": picture(4)}
    names = [*(f"i/caf{NFC} {i}.png" for i in range(3)), "i/a.png", "ftp://x/b.png", "i/\x1b[1m.png"]
    table = "image,caption\n" + "".join(f"{name},card {i}\n" for i, name in enumerate(names))
    source = write_files(tmp_path / "in", {"t.csv": table, **files}) / "t.csv"
    with caplog.at_level("INFO", logger="mlip_cli"):
        summary = prepare(source, tmp_path / "out")
    assert len(samples(tmp_path / "out")) == 3
    assert summary["passed_over"] == {"paths were found by another spelling": 3}
    assert (
        f"3 paths were found by another spelling (first: i/caf{NFC} 0.png is caf{NFD} 0.png, in another Unicode normal "
        "form)"
    ) in caplog.messages
    assert [reject[2:] for reject in rejects(tmp_path / "out")] == [
        ("picture missing", "i/a.png: no such file; A.png and a.PNG could be meant"),
        ("picture is an address", "ftp://x/b.png: only http and https are downloaded"),
        ("picture missing", r"i/\x1b[1m.png: no such file"),
    ]


def test_a_backslash_is_no_normal_form(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write_files(tmp_path / "in", {"t.csv": "image,caption\ni\\0.png,card\n", "i/0.png": picture(0)}) / "t.csv"
    with caplog.at_level("INFO", logger="mlip_cli"):
        prepare(source, tmp_path / "out")
    assert r"1 paths were found by another spelling (first: i\0.png is 0.png)" in caplog.messages


@pytest.mark.parametrize(
    ("files", "options", "wanted"),
    [
        ({"t.csv": "a.png", "Images/a.png": ""}, {}, "a.png"),
        ({"t.csv": "x/a.png", "some/Images/x/A.png": ""}, {}, "x/a.png"),
        ({"t.csv": "a", "Images/a.png": ""}, {}, "a"),
        ({"t.csv": "a.png", "one/a.png": "", "two/a.png": ""}, {"image_folder": "in/two"}, "a.png"),
        ({"deep/t.csv": "a.png", "Images/a.png": ""}, {}, "a.png"),
    ],
)
@pytest.mark.parametrize("is_folder", [True, False])
def test_pictures_in_the_folder_beside_a_table(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    files: dict[str, str],
    options: dict[str, str],
    wanted: str,
    is_folder: bool,
) -> None:
    monkeypatch.chdir(tmp_path)
    table = next(iter(files))
    contents = {name: f"image,caption\n{text},card\n" if text else picture(0) for name, text in files.items()}
    source = write_files(tmp_path / "in", contents)
    is_beside = is_folder or not (table.startswith("deep") or "some/Images/x/A.png" in files)
    if is_beside:
        prepare(source if is_folder else source / table, tmp_path / "out", **options)
        assert samples(tmp_path / "out")[0]["txt"] == "card"
    else:
        with pytest.raises(UsageError) as error:
            prepare(source / table, tmp_path / "out")
        assert str(error.value) == (
            f"{source / table}: none of its 1 picture is in {(source / table).parent} (first: {wanted}: no such file); "
            "say --image-folder FOLDER, what the paths are relative to"
        )


def test_pictures_that_could_lie_in_two_folders(tmp_path: Path) -> None:
    files = {"t.csv": "image,caption\na.png,card\n", "one/a.png": picture(0), "two/a.png": picture(1)}
    source = write_files(tmp_path / "in", files)
    for place in (source, source / "t.csv"):
        with pytest.raises(UsageError) as error:
            prepare(place, tmp_path / "out")
        assert (
            str(error.value) == f"{source / 't.csv'}: its pictures could lie in one and two; say --image-folder FOLDER"
        )
    with pytest.raises(UsageError, match=r"^--image-folder /nowhere: no such folder; name the folder of the pictures$"):
        prepare(source, tmp_path / "out", image_folder="/nowhere")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("/home/a/0.png", "its paths are those of another place: write paths from the folder of the pictures"),
        (r"C:\a\0.png", "its paths are those of another place: write paths from the folder of the pictures"),
        ("pictures/0.png", "say --image-folder FOLDER, what the paths are relative to"),
        ("x" * 5_000, f"no file name (first: t.csv row 0: {'x' * 60}... of 5,000 characters)"),
    ],
)
def test_what_helps_where_no_picture_is_found(tmp_path: Path, name: str, words: str) -> None:
    rows = "".join(f"{name},card {i}\n" for i in range(12))
    source = write_files(tmp_path / "in", {"t.csv": f"image,caption\n{rows}"}) / "t.csv"
    with pytest.raises((UsageError, RunError)) as error:
        prepare(source, tmp_path / "out")
    assert words in str(error.value)
