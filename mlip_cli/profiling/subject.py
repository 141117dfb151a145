"""The model that `mlip profile` measures, its data, and batches like those of its training."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from mlip_cli.data.dataset import ShardDataset
from mlip_cli.data.open import open_sources
from mlip_cli.data.tokenizer import Tokenizer
from mlip_cli.devices import check_compiler, check_precision, has_units_for_bf16, pick_device
from mlip_cli.errors import RunError, UsageError
from mlip_cli.model.blocks import Compiled, set_fused_attention
from mlip_cli.model.clip import CLIP, build_model
from mlip_cli.recipe.config import Recipe
from mlip_cli.recipe.load import load_recipe
from mlip_cli.runs.folder import Run
from mlip_cli.runs.loading import load_run
from mlip_cli.terminal.output import say
from mlip_cli.train.setup import compiles, with_usual_precision
from mlip_cli.types import Batch


@dataclass(frozen=True)
class ProfiledModel:
    """A model to measure, and where it comes from."""

    label: str
    recipe: Recipe
    model: CLIP
    """On `device`; training steps are timed on it, with a learning rate of 0."""
    device: torch.device
    run: Run | None = None
    """Where the weights come from; None for random ones."""
    step: int | None = None
    """Step of the checkpoint."""
    is_compiled: bool = False
    """Whether its blocks are to be compiled."""
    blocks: Compiled | None = None
    """The compiled ones."""

    @property
    def runs_compiled(self) -> bool:
        """Whether the blocks are compiled: some cannot be, which shows when they run."""
        return self.is_compiled and (self.blocks is None or self.blocks.failure is None)


def load_profiled(
    target: str, device: str, *, precision: str | None = None, is_compiled: bool | None = None
) -> ProfiledModel:
    """The model of a run or a checkpoint (a folder), or of a recipe, with random weights.

    Args:
        precision: in place of the recipe's. is_compiled: in place of what the recipe's training does.

    Raises:
        UsageError: there is no such run or recipe, or no compiler.
    """
    if Path(target).is_dir():
        run = load_run(target, device=device, precision=precision)
        own = ProfiledModel(f"{run.label}, step {run.step}", run.recipe, run.model, run.device, run.run, run.step)
    else:
        loaded, where = load_recipe(target), pick_device(device)
        check_precision(precision, where)
        model = build_model(loaded.recipe).to(where).eval()
        set_fused_attention(model, where.type != "cpu")
        own = ProfiledModel(f"recipe {loaded.name}, random weights", loaded.recipe, model, where)
    if precision is None:
        own = replace(own, recipe=with_usual_precision(own.recipe, has_units=has_units_for_bf16(own.device)))
    else:
        own = replace(own, recipe=own.recipe.in_precision(precision))
    own = replace(own, is_compiled=compiles(own.recipe, own.device) if is_compiled is None else is_compiled)
    return replace(own, blocks=_made_as_trained(own))


def _made_as_trained(profiled: ProfiledModel) -> Compiled | None:
    """Switch gradients and recomputation on as the recipe's training does, and compile the blocks if asked to."""
    model, recipe = profiled.model, profiled.recipe
    model.requires_grad_(True)
    if recipe.train.grad_checkpointing:
        model.set_grad_checkpointing()
    if recipe.model.freeze is not None:
        model.freeze(recipe.model.freeze)
    if not profiled.is_compiled:
        return None
    check_compiler(profiled.device, "compiling the blocks", otherwise="add --no-compile")
    return Compiled(fixed=model.picture_blocks(), varying=model.text.blocks)


def training_data(recipe: Recipe) -> list[ShardDataset]:
    """The data sets of `data.train`; if one of them is missing or damaged, a line that says why, and an empty list."""
    try:
        return open_sources(recipe.data.train, cache=recipe.data.cache)
    except (UsageError, RunError) as error:
        say(f"no data, so reading and decoding are not timed: {error}")
        return []


def caption_length(recipe: Recipe, datasets: Sequence[ShardDataset]) -> tuple[int, str]:
    """The number of tokens to which a typical batch pads its captions, and the source of that number."""
    most = recipe.model.text.context_length
    if not datasets:
        return most, "the context length, without data"
    dataset = datasets[0]
    generator = np.random.default_rng(0)
    size = min(recipe.train.global_batch_size, dataset.num_samples)
    longest = [dataset.num_tokens(generator.integers(dataset.num_samples, size=size)).max() for _ in range(25)]
    return Tokenizer.of(recipe.model.text).padded_length(int(np.median(longest))), f"batches of {dataset.name}"


def caption_lengths(
    recipe: Recipe, datasets: Sequence[ShardDataset], *, num_captions: int, width: int
) -> tuple[int, ...] | None:
    """Tokens of as many captions drawn at random, cut to `width`; None without data, or if all are padded alike."""
    if not datasets or Tokenizer.of(recipe.model.text).whole:
        return None
    drawn = np.random.default_rng(0).integers(datasets[0].num_samples, size=num_captions)
    return tuple(datasets[0].num_tokens(drawn).clip(max=width).tolist())


def pinned(batch: Batch, device: torch.device) -> Batch:
    """The batch as the loader leaves it for `device`: in main memory, pinned for CUDA."""
    batch = batch.to("cpu")
    return batch.pin_memory() if device.type == "cuda" else batch
