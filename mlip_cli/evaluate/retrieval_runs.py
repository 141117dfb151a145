"""Retrieval by several encoders on one data set of pairs: for `eval-zeroshot` and for `merge-sweep`."""

from collections.abc import Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

from mlip_cli.devices import batch_named
from mlip_cli.evaluate.datasets.pairs import PairData
from mlip_cli.evaluate.retrieval import Ranks, image_text_ranks, right_answers
from mlip_cli.evaluate.validation import ValidationPairs
from mlip_cli.runs.loading import LoadedRun, MergedEncoder
from mlip_cli.terminal.output import plural, say
from mlip_cli.terminal.panel import progress
from mlip_cli.types import Encoder


def ranks_of(pairs: ValidationPairs, encoders: Sequence[Encoder]) -> list[dict[str, Ranks]]:
    """What each encoder finds among the pairs, both ways.

    Raises:
        RunError: features are not finite, or a picture cannot be read.
    """
    found = []
    with progress(len(encoders) * pairs.num_pictures, pairs.place) as bar:
        for encoder in encoders:
            features = pairs.features(encoder, on_batch=partial(bar.advance, bar.task_ids[0]))
            found.append(image_text_ranks(*features, pairs.own_texts))
    return found


def measure_retrieval(
    data: PairData, encoders: Sequence[tuple[LoadedRun, MergedEncoder]], *, batch_size: int
) -> list[dict[str, Any]]:
    """Scores of each run at its merge plan on a data set of pairs, in the order given: fields of RetrievalResult.

    Raises:
        UsageError, RunError, OSError: the data is damaged, or the device has too little memory for the batch.
    """
    datasets = data.open()
    scores: list[dict[str, Any]] = [{} for _ in encoders]
    for loaded in {id(loaded): loaded for loaded, _ in encoders}.values():
        pairs = ValidationPairs(
            datasets,
            loaded.tokenizer,
            data=loaded.recipe.data,
            device=loaded.device,
            place=f"{data.name}: {loaded.label}",
            batch_size=batch_size,
        )
        say(f"{pairs.place}: {plural(pairs.num_pictures, 'picture')}, {plural(len(pairs.texts), 'caption')}")
        own = [number for number, (run, _) in enumerate(encoders) if run is loaded]
        with batch_named("--batch-size", batch_size):
            found = ranks_of(pairs, [encoders[number][1] for number in own])
        for number, ranks in zip(own, found, strict=True):
            scores[number] = _scores(pairs, ranks)
    return scores


def _scores(pairs: ValidationPairs, found: Mapping[str, Ranks]) -> dict[str, Any]:
    picture_of_text = found["text_to_image"].cluster_of
    return {
        "n": pairs.num_pictures,
        "num_texts": len(pairs.texts),
        **{way: own.recalls() for way, own in found.items()},
        "median_rank": {way: 1 + median(own.ranks.tolist()) for way, own in found.items()},
        "right": right_answers(found),
        "picture_of_text": None if picture_of_text is None else " ".join(map(str, picture_of_text)),
    }
