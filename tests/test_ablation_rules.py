"""The ablation's own arithmetic against plain loops, and its rules on results made up for them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from ablation import stages
from ablation.factorial import FACTORS, cells, design, effects
from ablation.measure import Question, pair_ranks, ranks_of
from ablation.questions import QUESTIONS
from ablation.runs import WORDS_OF_STEM, AblationRun, Found, Measured, Missing, overrides_of
from ablation.scores import (
    WAYS,
    Contrast,
    Rows,
    bootstrap,
    contrast,
    holm,
    log2_ranks,
    lr_by_question,
    macro,
    numbered,
    recall,
    reciprocal_ranks,
    score,
)
from ablation.stages import CONFIRMATION_SEEDS, CONTRASTS, STAGES
from ablation.train_all import RECIPES
from ablation.verdict import compare, cpu_ratio, verdict
from torch import Tensor

from mlip_cli.recipe.load import differences, load_recipe


def slow_places(scores: Tensor, right: Tensor) -> list[list[int]]:
    found = [[0] * scores.shape[1] for _ in range(len(scores))]
    for query in range(len(scores)):
        for candidate in range(scores.shape[1]):
            if right[query, candidate]:
                before = [
                    other
                    for other in range(scores.shape[1])
                    if not right[query, other] and scores[query, other] >= scores[query, candidate]
                ]
                found[query][candidate] = 1 + len(before)
    return found


def test_places_among_the_wrong_ones_equal_plain_loops() -> None:
    torch.manual_seed(0)
    scores = torch.randint(0, 6, (20, 15)).float()  # many ties
    right = torch.rand(20, 15) < 0.2
    assert pair_ranks(scores, right).tolist() == slow_places(scores, right)
    pictures, texts = (torch.nn.functional.normalize(torch.randn(n, 4), dim=1) for n in (20, 15))
    lines = ranks_of(pictures, texts, right)
    similar = pictures @ texts.T
    by_picture, by_text = slow_places(similar, right), slow_places(similar.T, right.T)
    words = {way: iter(line.split()) for way, line in lines.items()}
    for i in range(20):
        own = right[i].nonzero().flatten().tolist()
        if own:  # a picture without a right text has no word
            assert next(words["image_to_text"]) == ",".join(str(by_picture[i][t]) for t in own)
            assert next(words["text_to_image"]) == ",".join(str(by_text[t][i]) for t in own)
    assert [list(rest) for rest in words.values()] == [[], []]


def test_a_question_has_its_pictures_and_the_texts_that_they_bear() -> None:
    def meta(questions: str, name: str, tags: str = "") -> dict[str, str]:
        return {"questions": questions, "name": name, "tags": tags, "concept": f"c{name}", "source": "s"}

    held = [meta("names tags", "b", "red, old"), meta("tags", "z"), meta("names tags", "a", "red")]
    samples = [meta("style", "x"), *held]
    names, tags = (Question.of(name, samples) for name in ("names", "tags"))
    assert (names.numbers, names.texts, names.concepts) == ([1, 3], ["a", "b"], ["cb", "ca"])
    assert names.right.tolist() == [[False, True], [True, False]]
    assert (tags.numbers, tags.texts, tags.concepts) == ([1, 2, 3], ["old", "red"], ["cb", "ca"])
    assert tags.right.tolist() == [[True, True], [False, False], [False, True]]


def result(places: dict[str, Sequence[str]], sources: dict[str, Sequence[str]], **more: Any) -> dict[str, Any]:
    """As `results.read` returns it, with the same places both ways."""
    spatial = {name: dict.fromkeys(WAYS, " ".join(own)) for name, own in places.items()}
    concepts = {name: [f"{name}{i}" for i in range(len(own))] for name, own in sources.items()}
    return {
        "at": {"own": {"rate": 0.0, "spatial": spatial}},
        "questions": {name: {"sources": sources[name], "concepts": concepts[name]} for name in QUESTIONS},
        "cpu_s": None,
        **more,
    }


def test_lr_is_the_mean_log2_of_the_places_over_texts_pictures_sources_and_questions() -> None:
    ranks = {"image_to_text": "1,4 8", "text_to_image": "2,2 32"}
    assert log2_ranks(ranks).tolist() == [(1 + 1) / 2, (3 + 5) / 2]
    assert reciprocal_ranks(ranks).tolist() == pytest.approx([(0.625 + 0.5) / 2, (1 / 8 + 1 / 32) / 2])
    assert recall(ranks, "image_to_text", 1).tolist() == [0.5, 0]
    found = result(
        {"style": ["1", "4", "16"], "names": ["2"], "tags": ["8,2", "4"]},
        {"style": ["a", "a", "b"], "names": ["a"], "tags": ["a", "a"]},
    )
    assert lr_by_question(found) == {"style": ((0 + 2) / 2 + 4) / 2, "names": 1, "tags": 2}
    assert score(found) == (2.5 + 1 + 2) / 3
    assert Rows.of([found]).score(Rows.of([found]).values[0]) == pytest.approx(score(found))


def slow_score(values: Sequence[float], cells_of: Sequence[int], members: np.ndarray) -> float:
    by_question = []
    for own in members:
        means = []
        for cell in np.flatnonzero(own):
            some = [value for value, other in zip(values, cells_of, strict=True) if other == cell]
            if some:
                means.append(np.mean(some))
        by_question.append(np.mean(means))
    return float(np.mean(by_question))


def test_macro_and_bootstrap_equal_plain_loops() -> None:
    random = np.random.default_rng(3)
    concepts = random.integers(0, 7, size=60)
    concepts[:7] = range(7)
    cells_of = random.integers(0, 4, size=60)
    cells_of[-1] = 4  # many draws have no picture of this one
    values = random.random((4, 60))
    members = np.array([[1, 0, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 1]], float)
    rows = Rows(values, concepts, cells_of, members)
    assert rows.score(values[0]) == pytest.approx(slow_score(values[0].tolist(), cells_of.tolist(), members))
    assert macro(values[0], cells_of) == pytest.approx(np.mean([values[0][cells_of == c].mean() for c in range(5)]))

    found = bootstrap(rows, resamples=50, seed=5)
    draws = np.random.default_rng(5)
    for mean in found:
        drawn = draws.integers(7, size=7)
        seeds = draws.integers(4, size=4)
        columns = [i for concept in drawn for i in np.flatnonzero(concepts == concept)]
        of_seeds = values[seeds].mean(0)
        assert mean == pytest.approx(slow_score(of_seeds[columns].tolist(), cells_of[columns].tolist(), members))


def rows_like(values: np.ndarray) -> Rows:
    n = values.shape[1]
    return Rows(values, numbered([str(i // 2) for i in range(n)]), np.arange(n) % 2, np.array([[1.0, 1.0]]))


@pytest.mark.slow
def test_a_contrast_covers_a_known_difference_and_no_difference() -> None:
    random = np.random.default_rng(0)
    base, noise = 8 * random.random((5, 600)), 0.2 * random.standard_normal((5, 600))
    better = contrast("x", rows_like(base - 0.1 + noise), rows_like(base))
    assert better.low < 0.1 < better.high
    assert better.verdict(better.p) == "better"
    assert better.verdict(0.06) == "not shown"
    same = contrast("x", rows_like(base + noise), rows_like(base))
    assert same.low < 0 < same.high
    assert same.verdict(same.p) == "not shown"
    not_worse = contrast("x", rows_like(base + noise), rows_like(base), margin=0.05)
    assert not_worse.verdict(not_worse.p) == "not worse"
    worse = contrast("x", rows_like(base), rows_like(base - 0.1 + noise))
    assert (worse.low, worse.high) == pytest.approx((-better.high, -better.low), abs=2e-3)
    assert worse.verdict(worse.p) == "worse"
    worse_than_margin = contrast("x", rows_like(base), rows_like(base - 0.1 + noise), margin=0.05)
    assert worse_than_margin.verdict(worse_than_margin.p) == "worse"


@pytest.mark.parametrize(
    ("agree", "seeds", "verdict"), [(5, 5, "better"), (4, 5, "better"), (3, 5, "not shown"), (4, 4, "not shown")]
)
def test_seeds_have_to_agree_and_to_be_five(agree: int, seeds: int, verdict: str) -> None:
    assert Contrast("x", 0.02, 0.01, 0.03, 0.001, agree, seeds).verdict(0.004) == verdict


def test_holm_adjusts_as_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([0.02], among=4) == [0.08]
    assert holm([0.01, 0.005], among=4) == pytest.approx([0.03, 0.02])


def test_contrasts_pair_the_seeds_of_both_arms_and_name_missing_ones(capfd: pytest.CaptureFixture[str]) -> None:
    def results(place: dict[int, int], cpu_s: float | None = None) -> dict[int, dict[str, Any]]:
        sources = {name: ["s"] * 30 for name in QUESTIONS}
        return {
            seed: result({name: [str(number)] * 30 for name in QUESTIONS}, sources, cpu_s=cpu_s)
            for seed, number in place.items()
        }

    arms = {"clip_half": results({0: 8, 1: 8, 2: 1}, 10.0), "mlip_half": results({1: 2, 0: 4, 7: 1}, 6.0)}
    found = compare(CONTRASTS[0], arms)
    assert found is not None
    assert (found.name, found.num_seeds, found.gain) == (CONTRASTS[0].name, 2, pytest.approx(1.5))
    assert compare(CONTRASTS[2], arms) is None
    assert "MLIP strong - CLIP strong: no seed yet of both mlip_strong and clip_strong" in capfd.readouterr().out
    assert cpu_ratio(CONTRASTS[0], arms) == 0.6
    assert cpu_ratio(CONTRASTS[0], arms | {"clip_half": results({0: 1})}) is None


def test_half_the_time_is_not_shown_by_an_arm_that_took_more() -> None:
    half_the_time = CONTRASTS[3]
    good = Contrast("x", 0.02, -0.01, 0.03, 0.001, 5, 5, margin=0.05)
    assert verdict(half_the_time, good, 0.004, 0.55) == "not worse"
    assert verdict(half_the_time, good, 0.004, 0.56) == "not shown: CPU time"
    assert verdict(half_the_time, good, 0.004, None) == "not shown: CPU time"
    assert verdict(CONTRASTS[1], good, 0.004, 0.9) == "not worse"


def test_main_effects_are_orthogonal_and_mix_with_no_interaction_of_two() -> None:
    levels = design()
    assert levels.shape == (16, 7)
    assert (levels.T @ levels == 16 * np.eye(7)).all()
    assert (levels.sum(0) == 0).all()
    assert len(set(cells())) == 16
    assert cells()[0] == ""
    for first in range(7):
        for second in range(first):
            assert (levels.T @ (levels[:, first] * levels[:, second]) == 0).all()


def test_effects_and_their_errors_equal_least_squares_and_the_noise_put_in() -> None:
    random = np.random.default_rng(1)
    gains = np.array([0.3, 0.1, -0.2, 0.0, 0.05, 0.4, -0.1])
    lr = 6 - design() @ gains / 2
    assert [one.gain for one in effects(lr).values()] == pytest.approx(gains)
    noisy = lr + 0.1 * random.standard_normal(16)
    with_mean = np.column_stack([np.ones(16), design()])
    solution, rest, *_ = np.linalg.lstsq(with_mean, noisy, rcond=None)
    error = 2 * np.sqrt(rest[0] / 8 * np.linalg.inv(with_mean.T @ with_mean)[1, 1])
    found = effects(noisy)
    assert [one.gain for one in found.values()] == pytest.approx(-2 * solution[1:])
    assert [one.standard_error for one in found.values()] == pytest.approx([error] * 7)
    draws = [effects(lr + 0.1 * random.standard_normal(16))["A"] for _ in range(400)]
    assert np.mean([one.standard_error**2 for one in draws]) == pytest.approx(4 * 0.1**2 / 16, rel=0.15)
    assert np.mean([one.interval[0] < 0.3 < one.interval[1] for one in draws]) == pytest.approx(0.95, abs=0.03)


@pytest.mark.parametrize(("high", "has_words"), [("AB", True), ("ABG", True), ("A", False), ("BG", False)])
def test_words_go_to_the_stem_too_where_there_is_one(high: str, has_words: bool) -> None:
    assert (WORDS_OF_STEM in overrides_of(high)) == has_words


def screening(gains: dict[str, float]) -> dict[str, Measured]:
    """Results of the 16 runs of a world with these gains."""
    return {
        run.label: Measured(6 - sum(gains.get(factor, 0) for factor in high), 100.0)
        for run, high in zip(stages.screening_runs(Found({})), cells(), strict=True)
    }


def plateau(half: Sequence[float], whole: Sequence[float]) -> dict[str, Measured]:
    names = [name for run in stages.plateau_runs(Found({})) for name in run.results]
    return {name: Measured(lr, None) for name, lr in zip(names, [*half, *whole], strict=True)}


FALLING = [8.0, 7.0, 6.5, 6.2, 6.1, 6.04, 6.0, 6.01]


def test_the_plateau_is_the_first_step_within_a_twentieth_of_the_best() -> None:
    early = [5.0, 5.2, 5.3, 5.4, 5.5, 5.6, 5.7, 5.8]
    assert stages.plateau_steps(Found(plateau(FALLING, early))) == 1500
    assert stages.plateau_steps(Found(plateau(early, FALLING))) == 1500
    assert stages.plateau_steps(Found(plateau(early, early))) == 250
    with pytest.raises(Missing, match="no result of plateau_half-0@250 yet"):
        stages.plateau_steps(Found({}))


def test_the_screening_stops_unless_a_factor_of_mlip_gains_enough() -> None:
    stopped = stages.after_screening(Found(screening({"A": 0.05, "C": 0.4, "F": -0.1})))
    assert not stopped.goes_on
    assert stopped.reason == "the best MLIP factor of the screening, A, gains +0.050 LR; more than +0.05 is asked for"
    assert stages.after_screening(Found(screening({"B": 0.06}))).goes_on


def test_the_halving_has_clip_and_the_three_best_sets_with_the_chosen_recipe() -> None:
    found = Found(screening({"A": 0.2, "B": 0.1, "F": -0.15, "C": 0.3, "D": -0.1, "E": 0.01, "G": -0.2}))
    assert stages.chosen_recipe(found) == "CE"
    assert stages.halving_cells(found) == ["", "AB", "A", "ABF"]
    runs = stages.halving_runs(found)
    assert len(runs) == 8
    assert runs[0].overrides == (
        *("model.vision.pool=mean", "losses.positives=concept", "optim.lr=5e-4"),
        "train.steps=1000",
    )


def halved(gains: dict[str, float]) -> dict[str, Measured]:
    """A screening and the halving after it."""
    found = screening({"A": 0.2, "B": 0.1, "F": 0.05})
    return found | {
        f"{stages.cell_name('halving', mlip)}-{seed}": Measured(6 - gains.get(mlip, 0) + (seed - 100.5) / 10, 100.0)
        for mlip in stages.halving_cells(Found(found))
        for seed in stages.HALVING_SEEDS
    }


def test_the_halving_stops_unless_a_cell_gains_enough_over_none() -> None:
    stopped = stages.after_halving(Found(halved({"AB": 0.07, "A": 0.02})))
    assert not stopped.goes_on
    assert stopped.reason == "the best MLIP cell of the halving, AB, gains +0.070 LR; +0.08 is asked for"
    assert stages.after_halving(Found(halved({"ABF": 0.09}))).goes_on


def confirmed() -> dict[str, Measured]:
    """All results that the last stages ask for; MLIP is ABF."""
    times = {"clip_half": 3000.0, "mlip_fine": 1200.0}
    return halved({"AB": 0.1, "ABF": 0.2}) | {
        f"{name}-{seed}": Measured(6.0, time) for name, time in times.items() for seed in CONFIRMATION_SEEDS
    }


def test_the_last_stages_take_what_the_earlier_ones_chose() -> None:
    found = Found(confirmed())
    assert stages.chosen_mlip(found) == "ABF"
    runs = stages.confirmation_runs(found)
    by_name = {run.name: run for run in runs}
    assert by_name["mlip_half"].train == by_name["mlip_strong"].train == "train_half"
    assert by_name["clip_all"].train == "train"
    assert set(overrides_of("ABF")) - set(overrides_of("")) <= set(by_name["mlip_half"].overrides)
    assert "train.steps=1000" in by_name["clip_half"].overrides
    equal = next(run for run in stages.control_runs(found) if run.name == "clip_equal_time")
    assert "train.steps=400" in equal.overrides  # 1,200 s at 3 s a step


def test_the_confirmation_goes_seed_by_seed() -> None:
    seeds = [run.seed for run in stages.confirmation_runs(Found(confirmed()))]
    assert seeds == sorted(seeds)
    assert {seeds.count(seed) for seed in CONFIRMATION_SEEDS} == {7}


def test_contrasts_are_of_arms_with_five_fresh_seeds() -> None:
    runs = [run for stage in STAGES for run in stage.runs(Found(confirmed()))]
    assert len({run.label for run in runs}) == len(runs)
    on_test = [run for run in runs if run.split == "test"]
    before = {run.seed for run in runs if run.split != "test"}
    for one in CONTRASTS:
        for name in (one.first, one.second):
            seeds = {run.seed for run in on_test if run.name == name}
            assert len(seeds) == 5
            assert not seeds & before


@pytest.mark.slow
def test_every_recipe_of_every_stage_loads() -> None:
    loaded = {}
    for stage in STAGES:
        for run in stage.runs(Found(confirmed())):
            loaded[run.name] = recipe_of(run)
    for high in cells():
        of_stem = loaded[stages.cell_name("screening", high)].losses.frequency_words
        assert (of_stem is not None) == ({"A", "B"} <= set(high))
    assert "".join(sorted(stages.MLIP_FACTORS + stages.RECIPE_FACTORS)) == FACTORS


def recipe_of(run: AblationRun) -> Any:
    return load_recipe(str(RECIPES / f"{run.recipe}.yaml"), (*run.overrides, f"seed={run.seed}")).recipe


def test_the_stronger_arms_share_what_makes_them_stronger() -> None:
    arms = {run.name: recipe_of(run) for run in stages.confirmation_runs(Found(confirmed()))}

    def changes(plain: str, strong: str) -> set[tuple[str, str]]:
        return {(key, str(new)) for key, _, new in differences(arms[plain], arms[strong])}

    of_clip = changes("clip_half", "clip_strong")
    assert len(of_clip) >= 4
    assert changes("mlip_half", "mlip_strong") == of_clip | {("losses.frequency_global.label_smoothing", "0.1")}
