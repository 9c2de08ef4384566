"""What ``softlabel lineage`` prints: a tree of what was made from what."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from rich.text import Text
from rich.tree import Tree

from softlabel.flows.display.console import console, count, printable, short
from softlabel.storage.upkeep.inspection import HistoryEntry

if TYPE_CHECKING:
    from softlabel.pipeline.lineage import Dependent, Lineage, StudentLineage, TableLineage, ViewLineage
    from softlabel.storage.identity import SelectionIdentity

_SHOWN_COMMITS, _SHOWN_SOURCES = 8, 8
_SHOWN_DIGITS = 12


def show_lineage(report: "Lineage") -> None:
    """What a student or a table was made from, and what was made from a table."""
    match report.kind:
        case "student":
            tree = _student(report)
        case "table":
            tree = _table(Tree(_title("table", f"{report.location}@{report.version}")), report)
        case "view":
            tree = _view(Tree(_title("view", report.location)), report)
    console.print(tree, soft_wrap=False)  # otherwise rich cuts long lines of a tree off


def _student(report: "StudentLineage") -> Tree:
    tree = Tree(_title("student", report.location))
    facts = f"step {report.step:,}, {count(report.positions, 'position')}, {short(report.parameters)} parameters"
    tree.add(_fact("trained", f"{facts}; loss: {report.objective}"))
    for run in report.runs:
        tree.add(_fact("run", f"steps {run.first_step:,} to {run.last_step:,}{_by(run.circumstances)}"))
    base = report.base
    made_from = tree.add(_fact("made from", _at(base.name or "unknown files", base.commit), base.problem))
    _add_files(made_from, base.files)
    what = "table" if report.table.kind == "table" else "view"
    if report.table.kind == "table":
        _table(
            tree.add(_title(what, f"{report.table.location}@{report.table.version}", report.table.problem)),
            report.table,
        )
    else:
        _view(tree.add(_title(what, report.table.location, report.table.problem)), report.table)
    return tree


def _view(tree: Tree, report: "ViewLineage") -> Tree:
    made = f", made {report.time}{_by({'user': report.user, 'run': report.run or ''})}" if report.time else ""
    tree.add(_fact("how", f"{report.how}{made}"))
    for table in report.tables:
        title = _title("table", f"{table.location}@{table.version}", table.problem)
        title.append(f"  weight {table.weight:g}", style="dim")
        _table(tree.add(title), table)
    _add_uses(tree, report.students)
    return tree


def _table(tree: Tree, report: "TableLineage") -> Tree:
    if teacher := report.teacher:
        labels = "the documents' own labels"
        named = tree.add(_fact("teacher", _at(teacher.name, teacher.commit) if teacher.files else labels))
        _add_files(named, teacher.files | ({"adapter": teacher.adapter} if teacher.adapter else {}))
    if report.selection:
        reduced = f", reduced from {_selection(report.reduced_from)}" if report.reduced_from else ""
        tree.add(_fact("selection", f"{_selection(report.selection)}{reduced}"))
    if report.documents:
        documents = report.documents
        listed = tree.add(_fact("documents", f"{documents.number:,}, SHA-256 {documents.hash[:_SHOWN_DIGITS]}"))
        _add_some(listed, [Text(printable(path)) for path in documents.sources], _SHOWN_SOURCES)
    if report.commits:
        commits = tree.add(_fact("commits", f"{len(report.commits):,}"))
        _add_some(commits, list(map(_commit, report.commits)), _SHOWN_COMMITS)
    for source in report.sources:
        _table(tree.add(_title("made from", f"{source.location}@{source.version}", source.problem)), source)
    _add_uses(tree, (*report.students, *report.views, *report.derived))
    return tree


def _add_uses(tree: Tree, uses: "Iterable[Dependent]") -> None:
    for use in uses:
        line = _title(f"used by {use.kind}", use.location, use.problem)
        line.append(printable(f"  version {use.version}{_by({'user': use.user, 'run': use.run or ''})}"), style="dim")
        tree.add(line)


def _commit(entry: HistoryEntry) -> Text:
    when = entry.time.removesuffix("+00:00").replace("T", " ")
    change = f"{entry.sequences:+,} sequences" if entry.sequences else "no sequences"
    by = _by({"user": entry.user, "flow": entry.flow or "", "run": entry.run or ""})
    return Text(printable(f"{entry.version}  {when}  {entry.operation}: {change}{by}"))


def _add_some(tree: Tree, lines: list[Text], most: int) -> None:
    for line in lines[:most]:
        tree.add(line)
    if len(lines) > most:
        tree.add(Text(f"and {len(lines) - most:,} more (all with --json)", style="dim"))


def _add_files(tree: Tree, files: Mapping[str, str]) -> None:
    lines = [
        Text(printable(f"{name}  SHA-256 {digest[:_SHOWN_DIGITS]}"), style="dim") for name, digest in files.items()
    ]
    _add_some(tree, lines, _SHOWN_SOURCES)


def _title(kind: str, name: str, problem: str | None = None) -> Text:
    title = Text.assemble((f"{kind} ", "dim"), (printable(name), "bold"))
    return title if problem is None else title.append(printable(f"  {problem}"), style="yellow")


def _fact(name: str, text: str, problem: str | None = None) -> Text:
    fact = Text.assemble((f"{name} ", "dim"), printable(text))
    return fact if problem is None else fact.append(printable(f"  {problem}"), style="yellow")


def _at(name: str, commit: str | None) -> str:
    return f"{name} (commit {commit})" if commit else name


def _by(circumstances: Mapping[str, str]) -> str:
    """Who and which run, as far as it is known."""
    user, run = circumstances.get("user"), circumstances.get("run")
    flow = f"{circumstances['flow']} " if circumstances.get("flow") else ""
    return (f", by {user}" if user else "") + (f", {flow}run {run}" if run else "")


def _selection(selection: "SelectionIdentity") -> str:
    return f"top-p {selection.top_p:g}, {selection.min_k} to {selection.max_k} ids, {selection.draws} draws"
