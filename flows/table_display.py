"""What each verb that looks after a table shows a person when it is done."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from softlabel.flows.console import bytes_of, console, facts, table_of, try_next
from softlabel.storage.versions import spans

if TYPE_CHECKING:
    from softlabel.pipeline.tables.history import HistoryReport
    from softlabel.pipeline.tables.inspect import TableReport, ViewReport
    from softlabel.pipeline.tables.maintain import MaintainReport
    from softlabel.pipeline.tables.recheck import Recheck
    from softlabel.pipeline.tables.reprocess import ReprocessReport
    from softlabel.pipeline.tables.verify import VerifyReport
    from softlabel.storage.identity import Identity, SelectionIdentity
    from softlabel.storage.upkeep.maintenance import Maintenance
    from softlabel.storage.upkeep.purge import Purged
    from softlabel.storage.versions import Pin, Tag
    from softlabel.storage.views.view_inspection import ViewInspection

_SHOWN_CLASSES = 12


def show_inspect(report: "TableReport | ViewReport") -> None:
    """What made a table, its rows by split, and its bytes a position by column."""
    from softlabel.pipeline.tables.inspect import ViewReport

    if isinstance(report, ViewReport):
        show_mix(report.view)
        return
    inspection = report.inspection
    made_by = _made_by(report.teacher, report.identity)
    needed = ", ".join(_needed_by(inspection.version, report.tags, report.pins))
    needed_by = {"needed by": needed} if needed else {}
    facts({"table": f"{inspection.location} (version {inspection.version})"} | made_by | needed_by)
    splits = table_of("split", "shards", "documents", "sequences", "tokens", "positions", "bytes")
    for name, size in inspection.splits.items():
        counts = (size.shards, size.documents, size.sequences, size.tokens, size.positions)
        splits.add_row(name, *(f"{count:,}" for count in counts), bytes_of(size.bytes))
    console.print(splits)
    columns = table_of("column", "bytes", "bytes a position", "entropy")
    for name, column in sorted(inspection.columns.items(), key=lambda item: -item[1].bytes):
        entropy = "" if column.entropy_per_position is None else f"{column.entropy_per_position:.2f}"
        columns.add_row(name, bytes_of(column.bytes), f"{column.bytes_per_position:.2f}", entropy)
    columns.add_section()
    together = (inspection.soft_label_bytes_per_position, inspection.soft_label_entropy_per_position)
    columns.add_row("soft labels together", "", *(f"{number:.2f}" for number in together))
    console.print(columns)
    console.print("entropy: bytes a position of a perfect code for the column's single values, from a sample")


def show_mix(found: "ViewInspection") -> None:
    """A view's tables with their weights, and what it holds by split."""
    temperatures = " ".join(f"{temperature:g}" for temperature in found.temperatures)
    facts({"view": f"{found.location} ({found.how})", "temperatures": temperatures})
    for part in found.parts:
        about = f"{part.teacher}, {_selection(part.selection)}, {bytes_of(part.bytes)}"
        console.print(f"  {part.weight:g} x {part.table}  [dim]{about}[/]")
    splits = table_of("split", "sequences", "tokens", "positions")
    for name, size in found.splits.items():
        splits.add_row(name, *(f"{count:,}" for count in (size.sequences, size.tokens, size.positions)))
    console.print(splits)
    if found.left_out:
        console.print(f"[yellow]{found.left_out:,} sequences are left out[/]: not all of the tables hold them")


def show_history(report: "HistoryReport") -> None:
    """A table's versions, newest first, and who needs them."""
    table = table_of("version", "when (UTC)", "what", "who", "sequences", "positions", "bytes", words=4)
    for entry in report.versions:
        when = entry.time.removesuffix("+00:00").replace("T", " ")
        counts = (entry.sequences, entry.positions)
        table.add_row(
            str(entry.version), when, entry.operation, entry.user, *(f"{n:,}" for n in counts), bytes_of(entry.bytes)
        )
    console.print(table)
    _names(report.tags, report.pins)
    for fate, versions in (("vacuumed", report.vacuumed), ("purged", report.purged)):
        if versions:
            console.print(f"{fate}, and can no longer be opened: {spans(versions)}")


def show_verify(found: "VerifyReport") -> None:
    """What was looked at, and what was taken out."""
    if found.removed:
        removed = f"{len(found.removed):,} damaged shards, whose {found.removed_rows:,} sequences are pending again"
        console.print(f"[bold]{found.location}[/]: taken out of the newest version are {removed}")
        for finding in found.findings:
            console.print(f"  {finding.path}  [dim]{finding.problem}[/]")
        try_next([f"softlabel capture DOCUMENTS {found.location}, as before: it brings back exactly what is missing"])
    else:
        counts = f"{found.shards:,} shards, {found.rows:,} sequences, {bytes_of(found.bytes)}"
        console.print(f"[bold]{found.location}[/] (version {found.version}) is as it was written: {counts}")
    if found.recheck:
        _recheck(found.recheck, of=found.rows)
    if found.orphans:
        console.print(
            f"{len(found.orphans):,} files belong to no version: a writer that was stopped has left them, or the newest"
            " commits are gone from the log (then restore that first):"
        )
        for path in found.orphans:
            console.print(f"  {path}")
        try_next([f"softlabel maintain {found.location}"])


def _recheck(asked: "Recheck", of: int) -> None:
    """How far the table is from its teacher, beside how far the teacher is from itself."""
    console.print(
        f"its teacher says the same again of {asked.sequences:,} sequences, {asked.positions:,} positions,"
        " within its own noise (in nats):"
    )
    table = table_of("", "table: mean", "99.9%", "max", "noise: mean", "99.9%", "max")
    for agreement in asked.agreements:
        pairs = (agreement.table, agreement.noise)
        cells = [f"{value:.4f}" for pair in pairs for value in (pair.mean, pair.most, pair.maximum)]
        table.add_row(agreement.name, *cells)
    console.print(table)
    console.print(
        f"noise: the teacher against itself in other batches, where {asked.top_changes:.2%} of its likeliest ids"
        f" change\ntruncation: {asked.outside:.2%} of the mass is outside the head, and with it {asked.lost:.3f} nats"
        " (KL) where no tail is sampled"
    )
    if asked.sequences < of:  # n that agree leave room, at 95 %, for a share w that is wrong with (1 - w)^n = 5 %
        console.print(
            f"sample: with a certainty of 95 %, less than {1 - 0.05 ** (1 / asked.sequences):.1%} of all sequences are"
            " wrong; --sequences asks about more"
        )


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
    console.print(f"{where} {report.operation}: {', '.join(counts)}; {bytes_of(rows.bytes)}")
    if report.unknown:
        console.print(f"[yellow]{report.unknown:,} documents of the list[/] are not in the table")
    if report.purged:
        _purged(report.purged)
    try_next([f"softlabel inspect {report.table}", f"softlabel history {report.table}"])


def _purged(done: "Purged") -> None:
    found = f"{done.found:,} of them found now" if done.found else "none of them found"
    console.print(f"{done.documents:,} documents taken down ({found}), {len(done.files):,} files deleted")
    if done.versions:
        console.print(f"versions that can no longer be opened: {spans(done.versions)}")
    lists = {
        "[yellow]these lose their version[/]": done.broken,
        "[yellow]other documents with a text of theirs stay[/]": done.same_text,
        "[yellow]out of reach[/]": done.out_of_reach,
    }
    for title, lines in lists.items():
        if lines:
            console.print(f"{title}:")
        for line in lines:
            console.print(f"  {line}")


def _deletion(done: "Maintenance") -> None:
    verb = "would be deleted" if done.dry_run else "deleted"
    for leftover in done.deleted:
        console.print(f"  {bytes_of(leftover.bytes):>8}  {leftover.path}  [dim]{leftover.why}[/]")
    total = bytes_of(sum(leftover.bytes for leftover in done.deleted))
    what = f"{len(done.deleted):,} files, {total}, {verb}" if done.deleted else "nothing to delete"
    console.print(f"[bold]{done.location}[/]: {what}")
    if done.vacuumed:
        verb = "could no longer be opened" if done.dry_run else "can no longer be opened"
        console.print(f"versions that {verb}: {spans(done.vacuumed)}")
    if done.spared:
        size = bytes_of(sum(leftover.bytes for leftover in done.spared))
        console.print(f"{len(done.spared):,} files, {size}, spared: written lately (grace_hours), or being written")


def _names(tags: Iterable["Tag"], pins: Iterable["Pin"]) -> None:
    """Tags and pins, a line a version."""
    for version in sorted({tag.version for tag in tags} | {pin.version for pin in pins}):
        console.print(f"version {version} is needed by {', '.join(_needed_by(version, tags, pins))}")


def _needed_by(version: int, tags: Iterable["Tag"], pins: Iterable["Pin"]) -> list[str]:
    named = [tag.name for tag in tags if tag.version == version]
    return named + [f"{pin.kind} {pin.student}" for pin in pins if pin.version == version]


def _made_by(teacher: str, identity: "Identity") -> dict[str, str]:
    if identity.classes is not None:
        by = f"{teacher}, {identity.teacher.dtype}" if identity.teacher.files else "the documents' own labels"
        shown = ", ".join(identity.classes[:_SHOWN_CLASSES]) + (", ..." if identity.vocabulary > _SHOWN_CLASSES else "")
        return {"teacher": by, "classes": f"{identity.vocabulary:,}: {shown}"}
    return {
        "teacher": f"{teacher}, {identity.teacher.dtype}, {identity.vocabulary:,} ids",
        "selection": _selection(identity.selection),
        "temperatures": " ".join(f"{temperature:g}" for temperature in identity.temperatures),
    }


def _selection(selection: "SelectionIdentity") -> str:
    head = f"head of {selection.min_k} to {selection.max_k} ids, to mass {selection.top_p:g}"
    tail = f"tail of up to {selection.draws} draws" if selection.draws else "no tail"
    return f"{head}; {tail}"
