"""Pointing in mosaics: their composition, the scores of encoders that know all or nothing, and the command."""

import itertools
import json
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from models_for_tests import make_run, small_batch, small_model, small_recipe
from PIL import Image
from shards_for_tests import make_dataset
from torch import Tensor

from mlip_cli import cli
from mlip_cli.commands.eval_zeroshot import eval_zeroshot
from mlip_cli.commands.loading import at_rate, load_run
from mlip_cli.commands.pointing_tables import compared_pointing
from mlip_cli.commands.report import rebuild
from mlip_cli.commands.validation import ValidationPairs
from mlip_cli.config import Source
from mlip_cli.data.tokenizer import Tokenizer
from mlip_cli.errors import RunError, UsageError
from mlip_cli.evaluate.mosaics import assemble, compose, concepts, quadrants, tile_size
from mlip_cli.evaluate.pictures import Names, Pictures
from mlip_cli.evaluate.pointing import TIE, Maps, Pointer, Queries, measure_pointing, right_shares
from mlip_cli.evaluate.retrieval import rank_of_first_right
from mlip_cli.evaluate.statistics import by_cluster, cluster_interval, paired_by_cluster
from mlip_cli.evaluate.zeroshot import normalized
from mlip_cli.model.pointing import pointing_queries, similarity_maps
from mlip_cli.run_folder import Run
from mlip_cli.train.checkpoint import save_checkpoint

COLORS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "cyan": (0, 255, 255),
    "magenta": (255, 0, 255),
}
SIDE, PATCH = 24, 4


@pytest.mark.parametrize("size", [6, 7, 9])
def test_tiles_lie_in_reading_order_and_meet_in_the_middle(size: int) -> None:
    s = tile_size(size)
    tiles = torch.arange(2 * 4 * 3 * s * s).reshape(2, 4, 3, s, s)
    mosaic = assemble(tiles, image_size=size)
    assert mosaic.shape == (2, 3, size, size)
    for row, column in itertools.product(range(size), repeat=2):
        lower, right = row >= s, column >= s
        y = s - (size - row) if lower else row  # the outer edges stay, whatever the middle loses
        x = s - (size - column) if right else column
        assert torch.equal(mosaic[:, :, row, column], tiles[:, 2 * lower + right, :, y, x])


@pytest.mark.parametrize("grid", [(2, 2), (3, 3), (4, 5), (7, 7), (1, 4)])
def test_quadrants_are_those_of_every_pixel_of_a_patch(grid: tuple[int, int]) -> None:
    h, w = grid
    p = 2  # pixels a patch, so that every middle lies between two pixels
    found = quadrants(grid).reshape(h, w)
    for row, column in itertools.product(range(h), range(w)):
        pixels = itertools.product(range(p * row, p * row + p), range(p * column, p * column + p))
        seen = {2 * (2 * y >= p * h) + (2 * x >= p * w) for y, x in pixels}
        assert found[row, column] == (seen.pop() if len(seen) == 1 else -1)


@pytest.mark.parametrize(
    "concept_of",
    [
        list(range(4)),
        list(range(103)),
        [i % 10 for i in range(98)],
        [i % 4 for i in range(41)],
        [0] * 60 + [1, 2, 3],  # most pictures have one name
        [i // 30 for i in range(120)],
    ],
)
def test_each_picture_is_asked_for_once_beside_three_other_names(concept_of: list[int]) -> None:
    mosaics = compose(concept_of, dataset="set")
    asked = mosaics.pictures[mosaics.is_asked].tolist()
    assert sorted(asked) == list(range(len(concept_of)))
    for row in mosaics.pictures.tolist():
        assert len({concept_of[picture] for picture in row}) == 4
    assert mosaics.is_asked.any(dim=1).all()
    most = max(Counter(concept_of).values())
    assert len(mosaics.pictures) <= max(-(-len(concept_of) // 4) + 3, most)
    assert torch.equal(compose(concept_of, dataset="set").pictures, mosaics.pictures)
    if len(concept_of) > 4:
        assert not torch.equal(compose(concept_of, dataset="set", seed=1).pictures, mosaics.pictures)


def test_places_are_random() -> None:
    concept_of = [0] * 40 + list(range(1, 9))  # most mosaics have one picture that is asked for, and fillers
    asked, all_of_one = torch.zeros(4), torch.zeros(4)
    for seed in range(20):
        mosaics = compose(concept_of, dataset="set", seed=seed)
        asked += mosaics.is_asked.sum(0)
        all_of_one += (mosaics.pictures < 40).sum(0)
    for places in (asked, all_of_one):
        assert places.min() > 0.2 * places.sum()


def test_equal_names_and_equal_pictures_never_meet() -> None:
    names = ["crane", "boat", "crane", "dot", "disc", "circle"]
    assert concepts(names, [0, 1, 2, 3]) == [0, 1, 0, 3]
    found = concepts(names, [3, 4, 5, 1], [[3, 4], [4, 3], [4, 5], [1]])  # dot = disc, disc = circle
    assert len(set(found[:3])) == 1
    assert found[3] not in found[:3]
    assert len(set(concepts(names[1:4], [0, 1, 2], [[0, 1], [1, 2], [2]]))) == 1  # a chain


@pytest.mark.parametrize(
    ("concept_of", "message"),
    [
        ([], "set: 0 pictures, and pointing needs 4; add pictures, or name another data set"),
        ([0, 1, 2], "set: 3 pictures, and pointing needs 4; add pictures, or name another data set"),
        (
            [0, 1, 2, 2, 1],
            "set: 3 different names, and pointing needs 4; add pictures of other names, or name another data set",
        ),
        (
            [0] * 9,
            "set: 1 different name, and pointing needs 4; add pictures of other names, or name another data set",
        ),
    ],
)
def test_too_little_for_a_mosaic(concept_of: list[int], message: str) -> None:
    with pytest.raises(UsageError) as error:
        compose(concept_of, dataset="set")
    assert str(error.value) == message


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


def pictures_of(names: Sequence[str], labels: Sequence[int], accepted: Sequence[Sequence[int]] = ()) -> Pictures:
    return Pictures(
        class_names=tuple(names),
        templates=("{c}",),
        items=lambda: labels,
        load=lambda label: (
            torch.tensor(COLORS[names[label]], dtype=torch.uint8)[:, None, None].expand(3, 12, 12),
            label,
        ),
        num_pictures=len(labels),
        names=Names(tuple(names), tuple(map(tuple, accepted))) if accepted else None,
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
    assert knows["pointing"]["feature"] == {"accuracy": 1.0, "accuracy_interval": (1.0, 1.0)}
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
        found = similarity_maps(model, batch.images, {name: vectors[:, None] for name, vectors in queries.items()})
        tokens = model(batch).frequency_tokens
    cosines = torch.nn.functional.normalize(tokens, dim=-1) @ queries["frequency_tokens"][:, :, None]
    torch.testing.assert_close(found["frequency_tokens"][:, 0], cosines[..., 0], rtol=0, atol=1e-12)


def reference_maps(model: Any, images: Tensor, token_ids: Tensor, plan: Any) -> dict[str, Tensor]:
    """One picture, one text, one word and one patch at a time: (n, N) each, text i against picture i."""
    cos = torch.nn.functional.cosine_similarity
    maps: dict[str, list[list[Tensor]]] = {"feature": [], "tokens": [], "frequency_tokens": []}
    for image, ids in zip(images, token_ids, strict=True):
        pixels = model.normalize(image[None])
        embedded = model.vision.embed(pixels)
        tower = model.vision(pixels, embedded, plan)
        frequency = model.frequency(pixels, embedded[:, model.vision.num_prefix :])[0]
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
        [stage] = model.merge_stages(images)
        quadrant_of = quadrants((4, 4))
        for group in range(8):
            assert len(quadrant_of[stage.groups[0] == group].unique()) == 1
        queries = {name: vectors[None] for name, vectors in pointing_queries(model, ids).items()}
        merged = similarity_maps(model, images, queries, model.plan)
        whole = similarity_maps(model, images, queries, model.merge_plan(0.0))
    for reading in ("feature", "tokens", "frequency_tokens"):
        torch.testing.assert_close(merged[reading], whole[reading], rtol=0, atol=1e-12)


def test_patches_go_through_what_the_pooled_feature_goes_through() -> None:
    model = small_model(small_recipe(mlip=False)).eval()
    trunk = model.vision.trunk
    trunk.pos_embed.data.zero_()  # all patches of one colour are equal then, and so is their mean
    trunk.global_pool, trunk.fc_norm = "avg", torch.nn.LayerNorm(32, dtype=torch.float64)
    torch.nn.init.normal_(trunk.fc_norm.weight)
    torch.nn.init.normal_(trunk.fc_norm.bias)
    images = torch.full((1, 3, 32, 32), 90, dtype=torch.uint8)
    ids = small_batch(4).token_ids
    with torch.no_grad():
        maps = similarity_maps(model, images, {"feature": pointing_queries(model, ids)["feature"][None]})["feature"]
        whole = torch.nn.functional.cosine_similarity(model.encode_image(images), model.encode_text(ids))
    torch.testing.assert_close(maps[0], whole[:, None].expand(4, 16), rtol=0, atol=1e-12)


def test_bootstrap_draws_whole_clusters() -> None:
    assert by_cluster([1.0, 0.5, 0.0, 1.0], [2, 0, 2, 2]) == ([0.5, 2.0], [1, 3])
    assert cluster_interval([3.0], [4]) == (0.0, 1.0)
    assert cluster_interval([1.0] * 50, [4] * 50) == (0.25, 0.25)
    random = torch.Generator().manual_seed(0)
    one = torch.randint(0, 2, (400,), generator=random).double()
    low, high = cluster_interval(one.tolist(), [1] * 400)
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.1)
    low, high = cluster_interval((4 * one).tolist(), [4] * 400)  # four equal answers tell no more than one
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.1)
    same = [0.25] * 8
    found = paired_by_cluster(same, same, [i // 4 for i in range(8)])
    assert found == {"difference": 0.0, "difference_interval": (0.0, 0.0)}
    assert paired_by_cluster([0.0, 1.0], [1.0, 1.0], [0, 0]) == {"difference": 0.5, "difference_interval": (-1.0, 1.0)}


def test_only_readings_of_both_are_compared() -> None:
    first = {"run": "a", "merge_rate": None, "mosaic": "0 0 1", "right": {"feature": "1 0 0"}}
    other = {**first, "run": "b", "right": {"feature": "1 0.5 1", "tokens": "1 1 1"}}
    [_, found] = compared_pointing([first, other])
    assert found["compared_to_first"].keys() == {"first", "feature"}
    assert found["compared_to_first"]["feature"]["difference"] == pytest.approx(0.5)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pointing")
    make_run(folder / "runs" / "clip", small_recipe(mlip=False))
    make_run(folder / "runs" / "mlip", small_recipe())
    make_dataset(folder / "shards", n=26)
    for i, (name, color) in enumerate(COLORS.items()):
        (folder / "classes" / name).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (20, 20 + i), color).save(folder / "classes" / name / f"{number}.png")
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs and data to write into, as the current folder."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLIP_DATA", raising=False)
    return tmp_path


def point(
    *runs: str, datasets: Sequence[str], rates: Sequence[float] = (), as_json: bool = True, **changes: Any
) -> None:
    options: dict[str, Any] = {"task": "pointing", "data_root": None, "batch_size": 16, "device": "cpu"} | changes
    eval_zeroshot(runs, datasets=datasets, merge_rates=rates, as_json=as_json, **options)


def test_runs_and_rates_side_by_side(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    point("runs/clip", "runs/mlip", datasets=["folder:classes", "shards:shards"], rates=(0.0, 0.5))
    results = json.loads(capsys.readouterr().out)["results"]
    assert [(r["dataset"], r["run"], r["merge_rate"]) for r in results[:4]] == [
        ("folder:classes", "clip", 0),
        ("folder:classes", "clip", 0.5),
        ("folder:classes", "mlip", 0),
        ("folder:classes", "mlip", 0.5),
    ]
    heads = {"tokens", "frequency_tokens"}
    for result in results:
        is_folder = result["dataset"] == "folder:classes"
        assert result["kind"] == "pointing"
        assert (result["n"], result["num_names"]) == ((12, 6) if is_folder else (26, 24))
        assert result["pointing"].keys() - {"feature"} == (heads if result["run"] == "mlip" else set())
        assert 0 <= result["pointing"]["feature"]["accuracy"] <= 1
        assert not {"right", "mosaic"} & result.keys()
    assert results[3]["compared_to_first"].keys() == {"first", "feature"}
    frequency = [r["pointing"]["frequency_tokens"] for r in results if r["run"] == "mlip"]
    assert frequency[0] == frequency[1]  # they never merge
    assert sorted(path.name.split("-step")[0] for path in Path("runs/mlip/evals").iterdir()) == [
        "pointing-folder_classes",
        "pointing-folder_classes",
        "pointing-shards_shards",
        "pointing-shards_shards",
    ]


def test_names_are_captions_and_scores_those_of_a_plain_computation(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    point("runs/mlip", datasets=["folder:classes"], rates=(0.5,), batch_size=1)
    [result] = json.loads(capsys.readouterr().out)["results"]
    run = load_run("runs/mlip", device="cpu")
    names = sorted(COLORS)
    labels = [i // 2 for i in range(12)]
    mosaics = compose(labels, dataset="classes")
    right = 0.0
    for row, is_asked in zip(mosaics.pictures.tolist(), mosaics.is_asked.tolist(), strict=True):
        image = torch.empty(1, 3, 32, 32, dtype=torch.uint8)
        for tile, picture in enumerate(row):
            y, x = 16 * (tile // 2), 16 * (tile % 2)
            color = torch.tensor(COLORS[names[labels[picture]]], dtype=torch.uint8)
            image[0, :, y : y + 16, x : x + 16] = color[:, None, None]
        ids = run.tokenizer.encode([names[labels[picture]] for picture in row])
        with torch.no_grad():
            queries = {name: vectors[None] for name, vectors in pointing_queries(run.model, ids).items()}
            maps = similarity_maps(run.model, image, queries, at_rate(run.model, 0.5).plan)
        shares = right_shares(maps["tokens"], quadrants((4, 4)))[0]
        right += sum(share for share, asked in zip(shares.tolist(), is_asked, strict=True) if asked)
    assert result["pointing"]["tokens"]["accuracy"] == pytest.approx(right / 12, abs=1e-6)


def test_what_is_measured_is_read_and_shown(
    place: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    point("runs/clip", "runs/mlip", datasets=["folder:classes"], as_json=False)
    first = capsys.readouterr().out
    caplog.clear()
    with caplog.at_level("INFO", logger="mlip_cli"):
        point("runs/clip", "runs/mlip", datasets=["folder:classes"], as_json=False)
    assert caplog.messages == ["measured already, in evals/ of the runs: 2 rows; to measure: 0"]
    assert capsys.readouterr().out == first
    lines = [" ".join(line.split()) for line in first.splitlines()]
    assert max(map(len, first.splitlines()[:6])) <= 80
    assert lines[0] == "folder:classes: 12 pictures in 3 mosaics of 2 x 2"
    assert lines[1] == "run true rate patches by pointing % against the first"
    assert [line.split("%")[0].split()[:3] for line in lines[2:6]] == [
        ["1", "0.000", "feature"],
        ["2", "0.500", "feature"],
        ["2", "0.500", "tokens"],
        ["2", "0.500", "frequency"],
    ]
    assert lines[6] == (
        "pointing: names whose most similar patch lies in their own picture; chance 25.0 %; 6 names; in brackets: 95 % "
        "intervals, by drawing mosaics again"
    )
    page = Path("runs/mlip/report.html").read_text()
    assert "<h3>folder:classes: pointing</h3>" in page
    assert "Not measured yet" in page  # classification is
    point("runs/mlip", datasets=["folder:classes"], task="classification")
    rebuild(Run(Path("runs/mlip")))
    page = Path("runs/mlip/report.html").read_text()
    assert page.index("<h3>folder:classes</h3>") < page.index("<h3>folder:classes: pointing</h3>")


def test_blank_pictures_tell_nothing_and_break_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in COLORS:
        Image.new("RGB", (20, 20), "white").save(f"classes/{name}/0.png")
        Image.new("RGB", (20, 20), "white").save(f"classes/{name}/1.png")
    point("runs/mlip", datasets=["folder:classes"])
    [result] = json.loads(capsys.readouterr().out)["results"]
    for reading in ("feature", "tokens", "frequency_tokens"):
        low, high = result["pointing"][reading]["accuracy_interval"]
        assert 0 <= low <= result["pointing"][reading]["accuracy"] <= high <= 1


def test_too_few_names_are_wrong_usage(place: Path) -> None:
    for name in ("red", "green", "blue"):
        shutil.rmtree(f"classes/{name}")
    with pytest.raises(UsageError) as error:
        point("runs/mlip", datasets=["folder:classes"])
    assert str(error.value) == (
        "folder:classes: 3 different names, and pointing needs 4; add pictures of other names, or name another data set"
    )


def test_the_command_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["mlip", "eval-zeroshot", "runs/clip", "--dataset", "folder:classes", "--json", "--task"]
    with patch.object(sys, "argv", [*words, "point"]), pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        "error: mlip eval-zeroshot: --task: 'point' is not one of 'classification', 'pointing'; "
        "try mlip eval-zeroshot --help\n"
    )
    with patch.object(sys, "argv", [*words, "pointing"]), pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    assert [r["kind"] for r in json.loads(capsys.readouterr().out)["results"]] == ["pointing"]


def damage(run: str, recipe: Any, parameter: str) -> None:
    weights = small_model(recipe, dtype=torch.float32).state_dict()
    weights[parameter][0, 0] = float("nan")
    save_checkpoint(Path(run) / "checkpoints", step=8, weights=weights, state={"step": 8})


@pytest.mark.parametrize("task", ["classification", "pointing"])
@pytest.mark.parametrize(("tower", "what", "n"), [("image", "image", 12), ("text", "text", 6)])
def test_damaged_weights_are_one_line(place: Path, task: str, tower: str, what: str, n: int) -> None:
    damage("runs/clip", small_recipe(mlip=False), f"{tower}_projection.weight")
    with pytest.raises(RunError) as error:
        point("runs/clip", datasets=["folder:classes"], task=task)
    assert str(error.value) == (
        f"folder:classes: clip: {n} of {n} {what} features are not finite; the weights of this checkpoint are damaged; "
        "name an earlier one"
    )
    assert not Path("runs/clip/evals").exists()


def test_retrieval_ranks_nothing_that_is_not_finite(place: Path) -> None:
    pairs = ValidationPairs([Source(path="shards")], Tokenizer(16), image_size=32, device=torch.device("cpu"))
    encoder = SimpleNamespace(
        encode_image=lambda images: torch.where(torch.arange(len(images))[:, None] < 3, torch.nan, torch.ones(1, 4)),
        encode_text=lambda ids: torch.ones(len(ids), 4),
    )
    with pytest.raises(RunError) as error:
        pairs.features(encoder)  # type: ignore[arg-type]
    assert str(error.value) == (
        "validation: 3 of 26 image features are not finite; the weights of this checkpoint are damaged; "
        "name an earlier one"
    )
    nan = float("nan")
    scores = torch.tensor([[nan, 0.5, 0.1], [0.9, nan, 0.1], [nan, nan, nan]])
    right = torch.tensor([[True, False, False], [True, False, False], [False, False, True]])
    assert rank_of_first_right(scores, right).tolist() == [2, 1, 2]
    with pytest.raises(RunError, match="1 of 2 image features are not finite"):
        normalized(torch.tensor([[1e30, 1e30], [1.0, 0.0]]), "image")  # too long for fp32, though each number is finite
