"""Write a run without its training: recipe, weights and tokenizer. mlip reads it wherever it reads a RUN."""

from pathlib import Path

from mlip_cli.files import write_bytes, write_text
from mlip_cli.recipe.config import Cache, Log
from mlip_cli.recipe.load import recipe_yaml
from mlip_cli.runs.checkpoint import WEIGHTS, load_weights, save_checkpoint
from mlip_cli.runs.folder import Run
from mlip_cli.runs.loading import LoadedRun


def write_safetensors(loaded: LoadedRun, folder: Path) -> list[str]:
    """Write a run folder with one checkpoint that has no state of a training. It holds all of the model."""
    run = Run(folder)
    weights = load_weights(loaded.checkpoint)
    origin = {"kind": "export", "named": f"{loaded.label} at step {loaded.step:,}"}
    save_checkpoint(run.checkpoints, step=loaded.step, weights=weights, origin=origin)
    no_data = {"train": (), "validation": None, "cache": Cache()}
    recipe = loaded.recipe.model_copy(update={"data": loaded.recipe.data.model_copy(update=no_data)})
    vision = recipe.model.vision.model_copy(update={"init": None})
    model = recipe.model.model_copy(update={"init": None, "freeze": None, "vision": vision})
    evaluate = recipe.evaluate.model_copy(update={"zeroshot": (), "best_metric": None})
    keep = recipe.train.keep.model_copy(update={"best": None})
    train = recipe.train.model_copy(update={"keep": keep})
    recipe = recipe.model_copy(update={"model": model, "evaluate": evaluate, "train": train, "log": Log()})
    text = recipe.model.text
    if text.tokenizer is not None:  # a run reads the file beside its recipe, whatever the name of the place
        tokenizer = text.tokenizer.model_copy(update={"file": run.tokenizer.name})
        model = model.model_copy(update={"text": text.model_copy(update={"tokenizer": tokenizer})})
        recipe = recipe.model_copy(update={"model": model})
    write_text(run.recipe, recipe_yaml(recipe))
    if loaded.recipe.model.text.tokenizer is not None:
        write_bytes(run.tokenizer, loaded.run.tokenizer.read_bytes())
    return []


def check_safetensors(loaded: LoadedRun, folder: Path) -> float:
    """The difference of the weights, which is 0: the file is the checkpoint's."""
    [copy] = Run(folder).checkpoints.glob(f"*/{WEIGHTS}")
    own, other = load_weights(loaded.checkpoint), load_weights(copy.parent)
    return max((own[name] - other[name]).abs().max().item() for name in own | other)
