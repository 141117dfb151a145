"""Measure encoders on data sets: for `eval-zeroshot`, for `merge-sweep` and during training."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from mlip_cli.data.tokenizer import Tokenizer
from mlip_cli.devices import batch_named
from mlip_cli.errors import UsageError
from mlip_cli.evaluate.before_after import Answers
from mlip_cli.evaluate.datasets.benchmark import Benchmark
from mlip_cli.evaluate.datasets.find import find_benchmark
from mlip_cli.evaluate.datasets.open import open_benchmark
from mlip_cli.evaluate.datasets.pictures import batches
from mlip_cli.evaluate.measure import NAME_RECALL_AT, Candidate, measure
from mlip_cli.evaluate.results import DIRECTIONS
from mlip_cli.evaluate.retrieval import RECALL_AT, image_text_ranks, in_batch, modality_gap
from mlip_cli.evaluate.statistics import BELOW_CHANCE, is_below_chance, metric_prefix
from mlip_cli.evaluate.together import OnBatch
from mlip_cli.evaluate.validation import BATCH_SIZE, DecodedBatches, ValidationPairs, tokenize
from mlip_cli.evaluate.wanted import VALIDATION
from mlip_cli.recipe.config import Recipe, Resize
from mlip_cli.runs.loading import LoadedRun, MergedEncoder
from mlip_cli.terminal.output import percent, plural, say
from mlip_cli.terminal.panel import progress
from mlip_cli.types import Encoder

WAYS = {"picture": "pictures", "name": "names"}
"""What is looked for among the names and pictures of a data set -> its recalls."""


@dataclass(frozen=True)
class Measures:
    """The result of an evaluator."""

    values: dict[str, float]
    """By name in metrics.jsonl: fractions such as `openmoji_mean_recall`, and the modality gap in [0, 2]."""
    words: str
    """The same in a line of text: in per cent, with chance and n."""
    chances: dict[str, float] = field(default_factory=dict)
    """Chance levels of values that have one."""
    answers: Sequence[Answers] = ()
    """To single questions, for paired tests."""


@dataclass(frozen=True)
class Evaluator:
    """A measure that is taken during training."""

    name: str
    """Name of the data set."""
    num_pictures: int
    metrics: tuple[str, ...]
    """Names of its values."""
    measure: Callable[[Encoder, OnBatch], Measures]
    """All ranks take part, and all of them get the result. Stops when OnBatch raises EvaluationStopped."""
    headline: str | None = None
    """The value that the panel follows."""


def measure_runs(
    benchmark: Benchmark, encoders: Sequence[tuple[LoadedRun, MergedEncoder]], *, batch_size: int
) -> list[dict[str, Any]]:
    """Scores of each run at its merge plan on a data set (see `evaluate.measure.measure`), in the order given.

    A picture is decoded once for all runs that see it alike. Each batch goes through all their encoders in turn.

    Raises:
        UsageError, RunError, OSError: the data is damaged, or the device has too little memory for the batch.
    """
    pictures = open_benchmark(benchmark)
    say(f"{benchmark.words}: {pictures.in_words()}")
    scores: dict[int, dict[str, Any]] = {}
    for data in {_view(loaded): loaded.recipe.data for loaded, _ in encoders}.values():
        candidates = {
            number: Candidate(
                encoder,
                loaded.model,
                partial(tokenize, loaded.tokenizer, loaded.device),
                loaded.device,
                loaded.label,
            )
            for number, (loaded, encoder) in enumerate(encoders)
            if _view(loaded) == (data.image_size, data.resize)
        }
        read_ahead = all(candidate.device.type == "cuda" for candidate in candidates.values())
        with batch_named("--batch-size", batch_size), progress(pictures.num_pictures, benchmark.name) as bar:
            found = measure(
                pictures,
                partial(batches, pictures, data=data, batch_size=batch_size, read_ahead=read_ahead),
                list(candidates.values()),
                dataset=benchmark.name,
                batch_size=batch_size,
                on_batch=partial(bar.advance, bar.task_ids[0]),
            )
        scores |= dict(zip(candidates, found, strict=True))
    return [scores[number] for number in range(len(encoders))]


def _view(loaded: LoadedRun) -> tuple[int, Resize]:
    return loaded.recipe.data.image_size, loaded.recipe.data.resize


def training_evaluators(
    recipe: Recipe,
    tokenizer: Tokenizer,
    pairs: ValidationPairs | None,
    *,
    device: torch.device | str = "cpu",
) -> list[Evaluator]:
    """The evaluators of `pretrain`: retrieval among the validation pairs, and each data set of `evaluate.zeroshot`.

    Raises:
        UsageError: a data set is missing, or no evaluator measures evaluate.best_metric.
    """
    where = torch.device(device)
    of_pairs = [] if pairs is None else [_retrieval_evaluator(pairs, recipe.train.global_batch_size)]
    benchmarks = [find_benchmark(name) for name in recipe.evaluate.zeroshot]
    evaluators = [*of_pairs, *(_zeroshot_evaluator(benchmark, recipe, tokenizer, where) for benchmark in benchmarks)]
    best, metrics = recipe.evaluate.best_metric, [metric for evaluator in evaluators for metric in evaluator.metrics]
    if best is not None and best not in metrics:
        known = ", ".join(metrics)
        raise UsageError(f"evaluate.best_metric: {best}: this recipe does not measure it; take one of {known}")
    return [replace(own, headline=best) if best in own.metrics else own for own in evaluators]


def _zeroshot_evaluator(benchmark: Benchmark, recipe: Recipe, tokenizer: Tokenizer, device: torch.device) -> Evaluator:
    data = recipe.data
    pictures = open_benchmark(benchmark)
    say(f"{benchmark.words}: {pictures.in_words()}")
    read_ahead = device.type == "cuda"
    read = partial(batches, pictures, data=data, batch_size=BATCH_SIZE, read_ahead=read_ahead)
    decoded = DecodedBatches(read, size=data.image_size)
    of_names = tuple(f"{way}_r{k}" for way in WAYS for k in NAME_RECALL_AT) if pictures.names else ()
    of_classes = () if pictures.asks_names_alone else ("mean_recall", "acc1")
    metrics = tuple(f"{metric_prefix(benchmark.name)}_{name}" for name in (*of_classes, *of_names))

    def evaluate(encoder: Encoder, on_batch: OnBatch) -> Measures:
        [scores] = measure(
            pictures,
            decoded.of,
            [Candidate(encoder, encoder, partial(tokenize, tokenizer, device), device)],
            dataset=benchmark.name,
            batch_size=BATCH_SIZE,
            is_timed=False,
            on_batch=on_batch,
        )
        found, chances = [], []
        if of_classes:
            found, chances = [scores["mean_per_class_recall"], scores["acc1"]], [scores["chance"]] * 2
        if pictures.names:
            recalls = [(scores[way], k) for way in WAYS.values() for k in NAME_RECALL_AT]
            found += [own[f"r{k}"] for own, k in recalls]
            chances += [own[f"r{k}_chance"] for own, k in recalls]
        values, levels = (dict(zip(metrics, own, strict=True)) for own in (found, chances))
        key = "picture_r1" if pictures.asks_names_alone else "acc1"
        answers = Answers(
            dataset=benchmark.name, fingerprint=benchmark.fingerprint, measure=key, right=scores["right"][key]
        )
        return Measures(values, zeroshot_words(scores), levels, [answers])

    return Evaluator(benchmark.name, pictures.num_pictures, metrics, evaluate, headline=metrics[0])


def zeroshot_words(scores: Mapping[str, Any]) -> str:
    """Scores of `evaluate.measure.measure` in a line of text."""
    recall, interval = scores["mean_per_class_recall"], scores["mean_per_class_recall_interval"]
    words = [
        f"mean recall {percent(recall)} % (chance {percent(scores['chance'])})",
        f"top-1 {percent(scores['acc1'])} %",
    ]
    if is_below_chance(interval, scores["chance"]):
        words.append(BELOW_CHANCE)
    if "names" in scores:
        asks_names_alone = scores["names"]["num_candidates"] == scores["num_classes"]
        words = [] if asks_names_alone else words
        for way, key in WAYS.items():
            own = scores[key]
            recalls = [f"R@{k} {percent(own[f'r{k}'])} % ({percent(own[f'r{k}_chance'])})" for k in NAME_RECALL_AT]
            words.append(f"{way} {', '.join(recalls)}")
    return f"{', '.join(words)}; {plural(scores['n'], 'picture')}"


def _retrieval_evaluator(pairs: ValidationPairs, batch_size: int) -> Evaluator:
    """Retrieval of all pictures and captions, top-1 in batches as large as in training, and the modality gap."""
    recalls = [(way, k) for way in DIRECTIONS for k in RECALL_AT]
    names = (*(f"{way}_r{k}" for way, k in recalls), "in_batch_acc1", "modality_gap")
    metrics = tuple(f"validation_{name}" for name in names)

    def evaluate(encoder: Encoder, on_batch: OnBatch) -> Measures:
        images, texts = pairs.features(encoder, on_batch=on_batch)
        ranked = image_text_ranks(images, texts, pairs.own_texts)
        scores = {way: own.recalls() for way, own in ranked.items()}
        batches = in_batch(images, texts, pairs.own_texts, batch_size=batch_size)
        gap = modality_gap(images, texts, pairs.own_texts)
        found = [*(scores[way][f"r{k}"] for way, k in recalls), batches.acc1, gap]
        words = (
            f"{retrieval_words(scores)}; in-batch top-1 {percent(batches.acc1)} % (chance {percent(batches.chance)}; "
            f"{batches.batch_size:,} pairs), modality gap {gap:.3f}"
        )
        chances = [*(scores[way][f"r{k}_chance"] for way, k in recalls), batches.chance]
        values, levels = dict(zip(metrics, found, strict=True)), dict(zip(metrics[:-1], chances, strict=True))
        answers = [
            Answers(
                dataset=VALIDATION,
                fingerprint=pairs.fingerprint,
                measure=f"{way}_r5",
                right=own.right()["r5"],
                cluster_of=own.cluster_of,
            )
            for way, own in ranked.items()
        ]
        return Measures(values, words, levels, answers)

    headline = "validation_text_to_image_r5"
    return Evaluator("validation", pairs.num_pictures, metrics, evaluate, headline=headline)


def retrieval_words(scores: Mapping[str, Mapping[str, Any]]) -> str:
    """Recalls both ways in a line of text, each with its number of queries."""
    ways = []
    for (way, name), query in zip(DIRECTIONS.items(), ("picture", "caption"), strict=True):
        found, chance = ("/".join(f"{percent(scores[way][f'r{k}{of}'])}" for k in RECALL_AT) for of in ("", "_chance"))
        ways.append(f"{name} {found} % (chance {chance}; {plural(scores[way]['n'], query)})")
    return f"R@{'/'.join(map(str, RECALL_AT))} {', '.join(ways)}"
