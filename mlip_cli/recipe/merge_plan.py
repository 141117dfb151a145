"""How many patch tokens each block of an image tower sees: arithmetic, so that a recipe is checked without torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, get_args

from mlip_cli.errors import UsageError
from mlip_cli.recipe.config import Frequency, Merging

MOST_IN_ONE_MERGE = 0.35
"""Above this share a single merge leaves guidance little to decide."""

DEFAULT = Merging()
"""What a recipe leaves open."""

METHODS: tuple[str, ...] = get_args(Merging.model_fields["method"].annotation)
GUIDANCE: tuple[str, ...] = get_args(Merging.model_fields["guidance"].annotation)


def stem_depth(frequency: Frequency | None) -> int:
    """Blocks at the start of the image tower that are spectral and see the whole grid."""
    return frequency.depth if frequency is not None and frequency.placement == "stem" else 0


def wrong_stem(frequency: Frequency, *, width: int | None, depth: int | None) -> list[tuple[str, str]]:
    """What is wrong with a stem in a tower of this width and depth: [(key of `model.frequency`, what and the cure)].

    A size None is not known.
    """
    wrong = []
    if width is not None and frequency.width != width:
        wrong.append(("width", f"{frequency.width}, but a stem's blocks are the tower's; use {width}"))
    if depth is not None and frequency.depth >= depth:
        wrong.append(("depth", f"{frequency.depth} leaves no attention block of the tower's {depth}; use less"))
    return wrong


def earliest_place(method: str, stem: int) -> int:
    """The first block before which tokens can merge, behind an attention block, or drop, behind the stem at once."""
    return stem + 1 if method == "random_drop" else stem + 2


def default_places(depth: int, method: str = DEFAULT.method, *, stem: int = 0) -> tuple[int, ...]:
    """Two places in the first half of the tower: 4 -> (2, 4), 6 -> (2, 4), 12 -> (3, 5), 24 -> (6, 10).

    `random_drop` needs no features and drops before the first block. Behind a stem of so many blocks no place is too
    early: 12 with a stem of 2 -> (4, 6).
    """
    earliest = earliest_place(method, stem)
    if method == "random_drop":
        return (earliest,)
    first = max(earliest, depth // 4)
    second = first + max(2, depth // 6)
    return (first, second) if second <= depth else (first,)


def wrong_places(
    places: Sequence[int], *, depth: int | None, method: str = DEFAULT.method, stem: int = 0
) -> str | None:
    """What is wrong with merges before these blocks, and what to do; None for nothing. `depth` None is not known."""
    earliest = earliest_place(method, stem)
    shown = "[" + ", ".join(map(str, places)) + "]"
    if not places:
        return "no block given; name some, or set model.merging to null"
    if list(places) != sorted(set(places)):
        return f"{shown} does not ascend; name each block once, the first one first"
    if places[0] < 1:
        return f"{shown} starts before block 1; blocks count from 1"
    if places[0] < earliest and not stem:
        return f"{shown} starts at block 1, which no attention precedes to guide a merge; start at 2"
    if places[0] < earliest:
        behind = "the stem" if method == "random_drop" else "an attention block"
        return f"{shown} starts too early for a stem of depth {stem}; start at {earliest}, behind {behind}"
    if depth is not None and places[-1] > depth:
        cure = f"the last block is {depth}" if depth >= earliest else "set model.merging to null"
        return f"{shown} goes beyond the tower's depth {depth}; {cure}"
    return None


def largest_rate(num_patches: int, num_merges: int) -> float:
    """Rate that merges of at most half of the tokens reach, to three digits, rounded down."""
    left = num_patches
    for _ in range(num_merges):
        left -= left // 2
    return math.floor(1000 * (1 - left / num_patches)) / 1000


def merging_steps(total_steps: int, active: tuple[float, float]) -> range:
    """The steps of a training, counted from 1, in which tokens merge: those behind one share of it up to another."""
    before, last = (round(share * total_steps) for share in active)
    return range(before + 1, last + 1)


@dataclass(frozen=True)
class MergePlan:
    """How many patch tokens each block sees: Python integers, so shapes are static."""

    tokens: tuple[int, ...]
    """Patch tokens inside each block."""
    num_patches: int
    """Patch tokens before any merge."""
    num_prefix: int
    """Class and register tokens; they never merge."""
    method: str
    """`guided`, `tome` or `random_drop`."""
    at: tuple[int, ...]
    """Blocks before which tokens merge or drop, counted from 1."""
    guidance: str = DEFAULT.guidance
    """Of `guided`: `mixed`, `spatial`, `frequency` or `inverse`."""
    strength: float = DEFAULT.strength
    """Of `guided`: how much guidance in [0, 1] weighs against a cosine similarity."""

    @property
    def rate(self) -> float:
        """Fraction of the patch tokens that is gone at the end of the tower: the true one, after rounding."""
        return 1 - self.tokens[-1] / self.num_patches

    @property
    def merges(self) -> dict[int, int]:
        """Block -> patch tokens after the merge before it."""
        return {block: self.tokens[block - 1] for block in self.at}

    @property
    def drops(self) -> bool:
        """Tokens vanish and do not merge."""
        return bool(self.at) and self.method == "random_drop"

    @property
    def asks_space(self) -> bool:
        """The guidance of the spatial domain is needed."""
        return bool(self.at) and self.method == "guided" and self.guidance != "frequency"

    @property
    def asks_frequency(self) -> bool:
        """The guidance of the frequency domain is needed."""
        return bool(self.at) and self.method == "guided" and self.guidance != "spatial"

    @property
    def largest_merge(self) -> float:
        """Largest share of tokens that one merge removes; a drop merges nothing."""
        if self.drops:
            return 0.0
        before = (self.num_patches, *self.tokens)
        return max((1 - self.tokens[b - 1] / before[b - 1] for b in self.at), default=0.0)

    @classmethod
    def resolve(
        cls,
        *,
        depth: int,
        num_patches: int,
        num_prefix: int,
        rate: float,
        at: Sequence[int] | None,
        method: str,
        guidance: str = DEFAULT.guidance,
        strength: float = DEFAULT.strength,
        stem: int = 0,
        multiple_of: int = 8,
    ) -> Self:
        """Spread `rate` evenly (geometrically) over the merges before the blocks `at`, less those that remove nothing.

        A token count is rounded so that patches and prefix together are a `multiple_of`, where that changes the rate
        by less than 0.02 and by less than half, and leaves the next merge no more than half to remove.

        Raises:
            UsageError: an unknown method, a rate that is none, places outside the tower, a rate that removes nothing,
                or one that needs a merge to remove more than half of the tokens; drops have no such limit.
        """
        for name, value, known in (("method", method, METHODS), ("guidance", guidance, GUIDANCE)):
            if value not in known:
                raise UsageError(f"model.merging.{name}: {value} is none; there are {', '.join(known)}")
        if not 0 <= rate < 1:
            raise UsageError(f"merge rate {rate:g}: not in [0, 1); it is the fraction of the patch tokens that goes")
        if rate == 0:
            return cls((num_patches,) * depth, num_patches, num_prefix, method, (), guidance, strength)
        places = tuple(at) if at is not None else default_places(depth, method, stem=stem)
        wrong = wrong_places(places, depth=depth, method=method, stem=stem)
        if wrong:
            raise UsageError(f"model.merging.at: {wrong}")
        counts: dict[int, int] = {}
        before = num_patches
        all_wanted = [max(1, round(num_patches * (1 - rate) ** (i / len(places)))) for i in range(1, len(places) + 1)]
        for place, wanted, then in zip(places, all_wanted, (*all_wanted[1:], None), strict=True):
            rounded = round((wanted + num_prefix) / multiple_of) * multiple_of - num_prefix
            least = 1 if method == "random_drop" else before - before // 2
            tolerated = min(0.02 * num_patches, (num_patches - wanted) / 2)
            leads_on = then is None or method == "random_drop" or rounded - rounded // 2 <= then
            fits = least <= rounded < before and abs(rounded - wanted) < tolerated and leads_on
            count = rounded if fits else wanted
            if count < least:
                raise UsageError(_beyond_half(rate, places, place, before, count, num_patches))
            if count < before:
                counts[place] = before = count
        if not counts:
            enough = math.ceil(1000 / num_patches) / 1000
            raise UsageError(f"merge rate {rate:g}: removes none of {num_patches} tokens; use 0, or {enough:g} or more")
        tokens = tuple(
            min((count for place, count in counts.items() if place <= block), default=num_patches)
            for block in range(1, depth + 1)
        )
        return cls(tokens, num_patches, num_prefix, method, tuple(counts), guidance, strength)


def _beyond_half(rate: float, places: Sequence[int], place: int, before: int, count: int, num_patches: int) -> str:
    blocks = f"block{'s' if len(places) > 1 else ''} {', '.join(map(str, places))}"
    return (
        f"merge rate {rate:g}: the merge before block {place} would take {before} tokens to {count}, and one merge "
        f"removes at most half; with merges before {blocks} the largest rate is "
        f"{largest_rate(num_patches, len(places)):g}; lower the rate or add places to model.merging.at"
    )
