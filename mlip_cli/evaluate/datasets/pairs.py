"""Data sets for retrieval: shards, what `prepare-data` reads, and Flickr30k and COCO in Karpathy's splits."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlip_cli.data.sources.find import find_source
from mlip_cli.data.sources.formats import DataSource, read_records
from mlip_cli.data.sources.records import PictureAddress, PicturePlace, Record
from mlip_cli.errors import RunError, UsageError
from mlip_cli.evaluate.datasets.benchmark import Benchmark
from mlip_cli.evaluate.datasets.find import data_root, find_benchmark
from mlip_cli.evaluate.wanted import VALIDATION
from mlip_cli.paths import check_utf8
from mlip_cli.recipe.config import Cache, Recipe, Source

if TYPE_CHECKING:
    from mlip_cli.data.dataset import RawSample
    from mlip_cli.evaluate.validation import PairSet

KARPATHY = {"flickr30k": "dataset_flickr30k.json", "coco": "dataset_coco.json"}
"""Data set -> its captions and splits by Karpathy and Fei-Fei (2015), beside the folders of pictures."""
PAIRS = "pairs:"
MEASURED_SPLITS = ("test", "validation")
"""The first of these that a source has is measured; all of a source without splits."""
NAMES = "validation, shards:PATH, pairs:PATH (whatever prepare-data reads), flickr30k or coco"


@dataclass(frozen=True)
class PairData(Benchmark):
    """A data set of pairs that was found."""

    sources: tuple[Source, ...] = field(default=(), compare=False)
    """Prepared shards, or tars as they are."""
    cache: Cache | None = field(default=None, compare=False)

    def open(self) -> "list[PairSet]":
        """Open it.

        Raises:
            UsageError, RunError: the data is damaged, or rows of its table cannot be used.
        """
        from mlip_cli.data.open import open_sources

        if self.sources:
            return list(open_sources(self.sources, cache=self.cache))
        return [_ListedPairs(self, _measured_records(self.name, find_source(str(self.root))))]


def find_pair_data(name: str, *, root: Path | None, recipes: Sequence[Recipe]) -> PairData:
    """The data set of pairs called `name`; `recipes` are those of the runs that it is for.

    Raises:
        UsageError: the data is not there, or `validation` is not the same for all runs.
    """
    check_utf8(name)
    if name == VALIDATION:
        return _validation(recipes)
    if name in KARPATHY:
        folder = data_root(root) / name
        path = folder / KARPATHY[name]
        if not path.is_file():
            cure = (
                "put the file of Karpathy's splits there, beside the folders of pictures, or name another --data-root"
            )
            raise UsageError(f"{name}: no {path.name} in {folder}; {cure}")
        return _listed(name, path)
    if name.startswith(PAIRS):
        path = Path(name.removeprefix(PAIRS))
        if name == PAIRS or not path.exists():
            raise UsageError(f"{name}: no such file or folder; write {PAIRS}PATH")
        return _listed(name, path)
    if name.startswith("shards:"):
        found = find_benchmark(name)
        return PairData(name, "pairs", found.root, found.fingerprint, (Source(path=str(found.root)),))
    raise UsageError(f"unknown data set {name!r} for retrieval; use {NAMES}")


def _listed(name: str, path: Path) -> PairData:
    source = find_source(str(path))
    return PairData(name, "pairs", path, source.fingerprint())


def _validation(recipes: Sequence[Recipe]) -> PairData:
    """The validation pairs of all runs that have some, which must be the same; a published CLIP has none."""
    given = [recipe.data.validation for recipe in recipes if recipe.data.validation]
    if not given:
        raise UsageError(f"{VALIDATION}: no recipe of these runs has data.validation; use shards:PATH or pairs:PATH")
    first, *others = given
    if any(other != first for other in others):
        cure = f"name one for all, as in --dataset shards:{first[0].path}"
        raise UsageError(f"{VALIDATION}: the runs have different data.validation; {cure}")
    root, cache = Path(first[0].path), recipes[0].data.cache
    kind = "pairs" if len(first) == 1 else VALIDATION  # one alone may also be named as shards:PATH
    return PairData(VALIDATION, kind, root, _fingerprint(first, cache), tuple(first), cache)


def _fingerprint(sources: Sequence[Source], cache: Cache) -> str:
    """As `merge-sweep` has it. Data that is not prepared, or lies elsewhere, must be opened for it."""
    from mlip_cli.data.open import open_sources

    return " ".join(dataset.fingerprint for dataset in open_sources(sources, cache=cache))


def _measured_records(name: str, source: DataSource) -> list[Record]:
    """The records of the split that is measured, one a picture.

    Raises:
        UsageError: there are none.
        RunError: some of them cannot be used: a measure over the others would be another measure.
    """
    from mlip_cli.data.sources.survey import surveyed

    records = list(read_records(source, surveyed(source).shared))
    splits = {record.split for record in records}
    wanted = next((split for split in MEASURED_SPLITS if split in splits), None)
    chosen = [record for record in records if wanted is None or record.split == wanted]
    if not chosen:
        raise UsageError(f"{name}: no pairs")
    if any(isinstance(record.picture, PicturePlace) and record.picture.is_compressed for record in chosen):
        raise UsageError(f"{name}: compressed tars; decompress them, or name what mlip prepare-data makes of them")
    if any(isinstance(record.picture, PictureAddress) for record in chosen):
        raise UsageError(f"{name}: its pictures are addresses; name what mlip prepare-data makes of them")
    wrong = [record for record in chosen if record.reject or record.picture is None]
    if wrong:
        first = f"{wrong[0].file}, row {wrong[0].row}: {wrong[0].reject}" + (
            f": {wrong[0].detail}" if wrong[0].detail else ""
        )
        cure = "repair them, or measure what mlip prepare-data makes of the others, as shards:OUT/test"
        raise RunError(f"{name}: {len(wrong):,} of {len(chosen):,} pairs cannot be used ({first}); {cure}")
    return chosen


class _ListedPairs:
    """Pairs that lie one by one, as files or in a table."""

    def __init__(self, data: PairData, records: Sequence[Record]) -> None:
        self.card: dict[str, Any] = {}
        self.fingerprint = data.fingerprint
        self.place = str(data.root.resolve())
        self._records = records

    @property
    def num_samples(self) -> int:
        """Number of pictures."""
        return len(self._records)

    def fetch(self) -> None:
        """All lies here."""

    def read(self, id: int) -> "RawSample":
        """One pair.

        Raises:
            BadSampleError: its picture cannot be read.
        """
        from mlip_cli.data.dataset import BadSampleError, RawSample
        from mlip_cli.data.pictures import RejectedPictureError
        from mlip_cli.data.prepare.parts import read_picture
        from mlip_cli.data.sources.tars import Stated

        record = self._records[id]
        assert record.picture is not None, "checked when the data set was opened"
        key = record.detail or f"{record.file}: row {record.row}"
        try:
            content = read_picture(record.picture)
        except RejectedPictureError as error:
            raise BadSampleError(self.place, key, str(error)) from None
        return RawSample(key, content, record.captions, Stated(record.captions, {}, None), self.place)
