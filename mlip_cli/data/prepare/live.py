"""The bar of pass 1: it moves row by row, by what workers say of the parts that they have in hand."""

from collections import Counter
from collections.abc import Iterable

from mlip_cli.data.prepare.downloads import outcomes_in_words
from mlip_cli.data.prepare.workspace import PartInHand, PartResult
from mlip_cli.terminal.panel import WorkProgress


class LiveCounts:
    """Rows and rejects so far, of finished parts and of those in hand."""

    def __init__(self, bar: WorkProgress, about: int, done: Iterable[PartResult], *, are_downloads: bool) -> None:
        """`about` is the number of rows, which may be a few more; `done` are parts of an earlier run."""
        self._bar, self._about, self._are_downloads = bar, about, are_downloads
        self._rows, self._reasons = 0, Counter[str]()
        self._in_hand: dict[int, PartInHand] = {}
        for result in done:
            self._count(result)
        self._show()

    def _count(self, part: PartResult | PartInHand) -> None:
        self._rows += part.rows
        self._reasons.update(part.reasons)

    def finished(self, result: PartResult) -> None:
        """A part is finished."""
        self._in_hand.pop(result.number, None)
        self._count(result)
        self._show()

    def hear(self, part: PartInHand) -> None:
        """A worker says how far a part is."""
        self._in_hand[part.number] = part
        self._show()

    def _show(self) -> None:
        rows = self._rows + sum(part.rows for part in self._in_hand.values())
        words = None
        if self._are_downloads:
            reasons = sum((Counter(part.reasons) for part in self._in_hand.values()), self._reasons)
            words = outcomes_in_words(rows, reasons)
        self._bar.update(self._bar.task_ids[0], completed=rows, total=max(self._about, rows), description=words)
