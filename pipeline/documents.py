"""Documents in: Parquet, JSON lines or plain text, as a stream of small tables of a fixed form.

What is wrong with the whole (no such path, no such column, a damaged file) is an error; what is wrong with a document
is a ``Reject`` with its reason, and never stops the stream. Nothing is tokenised here, and no file is ever held whole,
but a plain text one, which is a document.
"""

import json
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from hashlib import blake2b
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.config import ColumnsConfig
from pipeline.digests import DigestSet, digests
from pipeline.sources import Piece, find
from storage.errors import DocumentsError, UsageError
from storage.schema import row_schema

DOCUMENT = pa.schema(
    [
        pa.field("document_id", pa.string(), nullable=False),
        pa.field("content", pa.string(), nullable=False),
        pa.field("label", pa.string()),
        pa.field("fingerprint", pa.binary(), nullable=False),
    ]
)
"""A document: its content is its text or, as JSON, its chat or its prompt and completion. The fingerprint is a
16-byte BLAKE2b of content and label: it changes when the document's sequences would, and not with a carried column."""


class Reject(NamedTuple):
    """A document that can't be used, and why."""

    document_id: str
    reason: str


class Batch(NamedTuple):
    """Some documents (``DOCUMENT`` and the carried columns), and those that fell out among them."""

    documents: pa.Table
    rejects: list[Reject]

    def without(self, unwanted: NDArray[np.bool_], reason: str) -> "Batch":
        """The batch with some of its documents as rejects, for this reason."""
        if not unwanted.any():
            return self
        names = self.documents.filter(pa.array(unwanted)).column("document_id").to_pylist()
        kept = self.documents.filter(pa.array(~unwanted))
        return Batch(kept, [*self.rejects, *(Reject(name, reason) for name in names)])


class Documents:
    """The documents at a path: a file, a folder or a glob, on this machine or in s3://BUCKET/.

    Args:
        path: of Parquet (.parquet), JSON lines (.jsonl, .ndjson) or plain text (.txt, .md, .rst), the latter two also
            compressed (.gz, .zst). A plain text file is one document, named by its path below the folder or glob.
        columns: which columns hold what.

    Raises:
        UsageError: if there is nothing at that path, or no such column.
        DocumentsError: if a file there can't be read.
    """

    def __init__(self, path: str, columns: ColumnsConfig) -> None:
        self.path = path
        self._columns = columns
        self._source = find(path)
        known = self._source.schema()
        self._require_columns(known.names)
        self.carried: pa.Schema = pa.schema([_carried_field(known.field(name)) for name in columns.carry])
        """Names and types of the carried columns."""
        row_schema(self.carried)

    def batches(self) -> Iterator[Batch]:
        """All documents, always in the same order, some thousands or some tens of MB at a time.

        Raises:
            DocumentsError: if a file turns out to be damaged, or there is no document at all.
        """
        c = self._columns
        wanted = [c.id, *c.contents.values(), *([c.label] if c.label else []), *c.carry]
        seen = DigestSet()
        empty = True
        for piece in self._source.read(list(dict.fromkeys(wanted))):
            judged = self._judged(piece)
            twice = ~seen.add(digests(judged.documents.column("document_id").to_pylist()))
            batch = judged.without(twice, "another document has this id")
            empty = empty and not batch.documents.num_rows and not batch.rejects
            yield batch
        if empty:
            raise DocumentsError(
                "there are no documents", expected="at least one", found="files without a record", where=self.path
            )

    def _judged(self, piece: Piece) -> Batch:
        """The usable records as a table, the others as rejects."""
        c, values = self._columns, piece.values
        judge = _JUDGES[c.content]
        contents = zip(*(values[name] for name in c.contents.values()), strict=True)
        labels = values[c.label] if c.label else [None] * len(piece.places)
        carried, misfits = _carried(values, self.carried)
        rejects = [Reject(place, reason) for place, reason in piece.unreadable]
        rows, kept = [], []
        for i, (named, name, content, label) in enumerate(
            zip(piece.places, values[c.id], contents, labels, strict=True)
        ):
            try:
                named = _id(name)
                row = _document(named, judge(*content), _label(label))
                if i in misfits:
                    raise _UnfitError(misfits[i])
            except _UnfitError as unfit:
                rejects.append(Reject(named, str(unfit)))
                continue
            rows.append(row)
            kept.append(i)
        columns = zip(*rows, strict=True) if rows else [()] * len(DOCUMENT)
        arrays = [pa.array(column, f.type) for column, f in zip(columns, DOCUMENT, strict=True)]
        chosen = pa.array(kept, pa.int64())
        schema = pa.schema([*DOCUMENT, *self.carried])
        return Batch(pa.table(arrays + [column.take(chosen) for column in carried], schema=schema), rejects)

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
                    expected=f"{setting}: one of the columns there are",
                    found=", ".join(islice(found, 40)) or "no column",
                    where=self.path,
                    do=f"set {setting.partition('[')[0]} to the column's name",
                )


class _UnfitError(Exception):
    """Why a document can't be used."""


_MISFIT = (pa.ArrowException, OverflowError, UnicodeError)


def _carried_field(field: pa.Field) -> pa.Field:
    """The column as a table keeps it: without loss as one of the few types of ``storage.schema.row_schema``."""
    kind = field.type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind) or pa.types.is_null(kind):
        kind = pa.string()
    elif pa.types.is_integer(kind):
        kind = pa.int64()
    elif pa.types.is_floating(kind):
        kind = pa.float64()
    return pa.field(field.name, kind)


def _carried(values: dict[str, list[Any]], schema: pa.Schema) -> tuple[list[pa.Array], dict[int, str]]:
    """Carried columns as arrays, and by its number why a record has a value that does not fit."""
    columns: list[pa.Array] = []
    misfits: dict[int, str] = {}
    for field in schema:
        column = values[field.name]
        try:
            columns.append(pa.array(column, field.type))
        except _MISFIT:
            fitting = [_fits(value, field.type) for value in column]
            columns.append(pa.array([v if f else None for v, f in zip(column, fitting, strict=True)], field.type))
            reason = f"column {field.name!r} holds no {field.type} there"
            misfits |= {i: reason for i, fits in enumerate(fitting) if not fits}
    return columns, misfits


def _fits(value: Any, kind: pa.DataType) -> bool:
    try:
        pa.scalar(value, kind)
    except _MISFIT:
        return False
    return True


def _document(name: str, content: str, label: str | None) -> tuple[str, str, str | None, bytes]:
    """A row of ``DOCUMENT``."""
    return name, content, label, _fingerprint(content, label)


def _fingerprint(text: str, label: str | None) -> bytes:
    try:
        content = text.encode()
        suffix = b"" if label is None else b"\1" + label.encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair
        raise _UnfitError("the text is broken UTF-8") from None
    digest = blake2b(len(content).to_bytes(8, "little"), digest_size=16)
    digest.update(content)
    digest.update(suffix)
    return digest.digest()


def _string(value: Any, what: str) -> str:
    if value is None:
        raise _UnfitError(f"the {what} is null")
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise _UnfitError(f"the {what} is broken UTF-8 at byte {error.start}") from None
    if not isinstance(value, str):
        raise _UnfitError(f"the {what} is no string but {type(value).__name__}")
    return value


def _id(value: Any) -> str:
    text = str(value) if type(value) is int else _string(value, "id")
    if not text:
        raise _UnfitError("the id is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _UnfitError("the id is broken UTF-8") from None
    return text


def _text(value: Any) -> str:
    text = _string(value, "text")
    if not text.strip():
        raise _UnfitError("the text is empty")
    return text


def _label(value: Any) -> str | None:
    if value is None or type(value) in (int, bool):
        return None if value is None else str(value)
    return _string(value, "label")


def _chat(value: Any) -> str:
    """Messages, as JSON."""
    if isinstance(value, str | bytes):
        try:
            value = json.loads(value)
        except ValueError:
            raise _UnfitError("the chat is a string that is no JSON") from None
    return _json(_messages(value, "chat"))


def _completion(prompt: Any, completion: Any) -> str:
    """A prompt, which may be empty, and what follows it, as JSON: two texts, or the messages of one chat."""
    parts = {"prompt": prompt, "completion": completion}
    if isinstance(prompt, list) and isinstance(completion, list):
        return _json({what: _messages(value, what) for what, value in parts.items()})
    for what, value in parts.items():
        parts[what] = _string(value, what)
    if not parts["completion"].strip():
        raise _UnfitError("the completion is empty")
    return _json(parts)


_JUDGES: dict[str, Callable[..., str]] = {"text": _text, "chat": _chat, "completion": _completion}
"""What makes the content of a document of the values of its columns."""


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except TypeError as error:  # a struct of Parquet may hold a date, or bytes
        raise _UnfitError(f"a message holds what is no JSON: {error}") from None


def _messages(value: Any, what: str) -> list[dict[str, Any]]:
    """Messages with a role and a content each; keys that are null are left out: Parquet fills structs so."""
    if value is None or not isinstance(value, list):
        raise _UnfitError(f"the {what} is no list of messages but {'null' if value is None else type(value).__name__}")
    if not value:
        raise _UnfitError(f"the {what} has no message")
    return [_message(i, message) for i, message in enumerate(value)]


def _message(i: int, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _UnfitError(f"message {i} is no object")
    message = {key: field for key, field in value.items() if field is not None}
    if not isinstance(message.get("role"), str):
        raise _UnfitError(f"message {i} has no role")
    if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
        raise _UnfitError(f"message {i} has no text as content")
    return message
