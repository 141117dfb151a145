"""prepare-data killed at 30 random moments of a download, and at 30 of shares of the parts and of what finishes them.

    make bench                    or, alone:    python tests/benchmarks/bench_prepare_kills.py

The whole of what tests/test_prepare_killed.py has a part of: SIGKILL to all processes, to the first one alone or to a
worker, and the same command again. The output is compared byte by byte with that of a run that nobody disturbed.
"""

import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from open_clip_peer import write_numbers
from prepare_kills_for_tests import WHOM
from test_prepare_killed import killed_downloads, killed_shares

from mlip_cli.terminal.output import print_table

KILLS = 30
SEEDS = {"download": 17, "shares": 18}


def test_thirty_kills_each() -> None:
    rows, numbers = [], {}
    for (name, seed), kill in zip(SEEDS.items(), (killed_downloads, killed_shares), strict=True):
        with tempfile.TemporaryDirectory() as temporary:
            killed = kill(Path(temporary), kills=KILLS, seed=seed)
        whom = Counter(own.whom for own in killed)
        finishing = sum(own.is_finishing for own in killed)
        parts = " ".join(str(own.num_parts) for own in killed)
        rows.append([name, str(seed), *(str(whom[one]) for one in WHOM), str(finishing), parts, "equal"])
        numbers[name] = [vars(own) for own in killed]
    columns = ["work", "seed", *WHOM, "in pass 2", "finished parts at each kill", "bytes"]
    print_table(columns, rows)
    write_numbers("prepare_kills", numbers)


if __name__ == "__main__":
    test_thirty_kills_each()
