"""Small real recipes and batches for tests."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mlip_cli.losses.features import features_of
from mlip_cli.losses.objective import Objective
from mlip_cli.losses.words import count_captions
from mlip_cli.model.clip import CLIP, build_model
from mlip_cli.recipe.config import Recipe
from mlip_cli.recipe.load import recipe_yaml
from mlip_cli.runs.checkpoint import save_checkpoint
from mlip_cli.train.gradients import Precision
from mlip_cli.train.optim import build_optimizer
from mlip_cli.train.state import Training
from mlip_cli.types import Batch, Encoded

BOS, EOS = 49406, 49407


def small_recipe(*, mlip: bool = True, train: str = "unused", **changes: dict[str, Any]) -> Recipe:
    """A CLIP or MLIP recipe of 32-px pictures, 4 x 4 patches; `changes` are merged into its sections."""
    tree: dict[str, Any] = {
        "data": {"train": train, "image_size": 32},
        "model": {
            "embed_dim": 16,
            "token_dim": 12,
            "vision": {"patch_size": 8, "width": 32, "depth": 4, "num_heads": 2},
            "text": {"width": 32, "depth": 2, "num_heads": 2, "context_length": 16},
        },
        "optim": {"lr": 1e-3, "warmup_steps": 2},
        "train": {"steps": 8, "global_batch_size": 8, "precision": "fp32"},
    }
    if mlip:
        tree["model"] |= {
            "frequency": {"placement": "branch", "width": 24, "depth": 1},
            "merging": {"rate": 0.5, "at": [2, 3]},
        }
        sparc = {"kind": "sparc"}
        tree["losses"] = {"spatial_token": sparc, "frequency_global": {"weight": 0.5}}
        tree["losses"]["frequency_token"] = sparc | {"weight": 0.25}
    for section, values in changes.items():
        tree.setdefault(section, {}).update(values)
    return Recipe.model_validate_json(json.dumps(tree))


def small_model(recipe: Recipe | None = None, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> CLIP:
    """A model with fixed random weights."""
    torch.manual_seed(seed)
    return build_model(recipe or small_recipe()).to(dtype)


def small_training(model: CLIP) -> Training:
    """A training of `model` on the CPU, in fp32."""
    device = torch.device("cpu")
    return Training(model, build_optimizer(model, small_recipe().optim), Precision.named("fp32", device), device)


def loss_terms(objective: Objective, encoded: Encoded, batch: Batch) -> dict[str, torch.Tensor]:
    """All terms of a whole batch, from what the model made of it."""
    counts = count_captions(batch.token_ids, encoded.text_mask) if objective.counts_captions else None
    features = features_of(encoded, token_losses=objective.batch_token_losses, labels=batch.labels)
    return objective.batch_terms(features) | objective.sample_terms(encoded, batch.token_ids, counts)


def make_run(folder: Path, recipe: Recipe, *, seed: int = 0) -> None:
    """A run with one checkpoint, of step 8, of fixed random weights."""
    weights = small_model(recipe, dtype=torch.float32, seed=seed).state_dict()
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(recipe_yaml(recipe))
    save_checkpoint(folder / "checkpoints", step=8, weights=weights, state={"step": 8})


def small_batch(n: int = 8, *, length: int = 10, seed: int = 0, words: list[int] | None = None) -> Batch:
    """Random pictures, and captions of 1 to 6 words (or as many as `words` says, which may be several a picture)."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator)
    counts = words or (torch.arange(n) % 6 + 1).tolist()
    token_ids = torch.zeros(len(counts), length, dtype=torch.int64)
    token_ids[:, 0] = BOS
    for row, count in zip(token_ids, counts, strict=True):
        row[1 : 1 + count] = torch.randint(300, 3000, (count,), generator=generator)
        row[1 + count] = EOS
    return Batch(images, token_ids, tuple(f"key-{i}" for i in range(n)))


def with_lengths(batch: Batch) -> Batch:
    """The batch with the lengths of its captions, as the loader gives it: EOS is the largest id."""
    return replace(batch, text_lengths=tuple((batch.token_ids.argmax(1) + 1).tolist()))
