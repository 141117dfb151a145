"""Scores of several encoders on one data set. They take turns on each batch, so speeds are measured side by side."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from mlip_cli.devices import synchronize
from mlip_cli.evaluate.datasets.pictures import Pictures
from mlip_cli.evaluate.retrieval import image_text_ranks
from mlip_cli.evaluate.together import OnBatch, on_all_ranks
from mlip_cli.evaluate.zeroshot import class_embeddings, classification, finite_rows, require_finite, top_classes, unit
from mlip_cli.types import Encoder, ImageFeatures

NAME_RECALL_AT = (1, 5)


@dataclass(frozen=True)
class Candidate:
    """An encoder to measure."""

    encoder: Encoder
    weights: object
    """Candidates of the same weights share the features of texts, because texts never merge."""
    tokenize: Callable[[Sequence[str]], Tensor]
    """Texts -> token ids (B, L)."""
    device: torch.device
    label: str | None = None
    """Name of the run in messages, where there may be several runs."""

    def place(self, dataset: str) -> str:
        """The place that messages begin with."""
        return f"{dataset}: {self.label}" if self.label else dataset


@dataclass(frozen=True)
class _Answers:
    """What one encoder found for some pictures, by kind of feature."""

    top: dict[str, Tensor]
    """Best classes of each picture: (n, k)."""
    features: dict[str, Tensor]
    """Unit vectors: (n, E). Empty for data sets without names."""
    is_finite: dict[str, Tensor]
    """Whether each feature is finite: (n,)."""


class _Classifier:
    """One encoder with the class embeddings (C, E) and name embeddings (T, E) of a data set."""

    def __init__(self, candidate: Candidate, classes: Tensor, names: Tensor | None, *, is_timed: bool) -> None:
        self.candidate, self.encoder = candidate, candidate.encoder
        self.classes, self.names, self.is_timed = classes, names, is_timed
        self.seconds: list[tuple[int, float]] = []
        self.has_frequency: bool | None = None

    def answers(self, images: Tensor) -> _Answers:
        """Classify a batch (B, 3, H, W) uint8 on the CPU."""
        images = images.to(self.candidate.device)
        found = self._timed_features(images) if self.is_timed else self.encoder.image_features(images)
        is_finite = {"image": finite_rows(found.spatial).cpu()}
        features = {"spatial": unit(found.spatial)}
        if found.frequency is not None:
            is_finite["frequency"] = finite_rows(found.frequency).cpu()
            features["frequency"] = unit(found.frequency)
            features["spatial_plus_frequency"] = unit(features["spatial"] + features["frequency"])
        return _Answers(
            top={kind: top_classes(own, self.classes).cpu() for kind, own in features.items()},
            features={} if self.names is None else {kind: own.cpu() for kind, own in features.items()},
            is_finite=is_finite,
        )

    def _timed_features(self, images: Tensor) -> ImageFeatures:
        """Time `encode_image` alone; a pass off the clock gives the frequency feature."""
        if self.has_frequency is None:
            self.encoder.encode_image(images)  # the first call of a shape chooses kernels and allocates
            self.has_frequency = self.encoder.image_features(images[:1]).frequency is not None
        device = self.candidate.device
        synchronize(device)
        started = time.perf_counter()
        spatial = self.encoder.encode_image(images)
        synchronize(device)
        self.seconds.append((len(images), time.perf_counter() - started))
        return ImageFeatures(spatial, self.encoder.image_features(images).frequency if self.has_frequency else None)

    def images_per_s(self) -> float:
        """Batch size over the median time of a full batch."""
        full = max(size for size, _ in self.seconds)
        return full / median(seconds for size, seconds in self.seconds if size == full)


@torch.no_grad()
def measure(
    pictures: Pictures,
    read: Callable[[range], Iterable[tuple[Tensor, Tensor]]],
    candidates: Sequence[Candidate],
    *,
    dataset: str,
    batch_size: int,
    is_timed: bool = True,
    on_batch: OnBatch = lambda _: None,
) -> list[dict[str, Any]]:
    """Scores of each candidate, in their order; strict JSON, fractions in [0, 1].

    Spatial features (`encode_image`) are on the top level; with a frequency head `frequency` and
    `spatial_plus_frequency` (the sum of the normalised features) hold the same scores for those features. `right` holds
    one character a picture, for paired tests. `predicted` holds the number of each picture's predicted class, in one
    line.

    Args:
        read: numbers of batches -> those batches: uint8 images (B, 3, S, S) and classes (B,), on the CPU. Ranks of one
            process group read some of them each.
        dataset: name of the data set, for messages.
        is_timed: also measure `images_per_s`; a frequency head then takes one more pass.
        on_batch: see `OnBatch`.

    Raises:
        RunError: features that are not finite, or a picture that cannot be read.
    """
    texts: dict[int, tuple[Tensor, Tensor | None]] = {}
    for candidate in candidates:
        if id(candidate.weights) not in texts:
            texts[id(candidate.weights)] = _texts(pictures, candidate, dataset, on_batch)
    classifiers = [_Classifier(candidate, *texts[id(candidate.weights)], is_timed=is_timed) for candidate in candidates]

    def classify(numbers: range) -> Iterator[tuple[Tensor, list[_Answers]]]:
        for images, labels in read(numbers):
            answers = [classifier.answers(images) for classifier in classifiers]
            on_batch(len(images))
            yield labels, answers

    batches = on_all_ranks(classify, num_batches=-(-pictures.num_pictures // batch_size))
    labels = torch.cat([own for own, _ in batches])
    return [
        _scores(classifier, _joined([answers[i] for _, answers in batches]), pictures, labels, dataset)
        for i, classifier in enumerate(classifiers)
    ]


def _joined(batches: Sequence[_Answers]) -> _Answers:
    def cat(tensors: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {key: torch.cat([own[key] for own in tensors]) for key in tensors[0]}

    return _Answers(*(cat([getattr(own, field.name) for own in batches]) for field in fields(_Answers)))


def _texts(pictures: Pictures, candidate: Candidate, dataset: str, on_batch: OnBatch) -> tuple[Tensor, Tensor | None]:
    """Class and name embeddings."""
    embed = partial(
        class_embeddings,
        templates=pictures.templates,
        tokenize=candidate.tokenize,
        encode_text=candidate.encoder.encode_text,
        device=candidate.device,
        place=candidate.place(dataset),
        on_batch=on_batch,
    )
    return embed(pictures.class_names), embed(pictures.names.texts) if pictures.names else None


def _scores(
    classifier: _Classifier, answers: _Answers, pictures: Pictures, labels: Tensor, dataset: str
) -> dict[str, Any]:
    for what, is_finite in answers.is_finite.items():
        require_finite(is_finite, what, place=classifier.candidate.place(dataset))
    counts = labels.bincount(minlength=len(pictures.class_names))
    by_kind = {kind: classification(top, labels, pictures.class_names) for kind, top in answers.top.items()}
    right = {"acc1": "".join("01"[hit] for hit in (answers.top["spatial"][:, 0] == labels).tolist())}
    if pictures.names and classifier.names is not None:
        for kind, features in answers.features.items():
            found = image_text_ranks(features, classifier.names.cpu(), pictures.names.accepted)
            names, of_names = found["image_to_text"], found["text_to_image"]
            by_kind[kind]["names"] = names.recalls(at=NAME_RECALL_AT)
            by_kind[kind]["pictures"] = of_names.recalls(at=NAME_RECALL_AT)
            if kind == "spatial":
                right |= {f"name_{k}": hits for k, hits in names.right(at=NAME_RECALL_AT).items()}
                right |= {f"picture_{k}": hits for k, hits in of_names.right(at=NAME_RECALL_AT).items()}
    result: dict[str, Any] = {
        "n": len(labels),
        "num_classes": len(pictures.class_names),
        "num_classes_seen": int((counts > 0).sum()),
        "chance": 1 / len(pictures.class_names),
        "majority_share": int(counts.max()) / len(labels),
        **by_kind.pop("spatial"),
        **by_kind,
        "right": right,
        "passed_over": asdict(pictures.passed_over),
        "predicted": " ".join(map(str, answers.top["spatial"][:, 0].tolist())),
    }
    if classifier.is_timed:
        result |= {"images_per_s": classifier.images_per_s(), "timed_batches": len(classifier.seconds)}
    return result
