"""Values on the command line: how they are parsed, checked and completed. Imports nothing heavy."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import TypeVar

import typer

from mlip_cli.errors import UsageError
from mlip_cli.paths import read_dataset_name, read_path, read_place
from mlip_cli.recipe.init_source import read_init

T = TypeVar("T")

DATASETS = ("openmoji", "openmoji_combinations", "digits", "imagenet")
"""Names of our own data sets. As a RUN they are a mistake."""
FAMILIES = ("folder:", "shards:", "wds/")
"""Beginnings of other data sets' names."""


def split(text: str) -> list[str]:
    """`a,b` -> [a, b]. An empty part is an error."""
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise typer.BadParameter(f"{text!r} has an empty part; lists look like a,b")
    return parts


def _read(read: Callable[[str], T], text: str) -> T:
    """`read(text)`; its error also names the option or argument."""
    try:
        return read(text)
    except UsageError as error:
        raise typer.BadParameter(str(error)) from None


def checked_path(value: Path | None) -> Path | None:
    """A file or folder, as `read_path` reads it."""
    return None if value is None else Path(_read(read_path, str(value)))


def checked_file(text: str) -> Path:
    """The same for an option that may be repeated."""
    return Path(_read(read_path, text))


def checked_place(value: str | None) -> str | None:
    """A folder of this machine or a URL, as `read_place` reads it."""
    return None if value is None else _read(read_place, value)


def checked_text(value: str | None) -> str | None:
    """A path that may also be a name."""
    return None if value is None else _read(read_path, value)


def given_words(context: typer.Context, *, but: Collection[str]) -> list[str]:
    """The arguments and options that stand on the command line, by the names that help shows.

    Args:
        but: names of parameters that are left out.
    """
    words = []
    for own in context.command.params:
        assert own.name is not None
        source = context.get_parameter_source(own.name)
        if own.name not in but and source is not None and source.name == "COMMANDLINE":
            words.append(own.opts[0] if own.param_type_name == "option" else own.name.upper())
    return words


def split_datasets(text: str) -> list[str]:
    """`openmoji,folder:~/x` -> [openmoji, folder:/home/me/x]."""
    return [_read(read_dataset_name, name) for name in split(text)]


def split_rates(text: str) -> list[float]:
    """`0,0.3` -> [0.0, 0.3]; each in [0, 1)."""
    rates = []
    for part in split(text):
        try:
            rate = float(part)
        except ValueError:
            raise typer.BadParameter(f"{part!r} is not a number; rates look like 0,0.3,0.5") from None
        if not 0 <= rate < 1:
            raise typer.BadParameter(f"{part} is not in [0, 1); a rate is the fraction of patch tokens that merge away")
        rates.append(rate)
    return rates


def one_rate(text: str) -> float:
    """`0.3` -> 0.3, in [0, 1)."""
    rates = split_rates(text)
    if len(rates) > 1:
        raise typer.BadParameter(f"{text!r} is a list; give one rate")
    return rates[0]


MOST_WEIGHTS = 1_000


def split_weights(text: str) -> list[float]:
    """`0:1:0.25` -> [0, 0.25, 0.5, 0.75, 1]; `0,0.3` -> [0, 0.3]; each in [0, 1]."""
    parts = text.split(":") if ":" in text else split(text)
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not START:END:STEP and not a list; write 0:1:0.1 or 0,0.3,1") from None
    if ":" in text:
        numbers = _steps(text, numbers)
    if not all(0 <= number <= 1 for number in numbers):
        raise typer.BadParameter(f"{text!r} leaves [0, 1]; a weight is the share of the second run")
    return numbers


def _steps(text: str, numbers: list[float]) -> list[float]:
    """START, END, STEP -> the numbers from START to END; END is among them where STEP reaches it."""
    if len(numbers) != 3:
        raise typer.BadParameter(f"{text!r} is not START:END:STEP; write 0:1:0.1")
    start, end, step = numbers
    if not (step > 0 and start <= end and end - start <= step * MOST_WEIGHTS):
        raise typer.BadParameter(f"{text!r} is not a range of up to {MOST_WEIGHTS:,} steps; write 0:1:0.1")
    return [round(start + number * step, 10) for number in range(int((end - start) / step + 1e-9) + 1)]


def flat(lists: list[list]) -> list:
    """All values of an option that may repeat and may list values."""
    return [value for values in lists for value in values]


def checked_run(value: str) -> str:
    """Refuse a RUN that is a number: it is the tail of a list written with spaces."""
    path = _read(read_init, value)
    if value.replace(".", "", 1).isdigit() and not Path(path).exists():
        raise typer.BadParameter(f"{value!r} is a number, not a run; lists take commas, as in 0.3,{value}")
    return path


def checked_measured_run(value: str) -> str:
    """Refuse a RUN that is a number or the name of a data set."""
    path = _read(read_init, value)
    if (value in DATASETS or value.startswith(FAMILIES)) and not Path(path).exists():
        raise typer.BadParameter(
            f"{value!r} is a data set, not a run; name it with --dataset {value} (lists take commas)"
        )
    return checked_run(value)


def complete_recipe(incomplete: str) -> list[str]:
    """Names of recipes, for completion in the shell."""
    from mlip_cli.recipe import shipped

    return shipped.complete_recipe(incomplete)


def complete_override(context: typer.Context, incomplete: str) -> list[str]:
    """Keys and values of recipes, for completion in the shell."""
    from mlip_cli.recipe import shipped

    return shipped.complete_override(context.params.get("overrides") or [], incomplete)
