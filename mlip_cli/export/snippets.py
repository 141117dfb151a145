"""How to load each format: short programs for a model card. They run inside the exported folder."""

from collections.abc import Callable, Iterator

from mlip_cli.recipe.config import Recipe, Text

FORMATS = {"open_clip": "open_clip", "huggingface": "transformers", "onnx": "onnx", "safetensors": "mlip"}
"""Format -> the library that loads it, by the name that the Hugging Face Hub knows."""


def snippet(format: str, recipe: Recipe) -> Iterator[str]:
    """Paragraphs of Markdown with a program that compares `picture.jpg` with two texts."""
    lead, program = PROGRAMS[format]
    yield f"{lead}{_from_hub(format, recipe)}"
    yield f"```python\n{program(recipe).strip()}\n```"


def _from_hub(format: str, recipe: Recipe) -> str:
    """How to name a repository of the Hub; nothing where OpenCLIP would look for the tokenizer in this folder."""
    if format == "open_clip" and recipe.model.text.tokenizer is None:
        return " From the Hub write `hf-hub:OWNER/NAME` in place of `local-dir:.`."
    return " From the Hub write `OWNER/NAME` in place of `.`." if format == "huggingface" else ""


def _open_clip(recipe: Recipe) -> str:
    return """
import open_clip
import torch
from PIL import Image

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:.")
tokenizer = open_clip.get_tokenizer("local-dir:.")
model.eval()

with torch.no_grad():
    images = model.encode_image(preprocess(Image.open("picture.jpg"))[None], normalize=True)
    texts = model.encode_text(tokenizer(["a dog", "a cat"]), normalize=True)
print(images @ texts.T)  # cosines
"""


def _transformers(recipe: Recipe) -> str:
    length = recipe.model.text.context_length
    return f"""
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained(".").eval()
processor = AutoProcessor.from_pretrained(".")
texts = ["a dog", "a cat"]
picture = Image.open("picture.jpg").convert("RGB")
fixed = {{"padding": "max_length", "max_length": {length}, "truncation": True}}  # as in training
inputs = processor(text=texts, images=picture, return_tensors="pt", **fixed)

with torch.no_grad():
    found = model(**inputs)
print(found.image_embeds @ found.text_embeds.T)  # cosines
"""


def _safetensors(recipe: Recipe) -> str:
    return """
from PIL import Image
from mlip_cli import load

model = load(".")
images = model.encode_image([Image.open("picture.jpg")])
print(images @ model.encode_text(["a dog", "a cat"]).T)  # cosines
"""


def _onnx(recipe: Recipe) -> str:
    size = recipe.data.image_size
    squashed = f"picture = picture.resize(({size}, {size}), Image.Resampling.BICUBIC)"
    cropped = f"""short = min(picture.size)
picture = picture.resize([{size} * side // short for side in picture.size], Image.Resampling.BICUBIC)
left, top = (round((side - {size}) / 2) for side in picture.size)
picture = picture.crop((left, top, left + {size}, top + {size}))"""
    scored = recipe.losses.spatial_global
    logits = 'about["logit_scale"] * images @ texts.T'
    ending = "print(images @ texts.T)  # cosines"
    if scored is not None and scored.kind == "infonce":
        ending = f"""logits = {logits}
shares = np.exp(logits - logits.max(1, keepdims=True))
print(shares / shares.sum(1, keepdims=True))  # shares of the texts"""
    elif scored is not None:
        ending = f'logits = {logits} + about["logit_bias"]\nprint(1 / (1 + np.exp(-logits)))  # probability of each'
    return f"""
import json

import numpy as np
import onnxruntime
{_tokenizer_import(recipe.model.text)}
from PIL import Image

about = json.load(open("onnx.json"))
image_graph = onnxruntime.InferenceSession("image.onnx")
text_graph = onnxruntime.InferenceSession("text.onnx")

picture = Image.open("picture.jpg").convert("RGB")
{squashed if recipe.data.resize == "squash" else cropped}
pixels = np.asarray(picture).transpose(2, 0, 1)[None]  # uint8; several pictures are one batch

{_tokens(recipe.model.text)}
images = image_graph.run(None, {{"pixels": pixels}})[0]
texts = text_graph.run(None, {{"token_ids": token_ids}})[0]
{ending}
"""


def _tokenizer_import(text: Text) -> str:
    if text.tokenizer is None:
        return "from open_clip.tokenizer import SimpleTokenizer"
    return "from open_clip.tokenizer import get_clean_fn\nfrom tokenizers import Tokenizer"


def _tokens(text: Text) -> str:
    """Token ids (n, context_length) int64 of two texts."""
    length, own = text.context_length, text.tokenizer
    if own is None:
        return f'token_ids = SimpleTokenizer(context_length={length})(["a dog", "a cat"]).numpy()'
    zeroed = "" if own.zero_id is None else f"token_ids[token_ids == {own.zero_id}] = 0\n"
    return f"""clean = get_clean_fn("{own.clean}")
tokenizer = Tokenizer.from_file("tokenizer.json")
tokenizer.enable_truncation({length})
tokenizer.enable_padding(length={length}, pad_id={own.pad_id})
encoded = tokenizer.encode_batch([clean(text) for text in ("a dog", "a cat")])
token_ids = np.array([own.ids for own in encoded])
{zeroed}"""


PROGRAMS: dict[str, tuple[str, Callable[[Recipe], str]]] = {
    "open_clip": ("With `pip install open_clip_torch`, in this folder.", _open_clip),
    "huggingface": ("With `pip install transformers`, in this folder.", _transformers),
    "onnx": (
        "With `pip install onnxruntime pillow open_clip_torch` (the last one for the tokenizer alone), in this folder. "
        "`onnx.json` says what the graphs expect.",
        _onnx,
    ),
    "safetensors": ("With `pip install mlip-cli`, in this folder.", _safetensors),
}
"""Format -> what it needs, and the program."""
