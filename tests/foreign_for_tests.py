"""Small models of other programs, written as these write them."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
import transformers
from open_clip_for_tests import randomised
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn

SIGLIP_TOWER = "vit_tiny_patch8_siglip_for_tests"
CLIP_TOWER = "vit_tiny_patch8_clip_for_tests_too"
GAP_TOWER = "vit_tiny_patch8_gap_for_tests"
WORDS = ["a dog", "wow, a red balloon!", "A Red balloon with quite a long string over the roofs of the town", "x"]
CORPUS = [*WORDS, "roofs and towns", "dogs", "strings of red balloons"]


@contextmanager
def towers_of_timm() -> Iterator[None]:
    """Towers in the form of timm's for SigLIP, for CLIP and with a pooled mean, but small."""
    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
    kinds: dict[str, dict[str, Any]] = {
        SIGLIP_TOWER: {"class_token": False, "global_pool": "map"},
        CLIP_TOWER: {"pre_norm": True, "norm_layer": lambda width, **kinds: nn.LayerNorm(width, eps=1e-5, **kinds)},
        GAP_TOWER: {"class_token": False, "global_pool": "avg", "fc_norm": False},
    }
    registry = timm.models._registry._model_entrypoints

    def tower(own: dict[str, Any]) -> Any:
        def build(**given: Any) -> VisionTransformer:
            wanted = {key: value for key, value in given.items() if not key.startswith(("pretrained", "cache"))}
            model = VisionTransformer(**sizes | own | wanted)
            model.default_cfg = {"pool_size": None}
            return model

        return build

    registry |= {name: tower(own) for name, own in kinds.items()}
    yield
    for name in kinds:
        del registry[name]


VISION = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 3, "head_width": 16}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
OTHER_TEXT = {**TEXT, "vocab_size": 120, "hf_tokenizer_name": "somebody/tokenizer"}
SIGLIP_TEXT = {
    **OTHER_TEXT,
    "tokenizer_kwargs": {"clean": "canonicalize"},
    "no_causal_mask": True,
    "proj_bias": True,
    "pool_type": "last",
    "norm_kwargs": {"eps": 1e-6},
}
SIGLIP_VISION = {"image_size": 32, "timm_model_name": SIGLIP_TOWER, "timm_pool": "map", "timm_proj": "none"}
SIGLIP = {"embed_dim": 32, "init_logit_bias": -10, "custom_text": True, "vision_cfg": SIGLIP_VISION}

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "openai": {"embed_dim": 16, "quick_gelu": True, "vision_cfg": VISION, "text_cfg": TEXT},
    "laion": {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT},
    "plain_vit": {
        "embed_dim": 16,
        "vision_cfg": {**VISION, "no_ln_pre": True, "norm_kwargs": {"eps": 1e-6}},
        "text_cfg": TEXT,
    },
    "layer_scale": {"embed_dim": 16, "vision_cfg": {**VISION, "ls_init_value": 1e-4}, "text_cfg": TEXT},
    "clipa": {
        "embed_dim": 16,
        "vision_cfg": {**VISION, "no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True},
        "text_cfg": {
            **OTHER_TEXT,
            "tokenizer_kwargs": {"strip_sep_token": True},
            "pool_type": "last",
            "no_causal_mask": True,
        },
    },
    "worldwide": {
        "embed_dim": 16,
        "vision_cfg": VISION,
        "text_cfg": {**OTHER_TEXT, "pool_type": "eos", "eos_id": 2},
    },
    "siglip": {**SIGLIP, "text_cfg": SIGLIP_TEXT},
    "siglip2": {**SIGLIP, "text_cfg": {**SIGLIP_TEXT, "act_kwargs": {"approximate": "tanh"}, "mlp_ratio": 3.7362}},
    "siglip_i18n": {
        **SIGLIP,
        "text_cfg": {key: value for key, value in SIGLIP_TEXT.items() if key != "proj_bias"} | {"proj_type": "none"},
    },
    "mobileclip2": {
        "embed_dim": 16,
        "custom_text": True,
        "vision_cfg": {"image_size": 32, "timm_model_name": CLIP_TOWER, "timm_pool": "token", "timm_proj": None},
        "text_cfg": {**TEXT, "no_causal_mask": True},
    },
    "gap": {
        "embed_dim": 16,
        "custom_text": True,
        "vision_cfg": {"image_size": 32, "timm_model_name": GAP_TOWER, "timm_pool": "", "timm_proj": "linear"},
        "text_cfg": TEXT,
    },
}
"""A small model of each kind that mlip reads, as OpenCLIP configures it."""


def model_of(configuration: dict[str, Any]) -> Any:
    """OpenCLIP's model with random weights."""
    arguments = dict(configuration)
    kind = open_clip.CustomTextCLIP if arguments.pop("custom_text", False) else open_clip.CLIP
    return randomised(kind(**arguments))


def write_open_clip(folder: Path, configuration: dict[str, Any], **preprocess: Any) -> Any:
    """A folder in OpenCLIP's layout, and the model that lies in it."""
    model = model_of(configuration)
    folder.mkdir(parents=True)
    content = {"model_cfg": configuration, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    if "hf_tokenizer_name" in configuration["text_cfg"]:
        write_tokenizer(folder)
    return model


def write_tokenizer(folder: Path) -> None:
    """A small tokenizer.json with its settings, in the form of those on the Hub."""
    tokens = Tokenizer(models.BPE(unk_token="<unk>"))
    tokens.normalizer = normalizers.Lowercase()
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<pad>", "<unk>", "</s>", "[SEP]"]
    tokens.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=100, special_tokens=special))
    end = ("</s>", tokens.token_to_id("</s>"))
    tokens.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[end])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", unk_token="<unk>", eos_token="</s>", sep_token="[SEP]"
    )
    fast.save_pretrained(folder)


def write_transformers(folder: Path, kind: str) -> Any:
    """A folder in transformers' layout, and the CLIPModel or SiglipModel that lies in it."""
    vision = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2}
    text = {**vision, "max_position_embeddings": 16}
    vision |= {"image_size": 32, "patch_size": 8}
    if kind == "clip":
        configuration = transformers.CLIPConfig(
            vision_config=vision, text_config={**text, "vocab_size": 49408, "eos_token_id": 49407}, projection_dim=16
        )
        model: Any = transformers.CLIPModel(configuration)
    else:
        configuration = transformers.SiglipConfig(vision_config=vision, text_config={**text, "vocab_size": 120})
        model = transformers.SiglipModel(configuration)
    randomised(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter += 1
    model.save_pretrained(folder)
    if kind == "siglip":
        write_tokenizer(folder)
    return model
