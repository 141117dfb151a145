"""How many patch tokens each block of an image tower sees. All is arithmetic: recipes are checked without torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, get_args

from mlip_cli.errors import UsageError
from mlip_cli.recipe.config import Frequency, Merging, Recipe

MOST_IN_ONE_MERGE = 0.35
"""A single merge of a larger share of the tokens leaves guidance little to decide."""

FEWEST_MERGES = 4
"""By default, where the tower has so many blocks for them: four merges of at most half each reach a rate of 0.9."""

DEFAULT = Merging()
"""The values of a recipe that names none."""


@dataclass(frozen=True)
class MergeMethod:
    """How a method reduces the number of tokens."""

    is_guided: bool = False
    """Guidance says which tokens to spare."""
    drops: bool = False
    """Tokens vanish; none are averaged."""


METHODS = {"guided": MergeMethod(is_guided=True), "tome": MergeMethod(), "random_drop": MergeMethod(drops=True)}
GUIDANCE: tuple[str, ...] = get_args(Merging.model_fields["guidance"].annotation)


def merge_method(name: str) -> MergeMethod:
    """The method of this name.

    Raises:
        UsageError: there is no such method; the message names those that exist.
    """
    if name not in METHODS:
        *others, last = METHODS
        raise UsageError(f"model.merging.method: unknown method {name}; use {', '.join(others)} or {last}")
    return METHODS[name]


def stem_depth(frequency: Frequency | None) -> int:
    """Number of spectral blocks at the start of the image tower; they see the whole grid."""
    return frequency.depth if frequency is not None and frequency.placement == "stem" else 0


def wrong_stem(frequency: Frequency, *, width: int | None, depth: int | None) -> list[tuple[str, str]]:
    """Mistakes of a stem in a tower of this width and depth: [(key of `model.frequency`, mistake and cure)].

    A size of None is unknown and not checked.
    """
    wrong = []
    if None not in (width, frequency.width) and frequency.width != width:
        wrong.append(("width", f"{frequency.width}, but the blocks of a stem are as wide as the tower; use {width}"))
    if depth is not None and frequency.depth >= depth:
        wrong.append(("depth", f"{frequency.depth} leaves no attention block in a tower of {depth} blocks; use less"))
    return wrong


def earliest_place(method: str, stem: int) -> int:
    """The first block before which the number of tokens can fall: the first one behind the stem.

    Without a stem tokens merge one block later, because no block has looked at the patches yet.
    """
    return stem + 1 if stem or merge_method(method).drops else 2


def default_places(depth: int, method: str = DEFAULT.method, *, stem: int = 0) -> tuple[int, ...]:
    """Blocks before which tokens merge or drop where the recipe names none.

    Drops need no features: before the first block behind the stem. Merges: before a third of the tower's blocks, four
    or more, from the earliest place on, each removing the same share: 4 -> (2, 3, 4), 6 and 12 -> (2, 3, 4, 5), 24 ->
    (2, ..., 9). A tower with fewer than four places cannot reach a rate of 0.9: 4 blocks reach 0.875, or 0.75 behind
    a stem of 2.

    Measured as 1000 x (1 - cosine) to the unmerged feature, on trained towers of width 128 and 64 patches
    (tests/ablation/results/merging). At equal tokens, summed over the blocks, several small merges move the features
    far less than two: 4 blocks 0.007 against 0.040 at 0.73 of the tokens, 12 blocks 0.007 at 0.60 against 0.080 at
    0.62. At equal CPU time, 12 blocks at 0.75 of the unmerged tower's: 0.007, against 0.080 with (3, 5) and about 0.1
    with (2, ..., 7), because a merge takes as long as half a block of such a narrow tower. With 4, 6 and 24 blocks the
    difference to two merges is within the noise there.
    """
    earliest = earliest_place(method, stem)
    if merge_method(method).drops:
        return (earliest,)
    last = min(earliest - 1 + max(depth // 3, FEWEST_MERGES), depth)
    return tuple(range(earliest, max(last, earliest) + 1))


def wrong_places(
    places: Sequence[int], *, depth: int | None, method: str = DEFAULT.method, stem: int = 0
) -> str | None:
    """The mistake of merges before these blocks, with its cure; None if there is none. `depth` None is not checked."""
    earliest = earliest_place(method, stem)
    shown = "[" + ", ".join(map(str, places)) + "]"
    if not places:
        return "no block given; name some, or set model.merging to null"
    if list(places) != sorted(set(places)):
        return f"{shown} does not ascend; name each block once, the first one first"
    if places[0] < earliest:
        return f"{shown} starts too early; the first place for {method} is {earliest}"
    if depth is not None and places[-1] > depth:
        cure = f"the last block is {depth}" if depth >= earliest else "set model.merging to null"
        return f"{shown} goes beyond the tower's depth {depth}; {cure}"
    return None


def merging_steps(total_steps: int, active: tuple[float, float]) -> range:
    """The steps in which tokens merge, counted from 1, for a part of the training given by two shares of its steps."""
    before, last = (round(share * total_steps) for share in active)
    return range(before + 1, last + 1)


@dataclass(frozen=True)
class MergePlan:
    """How many patch tokens each block sees. All numbers are Python integers, so shapes are static."""

    tokens: tuple[int, ...]
    """Patch tokens inside each block."""
    num_patches: int
    """Patch tokens before any merge."""
    method: str
    """A name in `METHODS`."""
    at: tuple[int, ...]
    """Blocks before which tokens merge or drop, counted from 1."""
    guidance: str = DEFAULT.guidance
    """A name in `GUIDANCE`; guided merging alone reads it."""
    strength: float = DEFAULT.strength
    """Guidance g in [0, 1] multiplies the cost of a merge by 1 + strength * g; guided merging alone reads it."""

    @property
    def rate(self) -> float:
        """Fraction of the patch tokens that is gone at the end of the tower, of whole tokens."""
        return 1 - self.tokens[-1] / self.num_patches

    @property
    def merges(self) -> dict[int, int]:
        """Block -> patch tokens after the merge before it."""
        return {block: self.tokens[block - 1] for block in self.at}

    @property
    def drops(self) -> bool:
        """Tokens vanish and do not merge."""
        return bool(self.at) and merge_method(self.method).drops

    @property
    def is_guided(self) -> bool:
        """Guidance says which tokens merge."""
        return bool(self.at) and merge_method(self.method).is_guided

    @property
    def asks_spatial(self) -> bool:
        """The guidance of the spatial domain is needed."""
        return self.is_guided and self.guidance != "frequency"

    @property
    def asks_frequency(self) -> bool:
        """The guidance of the frequency domain is needed."""
        return self.is_guided and self.guidance != "spatial"

    @property
    def largest_merge(self) -> float:
        """Largest share of tokens that one merge removes; 0 where tokens drop."""
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
        rate: float,
        at: Sequence[int] | None,
        method: str,
        guidance: str = DEFAULT.guidance,
        strength: float = DEFAULT.strength,
        stem: int = 0,
    ) -> Self:
        """The plan that spreads `rate` evenly (geometrically) over merges before the blocks `at`.

        Token counts are rounded to whole tokens. A merge that would remove none is left out of the plan.

        Raises:
            UsageError: an unknown method or guidance, a rate outside [0, 1), places outside the tower, a rate that
                removes no token, or a merge of more than half of the tokens; drops have no such limit.
        """
        drops = merge_method(method).drops
        if guidance not in GUIDANCE:
            raise UsageError(f"model.merging.guidance: unknown guidance {guidance}; there are {', '.join(GUIDANCE)}")
        if not 0 <= rate < 1:
            raise UsageError(f"merge rate {rate:g}: not in [0, 1); it is the fraction of the patch tokens to remove")
        if rate == 0:
            return cls((num_patches,) * depth, num_patches, method, (), guidance, strength)
        places = tuple(at) if at is not None else default_places(depth, method, stem=stem)
        wrong = wrong_places(places, depth=depth, method=method, stem=stem)
        if wrong:
            raise UsageError(f"model.merging.at: {wrong}")
        has_more_places = len(places) < len(range(earliest_place(method, stem), depth + 1))
        counts = _counts(num_patches, rate, places, drops=drops, has_more_places=has_more_places)
        if not counts:
            enough = math.ceil(1000 / num_patches) / 1000
            raise UsageError(
                f"merge rate {rate:g}: removes none of {num_patches} tokens; use 0, or at least {enough:g}"
            )
        tokens = tuple(
            min((count for place, count in counts.items() if place <= block), default=num_patches)
            for block in range(1, depth + 1)
        )
        return cls(tokens, num_patches, method, tuple(counts), guidance, strength)


def _counts(
    num_patches: int, rate: float, places: Sequence[int], *, drops: bool, has_more_places: bool
) -> dict[int, int]:
    """Block -> tokens from there on: each place removes the same share; places that would remove none are left out."""
    counts: dict[int, int] = {}
    before = num_patches
    for number, place in enumerate(places, start=1):
        count = max(1, round(num_patches * (1 - rate) ** (number / len(places))))
        if not drops and count < before - before // 2:
            cure = "lower the rate or add places to model.merging.at" if has_more_places else "lower the rate"
            raise UsageError(
                f"merge rate {rate:g}: the merge before block {place} would take {before} tokens to {count}, and one "
                f"merge removes at most half; {cure}"
            )
        if count < before:
            counts[place] = before = count
    return counts


def plan_for(
    merging: Merging | None, rate: float, method: str | None = None, *, depth: int, num_patches: int, stem: int
) -> MergePlan:
    """The plan for `rate`, with the places, guidance and strength of the recipe, or the defaults without any.

    `method` None is the recipe's method, or guided if the recipe drops patches, since only training drops.

    Raises:
        UsageError: no plan reaches the rate.
    """
    own = merging or DEFAULT
    drops = merge_method(own.method).drops
    method = method or ("guided" if drops else own.method)
    return MergePlan.resolve(
        depth=depth,
        num_patches=num_patches,
        rate=rate,
        at=own.at if drops == merge_method(method).drops else None,
        method=method,
        guidance=own.guidance,
        strength=own.strength,
        stem=stem,
    )


def plan_of_recipe(recipe: Recipe, rate: float, method: str | None = None) -> MergePlan | None:
    """The same for the recipe's image tower; None if timm names the tower, whose depth only torch knows."""
    vision = recipe.model.vision
    if vision.depth is None or vision.patch_size is None:
        return None
    num_patches = (recipe.data.image_size // vision.patch_size) ** 2
    stem = stem_depth(recipe.model.frequency)
    return plan_for(recipe.model.merging, rate, method, depth=vision.depth, num_patches=num_patches, stem=stem)
