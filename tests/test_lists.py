"""Published lists of addresses: their columns, what is left out of them, and captions that others wrote for them."""

import gzip
import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sources_for_tests import picture, prepare, rejects, samples, write_files

from mlip_cli.data.open import open_prepared
from mlip_cli.data.sources.find import find_source
from mlip_cli.data.sources.formats import read_rows
from mlip_cli.data.sources.json_streams import JsonText
from mlip_cli.data.sources.json_tables import json_rows
from mlip_cli.data.sources.lists import LISTS, prepare_command
from mlip_cli.data.sources.records import PictureAddress, ReadOptions, Record
from mlip_cli.data.sources.survey import surveyed
from mlip_cli.data.sources.where import condition
from mlip_cli.errors import UsageError
from mlip_cli.recipe.load import load_recipe

URLS = [f"https://host{i % 3}.example/p/{i}.jpg" for i in range(12)]
DATACOMP = {
    "uid": [f"{i:032x}" for i in range(12)],
    "url": URLS,
    "text": [f"picture {i}" for i in range(12)],
    "original_width": [100 * i for i in range(12)],
    "original_height": [200] * 12,
    "clip_b32_similarity_score": [i / 10 for i in range(12)],
    "clip_l14_similarity_score": [None if i == 3 else i / 10 for i in range(12)],
    "face_bboxes": [[[0.1, 0.2, 0.3, 0.4]]] * 12,
    "sha256": [hashlib.sha256(str(i).encode()).hexdigest() for i in range(12)],
}
LAION = {
    "SAMPLE_ID": list(range(12)),
    "URL": URLS,
    "TEXT": [f"picture {i}" for i in range(12)],
    "WIDTH": [100.0] * 12,
    "similarity": [i / 10 for i in range(12)],
    "NSFW": ["UNLIKELY", "NSFW", "UNSURE"] * 4,
    "punsafe": [0.01] * 12,
}
COYO = {
    "id": [10**15 + i for i in range(12)],
    "url": URLS,
    "text": [f"picture {i}" for i in range(12)],
    "width": [640] * 12,
    "clip_similarity_vitb32": [0.3] * 12,
}
REDCAPS = {
    "info": {"start_date": "2017-01-01"},
    "annotations": [
        {"image_id": str(i), "author": "a", "url": url, "raw_caption": f"PICTURE {i}", "caption": f"picture {i}"}
        for i, url in enumerate(URLS)
    ],
}


def records(source: Path, folder: Path, **options: Any) -> list[Record]:
    """The rows of a source with the rules of the user."""
    read = ReadOptions(**options)
    return list(read_rows(find_source(str(source), read=read).with_rules(folder / "store")))


def pairs(found: Sequence[Record]) -> list[tuple[str, list[str]]]:
    """Address and captions of the records that are no rejects."""
    assert all(isinstance(record.picture, PictureAddress) for record in found if not record.reject)
    kept = [record for record in found if not record.reject]
    return [(record.picture.url, [c.text for c in record.captions]) for record in kept]  # type: ignore[union-attr]


def reasons(found: Sequence[Record]) -> list[tuple[int, str, str]]:
    return [(record.row, record.reject, record.detail) for record in found if record.reject]


def table(path: Path, columns: dict[str, list[Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


EXPECTED = [(url, [f"picture {i}"]) for i, url in enumerate(URLS)]


@pytest.mark.parametrize("preset", [None, "cc3m", "cc12m"])
@pytest.mark.parametrize("swapped", [True, False])
@pytest.mark.parametrize("name", ["list.tsv", "list.tsv.gz"])
def test_lists_of_two_columns_without_a_header(tmp_path: Path, preset: str | None, swapped: bool, name: str) -> None:
    lines = [f"picture {i}\t{url}" if swapped else f"{url}\tpicture {i}" for i, url in enumerate(URLS)]
    text = "\r\n".join(lines).encode()
    source = write_files(tmp_path, {name: gzip.compress(text) if name.endswith("gz") else text}) / name
    if preset in (None, "cc3m" if swapped else "cc12m"):
        found = records(source, tmp_path, preset=preset)
        assert pairs(found) == EXPECTED
        assert found[0].same == URLS[0]
        assert found[0].meta == {}
        return
    own = "caption, url" if preset == "cc3m" else "url, caption"
    with pytest.raises(UsageError) as error:
        records(source, tmp_path, preset=preset)
    assert str(error.value) == (
        f"{source}: --preset {preset}: found no http(s) address in column 'url' of the first rows, but picture 0; that "
        f"list has addresses in 'url' or 'image_url' and captions in 'caption' or 'text'; without a header the columns "
        f"are {own}; see --image-column without a preset"
    )


def test_quotes_and_odd_rows_of_a_list(tmp_path: Path) -> None:
    rows = [
        b'https://x/0.jpg\t"a lone quote',
        b"https://x/1.jpg\tNA",
        b"https://x/2.jpg\tnull",
        b"https://x/3.jpg\tcaf\xe9",
        b"https://x/4.jpg\t" + b"w " * 40_000,
        b"https://x/5.jpg\tone\ttoo many",
        b"https://x/6.jpg",
        b"\tno address",
        b"https://x/a b.jpg\ta space",
        b"  https://x/9.jpg \tspaces around",
        b"https://x/10.jpg\t",
        b"https://x/11.jpg\ta zero\0byte",
        b"file:///etc/passwd\ta file",
        b"https://x/13.jpg\tlast\rpiece",
    ]
    found = records(write_files(tmp_path, {"l.tsv": b"\n".join(rows)}) / "l.tsv", tmp_path, preset="cc12m")
    assert pairs(found) == [
        ("https://x/0.jpg", ['"a lone quote']),
        ("https://x/1.jpg", ["NA"]),
        ("https://x/2.jpg", ["null"]),
        ("https://x/a b.jpg", ["a space"]),
        ("https://x/9.jpg", ["spaces around"]),
        ("https://x/11.jpg", ["a zero\0byte"]),
        ("https://x/13.jpg", ["last"]),
    ]
    assert reasons(found) == [
        (3, "caption is not UTF-8", "write it as UTF-8"),
        (4, "caption too long", "79999 bytes, at most 65536"),
        (5, "row of 3 cells under 2 columns", ""),
        (6, "row of 1 cells under 2 columns", ""),
        (7, "no file name", ""),
        (10, "no caption", "https://x/10.jpg"),
        (12, "no http(s) address", "file:///etc/passwd"),
        (14, "row of 1 cells under 2 columns", ""),
    ]


@pytest.mark.parametrize("preset", [None, "cc12m"])
def test_files_that_a_list_names_are_not_read(tmp_path: Path, preset: str | None) -> None:
    write_files(tmp_path, {"secret.png": picture(0)})
    names = [*URLS, "secret.png", str(tmp_path / "secret.png"), f"file://{tmp_path}/secret.png", "ftp://x/a.png"]
    source = write_files(tmp_path, {"l.tsv": "".join(f"{name}\ta caption\n" for name in names)}) / "l.tsv"
    found = records(source, tmp_path, preset=preset)
    assert [record.reject for record in found] == [None] * 12 + ["no http(s) address"] * 4


def test_a_list_whose_first_row_has_no_address_has_no_header_either(tmp_path: Path) -> None:
    source = write_files(tmp_path, {"l.tsv": "\tno address\nhttps://x/1.jpg\tone\n"}) / "l.tsv"
    assert pairs(records(source, tmp_path, preset="cc12m")) == [("https://x/1.jpg", ["one"])]


@pytest.mark.parametrize(
    ("preset", "columns"), [("datacomp", DATACOMP), ("laion", LAION), ("coyo", COYO)], ids=lambda value: str(value)[:8]
)
def test_lists_as_parquet(tmp_path: Path, preset: str, columns: dict[str, list[Any]]) -> None:
    for part in range(12):  # in the order of their numbers
        table(
            tmp_path / "l" / f"part-{part}.parquet", {name: values[part : part + 1] for name, values in columns.items()}
        )
    found = records(tmp_path / "l", tmp_path, preset=preset)
    assert pairs(found) == EXPECTED
    left = {name for name in columns if name.lower() not in ("url", "text", "face_bboxes")}
    assert set(found[5].meta) == left  # lists of boxes are no plain values


def test_redcaps(tmp_path: Path) -> None:
    half = [{**REDCAPS, "annotations": REDCAPS["annotations"][at : at + 6]} for at in (0, 6)]  # type: ignore[index]
    files: dict[str, Any] = {"annotations/cats_2017.json": json.dumps(half[0], indent=1)}
    files["annotations/dogs_2017.json"] = json.dumps(half[1])
    source = write_files(tmp_path, files) / "annotations"
    assert pairs(records(source, tmp_path, preset="redcaps")) == EXPECTED
    raw = records(source, tmp_path, preset="redcaps", caption_column="raw_caption")
    assert pairs(raw)[1] == (URLS[1], ["PICTURE 1"])


def test_both_lists_of_yfcc15m(tmp_path: Path) -> None:
    lines = [json.dumps({"filename": f"{i}.jpg", "caption": c[0], "url": url}) for i, (url, c) in enumerate(EXPECTED)]
    titles = ["photoid,title,description,pageurl,downloadurl"]
    titles += [f"{i},picture {i},told of {i},http://flickr/{i},{url}" for i, url in enumerate(URLS)]
    write_files(tmp_path, {"v2.json": "\n".join(lines), "v1.csv": "\n".join(titles)})
    assert pairs(records(tmp_path / "v2.json", tmp_path, preset="yfcc15m_v2")) == EXPECTED
    found = pairs(records(tmp_path / "v1.csv", tmp_path, preset="yfcc15m_v1"))
    assert found == [(url, [f"picture {i}", f"told of {i}"]) for i, url in enumerate(URLS)]


@pytest.mark.parametrize("columns", ["title,description", "Title,Description", "title_clean,description_clean"])
def test_titles_as_yfcc100m_has_them_are_decoded(tmp_path: Path, columns: str) -> None:
    texts = ["My+cat%21", "100%25+caf%C3%A9", "1+%2B+1+%3D+2", "IMG_0520", "a%0Ab"]
    lines = [f"photoid,{columns},downloadurl"]
    lines += [f"{i},{text},told+of+{i},{URLS[i]}" for i, text in enumerate(texts)]
    source = write_files(tmp_path, {"v1.csv": "\n".join(lines)}) / "v1.csv"
    found = pairs(records(source, tmp_path, preset="yfcc15m_v1"))
    words = find_source(str(source), read=ReadOptions(preset="yfcc15m_v1")).table_plans[0].in_words()
    is_clean = "clean" in columns
    wanted = texts if is_clean else ["My cat!", "100% café", "1 + 1 = 2", "IMG_0520", "a\nb"]
    own = [f"told+of+{i}" if is_clean else f"told of {i}" for i in range(5)]
    assert found == [(URLS[i], [wanted[i], own[i]]) for i in range(5)]
    decoded = "; column {!r} and {!r} decoded, as My+cat%21 to My cat!".format(*columns.split(","))
    assert words.endswith(decoded) is not is_clean


def test_titles_are_decoded_where_descriptions_tell_that_they_are_encoded(tmp_path: Path) -> None:
    lines = ["title,description,downloadurl", *(f"IMG_{i},told+of+{i},{URLS[0]}" for i in range(250))]
    source = write_files(tmp_path, {"v1.csv": "\n".join([*lines, f"My+cat%21,,{URLS[1]}"])}) / "v1.csv"
    assert pairs(records(source, tmp_path, preset="yfcc15m_v1"))[-1] == (URLS[1], ["My cat!"])


def test_titles_that_are_decoded_stay_as_they_are(tmp_path: Path) -> None:
    lines = ["title,downloadurl", f"C++,{URLS[0]}", f"100%25 sure,{URLS[1]}"]
    source = write_files(tmp_path, {"v1.csv": "\n".join(lines)}) / "v1.csv"
    assert pairs(records(source, tmp_path, preset="yfcc15m_v1")) == [(URLS[0], ["C++"]), (URLS[1], ["100%25 sure"])]


def test_what_a_preset_is_refused_for(tmp_path: Path) -> None:
    source = table(tmp_path / "coyo.parquet", COYO)
    with pytest.raises(UsageError) as error:
        records(source, tmp_path, preset="redcaps")
    assert str(error.value) == (
        f"{source}: --preset redcaps: found columns id, url, text, width, clip_similarity_vitb32; that list has "
        "addresses in 'url' or 'image_url' and captions in 'caption' or 'raw_caption'; see --image-column without a "
        "preset"
    )
    with pytest.raises(UsageError, match=r"--preset cc4m: no such list; known are cc3m, .* laion and coyo"):
        records(source, tmp_path, preset="cc4m")
    write_files(tmp_path / "f", {"a/0.png": picture(0), "b/1.png": picture(1)})
    with pytest.raises(UsageError, match=r"--preset: for tables only, and .* is read as classes"):
        prepare(tmp_path / "f", tmp_path / "out", preset="coyo")


def test_a_column_of_addresses_is_found_without_a_preset(tmp_path: Path) -> None:
    assert pairs(records(table(tmp_path / "l.parquet", LAION), tmp_path)) == EXPECTED
    both = {**COYO, "image_path": [f"{i}.png" for i in range(12)]}
    read = ReadOptions()
    plan = find_source(str(table(tmp_path / "b.parquet", both)), read=read).table_plans[0]
    assert plan.chosen.image == "image_path"


def test_addresses_beside_pictures_tell_where_they_are_from(tmp_path: Path) -> None:
    files: dict[str, Any] = {
        "sources.csv": "url,title\nhttps://x/0.jpg,a\n",
        "a/0.png": picture(0),
        "b/1.png": picture(1),
    }
    found = find_source(str(write_files(tmp_path / "f", files)))
    assert found.format == "classes"
    assert found.unread_tables == {
        "sources.csv": "column 'url' holds addresses, and pictures are here; say --image-column url"
    }


def test_addresses_are_never_missing(tmp_path: Path) -> None:
    source = find_source(str(table(tmp_path / "l.parquet", COYO)))
    survey = surveyed(source)
    assert (survey.rows, survey.rejects, survey.missing, survey.addresses, survey.pictures) == (12, 0, 0, 12, 12)


def test_a_small_list_is_worth_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = table(tmp_path / "l.parquet", {**COYO, "image": [None] * 12})
    with pytest.raises(Exception):  # noqa: B017, PT011  (no picture is there)
        prepare(source, tmp_path / "out", preset="coyo", image_column="image")
    assert "--preset coyo: 12 rows; published were 746,972,269" in caplog.messages


@pytest.mark.parametrize("name", ["cc3m", "cc12m", "yfcc15m_v1", "yfcc15m_v2"])
def test_a_recipe_of_a_list_names_the_line_that_prepares_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = prepare_command(name, Path("data", name))
    path = Path(__file__).parents[1] / "recipes" / f"{name}.yaml"
    assert command == f"mlip prepare-data {LISTS[name].file} data/{name} --preset {name}"
    assert f"# Data first: {command}" in path.read_text()
    recipe = load_recipe(name).recipe
    assert [source.path for source in recipe.data.train] == [f"data/{name}/train"]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as error:
        open_prepared(Path(f"data/{name}/train"))
    assert str(error.value) == f"data/{name}/train: no such folder; make it with: {command}"


ROW = {"a": 1, "b": 0.5, "t": "0.7", "s": "Text", "e": "", "n": None, "nan": float("nan"), "odd name": 3, "id": "007"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a == 1 and b < 0.6", True),
        ("0 < a <= 1 < 2", True),
        ("t > 0.6", True),
        ("t > b", True),
        ("id == '007'", True),
        ("id == '7'", False),
        ("id == 7", True),
        ("s in ('Text', 'Other')", True),
        ("s not in ['Text']", False),
        ("a in (1, 2)", True),
        ("lower(s) == 'text'", True),
        ("len(s) == 4", True),
        ("`odd name` == 3", True),
        ("col('odd name') > -1", True),
        ("s == '`a`'", False),
        ("n > 1", None),
        ("not n > 1", None),
        ("nan < 1", None),
        ("e > 1", None),
        ("s > 1", None),
        ("n > 1 or a == 1", True),
        ("n > 1 and a == 2", False),
        ("n is None and nan is None and e is None", True),
        ("n == None", True),
        ("a is not None", True),
        ("a", True),
        ("not s", None),
        ("A == 1", True),
    ],
)
def test_conditions(text: str, expected: bool | None) -> None:
    assert condition(text, tuple(ROW)).test(ROW) is expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a > ", "--where 'a > ': cannot be read at its end; allowed are"),
        ("a > > 3", "--where 'a > > 3': cannot be read from '> 3' on; allowed are"),
        ("c > 3", "--where: no column 'c'; columns are a, b, t, s, e, n, nan, odd name, id"),
        ("__import__('os')", "--where: \"__import__('os')\": not a condition; allowed are"),
        ("a.b > 1", "--where: 'a.b': not allowed; allowed are"),
        ("a + 1 > 1", "--where: 'a + 1': not allowed; allowed are"),
        ("(lambda: 1)() > 1", "--where: '(lambda: 1)()': not allowed; allowed are"),
        ("f'{a}' == '1'", "--where: \"f'{a}'\": not allowed; allowed are"),
        ("s in s", "--where: 's': not a list of constants such as ('a', 'b'); allowed are"),
        ("a is 1", "--where: '1': only None can stand after `is`; allowed are"),
        ("len(a, b) > 1", "--where: 'len(a, b)': not allowed; allowed are"),
        ("a" + " > 1" * 2_000, "--where: 8,001 characters, at most 4,096"),
        ("(" * 3_000 + "a" + ")" * 1_000, "--where"),
        ("a > 1\0", "--where"),
        ("not " * 970 + "a", "--where: more than 100 conditions inside each other"),
    ],
)
def test_conditions_that_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        condition(text, tuple(ROW))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_rows_that_a_condition_leaves_out(tmp_path: Path) -> None:
    text = "clip_l14_similarity_score > 0.2 and original_width < 600"
    found = records(table(tmp_path / "l.parquet", DATACOMP), tmp_path, preset="datacomp", where=text)
    assert pairs(found) == [EXPECTED[4], EXPECTED[5]]
    told = reasons(found)
    assert told[3] == (3, "--where asks for a missing value", "clip_l14_similarity_score is missing")
    assert [row for row, reason, detail in told if (reason, detail) == ("left out by --where", text)] == [
        *(0, 1, 2),
        *range(6, 12),
    ]


def test_most_rows_may_be_left_out(tmp_path: Path) -> None:
    write_files(tmp_path / "in", {f"{i}.png": picture(i) for i in range(20)})
    lines = ["image,caption,score", *(f"{i}.png,card {i},{i}" for i in range(20))]
    write_files(tmp_path / "in", {"t.csv": "\n".join(lines)})
    prepared = prepare(tmp_path / "in/t.csv", tmp_path / "out", where="score >= 17")
    assert prepared["reasons"] == {"left out by --where": 17}
    assert prepared["request"]["where"] == "score >= 17"
    assert len(samples(tmp_path / "out")) == 3
    assert len(rejects(tmp_path / "out")) == 17
    with pytest.raises(UsageError, match="where score >= 17, now none"):
        prepare(tmp_path / "in/t.csv", tmp_path / "out")


@pytest.mark.parametrize("kind", ["npy", "txt"])
def test_uids(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    wanted = [DATACOMP["uid"][i] for i in (7, 2, 2)] + ["f" * 32]
    path = tmp_path / f"uids.{kind}"
    if kind == "npy":  # as DataComp's baselines write them
        np.save(path, np.array([(int(uid[:16], 16), int(uid[16:32], 16)) for uid in wanted], np.dtype("u8,u8")))
    else:
        path.write_text("\n".join(wanted).upper())
    read = ReadOptions(preset="datacomp", uids=str(path))
    source = find_source(str(table(tmp_path / "l.parquet", DATACOMP)), read=read).with_rules(tmp_path)
    found = list(read_rows(source))
    assert pairs(found) == [EXPECTED[2], EXPECTED[7]]
    assert reasons(found)[0] == (0, "not in --uids", DATACOMP["uid"][0])
    assert source.rules
    assert source.rules.uids
    assert source.rules.uids.unmet() == f"--uids {path}: no row has 1 of its 3 uids"


def test_ids_that_are_no_uids(tmp_path: Path) -> None:
    write_files(tmp_path, {"ids.txt": f"{COYO['id'][4]}\n{COYO['id'][9]}\n"})
    found = records(table(tmp_path / "l.parquet", COYO), tmp_path, uids=str(tmp_path / "ids.txt"))
    assert pairs(found) == [EXPECTED[4], EXPECTED[9]]


def test_ids_and_keys_with_half_a_pair_of_surrogates(tmp_path: Path) -> None:
    rows = [{"url": URLS[i], "text": f"t {i}", "id": "\ud800" if i == 1 else str(i)} for i in range(3)]
    captions = [{"id": row["id"], "caption": f"new {row['text']}"} for row in rows]
    write_files(tmp_path, {"ids.txt": "0\n1\n"})
    for name, lines in {"l.jsonl": rows, "c.jsonl": captions}.items():
        write_files(tmp_path, {name: "".join(f"{json.dumps(line)}\n" for line in lines)})
    source = tmp_path / "l.jsonl"
    assert reasons(records(source, tmp_path, uids=str(tmp_path / "ids.txt")))[0][:2] == (1, "not in --uids")
    found = records(source, tmp_path, captions_from=str(tmp_path / "c.jsonl"))
    assert [record.captions[0].text for record in found] == ["new t 0", "new t 1", "new t 2"]


@pytest.mark.parametrize(("unit", "year"), [("ns", 2116), ("us", 148108)])
@pytest.mark.parametrize("zone", [None, "Europe/Berlin"])
def test_times_that_python_cannot_hold(tmp_path: Path, unit: str, year: int, zone: str | None) -> None:
    times = pa.array([2**62 + 1, None], pa.timestamp(unit, zone))
    pq.write_table(pa.table({"url": URLS[:2], "text": ["a", "b"], "t": times}), tmp_path / "l.parquet")
    found = records(tmp_path / "l.parquet", tmp_path, where=f"t > '{str(year)[:4]}'")
    assert [len(record.captions) for record in found if not record.reject] == [1]
    assert reasons(found)[0][:2] == (1, "--where asks for a missing value")


def test_uids_that_are_refused(tmp_path: Path) -> None:
    source = table(tmp_path / "l.parquet", {"url": URLS, "text": DATACOMP["text"]})
    np.save(tmp_path / "floats.npy", np.zeros(3))
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    write_files(tmp_path, {"empty.txt": "\n", "one.txt": "1\n"})
    np.save(tmp_path / "whole.npy", np.zeros(3, "u8,u8"))
    whole = (tmp_path / "whole.npy").read_bytes()
    (tmp_path / "shape.npy").write_bytes(whole.replace(b"(3,)", b"(9999999999999999999999,)"))
    (tmp_path / "header.npy").write_bytes(whole.replace(b"(3,), }", b"exec(1)"))
    (tmp_path / "wide.txt").write_bytes("1\n".encode("utf-16-le"))
    for name, message in {
        "floats.npy": "an array of float64 and shape (3,); DataComp's are of u8,u8",
        "objects.npy": "not a whole .npy of numbers (Array can't be memory-mapped: Python objects in dtype.)",
        "empty.txt": "holds no uids",
        "shape.npy": "not a whole .npy of numbers (",
        "header.npy": "not a whole .npy of numbers (",
        "wide.txt": "neither a .npy nor a text with a uid a line: it has NULs",
        "gone.txt": "cannot be read (No such file or directory)",
    }.items():
        with pytest.raises(UsageError) as error:
            records(source, tmp_path, uids=str(tmp_path / name))
        assert str(error.value).startswith(f"--uids {tmp_path / name}: {message}")
    with pytest.raises(UsageError, match=r"--uids: no column of uids \(uid, key, id\); columns are url, text"):
        records(source, tmp_path, uids=str(tmp_path / "one.txt"))


def rewritten_csv(path: Path, key: str, keys: Sequence[str]) -> Path:
    lines = [f"{key},caption", *(f"{one},rewritten {place}" for place, one in enumerate(keys))]
    return write_files(path.parent, {path.name: "\n".join(lines)}) / path.name


def test_captions_of_another_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = table(tmp_path / "l.parquet", DATACOMP)
    uids = DATACOMP["uid"]
    more = rewritten_csv(tmp_path / "more.csv", "uid", [uids[8], uids[1], uids[8], "0"])
    found = pairs(records(source, tmp_path, preset="datacomp", captions_from=str(more)))
    assert found[1] == (URLS[1], ["rewritten 1"])
    assert found[8] == (URLS[8], ["rewritten 0", "rewritten 2"])
    assert found[0] == EXPECTED[0]
    added = pairs(records(source, tmp_path, preset="datacomp", captions_from=f"add:{more}"))
    assert added[8] == (URLS[8], ["picture 8", "rewritten 0", "rewritten 2"])
    by_url = rewritten_csv(tmp_path / "by_url.csv", "url", [URLS[3]])
    tsv = write_files(tmp_path, {"cc.tsv": "\n".join(f"{url}\t{c[0]}" for url, c in EXPECTED)}) / "cc.tsv"
    for preset in (None, "cc12m"):
        joined = pairs(records(tsv, tmp_path, preset=preset, captions_from=str(by_url)))
        assert joined[2:4] == [EXPECTED[2], (URLS[3], ["rewritten 0"])]


def test_captions_of_another_file_by_the_bytes_of_pictures(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files: dict[str, Any] = {}
    for i in range(4):
        files |= {f"{i}.png": picture(i), f"{i}.txt": f"own {i}"}
    write_files(tmp_path / "in", files)
    more = rewritten_csv(tmp_path / "m.csv", "sha256", [hashlib.sha256(picture(2)).hexdigest().upper()])
    with caplog.at_level("INFO", logger="mlip_cli"):
        prepared = prepare(tmp_path / "in", tmp_path / "out", captions_from=str(more))
    texts = [[caption["text"] for caption in sample["captions"]] for sample in samples(tmp_path / "out")]
    assert texts == [["own 0"], ["own 1"], ["rewritten 0"], ["own 3"]]
    assert f"captions of {more} for 1 sample" in caplog.messages
    assert prepared["request"]["captions_from_file"][0] == more.stat().st_size
    assert not (tmp_path / "out/.prepare").exists()
    more.write_text(more.read_text() + "\n")
    with pytest.raises(UsageError, match="the file of --captions-from has changed"):
        prepare(tmp_path / "in", tmp_path / "out", captions_from=str(more))


def test_captions_of_another_file_that_are_refused(tmp_path: Path) -> None:
    source = table(tmp_path / "l.parquet", DATACOMP)
    write_files(tmp_path, {"other.csv": "number,caption\n1,a\n", "empty.csv": "uid,caption\n,a\n1,\n"})
    for name, message in {
        "other.csv": "--captions-from: no column joins it: its columns are number, caption, those of the source uid, ",
        "empty.csv": "--captions-from: no row has 'uid' and a caption in column 'caption'",
    }.items():
        with pytest.raises(UsageError) as error:
            prepare(source, tmp_path / "out", preset="datacomp", captions_from=str(tmp_path / name))
        assert str(error.value).startswith(f"{tmp_path / name}: {message}")
        assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match=r"--captions-from gone.csv: cannot be read \(No such file or directory\)"):
        prepare(source, tmp_path / "out", captions_from="gone.csv")


@pytest.mark.parametrize("size", [1, 3, 7, 1 << 20])
def test_json_is_read_in_pieces(tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlip_cli.data.sources.json_streams.PIECE", size)
    document = {"n": 1234567, "info": {"a": [1, 2]}, "rows": [{"i": i, "é": 'q"\\'} for i in range(5)], "t": None}
    for indent in (None, 2):
        path = write_files(tmp_path, {"t.json": json.dumps(document, indent=indent, ensure_ascii=False)}) / "t.json"
        assert list(json_rows(path)) == document["rows"]
        path.write_text(json.dumps(document["rows"], indent=indent))
        assert list(json_rows(path)) == document["rows"]
    text = JsonText(io.StringIO("[1234, 56 ,7] "))
    assert list(text.items()) == [1234, 56, 7]
    text.expect_end()


@pytest.mark.parametrize("option", ["preset", "where", "captions_from"])
def test_an_option_without_a_value_is_not_passed_over(option: str, tmp_path: Path) -> None:
    source = table(tmp_path / "l.parquet", {"image": [b"x"], "caption": ["a"]})
    with pytest.raises(UsageError, match=f"--{option.replace('_', '-')}: nothing is given; give it a value"):
        prepare(source, tmp_path / "out", **{option: ""})
    assert not (tmp_path / "out").exists()
