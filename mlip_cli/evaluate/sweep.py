"""A merge sweep: speed and scores of one model at several merge rates, beside the unmerged model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from mlip_cli import __version__
from mlip_cli.data.loader import decoded
from mlip_cli.data.prepare.summary import attributions
from mlip_cli.data.sources.listing import PassedOver
from mlip_cli.data.transforms import evaluation_transform
from mlip_cli.devices import batch_named, device_name
from mlip_cli.errors import UsageError
from mlip_cli.evaluate.datasets.benchmark import Benchmark
from mlip_cli.evaluate.datasets.find import OPENMOJI_SPLITS
from mlip_cli.evaluate.datasets.open import open_benchmark
from mlip_cli.evaluate.evaluators import measure_runs
from mlip_cli.evaluate.merge_points import Point, distortions, speeds
from mlip_cli.evaluate.results import (
    FailedData,
    PairedTest,
    Recalls,
    RetrievalAtSetting,
    RetrievalSweep,
    SweepResult,
    ZeroshotAtSetting,
    ZeroshotSweep,
)
from mlip_cli.evaluate.retrieval import right_answers
from mlip_cli.evaluate.retrieval_runs import ranks_of
from mlip_cli.evaluate.statistics import paired
from mlip_cli.evaluate.validation import ValidationPairs, validation_pairs
from mlip_cli.evaluate.wanted import FAILURES, VALIDATION, WantedData
from mlip_cli.files import read_object
from mlip_cli.recipe.config import Data
from mlip_cli.runs.folder import now
from mlip_cli.runs.loading import LoadedRun
from mlip_cli.runs.result_files import checked

PREPARED = frozenset({*OPENMOJI_SPLITS, "shards", "imagenet_shards"})
"""Kinds of data sets that `prepare-data` writes, with a card."""


DISTORTED_PICTURES = 1_000
"""Pictures of a data set on which the distortion is measured, or all if there are fewer."""


@dataclass(frozen=True)
class ChosenPicture:
    """A picture for people to look at."""

    number: int
    """In the data set, from 0."""
    label: str | None
    """Name of its class, or its first caption."""
    image: Tensor
    """(3, S, S) uint8, as the model gets it."""


@dataclass(frozen=True)
class SweepDataset:
    """A data set that was found."""

    name: str
    fingerprint: str
    attribution: tuple[str, ...]
    """The attributions that the licence of its pictures asks for."""
    measure: Callable[[Sequence[Point]], ZeroshotSweep | RetrievalSweep]
    """Scores all points, the unmerged first, on the same pictures; raises one of FAILURES."""
    choose: Callable[[int], list[ChosenPicture]]
    """Draws so many pictures at random with seed 0, in the order of the data set; raises one of FAILURES."""


def open_datasets(
    loaded: LoadedRun, wanted: WantedData, *, batch_size: int
) -> tuple[list[SweepDataset], dict[str, Exception]]:
    """The data sets that were found, and the errors of all others."""
    opened: list[SweepDataset] = []
    failures = dict(wanted.failures)
    for name, benchmark in wanted.found.items():
        try:
            own = _validation(loaded) if benchmark is None else _benchmark(benchmark, loaded, batch_size=batch_size)
        except FAILURES as error:
            failures[name] = error
        else:
            opened.append(own)
    return opened, failures


def numbers_at_random(wanted: int, num_pictures: int) -> list[int]:
    """Numbers of `wanted` pictures drawn with seed 0, ascending; all pictures if there are fewer."""
    order = torch.randperm(num_pictures, generator=torch.Generator().manual_seed(0))
    return sorted(order[:wanted].tolist())


def _benchmark(benchmark: Benchmark, loaded: LoadedRun, *, batch_size: int) -> SweepDataset:
    is_prepared = benchmark.kind in PREPARED
    cards = [read_object(benchmark.root / "dataset.json")] if is_prepared else []
    return SweepDataset(
        name=benchmark.name,
        fingerprint=benchmark.fingerprint,
        attribution=attributions(cards),
        measure=partial(accuracies, benchmark, loaded, batch_size=batch_size),
        choose=partial(_choose_of_benchmark, benchmark, loaded.recipe.data),
    )


def _choose_of_benchmark(benchmark: Benchmark, data: Data, wanted: int) -> list[ChosenPicture]:
    pictures = open_benchmark(benchmark)
    chosen = []
    for number in numbers_at_random(wanted, pictures.num_pictures):
        image, label = pictures.load(pictures.items[number])
        seen = evaluation_transform(image, size=data.image_size, resize=data.resize)
        chosen.append(ChosenPicture(number, pictures.class_names[label], seen))
    return chosen


def accuracies(benchmark: Benchmark, loaded: LoadedRun, points: Sequence[Point], *, batch_size: int) -> ZeroshotSweep:
    """Zero-shot scores of all points, each beside the unmerged model on the same pictures."""
    scores = measure_runs(benchmark, [(loaded, point.encoder) for point in points], batch_size=batch_size)
    unmerged = scores[0]
    return ZeroshotSweep(
        dataset=benchmark.name,
        fingerprint=benchmark.fingerprint,
        n=unmerged["n"],
        num_classes=unmerged["num_classes"],
        chance=unmerged["chance"],
        majority_share=unmerged["majority_share"],
        passed_over=PassedOver(**unmerged["passed_over"]),
        points=[
            checked(
                ZeroshotAtSetting,
                {
                    **vars(point.setting),
                    **own,
                    "agreement": agreement(unmerged["predicted"], own["predicted"]),
                    "paired": all_paired(unmerged["right"], own["right"]),
                },
            )
            for point, own in zip(points, scores, strict=True)
        ],
    )


def agreement(unmerged: str, merged: str) -> float:
    """Share of pictures that get the same class from both, right or wrong."""
    pairs = list(zip(unmerged.split(), merged.split(), strict=True))
    return sum(a == b for a, b in pairs) / len(pairs)


def all_paired(
    unmerged: Mapping[str, str], merged: Mapping[str, str], clusters: Mapping[str, Sequence[int] | None] | None = None
) -> dict[str, PairedTest]:
    """The paired test of each measure; `clusters` are those of the samples (see `statistics.paired`)."""
    return {
        measure: PairedTest(**paired(unmerged[measure], right, (clusters or {}).get(measure)))
        for measure, right in merged.items()
    }


def _validation(loaded: LoadedRun) -> SweepDataset:
    pairs = validation_pairs(loaded.recipe, loaded.tokenizer, device=loaded.device)
    if pairs is None:
        raise UsageError(f"{VALIDATION}: the recipe of {loaded.label} has no data.validation; name another data set")
    return SweepDataset(
        name=VALIDATION,
        fingerprint=pairs.fingerprint,
        attribution=attributions(dataset.card for dataset in pairs.datasets),
        measure=partial(retrieval, pairs),
        choose=partial(_choose_of_validation, pairs, loaded.recipe.data),
    )


def _choose_of_validation(pairs: ValidationPairs, data: Data, wanted: int) -> list[ChosenPicture]:
    numbers = numbers_at_random(wanted, pairs.num_pictures)
    samples = [(number, pairs.sample(number)) for number in numbers]
    return [
        ChosenPicture(
            number,
            sample.captions[0].text,
            evaluation_transform(decoded(sample), size=data.image_size, resize=data.resize),
        )
        for number, sample in samples
    ]


def retrieval(pairs: ValidationPairs, points: Sequence[Point]) -> RetrievalSweep:
    """Retrieval both ways by all points, each beside the unmerged model on the same pairs."""
    ranks = ranks_of(pairs, [point.encoder for point in points])
    unmerged = right_answers(ranks[0])
    clusters = {f"{way}_{k}": found.cluster_of for way, found in ranks[0].items() for k in found.right()}
    return RetrievalSweep(
        dataset=VALIDATION,
        fingerprint=pairs.fingerprint,
        n=pairs.num_pictures,
        num_texts=len(pairs.texts),
        points=[
            RetrievalAtSetting(
                **vars(point.setting),
                image_to_text=Recalls(**own["image_to_text"].recalls()),
                text_to_image=Recalls(**own["text_to_image"].recalls()),
                paired=all_paired(unmerged, right_answers(own), clusters),
            )
            for point, own in zip(points, ranks, strict=True)
        ],
    )


def measure_sweep(
    loaded: LoadedRun,
    points: Sequence[Point],
    datasets: Sequence[SweepDataset],
    failures: Mapping[str, Exception],
    *,
    batch_size: int,
    rounds: int,
) -> SweepResult:
    """Speed of all points, then their scores on each data set.

    Args:
        points: the unmerged model first.
        failures: errors of data sets that were not found.

    Raises:
        RunError: the device has no memory for the batch.
    """
    measured_at = now()
    with batch_named("--batch-size", batch_size):
        timed = speeds(loaded, points, batch_size=batch_size, rounds=rounds)
    scores: list[ZeroshotSweep | RetrievalSweep] = []
    failed = {name: str(error) for name, error in failures.items()}
    for dataset in datasets:
        try:
            found = dataset.measure(points)
            images = torch.stack([chosen.image for chosen in dataset.choose(DISTORTED_PICTURES)])
            moved = distortions(loaded, points, images, batch_size=batch_size)
            scores.append(replace(found, distortion=moved))
        except FAILURES as error:
            failed[dataset.name] = str(error)
    return SweepResult(
        measured_at=measured_at,
        mlip_version=__version__,
        run=loaded.label,
        checkpoint=loaded.checkpoint.name,
        step=loaded.step,
        image_size=loaded.model.image_size,
        device=str(loaded.device),
        device_name=device_name(loaded.device),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        precision=loaded.precision,
        batch_size=batch_size,
        rounds=rounds,
        points=timed,
        datasets=scores,
        failed=[FailedData(name, error) for name, error in failed.items()],
    )
