"""The tokenizer is open_clip's, to the id, without the rest of open_clip."""

import pickle
import subprocess
import sys

import open_clip
import pytest
import torch

from mlip_cli.data.tokenizer import LENGTHS, Tokenizer
from mlip_cli.evaluate.validation import tokenize
from mlip_cli.recipe.config import VOCAB_SIZE

CAPTIONS = [
    "a photo of a cat",
    "",
    "   \n\t ",
    "A PHOTO, of: a «cat»!!! &amp;amp; it's we'll 12345",
    "naïve café — ﬁne ¿qué? ünïcödé",
    "日本語の字幕 и кириллица 한국어",
    "😀👩🏽‍🌾 zero\u200bwidth \u202eright to left\u202c \x00 nul",
    "<start_of_text> not <end_of_text> special",
    "word " * 200,
    "x" * 300,
    "[bold]markup[/bold] {braces} %s \\n",
]


@pytest.mark.parametrize("context_length", [8, 24, 77])
def test_ids_are_those_of_open_clip(context_length: int) -> None:
    reference = open_clip.get_tokenizer("ViT-B-32", context_length=context_length)
    assert torch.equal(Tokenizer(context_length).encode(CAPTIONS), reference(CAPTIONS))


def test_a_cut_caption_keeps_its_end() -> None:
    ids = Tokenizer(77).encode(["word " * 200], length=8)
    assert ids.shape == (1, 8)
    assert ids[0, -1] == VOCAB_SIZE - 1
    assert torch.equal(ids, Tokenizer(8).encode(["word " * 200]))


def test_count_is_before_any_cut() -> None:
    tokenizer = Tokenizer(8)
    assert tokenizer.count("") == 2
    assert tokenizer.count("a photo of a cat") == 7
    assert tokenizer.count("word " * 200) == 202


def test_vocabulary_size() -> None:
    assert open_clip.get_tokenizer("ViT-B-32").vocab_size == VOCAB_SIZE


def test_padded_length() -> None:
    assert [Tokenizer(77).padded_length(n) for n in (2, 8, 9, 24, 25, 49, 77, 500)] == [8, 8, 16, 24, 32, 77, 77, 77]
    assert [Tokenizer(20).padded_length(n) for n in (8, 16, 17, 500)] == [8, 16, 20, 20]
    assert [Tokenizer(100).padded_length(n) for n in (48, 77, 78)] == [48, 77, 100]


def test_lengths_are_those_of_the_rows() -> None:
    texts = ["", "a photo", "!" * 3, "word " * 100]
    rows = Tokenizer(77).encode(texts, length=16)
    assert Tokenizer(77).lengths(texts, length=16) == (2, 4, 3, 16)
    assert rows.argmax(1).tolist() == [1, 3, 2, 15]
    assert Tokenizer(77, whole=True).lengths(texts, length=77) is None


def test_evaluation_on_a_gpu_pads_texts_to_few_widths() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    texts = [" ".join(["word"] * n) for n in range(1, 90)]
    whole = Tokenizer(77).encode(texts)
    for i in range(0, len(texts), 3):
        some = tokenize(Tokenizer(77), gpu, texts[i : i + 3])
        assert some.shape[1] == next(width for width in LENGTHS if min(i + 5, 77) <= width)
        assert torch.equal(some, whole[i : i + 3, : some.shape[1]])
    assert tokenize(Tokenizer(77, whole=True), gpu, texts[:1]).shape == (1, 77)
    assert tokenize(Tokenizer(77), cpu, texts[:1]).shape == (1, 3)


def test_pickles_small() -> None:
    tokenizer = Tokenizer(24)
    tokenizer.encode(["loaded"])
    sent = pickle.dumps(tokenizer)
    assert len(sent) < 200
    assert torch.equal(pickle.loads(sent).encode(CAPTIONS), tokenizer.encode(CAPTIONS))  # noqa: S301 - our own bytes


def test_no_room_for_a_word() -> None:
    with pytest.raises(ValueError, match="context_length 2 leaves no room"):
        Tokenizer(2)


@pytest.mark.slow
def test_the_rest_of_open_clip_stays_unloaded() -> None:
    code = (
        "import sys; from mlip_cli.data.tokenizer import Tokenizer; Tokenizer(8).encode(['a']); "
        "sys.exit(any(name in sys.modules for name in ('open_clip', 'timm', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
