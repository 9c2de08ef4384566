"""What each verb shows a person when it is done: short tables on stdout, and where the rest is."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from storage.versions import spans

if TYPE_CHECKING:
    from flows.distill import DistillReport
    from flows.maintain import MaintainReport
    from pipeline.capturing import CaptureReport
    from pipeline.evaluation import EvaluationReport
    from pipeline.reprocessing import ReprocessReport
    from pipeline.training import TrainReport
    from storage.inspection import HistoryEntry
    from storage.maintenance import Maintenance
    from storage.provenance import Identity
    from storage.purge import Purged
    from storage.verification import Verification
    from storage.versions import Pin, Tag

_console = Console(highlight=False, soft_wrap=True)
_SHOWN_CLASSES = 12


def show_capture(report: "CaptureReport") -> None:
    """What was captured, what was there already, what could not be used, and what to do next."""
    _capture_line(report)
    _next([f"softlabel inspect {report.table}", f"softlabel train {report.table} STUDENT --student.layers 0 1 2"])


def show_train(report: "TrainReport") -> None:
    """One line, and what to do next."""
    _train_line(report)
    _next([f"softlabel evaluate {report.table} {report.output}"])


def show_evaluate(report: "EvaluationReport") -> None:
    """The teacher and its students side by side."""
    _scores(report)
    _facts({"report": report.html, "numbers": report.json})


def show_distill(report: "DistillReport") -> None:
    """What each stage did, the teacher and its students side by side, and what to try next."""
    _capture_line(report.capture)
    for trained in report.train.values():
        _train_line(trained)
    _scores(report.evaluate)
    table = report.evaluate.table
    _facts({"table": f"{table} (version {report.evaluate.version})", "report": report.evaluate.html})
    student = report.train["student"].output
    other = f"{student}-reverse"
    _next(
        [
            f"softlabel inspect {table}",
            f"softlabel train {table} {other} --student.model {student} --loss.divergence reverse_kl",
            f"softlabel evaluate {table} {student} {other}",
        ]
    )


def show_inspect(result: Mapping[str, Any]) -> None:
    """What made a table, its rows by split, and its bytes a position by column."""
    inspection = result["inspection"]
    made_by = _made_by(result["teacher"], result["identity"])
    needed = ", ".join(_needed_by(inspection.version, result["tags"], result["pins"]))
    needed_by = {"needed by": needed} if needed else {}
    _facts({"table": f"{inspection.location} (version {inspection.version})"} | made_by | needed_by)
    splits = _table("split", "shards", "documents", "sequences", "tokens", "positions", "bytes")
    for name, size in inspection.splits.items():
        counts = (size.shards, size.documents, size.sequences, size.tokens, size.positions)
        splits.add_row(name, *(f"{count:,}" for count in counts), _bytes(size.bytes))
    _console.print(splits)
    columns = _table("column", "bytes", "bytes a position", "entropy")
    for name, column in sorted(inspection.columns.items(), key=lambda item: -item[1].bytes):
        entropy = "" if column.entropy_per_position is None else f"{abs(column.entropy_per_position):.2f}"
        columns.add_row(name, _bytes(column.bytes), f"{column.bytes_per_position:.2f}", entropy)
    columns.add_section()
    columns.add_row("soft labels together", "", f"{inspection.soft_label_bytes_per_position:.2f}", "")
    _console.print(columns)
    _console.print("entropy: bytes a position of a perfect code for the column's single values, from a sample")


def show_history(result: Mapping[str, Any]) -> None:
    """A table's versions, newest first, and who needs them."""
    versions = _table("version", "when (UTC)", "what", "who", "sequences", "positions", "bytes", words=4)
    entries: Sequence[HistoryEntry] = result["versions"]
    for entry in entries:
        when = entry.time.removesuffix("+00:00").replace("T", " ")
        counts = (entry.sequences, entry.positions)
        versions.add_row(
            str(entry.version), when, entry.operation, entry.user, *(f"{n:,}" for n in counts), _bytes(entry.bytes)
        )
    _console.print(versions)
    _names(result["tags"], result["pins"])
    for fate in ("vacuumed", "purged"):
        if result[fate]:
            _console.print(f"{fate}, and can no longer be opened: {spans(result[fate])}")


def show_verify(found: "Verification") -> None:
    """What was looked at, and what was taken out."""
    if found.removed:
        removed = f"{len(found.removed):,} damaged shards, whose {found.removed_rows:,} sequences are pending again"
        _console.print(f"[bold]{found.location}[/]: taken out of the newest version are {removed}")
        for finding in found.findings:
            _console.print(f"  {finding.path}  [dim]{finding.problem}[/]")
        _next([f"softlabel capture DOCUMENTS {found.location}, as before: it brings back exactly what is missing"])
    else:
        counts = f"{found.shards:,} shards, {found.rows:,} sequences, {_bytes(found.bytes)}"
        _console.print(f"[bold]{found.location}[/] (version {found.version}) is as it was written: {counts}")
    if found.orphans:
        _console.print(f"{len(found.orphans):,} files among the shards belong to no version, and do no harm:")
        for path in found.orphans:
            _console.print(f"  {path}")
        _next([f"softlabel maintain {found.location}"])


def show_maintain(report: "MaintainReport") -> None:
    """What was deleted with its bytes, what was spared, and who needs which version."""
    if report.deletion:
        _deletion(report.deletion)
    _names(report.tags, report.pins)


def show_reprocess(report: "ReprocessReport") -> None:
    """What became of the rows, what was taken down and what is out of reach, and what to do next."""
    rows, where = report.rows, f"[bold]{report.table}[/] (version {report.version})"
    counts = [f"{rows.dropped:,} sequences dropped", f"{rows.sequences:,} in {rows.shards:,} new shards"]
    counts += [f"{rows.left:,} left as they are"] if rows.left else []
    _console.print(f"{where} {report.operation}: {', '.join(counts)}; {_bytes(rows.bytes)}")
    if report.unknown:
        _console.print(f"[yellow]{report.unknown:,} documents of the list[/] are not in the table")
    if report.purged:
        _purged(report.purged)
    _next([f"softlabel inspect {report.table}", f"softlabel history {report.table}"])


def _purged(done: "Purged") -> None:
    found = f"{done.found:,} of them found now" if done.found else "none of them found"
    _console.print(f"{done.documents:,} documents taken down ({found}), {len(done.files):,} files deleted")
    if done.versions:
        _console.print(f"versions that can no longer be opened: {spans(done.versions)}")
    lists = {
        "[yellow]these lose their version[/]": done.broken,
        "[yellow]other documents with a text of theirs stay[/]": done.same_text,
        "[yellow]out of reach[/]": done.out_of_reach,
    }
    for title, lines in lists.items():
        if lines:
            _console.print(f"{title}:")
        for line in lines:
            _console.print(f"  {line}")


def _deletion(done: "Maintenance") -> None:
    verb = "would be deleted" if done.dry_run else "deleted"
    for leftover in done.deleted:
        _console.print(f"  {_bytes(leftover.bytes):>8}  {leftover.path}  [dim]{leftover.why}[/]")
    total = _bytes(sum(leftover.bytes for leftover in done.deleted))
    what = f"{len(done.deleted):,} files, {total}, {verb}" if done.deleted else "nothing to delete"
    _console.print(f"[bold]{done.location}[/]: {what}")
    if done.vacuumed:
        verb = "could no longer be opened" if done.dry_run else "can no longer be opened"
        _console.print(f"versions that {verb}: {spans(done.vacuumed)}")
    if done.spared:
        size = _bytes(sum(leftover.bytes for leftover in done.spared))
        _console.print(f"{len(done.spared):,} files, {size}, spared: written lately (grace_hours), or being written")


def _names(tags: Iterable["Tag"], pins: Iterable["Pin"]) -> None:
    """Tags and pins, a line a version."""
    for version in sorted({tag.version for tag in tags} | {pin.version for pin in pins}):
        _console.print(f"version {version} is needed by {', '.join(_needed_by(version, tags, pins))}")


def _needed_by(version: int, tags: Iterable["Tag"], pins: Iterable["Pin"]) -> list[str]:
    named = [tag.name for tag in tags if tag.version == version]
    return named + [f"student {pin.student}" for pin in pins if pin.version == version]


def _capture_line(report: "CaptureReport") -> None:
    where = f"[bold]{report.table}[/] (version {report.version})"
    if not report.sequences and not report.copied:
        _console.print(f"{where} holds all {report.documents:,} documents already: nothing was captured")
    else:
        rate = f"{report.positions / max(report.seconds, 1e-9):,.0f} positions/s"
        copied = f", {report.copied:,} copied from other documents" if report.copied else ""
        _console.print(
            f"{where} captured: {report.sequences:,} sequences, {report.positions:,} positions in"
            f" {timedelta(seconds=round(report.seconds))} ({rate}), {_bytes(report.bytes)}{copied}"
        )
    if report.truncated:
        _console.print(
            f"[yellow]{report.truncated:,} documents are longer[/] than what the classifier reads: cut short"
        )
    if report.rejects:
        _console.print(f"[yellow]{report.rejects:,} documents can't be used[/]: see {report.rejects_file}")


def _train_line(report: "TrainReport") -> None:
    if not report.steps_trained:
        _console.print(f"[bold]{report.output}[/] was trained already: {report.steps:,} steps on {report.table}")
        return
    resumed = "" if report.resumed_from is None else f", on from step {report.resumed_from:,}"
    best = "" if report.steps == report.stopped_at else f" (the best of {report.stopped_at:,})"
    took = timedelta(seconds=round(report.seconds))
    _console.print(
        f"[bold]{report.output}[/] trained: {report.steps:,} steps{best}{resumed}, {report.positions:,} positions"
        f" of {report.table}, in {took}"
    )


def _scores(report: "EvaluationReport") -> None:
    scores = _table("", "perplexity", "KL to the teacher", "top-1 agreement", "parameters")
    for score in (report.teacher, *report.students):
        agreement = "" if score.agreement is None else f"{score.agreement:.1%}"
        parameters = "" if score.parameters is None else _short(score.parameters)
        scores.add_row(score.name, f"{score.perplexity:,.2f}", f"{score.kl:.3f}", agreement, parameters)
    _console.print(scores)
    left_out = f", {report.left_out:,} that also occur in train left out" if report.left_out else ""
    _console.print(f"{report.positions:,} positions of {report.sequences:,} held-out sequences{left_out}")


def _made_by(teacher: str, identity: "Identity") -> dict[str, str]:
    if identity.classes is not None:
        by = f"{teacher}, {identity.teacher.dtype}" if identity.teacher.files else "the documents' own labels"
        shown = ", ".join(identity.classes[:_SHOWN_CLASSES]) + (", ..." if identity.vocabulary > _SHOWN_CLASSES else "")
        return {"teacher": by, "classes": f"{identity.vocabulary:,}: {shown}"}
    selection = identity.selection
    head = f"head of {selection.min_k} to {selection.max_k} ids, to mass {selection.top_p:g}"
    tail = f"tail of up to {selection.draws} draws" if selection.draws else "no tail"
    return {
        "teacher": f"{teacher}, {identity.teacher.dtype}, {identity.vocabulary:,} ids",
        "selection": f"{head}; {tail}",
        "temperatures": " ".join(f"{temperature:g}" for temperature in identity.temperatures),
    }


def _facts(facts: Mapping[str, str]) -> None:
    width = max(map(len, facts))
    for name, text in facts.items():
        _console.print(f"[dim]{name:<{width}}[/]  {text}")


def _next(commands: Iterable[str]) -> None:
    _console.print("[dim]try next[/]")
    for command in commands:
        _console.print(f"  {command}")


def _table(*names: str, words: int = 1) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for index, name in enumerate(names):
        table.add_column(name, justify="left" if index < words else "right", no_wrap=True)
    return table


def _bytes(count: int) -> str:
    if count < 0:
        return f"-{_bytes(-count)}"
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _short(count: int) -> str:
    for unit, factor in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g}{unit}"
    return str(count)
