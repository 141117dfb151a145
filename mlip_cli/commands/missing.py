"""Data of a recipe that is not there, named before the work."""

from collections.abc import Callable, Iterable, Iterator

from mlip_cli.errors import UsageError
from mlip_cli.evaluate.datasets.find import UnknownDataSetError, find_benchmark
from mlip_cli.recipe.config import Recipe, Source


def missing_data(recipe: Recipe, look: Callable[[Source], object]) -> Iterator[str]:
    """A line about each missing data set of the recipe, with its cure.

    Args:
        look: raises a UsageError where training data is missing.

    Raises:
        UnknownDataSetError: the recipe names an evaluation set that does not exist.
    """
    yield from missing_sources((*recipe.data.train, *(recipe.data.validation or ())), look)
    for name in recipe.evaluate.zeroshot:
        try:
            find_benchmark(name)
        except UnknownDataSetError:
            raise
        except UsageError as error:
            yield str(error)


def missing_sources(sources: Iterable[Source], look: Callable[[Source], object]) -> Iterator[str]:
    """A line about each source at which `look` raises a UsageError."""
    for source in sources:
        try:
            look(source)
        except UsageError as error:
            yield str(error)
