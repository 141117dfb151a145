"""The ablation's own arithmetic against plain loops, and its queue on real, tiny trainings."""

import io
import json
import os
import subprocess
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import forks_for_tests
import numpy as np
import pytest
import torch
from ablation import prepare as prepare_module
from ablation import train_all as train_all_module
from ablation.mosaics import quadrants
from ablation.pointing import Maps, Pointer, Queries, measure_pointing, right_shares
from ablation.pointing_runs import point
from ablation.prepare import training_captions
from ablation.runs import RUNS, AblationRun
from ablation.scores import WAYS, Contrast, Rows, bootstrap, contrast, holm, macro, numbered
from ablation.train_all import RECIPES, Queue, train_all
from ablation.verdict import CONTRASTS, Results, contrasts, read, table
from models_for_tests import make_run, small_recipe
from PIL import Image
from shards_for_tests import make_dataset
from torch import Tensor

from mlip_cli.recipe.load import differences, load_recipe
from mlip_cli.runs.loading import at_rate, load_run

TINY = (
    "train.steps=2",
    "train.global_batch_size=8",
    "optim.warmup_steps=1",
    "model.embed_dim=16",
    "model.vision.width=16",
    "model.vision.depth=1",
    "model.text.width=16",
    "model.text.depth=1",
    "data.image_size=16",
)


def write_tar(path: Path, samples: list[dict[str, object]]) -> None:
    with tarfile.open(path, "w") as archive:
        for number, sample in enumerate(samples):
            picture = io.BytesIO()
            Image.new("RGB", (64, 64), (number * 5 % 256, 80, 160)).save(picture, "WEBP")
            for suffix, content in ((".webp", picture.getvalue()), (".json", json.dumps(sample).encode())):
                member = tarfile.TarInfo(f"{path.stem}_{number}{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def sample(number: int, prefix: str) -> dict[str, object]:
    return {
        "caption": f"{prefix} {number // 2}",
        "tags": ["round", "red", "old"][: number % 4],
        "concept": f"{prefix}{number // 2}",
        "source": "ab"[number % 2],
        "group": ["food", "tools"][number // 2 % 2],
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tars")
    write_tar(folder / "train-000.tar", [sample(i, "dish") for i in range(60)])
    write_tar(folder / "test-000.tar", [sample(i, "bowl") for i in range(12)])
    with open(folder / "log", "w") as log, pytest.MonkeyPatch.context() as patch:

        def run(command: Sequence[str], *, check: bool) -> None:
            assert forks_for_tests.call(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ) == 0

        patch.setattr(prepare_module, "subprocess", SimpleNamespace(run=run))
        prepare_module.main(folder, folder / "data")
    return folder / "data"


@pytest.fixture
def forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The queue's processes are forked from one that has imported torch."""
    forked = SimpleNamespace(call=forks_for_tests.call, STDOUT=subprocess.STDOUT)
    monkeypatch.setattr(train_all_module, "subprocess", forked)


def test_captions_have_up_to_three_tags_in_equal_shares() -> None:
    captions = [c for key in range(200) for c in training_captions("cup", ["a", "b", "c", "d"], str(key))]
    weights = np.zeros(4)
    for caption in captions:
        name, _, tags = caption["text"].partition(": ")
        assert name == "cup"
        weights[len(tags.split(", ")) if tags else 0] += caption["weight"]
    assert np.allclose(weights / weights.sum(), 0.25, atol=0.02)


@pytest.mark.slow
def test_a_concept_is_in_one_split(data: Path) -> None:
    from ablation.measure import samples

    concepts = {split: {s["concept"] for s in samples(data / split)} for split in ("train", "validation", "test")}
    assert all(concepts.values())
    assert concepts["test"] == {f"bowl{i}" for i in range(6)}
    assert not concepts["train"] & concepts["validation"]
    assert len(concepts["train"] | concepts["validation"]) == 30


@pytest.mark.slow
def test_every_recipe_of_the_ablation_loads() -> None:
    for run in RUNS:
        load_recipe(str(RECIPES / f"{run.recipe}.yaml"), run.overrides)
    assert len({run.label for run in RUNS}) == len(RUNS)


@pytest.mark.slow
@pytest.mark.usefixtures("forks")
def test_the_queue_trains_measures_and_skips(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    runs = [AblationRun("A", "clip", seed, "test", "clip", TINY) for seed in (0, 1)]
    queue = Queue(data, tmp_path)
    train_all(runs, queue, jobs=2)
    assert "2 of 2 runs to do" in capfd.readouterr().out
    result = json.loads(queue.result(runs[0]).read_bytes())
    assert result["step"] == 2
    pictures = json.loads((tmp_path / "results" / "pictures_test.json").read_bytes())
    assert len(pictures["concepts"]) == 12  # every name of test is new
    assert sorted(result["at"]) == ["own"]
    ranks = [int(rank) for rank in result["at"]["own"]["spatial"]["image_to_text"].split()]
    assert len(ranks) == 12
    assert all(1 <= rank <= 6 for rank in ranks)
    assert len(result["at"]["own"]["group_hits"]) == 12
    assert set(result["at"]["own"]["group_hits"]) <= {"0", "1"}
    train_all(runs, queue, jobs=2)
    assert "0 of 2 runs to do" in capfd.readouterr().out
    with pytest.raises(SystemExit, match=r"clip-0.json: the recipe has changed since \(optim.lr 0.0005 -> 0.1\); "):
        train_all([replace(runs[0], overrides=(*TINY, "optim.lr=0.1"))], queue, jobs=1)
    with pytest.raises(SystemExit, match=r"\(model.merging null -> a section\)"):
        train_all([replace(runs[0], overrides=(*TINY, "model.merging={method: random_drop}"))], queue, jobs=1)
    (line,) = table(read(tmp_path / "results"))
    assert line[:3] == ["clip", "rate 0.00", "2"]


@pytest.mark.usefixtures("forks")
def test_a_failed_training_ends_the_queue_with_the_place_of_its_log(data: Path, tmp_path: Path) -> None:
    queue = Queue(data, tmp_path)
    run = AblationRun("A", "clip", 0, "test", "clip", (*TINY, "model.vision.timm=no_such", "train.micro_batch_size=2"))
    broken = [AblationRun("A", "clip", 0, "test", "clip", (*TINY, "model.init=nowhere")), run]
    with pytest.raises(Exception, match=r"model\.vision\.timm"):  # before any training
        train_all(broken, queue, jobs=1)
    with pytest.raises(RuntimeError, match=r"clip-0: ended with 2; see .*clip-0.log"):
        train_all(broken[:1], queue, jobs=1)
    assert "nowhere" in (tmp_path / "logs" / "clip-0.log").read_text()
    assert not queue.result(run).exists()


def slow_macro(values: list[float], sources: list[int]) -> float:
    by_source: dict[int, list[float]] = {}
    for value, source in zip(values, sources, strict=True):
        by_source.setdefault(source, []).append(value)
    return float(np.mean([np.mean(v) for v in by_source.values()]))


def test_macro_and_bootstrap_equal_plain_loops() -> None:
    random = np.random.default_rng(3)
    concepts = random.integers(0, 7, size=40)
    concepts[:7] = range(7)
    sources = concepts % 3
    values = random.random((4, 40))
    assert macro(values[0], sources) == pytest.approx(slow_macro(list(values[0]), list(sources)))

    found = bootstrap(Rows(values, concepts, sources), resamples=50, seed=5)
    draws = np.random.default_rng(5)
    for mean in found:
        drawn = draws.integers(7, size=7)
        seeds = draws.integers(4, size=4)
        pictures = [i for concept in drawn for i in np.flatnonzero(concepts == concept)]
        assert mean == pytest.approx(
            slow_macro([float(values[seeds, i].mean()) for i in pictures], [int(sources[i]) for i in pictures])
        )


@pytest.mark.slow
def test_a_contrast_covers_a_known_difference_and_no_difference() -> None:
    random = np.random.default_rng(0)
    concepts, sources = numbered([str(i // 2) for i in range(600)]), numbered(["ab"[i % 2] for i in range(600)])
    base = random.random((5, 600))
    noise = 0.02 * random.standard_normal((5, 600))
    better = contrast("x", Rows(base + 0.01 + noise, concepts, sources), Rows(base, concepts, sources))
    assert better.low < 0.01 < better.high
    assert better.verdict(better.p) == "better"
    same = contrast("x", Rows(base + noise, concepts, sources), Rows(base, concepts, sources))
    assert same.low < 0 < same.high
    assert same.verdict(same.p) == "not shown"
    assert better.verdict(0.06) == "not shown"
    worse = contrast("x", Rows(base, concepts, sources), Rows(base + 0.01 + noise, concepts, sources))
    assert (worse.low, worse.high) == pytest.approx((-better.high, -better.low), abs=2e-4)
    assert worse.verdict(worse.p) == "worse"


@pytest.mark.parametrize(
    ("agree", "seeds", "verdict"), [(5, 5, "better"), (4, 5, "better"), (3, 5, "not shown"), (4, 4, "not shown")]
)
def test_seeds_have_to_agree_and_to_be_five(agree: int, seeds: int, verdict: str) -> None:
    assert Contrast("x", 0.02, 0.01, 0.03, 0.001, agree, seeds).verdict(0.004) == verdict


def test_contrasts_pair_the_seeds_of_both_runs_and_name_missing_ones(capfd: pytest.CaptureFixture[str]) -> None:
    def results(place: dict[int, int]) -> Results:
        return {
            seed: {
                "concepts": ["a", "b", "c"],
                "sources": ["s", "s", "s"],
                "at": {"own": {"spatial": dict.fromkeys(WAYS, f"{number} {number} {number}")}},
            }
            for seed, number in place.items()
        }

    everything = {"clip": results({0: 4, 1: 4, 2: 1}), "mlip": results({1: 2, 0: 2, 7: 1}), "branch": {}}
    (found,) = contrasts(everything)
    assert (found.name, found.num_seeds, found.difference) == (CONTRASTS[0][0], 2, pytest.approx(0.25))
    assert "branch - none: no seed yet of both branch and clip" in capfd.readouterr().out


def test_contrasts_are_of_runs_with_five_seeds() -> None:
    on_test = [run.name for run in RUNS if run.split == "test"]
    assert all(on_test.count(name) == 5 for _, *names in CONTRASTS for name in names)


def test_the_stronger_recipes_share_what_makes_them_stronger() -> None:
    def changes(plain: str, strong: str) -> set[tuple[str, str]]:
        before, after = (load_recipe(str(RECIPES / f"{name}.yaml")).recipe for name in (plain, strong))
        return {(key, str(new)) for key, _, new in differences(before, after)}

    of_clip = changes("clip", "clip_strong")
    assert changes("mlip", "mlip_strong") == of_clip | {("losses.frequency_global.label_smoothing", "0.1")}


def test_holm_adjusts_as_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([0.02], among=4) == [0.08]
    assert holm([0.01, 0.005], among=4) == pytest.approx([0.03, 0.02])


def test_patches_that_carry_their_colour_point_and_equal_patches_guess() -> None:
    colors = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [0, 255, 255], [255, 0, 255]])
    names = [str(i % 6) for i in range(38)]
    tiles = colors[[int(name) for name in names]].to(torch.uint8)[:, :, None, None].expand(-1, 3, 10, 10)

    def queries(texts: Sequence[str]) -> Queries:
        return {"feature": colors[[int(text) for text in texts]] / 127.5 - 1}

    def knows(images: Tensor, queries: Queries) -> Maps:
        patches = torch.nn.functional.avg_pool2d(images.float() / 127.5 - 1, 4).flatten(2)
        return {"feature": queries["feature"] @ patches}

    def guesses(images: Tensor, queries: Queries) -> Maps:
        return {"feature": torch.zeros(len(images), 4, 25)}

    pointer = Pointer("colors: run", 20, (5, 5), torch.device("cpu"), queries, (knows, guesses))
    assert measure_pointing(tiles, names, pointer, batch_size=3) == [{"feature": 1.0}, {"feature": 0.25}]
    tied = torch.zeros(1, 4, 25)
    tied[..., [0, 4, 12]] = 1  # the first two quadrants, and the middle, which counts for none
    assert right_shares(tied, quadrants((5, 5))).tolist() == [[0.5, 0.5, 0.0, 0.0]]


def test_a_run_points_in_mosaics_of_prepared_data(tmp_path: Path) -> None:
    make_run(tmp_path / "run", small_recipe())
    make_dataset(tmp_path / "data", n=26)
    run = load_run(str(tmp_path / "run"), device="cpu")
    own, unmerged = point(run, [at_rate(run.model, rate) for rate in (None, 0.0)], tmp_path / "data", batch_size=4)
    assert own.keys() == unmerged.keys() == {"feature", "tokens", "frequency_tokens"}
    assert all(0 <= accuracy <= 1 for accuracy in own.values())
    assert own["frequency_tokens"] == unmerged["frequency_tokens"]  # they never merge
