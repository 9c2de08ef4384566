"""An SQL expression's words, numbers and signs, each with its place: what an error about the expression points at."""

import re
from typing import NamedTuple

LONGEST = 50_000
"""Characters: room for the ids of a thousand documents, while any expression is still evaluated within a second."""

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
"""Characters that an error shows of the place, and on each side of it."""


class Token(NamedTuple):
    """One of an expression's parts."""

    kind: str
    """The name of its group in the pattern: number, string, name (in double quotes), word, sign or end."""
    text: str
    """A word or sign in capitals, a string or name without its quotes."""
    start: int
    end: int
    written: str = ""

    def __str__(self) -> str:
        return printable(self.written[:_SHOWN]) or "the end"


class RefusedError(Exception):
    """A part of the expression can't be used: that from ``start`` to before ``end``."""

    def __init__(self, found: str, start: int, end: int) -> None:
        super().__init__(found)
        self.start, self.end = start, end


def tokens(text: str) -> list[Token]:
    """The parts of an expression, and last its end.

    Raises:
        RefusedError: if it is too long, or holds a comment, a quote that is not closed or what is no part of SQL.
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
        problem = (
            "a quote that is not closed" if text[start] in "'\"" else f"{printable(text[start])}, which is not SQL"
        )
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
    """The expression around a place, and a line that points at the place from below; both fit a terminal."""
    end = min(end, start + _SHOWN)
    first, last = max(start - _SHOWN, 0), min(end + _SHOWN, len(text))
    before, place = "…" * (first > 0) + printable(text[first:start]), printable(text[start:end])
    after = printable(text[end:last]) + "…" * (last < len(text))
    return before + place + after, " " * len(before) + "^" * max(len(place), 1)


def printable(text: str) -> str:
    r"""The text, with what a terminal would obey or not show written out, like \x1b."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape", "surrogatepass").decode()
        for character in text
    )
