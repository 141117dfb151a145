"""When so many rows fail that the source cannot be what the user meant."""

from collections import Counter
from collections.abc import Mapping, Sequence

from mlip_cli.data.prepare import downloads
from mlip_cli.data.prepare.filters import REASONS
from mlip_cli.data.prepare.finish import Finished
from mlip_cli.data.prepare.rejects import rejects_of
from mlip_cli.data.prepare.share import Share
from mlip_cli.data.prepare.workspace import PartResult, Workspace
from mlip_cli.data.sources.records import WISHED
from mlip_cli.errors import RunError
from mlip_cli.terminal.output import plural

FIRST_ROWS = 1_000
"""This many rows are enough to see that most rows of a source fail. Fewer than FEWEST_ROWS are not."""
FEWEST_ROWS = 10
CURES = {
    "caption is not UTF-8": "save the texts as UTF-8, for example with iconv -f latin1 -t utf-8",
    "caption too long": "cut the texts: training reads the first words alone",
    **downloads.CURES,
}
"""What helps where most rows fail for a reason that does not say it."""

ASKED_FOR = REASONS | WISHED
"""Reasons of rejects that the user asked for: however many there are, the source is as it should be."""


class SourceError(RunError):
    """Most rows of the source fail; nothing of the work is worth keeping."""


def check_first_rows(work: Workspace, results: Mapping[int, PartResult], share: Share) -> None:
    """Stop early if the source is a wrong folder or a wrong column is read."""
    first: list[PartResult] = []
    number = share.index - 1
    while number in results and sum(result.rows for result in first) < FIRST_ROWS:
        first.append(results[number])
        number += share.count
    check_reasons(work, first, enough=FIRST_ROWS, which="first ")


def check_reasons(work: Workspace, results: Sequence[PartResult], *, enough: int, which: str) -> None:
    """Check that the rows do not mostly fail for one reason. `which` says which rows these are.

    Raises:
        SourceError: they do.
    """
    reasons = reasons_of(results)
    rows = sum(result.rows for result in results) - sum(reasons[asked] for asked in ASKED_FOR)
    for reason, n in reasons.items():
        most = rows * downloads.most_alike(reason, is_first=bool(which))
        if rows >= enough and n > most and reason not in ASKED_FOR:
            example = _first_reject(work, results, reason)
            passed = " that pass the rules" if reasons.keys() & ASKED_FOR else ""
            same = f"{n} of the {which}{rows} rows{passed} fail for the same reason: {reason} (first: {example})"
            raise SourceError(same + _cure(reason))


def _cure(reason: str) -> str:
    """What helps against a reason, as the end of an error; empty where the reason says it."""
    return f"; {CURES[reason]}" if reason in CURES else ""


def reasons_of(results: Sequence[PartResult]) -> Counter[str]:
    """Number of rejects by reason."""
    return sum((Counter(result.reasons) for result in results), Counter[str]())


def _first_reject(work: Workspace, results: Sequence[PartResult], reason: str | None = None) -> str:
    """The first row that fails, or that fails for a reason, in words."""
    all_rejects = (reject for result in results for reject in rejects_of(work.parts / result.tar))
    reject = next(reject for reject in all_rejects if reason in (None, reject["reason"]))
    return f"{reject['file']} row {reject['row']}: {reject['detail'] or reject['reason']}"


def check_samples(
    work: Workspace, results: Sequence[PartResult], finished: Finished, reasons: Mapping[str, int]
) -> None:
    """See that a row became a sample.

    Raises:
        SourceError: none did.
    """
    if not finished.splits:
        rows = plural(sum(result.rows for result in results), "row")
        listed = ", ".join(f"{n:,} x {reason}" for reason, n in Counter(reasons).most_common())
        first = "" if finished.dropped else f" (first: {_first_reject(work, results)})"
        most = max(reasons, key=reasons.__getitem__, default="")
        raise SourceError(f"none of the {rows} became a sample: {listed}{first}{_cure(most)}")
