"""How long a training will still take, by a clock that the tests turn."""

import pytest

from mlip_cli.terminal.panel import FEWEST_STEPS, STRETCHES, TimeLeft


class Training:
    """Steps, evaluations and checkpoints that take as long as the test says."""

    def __init__(self, total: int, *, evaluate_every: int | None = None, log_every: int = 10, step: int = 0) -> None:
        self.now_s, self.step, self.log_every = 1000.0, step, log_every
        self.left = TimeLeft(total, step=step, evaluate_every=evaluate_every, clock=lambda: self.now_s)
        self.eta_s: float | None = None

    def steps(self, n: int, seconds: float) -> None:
        for _ in range(n):
            self.now_s += seconds
            self.step += 1
            is_logged = self.step % self.log_every == 0
            self.eta_s = self.left.logged(self.step) if is_logged else self.left.after(self.step)

    def evaluate(self, seconds: float) -> None:
        with self.left.evaluating(self.step):
            self.now_s += seconds

    def save(self, seconds: float) -> None:
        with self.left.saving():
            self.now_s += seconds


def test_the_first_step_with_its_compilation_counts_nowhere() -> None:
    training = Training(1000)
    training.steps(1, 300.0)
    assert training.eta_s is None
    training.steps(1, 2.0)
    assert training.eta_s == pytest.approx(998 * 2.0)
    training.steps(58, 2.0)
    assert training.eta_s == pytest.approx(940 * 2.0)


def test_a_pause_is_one_stretch_among_many() -> None:
    training = Training(1000)
    training.steps(95, 1.0)
    training.steps(1, 3600.0)
    training.steps(4, 1.0)
    assert training.eta_s == pytest.approx(900.0)


def test_a_lasting_change_of_speed_counts_after_half_of_the_window() -> None:
    training = Training(10_000)
    training.steps(1000, 1.0)
    training.steps(FEWEST_STEPS * (STRETCHES // 2), 3.0)
    assert training.eta_s == pytest.approx(10_000 - training.step)
    training.steps(FEWEST_STEPS, 3.0)
    assert training.eta_s == pytest.approx(3.0 * (10_000 - training.step))


def test_waiting_for_every_eighth_batch_is_part_of_the_speed() -> None:
    training = Training(1000, log_every=1)
    for _ in range(50):
        training.steps(7, 0.1)
        training.steps(1, 4.0)
    mean_s = 4.7 / 8
    assert training.eta_s == pytest.approx((1000 - 400) * mean_s, rel=0.3)


def test_evaluations_are_counted_by_how_many_are_still_to_come() -> None:
    training = Training(100, evaluate_every=30)
    training.steps(30, 1.0)
    assert training.eta_s == pytest.approx(70.0), "what one costs is not known yet"
    training.evaluate(20.0)
    training.steps(10, 1.0)
    assert training.eta_s == pytest.approx(60.0 + 3 * 20.0), "after steps 60, 90 and 100"
    training.steps(20, 1.0)
    assert training.eta_s == pytest.approx(40.0 + 3 * 20.0), "the one of this step has not begun"
    training.evaluate(40.0)
    training.steps(1, 1.0)
    assert training.eta_s == pytest.approx(39.0 + 2 * 30.0)
    training.steps(39, 1.0)
    training.evaluate(30.0)
    assert training.left.after(100) == 0.0


def test_without_evaluations_in_between_the_one_at_the_end_counts() -> None:
    training = Training(40, evaluate_every=None, step=20)
    training.steps(5, 1.0)
    training.evaluate(7.0)  # as nothing does; its cost shows what is counted
    assert training.left.after(25) == pytest.approx(15.0 + 7.0)


def test_what_saving_costs_is_spread_over_the_steps() -> None:
    training = Training(200, step=100)
    for _ in range(5):
        training.steps(10, 1.0)
        training.save(5.0)
    training.steps(1, 1.0)
    assert training.eta_s == pytest.approx(49 * (1.0 + 25.0 / 51))
