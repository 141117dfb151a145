"""`mlip pretrain --dry-run`: shows what would run, and reads one sample of each data set at most."""

from dataclasses import dataclass
from typing import Any

import torch

from mlip_cli.commands.missing import missing_data, missing_sources
from mlip_cli.data.open import open_sources
from mlip_cli.devices import has_units_for_bf16
from mlip_cli.distributed import world_size
from mlip_cli.errors import UsageError
from mlip_cli.model.clip import CLIP, build_model
from mlip_cli.profiling.flops import frequency_gflops, image_gflops, parameters, text_gflops
from mlip_cli.recipe.config import Recipe, Source
from mlip_cli.recipe.load import LoadedRecipe, recipe_yaml
from mlip_cli.runs.initial_weights import check_initial
from mlip_cli.runs.tower_weights import pixel_cautions
from mlip_cli.terminal.output import plural, print_json, print_lines, print_prose
from mlip_cli.train.facts import cautions, facts, preflight
from mlip_cli.train.setup import (
    num_workers,
    open_data,
    precision_cautions,
    training_device,
    with_usual_precision,
)


@dataclass(frozen=True)
class Planned:
    """What a run of a recipe would be; missing data is an entry with its cure, not an error."""

    recipe: Recipe
    """In the precision of this device."""
    model: CLIP
    """Without weights."""
    device: torch.device
    steps: int | None
    """None: the number of epochs is given, and data is missing."""
    data: list[str]
    """Lines about the data sets."""
    missing: list[str]
    cautions: list[str]


def describe(loaded: LoadedRecipe, *, resumes: bool, as_json: bool) -> None:
    """Print the resolved recipe with the origin of every value, and what follows from it.

    Raises:
        UsageError: the ranks cannot share the batch, the data cannot fill it, the model cannot be built, `model.init`
            does not fit it, or an evaluation data set is unknown; at the end, if data is missing.
    """
    recipe = loaded.recipe
    planned = plan(recipe, resumes=resumes)
    if as_json:
        print_json({"recipe": recipe.model_dump(mode="json"), "origins": loaded.origins, **_facts(planned)})
    else:
        _print(loaded, planned)
    if planned.missing:
        raise UsageError(f"--dry-run: {plural(len(planned.missing), 'data set')} missing, see above: no training yet")


def _print(loaded: LoadedRecipe, planned: Planned) -> None:
    print_lines(recipe_yaml(loaded.recipe, loaded.origins))
    print_lines("")
    print_prose("\n".join(_lines(planned)))
    for line in planned.cautions:
        print_prose(f"caution: {line}")
    for line in planned.missing:
        print_lines(f"missing: {line}")  # with a command to copy, which is not folded


def plan(recipe: Recipe, *, resumes: bool) -> Planned:
    """Build the model without weights and open the data that is there; raises as `describe`."""
    with torch.device("meta"):
        model = build_model(recipe)
    if recipe.model.init is not None and not resumes:
        check_initial(recipe)
    if recipe.model.freeze is not None:
        model.freeze(recipe.model.freeze)

    def look(source: Source) -> None:
        open_sources([source], cache=recipe.data.cache)

    device, steps, lines, missing = training_device(recipe), recipe.train.steps, [], list(missing_data(recipe, look))
    if not any(missing_sources(recipe.data.train, look)):
        data = open_data(recipe)
        lines = preflight(data.datasets, data.order, world_size())
        steps = data.total_steps
    recipe = with_usual_precision(recipe, has_units=has_units_for_bf16(device))
    warned = cautions(recipe, model.training_plan, steps) + precision_cautions(recipe, device)
    if recipe.model.vision.init is not None and not resumes:
        warned += pixel_cautions(recipe)
    return Planned(recipe, model, device, steps, lines, missing, warned)


def _lines(planned: Planned) -> list[str]:
    """What a run would print before its first step, the device and the costs."""
    recipe = planned.recipe
    image, unmerged, branch, text = (f"{cost:.3g}" for cost in _gflops(recipe, planned.model).values())
    counted = ", ".join(f"{name} {count:,}" for name, count in parameters(planned.model).items())
    return [
        f"device: {planned.device}",
        *facts(recipe, planned.model, planned.steps),
        f"parameters: {counted}",
        f"GFLOPs per image: {image} (unmerged {unmerged}, frequency branch in training {branch}); "
        f"per text of {planned.model.context_length} tokens: {text}",
        *[f"data: {line}" for line in planned.data],
    ]


def _facts(planned: Planned) -> dict[str, Any]:
    """The same as JSON."""
    recipe, model, merges = planned.recipe, planned.model, planned.model.training_plan
    return {
        "device": str(planned.device),
        "ranks": world_size(),
        "samples_per_rank": recipe.train.global_batch_size / world_size(),
        "num_workers": num_workers(recipe),
        "parameters": parameters(model),
        "parameters_that_train": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "patch_tokens_per_block": list(merges.tokens),
        "true_merge_rate": merges.rate,
        **_gflops(recipe, model),
        "steps": planned.steps,
        "data": planned.data,
        "missing": planned.missing,
        "cautions": planned.cautions,
    }


def _gflops(recipe: Recipe, model: CLIP) -> dict[str, float]:
    other_crop = recipe.losses.read_other_crop
    return {
        "gflops_per_image": sum(image_gflops(model, model.training_plan).values()),
        "gflops_per_image_unmerged": sum(image_gflops(model, model.merge_plan(0.0)).values()),
        "gflops_per_image_frequency_branch": frequency_gflops(model, model.training_plan, other_crop=other_crop),
        "gflops_per_text": text_gflops(model, model.context_length),
    }
