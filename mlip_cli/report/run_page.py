"""report.html of one run."""

from collections.abc import Mapping

from mlip_cli.evaluate.statistics import metric_prefix
from mlip_cli.report.canvas import Picture
from mlip_cli.report.galleries import gallery_section, merges_section
from mlip_cli.report.page import Html, element, facts, folded, joined, note, page, section, table, tiles
from mlip_cli.report.record import Result, RunRecord
from mlip_cli.report.results import curves_section, merge_rate, results_section
from mlip_cli.report.speed import profile_section, sweep_section
from mlip_cli.terminal.output import percent, plural

TRAINING = "training"
"""Role of the data cards that a run learned from; several are numbered."""


def run_page(record: RunRecord, pictures: Mapping[str, Picture], *, written: str) -> str:
    """The whole page.

    Args:
        pictures: those of `standalone_pictures`.
        written: time and version that made the page.
    """
    return page(
        f"{record.name} · mlip",
        heading=record.name,
        lead=[element("p", _lead(record)), *(note(line) for line in record.damaged), _tiles(record)],
        sections=[
            results_section(record),
            curves_section([record], chances=known_chances(record)),
            gallery_section(record),
            merges_section(record),
            sweep_section(record, pictures),
            profile_section(record, pictures),
            _data_section(record),
            _recipe_section(record),
        ],
        foot=joined(note(line) for line in [written, *record.attributions]),
    )


def _lead(record: RunRecord) -> str:
    """What was trained on what, and how it ended."""
    parts = [method(record)]
    cards = [card for role, card in record.cards.items() if role.startswith(TRAINING)]
    if cards:
        sources = dict.fromkeys(card.get("provenance", {}).get("source") or card["folder"] for card in cards)
        parts.append(f"on {plural(sum(card['num_samples'] for card in cards), 'sample')} of {' and '.join(sources)}")
    end = record.stamp.get("end_reason")
    if end is None or end == "finished":
        parts.append(f"step {record.last_step:,}{_of_total(record)}")
    return ", ".join(parts) + f": {end or 'not ended'}."


def method(record: RunRecord) -> str:
    """CLIP, or MLIP and what of it the recipe switches on."""
    recipe = record.recipe
    if recipe is None:
        return "a run"
    merging = recipe.model.merging
    if recipe.model.frequency is None and merging is None:
        return "CLIP"
    name = "MLIP" if recipe.model.frequency is not None else "CLIP"
    return name + (f" with {merging.method} merging at rate {merging.rate:g}" if merging is not None else "")


def _of_total(record: RunRecord) -> str:
    steps = record.recipe.train.steps if record.recipe is not None else None
    return f" of {steps:,}" if steps else ""


def _tiles(record: RunRecord) -> Html:
    found: list[tuple[str, str, str]] = []
    if record.last_loss is not None:
        found.append(("loss", record.last_loss, f"at step {record.last_step:,}"))
    for dataset, result in _newest_results(record).items():
        low, high = result["mean_per_class_recall_interval"]
        beside = f"95 %: {percent(low)}–{percent(high)}; chance {percent(result['chance'])} %; n {result['n']:,}"
        score = f"{percent(result['mean_per_class_recall'])} %"
        found.append((f"{dataset}: mean recall, rate {merge_rate(result)}", score, beside))
    gallery = record.newest("gallery")
    if gallery is not None:
        own = gallery["scores"]["text_to_image"]
        low, high = own["r5_interval"]
        beside = f"95 %: {percent(low)}–{percent(high)}; chance {percent(own['r5_chance'])} %; n {own['n']:,}"
        found.append(("text → image R@5", f"{percent(own['r5'])} %", beside))
    sweep = record.newest("merge_sweep")
    merged = [point for point in sweep["points"] if point["method"]] if sweep is not None else []
    if merged:
        best = max(merged, key=lambda point: point["speedup"])
        low, high = best["speedup_interval"]
        name = f"speed, {best['method']} at rate {best['true_rate']:.2f}"
        found.append((name, f"{best['speedup']:.2f}×", f"95 %: {low:.2f}–{high:.2f}"))
    return tiles(found)


def _newest_results(record: RunRecord) -> dict[str, Result]:
    """Of each data set the newest checkpoint's result, at the recipe's merge rate where that was measured."""
    merging = record.recipe.model.merging if record.recipe is not None else None
    rate = merging.rate if merging is not None else 0.0
    newest: dict[str, Result] = {}
    for result in record.results.get("zeroshot", []):
        best = newest.get(result["dataset"])
        if best is None or _preference(result, rate) >= _preference(best, rate):
            newest[result["dataset"]] = result
    return newest


def _preference(result: Result, rate: float) -> tuple[int, bool]:
    asked = result["merge_rate"]
    return result["step"], asked is None or asked == rate


def known_chances(record: RunRecord) -> dict[str, float]:
    """Chance level by the name of a measure in metrics.jsonl, as far as results tell it."""
    chances: dict[str, float] = {}
    gallery = record.newest("gallery")
    if gallery is not None:
        for way, scores in gallery["scores"].items():
            chances |= {f"validation_{way}_r{k}": scores[f"r{k}_chance"] for k in (1, 5, 10)}
        if record.recipe is not None:  # of batches with captions that all differ
            size = min(record.recipe.train.global_batch_size, gallery["num_images"])
            chances["validation_in_batch_acc1"] = 1 / size
    for result in record.results.get("zeroshot", []):
        prefix = metric_prefix(result["dataset"])
        chances |= {f"{prefix}_{name}": result["chance"] for name in ("mean_recall", "acc1")}
        if "names" in result:
            chances |= {f"{prefix}_name_r{k}": result["names"][f"r{k}_chance"] for k in (1, 5)}
    return chances


def _data_section(record: RunRecord) -> Html:
    """The cards, in short."""
    parts = []
    for role, card in record.cards.items():
        provenance, statistics = card.get("provenance", {}), card.get("statistics", {})
        spreads = [
            [name.replace("_", " "), *(f"{spread[key]:,}" for key in ("min", "median", "mean", "max"))]
            for name, spread in statistics.items()
            if isinstance(spread, dict) and "median" in spread
        ]
        classes = [f"{name} {count:,}" for name, count in statistics.get("classes", {}).items()]
        parts += [
            element("h3", f"{role}: {plural(card['num_samples'], 'sample')}"),
            facts(
                [
                    ("folder", card["folder"]),
                    ("source", provenance.get("source")),
                    ("prepared by", provenance.get("tool")),
                    ("bytes", f"{card['num_bytes']:,}" if "num_bytes" in card else None),
                    ("fingerprint", card["fingerprint"][:16]),
                    ("licence", provenance.get("license")),
                    ("attribution", provenance.get("attribution")),
                ]
            ),
            folded("Numbers", table(["a sample's", "min", "median", "mean", "max"], spreads)) if spreads else None,
            folded(_how_many_classes(statistics, len(classes)), element("p", ", ".join(classes))) if classes else None,
        ]
    return section("data", "Data", *(parts or [note("The run has no cards of its data.")]))


def _how_many_classes(statistics: Result, shown: int) -> str:
    most = "" if statistics["num_classes"] == shown else f", the {shown} most frequent"
    return plural(statistics["num_classes"], "class", "classes") + most


def _recipe_section(record: RunRecord) -> Html:
    stamp = record.stamp
    versions = stamp.get("versions", {}).items()
    sessions = [
        [
            session["started"],
            f"{session['from_step']:,}",
            session["device"],
            session["ranks"],
            session["threads"],
            session["command"],
        ]
        for session in stamp.get("sessions", [])
    ]
    return section(
        "recipe",
        "Recipe and stamp",
        facts(
            [
                ("mlip", f"{stamp['mlip_version']}, commit {stamp.get('commit') or 'unknown'}" if stamp else None),
                ("versions", ", ".join(f"{name} {version or 'not installed'}" for name, version in versions) or None),
                ("platform", stamp.get("platform")),
                ("seed", stamp.get("seed")),
                ("started", stamp.get("started")),
                ("ended", stamp.get("ended")),
                ("why it ended", stamp.get("end_reason")),
            ]
        ),
        element("h3", "Sessions"),
        table(["started", "after step", "device", "ranks", "threads", "command"], sessions, text_columns=6),
        folded("Recipe, resolved", element("pre", record.recipe_text), is_open=True),
    )
