"""Random sources, whole and damaged: 10,000 of them, none read wrong.

    make bench                    or, alone:    python tests/benchmarks/bench_borders.py

No pair may be wrong, no picture of a whole source may be missing, and an error is one line. What the suite does with a
few hundred fixed sources, this does with new ones every time.
"""

import sys
from collections import Counter
from pathlib import Path

from hypothesis import HealthCheck, given, settings

sys.path.insert(0, str(Path(__file__).parents[1]))
from borders_for_tests import Files, damaged
from test_borders import SOURCES, check_damaged, check_whole

from mlip_cli.terminal.output import print_table

INPUTS = 10_000


def test_random_sources() -> None:
    counts: Counter[tuple[str, str]] = Counter()
    for kind, sources in SOURCES.items():
        for state, drawn, check in (("whole", sources, check_whole), ("damaged", damaged(sources), check_damaged)):
            many = settings(
                max_examples=INPUTS // (2 * len(SOURCES)),
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
            )

            def one(files: Files, check=check, place=(kind, state)) -> None:
                check(files)
                counts[place] += 1

            many(given(drawn)(one))()
    print_table(
        ["kind", "state", "sources read right or refused in a line"],
        [[*place, f"{n:,}"] for place, n in counts.items()],
    )


if __name__ == "__main__":
    test_random_sources()
