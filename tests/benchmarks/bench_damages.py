"""10,000 damages of prepared shards, indexes and cards: how many samples train that are not as they were written.

    python tests/benchmarks/bench_damages.py

Printed are samples by what became of them, a row a kind of damage; all columns but the first four must be 0.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from damages_for_tests import DAMAGES, WRONG, make_whole, outcomes

from mlip_cli.terminal.output import print_table

TRIALS = 10_000
FINE = ("as written", "named", "refused when opened", "damages of unread bytes")


def test_no_damaged_sample_trains() -> None:
    with tempfile.TemporaryDirectory() as name:
        whole = make_whole(Path(name, "whole"))
        each = -(-TRIALS // len(DAMAGES))
        rows = []
        for damage in DAMAGES:
            found = outcomes(whole, Path(name, damage.__name__), damage, trials=each, seed=1)
            rows.append([damage.__name__.replace("_", " "), each, *(found[kind] for kind in (*FINE, *WRONG))])
    print_table(["damage", "trials", *FINE, *WRONG], rows)
    assert all(not any(row[2 + len(FINE) :]) for row in rows)


if __name__ == "__main__":
    test_no_damaged_sample_trains()
