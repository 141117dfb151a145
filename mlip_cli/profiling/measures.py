"""What `mlip profile` measures."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mlip_cli.data.dataset import ShardDataset
from mlip_cli.errors import RunError, UsageError
from mlip_cli.model.clip import CLIP
from mlip_cli.profiling import flops as costs
from mlip_cli.profiling.loader import LoaderCost, measure_loader
from mlip_cli.profiling.step import RepeatedStep, StepRecorder, breakdown, limit, step_parts
from mlip_cli.profiling.subject import Subject, pinned
from mlip_cli.profiling.timing import SquareMatmul, Timing, measure_interleaved, peak_memory, square_matmul
from mlip_cli.recipe.config import Recipe
from mlip_cli.recipe.merge_plan import MergePlan
from mlip_cli.terminal.output import say
from mlip_cli.terminal.panel import progress
from mlip_cli.train.gradients import Precision
from mlip_cli.train.setup import num_workers
from mlip_cli.types import Batch

STEP = "training step"
CLOCKED = "with clocks"


def counts(model: CLIP, num_tokens: int) -> dict[str, Any]:
    """What needs no clock: parameters, operations by part, tokens per block."""
    plan, unmerged = model.plan, model.merge_plan(0.0)
    parts, whole = costs.image_gflops(model, plan), costs.image_gflops(model, unmerged)
    return {
        "parameters": costs.parameters(model) | {"total": sum(p.numel() for p in model.parameters())},
        "merging": {"method": plan.method, "rate": plan.rate, "before_blocks": plan.at} if plan.at else None,
        "tokens_per_block": plan.tokens,
        "prefix_tokens": plan.num_prefix,
        "gflops": {
            "image_tower": sum(parts.values()),
            "image_tower_by_part": parts,
            "image_tower_unmerged": sum(whole.values()),
            "image_tower_unmerged_by_part": whole,
            "frequency_branch": costs.frequency_gflops(model),
            "token_heads": costs.token_head_gflops(model, plan, num_tokens),
            "text_tower": costs.text_gflops(model, num_tokens),
            "text_tower_at_context_length": costs.text_gflops(model, model.context_length),
        },
    }


def speeds_of_towers(subject: Subject, batch: Batch, rounds: int) -> list[dict[str, Any]]:
    """Seconds of the towers side by side, without gradients."""
    model = subject.model
    functions = {"image tower, rate 0": encode(subject, batch, model.merge_plan(0.0))}
    if model.plan.at:
        functions[f"image tower, rate {model.plan.rate:.2f}"] = encode(subject, batch, model.plan)
    functions["text tower"] = lambda: inference(subject, lambda: model.encode_text(batch.token_ids))
    timings = timed(functions, subject, rounds, "timing the towers")
    n = len(batch.images)
    return [speed(name, timing, n, is_image=name.startswith("image")) for name, timing in timings.items()]


def measures_of_step(subject: Subject, batch: Batch, rounds: int, datasets: Sequence[ShardDataset]) -> dict[str, Any]:
    """Seconds of the training step (whole, in pieces that run alone, by parts), its limit, operations and memory."""
    n = len(batch.images)
    loader = loader_cost(subject.recipe, datasets)
    subject.model.train()
    step = training_step(subject, batch)
    recorder = StepRecorder(step)
    step()  # the optimiser's state exists from then on
    memory = peak_memory(step, device=subject.device)  # before the matrices below lie there too
    dtypes: dict[str, torch.dtype] = {"fp32": torch.float32, subject.recipe.train.precision: step.precision.dtype}
    matmuls = {name: square_matmul(dtype, device=subject.device) for name, dtype in dtypes.items()}
    pieces, beside = timings_of_step(subject, step, batch, recorder, matmuls, rounds=rounds)
    subject.model.eval()
    whole = pieces[STEP]
    return {
        "speed": [speed(name, timing, n, is_image=False) for name, timing in pieces.items()],
        "micro_batch_size": step.micro_batch_size,
        "step_s": whole.median_s,
        "clocks_cost": extra_share(beside[CLOCKED], whole),
        **parts_and_limit(step, recorder, loader, step_s=whole.median_s, num_workers=num_workers(subject.recipe)),
        **utilisation(subject, matmuls, beside, step_s=whole.median_s, batch=batch),
        "peak_memory": {"what": f"training step of {n} pairs", **vars(memory)},
    }


def training_step(subject: Subject, batch: Batch) -> RepeatedStep:
    """The step on a batch, by the recipe's micro-batches where they are smaller."""
    step = RepeatedStep(subject.model, subject.recipe, pinned(batch, subject.device), subject.device)
    size = subject.recipe.train.given_micro_batch_size
    if size is not None and step.micro_batch_size is None:
        say(
            f"the recipe's micro-batches of {size} are no smaller than this batch of {len(batch.images)}: "
            "it is measured at once"
        )
    return step


def timings_of_step(
    subject: Subject,
    step: RepeatedStep,
    batch: Batch,
    recorder: StepRecorder,
    matmuls: Mapping[str, SquareMatmul],
    *,
    rounds: int,
) -> tuple[dict[str, Timing], dict[str, Timing]]:
    """The step's pieces and the step itself; what is timed in turn with them: the step with clocks, large products."""
    pieces: dict[str, Callable[[], object]] = {**step.parts_of_step(batch), STEP: step}  # they hold a gradient
    beside: dict[str, Callable[[], object]] = {
        CLOCKED: recorder,
        **{name: matmul.run for name, matmul in matmuls.items()},
    }
    timings = timed({**pieces, **beside}, subject, rounds, "timing the step")
    return {name: timings[name] for name in pieces}, {name: timings[name] for name in beside}


def parts_and_limit(
    step: RepeatedStep, recorder: StepRecorder, loader: LoaderCost | None, *, step_s: float, num_workers: int
) -> dict[str, Any]:
    """Where the time of the step goes, what the loader needs beside it, and which of them the training waits for."""
    n = len(step.batch.images)
    parts = breakdown(
        recorder.steps[1:],  # the first one was not timed
        step_parts(step),
        loader_s=None if loader is None else loader.batch_seconds(n, num_workers),
        loader_is_apart=num_workers > 0,
    )
    per_s = None if loader is None else max(num_workers, 1) / loader.sample_s
    return {
        **parts,
        "data": None
        if loader is None
        else vars(loader) | {"loader_processes": num_workers, "loader_images_per_s": per_s},
        "limit": limit(parts["breakdown"], step_per_s=n / step_s, loader_per_s=per_s, num_workers=num_workers),
    }


def extra_share(longer: Timing, shorter: Timing) -> float:
    """How much longer one function takes than another, 0.1 for a tenth: median over rounds of their ratio, less 1."""
    return float(np.median(np.array(longer.seconds) / np.array(shorter.seconds))) - 1


def timed(
    functions: Mapping[str, Callable[[], object]], subject: Subject, rounds: int, label: str
) -> dict[str, Timing]:
    """All functions in turn, round by round, with a progress bar."""
    with progress(rounds * len(functions), label) as bar:
        return measure_interleaved(
            functions, rounds, device=subject.device, after_call=lambda: bar.advance(bar.task_ids[0])
        )


def loader_cost(recipe: Recipe, datasets: Sequence[ShardDataset]) -> LoaderCost | None:
    """What the loader needs for a sample; None without data, and with a line that says why where it is damaged."""
    if not datasets:
        return None
    try:
        return measure_loader(recipe, datasets)
    except (UsageError, RunError) as error:
        say(f"reading and decoding are not timed: {error}")
        return None


def utilisation(
    subject: Subject,
    matmuls: Mapping[str, SquareMatmul],
    timings: Mapping[str, Timing],
    *,
    step_s: float,
    batch: Batch,
) -> dict[str, Any]:
    """Operations a second of the step, by formula, beside those of large products in the same precision.

    Args:
        timings: of the products, by their precision.
    """
    model = subject.model
    batch_size, num_tokens = batch.token_ids.shape
    gflops = costs.step_gflops(model, model.training_plan, batch_size=batch_size, num_text_tokens=num_tokens)
    step_tflops = gflops / 1000 / step_s
    measured = {name: matmul.flops / 1e12 / timings[name].median_s for name, matmul in matmuls.items()}
    peak = measured[subject.recipe.train.precision]
    return {
        "step_gflops": gflops,
        "step_tflops": step_tflops,
        "matmul_peak_tflops": peak,
        "mfu": step_tflops / peak,
        "matmul": [
            {"precision": name, "shape": [matmul.n] * 3, "tflops": measured[name], "median_s": timings[name].median_s}
            for name, matmul in matmuls.items()
        ],
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def speed(name: str, timing: Timing, batch_size: int, *, is_image: bool) -> dict[str, Any]:
    """One line of the result; only image towers compare with the first of them."""
    return {
        "part": name,
        "median_s": timing.median_s,
        "per_s": batch_size / timing.median_s,
        "speedup": timing.speedup if is_image else None,
        "speedup_interval": timing.speedup_interval if is_image else None,
        "seconds": timing.seconds,
    }


def inference(subject: Subject, function: Callable[[], object]) -> None:
    """Run in the recipe's precision, without gradients."""
    precision = Precision.named(subject.recipe.train.precision, subject.device)
    with torch.inference_mode(), precision.autocast(subject.device):
        function()


def encode(subject: Subject, batch: Batch, plan: MergePlan) -> Callable[[], None]:
    """A forward pass of the image tower at `plan`."""
    return lambda: inference(subject, lambda: subject.model.encode_image(batch.images, plan))
