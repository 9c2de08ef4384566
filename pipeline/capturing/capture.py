"""Capture: run a teacher once over documents, and store its predictions in a table.

``capture`` goes through these steps: ``job.resolve`` makes a job of the settings, ``plan`` finds out what is missing,
``shard.capture_shard`` and ``copies.copy_rows`` each process one file of the plan, in any process, and commit all of it
or nothing.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from softlabel.pipeline.capturing.corrections import replace_rows
from softlabel.pipeline.capturing.job import CaptureJob, resolve
from softlabel.pipeline.capturing.plan import CapturePlan, plan
from softlabel.pipeline.capturing.steps import StepDecorator, undecorated
from softlabel.pipeline.config.capture import CaptureConfig
from softlabel.pipeline.exclusive import scratch
from softlabel.pipeline.progress import Progress, Watch, unwatched
from softlabel.storage.table import Table
from softlabel.storage.upkeep.card import keeping_card
from softlabel.storage.writer import Commit, require_writable


@dataclass(frozen=True)
class CaptureReport:
    """What a capture did."""

    table: str
    version: int
    """Newest version of the table at the end."""
    documents: int
    unchanged: int
    """Documents that the table already held completely."""
    taken_down: int
    """Documents left out because they are on the table's refuse list."""
    rejects: int
    """Documents that can't be used ..."""
    rejects_file: str | None
    """... and the file with the reasons."""
    truncated: int
    """Documents that were truncated to the longest sequence that a classifier reads."""
    sequences: int
    """Sequences that the teacher was run over."""
    copied: int
    """Sequences that another document has too, copied from there."""
    positions: int
    """Captured positions of the teacher's sequences."""
    bytes: int
    """Size of the new shards."""
    seconds: float
    repeated: int = 0
    """Documents without an id that were left out because another one has the same content."""
    answers: int = 0
    """Answers of the assistant in the chats that were tokenized, ..."""
    partial_answers: int = 0
    """... and how many of them the chat template does not write whole: it leaves out a thought, a tool call, or content
    beside a tool call."""
    reread: int = 0
    """Documents that were read again, because an older version of this program had captured them."""
    replaced: int = 0
    """Wrong rows of these documents, which were replaced by the right ones in one commit."""
    withdrawn: int = 0
    """How many of these documents have no rows any more, because they can't be used."""
    held_out: bool = True
    """Whether the table holds out any document, to evaluate students on."""


@dataclass(frozen=True)
class CapturePreview:
    """What a capture would do; the fields of ``CaptureReport`` have the same names."""

    table: str
    version: int | None
    """Newest version of the table now; None if it would be made."""
    documents: int
    unchanged: int
    taken_down: int
    rejects: int
    truncated: int
    sequences: int
    """Sequences that the teacher would run over."""
    copied: int
    """Sequences that would be copied from other documents."""
    positions: int
    """Captured positions of the teacher's sequences."""
    shards: int
    """Files of sequences, each captured and committed by itself; several GPUs may divide them further."""
    repeated: int
    answers: int
    partial_answers: int
    reread: int
    replaced: int
    withdrawn: int
    rejected: tuple[str, ...] = ()
    """The first documents that can't be used, each with the reason."""
    dry_run: Literal[True] = True


def preview_capture(job: CaptureJob, watch: Watch = unwatched) -> CapturePreview:
    """What ``capture`` would do with this job, by the same plan; nothing is written.

    Raises:
        SoftlabelError: as ``capture`` does before the teacher runs.
    """
    with scratch() as folder:
        todo = plan(job, folder, watch, dry_run=True)
        parts = [todo, todo.corrections] if todo.corrections else [todo]
        if todo.shards or todo.corrections:
            require_writable(job.table, dry_run=True)
        counts = ["documents", "unchanged", "taken_down", "rejects", "rejected", "repeated", "truncated"]
        counts += ["answers", "partial_answers", "reread", "replaced", "withdrawn"]
        return CapturePreview(
            table=job.table,
            version=Table.open(job.table).version if Table.exists(job.table) else None,
            shards=sum(len(part.shards) for part in parts),
            sequences=sum(part.sequences for part in parts),
            copied=sum(part.copied for part in parts),
            positions=sum(part.positions for part in parts),
            **{name: getattr(todo, name) for name in counts},
        )


def capture(config: CaptureConfig, watch: Watch = unwatched, decorate: StepDecorator = undecorated) -> CaptureReport:
    """Bring a table up to date with documents: capture what is missing, and leave everything else as it is.

    A second run captures nothing. A run that was killed continues when run again; at most one shard is done twice.

    Args:
        config: settings of the capture.
        watch: called after each batch.
        decorate: applied to ``plan``, ``capture_shard`` and ``copy_rows``, so that a scheduler can run them as tasks.

    Raises:
        SoftlabelError: if documents, teacher or table can't be used; shards that are already committed stay.
    """
    job = resolve(config)
    with scratch() as folder:
        return carry_out(job, decorate(plan)(job, folder, watch), watch, decorate)


def carry_out(
    job: CaptureJob, todo: CapturePlan, watch: Watch = unwatched, decorate: StepDecorator = undecorated
) -> CaptureReport:
    """Do what a capture's plan says; see ``capture``. The plan's files must still be there."""
    started = time.monotonic()
    if todo.shards or todo.corrections:
        require_writable(job.table)
    else:
        watch(Progress("capture", 0, 0, "positions"))
    if todo.is_empty:
        return _summarize(job.table, todo, (), (), 0, todo.seconds)
    # Imported here: torch takes seconds, and a capture that finds nothing to do never needs it.
    from softlabel.pipeline.capturing.run_plan import run_plan

    commits, copies, replaced = list[Commit](), list[Commit](), 0
    with keeping_card(job.table):
        if todo.corrections:
            commits, copies = run_plan(replace(job, is_correction=True), todo.corrections, watch, decorate)
            replaced = replace_rows(job, todo.corrections.notes)
        for done, more in zip((commits, copies), run_plan(job, todo, watch, decorate), strict=True):
            done += more
    return _summarize(job.table, todo, commits, copies, replaced, todo.seconds + time.monotonic() - started)


def _summarize(
    table: str,
    todo: CapturePlan,
    commits: Sequence[Commit],
    copies: Sequence[Commit],
    replaced: int,
    seconds: float,
) -> CaptureReport:
    """The report on a plan and the commits that carried it out."""
    newest = Table.open(table)
    return CaptureReport(
        table=table,
        version=newest.version,
        documents=todo.documents,
        unchanged=todo.unchanged,
        taken_down=todo.taken_down,
        rejects=todo.rejects,
        rejects_file=todo.rejects_file,
        truncated=todo.truncated,
        sequences=sum(commit.sequences for commit in commits),
        copied=sum(commit.sequences for commit in copies),
        positions=sum(commit.positions for commit in commits),
        bytes=sum(commit.bytes for commit in (*commits, *copies)),
        seconds=seconds,
        repeated=todo.repeated,
        answers=todo.answers,
        partial_answers=todo.partial_answers,
        reread=todo.reread,
        replaced=replaced,
        withdrawn=todo.withdrawn,
        held_out=bool(newest.shards("eval")),
    )
