"""FILIP against the naive form, which holds every similarity at one time and leaves its maxima to autograd, in fp64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mlip_cli.losses import objective
from mlip_cli.losses.contrastive import sigmoid_loss
from mlip_cli.losses.features import CAPTION_MASK, IMAGE, TEXT, TEXT_TOKENS, Features
from mlip_cli.losses.filip import filip_scores, filip_words, index_dtype, patch_factors, word_factors
from mlip_cli.losses.objective import Objective
from mlip_cli.recipe.config import Losses, TokenLoss

OBJECTIVE = Objective(Losses(spatial_token=TokenLoss(kind="filip")))


def token_inputs(
    images: int = 5, texts: int = 6, seed: int = 0, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Captions of 1 to 7 words, patches of sizes 1 to 4, nothing normalised."""
    draws = torch.Generator().manual_seed(seed)
    return {
        "patches": (3 * torch.randn(images, 9, 4, generator=draws, dtype=dtype)).requires_grad_(),
        "sizes": torch.randint(1, 5, (images, 9), generator=draws).to(dtype),
        "words": (2 * torch.randn(texts, 7, 4, generator=draws, dtype=dtype)).requires_grad_(),
        "mask": torch.arange(7)[None] < torch.randint(1, 8, (texts, 1), generator=draws),
    }


def naive_scores(patches: Tensor, sizes: Tensor, words: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    similarity = torch.einsum("ipd,jld->ijpl", F.normalize(patches, dim=-1), F.normalize(words, dim=-1))
    best_word = similarity.masked_fill(~mask[None, :, None], -torch.inf).max(3).values
    best_patch = similarity.max(2).values
    return (
        (best_word * sizes[:, None]).sum(-1) / sizes.sum(-1)[:, None],
        (best_patch * mask).sum(-1) / mask.sum(-1),
    )


def naive_loss(patches: Tensor, sizes: Tensor, words: Tensor, mask: Tensor, scale: Tensor) -> Tensor:
    image_scores, text_scores = naive_scores(patches, sizes, words, mask)
    pairs = torch.arange(len(patches))
    return (F.cross_entropy(scale * image_scores, pairs) + F.cross_entropy(scale * text_scores.T, pairs)) / 2


def our_scores(patches: Tensor, sizes: Tensor, words: Tensor, mask: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    return filip_scores(patches, sizes, *filip_words(words, mask), chunk_similarities=chunk)


def features(tokens: dict[str, Tensor], scale: Tensor, **changes: Any) -> Features:
    everyone = torch.eye(len(tokens["patches"]), 8, dtype=tokens["patches"].dtype)
    tensors = {
        IMAGE: everyone,
        TEXT: everyone[:, None],
        "scale.spatial_global": torch.ones_like(scale),
        "scale.spatial_token": scale,
        "tokens.spatial_token": tokens["patches"],
        "sizes.spatial_token": tokens["sizes"],
        TEXT_TOKENS: tokens["words"][:, None],
        CAPTION_MASK: tokens["mask"][:, None],
    }
    return Features(tensors, **changes)


@pytest.mark.parametrize("chunk", [1, 2 * 5 * 9 * 7, 4 * 5 * 9 * 7 + 1, 10**6])
@pytest.mark.parametrize("ties", [False, True])
def test_scores_and_their_gradients_equal_the_naive_form(chunk: int, ties: bool) -> None:
    """For 5 images and 6 texts, one text a chunk, two, four and two, all at once; with patches that are alike, too."""
    tokens = token_inputs()
    if ties:
        alike = tokens["patches"].detach().clone()
        alike[:, 3:6] = alike[:, 3:4]
        tokens["patches"] = alike.requires_grad_()
    weights = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    results = []
    for scores in (our_scores(**tokens, chunk=chunk), naive_scores(**tokens)):
        loss = sum((w * s).sum() for w, s in zip(weights, scores, strict=True))
        results.append([*scores, *torch.autograd.grad(loss, (tokens["patches"], tokens["words"]))])  # type: ignore[arg-type]
    for ours, naive in zip(*results, strict=True):
        torch.testing.assert_close(ours, naive, rtol=0, atol=1e-10)


def half_inputs() -> dict[str, Tensor]:
    """As they come from bf16 training, with as many patches and words as there the maxima are close."""
    draws = torch.Generator().manual_seed(2)
    patches, words = torch.randn(6, 49, 128, generator=draws), torch.randn(8, 20, 128, generator=draws)
    mask = torch.arange(20)[None] < torch.randint(1, 21, (8, 1), generator=draws)
    tokens = {"patches": patches.bfloat16().requires_grad_(), "words": words.bfloat16().requires_grad_()}
    return tokens | {"sizes": torch.randint(1, 5, (6, 49), generator=draws).float(), "mask": mask}


def test_scores_and_gradients_of_bf16_tokens_equal_the_naive_form_in_fp64() -> None:
    """Scores to 16 digits, as the units for half precision give them in parts; gradients to the digits of bf16."""
    tokens = half_inputs()
    exact = {name: value.detach().double() if value.is_floating_point() else value for name, value in tokens.items()}
    inputs = [(given["patches"].requires_grad_(), given["words"].requires_grad_()) for given in (tokens, exact)]
    ours, naive = our_scores(**tokens, chunk=6 * 49 * 20 * 3), naive_scores(**exact)
    for found, expected in zip(ours, naive, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-6)
    found_grads, expected_grads = (
        torch.autograd.grad(sum((s * s).sum() for s in scores), given)  # type: ignore[arg-type]
        for scores, given in zip((ours, naive), inputs, strict=True)
    )
    for found, expected in zip(found_grads, expected_grads, strict=True):
        assert found.dtype == torch.bfloat16
        assert (found.double() - expected).norm() / expected.norm() < 2**-7
    assert torch.get_float32_matmul_precision() == "highest"


def test_factors_in_parts_have_16_digits_when_multiplied_with_8() -> None:
    """On the units for half precision, wherever they are: each factor is rounded to bf16, sums are fp32."""
    tokens = half_inputs()
    patches, words = (F.normalize(tokens[name].detach().float(), dim=-1) for name in ("patches", "words"))
    sides = word_factors(words).flatten(0, 1), patch_factors(patches).flatten(0, 1)
    found = sides[0].bfloat16().float() @ sides[1].bfloat16().float().T
    expected = words.flatten(0, 1).double() @ patches.flatten(0, 1).double().T
    assert (found - expected).abs().max() < 4e-6
    plain = words.flatten(0, 1).bfloat16().double() @ patches.flatten(0, 1).bfloat16().double().T
    assert (plain - expected).abs().max() > 1e-4


def test_the_term_equals_the_naive_loss_with_all_its_gradients() -> None:
    tokens, scale = token_inputs(6, 6), torch.tensor([14.0], dtype=torch.float64, requires_grad=True)
    inputs = (tokens["patches"], tokens["words"], scale)
    ours, naive = OBJECTIVE.batch_terms(features(tokens, scale))["spatial_token"], naive_loss(**tokens, scale=scale)
    assert ours.item() == pytest.approx(naive.item(), rel=1e-12)
    for mine, other in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(naive, inputs), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-10)


def test_an_objective_without_filip_does_not_prepare_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """`profile` times each loss alone, on the features that all of them need."""
    monkeypatch.setattr(objective, "filip_words", lambda *_: pytest.fail("prepared"))
    whole = features(token_inputs(6, 6), torch.tensor([14.0], dtype=torch.float64))
    assert list(Objective(Losses()).batch_terms(whole)) == ["spatial_global"]


def test_a_merged_patch_counts_as_often_as_patches_merged_into_it() -> None:
    tokens = token_inputs()
    weighted, _ = our_scores(**tokens, chunk=100)
    for i, sizes in enumerate(tokens["sizes"].long()):
        repeated = tokens["patches"][i].repeat_interleave(sizes, 0)[None]
        alone, _ = our_scores(repeated, torch.ones_like(repeated[..., 0]), tokens["words"], tokens["mask"], 100)
        torch.testing.assert_close(weighted[i], alone[0])


def test_masked_words_change_nothing_and_get_no_gradient() -> None:
    tokens = token_inputs()
    mask = tokens["mask"]
    loud = torch.where(mask[..., None], tokens["words"], 1e30).detach().requires_grad_()
    scores = our_scores(tokens["patches"], tokens["sizes"], loud, mask, 100)
    for found, expected in zip(scores, our_scores(**tokens, chunk=100), strict=True):
        assert torch.equal(found, expected)
    (grad,) = torch.autograd.grad(scores[0].sum() + scores[1].sum(), loud)
    assert (grad[~mask] == 0).all()
    assert (grad[mask] != 0).any()


def test_positives_share_the_target_of_both_sides() -> None:
    tokens, scale = token_inputs(6, 6), torch.tensor([5.0], dtype=torch.float64)
    labels = torch.tensor([7, 1, 7, 2, 1, 7])
    objective = Objective(Losses(spatial_token=TokenLoss(kind="filip"), positives="concept"))
    found = objective.batch_terms(features(tokens, scale, labels=labels))["spatial_token"]
    image_scores, text_scores = naive_scores(**tokens)
    total = 0.0
    for logits in (scale * image_scores, scale * text_scores.T):
        for i in range(6):
            positives = [j for j in range(6) if labels[j] == labels[i]]
            total -= sum(logits[i].log_softmax(0)[j].item() for j in positives) / len(positives)
    assert found.item() == pytest.approx(total / 12, rel=1e-12)


def test_indices_take_the_smallest_type_that_holds_them() -> None:
    sizes = (1, 77, 256, 257, 2**15, 2**15 + 1)
    expected = (torch.uint8, torch.uint8, torch.uint8, torch.int16, torch.int16, torch.int32)
    assert tuple(index_dtype(size) for size in sizes) == expected


def test_more_than_256_patches_and_words_keep_their_places() -> None:
    draws = torch.Generator().manual_seed(0)
    patches, words = torch.randn(2, 2, 300, 3, generator=draws, dtype=torch.float64)
    tokens = {"patches": patches.requires_grad_(), "words": words.requires_grad_()}
    tokens |= {"sizes": torch.ones(2, 300), "mask": torch.ones(2, 300, dtype=torch.bool)}
    inputs = (tokens["patches"], tokens["words"])
    grads = [
        torch.autograd.grad(sum((s * s).sum() for s in scores), inputs)  # type: ignore[arg-type]
        for scores in (our_scores(**tokens, chunk=1), naive_scores(**tokens))
    ]
    for ours, naive in zip(*grads, strict=True):
        torch.testing.assert_close(ours, naive, rtol=0, atol=1e-10)


class LargestTensor(TorchDispatchMode):
    """Numbers in the largest tensor that any operation gave."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor))])
        return result


def largest_tensor(loss: Callable[[], Tensor]) -> int:
    """In the forward and the backward pass."""
    with LargestTensor() as largest:
        loss().backward()
    return largest.numel


def test_no_tensor_is_larger_than_a_chunk() -> None:
    tokens = token_inputs(32, 32)
    chunk = 4 * 32 * 9 * 7

    def filip() -> Tensor:
        image_scores, text_scores = our_scores(**tokens, chunk=chunk)
        return (image_scores + text_scores).logsumexp(1).sum()

    assert largest_tensor(filip) == 32 * 32 * 9 > chunk  # the arg-max indices
    assert largest_tensor(lambda: sum(s.sum() for s in naive_scores(**tokens))) == 32 * 32 * 9 * 7  # type: ignore[arg-type, return-value]


def test_no_float_of_the_sigmoid_loss_is_larger_than_a_chunk() -> None:
    draws = torch.Generator().manual_seed(0)
    images, texts = (torch.randn(64, 4, generator=draws).requires_grad_() for _ in range(2))
    scale, bias = torch.tensor([10.0]), torch.tensor([-3.0])

    def loss(chunk: int) -> Tensor:
        return sigmoid_loss(images, texts, scale, bias, offset=0, chunk_logits=chunk)

    assert largest_tensor(lambda: loss(8 * 64)) == 8 * 64
    assert largest_tensor(lambda: loss(64 * 64)) == 64 * 64


def test_logits_are_fp32_even_under_autocast() -> None:
    tokens, scale = token_inputs(6, 6, dtype=torch.float32), torch.tensor([50.0])
    plain = OBJECTIVE.batch_terms(features(tokens, scale))["spatial_token"]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(OBJECTIVE.batch_terms(features(tokens, scale))["spatial_token"], plain)
