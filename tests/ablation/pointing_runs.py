"""Point with the checkpoints of a run in the mosaics of a prepared data set."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from ablation.mosaics import tile_size
from ablation.pointing import Pointer, Queries, measure_pointing
from ablation.pointing_maps import pointing_queries, similarity_maps

from mlip_cli.data.open import open_prepared
from mlip_cli.evaluate.validation import evaluation_loader, tokenize
from mlip_cli.runs.loading import LoadedRun, MergedEncoder

TEXTS_AT_ONCE = 256


def point(
    loaded: LoadedRun, encoders: Sequence[MergedEncoder], folder: Path, *, batch_size: int
) -> list[dict[str, float]]:
    """Accuracy of each merge rate by reading (see `measure_pointing`). A picture's name is its first caption."""
    dataset, image_size = open_prepared(folder), loaded.model.image_size
    loader = evaluation_loader(dataset, image_size=tile_size(image_size), batch_size=batch_size, num_workers=0)
    return measure_pointing(
        torch.cat(list(loader)),
        [dataset.read(id).captions[0].text for id in range(dataset.num_samples)],
        Pointer(
            label=f"{folder}: {loaded.label}",
            image_size=image_size,
            grid=loaded.model.vision.grid,
            device=loaded.device,
            queries=queries_of(loaded),
            maps=tuple(partial(similarity_maps, loaded.model, plan=encoder.plan) for encoder in encoders),
        ),
        batch_size=batch_size,
    )


def queries_of(loaded: LoadedRun) -> Callable[[Sequence[str]], Queries]:
    """What a model compares patches with, from names."""

    def queries(texts: Sequence[str]) -> Queries:
        parts = [
            pointing_queries(
                loaded.model, tokenize(loaded.tokenizer, texts[start : start + TEXTS_AT_ONCE]).to(loaded.device)
            )
            for start in range(0, len(texts), TEXTS_AT_ONCE)
        ]
        return {reading: torch.cat([part[reading] for part in parts]) for reading in parts[0]}

    return queries
