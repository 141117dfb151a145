"""The page of one run: report.html."""

from collections.abc import Mapping

from mlip_cli.evaluate.picture_results import GalleryResult
from mlip_cli.evaluate.results import DIRECTIONS, SweepResult, ZeroshotResult
from mlip_cli.evaluate.statistics import metric_prefix
from mlip_cli.report.canvas import Chart
from mlip_cli.report.curves import curves_section
from mlip_cli.report.galleries import gallery_section, merges_section
from mlip_cli.report.page import Html, definitions, details, element, joined, note, page, section, table, tiles
from mlip_cli.report.profiles import profile_section
from mlip_cli.report.record import RunRecord
from mlip_cli.report.scores import rate_words, scores_section
from mlip_cli.report.sweeps import sweep_section
from mlip_cli.report.tables import (
    RECALLS_SHOWN,
    Spread,
    Table,
    main_score,
    percent_cell,
    recall_cell,
    speedup_cell,
)
from mlip_cli.terminal.output import percent, plural

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
        lead=[element("p", _lead(record)), *(note(line) for line in record.damaged), _tiles(record)],
        sections=[
            scores_section(record),
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
    end = record.stamp.end_reason
    if end is None or end == "finished":
        steps = record.recipe.train.steps if record.recipe is not None else None
        parts.append(f"step {record.last_step:,}" + (f" of {steps:,}" if steps else ""))
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


def _tiles(record: RunRecord) -> Html:
    found: list[tuple[str, str, str]] = []
    if record.last_loss is not None:
        found.append(("loss", record.last_loss, f"at step {record.last_step:,}"))
    for result in _newest_results(record):
        main = main_score(result, chance=result.chance)
        score = percent_cell(main.value, main.interval)
        beside = f"chance {percent(main.chance)} %; n {result.n:,}"
        found.append(_tile(f"{result.dataset}: {main.words}, rate {rate_words(result)}", score, " %", beside))
    gallery = record.newest(GalleryResult)
    if gallery is not None:
        recalls = gallery.scores["text_to_image"]
        beside = f"chance {percent(recalls.r5_chance)} %; n {recalls.n:,}"
        found.append(_tile("text to image R@5", recall_cell(recalls, 5), " %", beside))
    sweep = record.newest(SweepResult)
    merged = [point for point in sweep.points if point.method] if sweep is not None else []
    if merged:
        best = max(merged, key=lambda point: point.speedup)
        name = f"speed, {best.method} at rate {best.true_rate:.2f}"
        found.append(_tile(name, speedup_cell(best.speedup, best.speedup_interval), "×"))
    return tiles(found)


def _tile(name: str, number: Spread | None, unit: str, beside: str = "") -> tuple[str, str, str]:
    assert number is not None, name
    return name, f"{number.value}{unit}", f"95 %: {number.low}–{number.high}" + (f"; {beside}" if beside else "")


def _newest_results(record: RunRecord) -> list[ZeroshotResult]:
    """The newest checkpoint's result on each data set, at the recipe's merge rate where it was measured."""
    merging = record.recipe.model.merging if record.recipe is not None else None
    rate = merging.rate if merging is not None else 0.0
    results = record.all_of(ZeroshotResult)
    results.sort(key=lambda result: (result.step, result.merge_rate is None or result.merge_rate == rate))
    return list({result.dataset: result for result in results}.values())


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
