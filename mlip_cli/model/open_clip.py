"""Weights by OpenCLIP's names, which are OpenAI's too, or by those of transformers' CLIPModel and SiglipModel: renamed
to ours.

All sides name the same tensors. Only names, transposed projections and axes of length one differ; transformers also
keeps query, key and value apart. OpenCLIP's towers of timm have timm's names, as ours have.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from mlip_cli.errors import UsageError
from mlip_cli.recipe.architecture import READ

BLOCKS = {"visual.transformer.resblocks": "vision.trunk.blocks", "transformer.resblocks": "text.blocks"}
MODULES_OF_A_BLOCK = {
    "ln_1.": "norm1.",
    "attn.in_proj_": "attn.qkv.",
    "attn.out_proj.": "attn.proj.",
    "ln_2.": "norm2.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
    "ls_1.": "ls1.",
    "ls_2.": "ls2.",
}
OUTSIDE_BLOCKS = {
    "visual.conv1.weight": "vision.trunk.patch_embed.proj.weight",
    "visual.conv1.bias": "vision.trunk.patch_embed.proj.bias",
    "visual.class_embedding": "vision.trunk.cls_token",
    "visual.positional_embedding": "vision.trunk.pos_embed",
    "visual.ln_pre.weight": "vision.trunk.norm_pre.weight",
    "visual.ln_pre.bias": "vision.trunk.norm_pre.bias",
    "visual.ln_post.weight": "vision.trunk.norm.weight",
    "visual.ln_post.bias": "vision.trunk.norm.bias",
    "visual.proj": "image_projection.weight",
    "token_embedding.weight": "text.token_embedding.weight",
    "positional_embedding": "text.positional_embedding",
    "ln_final.weight": "text.norm.weight",
    "ln_final.bias": "text.norm.bias",
    "text_projection": "text_projection.weight",
    "text_projection.weight": "text_projection.weight",
    "text_projection.bias": "text_projection.bias",
    "visual.head.proj.weight": "image_projection.weight",
    "visual.head.proj.bias": "image_projection.bias",
    "visual.trunk.head.weight": "image_projection.weight",
    "visual.trunk.head.bias": "image_projection.bias",
    "logit_scale": "log_scales.spatial_global",
    "logit_bias": "logit_biases.spatial_global",
}
PATCH_BIAS = "vision.trunk.patch_embed.proj.bias"
FROM_OURS = {
    **{ours: theirs for theirs, ours in reversed(OUTSIDE_BLOCKS.items()) if ours != PATCH_BIAS},
    "vision.trunk.fc_norm.weight": "visual.ln_post.weight",
    "vision.trunk.fc_norm.bias": "visual.ln_post.bias",
}
"""Our names -> those of OpenCLIP's own classes, which come first in `OUTSIDE_BLOCKS`."""
TRANSPOSED = ("visual.proj", "text_projection")
"""(D, E) in OpenCLIP, (E, D) here."""
LEADING_AXES = {"visual.class_embedding": 2, "visual.positional_embedding": 1}
"""Number of axes of length one that come first here and that OpenCLIP does not have."""
SCALARS = ("logit_scale", "logit_bias")
"""() or (1,) in OpenCLIP, (1,) here."""
NO_WEIGHTS = (
    *("attn_mask", "input_resolution", "context_length", "vocab_size"),
    *("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids", "n_averaged"),
)
"""Entries of some files that repeat what the shapes say, or count what an average is of."""

WRAPPERS = ("module", "model", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""What DDP and averages, Lightning, torch.compile, FSDP and recomputation add to names, in front or in between."""

OF_TRANSFORMERS = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.": "visual.conv1.",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.": "visual.ln_pre.",  # spelled like this there
    "vision_model.encoder.layers.": "visual.transformer.resblocks.",
    "vision_model.post_layernorm.": "visual.ln_post.",
    "vision_model.head.": "visual.trunk.attn_pool.",
    "visual_projection.weight": "visual.proj",
    "text_model.embeddings.token_embedding.": "token_embedding.",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.encoder.layers.": "transformer.resblocks.",
    "text_model.final_layer_norm.": "ln_final.",
    "text_projection.weight": "text_projection",
    "text_model.head.": "text_projection.",
}
"""Beginnings of transformers' names -> OpenCLIP's."""
BLOCKS_OF_TRANSFORMERS = {
    ".layer_norm1.": ".ln_1.",
    ".self_attn.out_proj.": ".attn.out_proj.",
    ".layer_norm2.": ".ln_2.",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
}
POOLING_OF_TRANSFORMERS = {
    ".attn_pool.probe": ".attn_pool.latent",
    ".attn_pool.attention.out_proj.": ".attn_pool.proj.",
    ".attn_pool.layernorm.": ".attn_pool.norm.",
}
QUERY_AND_REST = (".attn_pool.q.", ".attn_pool.kv.")
"""timm's two parts of what is one matrix of SigLIP's attention pooling in transformers: query, key and value."""
QUERY_KEY_VALUE = re.compile(r"(.+)\.self_attn\.([qkv])_proj\.(weight|bias)")

ONLY_OURS = ("frequency.", "frequency_projection.", "token_projections.", "log_scales.", "logit_biases.")
"""Beginnings of the names that OpenCLIP has no tensor for, but for the scale and the bias of spatial_global."""


def from_open_clip(weights: Mapping[str, Tensor], *, source: str) -> dict[str, Tensor]:
    """OpenCLIP's weights by our names and in our shapes, some as views.

    What wrappers add to names is taken off, as is `text.` of models with a separate text tower; transformers' names
    are read too. `source` begins the message of an error.

    Raises:
        UsageError: names of parts that our towers do not have, or two tensors for one part.
    """
    found: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in from_transformers(unwrapped(weights, source=source), source=source).items():
        name = name.removeprefix("text.")
        ours = _our_name(name)
        if ours is not None:
            tensor = _transposed(tensor) if name in TRANSPOSED else tensor[(None,) * LEADING_AXES.get(name, 0)]
            found[ours] = tensor.reshape(-1) if name in SCALARS else tensor
        elif name not in NO_WEIGHTS:
            unknown.append(name)
    if unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise UsageError(f"{source}: {', '.join(unknown[:3])}{more}: no such part here; {READ}")
    return found


def as_built(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of `from_open_clip` with the names that a model's tensors `own` have.

    timm's towers without a norm before the blocks have a bias in the patch embedding, which is 0 here, and another name
    for a norm behind the pooling.
    """
    found = dict(weights)
    if PATCH_BIAS in own and PATCH_BIAS not in found:
        found[PATCH_BIAS] = torch.zeros(own[PATCH_BIAS].shape)
    for kind in ("weight", "bias"):
        last, behind_mean = f"vision.trunk.norm.{kind}", f"vision.trunk.fc_norm.{kind}"
        if behind_mean in own and last in found:
            found[behind_mean] = found.pop(last)
    return found


def unwrapped(weights: Mapping[str, Tensor], *, source: str) -> dict[str, Tensor]:
    """The same tensors by their names without those of wrappers, such as `module.` and `_orig_mod.`, in any order.

    Raises:
        UsageError: two names are the same without them.
    """
    found: dict[str, Tensor] = {}
    for given, tensor in weights.items():
        name = ".".join(part for part in given.split(".") if part not in WRAPPERS)
        if name in found:
            raise UsageError(f"{source}: two tensors are named {name} but for wrappers, one of them {given}; keep one")
        found[name] = tensor
    return found


def from_transformers(weights: Mapping[str, Tensor], *, source: str) -> dict[str, Tensor]:
    """The weights of transformers' CLIPModel by OpenCLIP's names and in its shapes; other names stay as they are.

    Raises:
        UsageError: query, key and value of a block do not fit together.
    """
    found: dict[str, Tensor] = {}
    apart: dict[str, dict[str, Tensor]] = {}
    for given, tensor in weights.items():
        start = next((start for start in OF_TRANSFORMERS if given.startswith(start)), None)
        if start is None:
            found[given] = tensor
            continue
        name = OF_TRANSFORMERS[start] + given.removeprefix(start)
        one_of_three = QUERY_KEY_VALUE.fullmatch(name)
        if one_of_three is not None:
            block, letter, kind = one_of_three.groups()
            apart.setdefault(f"{block}.attn.in_proj_{kind}", {})[letter] = tensor
            continue
        if ".attn_pool.attention.in_proj_" in name:
            for part, rows in zip(
                QUERY_AND_REST, (tensor[: len(tensor) // 3], tensor[len(tensor) // 3 :]), strict=True
            ):
                found[name.replace(".attn_pool.attention.in_proj_", part)] = rows
            continue
        for theirs, own in (BLOCKS_OF_TRANSFORMERS if ".resblocks." in name else POOLING_OF_TRANSFORMERS).items():
            name = name.replace(theirs, own)
        found[name] = _transposed(tensor) if name in TRANSPOSED else tensor
    for name, parts in apart.items():
        if len(parts) < 3 or len({tensor.shape for tensor in parts.values()}) > 1 or not parts["q"].ndim:
            raise UsageError(
                f"{source}: {name}: query, key and value are not three tensors of one shape; save them again"
            )
        found[name] = torch.cat([parts[letter] for letter in "qkv"])
    return found


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.T if tensor.ndim == 2 else tensor  # of another shape it fits nowhere, which loading says


def _our_name(name: str) -> str | None:
    if name in OUTSIDE_BLOCKS:
        return OUTSIDE_BLOCKS[name]
    if name.startswith("visual.trunk."):
        return name.replace("visual.", "vision.", 1)
    in_block = re.fullmatch(r"(.+?)\.(\d+)\.(.+[._])(weight|bias|gamma)", name)
    if in_block is None:
        return None
    blocks, number, module, kind = in_block.groups()
    if blocks not in BLOCKS or module not in MODULES_OF_A_BLOCK:
        return None
    return f"{BLOCKS[blocks]}.{number}.{MODULES_OF_A_BLOCK[module]}{kind}"


def to_open_clip(weights: Mapping[str, Tensor], *, of_timm: bool, custom_text: bool) -> dict[str, Tensor]:
    """Our weights by OpenCLIP's names and in its shapes: the inverse of `from_open_clip`.

    Parts that only ours has are left out, but for the scale and the bias of spatial_global. A bias of the patch
    embedding is added to the positions, which changes nothing.

    Args:
        of_timm: the image tower is OpenCLIP's wrapper of timm, not its own ViT.
        custom_text: the text tower is a module of its own, so that its names begin with `text.`.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if of_timm and name.startswith("vision."):
            found[name.replace("vision.", "visual.", 1)] = tensor
            continue
        if of_timm and name.startswith("image_projection."):
            found[name.replace("image_projection", "visual.head.proj")] = tensor
            continue
        theirs = _their_name(name)
        if theirs is None:
            continue
        if theirs == "visual.positional_embedding" and PATCH_BIAS in weights:
            tensor = torch.cat([tensor[:, :1], tensor[:, 1:] + weights[PATCH_BIAS]], dim=1)
        if theirs == "text_projection" and "text_projection.bias" in weights:
            theirs = "text_projection.weight"
        tensor = tensor.T if theirs in TRANSPOSED else tensor.reshape(tensor.shape[LEADING_AXES.get(theirs, 0) :])
        is_text = name.startswith(("text.", "text_projection."))
        found["text." * (custom_text and is_text) + theirs] = tensor.reshape(()) if theirs in SCALARS else tensor
    return found


def _their_name(name: str) -> str | None:
    if name in FROM_OURS:
        return FROM_OURS[name]
    for theirs, blocks in BLOCKS.items():
        in_block = re.fullmatch(rf"{re.escape(blocks)}\.(\d+)\.(.+\.)(weight|bias|gamma)", name)
        if in_block is not None:
            number, module, kind = in_block.groups()
            their_module = next(other for other, own in MODULES_OF_A_BLOCK.items() if own == module)
            return f"{theirs}.{number}.{their_module}{kind}"
    return None


def to_transformers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our weights by the names of transformers' CLIPModel or SiglipModel: the inverse of `from_transformers`.

    A pooling by attention makes it a SiglipModel, whose patch embedding has a bias.
    """
    is_siglip = any(QUERY_AND_REST[0] in name for name in weights)
    plain = {name: tensor for name, tensor in weights.items() if name != PATCH_BIAS}
    named = to_open_clip(plain, of_timm=False, custom_text=False)
    if is_siglip:
        named |= {n.replace("vision.", "visual.", 1): own for n, own in weights.items() if ".attn_pool." in n}
        named["visual.conv1.bias"] = weights[PATCH_BIAS]
    found: dict[str, Tensor] = {}
    for name, tensor in named.items():
        renamed = name
        for theirs, own in (BLOCKS_OF_TRANSFORMERS if ".resblocks." in name else POOLING_OF_TRANSFORMERS).items():
            renamed = renamed.replace(own, theirs)
        starts = [(start, theirs) for theirs, start in OF_TRANSFORMERS.items() if renamed.startswith(start)]
        start, theirs = max(starts, key=lambda pair: len(pair[0]), default=("", ""))
        renamed = theirs + renamed.removeprefix(start)
        if ".attn.in_proj_" in name:
            for letter, rows in zip("qkv", tensor.chunk(3), strict=True):
                found[renamed.replace(".attn.in_proj_", f".self_attn.{letter}_proj.")] = rows
        elif QUERY_AND_REST[0] in name:
            rest = named[name.replace(*QUERY_AND_REST)]
            found[renamed.replace("head.q.", "head.attention.in_proj_")] = torch.cat([tensor, rest])
        elif QUERY_AND_REST[1] not in name:
            found[renamed] = _transposed(tensor) if name in TRANSPOSED else tensor
    for name in SCALARS:
        if is_siglip and name in found:
            found[name] = found[name].reshape(1)
    return found
