"""The picture of accuracy against training time, from results with made-up numbers."""

from pathlib import Path
from typing import Any

from models_for_tests import small_recipe
from results_for_tests import recalls, zeroshot_result

from mlip_cli.evaluate.results import ZeroshotResult
from mlip_cli.report.costs import training_seconds
from mlip_cli.report.record import RunRecord
from mlip_cli.report.time_chart import time_chart
from mlip_cli.runs.contents import Stamp
from mlip_cli.runs.folder import Run

NAMES = 200


def asked(hits: int, *, rate: float = 0.0, first_hit: int = 0) -> ZeroshotResult:
    """A result on 200 names, each of them a class, of which `hits` are found, from the name `first_hit` on."""
    right = "".join("01"[first_hit <= number < first_hit + hits] for number in range(NAMES))
    own = {**recalls(1, 5), "n": NAMES, "num_candidates": NAMES, "r1": hits / NAMES, "r1_chance": 1 / NAMES}
    own |= {"r1_interval": (hits / NAMES - 0.05, hits / NAMES + 0.05)}
    classes = [{"class": str(number), "n": 1, "recall": 1.0} for number in range(NAMES)]
    answers = {"right": {"picture_r1": right, "acc1": right}, "names": own, "pictures": own}
    return zeroshot_result(dataset="names", rate=rate, num_classes=NAMES, per_class=classes, **answers)


def record(name: str, *results: ZeroshotResult, speed: float = 100.0, **more: Any) -> RunRecord:
    steps = [{"step": step, "loss": 1.0, "samples_seen": 100 * step, "images_per_s": speed} for step in (10, 20)]
    measured = [{"step": step, "names_picture_r1": step / 100} for step in (10, 20)]
    fields = {"recipe": None, "recipe_text": "", "stamp": Stamp(), "steps": steps, "evaluations": measured, "cards": {}}
    return RunRecord(run=Run(Path("runs", name)), name=name, results=results, **{**fields, **more})


def test_runs_that_were_not_measured_during_training_have_no_picture() -> None:
    assert time_chart([record("a", asked(100)), record("b", asked(100), evaluations=[])]) is None


def test_time_is_that_of_each_stretch() -> None:
    steps = [
        {"step": 5, "loss": 1.0, "samples_seen": 500, "images_per_s": 100.0},
        {"step": 10, "loss": 1.0, "samples_seen": 1000, "images_per_s": 50.0},
    ]
    assert list(training_seconds(record("a", steps=steps))) == [(5, 5.0), (10, 15.0)]


def test_the_picture_has_a_curve_for_each_run() -> None:
    chart = time_chart([record("a", asked(100)), record("b", asked(130), speed=50.0)])
    assert chart is not None
    assert [line.get_label() for line in chart.axes.get_lines()] == ["a", "b", "chance"]
    assert [list(line.get_xdata()) for line in chart.axes.get_lines()[:2]] == [[10.0, 20.0], [20.0, 40.0]]
    assert list(chart.axes.get_lines()[0].get_ydata()) == [10.0, 20.0]
    assert "names: text to image R@1 against training time" in chart.as_file()


def test_the_interval_at_the_end_of_a_curve_is_that_of_the_merge_rate_of_training() -> None:
    recipe = small_recipe(model={"merging": {"rate": 0.5}})
    chart = time_chart([record("a", asked(20, rate=0.0), asked(100, rate=0.5), recipe=recipe)])
    assert chart is not None
    [[(_, low), (_, high)]] = chart.axes.collections[0].get_segments()
    assert low < 50 < high
