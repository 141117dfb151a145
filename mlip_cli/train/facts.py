"""The lines that a training prints before its first step."""

from collections.abc import Sequence

from mlip_cli.data.dataset import ShardDataset
from mlip_cli.data.loader import check_divides, decoded
from mlip_cli.data.order import Order
from mlip_cli.distributed import world_size
from mlip_cli.model.clip import CLIP
from mlip_cli.recipe.config import Recipe
from mlip_cli.recipe.merge_plan import DEFAULT, MOST_IN_ONE_MERGE, MergePlan, merging_steps
from mlip_cli.runs.moved_data import is_move, move_in_words
from mlip_cli.runs.start import Start
from mlip_cli.terminal.output import plural
from mlip_cli.train.setup import num_workers

FINE_TUNING_LR = 1e-4
"""A higher learning rate is one of training from random weights. Published CLIPs are fine-tuned with 1e-6 to 1e-5 at
batches of 512 (Goyal et al., CVPR 2023, "Finetune like you pretrain") and with 3e-5 (Wortsman et al., CVPR 2022,
"Robust fine-tuning of zero-shot models"); they were trained with 5e-4 (Radford et al. 2021)."""


def facts(recipe: Recipe, model: CLIP, total_steps: int | None) -> list[str]:
    """Lines about what follows from the recipe; `total_steps` is None if data that is missing leaves it open."""
    train, plan = recipe.train, model.training_plan
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    beside = "; the image projection trains" if model.frozen == "image" and model.starts_from_tower else ""
    frozen = f", {trained:,} of them train (model.freeze: {model.frozen}{beside})" if model.frozen else ""
    length = plural(train.epochs or 0, "epoch") if total_steps is None else plural(total_steps, "step")
    loaders = plural(num_workers(recipe), "loader process", "loader processes")
    at_a_time = f", {train.given_micro_batch_size:,} samples at a time" if train.given_micro_batch_size else ""
    lines = [
        f"{plural(parameters, 'parameter')}{frozen}; {length} with batches of {train.global_batch_size:,} on "
        f"{plural(world_size(), 'rank')}{at_a_time}, {loaders} each, {train.precision}"
    ]
    if plan.at:
        tokens = " ".join(map(str, plan.tokens))
        word = "dropping" if plan.drops else "merging"
        lines.append(
            f"{word} ({plan.method}): patch tokens per block {tokens}, true rate {plan.rate:.3f}"
            f"{phase(recipe, total_steps)}"
        )
    return lines + _taught_by_branch(recipe)


def _taught_by_branch(recipe: Recipe) -> list[str]:
    """A line about a branch whose losses do not reach the blocks of the image tower."""
    frequency = recipe.model.frequency
    if frequency is None or frequency.placement != "branch" or recipe.losses.read_other_crop:
        return []
    taught = "the text tower alone" if frequency.input == "dct" else "the text tower and the patch embedding alone"
    return [f"the frequency branch teaches {taught}; losses.align makes it teach the image tower"]


def phase(recipe: Recipe, total_steps: int | None) -> str:
    """Words for the steps in which tokens merge; an empty text if they merge in all of them."""
    assert recipe.model.merging is not None
    if total_steps is None:
        return ""
    steps = merging_steps(total_steps, recipe.model.merging.active)
    if len(steps) == total_steps:
        return ""
    return f", in steps {steps[0]:,} to {steps[-1]:,}" if steps else ", in no step: the run has too few"


def cautions(recipe: Recipe, plan: MergePlan, total_steps: int | None) -> list[str]:
    """Lines about settings that are allowed and probably not meant; for `total_steps` see `facts`."""
    lines = _idle_keys(recipe, total_steps) + _overwriting(recipe)
    if plan.largest_merge > MOST_IN_ONE_MERGE:
        lines.append(
            f"one merge removes {plan.largest_merge:.0%} of the tokens and leaves guidance little to choose; add "
            "places to model.merging.at"
        )
    if total_steps is not None and recipe.optim.warmup_steps >= total_steps:
        lines.append(
            f"optim.warmup_steps {recipe.optim.warmup_steps} is not below the {plural(total_steps, 'step')} of the run:"
            " the learning rate only rises; lower it"
        )
    return lines


def _idle_keys(recipe: Recipe, total_steps: int | None) -> list[str]:
    """Lines about values that change nothing, or that only do harm."""
    lines, merging, layer_decay = [], recipe.model.merging, recipe.optim.layer_decay
    if merging is not None and merging.rate == 0:
        changed = {"at": merging.at is not None, "active": merging.active != DEFAULT.active}
        lines += [
            f"model.merging.{key} changes nothing while model.merging.rate is 0; give a rate, or leave it out"
            for key, is_given in changed.items()
            if is_given
        ]
    elif merging is not None and total_steps is not None and not merging_steps(total_steps, merging.active):
        first, last = merging.active
        lines.append(
            f"model.merging.active [{first:g}, {last:g}] contains none of the {plural(total_steps, 'step')} of the "
            "run: nothing merges in training; widen it"
        )
    if recipe.losses.read_other_crop and recipe.data.augment.crop_scale is None:
        lines.append("data.augment.crop_scale null gives losses.align the same crop twice; give a range")
    if layer_decay < 1 and recipe.model.init is None:
        slowed = "the lower blocks of random weights" if recipe.model.vision.init is None else "the new text tower too"
        lines.append(
            f"optim.layer_decay {layer_decay:g} is for trained weights, and model.init is null: it slows {slowed}; set "
            "it to 1"
        )
    if recipe.evaluate.at_start and not recipe.evaluate.zeroshot and recipe.data.validation is None:
        lines.append("evaluate.at_start has nothing to measure; name evaluate.zeroshot or data.validation")
    return lines


def _overwriting(recipe: Recipe) -> list[str]:
    """A line about a learning rate that fits random weights, where training starts from trained ones.

    A locked image tower is not overwritten, and the text tower beside it is often new.
    """
    lr = recipe.optim.lr
    if recipe.model.freeze == "image" or lr <= FINE_TUNING_LR:
        return []
    if recipe.model.vision.init is not None:
        return [
            f"optim.lr {lr:g} fits a training from random weights, and model.vision.init gives the image tower trained "
            "ones: it overwrites what they have learned; set model.freeze=image"
        ]
    if recipe.model.init is None:
        return []
    return [
        f"optim.lr {lr:g} fits a training from random weights, and model.init gives trained ones: it overwrites what "
        "they have learned; CLIP is fine-tuned with 1e-6 to 3e-5; set optim.lr=1e-5"
    ]


def resume_facts(start: Start, step: int) -> list[str]:
    """Lines about the run that is resumed, and the permitted changes of its recipe."""
    if not start.resumes:
        return []
    changes = [
        move_in_words(change) if is_move(change) else "changed: {}: {} -> {}".format(*change)
        for change in start.changes
    ]
    return [f"resuming {start.run.folder} after step {step:,}", *changes]


def preflight(datasets: Sequence[ShardDataset], order: Order, world_size: int) -> list[str]:
    """Lines about the data sets and the steps of an epoch; the first sample of each data set is decoded.

    Raises:
        UsageError: the global batch does not divide by the ranks.
        RunError: the first sample of a data set cannot be read.
    """
    global_batch_size = order.global_batch_size
    check_divides(global_batch_size, world_size)
    lines = []
    for number, dataset in enumerate(datasets):
        decoded(dataset.read(0))
        share = f", {float(order.shares[number]):.1%} of what is seen" if order.shares else ""
        lines.append(f"{dataset.name}: {dataset.num_samples:,} samples in {plural(dataset.num_shards, 'shard')}{share}")
    if order.steps_per_epoch is not None:
        left_out = order.num_samples - order.steps_per_epoch * global_batch_size
        tail = f"; {left_out:,} samples are left out, others each epoch" if left_out else ""
        steps = order.steps_per_epoch
        lines.append(f"{order.num_samples:,} samples / {global_batch_size:,} = {steps:,} steps an epoch{tail}")
    if world_size > 1:
        lines.append(f"{global_batch_size:,} / {world_size} ranks = {global_batch_size // world_size:,} samples a rank")
    return lines
