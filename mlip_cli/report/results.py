"""What a run was measured at: zero-shot tables, curves over training, and numbers as people read them."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from mlip_cli.evaluate.statistics import MANY_CLASSES
from mlip_cli.recipe.config import LOSS_NAMES
from mlip_cli.report.charts import Bar, Line, bars_chart, lines_chart
from mlip_cli.report.page import Html, command, element, figure, figures, folded, note, section, table
from mlip_cli.report.record import Result, RunRecord
from mlip_cli.terminal.output import percent, plural

SCORES = (
    ("mean_per_class_recall", "mean recall %"),
    ("acc1", "top-1 %"),
    ("acc5", "top-5 %"),
)
NAME_SCORES = (("r1", "name R@1 %"), ("r5", "name R@5 %"))

FEATURES = {"frequency": "frequency feature", "spatial_plus_frequency": "sum of both"}
"""Beside the spatial feature, which `encode_image` gives."""

CLASSES_SHOWN = 20
"""Best, and as many worst, where a data set has more classes than both together."""

AT_K = re.compile(r"_r(\d+)$")
FROM_ZERO = ("lr", "images_per_s", "data_wait_share", "peak_gib", "skipped_steps", "bad_samples")
COUNTS = ("step", "samples_seen")
DISTANCES = ("validation_modality_gap",)
"""Measures that are no fractions."""
LOSSES = ("loss", *LOSS_NAMES)


def with_interval(scores: Result, name: str) -> Html | None:
    """A fraction in per cent, and its 95 % interval more quietly; None where there is no such score."""
    value, interval = scores.get(name), scores.get(f"{name}_interval")
    if value is None or interval is None:
        return None
    low, high = interval
    return element("span", f"{percent(value)} ", element("span", f"({percent(low)}–{percent(high)})", class_="note"))


def merge_rate(result: Result) -> str:
    """The rate that a result was measured at: the true one, and the one asked for where it is another."""
    true, asked = result["true_merge_rate"], result["merge_rate"]
    return f"{true:.3f}".rstrip("0").rstrip(".") + (f" (asked {asked:g})" if asked and abs(asked - true) > 5e-4 else "")


def by_data(results: Sequence[Result], fingerprint: str) -> dict[str, list[Result]]:
    """Results by data set, in the order given; data that has changed since counts as another data set.

    Args:
        fingerprint: key of the data's fingerprint in a result.
    """
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result["dataset"], result[fingerprint]), []).append(result)
    names = Counter(name for name, _ in groups)
    return {name if names[name] == 1 else f"{name} (data {print[:8]})": own for (name, print), own in groups.items()}


def results_section(record: RunRecord) -> Html:
    """Zero-shot results of every checkpoint, rate and data set, and recall by class of the newest."""
    classified = record.results.get("zeroshot", [])
    parts: list[Html] = []
    if not classified:
        names = record.recipe.evaluate.zeroshot if record.recipe is not None else ()
        dataset = "" if names else " --dataset NAME"
        parts.append(note("Not measured yet: ", command(f"mlip eval-zeroshot {record.place}{dataset}")))
    for name, own in by_data(classified, "data_fingerprint").items():
        parts += _dataset(name, _last_measured(own))
    if classified:
        parts.append(note("In brackets: 95 % intervals."))
    return section("results", "Zero-shot", *parts)


def _last_measured(results: Sequence[Result]) -> list[Result]:
    """Of each step and rate the last result; later steps first."""
    last = {(result["step"], result["true_merge_rate"]): result for result in results}
    return sorted(last.values(), key=lambda result: (-result["step"], result["true_merge_rate"]))


def _dataset(name: str, results: Sequence[Result]) -> list[Html]:
    first = results[0]
    is_coarse = first["num_classes"] < MANY_CLASSES
    scores = [(key, title) for key, title in SCORES if first.get(key) is not None and not (key == "acc5" and is_coarse)]
    names = NAME_SCORES if "names" in first else ()
    rows = []
    for result in results:
        rows.append(_row(result, result, "spatial", scores, names))
        rows += [_row(result, result[key], title, scores, names) for key, title in FEATURES.items() if key in result]
    chances = [f"{plural(first['n'], 'picture')}, {plural(first['num_classes'], 'class', 'classes')}: "]
    chances[0] += f"chance {percent(first['chance'])} %"
    chances += [] if is_coarse else [f"top-5 {percent(5 / first['num_classes'])} %"]
    chances += [f"{title[:-2]} {percent(first['names'][f'{key}_chance'])} %" for key, title in names]
    columns = ["step", "merge rate", "feature", *(title for _, title in (*scores, *names)), "images/s"]
    return [
        element("h3", name),
        table(columns, rows, text_columns=3),
        note(", ".join(chances) + "."),
        _by_class(first),
    ]


def _row(
    result: Result, own: Result, feature: str, scores: Sequence[tuple[str, str]], names: Sequence[tuple[str, str]]
) -> list[str | Html | None]:
    """One feature of one result."""
    speed = f"{result['images_per_s']:,.0f}" if own is result else None
    found = [with_interval(own, key) for key, _ in scores] + [with_interval(own["names"], key) for key, _ in names]
    return [f"{result['step']:,}", merge_rate(result), feature, *found, speed]


def _by_class(result: Result) -> Html:
    """Recall of each class, or of the best and the worst where there are many."""
    classes = [entry for entry in result["per_class"] if entry["recall"] is not None]
    classes.sort(key=lambda entry: (-entry["recall"], entry["class"]))
    is_cut = len(classes) > 2 * CLASSES_SHOWN
    bars = [
        Bar(entry["class"][:40], 100 * entry["recall"], f"{percent(entry['recall'])} % of {entry['n']:,}")
        for entry in ([*classes[:CLASSES_SHOWN], *classes[-CLASSES_SHOWN:]] if is_cut else classes)
    ]
    which = f": the {CLASSES_SHOWN} best and the {CLASSES_SHOWN} worst of {len(classes):,}" if is_cut else ""
    title = f"{result['dataset']}: recall by class, step {result['step']:,}, merge rate {merge_rate(result)}"
    return folded(f"Recall by class{which}", figure(bars_chart(title, bars, x_label="recall %").in_page(), kind="wide"))


def curves_section(records: Sequence[RunRecord], *, chances: Mapping[str, float]) -> Html:
    """Every loss and metric over the steps, of one run or of several laid over each other.

    Args:
        chances: chance level by the name of a measure, where it is known.
    """
    steps = list(dict.fromkeys(key for record in records for line in record.steps for key in line))
    measures = list(dict.fromkeys(key for record in records for line in record.evaluations for key in line))
    if not steps:
        return section("curves", "Curves", note("Nothing logged yet."))
    charts = [
        *_loss_charts(records, [key for key in LOSSES if key in steps]),
        *_measure_charts(records, [key for key in measures if key not in COUNTS], chances),
        *_other_charts(records, [key for key in steps if key not in (*COUNTS, *LOSSES)]),
    ]
    return section("curves", "Curves", figures(charts))


def _loss_charts(records: Sequence[RunRecord], keys: Sequence[str]) -> list[Html]:
    """The total and every term, unweighted, one chart each."""
    titles = {"loss": "loss (weighted sum)"}
    return [_step_chart(records, titles.get(key, key), key) for key in keys]


def _measure_charts(records: Sequence[RunRecord], keys: Sequence[str], chances: Mapping[str, float]) -> list[Html]:
    """One chart a measure; of a single run, one for all k of a recall at k."""
    if len(records) > 1:
        return [_measure_chart(records, [key], chances) for key in keys]
    families: dict[str, list[str]] = {}
    for key in keys:
        families.setdefault(AT_K.sub("", key), []).append(key)
    return [_measure_chart(records, own, chances) for own in families.values()]


def _measure_chart(records: Sequence[RunRecord], keys: Sequence[str], chances: Mapping[str, float]) -> Html:
    """Lines by run, or those of one run by the k of its recalls; fractions in per cent with chance."""
    lines: list[Line] = []
    for number, record in enumerate(records):
        for key in keys:
            label = _at(key) if len(keys) > 1 else record.name
            measured = [line for line in record.evaluations if key in line]
            values = [line[key] if key in DISTANCES else _times_100(line[key]) for line in measured]
            if measured:
                lines.append(
                    Line(label, [line["step"] for line in measured], values, number if len(records) > 1 else len(lines))
                )
    levels = {
        f"chance {_at(key) if len(keys) > 1 else ''}".strip(): 100 * chances[key] for key in keys if key in chances
    }
    title = _words(keys[0] if len(keys) == 1 else AT_K.sub("", keys[0])) + ("" if keys[0] in DISTANCES else " %")
    return figure(lines_chart(title, lines, x_label="step", levels=levels, from_zero=True).in_page())


def _other_charts(records: Sequence[RunRecord], keys: Sequence[str]) -> list[Html]:
    """Learning rate, gradient, speed, waiting, memory, scales; counts of trouble only where there was some."""
    quiet = {"skipped_steps", "bad_samples"}
    troubled = {key for key in quiet if any(line.get(key) for record in records for line in record.steps)}
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
        if key not in quiet - troubled
    ]


def _step_chart(records: Sequence[RunRecord], title: str, key: str, *, from_zero: bool = False) -> Html:
    """A key of metrics.jsonl, a line a run."""
    lines = []
    for number, record in enumerate(records):
        own = [line for line in record.steps if key in line]
        if own:
            label = record.name if len(records) > 1 else ""
            lines.append(Line(label, [line["step"] for line in own], [line[key] for line in own], number))
    return figure(lines_chart(title, lines, x_label="step", from_zero=from_zero).in_page())


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
