"""The model card of an export: what it says of a run, and that nothing in it is markup but our own."""

import json
import math
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from foreign_for_tests import CONFIGURATIONS, write_open_clip
from markdown_it import MarkdownIt
from models_for_tests import make_run, small_recipe
from PIL import Image
from results_for_tests import recalls, retrieval_result, zeroshot_result
from torch.nn.functional import normalize

from mlip_cli.evaluate.picture_results import GalleryResult
from mlip_cli.export.card import LICENSES, model_card, plain
from mlip_cli.export.snippets import FORMATS, snippet
from mlip_cli.export.write import write_format
from mlip_cli.recipe.config import Recipe
from mlip_cli.runs.find import find_checkpoint
from mlip_cli.runs.folder import ORIGIN, Run
from mlip_cli.runs.loading import load_run

EVIL = (
    "<script>alert(1)</script>",
    "![x](http://x.y/z)",
    "a | b",
    "`code`",
    "line\nbreak",
    "[t](javascript:x)",
    "&lt;b",
)
LICENCE, CREDIT = "CC BY-SA 4.0", "Pictures by <b>Ann & Bob</b> | https://example.org"


def card_of(name: str, **more: Any) -> dict[str, Any]:
    own = {"source": "openmoji 16", "license": LICENCE, "attribution": CREDIT} | more
    return {"folder": f"/home/me/{name}", "fingerprint": "f" * 64, "num_samples": 1234, "provenance": own}


@pytest.fixture
def recipe() -> Recipe:
    return small_recipe(evaluate={"zeroshot": ["digits"]})


@pytest.fixture
def run(tmp_path: Path, recipe: Recipe) -> Run:
    """A run with data, measured steps and results, by hand."""
    make_run(tmp_path / "trained", recipe)
    own = Run(tmp_path / "trained")
    own.data_cards.write_text(json.dumps({"training": card_of("pairs"), "validation": card_of("held-out")}))
    lines = [{"step": step, "loss": 9 - step, "samples_seen": 8 * step, "images_per_s": 2.0} for step in (4, 8, 12)]
    own.metrics.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    for number, dataset in enumerate(("digits", *EVIL)):
        zeroshot_result(dataset=dataset, data_fingerprint=str(number), step=8).write(own.evals / f"{number}.json")
    zeroshot_result(step=12, n=77_777).write(own.evals / "later.json")
    return own


def card(run: Run, recipe: Recipe, *, format: str = "onnx", lost: tuple[str, ...] = ()) -> str:
    checkpoint = run.latest_checkpoint()
    assert checkpoint is not None
    return model_card(run, recipe, checkpoint, format=format, lost=lost)


def front_matter(text: str) -> dict[str, Any]:
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


@pytest.mark.parametrize(("format", "library"), FORMATS.items())
def test_the_front_matter_is_what_the_hub_reads(run: Run, recipe: Recipe, format: str, library: str) -> None:
    assert front_matter(card(run, recipe, format=format)) == {
        "library_name": library,
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["clip", "mlip", "image-text-retrieval"],
        "license": "cc-by-sa-4.0",
    }


@pytest.mark.parametrize(
    "cards",
    [
        {},
        {"training": card_of("a", license=None)},
        {"training": card_of("a", license="ask: me")},
        {"training1": card_of("a"), "training2": card_of("b", license="MIT")},
        {"training1": card_of("a"), "training2": card_of("b", license=None)},
        {"validation": card_of("a")},
    ],
)
def test_a_licence_that_not_all_training_data_has_is_not_claimed(
    run: Run, recipe: Recipe, cards: dict[str, Any]
) -> None:
    run.data_cards.write_text(json.dumps(cards))
    assert "license" not in front_matter(card(run, recipe))


@pytest.mark.parametrize("origin", ["init", "vision.init", "average"])
def test_a_licence_is_not_claimed_for_weights_from_elsewhere(run: Run, recipe: Recipe, origin: str) -> None:
    model = recipe.model
    changed = {"init": {"init": "other"}, "vision.init": {"vision": model.vision.model_copy(update={"init": "x.pth"})}}
    recipe = recipe.model_copy(update={"model": model.model_copy(update=changed.get(origin, {}))})
    checkpoint = run.latest_checkpoint()
    assert checkpoint is not None
    if origin == "average":
        (checkpoint / ORIGIN).write_text('{"kind": "average"}')
    assert "license" not in front_matter(card(run, recipe))


def test_licences_are_those_of_the_hub() -> None:
    assert {"cc-by-sa-4.0", "cc-by-nc-nd-2.0", "cc0-1.0", "mit", "apache-2.0"} <= LICENSES
    assert len(LICENSES) == 9 + 6 * 3


def test_the_card_says_what_the_run_knows_of_this_checkpoint(run: Run, recipe: Recipe) -> None:
    text = card(run, recipe, lost=("the frequency feature",))
    sums = (
        "| true rate | mean recall % | top\\-1 % |",
        "- Does it name the class of a picture of digits, one of 10? It puts 34.4 % (95 %: 31.0–38.4) of the pictures",
        "guessing gives 10.0 %, so it is above chance.",
        "| 0.000 | 34.4 (31.0-38.4) | 34.4 (31.0-38.4) |",
        "50,000 pictures, 10 classes: chance 10.0 %; in brackets: 95 % intervals",
        "| training | pairs | 1,234 | openmoji 16 | CC BY-SA 4.0 |",
        "| validation | held-out | 1,234 | openmoji 16 | CC BY-SA 4.0 |",
        "| image tower | ViT, patches of 8 pixels, width 32, depth 4, 2 heads |",
        "spatial_global (infonce, weight 1), spatial_token (sparc, weight 1), frequency_global (infonce, weight 0.5)",
        "| optimiser | AdamW, peak lr 0.001, weight decay 0.2, warm-up of 2 steps |",
        "| seed | 0 |",
        "| 8 | 8 | 64 | 0:32 | 1.000 |",
        "## Not in these files\n\n- the frequency feature",
    )
    shown = text.replace("\\", "")
    for words in sums:
        assert words.replace("\\", "") in shown
    assert "77,777" not in text
    assert "/home/me" not in text


def test_parameters_are_counted(run: Run, recipe: Recipe) -> None:
    number = sum(parameter.numel() for parameter in load_run(str(run.folder), device="cpu").model.parameters())
    assert f"| parameters | {number:,} |" in card(run, recipe)


def test_retrieval_on_the_validation_pairs_is_shown(run: Run, recipe: Recipe) -> None:
    ways = {way: recalls(1, 5, 10) for way in ("image_to_text", "text_to_image")}
    value = {"kind": "gallery", "step": 8, "true_merge_rate": 0.5, "folders": ["v"], "fingerprints": ["f"]}
    value |= {"num_images": 383, "num_texts": 400, "chosen": "at random", "scores": ways}
    GalleryResult.from_json(value | {"text_to_image": [], "image_to_text": []}).write(run.evals / "gallery.json")
    text = card(run, recipe)
    assert "**validation: 383 pictures, 400 distinct texts**" in text
    assert "| text to image | 34.4 (31.0-38.4) | 1.3 |" in text
    assert "Does it find the right picture for a text among 383 held-out ones?" in text


def test_a_repository_is_named_only_where_its_tokenizer_is_found_there(recipe: Recipe) -> None:
    tokenizer = {"file": "tokenizer.json", "pad_id": 0}
    own = small_recipe(model={"text": {"width": 32, "depth": 2, "num_heads": 2, "tokenizer": tokenizer}})
    said = "From the Hub write `hf-hub:OWNER/NAME` in place of `local-dir:.`."
    assert said in next(snippet("open_clip", recipe))
    assert "Hub" not in next(snippet("open_clip", own))
    assert "From the Hub write `OWNER/NAME`" in next(snippet("huggingface", own))


def test_shares_of_texts_are_finite_at_large_scales(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    _, program = snippet("onnx", recipe)
    ending = program.split("texts = text_graph")[1].split("\n", 1)[1].removesuffix("```")
    images, texts = np.float32([[1, 0]]), np.float32([[1, 0], [0.99, 0.14]])
    exec(ending, {"np": np, "about": {"logit_scale": 100.0}, "images": images, "texts": texts})
    shares = [float(number) for number in re.findall(r"[\d.]+", capsys.readouterr().out)]
    assert shares == pytest.approx([1 / (1 + math.exp(-1)), 1 / (1 + math.e)], abs=1e-4)


def test_no_name_becomes_markup(run: Run, recipe: Recipe) -> None:
    cards = {"training": card_of("<i>x", source="\n\n# A heading", holds="<img src=x onerror=y>", license="a|b")}
    run.data_cards.write_text(json.dumps(cards))
    text = card(run, recipe, lost=("<script>", "# no\n\nheading"))
    tokens = MarkdownIt("commonmark").enable("table").parse(text.split("---\n", 2)[2])
    inline = [child for token in tokens for child in token.children or ()]
    assert not {token.type for token in (*tokens, *inline)} & {"html_block", "html_inline", "image", "link_open", "hr"}
    headings = [after.content for token, after in pairwise(tokens) if token.type == "heading_open"]
    assert headings == ["trained", "Use", "Scores", "Data", "Model and training", "Not in these files"]
    html = MarkdownIt("commonmark").enable("table").render(text.split("---\n", 2)[2])
    for name in EVIL:
        escaped = name.replace("\n", "\\n").replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        assert escaped in html
    widths = [row.count("<td") or row.count("<th") for row in html.split("<tr>")[1:]]
    assert widths
    tables = [table.split("<tr>")[1:] for table in html.split("<table>")[1:]]
    assert all(len({row.count("<td") or row.count("<th") for row in rows}) == 1 for rows in tables)


@pytest.mark.parametrize("text", [*EVIL, CREDIT, "*a* _b_ ~c~ #d $e$ \\ ^f^ =g=", "日本 🙂"])
def test_plain_text_is_shown_as_it_is(text: str) -> None:
    html = MarkdownIt("commonmark").enable("strikethrough").renderInline(plain(text))
    shown = html.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", '"').replace("&amp;", "&")
    assert shown == text.replace("\n", "\\n")
    assert not set(plain(text)) & set("<>\n")


def test_scores_of_retrieval_alone_are_shown(run: Run, recipe: Recipe) -> None:
    shutil.rmtree(run.evals)
    retrieval_result(step=8, dataset="pairs", merge_rate=0.5, true_merge_rate=0.5).write(run.evals / "retrieval.json")
    text = card(run, recipe)
    assert "Nothing is measured" not in text
    assert "**pairs: text to image**" in text
    assert "| 8 | 0.500 | fp32 | 34.4 (31.0-38.4) | 34.4 (31.0-38.4) | 34.4 (31.0-38.4) | 2 |" in text


def test_a_run_without_data_and_scores_says_so(tmp_path: Path, recipe: Recipe) -> None:
    make_run(tmp_path / "bare", recipe)
    text = card(Run(tmp_path / "bare"), recipe)
    assert "Nothing is measured yet: the run holds no result of this checkpoint." in text
    assert "The run does not say on what data it was trained." in text


def test_weights_from_elsewhere_are_named_without_their_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_open_clip(tmp_path / "theirs", CONFIGURATIONS["laion"])
    run, checkpoint = find_checkpoint("theirs")
    text = model_card(run, run.read_recipe(), checkpoint, format="open_clip", lost=())
    assert "The weights come from elsewhere: open\\_clip\\_model.safetensors (SHA-256" in text
    assert str(tmp_path) not in text
    assert "| losses |" not in text
    assert "license" not in front_matter(text)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["open_clip", "huggingface", "safetensors"])
def test_the_program_of_a_card_gives_the_models_cosines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_open_clip(tmp_path / "theirs", CONFIGURATIONS["laion"])
    loaded = load_run("theirs", device="cpu")
    folder = tmp_path / "out"
    folder.mkdir()
    write_format(loaded, folder, format=format, merge_rate=None)
    Image.new("RGB", (50, 40), "red").save(folder / "picture.jpg")
    text = model_card(loaded.run, loaded.recipe, loaded.checkpoint, format=format, lost=())
    program = text.split("```python\n")[1].split("```")[0]
    ran = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True)
    red = torch.tensor([254, 0, 0], dtype=torch.uint8)[None, :, None, None].expand(1, 3, 32, 32)  # as the JPEG has it
    with torch.no_grad():
        image = normalize(loaded.model.encode_image(red, loaded.model.plan), dim=-1)
        texts = normalize(loaded.model.encode_text(loaded.tokenizer.encode(["a dog", "a cat"])), dim=-1)
    found = [float(number) for number in re.findall(r"-?\d+\.\d+", ran.stdout)]
    assert found == pytest.approx((image @ texts.T)[0].tolist(), abs=3e-3), ran.stderr
