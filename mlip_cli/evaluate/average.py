"""Measure averages of weights: all of them answer the same questions, in turn on each batch."""

from collections.abc import Sequence
from functools import partial

from mlip_cli.devices import batch_named
from mlip_cli.evaluate.average_results import AnsweredPoint, AveragedData, Coefficients
from mlip_cli.evaluate.datasets.benchmark import Benchmark
from mlip_cli.evaluate.datasets.open import open_benchmark
from mlip_cli.evaluate.datasets.pictures import batches
from mlip_cli.evaluate.measure import Candidate, measure
from mlip_cli.evaluate.retrieval import image_text_ranks
from mlip_cli.evaluate.validation import tokenize, validation_pairs
from mlip_cli.evaluate.wanted import VALIDATION
from mlip_cli.runs.average import AveragedEncoder, Mixture
from mlip_cli.runs.loading import LoadedRun
from mlip_cli.terminal.output import say
from mlip_cli.terminal.panel import progress


def measure_averages(
    loaded: LoadedRun, mixture: Mixture, benchmark: Benchmark | None, wanted: Sequence[Coefficients], *, batch_size: int
) -> list[AveragedData]:
    """The answers of the wanted averages to a data set, as one measure, or two for retrieval both ways.

    Args:
        loaded: the run whose model the mixture fills.
        benchmark: None: the validation set of the run's recipe.

    Raises:
        UsageError, RunError, OSError: the data is missing or damaged, weights give features that are not finite, or the
            device has too little memory for the batch.
    """
    encoders = [AveragedEncoder(mixture, coefficients) for coefficients in wanted]
    if benchmark is None:
        return _of_validation(loaded, encoders)
    return [_of_benchmark(benchmark, loaded, encoders, batch_size=batch_size)]


def _of_benchmark(
    benchmark: Benchmark, loaded: LoadedRun, encoders: Sequence[AveragedEncoder], *, batch_size: int
) -> AveragedData:
    """Top-1, or text to image R@1 where each name is a class. A picture is decoded once for all encoders."""
    pictures = open_benchmark(benchmark)
    say(f"{benchmark.words}: {pictures.in_words()}")
    data, is_cuda = loaded.recipe.data, loaded.device.type == "cuda"
    texts = partial(tokenize, loaded.tokenizer, loaded.device)
    candidates = [Candidate(own, own, texts, loaded.device) for own in encoders]
    with batch_named("--batch-size", batch_size), progress(pictures.num_pictures, benchmark.name) as bar:
        found = measure(
            pictures,
            partial(batches, pictures, data=data, batch_size=batch_size, read_ahead=is_cuda),
            candidates,
            dataset=benchmark.name,
            batch_size=batch_size,
            is_timed=False,
            on_batch=partial(bar.advance, bar.task_ids[0]),
        )
    key = "picture_r1" if pictures.asks_names_alone else "acc1"
    return AveragedData(
        dataset=benchmark.name,
        fingerprint=benchmark.fingerprint,
        measure=key,
        chance=found[0]["pictures"]["r1_chance"] if pictures.asks_names_alone else found[0]["chance"],
        points=[
            AnsweredPoint(coefficients=own.coefficients, right=scores["right"][key])
            for own, scores in zip(encoders, found, strict=True)
        ],
    )


def _of_validation(loaded: LoadedRun, encoders: Sequence[AveragedEncoder]) -> list[AveragedData]:
    """Recall at 5 both ways. The pictures stay decoded from one average to the next, where memory allows it."""
    pairs = validation_pairs(loaded.recipe, loaded.tokenizer, device=loaded.device)
    assert pairs is not None, "a recipe without data.validation"
    with progress(len(encoders) * pairs.num_pictures, VALIDATION) as bar:
        ranked = [
            image_text_ranks(
                *pairs.features(encoder, on_batch=lambda n: bar.advance(bar.task_ids[0], n)), pairs.own_texts
            )
            for encoder in encoders
        ]
    return [
        AveragedData(
            dataset=VALIDATION,
            fingerprint=pairs.fingerprint,
            measure=f"{way}_r5",
            chance=first.recalls(at=(5,))["r5_chance"],
            points=[
                AnsweredPoint(coefficients=encoder.coefficients, right=own[way].right(at=(5,))["r5"])
                for encoder, own in zip(encoders, ranked, strict=True)
            ],
            cluster_of=first.cluster_of,
        )
        for way, first in ranked[0].items()
    ]
