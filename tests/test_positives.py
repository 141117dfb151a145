"""Pairs that share a concept: targets by loops written here, and nothing changed where all labels differ."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mlip_cli.data.loader import label_of
from mlip_cli.losses.contrastive import cross_entropy, info_nce, sigmoid_loss

N = 8
LABELS = torch.tensor([5, 2, 5, 9, 2, 5, 1, 2**62])


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draws = torch.Generator().manual_seed(0)
    images, texts = (F.normalize(torch.randn(N, 6, generator=draws, dtype=dtype), dim=-1) for _ in range(2))
    leaves = (images, texts, torch.tensor([9.0], dtype=dtype), torch.tensor([-2.0], dtype=dtype))
    return tuple(x.requires_grad_() for x in leaves)  # type: ignore[return-value]


def targets(smoothing: float, labels: Tensor | None) -> Tensor:
    """Row i: the positives of i share 1 - smoothing, all columns share smoothing."""
    result = torch.full((N, N), smoothing / N, dtype=torch.float64)
    for i in range(N):
        positives = [j for j in range(N) if (i == j if labels is None else labels[i] == labels[j])]
        for j in positives:
            result[i, j] += (1 - smoothing) / len(positives)
    return result


def assert_same(found: Tensor, expected: Tensor, leaves: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for mine, other in zip(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("labels", [None, LABELS])
@pytest.mark.parametrize("shares", [1, 2, 4])
def test_info_nce_equals_the_target_written_out(smoothing: float, labels: Tensor | None, shares: int) -> None:
    """Also as the mean over shares, each with its rows against all columns."""
    images, texts, scale, _ = inputs()
    size = N // shares
    found = torch.stack([
        info_nce(
            images[start : start + size], texts[start : start + size], images, texts, scale,
            offset=start, label_smoothing=smoothing, labels=labels,
        ) for start in range(0, N, size)
    ]).mean()  # fmt: skip
    target, logits = targets(smoothing, labels), scale * images @ texts.T
    expected = -(target * (logits.log_softmax(1) + logits.T.log_softmax(1))).sum() / (2 * N)
    assert_same(found, expected, (images, texts, scale))


@pytest.mark.parametrize("labels", [None, LABELS])
@pytest.mark.parametrize("chunk", [1, 3 * 4, 10**6])
@pytest.mark.parametrize("shares", [1, 2])
def test_sigmoid_loss_equals_loops_whatever_the_chunks(labels: Tensor | None, chunk: int, shares: int) -> None:
    images, texts, scale, bias = inputs()
    size = N // shares
    found = torch.stack([
        sigmoid_loss(
            images[start : start + size], texts, scale, bias, offset=start, labels=labels, chunk_logits=chunk
        ) for start in range(0, N, size)
    ]).mean()  # fmt: skip
    positive = targets(0.0, labels) > 0
    expected = sum(
        -F.logsigmoid((1 if positive[i, j] else -1) * (scale * (images[i] @ texts[j]) + bias)).sum() / N
        for i in range(N)
        for j in range(N)
    )
    assert_same(found, expected, (images, texts, scale, bias))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_labels_that_all_differ_change_no_bit(dtype: torch.dtype, smoothing: float) -> None:
    images, texts, scale, bias = leaves = inputs(dtype)
    results = []
    for labels in (None, torch.randperm(N, generator=torch.Generator().manual_seed(0)) * 10**15):
        named: dict[str, Any] = {"offset": 0, "labels": labels}
        nce = info_nce(images, texts, images, texts, scale, label_smoothing=smoothing, **named)
        sigmoid = sigmoid_loss(images, texts, scale, bias, chunk_logits=3 * N, **named)
        grads = [*torch.autograd.grad(nce, leaves[:3]), *torch.autograd.grad(sigmoid, leaves)]
        results.append([nce, sigmoid, *grads])
    assert all(torch.equal(pair, concept) for pair, concept in zip(*results, strict=True))


def test_one_concept_for_all_leaves_nothing_to_learn_but_evenness() -> None:
    logits = torch.zeros(4, 4, dtype=torch.float64, requires_grad=True)
    loss = cross_entropy(logits, offset=0, labels=torch.zeros(4, dtype=torch.int64))
    loss.backward()
    torch.testing.assert_close(loss.exp().item(), 4.0)
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-15


def test_labels_stand_for_the_concept_or_else_for_the_caption() -> None:
    def label(concept: object, caption: str) -> int:
        return label_of({"concept": concept}, caption)

    assert label("dog", "a dog") == label("dog", "another one") != label("cat", "a dog")
    assert label(None, "A  dog\n") == label("", "a dog") == label_of({}, "a dog") == label_of({"meta": None}, "a dog")
    assert label(None, "a dog") != label(None, "a cat")
    assert label("a dog", "?") != label(None, "a dog")
    assert label(None, "half of a pair \ud83d") != label(None, "half of a pair \ud83e")
    many = [label(i, "") for i in range(10_000)]
    assert len(set(many)) == 10_000
    assert 0 <= min(many) <= max(many) < 2**63
    assert label("dog", "") == 5_159_277_549_613_392_827  # the same in every version: it is part of what a run learns
