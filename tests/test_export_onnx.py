"""ONNX files give the model's own features in onnxruntime, for batches of every size, with merging inside."""

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from foreign_for_tests import CONFIGURATIONS, WORDS, towers_of_timm, write_open_clip
from models_for_tests import make_run, small_recipe
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from mlip_cli.data.transforms import evaluation_transform
from mlip_cli.errors import RunError, UsageError
from mlip_cli.export import onnx as export
from mlip_cli.export.card import model_card
from mlip_cli.export.onnx import BOUND, check_onnx, check_packages, random_pictures, write_onnx
from mlip_cli.model.merging import cosine_cost, grid_halves, match, mid_ranks
from mlip_cli.runs.loading import LoadedRun, at_rate, load_run

SMALL: dict[str, Any] = {"vision": {"patch_size": 8, "width": 32, "depth": 2, "num_heads": 2}}
ALWAYS = "resizing of pictures and the tokenizer are not in the graphs; onnx.json says what they expect"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    with towers_of_timm():
        yield


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def own_run(**changes: Any) -> LoadedRun:
    make_run(Path("run"), small_recipe(**changes))
    return load_run("run", device="cpu")


def outputs(path: Path, given: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(path))
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: given.numpy()})[0])


@torch.no_grad()
def assert_same(loaded: LoadedRun, folder: Path, *, rate: float, method: str | None) -> None:
    """Features of the files are those of the model at this rate, and differ between pictures and between texts."""
    encoder = at_rate(loaded.model, rate, method)
    texts = loaded.tokenizer.encode([*WORDS, *WORDS])
    for n in (1, 3, 8):
        pixels = random_pictures(n, loaded.model.image_size, torch.Generator().manual_seed(n))
        for name, given, mine in (
            ("image.onnx", pixels, encoder.encode_image(pixels)),
            ("text.onnx", texts[:n], encoder.encode_text(texts[:n])),
        ):
            found = outputs(folder / name, given)
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, normalize(mine, dim=-1), rtol=0, atol=1e-5)
            torch.testing.assert_close(found.norm(dim=-1), torch.ones(n), rtol=0, atol=1e-5)
            assert n == 1 or (found[0] - found[1:3]).norm(dim=-1).min() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "rate", "method"), [("clipa", 0.5, "guided"), ("worldwide", 0.0, None)])
def test_features_of_other_programs_models_are_the_same(kind: str, rate: float, method: str | None, out: Path) -> None:
    write_open_clip(Path(kind), CONFIGURATIONS[kind])
    loaded = load_run(kind, device="cpu")
    write_onnx(loaded, at_rate(loaded.model, rate, method), out)
    assert_same(loaded, out, rate=rate, method=method)
    assert (out / "tokenizer.json").read_bytes() == (Path(kind) / "tokenizer.json").read_bytes()


@pytest.mark.slow
def test_a_stem_and_merges_behind_it(out: Path) -> None:
    loaded = own_run(model={"frequency": {"placement": "stem", "depth": 1}, "merging": {"rate": 0.6, "at": [2, 3, 4]}})
    write_onnx(loaded, at_rate(loaded.model, 0.6, "guided"), out)
    assert_same(loaded, out, rate=0.6, method="guided")


@pytest.mark.slow
def test_a_branch_guides_and_its_feature_is_named_as_missing(out: Path) -> None:
    loaded = own_run()
    encoder = at_rate(loaded.model, None)
    assert write_onnx(loaded, encoder, out) == [
        ALWAYS,
        "the frequency feature is not in image.onnx, which gives the spatial one",
        "features of single patches and words, which only losses read, are left out",
        "image.onnx always merges (guided, rate 0.500); another rate takes another export. Where two merges cost "
        "nearly the same, onnxruntime may choose the other one, because it rounds otherwise",
    ]
    assert_same(loaded, out, rate=0.5, method="guided")
    about = json.loads((out / "onnx.json").read_text())
    expected = {"image_size": 32, "resize": "crop", "context_length": 16, "embed_dim": 16, "logit_bias": None}
    expected |= {"merge_rate": 0.5, "merge_method": "guided", "tokens_per_block": [16, 11, 8, 8], "loss": "infonce"}
    assert expected.items() <= about.items()
    assert about["logit_scale"] == pytest.approx(1 / 0.07)
    assert check_onnx(loaded, encoder, out) < 1e-5
    for name in ("image.onnx", "text.onnx"):
        graph = onnx.load(out / name)
        onnx.checker.check_model(graph, full_check=True)
        assert [entry.version for entry in graph.opset_import if not entry.domain] == [20]
        assert not re.search(rb"site-packages|mlip_cli|\.py\b", (out / name).read_bytes())
        first = graph.graph.input[0].type.tensor_type.shape.dim[0]
        assert (first.dim_param, first.dim_value) == ("batch", 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "method", "resize"), [("openai", "tome", "shortest"), ("siglip2", "guided", "squash")]
)
def test_the_cards_program_gives_the_models_scores(kind: str, method: str, resize: str, out: Path) -> None:
    write_open_clip(Path(kind), CONFIGURATIONS[kind], resize_mode=resize)
    loaded = load_run(kind, device="cpu")
    encoder = at_rate(loaded.model, 0.5, method)
    lines = write_onnx(loaded, encoder, out)
    assert lines[0] == ALWAYS
    assert len(lines) == 2
    assert_same(loaded, out, rate=0.5, method=method)
    noise = random_pictures(1, 61, torch.Generator().manual_seed(3))[0, :, :45]
    Image.fromarray(noise.permute(1, 2, 0).numpy()).save(out / "picture.png")
    card = model_card(loaded.run, loaded.recipe, loaded.checkpoint, format="onnx", lost=lines)
    program = card.split("```python\n")[1].split("```")[0].replace("picture.jpg", "picture.png")
    program += "\nprint((images @ texts.T).tolist())"
    ran = subprocess.run([sys.executable, "-c", program], cwd=out, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    pixels = evaluation_transform(noise, size=32, resize=loaded.recipe.data.resize)
    with torch.no_grad():
        images = normalize(encoder.encode_image(pixels[None]), dim=-1)
        texts = normalize(encoder.encode_text(loaded.tokenizer.encode(["a dog", "a cat"])), dim=-1)
    cosines = torch.tensor(json.loads(ran.stdout.splitlines()[-1]))
    torch.testing.assert_close(cosines, images @ texts.T, rtol=0, atol=2e-3)  # PIL and torchvision round apart


@pytest.mark.slow
def test_weights_beside_a_graph_that_would_be_too_large(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "MOST_IN_ONE_FILE", 1000)
    loaded = own_run(mlip=False, model=SMALL)
    encoder = at_rate(loaded.model, 0.0)
    write_onnx(loaded, encoder, out)
    names = ["image.onnx", "image.onnx.data", "onnx.json", "text.onnx", "text.onnx.data"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert (out / "text.onnx.data").stat().st_size > 20 * (out / "text.onnx").stat().st_size
    assert check_onnx(loaded, encoder, out.rename("moved")) < 1e-5


@pytest.mark.slow
def test_the_check_refuses_another_models_files_and_damage(out: Path) -> None:
    loaded = own_run(mlip=False, model=SMALL)
    encoder = at_rate(loaded.model, 0.0)
    write_onnx(loaded, encoder, out)
    make_run(Path("other"), loaded.recipe, seed=1)
    other = load_run("other", device="cpu")
    with pytest.raises(RunError) as refused:
        check_onnx(other, at_rate(other.model, 0.0), out)
    assert re.fullmatch(
        rf"{out}/image\.onnx: onnxruntime's features differ from the model's by [\d.]+e[-+]\d+, more than {BOUND:g}; "
        "try other versions of onnxruntime and torch",
        str(refused.value),
    )
    content = (out / "image.onnx").read_bytes()
    (out / "image.onnx").write_bytes(content[: len(content) // 2])
    with pytest.raises(RunError, match=rf"^{out}/image\.onnx: onnxruntime cannot read it \([^\n]+\)$"):
        check_onnx(loaded, encoder, out)


class Matching(nn.Module):
    """Costs with many ties -> groups; values with many ties -> ranks."""

    def forward(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        even, odd = grid_halves(6, 6)
        return match(cosine_cost(keys, even, odd).round(), even, odd, 22), mid_ranks(keys[..., 0].round())


@pytest.mark.slow
def test_equal_costs_merge_in_token_order_as_in_the_model(out: Path) -> None:
    keys = torch.randn(16, 36, 4, generator=torch.Generator().manual_seed(0)) / 2

    class Grouped(nn.Module):
        def forward(self, keys: Tensor) -> Tensor:
            return torch.cat([own.float() for own in Matching()(keys)], dim=1)

    costs = cosine_cost(keys, *grid_halves(6, 6)).round().amin(-1)
    assert max(len(row.unique()) for row in costs) <= 2, "nearly all proposals tie"
    export._write_graph(Grouped(), keys[:2], out / "match.onnx", names=("keys", "groups"))
    assert torch.equal(outputs(out / "match.onnx", keys), Grouped()(keys))


def test_random_drops_are_refused(out: Path) -> None:
    loaded = own_run(mlip=False, model=SMALL)
    with pytest.raises(UsageError, match=r"^ONNX: drops of random patches belong to training; "):
        write_onnx(loaded, at_rate(loaded.model, 0.5, "random_drop"), out)
    assert not list(out.iterdir())


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        (("onnxruntime",), "ONNX: onnxruntime is not installed"),
        (("onnx", "onnxscript"), "ONNX: onnx, onnxscript are not installed"),
    ],
)
def test_missing_packages_are_named_with_the_cure(
    missing: tuple[str, ...], words: str, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else find(name))
    loaded = own_run(mlip=False, model=SMALL)
    for call in (check_packages, lambda: write_onnx(loaded, at_rate(loaded.model, 0.0), out)):
        with pytest.raises(UsageError) as refused:
            call()
        assert str(refused.value) == f'{words}; pip install "mlip-cli[onnx]"'
    assert not list(out.iterdir())
