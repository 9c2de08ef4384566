"""Read documents of any known format as a stream of small tables with a fixed schema.

A problem with the input as a whole (no such path, no such column, a damaged file) is an error. A problem with one
document is a ``Reject`` with a reason, and never stops the stream. Nothing is tokenized here, and no file is read into
memory as a whole except plain text files, each of which is one document.
"""

from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from hashlib import blake2b
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from softlabel.pipeline.config.capture import ColumnsConfig
from softlabel.pipeline.digests import DigestSet, as_digests, digests, side_by_side
from softlabel.pipeline.documents.columns import (
    CONTENTS,
    UnfitError,
    carried,
    carried_field,
    content_id,
    encoded,
    id_of,
    label_of,
    without_nulls,
)
from softlabel.pipeline.documents.readers import find
from softlabel.pipeline.documents.reading import Piece
from softlabel.storage.errors import DocumentsError, UsageError, printable
from softlabel.storage.schema import row_schema

DOCUMENT = pa.schema(
    [
        pa.field("document_id", pa.string(), nullable=False),
        pa.field("content", pa.string(), nullable=False),
        pa.field("label", pa.string()),
        pa.field("fingerprint", pa.binary(), nullable=False),
    ]
)
"""Schema of a document. The content is its text or, as JSON, its chat or its prompt and completion. The fingerprint is
a 16-byte BLAKE2b of content and label: it changes when the document's sequences change, not with a carried column."""


class Reject(NamedTuple):
    """A document that can't be used, and why."""

    document_id: str
    reason: str


class DocumentBatch(NamedTuple):
    """Some documents (``DOCUMENT`` and the carried columns), and the rejected ones among them."""

    documents: pa.Table
    rejects: list[Reject]
    names: list[str]
    """Name of each record, in their order: its document's id, or its position in the file if it has no id."""
    repeated: int = 0
    """Records left out because an earlier one has the same content; only if the documents have no ids."""

    def in_order(self, rejects: Iterable[Reject]) -> list[Reject]:
        """Rejects of this batch in the order of their records; of two records with one id, the later is rejected."""
        order = {name: i for i, name in enumerate(self.names)}
        return sorted(rejects, key=lambda reject: order[reject.document_id])

    def without(self, unwanted: NDArray[np.bool_], reason: str) -> "DocumentBatch":
        """The batch with some of its documents rejected for this reason."""
        if not unwanted.any():
            return self
        names = self.documents.filter(pa.array(unwanted)).column("document_id").to_pylist()
        remaining = self.documents.filter(pa.array(~unwanted))
        return self._replace(documents=remaining, rejects=[*self.rejects, *(Reject(name, reason) for name in names)])


class Documents:
    """The documents at some paths: files, folders or globs, on this machine or in one of ``documents.stores``.

    Args:
        paths: one or several. At each of them are files of one kind: Parquet, Arrow, CSV, JSON or plain text (see
            ``documents.readers``), all but the first two also compressed (.gz, .zst). A plain text file is one
            document; its id is the file's path below the folder or glob.
        columns: names of the columns to read. Without an id column, a document's id is the hash of its content.

    Raises:
        UsageError: if there is nothing at a path, or a column does not exist.
        DocumentsError: if a file can't be read.
    """

    def __init__(self, paths: str | Sequence[str], columns: ColumnsConfig) -> None:
        self.path = paths if isinstance(paths, str) else ", ".join(paths)
        self._columns = columns
        self._sources = find(paths)
        schemas = [(path, source.schema()) for path, source in self._sources]
        for path, known in schemas:
            self._require_columns(known.names, path)
        known = schemas[0][1]
        self.carried: pa.Schema = pa.schema(
            [carried_field(known.field(known.names.index(name))) for name in columns.carry]
        )
        """Names and types of the carried columns."""
        row_schema(self.carried)

    def batches(self) -> Iterator[DocumentBatch]:
        """All documents, always in the same order, a few thousand or a few tens of MB at a time.

        Raises:
            DocumentsError: if a file is damaged, or there are no documents at all.
        """
        c = self._columns
        wanted = [c.id, *c.contents.values(), c.label, *c.carry]
        names = list(dict.fromkeys(name for name in wanted if name is not None))
        distinct = self._by_content if c.id is None else self._by_id
        seen, versions = DigestSet(), DigestSet()
        empty = True
        for piece in chain.from_iterable(source.read(names) for _, source in self._sources):
            batch = distinct(self._checked(piece), seen, versions)
            empty = empty and not piece.places
            yield batch
        if empty:
            raise DocumentsError(
                "there are no documents",
                expected="at least one document",
                found="files without any records",
                where=printable(self.path),
                do="check that these are the right files and that they are complete",
            )

    @staticmethod
    def _by_id(batch: DocumentBatch, seen: DigestSet, _: DigestSet) -> DocumentBatch:
        """The batch without documents whose ids were seen before, which are rejected."""
        known = ~seen.add(digests(batch.documents.column("document_id").to_pylist()))
        return batch.without(known, "another document has this id")

    @staticmethod
    def _by_content(batch: DocumentBatch, seen: DigestSet, versions: DigestSet) -> DocumentBatch:
        """The batch without documents whose contents were seen before; one with another label is rejected."""
        ids = digests(batch.documents.column("document_id").to_pylist())
        known = ~seen.add(ids)
        is_other = versions.add(side_by_side(ids, as_digests(batch.documents.column("fingerprint"))))
        repeated = known & ~is_other
        labelled = batch.without(known & is_other, "another document has the same content and another label")
        kept = labelled.documents.filter(pa.array(~repeated[~(known & is_other)]))
        return labelled._replace(documents=kept, repeated=int(repeated.sum()))

    def _checked(self, piece: Piece) -> DocumentBatch:
        """The usable records as a table, and the rest as rejects."""
        c, values, names = self._columns, piece.values, list(piece.places)
        clean = without_nulls if piece.padded else list
        contents = zip(*(clean(values[name]) for name in c.contents.values()), strict=True)
        labels = values[c.label] if c.label else [None] * len(names)
        columns = {field: carried(values[field.name], field.type) for field in self.carried}
        misfits = {i: field for field, (_, unfit) in columns.items() for i in unfit}
        rejects, rows, usable = [], [], []
        ids = values[c.id] if c.id else [None] * len(names)
        for i, (name, columns_of_content, label) in enumerate(zip(ids, contents, labels, strict=True)):
            try:
                if i in piece.unreadable:
                    raise UnfitError(piece.unreadable[i])
                if c.id:
                    names[i] = id_of(name)
                content = CONTENTS[c.content](*columns_of_content)
                if not c.id:
                    names[i] = content_id(content)
                row = _document(names[i], content, label_of(label))
                if i in misfits:
                    raise UnfitError(f"the value of column {misfits[i].name!r} can't be stored as {misfits[i].type}")
            except UnfitError as unfit:
                rejects.append(Reject(names[i], str(unfit)))
                continue
            rows.append(row)
            usable.append(i)
        own = zip(*rows, strict=True) if rows else [()] * len(DOCUMENT)
        arrays = [pa.array(column, f.type) for column, f in zip(own, DOCUMENT, strict=True)]
        arrays += [column.take(pa.array(usable, pa.int64())) for column, _ in columns.values()]
        return DocumentBatch(pa.table(arrays, schema=pa.schema([*DOCUMENT, *self.carried])), rejects, names)

    def _require_columns(self, found: list[str], path: str) -> None:
        c = self._columns
        wanted = {"columns.id": c.id, "columns.label": c.label}
        wanted |= {f"columns.{setting}": name for setting, name in c.contents.items()}
        wanted |= {f"columns.carry[{i}]": name for i, name in enumerate(c.carry)}
        for setting, name in wanted.items():
            if name is not None and name not in found:
                close = get_close_matches(name, found, n=1)
                raise UsageError(
                    f"the documents have no column {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""),
                    expected=f"{setting}: the name of an existing column",
                    found=printable(", ".join(islice(found, 40))) or "no columns",
                    where=printable(path),
                    do=f"set {setting.partition('[')[0]} to one of these columns, or add the column to the documents"
                    + ("; or to none, if the documents have no ids" if setting == "columns.id" else ""),
                )


def _document(name: str, content: str, label: str | None) -> tuple[str, str, str | None, bytes]:
    """A row of ``DOCUMENT``."""
    return name, content, label, _fingerprint(content, label)


def _fingerprint(text: str, label: str | None) -> bytes:
    content = encoded(text, "text")
    suffix = b"" if label is None else b"\1" + encoded(label, "label")
    digest = blake2b(len(content).to_bytes(8, "little"), digest_size=16)
    digest.update(content)
    digest.update(suffix)
    return digest.digest()
