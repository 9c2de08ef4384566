"""Rows of a table token by token: the text, what is captured, and what the teacher expected there.

Only the row groups of the rows that are shown are decoded.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from math import exp, isnan
from typing import Any

import numpy as np
import pyarrow as pa

from softlabel.pipeline.config.show import ShowConfig
from softlabel.pipeline.sequences.token_text import TokenText, TokenTexts
from softlabel.pipeline.tables import find_rows
from softlabel.pipeline.tables.find_rows import Found, Place
from softlabel.storage.codec import decode
from softlabel.storage.errors import UsageError
from softlabel.storage.labels import SoftLabels
from softlabel.storage.schema import PARTITION, SEQUENCE, SOFT_LABELS
from softlabel.storage.table import Table
from softlabel.storage.upkeep.inspection import last_capture
from softlabel.storage.views.row_groups import column_of, load
from softlabel.storage.views.view import AnyTable, View, open_table

_SUGGESTED = 3
_SEQUENCE = tuple(name for name in SEQUENCE.names if name != PARTITION)


@dataclass(frozen=True)
class Choice:
    """One of a teacher's likeliest tokens or classes."""

    id: int
    text: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """What a teacher predicted at a position, before it saw the token."""

    choices: tuple[Choice, ...]
    """Its likeliest tokens, the likeliest first."""
    rank: int | None
    """Place of the token itself among all that are stored with their probability, from 1; None if it is not among
    them."""
    entropy: float | None
    """Of its whole distribution, in nats; None if the table does not know it."""
    outside: float | None
    """Probability of everything that is not stored with a probability of its own; None if the table does not know
    it."""
    stored: int
    """How many tokens are stored with their probability."""


@dataclass(frozen=True)
class ShownToken:
    """A token of a row."""

    id: int
    text: str
    r"""Its own text; bytes that are only part of a character are \xf0 and so on."""
    reading: str
    """What it adds to the text of the row: as ``text``, but a character of several tokens belongs to the last."""
    special: bool
    """Whether it is one of the tokenizer's special tokens."""
    captured: bool
    """Whether the loss mask marks it."""
    probability: float | None
    """The teacher's probability of this token, before it saw it; the weighted mean if several teachers are averaged.
    None for a token that is not captured, and where the table does not know it."""
    predictions: tuple[Prediction, ...]
    """One for each teacher; none for a token that is not captured."""


@dataclass(frozen=True)
class ShownRow:
    """One sequence of a document."""

    table: str
    """TABLE@version that has the row."""
    document: str
    chunk: int
    """Which of the document's sequences this is, from 0."""
    chunks: int
    split: str
    label: str | None
    carried: dict[str, Any]
    fingerprint: str
    """Of the document's text; a document that has changed may have rows of several texts."""
    text: int
    """Which of the document's texts among the rows that are shown, from 1 ..."""
    texts: int
    """... and how many of them there are."""
    tokens: tuple[ShownToken, ...]
    positions: int
    """Number of captured tokens."""
    classes: tuple[Choice, ...] = ()
    """The likeliest classes of the document, if the teacher is a classifier; then nothing is predicted at tokens."""


@dataclass(frozen=True)
class ShowReport:
    """Rows of a table."""

    table: str
    version: int
    teachers: tuple[str, ...]
    rows: tuple[ShownRow, ...]
    matching: int
    """How many rows match, of which these are some."""
    tokens: int
    """How many tokens of each row the terminal lists."""
    html: str | None
    """The page that was written."""
    dry_run: bool = False
    """Whether the page was not written, but would be."""


def show(config: ShowConfig, *, dry_run: bool = False) -> ShowReport:
    """Read rows with their soft labels and texts; with ``html``, also write them to a page, unless in a dry run.

    Raises:
        UsageError: if no row matches, the expression can't be evaluated, or the page can't be written.
        TableError: if the table can't be read.
    """
    source = open_table(config.table)
    found = _find(source, config)
    report = ShowReport(
        table=source.location,
        version=source.version,
        teachers=tuple(last_capture(table).teacher or "" for table in source.tables),
        rows=_with_texts(list(_read(source, found.places, config.choices))),
        matching=found.matching,
        tokens=config.tokens,
        html=config.html,
        dry_run=dry_run,
    )
    if config.html is not None:
        from softlabel.pipeline.tables.show_page import write_page  # jinja2 is not needed otherwise

        write_page(report, config.html)
    return report


def _find(source: AnyTable, config: ShowConfig) -> Found:
    if config.document is not None:
        found = find_rows.of_document(source, config.document, config.limit, config.where)
    elif config.where is not None and config.random is None:
        found = find_rows.first(source, config.limit, config.where)
    else:
        found = find_rows.sample(source, config.random or 1, config.seed, config.where)
    if not found.places:
        raise _nothing(source, config)
    return found


def _nothing(source: AnyTable, config: ShowConfig) -> UsageError:
    if config.document is None:
        wanted = "a row" if config.where is None else f"a row for which this is true: {config.where}"
        return UsageError(
            "there is no row to show",
            expected=wanted,
            found="no such row",
            where=config.table,
            do=f"look at softlabel inspect {config.table} for what the table holds",
        )
    if config.where is not None and find_rows.of_document(source, config.document, 1).places:
        return UsageError(
            "the table has no row of this document that matches",
            expected=f"a row for which this is true: {config.where}",
            found=config.document,
            where=config.table,
            do="leave out where to see all rows of the document",
        )
    near = find_rows.some_documents(source, config.document, _SUGGESTED)
    return UsageError(
        "the table has no row of this document",
        expected=f"an id as the table has it, such as {', '.join(near)}" if near else "a table with rows",
        found=config.document,
        where=config.table,
        do=f"check the id; softlabel rejects {source.location} lists the documents that could not be used",
    )


def _read(source: AnyTable, places: Sequence[Place], choices: int) -> Iterator[ShownRow]:
    """The rows at these places, in their order; each row group is read once if its rows stand together."""
    texts = TokenTexts(source.tokenizer)
    for group, together in groupby(places, key=lambda place: place.group):
        table = source.tables[group.table]
        reader = _Reader(source, table, texts, choices)
        rows = load(source, group, [*_SEQUENCE, *SOFT_LABELS.names, *table.carried.names])
        for place in together:
            yield reader.row(rows.slice(place.row, 1), group.shard.split)


def _with_texts(rows: list[ShownRow]) -> tuple[ShownRow, ...]:
    """The same rows, each with which of its document's texts it belongs to."""
    texts: dict[str, list[str]] = {}
    for row in rows:
        known = texts.setdefault(row.document, [])
        known += [] if row.fingerprint in known else [row.fingerprint]
    return tuple(
        replace(row, text=known.index(row.fingerprint) + 1, texts=len(known))
        for row in rows
        for known in (texts[row.document],)
    )


class _Reader:
    """Turns a stored row into what is shown of it."""

    def __init__(self, source: AnyTable, table: Table, texts: TokenTexts, choices: int) -> None:
        self._source, self._table, self._texts, self._choices = source, table, texts, choices
        self._weights = source.weights if isinstance(source, View) and source.average else (1.0,)
        self._classes = source.tables[0].identity.classes or ()

    def row(self, row: pa.Table, split: str) -> ShownRow:
        values = {name: row.column(name)[0].as_py() for name in (*_SEQUENCE, *self._table.carried.names)}
        labels = [_labels(row, number, self._source) for number in range(len(self._weights))]
        chosen = () if self._classes else np.unique(np.concatenate([each.head_ids for each in labels])).tolist()
        self._texts.require([*values["token_ids"], *chosen])
        mask = [False] * values["tokens"] if self._classes else values["loss_mask"]
        tokens = self._tokens(values["token_ids"], mask, labels)
        return ShownRow(
            table=f"{self._table.location}@{self._table.version}",
            document=values["document_id"],
            chunk=values["chunk"],
            chunks=values["chunks"],
            split=split,
            label=values["label"],
            carried={name: _plain(values[name]) for name in self._table.carried.names},
            fingerprint=values["fingerprint"].hex(),
            text=1,
            texts=1,
            tokens=tuple(tokens),
            positions=values["positions"],
            classes=self._head(labels[0], 0, self._classes) if self._classes else (),
        )

    def _tokens(self, ids: list[int], mask: list[bool], labels: list[SoftLabels]) -> Iterator[ShownToken]:
        position = 0
        for token, text, captured in zip(ids, self._texts.sequence(ids), mask, strict=True):
            if captured:
                yield self._captured(token, text, labels, position)
                position += 1
            else:
                yield ShownToken(token, text.own, text.reading, text.special, False, None, ())

    def _captured(self, token: int, text: TokenText, labels: list[SoftLabels], position: int) -> ShownToken:
        logprobs = [each.next_logprobs[position] for each in labels]
        probability = _known(sum(w * exp(logprob) for w, logprob in zip(self._weights, logprobs, strict=True)))
        predictions = tuple(self._prediction(each, position, token) for each in labels)
        return ShownToken(token, text.own, text.reading, text.special, True, probability, predictions)

    def _prediction(self, labels: SoftLabels, position: int, token: int) -> Prediction:
        ids = _head(labels, position)[0]
        places = np.flatnonzero(ids == token)
        return Prediction(
            choices=self._head(labels, position),
            rank=int(places[0]) + 1 if len(places) else None,
            entropy=_known(labels.entropies[position]),
            outside=_known(np.exp(labels.tail_log_masses[0, position])),
            stored=len(ids),
        )

    def _head(self, labels: SoftLabels, position: int, names: Sequence[str] = ()) -> tuple[Choice, ...]:
        ids, logprobs = _head(labels, position)
        wanted = list(zip(ids[: self._choices].tolist(), logprobs[: self._choices].tolist(), strict=True))
        return tuple(Choice(i, names[i] if names else self._texts.text(i), exp(logprob)) for i, logprob in wanted)


def _labels(row: pa.Table, number: int, source: AnyTable) -> SoftLabels:
    """A row's soft labels, of one of the tables if they are averaged."""
    columns = [row.column(column_of(name, number)) for name in SOFT_LABELS.names]
    return decode(pa.table(columns, names=SOFT_LABELS.names), source.numbering)


def _head(labels: SoftLabels, position: int) -> tuple[Any, Any]:
    """Ids and log-probabilities of a position's head."""
    start = int(labels.head_counts[:position].sum())
    span = slice(start, start + int(labels.head_counts[position]))
    return labels.head_ids[span], labels.head_logprobs[span]


def _known(value: Any) -> float | None:
    return None if isnan(value) else float(value)


def _plain(value: Any) -> Any:
    """A carried value as JSON can have it: bytes as hexadecimal digits."""
    match value:
        case bytes():
            return value.hex()
        case list():
            return [_plain(each) for each in value]
        case dict():
            return {name: _plain(each) for name, each in value.items()}
        case _:
            return value
