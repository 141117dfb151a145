"""From a recipe to what training needs: device, data in its order, model and optimiser."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from mlip_cli.data.dataset import ShardDataset
from mlip_cli.data.loader import default_num_workers, training_loader
from mlip_cli.data.open import open_sources
from mlip_cli.data.order import Order
from mlip_cli.data.pictures import jpeg_decoder
from mlip_cli.devices import pick_device
from mlip_cli.distributed import rank, world_size, wrap
from mlip_cli.errors import UsageError
from mlip_cli.model.blocks import compile_blocks, set_fused_attention
from mlip_cli.model.clip import build_model
from mlip_cli.recipe.config import Recipe
from mlip_cli.runs.initial_weights import InitNotes, load_initial
from mlip_cli.train.average import WeightAverage
from mlip_cli.train.gradients import Precision
from mlip_cli.train.optim import build_optimizer
from mlip_cli.train.resume import Training
from mlip_cli.types import Batch


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
        UsageError: PyTorch sees no such device, or it cannot train in the recipe's precision.
    """
    device = pick_device(recipe.train.device)
    if recipe.train.precision == "fp16" and device.type != "cuda":
        raise UsageError(
            f"train.precision: fp16 needs CUDA, and train.device {recipe.train.device} is {device.type} here; "
            "use bf16 or fp32"
        )
    return device


def open_data(recipe: Recipe) -> TrainingData:
    """Open the training shards and fix their order and the number of steps."""
    datasets = open_sources(recipe.data.train, cache=recipe.data.cache)
    order = Order(
        [dataset.num_samples for dataset in datasets],
        [source.weight for source in recipe.data.train],
        seed=recipe.seed,
        global_batch_size=recipe.train.global_batch_size,
    )
    if recipe.train.steps is not None:
        return TrainingData(datasets, order, recipe.train.steps)
    assert recipe.train.epochs is not None
    assert order.steps_per_epoch is not None
    return TrainingData(datasets, order, recipe.train.epochs * order.steps_per_epoch)


def build(recipe: Recipe, device: torch.device, *, fresh: bool) -> tuple[Training, InitNotes]:
    """Model and optimiser on `device`; a fresh run starts from `model.init` where the recipe names one."""
    torch.manual_seed(recipe.seed)
    model = build_model(recipe)
    starts_from_weights = fresh and recipe.model.init is not None
    notes = load_initial(model, recipe) if starts_from_weights else InitNotes()
    if recipe.model.freeze is not None:
        model.freeze(recipe.model.freeze)
    set_fused_attention(model, device.type != "cpu")
    if recipe.train.grad_checkpointing:
        model.set_grad_checkpointing()
    if recipe.train.compile:
        compile_blocks(model, model.blocks())
    model.to(device)
    torch.manual_seed(recipe.seed + 1 + rank())  # dropout and drop path differ between ranks
    wrapped = wrap(
        model, device, parallel=recipe.train.parallel, units=model.blocks(), methods=("encode_image", "encode_text")
    )
    optimizer = build_optimizer(model, recipe.optim)  # of the wrapped model's parameters, which may be sharded
    precision = Precision.named(recipe.train.precision, device)
    horizon = recipe.optim.ema_horizon
    average = WeightAverage(model, horizon=horizon) if horizon is not None else None
    return Training(wrapped, optimizer, precision, device, average, decoder=jpeg_decoder()), notes


def open_batches(recipe: Recipe, data: TrainingData, device: torch.device, *, start_step: int) -> Iterator[Batch]:
    """This rank's share of every batch after `start_step`."""
    return training_loader(
        data.datasets,
        data.order,
        data=recipe.data,
        context_length=recipe.model.text.context_length,
        global_batch_size=recipe.train.global_batch_size,
        seed=recipe.seed,
        rank=rank(),
        world_size=world_size(),
        start_step=start_step,
        stop_step=data.total_steps,
        num_workers=num_workers(recipe),
        pin_memory=device.type == "cuda",
        with_labels=recipe.losses.positives == "concept",
    )


def num_workers(recipe: Recipe) -> int:
    """The recipe's number of loader processes, or one made from cores and ranks."""
    return default_num_workers(world_size()) if recipe.data.num_workers is None else recipe.data.num_workers
