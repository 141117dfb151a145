"""Training whose parameters are spread over the ranks (FSDP2), in real processes."""

import json
import os
import signal
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from forks_for_tests import own_group
from killed_for_tests import Forked, pretrain
from models_for_tests import small_batch, small_model, small_recipe
from test_gradients import gradients
from test_training import assert_alike, lines_in, metrics, recipe, run, whole
from waits_for_tests import wait_until

from mlip_cli.distributed import full_on_main, process_group, rank, wrap
from mlip_cli.losses.objective import Objective
from mlip_cli.model.clip import CLIP
from mlip_cli.recipe.config import Recipe
from mlip_cli.runs.checkpoint import load_state, load_weights
from mlip_cli.train.gradients import Precision, add_gradients

pytestmark = pytest.mark.slow

__all__ = ["recipe", "whole"]
SHARDED = ("train.parallel=fsdp", "train.checkpoint_every.steps=6")


@pytest.fixture(scope="module")
def sharded(recipe: Path) -> Path:
    """A run on two ranks that was never stopped."""
    folder = recipe.parent / "sharded"
    done = run(recipe, "--out", str(folder), *SHARDED, ranks=2)
    assert done.returncode == 0, done.stderr
    return folder


def stopped_after_6(run: Path, folder: Path) -> Path:
    """A copy of a run as it was after step 6."""
    (folder / "checkpoints").mkdir(parents=True)
    for name in ("recipe.yaml", "metrics.jsonl"):
        (folder / name).write_bytes((run / name).read_bytes())
    (folder / "run.json").write_text(json.dumps(json.loads((run / "run.json").read_text()) | {"end_reason": None}))
    os.symlink(run / "checkpoints" / "step_0000006", folder / "checkpoints" / "step_0000006")
    return folder


def test_sharded_ranks_train_as_one_process_and_save_whole_checkpoints(whole: Path, sharded: Path) -> None:
    assert_alike(metrics(sharded), metrics(whole))
    ours, theirs = (folder / "checkpoints" / "step_0000012" for folder in (sharded, whole))
    shapes = [{n: t.shape for n, t in load_weights(checkpoint).items()} for checkpoint in (ours, theirs)]
    assert shapes[0] == shapes[1]
    states = [load_state(checkpoint)["optimizer"]["state"] for checkpoint in (ours, theirs)]
    assert states[0].keys() == states[1].keys()
    for number, moments in states[1].items():
        assert {n: t.shape for n, t in states[0][number].items()} == {n: t.shape for n, t in moments.items()}


def test_a_sharded_run_continues_to_the_bit_and_on_one_rank(recipe: Path, sharded: Path, tmp_path: Path) -> None:
    again = stopped_after_6(sharded, tmp_path / "again")
    resumed = run(recipe, "--out", str(again), *SHARDED, "--resume", ranks=2)
    assert resumed.returncode == 0, resumed.stderr
    assert metrics(again) == metrics(sharded)
    ours, theirs = (load_weights(f / "checkpoints" / "step_0000012") for f in (again, sharded))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    alone = stopped_after_6(sharded, tmp_path / "alone")
    resumed = run(recipe, "--out", str(alone), "--resume", "train.checkpoint_every.steps=6")
    assert resumed.returncode == 0, resumed.stderr
    assert "ranks 2 -> 1, parallel fsdp -> none" in resumed.stderr
    assert metrics(alone)[-2]["loss"] == pytest.approx(metrics(sharded)[-2]["loss"], rel=2e-3)


def signalled(arguments: Sequence[str], environment: dict[str, str], words: str) -> None:
    """Body of a forked process: `mlip pretrain`, and SIGTERM to rank 0 in the evaluation after step 4."""
    os.environ.update(environment)
    from mlip_cli.commands import training

    measure = training.measure

    def measured(*given: Any, **named: Any) -> dict[str, float] | None:
        if given[3] == 4 and os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGTERM)
        return measure(*given, **named)

    training.measure = measured
    pretrain(arguments, environment, words)


def test_an_interrupted_evaluation_is_made_up_before_the_first_step(
    recipe: Path, sharded: Path, tmp_path: Path
) -> None:
    folder, words = tmp_path / "run", tmp_path / "words"
    arguments = [str(recipe), "--out", str(folder), *SHARDED]
    with Forked(arguments, words, ranks=2, body=signalled) as training:
        assert training.join() == [143, 143], training.said()
    assert "the evaluation was stopped before its end" in training.said()
    with Forked([*arguments, "--resume"], words, ranks=2) as training:
        assert training.join() == [0, 0], training.said()
    assert metrics(folder) == metrics(sharded)


def test_step_0_is_measured_before_the_first_gathered_block(recipe: Path, sharded: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = [str(recipe), "--out", str(folder), *SHARDED, "evaluate.at_start=true"]
    with Forked(arguments, tmp_path / "words", ranks=2) as training:
        assert training.join() == [0, 0], training.said()
    first, *others = metrics(folder)
    assert first["step"] == 0
    assert others == metrics(sharded)


def test_a_signal_to_one_rank_stops_all_after_the_same_step(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    long = ["train.parallel=fsdp", "train.steps=2000", "evaluate.every_steps=null"]
    with Forked([str(recipe), "--out", str(folder), *long], tmp_path / "words", ranks=2) as training:
        wait_until(lambda: lines_in(folder) >= 2, what=training.said())
        os.kill(training.processes[1].pid, signal.SIGTERM)
        assert training.join() == [143, 143], training.said()
        step = metrics(folder)[-1]["step"]
        assert f"stopped after step {step} of 2000, saved in {folder}" in training.said()
    assert [p.name for p in (folder / "checkpoints").iterdir()] == [f"step_{step:07d}"]


def norms_as_on_cuda(model: CLIP) -> None:
    """Autocast on CUDA normalises layers in fp32, also where input and weights are of two types."""

    def forward(norm: torch.nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
        weight, bias = norm.weight.float(), norm.bias.float()
        return torch.nn.functional.layer_norm(x.float(), norm.normalized_shape, weight, bias, norm.eps)

    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.forward = partial(forward, module)  # type: ignore[method-assign]


def in_two_types(recipes: Sequence[Recipe], environment: dict[str, str], out: str) -> None:
    """Body of one forked rank: a gradient with parameters gathered in fp32 and in bf16, and what the graph keeps."""
    own_group()
    os.environ.update(environment)
    torch.set_num_threads(1)
    [recipe], cpu, found = recipes, torch.device("cpu"), {}
    with process_group(cpu):
        for name, dtype in (("fp32", None), ("bf16", torch.bfloat16)):
            plain = small_model(recipe, dtype=torch.float32).train()
            norms_as_on_cuda(plain)
            shapes = {p.shape for block in plain.blocks() for p in block.parameters() if p.ndim == 2}
            model = wrap(plain, cpu, parallel="fsdp", units=plain.blocks(), dtype=dtype)
            kept: list[torch.Tensor] = []

            def keep(x: torch.Tensor, kept: list[torch.Tensor] = kept, shapes: Any = shapes) -> torch.Tensor:
                if x.ndim == 2 and {x.shape, x.T.shape} & shapes:
                    kept.append(x)
                return x

            batch = small_batch().split(4)[rank()]
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16):
                model(batch, plan=plain.training_plan)
            alive = sum(x.untyped_storage().nbytes() for x in kept)
            for micro in (None, 2):
                plain.zero_grad()
                add_gradients(
                    model, Objective(recipe.losses), batch,
                    precision=Precision(torch.bfloat16, torch.amp.GradScaler("cpu", enabled=False)),
                    micro_batch_size=micro, plan=plain.training_plan,
                )  # fmt: skip
                types = {p.dtype for p in plain.parameters()} | {p.grad.dtype for p in plain.parameters()}
                found[name, micro] = full_on_main(gradients(plain)), alive, types
        if rank() == 0:
            torch.save(found, out)


def test_blocks_gathered_in_bf16_keep_no_copies_and_give_the_same_gradient(tmp_path: Path) -> None:
    """Autocast keeps a copy of every matrix for the backward pass; a sharded parameter in that type is its own."""
    out = tmp_path / "found.pt"
    with Forked([small_recipe()], out, ranks=2, body=in_two_types) as forked:
        assert forked.join() == [0, 0], forked.said()
    found = torch.load(out, weights_only=False)
    expected, kept_before, _ = found["fp32", None]
    for micro in (None, 2):
        grads, kept, types = found["bf16", micro]
        assert types == {torch.float32}
        assert kept < 0.2 * kept_before
        for name, gradient in expected.items():
            assert (grads[name] - gradient).norm() <= 0.05 * gradient.norm() + 1e-6, name
