"""Rows about numbers: a step on the device against fp64 on the CPU, skipped steps, micro-batches, fp32."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from gpu.rows import Found, Scale
from gpu.trainings import EAGER, recipe_of, stepper_of, steps_of, web_batch
from models_for_tests import loss_terms, small_batch, small_model, small_recipe, with_lengths
from test_gradients import gradients, relative_error
from torch import Tensor, nn

from mlip_cli.devices import pick_device
from mlip_cli.files import GIB
from mlip_cli.losses.objective import Objective
from mlip_cli.model.blocks import set_fused_attention
from mlip_cli.model.clip import CLIP
from mlip_cli.train.gradients import Precision, add_gradients
from mlip_cli.train.micro_batches import chosen_micro_batch_size
from mlip_cli.train.optim import Schedule, build_optimizer
from mlip_cli.train.state import Progress, Training
from mlip_cli.train.step import Stepper, StepSettings

SMALL = 1e-5
"""Relative error of fp32 against fp64."""
TINY = 1e-10
"""Relative error of fp64 in another order."""
STEPS, BROKEN = 18, 16
"""Steps in fp16, and the one whose gradient is infinite."""


def on(device: torch.device, dtype: torch.dtype) -> CLIP:
    """MLIP with fixed weights, with the attention that training uses there."""
    model = small_model(dtype=dtype).train().to(device)
    set_fused_attention(model, device.type != "cpu")
    return model


def relative(found: Tensor, expected: Tensor) -> float:
    """Of all numbers of a tensor together."""
    expected = expected.double().cpu()
    return ((found.double().cpu() - expected).norm() / expected.norm()).item()


def whole_step(
    model: CLIP, device: torch.device, assign: tuple[Tensor, ...] | None = None
) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
    """Features and gradients of one batch by name, on the CPU, and the merges; `assign` repeats merges."""
    batch, objective = with_lengths(small_batch(16)).to(device), Objective(small_recipe().losses)
    encoded = model(batch, plan=model.training_plan, assign=assign)
    objective.total(loss_terms(objective, encoded, batch)).backward()
    names = ("image_features", "text_features", "frequency_features", "image_tokens", "text_tokens")
    found = {name: getattr(encoded, name).detach() for name in names} | gradients(model)
    return {name: value.cpu() for name, value in found.items()}, tuple(own.cpu() for own in encoded.assign)


def against_fp64(scale: Scale) -> Found:
    """Features and gradients of MLIP in fp32 on the device, and of micro-batches."""
    device = pick_device(scale.device_type)
    expected, merges = whole_step(on(torch.device("cpu"), torch.float64), torch.device("cpu"))
    given = tuple(own.to(device) for own in merges)
    found, _ = whole_step(on(device, torch.float32), device, given)
    _, own_merges = whole_step(on(device, torch.float32), device)
    alike = torch.stack([(a == b).float().mean() for a, b in zip(own_merges, merges, strict=True)]).mean().item()
    errors = {name: relative(found[name], value) for name, value in expected.items()}
    worst = max(errors, key=errors.__getitem__)
    whole, parts = (_gradient(device, size) for size in (None, 3))
    of_parts = relative_error(parts, whole)
    return Found(
        f"fp32 {errors[worst]:.1e} ({worst}), micro-batches {of_parts:.1e} in fp64, {alike:.2%} of groups as in fp64",
        statements={
            f"features and gradients in fp32 within {SMALL:g} of fp64 on the CPU": errors[worst] <= SMALL,
            f"micro-batches give the gradient of the whole batch within {TINY:g}": of_parts <= TINY,
        },
        figures={"errors": errors, "micro_batches": of_parts, "groups_alike": alike},
    )


def _gradient(device: torch.device, micro_batch_size: int | None) -> dict[str, Tensor]:
    model, precision = on(device, torch.float64), Precision.named("fp32", device)
    add_gradients(
        model, Objective(small_recipe().losses), with_lengths(small_batch(8)).to(device),
        precision=precision, micro_batch_size=micro_batch_size, plan=model.training_plan,
    )  # fmt: skip
    return gradients(model)


def skipped_step(scale: Scale) -> Found:
    """Steps in fp16, one of them with an infinite number in a gradient. The first ones find the scale of the loss."""
    device, recipe = pick_device(scale.device_type), small_recipe()
    model = on(device, torch.float32)
    training = Training(model, build_optimizer(model, recipe.optim), Precision.named("fp16", device), device)
    stepper = Stepper(training, Objective(recipe.losses), StepSettings(Schedule(1e-3, 0, 2 * STEPS), None, 8, None))
    broken: list[bool] = [False]

    def break_it(gradient: Tensor) -> Tensor:
        return gradient.flatten().index_fill(0, gradient.new_zeros(1).long(), torch.inf).view_as(gradient)

    weight = model.image_projection.weight
    weight.register_hook(lambda gradient: break_it(gradient) if broken[0] else gradient)
    batch, moved = with_lengths(small_batch(8)), []
    for step in range(1, STEPS + 1):
        broken[0] = step == BROKEN
        before = weight.detach().clone()
        stepper.take(stepper.copy(batch), step, model.training_plan)
        moved.append(not torch.equal(before, weight))
    progress = Progress(step=STEPS)
    stepper.guard.count(progress)
    finite = all(torch.isfinite(p).all().item() for p in model.parameters())
    return Found(
        f"{moved.count(True)} of {STEPS} steps trained, {progress.skipped_steps} skipped and counted",
        statements={
            "the steps before and after train": moved[BROKEN - 2] and moved[-1],
            "the step with an infinite gradient changes nothing": not moved[BROKEN - 1],
            "skipped steps are counted": progress.skipped_steps == moved.count(False),
            "all weights are finite": finite,
        },
        figures={"moved": moved, "skipped_steps": progress.skipped_steps},
    )


def micro_batches(scale: Scale) -> Found:
    """What `auto` finds for single_gpu.yaml where memory is short: the share is halved until it fits."""
    device = pick_device(scale.device_type)
    recipe, share, allowed_gib = recipe_of("single_gpu", scale, EAGER), scale.batch_size, 8
    stepper = stepper_of(recipe, device)
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, allowed_gib * GIB / total), device)
    size = chosen_micro_batch_size(recipe, stepper.training, Progress(), share=share)
    assert size is not None, "single_gpu.yaml says auto"
    stepper.settings = replace(stepper.settings, micro_batch_size=size)
    steps_of(stepper, web_batch(recipe, device, batch_size=share), steps=1)()
    is_finite = all(torch.isfinite(p).all().item() for p in stepper.training.plain.parameters())
    return Found(
        f"{size} of {share} samples at a time in {allowed_gib} GiB",
        statements={
            "some size fits, and a whole batch does not": 1 < size < share or device.type != "cuda",
            "a step by such micro-batches trains": is_finite and stepper.guard.skipped.item() == 0,
        },
        figures={"size": size, "share": share, "allowed_gib": allowed_gib},
    )


def evaluation_in_fp32(scale: Scale) -> Found:
    """A convolution over patches and a product of matrices as evaluation in fp32 computes them."""
    device, n = pick_device(scale.device_type), scale.matrix
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, n, generator=generator) for _ in range(2))
    pictures = torch.randn(8, 3, 64, 64, generator=generator)
    embed = nn.Conv2d(3, 64, 16, 16)
    with torch.no_grad():
        found = {
            "product": (a.to(device) @ b.to(device), a.double() @ b.double()),
            "convolution": (
                F.conv2d(pictures.to(device), embed.weight.to(device), stride=16),
                F.conv2d(pictures.double(), embed.weight.double(), stride=16),
            ),
        }
    errors = {name: relative(*pair) for name, pair in found.items()}
    return Found(
        ", ".join(f"{name} {error:.1e}" for name, error in errors.items()),
        statements={f"a {name} has the digits of fp32 (TF32: 3e-4)": error < SMALL for name, error in errors.items()},
        figures=errors,
    )
