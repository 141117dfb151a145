"""Where the pointing measure meets data and models."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from mlip_cli.devices import batch_named
from mlip_cli.evaluate.datasets.find import Benchmark
from mlip_cli.evaluate.datasets.open import open_named
from mlip_cli.evaluate.datasets.pictures import batches
from mlip_cli.evaluate.evaluators import READERS, RunToMeasure, by_image_size
from mlip_cli.evaluate.mosaics import tile_size
from mlip_cli.evaluate.pointing import Pointer, Queries, measure_pointing
from mlip_cli.evaluate.validation import tokenize
from mlip_cli.model.pointing import pointing_queries, similarity_maps
from mlip_cli.runs.loading import LoadedRun, MergedEncoder
from mlip_cli.terminal.panel import progress

TEXTS_AT_ONCE = 256


def point_runs(benchmark: Benchmark, runs: Sequence[RunToMeasure], *, batch_size: int) -> list[list[dict[str, Any]]]:
    """Scores of each encoder of each run on a data set (see `evaluate.pointing.measure_pointing`), in the order given.

    Pictures are decoded once for all runs with the same image size. All runs see the same mosaics.

    Raises:
        UsageError, RunError, OSError: what is wrong with the data, or too little memory for the batch.
    """
    pictures = open_named(benchmark, READERS)

    def measure_together(size: int, group: list[RunToMeasure]) -> list[list[dict[str, Any]]]:
        tiles = batches(pictures, READERS, size=tile_size(size), batch_size=batch_size, read_ahead=True)
        with batch_named("--batch-size", batch_size), progress(2 * pictures.num_pictures, benchmark.name) as bar:
            return measure_pointing(
                pictures,
                tiles,
                [pointer(*run) for run in group],
                dataset=benchmark.name,
                batch_size=batch_size,
                on_batch=lambda n: bar.advance(bar.task_ids[0], n),
            )

    return by_image_size(runs, measure_together)


def pointer(loaded: LoadedRun, encoders: Sequence[MergedEncoder]) -> Pointer:
    """A run and its merge rates as what points."""

    def queries(texts: Sequence[str]) -> Queries:
        parts = [
            pointing_queries(loaded.model, tokenize(loaded.tokenizer, texts[start : start + TEXTS_AT_ONCE]).to(device))
            for start in range(0, len(texts), TEXTS_AT_ONCE)
        ]
        return {reading: torch.cat([part[reading] for part in parts]) for reading in parts[0]}

    device = loaded.device
    return Pointer(
        label=loaded.label,
        image_size=loaded.model.image_size,
        grid=loaded.model.vision.grid,
        device=device,
        queries=queries,
        maps=tuple(partial(similarity_maps, loaded.model, plan=encoder.plan) for encoder in encoders),
    )
