"""Token merging against loops, replicated keys, and its invariants."""

import copy
import math
import pickle
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from models_for_tests import small_batch, small_model
from reference_for_tests import block_dct, merged
from scipy.fft import dctn
from scipy.stats import rankdata
from timm.models.vision_transformer import Block
from torch import Tensor

from mlip_cli.errors import UsageError
from mlip_cli.model.merging import (
    compose,
    cosine_cost,
    distinctness,
    frequency_guidance,
    grid_halves,
    grid_parity,
    group_mean,
    group_sizes,
    index_halves,
    last_step,
    match,
    merge_tokens,
    mid_ranks,
    size_mask,
    unmerge_tokens,
    ward_cost,
)
from mlip_cli.model.vision import ObservedBlock, attend
from mlip_cli.recipe.merge_plan import MergePlan, default_places

STRENGTH = 2.0


def resolve(rate: float, **changes: object) -> MergePlan:
    settings = {"depth": 12, "num_patches": 196, "at": None, "method": "guided"}
    return MergePlan.resolve(rate=rate, **(settings | changes))  # type: ignore[arg-type]


def loop_match(cost: Callable[[int, int], float], odd: Sequence[bool], num_groups: int) -> list[int]:
    """`match` for one image, in loops."""
    n = len(odd)
    proposals = []
    for i in range(n):
        if odd[i]:
            continue
        least, partner = math.inf, -1
        for j in range(n):
            if odd[j] and cost(i, j) < least:
                least, partner = cost(i, j), j
        proposals.append((least, i, partner))
    target = list(range(n))
    for _, i, partner in sorted(proposals)[: n - num_groups]:
        target[i] = partner
    members = {r: min(i for i in range(n) if target[i] == r) for r in set(target)}
    order = sorted(members.values())
    return [order.index(members[target[i]]) for i in range(n)]


Halves = tuple[Tensor, Tensor]


def tome(keys: Tensor, halves: Halves, num_groups: int) -> Tensor:
    """Groups by similarity alone."""
    even, odd = halves
    return match(cosine_cost(keys, even, odd), even, odd, num_groups)


def guided(keys: Tensor, guidance: Tensor, halves: Halves, num_groups: int, *, sizes: Tensor | None = None) -> Tensor:
    """Groups by what a merge changes, for tokens of one patch or of `sizes`."""
    even, odd = halves
    sizes = torch.ones(keys.shape[:2], dtype=keys.dtype) if sizes is None else sizes
    return match(ward_cost(keys, sizes, guidance, even, odd, strength=STRENGTH), even, odd, num_groups)


SHAPES = [(4, 4, 9), (3, 5, 8), (5, 5, 13), (4, 6, 24)]


@pytest.mark.parametrize(("h", "w", "num_groups"), SHAPES)
def test_matching_by_similarity_equals_loops(h: int, w: int, num_groups: int) -> None:
    keys = torch.randn(3, h * w, 6, generator=torch.Generator().manual_seed(h * w), dtype=torch.float64)
    parity = grid_parity(h, w)
    found = tome(keys, grid_halves(h, w), num_groups)
    for i in range(3):
        unit = keys[i].numpy() / np.linalg.norm(keys[i].numpy(), axis=1, keepdims=True)
        assert found[i].tolist() == loop_match(lambda a, b, u=unit: -u[a] @ u[b], parity.tolist(), num_groups)


@pytest.mark.parametrize(("h", "w", "num_groups"), SHAPES)
def test_guided_matching_equals_loops_that_merge_and_measure_the_change(h: int, w: int, num_groups: int) -> None:
    generator = torch.Generator().manual_seed(h * w)
    keys = torch.randn(3, h * w, 6, generator=generator, dtype=torch.float64)
    guidance = torch.rand(3, h * w, generator=generator, dtype=torch.float64)
    sizes = torch.randint(1, 6, (3, h * w), generator=generator).double()
    parity = grid_parity(h, w)
    found = guided(keys, guidance, grid_halves(h, w), num_groups, sizes=sizes)
    for i in range(3):

        def cost(a: int, b: int, i: int = i) -> float:
            """Squared distances of the patches of two tokens to the mean of all of them, before and after the merge."""
            patches = keys[i, a].repeat(int(sizes[i, a]), 1), keys[i, b].repeat(int(sizes[i, b]), 1)
            together = torch.cat(patches)
            change = (together - together.mean(0)).square().sum()
            change = change - sum((own - own.mean(0)).square().sum() for own in patches)
            return float(change * (1 + STRENGTH * max(guidance[i, a], guidance[i, b])))

        assert found[i].tolist() == loop_match(cost, parity.tolist(), num_groups)


def test_equal_tokens_merge_for_nothing_however_important_they_are() -> None:
    keys = torch.randn(1, 16, 4, generator=torch.Generator().manual_seed(0))
    keys[0, 5] = keys[0, 6] + 1e-4
    guidance = torch.zeros(1, 16)
    guidance[0, 5] = 1.0
    assign = guided(keys, guidance, grid_halves(4, 4), 15)
    assert assign[0, 5] == assign[0, 6]


def test_parity_is_a_chequerboard_on_even_grids() -> None:
    board = grid_parity(4, 4).view(4, 4)
    assert (board[1:] != board[:-1]).all()
    assert (board[:, 1:] != board[:, :-1]).all()


def test_strong_guidance_keeps_a_token_out_of_every_merge() -> None:
    keys = torch.ones(1, 16, 4) + 0.01 * torch.randn(1, 16, 4, generator=torch.Generator().manual_seed(0))
    guidance = torch.zeros(1, 16)
    guidance[0, 5] = 1.0
    even, odd = grid_halves(4, 4)
    cost = ward_cost(keys, torch.ones(1, 16), guidance, even, odd, strength=1e3)
    assign = match(cost, even, odd, 9)
    assert (assign == assign[0, 5]).sum() == 1
    assert (tome(keys, grid_halves(4, 4), 8)[0].bincount() > 1).any()


@pytest.mark.parametrize("value", [0.0, 1.0, 1e30])
def test_ties_zero_keys_and_blank_tokens_give_groups_without_nan(value: float) -> None:
    x = torch.full((2, 16, 4), value)
    assign = guided(x, torch.zeros(2, 16), grid_halves(4, 4), 8)
    assert sorted(set(assign[0].tolist())) == list(range(8))
    assert torch.isfinite(merged(x, torch.ones(2, 16), assign, 8)).all()


def test_groups_are_numbered_by_their_smallest_patch() -> None:
    assign = tome(torch.randn(4, 36, 5), grid_halves(6, 6), 20)
    for row in assign.tolist():
        firsts = [row.index(g) for g in range(20)]
        assert firsts == sorted(firsts)


def test_merge_is_the_weighted_mean_and_sizes_are_exact() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 10, 3, generator=generator, dtype=torch.float64)
    sizes = torch.randint(1, 5, (2, 10), generator=generator).double()
    assign = tome(x, index_halves(10), 6)
    merged_sizes = group_sizes(sizes, assign, 6)
    tokens = merge_tokens(x, sizes, assign, merged_sizes)
    for b in range(2):
        for g in range(6):
            members = assign[b] == g
            total = sizes[b, members].sum()
            assert merged_sizes[b, g] == total
            torch.testing.assert_close(tokens[b, g], (x[b, members] * sizes[b, members, None]).sum(0) / total)
            if members.sum() == 1:
                assert torch.equal(tokens[b, g], x[b, members][0])
    torch.testing.assert_close((tokens * merged_sizes[..., None]).sum(1), (x * sizes[..., None]).sum(1))
    torch.testing.assert_close(group_mean(x[..., 0], sizes, assign, merged_sizes), tokens[..., 0])


def test_sizes_of_577_tokens_stay_exact_under_bf16_autocast() -> None:
    sizes = torch.ones(1, 577)
    assign = torch.zeros(1, 577, dtype=torch.int64)
    assign[0, 500:] = 1
    with torch.autocast("cpu", torch.bfloat16):
        assert group_sizes(sizes, assign, 2).tolist() == [[500.0, 77.0]]
        lone = torch.arange(577)[None].clamp(max=1)
        x = torch.randn(1, 577, 4)
        assert torch.equal(merged(x, sizes, lone, 2)[0, 0], x[0, 0])


def test_compose_unmerge_and_last_step_agree() -> None:
    x = torch.randn(2, 16, 3)
    first = tome(x, grid_halves(4, 4), 10)
    y = merged(x, torch.ones(2, 16), first, 10)
    second = tome(y, index_halves(10), 6)
    both = compose(first, second)
    z = merged(y, group_sizes(torch.ones(2, 16), first, 10), second, 6)
    assert torch.equal(unmerge_tokens(z, both), unmerge_tokens(unmerge_tokens(z, second), first))
    assert torch.equal(last_step(first, both, 10), second)
    assert torch.equal(group_sizes(torch.ones(2, 16), both, 6).sum(1), torch.full((2,), 16.0))


def test_proportional_attention_equals_replicated_keys() -> None:
    torch.manual_seed(0)
    block = Block(24, 3, qkv_bias=True).double().eval()
    x = torch.randn(2, 6, 24, dtype=torch.float64)
    sizes = torch.tensor([[1.0, 3, 2, 1, 4]] * 2, dtype=torch.float64)
    copies = torch.cat([x[:, :1], x[:, 1:].repeat_interleave(sizes[0].long(), 1)], 1)
    expected = block(copies)
    found = block(x, attn_mask=size_mask(sizes, 1))
    torch.testing.assert_close(found[:, 0], expected[:, 0], rtol=1e-12, atol=1e-12)
    starts = [1 + int(sizes[0, :i].sum()) for i in range(5)]
    torch.testing.assert_close(found[:, 1:], expected[:, starts], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_an_observed_block_computes_what_timms_block_does(fused: bool, masked: bool) -> None:
    torch.manual_seed(0)
    block = ObservedBlock(24, 3, qkv_bias=True, init_values=0.1, qk_norm=True).double().eval()
    block.attn.fused_attn = fused
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    mask = torch.randn(2, 1, 1, 7, dtype=torch.float64) if masked else None
    out, keys, first_row = block(x, attn_mask=mask, observe=True)
    torch.testing.assert_close(out, Block.forward(block, x, mask), rtol=1e-12, atol=1e-12)
    assert keys.shape == (2, 7, 8)
    torch.testing.assert_close(first_row.sum(1), torch.ones(2, dtype=torch.float64))
    h = block.norm1(x)
    q, k, _ = block.attn.qkv(h).view(2, 7, 3, 3, 8).permute(2, 0, 3, 1, 4)
    q, k = block.attn.q_norm(q), block.attn.k_norm(k)
    logits = q[:, :, 0:1] @ k.transpose(-2, -1) / math.sqrt(8)
    expected = (logits if mask is None else logits + mask).softmax(-1)[:, :, 0].mean(1)
    torch.testing.assert_close(first_row, expected)
    torch.testing.assert_close(attend(block.attn, h, mask)[1], k.mean(1))


def test_mid_ranks_share_ties() -> None:
    values = torch.tensor([[3.0, 1, 1, 7, 3, 3, 0, 9]])
    expected = (rankdata(values[0].numpy(), method="average") - 1) / 7
    np.testing.assert_allclose(mid_ranks(values)[0].numpy(), expected, atol=1e-7)
    assert mid_ranks(torch.zeros(1, 5)).unique().tolist() == [0.5]


def test_patch_dct_is_scipys() -> None:
    images = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    found = block_dct(images, 8)
    expected = dctn(images[1, 2, 8:16, 16:24].numpy(), norm="ortho")
    np.testing.assert_allclose(found[1, 5, 2].numpy(), expected, atol=1e-12)


def test_frequency_guidance_prefers_detail_and_ties_blank_patches() -> None:
    images = torch.full((1, 3, 32, 32), 1.9)
    images[:, :, 8:16, 8:16] = torch.where(torch.arange(64).view(8, 8) % 2 == 0, 1.0, -1.0)
    images[:, :, 0:8, 0:8] += torch.linspace(0, 0.5, 8)
    guidance = frequency_guidance(block_dct(images, 8))[0]
    assert guidance.argmax() == 5
    assert len(guidance.unique()) <= 3
    assert (guidance == guidance[15]).sum() >= 14


def test_distinctness_of_an_outlier_is_largest() -> None:
    x = torch.ones(1, 6, 4)
    x[0, 3] = torch.tensor([1.0, -1, 1, -1])
    assert distinctness(x, torch.ones(1, 6)).argmax() == 3


def test_default_places() -> None:
    """A third of the tower, or four places where it has them."""
    for depth, last in ((1, 2), (2, 2), (3, 3), (4, 4), (5, 5), (6, 5), (12, 5), (15, 6), (24, 9)):
        assert default_places(depth) == default_places(depth, "tome") == tuple(range(2, last + 1))
    assert default_places(12, "random_drop") == (1,)


def test_plan_counts_tokens_and_says_its_true_rate() -> None:
    plan = resolve(0.5)
    assert plan.tokens == (196, 165, 139, 117, *(98,) * 8)
    assert plan.rate == 0.5
    assert plan.merges == {2: 165, 3: 139, 4: 117, 5: 98}
    assert resolve(0.0).tokens == (196,) * 12
    assert resolve(0.0).at == ()
    assert resolve(0.3, num_patches=49, depth=4, at=(2, 3)).tokens == (49, 41, 34, 34)


def test_a_rate_that_no_plan_reaches_is_refused() -> None:
    message = (
        "merge rate 0.8: the merge before block 3 would take 196 tokens to 88, and one merge removes at most half; "
        "lower the rate"
    )
    with pytest.raises(UsageError) as caught:
        resolve(0.8, at=(3, 5))
    assert str(caught.value) == message + " or add places to model.merging.at"
    with pytest.raises(UsageError) as caught:
        resolve(0.8, depth=4, stem=2)
    assert str(caught.value) == message
    assert resolve(0.75, at=(3, 5)).tokens[-1] == 49


def test_rate_09_is_reached_by_default_where_four_merges_fit() -> None:
    for depth in range(1, 25):
        for stem in range(min(depth, 5)):
            if depth - max(stem, 1) >= 4:
                plan = resolve(0.9, depth=depth, num_patches=256, stem=stem)
                assert plan.tokens[-1] == 26
            else:
                with pytest.raises(UsageError, match=r"at most half; lower the rate$|beyond the tower's depth"):
                    resolve(0.9, depth=depth, num_patches=256, stem=stem)
    assert resolve(0.875, depth=4, num_patches=256).tokens == (256, 128, 64, 32)


@pytest.mark.parametrize(
    ("at", "message"),
    [
        ((1, 3), "[1, 3] starts too early; the first place for guided is 2"),
        ((3, 2), "[3, 2] does not ascend; name each block once, the first one first"),
        ((2, 2), "[2, 2] does not ascend; name each block once, the first one first"),
        ((5,), "[5] goes beyond the tower's depth 4; the last block is 4"),
        ((), "no block given; name some, or set model.merging to null"),
    ],
)
def test_places_outside_the_tower_are_refused(at: tuple[int, ...], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve(0.3, depth=4, at=at)
    assert str(caught.value) == f"model.merging.at: {message}"


@pytest.mark.parametrize("method", ["guided", "tome"])
def test_sizes_sum_to_n_and_gradients_flow(method: str) -> None:
    model, batch = small_model(), small_batch()
    encoded = model(batch, model.merge_plan(0.5, method))
    assert encoded.token_sizes.shape == (8, 8)
    assert (encoded.token_sizes.sum(1) == 16).all()
    for assign, count in zip(encoded.assign, (11, 8), strict=True):
        assert assign.shape == (8, 16)
        assert (assign.amax(1) == count - 1).all()
    encoded.image_tokens.sum().backward()
    assert model.vision.trunk.patch_embed.proj.weight.grad.isfinite().all()
    assert model.vision.trunk.patch_embed.proj.weight.grad.abs().sum() > 0


def test_methods_differ_and_replay_is_exact() -> None:
    model, batch = small_model(), small_batch()
    with torch.no_grad():
        guided, tome = (model(batch, model.merge_plan(0.5, m)) for m in ("guided", "tome"))
        assert not torch.equal(guided.assign[0], tome.assign[0])
        again = model(batch, model.merge_plan(0.5), assign=guided.assign)
    assert torch.equal(again.image_features, guided.image_features)


def test_merging_leaves_no_state_behind() -> None:
    model = small_model()
    keys = list(model.state_dict())
    before = model.encode_image(small_batch().images, model.merge_plan(0.0))
    model.encode_image(small_batch().images, model.plan)
    assert torch.equal(model.encode_image(small_batch().images, model.merge_plan(0.0)), before)
    assert list(model.state_dict()) == keys
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301 - our own bytes
        assert torch.equal(
            twin.encode_image(small_batch().images, twin.plan), model.encode_image(small_batch().images, model.plan)
        )
