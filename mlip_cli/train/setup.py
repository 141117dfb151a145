"""Builds the parts of a training from a recipe: device, data in its order, model, optimiser, stepper."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from mlip_cli.data.dataset import ShardDataset
from mlip_cli.data.loader import training_loader
from mlip_cli.data.open import open_sources
from mlip_cli.data.order import Order
from mlip_cli.data.pictures import jpeg_decoder
from mlip_cli.data.tokenizer import Tokenizer
from mlip_cli.data.workers import default_num_workers
from mlip_cli.devices import (
    check_compiler,
    check_precision,
    find_compiler,
    has_units_for_bf16,
    pick_device,
)
from mlip_cli.distributed import rank, world_size, wrap
from mlip_cli.losses.objective import Objective
from mlip_cli.model.blocks import Compiled, set_fused_attention
from mlip_cli.model.clip import CLIP, build_model
from mlip_cli.recipe.config import Merging, Recipe
from mlip_cli.recipe.merge_plan import MergePlan, merging_steps
from mlip_cli.runs.initial_weights import InitNotes, load_initial
from mlip_cli.runs.tower_weights import load_tower
from mlip_cli.train.average import WeightAverage
from mlip_cli.train.gradients import Precision
from mlip_cli.train.optim import Schedule, build_optimizer
from mlip_cli.train.state import Training
from mlip_cli.train.step import Stepper, StepSettings
from mlip_cli.types import Batch, PartOf


@dataclass(frozen=True)
class TrainingData:
    """The training set of a run, in its order."""

    datasets: list[ShardDataset]
    order: Order
    total_steps: int

    @property
    def fingerprints(self) -> dict[str, str]:
        """Folder or URL -> fingerprint."""
        return {dataset.place: dataset.fingerprint for dataset in self.datasets}


def training_device(recipe: Recipe) -> torch.device:
    """The device of this rank.

    Raises:
        UsageError: PyTorch does not see the device, the device cannot train in the recipe's precision, or there is no
            compiler for `train.compile`.
    """
    device = pick_device(recipe.train.device)
    check_precision(recipe.train.precision, device, setting="train.precision")
    if recipe.train.compile is True:
        check_compiler(device, "train.compile", otherwise="set it to false")
    return device


def with_usual_precision(recipe: Recipe, *, has_units: bool) -> Recipe:
    """The recipe with what `train.precision: auto` means where all ranks have units for bf16, or where one has none."""
    if recipe.train.precision != "auto":
        return recipe
    return recipe.in_precision("bf16" if has_units else "fp32")


def precision_cautions(recipe: Recipe, device: torch.device) -> list[str]:
    """A line about bf16 where it is slow."""
    if recipe.train.precision != "bf16" or has_units_for_bf16(device):
        return []
    return [
        f"train.precision bf16: the device, {device.type}, has no units for it, and steps take several times as long "
        "as in fp32; in a new run leave it at auto, or set fp32"
    ]


def compiles(recipe: Recipe, device: torch.device) -> bool:
    """Whether training compiles the blocks: `auto` does on CUDA, if there is a compiler."""
    if recipe.train.compile == "auto":
        return device.type == "cuda" and find_compiler("cuda")[1] is not None
    return recipe.train.compile


def compile_facts(recipe: Recipe, device: torch.device) -> list[str]:
    """A line where there is a compiler to wait for, or where `auto` lacks one on CUDA."""
    if compiles(recipe, device):
        value = recipe.train.compile if recipe.train.compile == "auto" else "true"
        return [f"train.compile {value}: the first steps compile the blocks, which takes a minute or more"]
    if recipe.train.compile is False or device.type != "cuda":
        return []
    return [f"train.compile auto: nothing is compiled, which needs a {find_compiler('cuda')[0]}; apt install g++"]


def open_data(recipe: Recipe) -> TrainingData:
    """Open the training shards and fix their order and the number of steps."""
    datasets = open_sources(recipe.data.train, cache=recipe.data.cache)
    order = order_of(recipe, datasets, global_batch_size=recipe.train.global_batch_size)
    if recipe.train.steps is not None:
        return TrainingData(datasets, order, recipe.train.steps)
    assert recipe.train.epochs is not None
    assert order.steps_per_epoch is not None
    return TrainingData(datasets, order, recipe.train.epochs * order.steps_per_epoch)


def build(recipe: Recipe, device: torch.device, *, fresh: bool) -> tuple[Training, InitNotes]:
    """Model and optimiser on `device`; a fresh run starts from the weights that the recipe names, if it names any."""
    torch.manual_seed(recipe.seed)
    model = build_model(recipe)
    notes = InitNotes()
    if fresh and recipe.model.init is not None:
        notes = load_initial(model, recipe)
    elif fresh and recipe.model.vision.init is not None:
        notes = load_tower(model, recipe)
    if recipe.model.freeze is not None:
        model.freeze(recipe.model.freeze)
    set_fused_attention(model, device.type != "cpu")
    if recipe.train.grad_checkpointing:
        model.set_grad_checkpointing()
    if compiles(recipe, device):
        Compiled(fixed=model.picture_blocks(), varying=model.text.blocks)
    model.to(device)
    torch.manual_seed(recipe.seed + 1 + rank())  # dropout and drop path differ between ranks
    precision = Precision.named(recipe.train.precision, device)
    wrapped = wrap(
        model,
        device,
        parallel=recipe.train.parallel,
        units=model.blocks(),
        methods=("encode_image", "encode_text"),
        # autocast on CPUs normalises layers in the type of their weights, that of CUDA in fp32 whatever their type
        dtype=precision.dtype if device.type == "cuda" and precision.dtype != torch.float32 else None,
    )
    optimizer = build_optimizer(model, recipe.optim)  # after wrapping: parameters may be sharded
    horizon = recipe.optim.ema_horizon
    average = WeightAverage(model, horizon=horizon) if horizon is not None else None
    return Training(wrapped, optimizer, precision, device, average, decoder=jpeg_decoder()), notes


def build_stepper(training: Training, recipe: Recipe, *, total_steps: int, micro_batch_size: int | None) -> Stepper:
    """Takes the steps of a training by its recipe."""
    optim = recipe.optim
    settings = StepSettings(
        Schedule(optim.lr, optim.warmup_steps, total_steps),
        clip_grad_norm=optim.clip_grad_norm,
        global_batch_size=recipe.train.global_batch_size,
        micro_batch_size=micro_batch_size,
    )
    return Stepper(training, Objective(recipe.losses), settings)


def plan_by_step(merging: Merging | None, model: CLIP, total_steps: int) -> Callable[[int], MergePlan]:
    """Step, counted from 1 -> its merges; outside of `model.merging.active` nothing merges."""
    unmerged = model.merge_plan(0.0)
    steps = range(1, total_steps + 1) if merging is None else merging_steps(total_steps, merging.active)
    return lambda step: model.training_plan if step in steps else unmerged


def order_of(recipe: Recipe, datasets: Sequence[ShardDataset], *, global_batch_size: int) -> Order:
    """The order of the recipe's samples in batches of this size."""
    return Order(
        [dataset.num_samples for dataset in datasets],
        [source.weight for source in recipe.data.train],
        seed=recipe.seed,
        global_batch_size=global_batch_size,
    )


def open_batches(
    recipe: Recipe,
    datasets: Sequence[ShardDataset],
    order: Order,
    *,
    steps: range,
    num_workers: int,
    pin_memory: bool = False,
    part: PartOf = nullcontext,
) -> Iterator[Batch]:
    """This rank's share of the batches of these steps, with all that the recipe's losses read."""
    return training_loader(
        datasets,
        order,
        data=recipe.data,
        tokenizer=Tokenizer.of(recipe.model.text),
        steps=steps,
        num_workers=num_workers,
        rank=rank(),
        world_size=world_size(),
        pin_memory=pin_memory,
        with_labels=recipe.losses.read_labels,
        with_other_crop=recipe.losses.read_other_crop,
        part=part,
    )


def num_workers(recipe: Recipe, ranks: int | None = None) -> int:
    """The recipe's number of loader processes of a rank, or a default by cores and ranks; None: the ranks of now."""
    return default_num_workers(ranks or world_size()) if recipe.data.num_workers is None else recipe.data.num_workers
