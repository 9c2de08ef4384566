"""What every answer on a terminal is made of: one console, tables, facts, what to try next, and sizes in few digits."""

from collections.abc import Iterable, Mapping
from datetime import timedelta

from rich.console import Console
from rich.table import Table

console = Console(highlight=False, soft_wrap=True)


def facts(facts: Mapping[str, str]) -> None:
    """Names and what is to be said of each, a line each."""
    width = max(map(len, facts))
    for name, text in facts.items():
        console.print(f"[dim]{name:<{width}}[/]  {text}")


def try_next(commands: Iterable[str]) -> None:
    """Commands that may be of use now."""
    console.print("[dim]try next[/]")
    for command in commands:
        console.print(f"  {command}")


def table_of(*names: str, words: int = 1) -> Table:
    """An empty table with these columns, the first of them words, the others numbers."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for index, name in enumerate(names):
        table.add_column(name, justify="left" if index < words else "right", no_wrap=True)
    return table


def duration(seconds: float) -> str:
    """Hours, minutes and seconds."""
    return f"{timedelta(seconds=round(seconds))}"


def bytes_of(count: int) -> str:
    """A number of bytes in the unit that fits it."""
    if count < 0:
        return f"-{bytes_of(-count)}"
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def short(count: int) -> str:
    """A number in three digits."""
    for unit, factor in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g}{unit}"
    return str(count)
