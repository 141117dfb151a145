"""What the user asks of the rows of tables: --where, --uids and --captions-from."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlip_cli.data.sources.lists import odd_size
from mlip_cli.data.sources.records import ADD, LEFT_OUT, NOT_IN_UIDS, Caption, ReadOptions
from mlip_cli.data.sources.table_files import Chosen, Table, match_column
from mlip_cli.data.sources.text_tables import cells_in_words, table_error
from mlip_cli.data.sources.where import Condition, condition
from mlip_cli.errors import UsageError
from mlip_cli.paths import escaped

if TYPE_CHECKING:  # they import numpy
    from mlip_cli.data.sources.rewritten import Rewritten
    from mlip_cli.data.sources.uids import Uids

UNKNOWN = "--where asks for a missing value"


@dataclass(frozen=True)
class TableRules:
    """The rules for the rows of one table."""

    rules: "RowRules"
    condition: Condition | None
    uid_column: str
    key_column: str
    """Of the captions of another file; "" where they are not joined by a column."""

    def left_out(self, row: Mapping[str, Any]) -> tuple[str, str] | None:
        """(reason, detail) of a row that is not wanted."""
        if self.rules.uids is not None:
            uid = row.get(self.uid_column)
            if uid is None or str(uid) not in self.rules.uids:
                return NOT_IN_UIDS, "" if uid is None else str(uid)
        if self.condition is not None and not (found := self.condition.test(row)):
            if found is None:
                return UNKNOWN, self.condition.missing(row)
            return LEFT_OUT, self.condition.text
        return None

    def captions(self, row: Mapping[str, Any], own: tuple[Caption, ...]) -> tuple[Caption, ...]:
        """The captions of a row, from the file of rewritten ones if it has any."""
        if self.rules.rewritten is None or not self.key_column:
            return own
        return self.rules.rewritten.instead_of(own, row.get(self.key_column))


@dataclass(frozen=True)
class RowRules:
    """The rules for all tables."""

    where: str | None = None
    uids: "Uids | None" = None
    rewritten: "Rewritten | None" = None

    def of(self, table: Table, chosen: Chosen) -> TableRules:
        """The rules for one table.

        Raises:
            UsageError: the condition cannot be read, or a column is not there.
        """
        uid_column = ""
        if self.uids is not None:
            from mlip_cli.data.sources.uids import UID_COLUMNS

            found = (match_column(table.columns, name) for name in UID_COLUMNS)
            uid_column = next(filter(None, found), "")
            if not uid_column:
                names = ", ".join(UID_COLUMNS)
                columns = cells_in_words(table.columns)
                raise table_error(table.path, f"--uids: no column of uids ({names}); columns are {columns}")
        key_column = self.rewritten.key_column_of(table, chosen) if self.rewritten is not None else ""
        tested = condition(self.where, table.columns) if self.where else None
        return TableRules(self, tested, uid_column, key_column)

    def remarks(self) -> Iterator[str]:
        """What is worth a line after all rows have been read once."""
        if self.rewritten is not None:
            yield self.rewritten.in_words()
            if not self.rewritten.by_sha256:
                yield self.rewritten.counts_in_words()


def row_rules(read: ReadOptions, tables: Sequence[tuple[Table, Chosen]], folder: Path) -> RowRules | None:
    """The rules that the user gave, or None.

    Args:
        tables: of the source, with the columns that are read. folder: where rewritten captions are written by key.

    Raises:
        UsageError: a file cannot be read, a condition cannot be read, or a column is not there.
    """
    if not (read.where or read.uids or read.captions_from):
        return None
    rules = RowRules(read.where)
    if read.uids:
        from mlip_cli.data.sources.uids import read_uids

        rules = replace(rules, uids=read_uids(Path(read.uids)))
    for table, chosen in tables:
        rules.of(table, chosen)
    if read.captions_from:
        from mlip_cli.data.sources.rewritten import rewritten_captions

        rules = replace(rules, rewritten=rewritten_captions(read.captions_from, tables, folder))
    return rules


def list_warnings(read: ReadOptions, rules: RowRules | None, *, num_rows: int) -> Iterator[str]:
    """What looks wrong after all rows have been read once. A limit leaves rows out, so nothing is said then."""
    if read.limit is not None:
        return
    if read.preset and (odd := odd_size(read.preset, num_rows)):
        yield odd
    if rules and rules.uids and (unmet := rules.uids.unmet()):
        yield unmet


def fingerprints(read: ReadOptions) -> dict[str, list[int]]:
    """Sizes and times of the files that the rules name, for prepared.json.

    Raises:
        UsageError: one is not there.
    """
    captions = read.captions_from and read.captions_from.removeprefix(ADD)
    named = {"uids": read.uids, "captions_from": captions}
    return {f"{what}_file": _size_and_time(what, path) for what, path in named.items() if path}


def _size_and_time(what: str, path: str) -> list[int]:
    try:
        stat = Path(path).stat()
    except OSError as error:
        option = what.replace("_", "-")
        raise UsageError(f"--{option} {escaped(path)}: cannot be read ({error.strerror})") from None
    return [stat.st_size, stat.st_mtime_ns]
