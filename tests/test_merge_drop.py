"""Dropping random patches in training: which, in what order, and that evaluation sees them all."""

import pickle

import pytest
import torch
from models_for_tests import small_batch, small_model, small_recipe
from reference_for_tests import patches_of
from timm.layers import DropPath
from torch import Tensor

from mlip_cli.errors import UsageError
from mlip_cli.losses.objective import Objective
from mlip_cli.model.clip import CLIP
from mlip_cli.model.merge_pass import MergePass
from mlip_cli.model.merging import compose, drop, kept_tokens, last_step, unmerge_tokens
from mlip_cli.recipe.checks import check
from mlip_cli.recipe.merge_plan import MergePlan
from mlip_cli.train.gradients import Precision, add_gradients


def dropping_model(**merging: object) -> CLIP:
    settings = {"method": "random_drop", "rate": 0.5, "at": None} | merging
    return small_model(small_recipe(model={"merging": settings}))


def plan(rate: float, **changes: object) -> MergePlan:
    settings = {"depth": 12, "num_patches": 196, "at": None, "method": "random_drop"}
    return MergePlan.resolve(rate=rate, **(settings | changes))  # type: ignore[arg-type]


def test_the_largest_draws_stay_in_order_and_to_the_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    draws, x = torch.rand(3, 10, generator=generator), torch.randn(3, 10, 4, generator=generator)
    assign = drop(draws, 6)
    kept = kept_tokens(x, assign, 6)
    for i in range(3):
        largest = sorted(sorted(range(10), key=lambda j: -draws[i, j])[:6])
        assert assign[i].tolist() == [largest.index(j) if j in largest else -1 for j in range(10)]
        assert torch.equal(kept[i], x[i, largest])


def test_groups_of_dropped_patches_compose_and_come_back() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 12, 3, generator=generator)
    first, second = (drop(torch.rand(2, n, generator=generator), k) for n, k in ((12, 8), (8, 5)))
    both = compose(first, second)
    last = kept_tokens(kept_tokens(x, first, 8), second, 5)
    assert torch.equal(last, kept_tokens(x, both, 5))
    assert torch.equal(last_step(first, both, 8), second)
    spread = unmerge_tokens(last, both)
    assert torch.equal(spread, torch.where((both >= 0)[..., None], x, 0))
    assert ((both >= 0).sum(1) == 5).all()


def test_drops_leave_the_share_of_patches_that_is_asked_for() -> None:
    assert plan(0.5).at == (1,)
    assert plan(0.5).tokens == (98,) * 12
    assert plan(0.9).tokens == (20,) * 12  # a merge would stop at half
    assert plan(0.999).tokens == (1,) * 12
    assert plan(0.75, at=(1, 4)).tokens == (98,) * 3 + (49,) * 9
    assert plan(0.9).largest_merge == 0
    assert (plan(0.5).drops, plan(0.0).drops, plan(0.4, method="tome").drops) == (True, False, False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate": 1.0}, "merge rate 1: not in [0, 1); it is the fraction of the patch tokens to remove"),
        ({"rate": -0.1}, "merge rate -0.1: not in [0, 1); it is the fraction of the patch tokens to remove"),
        ({"rate": float("nan")}, "merge rate nan: not in [0, 1); it is the fraction of the patch tokens to remove"),
        ({"method": "kmeans"}, "model.merging.method: unknown method kmeans; use guided, tome or random_drop"),
        (
            {"guidance": "text"},
            "model.merging.guidance: unknown guidance text; there are mixed, spatial, frequency, inverse",
        ),
        ({"at": (0, 1)}, "model.merging.at: [0, 1] starts too early; the first place for random_drop is 1"),
    ],
)
def test_impossible_plans_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        plan(**({"rate": 0.5} | changes))  # type: ignore[arg-type]
    assert str(caught.value) == message


def test_only_drops_may_come_before_the_first_block() -> None:
    def mistakes(**merging: object) -> list[tuple[str, str]]:
        return check(small_recipe(model={"merging": merging}))

    assert mistakes(method="random_drop", rate=0.9) == mistakes(method="random_drop", at=[1, 3]) == []
    [(key, message)] = mistakes(method="guided", at=[1, 3])
    assert key == "model.merging.at"
    assert message.startswith("[1, 3] starts too early; the first place for guided is 2")
    [(key, _)] = mistakes(method="random_drop", at=[5])
    assert key == "model.merging.at"


def test_training_drops_and_evaluation_sees_all() -> None:
    model, batch = dropping_model(), small_batch()
    assert model.training_plan == model.merge_plan(0.5, "random_drop")
    assert model.plan == model.merge_plan(0.0)
    encoded = model(batch, model.training_plan)
    assert encoded.image_tokens is not None
    assert encoded.image_tokens.shape[1] == encoded.token_sizes.shape[1] == 8
    assert (encoded.token_sizes == 1).all()
    plain = small_model(small_recipe(model={"merging": None}))
    plain.load_state_dict(model.state_dict())
    for training in (False, True):
        model.train(training)
        expected = plain.image_features(batch.images, plain.plan)
        found = model.image_features(batch.images, model.plan)
        assert torch.equal(found.spatial, expected.spatial)
        assert torch.equal(model.encode_image(batch.images, model.plan), expected.spatial)
    assert model.merge_plan(0.5).method == "guided"
    assert model.merge_plan(0.5).at == (2, 3, 4)


def test_a_drop_is_the_tower_on_the_kept_patches() -> None:
    model, batch = dropping_model(), small_batch()
    torch.manual_seed(2)
    found = model(batch, model.training_plan)
    images = model.normalize(batch.images)
    embedded = model.vision.embed(images)
    [assign] = found.assign
    assert ((assign >= 0).sum(1) == 8).all()
    assert len({str(row) for row in assign.tolist()}) > 1  # each picture has its own
    rows = []
    for i in range(8):
        x = torch.cat([embedded[i : i + 1, :1], embedded[i : i + 1, 1:][:, assign[i] >= 0]], 1)
        rows.append(model.vision.trunk.norm(model.vision.trunk.blocks(x))[0, 0])
    torch.testing.assert_close(found.image_features, model.image_projection(torch.stack(rows)))


def test_drops_come_from_torchs_generator_and_favour_no_patch() -> None:
    patches = patches_of((4, 4), 8, 1, has_class_token=True)
    images, tokens = torch.zeros(500, 3, 32, 32), torch.zeros(500, 17, 1)

    def kept(seed: int) -> Tensor:
        torch.manual_seed(seed)
        state = MergePass(images, plan(0.5, depth=4, num_patches=16), patches=patches)
        state.merge(tokens, 8)
        return state.assigns[0] >= 0

    assert torch.equal(kept(3), kept(3))
    assert not torch.equal(kept(3), kept(4))
    torch.testing.assert_close(kept(3).double().mean(0), torch.full((16,), 0.5, dtype=torch.float64), rtol=0, atol=0.1)


def test_a_replay_draws_the_same_numbers_as_the_first_pass() -> None:
    """Else drop path behind the drops would differ, and accumulation would give another gradient."""
    model, batch = dropping_model(at=[1, 3]).train(), small_batch()
    for block in model.vision.trunk.blocks:
        block.drop_path1 = DropPath(0.5)
    torch.manual_seed(0)
    first = model(batch, model.training_plan)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    again = model(batch, model.training_plan, assign=first.assign)
    assert torch.equal(again.image_features, first.image_features)
    assert all(torch.equal(a, b) for a, b in zip(again.assign, first.assign, strict=True))
    assert torch.equal(torch.get_rng_state(), after)
    other = [groups.flip(0) for groups in first.assign]
    assert not torch.equal(model(batch, model.training_plan, assign=tuple(other)).image_features, first.image_features)


def test_gradients_reach_kept_patches_alone() -> None:
    model, batch = dropping_model(), small_batch()
    tower = model.image_tower(batch.images, model.training_plan)
    [gradient] = torch.autograd.grad(tower.pooled.square().sum(), tower.embedded)
    assert torch.equal(gradient[:, 1:].abs().sum(-1) > 0, tower.assign[0] >= 0)


def test_a_model_that_drops_pickles() -> None:
    model = dropping_model()
    twin = pickle.loads(pickle.dumps(model))  # noqa: S301 - our own bytes
    assert twin.training_plan == model.training_plan
    assert torch.equal(
        twin.encode_image(small_batch().images, twin.plan), model.encode_image(small_batch().images, model.plan)
    )


def test_micro_batches_drop_what_the_whole_batch_drops() -> None:
    """The CPU's generator hands out the same numbers in one call and in several, so the gradients can be compared."""

    def gradients(micro_batch_size: int | None) -> list[Tensor]:
        model, batch = dropping_model().train(), small_batch()
        objective = Objective(small_recipe().losses)
        torch.manual_seed(0)
        precision = Precision.named("fp32", torch.device("cpu"))
        add_gradients(
            model, objective, batch,
            precision=precision, micro_batch_size=micro_batch_size, plan=model.training_plan,
        )  # fmt: skip
        return [p.grad for p in model.vision.parameters() if p.grad is not None]

    for whole, parts in zip(gradients(None), gradients(2), strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-12)
