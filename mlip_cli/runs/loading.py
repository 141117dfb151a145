"""Load a trained run, and encode images and texts with it.

loaded = load_run("runs/mlip", device="cpu")
encoder = loaded.at_rate(0.5)  # None: the recipe's own merge rate
encoder.encode_image(images), encoder.encode_text(loaded.tokenizer.encode(captions))
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mlip_cli.data.tokenizer import Tokenizer
from mlip_cli.devices import DTYPES, autocast, check_precision, pick_device
from mlip_cli.errors import UsageError
from mlip_cli.model.blocks import set_fused_attention
from mlip_cli.model.clip import CLIP, build_model
from mlip_cli.recipe.config import Recipe
from mlip_cli.recipe.merge_plan import MergePlan
from mlip_cli.runs.checkpoint import load_weights
from mlip_cli.runs.find import find_checkpoint
from mlip_cli.runs.folder import Run, evaluation_precision, step_of
from mlip_cli.runs.weight_files import differing
from mlip_cli.types import ImageFeatures, MergeStage


@dataclass(frozen=True)
class MergedEncoder:
    """A model held at one merge plan, which encodes in one precision."""

    model: CLIP
    plan: MergePlan
    dtype: torch.dtype = torch.float32
    """Of autocast. What becomes of the features is computed in fp32 whatever it is."""

    def encode_image(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 or normalised -> (B, E) spatial features."""
        with autocast(images.device, self.dtype):
            return self.model.encode_image(images, self.plan)

    def encode_text(self, token_ids: Tensor) -> Tensor:
        """(B, L) -> (B, E)"""
        with autocast(token_ids.device, self.dtype):
            return self.model.encode_text(token_ids)

    def image_features(self, images: Tensor) -> ImageFeatures:
        """Features of both domains."""
        with autocast(images.device, self.dtype):
            return self.model.image_features(images, self.plan)

    def merge_stages(self, images: Tensor) -> tuple[MergeStage, ...]:
        """What became one token at each merge."""
        with autocast(images.device, self.dtype):
            return self.model.merge_stages(images, self.plan)


@dataclass(frozen=True)
class LoadedRun:
    """A trained model, with its run, recipe and checkpoint."""

    label: str
    """Name of the run folder."""
    run: Run
    recipe: Recipe
    model: CLIP
    """On `device`, in evaluation mode, without gradients."""
    tokenizer: Tokenizer
    checkpoint: Path
    step: int
    device: torch.device
    precision: str
    """In which it encodes, a key of `DTYPES`."""

    def at_rate(self, rate: float | None, method: str | None = None) -> MergedEncoder:
        """The function `at_rate` in the precision of this run."""
        return at_rate(self.model, rate, method, dtype=DTYPES[self.precision])


def at_rate(
    model: CLIP, rate: float | None, method: str | None = None, *, dtype: torch.dtype = torch.float32
) -> MergedEncoder:
    """`model` at a merge rate; None is the rate of the recipe's evaluation. If `method` is None, `merge_plan` chooses
    it.

    Raises:
        UsageError: no plan reaches the rate.
    """
    assert rate is not None or method is None, "a method without a rate"
    return MergedEncoder(model, model.plan if rate is None else model.merge_plan(rate, method), dtype)


def load_run(target: str | None, *, device: str, precision: str | None = None) -> LoadedRun:
    """Build the model from the recipe inside the run and load its weights.

    Args:
        precision: in which it encodes; None: see `evaluation_precision`.

    Raises:
        UsageError: no such run, no checkpoint in it, a damaged one, or a checkpoint of another model; the device cannot
            compute in the precision.
    """
    run, checkpoint = find_checkpoint(target)
    recipe = run.read_recipe()
    where = pick_device(device)
    check_precision(precision, where)
    weights = load_weights(checkpoint)
    with torch.random.fork_rng(devices=[]):
        model = build_model(recipe)
    load_into(model, weights, checkpoint)
    set_fused_attention(model, where.type != "cpu")
    model.to(where).eval().requires_grad_(False)
    return LoadedRun(
        label=run.folder.resolve().name,
        run=run,
        recipe=recipe,
        model=model,
        tokenizer=Tokenizer.of(recipe.model.text),
        checkpoint=checkpoint,
        step=step_of(checkpoint),
        device=where,
        precision=precision or evaluation_precision(recipe, where.type),
    )


def load_into(model: CLIP, weights: dict[str, Tensor], checkpoint: Path) -> None:
    """Load weights of exactly the model's names and shapes.

    Raises:
        UsageError: names or shapes differ; the message names the first few.
    """
    wrong = differing(model.state_dict(), weights)
    if wrong:
        raise UsageError(
            f"{checkpoint}: weights of another model: {len(wrong)} tensors differ from the recipe's, such as "
            f"{'; '.join(wrong[:3])}"
        )
    model.load_state_dict(weights)
