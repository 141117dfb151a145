"""Losses against open_clip and against loops written here, in fp64."""

import math

import open_clip
import pytest
import torch
import torch.nn.functional as F
from models_for_tests import loss_terms, small_batch, small_model, small_recipe

from mlip_cli.losses.contrastive import info_nce, sigmoid_loss
from mlip_cli.losses.features import IMAGE, TEXT, Features
from mlip_cli.losses.objective import Objective
from mlip_cli.losses.token_alignment import grouped_patches, sparc_sum
from mlip_cli.losses.words import count_captions
from mlip_cli.recipe.config import GlobalLoss, Losses, TokenLoss


def random_features(n: int = 6, width: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images, texts = torch.randn(2, n, width, generator=generator, dtype=torch.float64)
    return F.normalize(images, dim=-1).requires_grad_(), F.normalize(texts, dim=-1).requires_grad_()


def test_info_nce_equals_open_clips_loss_and_gradient() -> None:
    images, texts = random_features()
    scale = torch.tensor([14.0], dtype=torch.float64, requires_grad=True)
    ours = info_nce(images, texts, images, texts, scale, offset=0)
    theirs = open_clip.ClipLoss()(images, texts, scale)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-14)
    inputs = (images, texts, scale)
    for mine, other in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-14)


def test_sigmoid_loss_equals_open_clips_and_its_gradient() -> None:
    images, texts = random_features()
    scale, bias = (torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (10.0, -3.0))
    inputs = (images, texts, scale, bias)
    theirs = open_clip.loss.SigLipLoss()(images, texts, scale, bias)
    for chunk_logits in (12, 2**22):
        ours = sigmoid_loss(images, texts, scale, bias, offset=0, chunk_logits=chunk_logits)
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-14)
        grads = torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs, retain_graph=True)
        for mine, other in zip(*grads, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-14)


def sparc_in_loops(patches, sizes, words, mask, scale):  # type: ignore[no-untyped-def]
    """The sum over captions, one number at a time, on patches repeated by their size."""
    total = 0.0
    for v, s, t, m in zip(patches, sizes, words, mask, strict=True):
        v = F.normalize(v.repeat_interleave(s.long(), 0), dim=-1)
        t = F.normalize(t[m], dim=-1)
        if len(t) < 2:
            continue
        groups = []
        for word in t:
            similarity = v @ word
            weight = (similarity - similarity.min()) / (similarity.max() - similarity.min())
            weight = torch.where(weight < 1 / len(v), 0.0, weight)
            groups.append(F.normalize((weight / weight.sum()) @ v, dim=-1))
        logits = scale * torch.stack(groups) @ t.T
        labels = torch.arange(len(t))
        total = total + (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    return total


def token_inputs() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    patches = torch.randn(5, 7, 6, generator=generator, dtype=torch.float64).requires_grad_()
    words = torch.randn(5, 8, 6, generator=generator, dtype=torch.float64).requires_grad_()
    sizes = torch.randint(1, 5, (5, 7), generator=generator).double()
    mask = torch.arange(8)[None] < torch.tensor([8, 3, 2, 1, 0])[:, None]
    return patches, sizes, words, mask, torch.tensor([12.0], dtype=torch.float64)


def test_sparc_equals_loops_over_replicated_patches() -> None:
    patches, sizes, words, mask, scale = token_inputs()
    ours, theirs = sparc_sum(patches, sizes, words, mask, scale), sparc_in_loops(patches, sizes, words, mask, scale)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)
    for mine, other in zip(
        torch.autograd.grad(ours, (patches, words)), torch.autograd.grad(theirs, (patches, words)), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-12)


def test_sparc_ignores_masked_words() -> None:
    patches, sizes, words, mask, scale = token_inputs()
    loud = torch.where(mask[..., None], words, 1e6 * torch.randn_like(words)).detach().requires_grad_()
    value = sparc_sum(patches, sizes, loud, mask, scale)
    assert value.item() == pytest.approx(sparc_sum(patches, sizes, words, mask, scale).item(), rel=1e-12)
    (grad,) = torch.autograd.grad(value, loud)
    assert (grad[~mask] == 0).all()


def test_constant_patches_make_all_words_one_group_and_stay_finite() -> None:
    patches = torch.ones(1, 4, 3, dtype=torch.float64).requires_grad_()
    words = torch.randn(1, 3, 3, dtype=torch.float64)
    sizes = torch.tensor([[1.0, 5.0, 2.0, 1.0]], dtype=torch.float64)
    group = grouped_patches(F.normalize(patches, dim=-1), sizes, F.normalize(words, dim=-1))
    torch.testing.assert_close(group, torch.full((1, 3, 3), 3**-0.5, dtype=torch.float64))
    loss = sparc_sum(patches, sizes, words, torch.ones(1, 3, dtype=torch.bool), torch.ones(1))
    cosines = F.normalize(words[0], dim=-1).sum(-1) / 3**0.5  # of each word with the one group: the same for all
    to_words = torch.logsumexp(cosines, 0) - cosines
    assert loss.item() == pytest.approx(((to_words + math.log(3)).mean() / 2).item(), rel=1e-6)
    loss.backward()
    assert patches.grad.isfinite().all()


def test_objective_logs_every_term_and_sums_them_by_weight() -> None:
    recipe = small_recipe()
    objective, model = Objective(recipe.losses), small_model(recipe)
    batch = small_batch()
    encoded = model(batch, model.training_plan)
    terms = loss_terms(objective, encoded, batch)
    weights = {"spatial_global": 1.0, "spatial_token": 1.0, "frequency_global": 0.5, "frequency_token": 0.25}
    assert terms.keys() == weights.keys()
    assert objective.total(terms).item() == pytest.approx(
        sum(w * terms[n].item() for n, w in weights.items()), rel=1e-12
    )
    image, text = (F.normalize(x, dim=-1) for x in (encoded.image_features, encoded.text_features))
    expected = open_clip.ClipLoss()(image, text, encoded.scales["spatial_global"])
    assert terms["spatial_global"].item() == pytest.approx(expected.item(), rel=1e-12)


def test_token_terms_are_means_over_usable_captions() -> None:
    recipe = small_recipe()
    objective = Objective(recipe.losses)
    model = small_model(recipe)
    batch = small_batch(4, words=[1, 2, 5, 1])
    encoded = model(batch, model.training_plan)
    assert count_captions(batch.token_ids, encoded.text_mask).valid == 2
    one_by_one = [
        sparc_sum(
            encoded.image_tokens[i : i + 1], encoded.token_sizes[i : i + 1], encoded.text_tokens[i : i + 1],
            encoded.text_mask[i : i + 1], encoded.scales["spatial_token"],
        ).item() for i in range(4)
    ]  # fmt: skip
    assert one_by_one[0] == one_by_one[3] == 0
    found = loss_terms(objective, encoded, batch)["spatial_token"].item()
    assert found == pytest.approx(sum(one_by_one) / 2, rel=1e-12)
    batch = small_batch(4, words=[1, 1, 1, 1])
    assert loss_terms(objective, model(batch, model.training_plan), batch)["spatial_token"].item() == 0


def test_logits_are_fp32_even_under_autocast() -> None:
    objective = Objective(Losses())
    images, texts = (x.detach() for x in random_features(width=64))
    scale = {"scale.spatial_global": torch.tensor([50.0])}
    features = Features({IMAGE: images.float(), TEXT: texts.float()[:, None]} | scale)
    plain = objective.batch_terms(features)["spatial_global"]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(objective.batch_terms(features)["spatial_global"], plain)


def test_every_kind_in_the_recipe_has_its_function() -> None:
    batch = small_batch()
    for model, loss in ((GlobalLoss, "spatial_global"), (TokenLoss, "spatial_token")):
        for kind in model.model_fields["kind"].annotation.__args__:  # type: ignore[union-attr]
            recipe = small_recipe(mlip=False, losses={loss: {"kind": kind}})
            objective, clip = Objective(recipe.losses), small_model(recipe)
            terms = loss_terms(objective, clip(batch, clip.training_plan), batch)
            assert terms.keys() == {"spatial_global", loss}
            assert (loss in objective.batch_token_losses) == (kind in ("pooled", "filip"))
