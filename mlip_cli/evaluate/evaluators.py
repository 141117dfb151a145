"""Where evaluation meets data and models: for `eval-zeroshot`, for `merge-sweep` and for measures during training."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlip_cli.data.dataset import ShardDataset
from mlip_cli.data.prepare import pixels
from mlip_cli.data.tar import read_members
from mlip_cli.data.tokenizer import Tokenizer
from mlip_cli.data.transforms import decode, evaluation_transform, pil_to_uint8
from mlip_cli.devices import batch_named
from mlip_cli.errors import UsageError
from mlip_cli.evaluate.datasets.find import Benchmark, data_root, find_benchmark
from mlip_cli.evaluate.datasets.open import open_benchmark
from mlip_cli.evaluate.datasets.pictures import Pictures, Readers, batches
from mlip_cli.evaluate.measure import NAME_RECALL_AT, Candidate, measure
from mlip_cli.evaluate.retrieval import RECALL_AT, InBatch, image_text_retrieval, in_batch, modality_gap
from mlip_cli.evaluate.statistics import metric_prefix
from mlip_cli.evaluate.together import OnBatch
from mlip_cli.evaluate.validation import BATCH_SIZE, DecodedBatches, ValidationPairs, tokenize
from mlip_cli.recipe.config import Recipe
from mlip_cli.runs.loading import LoadedRun, MergedEncoder
from mlip_cli.terminal.output import percent, plural
from mlip_cli.terminal.panel import progress
from mlip_cli.types import Encoder

WAYS = {"image_to_text": "image to text", "text_to_image": "text to image"}

READERS = Readers(
    open_shards=ShardDataset,
    read_members=read_members,
    decode=decode,
    from_pil=pil_to_uint8,
    fit=lambda image, size: evaluation_transform(image, size=size),
    formats=pixels.FORMATS,
)


@dataclass(frozen=True)
class Measures:
    """What an evaluator found."""

    values: dict[str, float]
    """By their names in metrics.jsonl: fractions such as `openmoji_mean_recall`, and the modality gap in [0, 2]."""
    words: str
    """The same for a person, in per cent, with chance and n."""


@dataclass(frozen=True)
class Evaluator:
    """A measure of training."""

    name: str
    """Of the data set."""
    num_pictures: int
    metrics: tuple[str, ...]
    """Names of the values that it finds."""
    measure: Callable[[Encoder, OnBatch], Measures]
    """All ranks take part, and all of them get the result. Stops when OnBatch raises EvaluationStopped."""


RunToMeasure = tuple[LoadedRun, Sequence[MergedEncoder]]
"""A run and its merge rates."""


def by_image_size(
    runs: Sequence[RunToMeasure], measure_together: Callable[[int, list[RunToMeasure]], list[list[dict[str, Any]]]]
) -> list[list[dict[str, Any]]]:
    """Scores of each encoder of each run, in the order given; `measure_together` finds them for the runs of one image
    size, which share the decoded pictures."""
    order = sorted(range(len(runs)), key=lambda i: runs[i][0].model.image_size)
    scores: dict[int, list[dict[str, Any]]] = {}
    for size, group in groupby(order, key=lambda i: runs[i][0].model.image_size):
        numbers = list(group)
        scores |= dict(zip(numbers, measure_together(size, [runs[i] for i in numbers]), strict=True))
    return [scores[i] for i in range(len(runs))]


def measure_runs(benchmark: Benchmark, runs: Sequence[RunToMeasure], *, batch_size: int) -> list[list[dict[str, Any]]]:
    """Scores of each encoder of each run on a data set (see `evaluate.measure.measure`), in the order given.

    A picture is decoded once for all runs with the same image size, and each batch goes through all their encoders in
    turn.

    Raises:
        UsageError, RunError, OSError: what is wrong with the data, or too little memory for the batch.
    """
    pictures = open_benchmark(benchmark, READERS)

    def measure_together(size: int, group: list[RunToMeasure]) -> list[list[dict[str, Any]]]:
        candidates = [
            Candidate(tuple(encoders), partial(tokenize, loaded.tokenizer), loaded.device, loaded.label)
            for loaded, encoders in group
        ]
        read_ahead = all(candidate.device.type == "cuda" for candidate in candidates)

        def read(numbers: range) -> Iterator[tuple[Tensor, Tensor]]:
            return batches(pictures, READERS, size=size, batch_size=batch_size, read_ahead=read_ahead, numbers=numbers)

        with batch_named("--batch-size", batch_size), progress(pictures.num_pictures, benchmark.name) as bar:
            return measure(
                pictures,
                read,
                candidates,
                dataset=benchmark.name,
                batch_size=batch_size,
                on_batch=lambda n: bar.advance(bar.task_ids[0], n),
            )

    return by_image_size(runs, measure_together)


def training_evaluators(
    recipe: Recipe,
    tokenizer: Tokenizer,
    pairs: ValidationPairs | None,
    *,
    device: torch.device | str = "cpu",
    root: Path | None = None,
) -> list[Evaluator]:
    """What `pretrain` measures: retrieval among the validation pairs, and each data set of `evaluate.zeroshot`.

    Raises:
        UsageError: before any training: a data set is not there, or evaluate.best_metric is not measured.
    """
    where = torch.device(device)
    of_pairs = [] if pairs is None else [_retrieval_evaluator(pairs, recipe.train.global_batch_size)]
    benchmarks = [find_benchmark(name, root=data_root(root)) for name in recipe.evaluate.zeroshot]
    evaluators = [*of_pairs, *(_zeroshot_evaluator(benchmark, recipe, tokenizer, where) for benchmark in benchmarks)]
    best, metrics = recipe.evaluate.best_metric, [metric for evaluator in evaluators for metric in evaluator.metrics]
    if best is not None and best not in metrics:
        known = ", ".join(metrics)
        raise UsageError(f"evaluate.best_metric: {best}: this recipe does not measure it; take one of {known}")
    return evaluators


def _zeroshot_evaluator(benchmark: Benchmark, recipe: Recipe, tokenizer: Tokenizer, device: torch.device) -> Evaluator:
    size = recipe.data.image_size
    pictures = open_benchmark(benchmark, READERS)
    decoded = DecodedBatches(partial(_batches, pictures, size, device), size=size)
    of_names = tuple(f"name_r{k}" for k in NAME_RECALL_AT) if pictures.names else ()
    metrics = tuple(f"{metric_prefix(benchmark.name)}_{name}" for name in ("mean_recall", "acc1", *of_names))

    def evaluate(encoder: Encoder, on_batch: OnBatch) -> Measures:
        [[scores]] = measure(
            pictures,
            decoded.of,
            [Candidate((encoder,), partial(tokenize, tokenizer), device)],
            dataset=benchmark.name,
            batch_size=BATCH_SIZE,
            is_timed=False,
            on_batch=on_batch,
        )
        found = [scores["mean_per_class_recall"], scores["acc1"]]
        if pictures.names:
            found += [scores["names"][f"r{k}"] for k in NAME_RECALL_AT]
        return Measures(dict(zip(metrics, found, strict=True)), zeroshot_words(scores))

    return Evaluator(benchmark.name, pictures.num_pictures, metrics, evaluate)


def zeroshot_words(scores: Mapping[str, Any]) -> str:
    """Scores of `evaluate.measure.measure` in a line."""
    words = (
        f"mean recall {percent(scores['mean_per_class_recall'])} % (chance {percent(scores['chance'])}), "
        f"top-1 {percent(scores['acc1'])} %"
    )
    if names := scores.get("names"):
        recalls = [f"R@{k} {percent(names[f'r{k}'])} % ({percent(names[f'r{k}_chance'])})" for k in NAME_RECALL_AT]
        words += f", name {', '.join(recalls)}"
    return f"{words}; {plural(scores['n'], 'picture')}"


def _batches(pictures: Pictures, size: int, device: torch.device, numbers: range) -> Iterator[tuple[Tensor, Tensor]]:
    read_ahead = device.type == "cuda"
    return batches(pictures, READERS, size=size, batch_size=BATCH_SIZE, read_ahead=read_ahead, numbers=numbers)


def _retrieval_evaluator(pairs: ValidationPairs, batch_size: int) -> Evaluator:
    """All pictures against all distinct captions, pairs in batches as large as those of training, and the gap."""
    recalls = [(way, k) for way in WAYS for k in RECALL_AT]
    names = (*(f"{way}_r{k}" for way, k in recalls), "in_batch_acc1", "modality_gap")
    metrics = tuple(f"validation_{name}" for name in names)

    def evaluate(encoder: Encoder, on_batch: OnBatch) -> Measures:
        images, texts = pairs.features(encoder, on_batch=on_batch)
        scores = image_text_retrieval(images, texts, pairs.own_texts)
        batches = in_batch(images, texts, pairs.own_texts, batch_size=batch_size)
        gap = modality_gap(images, texts, pairs.own_texts)
        found = [*(scores[way][f"r{k}"] for way, k in recalls), batches.acc1, gap]
        words = f"{retrieval_words(scores)}; {pairs_words(batches, gap)}"
        return Measures(dict(zip(metrics, found, strict=True)), words)

    return Evaluator("validation", pairs.num_pictures, metrics, evaluate)


def retrieval_words(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """Recalls both ways in a line, each with its number of queries."""
    ways = []
    for (way, name), query in zip(WAYS.items(), ("picture", "caption"), strict=True):
        found, chance = ("/".join(f"{percent(scores[way][f'r{k}{of}'])}" for k in RECALL_AT) for of in ("", "_chance"))
        ways.append(f"{name} {found} % (chance {chance}; {plural(scores[way]['n'], query)})")
    return f"R@{'/'.join(map(str, RECALL_AT))} {', '.join(ways)}"


def pairs_words(batches: InBatch, gap: float) -> str:
    """What else is measured of the pairs."""
    found = f"{percent(batches.acc1)} % (chance {percent(batches.chance)}; {batches.batch_size:,} pairs)"
    return f"in-batch top-1 {found}, modality gap {gap:.3f}"
