"""The sentences and the picture of a comparison, from results with made-up numbers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from results_for_tests import recalls, zeroshot_result

from mlip_cli.evaluate.results import ZeroshotResult
from mlip_cli.evaluate.statistics import paired_interval
from mlip_cli.report.record import RunRecord
from mlip_cli.report.verdict import time_chart, training_seconds, verdicts
from mlip_cli.runs.contents import Stamp
from mlip_cli.runs.folder import Run

NAMES = 200


def asked(hits: int, *, rate: float = 0.0, first_hit: int = 0) -> ZeroshotResult:
    """A result on 200 names, each of them a class, of which `hits` are found, from the name `first_hit` on."""
    right = "".join("01"[first_hit <= number < first_hit + hits] for number in range(NAMES))
    own = {**recalls(1, 5), "n": NAMES, "num_candidates": NAMES, "r1": hits / NAMES, "r1_chance": 1 / NAMES}
    classes = [{"class": str(number), "n": 1, "recall": 1.0} for number in range(NAMES)]
    answers = {"right": {"picture_r1": right, "acc1": right}, "names": own, "pictures": own}
    return zeroshot_result(dataset="names", rate=rate, num_classes=NAMES, per_class=classes, **answers)


def record(name: str, *results: ZeroshotResult, speed: float = 100.0, **more: Any) -> RunRecord:
    steps = [{"step": step, "loss": 1.0, "samples_seen": 100 * step, "images_per_s": speed} for step in (10, 20)]
    measured = [{"step": step, "names_picture_r1": step / 100} for step in (10, 20)]
    fields = {"recipe": None, "recipe_text": "", "stamp": Stamp(), "steps": steps, "evaluations": measured, "cards": {}}
    return RunRecord(run=Run(Path("runs", name)), name=name, results=results, **{**fields, **more})


def test_a_difference_that_the_interval_shows() -> None:
    assert verdicts([record("a", asked(100)), record("b", asked(130), speed=80.0)]) == [
        "names, 200 names (chance 0.5 %): a puts the right picture first for 50.0 %, b for 65.0 %; "
        "+15.0 points (95 % interval +9.8 to +19.9): a gain is shown between these two runs, and training took 1.25 "
        "times as long."
    ]
    assert (
        "-15.0 points (95 % interval -19.9 to -9.8): a loss is shown"
        in verdicts([record("a", asked(130)), record("b", asked(100))])[0]
    )


def test_a_difference_that_the_interval_does_not_show() -> None:
    [sentence] = verdicts([record("a", asked(100)), record("b", asked(101, first_hit=5), steps=[])])
    assert sentence.endswith("+0.5 points (95 % interval -3.0 to +4.0): no difference is shown between these two runs.")


def test_a_sentence_says_what_merging_changes() -> None:
    first, other = record("a", asked(100)), record("b", asked(100), asked(96, rate=0.3), asked(60, rate=0.5))
    assert verdicts([first, other])[1] == (
        "b at merge rate 0.50 puts the right picture first for 30.0 % instead of 50.0 %; "
        "-20.0 points (95 % interval -25.5 to -14.1): a loss is shown."
    )


def test_other_data_gives_no_sentence_and_no_picture() -> None:
    records = [record("a", asked(100)), record("b", zeroshot_result(dataset="digits", right={"acc1": "01"}))]
    assert verdicts(records) == []
    assert time_chart([record("a", asked(100)), record("b", asked(100), evaluations=[])]) is None


def test_classes_are_compared_by_accuracy() -> None:
    results = [zeroshot_result(right={"acc1": right}) for right in ("1100", "1111")]
    [sentence] = verdicts([record("a", results[0]), record("b", results[1])])
    assert sentence.startswith("digits, 4 pictures (chance 10.0 %): a finds the right class for 50.0 %, b for 100.0 %;")


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


def test_the_paired_interval_holds_the_true_difference_in_95_of_100_draws() -> None:
    random, held = np.random.default_rng(0), 0
    for _ in range(2000):
        won, lost, _ = random.multinomial(289, [0.12, 0.08, 0.8])
        low, high = paired_interval(int(won), int(lost), 289)
        held += low <= 0.04 <= high
    assert 0.94 <= held / 2000 <= 0.965
    assert paired_interval(0, 0, 10).low < 0 < paired_interval(0, 0, 10).high
    with pytest.raises(ValueError, match="6 won and 5 lost among 10"):
        paired_interval(6, 5, 10)
