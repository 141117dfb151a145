"""The whole model: two towers, the frequency branch, projections into the joint spaces, logit scales."""

import math
from collections.abc import Collection, Mapping
from typing import Literal, Self

import torch
from torch import Tensor, nn

from mlip_cli.model.frequency import FrequencyBranch
from mlip_cli.model.text import TextTower, caption_mask, pool_text, word_mask
from mlip_cli.model.vision import ImageTower, Tower
from mlip_cli.recipe.config import LOSS_NAMES, Merging, Recipe
from mlip_cli.recipe.config import Model as ModelConfig
from mlip_cli.recipe.merge_plan import MergePlan
from mlip_cli.types import VOCAB_SIZE, Batch, Encoded, ImageFeatures, MergeStage

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
"""Of RGB in [0, 1], as published with CLIP."""


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A projection without bias, initialised as in CLIP."""
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=inputs**-0.5)
    return layer


def token_heads(config: ModelConfig, losses: Collection[str], *, vision_width: int) -> nn.ModuleDict:
    """Projections of the tokens that these losses compare, with that of the words where there is any."""
    widths = {}
    if "spatial_token" in losses:
        widths["spatial"] = vision_width
    if "frequency_token" in losses and config.frequency is not None:
        widths["frequency"] = config.frequency.width
    if widths:
        widths["text"] = config.text.width
    return nn.ModuleDict({name: linear(width, config.token_dim) for name, width in widths.items()})


def scales_and_biases(
    losses: Mapping[str, str], *, global_batch_size: int
) -> tuple[nn.ParameterDict, nn.ParameterDict]:
    """The logs of the logit scales, and the biases of sigmoid losses: each (1,), since 0-d cannot be sharded.

    They start as in CLIP and SigLIP, whose bias is the log of the odds that a pair of the batch belongs together.
    """
    log_scales, biases = nn.ParameterDict(), nn.ParameterDict()
    for name in LOSS_NAMES:
        if name in losses:
            sigmoid = losses[name] == "sigmoid"
            log_scales[name] = nn.Parameter(torch.tensor([math.log(10 if sigmoid else 1 / 0.07)]))
            if sigmoid:
                biases[name] = nn.Parameter(torch.tensor([-math.log(max(global_batch_size - 1, 1))]))
    return log_scales, biases


class CLIP(nn.Module):
    """CLIP, and with a frequency branch, token heads and merging: MLIP.

    A head exists only where a loss trains it. `losses` maps the names of active losses to their kind.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, config: ModelConfig, *, image_size: int, losses: dict[str, str], global_batch_size: int) -> None:
        super().__init__()
        self.image_size = image_size
        self.frozen: Literal["image", "text"] | None = None
        self.context_length = config.text.context_length
        self.merging = config.merging
        self.vision = ImageTower(config.vision, image_size=image_size, frequency=config.frequency)
        self.text = TextTower(config.text, vocab_size=VOCAB_SIZE)
        self.image_projection = linear(self.vision.width, config.embed_dim)
        self.text_projection = linear(self.text.width, config.embed_dim)

        self.frequency: FrequencyBranch | nn.LayerNorm | None = None
        self.frequency_projection: nn.Linear | None = None
        if config.frequency is not None and self.vision.stem_depth:
            self.frequency = nn.LayerNorm(self.vision.width)
        elif config.frequency is not None:
            self.frequency = FrequencyBranch(
                config.frequency,
                grid=self.vision.grid,
                patch_size=self.vision.patch_size,
                tower_width=self.vision.width,
            )
        if config.frequency is not None and "frequency_global" in losses:
            self.frequency_projection = linear(config.frequency.width, config.embed_dim)

        self.token_projections = token_heads(config, losses, vision_width=self.vision.width)
        self.log_scales, self.logit_biases = scales_and_biases(losses, global_batch_size=global_batch_size)

        self.register_buffer("pixel_mean", torch.tensor(PIXEL_MEAN)[:, None, None], persistent=False)
        self.register_buffer("pixel_std", torch.tensor(PIXEL_STD)[:, None, None], persistent=False)
        rate = config.merging.rate if config.merging else 0.0
        self.training_plan = self.merge_plan(rate, config.merging.method if config.merging else None)
        """What the losses see; dropping random patches is for them alone."""
        self.plan = self.merge_plan(0.0) if self.training_plan.drops else self.training_plan
        """What evaluation sees."""

    def freeze(self, tower: Literal["image", "text"]) -> None:
        """Leave a tower with its projection as it is: no gradients, and no dropout in training."""
        trunk, projection = {
            "image": (self.vision, self.image_projection),
            "text": (self.text, self.text_projection),
        }[tower]
        trunk.requires_grad_(False)
        projection.requires_grad_(False)
        self.frozen = tower
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Training mode for all but a frozen tower, which drops nothing."""
        super().train(mode)
        if self.frozen == "image":
            self.vision.eval()
        elif self.frozen == "text":
            self.text.eval()
        return self

    def set_grad_checkpointing(self) -> None:
        """Compute the activations inside the towers' blocks again for the gradient, in place of keeping them."""
        self.vision.trunk.set_grad_checkpointing()
        self.text.grad_checkpointing = True

    def blocks(self) -> list[nn.Module]:
        """Blocks of both towers and of the branch: what can be sharded or compiled one by one."""
        branch = self.frequency.blocks if isinstance(self.frequency, FrequencyBranch) else ()
        return [*self.vision.trunk.blocks, *self.text.blocks, *branch]

    def blocks_above(self) -> dict[str, int]:
        """Number of blocks between each parameter of the towers and its tower's top, by name.

        0 in the last block and above it (norms, pooling), the tower's depth below the first block (embeddings).
        """
        trunk = self.vision.trunk
        top = (trunk.norm, trunk.fc_norm, trunk.attn_pool)
        return {
            **_blocks_above("vision.", self.vision, list(trunk.blocks), top),
            **_blocks_above("text.", self.text, list(self.text.blocks), (self.text.norm,)),
        }

    def merge_plan(self, rate: float, method: str | None = None) -> MergePlan:
        """Plan for `rate`, with the recipe's places, guidance and strength, or the defaults where it has none.

        `method` None is the recipe's; where that drops patches, which only training does, it is guided.

        Raises:
            UsageError: no plan reaches the rate, or the tower cannot merge.
        """
        own = self.merging or Merging()
        dropping = own.method == "random_drop"
        method = method or ("guided" if dropping else own.method)
        plan = MergePlan.resolve(
            depth=self.vision.depth,
            num_patches=self.vision.num_patches,
            rate=rate,
            at=own.at if dropping == (method == "random_drop") else None,
            method=method,
            guidance=own.guidance,
            strength=own.strength,
            stem=self.vision.stem_depth,
        )
        if plan.at and not plan.drops:
            self.vision.check_merging()
        return plan

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 pixels -> normalised floats; floats are taken as normalised already: (B, 3, H, W) -> the same."""
        if images.dtype != torch.uint8:
            return images
        return (images.to(self.pixel_mean.dtype) / 255 - self.pixel_mean) / self.pixel_std

    def encode_image(self, images: Tensor, plan: MergePlan | None = None) -> Tensor:
        """Spatial feature: (B, 3, H, W) -> (B, E), not normalised. `plan` None is the recipe's."""
        images = self.normalize(images)
        tower = self.vision(images, self.vision.embed(images), plan or self.plan)
        return self.image_projection(tower.pooled)

    def image_features(self, images: Tensor, plan: MergePlan | None = None) -> ImageFeatures:
        """Features of both domains: (B, 3, H, W) -> 2 x (B, E); the frequency one is None without a trained head."""
        images = self.normalize(images)
        embedded = self.vision.embed(images)
        tower = self.vision(images, embedded, plan or self.plan)
        frequency = None
        if self.frequency_projection is not None:
            frequency = self.frequency_projection(self.frequency_tokens(images, embedded, tower).mean(1))
        return ImageFeatures(self.image_projection(tower.pooled), frequency)

    def merge_stages(self, images: Tensor, plan: MergePlan | None = None) -> tuple[MergeStage, ...]:
        """What each merge of `encode_image(images, plan)` does: (B, 3, H, W) -> one stage a merge, none at rate 0."""
        plan = plan or self.plan
        images = self.normalize(images)
        tower: Tower = self.vision(images, self.vision.embed(images), plan)
        return tower.stages(plan)

    def encode_text(self, token_ids: Tensor) -> Tensor:
        """(B, L) int64, L up to context_length -> (B, E), not normalised."""
        return self.text_projection(pool_text(self.text(token_ids), token_ids))

    def forward(self, batch: Batch, plan: MergePlan | None = None, assign: tuple[Tensor, ...] | None = None) -> Encoded:
        """All that the losses need; `plan` None is training's, `assign` replays an earlier pass over the same batch."""
        images = self.normalize(batch.images)
        embedded = self.vision.embed(images)
        tower: Tower = self.vision(images, embedded, plan or self.training_plan, assign)
        hidden = self.text(batch.token_ids)
        frequency_features = frequency_tokens = None
        if self.frequency is not None:
            tokens = self.frequency_tokens(images, embedded, tower)
            if self.frequency_projection is not None:
                frequency_features = self.frequency_projection(tokens.mean(1))
            frequency_tokens = self._project("frequency", tokens)
        return Encoded(
            image_features=self.image_projection(tower.pooled),
            text_features=self.text_projection(pool_text(hidden, batch.token_ids)),
            frequency_features=frequency_features,
            image_tokens=self._project("spatial", tower.tokens),
            token_sizes=tower.sizes,
            frequency_tokens=frequency_tokens,
            text_tokens=self._project("text", hidden),
            text_mask=word_mask(batch.token_ids),
            scales={name: log_scale.exp() for name, log_scale in self.log_scales.items()},
            biases=dict(self.logit_biases.items()),
            caption_mask=caption_mask(batch.token_ids),
            assign=tower.assign,
        )

    def frequency_tokens(self, images: Tensor, embedded: Tensor, tower: Tower) -> Tensor:
        """Tokens (B, N, width) of the branch, or of the stem that `tower` went through; they never merge.

        `images` are normalised, `embedded` is what the tower embeds them to.
        """
        assert self.frequency is not None
        if tower.stem_tokens is not None:
            return self.frequency(tower.stem_tokens)
        return self.frequency(images, embedded[:, self.vision.num_prefix :])

    def _project(self, name: str, tokens: Tensor) -> Tensor | None:
        return self.token_projections[name](tokens) if name in self.token_projections else None


def _blocks_above(
    prefix: str, tower: nn.Module, blocks: list[nn.Module], top: tuple[nn.Module | None, ...]
) -> dict[str, int]:
    above = {id(p): len(blocks) - number for number, block in enumerate(blocks, 1) for p in block.parameters()}
    above |= {id(p): 0 for module in top if module is not None for p in module.parameters()}
    return {prefix + name: above.get(id(p), len(blocks)) for name, p in tower.named_parameters()}


def build_model(recipe: Recipe) -> CLIP:
    """The recipe's model with random weights, drawn from torch's global generator."""
    losses = {name: term.kind for name in LOSS_NAMES if (term := getattr(recipe.losses, name)) is not None}
    return CLIP(
        recipe.model,
        image_size=recipe.data.image_size,
        losses=losses,
        global_batch_size=recipe.train.global_batch_size,
    )
