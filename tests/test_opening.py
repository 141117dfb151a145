"""The opening of a page says what the stored results carry, and no more."""

import re
from pathlib import Path
from typing import Any

import pytest
from models_for_tests import small_recipe
from results_for_tests import recalls, sweep_result, zeroshot_result

from mlip_cli.evaluate.picture_results import GalleryResult
from mlip_cli.evaluate.results import ClassRecall, Recalls
from mlip_cli.evaluate.statistics import Interval
from mlip_cli.recipe.config import Recipe
from mlip_cli.report.costs import costs_table, cpu_s, equal_terms, steps_s
from mlip_cli.report.headlines import Score, compared, difference, far_apart, merging_sentence, scores_of, verdict
from mlip_cli.report.opening import comparison_opening, run_opening
from mlip_cli.report.record import RunRecord
from mlip_cli.runs.contents import Session, Stamp
from mlip_cli.runs.folder import Run
from mlip_cli.runs.result_files import Result


def record(*results: Result, name: str = "a", recipe: Recipe | None = None, **more: Any) -> RunRecord:
    empty: dict[str, Any] = {"recipe_text": "", "stamp": Stamp(), "steps": [], "evaluations": [], "cards": {}}
    return RunRecord(run=Run(Path(name)), name=name, recipe=recipe, results=results, **(empty | more))


def gallery(r5: float, low: float, high: float) -> GalleryResult:
    own = recalls(1, 5, 10) | {"r5": r5, "r5_interval": Interval(low, high)}
    return GalleryResult(
        step=240,
        true_merge_rate=0.0,
        folders=["data"],
        fingerprints=["f"],
        num_images=383,
        num_texts=383,
        chosen="at random with seed 0",
        scores={way: Recalls(**own) for way in ("image_to_text", "text_to_image")},
        text_to_image=[],
        image_to_text=[],
    )


def score(value: float, low: float, high: float, *, right: str = "", chance: float = 0.1) -> Score:
    interval = Interval(low, high)
    return Score(
        name="s", data=("f",), question="?", answer="", value=value, interval=interval, chance=chance, right=right
    )


def words(html: str) -> str:
    return " ".join(re.sub("<[^>]*>", " ", html).split())


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.11, 0.3, "above chance"),
        (0.1, 0.3, "not shown to be above chance"),
        (0.01, 0.1, "not shown to be above chance"),
        (0.01, 0.09, "below chance"),
    ],
)
def test_a_score_stands_beside_chance_by_its_interval(low: float, high: float, expected: str) -> None:
    assert score(0.2, low, high).against_chance == expected


MANY, FEW = "1" * 60 + "0" * 40, "1" * 40 + "0" * 60


@pytest.mark.parametrize(
    ("first", "other", "is_shown", "why"),
    [
        (score(0.4, 0.3, 0.5), score(0.6, 0.51, 0.7), True, "the intervals do not overlap"),
        (score(0.4, 0.3, 0.5), score(0.6, 0.5, 0.7), False, "the intervals overlap"),
        (
            score(0.4, 0.3, 0.6, right=FEW),
            score(0.6, 0.5, 0.7, right=MANY),
            True,
            "p 1.9e-06 by the paired test",
        ),
        (score(0.4, 0.3, 0.6, right=FEW), score(0.4, 0.3, 0.7, right=FEW), False, "p 1 by the paired test"),
        (
            score(0.6, 0.3, 0.6, right=FEW),
            score(0.4, 0.3, 0.7, right=MANY),
            False,
            "p 1.9e-06 by the paired test",
        ),
        (score(0.4, 0.3, 0.6, right=FEW), score(0.6, 0.5, 0.7, right=MANY[:50]), False, "the intervals overlap"),
    ],
)
def test_a_difference_is_shown_by_intervals_or_by_a_paired_test(
    first: Score, other: Score, is_shown: bool, why: str
) -> None:
    there, back = difference(first, other), difference(other, first)
    assert there.is_shown == back.is_shown == is_shown
    assert there.points == -back.points
    assert there.why.endswith(why)
    assert ("not shown" in there.words) != is_shown
    if is_shown:
        assert "better" in there.words
        assert "worse" in back.words


def classes(*pairs: tuple[float | None, int]) -> list[ClassRecall]:
    return [ClassRecall(f"c{number}", n, recall) for number, (recall, n) in enumerate(pairs)]


def test_a_mean_hides_classes_whose_recalls_differ_beyond_their_intervals() -> None:
    apart = far_apart(classes((0.5, 40), (0.0, 44), (0.9, 50), (None, 0)))
    assert apart is not None
    assert [own.class_ for own in apart] == ["c2", "c1"]
    assert far_apart(classes((1.0, 3), (0.33, 3))) is None, "too few pictures"
    assert far_apart(classes((0.80, 9000), (0.90, 9000))) is None, "a small gap"
    assert far_apart(classes((0.5, 40), (None, 0))) is None
    assert far_apart([]) is None


PETS = [{"class": "cats", "n": 50, "recall": 0.9}, {"class": "dogs", "n": 50, "recall": 0.0}]


def test_a_run_page_opens_with_question_answer_and_picture() -> None:
    run = record(gallery(0.2, 0.15, 0.25), zeroshot_result(dataset="pets", per_class=PETS))
    opening = run_opening(run)
    text = words(opening)
    assert text.startswith(
        "Asked: Does it find the right picture for a text among 383 held-out ones? The right picture is among the "
        "first 5 for 20.0 % (95 %: 15.0–25.0) of 383 texts; guessing gives 1.3 %, so it is above chance. "
        "pets: mean recall of 34.4 % hides its classes: cats 90.0 %, dogs 0.0 %."
    )
    assert "The whole width is 100 %" in text
    names = re.findall('class="bar-name">([^<]*)<', opening)
    assert names == ["text to image R@5", "image to text R@5", "pets: mean recall", "cats", "dogs"]
    widths = [float(width) for width in re.findall(r'class="fill" style="width: ([\d.]+)%', opening)]
    assert widths == [20.0, 20.0, 34.37, 90.0, 0.0]
    assert re.findall(r'class="chance" style="left: ([\d.]+)%', opening) == ["1.31", "1.31", "10.00"]
    assert opening.index('class="outcome"') < opening.index('class="bars"')


def test_the_picture_is_as_wide_as_its_scores_need() -> None:
    opening = run_opening(record(gallery(0.02, 0.01, 0.04)))
    assert "The whole width is 5 %" in opening
    assert 'style="width: 40.00%' in opening
    assert "so it is not shown to be above chance" in opening


def test_a_run_without_results_says_that_nothing_is_shown() -> None:
    steps = [{"step": 40, "loss": 1.25, "samples_seen": 320}]
    measured = [{"step": 40, "validation_text_to_image_r5": 0.25}]
    text = words(run_opening(record(steps=steps, evaluations=measured)))
    assert "loss is 1.250 at step 40, and text to image R@5 25.0 % at step 40. No result is stored yet" in text
    assert "mlip eval-zeroshot a --dataset NAME" in text
    assert "Nothing is logged yet." in run_opening(record())


def test_the_verdict_on_two_runs_is_what_their_intervals_allow() -> None:
    first = record(gallery(0.2, 0.15, 0.25), name="clip")
    scores = "text to image R@5 {}, image to text R@5 {} points"
    shown = f"As trained here, mlip is {{}} at {scores}, beside clip. Other seeds may differ."
    not_shown = f"It is not shown that mlip is better or worse than clip: {scores.format('+4.0', '+4.0')}."
    for (value, low, high), expected in {
        (0.24, 0.2, 0.3): not_shown,
        (0.4, 0.3, 0.5): shown.format("better", "+20.0", "+20.0"),
        (0.1, 0.0, 0.14): shown.format("worse", "-10.0", "-10.0"),
    }.items():
        other = record(gallery(value, low, high), name="mlip")
        assert verdict("clip", "mlip", compared([first, other])) == expected
        opening = comparison_opening([first, other], methods={"clip": "CLIP", "mlip": "MLIP"})
        assert expected in words(opening)
        assert "Which is better: clip (CLIP) or mlip (MLIP)?" in words(opening)
        assert opening.count("not shown,") == (2 if "not shown" in expected else 0)


def test_scores_on_other_data_are_not_compared() -> None:
    first = record(zeroshot_result(dataset="pets"), name="x")
    other = record(zeroshot_result(dataset="pets", data_fingerprint="g"), name="y")
    assert compared([first, other]) == []
    assert verdict("x", "y", []) == "y and x were not measured on the same data."
    assert "were not measured on the same data" in comparison_opening([first, other], methods={"x": "", "y": ""})


def test_the_data_sets_of_the_recipe_come_first() -> None:
    recipe = small_recipe(evaluate={"zeroshot": ["pets", "birds", "gone"]})
    results = [zeroshot_result(dataset=name) for name in ("birds", "fish", "pets")]
    run = record(*results, gallery(0.2, 0.15, 0.25), recipe=recipe)
    ways = ["text to image R@5", "image to text R@5"]
    means = [f"{name}: mean recall" for name in ("pets", "birds", "fish")]
    assert [own.name for own in scores_of(run)] == [*means[:2], *ways, means[2]]


def test_scores_are_those_at_the_merge_rate_of_the_recipe() -> None:
    recipe = small_recipe(model={"merging": {"rate": 0.5}})
    at = {rate: zeroshot_result(rate=rate, mean_per_class_recall=rate or 0.1) for rate in (0.5, 0.0)}
    assert [own.value for own in scores_of(record(*at.values(), recipe=recipe))] == [0.5]
    assert [own.value for own in scores_of(record(*at.values(), recipe=small_recipe(model={"merging": None})))] == [0.1]


@pytest.mark.parametrize(
    ("interval", "expected"),
    [((1.1, 1.9), "faster"), ((0.5, 0.9), "slower"), ((0.9, 1.9), "a gain in speed is not shown")],
)
def test_a_page_speaks_of_the_speed_of_the_recipes_own_merging(interval: tuple[float, float], expected: str) -> None:
    sweep = sweep_result({None: (1.0, 1.0), "guided": (3.0, 4.0), "tome": interval})
    recipe = small_recipe(model={"merging": {"rate": 0.5, "method": "tome"}})
    low, high = interval
    assert merging_sentence(record(sweep, recipe=recipe)) == (
        f"Merging (tome, rate 0.52) makes the image tower 1.52 × as fast as without (95 %: {low:.2f}–{high:.2f}: "
        f"{expected}); openmoji top-1 +0.0 points, a change is shown (p 1.2e-05)."
    )
    assert merging_sentence(record(recipe=recipe)) is None


def trained(name: str, *, samples: int = 300, print_: str = "d", cpu: float | None = 20.0) -> RunRecord:
    steps = [
        {"step": 1, "samples_seen": 100, "images_per_s": 10.0, "loss": 2.0},
        {"step": 2, "samples_seen": samples, "images_per_s": 50.0, "loss": 1.0},
    ]
    stamp = Stamp(data={"train": print_}, sessions=[Session(cpu_s=cpu, device="cpu"), Session(cpu_s=2.5, device="cpu")])
    return record(name=name, steps=steps, stamp=stamp)


def test_what_a_training_cost() -> None:
    run = trained("a")
    assert steps_s(run) == pytest.approx(100 / 10 + 200 / 50)
    assert cpu_s(run) == 22.5
    assert cpu_s(trained("b", cpu=None)) is None, "a session of an earlier version"
    assert (steps_s(record()), cpu_s(record())) == (None, None)
    table = costs_table([run], heads={"a": ["a", "CLIP"]})
    row = dict(zip(table.columns, table.rows[0], strict=True))
    assert (row["samples seen"], row["time of the steps"], row["CPU time"]) == ("300", "0:14", "0:22")


def test_runs_are_said_to_differ_in_more_than_the_method() -> None:
    assert equal_terms([trained("a"), trained("b")]) == "Both saw 300 samples of the same data."
    more = "so more than the method differs."
    assert equal_terms([trained("a"), trained("b", samples=600)]) == (
        f"They saw 300, 600 samples of the same data, {more}"
    )
    assert equal_terms([trained("a"), trained("b", print_="e")]) == (
        f"They saw 300, 300 samples of data that differs, {more}"
    )
