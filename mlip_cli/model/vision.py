"""The image tower: a timm ViT whose block loop is run here, so that tokens can merge between blocks."""

import difflib
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
from timm.layers import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from mlip_cli.errors import UsageError
from mlip_cli.model.blocks import ACTIVATIONS, run_block
from mlip_cli.model.fixed import FixedMatrix
from mlip_cli.model.frequency import place_stem
from mlip_cli.model.merge_pass import Guidance, MergePass, Patches
from mlip_cli.model.merging import dct_matrix, grid_halves
from mlip_cli.recipe.config import Frequency, Vision
from mlip_cli.recipe.merge_plan import MergePlan, stem_depth
from mlip_cli.types import MergeStage


@dataclass(frozen=True)
class TowerOutput:
    """The results of the image tower."""

    pooled: Tensor
    """(B, D)"""
    tokens: Tensor
    """(B, K, D): patch tokens after the last norm."""
    sizes: Tensor
    """(B, K): number of patches per token; at least fp32."""
    assign: tuple[Tensor, ...]
    """One tensor (B, N) per merge: the group of every original patch."""
    guidance: tuple[Guidance | None, ...]
    """The guidance of each merge; None without guidance."""
    embedded: Tensor
    """(B, P+N, D): prefix and patch tokens with positions, before the first block."""
    stem_tokens: Tensor | None
    """(B, N, D): patch tokens behind the spectral blocks of a stem; None without a stem."""
    spectrum: Tensor | None
    """(B, N, 3, p, p): the block DCT of the patches, if it was given to the tower."""

    def stages(self, plan: MergePlan) -> tuple[MergeStage, ...]:
        """Every merge of this pass as the original patches see it."""
        earlier = (None, *self.assign)[: len(self.assign)]
        merges = zip(plan.at, self.assign, earlier, self.guidance, strict=True)
        return tuple(
            MergeStage(block, groups, None, None, None) if guidance is None else guidance.stage(block, groups, before)
            for block, groups, before, guidance in merges
        )


class ObservedBlock(Block):
    """timm's block, which can also return its keys and the class token's attention.

    Parameters, names and results are those of `Block`.
    """

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        observe: bool = False,
        with_row: bool = True,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor | None]:
        if not observe:
            return super().forward(x, attn_mask, is_causal)
        attended, keys, first_row = attend(self.attn, self.norm1(x), attn_mask, with_row=with_row)
        x = x + self.drop_path1(self.ls1(attended))
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return x, keys, first_row


def attend(
    attention: Attention, x: Tensor, mask: Tensor | None, *, with_row: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Self-attention that also returns what merging needs, without gradient.

    (B, P+N, D), additive mask (B, 1, 1, P+N) -> output (B, P+N, D), keys averaged over heads (B, P+N, d), attention of
    the first token averaged over heads (B, P+N), or None where nobody asks for it. Keys of all heads side by side would
    move features 0.98 times as far (standard error 0.03), for as many times the products as there are heads.
    """
    q, k, v = (
        attention.qkv(x).unflatten(2, (3, attention.num_heads, attention.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
    )
    q, k = attention.q_norm(q), attention.k_norm(k)
    first_row: Tensor | None = None
    if attention.fused_attn:
        dropout = attention.attn_drop.p if attention.training else 0.0
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        if with_row:
            with torch.no_grad():
                logits = (q[:, :, :1] * attention.scale) @ k.transpose(-2, -1)
                first_row = (logits if mask is None else logits + mask).softmax(-1)[:, :, 0].mean(1)
    else:
        logits = (q * attention.scale) @ k.transpose(-2, -1)
        weights = (logits if mask is None else logits + mask).softmax(-1)
        first_row = weights[:, :, 0].detach().mean(1) if with_row else None
        out = attention.attn_drop(weights) @ v
    out = attention.proj_drop(attention.proj(out.transpose(1, 2).flatten(2)))
    return out, k.detach().mean(1), first_row


def is_observable(block: nn.Module) -> bool:
    """True for plain timm blocks with plain attention, because their keys can be read."""
    if type(block) is not Block or type(block.attn) is not Attention:
        return False
    attention: Attention = block.attn
    return attention.gate is None and isinstance(attention.norm, nn.Identity)


POOLING: dict[str, dict[str, Any]] = {
    "mean": {"global_pool": "avg", "fc_norm": False},
    "mean_then_norm": {"global_pool": "avg", "fc_norm": True},
    "map": {"global_pool": "map", "fc_norm": False},
}
"""The recipe's word for a pooling -> timm's arguments."""


def build_trunk(config: Vision, *, image_size: int) -> VisionTransformer:
    """A randomly initialised timm ViT without classifier.

    Raises:
        UsageError: an unknown name, a tower of another class, or an image size that does not fit.
    """
    pooling: dict[str, Any] = {} if config.pool is None else POOLING[config.pool]
    if config.timm is None:
        return VisionTransformer(
            img_size=image_size,
            patch_size=config.patch_size,
            embed_dim=config.width,
            depth=config.depth,
            num_heads=config.num_heads,
            mlp_ratio=config.mlp_ratio,
            num_classes=0,
            pre_norm=config.pre_norm,
            init_values=config.layer_scale,
            norm_layer=partial(nn.LayerNorm, eps=config.norm_eps),
            act_layer=ACTIVATIONS[config.activation],
            drop_path_rate=config.drop_path,
            block_fn=ObservedBlock,
            class_token=config.pool in (None, "mean_then_norm"),
            **pooling,
        )
    name, dot, _ = config.timm.partition(".")
    if dot:
        raise UsageError(
            f"model.vision.timm: {config.timm} names trained weights, which mlip does not download; write {name} for "
            "its architecture, and their file as model.vision.init"
        )
    if not timm.is_model(config.timm):
        close = difflib.get_close_matches(config.timm, timm.list_models(), 3)
        hint = f"did you mean {', '.join(close)}?" if close else "names look like vit_small_patch16_224"
        raise UsageError(f"model.vision.timm: timm has no model {config.timm!r}; {hint}")
    with torch.device("meta"):
        plain = timm.create_model(config.timm, pretrained=False, num_classes=0)
    if type(plain) not in (VisionTransformer, VisionTransformerDistilled):
        raise UsageError(
            f"model.vision.timm: {config.timm} is a {type(plain).__name__}; use a VisionTransformer or its distilled "
            "form, such as vit_base_patch16_224"
        )
    patch_size = plain.patch_embed.feat_ratio(as_scalar=True)
    if image_size % patch_size:
        raise UsageError(
            f"data.image_size: {image_size} is not a multiple of the patch size {patch_size} of {config.timm}"
        )
    own_block = {"block_fn": ObservedBlock} if all(is_observable(b) for b in plain.blocks) else {}
    return timm.create_model(
        config.timm,
        pretrained=False,
        num_classes=0,
        img_size=image_size,
        drop_path_rate=config.drop_path,
        **own_block,
        **pooling,
    )


def _half(grid: tuple[int, int], number: int) -> Tensor:
    return grid_halves(*grid)[number]


class ImageTower(nn.Module):
    """A ViT with token merging: images -> pooled feature and patch tokens.

    With a spectral stem, spectral blocks replace the first blocks of the trunk; all blocks keep their numbers.
    """

    def __init__(self, config: Vision, *, image_size: int, frequency: Frequency | None = None) -> None:
        super().__init__()
        self.trunk = build_trunk(config, image_size=image_size)
        self.stem_depth = stem_depth(frequency)
        if frequency is not None and self.stem_depth:
            place_stem(self.trunk, frequency)
        self.width: int = self.trunk.embed_dim
        self.depth = len(self.trunk.blocks)
        self.num_prefix: int = self.trunk.num_prefix_tokens
        self.grid: tuple[int, int] = self.trunk.patch_embed.grid_size
        self.num_patches = self.grid[0] * self.grid[1]
        self.patch_size = image_size // self.grid[0]  # hybrids embed the patches of a smaller feature map
        self.even, self.odd = (FixedMatrix(partial(_half, self.grid, number)) for number in (0, 1))
        self.dct = FixedMatrix(partial(dct_matrix, self.patch_size))

    def embed(self, images: Tensor) -> Tensor:
        """Prefix and patch tokens with positions: (B, 3, H, W) -> (B, P+N, D).

        Raises:
            UsageError: images of another size than the tower's.
        """
        given, own = tuple(images.shape[-2:]), tuple(self.trunk.patch_embed.img_size)
        if given != own:
            raise UsageError(f"images: {given[0]} x {given[1]} pixels, but the model reads {own[0]} x {own[1]}")
        # A convolution leaves the tokens transposed in memory, and so would be all sums of residuals: each norm would
        # copy them, and compiled code for CPUs makes NaN of them in bf16 (PyTorch 2.14).
        return self.trunk._pos_embed(self.trunk.patch_embed(images)).contiguous()

    def check_merging(self) -> None:
        """Check that the pooling can weigh each token by its number of patches.

        Raises:
            UsageError: it cannot, so the tower cannot merge.
        """
        if self.trunk.global_pool not in ("token", "max", "avg", "avgmax", "map"):
            raise UsageError(
                f"model.merging: towers that pool by {self.trunk.global_pool!r} cannot merge; set model.merging to null"
            )

    def forward(
        self,
        images: Tensor,
        plan: MergePlan,
        *,
        assign: tuple[Tensor, ...] | None = None,
        spectrum: Tensor | None = None,
    ) -> TowerOutput:
        """Run normalised images (B, 3, H, W) through the tower, merging by `plan`.

        Args:
            assign: the groups of an earlier pass, to merge again as it did.
            spectrum: `patch_dct(images, self.dct.matrix)`, if it is needed elsewhere too; guidance then reads it.

        Raises:
            UsageError: images of another size than the tower's.
        """
        embedded = self.embed(images)
        x = self.trunk.norm_pre(self.trunk.patch_drop(embedded))
        pools_class_token = self.trunk.cls_token is not None and self.trunk.global_pool == "token"
        halves = self.even.matrix, self.odd.matrix
        patches = Patches(self.num_prefix, has_class_token=pools_class_token, halves=halves, dct=self.dct.matrix)
        merging = MergePass(images, plan, patches=patches, replay=assign, spectrum=spectrum)
        merges, stem_tokens = plan.merges, None
        again: bool = self.trunk.grad_checkpointing
        for number, block in enumerate(self.trunk.blocks, start=1):
            if number in merges:
                x = merging.merge(x, merges[number])
            if merging.wants_keys(number + 1) and isinstance(block, ObservedBlock):
                asked = {"observe": True, "with_row": merging.wants_row}
                x, merging.keys, merging.first_row = run_block(block, x, again=again, attn_mask=merging.mask, **asked)
            else:
                x = run_block(block, x, again=again, attn_mask=merging.mask)
            if number == self.stem_depth:
                stem_tokens = x[:, self.num_prefix :]
        x = self.trunk.norm(x)
        return TowerOutput(
            pooled=self._pool(x, merging),
            tokens=x[:, self.num_prefix :],
            sizes=merging.sizes,
            assign=tuple(merging.assigns),
            guidance=tuple(merging.guidance),
            embedded=embedded,
            stem_tokens=stem_tokens,
            spectrum=spectrum,
        )

    def _pool(self, x: Tensor, merging: MergePass) -> Tensor:
        """timm's pooling. Means count every patch once, also after merges."""
        trunk, kind, prefix = self.trunk, self.trunk.global_pool, self.num_prefix
        if merging.mask is None or kind in ("token", "max"):
            return trunk.forward_head(x, pre_logits=True)
        sizes = nn.functional.pad(merging.sizes, (prefix, 0), value=1)
        mask = merging.mask
        if not trunk.pool_include_prefix:
            x, sizes, mask = x[:, prefix:], sizes[:, prefix:], mask[..., prefix:]
        if kind == "map":
            pooled = trunk.attn_pool(x, attn_mask=mask)
        else:
            pooled = ((x * sizes[..., None]).sum(1) / sizes.sum(1, keepdim=True)).to(x.dtype)
            pooled = pooled if kind == "avg" else 0.5 * (x.amax(1) + pooled)
        return trunk.head_drop(trunk.fc_norm(pooled))
