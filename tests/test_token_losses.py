"""Losses over words, of pooled patches and between crops: against loops, and what they look at."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from models_for_tests import loss_terms, small_batch, small_model, small_recipe
from torch import Tensor

from mlip_cli.losses.features import with_other_pictures
from mlip_cli.losses.objective import Objective
from mlip_cli.losses.pooled import caption_queries, pooled_scores
from mlip_cli.losses.words import CaptionCounts, count_captions, words_sum
from mlip_cli.model.merging import unmerge_tokens
from mlip_cli.model.text import caption_mask, word_mask
from mlip_cli.recipe.config import Recipe
from mlip_cli.train.gradients import captions_counted
from mlip_cli.train.optim import build_optimizer
from mlip_cli.types import Batch, Encoded

BOS, EOS = 49406, 49407
CAPTIONS = [[300, 301, 302], [301], [302, 301, 301, 7], [], [8, 300], [0, 301]]
"""Words of each caption: repeated ones, one in five captions, id 0, and a caption without words."""
SCALE = torch.tensor([9.0], dtype=torch.float64)


def token_ids() -> Tensor:
    ids = torch.zeros(len(CAPTIONS), 9, dtype=torch.int64)
    for row, words in zip(ids, CAPTIONS, strict=True):
        row[: len(words) + 2] = torch.tensor([BOS, *words, EOS])
    return ids


def counts_of(ids: Tensor) -> CaptionCounts:
    return count_captions(ids, word_mask(ids))


def words_in_loops(features: Tensor, embeddings: dict[int, Tensor], captions: list[list[int]]) -> Tensor:
    """The sum over captions; `features` has a row for each caption."""
    every = sorted({word for words in captions for word in words})
    total = torch.zeros((), dtype=torch.float64)
    for feature, words in zip(features, captions, strict=True):
        logits = torch.stack([SCALE[0] * F.cosine_similarity(feature, embeddings[word], dim=0) for word in every])
        weights = {}
        for word in words:
            with_word = sum(word in others for others in captions)
            weights[word] = math.log((1 + len(captions)) / with_word)
        for word, weight in weights.items():
            total = total - weight / sum(weights.values()) * logits.log_softmax(0)[every.index(word)]
    return total


def test_a_batch_without_words_still_reaches_every_parameter() -> None:
    ids = torch.tensor([[BOS, EOS, 0]])
    counts, features, scale = counts_of(ids), torch.ones(1, 5, requires_grad=True), torch.ones(1, requires_grad=True)
    words_sum(features, torch.ones(0, 5), ids, word_mask(ids), scale, counts).backward()
    for leaf in (features, scale):
        assert leaf.grad is not None
        assert not leaf.grad.any()


@pytest.mark.parametrize("captions_per_image", [1, 3])
def test_words_equal_loops_with_their_gradients(captions_per_image: int) -> None:
    draws = torch.Generator().manual_seed(0)
    ids = token_ids()
    counts = counts_of(ids)
    features = torch.randn(6 // captions_per_image, 5, generator=draws, dtype=torch.float64).requires_grad_()
    vocabulary = torch.randn(len(counts.word_ids), 5, generator=draws, dtype=torch.float64).requires_grad_()
    assert counts.word_ids.tolist() == [0, 7, 8, 300, 301, 302]
    assert (counts.with_words, counts.valid) == (5, 4)
    ours = words_sum(features, vocabulary, ids, word_mask(ids), SCALE, counts)
    table = dict(zip(counts.word_ids.tolist(), vocabulary, strict=True))
    theirs = words_in_loops(features.repeat_interleave(captions_per_image, 0), table, CAPTIONS)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)
    for mine, other in zip(
        torch.autograd.grad(ours, (features, vocabulary)),
        torch.autograd.grad(theirs, (features, vocabulary)),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-13)


def pooled_in_loops(patches: Tensor, sizes: Tensor, queries: Tensor) -> Tensor:
    """Scores (B, C), each from the patches themselves, repeated by the size of their token."""
    rows = []
    for own, count in zip(patches, sizes, strict=True):
        single = F.normalize(own, dim=-1).repeat_interleave(count.long(), 0)
        row = []
        for query in queries:
            attention = (SCALE[0] * single @ query).softmax(0)
            row.append((attention[:, None] * single).sum(0) @ query)
        rows.append(torch.stack(row))
    return torch.stack(rows)


@pytest.mark.parametrize("chunk", [1, 2 * 4 * 5, 10**6])
def test_pooled_scores_equal_loops_over_single_patches_with_their_gradients(chunk: int) -> None:
    draws = torch.Generator().manual_seed(1)
    patches = torch.randn(4, 5, 6, generator=draws, dtype=torch.float64).requires_grad_()
    text_tokens = torch.randn(6, 9, 6, generator=draws, dtype=torch.float64).requires_grad_()
    sizes = torch.randint(1, 4, (4, 5), generator=draws).double()
    ends = [len(words) + 1 for words in CAPTIONS]
    queries = F.normalize(torch.stack([row[end] for row, end in zip(text_tokens, ends, strict=True)]), dim=-1)
    found = caption_queries(text_tokens, caption_mask(token_ids()))
    assert torch.equal(found, queries)
    scale = SCALE.clone().requires_grad_()
    ours = pooled_scores(patches, sizes, found, scale, chunk_similarities=chunk)
    theirs = pooled_in_loops(patches, sizes, queries)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
    weights = torch.randn(4, 6, generator=draws, dtype=torch.float64)
    for mine, other in zip(
        torch.autograd.grad((ours * weights).sum(), (patches, text_tokens), retain_graph=True),
        torch.autograd.grad((theirs * weights).sum(), (patches, text_tokens)),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-13)


WORDS_AND_POOLED = {
    "spatial_words": {},
    "frequency_words": {"weight": 0.5},
    "spatial_token": {"kind": "pooled"},
    "frequency_global": {},
}


def stem(**losses: object) -> Recipe:
    return small_recipe(
        mlip=False,
        model={"frequency": {"depth": 1}, "merging": {"rate": 0.25, "at": [3]}, "vision": small_vision(pool="mean")},
        losses={**WORDS_AND_POOLED, **losses},
    )


def small_vision(**changes: object) -> dict[str, object]:
    return {"patch_size": 8, "width": 32, "depth": 4, "num_heads": 2, **changes}


def encode(recipe: Recipe, batch: Batch) -> tuple[Objective, Encoded, Batch]:
    objective, model = Objective(recipe.losses), small_model(recipe)
    batch, _ = captions_counted(objective, batch)
    return objective, model(batch, model.training_plan), batch


def test_losses_of_several_captions_are_means_over_them() -> None:
    """With words that all sets of captions share alike, so that each set alone has the same words and weights."""
    one = small_batch(4, words=[2, 3, 2, 4])
    shuffled = torch.stack([one.token_ids, one.token_ids[[1, 0, 3, 2]], one.token_ids[[2, 3, 0, 1]]], dim=1)
    recipe = stem()
    objective, encoded, batch = encode(recipe, replace(one, token_ids=shuffled.flatten(0, 1)))
    together = loss_terms(objective, encoded, batch)
    apart = []
    for captions in shuffled.unbind(1):
        objective, encoded, batch = encode(recipe, replace(one, token_ids=captions))
        apart.append(loss_terms(objective, encoded, batch))
    for name, value in together.items():
        expected = sum(terms[name] for terms in apart) / 3
        tolerance = 0.05 if name.endswith("words") else 1e-12  # 1 + captions, in the weights, is another number
        assert value.item() == pytest.approx(expected.item(), rel=tolerance), name


def test_words_are_asked_of_the_mean_over_patches_also_after_merges() -> None:
    recipe = stem()
    _, encoded, batch = encode(recipe, small_batch())
    model = small_model(recipe)
    tower = model.image_tower(batch.images, model.training_plan)
    assert tower.sizes.max() > 1
    patches = unmerge_tokens(tower.tokens, tower.assign[-1])
    for name, tokens in {"spatial_words": patches, "frequency_words": model.frequency_tokens(tower)}.items():
        expected = model.token_projections[name](tokens).mean(1)
        torch.testing.assert_close(encoded.word_features[name], expected, rtol=1e-10, atol=1e-12)


def test_a_branch_that_reads_another_crop_sees_that_one_alone() -> None:
    recipe = small_recipe(losses={"align": {}})
    other = small_batch(seed=5).images
    _, encoded, _ = encode(recipe, replace(small_batch(), other_images=other))
    _, of_other, _ = encode(recipe, replace(small_batch(), images=other))
    _, of_own, _ = encode(recipe, small_batch())
    assert encoded.frequency_features is not None
    torch.testing.assert_close(encoded.frequency_features, of_other.frequency_features, rtol=0, atol=0)
    torch.testing.assert_close(encoded.image_features, of_own.image_features, rtol=0, atol=0)
    objective = Objective(recipe.losses)
    images, frequency = (F.normalize(x, dim=-1) for x in (encoded.image_features, encoded.frequency_features))
    logits = encoded.scales["align"] * images @ frequency.T
    pairs = torch.arange(len(logits))
    expected = (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2
    assert loss_terms(objective, encoded, small_batch())["align"].item() == pytest.approx(expected.item(), rel=1e-12)


COLORS = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [0, 255, 255], [255, 0, 255]])


def colors(step: int) -> Batch:
    """24 pictures with a left and a right colour, in noise, and captions of three words that name them."""
    draws = torch.Generator().manual_seed(step)
    pairs = torch.cartesian_prod(torch.arange(6), torch.arange(6))[torch.randperm(36, generator=draws)[:24]]
    images = COLORS[pairs].float()[:, :, :, None, None].expand(24, 2, 3, 32, 16).permute(0, 2, 3, 1, 4)
    images = images.reshape(24, 3, 32, 32) + 60 * torch.randn(24, 3, 32, 32, generator=draws)
    rows = [torch.tensor([BOS, 400 + left, 500, 600 + right, EOS]) for left, right in pairs.tolist()]
    return Batch(images.clamp(0, 255).to(torch.uint8), torch.stack(rows), ("",) * 24)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "looks"),
    [
        ({"spatial_words": {}}, True),
        ({"spatial_token": {"kind": "pooled"}}, True),
        ({"spatial_token": {"kind": "filip"}}, True),
        ({"spatial_token": {"kind": "sparc"}}, False),
    ],
)
def test_a_token_loss_needs_its_picture(loss: dict[str, object], looks: bool) -> None:
    """After 200 steps the loss is far above with another picture; SPARC's is not, and so it is no default."""
    recipe = small_recipe(mlip=False, model={"vision": small_vision(pool="mean", depth=2)}, losses=loss)
    objective, model = Objective(recipe.losses), small_model(recipe, dtype=torch.float32).train()
    [name] = loss
    optimizer = build_optimizer(model, recipe.optim)

    def right_and_other() -> tuple[float, float]:
        batch, _ = captions_counted(objective, colors(10_000))
        with torch.no_grad():
            encoded = model(batch, model.training_plan)
            both = (encoded, with_other_pictures(encoded))
            return tuple(loss_terms(objective, of, batch)[name].item() for of in both)  # type: ignore[return-value]

    right, other = right_and_other()
    assert other - right < 1
    for step in range(200):
        batch, _ = captions_counted(objective, colors(step))
        optimizer.zero_grad()
        objective.total(loss_terms(objective, model(batch, model.training_plan), batch)).backward()
        optimizer.step()
    right, other = right_and_other()
    print(f"{loss}: right {right:.3f}, other {other:.3f}")
    assert other - right > 1 if looks else other - right < 0.3
