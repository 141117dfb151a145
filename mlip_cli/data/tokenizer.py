"""Captions to token ids: open_clip's byte-pair encoding, loaded from its one file.

Importing `open_clip` itself takes nine seconds (models, training, hub clients), its tokenizer alone a quarter of that,
and every worker process pays.
"""

from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlip_cli.data.index import MAX_TOKENS
from mlip_cli.data.packages import open_clip_module
from mlip_cli.types import VOCAB_SIZE

LENGTHS = (8, 16, 24, 32, 48, 77)


class Tokenizer:
    """Captions to ids. Pickles as one number; the vocabulary is loaded on first use, once a process."""

    vocab_size = VOCAB_SIZE

    def __init__(self, context_length: int) -> None:
        if context_length < 3:
            raise ValueError(
                f"context_length {context_length} leaves no room for a word between BOS and EOS; use 3 or more"
            )
        self.context_length = context_length

    def encode(self, texts: Sequence[str], *, length: int | None = None) -> Tensor:
        """Token ids (n, context_length) int64: BOS, caption, EOS, zeros; a caption that is too long is cut before EOS.

        With `length` the result is (n, length) instead: the same ids, cut or padded there.
        """
        assert not isinstance(texts, str), "a list of captions, not one caption"
        length = length or self.context_length
        rows = np.zeros((len(texts), length), np.int64)
        for row, text in zip(rows, texts, strict=True):
            ids = _ids(text)
            row[: len(ids)] = ids if len(ids) <= length else (*ids[: length - 1], ids[-1])
        return torch.from_numpy(rows)

    def count(self, text: str) -> int:
        """Number of tokens of `text` with BOS and EOS, before any cut."""
        return len(_ids(text))


def padded_length(num_tokens: int, context_length: int) -> int:
    """Width of a batch whose longest caption has `num_tokens`: the next of `LENGTHS`, at most `context_length`."""
    return next((length for length in LENGTHS if num_tokens <= length < context_length), context_length)


@lru_cache(maxsize=16_384)
def _ids(text: str) -> tuple[int, ...]:
    """All ids of a caption, BOS and EOS too. A small data set repeats its captions epoch after epoch."""
    bpe = _bpe()
    return bpe.sot_token_id, *bpe.encode(text), bpe.eot_token_id


@cache
def _bpe() -> Any:
    return open_clip_module("tokenizer").SimpleTokenizer()


def count_tokens(captions: Iterable[str]) -> int:
    """CLIP tokens of the longest caption, as an index records them."""
    return min(MAX_TOKENS, max(len(_ids(caption)) for caption in captions))
