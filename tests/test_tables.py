"""Tables as people have them: separators, encodings, headers, JSON, Parquet and Arrow, and what their cells hold."""

import gzip
import io
import json
import random
import tracemalloc
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sources_for_tests import picture, prepare, rejects, samples, texts, write_files

from mlip_cli.data.sources import text_tables
from mlip_cli.data.sources.captions import CaptionLooks, listed
from mlip_cli.data.sources.find import find_source
from mlip_cli.data.sources.formats import read_records
from mlip_cli.data.sources.records import Caption, PictureBytes, ReadOptions
from mlip_cli.data.sources.survey import surveyed
from mlip_cli.data.sources.text_tables import MAX_CELL, lines_of
from mlip_cli.errors import UsageError
from mlip_cli.paths import escaped

THREE = {f"i/{i}.png": picture(i) for i in range(3)}
packed = partial(gzip.compress, mtime=0)  # the same bytes in every process

ROWS = [(f"i/{i}.png", f"a card, number {i}; nice") for i in range(3)]
WANTED = [[text] for _, text in ROWS]


def table(separator: str, head: tuple[str, ...] = ("image", "caption"), *, quote: str = "") -> str:
    """A table of `ROWS`."""
    lines = [head, *ROWS] if head else ROWS
    return "".join(separator.join(f"{quote}{cell}{quote}" for cell in cells) + "\r\n" for cells in lines)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("comma.csv", table(",", quote='"')),
        ("space after the comma.csv", table(", ", quote='"')),
        ("tab.csv", table("\t", ("filepath", "title"))),
        ("quoted tab.csv", table("\t", ("filepath", "title"), quote='"')),
        ("semicolon.csv", table(";", quote='"')),
        ("pipe.csv", table("| ", ("image_name", " comment"))),
        ("tab.txt", table("\t")),
        ("pipe.txt", table(" | ")),
        ("comma.txt", table(",", quote='"')),
        ("tab.tsv", table("\t", ("Image Path", "TEXT"))),
        ("mark.csv", b"\xef\xbb\xbf" + table("\t").encode()),
        ("utf16.csv", table("\t").encode("utf-16")),
        ("utf16be.txt", b"\xfe\xff" + table("\t").encode("utf-16-be")),
        ("packed.csv.gz", packed(table(",", quote='"').encode())),
        ("packed.csv", packed(table("\t").encode())),
        ("no header.tsv", table("\t", ())),
        ("no header.csv", table(",", (), quote='"')),
        ("turned.tsv", "".join(f"{text}\t{name}\n" for name, text in ROWS)),
        ("numbered.txt", "".join(f"{name}#0\t{text}\n" for name, text in ROWS)),
        ("objects.json", json.dumps([{"id": 1, "image": name, "caption": text} for name, text in ROWS])),
        ("wrapped.json", json.dumps({"data": [{"img": name, "sentence": text} for name, text in ROWS]})),
        ("names.json", json.dumps(dict(ROWS))),
        ("lines.json", "".join(json.dumps({"image": name, "text": text}) + "\n" for name, text in ROWS)),
        ("one line.ndjson", "".join(json.dumps({"image": name, "text": text}) + "\n" for name, text in ROWS)),
        (
            "utf16.jsonl",
            "".join(json.dumps({"image": name, "text": text}) + "\n" for name, text in ROWS).encode("utf-16"),
        ),
        (
            "packed.jsonl.gz",
            packed(b"".join(json.dumps({"image": n, "text": t}).encode() + b"\n" for n, t in ROWS)),
        ),
        (
            "coco.json",
            json.dumps(
                {
                    "images": [{"id": i, "file_name": name} for i, (name, _) in enumerate(ROWS)],
                    "annotations": [{"id": 9 + i, "image_id": i, "caption": t} for i, (_, t) in enumerate(ROWS)],
                }
            ),
        ),
        (
            "karpathy.json",
            json.dumps(
                {
                    "dataset": "coco",
                    "images": [{"filepath": "i", "filename": n[2:], "sentences": [{"raw": t}]} for n, t in ROWS],
                }
            ),
        ),
        (
            "llava.json",
            json.dumps(
                [
                    {
                        "image": name,
                        "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": text}],
                    }
                    for name, text in ROWS
                ]
            ),
        ),
    ],
)
def test_every_dialect_gives_the_same_pairs(tmp_path: Path, name: str, content: str | bytes) -> None:
    source = write_files(tmp_path / "in", {name: content, **THREE})
    for place in (source / name, source):
        out = tmp_path / ("table" if place.is_file() else "folder")
        assert prepare(place, out)["rejects"] == 0
        assert texts(out) == WANTED


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        (
            "t.csv",
            'i/0.png,1,"a card, one"\ni/1.png,2,b\n',
            {},
            ": no header: the first row is i/0.png, 1, a card, one; say --image-column N and --caption-column N, from "
            "1 to 3, or give the table a header",
        ),
        (
            "t.tsv",
            "0\ta card\n1\tb\n",
            {},
            ": no header: the first row is 0, a card; say --image-column N and --caption-column N, from 1 to 2, or "
            "give the table a header",
        ),
        (
            "t.tsv",
            "http://x/0.jpg\tone\n",
            {"image_column": "http://x/0.jpg", "caption_column": "one"},
            ": no column 'http://x/0.jpg' (--image-column); columns are 1, 2; the table has no header, so its columns "
            "are numbers",
        ),
        ("t.csv", "image,caption\n".encode("utf-16-le"), {}, ": its text holds zero bytes; save the table as UTF-8"),
        (
            "t.csv",
            "a\x1bb,caption\n",
            {},
            r": no column for the image; columns are a\x1bb, caption; say --image-column NAME",
        ),
        ("t.json", "[1", {}, ": not JSON (',' expected at character 2)"),
        (
            "t.json",
            '{"images": [{"id": 1}], "annotations": [{"bbox": []}]}',
            {},
            ": JSON of no known form; known are an array of objects (pandas: orient='records'), COCO's images and "
            "annotations of captions, and captions by file name",
        ),
        ("t.json", '{"image": {"0": "i/0.png"}, "caption": {"0": "a card"}}', {}, ": JSON of no known form; "),
        ("t.json", '{"image": ["i/0.png", "i/1.png"], "caption": ["a", "b"]}', {}, ": JSON of no known form; "),
        ("t.csv", "sep=;\nimage;caption\n", {}, ": its first line is sep=;, which Excel alone reads; remove that line"),
        (
            "t.txt",
            "i/0.png a card\n",
            {},
            ": no column for the image; the only column is i/0.png a card; part its cells by commas or tabs",
        ),
        ("t.arrow", b"?" * 100, {}, ": not an Arrow file ("),
        (
            "t.csv",
            "image,text,title\n",
            {"caption_column": "text:0,title"},
            "--caption-column text:0: '0' is not a weight above 0; say NAME:WEIGHT",
        ),
    ],
)
def test_tables_that_are_refused(
    tmp_path: Path, name: str, content: str | bytes, options: dict[str, str], message: str
) -> None:
    source = write_files(tmp_path / "in", {name: content, "i/0.png": picture(0)}) / name
    with pytest.raises(UsageError) as error:
        prepare(source, tmp_path / "out", **options)
    assert str(error.value).startswith(message if message.startswith("-") else f"{source}{message}")


LONG = "a card " * (MAX_CELL // 7 + 1)


@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
def test_a_line_of_json_that_is_too_long_is_a_reject(tmp_path: Path, end: str) -> None:
    rows = [f'{{"image": "{i}.png", "text": "{LONG if i in (1, 3) else f"card {i}"}"}}' for i in range(4)]
    files: dict[str, bytes | str] = {f"{i}.png": picture(i) for i in range(4)}
    source = write_files(tmp_path / "in", files | {"t.jsonl": (end or "\n").join(rows) + end}) / "t.jsonl"
    prepare(source, tmp_path / "out")
    assert texts(tmp_path / "out") == [["card 0"], ["card 2"]]
    reason = "row of more than 16,777,216 characters"
    assert [reject[1:3] for reject in rejects(tmp_path / "out")] == [(1, reason), (3, reason)]


@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
@pytest.mark.parametrize("length", [7, 8, 9, 16, 17])
def test_lines_of_about_the_greatest_length(monkeypatch: pytest.MonkeyPatch, length: int, end: str) -> None:
    monkeypatch.setattr(text_tables, "MAX_CELL", 8)
    line = "a" * length + end
    found = [line for line in lines_of(io.StringIO(f"first\n{line}", newline="")) if line is None or line.strip()]
    assert found == ["first\n", line if len(line) <= 8 else None]


@pytest.mark.parametrize(
    ("name", "start", "message"),
    [
        ("t.json", '[{"image": "0.png", "text": "card 0"}, {"image": "0.png", "text": "', "not JSON ("),
        ("t.csv", "image,text\n0.png,card 0\n0.png,", "not CSV ("),
    ],
)
def test_a_row_that_is_too_long_is_refused(tmp_path: Path, name: str, start: str, message: str) -> None:
    source = write_files(tmp_path / "in", {name: start + 4 * LONG, "0.png": picture(0)}) / name
    with pytest.raises(UsageError) as error:
        prepare(source, tmp_path / "out")
    assert f": {message}row of more than 16,777,216 characters" in str(error.value)


def test_a_table_without_a_header_is_read_by_places(tmp_path: Path) -> None:
    rows = "".join(f"{i}\t{text}\t{name}\n" for i, (name, text) in enumerate(ROWS))
    source = write_files(tmp_path / "in", {"t.txt": rows, **THREE}) / "t.txt"
    prepare(source, tmp_path / "out", image_column="3", caption_column="2")
    assert texts(tmp_path / "out") == WANTED


@pytest.mark.parametrize(
    ("cell", "wanted"),
    [
        ('["a dog", "it\'s a [dog]"]', ["a dog", "it's a [dog]"]),
        ("['a dog', \"it's one\"]", ["a dog", "it's one"]),
        ("['a dog' 'a cat']", ["a dog", "a cat"]),
        ("['a dog'\n 'a cat'\n]", ["a dog", "a cat"]),
        ('["\\u00fc"]', ["ü"]),
        ("[]", None),
        ("[1, 2]", None),
        ("['a', 2]", None),
        ("[a dog] on grass", None),
        ("[a dog]", None),
        ("['a' ... 'b']", None),
        ("[['a']]", None),
        ("[__import__('os').abort()]", None),
        ("[" * 5_000 + "]" * 5_000, None),
        ("[b'a']", None),
        ("a [dog]", None),
    ],
)
def test_lists_in_cells(cell: str, wanted: list[str] | None) -> None:
    assert listed(cell) == wanted


def test_columns_of_captions_with_weights(tmp_path: Path) -> None:
    rows = "image,caption_0,caption_1,long\ni/0.png,a,b,c\ni/1.png,d,,\n"
    source = write_files(tmp_path / "in", {"t.csv": rows, **THREE}) / "t.csv"
    prepare(source, tmp_path / "out", caption_column="caption_0, caption_1 , Long:0.5")
    found = [[(c["text"], c["weight"]) for c in sample["captions"]] for sample in samples(tmp_path / "out")]
    assert found == [[("a", 1.0), ("b", 1.0), ("c", 0.5)], [("d", 1.0)]]


def flickr(separator: str) -> dict[str, bytes | str]:
    """Rows of three pictures, mixed: 0 and 1 have two captions each, and one of 2 is empty."""
    order = [(0, "a"), (1, "b"), (2, ""), (0, "c"), (2, "d"), (1, "e")]
    return {
        "t.csv": "image,caption,n\n" + "".join(f"i{separator}{i}.png,{t},{n}\n" for n, (i, t) in enumerate(order)),
        **THREE,
    }


@pytest.mark.parametrize("separator", ["/", "/./", "\\", "/../i/"])
def test_rows_of_one_picture_are_one_sample(tmp_path: Path, caplog: pytest.LogCaptureFixture, separator: str) -> None:
    source = write_files(tmp_path / "in", flickr(separator)) / "t.csv"
    with caplog.at_level("INFO", logger="mlip_cli"):
        summary = prepare(source, tmp_path / "out")
    assert texts(tmp_path / "out") == [["a", "c"], ["d"], ["b", "e"]]
    assert [sample["source"]["row"] for sample in samples(tmp_path / "out")] == [0, 4, 1]
    assert [sample["meta"] for sample in samples(tmp_path / "out")] == [{}, {"n": "4"}, {}]
    assert [(row, reason) for _, row, reason, _ in rejects(tmp_path / "out")] == [(2, "no caption")]
    assert (summary["rows"], summary["pictures"], summary["rejects"]) == (6, 4, 1)
    assert f"{source}: pictures in t.csv; 6 rows, 3 pictures with 1 to 2 captions each" in caplog.messages
    assert "6 rows, 4 pictures: 3 samples, 1 reject" in caplog.messages


def test_links_to_one_picture_are_one_and_a_lost_one_is_counted_by_rows(tmp_path: Path) -> None:
    table = "image,caption\ni/0.png,a\nlink/0.png,b\nalias.png,c\ngone.png,d\ngone.png,e\ni/1.png,f\n"
    source = write_files(tmp_path / "in", {"t.csv": table, **THREE})
    (source / "link").symlink_to(source / "i")
    (source / "alias.png").symlink_to("i/0.png")
    summary = prepare(source / "t.csv", tmp_path / "out")
    assert texts(tmp_path / "out") == [["a", "b", "c"], ["f"]]
    assert (summary["rows"], summary["pictures"], summary["reasons"]) == (6, 4, {"picture missing": 2})


@pytest.mark.parametrize("num_rows", [255, 300])
def test_the_first_255_captions_of_a_picture_stay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, num_rows: int
) -> None:
    table = "image,caption\n" + "".join(f"i/0.png,caption {i}\n" for i in range(num_rows))
    source = write_files(tmp_path / "in", {"t.csv": table, **THREE}) / "t.csv"
    with caplog.at_level("INFO", logger="mlip_cli"):
        summary = prepare(source, tmp_path / "out")
    assert texts(tmp_path / "out") == [[f"caption {i}" for i in range(255)]]
    assert (summary["rows"], summary["rejects"]) == (num_rows, 0)
    assert summary["cleaning"]["captions_left_out"] == num_rows - 255
    said = [message for message in caplog.messages if "left out" in message]
    why = "by the rules for captions or as more than 255 of a picture; other captions of these pictures stay"
    assert said == ([f"{num_rows - 255} captions left out {why}"] if num_rows > 255 else [])


@pytest.mark.parametrize(
    ("column", "values", "reason"),
    [
        ("split", ("train", "test", "train"), "rows of one picture differ in split"),
        ("class", ("cat", "dog", "cat"), "rows of one picture differ in class"),
    ],
)
def test_rows_of_one_picture_that_contradict_each_other(
    tmp_path: Path, column: str, values: tuple[str, ...], reason: str
) -> None:
    rows = [("i/0.png", values[0]), ("i/0.png", values[1]), ("i/1.png", values[2]), ("i/1.png", values[2])]
    table = f"image,caption,{column}\n" + "".join(f"{name},x{n},{value}\n" for n, (name, value) in enumerate(rows))
    prepare(write_files(tmp_path / "in", {"t.csv": table, **THREE}), tmp_path / "out")
    assert texts(tmp_path / "out") == [["x2", "x3"]]
    both = " and ".join(sorted(values[:2]))
    assert rejects(tmp_path / "out") == [("t.csv", 0, reason, f"i/0.png: {both}")]


PIECES = (*'",\t;|\n\r\0[]{}:#/\\', "image", "caption", "i/0.png", "I/1.PNG", "é", "\u2028", "null", "['a' 'b']",
          '["x"]', "split", "id", "annotations", "http://x/y.jpg", "%00", "..", "9" * 5_000, "[" * 1_200)  # fmt: skip
NAMES = ("t.csv", "t.tsv", "t.txt", "t.json", "t.jsonl", "t.csv.gz", "t.parquet", "t.arrow", "metadata.csv", "i/0.txt")


def random_table(choose: random.Random) -> bytes:
    """Something between a table and noise."""
    separator = choose.choice([",", "\t", ";", "| "])
    cells = ("i/0.png", "i/1.png", "a card", "".join(choose.choices(PIECES, k=3)))
    rows = [["image", "caption"], *(choose.choices(cells, k=choose.choice([2, 2, 2, 3])) for _ in range(6))]
    text = (
        "\n".join(separator.join(row) for row in rows)
        if choose.random() < 0.6
        else "".join(choose.choices(PIECES, k=40))
    )
    objects = [
        dict(zip(("image", "caption"), choose.choices([*cells, None, [], {}, 1], k=2), strict=True)) for _ in range(5)
    ]
    text = choose.choice([text, json.dumps(objects), "\n".join(map(json.dumps, objects))])
    content = text.encode(choose.choice(["utf-8", "utf-8", "utf-16", "utf-16-le", "latin-1"]), "replace")
    return choose.choice([content, content, content[: len(content) // 2], packed(content)])


@pytest.mark.parametrize("seed", range(10))
def test_no_row_of_a_random_table_is_lost(tmp_path: Path, seed: int) -> None:
    choose, num_read, said = random.Random(seed), 0, list[str]()
    write_files(tmp_path / "in", THREE)
    for _ in range(40):
        name = choose.choice(NAMES)
        path = write_files(tmp_path / "in", {name: random_table(choose)}) / name
        read = ReadOptions(limit=choose.choice([None, 3]))
        try:
            source = find_source(str(choose.choice([path, tmp_path / "in"])), read=read)
            survey = surveyed(source)
            found = list(read_records(source, survey.shared))
        except UsageError as error:
            said.append(str(error))
        else:
            num_read += 1
            assert (len(found), sum(record.num_rows for record in found)) == (survey.pictures, survey.rows)
            assert all(record.captions or record.reject for record in found)
        path.unlink()
    assert num_read > 2
    assert list(map(escaped, said)) == list(said)


def held(i: int, kind: str) -> Any:
    """A cell with a picture in it."""
    return {"bytes": picture(i), "path": f"{i}.png"} if kind == "image" else picture(i)


def arrow_stream(path: Path, rows: list[Mapping[str, Any]]) -> None:
    """As `datasets` saves."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, content.schema) as writer:
        writer.write_table(content, max_chunksize=2)


@pytest.mark.parametrize("kind", ["image", "bytes"])
def test_pictures_inside_parquet(tmp_path: Path, kind: str) -> None:
    (tmp_path / "in" / "data").mkdir(parents=True)
    for split, numbers in (("train", (0, 1)), ("test", (2,))):
        for shard, i in enumerate(numbers):
            rows = [{"image": held(i, kind), "caption": [f"card {i}", "x"], "n": 3}, {"image": None, "caption": ["y"]}]
            name = f"in/data/{split}-{shard:05d}-of-{len(numbers):05d}.parquet"
            pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    summary = prepare(tmp_path / "in", tmp_path / "out")
    assert texts(tmp_path / "out") == [["card 0", "x"], ["card 1", "x"]]
    assert texts(tmp_path / "out", "test") == [["card 2", "x"]]
    assert summary["reasons"] == {"no file name": 3}
    assert samples(tmp_path / "out")[0]["meta"] == {"n": 3}


def test_columns_of_bytes_that_are_text(tmp_path: Path) -> None:
    """Spark, Hive and Impala can write all text as bytes."""
    columns = {
        "image": ["i/0.png", "i/1.png", "i/2.png"],
        "caption": ["café", "['one', 'two']", "three"],
        "split": ["train", "test", "train"],
        "place": ["Rome", "Oslo", None],
    }
    binary = {name: pa.array([cell and cell.encode() for cell in cells]) for name, cells in columns.items()}
    for name, table in (("all", binary), ("caption", {**columns, "caption": binary["caption"]})):
        source = write_files(tmp_path / name, THREE)
        pq.write_table(pa.table(table), source / "t.parquet")
        prepare(source, tmp_path / f"out_{name}")
        assert texts(tmp_path / f"out_{name}") == [["café"], ["three"]]
        assert texts(tmp_path / f"out_{name}", "test") == [["one", "two"]]
        assert [sample["meta"] for sample in samples(tmp_path / f"out_{name}")] == [{"place": "Rome"}, {}]


def test_columns_of_bytes_that_begin_without_content(tmp_path: Path) -> None:
    """Their first text is below the rows by which other columns are known, and below those that are read at once."""
    for num_empty in (30, 100):
        folder, out = tmp_path / str(num_empty), tmp_path / f"out_{num_empty}"
        cells = [None, b""] * (num_empty // 2) + [b"cat"]
        files = [f"{i}.png" for i in range(len(cells))]
        write_files(folder, {name: picture(i) for i, name in enumerate(files)})
        table = {"image": files, "text": files, "class": pa.array(cells), "place": pa.array(cells)}
        pq.write_table(pa.table(table), folder / "t.parquet")
        prepare(folder, out)
        last = samples(out)[-1]
        assert (last["class"], last["meta"]) == ("cat", {"place": "cat"})


def test_captions_as_bytes_of_another_encoding_are_no_pictures(tmp_path: Path) -> None:
    table = pa.table({"image": ["i/0.png", "i/1.png"], "caption": ["café".encode("latin-1"), b"plain"]})
    source = write_files(tmp_path / "in", THREE)
    pq.write_table(table, source / "t.parquet")
    prepare(source, tmp_path / "out")
    assert texts(tmp_path / "out") == [["plain"]]
    assert rejects(tmp_path / "out") == [("t.parquet", 0, "caption is not UTF-8", "write it as UTF-8")]


@pytest.mark.parametrize("caption", ["caption", "captions"])
def test_other_bytes_beside_the_names_of_pictures_are_no_pictures(tmp_path: Path, caption: str) -> None:
    texts_of_rows = [[b"one", b"two"], [b"three"]] if caption == "captions" else [b"one", b"three"]
    table = {"image": [0, 1], caption: texts_of_rows, "phash": [b"\xff\x00\x80", b"\x00\x01\x02"]}
    write_files(tmp_path / "in", {f"i/{i}.png": picture(i) for i in range(2)})
    pq.write_table(pa.table(table), tmp_path / "in" / "t.parquet")
    prepare(tmp_path / "in", tmp_path / "out")
    assert texts(tmp_path / "out") == [["one", "two"] if caption == "captions" else ["one"], ["three"]]
    assert samples(tmp_path / "out")[0]["meta"] == {}


def test_pictures_in_rows_that_are_not_complete_are_not_kept(tmp_path: Path) -> None:
    """All pictures come, then all of them again: their bytes would take 20 times as much."""
    rows = [{"image": picture(i % 100) + bytes(20_000), "caption": f"card {i}"} for i in range(200)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    source = find_source(str(tmp_path / "t.parquet"))
    shared = surveyed(source).shared
    tracemalloc.start()
    records = read_records(source, shared)
    first = next(records)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 100 * 5_000 + 64 * 20_500  # beside the rows that are read at once
    assert [caption.text for caption in first.captions] == ["card 0", "card 100"]
    assert isinstance(first.picture, PictureBytes)
    assert first.picture.content == rows[0]["image"]


def test_datasets_saved_to_disk(tmp_path: Path) -> None:
    for split, i in (("train", 0), ("validation", 3)):
        rows = [{"image": held(i + k, "image"), "text": f"card {i + k}"} for k in range(3)]
        arrow_stream(tmp_path / "in" / split / "data-00000-of-00001.arrow", rows)
        write_files(
            tmp_path / "in" / split, {"state.json": '{"_fingerprint": "x"}', "dataset_info.json": '{"text": 1}'}
        )
    write_files(tmp_path / "in", {"dataset_dict.json": '{"splits": ["train", "validation"]}'})
    prepare(tmp_path / "in", tmp_path / "out")
    assert texts(tmp_path / "out") == [["card 0"], ["card 1"], ["card 2"]]
    assert texts(tmp_path / "out", "validation") == [["card 3"], ["card 4"], ["card 5"]]
    prepare(tmp_path / "in" / "train" / "data-00000-of-00001.arrow", tmp_path / "one")
    assert texts(tmp_path / "one") == [["card 0"], ["card 1"], ["card 2"]]


def test_equal_pictures_in_a_table_are_one_and_big_ones_make_small_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlip_cli.data.sources.records.PART_BYTES", 3 * len(picture(0)))
    rows = [{"image": held(i % 20, "image"), "caption": f"card {i}"} for i in range(40)]
    (tmp_path / "in").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in" / "a.parquet", row_group_size=7)
    summary = prepare(tmp_path / "in" / "a.parquet", tmp_path / "out")
    assert texts(tmp_path / "out") == [[f"card {i}", f"card {i + 20}"] for i in range(20)]
    assert (summary["rows"], summary["pictures"]) == (40, 20)
    assert [sample["key"] for sample in samples(tmp_path / "out")] == [f"{i:09d}" for i in range(20)]


@pytest.mark.parametrize(
    ("captions", "warning"),
    [
        (["['a", "[b]", "[c d]", "x"], '3 of 4 captions look like lists: "[\'a", "[b]", "[c d]"'),
        (
            ["a/b.jpg", "c.png", "http://x/y z", "http://x/y"],
            '3 of 4 captions look like paths or addresses: "a/b.jpg", "c.png", "http://x/y"',
        ),
        (["1", "2.5", "10 20", "three"], '3 of 4 captions look like numbers: "1", "2.5", "10 20"'),
        (
            ["img_001", "00012345abcdef", "n01440764", "x y"],
            '3 of 4 captions look like ids: "img_001", "00012345abcdef", "n01440764"',
        ),
        (["<p>a</p>", "b<br>c", "R&amp;D", "d < e"], '3 of 4 captions look like HTML: "<p>a</p>", "b<br>c", "R&amp;D"'),
        (
            ["nan"] * 2 + ["NULL"] + ["x y"] * 2 + ["z", "v", "w"],
            '3 of 8 captions are words for a missing value: "nan", "NULL"',
        ),
        (
            ["b'a'", 'b"it\'s"', "b'b c'", "b'"],
            '3 of 4 captions look like bytes as Python shows them: "b\'a\'", "b"it\'s"", "b\'b c\'"',
        ),
        (["a photo"] * 6 + ["other"], '6 of 7 captions are the same: "a photo"'),
        (["a dog", "Dog", "2 dogs", "dog.", "a 4x4", "nan bread"], None),
    ],
)
def test_captions_that_hardly_anyone_means(captions: list[str], warning: str | None) -> None:
    looks = CaptionLooks()
    for text in captions:
        looks.look_at((Caption(text),))
    assert list(looks.warnings(are_classes=False))[:1] == ([warning] if warning else [])
