"""`make gpu`, rehearsed on a CPU: no row has a plain mistake, and the check comes to its end whatever a row does."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import pytest
from gpu.__main__ import NOTHING_RUN, all_rows, check, main, report
from gpu.rows import REHEARSAL, Found, Row, Scale

ROOT = Path(__file__).parents[1]
VERSIONS = {"gpu", "driver", "torch", "cuda", "mlip"}


def fine(scale: Scale) -> Found:
    return Found(
        "all fine", statements={"it is": True}, figures={"sizes": [scale.batch_size]}, lines=[{"what": "a", "s": 1.5}]
    )


def wrong(scale: Scale) -> Found:
    return Found("2 s", statements={"it takes a second": False, "it runs": True})


def raising(scale: Scale) -> Found:
    raise ValueError("no such thing\nand more about it")


def ending(scale: Scale) -> Found:
    print("the last words", flush=True)
    os._exit(7)


def endless(scale: Scale) -> Found:
    return Found("no number", figures={"speed": float("nan")})


def sleeping(scale: Scale) -> Found:
    time.sleep(600)
    raise AssertionError


def warning(scale: Scale) -> Found:
    warnings.warn("a surprise", stacklevel=1)
    return fine(scale)


def interrupting(number: int, scale: Scale) -> Found:
    os.kill(number, signal.SIGINT)
    return sleeping(scale)


def test_ctrl_c_keeps_the_rows_that_ended(caplog: pytest.LogCaptureFixture) -> None:
    rows = [Row("a", "", fine, 0), Row("b", "", partial(interrupting, os.getpid()), 0), Row("c", "", fine, 0)]
    with caplog.at_level("INFO", logger="mlip_cli"):
        assert [outcome.name for outcome in check(rows, REHEARSAL, budget_s=240)] == ["a"]
    assert caplog.messages[-1] == "gpu: interrupted; 1 row ended before"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_row_runs_on_a_cpu_at_tiny_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "PYTORCH_NVML_BASED_CUDA_CHECK"):  # the check sets them, and they are put back
        monkeypatch.setenv(name, "")
    out = tmp_path / "gpu.json"
    assert main(["--rehearse", "--out", str(out)]) == 0, capsys.readouterr()
    value = json.loads(out.read_text())
    assert value.keys() == {*VERSIONS, "is_rehearsal", "seconds", "rows"}
    assert value["is_rehearsal"]
    printed = capsys.readouterr().out
    rows = {row.name: row for row in all_rows()}
    assert [own["name"] for own in value["rows"]] == list(rows)
    for own in value["rows"]:
        row = rows[own["name"]]
        assert (own["error"], own["not_run"]) == (None, None)
        assert own["expected"] == row.expected
        assert own["found"]["words"]
        assert own["not_rehearsed"] == row.only_on_cuda
        assert own["as_expected"] is (True if own["found"]["statements"] else None)
        assert own["seconds"] > 0
        assert f"\n{row.name}  " in printed
        assert own["found"]["words"] in printed


@pytest.mark.slow
def test_a_row_that_fails_ends_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    functions = (raising, ending, endless, wrong, warning, fine)
    rows = [Row(own.__name__, "that it is fine", own, 0, is_quiet=own is warning) for own in functions]
    outcomes, out = check(rows, REHEARSAL, budget_s=240), tmp_path / "gpu.json"
    assert [own.is_well for own in outcomes] == [False, False, False, False, False, True]
    errors = [own.error for own in outcomes]
    line = next(i for i, text in enumerate(Path(__file__).read_text().splitlines(), 1) if "raise ValueError" in text)
    assert errors[0] == f"ValueError: no such thing (test_gpu_check.py:{line})"
    assert errors[1] == "its process ended with code 7: the last words"
    assert errors[2] is not None
    assert errors[2].startswith("ValueError: Out of range float values")
    assert errors[3:] == [None, None, None]
    assert [own.as_expected for own in outcomes] == [None, None, None, False, False, True]
    report(outcomes, REHEARSAL, out, seconds=1)
    written = [own["found"] for own in json.loads(out.read_text())["rows"]]
    assert written[5]["figures"] == {"sizes": [REHEARSAL.batch_size]}
    assert written[4]["statements"] == {"it is": True, "nobody warned": False}
    assert any("UserWarning: a surprise" in text for text in written[4]["figures"]["warnings"])
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    cells = {line[0]: [cell.strip() for cell in line[1:] if cell.strip()] for line in lines}
    assert cells["wrong"][1:3] == ["2 s; not so: it takes a second", "no"]
    assert cells["raising"][1:3] == [f"failed: {errors[0]}", "no"]
    assert cells["fine"][1:3] == ["all fine", "yes"]


@pytest.mark.slow
def test_what_there_is_no_time_for_is_named() -> None:
    long, following = check([Row("a", "", sleeping, 0), Row("b", "", fine, 0)], REHEARSAL, budget_s=3)
    assert long.not_run is not None
    assert long.not_run.startswith("out of time: stopped after ")
    assert (following.not_run, following.seconds) == ("out of time", 0)
    assert [own.is_well for own in (long, following)] == [True, True]


@pytest.mark.slow
def test_what_the_rows_usually_take_is_within_the_budget() -> None:
    assert sum(row.usual_s for row in all_rows()) <= 480
    assert len({row.name for row in all_rows()}) == len(all_rows())


@pytest.mark.slow
def test_without_cuda_a_line_says_that_nothing_was_run(tmp_path: Path) -> None:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "gpu"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr.splitlines()) == (0, "", [NOTHING_RUN])
    assert list(tmp_path.iterdir()) == []
