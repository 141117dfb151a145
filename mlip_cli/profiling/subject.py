"""The model that `mlip profile` measures, its data, and batches like those of its training."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mlip_cli.data.dataset import ShardDataset
from mlip_cli.data.open import open_sources
from mlip_cli.data.tokenizer import Tokenizer
from mlip_cli.devices import pick_device
from mlip_cli.errors import RunError, UsageError
from mlip_cli.model.blocks import set_fused_attention
from mlip_cli.model.clip import CLIP, build_model
from mlip_cli.recipe.config import Recipe
from mlip_cli.recipe.load import load_recipe
from mlip_cli.runs.folder import Run
from mlip_cli.runs.loading import load_run
from mlip_cli.terminal.output import say
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


def load_profiled(target: str, device: str) -> ProfiledModel:
    """The model of a run or a checkpoint (a folder), or of a recipe, with random weights.

    Raises:
        UsageError: there is no such run or recipe.
    """
    if Path(target).is_dir():
        run = load_run(target, device=device)
        model = _as_trained(run.model, run.recipe)
        return ProfiledModel(f"{run.label}, step {run.step}", run.recipe, model, run.device, run.run, run.step)
    loaded = load_recipe(target)
    where = pick_device(device)
    model = _as_trained(build_model(loaded.recipe), loaded.recipe).to(where).eval()
    set_fused_attention(model, where.type != "cpu")
    return ProfiledModel(f"recipe {loaded.name}, random weights", loaded.recipe, model, where)


def _as_trained(model: CLIP, recipe: Recipe) -> CLIP:
    """Switch gradients and recomputation on as the recipe's training does; nothing is compiled."""
    model.requires_grad_(True)
    if recipe.train.grad_checkpointing:
        model.set_grad_checkpointing()
    if recipe.train.compile:
        say("train.compile: profile measures the model without compiling it")
    if recipe.model.freeze is not None:
        model.freeze(recipe.model.freeze)
    return model


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
