"""Losses and measures over the steps, of one run or of several in shared charts."""

import re
from collections.abc import Mapping, Sequence

from mlip_cli.recipe.config import LOSS_NAMES
from mlip_cli.report.charts import Curve, curves_chart
from mlip_cli.report.page import Html, figure, figures, note, section
from mlip_cli.report.record import RunRecord

AT_K = re.compile(r"_r(\d+)$")
COUNTS = ("step", "samples_seen")
FAULTS = ("skipped_steps", "bad_samples")
"""Left out while they are 0."""
FROM_ZERO = ("lr", "images_per_s", "data_wait_share", "peak_gib", *FAULTS)
LOSS_KEYS = ("loss", *LOSS_NAMES)
DISTANCES = ("validation_modality_gap",)
"""Measures that are not fractions."""
TITLES = {
    "loss": "loss (weighted sum)",
    "lr": "learning rate",
    "grad_norm": "gradient norm before clipping",
    "images_per_s": "images/s",
    "data_wait_share": "share of time waiting for data",
    "peak_gib": "peak memory, GiB",
    "skipped_steps": "skipped steps, so far",
    "bad_samples": "bad samples replaced, so far",
}


def curves_section(records: Sequence[RunRecord], *, chances: Mapping[str, float]) -> Html:
    """Every loss and metric over the steps, of one run or of several in shared charts.

    Args:
        chances: chance level by the name of a measure; some may be unknown.
    """
    logged = dict.fromkeys(key for record in records for line in record.steps for key in line if key not in COUNTS)
    losses = [key for key in LOSS_KEYS if key in logged]
    others = [key for key in logged if key not in LOSS_KEYS]
    for key in FAULTS:
        if key in others and not any(line.get(key) for record in records for line in record.steps):
            others.remove(key)
    measures = dict.fromkeys(key for record in records for line in record.evaluations for key in line)
    families: dict[str, list[str]] = {}  # for a single run, recalls at several k share a chart
    for key in measures:
        if key not in COUNTS:
            families.setdefault(AT_K.sub("", key) if len(records) == 1 else key, []).append(key)
    if not logged:
        return section("curves", "Curves", note("Nothing logged yet."))
    charts = [
        *(_step_chart(records, key) for key in losses),
        *(_measure_chart(records, keys, chances) for keys in families.values()),
        *(_step_chart(records, key) for key in others),
    ]
    return section("curves", "Curves", figures(charts))


def _measure_chart(records: Sequence[RunRecord], keys: Sequence[str], chances: Mapping[str, float]) -> Html:
    """A curve for each run, or for each k of one run; fractions in per cent, with chance."""
    lines: list[Curve] = []
    scale = 1 if keys[0] in DISTANCES else 100
    for number, record in enumerate(records):
        for key in keys:
            measured = [line for line in record.evaluations if key in line]
            if measured:
                values = [None if line[key] is None else scale * line[key] for line in measured]
                label = _at(key) if len(keys) > 1 else record.name
                series = number if len(records) > 1 else len(lines)
                lines.append(Curve(label, [line["step"] for line in measured], values, series))
    levels = {
        f"chance {_at(key) if len(keys) > 1 else ''}".strip(): 100 * chances[key] for key in keys if key in chances
    }
    title = _words(keys[0] if len(keys) == 1 else AT_K.sub("", keys[0])) + ("" if keys[0] in DISTANCES else " %")
    return figure(curves_chart(title, lines, x_label="step", levels=levels, from_zero=True).in_page())


def _step_chart(records: Sequence[RunRecord], key: str) -> Html:
    """A key of metrics.jsonl, with a curve for each run."""
    lines = []
    for number, record in enumerate(records):
        own = [line for line in record.steps if key in line]
        if own:
            label = record.name if len(records) > 1 else ""
            lines.append(Curve(label, [line["step"] for line in own], [line[key] for line in own], number))
    title = TITLES.get(key) or key.replace("scale/", "logit scale: ")
    return figure(curves_chart(title, lines, x_label="step", from_zero=key in FROM_ZERO).in_page())


def _at(key: str) -> str:
    """openmoji_name_r5 -> R@5, openmoji_acc1 -> nothing"""
    found = AT_K.search(key)
    return f"R@{found.group(1)}" if found else ""


def _words(key: str) -> str:
    """validation_image_to_text_r1 -> validation: image to text R@1"""
    words = re.sub("^validation_", "validation: ", AT_K.sub(r" R@\1", key)).replace("in_batch", "in-batch")
    return re.sub(" acc1$", " top-1", words.replace("_", " "))
