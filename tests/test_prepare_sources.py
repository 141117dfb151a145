"""Each format of a source: what is read from it, and which sources are refused."""

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sources_for_tests import picture, prepare, rejects, samples, texts, write_files, write_sidecars, write_tar

from mlip_cli.data.tar import DamagedTarError
from mlip_cli.errors import UsageError
from mlip_cli.paths import escaped


def test_csv_with_its_traps(tmp_path: Path) -> None:
    source = write_files(
        tmp_path / "in",
        {
            "metadata.csv": (
                b"\xef\xbb\xbffile_name,text,class,year\r\n"
                b'pictures/0.png,"one, ""two"" and\nthree",cat,1999\r\n'
                b"pictures/1.png,NA,,\r\n"
                b"pictures/2.png,null,dog,\r\n"
                b"pictures/3.png,caf\xe9,dog,\r\n"
                b"\r\n"
                b"pictures/4.png,too few\r\n"
                b"pictures/5.png,  ,dog,\r\n"
                b"pictures/6.png," + b"x" * 65_537 + b",dog,\r\n"
                b",no name,dog,\r\n"
                b"pictures/missing.png,gone,dog,\r\n"
                b"pictures,a folder,dog,\r\n"
                b'pictures/7.png,5" pipe,dog,\r\n'
            ),
            **{f"pictures/{i}.png": picture(i) for i in range(8)},
        },
    )
    summary = prepare(source, tmp_path / "out")
    assert texts(tmp_path / "out") == [['one, "two" and\nthree'], ["NA"], ["null"], ['5" pipe']]
    first = samples(tmp_path / "out")[0]
    assert first["txt"] == 'one, "two" and three'
    assert (first["class"], first["source"]) == ("cat", {"file": "metadata.csv", "row": 0})
    assert first["meta"] == {"year": "1999"}
    assert rejects(tmp_path / "out") == [
        ("metadata.csv", 3, "caption is not UTF-8", "write it as UTF-8"),
        ("metadata.csv", 4, "row of 2 cells under 4 columns", ""),
        ("metadata.csv", 5, "no caption", "pictures/5.png"),
        ("metadata.csv", 6, "caption too long", "65537 bytes, at most 65536"),
        ("metadata.csv", 7, "no file name", ""),
        ("metadata.csv", 8, "picture missing", "pictures/missing.png: no such file"),
        ("metadata.csv", 9, "picture cannot be read", "pictures: Is a directory"),
    ]
    assert (summary["rows"], summary["rejects"]) == (11, 7)


def test_tsv_has_no_quotes(tmp_path: Path) -> None:
    files = {f"{i}.png": picture(i) for i in range(3)}
    table = 'file_name\tcaption\n0.png\t"a lone quote\n1.png\tplain\n2.png\t"quoted"\n'
    prepare(write_files(tmp_path / "in", {"metadata.tsv": table, **files}), tmp_path / "out")
    assert texts(tmp_path / "out") == [['"a lone quote'], ["plain"], ['"quoted"']]


def test_jsonl_takes_lists_and_weights(tmp_path: Path) -> None:
    rows: list[Any] = [
        {"file_name": "0.png", "caption": ["a", " ", "b"]},
        {"file_name": "1.png", "caption": [{"text": "c", "weight": 2}, {"text": "d", "weight": 0.5}]},
        {"file_name": "2.png", "caption": None},
        {"file_name": "2.png", "caption": [{"text": "c", "weight": -1}]},
        {"file_name": "2.png", "caption": "\ud800"},
        {"file_name": "2.png", "caption": [str(i) for i in range(256)]},
        {"file_name": 3, "caption": "x"},
        ["no", "object"],
    ]
    lines = "\n".join(json.dumps(row) for row in rows) + "\n{torn"
    files = {f"{i}.png": picture(i) for i in range(3)}
    summary = prepare(write_files(tmp_path / "in", {"metadata.jsonl": lines, **files}), tmp_path / "out")
    assert texts(tmp_path / "out") == [["a", "b"], ["c", "d"], [str(i) for i in range(255)]]
    assert summary["cleaning"]["captions_left_out"] == 1
    assert [caption["weight"] for caption in samples(tmp_path / "out")[1]["captions"]] == [2.0, 0.5]
    assert [(row, reason) for _, row, reason, _ in rejects(tmp_path / "out")] == [
        (2, "no caption"),
        (3, "caption weight is not positive"),
        (4, "caption is not UTF-8"),
        (6, "picture missing"),
        (7, "row is not a JSON object"),
        (8, "row is not JSON"),
    ]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_texts_by_their_byte_order_mark(tmp_path: Path, encoding: str) -> None:
    prepare(
        write_files(tmp_path / "in", {"0.png": picture(0), "0.txt": "café \u732b".encode(encoding)}), tmp_path / "out"
    )
    assert texts(tmp_path / "out") == [["café \u732b"]]


def test_parquet_rows_and_their_meta(tmp_path: Path) -> None:
    source = write_files(tmp_path / "in", {f"{i}.png": picture(i) for i in range(3)})
    table = pa.table(
        {
            "path": ["0.png", "1.png", "2.png"],
            "title": pa.array([b"zero", b"\xff", b"two"], pa.binary()).view(pa.string()),
            "score": [0.5, 1.0, float("nan")],
            "split": ["train", "test", "val"],
        }
    )
    pq.write_table(table, source / "metadata.parquet")
    prepare(source, tmp_path / "out")
    assert texts(tmp_path / "out") == [["zero"]]
    assert texts(tmp_path / "out", "validation") == [["two"]]
    assert samples(tmp_path / "out")[0]["meta"] == {"score": 0.5}
    assert samples(tmp_path / "out", "validation")[0]["meta"] == {}
    assert [reason for _, _, reason, _ in rejects(tmp_path / "out")] == ["caption is not UTF-8"]


def test_a_table_may_be_named_itself_and_lie_in_split_folders(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {}
    for split in ("train", "val", "test"):
        files |= {f"{split}/metadata.csv": f"file_name,caption\na.png,in {split}\n", f"{split}/a.png": picture(0)}
    source = write_files(tmp_path / "in", files)
    prepare(source, tmp_path / "out")
    assert [texts(tmp_path / "out", split) for split in ("train", "validation", "test")] == [
        [["in train"]],
        [["in val"]],
        [["in test"]],
    ]
    prepare(source / "val" / "metadata.csv", tmp_path / "one")
    assert texts(tmp_path / "one") == [["in val"]]


def test_unknown_split_is_a_reject(tmp_path: Path) -> None:
    table = "file_name,caption,split\n0.png,a,train\n0.png,b,holdback\n"
    prepare(write_files(tmp_path / "in", {"metadata.csv": table, "0.png": picture(0)}), tmp_path / "out")
    assert rejects(tmp_path / "out") == [("metadata.csv", 1, "unknown split", "holdback")]


def test_sidecars(tmp_path: Path) -> None:
    source = write_sidecars(tmp_path / "in", 3)
    write_files(source, {"alone.JPG": picture(9, "JPEG"), "bad.png": picture(8), "bad.txt": b"\xff\xfea", "x.doc": "?"})
    prepare(source, tmp_path / "out")
    assert texts(tmp_path / "out") == [["picture number 0"], ["picture number 1"], ["picture number 2"]]
    assert samples(tmp_path / "out")[1]["source"] == {"file": "00001.png", "row": 0}
    assert rejects(tmp_path / "out") == [
        ("alone.JPG", 0, "no caption", "alone.txt"),
        ("bad.png", 0, "caption is not UTF-8", "bad.txt"),
    ]


def test_class_folders_keep_splits_and_classes(tmp_path: Path) -> None:
    source = write_files(
        tmp_path / "in",
        {
            "train/tabby_cat/0.png": picture(0),
            "train/dog/old/1.png": picture(1),
            "test/dog/2.jpg": picture(2, "JPEG"),
            "train/3.png": picture(3),
            ".hidden/4.png": picture(4),
        },
    )
    prepare(source, tmp_path / "out")
    found = [(sample["class"], sample["txt"], sample["format"]) for sample in samples(tmp_path / "out")]
    assert found == [("dog", "dog", "webp"), ("tabby cat", "tabby cat", "webp")]
    assert [sample["format"] for sample in samples(tmp_path / "out", "test")] == ["jpg"]
    assert rejects(tmp_path / "out") == [("train/3.png", 0, "not in a class folder", "")]


def test_folders_behind_links_are_read_and_loops_are_not(tmp_path: Path) -> None:
    write_files(tmp_path / "elsewhere", {"dog/1.png": picture(1), "dog/deep/2.png": picture(2)})
    source = write_files(tmp_path / "in", {"cat/0.png": picture(0)})
    (source / "dog").symlink_to(tmp_path / "elsewhere" / "dog")
    (tmp_path / "elsewhere" / "dog" / "deep" / "loop").symlink_to(tmp_path / "elsewhere")
    (source / "cat" / "loop").symlink_to(source)
    prepare(source, tmp_path / "out")
    assert [sample["source"]["file"] for sample in samples(tmp_path / "out")] == [
        "cat/0.png", "dog/1.png", "dog/deep/2.png",
    ]  # fmt: skip


def test_pipes_and_devices_are_rejected_as_pictures(tmp_path: Path) -> None:
    """Reading one would wait for ever."""
    source = write_files(tmp_path / "in", {"cat/0.png": picture(0), "dog/1.png": picture(1)})
    os.mkfifo(source / "dog" / "2.jpg")
    (source / "dog" / "3.jpg").symlink_to("/dev/zero")
    assert prepare(source, tmp_path / "folder")["rows"] == 2

    sidecars = write_sidecars(tmp_path / "sidecars", 2)
    (sidecars / "00001.txt").unlink()
    os.mkfifo(sidecars / "00001.txt")
    prepare(sidecars, tmp_path / "text")
    assert rejects(tmp_path / "text") == [("00001.png", 0, "caption is not a file", "00001.txt")]

    table = write_files(
        tmp_path / "table", {"metadata.csv": "path,text\n0.png,a\n1.png,b\n2.png,c\n", "0.png": picture(0)}
    )
    os.mkfifo(table / "1.png")
    (table / "2.png").symlink_to("/dev/zero")
    prepare(table, tmp_path / "rows")
    assert [(row, reason, detail) for _, row, reason, detail in rejects(tmp_path / "rows")] == [
        (1, "picture is not a file", "1.png: a pipe or a device"),
        (2, "picture is not a file", "2.png: a pipe or a device"),
    ]


def test_the_chosen_columns_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write_files(tmp_path / "in", {"metadata.csv": "path,title,note\n0.png,a,b\n", "0.png": picture(0)})
    with caplog.at_level("INFO", logger="mlip_cli"):
        prepare(source, tmp_path / "out")
        prepare(source, tmp_path / "named", caption_column="note")
    assert [text for text in caplog.messages if text.startswith("pictures: ")] == [
        "pictures: column 'path', captions: column 'title'",
        "pictures: column 'path', captions: column 'note'",
    ]


def test_file_names_that_are_not_utf_8(tmp_path: Path) -> None:
    source = write_files(tmp_path / "in", {"a.png": picture(0), "a.txt": "a"})
    for ending in (".png", ".txt"):
        (source / f"a{ending}").rename(os.fsdecode(os.fsencode(source) + b"/caf\xe9" + ending.encode()))
    prepare(source, tmp_path / "out")
    assert samples(tmp_path / "out")[0]["source"]["file"] == r"caf\udce9.png"
    assert prepare(source, tmp_path / "out")["rows"] == 1
    odd = os.fsdecode(b"caf\xe9")
    for names in ((odd, tmp_path / "new"), (source, tmp_path / odd)):
        with pytest.raises(UsageError, match=r"caf\\udce9: a name that is not UTF-8; rename it$"):
            prepare(*names)


def test_tars_of_img2dataset_and_of_our_own(tmp_path: Path) -> None:
    about = {"caption": "from json", "url": "http://x/1.jpg", "width": 12, "status": "success", "error_message": None}
    write_tar(
        tmp_path / "in" / "00000.tar",
        {
            "000.jpg": picture(0, "JPEG"),
            "000.txt": "from txt",
            "000.json": json.dumps(about),
            "001.png": picture(1),
            "001.json": json.dumps({"caption": "only json", "label": 7}),
            "a/b.c.webp": picture(2, "WEBP"),
            "a/b.c.txt": "dots in the key",
            "a/b.c.cls": "3",
            "a/b.d.png": picture(3),
            "a/b.d.txt": "and its neighbour",
            "no-caption.png": picture(4),
            "no-picture.txt": "x",
            "broken.png": picture(5),
            "broken.json": "{",
            "x.pyd": b"cos\nsystem\n",
        },
    )
    (tmp_path / "in" / "00000_stats.json").write_text("{}")
    prepare(tmp_path / "in", tmp_path / "out")
    found = samples(tmp_path / "out")
    assert [sample["txt"] for sample in found] == ["from txt", "only json", "dots in the key", "and its neighbour"]
    assert [sample["class"] for sample in found] == [None, "7", "3", None]
    assert [sample["key"] for sample in found] == ["000000000", "000000001", "000000002", "000000003"]
    assert found[0]["meta"] == {"url": "http://x/1.jpg", "status": "success"}
    assert [(reason, detail) for _, _, reason, detail in rejects(tmp_path / "out")] == [
        ("no caption", "no-caption"),
        ("no picture", "no-picture"),
        ("KEY.json is not JSON", "broken"),
    ]
    prepare(tmp_path / "out" / "train", tmp_path / "again")
    again = samples(tmp_path / "again")
    for name in ("captions", "class", "meta"):
        assert [sample[name] for sample in again] == [sample[name] for sample in found]


@pytest.mark.slow
def test_tars_by_pattern(tmp_path: Path) -> None:
    for i in range(3):
        write_tar(tmp_path / f"s-{i}.tar", {"k.png": picture(i), "k.txt": f"shard {i}"})
    prepare(f"{tmp_path}/s-{{1..2}}.tar", tmp_path / "braces")
    assert texts(tmp_path / "braces") == [["shard 1"], ["shard 2"]]
    prepare(f"{tmp_path}/s-*.tar", tmp_path / "star")
    assert texts(tmp_path / "star") == [["shard 0"], ["shard 1"], ["shard 2"]]
    prepare(tmp_path / "s-0.tar", tmp_path / "one")
    assert texts(tmp_path / "one") == [["shard 0"]]
    with pytest.raises(UsageError, match=r"1 of 3 files are missing, the first is .*/s-3\.tar$"):
        prepare(f"{tmp_path}/s-{{1..3}}.tar", tmp_path / "gap")


def test_a_cut_tar_stops_the_work_before_it_starts(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "in" / "0.tar", {"a.png": picture(0), "a.txt": "a", "b.png": picture(1), "b.txt": "b"})
    whole = path.read_bytes()
    path.write_bytes(whole[:1700])
    with pytest.raises(DamagedTarError) as error:
        prepare(tmp_path / "in", tmp_path / "out")
    assert str(error.value) == f"{path}: cut at byte 1700: no end-of-archive block"
    assert not (tmp_path / "out").exists()
    path.write_bytes(whole)
    assert prepare(tmp_path / "in", tmp_path / "out")["rows"] == 2


LOOKED_FOR = (
    "looked for a table (.csv, .tsv, .txt, .json, .jsonl, .parquet, .arrow) with columns of pictures and captions; "
    ".tar files; pictures with a .txt of the same name; one folder of pictures a class"
)


@pytest.mark.parametrize(
    ("files", "source", "options", "message"),
    [
        ({}, "in", {}, f"the folder is empty; {LOOKED_FOR}"),
        ({"a.txt": "x", "b.txt": "y", "c.md": "z"}, "in", {}, f"2 .txt, 1 .md, no pictures; {LOOKED_FOR}"),
        ({"a.png": picture(0)}, "in", {}, f"1 .png, but no captions for the pictures; {LOOKED_FOR}"),
        ({"x.pdf": "?"}, "in/x.pdf", {}, f"a file of no known kind; {LOOKED_FOR}"),
        ({}, "gone", {}, "no such file or folder; SOURCE is a folder, a table, tars, or openmoji"),
        (
            {"metadata.csv": "file_name,caption\n"},
            "in",
            {},
            f"read as metadata, it has no records; {LOOKED_FOR}",
        ),
        (
            {"metadata.csv": "a,b\n", "metadata.jsonl": "{}"},
            "in",
            {},
            "several tables: metadata.csv, metadata.jsonl; name one of them as SOURCE",
        ),
        (
            {"metadata.csv": "a,b\n", "train/metadata.csv": "a,b\n"},
            "in",
            {},
            "a table here and others in folders: metadata.csv, train/metadata.csv; name one as SOURCE",
        ),
        (
            {"a.png": picture(0), "a.txt": "x"},
            "in",
            {"format": "webdataset"},
            f"not of format webdataset: 1 .png, 1 .txt; {LOOKED_FOR}",
        ),
    ],
)
def test_what_cannot_be_a_source(
    tmp_path: Path, files: dict[str, bytes | str], source: str, options: dict[str, Any], message: str
) -> None:
    (tmp_path / "in").mkdir()
    write_files(tmp_path / "in", files)
    with pytest.raises(UsageError) as error:
        prepare(tmp_path / source, tmp_path / "out", **options)
    assert str(error.value) == f"{tmp_path / source}: {message}"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("metadata.csv", "x,y\n", {}, ": no column for the image; columns are x, y; say --image-column NAME"),
        (
            "metadata.csv",
            "path,image,text\n",
            {},
            ": columns path and image could both be the image; columns are path, image, text; say --image-column NAME",
        ),
        (
            "metadata.csv",
            "path,text,title\n",
            {},
            ": columns text and title could both be the caption; columns are path, text, title; "
            "say --caption-column NAME, or NAME,NAME for several",
        ),
        (
            "metadata.csv",
            "path,text\n",
            {"caption_column": "txt"},
            ": no column 'txt' (--caption-column); columns are path, text",
        ),
        ("metadata.csv", "path,text,text\n", {}, ": column 'text' is there twice"),
        ("metadata.csv", "", {}, ": the table is empty"),
        ("metadata.jsonl", "nothing\n", {}, ": the table is empty, or not one JSON object a line"),
        (
            "metadata.csv",
            'path,text\na.png,"open\nb.png,x\n',
            {},
            ":3: not CSV (unexpected end of data); a cell that starts with a quote must end with one and double those "
            "inside; or use .tsv or .jsonl",
        ),
        (
            "metadata.parquet",
            "PAR?",
            {},
            ": not a Parquet file (Parquet file size is 4 bytes, smaller than the minimum file footer (8 bytes))",
        ),
    ],
)
def test_tables_that_cannot_be_read(
    tmp_path: Path, name: str, content: str, options: dict[str, Any], message: str
) -> None:
    source = write_files(tmp_path / "in", {name: content})
    with pytest.raises(UsageError) as error:
        prepare(source, tmp_path / "out", **options)
    assert str(error.value) == f"{source / name}{message}"
    assert not (tmp_path / "out").exists()


def test_options_for_other_sources_are_refused(tmp_path: Path) -> None:
    source = write_sidecars(tmp_path / "in", 1)
    with pytest.raises(
        UsageError, match=r"^--image-column, --caption-column: for tables and tars only, and .* is read as sidecar$"
    ):
        prepare(source, tmp_path / "out", image_column="x")
    with pytest.raises(UsageError, match=r"^--format jpeg: no such format; use auto, openmoji, metadata"):
        prepare(source, tmp_path / "out", format="jpeg")
    with pytest.raises(UsageError, match=r"lies inside the source .*; name a folder elsewhere$"):
        prepare(source, source / "out")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Übung 猫 \U0001f468\u200d\U0001f469.jpg", "Übung 猫 \U0001f468\u200d\U0001f469.jpg"),
        ("a\nb\t\x00", r"a\nb\t\x00"),
        ("\x1b[31mred\x9b\x7f", r"\x1b[31mred\x9b\x7f"),
        ("caf\udce9", r"caf\udce9"),
        ("\u202egpj.exe\u2028", r"\u202egpj.exe\u2028"),
    ],
)
def test_what_is_shown_of_a_name_stays_on_its_line(text: str, shown: str) -> None:
    assert escaped(text) == shown
