"""Losses and measures over the steps, of one run or of several in shared charts."""

import re
from collections.abc import Mapping, Sequence

from mlip_cli.recipe.config import LOSS_NAMES
from mlip_cli.report.charts import Curve, curves_chart
from mlip_cli.report.page import Html, figure, figures, note, section
from mlip_cli.report.record import RunRecord

AT_K = re.compile(r"_r(\d+)$")
FROM_ZERO = ("lr", "images_per_s", "data_wait_share", "peak_gib", "skipped_steps", "bad_samples")
COUNTS = ("step", "samples_seen")
DISTANCES = ("validation_modality_gap",)
"""Measures that are not fractions."""
LOSS_KEYS = ("loss", *LOSS_NAMES)


def curves_section(records: Sequence[RunRecord], *, chances: Mapping[str, float]) -> Html:
    """Every loss and metric over the steps, of one run or of several in shared charts.

    Args:
        chances: chance level by the name of a measure; some may be unknown.
    """
    steps = list(dict.fromkeys(key for record in records for line in record.steps for key in line))
    measures = list(dict.fromkeys(key for record in records for line in record.evaluations for key in line))
    if not steps:
        return section("curves", "Curves", note("Nothing logged yet."))
    charts = [
        *_loss_charts(records, [key for key in LOSS_KEYS if key in steps]),
        *_measure_charts(records, [key for key in measures if key not in COUNTS], chances),
        *_other_charts(records, [key for key in steps if key not in (*COUNTS, *LOSS_KEYS)]),
    ]
    return section("curves", "Curves", figures(charts))


def _loss_charts(records: Sequence[RunRecord], keys: Sequence[str]) -> list[Html]:
    """A chart of the total and of each term, unweighted."""
    titles = {"loss": "loss (weighted sum)"}
    return [_step_chart(records, titles.get(key, key), key) for key in keys]


def _measure_charts(records: Sequence[RunRecord], keys: Sequence[str], chances: Mapping[str, float]) -> list[Html]:
    """A chart for each measure. For a single run, recalls at several k share a chart."""
    if len(records) > 1:
        return [_measure_chart(records, [key], chances) for key in keys]
    families: dict[str, list[str]] = {}
    for key in keys:
        families.setdefault(AT_K.sub("", key), []).append(key)
    return [_measure_chart(records, own, chances) for own in families.values()]


def _measure_chart(records: Sequence[RunRecord], keys: Sequence[str], chances: Mapping[str, float]) -> Html:
    """A curve for each run, or for each k of one run; fractions in per cent, with chance."""
    lines: list[Curve] = []
    for number, record in enumerate(records):
        for key in keys:
            label = _at(key) if len(keys) > 1 else record.name
            measured = [line for line in record.evaluations if key in line]
            values = [line[key] if key in DISTANCES else _times_100(line[key]) for line in measured]
            if measured:
                lines.append(
                    Curve(
                        label, [line["step"] for line in measured], values, number if len(records) > 1 else len(lines)
                    )
                )
    levels = {
        f"chance {_at(key) if len(keys) > 1 else ''}".strip(): 100 * chances[key] for key in keys if key in chances
    }
    title = _words(keys[0] if len(keys) == 1 else AT_K.sub("", keys[0])) + ("" if keys[0] in DISTANCES else " %")
    return figure(curves_chart(title, lines, x_label="step", levels=levels, from_zero=True).in_page())


def _other_charts(records: Sequence[RunRecord], keys: Sequence[str]) -> list[Html]:
    """Learning rate, gradient, speed, waiting, memory, scales. Counts of faults are left out while they are 0."""
    quiet = {"skipped_steps", "bad_samples"}
    nonzero = {key for key in quiet if any(line.get(key) for record in records for line in record.steps)}
    titles = {
        "lr": "learning rate",
        "grad_norm": "gradient norm before clipping",
        "images_per_s": "images/s",
        "data_wait_share": "share of time waiting for data",
        "peak_gib": "peak memory, GiB",
        "skipped_steps": "skipped steps, so far",
        "bad_samples": "bad samples replaced, so far",
    }
    return [
        _step_chart(records, titles.get(key) or key.replace("scale/", "logit scale: "), key, from_zero=key in FROM_ZERO)
        for key in keys
        if key not in quiet - nonzero
    ]


def _step_chart(records: Sequence[RunRecord], title: str, key: str, *, from_zero: bool = False) -> Html:
    """A key of metrics.jsonl, with a curve for each run."""
    lines = []
    for number, record in enumerate(records):
        own = [line for line in record.steps if key in line]
        if own:
            label = record.name if len(records) > 1 else ""
            lines.append(Curve(label, [line["step"] for line in own], [line[key] for line in own], number))
    return figure(curves_chart(title, lines, x_label="step", from_zero=from_zero).in_page())


def _times_100(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _at(key: str) -> str:
    """openmoji_name_r5 -> R@5, openmoji_acc1 -> nothing"""
    found = AT_K.search(key)
    return f"R@{found.group(1)}" if found else ""


def _words(key: str) -> str:
    """validation_image_to_text_r1 -> validation: image to text R@1"""
    words = re.sub("^validation_", "validation: ", AT_K.sub(r" R@\1", key)).replace("in_batch", "in-batch")
    return re.sub(" acc1$", " top-1", words.replace("_", " "))
