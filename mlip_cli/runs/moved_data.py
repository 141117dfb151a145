"""Data of a run that lies elsewhere now: its fingerprint decides whether it is the same, and its path does not."""

from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any

from mlip_cli.errors import UsageError
from mlip_cli.recipe.config import Recipe
from mlip_cli.runs.folder import Run

ROLES = {"data.train": "training", "data.validation": "validation"}
"""Key of the recipe -> role of its cards in data.json."""

Change = tuple[str, Any, Any]
"""Key of the recipe, old value, new value."""

DataPlace = tuple[str, str]
"""Folder or URL of a data set, and its fingerprint."""


def is_move(change: Change) -> bool:
    """Whether a change of the recipe is one of the paths of its data alone."""
    key, old, new = change
    if key not in ROLES or not old or not new:
        return False
    return [{**source, "path": ""} for source in old] == [{**source, "path": ""} for source in new]


def move_in_words(change: Change) -> str:
    """The line about data that was found elsewhere."""
    key, old, new = change
    moved = [f"{a['path']} -> {b['path']}" for a, b in zip(old, new, strict=True) if a["path"] != b["path"]]
    return f"{key}: the same data lies elsewhere now: {', '.join(moved)}"


def changed_data(before: Sequence[DataPlace], now: Sequence[DataPlace]) -> str:
    """Words for the data sets that are not what they were; an empty text if all fingerprints are equal."""
    pairs = zip_longest(before, now, fillvalue=("no data set", ""))
    return "; ".join(f"{_in_words(old)} is now {_in_words(new)}" for old, new in pairs if old[1] != new[1])


def changed_by_moves(run: Run, recipe: Recipe, changes: Iterable[Change]) -> str:
    """The same for those data sets of `run` whose path is another one in `recipe`; they are opened.

    Raises:
        UsageError: the data is not there, or the run's data.json is damaged.
        RunError: the data is damaged.
    """
    keys = [change[0] for change in changes if is_move(change)]
    cards = run.read_cards() if keys else {}
    found = []
    for key in keys:
        before = [(card.folder, card.fingerprint) for role, card in cards.items() if role.split()[0] == ROLES[key]]
        if before:  # otherwise the run ended before it had read anything
            from mlip_cli.data.open import open_sources

            sources = recipe.data.train if key == "data.train" else recipe.data.validation or ()
            datasets = open_sources(sources, cache=recipe.data.cache)
            found.append(changed_data(before, [(own.place, own.fingerprint) for own in datasets]))
    return "; ".join(filter(None, found))


def check_moves(run: Run, recipe: Recipe, changes: Iterable[Change]) -> None:
    """Check that data whose path has changed is the data that the run began with.

    Raises:
        UsageError: it is other data, or it is not there.
    """
    changed = changed_by_moves(run, recipe, changes)
    if changed:
        raise UsageError(
            f"--resume {run.folder}: this is not the data that the run began with: {changed}; name that data, or start "
            "a new run with another --out"
        )


def _in_words(place: DataPlace) -> str:
    path, fingerprint = place
    return f"{path} (fingerprint {fingerprint[:16]})" if fingerprint else path
