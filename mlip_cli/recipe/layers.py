"""A later layer over an earlier one: a parent, the file that extends it, the command line.

Some keys exclude each other. Whoever sets one of them in a later layer need not remove the others from earlier ones.
"""

from dataclasses import dataclass
from typing import Any

from mlip_cli.recipe.checks import SIZES
from mlip_cli.recipe.config import FREQUENCY_LOSSES
from mlip_cli.recipe.schema import dotted
from mlip_cli.recipe.tree import Key, Tree, merge


@dataclass(frozen=True)
class Exclusion:
    """A value of `key` in a later layer sets `others` of earlier layers to null."""

    key: Key
    others: tuple[Key, ...]
    is_null: bool = False
    """Null excludes the others, not a value."""


STEPS, EPOCHS, TIMM, FREQUENCY, INIT, TOWER_INIT = (
    ("train", "steps"),
    ("train", "epochs"),
    ("model", "vision", "timm"),
    ("model", "frequency"),
    ("model", "init"),
    ("model", "vision", "init"),
)
OF_VISION: tuple[Key, ...] = tuple(("model", "vision", name) for name in SIZES)

EXCLUSIONS = (
    Exclusion(STEPS, (EPOCHS,)),
    Exclusion(EPOCHS, (STEPS,)),
    Exclusion(TIMM, OF_VISION),
    *(Exclusion(size, (TIMM,)) for size in OF_VISION),
    Exclusion(INIT, (TOWER_INIT,)),
    Exclusion(TOWER_INIT, (INIT,)),
    Exclusion(FREQUENCY, tuple(("losses", name) for name in FREQUENCY_LOSSES), is_null=True),
)

_ABSENT = object()


def layered(base: Tree, top: Tree) -> Tree:
    """`top` over `base`; what gave way is told in the notes."""
    tree = merge(base, top)
    for exclusion in EXCLUSIONS:
        given = _at(top.value, exclusion.key)
        if given is _ABSENT or (given is None) != exclusion.is_null:
            continue
        for other in exclusion.others:
            old = _at(tree.value, other)
            if _at(top.value, other) is not _ABSENT or old is _ABSENT or old is None:
                continue
            place = tree.place_of(other)
            _section(tree.value, other)[str(other[-1])] = None
            tree.places = {key: at for key, at in tree.places.items() if key[: len(other)] != other}
            tree.places[other] = tree.places[exclusion.key]
            setting = f"{dotted(exclusion.key)}: {'null' if given is None else given}"
            tree.notes.append(f"{setting} replaces {dotted(other)} of {place}, which is null now")
    return tree


def _at(value: Any, key: Key) -> Any:
    """The value of `key`, or `_ABSENT`."""
    for part in key:
        if not isinstance(value, dict) or part not in value:
            return _ABSENT
        value = value[part]
    return value


def _section(value: Any, key: Key) -> dict[str, Any]:
    """The section that holds `key`, which is there."""
    return value if len(key) == 1 else _section(value[key[0]], key[1:])
