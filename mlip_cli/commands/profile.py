"""`mlip profile`: parameters, operations, speed and memory of a run's model or a recipe's."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlip_cli.commands import costs
from mlip_cli.commands.loading import load_run
from mlip_cli.config import Recipe
from mlip_cli.data.dataset import ShardDataset
from mlip_cli.data.tokenizer import padded_length
from mlip_cli.distributed import pick_device
from mlip_cli.losses.objective import Objective
from mlip_cli.merge_plan import MergePlan
from mlip_cli.model.clip import CLIP, build_model, set_fused_attention
from mlip_cli.output import print_json, print_lines, print_table, progress, say
from mlip_cli.profiling import PeakMemory, Timing, measure_interleaved, peak_memory
from mlip_cli.recipe import load_recipe
from mlip_cli.train.gradients import Precision, add_gradients
from mlip_cli.train.optim import build_optimizer, clamp_scales, set_learning_rate
from mlip_cli.types import VOCAB_SIZE, Batch


@dataclass(frozen=True)
class Subject:
    """What is measured."""

    label: str
    recipe: Recipe
    model: CLIP
    """On `device`; its weights are changed by the training steps that are timed."""
    device: torch.device


def profile(target: str | None, *, batch_size: int, rounds: int, device: str, as_json: bool) -> None:
    """Count and time the model of a run (its checkpoint too) or of a recipe, and print both.

    Raises:
        UsageError: no such run or recipe.
    """
    subject = load_subject(target, device)
    num_tokens, length_source = caption_length(subject.recipe)
    batch = random_batch(subject, batch_size=batch_size, num_tokens=num_tokens)
    say(f"{subject.label}: timing {rounds} rounds with random pictures and words, nothing is read from disk")
    result = {
        "target": subject.label,
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
        **measures(subject, batch, rounds),
    }
    if as_json:
        print_json(result)
    else:
        show(result)


def load_subject(target: str | None, device: str) -> Subject:
    """A folder is a run or a checkpoint, None the newest run; everything else is a recipe with random weights."""
    if target is None or Path(target).is_dir():
        run = load_run(target, device=device)
        model = run.model.requires_grad_(True)
        return Subject(f"{run.label}, step {run.step}", run.recipe, model, run.device)
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


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's instruction set as PyTorch uses it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()


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


def measures(subject: Subject, batch: Batch, rounds: int) -> dict[str, Any]:
    """What needs a clock: seconds of each part side by side, and the peak of the training step's memory."""
    model, n = subject.model, len(batch.images)
    functions = {"image tower, rate 0": encode(subject, batch, model.merge_plan(0.0))}
    if model.plan.at:
        functions[f"image tower, rate {model.plan.rate:.2f}"] = encode(subject, batch, model.plan)
    functions["text tower"] = lambda: inference(subject, lambda: model.encode_text(batch.token_ids))
    functions["training step"] = step = training_step(subject, batch)
    with progress(rounds * len(functions), "timing") as bar:
        timings = measure_interleaved(
            functions, rounds, device=subject.device, after_call=lambda: bar.advance(bar.task_ids[0])
        )
    memory = peak_memory(step, device=subject.device)
    return {
        "speed": [speed(name, timing, n, is_image=name.startswith("image")) for name, timing in timings.items()],
        "peak_memory": {"what": f"training step of {n} pairs", **vars(memory)},
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


def training_step(subject: Subject, batch: Batch) -> Callable[[], None]:
    """Forward, losses, backward and optimiser as in training, with a learning rate of 0."""
    model, recipe = subject.model, subject.recipe
    objective, optimizer = Objective(recipe.losses), build_optimizer(model, recipe.optim)
    precision = Precision.named(recipe.train.precision, subject.device)
    set_learning_rate(optimizer, 0.0)

    def step() -> None:
        model.train()
        add_gradients(model, objective, batch, precision=precision, micro_batch_size=recipe.train.micro_batch_size)
        precision.scaler.step(optimizer)
        precision.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        clamp_scales(model)
        model.eval()

    return step


def show(result: dict[str, Any]) -> None:
    """The result for a person."""
    flops, merging = result["gflops"], result["merging"]
    print_table(["part", "parameters"], [[name, f"{count:,}"] for name, count in result["parameters"].items()])
    print_lines("")
    parts, whole = flops["image_tower_by_part"], flops["image_tower_unmerged_by_part"]
    decimals = 2 if flops["image_tower_unmerged"] >= 1 else 4
    columns = ["GFLOPs an image", "rate 0"] + ([f"rate {merging['rate']:.2f}"] if merging else [])
    rows = [[name, *(f"{g:.{decimals}f}" for g in (whole[name], parts[name])[: len(columns) - 1])] for name in parts]
    totals = (flops["image_tower_unmerged"], flops["image_tower"])[: len(columns) - 1]
    print_table(columns, [*rows, ["image tower", *(f"{g:.{decimals}f}" for g in totals)]])
    beside = [
        ("frequency branch, in training", flops["frequency_branch"]),
        ("token heads, in training", flops["token_heads"]),
        (f"text tower, {result['caption_tokens']} tokens", flops["text_tower"]),
    ]
    if result["caption_tokens"] < result["context_length"]:
        beside.append((f"text tower, {result['context_length']} tokens", flops["text_tower_at_context_length"]))
    print_lines("")
    print_table(["beside the image tower", "GFLOPs"], [[name, f"{g:.{decimals}f}"] for name, g in beside if g])
    print_lines("\npatch tokens in each block: " + " ".join(map(str, result["tokens_per_block"])))
    print_lines(f"tokens of a caption: {result['caption_tokens']} ({result['caption_tokens_from']})\n")
    rows = [
        [line["part"], f"{line['per_s']:,.1f}", f"{1000 * line['median_s']:,.1f}", ratio(line)]
        for line in result["speed"]
    ]
    print_table([f"batch of {result['batch_size']}, {result['precision']}", "per s", "ms", "x rate 0 (95 %)"], rows)
    memory = PeakMemory(result["peak_memory"]["gib"], result["peak_memory"]["measured"])
    print_lines(f"\npeak memory of the training step: {memory.gib:.2f} GiB ({memory.measured})")
    print_lines(f"on {result['device']}, {result['device_name']}, {result['threads']} threads, torch {result['torch']}")


def ratio(line: dict[str, Any]) -> str | None:
    """1.52 (1.48-1.55), or None."""
    if line["speedup"] is None:
        return None
    low, high = line["speedup_interval"]
    return f"{line['speedup']:.2f} ({low:.2f}-{high:.2f})"
