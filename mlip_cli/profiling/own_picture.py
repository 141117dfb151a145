"""Whether token losses look at the picture: each loss with the right pictures, and with those of other captions."""

from collections.abc import Sequence
from contextlib import closing

import torch

from mlip_cli.data.dataset import ShardDataset
from mlip_cli.errors import RunError, UsageError
from mlip_cli.losses.features import features_of, with_other_pictures
from mlip_cli.losses.objective import Objective
from mlip_cli.model.clip import CLIP
from mlip_cli.profiling.loader import training_batches
from mlip_cli.profiling.result import LossOfPictures
from mlip_cli.profiling.subject import ProfiledModel
from mlip_cli.recipe.config import GlobalLoss
from mlip_cli.terminal.output import say
from mlip_cli.train.gradients import captions_counted
from mlip_cli.types import Batch, Encoded


def losses_of_pictures(
    profiled: ProfiledModel, datasets: Sequence[ShardDataset], *, batch_size: int
) -> tuple[LossOfPictures, ...]:
    """Each token loss of a trained model on one training batch; none without data, or for random weights."""
    recipe = profiled.recipe
    names = [name for name, term in Objective(recipe.losses).terms.items() if not isinstance(term, GlobalLoss)]
    if profiled.run is None or not datasets or not names:
        return ()
    size = min(batch_size, sum(dataset.num_samples for dataset in datasets))
    try:
        with closing(training_batches(recipe, datasets, batch_size=size, num_steps=1)) as batches:  # type: ignore[type-var]
            batch = next(batches).to(profiled.device)
    except (UsageError, RunError) as error:
        say(f"token losses are not compared with those of other pictures: {error}")
        return ()
    right, other = right_and_other(profiled.model, Objective(recipe.losses), batch)
    return tuple(LossOfPictures(loss=name, pairs=size, right=right[name], other=other[name]) for name in names)


@torch.no_grad()
def right_and_other(model: CLIP, objective: Objective, batch: Batch) -> tuple[dict[str, float], dict[str, float]]:
    """All terms of a batch, in fp32: with its pictures, and with each caption's picture replaced by another's."""
    batch, counts = captions_counted(objective, batch)
    encoded: Encoded = model(batch, plan=model.training_plan)

    def terms(of: Encoded) -> dict[str, float]:
        features = features_of(of, token_losses=objective.batch_token_losses, labels=batch.labels)
        found = objective.batch_terms(features) | objective.sample_terms(of, batch.token_ids, counts)
        return {name: value.item() for name, value in found.items()}

    return terms(encoded), terms(with_other_pictures(encoded))
