"""`mlip pretrain --dry-run`: what would run, without reading more than the head of the data."""

from collections.abc import Iterator
from typing import Any

import torch

from mlip_cli.data.open import open_sources
from mlip_cli.distributed import world_size
from mlip_cli.errors import UsageError
from mlip_cli.evaluate.datasets.find import UnknownDataSetError, data_root, find_benchmark
from mlip_cli.model.clip import build_model
from mlip_cli.profiling.flops import frequency_gflops, image_gflops, parameters, text_gflops
from mlip_cli.recipe.config import Cache, Recipe, Source
from mlip_cli.recipe.load import LoadedRecipe, recipe_yaml
from mlip_cli.runs.initial_weights import check_initial
from mlip_cli.terminal.output import plural, print_json, print_lines, print_prose
from mlip_cli.train.facts import cautions, preflight
from mlip_cli.train.setup import num_workers, open_data, training_device


def describe(loaded: LoadedRecipe, *, resumes: bool, as_json: bool) -> None:
    """Print the resolved recipe with the origin of every value, and what follows from it."""
    facts = derived(loaded.recipe, resumes=resumes)
    if as_json:
        print_json({"recipe": loaded.recipe.model_dump(mode="json"), "origins": loaded.origins, **facts})
        return
    print_lines(recipe_yaml(loaded.recipe, loaded.origins))
    print_lines("")
    print_prose("\n".join(_lines(loaded.recipe, facts)))
    for line in facts["missing"]:
        print_lines(f"missing: {line}")  # with a command to copy, which is not folded
    for line in facts["cautions"]:
        print_prose(f"caution: {line}")


def derived(recipe: Recipe, *, resumes: bool) -> dict[str, Any]:
    """Model, costs, batch and data as plain data; missing data is an entry with its cure, not an error.

    Raises:
        UsageError: a batch that the ranks cannot share or the data cannot fill, a model that cannot be built or that
            `model.init` does not fit, or an evaluation data set that nobody knows.
    """
    with torch.device("meta"):
        model = build_model(recipe)
    if recipe.model.init is not None and not resumes:
        check_initial(model, recipe)
    if recipe.model.freeze is not None:
        model.freeze(recipe.model.freeze)
    plan, ranks = model.training_plan, world_size()
    facts: dict[str, Any] = {
        "device": str(training_device(recipe)),
        "ranks": ranks,
        "samples_per_rank": recipe.train.global_batch_size / ranks,
        "num_workers": num_workers(recipe),
        "parameters": parameters(model),
        "parameters_that_train": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "patch_tokens_per_block": list(plan.tokens),
        "true_merge_rate": plan.rate,
        "gflops_per_image": sum(image_gflops(model, plan).values()),
        "gflops_per_image_unmerged": sum(image_gflops(model, model.merge_plan(0.0)).values()),
        "gflops_per_image_frequency_branch": frequency_gflops(model, plan),
        "gflops_per_text": text_gflops(model, model.context_length),
        "steps": recipe.train.steps,
        "data": [],
        "missing": list(_missing(recipe)),
    }
    if not any(_missing_sources(recipe.data.train, recipe.data.cache)):
        data = open_data(recipe)
        facts["data"] = preflight(data.datasets, data.order, recipe.train.global_batch_size, ranks)
        facts["steps"] = data.total_steps
    facts["cautions"] = cautions(recipe, plan, facts["steps"])
    return facts


def _missing(recipe: Recipe) -> Iterator[str]:
    """What training would look for and not find, each with its cure."""
    yield from _missing_sources(recipe.data.train, recipe.data.cache)
    yield from _missing_sources(recipe.data.validation or (), recipe.data.cache)
    for name in recipe.evaluate.zeroshot:
        try:
            find_benchmark(name, root=data_root(None))
        except UnknownDataSetError:
            raise
        except UsageError as error:
            yield str(error)


def _missing_sources(sources: tuple[Source, ...], cache: Cache) -> Iterator[str]:
    for source in sources:
        try:
            open_sources([source], cache=cache)
        except UsageError as error:
            yield str(error)


def _lines(recipe: Recipe, facts: dict[str, Any]) -> list[str]:
    ranks, batch = facts["ranks"], recipe.train.global_batch_size
    micro = recipe.train.given_micro_batch_size
    at_a_time = ", as many at a time as fit" if recipe.train.micro_batch_size == "auto" else ""
    counted = ", ".join(f"{name} {count:,}" for name, count in facts["parameters"].items())
    length = plural(facts["steps"], "step") if facts["steps"] else plural(recipe.train.epochs or 0, "epoch")
    loaders = plural(facts["num_workers"], "loader process", "loader processes")
    frozen = f"; {facts['parameters_that_train']:,} train (model.freeze: {recipe.model.freeze})"
    return [
        f"device: {facts['device']}, {recipe.train.precision}, {loaders} a rank",
        f"batch: {batch:,} / {plural(ranks, 'rank')} = {facts['samples_per_rank']:g} a rank"
        + (f", {micro:,} at a time" if micro else at_a_time),
        f"length: {length}",
        f"parameters: {sum(facts['parameters'].values()):,} ({counted})" + (frozen if recipe.model.freeze else ""),
        f"patch tokens per block: {' '.join(map(str, facts['patch_tokens_per_block']))}"
        f" (true merge rate {facts['true_merge_rate']:.3f})",
        f"GFLOPs per image: {facts['gflops_per_image']:.3g} (unmerged {facts['gflops_per_image_unmerged']:.3g}, "
        f"frequency branch in training {facts['gflops_per_image_frequency_branch']:.3g}); "
        f"per text of {recipe.model.text.context_length} tokens: {facts['gflops_per_text']:.3g}",
        *[f"data: {line}" for line in facts["data"]],
    ]
