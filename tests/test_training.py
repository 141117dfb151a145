"""`mlip pretrain` as a user runs it: real processes, kill -9, two ranks, full disks."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from forks_for_tests import mlip
from killed_for_tests import Forked
from killed_for_tests import pretrain as run_pretrain
from models_for_tests import small_recipe
from safetensors.torch import save_file
from shards_for_tests import make_dataset
from waits_for_tests import wait_until

from mlip_cli.commands.pretrain import pretrain
from mlip_cli.errors import RunError, UsageError
from mlip_cli.recipe.load import recipe_yaml
from mlip_cli.runs.checkpoint import load_state, load_weights

CHANGES_FROM_RUN_TO_RUN = {"images_per_s", "data_wait_share", "peak_gib"}
QUIET = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small MLIP recipe on a data set of 40 pictures, 5 steps an epoch."""
    folder = tmp_path_factory.mktemp("training")
    data = make_dataset(folder / "train", n=40)
    made = small_recipe(
        train=str(data),
        data={"num_workers": 1, "validation": str(data)},
        log={"every_steps": 1},
        evaluate={"every_steps": 4},
    )
    made = made.model_copy(update={"train": made.train.model_copy(update={"steps": 12})})
    (folder / "small.yaml").write_text(recipe_yaml(made))
    return folder / "small.yaml"


def command(recipe: Path | str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "mlip_cli", "pretrain", str(recipe), *arguments]


def run(recipe: Path | str, *arguments: str, ranks: int = 1, cwd: Path | None = None) -> CompletedProcess[str]:
    """To its end; with several ranks what all of them said is in stderr."""
    if ranks == 1:
        return mlip(["pretrain", str(recipe), *arguments], environment=QUIET, folder=cwd)
    with (
        tempfile.TemporaryDirectory() as folder,
        Forked([str(recipe), *arguments], Path(folder, "words"), ranks) as training,
    ):
        codes = training.join()
        return CompletedProcess(arguments, max(codes, key=abs), "", training.said())


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CHANGES_FROM_RUN_TO_RUN} for line in lines]


def assert_alike(lines: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Two trainings on different numbers of ranks: the sums round differently in the last bit, and AdamW makes the
    difference grow from step to step. So the first half must agree ten times as closely, and the norm of the gradient,
    which grows apart first, in that half alone."""
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    for mine, other in zip(lines, expected, strict=True):
        is_early = mine["step"] <= expected[-1]["step"] // 2
        for name, value in other.items():
            if is_early or name != "grad_norm":
                rel = 2e-4 if is_early else 2e-3
                assert mine[name] == pytest.approx(value, rel=rel, abs=1e-4), (name, mine["step"])


@pytest.fixture(scope="module")
def whole(recipe: Path) -> Path:
    """A run that was never stopped."""
    folder = recipe.parent / "whole"
    done = run(recipe, "--out", str(folder), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["step"] == 12
    return folder


def lines_in(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.slow
def test_a_run_leaves_all_that_later_commands_need(whole: Path) -> None:
    stamp = json.loads((whole / "run.json").read_text())
    assert stamp["end_reason"] == "finished"
    assert stamp["sessions"][0]["command"].startswith("mlip pretrain")
    assert stamp["sessions"][0]["cpu_s"] > 0.5
    assert stamp["versions"]["torch"] == torch.__version__
    lines = metrics(whole)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8, 9, 10, 11, 12, 12]
    terms = ("spatial_global", "spatial_token", "frequency_global", "frequency_token")
    scales = {f"scale/{term}" for term in terms}
    counts = {"step", "samples_seen", "skipped_steps", "bad_samples"}
    assert lines[0].keys() == {"loss", *terms, "lr", "grad_norm", *scales, *counts}
    recalls = {f"validation_{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)}
    beside = {"validation_in_batch_acc1", "validation_modality_gap"}
    assert lines[4].keys() == {"step", "samples_seen", *recalls, *beside}
    assert lines[-2]["loss"] < lines[0]["loss"]
    checkpoint = whole / "checkpoints" / "step_0000012"
    state = load_state(checkpoint)
    counts = {"step": 12, "skipped_steps": 0, "bad_samples": 0, "measured_step": 12}
    assert state["progress"] == counts | {"best": [], "best_metric": None, "micro_batch_size": None}
    assert not [name for name in load_weights(checkpoint) if name.startswith("module.")]
    assert "finished" not in (whole / "log.txt").read_text()
    assert "step 12/12" in (whole / "log.txt").read_text()


@pytest.mark.slow
def test_a_finished_run_says_so_without_torch_and_an_existing_folder_is_refused(recipe: Path, whole: Path) -> None:
    before = (whole / "metrics.jsonl").read_bytes()
    done = run(recipe, "--out", str(whole), "--resume")
    assert done.returncode == 0
    assert "finished already; nothing to do" in done.stderr
    probe = (
        "import sys; sys.argv=['mlip','pretrain',*sys.argv[1:]]\nfrom mlip_cli.cli import main\n"
        "try: main()\nfinally: print('torch' in sys.modules)"
    )
    quick = [sys.executable, "-c", probe, str(recipe), "--out", str(whole), "--resume"]
    assert subprocess.run(quick, text=True, capture_output=True, check=True).stdout.splitlines()[-1] == "False"
    refused = run(recipe, "--out", str(whole))
    assert refused.returncode == 2
    assert refused.stderr.strip() == (
        f"error: --out {whole}: exists already; add --resume to go on with it, or name another folder"
    )
    assert (whole / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_resume_after_kill_9_gives_the_same_losses_to_the_bit(recipe: Path, whole: Path, tmp_path: Path) -> None:
    """As from the shell; at other moments, on more ranks and in bf16: test_killed.py."""
    folder = tmp_path / "run"
    arguments = ["--out", str(folder), "train.checkpoint_every.steps=2"]
    process = subprocess.Popen(command(recipe, *arguments), env=QUIET, text=True, stderr=subprocess.PIPE)
    wait_until(lambda: lines_in(folder) >= 6, process)
    process.kill()
    process.wait()
    process.stderr.close()  # type: ignore[union-attr]
    assert lines_in(folder) < 15
    resumed = run(recipe, *arguments, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert re.search(r"^step 12: checkpoint: saved in \d+\.\d s$", resumed.stderr, re.MULTILINE)
    assert metrics(folder) == metrics(whole)
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == [f"step_00000{n}" for n in ("08", "10", "12")]
    ours, theirs = (load_weights(f / "checkpoints" / "step_0000012") for f in (folder, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_two_ranks_train_as_one(recipe: Path, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "two"
    done = run(recipe, "--out", str(folder), ranks=2)
    assert done.returncode == 0, done.stderr
    assert_alike(metrics(folder), metrics(whole))


@pytest.mark.slow
def test_a_run_that_another_process_continues_is_not_touched(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = ["train.steps=2000", "train.checkpoint_every.steps=1", "evaluate.every_steps=null"]
    with Forked([str(recipe), "--out", str(folder), *arguments], tmp_path / "words") as training:
        wait_until(lambda: lines_in(folder) >= 2, what=training.said())
        second = run(recipe, "--out", str(folder), *arguments, "--resume")
        os.kill(training.processes[0].pid, signal.SIGINT)
        assert training.join() == [130], training.said()
    assert second.returncode == 2, second.stderr
    assert second.stderr.splitlines()[-1] == (
        f"error: {folder}: another mlip pretrain is running here; wait for it, or name another --out"
    )
    steps = [line["step"] for line in metrics(folder)]
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 143)])
def test_a_signal_saves_and_the_run_continues(
    recipe: Path, whole: Path, tmp_path: Path, number: int, code: int
) -> None:
    folder = tmp_path / "run"
    with Forked([str(recipe), "--out", str(folder)], tmp_path / "words") as training:
        wait_until(lambda: lines_in(folder) >= 2, what=training.said())
        os.kill(training.processes[0].pid, number)
        assert training.join() == [code], training.said()
        words = training.said()
    step = metrics(folder)[-1]["step"]
    assert words.splitlines()[-2:] == [
        f"stopped after step {step} of 12, saved in {folder}; go on with:",
        f"mlip pretrain {recipe} --out {folder} --resume",
    ]
    assert "error" not in words
    assert json.loads((folder / "run.json").read_text())["end_reason"] == f"stopped after step {step} of 12"
    assert [p.name for p in (folder / "checkpoints").iterdir()] == [f"step_{step:07d}"]
    if number == signal.SIGINT:
        resumed = run(recipe, "--out", str(folder), "--resume")
        assert resumed.returncode == 0, resumed.stderr
        assert metrics(folder) == metrics(whole)


def disturbed(step: int, error: str | None, arguments: Sequence[str], environment: dict[str, str], words: str) -> None:
    """Body of a forked process: a training whose evaluation after `step` fails with `error`, or meets SIGTERM."""
    from mlip_cli.commands import training

    measure = training.measure

    def measured(*given: Any, **named: Any) -> dict[str, float] | None:
        if given[3] == step and error is not None:
            raise RunError(error)
        if given[3] == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return measure(*given, **named)

    training.measure = measured
    run_pretrain(arguments, environment, words)


def run_disturbed(recipe: Path, folder: Path, *overrides: str, step: int, error: str | None = None) -> tuple[int, str]:
    """Exit code and words of a training with a disturbed evaluation."""
    words = folder.with_name("words")
    arguments = [str(recipe), *overrides, "--out", str(folder)]
    with Forked(arguments, words, body=partial(disturbed, step, error)) as training:
        return training.join()[0], training.said()


@pytest.mark.slow
@pytest.mark.parametrize("step", [4, 12])
def test_a_signal_in_an_evaluation_saves_and_the_model_is_measured_on_resume(
    recipe: Path, whole: Path, tmp_path: Path, step: int
) -> None:
    folder = tmp_path / "run"
    code, said = run_disturbed(recipe, folder, step=step)
    assert code == 143, said
    assert metrics(folder) == metrics(whole)[: {4: 4, 12: 14}[step]]
    resumed = run(recipe, "--out", str(folder), "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert metrics(folder) == metrics(whole)
    assert load_state(folder / "checkpoints" / "step_0000012")["progress"]["measured_step"] == 12


@pytest.mark.slow
def test_a_failed_evaluation_ends_the_run_after_its_step_is_saved(recipe: Path, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code, said = run_disturbed(recipe, folder, step=4, error="it did not fit")
    assert code == 1
    assert said.splitlines()[-1] == "error: it did not fit"
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step_0000004"]
    resumed = run(recipe, "--out", str(folder), "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert metrics(folder) == metrics(whole)


def test_another_recipe_or_other_data_is_refused_on_resume(recipe: Path, whole: Path, tmp_path: Path) -> None:
    changed = run(recipe, "--out", str(whole), "--resume", "optim.lr=2e-3")
    assert changed.returncode == 2
    assert changed.stderr.strip() == (
        f"error: --resume {whole}: the recipe differs from the one this run began with (optim.lr: 0.001 -> 0.002); "
        "undo the change, or start a new run with another --out"
    )
    permitted = run(recipe, "--out", str(whole), "--resume", "log.every_steps=2", "train.keep.last=1")
    assert permitted.returncode == 0, permitted.stderr


@pytest.mark.slow
def test_a_run_goes_on_where_its_data_lies_now(recipe: Path, whole: Path, tmp_path: Path) -> None:
    folder, data = tmp_path / "run", tmp_path / "job1"
    shutil.copytree(recipe.parent / "train", data)
    run_disturbed(recipe, folder, f"data.train={data}", f"data.validation={data}", step=4)
    moved = data.rename(tmp_path / "job2")
    again = ["--out", str(folder), "--resume", f"data.train={moved}", f"data.validation={moved}"]
    resumed = run(recipe, *again)
    assert resumed.returncode == 0, resumed.stderr
    assert f"data.train: the same data lies elsewhere now: {data} -> {moved}\n" in resumed.stderr
    assert metrics(folder) == metrics(whole)
    assert (folder / "recipe.yaml").read_text().count(str(moved)) == 2
    assert list(json.loads((folder / "run.json").read_text())["data"]) == [str(moved)]


@pytest.mark.slow
def test_a_state_that_is_not_that_of_a_training_is_refused(recipe: Path, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    (folder / "run.json").unlink()
    checkpoint = folder / "checkpoints" / "step_0000012"
    whole_state = load_state(checkpoint)
    weights = load_weights(checkpoint)
    without = {name: weights[name] for name in list(weights)[1:]}
    for state, kept, message in (
        ([1], weights, "state.pt: not a state (list)"),
        ({"progress": {}}, weights, "state.pt: not the state of a training (no data, environment, optimizer, random,"),
        (whole_state, without, "model.safetensors: weights of another model"),
    ):
        torch.save(state, checkpoint / "state.pt")
        save_file(kept, checkpoint / "model.safetensors")
        done = run(recipe, "--out", str(folder), "--resume")
        assert done.returncode == 2, done.stderr
        assert f"error: {checkpoint}/{message}" in done.stderr
        assert f"; remove {checkpoint}, and mlip takes the checkpoint before it" in done.stderr


@pytest.mark.slow
def test_resume_without_out_takes_the_newest_unfinished_run_or_starts_one(recipe: Path, tmp_path: Path) -> None:
    first = run(recipe, "--resume", "train.steps=3", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert first.stderr.splitlines()[0] == "--resume: no unfinished run of this recipe in runs/; a new run starts"
    (folder,) = (p for p in (tmp_path / "runs").iterdir() if p.is_dir())
    assert folder.name.startswith("small-2")
    stamp = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(stamp | {"end_reason": "interrupted"}))
    second = run(recipe, "--resume", "train.steps=3", cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    assert "resuming runs/" in second.stderr
    assert "a new run starts" not in second.stderr
    assert json.loads((folder / "run.json").read_text())["end_reason"] == "finished"
    third = run(recipe, "--resume", "train.steps=3", "optim.lr=2e-3", cwd=tmp_path)
    assert third.returncode == 0, third.stderr
    assert len([p for p in (tmp_path / "runs").iterdir() if p.is_dir()]) == 2


@pytest.mark.slow
def test_resume_without_out_skips_a_run_of_another_version(recipe: Path, tmp_path: Path) -> None:
    old = tmp_path / "runs" / "old-20200101-000000"
    checkpoint = old / "checkpoints" / "step_0000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.pt").touch()
    (old / "recipe.yaml").write_text("old_key: 1\n")
    done = run(recipe, "--resume", "train.steps=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first, second = done.stderr.splitlines()[:2]
    assert first.startswith("skipping runs/old-20200101-000000: its recipe does not load with this version: runs/old-")
    assert second == "--resume: no unfinished run of this recipe in runs/; a new run starts"


def saved_meanwhile(arguments: Sequence[str], environment: dict[str, str], words: str) -> None:
    """Body of a forked process: a training that reads its checkpoint while another one is saved."""
    from mlip_cli.commands import training

    restore = training.restore

    def restored(checkpoint: Path, *given: Any, **named: Any) -> Any:
        shutil.copytree(checkpoint, checkpoint.with_name("step_0000009"))
        return restore(checkpoint, *given, **named)

    training.restore = restored
    run_pretrain(arguments, environment, words)


@pytest.mark.slow
def test_a_checkpoint_that_another_process_saves_meanwhile_is_never_undone(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run_disturbed(recipe, folder, step=4)
    before = (folder / "metrics.jsonl").read_bytes()
    arguments = [str(recipe), "--out", str(folder), "--resume"]
    with Forked(arguments, tmp_path / "late", body=saved_meanwhile) as training:
        assert training.join() == [2], training.said()
        expected = f"error: {folder}/checkpoints/step_0000009: another process saved it just now; start again with"
        assert training.said().splitlines()[-1] == f"{expected} --resume"
    assert (folder / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_init_starts_a_new_run_from_weights(recipe: Path, whole: Path, tmp_path: Path) -> None:
    frozen = ("model.freeze=text", "optim.layer_decay=0.5")
    fresh = run(recipe, "--out", str(tmp_path / "new"), f"model.init={whole}", "train.steps=2", *frozen, ranks=2)
    assert fresh.returncode == 0, fresh.stderr
    assert f"model.init: weights of {whole}/checkpoints/step_0000012" in (tmp_path / "new" / "log.txt").read_text()
    assert "of them train (model.freeze: text); 2 steps" in fresh.stderr
    assert metrics(tmp_path / "new")[0]["spatial_global"] < metrics(whole)[0]["spatial_global"]
    before = load_weights(whole / "checkpoints" / "step_0000012")
    after = load_weights(tmp_path / "new" / "checkpoints" / "step_0000002")
    unchanged = {name for name in before if torch.equal(before[name], after[name])}
    assert unchanged == {name for name in before if name.startswith(("text.", "text_projection."))}
    other = run(recipe, "--out", str(tmp_path / "other"), f"model.init={whole}", "model.embed_dim=24", "train.steps=1")
    assert other.returncode == 2
    assert "does not fit the recipe: model.embed_dim 24 (there 16)" in other.stderr
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_micro_batches_train_alike(recipe: Path, whole: Path, tmp_path: Path) -> None:
    done = run(recipe, "--out", str(tmp_path / "run"), "train.micro_batch_size=3", "train.steps=2")
    assert done.returncode == 0, done.stderr
    for mine, other in zip(metrics(tmp_path / "run")[:2], metrics(whole), strict=False):
        assert mine["spatial_global"] == pytest.approx(other["spatial_global"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_other_precisions_train(recipe: Path, tmp_path: Path, precision: str) -> None:
    done = run(
        recipe, "--out", str(tmp_path / "run"), f"train.precision={precision}", "train.device=cpu", "train.steps=3"
    )
    if precision == "fp16":
        assert done.returncode == 2
        assert "fp16 needs train.device cuda, not cpu" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert all(line["skipped_steps"] == 0 for line in metrics(tmp_path / "run") if "skipped_steps" in line)


def on_small_files(arguments: Sequence[str], environment: dict[str, str], words: str) -> None:
    """Body of a forked process: a training that cannot write files of more than 64 KiB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
    run_pretrain(arguments, environment, words)


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_one_line_and_keeps_the_last_checkpoint(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert run(recipe, "--out", str(folder), "train.checkpoint_every.steps=2", "train.steps=4").returncode == 0
    stamp = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(stamp | {"end_reason": None}))
    state = (folder / "checkpoints" / "step_0000004" / "state.pt").read_bytes()
    os.rename(folder / "checkpoints" / "step_0000004", tmp_path / "kept")

    again = [str(recipe), "--out", str(folder), "--resume", "train.checkpoint_every.steps=2", "train.steps=4"]
    with Forked(again, tmp_path / "words", body=on_small_files) as training:
        assert training.join() == [1], training.said()
        said = training.said()
    assert said.splitlines()[-1] == (
        f"error: {folder}/checkpoints/step_0000004: File too large; make room and go on with --resume"
    )
    assert "Traceback" not in said
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step_0000002"]
    assert (
        run(recipe, "--out", str(folder), "--resume", "train.checkpoint_every.steps=2", "train.steps=4").returncode == 0
    )
    assert len((folder / "checkpoints" / "step_0000004" / "state.pt").read_bytes()) == pytest.approx(
        len(state), rel=0.01
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["data.train=/nowhere"],
            "/nowhere: no such folder; make it with: mlip prepare-data SOURCE /nowhere, and",
        ),
        (
            ["train.global_batch_size=64"],
            "train.global_batch_size: 64 is more than the 40 samples of data.train; use 40 or less",
        ),
        (["model.merging.rate=0.9"], "command line: model.merging.rate=0.9: merge rate 0.9: the merge before block 2"),
        (["model.init=/nowhere"], "/nowhere: no such run or checkpoint"),
        (["evaluate.zeroshot=[openmojo]"], "openmojo"),
    ],
)
def test_mistakes_show_before_anything_is_written(
    recipe: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    done = run(recipe, "--out", str(tmp_path / "run"), *arguments)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_batch_that_does_not_divide_by_the_ranks_is_refused(recipe: Path, tmp_path: Path) -> None:
    done = run(recipe, "--out", str(tmp_path / "run"), "train.global_batch_size=7", ranks=2)
    assert done.returncode != 0
    assert "error: train.global_batch_size: 7 does not divide by 2 ranks; use 6 or 8" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_not_a_checkpoint_is_refused(recipe: Path, whole: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken" / "checkpoints" / "step_0000001"
    broken.mkdir(parents=True)
    (tmp_path / "broken" / "recipe.yaml").write_bytes((whole / "recipe.yaml").read_bytes())
    (broken / "state.pt").write_bytes(b"not a checkpoint")
    (broken / "model.safetensors").write_bytes(b"not weights")
    done = run(recipe, "--out", str(tmp_path / "broken"), "--resume")
    assert done.returncode == 2
    assert f"error: {broken}/state.pt: not a whole checkpoint" in done.stderr
    start = run(recipe, "--out", str(tmp_path / "new"), f"model.init={tmp_path / 'broken'}")
    assert start.returncode == 2
    assert f"error: {broken}/model.safetensors: not a whole safetensors file" in start.stderr


@pytest.mark.slow
def test_dry_run_shows_every_value_with_its_origin_and_what_follows(recipe: Path, tmp_path: Path) -> None:
    done = run(recipe, "--dry-run", "optim.lr=2e-3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "lr: 0.002" in done.stdout
    assert "# command line" in done.stdout
    assert "merging (guided): patch tokens per block 16 11 8 8, true rate 0.500" in done.stdout
    assert "40 samples / 8 = 5 steps an epoch" in done.stdout
    missing = run("cc12m", "--dry-run", cwd=tmp_path)
    assert missing.returncode == 2, missing.stderr
    assert missing.stderr.splitlines()[-1] == "error: --dry-run: 2 data sets missing, see above: no training yet"
    cure = "make it with: mlip prepare-data cc12m.tsv data/cc12m --preset cc12m"
    assert f"missing: data/cc12m/train: no such folder; {cure}" in missing.stdout
    facts = json.loads(run(recipe, "--dry-run", "--json", "optim.warmup_steps=12", cwd=tmp_path).stdout)
    assert facts["patch_tokens_per_block"] == [16, 11, 8, 8]
    assert facts["steps"] == 12
    assert facts["missing"] == []
    assert facts["cautions"] == [
        "optim.warmup_steps 12 is not below the 12 steps of the run: the learning rate only rises; lower it"
    ]
    unknown = run(recipe, "--dry-run", "evaluate.zeroshot=[openmojo,digits]", cwd=tmp_path)
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert unknown.stderr == "error: unknown data set 'openmojo'; did you mean openmoji?\n"
    too_large = run(recipe, "--dry-run", "train.global_batch_size=99", cwd=tmp_path)
    assert (too_large.returncode, too_large.stdout) == (2, "")
    assert too_large.stderr.startswith("error: train.global_batch_size: 99 is more than the 40 samples of data.train")
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_refuses_what_the_start_would(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").touch()

    def refused(*overrides: str, out: str | None = None, resume: bool = False) -> str:
        with pytest.raises(UsageError) as error:
            pretrain(str(recipe), [*overrides], out=out and Path(out), resume=resume, dry_run=True, as_json=True)
        return str(error.value)

    assert refused("model.init=runs/gone").startswith("runs/gone: no such run or checkpoint")
    assert refused(out="taken").startswith("--out taken: exists already; add --resume")
    assert refused(out="taken", resume=True).startswith("--out taken: not a run folder")
    assert refused(out="file/run") == f"--out file/run: {tmp_path}/file is a file; name another folder"
    monkeypatch.setattr(tempfile, "mkdtemp", Mock(side_effect=PermissionError(13, "Permission denied")))
    words = f"--out new/run: nothing can be written in {tmp_path} (Permission denied); name another folder"
    assert refused(out="new/run") == words
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "taken"]
