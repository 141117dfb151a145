"""Captions to token ids: open_clip's byte-pair encoding, loaded from its one file, or a tokenizer.json.

Importing `open_clip` itself takes nine seconds (models, training, hub clients), its tokenizer alone a quarter of that,
and every worker process pays.
"""

from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlip_cli.data.index import MAX_TOKENS
from mlip_cli.data.packages import open_clip_module
from mlip_cli.errors import UsageError
from mlip_cli.recipe.checks import reads_whole_captions
from mlip_cli.recipe.config import Text, TokenizerFile

LENGTHS = (8, 16, 24, 32, 48, 77)


class Tokenizer:
    """Captions to ids. Pickles as a few values; the vocabulary is loaded on first use, once a process."""

    def __init__(self, context_length: int, file: TokenizerFile | None = None, *, whole: bool = False) -> None:
        """`file` describes another tokenizer than CLIP's; `whole` says that captions never get shorter rows."""
        if context_length < 3:
            raise ValueError(
                f"context_length {context_length} leaves no room for a word between BOS and EOS; use 3 or more"
            )
        self.context_length = context_length
        self.file = file
        self.whole = whole or file is not None

    @classmethod
    def of(cls, text: Text) -> "Tokenizer":
        """The tokenizer of a recipe's text tower."""
        return cls(text.context_length, text.tokenizer, whole=reads_whole_captions(text))

    def encode(self, texts: Sequence[str], *, length: int | None = None) -> Tensor:
        """Token ids (n, context_length) int64: BOS, caption, EOS, zeros; a caption that is too long is cut before EOS.

        With `length` the result is (n, length) instead: the same ids, cut or padded there. A tokenizer from a file
        writes what that file says in place of BOS, EOS and zeros.

        Raises:
            UsageError: the tokenizer's file is missing or damaged.
        """
        assert not isinstance(texts, str), "a list of captions, not one caption"
        length = length or self.context_length
        if self.file is not None:
            return _from_file(texts, self.file, length)
        rows = np.zeros((len(texts), length), np.int64)
        for row, text in zip(rows, texts, strict=True):
            ids = _ids(text)
            row[: len(ids)] = ids if len(ids) <= length else (*ids[: length - 1], ids[-1])
        return torch.from_numpy(rows)

    def lengths(self, texts: Sequence[str], *, length: int) -> tuple[int, ...] | None:
        """Tokens of each text in the rows of `encode(texts, length=length)`; None: padding counts too."""
        return None if self.whole else tuple(min(self.count(text), length) for text in texts)

    def count(self, text: str) -> int:
        """Number of tokens of `text` with BOS and EOS, before any cut."""
        if self.file is None:
            return len(_ids(text))
        tokens = tokenizer_from(self.file.file)
        tokens.no_truncation()
        return len(tokens.encode(_cleaned(text, self.file.clean)).ids)

    def padded_length(self, num_tokens: int) -> int:
        """Width of a batch whose longest caption has `num_tokens`: the next of `LENGTHS`, at most `context_length`."""
        if self.whole:
            return self.context_length
        return next((own for own in LENGTHS if num_tokens <= own < self.context_length), self.context_length)


def _from_file(texts: Sequence[str], file: TokenizerFile, length: int) -> Tensor:
    tokens = tokenizer_from(file.file)
    tokens.enable_truncation(length)
    rows = np.full((len(texts), length), file.pad_id, np.int64)
    encodings = tokens.encode_batch([_cleaned(text, file.clean) for text in texts])
    for row, encoding in zip(rows, encodings, strict=True):
        row[: len(encoding.ids)] = encoding.ids
    if file.zero_id is not None:
        rows[rows == file.zero_id] = 0
    return torch.from_numpy(rows)


@cache
def tokenizer_from(file: str) -> Any:
    """A tokenizer of Hugging Face's library from its file, without padding; truncation is the caller's.

    Raises:
        UsageError: no such file, or it is damaged.
    """
    import tokenizers

    if not Path(file).is_file():
        raise UsageError(f"{file}: no such tokenizer; it is the tokenizer.json that belongs to the weights")
    try:
        found = tokenizers.Tokenizer.from_file(file)
    except Exception as error:  # noqa: BLE001 - the library raises no narrower type
        raise UsageError(f"{file}: not a tokenizer.json of Hugging Face ({error}); fetch it again") from None
    found.no_padding()
    return found


def _cleaned(text: str, how: str) -> str:
    return str(open_clip_module("tokenizer").get_clean_fn(how)(text))


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
