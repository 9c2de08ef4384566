"""What the verbs that inspect, check and maintain a table print for people when they are done."""

from collections.abc import Iterable, Mapping
from math import exp, isnan
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.text import Text

from softlabel.flows.display.console import bytes_of, console, count, facts, printable, table_of, try_next
from softlabel.pipeline.config.flags import as_flag
from softlabel.storage.records.versions import spans

if TYPE_CHECKING:
    from softlabel.pipeline.tables.export import ExportReport
    from softlabel.pipeline.tables.history import HistoryReport
    from softlabel.pipeline.tables.inspect import TableReport, ViewReport
    from softlabel.pipeline.tables.maintain import MaintainReport
    from softlabel.pipeline.tables.mix import MixReport
    from softlabel.pipeline.tables.recheck import Recheck
    from softlabel.pipeline.tables.rejects import RejectsReport
    from softlabel.pipeline.tables.reprocess import ReprocessReport
    from softlabel.pipeline.tables.verify import VerifyReport
    from softlabel.storage.identity import Identity, SelectionIdentity
    from softlabel.storage.records.versions import Pin, Tag
    from softlabel.storage.upkeep.contents import CarriedColumn
    from softlabel.storage.upkeep.inspection import Inspection
    from softlabel.storage.upkeep.label_sample import LabelSample
    from softlabel.storage.upkeep.maintenance import Maintenance
    from softlabel.storage.upkeep.purge import Purged
    from softlabel.storage.views.view_inspection import ViewInspection

_SHOWN_CLASSES = 12
_WIDEST_VALUE = 40
"""Cells of a carried value."""
_BLOCKS = "▏▎▍▌▋▊▉█"
_BAR = 40
"""Cells of the longest bar of a histogram."""


def show_inspect(report: "TableReport | ViewReport") -> None:
    """What made the table, the size of each split, and the cost of each column."""
    from softlabel.pipeline.tables.inspect import ViewReport

    if isinstance(report, ViewReport):
        _view(report.view)
        return
    inspection = report.inspection
    made_by = _made_by(report.teacher, report.identity)
    needed = ", ".join(_needed_by(inspection.version, report.tags, report.pins))
    needed_by = {"needed by": needed} if needed else {}
    facts(
        {"table": f"{inspection.location} (version {inspection.version})"} | made_by | _commits(inspection) | needed_by
    )
    taken = "" if report.identity.derived_from else " that a capture into this table uses unless you give them"
    console.print(f"[dim]settings{taken}[/]")
    for name, value in report.settings.items():
        console.print(f"  {escape(as_flag(name, value))}")
    splits = table_of("split", "shards", "documents", "sequences", "tokens", "positions", "bytes")
    for name, size in inspection.splits.items():
        counts = (size.shards, size.documents, size.sequences, size.tokens, size.positions)
        splits.add_row(name, *(f"{count:,}" for count in counts), bytes_of(size.bytes))
    console.print(splits)
    _carried(inspection.contents.carried)
    _labels(inspection.labels, report.identity)
    columns = table_of("column", "bytes", "bytes per position", "entropy")
    for name, column in sorted(inspection.columns.items(), key=lambda item: -item[1].bytes):
        entropy = "" if column.entropy_per_position is None else f"{column.entropy_per_position:.2f}"
        columns.add_row(name, bytes_of(column.bytes), f"{column.bytes_per_position:.2f}", entropy)
    columns.add_section()
    soft_labels = (inspection.soft_label_bytes_per_position, inspection.soft_label_entropy_per_position)
    columns.add_row("all soft labels", "", *(f"{number:.2f}" for number in soft_labels))
    console.print(columns)
    console.print(
        "entropy: bytes per position that an ideal compression of the column's values, one by one, would take;"
        " estimated from a sample"
    )
    _unfinished(inspection)


def _commits(inspection: "Inspection") -> dict[str, str]:
    """When the first and the newest rows came."""
    shown = {"newest commit": inspection.newest}
    if inspection.oldest is not None and inspection.oldest.version != inspection.newest.version:
        shown = {"oldest commit": inspection.oldest} | shown
    times = {name: commit.time.removesuffix("+00:00").replace("T", " ") for name, commit in shown.items()}
    return {name: f"{times[name]} UTC, {each.operation}, version {each.version}" for name, each in shown.items()}


def _carried(columns: "Mapping[str, CarriedColumn]") -> None:
    """The values of the carried columns, the most frequent first."""
    for name, column in columns.items():
        spread = "" if column.lowest is None else f", {column.lowest} to {column.highest}"
        values = "too many values to count" if column.distinct is None else count(column.distinct, "value")
        console.print(f"[bold]{escape(printable(name))}[/]  [dim]{escape(f'{column.type}, {values}{spread}')}[/]")
        table = table_of("", "sequences", "positions")
        for value in column.values:
            shown = Text("none", "dim") if value.value is None else Text(printable(value.value))
            shown.truncate(_WIDEST_VALUE, overflow="ellipsis")
            table.add_row(Text("  ") + shown, f"{value.sequences:,}", f"{value.positions:,}")
        if column.distinct is not None and column.distinct > len(column.values):
            table.add_row(Text(f"  and {column.distinct - len(column.values):,} more", "dim"), "", "")
        if column.values:
            console.print(table)


def _labels(labels: "LabelSample", identity: "Identity") -> None:
    """How much of each distribution is kept, and how sure the teacher was."""
    if not labels.positions:
        return
    of = "positions" if identity.classes is None else "documents"
    console.print(
        f"kept exactly: [bold]{labels.mass:.1%}[/] of the probability, in {labels.ids:.1f} ids; {labels.draws:.1f} ids"
        f" drawn from the rest [dim](means of {labels.positions:,} {of})[/]"
    )
    unknown = isnan(labels.cross_entropy)
    followed = "" if unknown else f"; what follows has a perplexity of {exp(min(labels.cross_entropy, 700)):.3g}"
    console.print(f"the teacher's entropy: {labels.entropy:.2f} nats on average{followed}")
    highest = max((bar.positions for bar in labels.histogram), default=0)
    for bar in labels.histogram:
        drawn = _BLOCKS[-1] * int(_BAR * bar.positions / highest)
        drawn += _BLOCKS[int(len(_BLOCKS) * (_BAR * bar.positions / highest % 1))] if bar.positions else ""
        console.print(
            f"  {bar.low:4.1f} to {bar.high:4.1f}  {drawn:<{_BAR + 1}}  {bar.positions / labels.positions:6.1%}"
        )


def _unfinished(inspection: "Inspection") -> None:
    """What should be done about documents that have changed or are incomplete."""
    found, table = inspection.contents, inspection.location
    if found.changed:
        console.print(
            f"[yellow]{count(found.changed, 'document')} stored with more than one text[/]: changed since the first"
            " capture, and the rows of earlier texts have stayed"
        )
        try_next([f"softlabel reprocess {table} --stale DOCUMENTS    (drops the rows of earlier texts)"])
    if found.incomplete:
        console.print(f"[yellow]{count(found.incomplete, 'document')} incomplete[/]: some of the chunks are missing")
        try_next([f"softlabel capture DOCUMENTS {table}    (captures what is missing)"])


def show_mix(report: "MixReport") -> None:
    """The view that was made."""
    _view(report, title="view that would be made" if report.dry_run else "view")
    if report.dry_run:
        console.print("dry run: nothing was written")


def _view(report: "ViewInspection", title: str = "view") -> None:
    """The tables of a view with their weights, and the size of each split."""
    temperatures = " ".join(f"{temperature:g}" for temperature in report.temperatures)
    facts({title: f"{report.location} ({report.how})", "temperatures": temperatures})
    for part in report.parts:
        about = f"{part.teacher}, {_selection(part.selection)}, {bytes_of(part.bytes)}"
        console.print(f"  {part.weight:g} x {part.table}  [dim]{about}[/]")
    splits = table_of("split", "sequences", "tokens", "positions")
    for name, size in report.splits.items():
        splits.add_row(name, *(f"{count:,}" for count in (size.sequences, size.tokens, size.positions)))
    console.print(splits)
    if report.left_out:
        console.print(f"[yellow]{count(report.left_out, 'sequence')} left out[/]: not in every table")


def show_history(report: "HistoryReport") -> None:
    """The versions of a table, newest first, and the tags and students that need them."""
    table = table_of("version", "when (UTC)", "what", "who", "sequences", "positions", "bytes", words=4)
    for entry in report.versions:
        when = entry.time.removesuffix("+00:00").replace("T", " ")
        counts = (entry.sequences, entry.positions)
        table.add_row(
            str(entry.version), when, entry.operation, entry.user, *(f"{n:,}" for n in counts), bytes_of(entry.bytes)
        )
    console.print(table)
    _names(report.tags, report.pins)
    for cause, versions in (("vacuumed", report.vacuumed), ("purged", report.purged)):
        if versions:
            console.print(f"{cause}, and can no longer be opened: {spans(versions)}")


def show_verify(report: "VerifyReport") -> None:
    """What was checked, and what was removed."""
    if report.removed:
        removed = count(len(report.removed), "damaged shard")
        verb = "would remove" if report.dry_run else "removed"
        console.print(
            f"[bold]{report.location}[/]: {verb} {removed} from the newest version;"
            f" to be captured again: {count(report.removed_rows, 'sequence')}"
        )
        for finding in report.findings:
            console.print(f"  {finding.path}  [dim]{finding.problem}[/]")
        try_next([f"softlabel capture DOCUMENTS {report.location}    (as before; it captures only what is missing)"])
    else:
        counts = f"{count(report.shards, 'shard')}, {count(report.rows, 'sequence')}, {bytes_of(report.bytes)}"
        console.print(f"[bold]{report.location}[/] (version {report.version}) is intact: {counts}")
    if report.recheck:
        _recheck(report.recheck, table_rows=report.rows)
    if report.orphans:
        console.print(
            f"{count(len(report.orphans), 'file')} in no version of the table: softlabel did not write them, an"
            " interrupted writer left them, or the log has lost its newest commits (if so, restore the log before you"
            " delete anything):"
        )
        for path in report.orphans:
            console.print(f"  {path}")
        try_next([f"softlabel maintain {report.location}"])


def _recheck(recheck: "Recheck", table_rows: int) -> None:
    """The distance of the table from its teacher, next to the distance of the teacher from itself."""
    console.print(
        f"the teacher agrees with the table on {count(recheck.sequences, 'sequence')},"
        f" {count(recheck.positions, 'position')}, within its own noise (in nats):"
    )
    table = table_of("", "table: mean", "99.9%", "max", "noise: mean", "99.9%", "max")
    for agreement in recheck.agreements:
        pairs = (agreement.table, agreement.noise)
        cells = [f"{value:.4f}" for pair in pairs for value in (pair.mean, pair.most, pair.maximum)]
        table.add_row(agreement.name, *cells)
    console.print(table)
    console.print(
        f"noise: difference between two runs of the teacher with different batches; its top-1 id changes at"
        f" {recheck.top_changes:.2%} of positions\ntruncation: {recheck.outside:.2%} of the probability is outside the"
        f" head; without a sampled tail, this loses {recheck.lost:.3f} nats (KL)"
    )
    if recheck.sequences < table_rows:  # n agreeing sequences bound the wrong share w at 95 %: (1 - w)^n = 5 %
        console.print(
            f"sample: with 95 % confidence, less than {1 - 0.05 ** (1 / recheck.sequences):.1%} of all sequences are"
            " wrong; a larger --sequences narrows this down"
        )


def show_maintain(report: "MaintainReport") -> None:
    """What was deleted, what was spared, and which tags and students need which version."""
    if report.unpinned:
        would = "would be unpinned" if report.deletion and report.deletion.dry_run else "unpinned"
        console.print(f"{would}, because their folders are gone: {', '.join(pin.student for pin in report.unpinned)}")
    if report.deletion:
        _deletion(report.deletion)
    _names(report.tags, report.pins)
    if report.dry_run:
        console.print("dry run: nothing was written; this is how it would be")


def show_reprocess(report: "ReprocessReport") -> None:
    """What changed, what was taken down, what softlabel could not delete, and what to do next."""
    rows, where = report.rows, f"[bold]{report.table}[/] (version {report.version})"
    counts = [f"{count(rows.dropped, 'sequence')} dropped", f"{rows.sequences:,} in {count(rows.shards, 'new shard')}"]
    counts += [f"{rows.left:,} left as they are"] if rows.left else []
    changed = "would be changed" if report.dry_run else "changed"
    most = "at most about " if report.dry_run and "narrow" in report.operation else "about " if report.dry_run else ""
    console.print(f"{where}, {changed} by {report.operation}: {', '.join(counts)}; {most}{bytes_of(rows.bytes)}")
    if report.unknown:
        console.print(f"[yellow]not in the table[/]: {count(report.unknown, 'document')} of the list")
    if report.purged:
        _purged(report.purged, report.dry_run)
    if report.dry_run:
        console.print("dry run: nothing was written")
        return
    try_next([f"softlabel inspect {report.table}", f"softlabel history {report.table}"])


def _purged(report: "Purged", dry_run: bool) -> None:
    held = f"{report.found:,} of them found in the table"
    taken_down, deleted = count(report.documents, "document"), count(len(report.files), "file")
    would = "would be " if dry_run else ""
    console.print(f"{taken_down} {would}taken down ({held}), {deleted} {would}deleted")
    if report.versions:
        verb = "could no longer be opened" if dry_run else "can no longer be opened"
        console.print(f"versions that {verb}: {spans(report.versions)}")
    lists = {
        "these lose the version that they refer to": report.broken,
        "these documents share text with those taken down, and stay in the table": report.same_text,
        "these may still hold the documents or traces of them, and softlabel can't change them": report.out_of_reach,
    }
    for title, lines in lists.items():
        if lines:
            console.print(f"[yellow]{title}[/]:")
        for line in lines:
            console.print(f"  {line}")


def _deletion(report: "Maintenance") -> None:
    verb = "would be deleted" if report.dry_run else "deleted"
    for leftover in report.deleted:
        console.print(f"  {bytes_of(leftover.bytes):>8}  {leftover.path}  [dim]{leftover.why}[/]")
    total = bytes_of(sum(leftover.bytes for leftover in report.deleted))
    what = f"{count(len(report.deleted), 'file')}, {total}, {verb}" if report.deleted else "nothing to delete"
    console.print(f"[bold]{report.location}[/]: {what}")
    if report.renewed:
        verb = "would be written anew" if report.dry_run else "were written anew"
        console.print(f"damaged files of the log that {verb}: {', '.join(report.renewed)}")
    if report.vacuumed:
        verb = "could no longer be opened" if report.dry_run else "can no longer be opened"
        console.print(f"versions that {verb}: {spans(report.vacuumed)}")
    if report.spared:
        size = bytes_of(sum(leftover.bytes for leftover in report.spared))
        files = count(len(report.spared), "file")
        console.print(f"{files}, {size}, spared: written recently (--grace-hours), or still being written")


def show_rejects(report: "RejectsReport") -> None:
    """How many documents were left out for which reason, and some of them."""
    name = printable(report.table)
    if not report.rejected + report.shortened:
        console.print(f"[bold]{escape(name)}[/]: the newest capture could use every document, and cut none short")
        return
    found = f"{count(report.rejected, 'document')} not used by the newest capture, {report.shortened:,} cut short"
    console.print(f"[bold]{escape(name)}[/]: {found}")
    table = table_of("documents", "reason", "such as", words=3)
    for reason in report.reasons:
        examples = ", ".join(map(printable, reason.examples))
        table.add_row(f"{reason.documents:,}", Text(printable(reason.reason)), Text(examples, "dim"))
    console.print(table)
    if report.matching == sum(len(reason.examples) for reason in report.reasons):
        return
    console.print(f"[dim]{len(report.documents):,} of {count(report.matching, 'document')}[/]")
    for document in report.documents:
        console.print(Text.assemble(f"  {printable(document.document_id)}  ", (printable(document.reason), "dim")))


def show_export(report: "ExportReport") -> None:
    """What was written, and where."""
    has = "would have" if report.dry_run else "has"
    console.print(
        Text.assemble((printable(report.output), "bold"), f" {has} {printable(report.table)}@{report.version}")
    )
    table = table_of("split", "sequences", "positions", "files", "bytes")
    for name, split in report.splits.items():
        counts = (split.sequences, split.positions, split.files)
        size = "" if split.bytes is None else bytes_of(split.bytes)
        table.add_row(name, *("" if number is None else f"{number:,}" for number in counts), size)
    console.print(table)
    console.print("dry run: nothing was written" if report.dry_run else "its README.md says how to read it")


def _names(tags: Iterable["Tag"], pins: Iterable["Pin"]) -> None:
    """One line for each version that a tag or a student needs."""
    for version in sorted({tag.version for tag in tags} | {pin.version for pin in pins}):
        console.print(f"version {version} is needed by {', '.join(_needed_by(version, tags, pins))}")


def _needed_by(version: int, tags: Iterable["Tag"], pins: Iterable["Pin"]) -> list[str]:
    named = [f"tag {tag.name}" for tag in tags if tag.version == version]
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
    head = (
        f"head of {selection.min_k} to {selection.max_k} ids, until their probabilities add up to {selection.top_p:g}"
    )
    tail = f"sampled tail of up to {selection.draws} draws" if selection.draws else "no tail"
    return f"{head}; {tail}"
