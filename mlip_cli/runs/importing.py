"""Make a run of the weights of another program, once: later calls find it."""

import hashlib
import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from mlip_cli.data.packages import open_clip_module
from mlip_cli.data.tokenizer import tokenizer_from
from mlip_cli.errors import UsageError
from mlip_cli.files import full_disk_named, lock, remove, sync_folder, write_bytes, write_text
from mlip_cli.model.clip import build_model
from mlip_cli.model.open_clip import as_built, from_open_clip
from mlip_cli.paths import escaped
from mlip_cli.recipe.architecture import Architecture, with_preprocessing
from mlip_cli.recipe.checks import check
from mlip_cli.recipe.config import GlobalLoss, Losses, Recipe, TokenizerFile, Train
from mlip_cli.recipe.load import recipe_yaml
from mlip_cli.runs.checkpoint import WEIGHTS, save_checkpoint
from mlip_cli.runs.folder import RUNS, Run
from mlip_cli.runs.foreign import Foreign, read_foreign_object
from mlip_cli.runs.weight_files import check_finite, differing, read_weights
from mlip_cli.terminal.output import say, warn

IMPORTED = RUNS / "foreign"
"""Apart from the runs that `mlip pretrain` writes, so that a RUN by default is never one of these."""
OF_OPENAI = ("input_resolution", "context_length", "vocab_size")
"""Entries that only OpenAI's own files have."""
TOKENIZER = "tokenizer.json"


def imported(foreign: Foreign) -> tuple[Run, Path]:
    """The run with these weights, and its checkpoint. It is written if it is not there yet.

    Of several processes one writes it, and the others wait.

    Raises:
        UsageError: a damaged file, weights of another architecture, or a tokenizer that is missing.
        RunError: the disk is full.
    """
    recipe = recipe_of(foreign)
    text, sha256 = recipe_yaml(recipe), _sha256(foreign.files)
    digest = hashlib.sha256(f"{sha256}{text}".encode()).hexdigest()[:8]
    run = Run(IMPORTED / f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', foreign.name)}-{digest}")
    IMPORTED.mkdir(parents=True, exist_ok=True)
    with open(IMPORTED / f".{run.folder.name}.lock", "w") as guard:
        lock(guard, when_held=lambda: say(f"{foreign.shown}: another process copies it; waiting"))
        checkpoint = run.latest_checkpoint()
        if checkpoint is None:
            origin = {"source": os.path.abspath(foreign.files[0]), "named": foreign.shown, "sha256": sha256}
            _write(run, foreign, recipe, origin={"kind": "import", **origin})
            checkpoint = run.latest_checkpoint()
            assert checkpoint is not None
            size = (checkpoint / WEIGHTS).stat().st_size
            say(f"{foreign.shown}: copied into the run {run.folder} ({size / 1e6:,.0f} MB)")
        else:
            say(f"{foreign.shown}: run {run.folder}")
    return run, checkpoint


def _write(run: Run, foreign: Foreign, recipe: Recipe, *, origin: dict[str, str]) -> None:
    """Write the run folder under a temporary name and rename it; this process holds its lock.

    A run whose checkpoint is gone, such as a damaged one, gets it again and keeps its results.
    """
    weights = _fitted(foreign, recipe)
    if run.recipe.is_file():
        save_checkpoint(run.checkpoints, step=0, weights=weights, origin=origin)
        return
    temporary = Run(run.folder.with_name(f".{run.folder.name}.tmp"))
    remove(temporary.folder)  # of a process that was killed
    try:
        with full_disk_named(run.folder, "make room and repeat the command"):
            temporary.folder.mkdir()
            save_checkpoint(temporary.checkpoints, step=0, weights=weights, origin=origin)
            if recipe.model.text.tokenizer is not None:
                write_bytes(temporary.tokenizer, Path(recipe.model.text.tokenizer.file).read_bytes())
            said = f"# The model of {foreign.shown}, whose weights lie in checkpoints/.\n"
            write_text(temporary.recipe, escaped(said, keep="\n") + recipe_yaml(recipe))
            os.replace(temporary.folder, run.folder)
            sync_folder(run.folder.parent)
    finally:
        remove(temporary.folder)


def _sha256(files: tuple[Path, ...]) -> str:
    """Of the contents of all files, one after the other."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


@cache
def recipe_of(foreign: Foreign) -> Recipe:
    """A recipe with this model and no data; the weights are not read.

    Raises:
        UsageError: its parts do not fit together, or its tokenizer is missing.
    """
    described = foreign.architecture
    if foreign.configuration is not None:
        described = _as_published(described, foreign.configuration, foreign.tag)
    for line in described.notes:
        warn(f"{foreign.shown}: {line}")
    text = described.model.text.model_copy(update={"tokenizer": _tokenizer(foreign)})
    recipe = Recipe(
        data=described.data,
        model=described.model.model_copy(update={"text": text}),
        losses=Losses(spatial_global=GlobalLoss(kind="sigmoid" if described.is_sigmoid else "infonce")),
        train=Train(global_batch_size=1, precision="bf16"),
    )
    mistakes = check(recipe)
    if mistakes:
        raise UsageError("\n".join(f"{foreign.shown}: {key}: {wrong}" for key, wrong in mistakes))
    return recipe


def _as_published(described: Architecture, name: str, tag: str | None) -> Architecture:
    """With the pixels of the weights that OpenCLIP lists for this configuration under `tag`.

    Without a tag, those of most of them; a file does not say which of them it is. A warning names the others.

    Raises:
        UsageError: no such tag, or its weights need QuickGELU.
    """
    published = open_clip_module("pretrained")
    tags = {own: published.get_pretrained_cfg(name, own) for own in published.list_pretrained_tags_by_model(name)}
    quick = [own for own, its in tags.items() if its.get("quick_gelu")]
    needs_quick = quick if described.model.text.activation == "gelu" else []
    if tag is not None:
        if tag not in tags:
            known = ", ".join(tags) or "none"
            raise UsageError(f"open_clip:{name}/{tag}: OpenCLIP lists no such weights; it has {known}")
        if tag in needs_quick:
            raise UsageError(f"open_clip:{name}/{tag}: trained with QuickGELU; write open_clip:{name}-quickgelu/{tag}")
        return with_preprocessing(described, tags[tag])
    kinds: dict[tuple[object, ...], list[str]] = {}
    for own, its in tags.items():
        key = tuple(its.get("mean") or ()), tuple(its.get("std") or ()), its.get("resize_mode")
        kinds.setdefault(key, []).append(own)
    usual = max(kinds.values(), key=len, default=[])
    others = [own for kind in kinds.values() if kind is not usual for own in kind]
    if others:
        warn(
            f"open_clip:{name}: pixels are read as for {', '.join(usual)}; weights of {', '.join(others)} read other "
            f"ones: name them, as in open_clip:{name}/{others[0]}:FILE"
        )
    if needs_quick:
        warn(
            f"open_clip:{name}: computed with GELU; the weights {', '.join(needs_quick)} were trained with QuickGELU "
            f"and need open_clip:{name}-quickgelu:FILE; a file does not say which it was trained with"
        )
    return with_preprocessing(described, tags[usual[0]]) if usual else described


def _tokenizer(foreign: Foreign) -> TokenizerFile | None:
    wanted = foreign.architecture.tokenizer
    if wanted is None:
        return None
    file = foreign.folder / TOKENIZER
    if not file.is_file():
        raise UsageError(
            f"{foreign.shown}: its tokenizer is missing; download {TOKENIZER} and tokenizer_config.json of "
            f"{wanted.name} into {foreign.folder}"
        )
    tokens = tokenizer_from(str(file))
    beside = file.with_name("tokenizer_config.json")
    special = read_foreign_object(beside) if beside.is_file() else {}

    def id_of(key: str, *usual: str) -> int | None:
        given = special.get(key)
        given = given.get("content") if isinstance(given, Mapping) else given
        names = [given] if isinstance(given, str) else usual
        return next((own for name in names if (own := tokens.token_to_id(name)) is not None), None)

    pad_id = id_of("pad_token", "<pad>", "[PAD]")
    if pad_id is None:
        raise UsageError(f"{file}: no padding token; {beside.name} names it as pad_token")
    separator = id_of("sep_token", "[SEP]") if wanted.zeroes_separator else None
    return TokenizerFile(file=str(file), pad_id=pad_id, zero_id=separator, clean=wanted.clean)


def _fitted(foreign: Foreign, recipe: Recipe) -> dict[str, Tensor]:
    """The weights by our names, in fp32, exactly those of the recipe's model.

    Raises:
        UsageError: they are those of another architecture, or not finite.
    """
    place = foreign.shown
    with torch.device("meta"):
        model = build_model(recipe)
    theirs: dict[str, Tensor] = {}
    for file in foreign.files:
        theirs |= read_weights(file)
    weights = as_built(from_open_clip(theirs, source=place), model.state_dict())
    wrong = differing(model.state_dict(), weights)
    if wrong:
        cure = "name its own architecture" if foreign.configuration else "the configuration beside it is another's"
        raise UsageError(f"{place}: weights of another model: {'; '.join(wrong[:3])}; {len(wrong)} differ; {cure}")
    check_finite(weights, source=place)
    if recipe.model.text.activation == "gelu" and all(name in theirs for name in OF_OPENAI):
        name = foreign.configuration
        cure = "set quick_gelu in its configuration" if name is None else f"name {name}-quickgelu"
        warn(f"{place}: a file of OpenAI, whose models use QuickGELU; {cure}")
    return {name: tensor.float() for name, tensor in weights.items()}
