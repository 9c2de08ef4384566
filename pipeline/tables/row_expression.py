"""Parses SQL that is true or false for a row into a polars expression: columns, literals, operators, a few functions.

Only what is parsed here is supported: polars' own SQL, which can also open files and URLs, never sees the text.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from softlabel.pipeline.tables import sql_values as sql
from softlabel.pipeline.tables.sql_tokens import RefusedError, Token, pointed, tokens
from softlabel.pipeline.tables.sql_values import Kind, Value
from softlabel.storage.errors import UsageError, printable

_BINDING = {
    **{"OR": 1, "AND": 2, "IS": 4, "LIKE": 5, "ILIKE": 5, "IN": 6, "BETWEEN": 6},
    **dict.fromkeys(sql.COMPARISONS, 6),
    **{"+": 7, "-": 7, "||": 7, "*": 8, "/": 8, "%": 8},
}
"""How tightly each operator binds, as in polars' SQL; a NOT in front binds by 3, a sign by 9."""
_NOT, _SIGN = 3, 9
_NEGATED = ("LIKE", "ILIKE", "IN", "BETWEEN")
_CONSTANTS = {"TRUE": (True, Kind.TRUTH), "FALSE": (False, Kind.TRUTH), "NULL": (None, Kind.NULL)}
_INDENT = "\n" + " " * len("  what to do:  ")
_ALLOWED = _INDENT.join(
    [
        "use only columns, 'strings', numbers, TRUE, FALSE, NULL, DATE '2024-12-31',",
        "TIMESTAMP '2024-12-31 18:30:00' (of UTC);",
        "AND OR NOT = <> < <= > >= IN BETWEEN LIKE ILIKE IS + - * / % ||;",
        "CASE, CAST(... AS STRING), " + ", ".join(sorted({*sql.FUNCTIONS, *sql.CHOICES})) + ".",
        "Put strings in single quotes, and column names that are not plain words in double quotes:",
        "source = 'web' AND \"number of words\" > 20. For a list of documents, use --drop FILE.",
    ]
)


def row_expression(text: str, known: pa.Schema) -> tuple[Callable[[pa.Table], NDArray[np.bool_]], set[str]]:
    """Compile an expression.

    Args:
        text: SQL over the columns.
        known: names and types of the columns.

    Returns:
        A function that returns (R,) for which of R rows the expression is true, and the names of the columns it reads.

    Raises:
        UsageError: if the text is anything else; points at the place.
    """
    empty = pl.DataFrame(known.empty_table())
    try:
        reader = _Reader(tokens(text), empty.schema)
        whole = reader.whole()
        empty.select(whole.expr)
    except RefusedError as refused:
        found, place = str(refused), pointed(text, refused.start, refused.end)
    except pl.exceptions.PolarsError as error:  # a pattern is too large once it is compiled
        found, place = printable(str(error).splitlines()[0]), pointed(text, 0, len(text))
    else:
        return partial(_rows_where, whole.expr), reader.columns
    raise UsageError(
        "rows can't be filtered by this expression",
        expected=f"SQL that is true or false for each row, with the columns {printable(', '.join(known.names))}",
        found=found,
        where=f"--where {place[0]}{_INDENT}{' ' * len('--where ')}{place[1]}",
        do=_ALLOWED,
    )


def _rows_where(expr: pl.Expr, rows: pa.Table) -> NDArray[np.bool_]:
    values = pl.DataFrame(rows).select(expr.fill_null(value=False)).to_series().to_numpy()
    return np.broadcast_to(values, len(rows))  # polars returns one value for an expression without columns


class _Reader:
    """Recursive-descent parser over an expression's tokens."""

    def __init__(self, parts: list[Token], schema: pl.Schema) -> None:
        self._parts = parts
        self._schema = schema
        self._at = 0
        self._depth = 0
        self.columns: set[str] = set()
        """Names of the columns that the expression reads."""

    def whole(self) -> Value:
        """Parse the whole expression."""
        value = self._expression()
        if self._next.kind != "end":
            sql.refuse(f"{self._next} instead of an operator or the end", self._next)
        if value.kind is not Kind.TRUTH:
            sql.refuse(f"{value.kind}, which is neither true nor false", value)
        return value

    @property
    def _next(self) -> Token:
        return self._parts[self._at]

    def _sees(self, *wanted: str, ahead: int = 0) -> str:
        """The next token, if it is one of these words or signs; else an empty string."""
        part = self._parts[min(self._at + ahead, len(self._parts) - 1)]
        return part.text if part.kind in ("word", "sign") and part.text in wanted else ""

    def _take(self, *wanted: str) -> str:
        """Like ``_sees``, but also consumes the token."""
        found = self._sees(*wanted)
        self._at += bool(found)
        return found

    def _need(self, *wanted: str) -> Token:
        """Consume the next token, which must be one of these words or signs."""
        part = self._next
        if not self._take(*wanted):
            sql.refuse(f"{part} instead of {' or '.join(wanted)}", part)
        return part

    def _expression(self, above: int = 0) -> Value:
        """Parse an expression whose operators all bind more tightly than ``above``."""
        self._depth += 1
        if self._depth > sql.DEEPEST:
            sql.refuse(f"more than {sql.DEEPEST} nested expressions", self._next)
        value = self._operand()
        while (sign := self._operator()) and _BINDING[sign] > above:
            value = self._operation(value, sign)
        self._depth -= 1
        return value

    def _operator(self) -> str:
        """The next operator, skipping a NOT in front of it."""
        return self._sees(*_NEGATED, ahead=1) if self._sees("NOT") else self._sees(*_BINDING)

    def _operation(self, left: Value, sign: str) -> Value:
        if sign in ("AND", "OR"):
            terms = [left]
            while self._take(sign):
                terms.append(self._expression(_BINDING[sign]))
            return sql.chained(sign, terms)
        negated = self._take("NOT")
        self._need(sign)
        if sign == "IS":
            negated = self._take("NOT")
            value = sql.is_constant(left, self._constant(self._need(*_CONSTANTS)))
        elif sign == "IN":
            value = sql.in_list(left, self._list(), self._schema)
        else:
            right = self._expression(_BINDING[sign])
            value = self._with(left, sign, right)
        return sql.negated(value) if negated else value

    def _with(self, left: Value, sign: str, right: Value) -> Value:
        if sign == "BETWEEN":
            self._need("AND")
            return sql.between(left, right, self._expression(_BINDING[sign]))
        if sign in ("LIKE", "ILIKE"):
            return sql.like(left, right, ignore_case=sign == "ILIKE")
        return (sql.compared if sign in sql.COMPARISONS else sql.computed)(sign, left, right)

    def _list(self) -> list[Value]:
        """One or more values in parentheses."""
        self._need("(")
        values = [self._expression()]
        while self._need(",", ")").text == ",":
            values.append(self._expression())
        return values

    def _operand(self) -> Value:
        part = self._next
        self._at += 1
        value = self._read(part)
        return replace(value, start=part.start, end=self._parts[self._at - 1].end)

    def _read(self, part: Token) -> Value:
        """The operand that begins with this token."""
        match part.kind, part.text:
            case "number", _:
                return sql.number(part)
            case "string", text:
                return sql.literal(text, Kind.TEXT, part)
            case "name", name:
                return self._column(part, name)
            case "sign", "(":
                return self._enclosed()
            case "sign", "-":
                return sql.negative(self._expression(_SIGN))
            case "word", "NOT":
                return sql.negated(self._expression(_NOT))
            case "word", word if word in _CONSTANTS:
                return self._constant(part)
            case "word", "CASE":
                return self._case()
            case "word", "DATE" if self._next.kind == "string":
                return sql.date_literal(self._operand())
            case "word", "TIMESTAMP" if self._next.kind == "string":
                return sql.time_literal(self._operand())
            case "word", _ if self._sees("("):
                return self._call(part)
            case "sign" | "end", _:
                sql.refuse(f"{part} instead of a value", part)
        return self._column(part, part.written)

    def _enclosed(self) -> Value:
        value = self._expression()
        self._need(")")
        return value

    def _constant(self, part: Token) -> Value:
        return sql.literal(*_CONSTANTS[part.text], part)

    def _column(self, part: Token, name: str) -> Value:
        value = sql.column(part, name, self._schema)
        self.columns.add(name)
        return value

    def _case(self) -> Value:
        of = None if self._sees("WHEN") else self._expression()
        branches: list[tuple[Value, Value]] = []
        self._need("WHEN")
        while not branches or self._take("WHEN"):
            condition = self._expression()
            self._need("THEN")
            branches.append((sql.compared("=", of, condition) if of else condition, self._expression()))
        otherwise = self._expression() if self._take("ELSE") else sql.literal(None, Kind.NULL, self._next)
        self._need("END")
        return sql.case(branches, otherwise)

    def _call(self, name: Token) -> Value:
        if name.text == "CAST":
            return self._cast()
        if name.text not in {*sql.FUNCTIONS, *sql.CHOICES}:
            sql.refuse(f"{name}, which is not one of the functions that can be used here", name)
        return sql.call(name, self._list())

    def _cast(self) -> Value:
        self._need("(")
        value = self._expression()
        self._need("AS")
        self._need("STRING", "TEXT", "VARCHAR")
        self._need(")")
        return sql.as_text(value)
