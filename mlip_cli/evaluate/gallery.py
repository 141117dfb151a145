"""Which queries a gallery shows, and what the model finds for them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mlip_cli.evaluate.retrieval import ranks
from mlip_cli.evaluate.zeroshot import similarities


@dataclass(frozen=True)
class Query:
    """One query and the candidates that come first."""

    number: int
    """Of the query."""
    found: tuple[int, ...]
    """Numbers of the best candidates, best first."""
    is_right: tuple[bool, ...]
    """Whether each of them is one of the query's own."""
    first_right: int
    """Number of the query's own candidate that comes first."""
    rank: int
    """How many wrong candidates come before the first right one, ties counted against the model."""


def random_queries(queries: Tensor, gallery: Tensor, right: Sequence[Sequence[int]], *, n: int, k: int) -> list[Query]:
    """Up to `n` queries drawn with seed 0, each with its `k` best candidates.

    Args:
        queries: (Q, E) unit vectors. gallery: (G, E) unit vectors.
        right: for each query the numbers of its right candidates, at least one.
    """
    order = torch.randperm(len(queries), generator=torch.Generator().manual_seed(0))[:n].tolist()
    chosen = queries[order]
    own = [right[number] for number in order]
    places = ranks(chosen, gallery, own).tolist()
    shown = []
    for number, rights, scores, rank in zip(order, own, similarities(chosen, gallery), places, strict=True):
        found = scores.topk(min(k, len(gallery))).indices.tolist()
        first_right = rights[int(scores[list(rights)].argmax())]
        is_right = tuple(candidate in rights for candidate in found)
        shown.append(Query(number, tuple(found), is_right, first_right, rank))
    return shown
