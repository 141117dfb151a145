"""Captions in groups of few widths: none is cut, and features, tokens and gradients are those of padded captions."""

import random
from dataclasses import replace
from itertools import product

import pytest
import torch
from models_for_tests import BOS, EOS, small_batch, small_model, small_recipe, with_lengths
from torch import Tensor

from mlip_cli.model import packing
from mlip_cli.model.blocks import set_fused_attention
from mlip_cli.model.packing import PARTS, WIDTHS, Packing, text_groups
from mlip_cli.model.text import TextTower
from mlip_cli.recipe.config import Text
from mlip_cli.types import Encoded

TOWER = Text(width=32, depth=2, num_heads=2, context_length=77)


def web_lengths(n: int, seed: int = 0) -> list[int]:
    """Log-normal, median 14, one in twenty over 48; the last caption is as long as it can be."""
    draws = random.Random(seed)
    return [min(77, max(3, round(draws.lognormvariate(2.64, 0.75)))) for _ in range(n - 1)] + [77]


def captions(lengths: list[int], width: int = 77) -> Tensor:
    ids = torch.randint(1, BOS, (len(lengths), width), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = BOS
    for row, length in zip(ids, lengths, strict=True):
        row[length - 1], row[length:] = EOS, 0
    return ids


@pytest.mark.parametrize(("n", "width"), [*product((1, 5, 16, 33, 512), (8, 20, 48, 77, 300))])
def test_every_caption_is_in_one_group_that_is_wide_enough(n: int, width: int) -> None:
    for seed in range(20):
        lengths = [min(length, width) for length in web_lengths(n, seed)]
        groups = text_groups(lengths, width)
        assert sum(rows for rows, _ in groups) == n
        widths = [own for _, own in groups]
        assert widths == sorted(set(widths))
        assert set(widths) <= {*WIDTHS, width}
        places = [own for rows, own in groups for _ in range(rows)]
        assert all(length <= own <= width for length, own in zip(sorted(lengths), places, strict=True))


@pytest.mark.parametrize("n", [16, 512, 4096])
def test_groups_have_few_sizes_and_little_padding(n: int) -> None:
    found = [text_groups(web_lengths(n, seed), 77) for seed in range(100)]
    assert all(rows % (n // PARTS) == 0 for groups in found for rows, _ in groups)
    assert max(map(len, found)) <= len(WIDTHS) + 1
    computed = sum(rows * width for groups in found for rows, width in groups) / (100 * n)
    assert computed < 77 / 2.5


def test_captions_that_all_fit_into_narrow_groups_leave_no_rest_to_a_wider_one() -> None:
    assert text_groups([8] * 30 + [16] * 3, 77) == ((30, 8), (3, 16))
    assert text_groups([8] * 31 + [16] * 2 + [17], 77) == ((30, 8), (2, 16), (2, 24))  # a part is 2 rows
    assert text_groups([77, 3], 77) == ((1, 8), (1, 77))
    with pytest.raises(AssertionError, match="a caption of 78 tokens in a batch 77 wide"):
        text_groups([3, 78], 77)


@pytest.mark.parametrize("fused", [True, False])
def test_features_and_tokens_equal_padded_ones(fused: bool) -> None:
    torch.manual_seed(0)
    tower, lengths = TextTower(TOWER).double(), web_lengths(100)
    set_fused_attention(tower, fused)
    ids = captions(lengths)
    own = tower.packing(ids, lengths)
    assert own is not None
    assert len(own.groups) == 6
    padded, packed = tower(ids), tower(ids, own)
    assert len(packed) < 0.5 * ids.numel()
    torch.testing.assert_close(tower.pool(packed, ids, own), tower.pool(padded, ids), rtol=0, atol=1e-10)
    tokens, words = own.padded(packed), torch.arange(77) < torch.tensor(lengths)[:, None]
    assert tokens.shape == padded.shape
    torch.testing.assert_close(tokens[words], padded[words], rtol=0, atol=1e-10)


@pytest.mark.parametrize("losses", [{}, {"spatial_token": {"kind": "filip"}}], ids=["sparc", "filip"])
def test_what_losses_read_equals_that_of_padded_captions(
    losses: dict[str, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "WIDTHS", (4, 6))
    model, batch = small_model(small_recipe(losses=losses)), small_batch(24)
    padded, packed = (model(own, model.plan) for own in (batch, with_lengths(batch)))
    assert isinstance(padded, Encoded)
    assert padded.text_tokens is not None
    torch.testing.assert_close(packed.text_features, padded.text_features, rtol=0, atol=1e-10)
    for name in ("text_mask", "caption_mask"):
        mask = getattr(padded, name)
        assert torch.equal(getattr(packed, name), mask)
        torch.testing.assert_close(packed.text_tokens[mask], padded.text_tokens[mask], rtol=0, atol=1e-10)


def test_an_end_before_the_known_length_is_where_the_caption_is_pooled() -> None:
    """A caption may spell the token that ends it."""
    torch.manual_seed(0)
    tower, lengths = TextTower(TOWER).double(), [60, 5, 40, 12]
    ids = captions(lengths)
    ids[0, 2] = EOS
    own = tower.packing(ids, lengths)
    assert own is not None
    torch.testing.assert_close(tower.pool(tower(ids, own), ids, own), tower.pool(tower(ids), ids), rtol=0, atol=1e-10)


def test_groups_are_for_causal_towers_that_pool_at_the_end() -> None:
    lengths = web_lengths(64)
    assert TextTower(TOWER).groups(lengths, 77) is not None
    assert TextTower(TOWER).groups(None, 77) is None
    assert TextTower(TOWER).groups([77] * 64, 77) is None
    for change in ({"causal": False}, {"pool": "last"}):
        assert TextTower(TOWER.model_copy(update=change)).groups(lengths, 77) is None


def test_nothing_is_read_from_the_device() -> None:
    """Tensors of the meta device hold no values to read."""
    lengths = web_lengths(64)
    tower, ids = TextTower(TOWER).to("meta"), captions(lengths).to("meta")
    own = tower.packing(ids, lengths)
    assert isinstance(own, Packing)
    packed = tower(ids, own)
    assert tower.pool(packed, ids, own).shape == (64, 32)
    assert own.padded(packed).shape == (64, 77, 32)


def test_a_block_runs_once_for_all_groups() -> None:
    """So ranks with different groups gather its sharded weights equally often."""
    model, calls = small_model(), 0

    def count(module: torch.nn.Module, inputs: object) -> None:
        nonlocal calls
        calls += 1

    model.text.blocks[0].register_forward_pre_hook(count)
    model(with_lengths(small_batch(24)), model.plan)
    assert calls == 1


def test_micro_batches_find_groups_of_their_own() -> None:
    batch = with_lengths(small_batch(8))
    assert batch.text_lengths is not None
    batch = replace(batch, token_ids=batch.token_ids.repeat_interleave(2, 0), text_lengths=batch.text_lengths * 2)
    parts = batch.split(3)
    assert [part.text_lengths for part in parts] == [
        batch.text_lengths[:6],
        batch.text_lengths[6:12],
        batch.text_lengths[12:],
    ]
    assert [len(part.token_ids) for part in parts] == [6, 6, 4]
