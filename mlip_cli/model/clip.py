"""The whole model: two towers, frequency stage or branch, projections into the joint spaces, logit scales.

    model = build_model(load_recipe("recipes/openmoji.yaml").recipe)  # mlip_cli.recipe.load; random weights
    model.image_features(images, model.merge_plan(0.5))  # images (B, 3, H, W): uint8 pixels or normalised floats
    model.encode_text(token_ids)  # (B, L), from mlip_cli.data.tokenizer.Tokenizer

`mlip_cli.runs.loading` loads a trained model.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Literal, Self

import torch
from torch import Tensor, nn

from mlip_cli.errors import UsageError
from mlip_cli.model.fixed import FixedMatrix
from mlip_cli.model.frequency import FrequencyBranch
from mlip_cli.model.merging import patch_dct
from mlip_cli.model.text import TextTower, caption_mask, word_mask
from mlip_cli.model.vision import ImageTower, TowerOutput
from mlip_cli.recipe.config import FREQUENCY_LOSSES, LOSS_NAMES, Data, Projection, Recipe, WordsLoss
from mlip_cli.recipe.config import Model as ModelConfig
from mlip_cli.recipe.merge_plan import MergePlan, plan_for
from mlip_cli.types import Batch, Encoded, ImageFeatures, MergeStage


def pixel_factors(mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Factors and shifts that normalise the three channels of uint8 pixels: (2, 3, 1, 1), fp64."""
    mean_of, std_of = torch.tensor(mean).double(), torch.tensor(std).double()  # the numbers of other programs in fp32
    return torch.stack([1 / (255 * std_of), -mean_of / std_of])[..., None, None]


def linear(inputs: int, outputs: int, *, bias: bool = False) -> nn.Linear:
    """A projection with CLIP's initial values, and a bias of 0 if one is asked for."""
    layer = nn.Linear(inputs, outputs, bias=bias)
    nn.init.normal_(layer.weight, std=inputs**-0.5)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def projection(kind: Projection, inputs: int, outputs: int, *, tower: str) -> nn.Module:
    """From a tower to the joint space.

    Raises:
        UsageError: there is no projection, and the widths differ.
    """
    if kind != "none":
        return linear(inputs, outputs, bias=kind == "with_bias")
    if inputs != outputs:
        raise UsageError(
            f"model.{tower}.projection: none, but the tower is {inputs} wide and model.embed_dim {outputs}; use linear"
        )
    return nn.Identity()


def token_heads(config: ModelConfig, losses: Collection[str], *, vision_width: int) -> nn.ModuleDict:
    """Projections that losses of tokens and words among `losses` read.

    Tokens and words go to the width `token_dim`, where they are compared. The mean token of a loss over words goes to
    the width of the text tower, whose word embeddings it is compared with.
    """
    image_widths = {"spatial": vision_width}
    if config.frequency is not None:
        image_widths["frequency"] = frequency_width(config, vision_width)
    compared = {name: width for name, width in image_widths.items() if f"{name}_token" in losses}
    if compared:
        compared["text"] = config.text.width
    heads = {name: linear(width, config.token_dim) for name, width in compared.items()}
    over_words = {f"{name}_words": width for name, width in image_widths.items() if f"{name}_words" in losses}
    return nn.ModuleDict(heads | {name: linear(width, config.text.width) for name, width in over_words.items()})


def frequency_width(config: ModelConfig, vision_width: int) -> int:
    """Width of the frequency tokens: that of the branch, or the tower's."""
    assert config.frequency is not None
    return config.frequency.width or vision_width


def scales_and_biases(
    losses: Mapping[str, str], *, global_batch_size: int
) -> tuple[nn.ParameterDict, nn.ParameterDict]:
    """Logs of the logit scales, and biases of the sigmoid losses. Each is (1,), because 0-d cannot be sharded.

    They start as in CLIP and SigLIP. SigLIP's bias is the log of the odds that two samples of a batch are a pair.
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
    """CLIP, or MLIP with a frequency stage or branch, heads for its losses, and token merging.

    A head exists only if a loss trains it. `losses` maps the names of active losses to their kind. Every call with
    images takes a merge plan: `plan`, `training_plan` or `merge_plan(rate)`.
    """

    def __init__(self, config: ModelConfig, *, data: Data, losses: dict[str, str], global_batch_size: int) -> None:
        super().__init__()
        self.image_size = image_size = data.image_size
        self.frozen: Literal["image", "text"] | None = None
        self.starts_from_tower = config.vision.init is not None
        """The image tower has trained weights at the start, and its projection has random ones."""
        self.context_length = config.text.context_length
        self.merging = config.merging
        self.vision = ImageTower(config.vision, image_size=image_size, frequency=config.frequency)
        self.text = TextTower(config.text)
        self.image_projection = projection(
            config.vision.projection, self.vision.width, config.embed_dim, tower="vision"
        )
        self.text_projection = projection(config.text.projection, self.text.width, config.embed_dim, tower="text")

        self.frequency: FrequencyBranch | nn.LayerNorm | None = None
        self.frequency_projection: nn.Linear | None = None
        if config.frequency is not None and losses.keys() & set(FREQUENCY_LOSSES):
            if self.vision.stem_depth:
                self.frequency = nn.LayerNorm(self.vision.width)
            else:
                self.frequency = FrequencyBranch(
                    config.frequency,
                    grid=self.vision.grid,
                    patch_size=self.vision.patch_size,
                    tower_width=self.vision.width,
                )
            if losses.keys() & {"frequency_global", "align"}:
                self.frequency_projection = linear(frequency_width(config, self.vision.width), config.embed_dim)

        self.token_projections = token_heads(config, losses, vision_width=self.vision.width)
        self.log_scales, self.logit_biases = scales_and_biases(losses, global_batch_size=global_batch_size)

        self.pixels = FixedMatrix(partial(pixel_factors, data.pixel_mean, data.pixel_std))
        rate = config.merging.rate if config.merging else 0.0
        self.training_plan = self.merge_plan(rate, config.merging.method if config.merging else None)
        """The merges of training; only training drops random patches."""
        self.plan = self.merge_plan(0.0) if self.training_plan.drops else self.training_plan
        """The merges of evaluation."""

    def freeze(self, tower: Literal["image", "text"]) -> None:
        """Keep a tower and its projection as they are: no gradients, and no dropout in training.

        A projection that starts from random values trains: with `model.vision.init` that of the image tower, as in
        locked-image tuning (LiT, Zhai et al., CVPR 2022).
        """
        trunk, projection = {
            "image": (self.vision, self.image_projection),
            "text": (self.text, self.text_projection),
        }[tower]
        trunk.requires_grad_(False)
        if tower == "text" or not self.starts_from_tower:
            projection.requires_grad_(False)
        self.frozen = tower
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Set training mode, except in a frozen tower, which applies no dropout."""
        super().train(mode)
        if self.frozen == "image":
            self.vision.eval()
        elif self.frozen == "text":
            self.text.eval()
        return self

    def set_grad_checkpointing(self) -> None:
        """Recompute the activations inside the towers' blocks in the backward pass instead of keeping them."""
        self.vision.trunk.set_grad_checkpointing()
        self.text.grad_checkpointing = True

    def picture_blocks(self) -> list[nn.Module]:
        """Blocks of the image tower and of the branch beside it, which can be sharded or compiled one by one."""
        branch = self.frequency.blocks if isinstance(self.frequency, FrequencyBranch) else ()
        return [*self.vision.trunk.blocks, *branch]

    def blocks(self) -> list[nn.Module]:
        """Blocks of pictures and of texts."""
        return [*self.picture_blocks(), *self.text.blocks]

    def blocks_above(self) -> dict[str, int]:
        """Name of a parameter of the towers -> number of blocks above it in its tower.

        It is 0 in the last block and above (norms, pooling), and the tower's depth below the first block (embeddings).
        """
        trunk = self.vision.trunk
        top = (trunk.norm, trunk.fc_norm, trunk.attn_pool)
        return {
            **_blocks_above("vision.", self.vision, list(trunk.blocks), top),
            **_blocks_above("text.", self.text, list(self.text.blocks), (self.text.norm,)),
        }

    def merge_plan(self, rate: float, method: str | None = None) -> MergePlan:
        """The plan of this tower for `rate`, as `plan_for` makes it.

        Raises:
            UsageError: no plan reaches the rate, or the tower cannot merge.
        """
        tower = self.vision
        plan = plan_for(
            self.merging, rate, method, depth=tower.depth, num_patches=tower.num_patches, stem=tower.stem_depth
        )
        if plan.at and not plan.drops:
            self.vision.check_merging()
        return plan

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 pixels -> normalised floats; floats stay as they are: (B, 3, H, W) -> the same."""
        if images.dtype != torch.uint8:
            return images
        factor, shift = self.pixels.matrix
        return torch.addcmul(shift, images.to(factor.dtype), factor)

    def encode_image(self, images: Tensor, plan: MergePlan) -> Tensor:
        """Spatial feature: (B, 3, H, W) -> (B, E), not normalised."""
        return self.image_projection(self.image_tower(images, plan).pooled)

    def image_features(self, images: Tensor, plan: MergePlan) -> ImageFeatures:
        """Features of both domains: (B, 3, H, W) -> 2 x (B, E); the frequency one is None without a trained head."""
        tower = self.image_tower(images, plan, with_branch=self.frequency_projection is not None)
        frequency = None
        if self.frequency_projection is not None:
            frequency = self.frequency_projection(self.frequency_tokens(tower).mean(1))
        return ImageFeatures(self.image_projection(tower.pooled), frequency)

    def merge_stages(self, images: Tensor, plan: MergePlan) -> tuple[MergeStage, ...]:
        """The merges inside `encode_image(images, plan)`: (B, 3, H, W) -> one stage per merge."""
        return self.image_tower(images, plan).stages(plan)

    def encode_text(self, token_ids: Tensor) -> Tensor:
        """(B, L) int64, L up to context_length -> (B, E), not normalised."""
        return self.text_projection(self.text.pool(self.text(token_ids), token_ids))

    def forward(self, batch: Batch, plan: MergePlan, assign: tuple[Tensor, ...] | None = None) -> Encoded:
        """Everything that the losses read of a batch; `assign` repeats the merges of an earlier pass over it."""
        reads_same = self.frequency is not None and batch.other_images is None
        tower = self.image_tower(batch.images, plan, assign=assign, with_branch=reads_same)
        packing = self.text.packing(batch.token_ids, batch.text_lengths)
        hidden = self.text(batch.token_ids, packing)
        text_tokens = self._project("text", hidden)
        frequency_features = frequency_tokens = None
        heads, means = self.token_projections, {}
        if "spatial_words" in heads:
            means["spatial_words"] = _mean_token(tower.tokens, tower.sizes)
        if self.frequency is not None:
            tokens = self.frequency_tokens(tower, batch.other_images)
            means["frequency_words"] = mean = tokens.mean(1)
            if self.frequency_projection is not None:
                frequency_features = self.frequency_projection(mean)
            frequency_tokens = self._project("frequency", tokens)
        return Encoded(
            image_features=self.image_projection(tower.pooled),
            text_features=self.text_projection(self.text.pool(hidden, batch.token_ids, packing)),
            frequency_features=frequency_features,
            image_tokens=self._project("spatial", tower.tokens),
            token_sizes=tower.sizes,
            frequency_tokens=frequency_tokens,
            text_tokens=text_tokens if text_tokens is None or packing is None else packing.padded(text_tokens),
            text_mask=word_mask(batch.token_ids),
            scales={name: log_scale.exp() for name, log_scale in self.log_scales.items()},
            biases=dict(self.logit_biases.items()),
            caption_mask=caption_mask(batch.token_ids),
            assign=tower.assign,
            word_features={name: heads[name](mean) for name, mean in means.items() if name in heads},
            vocabulary=None if batch.word_ids is None else self.text.token_embedding(batch.word_ids),
        )

    def image_tower(
        self, images: Tensor, plan: MergePlan, *, assign: tuple[Tensor, ...] | None = None, with_branch: bool = False
    ) -> TowerOutput:
        """The results of the image tower for (B, 3, H, W) images, uint8 or normalised.

        A branch on DCT coefficients shares them with guidance; `with_branch` says that `frequency_tokens` follows.
        """
        images = self.normalize(images)
        shares_spectrum = isinstance(self.frequency, FrequencyBranch) and self.frequency.reads_pixels
        needs_spectrum = shares_spectrum and (with_branch or (plan.asks_frequency and assign is None))
        spectrum = patch_dct(images, self.vision.dct.matrix) if needs_spectrum else None
        return self.vision(images, plan, assign=assign, spectrum=spectrum)

    def frequency_tokens(self, tower: TowerOutput, other_images: Tensor | None = None) -> Tensor:
        """Tokens (B, N, width) of the branch beside the tower, or of the stem in it; they never merge.

        With `other_images` (B, 3, H, W), uint8 or normalised, a branch reads these instead of the tower's.
        """
        if not isinstance(self.frequency, FrequencyBranch):
            assert self.frequency is not None
            return self.frequency(tower.stem_tokens)
        spectrum, embedded = tower.spectrum, tower.embedded
        if other_images is not None:
            images = self.normalize(other_images)
            if self.frequency.reads_pixels:
                spectrum = patch_dct(images, self.vision.dct.matrix)
            else:
                embedded = self.vision.embed(images)
        if self.frequency.reads_pixels:
            assert spectrum is not None
            return self.frequency(spectrum.flatten(2).to(self.pixels.matrix.dtype))
        return self.frequency(embedded[:, self.vision.num_prefix :])

    def _project(self, name: str, tokens: Tensor) -> Tensor | None:
        return self.token_projections[name](tokens) if name in self.token_projections else None


def _mean_token(tokens: Tensor, sizes: Tensor) -> Tensor:
    """Mean over patches: (B, K, D), (B, K) -> (B, D)."""
    weights = (sizes / sizes.sum(1, keepdim=True)).to(tokens.dtype)
    return (weights[:, None] @ tokens)[:, 0]


def _blocks_above(
    prefix: str, tower: nn.Module, blocks: list[nn.Module], top: tuple[nn.Module | None, ...]
) -> dict[str, int]:
    above = {id(p): len(blocks) - number for number, block in enumerate(blocks, 1) for p in block.parameters()}
    above |= {id(p): 0 for module in top if module is not None for p in module.parameters()}
    return {prefix + name: above.get(id(p), len(blocks)) for name, p in tower.named_parameters()}


def build_model(recipe: Recipe) -> CLIP:
    """The recipe's model with random weights, drawn from torch's global generator."""
    terms = {name: term for name in LOSS_NAMES if (term := getattr(recipe.losses, name)) is not None}
    losses = {name: "words" if isinstance(term, WordsLoss) else term.kind for name, term in terms.items()}
    return CLIP(
        recipe.model,
        data=recipe.data,
        losses=losses,
        global_batch_size=recipe.train.global_batch_size,
    )
