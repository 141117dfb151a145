"""Several encoders on one data set, batch by batch in turn: scores of each, and speeds measured side by side."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from mlip_cli.devices import synchronize
from mlip_cli.evaluate.datasets.pictures import Pictures
from mlip_cli.evaluate.retrieval import ranks, recalls
from mlip_cli.evaluate.together import ALONE, Part, Together
from mlip_cli.evaluate.zeroshot import class_embeddings, classification, finite_rows, require_finite, top_classes, unit
from mlip_cli.types import Encoder, ImageFeatures

NAME_RECALL_AT = (1, 5)


@dataclass(frozen=True)
class Candidate:
    """One set of weights, and the ways to encode pictures with it (its merge rates)."""

    encoders: tuple[Encoder, ...]
    tokenize: Callable[[Sequence[str]], Tensor]
    """Texts -> token ids (B, L)."""
    device: torch.device
    label: str | None = None
    """Of the run, for messages, where there may be several."""

    def place(self, dataset: str) -> str:
        """What messages begin with."""
        return f"{dataset}: {self.label}" if self.label else dataset


@dataclass
class _Answers:
    """What one kind of feature said so far."""

    top: list[Tensor] = field(default_factory=list)
    name_ranks: list[Tensor] = field(default_factory=list)


class _Contestant:
    """One encoder on its way through the data set."""

    def __init__(
        self, candidate: Candidate, encoder: Encoder, classes: Tensor, names: Tensor | None, *, is_timed: bool
    ) -> None:
        self.device, self.encoder, self.classes, self.names = candidate.device, encoder, classes, names
        self.is_timed = is_timed
        self.answers: dict[str, _Answers] = {"spatial": _Answers()}
        self.is_finite: dict[str, list[Tensor]] = {}
        self.seconds: list[tuple[int, float]] = []
        self.has_frequency: bool | None = None

    def see(self, images: Tensor, accepted: Sequence[Sequence[int]]) -> None:
        """Encode a batch (B, 3, H, W) uint8 on the CPU and note the answers."""
        images = images.to(self.device)
        features = self._timed_features(images) if self.is_timed else self.encoder.image_features(images)
        for what, own in (("image", features.spatial), ("frequency", features.frequency)):
            if own is not None:
                self.is_finite.setdefault(what, []).append(finite_rows(own).cpu())
        spatial = unit(features.spatial)
        self._note("spatial", spatial, accepted)
        if features.frequency is not None:
            frequency = unit(features.frequency)
            self._note("frequency", frequency, accepted)
            self._note("spatial_plus_frequency", unit(spatial + frequency), accepted)

    def _timed_features(self, images: Tensor) -> ImageFeatures:
        """`encode_image` on the clock; the frequency feature, which it does not give, in a pass off the clock."""
        if self.has_frequency is None:
            self.encoder.encode_image(images)  # the first call of a shape chooses kernels and allocates
            self.has_frequency = self.encoder.image_features(images[:1]).frequency is not None
        synchronize(self.device)
        started = time.perf_counter()
        spatial = self.encoder.encode_image(images)
        synchronize(self.device)
        self.seconds.append((len(images), time.perf_counter() - started))
        return ImageFeatures(spatial, self.encoder.image_features(images).frequency if self.has_frequency else None)

    def _note(self, kind: str, features: Tensor, accepted: Sequence[Sequence[int]]) -> None:
        answers = self.answers.setdefault(kind, _Answers())
        answers.top.append(top_classes(features, self.classes).cpu())
        if self.names is not None:
            answers.name_ranks.append(ranks(features, self.names, accepted))

    def gather(self, together: Together, part: Part) -> None:
        """Put the notes of all ranks in the place of this one's."""
        self.is_finite = {what: [together.gathered(own, part)] for what, own in self.is_finite.items()}
        for answers in self.answers.values():
            answers.top = [together.gathered(answers.top, part)]
            if answers.name_ranks:
                answers.name_ranks = [together.gathered(answers.name_ranks, part)]

    def require_finite(self, place: str) -> None:
        """Refuse what was seen if some features were not finite."""
        for what, is_finite in self.is_finite.items():
            require_finite(torch.cat(is_finite), what, place=place)

    def images_per_s(self) -> float:
        """Batch size over the median time of a full batch."""
        full = max(size for size, _ in self.seconds)
        return full / median(seconds for size, seconds in self.seconds if size == full)


@torch.no_grad()
def measure(
    pictures: Pictures,
    batches: Iterable[tuple[Tensor, Tensor]],
    candidates: Sequence[Candidate],
    *,
    dataset: str,
    is_timed: bool = True,
    on_batch: Callable[[int], None] = lambda _: None,
    together: Together = ALONE,
    part: Part | None = None,
    first: int = 0,
) -> list[list[dict[str, Any]]]:
    """Scores of each encoder of each candidate, in their order; strict JSON, fractions in [0, 1].

    Spatial features (`encode_image`) are on the top level; with a frequency branch `frequency` and
    `spatial_plus_frequency` (the sum of the normalised features) hold the same scores for those. `right` holds one
    character a picture, for paired tests, and `predicted` the number of the class that each got, in one line.

    Args:
        batches: uint8 images (B, 3, S, S) and classes (B,), on the CPU.
        dataset: name of the data set, for messages.
        is_timed: also measure `images_per_s`, which takes a pass more where there is a frequency branch.
        on_batch: called with the number of pictures of each batch.
        part: which of all batches `batches` are, of ranks that measure `together`; None: all of them.
        first: number of the first picture in `batches`.

    Raises:
        RunError: features that are not finite, or a picture that cannot be read.
    """
    contestants = [
        [_Contestant(c, encoder, *texts, is_timed=is_timed) for encoder in c.encoders]
        for c, texts in _texts(pictures, candidates, dataset, together)
    ]
    labels: list[Tensor] = []
    start = first
    for images, classes in batches if part is None else together.in_rounds(batches, part):
        accepted = pictures.names.accepted[start : start + len(images)] if pictures.names else []
        for group in contestants:
            for contestant in group:
                contestant.see(images, accepted)
        labels.append(classes)
        start += len(images)
        on_batch(len(images))
    truth = torch.cat(labels) if part is None else together.gathered(labels, part)
    for candidate, group in zip(candidates, contestants, strict=True):
        for contestant in group:
            if part is not None:
                contestant.gather(together, part)
            contestant.require_finite(candidate.place(dataset))
    return [[_scores(contestant, pictures, truth) for contestant in group] for group in contestants]


def _texts(
    pictures: Pictures, candidates: Sequence[Candidate], dataset: str, together: Together
) -> Iterable[tuple[Candidate, tuple[Tensor, Tensor | None]]]:
    """Class and name embeddings, once a candidate: merging does not touch the texts."""
    for candidate in candidates:
        embed = partial(
            class_embeddings,
            templates=pictures.templates,
            tokenize=candidate.tokenize,
            encode_text=candidate.encoders[0].encode_text,
            device=candidate.device,
            place=candidate.place(dataset),
            together=together,
        )
        yield candidate, (embed(pictures.class_names), embed(pictures.names.texts) if pictures.names else None)


def _scores(contestant: _Contestant, pictures: Pictures, labels: Tensor) -> dict[str, Any]:
    counts = labels.bincount(minlength=len(pictures.class_names))
    spatial, *others = contestant.answers
    result: dict[str, Any] = {
        "n": len(labels),
        "num_classes": len(pictures.class_names),
        "num_classes_seen": int((counts > 0).sum()),
        "chance": 1 / len(pictures.class_names),
        "majority_share": int(counts.max()) / len(labels),
        **_kind_scores(contestant.answers[spatial], pictures, labels),
        **{kind: _kind_scores(contestant.answers[kind], pictures, labels) for kind in others},
        "right": _right(contestant.answers[spatial], labels),
        "predicted": " ".join(map(str, torch.cat(contestant.answers[spatial].top)[:, 0].tolist())),
    }
    if contestant.is_timed:
        result |= {"images_per_s": contestant.images_per_s(), "timed_batches": len(contestant.seconds)}
    return result


def _kind_scores(answers: _Answers, pictures: Pictures, labels: Tensor) -> dict[str, Any]:
    scores = classification(torch.cat(answers.top), labels, pictures.class_names)
    if pictures.names:
        scores["names"] = recalls(
            torch.cat(answers.name_ranks),
            num_accepted=[len(accepted) for accepted in pictures.names.accepted],
            num_candidates=len(pictures.names.texts),
            at=NAME_RECALL_AT,
        )
    return scores


def _right(answers: _Answers, labels: Tensor) -> dict[str, str]:
    right = {"acc1": torch.cat(answers.top)[:, 0] == labels}
    if answers.name_ranks:
        right |= {f"name_r{k}": torch.cat(answers.name_ranks) < k for k in NAME_RECALL_AT}
    return {name: "".join("01"[bool(hit)] for hit in hits.tolist()) for name, hits in right.items()}
