"""Random sources, whole and damaged: 10,000 of them, none read wrong.

    make bench                    or, alone:    python tests/benchmarks/bench_borders.py

No pair may be wrong, no picture of a whole source may be missing, and an error is one line. What the suite does with a
few hundred fixed sources, this does with new ones every time.
"""

import sys
from collections.abc import Callable
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy

sys.path.insert(0, str(Path(__file__).parents[1]))
from borders_for_tests import Files, damaged
from test_borders import SOURCES, check_damaged, check_whole

from mlip_cli.terminal.output import print_table

INPUTS = 10_000


def number_right(drawn: SearchStrategy[Files], check: Callable[[Files], None]) -> int:
    """How many random sources were read right, or refused in a line; the first one that was not is an error."""
    num_right = 0

    @settings(
        max_examples=INPUTS // (2 * len(SOURCES)), deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(drawn)
    def one(files: Files) -> None:
        nonlocal num_right
        check(files)
        num_right += 1

    one()
    return num_right


def test_random_sources() -> None:
    rows = []
    for kind, sources in SOURCES.items():
        whole, with_faults = number_right(sources, check_whole), number_right(damaged(sources), check_damaged)
        rows.append([kind, f"{whole:,}", f"{with_faults:,}"])
    print_table(["sources", "whole, read right", "damaged, read right or refused in a line"], rows)


if __name__ == "__main__":
    test_random_sources()
