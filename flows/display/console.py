"""Building blocks of the terminal output: the console, tables, labelled lines, suggested commands, short numbers."""

import os
import sys
from collections.abc import Iterable, Mapping
from datetime import timedelta

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import measure_renderables
from rich.table import Table

_WIDTH_OF_A_PIPE = 200
"""Columns for output that goes to no terminal; rich would take 80, and cut off what does not fit."""

_GAP = 2
"""Columns of the terminal between those of a table, ..."""
_NARROWEST = 12
"""... and for its words at least."""

console = Console(
    highlight=False,
    soft_wrap=True,
    width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else _WIDTH_OF_A_PIPE,
)


def facts(facts: Mapping[str, str]) -> None:
    """Print one line for each label and its text, aligned."""
    width = max(map(len, facts))
    for name, text in facts.items():
        console.print(f"[dim]{name:<{width}}[/]  {text}")


def try_next(commands: Iterable[str]) -> None:
    """Print commands that may be useful next."""
    console.print("[dim]try next[/]")
    for command in commands:
        console.print(f"  {command}")


def table_of(*names: str, words: int = 1, last: str | None = None) -> Table:
    """An empty table with these columns, which loses no number in a narrow terminal.

    Args:
        names: of the columns.
        words: how many of them, from the first, are words: they are aligned left, and take several lines if need be.
        last: name of one more column of words.
    """
    table = _Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="dim")
    for index, name in enumerate(names):
        is_word = index < words
        table.add_column(name, justify="left" if is_word else "right", no_wrap=not is_word, overflow="fold")
    if last is not None:
        table.add_column(last, overflow="fold")
    return table


class _Table(Table):
    """Wider than the terminal if its numbers are: they go on in the next line, where rich would cut them off."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        needed = 0
        for column in self.columns:
            widest = measure_renderables(console, options.update(width=10_000), [column.header, *column.cells]).maximum
            needed += _GAP + (widest if column.no_wrap else min(widest, _NARROWEST))
        return super().__rich_console__(console, options.update(width=max(options.max_width, needed)))


def duration(seconds: float) -> str:
    """Seconds as H:MM:SS."""
    return f"{timedelta(seconds=round(seconds))}"


def bytes_of(count: int) -> str:
    """A number of bytes in a fitting unit, such as 1.9 MB."""
    if count < 0:
        return f"-{bytes_of(-count)}"
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def count(number: int, noun: str) -> str:
    """A number with its noun, such as 1 file or 2,000 files."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def printable(text: str) -> str:
    """The text for a terminal: what is not printable, such as a control character, as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def short(count: int) -> str:
    """A count in three significant digits, such as 135M."""
    for unit, factor in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g}{unit}"
    return str(count)
