"""`mlip profile`: parameters, operations, speed and memory of a run's model or a recipe's."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlip_cli import __version__
from mlip_cli.commands import costs
from mlip_cli.commands.loader_breakdown import LoaderCost, measure_loader
from mlip_cli.commands.loading import load_run
from mlip_cli.commands.profile_tables import show
from mlip_cli.commands.report import rebuild
from mlip_cli.commands.step_breakdown import StepRecorder, breakdown, limit, step_parts
from mlip_cli.commands.training_setup import num_workers
from mlip_cli.commands.training_step import TrainingStep
from mlip_cli.config import Recipe
from mlip_cli.data.dataset import ShardDataset, open_sources
from mlip_cli.data.tokenizer import padded_length
from mlip_cli.distributed import pick_device
from mlip_cli.errors import UsageError
from mlip_cli.files import write_json
from mlip_cli.merge_plan import MergePlan
from mlip_cli.model.clip import CLIP, build_model, set_fused_attention
from mlip_cli.output import print_json, progress, say
from mlip_cli.profiling import SquareMatmul, Timing, device_name, measure_interleaved, peak_memory, square_matmul
from mlip_cli.recipe import load_recipe
from mlip_cli.run_folder import Run, checkpoint_name, now
from mlip_cli.train.gradients import Precision
from mlip_cli.types import VOCAB_SIZE, Batch


@dataclass(frozen=True)
class Subject:
    """What is measured."""

    label: str
    recipe: Recipe
    model: CLIP
    """On `device`; training steps are timed on it, with a learning rate of 0."""
    device: torch.device
    run: Run | None = None
    """Where the weights come from; None for random ones."""
    step: int | None = None
    """Step of the checkpoint."""


def profile(target: str | None, *, batch_size: int, rounds: int, device: str, as_json: bool) -> None:
    """Count and time the model of a run (its checkpoint too) or of a recipe, and print both; a run keeps it in evals/.

    Raises:
        UsageError: no such run or recipe.
    """
    subject = load_subject(target, device)
    num_tokens, length_source = caption_length(subject.recipe)
    batch = random_batch(subject, batch_size=batch_size, num_tokens=num_tokens)
    say(f"{subject.label}: timing {rounds} rounds; the model gets random pictures and words, the loader real ones")
    result = {
        "kind": "profile",
        "measured_at": now(),
        "mlip_version": __version__,
        "target": subject.label,
        "step": subject.step,
        "device": str(subject.device),
        "device_name": device_name(subject.device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "precision": subject.recipe.train.precision,
        "image_size": subject.model.image_size,
        "batch_size": batch_size,
        "rounds": rounds,
        "context_length": subject.model.context_length,
        "caption_tokens": num_tokens,
        "caption_tokens_from": length_source,
        **counts(subject.model, num_tokens),
    }
    towers = speeds_of_towers(subject, batch, rounds)
    measured = measures_of_step(subject, batch, rounds, num_tokens)
    result |= measured | {"speed": [*towers, *measured["speed"]]}
    if subject.run is not None and subject.step is not None:
        path = subject.run.evals / f"profile_{checkpoint_name(subject.step)}.json"
        path.parent.mkdir(exist_ok=True)
        write_json(path, result)
        say(f"written to {path}")
    if as_json:
        print_json(result)
    else:
        show(result)
    if subject.run is not None:
        rebuild(subject.run)


def load_subject(target: str | None, device: str) -> Subject:
    """A folder is a run or a checkpoint, None the newest run; everything else is a recipe with random weights."""
    if target is None or Path(target).is_dir():
        run = load_run(target, device=device)
        model = run.model.requires_grad_(True)
        return Subject(f"{run.label}, step {run.step}", run.recipe, model, run.device, run.run, run.step)
    loaded = load_recipe(target)
    where = pick_device(device)
    model = build_model(loaded.recipe).to(where).eval()
    set_fused_attention(model, where.type != "cpu")
    return Subject(f"recipe {loaded.name}, random weights", loaded.recipe, model, where)


def caption_length(recipe: Recipe) -> tuple[int, str]:
    """Tokens to which a typical batch's captions are padded, and where that is known from."""
    most, folder = recipe.model.text.context_length, Path(recipe.data.train[0].path)
    if not (folder / "dataset.json").is_file():
        return most, f"the context length; {folder} is not there"
    dataset = ShardDataset(folder)
    generator = np.random.default_rng(0)
    size = min(recipe.train.global_batch_size, dataset.num_samples)
    longest = [dataset.num_tokens(generator.integers(dataset.num_samples, size=size)).max() for _ in range(25)]
    return padded_length(int(np.median(longest)), most), f"batches of {folder}"


def random_batch(subject: Subject, *, batch_size: int, num_tokens: int) -> Batch:
    """Pictures of noise, captions of `num_tokens` words drawn from the whole vocabulary."""
    generator = torch.Generator().manual_seed(0)
    size = subject.model.image_size
    images = torch.randint(256, (batch_size, 3, size, size), dtype=torch.uint8, generator=generator)
    token_ids = torch.randint(1, VOCAB_SIZE - 2, (batch_size, num_tokens), generator=generator)
    token_ids[:, 0], token_ids[:, -1] = VOCAB_SIZE - 2, VOCAB_SIZE - 1
    return Batch(images, token_ids, keys=("",) * batch_size).to(subject.device)


def pinned(batch: Batch, device: torch.device) -> Batch:
    """The batch as the loader leaves it for `device`: in main memory, pinned where that speeds up the copy."""
    batch = batch.to("cpu")
    if device.type != "cuda":
        return batch
    return replace(batch, images=batch.images.pin_memory(), token_ids=batch.token_ids.pin_memory())


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


def measures_of_step(subject: Subject, batch: Batch, rounds: int, num_tokens: int) -> dict[str, Any]:
    """Seconds of the training step (whole, in pieces that run alone, by parts), its limit, operations and memory."""
    model, n = subject.model, len(batch.images)
    loader = loader_cost(subject.recipe)
    model.train()
    step = TrainingStep(model, subject.recipe, pinned(batch, subject.device), subject.device)
    if subject.recipe.train.micro_batch_size is not None and step.micro_batch_size is None:
        size = subject.recipe.train.micro_batch_size
        say(f"the recipe's micro-batches of {size} are no smaller than this batch of {n}: it is measured at once")
    recorder = StepRecorder(step)
    pieces: dict[str, Callable[[], object]] = {**step.parts_of_step(batch), "training step": step}
    dtypes: dict[str, torch.dtype] = {"fp32": torch.float32, subject.recipe.train.precision: step.precision.dtype}
    matmuls = {name: square_matmul(dtype, device=subject.device) for name, dtype in dtypes.items()}
    beside: dict[str, Callable[[], object]] = {
        "with clocks": recorder,
        **{name: matmul.run for name, matmul in matmuls.items()},
    }
    timings = timed({**pieces, **beside}, subject, rounds, "timing the step")
    speeds = [speed(name, timings[name], n, is_image=False) for name in pieces]
    del pieces  # they hold a gradient
    memory = peak_memory(step, device=subject.device)
    model.eval()

    step_s, workers = timings["training step"].median_s, num_workers(subject.recipe)
    parts = breakdown(
        recorder.steps[1:],  # the first one was not timed
        step_parts(step),
        loader_s=None if loader is None else loader.batch_seconds(n, workers),
        loader_is_apart=workers > 0,
    )
    per_s = None if loader is None else max(workers, 1) / loader.sample_s
    return {
        "speed": speeds,
        "micro_batch_size": step.micro_batch_size,
        **parts,
        "step_s": step_s,
        "clocks_cost": extra_share(timings["with clocks"], timings["training step"]),
        "data": None if loader is None else vars(loader) | {"loader_processes": workers, "loader_images_per_s": per_s},
        "limit": limit(parts["breakdown"], step_per_s=n / step_s, loader_per_s=per_s, num_workers=workers),
        **utilisation(subject, matmuls, timings, batch_size=n, num_tokens=num_tokens),
        "peak_memory": {"what": f"training step of {n} pairs", **vars(memory)},
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


def loader_cost(recipe: Recipe) -> LoaderCost | None:
    """What the loader needs for a sample; None, and a line that says why, where the training data is not there."""
    try:
        datasets = open_sources(recipe.data.train)
    except UsageError as error:
        say(f"no data, so reading and decoding are not timed: {error}")
        return None
    return measure_loader(recipe, datasets)


def utilisation(
    subject: Subject,
    matmuls: Mapping[str, SquareMatmul],
    timings: Mapping[str, Timing],
    *,
    batch_size: int,
    num_tokens: int,
) -> dict[str, Any]:
    """Operations a second of the step, by formula, beside those of large products in the same precision."""
    model = subject.model
    gflops = costs.step_gflops(model, model.plan, batch_size=batch_size, num_text_tokens=num_tokens)
    step_tflops = gflops / 1000 / timings["training step"].median_s
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
