"""Makes a view over several tables, or explains why they can't be combined. Reads no soft labels."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict

from softlabel.storage.errors import ProvenanceError, TableError, TableNotFoundError, UsageError
from softlabel.storage.identity import Identity, run_id, user
from softlabel.storage.location import located
from softlabel.storage.opening import VIEW_FILE, is_view
from softlabel.storage.places.open import place_of
from softlabel.storage.records.sealed_json import seal
from softlabel.storage.records.store import now
from softlabel.storage.records.versions import parse, pin, unpin
from softlabel.storage.table import Table
from softlabel.storage.views.view import FORMAT, Definition, How, Part, View, is_unbiased, read_definition
from softlabel.storage.writer import require_writable

_TOKEN_FIELDS = ("tokenizer.files", "vocabulary")
"""Fields of the identity that determine the meaning of a token id."""


def make_view(
    location: str, names: Sequence[str], weights: Sequence[float], how: How, *, dry_run: bool = False
) -> View:
    """Make a view, and pin the versions of its tables so that they are not vacuumed. Repeating it changes nothing.

    If several processes make different views at the same location, one succeeds, and only its pins remain.

    Args:
        location: folder of the view.
        names: locations of the tables; without a version or tag, the newest version is used.
        weights: weight of each table, above 0.
        how: concatenate or average.
        dry_run: write nothing; the view that is returned then exists only in this process.

    Raises:
        UsageError: if a table is given twice, or the folder is not empty.
        ProvenanceError: if the tables can't be combined in this way; it names what differs.
        TableError: if a table has no sequence in common with the others, or something can't be written.
    """
    location = located(location)
    tables = [Table.open(_absolute(name)) for name in names]
    if len({table.location for table in tables}) < len(tables):
        raise UsageError("the same table is given twice", expected="different tables", found=", ".join(names))
    for table in tables:
        _require_same_tokens(tables[0], table)
    parts = [Part(t.location, t.version, w, t.content) for t, w in zip(tables, weights, strict=True)]
    view = View(location, Definition(FORMAT, how, tuple(parts), now(), user(), run_id()), tables)
    if how == "average":
        _require_average(view)
    _require_free(location, view.definition)
    if dry_run:
        require_writable(location, dry_run=True)
        return view
    try:
        for table in tables:
            pin(table.location, table.version, view.place.address, "view")
        _write(location, view.definition)
    finally:
        _update_pins(view)
    return view


def _write(location: str, definition: Definition) -> None:
    try:
        fields = {name: value for name, value in asdict(definition).items() if value is not None}
        place_of(location).write(VIEW_FILE, seal(fields), replace=False)
    except OSError as error:
        if is_view(location):  # another process was first, perhaps with the same view
            return _require_free(location, definition)
        raise TableError(
            "the view can't be written",
            expected="write permission for the folder, and free disk space",
            found=error,
            where=location,
            do="check the path, the permissions and the free disk space, then run the same command again",
        ) from error


def _update_pins(view: View) -> None:
    """Pin what the view now at the location needs, if any: another process may have made a different one."""
    address = view.place.address
    held = {part.table: part.version for part in read_definition(view.place).parts} if is_view(view.location) else {}
    for table in view.tables:
        if table.location in held:
            pin(table.location, held[table.location], address, "view")
        else:
            with suppress(TableNotFoundError):
                unpin(table.location, address)


def _require_free(location: str, definition: Definition) -> None:
    """Refuse a location with anything other than the same view."""
    place = place_of(location)
    if is_view(location):
        existing = read_definition(place)
        if (existing.how, existing.parts) != (definition.how, definition.parts):
            raise UsageError(
                "there is a different view here already, and a view never changes",
                expected=f"the view that is there: {_describe(existing)}",
                found=f"the view to make: {_describe(definition)}",
                where=location,
                do="choose another folder, or delete this view",
            )
    elif any(place.files()):
        raise UsageError(
            "the folder for the view is not empty",
            expected="an empty folder, or a folder that does not exist",
            where=location,
            do="choose another folder",
        )


def _describe(definition: Definition) -> str:
    parts = (f"{part.weight:g} x {part.table}@{part.version}" for part in definition.parts)
    return f"{definition.how}: {', '.join(parts)}"


def _require_same_tokens(first: Table, other: Table) -> None:
    if other.identity.classes is not None:
        raise ProvenanceError(
            "a classifier's table can't be mixed with other tables",
            expected="tables of language models",
            found=f"a table of {len(other.identity.classes)} classes",
            where=other.location,
        )
    differences = first.identity.differences(other.identity)
    found = [f"{name}: {a} against {b}" for name, (a, b) in differences.items() if name in _TOKEN_FIELDS]
    if found:
        raise ProvenanceError(
            "these tables can't be mixed: their token ids have different meanings",
            expected="the same tokenizer and vocabulary",
            found="\n               ".join(found),
            where=f"{first.location} and {other.location}",
            do="mix tables whose teachers have the same tokenizer",
        )


def _require_average(view: View) -> None:
    """Refuse to average tables that sample no tail, or that have no sequence in common."""
    for table in view.tables:
        if not is_unbiased(table):
            selection = table.identity.selection
            raise ProvenanceError(
                "this table can't be averaged: it does not sample the tail, so the loss against the average "
                "would be a biased estimate",
                expected="a sampled tail, or heads that hold the whole vocabulary",
                found=f"heads of at most {selection.max_k} of {table.identity.vocabulary} ids, and no draws",
                where=f"{table.location}@{table.version}",
                do="use how: concatenate, or capture again with selection.draws above 0",
            )
    if not view.alignment.sequences:
        first, *others = (table.identity for table in view.tables)
        chunking = [line for other in others for line in _chunking(first, other)]
        raise TableError(
            "these tables have no sequence in common, so there is nothing to average",
            expected="tables of the same documents, cut into the same sequences",
            found="\n               ".join(chunking) or "different documents",
            where=", ".join(view.names),
            do="capture the same documents with each teacher and the same chunking; or use how: concatenate",
        )


def _chunking(first: Identity, other: Identity) -> list[str]:
    cuts = ("tokenizer.", "sequences.")
    differences = first.differences(other)
    return [f"{name}: {a} against {b}" for name, (a, b) in differences.items() if name.startswith(cuts)]


def _absolute(name: str) -> str:
    path, version = parse(name)
    return place_of(path).address + ("" if version is None else f"@{version}")
