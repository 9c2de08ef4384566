"""Progress of long work: bars on a terminal, otherwise a log line every few seconds, and what a flow adds.

Each of them shows how much of a stage is done, its rate and the time left. This module measures only time; the
counts come from the pipeline.
"""

import logging
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from time import monotonic

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bars

from softlabel.flows.running.logs import format_of_lines
from softlabel.pipeline.progress import Progress, Watch

_SECONDS_BETWEEN_LINES = 5.0
_SECONDS_OF_A_RATE = 60.0

Show = Callable[[Progress, str, Mapping[str, str]], None]
"""Shows a stage, and each of its parts, as text."""

logger = logging.getLogger("softlabel")
logger.setLevel(logging.INFO)
_lines = logger.getChild("progress")


@contextmanager
def watching(*more: Show) -> Iterator[Watch]:
    """Report progress while the block runs: in bars if stderr is a terminal, otherwise in log lines.

    Args:
        more: further ways to show it, every few seconds.
    """
    shown = [_throttled(show) for show in (_log, *more)]
    with _bars() if sys.stderr.isatty() and format_of_lines() == "text" else nullcontext() as bars:
        if bars:
            shown.append(bars)
        paces: dict[tuple[str, str], Pace] = {}

        def described(progress: Progress, part: str = "") -> str:
            pace = paces.setdefault((progress.stage, part), Pace())
            return describe(progress, pace.rate(progress.done))

        def watch(progress: Progress) -> None:
            parts = {name: described(part, name) for name, part in progress.parts.items()}
            text = described(progress)
            for show in shown:
                show(progress, text, parts)

        yield watch


class Pace:
    """The rate of a stage over the last minute, or since it started if that was later.

    A count that falls starts the measurement again.
    """

    def __init__(self) -> None:
        self._last = 0
        self._seen: deque[tuple[float, int]] = deque()

    def rate(self, done: int) -> float | None:
        """Units per second; None until there are two counts to compare."""
        now = monotonic()
        if done < self._last:  # a worker died, and its work has to be repeated
            self._seen.clear()
        self._last = done
        if not self._seen or now - self._seen[-1][0] >= 1:
            self._seen.append((now, done))
        while len(self._seen) > 1 and now - self._seen[1][0] >= _SECONDS_OF_A_RATE:
            self._seen.popleft()
        then, before = self._seen[0]
        return (done - before) / (now - then) if done > before and now > then else None


def describe(progress: Progress, rate: float | None) -> str:
    """One line: done of total, rate, time left, and further details of the stage."""
    total = "" if progress.total is None else f"/{progress.total:,}"
    parts = [f"{progress.done:,}{total} {progress.unit}"]
    if rate:
        parts.append(f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.2g}/s")
        if progress.total is not None and progress.done < progress.total:
            parts.append(f"{timedelta(seconds=round((progress.total - progress.done) / rate))} left")
    parts += [
        f"{name} {value:,.0f}" if value >= 1000 else f"{name} {value:.4g}" for name, value in progress.details.items()
    ]
    return "  ".join(parts)


def _throttled(show: Show) -> Show:
    """Show the first and the last report of each stage, and one every few seconds in between."""
    shown: dict[str, float] = {}

    def throttled(progress: Progress, text: str, parts: Mapping[str, str]) -> None:
        now = monotonic()
        last = shown.get(progress.stage)
        if last is None or progress.done == progress.total or now - last >= _SECONDS_BETWEEN_LINES:
            shown[progress.stage] = now
            show(progress, text, parts)

    return throttled


def _log(progress: Progress, text: str, parts: Mapping[str, str]) -> None:
    _lines.info("%s  %s", progress.stage, text)
    for name, part in parts.items():
        _lines.info("  %s  %s", name, part)


@contextmanager
def _bars() -> Iterator[Show]:
    columns = TextColumn("{task.description}"), BarColumn(30), TextColumn("{task.fields[text]}")
    with _no_lines_on_terminals(), Bars(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, TaskID] = {}

        def show(progress: Progress, text: str, parts: Mapping[str, str]) -> None:
            if progress.stage not in tasks:
                for before in bars.tasks:  # a stage without a known total is over when the next one begins
                    bars.update(before.id, total=before.completed if before.total is None else before.total)
                tasks[progress.stage] = bars.add_task(progress.stage, text="")
            bars.update(tasks[progress.stage], completed=progress.done, total=progress.total, text=text)
            for name, part in parts.items():  # the bar of a part is its share of the whole
                if name not in tasks:
                    tasks[name] = bars.add_task(f"  {name}", text="")
                done = progress.parts[name].done
                bars.update(tasks[name], completed=done, total=progress.total, text=part)

        yield show


@contextmanager
def _no_lines_on_terminals() -> Iterator[None]:
    """Keep progress lines off the terminal, where they would break the bars; files and Prefect still get them."""
    handlers = [handler for each in (logger, logging.getLogger()) for handler in each.handlers]
    terminals = [h for h in handlers if isinstance(h, logging.StreamHandler) and h.stream and h.stream.isatty()]
    for terminal in terminals:
        terminal.addFilter(_is_not_progress)
    try:
        yield
    finally:
        for terminal in terminals:
            terminal.removeFilter(_is_not_progress)


def _is_not_progress(record: logging.LogRecord) -> bool:
    return record.name != _lines.name
