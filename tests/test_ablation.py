"""The ablation's data and queue on real, tiny trainings."""

import io
import json
import os
import subprocess
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forks_for_tests
import numpy as np
import pytest
from ablation import prepare as prepare_module
from ablation import train_all as train_all_module
from ablation.prepare import training_captions
from ablation.questions import questions_of, split_of, training_of
from ablation.results import found_in, read
from ablation.runs import AblationRun, Found, Measured
from ablation.stages import Decision, Stage
from ablation.train_all import Queue, train_all, train_stages
from ablation.verdict import COLUMNS, arms_of, table
from PIL import Image

TINY = (
    "train.steps=2",
    "train.global_batch_size=8",
    "optim.warmup_steps=1",
    "optim.ema_horizon=16",
    "model.embed_dim=16",
    "model.token_dim=16",
    "model.vision.width=16",
    "model.vision.depth=2",
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
    """Three pictures a concept, one of them in the hidden style."""
    return {
        "caption": f"{prefix} {number // 3}",
        "tags": ["round", "red", "old"][: number // 3 % 4],
        "concept": f"{prefix}{number // 3}",
        "source": ("a", "b", "fluent")[number % 3],
        "group": "food",
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tars")
    write_tar(folder / "train-000.tar", [sample(i, "red dish") for i in range(90)])
    write_tar(folder / "test-000.tar", [sample(i, ("dish", "bowl")[i // 3 % 2]) for i in range(18)])
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


def test_a_concept_is_held_or_trained_and_the_hidden_style_is_never_trained() -> None:
    concepts = [f"c{i}" for i in range(2000)]
    plain = [split_of(concept, "a", is_test=False) for concept in concepts]
    hidden = [split_of(concept, "fluent", is_test=False) for concept in concepts]
    assert {"none" if one == "validation" else "train" for one in plain} == {"none", "train"}
    assert all((style == "none") == (own == "validation") for own, style in zip(plain, hidden, strict=True))
    assert Counter(plain)["validation"] / 2000 == pytest.approx(0.1, abs=0.02)
    assert Counter(hidden)["test"] / 1800 == pytest.approx(0.5, abs=0.04)
    assert split_of("c0", "a", is_test=True) == "test"
    assert split_of("c0", "fluent", is_test=True) == "none"


def test_questions_ask_for_new_names_of_tokens_that_five_pictures_show() -> None:
    words: dict[str, int] = {}

    def tokens_of(text: str) -> list[int]:
        return [words.setdefault(word.strip(","), len(words)) for word in text.split()]

    def one(name: str, *tags: str, concept: str = "held", source: str = "a") -> dict[str, Any]:
        return {"name": name, "tags": list(tags), "concept": concept, "source": source}

    trained = [one("blue cup", "round", concept=f"c{i}") for i in range(4)] + [one("tea", "round cup", concept="c4")]
    training = training_of(trained, tokens_of)
    assert training.tokens == {words["round"], words["cup"]}  # blue: four pictures
    assert training.tags == set()
    assert training_of(trained * 2, tokens_of).tags == set()  # round: eight pictures
    assert training_of(trained * 3, tokens_of).tags == {"round"}
    assert questions_of(one("round cup"), training, tokens_of) == ["names", "tags"]
    assert questions_of(one("blue round cup"), training, tokens_of) == ["tags"]
    assert questions_of(one("blue cup"), training_of(trained * 2, tokens_of), tokens_of) == ["tags"]  # an old name
    assert questions_of(one("cup blue"), training_of(trained * 2, tokens_of), tokens_of) == ["names", "tags"]
    assert questions_of(one("blue cup", concept="c1", source="fluent"), training, tokens_of) == ["style"]
    assert questions_of(one("round cup", source="fluent"), training, tokens_of) == []


@pytest.mark.slow
def test_the_data_hold_each_picture_once_with_its_questions(data: Path) -> None:
    from ablation.measure import samples_of

    split = {name: samples_of(data / name) for name in ("train", "train_half", "validation", "test")}
    concepts = {name: {one["concept"] for one in own} for name, own in split.items()}
    train = Counter((one["concept"], one["source"]) for one in split["train"])
    assert {source for _, source in train} == {"a", "b"}
    assert 15 <= len(split["train_half"]) <= len(split["train"]) - 15
    assert not Counter((one["concept"], one["source"]) for one in split["train_half"]) - train
    for name in ("validation", "test"):
        style = [one for one in split[name] if one["questions"] == "style"]
        assert style
        assert all(one["source"] == "fluent" and one["concept"] in concepts["train"] for one in style)
        held = [one for one in split[name] if one not in style]
        assert held
        assert not {one["concept"] for one in held} & concepts["train"]
        assert all(one["questions"] in ("names tags", "tags") and one["source"] != "fluent" for one in held)
        assert {tag for one in held for tag in one["tags"].split(", ")} <= {"", "round", "red", "old"}
    test = [one for one in split["test"] if one["questions"] != "style"]
    assert {one["name"].split()[0] for one in test if "names" in one["questions"]} <= {"dish"}
    assert all(one["questions"] == "tags" for one in test if one["name"].startswith("bowl"))
    assert sum(len(split[name]) for name in ("train", "validation", "test")) == 90 + 12 - held_in_hidden_style(split)


def held_in_hidden_style(split: dict[str, list[dict[str, Any]]]) -> int:
    """Concepts of train-*.tar that validation holds: their pictures of the hidden style are nowhere."""
    return len({one["concept"] for one in split["validation"] if one["questions"] != "style"})


@pytest.mark.slow
@pytest.mark.usefixtures("forks")
def test_the_queue_trains_measures_and_skips(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    runs = [AblationRun("S", "clip", seed, "train_half", "test", TINY) for seed in (0, 1)]
    queue = Queue(data, tmp_path)
    train_all(runs, queue, jobs=2)
    assert "2 of 2 runs to do" in capfd.readouterr().out
    result = json.loads(queue.result("clip-0").read_bytes())
    assert result["step"] == 2
    assert 0 < result["cpu_s"] < 100
    assert "path: train_half" in result["recipe"]
    pictures = json.loads((tmp_path / "results" / "pictures_test.json").read_bytes())["questions"]
    for name, question in pictures.items():
        found = result["at"]["own"]["spatial"][name]
        assert len(found["image_to_text"].split()) == len(question["concepts"]) == len(question["sources"]) > 0
    train_all(runs, queue, jobs=2)
    assert "0 of 2 runs to do" in capfd.readouterr().out
    with pytest.raises(SystemExit, match=r"clip-0.json: the recipe has changed since \(optim.lr 0.001 -> 0.1\); "):
        train_all([replace(runs[0], overrides=(*TINY, "optim.lr=0.1"))], queue, jobs=1)
    with pytest.raises(SystemExit, match=r"\(model.merging null -> a section\)"):
        train_all([replace(runs[0], overrides=(*TINY, "model.merging={method: random_drop}"))], queue, jobs=1)
    (line,) = table(arms_of(read(tmp_path / "results")))
    assert line[:5] == ["clip", "test", "2", "2", "spatial"]
    assert len(line) == len(COLUMNS)
    assert found_in(tmp_path / "results")["clip-0"].cpu_s == result["cpu_s"]


@pytest.mark.slow
@pytest.mark.usefixtures("forks")
def test_a_long_training_stops_after_its_last_measured_step(data: Path, tmp_path: Path) -> None:
    every = ("train.steps=100000", "train.checkpoint_every.steps=50", "train.keep.every_steps=50")
    stem = ("model.frequency={placement: stem, depth: 1}", "losses.frequency_global={weight: 0.5}")
    run = AblationRun("P", "long", 0, "train", "validation", (*TINY[1:], *every, *stem), checkpoints=(50, 100))
    queue = Queue(data, tmp_path)
    train_all([run], queue, jobs=1)
    first, last = (json.loads(queue.result(name).read_bytes()) for name in ("long-0@50", "long-0@100"))
    assert (first["step"], last["step"]) == (50, 100)
    assert first["at"] != last["at"]
    assert sorted(last["at"]["own"]) == ["frequency", "rate", "spatial", "sum"]
    assert [line[:3] for line in table(arms_of(read(tmp_path / "results")))[::3]] == [
        ["long@50", "validation", "50"],
        ["long@100", "validation", "100"],
    ]
    queue.result("long-0@100").unlink()
    before = (tmp_path / "runs" / "long-0" / "metrics.jsonl").read_bytes()
    train_all([run], queue, jobs=1)
    assert json.loads(queue.result("long-0@100").read_bytes()) == last
    assert (tmp_path / "runs" / "long-0" / "metrics.jsonl").read_bytes() == before


@pytest.mark.usefixtures("forks")
def test_a_failed_training_ends_the_queue_with_the_place_of_its_log(data: Path, tmp_path: Path) -> None:
    queue = Queue(data, tmp_path)
    run = AblationRun("S", "clip", 0, "train", "test", (*TINY, "model.vision.timm=no_such", "train.micro_batch_size=2"))
    broken = [AblationRun("S", "clip", 0, "train", "test", (*TINY, "model.init=nowhere")), run]
    with pytest.raises(Exception, match=r"model\.vision\.timm"):  # before any training
        train_all(broken, queue, jobs=1)
    with pytest.raises(RuntimeError, match=r"clip-0: ended with 2; see .*clip-0.log"):
        train_all(broken[:1], queue, jobs=1)
    assert "nowhere" in (tmp_path / "logs" / "clip-0.log").read_text()
    assert not queue.result("clip-0").exists()


def test_stages_follow_until_one_says_stop_or_lacks_a_result(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = []
    monkeypatch.setattr(train_all_module, "train_all", lambda runs, queue, jobs: begun.append([r.name for r in runs]))
    first = Stage("X", lambda found: [AblationRun("X", "x", 0, "train", "test")], lambda found: Decision(True, "well"))
    second = Stage("Y", lambda found: [AblationRun("Y", "y", 0, "train", "test")], lambda found: Decision(False, "no"))
    third = Stage("Z", lambda found: [AblationRun("Z", str(found["x-0"].lr), 0, "train", "test")])
    queue = Queue(tmp_path, tmp_path)
    train_stages([first, second, third], queue, jobs=1)
    assert begun == [["x"], ["y"]]
    assert capfd.readouterr().out == "stage X\ngo on: well\nstage Y\nstop: no\n"
    with pytest.raises(SystemExit, match="stage Z: no result of x-0 yet; train the stages before it"):
        train_stages([third], queue, jobs=1)
    monkeypatch.setattr(train_all_module, "found_in", lambda folder: Found({"x-0": Measured(2.5, None)}))
    train_stages([third], queue, jobs=1)
    assert begun[-1] == ["2.5"]
