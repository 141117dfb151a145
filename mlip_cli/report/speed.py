"""The parts of a report about speed: the sweep over merge rates, and where the time of a step goes."""

from collections.abc import Mapping, Sequence
from itertools import groupby

from mlip_cli.report.canvas import Picture
from mlip_cli.report.charts import Bar, Dot, bars_chart, dots_chart
from mlip_cli.report.page import Html, command, element, facts, figure, note, section, table
from mlip_cli.report.record import Result, RunRecord
from mlip_cli.report.results import by_data, with_interval
from mlip_cli.terminal.output import per_second, percent, plural

PARETO, BREAKDOWN = "pareto", "profile"
"""Names of picture files."""

CUT = "Whiskers are 95 % intervals; where one leaves the picture, the table has it."
"""Below a picture of accuracy against speed."""

WAYS = (("image_to_text", "i→t"), ("text_to_image", "t→i"))
"""Directions of retrieval, and their columns."""


def sweep_section(record: RunRecord, pictures: Mapping[str, Picture]) -> Html:
    """Accuracy against measured speed, and the numbers; `pictures` are those of `standalone_pictures`."""
    sweep = record.newest("merge_sweep")
    if sweep is None:
        return section("sweep", "Merge sweep", note("Not swept yet: ", command(f"mlip merge-sweep {record.place}")))
    charts = [picture for name, picture in pictures.items() if name.startswith(PARETO)]
    return section(
        "sweep",
        "Merge sweep",
        *(figure(picture.in_page(), CUT, kind="wide") for picture in charts),
        _speed_table(sweep),
        *(part for dataset in sweep["datasets"] for part in _accuracy(dataset)),
        *(note(f"{failed['dataset']}: not measured: {failed['error']}") for failed in sweep.get("failed", [])),
        note(
            f"Step {sweep['step']:,}; speed: batch of {sweep['batch_size']}, fp32, on {_machine(sweep)}, median of "
            f"{sweep['rounds']} rounds with all settings in turn. In brackets: 95 % intervals."
        ),
    )


def standalone_pictures(record: RunRecord) -> dict[str, Picture]:
    """Charts that are also files of their own, by name: Pareto of each data set, breakdown of a step."""
    sweep, profile = record.newest("merge_sweep"), record.newest("profile")
    pictures = {}
    if sweep is not None:
        for number, picture in enumerate(pareto_pictures([(record.name, sweep)]).values(), start=1):
            pictures[PARETO if number == 1 else f"{PARETO}_{number}"] = picture
    if profile is not None:
        pictures[BREAKDOWN] = breakdown_picture(record.name, profile)
    return pictures


def _speed_table(sweep: Result) -> Html:
    rows = [
        [
            point["method"] or "none",
            f"{point['true_rate']:.3f}",
            " → ".join(str(tokens) for tokens, _ in groupby(point["tokens_per_block"])),
            f"{point['gflops']:.3g}",
            f"{point['images_per_s']:,.1f}",
            _ratio(point),
            f"{point['expected_speedup']:.2f}",
            f"{point['peak_memory']['gib']:.2f}",
        ]
        for point in sweep["points"]
    ]
    columns = ["method", "rate", "tokens", "GFLOPs", "images/s", "× rate 0", "× by FLOPs", "peak GiB"]
    return table(columns, rows)


def _ratio(point: Result) -> Html:
    low, high = point["speedup_interval"]
    return element("span", f"{point['speedup']:.2f} ", element("span", f"({low:.2f}–{high:.2f})", class_="note"))


def _accuracy(dataset: Result) -> list[Html]:
    """Scores at each rate, each with its difference to rate 0 on the same pictures."""
    first = dataset["points"][0]
    if "image_to_text" in first:
        scores = [(way, f"r{k}", f"{title} R@{k} %") for way, title in WAYS for k in (1, 5)]
        tested = [(f"{way}_r5", f"{title} R@5") for way, title in WAYS]
        chance = ", ".join(f"{title} R@5 {percent(first[way]['r5_chance'])} %" for way, title in WAYS)
    else:
        scores = [("", "mean_per_class_recall", "mean recall %"), ("", "acc1", "top-1 %")]
        scores += [("names", "r5", "name R@5 %")] if "names" in first else []
        tested, chance = [("acc1", "top-1")], f"{percent(dataset['chance'])} %"
    unmerged: list[str | None] = [None] * (2 * len(tested))
    rows = []
    for point in dataset["points"]:
        own = [with_interval(point[part] if part else point, key) for part, key, _ in scores]
        tests = [point["paired"][key] for key, _ in tested] if point["method"] else []
        versus = [cell for test in tests for cell in (f"{test['won']} / {test['lost']}", f"{test['p']:.2g}")]
        rows.append([point["method"] or "none", f"{point['true_rate']:.3f}", *own, *(versus or unmerged)])
    tests_titles = [title for _, name in tested for title in (f"{name} won / lost", "p")]
    return [
        element("h3", dataset["dataset"]),
        table(["method", "rate", *(title for _, _, title in scores), *tests_titles], rows),
        note(
            f"{plural(dataset['n'], 'picture')}; chance {chance}. Won / lost: queries that only this setting, or only "
            "rate 0, gets right; p: McNemar's exact test."
        ),
    ]


def pareto_pictures(sweeps: Sequence[tuple[str, Result]]) -> dict[str, Picture]:
    """Accuracy against measured speed by data set, of one sweep or of several runs': (run, sweep)."""
    found = [
        {**dataset, "run": run, "speeds": sweep["points"]} for run, sweep in sweeps for dataset in sweep["datasets"]
    ]
    pictures = {}
    for name, own in by_data(found, "fingerprint").items():
        key, label, chance = _swept(own[0])
        series = {
            method if len(sweeps) == 1 else f"{dataset['run']}, {method}": dots
            for dataset in own
            for method, dots in _dots(dataset["speeds"], dataset, key).items()
        }
        pictures[name] = dots_chart(
            f"{name}: {label} against speed",
            series,
            x_label="measured speed, × rate 0 of the same run",
            y_label=f"{label} %",
            chance=100 * chance,
        )
    return pictures


def _swept(dataset: Result) -> tuple[str, str, float]:
    """Key of the score to show, its name, its chance level."""
    if "image_to_text" in dataset["points"][0]:
        return "image_to_text", "image to text R@1", dataset["points"][0]["image_to_text"]["r1_chance"]
    return "mean_per_class_recall", "mean recall", dataset["chance"]


def _dots(points: Sequence[Result], dataset: Result, key: str) -> dict[str, list[Dot]]:
    """By method, each beginning at the unmerged model; `points` hold the speeds."""
    speeds = {(point["method"], point["rate"]): point for point in points}
    dots: dict[str | None, list[Dot]] = {}
    for point in dataset["points"]:
        scores, name = (point[key], "r1") if isinstance(point.get(key), dict) else (point, key)
        speed = speeds[point["method"], point["rate"]]
        low, high = scores[f"{name}_interval"]
        dot = Dot(
            f"{point['true_rate']:.2f}",
            speed["speedup"],
            tuple(speed["speedup_interval"]),
            100 * scores[name],
            (100 * low, 100 * high),
        )
        dots.setdefault(point["method"], []).append(dot)
    unmerged = dots.pop(None)
    return {str(method): [*unmerged, *own] for method, own in dots.items()} or {"unmerged": unmerged}


def profile_section(record: RunRecord, pictures: Mapping[str, Picture]) -> Html:
    """Where the time of a training step goes, and what the model costs."""
    profile = record.newest("profile")
    if profile is None:
        return section("profile", "Profile", note("Not measured yet: ", command(f"mlip profile {record.place}")))
    flops = profile["gflops"]
    speeds = [[line["part"], f"{1000 * line['median_s']:,.1f}", f"{line['per_s']:,.1f}"] for line in profile["speed"]]
    return section(
        "profile",
        "Profile",
        figure(pictures[BREAKDOWN].in_page(), kind="wide"),
        element("p", f"The limit is {profile['limit']['part']}: {profile['limit']['why']}."),
        note(
            f"The clocks around the parts cost {percent(profile['clocks_cost'])} %; without them the step takes "
            f"{1000 * profile['step_s']:,.1f} ms."
        ),
        table([f"batch of {profile['batch_size']}, {profile['precision']}", "ms", "per s"], speeds),
        facts(
            [
                ("parameters", ", ".join(f"{name} {count:,}" for name, count in profile["parameters"].items())),
                ("GFLOPs an image", f"{flops['image_tower']:.3g} (rate 0: {flops['image_tower_unmerged']:.3g})"),
                ("GFLOPs a text", f"{flops['text_tower']:.3g} at {profile['caption_tokens']} tokens"),
                ("GFLOPs in training", f"frequency branch {flops['frequency_branch']:.3g}"),
                ("peak memory", f"{profile['peak_memory']['gib']:.2f} GiB ({profile['peak_memory']['what']})"),
                ("utilisation", _utilisation(profile)),
                ("measured on", _machine(profile)),
            ]
        ),
    )


def _machine(result: Result) -> str:
    return (
        f"{result['device']} ({result['device_name']}), {plural(result['threads'], 'thread')}, torch {result['torch']}"
    )


def _utilisation(profile: Result) -> str:
    return (
        f"{percent(profile['mfu'])} % of the matrix products that this machine was measured to do "
        f"({per_second(profile['step_tflops'])} of {per_second(profile['matmul_peak_tflops'])})"
    )


def breakdown_picture(name: str, profile: Result) -> Picture:
    """Milliseconds of each part of a training step, and of the loader processes that work beside it."""
    bars = [
        Bar(
            part["part"],
            1000 * part["seconds"],
            f"{percent(part['share'])} %",
            part["group"] if part["in_step"] else "data, in loader processes",
        )
        for part in profile["breakdown"]
    ]
    unaccounted = profile["unaccounted"]
    bars.append(Bar("unaccounted", 1000 * unaccounted["seconds"], f"{percent(unaccounted['share'])} %"))
    return bars_chart(
        f"{name}: a training step of {profile['batch_size']} pairs, part by part",
        bars,
        x_label="ms (and % of the step)",
    )
