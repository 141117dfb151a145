"""The report of real runs, in a real browser where there is one."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from browser_for_tests import Browser
from models_for_tests import small_recipe
from pages_for_tests import without_curves
from PIL import Image
from shards_for_tests import make_dataset

from mlip_cli.commands.report import report
from mlip_cli.errors import UsageError
from mlip_cli.recipe.load import recipe_yaml
from mlip_cli.report.record import KINDS

pytestmark = pytest.mark.slow

EVIL = ('<script>alert("1")</script> disc', '"><img src=x onerror=alert(2)> & $x^2$ square', "a bar", "日本 é 🙂")
TITLES = (
    "Before and after",
    "Averages of weights",
    "Zero-shot",
    "Curves",
    "Retrieval",
    "Merging",
    "Merge sweep",
    "Profile",
    "Data",
    "Recipe and stamp",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of CLIP and of MLIP, the second with all that a report can show, on captions of markup and formulas."""
    from mlip_cli.commands.average import average
    from mlip_cli.commands.eval_zeroshot import eval_zeroshot
    from mlip_cli.commands.merge_sweep import merge_sweep
    from mlip_cli.commands.pretrain import pretrain
    from mlip_cli.commands.profile import profile

    folder = tmp_path_factory.mktemp("report")
    train = make_dataset(folder / "train", n=32, captions=EVIL)
    validation = make_dataset(folder / "validation", n=12, captions=EVIL, seed=1)
    for name in ("red", "<i>blue"):
        (folder / "classes" / name).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (32, 32), name.removeprefix("<i>")).save(folder / "classes" / name / f"{number}.png")
    with pytest.MonkeyPatch.context() as patch, patch.context() as undrawn:
        patch.chdir(folder)
        without_curves(undrawn)  # of pages that the last call writes again
        for name in ("clip", "mlip"):
            recipe = small_recipe(
                mlip=name == "mlip",
                train=str(train),
                data={"validation": str(validation), "num_workers": 0},
                log={"every_steps": 1},
                evaluate={"every_steps": 4, "at_start": name == "mlip"},
            )
            every = recipe.train.checkpoint_every.model_copy(update={"steps": 4})
            recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"checkpoint_every": every})})
            Path(f"{name}.yaml").write_text(recipe_yaml(recipe))
            pretrain(f"{name}.yaml", [], out=Path("runs", name), resume=False, dry_run=False, as_json=True)
        common: dict[str, Any] = {"data_root": None, "device": "cpu", "as_json": True, "batch_size": 4}
        datasets = ["folder:classes"]
        for task, names in (("zeroshot", datasets), ("retrieval", [])):
            eval_zeroshot(["runs/clip", "runs/mlip"], task=task, datasets=names, merge_rates=[0.0, 0.5], **common)
        merge_sweep(
            "runs/mlip", rates=[0.5], methods=["guided", "tome"], datasets=datasets, rounds=3, num_pictures=2, **common
        )
        profile("runs/mlip", batch_size=4, rounds=3, device="cpu", as_json=True)
        ends = ["runs/mlip/checkpoints/step_0000004", "runs/mlip"]
        average(ends, weights=[0.5], datasets=["folder:classes", "validation"], choose=None, out=None, **common)
        undrawn.undo()
        report(["runs/clip", "runs/mlip"], out=None, as_json=True)
    return folder / "runs"


@pytest.fixture
def runs(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to write into, below the current folder."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(made, tmp_path / "runs")


@pytest.fixture
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    without_curves(monkeypatch)


PAGES = ("mlip/report.html", "clip/report.html", "comparison.html")
UNREADABLE = """
(() => {
  const luminance = color => {
    const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3).map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = node => {
    for (; node; node = node.parentElement) {
      const color = getComputedStyle(node).backgroundColor;
      if (!color.endsWith(', 0)')) return color;
    }
  };
  const kinds = 'h1,h2,h3,p,a,td,th,dt,dd,li,code,pre,summary,figcaption,span,.note,svg text';
  const texts = [...document.querySelectorAll(kinds)];
  return texts.filter(node => node.textContent.trim() && node.getClientRects().length).filter(node => {
    const style = getComputedStyle(node);
    const [a, b] = [luminance(node instanceof SVGElement ? style.fill : style.color), luminance(ground(node))];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05) < 4.5;
  }).map(node => node.tagName + ': ' + node.textContent.trim().slice(0, 60)).slice(0, 5);
})()
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("name", PAGES)
def test_a_browser_draws_the_whole_page_and_fetches_nothing(
    made: Path, chromium: Browser, name: str, width: int, scheme: str
) -> None:
    chromium.open(made / name, width=width, scheme=scheme)
    chromium.evaluate("document.querySelectorAll('details').forEach(part => { part.open = true; })")
    chromium.evaluate("Promise.all([...document.images].map(image => image.decode())).then(() => 0)")
    asked = [address for address in chromium.requested() if not address.startswith("data:image/")]
    assert asked == [(made / name).resolve().as_uri()]
    assert chromium.complaints() == []
    assert chromium.evaluate("document.scripts.length") == 0
    assert chromium.evaluate("document.querySelectorAll('[onerror]').length") == 0
    blank = "[...document.images].filter(i => !(i.naturalWidth > 0 && i.getBoundingClientRect().width >= 16)).length"
    assert chromium.evaluate(blank) == 0
    empty = "[...document.querySelectorAll('svg')].filter(s => s.getBoundingClientRect().height < 80).length"
    assert chromium.evaluate(empty) == 0
    assert chromium.evaluate("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
    assert chromium.evaluate(UNREADABLE) == []


@pytest.mark.parametrize("name", PAGES)
def test_a_telephone_shows_what_came_out_without_scrolling(made: Path, chromium: Browser, name: str) -> None:
    chromium.open(made / name, width=400, scheme="light")
    ends = chromium.evaluate(
        "['.outcome', '.bars .track'].map(part => document.querySelector(part).getBoundingClientRect().bottom)"
    )
    assert max(ends) <= 800
    above = "document.querySelector('.outcome').compareDocumentPosition(document.querySelector('svg'))"
    assert chromium.evaluate(above) & 4, "before the first chart"  # DOCUMENT_POSITION_FOLLOWING


def test_the_browser_test_sees_what_is_wrong(chromium: Browser, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(
        "<body style='background:#fff'><p style='color:#ddd'>pale</p><div style='width:900px'>wide</div>"
        "<img src='missing.png'><script>console.error('loud')</script></body>"
    )
    chromium.open(page, width=400, scheme="light")
    assert any(address.endswith("missing.png") for address in chromium.requested())
    assert any("loud" in complaint for complaint in chromium.complaints())
    assert chromium.evaluate(UNREADABLE) == ["P: pale"]
    assert chromium.evaluate("document.documentElement.scrollWidth") > 400


def test_the_page_shows_what_the_files_say(made: Path) -> None:
    page = (made / "mlip" / "report.html").read_text("utf-8")
    assert [title for title in TITLES if f"<h2>{title}</h2>" not in page] == []
    lines = [json.loads(line) for line in (made / "mlip" / "metrics.jsonl").read_text().splitlines()]
    assert f"{[line for line in lines if 'loss' in line][-1]['loss']:.3f}" in page
    measures = ("validation: image to text %", "validation: in-batch top-1 %", "validation: modality gap")
    for name in ("loss (weighted sum)", "spatial_token", "frequency_global", *measures):
        assert f'aria-label="{name}"' in page
    gallery = json.loads(next((made / "mlip" / "evals").glob("gallery_*.json")).read_text())
    assert {query["asked"]["text"] for query in gallery["text_to_image"]} <= set(EVIL)
    answers = [answer["is_right"] for query in gallery["text_to_image"] for answer in query["found"]]
    assert page.count('class="words right"') == answers.count(True)
    assert page.count('class="words wrong"') == answers.count(False)
    assert answers.count(True) > 0
    sweep = json.loads(next((made / "mlip" / "evals").glob("merge_sweep_*.json")).read_text())
    for point in sweep["points"]:
        assert f"{point['speedup']:.2f}" in page
    assert "mlip pretrain" not in re.sub("<[^>]*>", "", page).split("Sessions")[0]
    charts = sorted(path.stem for path in (made / "mlip" / "pictures").glob("*.svg"))
    assert charts == ["average", "average_2", "distortion", "pareto", "profile"]


def test_results_are_read_as_they_were_written(made: Path) -> None:
    values = [json.loads(path.read_text()) for path in made.glob("*/evals/*.json")]
    assert {value["kind"] for value in values} == set(KINDS)
    for value in values:
        assert KINDS[value["kind"]].from_json(value).to_json() == value


def test_a_new_run_says_what_is_missing_and_how_to_get_it(made: Path) -> None:
    page = (made / "clip" / "report.html").read_text("utf-8")
    for command in ("mlip merge-sweep runs/clip", "mlip profile runs/clip"):
        assert f"<code>{command}</code>" in page


def test_the_comparison_has_both_runs_their_differences_and_links(made: Path) -> None:
    page = (made / "comparison.html").read_text("utf-8")
    assert '<a href="clip/report.html">clip</a>' in page
    assert "model.frequency" in page
    assert "<th>won</th><th" in page or "won</th>" in page
    assert "validation: beside clip" in page
    assert page.count(">mlip</text>") > 5, "curves overlaid"
    galleries = [
        json.loads(next((made / name / "evals").glob("gallery_*.json")).read_text()) for name in ("clip", "mlip")
    ]
    for way in ("text_to_image", "image_to_text"):
        asked = [[query["asked"]["text"] for query in gallery[way]] for gallery in galleries]
        assert asked[0] == asked[1], "the same queries"
    right = sum(
        own["is_right"] for gallery in galleries for query in gallery["text_to_image"] for own in query["found"]
    )
    assert page.count('class="words right"') == right
    assert "mlip: every setting" in page
    assert "images/s</th>" not in page.split('id="scores"')[1].split("</section>")[0]


def test_a_page_is_made_of_files_alone_and_the_same_each_time(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(runs / "mlip" / "checkpoints")
    before = (runs / "mlip" / "report.html").read_text("utf-8")
    report(["runs/mlip"], out=None, as_json=False)
    assert capsys.readouterr().out == "runs/mlip/report.html\n"
    after = (runs / "mlip" / "report.html").read_text("utf-8")
    when = re.compile(r"at \d{4}-\d\d-\d\d \d\d:\d\d UTC")
    assert when.sub("", before) == when.sub("", after)


@pytest.mark.usefixtures("no_curves")
def test_damaged_files_are_named_and_left_out(runs: Path) -> None:
    (runs / "mlip" / "evals" / "broken.json").write_text('{"kind": "zero')
    (runs / "mlip" / "evals" / "strange.json").write_text("{}")
    with open(runs / "mlip" / "metrics.jsonl", "a") as file:
        file.write('nonsense\n{"step": 9, "loss": null, "grad_norm": null}\n{"step": 10, "lo')
    report(["runs/mlip"], out=None, as_json=False)
    page = (runs / "mlip" / "report.html").read_text("utf-8")
    assert "broken.json: cannot be read (Unterminated string" in page
    assert "strange.json: cannot be read (kind: None is not one of zeroshot, retrieval, gallery," in page
    assert "not finite" in page
    assert re.search(r"metrics\.jsonl:\d+: not a line of metrics; left out of the report", page)


@pytest.mark.usefixtures("no_curves")
def test_pictures_that_are_gone_or_elsewhere_are_named(runs: Path) -> None:
    shutil.rmtree(runs / "mlip" / "pictures")
    [path] = (runs / "mlip" / "evals").glob("gallery_*.json")
    gallery = json.loads(path.read_text())
    outside = runs.parent / "secret.png"
    Image.new("RGB", (8, 8), "red").save(outside)
    gallery["image_to_text"][0]["asked"]["picture"] = str(outside)
    path.write_text(json.dumps(gallery))
    report(["runs/mlip"], out=None, as_json=False)
    page = (runs / "mlip" / "report.html").read_text("utf-8")
    assert page.count("(no picture pictures/") > 10
    assert f"(no picture {outside})" in page
    assert "<img" not in page


@pytest.mark.usefixtures("no_curves")
def test_recipes_are_compared_by_what_each_holds(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(runs / "mlip", runs / "wide #1?")
    text = (runs / "wide #1?" / "recipe.yaml").read_text()
    (runs / "wide #1?" / "recipe.yaml").write_text(text.replace("width: 24", "width: 48"))
    report(["runs/mlip", "runs/wide #1?", "runs/clip"], out=None, as_json=False)
    assert capsys.readouterr().out == "runs/comparison.html\n"
    page = (runs / "comparison.html").read_text("utf-8")
    assert "<td>model.frequency.width</td><td>24</td><td>48</td><td>–</td>" in page
    assert re.search(r"<td>model\.frequency</td><td>\{.*?</td><td>\{.*?</td><td>null</td>", page)
    assert '<a href="wide%20%231%3F/report.html">wide #1?</a>' in page


@pytest.mark.usefixtures("no_curves")
def test_results_on_data_that_has_changed_stand_apart(runs: Path) -> None:
    path = sorted((runs / "mlip" / "evals").glob("folder_*.json"))[0]
    result = json.loads(path.read_text()) | {"data_fingerprint": "f" * 40, "n": 1_234}
    path.with_name("other.json").write_text(json.dumps(result))
    report(["runs/mlip"], out=None, as_json=False)
    page = (runs / "mlip" / "report.html").read_text("utf-8")
    assert "<h3>folder:classes (data ffffffff)</h3>" in page
    assert page.count("1,234 pictures") == 1


def test_mistakes(runs: Path) -> None:
    with pytest.raises(UsageError, match="runs/none: no such run; the newest in runs/: mlip, clip"):
        report(["runs/none"], out=None, as_json=False)
    with pytest.raises(UsageError, match=r"runs: not a run folder \(no recipe.yaml\)"):
        report(["runs"], out=None, as_json=False)
    with pytest.raises(UsageError, match="a part of a run; name the run folder: mlip report runs/mlip"):
        report(["runs/mlip/checkpoints/step_0000008"], out=None, as_json=False)
    with pytest.raises(UsageError, match="named twice"):
        report(["runs/mlip", "runs/../runs/mlip"], out=None, as_json=False)
    with pytest.raises(UsageError, match=r"--out runs: is a folder; name a file, as in runs/report\.html"):
        report(["runs/mlip"], out=Path("runs"), as_json=False)
    with pytest.raises(UsageError, match="folder nowhere does not exist; make it"):
        report(["runs/mlip"], out=Path("nowhere/page.html"), as_json=False)


def test_a_run_with_only_a_recipe_has_a_page(runs: Path) -> None:
    for name in ("evals", "pictures", "checkpoints"):
        shutil.rmtree(runs / "clip" / name)
    for name in ("metrics.jsonl", "run.json", "data.json"):
        (runs / "clip" / name).unlink()
    (runs / "mlip" / "metrics.jsonl").unlink()  # its curves take time to draw
    report(["runs/clip", "runs/mlip"], out=Path("both.html"), as_json=False)
    assert "Nothing logged yet." in (runs / "clip" / "report.html").read_text("utf-8")
    assert '<a href="runs/clip/report.html">' in Path("both.html").read_text("utf-8")
