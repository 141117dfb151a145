"""Paths as people type them: `~` in every place that takes one, and what no path can be."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_for_tests import mlip
from recipes_for_tests import SMALL, write
from shards_for_tests import make_dataset
from sources_for_tests import picture, write_files

from mlip_cli.errors import UsageError
from mlip_cli.evaluate.datasets.find import data_root
from mlip_cli.paths import escaped, read_dataset_name, read_path
from mlip_cli.recipe.load import load_recipe

NOT_HERE = "a URL or a stream, and a path of this machine is needed; copy the data to a disk"
A_NAME = "a name with control characters; rename it"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder; the current folder is another one."""
    (tmp_path / "work").mkdir()
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_paths_that_can_be(home: Path) -> None:
    for text, path in {
        "~": f"{home}",
        "~/a": f"{home}/a",
        "~root": "/root",
        "./~": "./~",
        "./~nobody": "./~nobody",
        "a~": "a~",
        "a:b": "a:b",
        "2024-01-02T10:30": "2024-01-02T10:30",
        "a/s3:b": "a/s3:b",
        "é": "é",
        "caf\udce9": "caf\udce9",
    }.items():
        assert read_path(text) == path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "an empty path; write . for the current folder"),
        ("a\nb", rf"a\nb: {A_NAME}"),
        ("\0", rf"\x00: {A_NAME}"),
        ("a\u2028b", rf"a\u2028b: {A_NAME}"),
        (
            "~nobody-here/x",
            "~nobody-here/x: there is no user nobody-here; correct it, or write ./~nobody-here/x for a "
            "file or folder of this name",
        ),
        ("a/" * 3000, f"{'a/' * 30}...: too long for a path, 6,000 characters; shorten it"),
        ("x" * 300, f"{'x' * 60}...: too long for a path, 300 characters; shorten it"),
        ("pipe:cat x", f"pipe:cat x: {NOT_HERE}"),
        ("s3:b/c", f"s3:b/c: {NOT_HERE}"),
        ("https://h/x", f"https://h/x: {NOT_HERE}"),
        ("weird+1://h/x", f"weird+1://h/x: {NOT_HERE}"),
    ],
)
def test_paths_that_cannot_be(text: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        read_path(text)
    assert str(error.value) == message


def test_names_are_shown_on_one_line() -> None:
    assert escaped("a\nb\t\x1b[31m\0\x7f\x85\u2028\u202e\udce9") == (r"a\nb\t\x1b[31m\x00\x7f\x85\u2028\u202e\udce9")
    for text in ("a b", "é", "🦊", "\u200d", "C:\\x", "\u3000"):
        assert escaped(text) == text


def test_tilde_in_recipes_names_and_variables(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(f"{home}/base.yaml", SMALL)
    write("x.yaml", "extends: ~/base.yaml\n")
    changes = ["data.train=[~/a, {path: ~/t.tar, format: webdataset}]", "data.validation=~/v", "model.init=~/run"]
    recipe = load_recipe(
        "x.yaml", [*changes, "data.cache.folder=~/c", "evaluate.zeroshot=[folder:~/f/, digits]"]
    ).recipe
    assert [source.path for source in recipe.data.train] == [f"{home}/a", f"{home}/t.tar"]
    assert recipe.data.validation is not None
    assert recipe.data.validation[0].path == f"{home}/v"
    assert (recipe.model.init, recipe.data.cache.folder) == (f"{home}/run", f"{home}/c")
    assert recipe.evaluate.zeroshot == (f"folder:{home}/f", "digits")
    foreign = load_recipe("x.yaml", ["model.init=open_clip:ViT-B-32:~/w.pt"]).recipe
    assert foreign.model.init == f"open_clip:ViT-B-32:{home}/w.pt"
    assert read_dataset_name("shards:~/s") == f"shards:{home}/s"
    monkeypatch.setenv("MLIP_DATA", "~/d")
    assert data_root(None) == home / "d"
    monkeypatch.setenv("MLIP_DATA", "s3://b")
    with pytest.raises(UsageError) as error:
        data_root(None)
    assert str(error.value) == f"$MLIP_DATA: s3://b: {NOT_HERE}"


@pytest.mark.slow
def test_tilde_on_the_command_line(home: Path) -> None:
    names = [f"{name}/{i}.png" for name in ("cat", "dog") for i in range(4)]
    write_files(home / "c", {name: picture(i) for i, name in enumerate(names)})
    write(f"{home}/t.csv", "image,caption\n" + "".join(f"{name},a pet\n" for name in names))
    make_dataset(home / "d" / "train", n=16)
    write(f"{home}/x.yaml", SMALL)
    small = ["data.train=~/d/train", "train.steps=1", "log.every_steps=1"]
    small += ["model.text={width: 32, depth: 1, num_heads: 2, context_length: 8}", "model.embed_dim=16"]
    for arguments in (
        ["prepare-data", "~/c", "~/out", "--size", "32", "--workers", "1"],
        ["prepare-data", "~/t.csv", "~/table", "--image-folder", "~/c", "--size", "32", "--workers", "1"],
        ["pretrain", "~/x.yaml", "--out=~/runs/x", *small],
        ["eval-zeroshot", "~/runs/x", "--dataset", "folder:~/c", "--device", "cpu"],
        ["report", "~/runs/x", "--out", "~/page.html"],
        ["report", "~/runs/x/"],
    ):
        done = mlip(*arguments)
        assert done.returncode == 0, done.stderr
    assert [*Path.cwd().iterdir()] == []
    made = ["c", "d", "out", "page.html", "runs", "t.csv", "table", "x.yaml"]
    assert sorted(path.name for path in home.glob("[!.]*")) == made


PLACES = (
    ("ascii", {"PYTHONIOENCODING": "ascii"}, r"caf\xe9"),
    ("latin", {"PYTHONIOENCODING": "latin-1"}, "caf\xe9"),
    ("posix", {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, r"caf\udcc3\udca9"),
    ("utf-8", {"LC_ALL": "C"}, "café"),
)


@pytest.mark.slow
@pytest.mark.parametrize(("environment", "shown"), [place[1:] for place in PLACES], ids=[place[0] for place in PLACES])
def test_what_an_encoding_lacks_is_escaped(tmp_path: Path, environment: dict[str, str], shown: str) -> None:
    encoding = environment.get("PYTHONIOENCODING", "utf-8")
    for stream, arguments in {"stderr": ["report", "café"], "stdout": ["prepare-data", "in", "café", "--json"]}.items():
        write_files(tmp_path / "in", {"a.png": picture(0), "a.txt": "a"})
        done = subprocess.run(
            [sys.executable, "-m", "mlip_cli", *arguments],
            cwd=tmp_path,
            env=os.environ | environment | {"PYTHONPATH": str(Path(__file__).parents[1])},
            capture_output=True,
            check=False,
        )
        assert b"Traceback" not in done.stderr
        if stream == "stderr":
            assert (done.returncode, done.stderr.decode(encoding).split(": no such run")[0]) == (2, f"error: {shown}")
        elif "LC_ALL" in environment and shown != "café":
            cure = "Python reads names as ascii here; set PYTHONUTF8=1"
            assert (done.returncode, done.stderr.decode()) == (2, f"error: {shown}: {cure}\n")
        else:
            assert done.returncode == 0
            assert shown in done.stdout.decode(encoding)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [["--version"], ["profile", "--help"], ["pretrain", "smoke", "--dry-run"], ["nope"]]
)
def test_a_reader_that_has_gone_ends_every_command_alike(tmp_path: Path, arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "mlip_cli", *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        stdout=writer,
        stderr=writer,
        check=False,
    )
    os.close(writer)
    assert done.returncode == 141


def test_results_of_damaged_names_are_kept(tmp_path: Path) -> None:
    from mlip_cli.files import write_json

    write_json(tmp_path / "x.json", {"name": "caf\udce9"})
    assert json.loads((tmp_path / "x.json").read_bytes()) == {"name": "caf\udce9"}
