"""The SQL of a row filter: what it means, what is refused, and where an error points."""

import sys
from collections.abc import Iterator
from datetime import UTC, date, datetime
from decimal import Decimal

import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softlabel.pipeline.tables.row_expression import row_expression
from softlabel.storage.errors import UsageError
from softlabel.storage.schema import SEQUENCE

CARRIED = {
    **{"source": pa.string(), "other": pa.string(), "year": pa.int64(), "score": pa.float64(), "ok": pa.bool_()},
    **{"day": pa.date32(), "number of words": pa.int64(), "Upper.dot": pa.string(), 'quo"te': pa.string()},
    **{"length": pa.int64(), "date": pa.date32(), "^.*$": pa.int64(), "*": pa.int64(), "größe": pa.int64()},
    **{"true": pa.int64(), "x\x1b[31m": pa.int64(), "price": pa.decimal128(7, 2), "exact": pa.decimal128(38, 9)},
    **{"written": pa.timestamp("us"), "read": pa.timestamp("us", "UTC")},
}
KNOWN = pa.schema([*SEQUENCE, *CARRIED.items()])
ROWS = pl.DataFrame(
    {
        "source": ["web", "book", None, "50%_off", "a\nb"],
        "other": ["web", "WEB", "x", None, "A\nB"],
        "year": [2020, -3, 0, None, 2**60 + 1],
        "score": [0.5, float("nan"), -2.0, float("inf"), None],
        "ok": [True, False, None, True, False],
        "day": [date(2024, 1, 1), date(2024, 6, 30), None, date(1999, 1, 1), date(2024, 12, 31)],
        "tokens": pl.Series([1, 2, 2**31 - 1, 0, 5], dtype=pl.Int32),
        "token_ids": [[1], [], [1, 2, 3], [4], [5, 6]],
        **{name: range(5) for name in ("number of words", "length", "^.*$", "*", "größe", "true")},
        **{name: list("abcde") for name in ("Upper.dot", 'quo"te')},
        "date": [date(2024, 1, day) for day in range(1, 6)],
        "price": pl.Series([*map(Decimal, ["0.10", "-3", "99999.99", "0"]), None], dtype=pl.Decimal(7, 2)),
        **{
            name: [
                datetime(2024, 1, 1, tzinfo=zone),
                *(datetime(2024, 1, 3, 8, 30, second, 1, zone) for second in (1, 2, 3)),
                None,
            ]
            for name, zone in (("written", None), ("read", UTC))
        },
    }
)


def kept(where: str, rows: pl.DataFrame = ROWS) -> list[bool]:
    """For which rows an expression is true."""
    predicate, _ = row_expression(where, KNOWN)
    return predicate(rows.to_arrow()).tolist()


def refused(where: str) -> str:
    with pytest.raises(UsageError) as error:
        row_expression(where, KNOWN)
    return str(error.value)


def pointed_at(message: str) -> str:
    """The part of the expression above the carets."""
    shown, marks = message.split("  where:       --where ")[1].split("\n")[:2]
    return shown[len(marks.strip("^")) - 23 :][: marks.count("^")]


@pytest.mark.parametrize(
    ("where", "wanted"),
    [
        ("day > '2024-01-01'", [False, True, False, False, True]),
        ("day BETWEEN DATE '2024-01-01' AND '2024-06-30'", [True, True, False, False, False]),
        ("day NOT IN ('2024-01-01', '1999-01-01')", [False, True, False, False, True]),
        ("date = DATE '2024-01-03'", [False, False, True, False, False]),
        ('"number of words" = 1 OR "Upper.dot" = \'c\' OR "quo""te" = \'d\'', [False, True, True, True, False]),
        ("length > 3 AND LENGTH(source) > 2", [False] * 4 + [True]),
        ('"^.*$" = 4 OR "*" = 0', [True, False, False, False, True]),
        ('größe = 2 OR "true" = 3', [False, False, True, True, False]),
        ("tokens * tokens > 4611686014132420608", [False, False, True, False, False]),
        ("ARRAY_LENGTH(token_ids) - 2 < 0", [True, True, False, True, False]),
        ("year IN (2020, -3.0, 0.5) OR score IN (-2, 0.5)", [True, True, True, False, False]),
        ("year IN (1152921504606846976) OR year = 9223372036854775807", [False] * 5),
        ("year = 0e5 AND year = 0. AND year = 00 AND year = .0", [False, False, True, False, False]),
        ("score NOT IN (1)", [True, True, True, True, False]),
        ("source LIKE '50\\%%' OR source LIKE '50%'", [False, False, False, True, False]),
        ("source LIKE 'a_b' AND other ILIKE 'a%b'", [False, False, False, False, True]),
        ("CAST(day AS STRING) LIKE '2024%' AND CAST(ok AS VARCHAR) = 'false'", [False, True, False, False, True]),
        ("CASE source WHEN 'web' THEN 1 WHEN 'book' THEN 2.5 END > 2", [False, True, False, False, False]),
        ("CASE WHEN TRUE THEN TRUE ELSE ok END", [True] * 5),
        ("year % 2 = -1 OR year % -4 = 1 OR year % -3 = 1", [True, True, False, False, True]),
        ("2.5 / year > 100 OR year % 0 = 0", [False, False, True, False, False]),
        ("1 = 1 AND NULL IS NULL", [True] * 5),
        ("NULL = NULL OR FALSE", [False] * 5),
        ("ok IS NOT TRUE AND ok IS NOT FALSE OR day IS NULL AND ok IS TRUE", [False, False, True, False, False]),
        ("price = 0.1 OR price IN (-3, 99999.99)", [True, True, True, False, False]),
        ("price * 10 < year % 3", [False, True, False, False, False]),
        ("written >= '2024-01-03 08:30:02'", [False, False, True, True, False]),
        ("read = TIMESTAMP '2024-01-03T09:30:01.000001+01:00'", [False, True, False, False, False]),
        ("read IN ('2024-01-01', '2024-01-03 08:30:03.000001Z')", [True, False, False, True, False]),
        ("read > written OR read = day OR written < date", [True, False, False, True, False]),
        ("written NOT BETWEEN DATE '2024-01-01' AND DATE '2024-01-03'", [False, True, True, True, False]),
        ("CAST(read AS STRING) LIKE '2024-01-03 08:30:02%' OR read IS NULL", [False, False, True, False, True]),
        ("UPPER(source) || '!' = 'WEB!' OR STARTS_WITH(source, 'bo')", [True, True, False, False, False]),
    ],
)
def test_an_expression_keeps_the_expected_rows(where: str, wanted: list[bool]) -> None:
    assert kept(where) == wanted


WHOLE = st.sampled_from(["year", "score", "tokens", "1", "0", "length", "ABS(year)"])
NUMBERS = st.one_of(WHOLE, st.just("2.5"))  # polars' SQL can't divide 0 by a decimal
TEXTS = st.sampled_from(["source", "other", "'web'", "'WEB'", "LOWER(other)", "UPPER(source)", "''"])
TRUTHS = st.one_of(
    st.sampled_from(["ok", "TRUE", "false", "ok IS NULL", "source IS NOT NULL"]),
    st.builds(lambda a, op, b: f"{a} {op} {b}", NUMBERS, st.sampled_from(["=", "<>", "<", ">="]), NUMBERS),
    st.builds(lambda a, op, b: f"{a} {op} {b}", TEXTS, st.sampled_from(["=", "!=", "<=", ">"]), TEXTS),
    st.builds(lambda a, b, c, d: f"{a} {b} {c} + {d} * 2 = 3", WHOLE, st.sampled_from("+-*/"), WHOLE, WHOLE),
    st.builds("{} % {} + 2 = {}".format, WHOLE, st.sampled_from(["year", "tokens", "2", "0", "-3"]), WHOLE),
    st.builds(lambda a, no, b: f"{a} {no} BETWEEN - {b} AND 3", NUMBERS, st.sampled_from(["", "NOT"]), NUMBERS),
    st.builds(lambda a, no: f"{a} {no} IN ('web', '50%_off')", TEXTS, st.sampled_from(["", "NOT"])),
    st.builds(lambda a, no, b: f"{a} {no} '{b}'", TEXTS, st.sampled_from(["LIKE", "NOT ILIKE"]), st.text("web%_\n")),
    st.builds(lambda a, b: f"COALESCE({a}, {b}) = GREATEST({b}, {a})", TEXTS, TEXTS),
)
EXPRESSIONS = st.recursive(
    TRUTHS,
    lambda inner: st.one_of(
        st.builds("({})".format, inner),
        st.builds("NOT {}".format, inner),
        st.builds("{} IS NULL".format, inner),
        st.builds(lambda a, op, b: f"{a} {op} {b}", inner, st.sampled_from(["AND", "OR"]), inner),
        st.builds("CASE WHEN {} THEN {} ELSE {} END".format, inner, inner, inner),
    ),
    max_leaves=6,
)


@given(EXPRESSIONS)
@settings(max_examples=200, deadline=None)
def test_an_expression_keeps_the_rows_that_polars_sql_keeps(where: str) -> None:
    oracle = ROWS.with_columns(pl.col("tokens").cast(pl.Int64))
    wanted = oracle.select(pl.sql_expr(where).fill_null(value=False)).to_series().to_list()
    assert kept(where) == wanted * (len(ROWS) // len(wanted))


@given(EXPRESSIONS)
@settings(max_examples=100, deadline=None)
def test_a_rows_result_does_not_depend_on_other_rows(where: str) -> None:
    assert kept(where) == [kept(where, ROWS[i : i + 1])[0] for i in range(len(ROWS))]
    assert kept(where, ROWS.reverse()) == kept(where)[::-1]


@pytest.mark.parametrize(
    ("where", "part", "problem"),
    [
        (
            "ok AND read_csv('/etc/passwd')",
            "read_csv",
            "read_csv, which is not one of the functions that can be used here",
        ),
        ("source IN (SELECT a FROM b)", "SELECT", "no column SELECT"),
        ("year + 1 > 3 AND source = 3", "source = 3", "a number and text"),
        ("LOWER(year) = 'a'", "year", "a number instead of text"),
        ("ok = TRUE AND tokens LIKE 'a%'", "tokens", "a number instead of text"),
        ("source LIKE other", "other", "a pattern that is not a string"),
        ("NOT tokens", "tokens", "a number instead of true or false"),
        ("ok OR day > 'today'", "'today'", "not a date"),
        ("ok OR read > '3 o''clock'", "'3 o''clock'", "not a time"),
        ("read < '0001-01-01T00+23'", "'0001-01-01T00+23'", "not a time"),
        ("ok AND read > 2024", "read > 2024", "a number and a time"),
        ("exact > 1", "exact", "only 15 digits"),
        ("CAST(source AS INT) > 3", "INT", "STRING"),
        ("year > 1e999", "1e999", "too large"),
        ("ok -- AND year > 3", "--", "a comment"),
        ("source = 'web", "'", "an unclosed quote"),
        ("ok; ok", ";", "which is not SQL"),
        ("year > 3 year", "year", "instead of an operator or the end"),
        ("year IN (1, year)", "year", "a list item that is not a string"),
        ("source = \x1b[31m", "\\x1b", "which is not SQL"),
        ("ok \u202eDNA", "\\u202e", "which is not SQL"),
        ("source = '\udcff'", "'\\udcff'", "not UTF-8"),
        ("year + 1", "year + 1", "neither true nor false"),
    ],
)
def test_an_error_points_at_its_place(where: str, part: str, problem: str) -> None:
    message = refused(where)
    assert pointed_at(message) == part
    assert problem in message
    assert "\x1b" not in message


@pytest.mark.parametrize(
    "where",
    [
        *("source = 'a' OR " * 30_000 + "ok", "ok AND " * 100_000 + "ok", "x" * 1_000_000, "'" * 1_000_001),
        *("(" * 5000 + "ok" + ")" * 5000, "NOT " * 5000 + "ok", "- " * 5000 + "1 = 1", "year = " + "1 + " * 5000 + "1"),
        *("CASE WHEN ok THEN " * 900 + "ok" + " END" * 900, "LOWER(" * 5000 + "source" + ")" * 5000 + " = 'a'"),
        *("(NOT " * 900 + "ok" + ")" * 900, "ok = " * 5000 + "ok", "source || " * 5000 + "'a' = 'a'"),
        *("year IN (" * 900, "CASE ok " + "WHEN ok THEN ok " * 3000 + "END", f"source LIKE '{'_' * 49_000}'"),
    ],
)
def test_an_expression_that_is_too_long_or_too_deep_is_refused_briefly(where: str) -> None:
    message = refused(where)
    assert len(message) < 2000
    assert max(map(len, message.splitlines()[2:5])) < 110


@pytest.mark.parametrize(
    "where",
    [
        " OR ".join(f"source = 's{i}'" for i in range(2000)) + " OR year = 2020",
        f"year IN ({', '.join(map(str, range(2020, 9000)))})",
        "source IN (" + "".join(f"'{i:036}', " for i in range(1000)) + "'web')",
        "(" * 48 + "year = 2020" + ")" * 48,
        "year = " + "0 + " * 40 + "2020",
    ],
)
def test_long_lists_and_chains_are_evaluated(where: str) -> None:
    assert kept(where) == [True, *[False] * 4]


WORDS = """
source year score ok day token_ids 'a' '' 1 1.5 0. 0e1 ( ( ) ) , + - * / % < = <> || AND OR NOT IN BETWEEN LIKE ILIKE
IS NULL TRUE CASE WHEN THEN ELSE END DATE CAST AS STRING LOWER COALESCE GREATEST SELECT FROM EXISTS read_csv OVER COUNT
. ; :: [ ] $1 ? @ -- /* " ' TIMESTAMP written read price
"""
TEXT = st.one_of(
    st.text(),
    st.text(st.characters(codec=None)),
    st.lists(st.sampled_from(WORDS.split()), max_size=25).map(" ".join),
)
opened: list[str] = []
watching = False


def watch(event: str, _: object) -> None:
    if watching and event.split(".")[0] in ("open", "socket", "subprocess", "exec", "compile"):
        opened.append(event)


@pytest.fixture(scope="module", autouse=True)
def _watched() -> Iterator[None]:
    global watching  # an audit hook can't be removed
    sys.addaudithook(watch)
    yield
    watching = False


@given(TEXT)
@settings(max_examples=300, deadline=None)
def test_any_text_is_evaluated_or_refused_and_never_opens_anything(text: str) -> None:
    global watching
    watching = True
    try:
        kept(text)
    except UsageError as error:
        shown = str(error)
        assert all(character.isprintable() or character == "\n" for character in shown)
    finally:
        watching = False
    assert not opened
