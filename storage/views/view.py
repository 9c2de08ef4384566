"""A view: several tables with the same tokenizer, each at a pinned version, that are read like one table.

    VIEW/view.json      the tables, their weights and how they are combined; written once, never changed

A concatenated view has the rows of all its tables. An averaged view has the sequences that are in all of them, with the
average of the teachers' distributions. ``mixing`` makes views, this module opens them, and ``row_groups`` reads their
rows.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from softlabel.storage.errors import IntegrityError, TableError, TableNotFoundError
from softlabel.storage.location import require_clean
from softlabel.storage.numbering import Numbering
from softlabel.storage.opening import VIEW_FILE, is_view
from softlabel.storage.places.open import place_of
from softlabel.storage.places.place import Place
from softlabel.storage.records.sealed_json import unseal
from softlabel.storage.records.store import LARGEST_RECORD
from softlabel.storage.records.versions import parse
from softlabel.storage.table import Table
from softlabel.storage.views.alignment import Alignment

How = Literal["concatenate", "average"]
FORMAT = 1


@dataclass(frozen=True)
class Part:
    """One table of a view."""

    table: str
    version: int
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    content: str
    """``Table.content`` of that version."""


@dataclass(frozen=True)
class Definition:
    """The content of view.json, in addition to its hash."""

    format: int
    how: How
    parts: Annotated[tuple[Part, ...], Field(min_length=1)]
    time: str
    """UTC, ISO 8601."""
    user: str
    run: str | None = None
    """The scheduler's id of the run that made it; None if no scheduler started it."""


class View:
    """Several tables that are read like one.

    Attributes:
        location: the view's folder, or its URL.
        place: folder or bucket of its file.
        definition: the content of its file.
        tables: its tables, each at its version.
        weights: for each table, how often its sequences occur in an epoch; or its share of the average (sum 1).
    """

    version = 0
    """A view never changes; students refer to it like to a table that has only this version."""

    def __init__(self, location: str, definition: Definition, tables: Sequence[Table]) -> None:
        self.location = location
        self.place = place_of(location)
        self.definition = definition
        self.tables = tuple(tables)
        weights = [part.weight for part in definition.parts]
        self.weights = tuple(weight / sum(weights) if self.average else weight for weight in weights)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as a location, so that another process opens the same view."""
        return open_table, (self.location,)

    @property
    def average(self) -> bool:
        """Whether the tables' distributions are averaged, instead of their rows concatenated."""
        return self.definition.how == "average"

    @property
    def names(self) -> list[str]:
        """TABLE@version of each table."""
        return [f"{table.location}@{table.version}" for table in self.tables]

    @property
    def content(self) -> str:
        """A hash of everything in this view that a student depends on."""
        parts = [[part.content, part.weight] for part in self.definition.parts]
        return sha256(json.dumps([self.definition.how, parts]).encode()).hexdigest()

    @property
    def temperatures(self) -> tuple[float, ...]:
        """Temperatures that all tables store; only 1 for an average."""
        common = set.intersection(*(set(table.temperatures) for table in self.tables))
        return (1.0,) if self.average else tuple(T for T in self.tables[0].temperatures if T in common)

    @property
    def draws(self) -> bool:
        """Whether head and draws are an unbiased estimate of the whole distribution in each of the tables."""
        return all(map(is_unbiased, self.tables))

    @cached_property
    def numbering(self) -> Numbering:
        """How the view's rows write token ids: as they are, because its tables number them differently."""
        return Numbering.of_ids(self.tables[0].identity.vocabulary)

    @property
    def tokenizer(self) -> Path:
        """Local folder with the tokenizer that all tables share."""
        return self.tables[0].tokenizer

    @cached_property
    def alignment(self) -> Alignment:
        """Which rows of an average's tables belong to the same sequence."""
        return Alignment(self.tables)


AnyTable = Table | View


def open_table(location: str) -> AnyTable:
    """Open a version of a table, or a view.

    Raises:
        TableNotFoundError: if there is neither, or a version that it needs can no longer be opened.
        IntegrityError: if the view is damaged, or one of its tables has changed.
    """
    path, version = parse(location)
    if not is_view(path):
        return Table.open(location)
    if version not in (None, View.version):
        raise TableNotFoundError(
            "a view has no versions",
            expected=path,
            found=location,
            do="leave out the version; a view always reads the same versions of its tables",
        )
    definition = read_definition(place_of(path))
    tables = [Table.open(f"{part.table}@{part.version}") for part in definition.parts]
    for part, table in zip(definition.parts, tables, strict=True):
        if table.content != part.content:
            raise IntegrityError(
                "a table of this view has changed since the view was made",
                expected=f"the shards that version {part.version} had when the view was made",
                found="different shards",
                where=part.table,
                do=f"restore the table from a copy, or make a new view (softlabel inspect {path} lists its tables)",
            )
    return View(path, definition, tables)


def is_unbiased(table: Table) -> bool:
    """Whether head and draws are an unbiased estimate: the table has draws, or its heads hold the whole vocabulary."""
    selection = table.identity.selection
    certain = selection.max_k if selection.top_p == 1 else selection.min_k
    return table.draws or certain >= table.identity.vocabulary


def read_definition(place: Place) -> Definition:
    """Read the file of a view.

    Raises:
        IntegrityError: if it can't be read.
        TableError: if another version of softlabel made it.
        UsageError: if the location of a table contains credentials.
    """
    try:
        definition = TypeAdapter(Definition).validate_python(unseal(place.read(VIEW_FILE, LARGEST_RECORD)))
    except (OSError, ValueError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        raise IntegrityError(
            "the view can't be read",
            expected="a file that softlabel mix wrote",
            found=" ".join([*map(str, first["loc"]), first["msg"]]) if first else error,
            where=place.where(VIEW_FILE),
            do="delete this file, and make the view again with softlabel mix",
        ) from error
    if definition.format != FORMAT:
        raise TableError(
            "another version of softlabel made this view",
            expected=f"format {FORMAT}",
            found=f"format {definition.format}",
            where=place.where(VIEW_FILE),
            do="use the version of softlabel that made it, or make the view again with softlabel mix",
        )
    do = "make the view again with softlabel mix, in another folder"
    require_clean({"table": [part.table for part in definition.parts]}, place.where(VIEW_FILE), do)
    return definition
