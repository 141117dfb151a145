"""README keeps its word: every command line in it runs, in its order and in one folder, only smaller.

And the documents beside it: what they name is there.
"""

import ast
import contextlib
import io
import os
import re
import shlex
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pytest
import yaml
from command_for_tests import mlip
from download_server_for_tests import DownloadServer, jpeg
from foreign_for_tests import CONFIGURATIONS, write_open_clip
from killed_for_tests import Forked
from pages_for_tests import without_curves
from pyarrow import parquet
from sources_for_tests import picture, write_files, write_sidecars
from torch.distributed.run import parse_args

from mlip_cli import cli
from mlip_cli.evaluate.datasets import imagenet
from mlip_cli.recipe.schema import paths
from mlip_cli.recipe.shipped import read_schema, recipe_names

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

SMALL = """
extends: {shipped}
data: {{image_size: 32, num_workers: 0}}
model:
  embed_dim: 16
  token_dim: 12
  vision: {{timm: null, patch_size: 8, width: 16, depth: 6, num_heads: 2}}
  text: {{width: 16, depth: 1, num_heads: 2, context_length: 16}}
optim: {{warmup_steps: 1}}
train: {{steps: 2, epochs: null, global_batch_size: 8, micro_batch_size: null, precision: fp32, device: cpu}}
"""
"""The shipped recipes under their own names, as a reader's changes to them would be: seconds instead of days."""
FINETUNE = """
extends: {shipped}
data: {{num_workers: 0}}
optim: {{warmup_steps: 1}}
train: {{steps: 2, epochs: null, global_batch_size: 8, micro_batch_size: null, precision: fp32, device: cpu}}
"""

PUBLISHED = "open_clip:ViT-B-32-quickgelu:clip.safetensors"
"""A file of a few hundred MB, whose place a small folder takes."""
TUNE = (
    f"mlip pretrain recipes/finetune.yaml model.init={PUBLISHED} "
    "evaluate.zeroshot=[folder:my_classes,digits] --out runs/tuned"
)
CHOSEN = 'mlip prepare-data pairs.parquet data/pairs --where "similarity > 0.3" --clean datacomp_basic --dedupe pixels'
QUICK = "--rounds 5 --batch-size 4"
SWEPT = f"{QUICK} --pictures 1"


@dataclass(frozen=True)
class Smaller:
    """How a line is changed to take a second."""

    instead: dict[str, str] = field(default_factory=dict)
    """Words of the line that others take the place of."""
    more: str = ""
    """What is added at its end."""

    def words(self, line: str) -> list[str]:
        words = shlex.split(line)
        assert self.instead.keys() <= set(words), "a word that is not in the line"
        return [self.instead.get(word, word) for word in words] + shlex.split(self.more)


def run(words: list[str]) -> None:
    """`mlip` and `torchrun` lines."""
    if words[0] == "mlip":
        done = mlip(*words[1:])
        assert done.returncode == 0, done.stderr
    else:
        assert words[0] == "torchrun"
        torchrun(words[1:])


def torchrun(words: list[str]) -> None:
    """torchrun takes the line; its processes are forked from one that has imported torch."""
    asked = parse_args(words)
    assert (asked.module, asked.training_script, asked.training_script_args[0]) == (True, "mlip_cli", "pretrain")
    ranks = int(asked.nproc_per_node)
    with Forked(asked.training_script_args[1:], Path("torchrun.words"), ranks) as training:
        assert training.join() == [0] * ranks, training.said()


def make(line: str) -> None:
    """Its target is there and can be made."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = [*shlex.split(line), "--dry-run"]
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def make_demo(line: str) -> None:
    """What the demo leaves behind, of a few pictures and steps."""
    make(line)
    run(shlex.split("mlip prepare-data openmoji data/openmoji --limit 60 --size 32 --workers 1"))
    for name in ("openmoji_clip", "openmoji"):
        run(shlex.split(f"mlip pretrain recipes/{name}.yaml --out runs/{name} --resume"))


def environment_is_the_makefiles(line: str) -> None:
    folder = line.removeprefix("source ").removesuffix("/bin/activate")
    assert f"VENV ?= {folder}\n" in (ROOT / "Makefile").read_text()


def script_is_there(line: str) -> None:
    """What it does is the matter of test_slurm.py."""
    _, script, recipe, _ = line.split()
    assert (ROOT / recipe).is_file()
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)


LINES: dict[str, Smaller | Callable[[str], None]] = {
    "make demo": make_demo,
    "make test": make,
    "source .venv/bin/activate": environment_is_the_makefiles,
    "mlip prepare-data my_pictures data/mine": Smaller(more="--holdout 0.2 --workers 1"),
    "mlip pretrain recipes/laptop.yaml --out runs/mine": Smaller(),
    "mlip eval-zeroshot runs/mine --dataset folder:my_classes": Smaller(),
    "mlip merge-sweep runs/mine --rates 0.3,0.5 --dataset folder:my_classes": Smaller(more=SWEPT),
    "mlip profile runs/mine": Smaller(more=QUICK),
    "mlip report runs/mine": Smaller(),
    "mlip prepare-data photos.csv data/photos --image-column path --caption-column title": Smaller(more="--workers 1"),
    "mlip prepare-data my_classes data/classes": Smaller(more="--workers 1"),
    "mlip prepare-data cc12m.tsv data/cc12m --preset cc12m": Smaller(more="--allow-private --holdout 0.3 --workers 1"),
    "mlip pretrain recipes/cc12m.yaml": Smaller(),
    CHOSEN: Smaller(more="--workers 1"),
    "mlip prepare-data cc12m.tsv data/cc12m --preset cc12m --part 1/8": Smaller(
        {"data/cc12m": "data/shares", "1/8": "1/1"}, "--allow-private --workers 1"
    ),
    "mlip prepare-data cc12m.tsv data/cc12m --preset cc12m --finish": Smaller(
        {"data/cc12m": "data/shares"}, "--allow-private --workers 1"
    ),
    "mlip prepare-data --check data/cc12m": Smaller(),
    "mlip pretrain recipes/cc12m.yaml --dry-run": Smaller(),
    "mlip pretrain recipes/single_gpu.yaml train.micro_batch_size=64 --out runs/small_batches": Smaller(
        {"train.micro_batch_size=64": "train.micro_batch_size=4"}
    ),
    "torchrun --nproc-per-node 8 -m mlip_cli pretrain recipes/cc12m.yaml --out runs/cc12m": Smaller({"8": "2"}),
    "sbatch recipes/slurm.sbatch recipes/cc12m.yaml runs/cc12m": script_is_there,
    "mlip pretrain recipes/openmoji.yaml --resume": Smaller(),
    "mlip pretrain recipes/openmoji.yaml model.init=runs/openmoji train.steps=500 --out runs/longer": Smaller(
        {"train.steps=500": "train.steps=3"}
    ),
    f"mlip eval-zeroshot {PUBLISHED} --dataset folder:my_classes": Smaller({PUBLISHED: "published"}),
    TUNE: Smaller(
        {
            f"model.init={PUBLISHED}": "model.init=published",
            "evaluate.zeroshot=[folder:my_classes,digits]": "evaluate.zeroshot=[folder:my_classes]",
        }
    ),
    f"mlip average {PUBLISHED} runs/tuned --choose 0.5 --out runs/mixed": Smaller({PUBLISHED: "published"}),
    "mlip export runs/mixed tuned_clip --format huggingface": Smaller(),
    "mlip eval-zeroshot runs/cc12m --dataset imagenet --data-root /data": Smaller(
        {"runs/cc12m": "runs/mine", "/data": "elsewhere"}
    ),
    "mlip eval-zeroshot runs/mine runs/longer --dataset folder:my_classes --merge-rate 0,0.5": Smaller(),
    "mlip eval-zeroshot runs/mine runs/tuned --task retrieval": Smaller(),
    "mlip merge-sweep runs/mine --rates 0.2,0.3,0.4,0.5 --methods guided,tome --dataset folder:my_classes": Smaller(
        more=SWEPT
    ),
    'mlip search runs/mine "a dog on a beach" "a red car" --images my_pictures': Smaller(),
    "mlip prepare-data openmoji data/openmoji": Smaller(more="--limit 60 --size 32 --workers 1"),
    "mlip pretrain recipes/openmoji.yaml": Smaller(),
    "mlip merge-sweep --rates 0.3,0.5": Smaller(more=SWEPT),
    "mlip eval-zeroshot --dataset openmoji": Smaller(),
    'mlip search runs/openmoji "a flag" --images data/openmoji': Smaller(),
    "mlip average runs/openmoji runs/longer": Smaller(more="--weights 0,1"),
    "mlip export runs/openmoji exported --format onnx": Smaller(),
    "mlip profile recipes/cc12m.yaml": Smaller(more=QUICK),
    "mlip report runs/openmoji_clip runs/openmoji": Smaller(),
    "mlip doctor": Smaller(),
}


def readme_lines() -> list[str]:
    """Lines of the sh blocks without their comments, then the commands of the table, each once."""
    blocks = "\n".join(re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL))
    lines = [re.sub(r"\s+#.*", "", line) for line in blocks.splitlines() if line]
    table = re.findall(r"^\| `(mlip [^`]*)` \|", README, re.MULTILINE)
    return list(dict.fromkeys([*lines, *table]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A reader's folder: pictures, data sets and smaller recipes. The tests work in it one after another."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("openmoji", "openmoji_clip", "laptop", "single_gpu", "cc12m"):
        write_files(folder, {f"recipes/{name}.yaml": SMALL.format(shipped=ROOT / "recipes" / f"{name}.yaml")})
    write_files(folder, {"recipes/finetune.yaml": FINETUNE.format(shipped=ROOT / "recipes" / "finetune.yaml")})
    write_open_clip(folder / "published", CONFIGURATIONS["openai"])
    write_sidecars(folder / "my_pictures", 24)
    write_files(folder, {f"photos/{i}.png": picture(100 + i) for i in range(8)})
    rows = [f"photos/{i}.png,photograph {i}" for i in range(8)]
    write_files(folder, {"photos.csv": "\n".join(["path,title", *rows, ""]), "picture.png": picture(200)})
    for number, name in enumerate(("apple", "green_tree")):
        write_files(folder / "my_classes" / name, {f"{i}.png": picture(300 + 10 * number + i) for i in range(4)})
    for number, name in enumerate(("n01440764", "n01443537")):
        pictures = {f"{i}.JPEG": picture(400 + 10 * number + i, "JPEG") for i in range(2)}
        write_files(folder / "elsewhere" / "imagenet" / "val" / name, pictures)
    pairs = {
        "image": [jpeg(i, side=210) for i in range(40)],
        "caption": [f"photograph of thing {i}" for i in range(40)],
        "similarity": [i / 40 for i in range(40)],
    }
    parquet.write_table(pa.table(pairs), folder / "pairs.parquet")
    before = Path.cwd()
    os.chdir(folder)
    with DownloadServer() as server:
        rows = [f"{server.url(f'good/{i}')}\tphotograph {i}\n" for i in range(48)]
        write_files(folder, {"cc12m.tsv": "".join(rows)})
        yield folder
    os.chdir(before)


def test_all_lines_of_readme_are_tested_and_no_others() -> None:
    assert readme_lines() == list(LINES)


@pytest.mark.slow
@pytest.mark.parametrize("line", readme_lines())
def test_a_line_of_readme_runs(line: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLIP_DATA", raising=False)
    if line != "mlip report runs/mine":
        without_curves(monkeypatch)
    names, templates = imagenet.names_and_templates()
    monkeypatch.setattr(imagenet, "names_and_templates", lambda: (names, templates[:1]))  # 1,000 texts, not 80,000
    assert line in LINES, "a new line: say in LINES how it is made smaller"
    how = LINES[line]
    if isinstance(how, Smaller):
        run(how.words(line))
    else:
        how(line)


@pytest.mark.slow
def test_the_snippet_runs_and_prints_cosines(folder: Path) -> None:
    (snippet,) = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    printed = io.StringIO()
    found: dict[str, object] = {}
    with contextlib.redirect_stdout(printed):
        exec(compile(snippet, "README.md", "exec"), found)
    assert re.fullmatch(r"tensor\(\[\[[-\d.e]+,\s+[-\d.e]+\]\]\)\n", printed.getvalue())
    assert found["images"].shape[0] == 1  # type: ignore[attr-defined]


def test_the_extra_that_readme_installs_is_there() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = re.findall(r"pip install \"?\.\[(\w+)\]", README)
    assert extras
    assert set(extras) <= project["optional-dependencies"].keys()


def test_recipe_keys_in_readme_are_keys() -> None:
    known = {path for path, _ in paths(read_schema())}
    sections = {path.split(".")[0] for path in known if "." in path}
    code = " ".join(re.findall(r"`([^`\n]+)`", README) + readme_lines())
    named = {match[0] for match in re.findall(rf"(?<!\S)((?:{'|'.join(sections)})(\.[a-z_]+)+)(?=[=:]|\s|$)", code)}
    assert len(named) > 8
    files = {name for name in named if name.endswith((".txt", ".json", ".safetensors"))}  # of the run folder
    assert named - files <= known


THEIRS = {"ChildFailedError"}
"""Words of other programs in README's table of troubles."""


@pytest.mark.slow
def test_the_troubles_in_readme_are_in_the_programs_words() -> None:
    table = README.split("| what you see |")[1].split("\n\n")[0]
    symptoms = [match[1] for match in re.finditer(r"^\| `([^`]*)`", table, re.MULTILINE)]
    assert len(symptoms) >= 10
    ours = [
        node.value
        for path in (ROOT / "mlip_cli").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    for symptom in set(symptoms) - THEIRS:
        for part in map(str.strip, symptom.split("…")):
            assert any(part in text for text in ours), f"{symptom}: no message has {part!r}"


def test_the_pages_that_readme_links_are_there() -> None:
    linked = set(re.findall(r"\]\((?!https?:)([^)#]+)\)", README)) - {".github/demo.png", ".github/search.png"}
    assert linked
    assert all((ROOT / name).is_file() for name in linked), linked


def code_in(document: str) -> set[str]:
    text = (ROOT / ".github" / document).read_text(encoding="utf-8")
    return set(re.findall(r"`([^`\n]+)`", text))


@pytest.mark.slow
def test_what_contributing_names_is_there() -> None:
    names = code_in("CONTRIBUTING.md")
    files = {name for name in names if re.fullmatch(r"[\w/.]+\.(py|json|md)|[\w/.]+/", name)}
    assert len(files) > 15
    places = (ROOT, ROOT / "mlip_cli", ROOT / "mlip_cli" / "data", ROOT / "tests", ROOT / ".github")
    assert {name for name in files if not any((place / name).exists() for place in places)} == set()
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "mlip_cli").rglob("*.py"))
    identifiers = {part for name in names - files if re.fullmatch(r"\w+(\.\w+)?", name) for part in name.split(".")}
    assert len(identifiers) > 20
    assert {name for name in identifiers if not re.search(rf"\b{name}\b", source)} == set()


def test_changelog_names_all_commands_and_recipes() -> None:
    names = code_in("CHANGELOG.md")
    assert set(recipe_names()) <= names
    assert {command.name or command.callback.__name__.replace("_", "-") for command in cli.app.registered_commands} <= {
        name.removeprefix("mlip ") for name in names
    }


def test_the_form_for_faults_asks_for_what_finding_them_needs() -> None:
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text(encoding="utf-8"))
    assert [field["id"] for field in form["body"] if "id" in field][1:5] == ["command", "doctor", "recipe", "log"]
    assert "mlip doctor --json" in str(form)
