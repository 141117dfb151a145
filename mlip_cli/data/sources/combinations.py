"""What OpenMoji's code points say of a person, and which pictures no training sees.

A model that has seen "woman judge: dark skin tone" and "man singer: light skin tone" should find "woman singer: dark
skin tone" without having seen it. So some combinations of a skin tone or a gender with an activity are held out. Every
part of them stays in training: the activity, the gender, the skin tone, and each word of their names.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

COMBINATIONS = "combinations"

TEST_SHARE = 5
"""One family in this many goes to test."""
GENDER_SHARE = 5
"""Of one activity in this many that both genders do, one gender is held out, in all skin tones."""
TONE_SHARE = 4
"""One combination in this many of a skin tone with an activity and its gender is held out."""
SPLIT_RULE = (1, TEST_SHARE, GENDER_SHARE, TONE_SHARE)
"""Changes when the splits do: earlier prepared data is then another data set. The first number is the rule's own."""

TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}
PERSONS = ("1F468", "1F469", "1F9D1")
GENDERS = {"1F468": "man", "2642": "man", "1F469": "woman", "2640": "woman"}
DROPPED = ("FE0F", "200D", "2640", "2642", "27A1", *TONES)
"""Code points that vary a picture: presentation, joiner, gender, direction, skin tone."""
SPELLED_OUT = {"1F9D1-2764-1F9D1": "1F491", "1F9D1-2764-1F48B-1F9D1": "1F48F"}
"""Couples as person, heart, person -> their one code point: almost the same picture."""


@dataclass(frozen=True)
class Place:
    """Where a picture goes."""

    split: str
    unseen: str = ""
    """Of a held-out combination: what training does not show together."""


TRAIN = Place("train")
TEST = Place("test")
UNSEEN_TONE = Place(COMBINATIONS, "skin tone and activity")
UNSEEN_GENDER = Place(COMBINATIONS, "gender and activity")


@dataclass(frozen=True)
class Sample:
    """A picture as far as its split depends on it."""

    hexcode: str
    family: str
    """Pictures of one family are of one concept."""
    captions: Sequence[str]
    picture: str
    """Digest of the picture."""

    @property
    def activity(self) -> str:
        """What is shown, whoever it is and wherever they look."""
        return family_of(self.hexcode)

    @property
    def genders(self) -> tuple[str, ...]:
        """`man` or `woman` for each person whose gender is said."""
        return tuple(GENDERS[point] for point in self.hexcode.split("-") if point in GENDERS)

    @property
    def is_woman(self) -> bool:
        """OpenMoji draws a person without a gender often as the man, and never as the woman."""
        return set(self.genders) == {"woman"}

    @property
    def parts(self) -> set[str]:
        """What a model needs to have seen: the activity, and the words of the captions."""
        return {self.activity, *(word for caption in self.captions for word in re.findall(r"[\w-]+", caption))}


def family_of(hexcode: str) -> str:
    """Code points without presentation, joiner, skin tone, gender and direction. Man and woman become person."""
    points = [PERSONS[-1] if point in PERSONS else point for point in hexcode.split("-") if point not in DROPPED]
    family = "-".join(points)
    return SPELLED_OUT.get(family, family) or hexcode


def tones_of(hexcode: str) -> list[str]:
    """The skin tones in their order: two for some couples."""
    return [TONES[point] for point in hexcode.split("-") if point in TONES]


def places_of(samples: Sequence[Sample]) -> list[Place | None]:
    """The place of each sample; None: in no split.

    Whole families go to test, without their skin tones, so that no tested concept was seen in another colour or gender.
    Left out are held-out pictures and captions that are equal to one of training, or have a part that is not in it, and
    persons whose gender is not said where that of the others is held out: they often equal the man.
    """
    trained = [sample for sample in samples if not _is_tested(sample)]
    gendered = _with_both_genders(trained)
    chosen = {sample.hexcode: place for sample in trained if (place := _held_out(sample, gendered))}
    seen = [sample for sample in trained if sample.hexcode not in chosen]
    seen_parts = {part for sample in seen for part in sample.parts}
    pictures = {sample.picture for sample in seen}
    captions = {caption for sample in seen for caption in sample.captions}

    def placed(sample: Sample) -> Place | None:
        if _is_tested(sample):
            return None if tones_of(sample.hexcode) else TEST
        if sample.hexcode not in chosen:
            return TRAIN
        is_unclear = sample.activity in gendered and not sample.genders
        is_seen = sample.picture in pictures or not captions.isdisjoint(sample.captions)
        return None if is_unclear or is_seen or not sample.parts <= seen_parts else chosen[sample.hexcode]

    return [placed(sample) for sample in samples]


def _is_tested(sample: Sample) -> bool:
    return _is_drawn(sample.family, share=TEST_SHARE)


def _with_both_genders(samples: Iterable[Sample]) -> set[str]:
    """The activities that are shown with a man and with a woman."""
    found: dict[str, set[tuple[str, ...]]] = {}
    for sample in samples:
        found.setdefault(sample.activity, set()).add(sample.genders)
    return {activity for activity, genders in found.items() if {("man",), ("woman",)} <= genders}


def _held_out(sample: Sample, gendered: set[str]) -> Place | None:
    """The place of a sample whose combination is drawn. Couples are not: they have two skin tones or two genders."""
    tones = tones_of(sample.hexcode)
    if len(tones) > 1 or len(sample.genders) > 1:
        return None
    own = f"{sample.activity} {sample.is_woman}"
    if sample.activity in gendered and _is_drawn(f"gender {sample.activity}", share=GENDER_SHARE):
        return UNSEEN_GENDER if sample.is_woman == _is_drawn(f"woman {sample.activity}", share=2) else None
    return UNSEEN_TONE if tones and _is_drawn(f"{own} {tones[0]}", share=TONE_SHARE) else None


def _is_drawn(name: str, *, share: int) -> bool:
    """True for one name in `share`."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()) % share == 0
