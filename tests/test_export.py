"""Export: other programs compute the features of the run, and mlip reads what it wrote."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import open_clip
import pytest
import torch
import transformers
from command_for_tests import mlip
from foreign_for_tests import CONFIGURATIONS, WORDS, towers_of_timm, write_open_clip, write_transformers
from models_for_tests import make_run, small_recipe
from torch.nn.functional import normalize

from mlip_cli.data.tokenizer import Tokenizer
from mlip_cli.data.transforms import evaluation_transform
from mlip_cli.errors import UsageError
from mlip_cli.export.check import check_open_clip, check_transformers
from mlip_cli.export.open_clip import write_open_clip as export_open_clip
from mlip_cli.export.transformers import write_transformers as export_transformers
from mlip_cli.export.write import write_format
from mlip_cli.runs.loading import LoadedRun, load_run

VIT = {"patch_size": 8, "width": 32, "depth": 4, "num_heads": 2}
"""timm's plain ViT: a class token, no norm before the blocks, a bias in the patch embedding, eps 1e-6."""
BRANCH = {"placement": "branch", "width": 24, "depth": 1}
OF_TRANSFORMERS = ("openai", "laion", "siglip")
"""Kinds of small models that transformers has too, but for the eps of SigLIP's text tower."""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    with towers_of_timm():
        yield


def same_features(run: LoadedRun, other: LoadedRun) -> None:
    size = run.model.image_size
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for own, its in (
            (
                run.model.encode_image(images, run.model.merge_plan(0)),
                other.model.encode_image(images, other.model.plan),
            ),
            (
                run.model.encode_text(run.tokenizer.encode(WORDS)),
                other.model.encode_text(other.tokenizer.encode(WORDS)),
            ),
        ):
            torch.testing.assert_close(normalize(own, dim=-1), normalize(its, dim=-1), rtol=0, atol=1e-5)


def trained(name: str, **model: object) -> LoadedRun:
    """A run of ours with a class token, as `model` changes it; its patch embedding has a bias that is not 0."""
    make_run(Path(name), small_recipe(mlip="frequency" in model, model={"vision": VIT} | model), seed=3)
    run = load_run(name, device="cpu")
    assert run.model.vision.trunk.patch_embed.proj.bias.abs().max() > 1e-3
    return run


@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_what_came_from_open_clip_goes_back(kind: str) -> None:
    write_open_clip(Path(kind), CONFIGURATIONS[kind])
    run = load_run(kind, device="cpu")
    Path("out").mkdir()
    written = write_format(run, Path("out"), format="open_clip", merge_rate=None)
    assert written.lost == []
    assert written.difference < 1e-5
    same_features(run, load_run("out", device="cpu"))


@pytest.mark.parametrize("kind", OF_TRANSFORMERS)
def test_what_came_from_open_clip_goes_to_transformers(kind: str) -> None:
    write_open_clip(Path(kind), CONFIGURATIONS[kind])
    run = load_run(kind, device="cpu")
    Path("out").mkdir()
    assert export_transformers(run, Path("out")) == []
    assert check_transformers(run, Path("out")) < 1e-5
    same_features(run, load_run("out", device="cpu"))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_what_came_from_transformers_goes_back(kind: str) -> None:
    theirs = write_transformers(Path(kind), kind)
    run = load_run(kind, device="cpu")
    Path("out").mkdir()
    assert write_format(run, Path("out"), format="huggingface", merge_rate=None).difference < 1e-5
    weights = transformers.AutoModel.from_pretrained("out").state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in theirs.state_dict().items())


def test_a_run_of_ours_goes_to_open_clip() -> None:
    run = trained("run")
    Path("out").mkdir()
    assert export_open_clip(run, Path("out")) == []
    assert check_open_clip(run, Path("out")) < 1e-6
    same_features(run, load_run("out", device="cpu"))


def test_a_trained_sigmoid_model_keeps_its_bias() -> None:
    losses = {"spatial_global": {"kind": "sigmoid"}}
    make_run(Path("run"), small_recipe(mlip=False, model={"vision": VIT}, losses=losses))
    run = load_run("run", device="cpu")
    Path("out").mkdir()
    export_open_clip(run, Path("out"))
    theirs, _, _ = open_clip.create_model_and_transforms("local-dir:out")
    assert torch.equal(theirs.logit_bias, run.model.logit_biases["spatial_global"][0])
    assert torch.equal(theirs.logit_scale, run.model.log_scales["spatial_global"][0])


def test_open_clip_makes_the_same_pixels_of_a_picture() -> None:
    """Within what rounding to whole numbers does before the crop."""
    run = trained("run")
    Path("out").mkdir()
    export_open_clip(run, Path("out"))
    _, _, transform = open_clip.create_model_and_transforms("local-dir:out")
    pixels = torch.randint(256, (3, 40, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    from torchvision.transforms.functional import to_pil_image

    mine = run.model.normalize(evaluation_transform(pixels, size=32)[None])
    assert (transform(to_pil_image(pixels)) - mine).abs().max() < 1.5 / 255 / 0.26


def test_the_vocabulary_of_transformers_gives_our_tokens() -> None:
    write_transformers(Path("clip"), "clip")
    run = load_run("clip", device="cpu")
    Path("out").mkdir()
    export_transformers(run, Path("out"))
    theirs = transformers.AutoTokenizer.from_pretrained("out")
    texts = [*WORDS, "It's 100 % naïve -- isn't it?", "MANY   spaces", "日本 and ελληνικά", "emoji 🎈🎈"]
    for text in texts:
        own = Tokenizer(77).encode([text])[0]
        assert theirs(text).input_ids == own[: int(own.argmax()) + 1].tolist()


def test_what_a_format_does_not_hold_is_said() -> None:
    run = trained("run", frequency=BRANCH, merging={"rate": 0.5})
    Path("out").mkdir()
    assert export_open_clip(run, Path("out")) == [
        "the frequency branch and its feature",
        "the heads of the losses over words and tokens",
        "token merging (evaluation here merges at the rate 0.500)",
    ]
    assert check_open_clip(run, Path("out")) < 1e-6


@pytest.mark.parametrize(
    ("model", "format", "why"),
    [
        (
            {"frequency": {"placement": "stem", "depth": 1}},
            "open_clip",
            "the image tower begins with 1 spectral block",
        ),
        (
            {"frequency": {"placement": "stem", "depth": 1}},
            "huggingface",
            "the image tower begins with 1 spectral block",
        ),
        ({"vision": VIT | {"pool": "mean"}}, "open_clip", "model.vision.pool mean of a tower without a name of timm"),
        ({"vision": VIT}, "huggingface", "the image tower is not CLIPModel's: a norm before the blocks, a class token"),
        ({"vision": VIT | {"activation": "quick_gelu"}}, "open_clip", "activations quick_gelu and gelu in one model"),
    ],
)
def test_a_model_that_a_format_cannot_hold_is_refused(model: dict[str, object], format: str, why: str) -> None:
    stem = "frequency" in model
    losses = {"spatial_token": None, "frequency_token": None} if stem else {}
    recipe = small_recipe(mlip=stem, model={"vision": VIT} | ({"merging": None} if stem else {}) | model, losses=losses)
    make_run(Path("run"), recipe)
    Path("out").mkdir()
    with pytest.raises(UsageError) as refused:
        write_format(load_run("run", device="cpu"), Path("out"), format=format, merge_rate=None)
    assert str(refused.value).startswith(f"--format {format}: {why}")
    assert str(refused.value).endswith("; use --format onnx or safetensors, which hold every model")


def test_the_run_without_its_training_is_a_run() -> None:
    make_run(Path("run"), small_recipe(), seed=1)
    run = load_run("run", device="cpu")
    Path("out").mkdir()
    assert write_format(run, Path("out"), format="safetensors", merge_rate=None).difference == 0
    copy = load_run("out", device="cpu")
    assert (copy.step, copy.model.plan) == (run.step, run.model.plan)
    assert all(torch.equal(copy.model.state_dict()[name], own) for name, own in run.model.state_dict().items())
    assert json.loads((copy.checkpoint / "origin.json").read_text())["named"] == f"run at step {run.step}"
    assert not list(Path("out").rglob("state.pt"))


@pytest.fixture
def mine() -> None:
    """A run of ours with CLIP's image tower, in half merged."""
    clip = VIT | {"pre_norm": True, "norm_eps": 1e-5, "activation": "quick_gelu"}
    text = small_recipe().model.text.model_dump() | {"activation": "quick_gelu"}
    make_run(
        Path("run"), small_recipe(mlip=False, model={"vision": clip, "text": text, "merging": {"rate": 0.5}}), seed=3
    )


@pytest.mark.slow
@pytest.mark.parametrize("format", ["open_clip", "huggingface", "onnx", "safetensors"])
def test_the_command_writes_a_folder_with_a_card(format: str, mine: None) -> None:
    done = mlip("export", "run", "out", "--format", format, "--json")
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed["largest_difference"] < 1e-5
    assert "# " in Path("out/README.md").read_text()
    plain = format in ("open_clip", "huggingface")
    assert ("token merging (evaluation here merges at the rate 0.500)" in printed["not_held"]) == plain
    again = mlip("export", "run", "out", "--format", format)
    assert again.returncode == 2
    assert again.stderr.endswith("out: exists already; name another folder\n")
    if format != "onnx":
        assert mlip("eval-zeroshot", "out", "--dataset", "digits", "--batch-size", "600", "--json").returncode == 0


def test_wrong_usage_of_the_command_is_one_line(mine: None) -> None:
    Path("file").write_text("x")
    for words, said in (
        (["nothing", "out"], "nothing: no such run or checkpoint; there are no runs in runs/ yet"),
        (["run", "file"], "file: exists already; name another folder"),
        (["run", "out", "--merge-rate", "0.5"], "--merge-rate 0.5: only --format onnx holds merges; leave it out"),
        (["run", "out", "--format", "tf"], "--format: 'tf' is not one of 'open_clip', 'huggingface', 'onnx', 'safet"),
        (["run", "out", "--push", "a b"], "--push a b: not the name of a repository"),
        (["run", "out", "--format", "onnx", "--merge-rate", "0.99"], "merge rate 0.99: the merge before block 2"),
    ):
        done = mlip("export", *words)
        assert (done.returncode, said in done.stderr, Path("out").exists()) == (2, True, False), done.stderr
        assert not list(Path().glob(".out*"))


def test_a_run_without_its_training_names_no_place_of_this_machine() -> None:
    write_open_clip(Path("siglip"), CONFIGURATIONS["siglip"])
    run = load_run("siglip", device="cpu")
    Path("out").mkdir()
    write_format(run, Path("out"), format="safetensors", merge_rate=None)
    assert str(Path.cwd()) not in Path("out/recipe.yaml").read_text()
    assert run.tokenizer.count("x") > 0  # reads its file while it is there
    shutil.rmtree("siglip")
    shutil.rmtree("runs")
    same_features(run, load_run("out", device="cpu"))


def test_an_exported_tokenizer_cleans_captions_as_the_run_does() -> None:
    write_transformers(Path("siglip"), "siglip")
    run = load_run("siglip", device="cpu")
    Path("out").mkdir()
    export_transformers(run, Path("out"))
    theirs = transformers.AutoTokenizer.from_pretrained("out")
    for text in (*WORDS, "Two red balloons,", "  A   dog -- (or two)!  "):
        own = run.tokenizer.encode([text])[0].tolist()
        assert theirs(text, padding="max_length", max_length=16, truncation=True).input_ids == own


@pytest.mark.slow
def test_an_interrupted_export_leaves_nothing_and_others_can_read_a_whole_one(mine: None) -> None:
    words = [sys.executable, "-m", "mlip_cli", "export", "run", "out", "--format", "open_clip"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(Path().glob(".out*/*")):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert (process.returncode, "interrupted; nothing was written" in said) == (130, True), said
    assert not list(Path().glob(".out*"))
    Path(f".out.{process.pid}.tmp").mkdir()  # as kill -9 leaves it
    assert mlip("export", "run", "out", "--format", "open_clip").returncode == 0
    assert not list(Path().glob(".out*"))
    assert {path.stat().st_mode & 0o777 for path in Path("out").iterdir()} == {0o644}
