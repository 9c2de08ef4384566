"""Values of an SQL expression, each of one kind, and the operations on them as polars expressions.

Every operation works on one row at a time, and gives null where SQL does. Kinds that don't go together are refused
with their place, before polars converts them by rules of its own.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, time
from enum import StrEnum
from math import isfinite
from typing import NoReturn

import polars as pl
import polars.selectors as cs

from softlabel.pipeline.tables.sql_tokens import RefusedError, Token

DEEPEST = 50
"""Most nested operations, because polars recurses over them. A chain of AND or OR counts as one, however long."""

_Operation = Callable[[pl.Expr, pl.Expr], pl.Expr]


def _remainder(left: pl.Expr, right: pl.Expr) -> pl.Expr:
    """Remainder with the sign of the left operand, as in SQL; in Python it has the sign of the right one."""
    return left.abs() % right.abs() * left.sign()


COMPARISONS: dict[str, _Operation] = {
    **{"=": operator.eq, "==": operator.eq, "<>": operator.ne, "!=": operator.ne},
    **{"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge},
}
ARITHMETIC: dict[str, _Operation] = {
    **{"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv, "%": _remainder}
}


class Kind(StrEnum):
    """Kind of a value; only values of the same kind can be compared."""

    TEXT = "text"
    NUMBER = "a number"
    TRUTH = "true or false"
    DATE = "a date"
    TIME = "a time"
    BYTES = "bytes"
    LIST = "a list"
    NULL = "NULL"


_TYPES: dict[Kind, pl.DataType] = {
    **{Kind.TEXT: pl.String(), Kind.NUMBER: pl.Int64(), Kind.TRUTH: pl.Boolean()},
    **{Kind.DATE: pl.Date(), Kind.TIME: pl.Datetime("us")},
    **{Kind.BYTES: pl.Binary(), Kind.LIST: pl.List(pl.Int64())},
}
_KINDS = {type(dtype): kind for kind, dtype in _TYPES.items()}
_KINDS |= dict.fromkeys((pl.Int32, pl.Float64, pl.Decimal), Kind.NUMBER)
"""The kind of every type that rows can be filtered by; a carried column may have other types."""
_EXACT_DIGITS = 15
"""Digits of a decimal that a floating-point number keeps."""

FUNCTIONS: dict[str, tuple[tuple[Kind, ...], Kind, Callable[..., pl.Expr]]] = {
    "ABS": ((Kind.NUMBER,), Kind.NUMBER, pl.Expr.abs),
    "ARRAY_LENGTH": ((Kind.LIST,), Kind.NUMBER, lambda values: values.list.len().cast(pl.Int64)),
    "ENDS_WITH": ((Kind.TEXT, Kind.TEXT), Kind.TRUTH, lambda text, end: text.str.ends_with(end)),
    "LENGTH": ((Kind.TEXT,), Kind.NUMBER, lambda text: text.str.len_chars().cast(pl.Int64)),
    "LOWER": ((Kind.TEXT,), Kind.TEXT, lambda text: text.str.to_lowercase()),
    "STARTS_WITH": ((Kind.TEXT, Kind.TEXT), Kind.TRUTH, lambda text, start: text.str.starts_with(start)),
    "UPPER": ((Kind.TEXT,), Kind.TEXT, lambda text: text.str.to_uppercase()),
}
"""Argument kinds, result kind and implementation of each function."""
CHOICES: dict[str, Callable[..., pl.Expr]] = {
    **{"COALESCE": pl.coalesce, "GREATEST": pl.max_horizontal, "LEAST": pl.min_horizontal}
}
"""Functions that return one of their arguments, which must all be of one kind."""


@dataclass(frozen=True)
class Value:
    """A parsed part of the expression."""

    expr: pl.Expr
    kind: Kind
    start: int
    end: int
    depth: int = 1
    literal: str | float | date | bool | None = None
    """The value itself, if it is a literal."""


def refuse(found: str, at: Value | Token) -> NoReturn:
    """Raise an error that says what can't be used, and points at it."""
    raise RefusedError(found, at.start, at.end)


def combined(expr: pl.Expr, kind: Kind, *parts: Value) -> Value:
    """A value computed from some parts of the expression."""
    depth = 1 + max(part.depth for part in parts)
    value = Value(expr, kind, parts[0].start, parts[-1].end, depth)
    if depth > DEEPEST:
        refuse(f"more than {DEEPEST} nested operations", value)
    return value


def column(part: Token, name: str, schema: pl.Schema) -> Value:
    """A column; integers become 64 bits wide, so that products of counts do not overflow, and times those of UTC."""
    if name not in schema:
        refuse(f"no column {part}", part)
    dtype = schema[name]
    if type(dtype) not in _KINDS:
        refuse(f"column {part} of type {dtype}, by which rows can't be filtered", part)
    expr = cs.by_name(name).as_expr()  # pl.col would read ^...$ as a pattern of names
    if isinstance(dtype, pl.Decimal):
        if dtype.precision > _EXACT_DIGITS:
            refuse(f"column {part} of type {dtype}, of which only {_EXACT_DIGITS} digits can be compared", part)
        expr = expr.cast(pl.Float64)
    elif isinstance(dtype, pl.Datetime) and dtype.time_zone:
        expr = expr.dt.convert_time_zone("UTC").dt.replace_time_zone(None)
    elif dtype == pl.Int32:
        expr = expr.cast(pl.Int64)
    return Value(expr, _KINDS[type(dtype)], part.start, part.end)


def literal(value: str | float | date | bool | None, kind: Kind, at: Value | Token) -> Value:
    """A string, number, date, time, TRUE, FALSE or NULL."""
    dtype = pl.Float64 if isinstance(value, float) else _TYPES.get(kind)
    return Value(pl.lit(value, dtype=dtype), kind, at.start, at.end, literal=value)


def number(part: Token) -> Value:
    """A number literal."""
    digits = (part.text.lstrip("0") or "0") if part.text.isdecimal() else ""
    value = int(digits) if 0 < len(digits) < 20 else float(part.text)
    if not isfinite(value) or (digits and value >= 2**63):
        refuse("a number that is too large", part)
    return literal(value, Kind.NUMBER, part)


def date_literal(value: Value) -> Value:
    """A string literal as a date."""
    try:
        return literal(date.fromisoformat(str(value.literal)), Kind.DATE, value)
    except ValueError:
        refuse("a string that is not a date; dates are written like '2024-12-31'", value)


def time_literal(value: Value) -> Value:
    """A string literal as a time of UTC, which it may say in another time zone: '2024-12-31 18:30:00+01:00'."""
    try:
        found = datetime.fromisoformat(str(value.literal))
        found = found.astimezone(UTC).replace(tzinfo=None) if found.tzinfo else found
    except (ValueError, OverflowError):
        refuse("a string that is not a time; times are written like '2024-12-31 18:30:00'", value)
    return literal(found, Kind.TIME, value)


def _as_time(value: Value) -> Value:
    """A string or a date among times."""
    if isinstance(value.literal, str):
        return time_literal(value)
    if value.kind is not Kind.DATE:
        return value
    if isinstance(value.literal, date):
        return literal(datetime.combine(value.literal, time()), Kind.TIME, value)
    return replace(value, expr=value.expr.cast(_TYPES[Kind.TIME]), kind=Kind.TIME)


def negative(value: Value) -> Value:
    """A number with a minus in front."""
    if value.kind is Kind.NUMBER and value.literal is not None:
        return literal(-value.literal, Kind.NUMBER, value)  # type: ignore[operator]
    return combined(-of_kind(Kind.NUMBER, value), Kind.NUMBER, value)


def negated(value: Value) -> Value:
    """The logical NOT."""
    return combined(~of_kind(Kind.TRUTH, value), Kind.TRUTH, value)


def of_kind(kind: Kind, value: Value) -> pl.Expr:
    """The value's expression; the value must be of this kind, or NULL."""
    if value.kind not in (kind, Kind.NULL):
        refuse(f"{value.kind} instead of {kind}", value)
    return value.expr.cast(_TYPES[kind]) if value.kind is Kind.NULL else value.expr


def of_one_kind(values: Sequence[Value]) -> tuple[Kind, list[Value]]:
    """The common kind of values that must be of one kind, and the values.

    Strings among dates are read as dates; among times, strings are times, and dates their first moments.
    """
    kinds = {value.kind for value in values} - {Kind.NULL}
    if Kind.TIME in kinds:
        values = [_as_time(value) for value in values]
        kinds = {value.kind for value in values} - {Kind.NULL}
    elif Kind.DATE in kinds:
        values = [date_literal(value) if isinstance(value.literal, str) else value for value in values]
        kinds = {value.kind for value in values} - {Kind.NULL}
    kind = min(kinds, default=Kind.TEXT)
    if len(kinds) > 1 or kind is Kind.LIST:
        found = " and ".join(sorted(kinds)) if len(kinds) > 1 else "lists"
        raise RefusedError(f"{found}, which can't be compared", values[0].start, values[-1].end)
    return kind, [replace(value, expr=of_kind(kind, value)) for value in values]


def compared(sign: str, left: Value, right: Value) -> Value:
    """Comparison by an operator of ``COMPARISONS``."""
    _, (first, second) = of_one_kind([left, right])
    return combined(COMPARISONS[sign](first.expr, second.expr), Kind.TRUTH, left, right)


def computed(sign: str, left: Value, right: Value) -> Value:
    """Arithmetic by an operator of ``ARITHMETIC``, or concatenation of two strings."""
    kind, do = (Kind.TEXT, operator.add) if sign == "||" else (Kind.NUMBER, ARITHMETIC[sign])
    return combined(do(of_kind(kind, left), of_kind(kind, right)), kind, left, right)


def chained(sign: str, terms: Sequence[Value]) -> Value:
    """AND or OR over all terms."""
    exprs = [of_kind(Kind.TRUTH, term) for term in terms]
    return combined(_joined(exprs, operator.and_ if sign == "AND" else operator.or_), Kind.TRUTH, *terms)


def _joined(exprs: Sequence[pl.Expr], join: _Operation) -> pl.Expr:
    """The expressions joined as a balanced tree, so that a long chain does not nest deeply."""
    half = len(exprs) // 2
    return join(_joined(exprs[:half], join), _joined(exprs[half:], join)) if half else exprs[0]


def in_list(value: Value, choices: Sequence[Value], schema: pl.Schema) -> Value:
    """IN: whether the value is one of some literals."""
    for choice in choices:
        if choice.literal is None:
            refuse("a list item that is not a string, number, date or time", choice)
    _, (wanted, *found) = of_one_kind([value, *choices])
    (dtype,) = pl.LazyFrame(schema=schema).select(wanted.expr).collect_schema().dtypes()
    literals = [one.literal for one in found]
    if dtype == pl.Int64:  # an integer column can't equal 2.5
        literals = [int(one) for one in literals if one == int(one)]  # type: ignore[arg-type]
    listed = pl.lit(pl.Series(literals, dtype=dtype)).implode()
    return combined(wanted.expr.is_in(listed), Kind.TRUTH, value, *choices)


def between(value: Value, low: Value, high: Value) -> Value:
    """BETWEEN, bounds included."""
    _, (wanted, least, most) = of_one_kind([value, low, high])
    return combined((wanted.expr >= least.expr) & (wanted.expr <= most.expr), Kind.TRUTH, value, low, high)


def like(value: Value, pattern: Value, ignore_case: bool) -> Value:
    """LIKE or ILIKE: % stands for any characters, _ for one."""
    if not isinstance(pattern.literal, str):
        refuse("a pattern that is not a string", pattern)
    regex = pl.escape_regex(pattern.literal).replace("%", ".*").replace("_", ".")
    matches = of_kind(Kind.TEXT, value).str.contains(f"^(?{'i' * ignore_case}s){regex}$")
    return combined(matches, Kind.TRUTH, value, pattern)


def is_constant(value: Value, constant: Value) -> Value:
    """IS TRUE, IS FALSE or IS NULL, which is never null itself."""
    if constant.kind is Kind.NULL:
        return combined(value.expr.is_null(), Kind.TRUTH, value, constant)
    return combined(of_kind(Kind.TRUTH, value).eq_missing(constant.expr), Kind.TRUTH, value, constant)


def call(name: Token, values: Sequence[Value]) -> Value:
    """A call of one of ``FUNCTIONS`` or ``CHOICES``."""
    if name.text in CHOICES:
        kind, values = of_one_kind(values)
        return combined(CHOICES[name.text](*(value.expr for value in values)), kind, *values)
    takes, gives, do = FUNCTIONS[name.text]
    if len(takes) != len(values):
        refuse(f"{len(values)} values for {name}, which takes {len(takes)}", name)
    return combined(do(*map(of_kind, takes, values)), gives, *values)


def case(branches: Sequence[tuple[Value, Value]], otherwise: Value) -> Value:
    """CASE: the result of the first branch whose condition is true."""
    kind, results = of_one_kind([*(result for _, result in branches), otherwise])
    value = results[-1]
    for (condition, _), result in zip(reversed(branches), reversed(results[:-1]), strict=True):
        expr = pl.when(of_kind(Kind.TRUTH, condition)).then(result.expr).otherwise(value.expr)
        value = combined(expr, kind, condition, result, value)
    return value


def as_text(value: Value) -> Value:
    """CAST(... AS STRING)."""
    if value.kind in (Kind.BYTES, Kind.LIST):
        refuse(f"{value.kind}, which can't be cast to a string", value)
    return combined(value.expr.cast(pl.String), Kind.TEXT, value)
