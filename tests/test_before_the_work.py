"""What can be said before the work is said before it: one line, the exit code, and no torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_for_tests import mlip
from models_for_tests import make_run, small_recipe
from recipes_for_tests import SMALL
from shards_for_tests import make_dataset
from sources_for_tests import picture, write_files

from mlip_cli.commands.doctor import torch_build
from mlip_cli.errors import UsageError
from mlip_cli.evaluate.wanted import find_wanted
from mlip_cli.runs import result_files
from mlip_cli.train.setup import training_device

COMMANDS = """
import json, sys
sys.path.insert(0, sys.argv[1])
from command_for_tests import mlip
for line in sys.stdin:
    done = mlip(*json.loads(line))
    print(json.dumps([done.returncode, done.stderr.splitlines()[-1], "torch" in sys.modules]))
"""

MISSING = "no such folder; make it with: mlip prepare-data SOURCE"
EARLY = [
    (["merge-sweep", "nope"], 2, "nope: no such run or checkpoint; the newest in runs/: small"),
    (["merge-sweep", "--methods", "foo"], 2, "--methods foo: not a method to sweep; use guided or tome"),
    (
        ["merge-sweep", "--rates", "0.9"],
        2,
        "merge rate 0.9: the merge before block 2 would take 16 tokens to 5, and one merge removes at most half; lower "
        "the rate or add places to model.merging.at",
    ),
    (
        ["eval-zeroshot", "--merge-rate", "0.01", "--dataset", "digits"],
        2,
        "merge rate 0.01: removes none of 16 tokens; use 0, or at least 0.063",
    ),
    (
        ["merge-sweep", "--dataset", "folder:nope"],
        2,
        "folder:nope: no such folder; name one that holds a folder of pictures for each class",
    ),
    (
        ["merge-sweep", "--dataset", "folder:clases"],
        2,
        "folder:clases: no such folder; did you mean folder:classes? name one that holds a folder of pictures for each "
        "class",
    ),
    (["merge-sweep", "--dataset", "validation"], 2, f"data/gone/test: {MISSING} data/gone"),
    (["profile", "data/cc3m"], 2, None),
    (["profile", "runs/gone"], 2, None),
    (
        ["pretrain", "small.yaml", "data.train=data/gone"],
        2,
        f"data/gone: {MISSING} data/gone, and name data/gone/train",
    ),
    (["pretrain", "small.yaml", "data.train=data/a b/train"], 2, f"data/a b/train: {MISSING} 'data/a b'"),
    (
        ["pretrain", "small.yaml", "data.train={path: gone.tar, format: webdataset}"],
        2,
        "gone.tar: no such file or folder; SOURCE is a folder, a table, tars, or openmoji",
    ),
    (
        ["pretrain", "small.yaml", "--out", "small.yaml/run"],
        2,
        "--out small.yaml/run: HERE/small.yaml is a file; name another folder",
    ),
    (["prepare-data", "classes", "small.yaml"], 2, "OUT small.yaml: small.yaml is a file; name another folder"),
    (
        ["pretrain", "small.yaml", "--out", "~nobody-here/run"],
        2,
        "mlip pretrain: --out: ~nobody-here/run: there is no user nobody-here; correct it, or write ./~nobody-here/run "
        "for a file or folder of this name",
    ),
    (
        ["prepare-data", "classes", "pipe:out"],
        2,
        "mlip prepare-data: OUT: pipe:out: a URL or a stream, and a path of this machine is needed; copy the data to a "
        "disk",
    ),
    (
        ["prepare-data", "classes", "file:///data/out"],
        2,
        "file:///data/out: a folder of this machine; write /data/out",
    ),
    (
        ["eval-zeroshot", "a\nb\x1b[31m"],
        2,
        r"mlip eval-zeroshot: RUN: a\nb\x1b[31m: a name with control characters; rename it",
    ),
    (
        ["report", "x" * 5000],
        2,
        f"mlip report: RUN: {'x' * 60}...: too long for a path, 5,000 characters; shorten it",
    ),
    (["report", ""], 2, "mlip report: RUN: an empty path; write . for the current folder"),
    (
        ["pretrain", "small.yaml", "--steps", "5"],
        2,
        "mlip pretrain: no such option: --steps; for the recipe's train.steps write train.steps=VALUE",
    ),
    (
        ["profile", "--batch-size", str(10**30)],
        2,
        f"mlip profile: --batch-size: {10**30} should be less than or equal to 65536; try mlip profile --help",
    ),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run whose data has moved, a recipe, and class folders."""
    folder = tmp_path_factory.mktemp("before")
    make_dataset(folder / "data" / "a" / "train", n=32)
    data = {"validation": "data/gone/test"}
    make_run(folder / "runs" / "small", small_recipe(train=str(folder / "data" / "a" / "train"), data=data))
    (folder / "small.yaml").write_text(SMALL)
    (folder / "classes" / "dog").mkdir(parents=True)
    return folder


@pytest.mark.slow
def test_mistakes_are_told_before_torch_is_loaded(place: Path) -> None:
    program = [sys.executable, "-c", COMMANDS, str(Path(__file__).parent)]
    lines = "".join(json.dumps(arguments) + "\n" for arguments, _, _ in EARLY)
    done = subprocess.run(program, cwd=place, input=lines, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    for (arguments, code, message), (returned, said, has_torch) in zip(EARLY, found, strict=True):
        assert (returned, has_torch) == (code, False), (arguments, said)
        assert message is None or said == f"error: {message.replace('HERE', str(place))}", arguments
    assert sorted(path.name for path in place.iterdir()) == ["classes", "data", "runs", "small.yaml"]


def test_data_named_in_two_spellings_is_one_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path, {"c/cat/0.png": picture(0), "c/dog/0.png": picture(1)})
    (tmp_path / "link").symlink_to("c")
    wanted = find_wanted(["folder:c", "folder:./c", f"folder:{tmp_path}/c", "folder:link", "folder:d"], root=None)
    assert [*wanted.found] == ["folder:c"]
    assert [*wanted.failures] == ["folder:d"]


def test_data_that_mostly_cannot_be_read_leaves_the_other_data_standing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    heic = {f"bad/{name}/{i}.heic": "" for name in ("cat", "dog") for i in range(3)}
    write_files(tmp_path, heic | {f"{name}/0.png": picture(0) for name in ("bad/cat", "bad/dog", "c/cat", "c/dog")})
    wanted = find_wanted(["folder:bad", "folder:c"], root=None)
    assert [*wanted.found] == ["folder:c"]
    assert str(wanted.failures["folder:bad"]).startswith("folder:bad: 6 of 8 pictures cannot be used: 6 .heic files")


@pytest.mark.parametrize(
    ("variable", "is_there"), [(None, False), ("cxx", True), ("cxx -pipe", True), ("gone", False), ("", False)]
)
def test_compiling_needs_a_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str | None, is_there: bool
) -> None:
    (tmp_path / "cxx").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    if variable is not None:
        monkeypatch.setenv("CXX", variable)
    recipe = small_recipe()
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"compile": True, "device": "cpu"})})
    [check] = [check for check in torch_build() if check.name == "compiler"]
    if is_there:
        assert training_device(recipe).type == "cpu"
        assert (check.status, check.found) == ("ok", f"{tmp_path}/cxx, for train.compile")
        return
    with pytest.raises(UsageError) as error:
        training_device(recipe)
    command = variable or "g++"
    assert str(error.value) == (f"train.compile: needs a C++ compiler, {command}; apt install g++, or set it to false")
    assert (check.status, check.found) == ("warn", f"no C++ compiler, {command}, for train.compile")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "file"),
    [
        (["eval-zeroshot", "--dataset", "folder:classes"], "folder_classes-step_0000008-recipe_rate-*.json"),
        (
            ["merge-sweep", "--rates", "0.5", "--dataset", "folder:classes", "--rounds", "5", "--pictures", "0"],
            "merge_sweep_step_0000008.json",
        ),
        (["profile", "--rounds", "5", "--batch-size", "2"], "profile_step_0000008.json"),
    ],
)
def test_what_was_measured_is_printed_where_it_cannot_be_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], file: str
) -> None:
    write_files(tmp_path, {f"classes/{name}/0.png": picture(i) for i, name in enumerate(("cat", "dog"))})
    make_run(tmp_path / "runs" / "small", small_recipe())

    def write_json(path: Path, value: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(result_files, "write_json", write_json)
    done = mlip(*command, "--device", "cpu", "--json", folder=tmp_path)
    assert done.returncode == 1
    assert json.loads(done.stdout)
    last = done.stderr.splitlines()[-1]
    place = Path(last.removeprefix("error: ").partition(": ")[0])
    assert place.match(f"runs/small/evals/{file}")
    assert last.endswith(": Permission denied; what was measured is printed, but not stored")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"XDG_CACHE_HOME": "~/c"}, None),
        ({"HOME": "/"}, None),
        ({}, "this account has no home folder for a cache; set it, or $XDG_CACHE_HOME, to a folder"),
    ],
)
def test_the_cache_of_an_account(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str | None
) -> None:
    from mlip_cli.data.cache import ShardCache
    from mlip_cli.recipe.config import Cache

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    if "XDG_CACHE_HOME" in variables:
        monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if message is None:
        place = tmp_path / "c" / "mlip" if "XDG_CACHE_HOME" in variables else Path("/.cache/mlip")
        assert ShardCache.of(Cache()).folder == place
        return
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 7)  # no line in /etc/passwd
    with pytest.raises(UsageError) as error:
        ShardCache.of(Cache())
    assert str(error.value) == f"data.cache.folder: {message}"


@pytest.mark.parametrize(
    ("variable", "launcher"), [("SLURM_STEP_NUM_TASKS", "srun"), ("OMPI_COMM_WORLD_SIZE", "mpirun")]
)
def test_processes_of_a_launcher_that_do_not_know_each_other_are_refused(variable: str, launcher: str) -> None:
    """Each would train alone, into a folder of its own."""
    refused = mlip("pretrain", "recipes/smoke.yaml", "--dry-run", **{variable: "8"})
    assert refused.returncode == 2
    assert refused.stderr.startswith(
        f"error: {launcher} started 8 processes ({variable}), and each of them would train"
    )
    assert "torchrun --nproc-per-node GPUS -m mlip_cli pretrain RECIPE" in refused.stderr
    alone = mlip("pretrain", "nope.yaml", **{variable: "1"})
    of_torchrun = mlip("pretrain", "nope.yaml", RANK="0", **{variable: "8"})
    for read_on in (alone, of_torchrun):
        assert "nope.yaml" in read_on.stderr
