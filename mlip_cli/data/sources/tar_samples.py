"""From the members of a webdataset tar to its samples: preparing, training and evaluation all read tars by this.

A member's name is its folder, its key and its field: `a/b.c.jpg` is the field `jpg` of `a/b.c`, or, by webdataset's own
rule, the field `c.jpg` of `a/b`. Of each tar the rule is taken by which more samples have one picture and a text.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

from mlip_cli.data.sources.listing import PICTURE_ENDINGS, PassedOver, is_leftover
from mlip_cli.data.sources.records import MAX_TEXT_BYTES, UnusableSampleError
from mlip_cli.data.tar import Member
from mlip_cli.terminal.output import plural

PICTURE_FIELDS = (*PICTURE_ENDINGS, "img", "image")
TEXT_FIELDS = {"txt": ("txt", "caption", "text", "cap"), "json": ("json",), "cls": ("cls",)}
"""Texts of a sample -> their endings; the first ending that a sample has is read."""
FIELDS_OF = {"image": PICTURE_FIELDS, **TEXT_FIELDS}
"""Parts of a sample -> endings of the members that can be it."""
MOST_NAMED = 10
"""Damaged tars that are named; more are counted."""
READ_FIELDS = frozenset(ending for endings in FIELDS_OF.values() for ending in endings)


@dataclass(frozen=True)
class Columns:
    """Which fields of a sample are its picture and its captions, where the user names them."""

    image: str | None = None
    """Field of the picture, such as `input.jpg`."""
    caption: str | None = None
    """Key of KEY.json, or, with a dot, field of a text, such as `long.txt`."""

    @property
    def caption_field(self) -> str | None:
        """The field of the captions, if they are not a key of KEY.json."""
        return self.caption if self.caption is not None and "." in self.caption else None

    @property
    def caption_key(self) -> str | None:
        """The key of KEY.json, if the captions are not a field."""
        return self.caption if self.caption_field is None else None


GUESSED = Columns()


@dataclass
class TarNotes:
    """How tars were read, where that may surprise, and what of them is not read."""

    read_as: PassedOver = field(default_factory=PassedOver)
    passed_over: PassedOver = field(default_factory=PassedOver)
    num_damaged: int = 0
    """Damaged tars, of which the samples before the damage are used."""
    first_damaged: list[str] = field(default_factory=list)
    """What is said of the first of them."""

    def add_damage(self, damage: str, num_samples: int) -> None:
        """Count a damaged tar, by where and how it is damaged and the number of its samples before that."""
        self.num_damaged += 1
        if len(self.first_damaged) < MOST_NAMED:
            self.first_damaged.append(used_before(damage, num_samples))

    def tell_damage(self, place: str, *, num_tars: int, warn: Callable[[str], None]) -> None:
        """Name the first damaged tars and count the others."""
        for words in self.first_damaged:
            warn(words)
        if (num_others := self.num_damaged - len(self.first_damaged)) > 0:
            warn(f"{place}: {num_others} more tars are damaged, {self.num_damaged} of {num_tars}")

    def tell_readings(self, place: str, *, say: Callable[[str], None]) -> None:
        """Say how the tars were read, where that may surprise."""
        if self.read_as.counts:
            say(f"{place}: {self.read_as.in_words()}")

    def add(self, other: "TarNotes") -> None:
        """Count what another one counts."""
        self.read_as.update(other.read_as)
        self.passed_over.update(other.passed_over)


def used_before(damage: str, num_samples: int) -> str:
    """What is done about a damage."""
    return f"{damage}; {plural(num_samples, 'sample')} before it are used"


class TarSample(NamedTuple):
    """The members of one sample."""

    key: str
    fields: dict[str, Member]
    """Those with an ending that mlip reads, by field."""
    fault: str | None = None
    """Why it cannot be told which of its members belong together."""


def key_and_field(name: str, *, at_first_dot: bool) -> tuple[str, str]:
    """(`a/b.c`, `jpg`) of `a/b.c.JPG`, or (`a/b`, `c.jpg`) if the key ends at the first dot."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    key, _, own = base.partition(".") if at_first_dot else base.rpartition(".")
    return folder + slash + key, own.lower()


def ending_of(field: str) -> str:
    """`c.jpg` -> `jpg`."""
    return field.rpartition(".")[2]


def samples_of(
    members: Iterable[Member], columns: Columns, notes: TarNotes, *, tar: str, is_cut: bool = False
) -> tuple[list[TarSample], bool]:
    """The samples of a whole tar, by their first members, and whether their keys end at the first dot.

    Members of a key need not be neighbours. Where a field of a key is there twice, only neighbours are one sample.

    Args:
        notes: are added to.
        tar: name for the notes.
        is_cut: more members followed, which are lost: the sample of the last one is left out.
    """
    named = list(_readable(members, notes.passed_over))
    samples = _grouped(named, at_first_dot=False)
    at_first_dot = False
    if any(member.name.rpartition("/")[2].count(".") > 1 for member in named):
        others = _grouped(named, at_first_dot=True)
        at_first_dot = _value(others, columns) > _value(samples, columns)
        samples = others if at_first_dot else samples
    if at_first_dot:
        notes.read_as.add("tars whose keys end at the first dot of the name", tar)
    if is_cut and named:
        last, _ = key_and_field(named[-1].name, at_first_dot=at_first_dot)
        samples = [sample for sample in samples if sample.key != last]
    seen: set[str] = set()
    for key, _, _ in samples:
        if key in seen:
            notes.read_as.add("samples whose key was there before", f"{tar}: {key}")
        seen.add(key)
    return samples, at_first_dot


def parts_of_sample(sample: TarSample, columns: Columns) -> dict[str, Member]:
    """The members of a sample that are read, by part: image, txt, json and cls. Empty texts count as missing.

    Raises:
        UnusableSampleError: there is not one picture, it cannot be told which is meant, or a text is too long.
    """
    if sample.fault:
        raise UnusableSampleError(sample.fault, detail=", ".join(sample.fields))
    texts = {name: member for name, member in sample.fields.items() if member.size}
    picture = _chosen(sample.fields, "image", columns.image)
    if picture is None:
        raise UnusableSampleError("no picture", detail=_there(sample.fields, columns.image))
    chosen = {"image": picture}
    for part in TEXT_FIELDS:
        text = _chosen(texts, part, columns.caption_field if part == "txt" else None)
        if text is not None:
            chosen[part] = text
            if text.size > MAX_TEXT_BYTES:
                raise UnusableSampleError("caption too long", detail=text.name)
    return chosen


def _there(fields: Mapping[str, Member], wanted: str | None) -> str:
    return f"no field {wanted}; fields are {', '.join(fields)}" if wanted else ""


def _chosen(fields: Mapping[str, Member], part: str, wanted: str | None) -> Member | None:
    """The member that is a part: a plain field (`jpg`) goes before those of two parts (`mask.jpg`)."""
    if wanted is not None:
        return fields.get(wanted.lower())
    endings = FIELDS_OF[part]
    plain = [ending for ending in endings if ending in fields]
    if part != "image":
        plain = plain[:1]
    found = plain or [name for name in fields if ending_of(name) in endings]
    if len(found) > 1:
        what, option = ("pictures", "image") if part == "image" else ("texts", "caption")
        raise UnusableSampleError(
            f"several {what}",
            detail=f"{', '.join(found)}; name one by --{option}-column, or {option}_column in a recipe",
        )
    return fields[found[0]] if found else None


def _readable(members: Iterable[Member], passed_over: PassedOver) -> Iterator[Member]:
    """Members that hold bytes and are not hidden, without `./` in front of their names; others are counted."""
    for member in members:
        name = member.name.removeprefix("./")
        if any(is_leftover(part) for part in name.split("/") if part not in (".", "..")):
            continue
        base = name.rpartition("/")[2]
        ending = ending_of(base).lower()
        if not member.is_file:
            if base:  # else a folder
                passed_over.add("links, devices or sparse files", name)
        elif "." in base and ending in READ_FIELDS:
            yield member._replace(name=name)
        else:
            kind = f".{ending} members" if "." in base else "members without ending"
            passed_over.add(kind, name)


def _grouped(members: Sequence[Member], *, at_first_dot: bool) -> list[TarSample]:
    by_key: dict[str, list[tuple[int, str, Member]]] = {}
    for position, member in enumerate(members):
        key, own = key_and_field(member.name, at_first_dot=at_first_dot)
        by_key.setdefault(key, []).append((position, own, member))
    found: list[tuple[int, TarSample]] = []
    for key, parts in by_key.items():
        for run in [parts] if _is_one(parts) else _runs(parts):
            fields = {own: member for _, own, member in run}
            fault = None if _is_one(run) else "a field twice under one key"
            found.append((run[0][0], TarSample(key, fields, fault)))
    return [sample for _, sample in sorted(found, key=lambda item: item[0])]


def _is_one(parts: Sequence[tuple[int, str, Member]]) -> bool:
    """Whether no field occurs twice."""
    return len({own for _, own, _ in parts}) == len(parts)


def _runs(parts: Sequence[tuple[int, str, Member]]) -> Iterator[list[tuple[int, str, Member]]]:
    """The parts, cut into runs of neighbours in the tar."""
    for _, run in groupby(enumerate(parts), key=lambda item: item[1][0] - item[0]):
        yield [part for _, part in run]


def _value(samples: Sequence[TarSample], columns: Columns) -> tuple[int, int]:
    """How many samples are pairs of a picture and a text, and how few are not."""
    num_pairs = sum(_is_pair(sample, columns) for sample in samples)
    return num_pairs, num_pairs - len(samples)


def _is_pair(sample: TarSample, columns: Columns) -> bool:
    try:
        return len(parts_of_sample(sample, columns)) > 1
    except UnusableSampleError:
        return False
