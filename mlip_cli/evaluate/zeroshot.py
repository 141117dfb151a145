"""Zero-shot classification: pictures are compared with the texts of class names. Scores are computed in fp32."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mlip_cli.errors import RunError
from mlip_cli.evaluate.statistics import mean_recall_interval, wilson
from mlip_cli.evaluate.together import OnBatch, on_all_ranks

TOP_K = 5


def finite_rows(features: Tensor) -> Tensor:
    """Which vectors have a finite length: (B, E) -> (B,) bool."""
    return features.float().norm(dim=-1).isfinite()


def require_finite(is_finite: Tensor, what: str, *, place: str | None = None) -> None:
    """Refuse features that are not finite: their scores would be hits or misses at random.

    Args:
        is_finite: (n,) bool, of all features that were made.
        what: the kind of features, such as `image`.
        place: the data set, with the run where there are several; None: the message names no place.

    Raises:
        RunError: says how many are not finite.
    """
    n, num_wrong = is_finite.numel(), int((~is_finite).sum())
    if num_wrong:
        start = f"{place}: " if place else ""
        cure = "the weights of this checkpoint are damaged; name an earlier one"
        raise RunError(f"{start}{num_wrong:,} of {n:,} {what} features are not finite; {cure}")


def unit(features: Tensor) -> Tensor:
    """Unit vectors in fp32, without a check that they are finite: (B, E) -> (B, E)."""
    return F.normalize(features.float(), dim=-1)


def normalized(features: Tensor, what: str, *, place: str | None = None) -> Tensor:
    """Unit vectors in fp32: (B, E) -> (B, E).

    Raises:
        RunError: some are not finite (see `require_finite`).
    """
    require_finite(finite_rows(features), what, place=place)
    return unit(features)


@torch.no_grad()
def text_features(
    texts: Sequence[str],
    *,
    tokenize: Callable[[Sequence[str]], Tensor],
    encode_text: Callable[[Tensor], Tensor],
    device: torch.device | str,
    batch_size: int = 256,
    place: str | None = None,
    on_batch: OnBatch = lambda _: None,
) -> Tensor:
    """Unit features of texts, in batches by all ranks: -> (len(texts), E) fp32, on every rank.

    Raises:
        RunError: some are not finite (see `require_finite`).
    """

    def encode(numbers: range) -> Iterator[Tensor]:
        on_batch(0)
        for number in numbers:
            batch = texts[number * batch_size : (number + 1) * batch_size]
            features = encode_text(tokenize(batch).to(device)).cpu()
            on_batch(0)
            yield features

    features = on_all_ranks(encode, num_batches=-(-len(texts) // batch_size))
    return normalized(torch.cat(features).to(device), "text", place=place)


def class_embeddings(
    class_names: Sequence[str],
    templates: Sequence[str],
    *,
    tokenize: Callable[[Sequence[str]], Tensor],
    encode_text: Callable[[Tensor], Tensor],
    device: torch.device | str,
    place: str | None = None,
    on_batch: OnBatch = lambda _: None,
) -> Tensor:
    """One unit vector a class: -> (C, E) fp32.

    The normalised mean of the normalised features of all templates, with the name in the place of `{c}` (Radford et al.
    2021).

    Raises:
        RunError: some are not finite (see `require_finite`).
    """
    texts = [template.replace("{c}", name) for name in class_names for template in templates]
    features = text_features(
        texts, tokenize=tokenize, encode_text=encode_text, device=device, place=place, on_batch=on_batch
    )
    return F.normalize(features.unflatten(0, (len(class_names), len(templates))).mean(dim=1), dim=-1)


def similarities(features: Tensor, others: Tensor) -> Tensor:
    """Cosines of unit vectors: (B, E), (C, E) -> (B, C), in fp32 under autocast too: bf16 would make ties."""
    with torch.autocast(features.device.type, enabled=False):
        return features @ others.T


def top_classes(features: Tensor, classes: Tensor) -> Tensor:
    """The five most similar classes of each picture (or all, if fewer), best first: (B, E), (C, E) -> (B, k)."""
    return similarities(features, classes).topk(min(TOP_K, len(classes)), dim=1).indices


def classification(top: Tensor, labels: Tensor, class_names: Sequence[str]) -> dict[str, Any]:
    """Scores of the predictions `top` (n, k) for `labels` (n,), as fractions, with 95 % intervals.

    `acc5` is None with fewer than five classes. The mean recall leaves out classes without pictures, as scikit-learn's
    balanced accuracy does.
    """
    n, num_classes = len(labels), len(class_names)
    hits = top == labels[:, None]
    right = hits[:, 0]
    counts = labels.bincount(minlength=num_classes).tolist()
    right_counts = labels[right].bincount(minlength=num_classes).tolist()
    recalls = [k / c if c else None for k, c in zip(right_counts, counts, strict=True)]
    present = [recall for recall in recalls if recall is not None]
    num_right, num_right5 = int(right.sum()), int(hits.any(dim=1).sum())
    return {
        "acc1": num_right / n,
        "acc1_interval": wilson(num_right, n),
        "acc5": num_right5 / n if num_classes >= TOP_K else None,
        "acc5_interval": wilson(num_right5, n) if num_classes >= TOP_K else None,
        "mean_per_class_recall": sum(present) / len(present),
        "mean_per_class_recall_interval": mean_recall_interval(right_counts, counts),
        "per_class": [
            {"class": name, "n": count, "recall": recall}
            for name, count, recall in zip(class_names, counts, recalls, strict=True)
        ],
    }
