"""What `mlip profile` measures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from mlip_cli import __version__
from mlip_cli.data.dataset import ShardDataset
from mlip_cli.devices import device_name
from mlip_cli.errors import RunError, UsageError
from mlip_cli.model.clip import CLIP
from mlip_cli.profiling import flops
from mlip_cli.profiling.breakdown import break_down, limit
from mlip_cli.profiling.loader import measure_loader
from mlip_cli.profiling.own_picture import losses_of_pictures
from mlip_cli.profiling.result import (
    Gflops,
    LoaderFacts,
    MatmulSpeed,
    PartSpeed,
    PeakMemory,
    ProfiledMerging,
    ProfileResult,
    StepMemory,
)
from mlip_cli.profiling.step import ClockedSeconds, ClockedStep, RepeatedStep, step_parts
from mlip_cli.profiling.subject import ProfiledModel, caption_length, caption_lengths, pinned
from mlip_cli.profiling.timing import SquareMatmul, Timing, measure_interleaved, peak_memory, square_matmul
from mlip_cli.recipe.config import Recipe
from mlip_cli.recipe.merge_plan import MergePlan
from mlip_cli.runs.folder import now
from mlip_cli.terminal.output import say
from mlip_cli.terminal.panel import progress
from mlip_cli.train.gradients import Precision
from mlip_cli.train.noise import noise_batch
from mlip_cli.train.setup import num_workers
from mlip_cli.types import Batch

STEP = "training step"
CLOCKED = "with clocks"


def measure(
    profiled: ProfiledModel, datasets: Sequence[ShardDataset], *, batch_size: int, rounds: int
) -> ProfileResult:
    """Count and time everything on random pictures and words; the loader reads real ones."""
    model, recipe, device = profiled.model, profiled.recipe, profiled.device
    num_tokens, tokens_from = caption_length(recipe, datasets)
    captions = recipe.data.captions_per_image * batch_size
    lengths = caption_lengths(recipe, datasets, num_captions=captions, width=num_tokens)
    batch = noise_batch(recipe, batch_size=batch_size, num_tokens=num_tokens, device=device, lengths=lengths)
    towers = speeds_of_towers(profiled, batch, rounds)
    loader = loader_facts(recipe, datasets, ranks=ranks_of(device))
    found = measure_step(profiled, batch, rounds)
    plan, step_s = model.plan, found.timings[STEP].median_s
    parts = break_down(found.seconds, step_parts(found.step), loader=loader, batch_size=batch_size)
    step_gflops = gflops_of_step(profiled, batch)
    peak = next(line.tflops for line in found.matmul if line.precision == recipe.train.precision)
    return ProfileResult(
        measured_at=now(),
        mlip_version=__version__,
        target=profiled.label,
        step=profiled.step,
        device=str(device),
        device_name=device_name(device),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        precision=recipe.train.precision,
        compiled=profiled.runs_compiled,
        image_size=model.image_size,
        batch_size=batch_size,
        rounds=rounds,
        context_length=model.context_length,
        caption_tokens=num_tokens,
        caption_tokens_from=tokens_from,
        caption_tokens_in_step=flops.mean_tokens(
            flops.groups_of_captions(model, captions, width=num_tokens, lengths=lengths)
        ),
        parameters=flops.parameters(model) | {"total": sum(p.numel() for p in model.parameters())},
        merging=ProfiledMerging(method=plan.method, rate=plan.rate, before_blocks=plan.at) if plan.at else None,
        tokens_per_block=plan.tokens,
        prefix_tokens=model.vision.num_prefix,
        gflops=gflops_of(model, num_tokens, other_crop=batch.other_images is not None),
        speed=(*towers, *(speed(name, timing, batch_size) for name, timing in found.timings.items())),
        micro_batch_size=found.step.micro_batch_size,
        step_s=step_s,
        clocks_cost=found.clocks_cost,
        whole_s=parts.whole_s,
        breakdown=parts.parts,
        unaccounted=parts.unaccounted,
        data=loader,
        limit=limit(parts.parts, loader, step_per_s=batch_size / step_s),
        step_gflops=step_gflops,
        step_tflops=step_gflops / 1000 / step_s,
        matmul_peak_tflops=peak,
        mfu=step_gflops / 1000 / step_s / peak,
        matmul=found.matmul,
        float32_matmul_precision=torch.get_float32_matmul_precision(),
        token_losses=losses_of_pictures(profiled, datasets, batch_size=batch_size),
        peak_memory=StepMemory(what=f"training step of {batch_size} pairs", **vars(found.memory)),
    )


def gflops_of_step(profiled: ProfiledModel, batch: Batch) -> float:
    """GFLOPs of a training step on this batch."""
    return flops.step_gflops(
        profiled.model,
        profiled.model.training_plan,
        batch_size=len(batch.images),
        num_text_tokens=batch.token_ids.shape[1],
        captions_per_image=profiled.recipe.data.captions_per_image,
        text_lengths=batch.text_lengths,
        other_crop=batch.other_images is not None,
    )


def gflops_of(model: CLIP, num_tokens: int, *, other_crop: bool) -> Gflops:
    """Operations of one image, with the merges of evaluation and without, and of one caption of `num_tokens`.

    Args:
        other_crop: the branch reads another crop in training.
    """
    parts, whole = flops.image_gflops(model, model.plan), flops.image_gflops(model, model.merge_plan(0.0))
    return Gflops(
        image_tower=sum(parts.values()),
        image_tower_by_part=parts,
        image_tower_unmerged=sum(whole.values()),
        image_tower_unmerged_by_part=whole,
        frequency_branch=flops.frequency_gflops(model, model.plan, other_crop=other_crop),
        token_heads=flops.token_head_gflops(model, model.plan, num_tokens),
        text_tower=flops.text_gflops(model, num_tokens),
        text_tower_at_context_length=flops.text_gflops(model, model.context_length),
    )


def speeds_of_towers(profiled: ProfiledModel, batch: Batch, rounds: int) -> list[PartSpeed]:
    """Seconds of the towers side by side, in the recipe's precision, without gradients."""
    model, device = profiled.model, profiled.device
    precision = Precision.named(profiled.recipe.train.precision, device)

    def image(plan: MergePlan) -> None:
        with torch.inference_mode(), precision.autocast(device):
            model.encode_image(batch.images, plan)

    def text() -> None:
        with torch.inference_mode(), precision.autocast(device):
            model.encode_text(batch.token_ids[: len(batch.images)])

    images: dict[str, Callable[[], None]] = {"image tower, rate 0": partial(image, model.merge_plan(0.0))}
    if model.plan.at:
        images[f"image tower, rate {model.plan.rate:.2f}"] = partial(image, model.plan)
    timings = timed({**images, "text tower": text}, profiled, rounds, "timing the towers")
    return [speed(name, timing, len(batch.images), is_image=name in images) for name, timing in timings.items()]


def speed(name: str, timing: Timing, batch_size: int, *, is_image: bool = False) -> PartSpeed:
    """One line of the result; only image towers compare with the first of them."""
    return PartSpeed(
        part=name,
        median_s=timing.median_s,
        per_s=batch_size / timing.median_s,
        speedup=timing.speedup if is_image else None,
        speedup_interval=timing.speedup_interval if is_image else None,
        seconds=timing.seconds,
    )


def ranks_of(device: torch.device) -> int:
    """Ranks of a training on all of this machine: one for each GPU."""
    return torch.cuda.device_count() if device.type == "cuda" else 1


def loader_facts(recipe: Recipe, datasets: Sequence[ShardDataset], *, ranks: int) -> LoaderFacts | None:
    """What the loader needs for a sample; None without data, or if the data is damaged, which a line says.

    Args:
        ranks: so many share the cores of this machine.
    """
    if not datasets:
        return None
    try:
        return measure_loader(recipe, datasets, num_workers=num_workers(recipe, ranks), ranks=ranks)
    except (UsageError, RunError) as error:
        say(f"reading and decoding are not timed: {error}")
        return None


@dataclass(frozen=True)
class MeasuredStep:
    """A training step, timed in turn with all that it is compared with."""

    step: RepeatedStep
    seconds: list[ClockedSeconds]
    """Of the steps with the clock, one a round."""
    timings: dict[str, Timing]
    """Of the pieces of the step that run alone, and of the step."""
    clocks_cost: float
    """How much longer a step with the clock takes: 0.1 for a tenth."""
    matmul: tuple[MatmulSpeed, ...]
    memory: PeakMemory


def measure_step(profiled: ProfiledModel, batch: Batch, rounds: int) -> MeasuredStep:
    """Time the training step: whole, in pieces, with the clock on its parts, beside large products of matrices."""
    device = profiled.device
    profiled.model.train()
    step = repeated_step(profiled, batch)
    clocked = ClockedStep(step)
    step()  # the optimiser's state exists from then on
    memory = peak_memory(step, device=device)  # before the matrices below lie there too
    dtypes: dict[str, torch.dtype] = {"fp32": torch.float32, profiled.recipe.train.precision: step.precision.dtype}
    matmuls = {name: square_matmul(dtype, device=device) for name, dtype in dtypes.items()}
    functions: dict[str, Callable[[], object]] = {**step.pieces(batch), STEP: step, CLOCKED: clocked}
    functions |= {name: matmul.run for name, matmul in matmuls.items()}
    timings = timed(functions, profiled, rounds, "timing the step")
    profiled.model.eval()
    return MeasuredStep(
        step=step,
        seconds=clocked.seconds[1:],  # the first one was not timed
        clocks_cost=extra_share(timings.pop(CLOCKED), timings[STEP]),
        matmul=tuple(matmul_speed(name, matmul, timings.pop(name)) for name, matmul in matmuls.items()),
        timings=timings,
        memory=memory,
    )


def repeated_step(profiled: ProfiledModel, batch: Batch) -> RepeatedStep:
    """The step on a batch, by the recipe's micro-batches if they are smaller."""
    step = RepeatedStep(profiled.model, profiled.recipe, pinned(batch, profiled.device), profiled.device)
    size = profiled.recipe.train.given_micro_batch_size
    if size is not None and step.micro_batch_size is None:
        say(
            f"the recipe's micro-batches of {size} are no smaller than this batch of {len(batch.images)}, so it is "
            "measured at once"
        )
    return step


def matmul_speed(precision: str, matmul: SquareMatmul, timing: Timing) -> MatmulSpeed:
    """Operations a second of a product."""
    tflops = matmul.flops / 1e12 / timing.median_s
    return MatmulSpeed(precision=precision, shape=[matmul.n] * 3, tflops=tflops, median_s=timing.median_s)


def extra_share(longer: Timing, shorter: Timing) -> float:
    """How much longer one function takes than another, 0.1 for a tenth: median over rounds of their ratio, less 1."""
    return float(np.median(np.array(longer.seconds) / np.array(shorter.seconds))) - 1


def timed(
    functions: Mapping[str, Callable[[], object]], profiled: ProfiledModel, rounds: int, label: str
) -> dict[str, Timing]:
    """All functions in turn, round by round, with a progress bar."""
    with progress(rounds * len(functions), label) as bar:
        return measure_interleaved(
            functions, rounds, device=profiled.device, after_call=lambda: bar.advance(bar.task_ids[0])
        )
