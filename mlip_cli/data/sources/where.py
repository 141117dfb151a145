"""Conditions on the columns of a row, such as `similarity > 0.3 and punsafe < 0.5`. Nothing is evaluated by Python.

Truth has three values, as in SQL: a comparison with a missing value is unknown (None), `unknown and False` is False,
`unknown or True` is True. `is None` asks whether a value is missing: null, NaN, or an empty text.
"""

import ast
import math
import operator
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from mlip_cli.data.sources.table_files import match_column
from mlip_cli.data.sources.text_tables import cells_in_words
from mlip_cli.errors import UsageError
from mlip_cli.paths import escaped

MOST_CHARACTERS = 4_096
"""Of an expression."""
MOST_LEVELS = 100
"""Of an expression: what lies in what lies in it. Rows are tested by as many calls inside each other."""
ALLOWED = (
    "columns (odd names in backticks), numbers, texts in quotes, == != < <= > >=, in and not in a list of constants, "
    "is None, len(), lower(), and, or, not"
)

Value = int | float | str | None
Test = Callable[[Mapping[str, Any]], bool | None]

ORDERS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
QUOTED_OR_ODD = re.compile(r"""("(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')|`([^`]+)`""")
NUMBER = re.compile(r"\s*[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[-+]?[0-9]+)?\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Condition:
    """What rows must satisfy."""

    text: str
    columns: tuple[str, ...]
    """Columns that it names, as the tables spell them."""
    test: Test
    """Row -> whether it satisfies the condition; None where a missing value leaves that open."""

    def missing(self, row: Mapping[str, Any]) -> str:
        """The columns that leave the answer open, in words."""
        missing = [name for name in self.columns if _is_missing(row.get(name))]
        open_ones = missing or [name for name in self.columns if _number(row.get(name)) is None]
        return ", ".join(f"{name} is {_shown(row.get(name))}" for name in open_ones)


class _Operand(NamedTuple):
    value: Callable[[Mapping[str, Any]], Value]
    is_text: bool = False
    """It is a text whatever the row holds."""
    is_number: bool = False


def condition(text: str, columns: Sequence[str]) -> Condition:
    """The condition of an expression over these columns.

    Raises:
        UsageError: it is not an expression of the allowed kind, or names a column that is not there.
    """
    if len(text) > MOST_CHARACTERS:
        raise UsageError(f"--where: {len(text):,} characters, at most {MOST_CHARACTERS:,}")
    source = QUOTED_OR_ODD.sub(lambda match: match[1] or f"col({match[2]!r})", text).strip()
    try:
        with warnings.catch_warnings(action="ignore"):  # of odd escapes in texts
            tree = ast.parse(source, mode="eval")
    except SyntaxError as error:
        rest = source[error.offset - 1 :] if error.offset and error.lineno == 1 else ""  # offset 0: more is expected
        where = f"from {escaped(rest)!r} on" if rest else "at its end"
        raise UsageError(f"--where {text!r}: cannot be read {where}; allowed are {ALLOWED}") from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise UsageError(f"--where: cannot be read ({error}); allowed are {ALLOWED}") from None
    if _num_levels(tree) > MOST_LEVELS:
        raise UsageError(
            f"--where: more than {MOST_LEVELS} conditions inside each other; write fewer parentheses and nots"
        )
    compiler = _Compiler(text, source, columns)
    test = compiler.truth(tree.body)
    return Condition(text, tuple(compiler.used), test)


def _num_levels(tree: ast.AST) -> int:
    level, num_levels = [tree], 0
    while level:
        num_levels += 1
        level = [child for node in level for child in ast.iter_child_nodes(node)]
    return num_levels


class _Compiler:
    """Turns the tree of an expression into functions of a row."""

    def __init__(self, text: str, source: str, columns: Sequence[str]) -> None:
        self.text, self.source, self.columns = text, source, columns
        self.used: dict[str, None] = {}

    def truth(self, node: ast.expr) -> Test:
        """Row -> True, False or None, of a condition."""
        if isinstance(node, ast.BoolOp):
            return _all_or_any([self.truth(part) for part in node.values], is_and=isinstance(node.op, ast.And))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            inner = self.truth(node.operand)
            return lambda row: None if (found := inner(row)) is None else not found
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
            pairs = zip(operands[:-1], node.ops, operands[1:], strict=True)
            tests = [self._comparison(left, order, right) for left, order, right in pairs]
            return tests[0] if len(tests) == 1 else _all_or_any(tests, is_and=True)
        if isinstance(node, ast.Name) or self._is_call(node, "col"):
            value = self._column(node).value
            return lambda row: _flag(value(row))
        raise self._refused(node, "not a condition")

    def _comparison(self, left: ast.expr, order: ast.cmpop, right: ast.expr) -> Test:
        if isinstance(order, ast.Is | ast.IsNot) or (_is_none(right) and isinstance(order, ast.Eq | ast.NotEq)):
            if not _is_none(right):
                raise self._refused(right, "only None can stand after `is`")
            value, wants = self._operand(left).value, isinstance(order, ast.Is | ast.Eq)
            return lambda row: _is_missing(value(row)) == wants
        if isinstance(order, ast.In | ast.NotIn):
            return self._membership(left, right, negated=isinstance(order, ast.NotIn))
        return _compared(self._operand(left), ORDERS[type(order)], self._operand(right))

    def _membership(self, left: ast.expr, right: ast.expr, *, negated: bool) -> Test:
        if not isinstance(right, ast.List | ast.Tuple | ast.Set) or not right.elts:
            raise self._refused(right, "not a list of constants such as ('a', 'b')")
        operand = self._operand(left)
        items = [self._operand(item) for item in right.elts]
        if not all(item.is_text or item.is_number for item in items):
            raise self._refused(right, "not a list of constants such as ('a', 'b')")
        found = _all_or_any([_compared(operand, operator.eq, item) for item in items], is_and=False)
        return found if not negated else lambda row: None if (one := found(row)) is None else not one

    def _operand(self, node: ast.expr) -> _Operand:
        if isinstance(node, ast.Constant | ast.UnaryOp):
            with suppress(ValueError):  # not a constant, or a sign before a condition
                constant = ast.literal_eval(node)
                if isinstance(constant, int | float | str):
                    is_text = isinstance(constant, str)
                    return _Operand(lambda row: constant, is_text, not is_text)
        if isinstance(node, ast.Name) or self._is_call(node, "col"):
            return self._column(node)
        if self._is_call(node, "len") or self._is_call(node, "lower"):
            assert isinstance(node, ast.Call)
            inner_value = self._operand(node.args[0]).value
            if self._is_call(node, "len"):
                return _Operand(lambda row: _length(inner_value(row)), is_number=True)
            return _Operand(lambda row: _lower(inner_value(row)), is_text=True)
        raise self._refused(node, "not allowed")

    def _column(self, node: ast.expr) -> _Operand:
        if isinstance(node, ast.Name):
            name = node.id
        else:
            assert isinstance(node, ast.Call)
            argument = node.args[0]
            if not (isinstance(argument, ast.Constant) and isinstance(argument.value, str)):
                raise self._refused(node, "col() takes the name of a column in quotes")
            name = argument.value
        column = match_column(self.columns, name)
        if column is None:
            raise UsageError(f"--where: no column {name!r}; columns are {cells_in_words(self.columns)}")
        self.used[column] = None
        return _Operand(lambda row: row.get(column))

    @staticmethod
    def _is_call(node: ast.expr, name: str) -> bool:
        is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name
        return is_call and len(node.args) == 1 and not node.keywords  # type: ignore[attr-defined]

    def _refused(self, node: ast.expr, why: str) -> UsageError:
        part = ast.get_source_segment(self.source, node) or self.text
        return UsageError(f"--where: {escaped(part)!r}: {why}; allowed are {ALLOWED}")


def _all_or_any(tests: Sequence[Test], *, is_and: bool) -> Test:
    """`and` and `or` of three values: the first test that decides, else unknown if one is."""
    decides = not is_and

    def test(row: Mapping[str, Any]) -> bool | None:
        answer: bool | None = is_and
        for one in tests:
            found = one(row)
            if found is decides:
                return decides
            if found is None:
                answer = None
        return answer

    return test


def _compared(left: _Operand, order: Callable[[Any, Any], bool], right: _Operand) -> Test:
    """A comparison of numbers if one side is a number, also one written as text; of texts otherwise."""
    left_value, right_value = left.value, right.value
    has_text_constant = left.is_text or right.is_text

    def test(row: Mapping[str, Any]) -> bool | None:
        a, b = left_value(row), right_value(row)
        if isinstance(a, str) and isinstance(b, str):
            if has_text_constant:
                return order(a, b)
            numbers = _number(a), _number(b)
            if None in numbers:
                return None if _is_missing(a) or _is_missing(b) else order(a, b)
            return order(*numbers)
        a, b = _number(a), _number(b)
        return None if a is None or b is None else order(a, b)

    return test


def _number(value: Any) -> int | float | None:
    if isinstance(value, str):
        if not NUMBER.fullmatch(value):
            return None
        return int(value) if len(value) < 20 and value.strip().lstrip("+-").isdecimal() else float(value)
    if isinstance(value, float):
        return None if math.isnan(value) else value
    return value if isinstance(value, int) else None


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value)) or value == ""


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _flag(value: Any) -> bool | None:
    """The truth of a cell that is a condition by itself."""
    if isinstance(value, str):
        return {"true": True, "false": False, "1": True, "0": False}.get(value.strip().lower())
    number = _number(value)
    return None if number is None else bool(number)


def _length(value: Any) -> int | None:
    return len(value) if isinstance(value, str | list) else None


def _lower(value: Any) -> str | None:
    return value.lower() if isinstance(value, str) else None


def _shown(value: Any) -> str:
    return "missing" if _is_missing(value) else f"{escaped(str(value)[:60])!r}"
