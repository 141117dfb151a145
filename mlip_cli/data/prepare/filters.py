"""Which rows of a source are worth training on: rules for captions and pictures, alone or as a published set of them.

Each preset holds those rules of its publication that need no model of language or of pictures, and its comment says
what is left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice
from typing import Any, NamedTuple

from mlip_cli.data.sources.records import MAX_CAPTIONS, Record
from mlip_cli.errors import UsageError
from mlip_cli.terminal.output import plural

MAX_RADIUS = 4
"""Of the 64 bits of a perceptual hash. Different photographs differ in 7 bits at least, most in 20 to 40."""
EXCLUDED_RADIUS = 2
"""More than nine in ten photographs that were compressed or resized stay within it; equal hashes are six in ten. A
picture of an evaluation set that stays costs more than one of training that falls."""
DEDUPES = ("none", "bytes", "pixels", *(f"near:{radius}" for radius in range(MAX_RADIUS + 1)))
"""Words of --dedupe; each also leaves out what those before it do."""
OWN_SPLITS = ("validation", "test")
"""Words of --exclude for splits of the source itself."""


@dataclass(frozen=True)
class Cleaning:
    """What becomes a reject although it can be read. None: there is no such rule."""

    min_words: int | None = None
    """Words are what white space separates."""
    max_words: int | None = None
    min_characters: int | None = None
    max_characters: int | None = None
    min_side: int | None = None
    """Shorter side in pixels, before the picture is stored."""
    max_aspect: float | None = None
    """Longer side divided by the shorter one."""
    min_bytes: int | None = None
    """Of the picture as it lies in the source."""
    max_bytes: int | None = None
    dedupe: str = "none"
    """One of DEDUPES."""
    exclude: tuple[str, ...] = ()
    """Evaluation sets whose pictures stay out of training, and splits of the source, by name."""

    def request(self) -> dict[str, Any]:
        """The rules that are set, as prepared.json holds them; empty for data that is kept as it is."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in given.items()
            if value != getattr(AS_IT_IS, name)
        }

    @property
    def compares_looks(self) -> bool:
        """Whether anything reads the perceptual hashes, which cost a tenth of the time of a picture."""
        return self.radius is not None or bool(self.exclude)

    @property
    def excluded_radius(self) -> int:
        """The same for pictures of evaluation sets, which are always looked for in other sizes and formats."""
        return EXCLUDED_RADIUS if self.radius is None else self.radius

    @property
    def radius(self) -> int | None:
        """Bits in which perceptual hashes of near duplicates may differ; None: those are not looked for."""
        return int(self.dedupe.removeprefix("near:")) if self.dedupe.startswith("near:") else None


AS_IT_IS = Cleaning()
PRESETS = {
    # Basic filtering of Gadre et al. 2023 (DataComp, section 3.2 and baselines/apply_filter.py): more than 2 words,
    # more than 5 characters, shorter side 200 or more, aspect ratio 3 or less. Left out: fastText finds English.
    "datacomp_basic": Cleaning(min_words=3, min_characters=6, min_side=200, max_aspect=3.0),
    # Changpinyo et al. 2021 (Conceptual 12M, section 2.1): both sides over 400 pixels, aspect ratio 2.5 or less, 3 to
    # 256 words. Left out: a noun and a determiner in each caption, rare words, repeated words (the share is not
    # defined), detectors of pornography, agreement of picture and text, names of persons replaced; and JPEG alone,
    # because servers give the same pictures as WebP now.
    "cc12m": Cleaning(min_words=3, max_words=256, min_side=401, max_aspect=2.5),
    # Byeon et al. 2022 (COYO-700M, README): 5 KB or more, shorter side 200 or more, aspect ratio 3 or less; captions
    # longer than 5 characters and up to 1,000, 3 to 256 words. Left out: cld3 finds English, a noun in each caption,
    # captions that occur more than 10 times, detectors of pornography; for pictures of public data sets see --exclude.
    "coyo": Cleaning(
        min_words=3,
        max_words=256,
        min_characters=6,
        max_characters=1_000,
        min_side=200,
        max_aspect=3.0,
        min_bytes=5_000,
    ),
}


class Fault(NamedTuple):
    """Why something falls: `reason` in fixed words, `detail` with the value that was measured."""

    reason: str
    detail: str


REASONS = frozenset(
    (
        "caption too short",
        "caption of too many words",
        "caption of too many characters",
        "picture too small",
        "picture too long and narrow",
        "picture of too few bytes",
        "picture of too many bytes",
    )
)
"""Rows that fall for these reasons fall because the user asks for it: many of them are no sign of a wrong source."""


def cleaning_of(preset: str | None, given: Cleaning) -> Cleaning:
    """The rules of a preset, with those that were given one by one in the place of its own.

    Raises:
        UsageError: no such preset, no such word for --dedupe, or a range without values.
    """
    if preset is not None and preset not in PRESETS:
        *names, last = PRESETS
        raise UsageError(f"--clean {preset}: no such preset; use {', '.join(names)} or {last}")
    if given.dedupe not in DEDUPES:
        raise UsageError(
            f"--dedupe {given.dedupe}: no such way; use none, bytes, pixels or near:R with R from 0 to {MAX_RADIUS}"
        )
    own = {field.name: getattr(given, field.name) for field in fields(given)}
    changes = {name: value for name, value in own.items() if value != getattr(AS_IT_IS, name)}
    cleaning = replace(PRESETS[preset] if preset else AS_IT_IS, **changes)
    for what in ("words", "characters", "bytes"):
        least, most = getattr(cleaning, f"min_{what}"), getattr(cleaning, f"max_{what}")
        if least is not None and most is not None and least > most:
            raise UsageError(f"--min-{what} {least} is more than --max-{what} {most}: nothing would be left")
    return cleaning


def with_clean_captions(record: Record, cleaning: Cleaning) -> tuple[Record, int]:
    """A record with the first MAX_CAPTIONS captions that pass, or as a reject if none does.

    Returns:
        The record, and how many captions of it fell alone.
    """
    if record.reject:
        return record, 0
    faults = [caption_fault(caption.text, cleaning) for caption in record.captions]
    passed = (caption for caption, fault in zip(record.captions, faults, strict=True) if fault is None)
    kept = tuple(islice(passed, MAX_CAPTIONS))
    if kept:
        num_fallen = len(record.captions) - len(kept)
        return (replace(record, captions=kept), num_fallen) if num_fallen else (record, 0)
    fault = next(filter(None, faults))
    detail = f"{record.detail}: {fault.detail}" if record.detail else fault.detail
    return replace(record, reject=fault.reason, detail=detail), 0


def caption_fault(text: str, cleaning: Cleaning) -> Fault | None:
    """What is wrong with a caption."""
    words, characters = len(text.split()), len(text)
    return (
        _below(words, cleaning.min_words, "caption too short", "word")
        or _below(characters, cleaning.min_characters, "caption too short", "character")
        or _above(words, cleaning.max_words, "caption of too many words", "word")
        or _above(characters, cleaning.max_characters, "caption of too many characters", "character")
    )


def bytes_fault(num_bytes: int, cleaning: Cleaning) -> Fault | None:
    """What is wrong with the number of bytes of a picture."""
    return _below(num_bytes, cleaning.min_bytes, "picture of too few bytes", "byte") or _above(
        num_bytes, cleaning.max_bytes, "picture of too many bytes", "bytes"
    )


def size_fault(size: Sequence[int], cleaning: Cleaning) -> Fault | None:
    """What is wrong with width and height of a picture, in pixels as it is shown."""
    width, height = size
    shown = f"{width} x {height} pixels"
    if cleaning.min_side is not None and min(size) < cleaning.min_side:
        return Fault("picture too small", f"{shown}, shorter side at least {cleaning.min_side}")
    if cleaning.max_aspect is not None and max(size) > cleaning.max_aspect * min(size):
        ratio = f"{max(size) / min(size):.2f} to 1, at most {cleaning.max_aspect:g}"
        return Fault("picture too long and narrow", f"{shown}, {ratio}")
    return None


def _below(value: int, least: int | None, reason: str, unit: str) -> Fault | None:
    return Fault(reason, f"{plural(value, unit)}, at least {least:,}") if least is not None and value < least else None


def _above(value: int, most: int | None, reason: str, unit: str) -> Fault | None:
    return Fault(reason, f"{plural(value, unit)}, at most {most:,}") if most is not None and value > most else None
