"""Pointing: scores of encoders that know all or nothing, and the maps of real models against loops."""

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from models_for_tests import small_batch, small_model, small_recipe
from timm.layers import AttentionPoolLatent
from torch import Tensor

from mlip_cli.errors import RunError, UsageError
from mlip_cli.evaluate.datasets.pictures import Pictures
from mlip_cli.evaluate.mosaics import assemble, quadrants
from mlip_cli.evaluate.pointing import TIE, Maps, Pointer, Queries, measure_pointing, right_shares
from mlip_cli.model.pointing import pointing_queries, similarity_maps

COLORS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "cyan": (0, 255, 255),
    "magenta": (255, 0, 255),
}
SIDE, PATCH = 24, 4


def test_ties_count_by_their_share_and_middle_patches_not_at_all() -> None:
    maps = torch.rand(20, 4, 25, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    maps = (maps * 4).round() / 4  # many ties
    maps[0, 0] = 0.5
    maps[1, 0, :] = torch.linspace(0.5, 0.5 + TIE / 2, 25)  # equal but for rounding
    quadrant_of = quadrants((5, 5))
    found = right_shares(maps, quadrant_of)
    for b, q in itertools.product(range(20), range(4)):
        allowed = [n for n in range(25) if n // 5 != 2 and n % 5 != 2]
        best = max(maps[b, q, n].item() for n in allowed)
        tied = [n for n in allowed if maps[b, q, n].item() >= best - TIE]
        right = [n for n in tied if 2 * (n // 5 > 2) + (n % 5 > 2) == q]
        assert found[b, q].item() == pytest.approx(len(right) / len(tied))
    assert found[0, 0] == found[1, 0] == 0.25


def pictures_of(names: Sequence[str], labels: Sequence[int]) -> Pictures:
    return Pictures(
        class_names=tuple(names),
        templates=("{c}",),
        items=lambda: labels,
        load=lambda label: (
            torch.tensor(COLORS[names[label]], dtype=torch.uint8)[:, None, None].expand(3, 12, 12),
            label,
        ),
        num_pictures=len(labels),
    )


def tiles_of(pictures: Pictures, size: int) -> list[tuple[Tensor, Tensor]]:
    loaded = [pictures.load(item) for item in pictures.items()]
    images = torch.stack([image[:, :1, :1].expand(3, size, size) for image, _ in loaded])
    return list(zip(images.split(5), torch.tensor([label for _, label in loaded]).split(5), strict=True))


def color_queries(names: Sequence[str]) -> Queries:
    return {"feature": torch.tensor([COLORS[name] for name in names]) / 127.5 - 1}


def color_maps(images: Tensor, queries: Queries) -> Maps:
    """Tokens that carry the mean colour of their patch."""
    patches = torch.nn.functional.avg_pool2d(images.float() / 127.5 - 1, PATCH).flatten(2)
    return {reading: vectors @ patches / 3 for reading, vectors in queries.items()}


def constant_maps(images: Tensor, queries: Queries) -> Maps:
    return {
        reading: vectors.new_zeros(*vectors.shape[:2], (SIDE // PATCH) ** 2) for reading, vectors in queries.items()
    }


def shuffler() -> Any:
    """The same values in other places."""
    generator = torch.Generator().manual_seed(0)

    def maps_of(images: Tensor, queries: Queries) -> Maps:
        maps = color_maps(images, queries)["feature"]
        return {"feature": torch.stack([row[:, torch.randperm(row.shape[1], generator=generator)] for row in maps])}

    return maps_of


def pointer_of(*maps: Any, side: int = SIDE, queries: Any = color_queries) -> Pointer:
    return Pointer("run", side, (side // PATCH, side // PATCH), torch.device("cpu"), queries, maps)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_encoders_that_know_all_nothing_or_guess(batch_size: int) -> None:
    labels = [i % 6 for i in range(398)]
    pictures = pictures_of(list(COLORS), labels)
    pointer = pointer_of(color_maps, constant_maps, shuffler())
    seen: list[int] = []
    [[knows, constant, guesses]] = measure_pointing(
        pictures,
        tiles_of(pictures, SIDE // 2),
        [pointer],
        dataset="set",
        batch_size=batch_size,
        on_batch=seen.append,
    )
    assert (knows["n"], knows["num_names"], knows["chance"]) == (398, 6, 0.25)
    assert sum(seen) == 2 * 398
    assert knows["pointing"]["feature"]["accuracy"] == 1.0
    low, high = knows["pointing"]["feature"]["accuracy_interval"]
    assert 0.96 < low < high == 1.0
    assert constant["pointing"]["feature"] == {"accuracy": 0.25, "accuracy_interval": (0.25, 0.25)}
    assert set(constant["right"]["feature"].split()) == {"0.25"}
    low, high = guesses["pointing"]["feature"]["accuracy_interval"]
    assert low < 0.25 < high
    assert high - low < 0.12
    mosaic_of = [int(number) for number in knows["mosaic"].split()]
    assert max(Counter(mosaic_of).values()) == 4
    assert len(set(mosaic_of)) == knows["num_mosaics"]
    assert knows["right"]["feature"].split() == ["1"] * 398


def test_an_odd_grid_loses_its_middle_only() -> None:
    side = 28  # 7 x 7 patches of 4 pixels
    pictures = pictures_of(list(COLORS), [i % 6 for i in range(30)])
    [[knows]] = measure_pointing(
        pictures, tiles_of(pictures, side // 2), [pointer_of(color_maps, side=side)], dataset="set", batch_size=8
    )
    assert knows["pointing"]["feature"]["accuracy"] == 1.0
    assert (knows["patch_grid"], knows["patches_left_out"]) == ([7, 7], 13)
    [[other]] = measure_pointing(
        pictures, tiles_of(pictures, SIDE // 2), [pointer_of(color_maps)], dataset="set", batch_size=3
    )
    assert other["mosaic"] == knows["mosaic"]  # whatever the size, so runs of other sizes can be paired


def test_answers_are_in_the_order_of_the_pictures() -> None:
    def only_red(images: Tensor, queries: Queries) -> Maps:
        """The first channel alone, by which green, blue and cyan are equal."""
        return color_maps(images * torch.tensor([1, 0, 0], dtype=torch.uint8)[:, None, None], queries)

    labels = [0, 1, 2, 4] * 5
    pictures = pictures_of(list(COLORS), labels)
    [[result]] = measure_pointing(
        pictures, tiles_of(pictures, SIDE // 2), [pointer_of(only_red)], dataset="set", batch_size=8
    )
    shares = [float(share) for share in result["right"]["feature"].split()]
    assert [share == 1.0 for share in shares] == [label == 0 for label in labels]
    assert result["pointing"]["feature"]["accuracy"] == pytest.approx(sum(shares) / len(shares), abs=1e-5)


def test_a_grid_without_quadrants_cannot_point() -> None:
    pictures = pictures_of(list(COLORS), list(range(6)))
    with pytest.raises(UsageError) as error:
        measure_pointing(pictures, tiles_of(pictures, 2), [pointer_of(color_maps, side=4)], dataset="set", batch_size=8)
    assert str(error.value) == "run: a grid of 1 x 1 patches cannot point; use smaller patches"


def test_features_that_are_not_finite_are_counted() -> None:
    def damaged(images: Tensor, queries: Queries) -> Maps:
        maps = color_maps(images, queries)
        maps["feature"][-1, :, 0] = float("nan")  # one mosaic a batch
        return maps

    def damaged_texts(names: Sequence[str]) -> Queries:
        queries = color_queries(names)
        queries["feature"][:2, 0] = float("inf")
        return queries

    pictures = pictures_of(list(COLORS), [i % 6 for i in range(24)])
    cure = "features are not finite; the weights of this checkpoint are damaged; name an earlier one"
    for pointer, message in (
        (pointer_of(damaged), f"set: run: 24 of 24 image {cure}"),
        (pointer_of(color_maps, queries=damaged_texts), f"set: run: 2 of 6 text {cure}"),
    ):
        with pytest.raises(RunError) as error:
            measure_pointing(pictures, tiles_of(pictures, SIDE // 2), [pointer], dataset="set", batch_size=1)
        assert str(error.value) == message


def test_a_stem_points_by_the_tokens_that_its_losses_see() -> None:
    stem = {"frequency": {"placement": "stem", "width": 32, "depth": 1}, "merging": {"rate": 0.5, "at": [3, 4]}}
    model = small_model(small_recipe(model=stem)).eval()
    batch = small_batch(4)
    with torch.no_grad():
        queries = pointing_queries(model, batch.token_ids)
        found = similarity_maps(
            model, batch.images, {name: vectors[:, None] for name, vectors in queries.items()}, model.training_plan
        )
        tokens = model(batch, model.training_plan).frequency_tokens
    cosines = torch.nn.functional.normalize(tokens, dim=-1) @ queries["frequency_tokens"][:, :, None]
    torch.testing.assert_close(found["frequency_tokens"][:, 0], cosines[..., 0], rtol=0, atol=1e-12)


def reference_maps(model: Any, images: Tensor, token_ids: Tensor, plan: Any) -> dict[str, Tensor]:
    """One picture, one text, one word and one patch at a time: (n, N) each, text i against picture i."""
    cos = torch.nn.functional.cosine_similarity
    maps: dict[str, list[list[Tensor]]] = {"feature": [], "tokens": [], "frequency_tokens": []}
    for image, ids in zip(images, token_ids, strict=True):
        pixels = model.normalize(image[None])
        tower = model.image_tower(pixels, plan, with_branch=True)
        frequency = model.frequency_tokens(tower)[0]
        groups = tower.assign[-1][0].tolist() if tower.assign else range(16)
        length = int((ids == 49407).nonzero()[0])
        words = model.token_projections["text"](model.text(ids[None, : length + 1]))[0]
        real = [i for i in range(1, length) if ids[i] not in ids[1:i]]
        feature = model.encode_text(ids[None])[0]
        rows: dict[str, list[Tensor]] = {reading: [] for reading in maps}
        for patch_number, group in enumerate(groups):
            token = tower.tokens[0, group]
            spatial = model.token_projections["spatial"](token)
            other = model.token_projections["frequency"](frequency[patch_number])
            rows["feature"].append(cos(model.image_projection(token), feature, dim=0))
            rows["tokens"].append(torch.stack([cos(spatial, words[i], dim=0) for i in real]).mean())
            rows["frequency_tokens"].append(torch.stack([cos(other, words[i], dim=0) for i in real]).mean())
        for reading, row in rows.items():
            maps[reading].append(row)
    return {reading: torch.stack([torch.stack(row) for row in rows]) for reading, rows in maps.items()}


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_maps_are_those_of_loops(rate: float) -> None:
    model = small_model().eval()
    batch = small_batch(4)
    batch.token_ids[3, 2] = batch.token_ids[3, 1]  # a repeated word counts once
    plan = model.merge_plan(rate)
    with torch.no_grad():
        queries = {name: vectors[:, None] for name, vectors in pointing_queries(model, batch.token_ids).items()}
        found = similarity_maps(model, batch.images, queries, plan)
        expected = reference_maps(model, batch.images, batch.token_ids, plan)
    assert found.keys() == expected.keys()
    for reading, maps in found.items():
        torch.testing.assert_close(maps[:, 0], expected[reading], rtol=0, atol=1e-12)
    if rate:
        values = found["feature"][0, 0]
        assert len(values.unique()) == plan.tokens[-1]  # patches of a token are equal to the bit


def test_a_caption_without_words_and_a_model_without_token_heads() -> None:
    model = small_model()
    token_ids = torch.tensor([[49406, 49407, 0]])
    assert not pointing_queries(model, token_ids)["tokens"].any()
    plain = small_model(small_recipe(mlip=False))
    assert pointing_queries(plain, token_ids).keys() == {"feature"}


def test_equal_tokens_that_merge_give_the_maps_of_the_unmerged_model() -> None:
    model = small_model(small_recipe(model={"merging": {"rate": 0.5, "at": [2], "method": "tome"}})).eval()
    model.vision.trunk.pos_embed.data.zero_()  # patches of one colour are equal then
    colors = torch.tensor([COLORS[name] for name in ("red", "green", "blue", "yellow")], dtype=torch.uint8)
    images = assemble(colors[None, :, :, None, None].expand(1, 4, 3, 16, 16), image_size=32)
    ids = small_batch(4).token_ids
    with torch.no_grad():
        [stage] = model.merge_stages(images, model.plan)
        quadrant_of = quadrants((4, 4))
        for group in range(8):
            assert len(quadrant_of[stage.groups[0] == group].unique()) == 1
        queries = {name: vectors[None] for name, vectors in pointing_queries(model, ids).items()}
        merged = similarity_maps(model, images, queries, model.plan)
        whole = similarity_maps(model, images, queries, model.merge_plan(0.0))
    for reading in ("feature", "tokens", "frequency_tokens"):
        torch.testing.assert_close(merged[reading], whole[reading], rtol=0, atol=1e-12)


@pytest.mark.parametrize("pool", ["avg", "map"])
def test_patches_go_through_what_the_pooled_feature_goes_through(pool: str) -> None:
    model = small_model(small_recipe(mlip=False)).eval()
    trunk = model.vision.trunk
    trunk.pos_embed.data.zero_()  # all patches of one colour are equal then, and so is what pooling makes of them
    trunk.global_pool, trunk.fc_norm = pool, torch.nn.LayerNorm(32, dtype=torch.float64)
    trunk.attn_pool = AttentionPoolLatent(32, num_heads=2).double() if pool == "map" else None
    torch.nn.init.normal_(trunk.fc_norm.weight)
    torch.nn.init.normal_(trunk.fc_norm.bias)
    images = torch.full((1, 3, 32, 32), 90, dtype=torch.uint8)
    ids = small_batch(4).token_ids
    with torch.no_grad():
        queries = {"feature": pointing_queries(model, ids)["feature"][None]}
        maps = similarity_maps(model, images, queries, model.plan)["feature"]
        whole = torch.nn.functional.cosine_similarity(model.encode_image(images, model.plan), model.encode_text(ids))
    torch.testing.assert_close(maps[0], whole[:, None].expand(4, 16), rtol=0, atol=1e-12)
