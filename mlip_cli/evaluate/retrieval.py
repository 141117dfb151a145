"""Retrieval between pictures and texts: exact, in chunks. Ties count against the model."""

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlip_cli.evaluate.statistics import by_cluster, chance_at, cluster_interval, wilson
from mlip_cli.evaluate.together import on_all_ranks
from mlip_cli.evaluate.zeroshot import similarities

RECALL_AT = (1, 5, 10)
CHUNK = 256
"""Queries that are compared at once. Ranks share the work by chunks."""


def rank_of_first_right(scores: Tensor, right: Tensor) -> Tensor:
    """How many wrong candidates come before the best right one: (Q, G) scores, (Q, G) bool -> (Q,).

    A wrong candidate with an equal score comes before it, so a model with one feature for everything finds nothing. A
    wrong candidate whose score is NaN comes before it too. A right candidate whose score is NaN comes last.
    """
    best = scores.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
    return (~(scores < best) & ~right).sum(dim=1)


def ranks(queries: Tensor, gallery: Tensor, right: Sequence[Sequence[int]], *, chunk: int = CHUNK) -> Tensor:
    """`rank_of_first_right` of each query: (Q, E), (G, E) unit vectors -> (Q,) int64 on the CPU.

    Args:
        right: for each query the numbers of its right candidates, at least one.
        chunk: queries compared at once; memory is chunk x G.
    """
    found = []
    for start in range(0, len(queries), chunk):
        numbers = right[start : start + chunk]
        rows = [row for row, candidates in enumerate(numbers) for _ in candidates]
        columns = [candidate for candidates in numbers for candidate in candidates]
        mask = torch.zeros(len(numbers), len(gallery), dtype=torch.bool)
        mask[rows, columns] = True
        assert bool(mask.any(dim=1).all()), "a query without a right candidate"
        found.append(
            rank_of_first_right(similarities(queries[start : start + chunk], gallery), mask.to(queries.device)).cpu()
        )
    return torch.cat(found)


def ranks_by_all(queries: Tensor, gallery: Tensor, right: Sequence[Sequence[int]]) -> Tensor:
    """`ranks` on every rank; all of them have these vectors, and each compares some chunks of the queries."""

    def compare(numbers: range) -> Iterator[Tensor]:
        for start in (number * CHUNK for number in numbers):
            yield ranks(queries[start : start + CHUNK], gallery, right[start : start + CHUNK])

    return torch.cat(on_all_ranks(compare, num_batches=-(-len(queries) // CHUNK)))


@dataclass(frozen=True)
class Ranks:
    """The ranks that a set of queries reached."""

    ranks: Tensor
    """(Q,): wrong candidates before the first right one."""
    num_accepted: Sequence[int]
    """Right candidates of each query."""
    num_candidates: int
    cluster_of: Sequence[int] | None = None
    """Cluster of each query; None: the queries are independent."""

    def recalls(self, *, at: Sequence[int] = RECALL_AT) -> dict[str, Any]:
        """Recall at each k with its 95 % interval and its chance level, as `r1`, `r1_interval`, `r1_chance`, ...

        Queries of one cluster depend on each other: the interval draws them together.
        """
        n = len(self.ranks)
        scores: dict[str, Any] = {"n": n, "num_candidates": self.num_candidates}
        for k in at:
            hits = self.ranks < k
            chances = {a: chance_at(k, accepted=a, candidates=self.num_candidates) for a in set(self.num_accepted)}
            scores[f"r{k}"] = int(hits.sum()) / n
            scores[f"r{k}_interval"] = (
                wilson(int(hits.sum()), n)
                if self.cluster_of is None
                else cluster_interval(*by_cluster(hits.double().tolist(), self.cluster_of))
            )
            scores[f"r{k}_chance"] = sum(chances[a] for a in self.num_accepted) / n
        return scores

    def right(self, *, at: Sequence[int] = RECALL_AT) -> dict[str, str]:
        """Which queries are right at each k, for paired tests: strings of 0 and 1 as `r1`, ..."""
        return {f"r{k}": "".join("01"[rank < k] for rank in self.ranks.tolist()) for k in at}


def images_of_texts(captions: Sequence[Sequence[int]], num_texts: int) -> list[list[int]]:
    """The numbers of each text's images, from those of each image's texts."""
    images: list[list[int]] = [[] for _ in range(num_texts)]
    for image, texts in enumerate(captions):
        for text in texts:
            images[text].append(image)
    return images


def image_text_ranks(
    image_features: Tensor, text_features: Tensor, captions: Sequence[Sequence[int]]
) -> dict[str, Ranks]:
    """Rank of each image's first right text, `image_to_text`, and of each text's first right image, `text_to_image`.

    Several texts of one image are a cluster. A text of several images belongs to the first.

    Args:
        image_features: (I, E) unit vectors.
        text_features: (T, E) unit vectors.
        captions: for each image the numbers of its texts. Images may share a text; it is right for each of them.
    """
    images = images_of_texts(captions, len(text_features))
    image_of = [own[0] for own in images]
    has_clusters = len(set(image_of)) < len(image_of)
    to_text = ranks_by_all(image_features, text_features, captions)
    to_image = ranks_by_all(text_features, image_features, images)
    return {
        "image_to_text": Ranks(to_text, [len(set(own)) for own in captions], len(text_features)),
        "text_to_image": Ranks(
            to_image, [len(set(own)) for own in images], len(image_features), image_of if has_clusters else None
        ),
    }


def right_answers(found: Mapping[str, Ranks]) -> dict[str, str]:
    """What `image_text_ranks` found, for paired tests: answers by measure, such as image_to_text_r1 -> 0110..."""
    return {f"{way}_{k}": right for way, own in found.items() for k, right in own.right().items()}


@dataclass(frozen=True)
class InBatch:
    """How often the two halves of a pair find each other first in a batch: the question of a contrastive loss."""

    acc1: float
    """Share of right queries, mean of both ways."""
    chance: float
    batch_size: int


def in_batch(
    image_features: Tensor, text_features: Tensor, captions: Sequence[Sequence[int]], *, batch_size: int
) -> InBatch:
    """Top-1 accuracy in random batches of pictures with their first captions, the same ones each time.

    Pairs that do not fill the last batch are left out. With fewer pairs than `batch_size` one batch holds them all. An
    equal caption is right for each of its pictures. The other arguments are those of `image_text_ranks`.
    """
    order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(0)).tolist()
    size = min(batch_size, len(order))
    trials: list[tuple[Tensor, Tensor, list[list[int]]]] = []
    for batch in (order[start : start + size] for start in range(0, len(order) - size + 1, size)):
        texts = [captions[image][0] for image in batch]
        right = _right_places([set(captions[image]) for image in batch], texts)
        images, own = image_features[batch], text_features[texts]
        trials += [(images, own, right), (own, images, images_of_texts(right, size))]

    def count_hits(numbers: range) -> Iterator[int]:
        for number in numbers:
            yield int((ranks(*trials[number]) == 0).sum())

    hits = sum(on_all_ranks(count_hits, num_batches=len(trials)))
    num_right = sum(len(own) for _, _, right in trials for own in right)
    return InBatch(hits / (size * len(trials)), num_right / (size**2 * len(trials)), size)


def _right_places(accepted: Sequence[Set[int]], texts: Sequence[int]) -> list[list[int]]:
    """For each image of a batch the places of the texts that are right for it."""
    places: dict[int, list[int]] = {}
    for place, text in enumerate(texts):
        places.setdefault(text, []).append(place)
    return [[place for text in own for place in places.get(text, ())] for own in accepted]


def modality_gap(image_features: Tensor, text_features: Tensor, captions: Sequence[Sequence[int]]) -> float:
    """Distance between the mean picture and the mean first caption, in [0, 2] (Liang et al., NeurIPS 2022).

    The arguments are those of `image_text_ranks`.
    """
    own = text_features[[texts[0] for texts in captions]]
    return (image_features.mean(dim=0) - own.mean(dim=0)).norm().item()


def image_text_retrieval(
    image_features: Tensor, text_features: Tensor, captions: Sequence[Sequence[int]]
) -> Mapping[str, dict[str, Any]]:
    """Recall both ways (the protocol of Flickr30k and COCO): a query is right if one of its own is among the first k.

    The arguments are those of `image_text_ranks`.
    """
    found = image_text_ranks(image_features, text_features, captions)
    return {way: own.recalls() for way, own in found.items()}
