"""Read documents from Parquet, JSON lines or plain text as a stream of small tables with a fixed schema.

A problem with the input as a whole (no such path, no such column, a damaged file) is an error. A problem with one
document is a ``Reject`` with a reason, and never stops the stream. Nothing is tokenized here, and no file is read into
memory as a whole except plain text files, each of which is one document.
"""

from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from hashlib import blake2b
from itertools import islice
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from softlabel.pipeline.config.capture import ColumnsConfig
from softlabel.pipeline.digests import DigestSet, digests
from softlabel.pipeline.documents.columns import CONTENTS, UnfitError, carried, carried_field, encoded, id_of, label_of
from softlabel.pipeline.documents.readers import Piece, find
from softlabel.storage.errors import DocumentsError, UsageError
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
    """The documents at a path: a file, a folder or a glob, on this machine or in s3://BUCKET/.

    Args:
        path: where there are Parquet (.parquet), JSON lines (.jsonl, .ndjson) or plain text files (.txt, .md, .rst),
            the latter two also compressed (.gz, .zst). A plain text file is one document; its id is the file's path
            below the folder or glob.
        columns: names of the columns to read.

    Raises:
        UsageError: if there is nothing at the path, or a column does not exist.
        DocumentsError: if a file can't be read.
    """

    def __init__(self, path: str, columns: ColumnsConfig) -> None:
        self.path = path
        self._columns = columns
        self._source = find(path)
        known = self._source.schema()
        self._require_columns(known.names)
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
        wanted = [c.id, *c.contents.values(), *([c.label] if c.label else []), *c.carry]
        seen = DigestSet()
        empty = True
        for piece in self._source.read(list(dict.fromkeys(wanted))):
            checked = self._checked(piece)
            duplicates = ~seen.add(digests(checked.documents.column("document_id").to_pylist()))
            batch = checked.without(duplicates, "another document has this id")
            empty = empty and not batch.documents.num_rows and not batch.rejects
            yield batch
        if empty:
            raise DocumentsError(
                "there are no documents",
                expected="at least one document",
                found="files without any records",
                where=self.path,
                do="check that these are the right files and that they are complete",
            )

    def _checked(self, piece: Piece) -> DocumentBatch:
        """The usable records as a table, and the rest as rejects."""
        c, values, names = self._columns, piece.values, list(piece.places)
        contents = zip(*(values[name] for name in c.contents.values()), strict=True)
        labels = values[c.label] if c.label else [None] * len(names)
        columns = {field: carried(values[field.name], field.type) for field in self.carried}
        misfits = {i: field for field, (_, unfit) in columns.items() for i in unfit}
        rejects, rows, usable = [], [], []
        for i, (name, content, label) in enumerate(zip(values[c.id], contents, labels, strict=True)):
            try:
                if i in piece.unreadable:
                    raise UnfitError(piece.unreadable[i])
                names[i] = id_of(name)
                row = _document(names[i], CONTENTS[c.content](*content), label_of(label))
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

    def _require_columns(self, found: list[str]) -> None:
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
                    found=", ".join(islice(found, 40)) or "no columns",
                    where=self.path,
                    do=f"set {setting.partition('[')[0]} to one of these columns, or add the column to the documents",
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
