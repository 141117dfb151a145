"""The clock that counts every moment for one part."""

import pytest

from mlip_cli.profiling.clock import PartClock


class Time:
    """A clock that the test moves."""

    now = 0.0

    def pass_(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def time() -> Time:
    return Time()


def test_a_moment_counts_for_the_innermost_part_alone(time: Time) -> None:
    clock = PartClock(now=lambda: time.now)
    time.pass_(100)  # nothing is open
    with clock.part("outer"):
        time.pass_(1)
        for _ in range(2):
            with clock.part("inner"):
                time.pass_(2)
            time.pass_(4)
        clock.switch("rest")
        time.pass_(8)
    time.pass_(100)
    assert clock.take() == {"outer": 9, "inner": 4, "rest": 8}
    assert clock.take() == {}


def test_an_undivided_part_keeps_what_is_inside_it(time: Time) -> None:
    clock = PartClock(now=lambda: time.now, undivided=["first pass"])
    with clock.part("first pass"):
        time.pass_(1)
        with clock.part("block"):
            time.pass_(2)
        clock.switch("merging")
        time.pass_(4)
    with clock.part("block"):
        time.pass_(8)
    assert clock.take() == {"first pass": 7, "block": 8}


def test_an_error_closes_its_part(time: Time) -> None:
    clock = PartClock(now=lambda: time.now)

    def fail() -> None:
        with clock.part("inner"):
            time.pass_(2)
            raise ZeroDivisionError

    with clock.part("outer"):
        with pytest.raises(ZeroDivisionError):
            fail()
        time.pass_(1)
    assert clock.take() == {"inner": 2, "outer": 1}
