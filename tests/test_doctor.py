"""Every finding of the doctor, on this machine or on one made sick for the test."""

import importlib.metadata
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlip_cli.commands import doctor
from mlip_cli.commands.doctor import Check
from mlip_cli.errors import RunError

PROJECT = Path(__file__).parents[1]


def only_check(checks: Iterator[Check]) -> Check:
    (check,) = checks
    return check


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLIP_DATA", raising=False)
    return tmp_path


PROBE = """
import sys
sys.argv = ["mlip", "doctor", "--json"]
from mlip_cli.cli import main
try:
    main()
finally:
    print(*sys.modules, file=sys.stderr)
"""


@pytest.mark.slow
def test_a_healthy_machine_gets_a_json_document_and_only_what_is_checked_is_imported(folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, env=environment, timeout=120, check=True
    )
    words, modules = done.stderr.splitlines()
    assert words == "checking this machine; PyTorch takes some seconds to load"
    assert {"timm", "open_clip", "torchvision", "webdataset", "pyarrow", "sklearn", "matplotlib"}.isdisjoint(
        modules.split()
    )
    report = json.loads(done.stdout)
    assert report["ok"] is True
    names = [check["name"] for check in report["checks"]]
    assert {"Python", "packages", "torch", "devices", "bf16", "disk", "open files", "data", "recipes"} <= set(names)
    assert {check["status"] for check in report["checks"]} <= {"ok", "warn"}


def test_a_failure_is_printed_with_its_fix(folder: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    without_torch = [examine for examine in doctor.EXAMINATIONS if examine is not doctor.torch_build]
    monkeypatch.setattr(doctor, "EXAMINATIONS", without_torch)
    monkeypatch.setenv("MLIP_DATA", "nowhere/[bold]")
    with pytest.raises(RunError, match=r"^doctor: \$MLIP_DATA failed; see the fixes above$"):
        doctor.doctor(as_json=False)
    printed = capsys.readouterr().out
    assert "\nfail  $MLIP_DATA  nowhere/[bold]: no such folder\n" in printed
    assert printed.endswith("\nfail  $MLIP_DATA: set it to a folder\n")


def test_data_that_cannot_be_read_is_named(folder: Path) -> None:
    assert only_check(doctor.data()).fix == "mlip prepare-data openmoji data/openmoji makes the demo's data"
    (folder / "data/mine/train").mkdir(parents=True)
    assert only_check(doctor.data()) == Check("data", "ok", "data: readable, it holds no data set prepared by mlip")
    (folder / "data/mine/train/dataset.json").write_text("{}")
    check = only_check(doctor.data())
    assert check.status == "fail"
    assert check.found.startswith("data/mine/train/dataset.json: not written by mlip prepare-data")


def install(site: Path, name: str, version: str, *requirements: str) -> None:
    """A distribution's metadata, as pip leaves it."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    (info / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {r}" for r in requirements)]) + "\n")


def test_packages_that_are_missing_or_old_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "mlip-cli", "0.1.0", "numpy>=999", "no-such-package>=1", "rich", 'other>=9 ; extra == "demo"')
    monkeypatch.syspath_prepend(tmp_path)
    assert only_check(doctor.packages()) == Check(
        "packages",
        "fail",
        f"numpy {importlib.metadata.version('numpy')} is not >=999; no-such-package is missing",
        "pip install --upgrade 'numpy>=999' 'no-such-package>=1'",
    )


def test_torchvision_of_another_torch_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "mlip-cli", "0.1.0", "torchvision")
    install(tmp_path, "torchvision", "99.0", "torch==1.0.0")
    monkeypatch.syspath_prepend(tmp_path)
    check = only_check(doctor.packages())
    assert check.status == "fail"
    assert check.found.endswith("is not ==1.0.0")
    assert check.fix == "install torch and torchvision together, of the same release"


def test_a_tree_that_is_not_installed_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "DISTRIBUTION", "no-such-distribution")
    assert only_check(doctor.packages()).status == "warn"


def test_a_torch_that_does_not_start_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    check = only_check(doctor.torch_build())
    assert (check.name, check.status) == ("torch", "fail")
    assert check.found.startswith("does not start: ")


def test_an_old_python_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "OLDEST_PYTHON", (99, 0))
    assert only_check(doctor.python()).fix == "install Python 99.0 or newer"


def test_few_open_files_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"few": (300, 4096), "enough": (300, 8192), "any": (300, resource.RLIM_INFINITY)}
    found = {}
    for name, limit in limits.items():
        monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: limit)
        found[name] = only_check(doctor.open_files())
    assert found["few"] == Check(
        "open files",
        "warn",
        "at most 4,096 in a process, so 1,536 shards stay open",
        "ask the administrator for a hard limit of 8,192, if your data has more shards",
    )
    assert found["enough"] == Check("open files", "ok", "at most 8,192 in a process")
    assert found["any"] == Check("open files", "ok", "any number in a process")


@pytest.mark.parametrize(("low", "no", "status"), [(0, 0, "ok"), (1e9, 0, "warn"), (1e9, 1e9, "fail")])
def test_little_room_is_graded(folder: Path, monkeypatch, low: float, no: float, status: str) -> None:
    monkeypatch.setattr(doctor, "LOW_DISK_GIB", low)
    monkeypatch.setattr(doctor, "NO_DISK_GIB", no)
    assert only_check(doctor.disk()).status == status


def test_damaged_and_missing_recipes_are_failures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert only_check(doctor.recipes()).status == "ok"
    monkeypatch.setattr(doctor, "recipes_folder", lambda: tmp_path)
    (tmp_path / "openmoji.yaml").write_text("no: recipe\n")
    check = only_check(doctor.recipes())
    assert check.status == "fail"
    assert "no" in check.found
    monkeypatch.setattr(doctor, "recipe_names", list)
    assert only_check(doctor.recipes()).found == f"no recipe in {tmp_path}"
