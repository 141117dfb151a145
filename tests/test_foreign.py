"""Weights of other programs as a RUN: features equal those of their own classes."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from foreign_for_tests import CONFIGURATIONS, WORDS, towers_of_timm, write_open_clip, write_transformers
from torch import Tensor
from torch.nn.functional import normalize

from mlip_cli import load
from mlip_cli.errors import UsageError
from mlip_cli.recipe.architecture import of_open_clip
from mlip_cli.runs import importing
from mlip_cli.runs.foreign import open_clip_configuration
from mlip_cli.runs.loading import LoadedRun, load_run


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    with towers_of_timm():
        yield


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is said and warned of."""
    lines: list[str] = []
    for name in ("say", "warn"):
        monkeypatch.setattr(importing, name, lines.append)
    return lines


def pictures() -> Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def assert_same(run: LoadedRun, images: Tensor, texts: Tensor) -> None:
    """Features of the run equal these, and differ between pictures and between texts."""
    with torch.no_grad():
        mine = (
            run.model.encode_image(pictures(), run.model.plan),
            run.model.encode_text(run.tokenizer.encode(WORDS)),
        )
    for own, other in zip(mine, (images, texts), strict=True):
        own, other = normalize(own, dim=-1), normalize(other, dim=-1)
        torch.testing.assert_close(own, other, rtol=0, atol=1e-5)
        assert (other[0] - other[1:]).norm(dim=-1).min() > 0.01


@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_features_equal_open_clips(kind: str) -> None:
    theirs = write_open_clip(Path(kind), CONFIGURATIONS[kind])
    run = load_run(kind, device="cpu")
    text = CONFIGURATIONS[kind]["text_cfg"]
    ids = open_clip.get_tokenizer("ViT-B-32", context_length=16)(WORDS)
    if "hf_tokenizer_name" in text:
        options = text.get("tokenizer_kwargs", {})
        ids = open_clip.tokenizer.HFTokenizer(kind, context_length=16, **options)(WORDS)
    with torch.no_grad():
        assert_same(run, theirs.encode_image(pictures()), theirs.encode_text(ids))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_features_equal_those_of_transformers(kind: str) -> None:
    theirs = write_transformers(Path(kind), kind)
    run = load_run(kind, device="cpu")
    ids = run.tokenizer.encode(WORDS)
    with torch.no_grad():
        images, texts = theirs.get_image_features(pictures()), theirs.get_text_features(ids)
    images, texts = (getattr(own, "pooler_output", own) for own in (images, texts))
    assert_same(run, images, texts)


def test_the_second_call_finds_the_run_and_other_weights_get_another(said: list[str]) -> None:
    write_open_clip(Path("laion"), CONFIGURATIONS["laion"])
    first, second = (load_run("laion", device="cpu").checkpoint for _ in range(2))
    assert first == second
    assert re.fullmatch(r"laion: copied into the run runs/foreign/laion-[0-9a-f]{8} \(\d+ MB\)", said[0])
    assert re.fullmatch(r"laion: run runs/foreign/laion-[0-9a-f]{8}", said[1])
    origin = json.loads((first / "origin.json").read_text())
    assert origin["source"] == str(Path("laion/open_clip_model.safetensors").absolute())
    weights = open_clip.factory.load_state_dict("laion/open_clip_model.safetensors")
    torch.save({"state_dict": {f"module.{name}": 2 * tensor for name, tensor in weights.items()}}, "other.pt")
    Path("laion/open_clip_model.safetensors").unlink()
    Path("other.pt").rename("laion/open_clip_pytorch_model.bin")
    assert load_run("laion", device="cpu").checkpoint != first


def test_pixels_are_those_of_the_configuration() -> None:
    write_open_clip(
        Path("own"), CONFIGURATIONS["laion"], mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6], resize_mode="squash"
    )
    data = load_run("own", device="cpu").recipe.data
    assert (data.pixel_mean, data.pixel_std, data.resize) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "squash")
    assert of_open_clip(open_clip_configuration("ViT-B-16-SigLIP2"), source="x").data.pixel_mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"vision_cfg": {"layers": [3, 4, 6, 3]}},
            "vision_cfg.layers [3, 4, 6, 3]: no such part here; ",
        ),
        ({"vision_cfg": {"attentional_pool": True}}, "vision_cfg.attentional_pool True: no such part here"),
        ({"text_cfg": {"hf_model_name": "roberta-base"}}, "text_cfg.hf_model_name roberta-base: no such part here"),
        ({"multimodal_cfg": {"width": 512}}, "multimodal_cfg {'width': 512}: no such part here"),
        ({"vision_cfg": {"image_size": [32, 48]}}, "vision_cfg.image_size [32, 48]: mlip reads square pictures only"),
        ({"text_cfg": {"norm_kwargs": {"bias": False}}}, "text_cfg.norm_kwargs {'bias': False}: no such part here"),
    ],
)
def test_configurations_with_parts_that_are_not_ours_are_refused(change: dict[str, Any], words: str) -> None:
    changed = dict(CONFIGURATIONS["laion"])
    for key, value in change.items():
        changed[key] = changed.get(key, {}) | value
    with pytest.raises(UsageError) as refused:
        of_open_clip(changed, source="tiny")
    assert str(refused.value).startswith(f"tiny: {words}")


def test_weights_of_another_architecture_are_refused() -> None:
    write_open_clip(Path("laion"), CONFIGURATIONS["laion"])
    described = json.loads(Path("laion/open_clip_config.json").read_text())
    described["model_cfg"]["vision_cfg"]["width"] = 48
    Path("laion/open_clip_config.json").write_text(json.dumps(described))
    with pytest.raises(UsageError, match=r"^laion: weights of another model: image_projection\.weight \(16, 32\) "):
        load_run("laion", device="cpu")
    assert not list(Path("runs/foreign").glob("[!.]*"))


def test_a_missing_tokenizer_is_named_with_its_origin() -> None:
    write_open_clip(Path("siglip"), CONFIGURATIONS["siglip"])
    Path("siglip/tokenizer.json").unlink()
    with pytest.raises(
        UsageError,
        match=r"^siglip: its tokenizer is missing; download tokenizer\.json and tokenizer_config\.json of somebody/tok",
    ):
        load_run("siglip", device="cpu")


def test_numbers_that_are_not_finite_are_refused() -> None:
    write_open_clip(Path("laion"), CONFIGURATIONS["laion"])
    weights = open_clip.factory.load_state_dict("laion/open_clip_model.safetensors")
    weights["ln_final.bias"][3] = torch.nan
    Path("laion/open_clip_model.safetensors").unlink()
    torch.save(weights, "laion/open_clip_pytorch_model.bin")
    with pytest.raises(UsageError, match=r"^laion: text\.norm\.bias holds NaN or infinity; use another copy"):
        load_run("laion", device="cpu")


def test_the_name_of_the_weights_says_how_they_read_pixels(said: list[str]) -> None:
    """Of ViT-L-14, laion2b_s32b_b82k alone of the weights with GELU reads pixels with mean 0.5."""
    named = {}
    for name in ("ViT-L-14", "ViT-L-14/laion2b_s32b_b82k", "ViT-L-14-quickgelu/openai", "ViT-B-16-SigLIP/webli"):
        described = of_open_clip(open_clip_configuration(name.partition("/")[0]), source=name)
        architecture, _, tag = name.partition("/")
        named[name] = importing._as_published(described, architecture, tag or None).data
    assert [data.pixel_mean[0] for data in named.values()] == [0.48145466, 0.5, 0.48145466, 0.5]
    assert [data.resize for data in named.values()] == ["crop", "crop", "crop", "squash"]
    assert "laion2b_s32b_b82k" in said[0]
    assert "as in open_clip:ViT-L-14/laion2b_s32b_b82k:FILE" in said[0]
    assert said[1].startswith("open_clip:ViT-L-14: computed with GELU; the weights openai, ")
    plain = of_open_clip(open_clip_configuration("ViT-L-14"), source="x")
    with pytest.raises(UsageError, match=r"^open_clip:ViT-L-14/openai: trained with QuickGELU; write open_cl"):
        importing._as_published(plain, "ViT-L-14", "openai")
    with pytest.raises(UsageError, match=r"^open_clip:ViT-L-14/nobody: OpenCLIP lists no such weights; it has op"):
        importing._as_published(plain, "ViT-L-14", "nobody")


def test_padding_that_counts_stays_in_every_batch() -> None:
    """SigLIP 2 and CLIPA read the padding, whose id may be 0; alone and beside longer texts a caption is the same."""
    for kind in ("siglip2", "clipa"):
        theirs = write_open_clip(Path(kind), CONFIGURATIONS[kind])
        options = CONFIGURATIONS[kind]["text_cfg"].get("tokenizer_kwargs", {})
        ids = open_clip.tokenizer.HFTokenizer(kind, context_length=16, **options)(WORDS)
        with torch.no_grad():
            expected = normalize(theirs.encode_text(ids), dim=-1)
        model = load(kind, device="cpu")
        assert model.loaded.recipe.model.text.tokenizer.pad_id == 0
        torch.testing.assert_close(model.encode_text(WORDS), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(model.encode_text(WORDS[3:]), expected[3:], rtol=0, atol=1e-5)


def test_a_damaged_copy_is_made_anew_and_keeps_its_results() -> None:
    write_open_clip(Path("laion"), CONFIGURATIONS["laion"])
    run = load_run("laion", device="cpu").run
    checkpoint = run.latest_checkpoint()
    assert checkpoint is not None
    run.evals.mkdir()
    (run.evals / "x.json").write_text("{}")
    (checkpoint / "model.safetensors").write_bytes(b"no")
    with pytest.raises(UsageError, match=rf"not a whole safetensors file .*; remove {checkpoint}, and mlip takes"):
        load_run("laion", device="cpu")
    shutil.rmtree(checkpoint)
    assert load_run("laion", device="cpu").checkpoint == checkpoint
    assert (run.evals / "x.json").is_file()


@pytest.mark.slow
def test_processes_that_want_the_same_weights_copy_them_once() -> None:
    write_open_clip(Path("laion"), CONFIGURATIONS["laion"])
    code = "from mlip_cli.runs.find import find_checkpoint; print(find_checkpoint('laion')[1])"
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    found = {process.communicate()[0] for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(found) == 1
    assert sorted(path.suffix for path in Path("runs/foreign").iterdir() if path.name[0] == ".") == [".lock"]


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("vision_cfg", "width", "x"),
        ("vision_cfg", "head_width", 0),
        ("text_cfg", "layers", None),
        ("text_cfg", "heads", -1),
    ],
)
def test_wrong_values_of_a_configuration_are_named_with_its_place(section: str, key: str, value: object) -> None:
    write_open_clip(Path("laion"), CONFIGURATIONS["laion"])
    place = Path("laion/open_clip_config.json")
    described = json.loads(place.read_text())
    described["model_cfg"][section][key] = value
    place.write_text(json.dumps(described))
    with pytest.raises(UsageError, match=rf"^{place.absolute()}: a value in it is of a wrong kind \("):
        load_run("laion", device="cpu")


def test_preprocessing_that_mlip_does_otherwise_is_named(said: list[str]) -> None:
    write_open_clip(Path("own"), CONFIGURATIONS["laion"], interpolation="bilinear", resize_mode="longest")
    load_run("own", device="cpu")
    assert said[:2] == [
        "own: its pictures were resized by the filter bilinear; mlip resizes by bicubic",
        "own: its pictures were resized by resize_mode longest; mlip resizes the short side and crops",
    ]


def test_preprocessing_of_transformers_is_read() -> None:
    write_transformers(Path("clip"), "clip")
    for size, crops, expected in (
        ({"shortest_edge": 32}, True, "crop"),
        ({"height": 32, "width": 32}, False, "squash"),
    ):
        settings = {"size": size, "do_center_crop": crops, "image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}
        Path("clip/preprocessor_config.json").write_text(json.dumps(settings))
        data = load_run("clip", device="cpu").recipe.data
        assert (data.resize, data.pixel_mean, data.pixel_std) == (expected, (0.1, 0.2, 0.3), (1.0, 1.0, 1.0))


@pytest.mark.parametrize(("key", "value"), [("hidden_size", "x"), ("hidden_size", 0)])
def test_wrong_values_in_a_folder_of_transformers_are_named_with_its_place(key: str, value: object) -> None:
    write_transformers(Path("clip"), "clip")
    place = Path("clip/config.json")
    described = json.loads(place.read_text())
    described["vision_config"][key] = value
    place.write_text(json.dumps(described))
    with pytest.raises(UsageError, match=rf"^{place.absolute()}: a value in it is of a wrong kind \("):
        load_run("clip", device="cpu")
