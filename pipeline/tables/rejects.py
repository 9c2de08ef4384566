"""The documents that a capture could not use, or not as a whole, with the reasons.

A capture leaves the first in a file next to the table, which the next capture replaces. The second are rows of the
table: a classifier reads a document that is too long only up to its longest input.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from pydantic import TypeAdapter, ValidationError

from softlabel.pipeline.config.rejects import RejectsConfig
from softlabel.pipeline.documents.documents import Reject
from softlabel.storage.errors import IntegrityError
from softlabel.storage.places.place import REJECTS, reading
from softlabel.storage.table import Table
from softlabel.storage.views.row_groups import outlines
from softlabel.storage.views.view import open_table

_EXAMPLES = 3
_READ = TypeAdapter(Reject)


@dataclass(frozen=True)
class LeftOut:
    """A document that the table lacks, or holds cut short."""

    document_id: str
    reason: str
    table: str
    shortened: bool
    """Whether the table holds it, cut short."""


@dataclass
class Reason:
    """Documents with the same reason."""

    reason: str
    shortened: bool
    documents: int
    examples: tuple[str, ...]
    """Some of their ids."""


@dataclass(frozen=True)
class RejectsReport:
    """Documents that a capture could not use, or not as a whole."""

    table: str
    rejected: int
    """Documents that the newest capture could not use."""
    shortened: int
    """Documents that the table holds cut short."""
    reasons: tuple[Reason, ...]
    """The most frequent first; only those that match."""
    documents: tuple[LeftOut, ...]
    """Some of the documents that match."""
    matching: int
    """How many match in all."""


def rejects(config: RejectsConfig) -> RejectsReport:
    """List what a capture left out, by reason.

    Raises:
        TableError: if the table or the list can't be read.
    """
    source = open_table(config.table)
    reasons: dict[tuple[str, bool], Reason] = {}
    listed: list[LeftOut] = []
    counts = {False: 0, True: 0}
    for table in source.tables:
        for each in (*_rejected(table), *_shortened(table)):
            counts[each.shortened] += 1
            if config.reason is not None and config.reason.lower() not in each.reason.lower():
                continue
            reason = reasons.setdefault((each.reason, each.shortened), Reason(each.reason, each.shortened, 0, ()))
            reason.documents += 1
            if len(reason.examples) < _EXAMPLES:
                reason.examples += (each.document_id,)
            if len(listed) < config.limit:
                listed.append(each)
    return RejectsReport(
        table=source.location,
        rejected=counts[False],
        shortened=counts[True],
        reasons=tuple(sorted(reasons.values(), key=lambda reason: (-reason.documents, reason.reason))),
        documents=tuple(listed),
        matching=sum(reason.documents for reason in reasons.values()),
    )


def _rejected(table: Table) -> Iterator[LeftOut]:
    """The documents in the file that the newest capture left."""
    where = table.place.where(REJECTS)
    try:
        with reading(where), table.place.fetch(REJECTS) as file:
            for number, line in enumerate(file, 1):
                found = _read(line, f"{where}, line {number}")
                yield LeftOut(_text(found.document_id), _text(found.reason), table.location, shortened=False)
    except FileNotFoundError:
        return


def _read(line: bytes, where: str) -> Reject:
    try:
        return _READ.validate_python(json.loads(line))
    except (ValueError, ValidationError) as error:
        raise IntegrityError(
            "the list of rejected documents is damaged",
            expected='one JSON object per line, {"document_id": ..., "reason": ...}',
            found=" ".join(str(error).split())[:200],
            where=where,
            do="delete this file; the next capture writes it again",
        ) from None


def _text(text: str) -> str:
    """Text without half of a surrogate pair, which the name of a file may have and JSON can't."""
    return text.encode("utf-8", "backslashreplace").decode()


def _shortened(table: Table) -> Iterator[LeftOut]:
    """The documents of a classifier's table that have as many tokens as it reads at most."""
    if not table.identity.classes:
        return
    longest = table.identity.sequences.max_tokens
    reason = f"cut to {longest:,} tokens, the longest input of the classifier (or exactly as long)"
    for _, rows in outlines(table, ["document_id", "tokens"]):
        for row in np.flatnonzero(rows.column("tokens").to_numpy() >= longest).tolist():
            yield LeftOut(rows.column("document_id")[row].as_py(), reason, table.location, shortened=True)
