"""What a person sees of long work: bars on a terminal, else a plain line every few seconds; and a Prefect artifact.

Every one of them says how far a stage is, at which rate it goes and how long it still takes. Measures nothing but time.
"""

import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from time import monotonic
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.context import FlowRunContext
from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bars

from pipeline.progress import Progress, Watch

_SECONDS_BETWEEN_LINES = 5.0

Show = Callable[[Progress, str, Mapping[str, str]], None]
"""Shows a stage, and each of its parts, as text."""

logger = logging.getLogger("softlabel")
logger.setLevel(logging.INFO)


@contextmanager
def watching(artifact: str | None = None) -> Iterator[Watch]:
    """Show progress on stderr for as long as the block runs.

    Args:
        artifact: key under which a Prefect progress artifact is kept too, if a flow is running.
    """
    on_artifact = _artifact(artifact) if artifact and FlowRunContext.get() else None
    with _bars() if sys.stderr.isatty() else _lines() as show:
        paces: dict[tuple[str, str], Pace] = {}

        def described(progress: Progress, part: str = "") -> str:
            pace = paces.setdefault((progress.stage, part), Pace(progress.done))
            return describe(progress, pace.rate(progress.done))

        def watch(progress: Progress) -> None:
            parts = {name: described(part, name) for name, part in progress.parts.items()}
            text = described(progress)
            show(progress, text, parts)
            if on_artifact:
                on_artifact(progress, text, parts)

        yield watch


class Pace:
    """The rate of a stage since it was first heard of."""

    def __init__(self, done: int) -> None:
        self._started, self._first = monotonic(), done

    def rate(self, done: int) -> float | None:
        """Units a second; None as long as nothing is known."""
        seconds = monotonic() - self._started
        return (done - self._first) / seconds if done > self._first and seconds > 0 else None


def describe(progress: Progress, rate: float | None) -> str:
    """One line: done of total, rate, time left, and what else the stage tells."""
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
    """The first and the last word of each stage, and one every few seconds between."""
    shown: dict[str, float] = {}

    def throttled(progress: Progress, text: str, parts: Mapping[str, str]) -> None:
        now = monotonic()
        last = shown.get(progress.stage)
        if last is None or progress.done == progress.total or now - last >= _SECONDS_BETWEEN_LINES:
            shown[progress.stage] = now
            show(progress, text, parts)

    return throttled


@contextmanager
def _lines() -> Iterator[Show]:
    def show(progress: Progress, text: str, parts: Mapping[str, str]) -> None:
        logger.info("%s  %s", progress.stage, text)
        for name, part in parts.items():
            logger.info("  %s  %s", name, part)

    yield _throttled(show)


@contextmanager
def _bars() -> Iterator[Show]:
    columns = TextColumn("{task.description}"), BarColumn(30), TextColumn("{task.fields[text]}")
    with Bars(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, TaskID] = {}

        def show(progress: Progress, text: str, parts: Mapping[str, str]) -> None:
            if progress.stage not in tasks:
                for before in bars.tasks:  # a stage that did not know its total is over when the next one begins
                    bars.update(before.id, total=before.completed if before.total is None else before.total)
                tasks[progress.stage] = bars.add_task(progress.stage, text="")
            bars.update(tasks[progress.stage], completed=progress.done, total=progress.total, text=text)
            for name, part in parts.items():  # the bar of a part is its share of the whole
                if name not in tasks:
                    tasks[name] = bars.add_task(f"  {name}", text="")
                done = progress.parts[name].done
                bars.update(tasks[name], completed=done, total=progress.total, text=part)

        yield show


def _artifact(key: str) -> Show:
    made = create_progress_artifact(0.0, key=key)
    assert isinstance(made, UUID)  # and no coroutine: flows are synchronous here

    reachable = True

    def show(progress: Progress, text: str, parts: Mapping[str, str]) -> None:
        nonlocal reachable
        share = 100.0 * progress.done / progress.total if progress.total else 0.0
        try:
            if reachable:
                lines = [f"{progress.stage}: {text}", *(f"{name}: {part}" for name, part in parts.items())]
                update_progress_artifact(made, share, description="  \n".join(lines))
        except Exception as error:  # hours of work must not end because nobody could be told of them
            reachable = False
            logger.warning("the progress artifact is no longer kept: %s", error)

    return _throttled(show)
