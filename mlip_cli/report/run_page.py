"""The page of one run: report.html."""

from collections.abc import Mapping

from mlip_cli.evaluate.picture_results import GalleryResult
from mlip_cli.evaluate.results import DIRECTIONS, ZeroshotResult
from mlip_cli.evaluate.statistics import metric_prefix
from mlip_cli.report.average import average_sections
from mlip_cli.report.before_after import before_after_sections
from mlip_cli.report.canvas import Chart
from mlip_cli.report.curves import curves_section
from mlip_cli.report.galleries import gallery_section, merges_section
from mlip_cli.report.opening import run_opening
from mlip_cli.report.page import Html, definitions, details, element, joined, note, page, section, table
from mlip_cli.report.profiles import profile_section
from mlip_cli.report.record import RunRecord
from mlip_cli.report.retrieval import retrieval_sections
from mlip_cli.report.scores import scores_section
from mlip_cli.report.sweeps import sweep_section
from mlip_cli.report.tables import RECALLS_SHOWN, Table
from mlip_cli.terminal.output import plural

TRAINING = "training"
"""Role of the cards of training data; several are numbered."""


def run_page(record: RunRecord, charts: Mapping[str, Chart], *, written: str) -> str:
    """The whole page.

    Args:
        charts: those that are files too, by name.
        written: the line about the page's making.
    """
    return page(
        f"{record.name} · mlip",
        heading=record.name,
        lead=[note(_lead(record)), run_opening(record), *(note(line) for line in record.damaged)],
        sections=[
            *before_after_sections(record),
            *average_sections(record, charts),
            scores_section(record),
            *retrieval_sections(record),
            curves_section([record], chances=known_chances(record)),
            gallery_section(record),
            merges_section(record),
            sweep_section(record, charts),
            profile_section(record, charts),
            _data_section(record),
            _recipe_section(record),
        ],
        foot=joined(note(line) for line in [written, *record.attributions]),
    )


def _lead(record: RunRecord) -> str:
    """The method, its data and how the run ended, in a sentence."""
    parts = [method(record)]
    cards = [card for role, card in record.cards.items() if role.startswith(TRAINING)]
    if cards:
        sources = dict.fromkeys(card.provenance.source or card.folder for card in cards)
        parts.append(f"on {plural(sum(card.num_samples for card in cards), 'sample')} of {' and '.join(sources)}")
    if record.origin is not None:
        return f"{', '.join(parts)}. No training in this folder."
    end = record.stamp.end_reason
    if end is None or end == "finished":
        steps = record.recipe.train.steps if record.recipe is not None else None
        parts.append(f"step {record.last_step:,}" + (f" of {steps:,}" if steps else ""))
    if record.last_loss is not None:
        parts.append(f"loss {record.last_loss}")
    return ", ".join(parts) + f": {end or 'not ended'}."


def method(record: RunRecord) -> str:
    """CLIP, or MLIP with the parts that the recipe switches on."""
    recipe = record.recipe
    if recipe is None:
        return "a run"
    merging = recipe.model.merging
    if recipe.model.frequency is None and merging is None:
        return "CLIP"
    name = "MLIP" if recipe.model.frequency is not None else "CLIP"
    return name + (f" with {merging.method} merging at rate {merging.rate:g}" if merging is not None else "")


def known_chances(record: RunRecord) -> dict[str, float]:
    """Chance level by the name of a measure in metrics.jsonl. Measures without a stored result are left out."""
    chances: dict[str, float] = {}
    gallery = record.newest(GalleryResult)
    if gallery is not None:
        for way in DIRECTIONS:
            chances |= {f"validation_{way}_r{k}": gallery.scores[way].at(k).chance for k in RECALLS_SHOWN}
        if record.recipe is not None:  # for batches whose captions all differ
            size = min(record.recipe.train.global_batch_size, gallery.num_images)
            chances["validation_in_batch_acc1"] = 1 / size
    for result in record.all_of(ZeroshotResult):
        prefix = metric_prefix(result.dataset)
        chances |= {f"{prefix}_{name}": result.chance for name in ("mean_recall", "acc1")}
        if result.names:
            chances |= {
                f"{prefix}_{way}_r{k}": result.names.at(k).chance for way in ("name", "picture") for k in (1, 5)
            }
    return chances


def _data_section(record: RunRecord) -> Html:
    """The data cards in short."""
    parts = []
    for role, card in record.cards.items():
        spreads = [
            [name.replace("_", " "), *(f"{value:,}" for value in (own.min, own.median, own.mean, own.max))]
            for name, own in card.spreads.items()
        ]
        classes = [f"{name} {count:,}" for name, count in card.classes.items()]
        num_classes = plural(card.num_classes, "class", "classes")
        if card.num_classes != len(classes):
            num_classes += f", the {len(classes)} most frequent"
        parts += [
            element("h3", f"{role}: {plural(card.num_samples, 'sample')}"),
            definitions(
                [
                    ("folder", card.folder),
                    ("source", card.provenance.source),
                    ("holds", card.provenance.holds),
                    ("prepared by", card.provenance.tool),
                    ("bytes", f"{card.num_bytes:,}" if card.num_bytes is not None else None),
                    ("fingerprint", card.fingerprint[:16]),
                    ("licence", card.provenance.license),
                    ("attribution", card.provenance.attribution),
                ]
            ),
            details("Numbers", table(Table(["a sample's", "min", "median", "mean", "max"], spreads)))
            if spreads
            else None,
            details(num_classes, element("p", ", ".join(classes))) if classes else None,
        ]
    return section("data", "Data", *(parts or [note("The run has no data cards.")]))


def _recipe_section(record: RunRecord) -> Html:
    stamp = record.stamp
    keys = ("started", "from_step", "device", "ranks", "threads", "command")
    sessions = [[getattr(session, key) for key in keys] for session in stamp.sessions]
    versions = ", ".join(f"{name} {version or 'not installed'}" for name, version in stamp.versions.items())
    made_by = f"{stamp.mlip_version}, commit {stamp.commit or 'unknown'}" if stamp.mlip_version else None
    return section(
        "recipe",
        "Recipe and stamp",
        definitions(
            [
                ("mlip", made_by),
                ("versions", versions or None),
                ("platform", stamp.platform),
                ("seed", stamp.seed),
                ("started", stamp.started),
                ("ended", stamp.ended),
                ("why it ended", stamp.end_reason),
            ]
        ),
        element("h3", "Sessions"),
        table(Table(["started", "after step", "device", "ranks", "threads", "command"], sessions)),
        details("Recipe, resolved", element("pre", record.recipe_text), is_open=True),
    )
