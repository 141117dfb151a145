"""What a folder is taken for: its tables, texts and pictures as people lay them out, and what is not read of it."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from sources_for_tests import picture, prepare, rejects, samples, texts, write_files, write_tar

from mlip_cli.data.sources.listing import counted
from mlip_cli.errors import RunError, UsageError

CARDS = "image,caption\n" + "".join(f"{i}.png,card {i}\n" for i in range(3))
COCO = {
    f"annotations/captions_{split}2017.json": json.dumps(
        {
            "images": [{"id": i, "file_name": f"{i}.png"} for i in numbers],
            "annotations": [{"image_id": i, "id": 7, "caption": f"card {i}"} for i in numbers],
        }
    )
    for split, numbers in (("train", (0, 1)), ("val", (2,)))
}


def pictures(folder: str, numbers: tuple[int, ...] = (0, 1, 2)) -> dict[str, bytes | str]:
    """Three pictures in a folder."""
    return {f"{folder}{i}.png": picture(i) for i in numbers}


def tar_of(*numbers: int) -> bytes:
    """A tar of pictures with their texts."""
    with tempfile.TemporaryDirectory() as folder:
        members = {
            f"{i}.{end}": content for i in numbers for end, content in (("png", picture(i)), ("txt", f"card {i}"))
        }
        return write_tar(Path(folder, "0.tar"), members).read_bytes()


def captions(pattern: str) -> dict[str, bytes | str]:
    """Their texts, a file each."""
    return {pattern.format(i): f"card {i}\n" for i in range(3)}


@pytest.mark.parametrize(
    "files",
    [
        {"captions.txt": CARDS} | pictures("Images/"),
        {"anything.csv": CARDS} | pictures("data/img/"),
        {"results.csv": CARDS.replace(",", "| ").replace("image", "image_name")} | pictures("flickr30k_images/"),
        {"Flickr8k.token.txt": CARDS[14:].replace(",", "#0\t")} | pictures("Flicker8k_Dataset/"),
        {"metadata.json": json.dumps([{"image": f"{i}.png", "caption": f"card {i}"} for i in range(3)])}
        | pictures("images/"),
        {"wrapper/archive/metadata.csv": CARDS} | pictures("wrapper/archive/"),
        {"wrapper/list.tsv": CARDS.replace(",", "\t"), "wrapper/README.md": "x"} | pictures("wrapper/Images/"),
        {"captions.txt": CARDS, "classes.txt": "1 cat\n2 dog\n", "splits.json": '{"train": [1]}'} | pictures("Images/"),
        pictures("") | captions("{}.txt"),
        pictures("") | captions("{}.png.txt"),
        pictures("") | captions("{}.caption"),
        pictures("a/b/") | captions("a/b/{}.txt"),
        pictures("images/") | captions("captions/{}.txt"),
        pictures("d/images/x/") | captions("d/texts/x/{}.png.txt"),
        pictures("") | captions("{}.TXT"),
        pictures("cafe\u0301") | captions("caf\u00e9{}.txt"),
        pictures("images/cafe\u0301") | captions("texts/caf\u00e9{}.txt"),
    ],
)
def test_every_layout_gives_the_same_pairs(tmp_path: Path, files: dict[str, bytes | str]) -> None:
    source = write_files(tmp_path / "in", {"._0.png": "", "__MACOSX/Images/0.png": "", ".DS_Store": "", **files})
    summary = prepare(source, tmp_path / "out")
    assert texts(tmp_path / "out") == [["card 0"], ["card 1"], ["card 2"]]
    assert summary["rejects"] == 0


@pytest.mark.parametrize(
    "files",
    [
        COCO
        | pictures("train2017/", (0, 1))
        | pictures("val2017/", (2,))
        | {"annotations/instances_val2017.json": '{"images": [{"id": 1}], "annotations": [{"bbox": 1}]}'},
        {"train.csv": CARDS[:40], "valid.csv": CARDS[:14] + CARDS[40:]} | pictures("Images/"),
        {"wrapper/train/metadata.csv": CARDS[:40], "wrapper/val/metadata.csv": CARDS[:14] + CARDS[40:]}
        | pictures("wrapper/train/", (0, 1))
        | pictures("wrapper/val/", (2,)),
        {"t.csv": "image,caption,split\n0.png,card 0,trainA\n1.png,card 1,restval\n2.png,card 2,val2014\n"}
        | pictures("Images/"),
        pictures("in/train/", (0, 1))
        | pictures("in/dev/", (2,))
        | {"in/train/0.txt": "card 0", "in/train/1.txt": "card 1", "in/dev/2.txt": "card 2"},
        pictures("images/train/", (0, 1))
        | pictures("images/val/", (2,))
        | {"captions/train/0.txt": "card 0", "captions/train/1.txt": "card 1", "captions/val/2.txt": "card 2"},
        {f"cc3m-{name}.tar": tar_of(*numbers) for name, numbers in (("train-0000", (0, 1)), ("validation-0000", (2,)))},
        {f"wds/{name}/0.tar": tar_of(*numbers) for name, numbers in (("train", (0, 1)), ("val", (2,)))},
    ],
)
def test_splits_in_names_and_columns(tmp_path: Path, files: dict[str, bytes | str]) -> None:
    prepare(write_files(tmp_path / "in", files), tmp_path / "out")
    assert texts(tmp_path / "out") == [["card 0"], ["card 1"]]
    assert texts(tmp_path / "out", "validation") == [["card 2"]]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"a.csv": CARDS, "b.txt": CARDS} | pictures("Images/"),
            ": several tables: a.csv, b.txt; name one of them as SOURCE",
        ),
        (
            {"train.csv": CARDS, "all.csv": CARDS} | pictures(""),
            ": several tables: all.csv, train.csv; name one of them as SOURCE",
        ),
        (
            {"c_train2014.csv": CARDS, "c_train2017.csv": CARDS} | pictures(""),
            ": several tables: c_train2014.csv, c_train2017.csv; name one of them as SOURCE",
        ),
        (
            {"a.csv": CARDS, "b/x.csv": CARDS} | pictures(""),
            ": a table here and others in folders: a.csv, b/x.csv; name one as SOURCE",
        ),
        (
            {"a.csv": CARDS} | pictures("") | captions("{}.txt"),
            ": captions in a.csv and in 3 texts of pictures; say --format metadata or --format sidecar",
        ),
        (
            {"labels.csv": "id,breed\n0,dog\n"} | pictures(""),
            ": 3 .png, 1 .csv, but no captions for the pictures; labels.csv: no column for the image; columns are "
            "id, breed; say --image-column NAME",
        ),
        (
            pictures("") | {f"{i}.json": '{"caption": "a card"}' for i in range(3)},
            ": 3 .json, 3 .png, but no captions for the pictures; a .json beside a picture is not read: write its "
            "caption to a .txt; looked for ",
        ),
        ({"a.zip": "PK"}, ": 1 .zip, no pictures; unpack a.zip first; looked for "),
        (
            pictures("train/") | {"captions.json": '{"data": [{"image_path": "train/0.png", "text_of": "a"}]}'},
            ": pictures outside of class folders; make one folder for each class in {0}/, or name the file that says "
            "what they show (captions.json)",
        ),
        (
            pictures("images/") | {f"labels/{i}.txt": "0 0.5 0.5" for i in range(3)} | {"x.png": picture(9)},
            ": 3 pictures in the folder images, not in folders of several classes; ",
        ),
    ],
)
def test_what_cannot_be_told_apart_is_asked_for(
    tmp_path: Path, files: dict[str, bytes | str], message: str | None
) -> None:
    source = write_files(tmp_path / "in", files)
    if message is None:
        assert "sidecar" not in prepare(source, tmp_path / "out")["request"]["format"]
        return
    with pytest.raises(UsageError) as error:
        prepare(source, tmp_path / "out")
    assert str(error.value).startswith(f"{source}{message.format(source)}")


def test_shards_that_are_not_there_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = {f"data/train-0000{i}-of-00003.csv": "image,caption\n../0.png,a\n" for i in (0, 2)} | pictures("")
    prepare(write_files(tmp_path / "in", files), tmp_path / "out")
    assert "2 of 3 shards of train are here" in caplog.messages


@pytest.mark.parametrize(("column", "splits"), [("", {"train": 3, "test": 3}), (",validation", {"validation": 6})])
def test_folders_in_a_table_tell_splits_and_a_column_goes_before_them(
    tmp_path: Path, column: str, splits: dict[str, int]
) -> None:
    rows = "".join(f"{split}/{i}.png,card {i}{column}\n" for split in ("train", "test") for i in range(3))
    files = {"metadata.csv": f"file_name,caption{column and ',split'}\n{rows}"} | pictures("train/") | pictures("test/")
    found = prepare(write_files(tmp_path / "in", files), tmp_path / "out")["splits"]
    assert {split: own["num_samples"] for split, own in found.items()} == splits


def test_pictures_of_no_known_ending_alone(tmp_path: Path) -> None:
    source = write_files(tmp_path / "in", {"a.heic": "", "a.txt": "a card"})
    with pytest.raises(UsageError) as error:
        prepare(source, tmp_path / "out")
    assert str(error.value).startswith(
        f"{source}: 1 .heic, 1 .txt, no pictures; convert its pictures to JPEG; looked for"
    )


def test_named_columns_tell_the_table_of_a_folder(tmp_path: Path) -> None:
    source = write_files(tmp_path / "in", {"t.csv": CARDS.replace("image,caption", "id,words")} | pictures("Images/"))
    prepare(source, tmp_path / "out", image_column="id", caption_column="words")
    assert texts(tmp_path / "out") == [["card 0"], ["card 1"], ["card 2"]]


def test_a_table_that_is_not_read_is_named_beside_classes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tables = {
        "a.csv": "id,breed\n0,dog\n",
        "b.txt": "pic,words\n0.png,a dog\n",
        "README.txt": "Pictures, of 0.png\nx\n",
    }
    source = write_files(tmp_path / "in", tables | pictures("cat/") | pictures("dog/", (3, 4)))
    with caplog.at_level("INFO", logger="mlip_cli"):
        assert prepare(source, tmp_path / "out")["passed_over"] == {"tables": 1, ".txt files": 2}
    assert [text for text in caplog.messages if "not read as" in text] == [
        "a.csv: not read as a table: no column for the image; columns are id, breed; say --image-column NAME",
        "b.txt: not read as a table: no column for the image; columns are pic, words; say --image-column NAME",
    ]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("one\ntwo\nthree", ["one", "two", "three"]),
        ("one\r\ntwo\r\n", ["one", "two"]),
        ("one", ["one"]),
        ("one\n\nthe same", ["one\n\nthe same"]),
        ("\n one line \n", ["one line"]),
        ('["one", "two"]\n', ["one", "two"]),
    ],
)
def test_a_caption_a_line(tmp_path: Path, text: str, wanted: list[str]) -> None:
    prepare(write_files(tmp_path / "in", {"a.png": picture(0), "a.txt": text}), tmp_path / "out")
    assert texts(tmp_path / "out") == [wanted]


NOISE = {"a.heic": "", "b.HEIC": "", "c.doc": "", "lonely.txt": "x", "Makefile": "", ".hidden": "", "t.csv": "x\n"}


@pytest.mark.parametrize(
    ("files", "passed"),
    [
        (
            pictures("") | captions("{}.txt"),
            {".heic files": 2, ".doc files": 1, "texts without a picture": 1, "files without ending": 1, "tables": 1},
        ),
        (
            pictures("") | {"metadata.csv": CARDS[:27]},
            {
                ".heic files": 2,
                ".doc files": 1,
                ".txt files": 1,
                "files without ending": 1,
                "tables": 1,
                "pictures that no row names": 2,
            },
        ),
        (
            pictures("cat/") | pictures("dog/", (4,)),
            {".heic files": 2, ".doc files": 1, ".txt files": 1, "files without ending": 1, "tables": 1},
        ),
    ],
)
def test_what_is_passed_over_is_counted_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, files: dict[str, bytes | str], passed: dict[str, int]
) -> None:
    with caplog.at_level("INFO", logger="mlip_cli"):
        summary = prepare(write_files(tmp_path / "in", files | NOISE), tmp_path / "out")
    assert summary["passed_over"] == passed
    (said,) = [text for text in caplog.messages if text.startswith("not read: ")]
    assert "2 .heic files (first: a.heic)" in said
    assert said.endswith("; convert the pictures among them to JPEG")


def test_a_source_whose_pictures_mostly_cannot_be_read_is_refused(tmp_path: Path) -> None:
    files: dict[str, Any] = {f"h{i}.avif": "" for i in range(4)} | pictures("") | captions("{}.txt")
    source = write_files(tmp_path / "in", files)
    with pytest.raises(RunError) as error:
        prepare(source, tmp_path / "out")
    assert str(error.value) == (
        f"{source}: most of its pictures cannot be read: 4 .avif files (first: h0.avif); 3 can; convert the others to "
        "JPEG"
    )
    assert not (tmp_path / "out").exists()


def test_a_table_of_which_most_pictures_are_missing_is_refused(tmp_path: Path) -> None:
    rows = "".join(f"{i}.png,card {i}\n" for i in range(10))
    source = write_files(tmp_path / "in", {"t.csv": f"image,caption\n{rows}"} | pictures("", (0, 1, 2, 3)))
    with pytest.raises(RunError) as error:
        prepare(source, tmp_path / "out")
    assert str(error.value) == (
        f"{source}: 6 of the 10 rows fail for the same reason: picture missing (first: t.csv row 4: 4.png: no such "
        "file); nothing was kept"
    )
    write_files(source, {"4.png": picture(4)})
    assert prepare(source, tmp_path / "out")["rejects"] == 5


def test_tables_beside_tars_are_no_source(tmp_path: Path) -> None:
    write_tar(tmp_path / "in" / "00000.tar", {"a.png": picture(0), "a.txt": "from the tar"})
    write_files(tmp_path / "in", {"00000.csv": CARDS, "00000_stats.json": "{}"})
    assert prepare(tmp_path / "in", tmp_path / "out")["passed_over"] == {"tables": 2}
    assert texts(tmp_path / "out") == [["from the tar"]]


def test_loops_of_links_and_odd_names(tmp_path: Path) -> None:
    odd = os.fsdecode(b"caf\xe9")
    files = {f"{odd}.png": picture(0), f"{odd}.txt": "latin", "a\nb\x1b.png": picture(1), "a\nb\x1b.txt": b"\xe9"}
    source = write_files(tmp_path / "in", files)
    (source / "self.png").symlink_to("self.png")
    (source / "self.txt").symlink_to("self.txt")
    (source / "loop").symlink_to(".")
    prepare(source, tmp_path / "out")
    assert [sample["source"]["file"] for sample in samples(tmp_path / "out")] == [r"caf\udce9.png"]
    assert rejects(tmp_path / "out") == [
        (r"a\nb\x1b.png", 0, "caption is not UTF-8", r"a\nb\x1b.txt"),
        ("self.png", 0, "caption cannot be read", "self.txt"),
    ]


def test_the_first_pairs_are_said_before_the_work(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = "image,caption\n" + "".join(f"{i}.png,{'x' * 70 if i else 'a	b'}\n" for i in range(4))
    source = write_files(tmp_path / "in", {"t.csv": rows} | pictures("", (0, 1, 2, 3)))
    with caplog.at_level("INFO", logger="mlip_cli"):
        prepare(source, tmp_path / "out")
    long = "x" * 60 + "..."
    assert caplog.messages[:3] == [
        f"{source}: pictures in t.csv; 4 rows",
        "pictures: column 'image', captions: column 'caption'",
        f'first: 0.png "a\\tb"; 1.png "{long}"; 2.png "{long}"',
    ]


@pytest.mark.parametrize(
    ("n", "kind", "words"),
    [
        (1, ".md files", "1 .md file"),
        (1, "files without ending", "1 file without ending"),
        (1, "texts without a picture", "1 text without a picture"),
        (2, "texts without a picture", "2 texts without a picture"),
        (1, ".files files", "1 .files file"),
        (1, "links, devices or sparse files", "1 links, devices or sparse files"),
    ],
)
def test_one_file_is_counted_in_the_singular(n: int, kind: str, words: str) -> None:
    assert counted(n, kind) == words
