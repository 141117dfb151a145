"""The model card of an exported folder: README.md, as the Hugging Face Hub shows it."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import yaml

from mlip_cli import __version__
from mlip_cli.evaluate.picture_results import GalleryResult
from mlip_cli.evaluate.results import ZeroshotResult
from mlip_cli.export.snippets import FORMATS, snippet
from mlip_cli.paths import encodable, escaped
from mlip_cli.recipe.config import LOSS_NAMES, Recipe, Text, Vision
from mlip_cli.report.costs import costs_table
from mlip_cli.report.galleries import recalls_table
from mlip_cli.report.headlines import scores_of
from mlip_cli.report.record import RunRecord, read_run
from mlip_cli.report.retrieval import retrieval_tables
from mlip_cli.report.run_page import method
from mlip_cli.report.scores import ZeroshotRow, newest_by_data, zeroshot_tables
from mlip_cli.report.tables import INTERVALS, Cell, Table
from mlip_cli.runs.contents import DataCard, Origin
from mlip_cli.runs.folder import ORIGIN, Run, step_of
from mlip_cli.terminal.output import plural

COMMONS = ("by", "by-sa", "by-nc", "by-nc-sa", "by-nd", "by-nc-nd")
LICENSES = {
    *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "odbl", "odc-by", "pddl", "unlicense"),
    *(f"cc-{kind}-{version}" for kind in COMMONS for version in ("2.0", "3.0", "4.0")),
}
"""Names that the Hub knows in the key `license`."""

MARKUP = re.compile(r"([\\`*_{}\[\]#|~$^=])")


def model_card(run: Run, recipe: Recipe, checkpoint: Path, *, format: str, lost: Sequence[str]) -> str:
    """README.md about one checkpoint of a run in the format `format`, one of `FORMATS`.

    Scores and costs are those that the run's files hold of this checkpoint; nothing is measured.

    Args:
        lost: a line about each thing of the run that the format does not hold.
    """
    record = at_checkpoint(read_run(run.folder), recipe, checkpoint)
    parts = [
        f"# {plain(record.name)}",
        f"{plain(method(record))}: a model that puts pictures and texts into one space. "
        f"Exported by mlip {__version__} from step {step_of(checkpoint):,}.",
        "## Use",
        *snippet(format, recipe),
        "## Scores",
        *_scores(record),
        "## Data",
        *_data(record, checkpoint),
        "## Model and training",
        *_training(record, recipe, checkpoint),
        *(["## Not in these files", "\n".join(f"- {plain(line)}" for line in lost)] if lost else []),
    ]
    return encodable(f"{_front_matter(record, recipe, checkpoint, format)}\n" + "\n\n".join(parts) + "\n")


def at_checkpoint(record: RunRecord, recipe: Recipe, checkpoint: Path) -> RunRecord:
    """The record without what was logged and measured after this checkpoint, or of others."""
    step = step_of(checkpoint)
    return replace(
        record,
        recipe=recipe,
        steps=[line for line in record.steps if line["step"] <= step],
        results=[result for result in record.results if result.step == step],
    )


def plain(text: object) -> str:
    """Text on one line that Markdown and HTML show as it is."""
    shown = escaped(str(text)).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return MARKUP.sub(r"\\\1", shown)


def _front_matter(record: RunRecord, recipe: Recipe, checkpoint: Path, format: str) -> str:
    """The YAML that the Hub reads.

    The licence is that of the training data, where all of it has one that the Hub knows and no weights come from
    elsewhere.
    """
    values: dict[str, Any] = {
        "library_name": FORMATS[format],
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["clip", "mlip", "image-text-retrieval"],
    }
    licences = {
        re.sub(r"\s+", "-", (card.provenance.license or "").strip().lower()) for card in _training_cards(record)
    }
    model = recipe.model
    is_own = model.init is None and model.vision.init is None and _origin(checkpoint) is None
    if is_own and len(licences) == 1 and licences <= LICENSES:
        values["license"] = licences.pop()
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---\n"


def _origin(checkpoint: Path) -> Origin | None:
    """Where the weights come from; None: a training of the run made them."""
    return Origin.read(checkpoint / ORIGIN) if (checkpoint / ORIGIN).is_file() else None


def _training_cards(record: RunRecord) -> list[DataCard]:
    return [card for role, card in record.cards.items() if role.startswith("training")]


def _scores(record: RunRecord) -> Iterator[str]:
    """The answers in words, then all stored results as tables."""
    answers = [f"- {plain(score.question)} {plain(score.sentence)}" for score in scores_of(record)]
    recalls = retrieval_tables(record)
    if not answers and not recalls:
        yield "Nothing is measured yet: the run holds no result of this checkpoint."
        return
    if answers:
        yield "\n".join(answers)
    for name, results in newest_by_data(record.all_of(ZeroshotResult)).items():
        for table in zeroshot_tables(name, [ZeroshotRow(result) for result in results], with_speed=False):
            yield from markdown_table(table)
    for table in recalls:
        yield from markdown_table(table)
    gallery = record.newest(GalleryResult)
    if gallery is not None:
        title = f"validation: {plural(gallery.num_images, 'picture')}, {plural(gallery.num_texts, 'distinct text')}"
        rate = f"true merge rate {gallery.true_merge_rate:.3f}"
        yield from markdown_table(replace(recalls_table(gallery), title=title, notes=[f"{rate}; {INTERVALS}"]))


def markdown_table(table: Table) -> Iterator[str]:
    """A table with its title and notes."""
    if table.title:
        yield f"**{plain(table.title)}**"
    lines = [table.columns, ["---"] * len(table.columns), *table.rows]
    cells = [["-" if cell is None else str(cell) for cell in line] for line in lines]
    yield "\n".join(f"| {' | '.join(line if number == 1 else map(plain, line))} |" for number, line in enumerate(cells))
    for words in table.notes:
        yield plain(words)


def _data(record: RunRecord, checkpoint: Path) -> Iterator[str]:
    """Data sets with number, source and licence; names of folders without their place on this machine."""
    origin = _origin(checkpoint)
    if origin is not None and origin.source is not None:
        file, digest = Path(origin.source).name, str(origin.sha256)[:16]
        yield (
            f"The weights come from elsewhere: {plain(file)} (SHA-256 {plain(digest)}...). What they were trained on, "
            "and under which licence they are, is not known here; see where they were published."
        )
    elif origin is not None:
        yield f"The weights are {plain(origin.words)}. The data below is that of the run that they were written into."
    if not record.cards:
        if origin is None:
            yield "The run does not say on what data it was trained."
        return
    rows: list[list[Cell]] = []
    for role, card in record.cards.items():
        own = card.provenance
        name = Path(card.folder).name or card.folder
        rows.append([role, name, f"{card.num_samples:,}", own.source, own.holds, own.license])
    columns = ("used for", "name", "samples", "source", "holds", "licence")
    yield from markdown_table(Table(columns, rows, notes=record.attributions).without_empty_columns())


def _training(record: RunRecord, recipe: Recipe, checkpoint: Path) -> Iterator[str]:
    """The recipe in short, and what the training cost until this checkpoint."""
    rows: list[list[Cell]] = [[name, value] for name, value in _facts(recipe, checkpoint).items()]
    yield from markdown_table(Table(("part", "value"), rows))
    if record.steps:
        heads = {record.name: [None, None]}  # run and method stand above
        yield from markdown_table(costs_table([record], heads=heads))


def _facts(recipe: Recipe, checkpoint: Path) -> Mapping[str, str]:
    model, optim, data = recipe.model, recipe.optim, recipe.data
    facts = {
        "parameters": f"{num_parameters(checkpoint / 'model.safetensors'):,}",
        "pictures": f"{data.image_size} x {data.image_size} pixels",
        "image tower": _vision_words(model.vision),
        "text tower": _text_words(model.text),
        "joint space": f"{model.embed_dim} numbers",
    }
    if model.frequency is not None:
        facts["frequency"] = f"{model.frequency.placement} of {plural(model.frequency.depth, 'spectral block')}"
    if model.merging is not None:
        facts["merging"] = f"{model.merging.method}, rate {model.merging.rate:g}"
    if not data.train:  # no training of this run made the weights
        return facts
    facts["losses"] = ", ".join(_loss_words(recipe))
    if model.init is not None:
        facts["start"] = f"weights of {Path(model.init).name}"
    warmup = plural(optim.warmup_steps, "step")
    facts["optimiser"] = f"AdamW, peak lr {optim.lr:g}, weight decay {optim.weight_decay:g}, warm-up of {warmup}"
    facts["batch"] = f"{recipe.train.global_batch_size:,}"
    facts["precision"] = recipe.train.precision
    facts["seed"] = str(recipe.seed)
    return facts


def _vision_words(vision: Vision) -> str:
    if vision.timm is not None:
        return f"{vision.timm} (timm)"
    heads = plural(vision.num_heads or 0, "head")
    return f"ViT, patches of {vision.patch_size} pixels, width {vision.width}, depth {vision.depth}, {heads}"


def _text_words(text: Text) -> str:
    heads = plural(text.num_heads, "head")
    return f"transformer, up to {text.context_length} tokens, width {text.width}, depth {text.depth}, {heads}"


def _loss_words(recipe: Recipe) -> Iterator[str]:
    """spatial_global (infonce, weight 1)"""
    for name in LOSS_NAMES:
        term = getattr(recipe.losses, name)
        if term is not None:
            kind = getattr(term, "kind", None)
            yield f"{name} ({f'{kind}, ' if kind else ''}weight {term.weight:g})"


def num_parameters(weights: Path) -> int:
    """Numbers in a safetensors file, from its header."""
    from safetensors import safe_open

    with safe_open(weights, framework="numpy") as file:
        return sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 - not a mapping
