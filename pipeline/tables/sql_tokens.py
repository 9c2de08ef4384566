"""Splits an SQL expression into tokens with their places, which error messages point at."""

import re
from typing import NamedTuple

from softlabel.storage.errors import printable

LONGEST = 50_000
"""Most characters: enough for the ids of a thousand documents, and any expression is evaluated within a second."""

_TOKEN = re.compile(
    r"""
    (?P<comment> -- | /\* )
    | (?P<number> (?: [0-9]+ \.? [0-9]* | \. [0-9]+ ) (?: [eE] [+-]? [0-9]+ )? (?!\w) )
    | (?P<string> ' [^']* (?: '' [^']* )* ' )
    | (?P<name> " [^"]* (?: "" [^"]* )* " )
    | (?P<word> [^\W\d] \w* )
    | (?P<sign> <= | >= | <> | != | == | \|\| | [-+*/%(),<>=] )
    | (?P<end> \Z )
    """,
    re.VERBOSE,
)
_SPACE = re.compile(r"\s*")
_SHOWN = 18
"""Characters that an error message shows of the place, and on each side of it."""


class Token(NamedTuple):
    """A token of an expression."""

    kind: str
    """Name of its group in the pattern: number, string, name (in double quotes), word, sign or end."""
    text: str
    """A word or sign in capitals, a string or name without its quotes."""
    start: int
    end: int
    written: str = ""

    def __str__(self) -> str:
        return printable(self.written[:_SHOWN]) or "the end"


class RefusedError(Exception):
    """The part of the expression from ``start`` (inclusive) to ``end`` (exclusive) can't be used."""

    def __init__(self, found: str, start: int, end: int) -> None:
        super().__init__(found)
        self.start, self.end = start, end


def tokens(text: str) -> list[Token]:
    """The tokens of an expression; the last one is its end.

    Raises:
        RefusedError: if the expression is too long, or contains a comment, an unclosed quote or anything but SQL.
    """
    if len(text) > LONGEST:
        raise RefusedError(f"{len(text):,} characters; at most {LONGEST:,} are allowed", LONGEST, len(text))
    found: list[Token] = []
    while not found or found[-1].kind != "end":
        found.append(_token(text, _SPACE.match(text, found[-1].end if found else 0).end()))  # type: ignore[union-attr]
    return found


def _token(text: str, start: int) -> Token:
    match = _TOKEN.match(text, start)
    if match is None:
        problem = "an unclosed quote" if text[start] in "'\"" else f"{printable(text[start])}, which is not SQL"
        raise RefusedError(problem, start, start + 1)
    kind, written, end = str(match.lastgroup), match[0], match.end()
    if kind == "comment":
        raise RefusedError("a comment", start, end)
    if any("\ud800" <= character <= "\udfff" for character in written):
        raise RefusedError("bytes that are not UTF-8", start, end)
    if kind in ("string", "name"):
        return Token(kind, written[1:-1].replace(written[0] * 2, written[0]), start, end, written)
    return Token(kind, written.upper(), start, end, written)


def pointed(text: str, start: int, end: int) -> tuple[str, str]:
    """The expression around a place, and a line of carets to print below it; both fit a terminal."""
    end = min(end, start + _SHOWN)
    first, last = max(start - _SHOWN, 0), min(end + _SHOWN, len(text))
    before, place = "…" * (first > 0) + printable(text[first:start]), printable(text[start:end])
    after = printable(text[end:last]) + "…" * (last < len(text))
    return before + place + after, " " * len(before) + "^" * max(len(place), 1)
