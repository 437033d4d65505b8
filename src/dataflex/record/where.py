"""Conditions on columns, as ``domain == "gsm8k" and times_served > 3``: parsed and looked up, never run as code.

A condition is Python's syntax with these parts alone: comparisons (also chained, ``in`` and ``not in``), ``and``,
``or``, ``not``, ``+ - * /`` on numbers, names of columns, ``col("a name")`` for names with other characters, texts,
numbers, ``True``, ``False`` and ``None``. A row for which a value is missing does not fulfil a comparison with it;
``score == None`` finds it.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from dataflex.errors import ConfigError, did_you_mean
from dataflex.printable import on_one_line

_MOST = 4096  # characters of a condition
_COMPARISONS: dict[type[ast.cmpop], Callable[..., Any]] = {
    ast.Eq: pc.equal,
    ast.NotEq: pc.not_equal,
    ast.Lt: pc.less,
    ast.LtE: pc.less_equal,
    ast.Gt: pc.greater,
    ast.GtE: pc.greater_equal,
}
_ARITHMETIC: dict[type[ast.operator], Callable[..., Any]] = {
    ast.Add: pc.add,
    ast.Sub: pc.subtract,
    ast.Mult: pc.multiply,
    ast.Div: lambda left, right: pc.divide(pc.cast(left, pa.float64()), right),
}
_FORM = "a condition is made of columns, values, comparisons, 'and', 'or' and 'not': domain == \"code\" and score > 2"


def where(table: pa.Table, condition: str) -> pa.Array:
    """Return which rows fulfil a condition, as booleans without nulls.

    Raises:
        ConfigError: It is no condition, names a column that is not there, or compares what cannot be compared.
    """
    shown = on_one_line(condition[:80])
    if len(condition) > _MOST:
        raise ConfigError(f"--where: the condition has {len(condition):,} characters; at most {_MOST:,} are read")
    try:
        found = _Reader(table).read(ast.parse(condition.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError, pa.ArrowException) as error:
        raise ConfigError(f"--where: {shown!r} cannot be read; {_FORM}") from error
    if not pa.types.is_boolean(found.type):
        raise ConfigError(f"--where: {shown!r} is no condition but {_kind(found.type)}; {_FORM}")
    if isinstance(found, pa.Scalar):
        found = pa.repeat(found, table.num_rows)
    found = found.combine_chunks() if isinstance(found, pa.ChunkedArray) else found
    return pc.fill_null(found, False)


class _Reader:
    """Computes the parts of a condition from a table's columns."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def read(self, node: ast.AST) -> Any:
        """Return the value of a part, an array for each row or one value; ConfigError for what is no such part."""
        if isinstance(node, ast.BoolOp):
            combine = pc.and_kleene if isinstance(node.op, ast.And) else pc.or_kleene
            found = self._truth(node.values[0])
            for value in node.values[1:]:
                found = combine(found, self._truth(value))
            return found
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            return pc.invert(self._truth(node.operand))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return pc.negate(self._number(node.operand))
        if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
            return _ARITHMETIC[type(node.op)](self._number(node.left), self._number(node.right))
        if isinstance(node, ast.Compare):
            return self._compared(node)
        if isinstance(node, ast.Constant) and isinstance(node.value, str | int | float | bool | None):
            return pa.scalar(node.value)
        if isinstance(node, ast.Name):
            return self._column(node.id)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "col":
            name = node.args[0] if len(node.args) == 1 and not node.keywords else None
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                return self._column(name.value)
        raise ConfigError(f"--where: {_written(node)} has no place in a condition; {_FORM}")

    def _column(self, name: str) -> Any:
        known = self._table.column_names
        if name not in known:
            told = [on_one_line(each) for each in known if not each.startswith(("score_", "rank_"))]
            near = did_you_mean(name, [on_one_line(each) for each in known])
            raise ConfigError(
                f"--where: no column {on_one_line(name)[:80]!r}{near} (columns: {', '.join(told)}, and score_N and "
                "rank_N of single decisions)"
            )
        column = self._table.column(name)
        return column.cast(pa.string()) if pa.types.is_dictionary(column.type) else column

    def _truth(self, node: ast.AST) -> Any:
        return self._wanted(node, pa.types.is_boolean, "no condition")

    def _number(self, node: ast.AST) -> Any:
        return self._wanted(node, lambda kind: pa.types.is_integer(kind) or pa.types.is_floating(kind), "no number")

    def _wanted(self, node: ast.AST, fits: Callable[[pa.DataType], bool], what: str) -> Any:
        value = self.read(node)
        if not fits(value.type):
            raise ConfigError(f"--where: {_written(node)} is {what} but {_kind(value.type)}; {_FORM}")
        return value

    def _compared(self, node: ast.Compare) -> Any:
        found, left = None, node.left
        for operator, right in zip(node.ops, node.comparators, strict=True):
            one = self._pair(node, left, operator, right)
            found, left = one if found is None else pc.and_kleene(found, one), right
        return found

    def _pair(self, node: ast.AST, left: ast.AST, operator: ast.cmpop, right: ast.AST) -> Any:
        first = self.read(left)
        if isinstance(operator, ast.In | ast.NotIn):
            if isinstance(right, ast.List | ast.Tuple | ast.Set):
                values = [self.read(each) for each in right.elts]
                tests = [self._equal(node, pc.equal, first, value) for value in values] or [pa.scalar(False)]
                inside = tests[0]
                for test in tests[1:]:
                    inside = pc.or_kleene(inside, test)
            else:
                text = self.read(right)
                if not (isinstance(first, pa.StringScalar) and pa.types.is_string(text.type)):
                    raise ConfigError(f'--where: {_written(node)}: write "a text" in COLUMN, or COLUMN in ["a", "b"]')
                inside = pc.match_substring(text, first.as_py())
            return pc.invert(inside) if isinstance(operator, ast.NotIn) else inside
        second = self.read(right)
        none = isinstance(right, ast.Constant) and right.value is None
        if none and isinstance(operator, ast.Eq | ast.Is):
            return pc.is_null(first)
        if none and isinstance(operator, ast.NotEq | ast.IsNot):
            return pc.is_valid(first)
        if type(operator) not in _COMPARISONS:
            raise ConfigError(f"--where: {_written(node)} compares in a way that is not known; {_FORM}")
        return self._equal(node, _COMPARISONS[type(operator)], first, second)

    def _equal(self, node: ast.AST, compare: Callable[..., Any], first: Any, second: Any) -> Any:
        kinds = {_kind(one.type) for one in (first, second)}
        if len(kinds) > 1 or kinds & {"a list", "nothing"}:
            hint = "; texts stand in quotes, numbers do not" if kinds == {"text", "a number"} else ""
            raise ConfigError(f"--where: {_written(node)} compares {' with '.join(sorted(kinds))}{hint}")
        return compare(first, second)


def _written(node: ast.AST) -> str:
    return repr(on_one_line(ast.unparse(node))[:80])


def _kind(kind: pa.DataType) -> str:
    if pa.types.is_boolean(kind):
        return "true or false"
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return "text"
    if pa.types.is_null(kind):
        return "nothing"
    return "a number" if pa.types.is_integer(kind) or pa.types.is_floating(kind) else "a list"
