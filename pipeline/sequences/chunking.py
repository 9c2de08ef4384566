"""Cut documents into sequences: token ids, which of them are captured, and a key that identifies both.

A sequence depends only on its own document: not on other documents, their order or the carried columns. This needs the
teacher's tokenizer, but not the teacher.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from softlabel.pipeline.config.capture import Content, SequencesConfig
from softlabel.pipeline.documents.documents import DOCUMENT, Reject
from softlabel.pipeline.models.checkpoint import Checkpoint
from softlabel.pipeline.sequences.tokenizer import DocumentTokenizer, Encoded
from softlabel.storage.schema import SEQUENCE

_CHARACTERS = 4 << 20
"""Characters tokenized at a time; the tokenizer's output takes about a hundred times as many bytes."""


class ChunkedDocuments:
    """Makes sequences of documents for a language model, as ``to_sequences`` does.

    Args:
        checkpoint: the teacher's files.
        settings: length and overlap of the chunks, and how documents are turned into tokens.
        content: kind of the documents' content.
    """

    truncated = 0

    def __init__(self, checkpoint: Checkpoint, settings: SequencesConfig, content: Content) -> None:
        self._tokenizer, self._settings = DocumentTokenizer(checkpoint, settings, content), settings

    @property
    def answers(self) -> int:
        """Number of answers in chats so far; see ``DocumentTokenizer``."""
        return self._tokenizer.answers

    @property
    def partial_answers(self) -> int:
        """Number of these that the chat template does not write whole."""
        return self._tokenizer.partial_answers

    def sequences(self, documents: pa.Table, eval_fraction: float) -> tuple[pa.Table, list[Reject]]:
        """See ``to_sequences``."""
        return to_sequences(documents, self._tokenizer, self._settings, eval_fraction)


def to_sequences(
    documents: pa.Table, tokenizer: DocumentTokenizer, settings: SequencesConfig, eval_fraction: float
) -> tuple[pa.Table, list[Reject]]:
    """The sequences of documents.

    A document longer than ``max_tokens`` is cut into chunks. Each chunk begins with the tokenizer's prefix and repeats
    ``context`` tokens of the previous chunk, so every token but the first is predicted exactly once, from text of its
    own row. A chunk without tokens to predict (such as a long question in a chat) is left out.

    Args:
        documents: rows of ``documents.DOCUMENT`` and any carried columns.
        tokenizer: the teacher's tokenizer.
        settings: length and overlap of the chunks.
        eval_fraction: share of the documents that goes to the eval split, by a hash of their ids.

    Returns:
        Rows of ``storage.schema.SEQUENCE`` and the carried columns, in the documents' order; and rejects for documents
        without any row.
    """
    schema = row_schema_of(documents)
    tables, rejects = [schema.empty_table()], []
    for part in parts(documents):
        encoded, refused = tokenizer.encode(part.column("content").to_pylist())
        chunks = cut(encoded, tokenizer.prefix, settings.max_tokens, settings.context)
        tables.append(to_rows(part, chunks, eval_fraction, schema))
        names = part.column("document_id")
        without = sorted(set(range(part.num_rows)) - set(chunks.documents.tolist()))
        rejects += [Reject(names[i].as_py(), refused.get(i, "it has no token that can be predicted")) for i in without]
    return pa.concat_tables(tables), rejects


@dataclass(frozen=True)
class Chunks:
    """Sequences of some documents, concatenated."""

    ids: NDArray[np.int32]
    mask: NDArray[np.bool_]
    """Which tokens are captured: those that are wanted and can be predicted from the position before them."""
    offsets: NDArray[np.int64]
    """Where each sequence begins in ids, and the total length."""
    documents: NDArray[np.int64]
    """Index of each sequence's document."""
    chunk: NDArray[np.int64]
    """Index of each sequence within its document ..."""
    chunks: NDArray[np.int64]
    """... and the number of sequences of that document."""


def cut(encoded: Encoded, prefix: NDArray[np.int32], max_tokens: int, context: int) -> Chunks:
    """Cut documents into sequences of at most ``max_tokens``; each repeats ``context`` tokens of the previous one."""
    lead = np.where(encoded.begins, len(prefix), 0)
    room = max_tokens - lead
    counts = 1 + np.maximum(0, -(-(encoded.lengths - room) // (room - context)))
    document = np.repeat(np.arange(len(counts)), counts)
    number = _within_groups(counts)
    start = number * (room - context)[document]
    lengths = lead[document] + np.minimum(room[document], encoded.lengths[document] - start)
    place = _within_groups(lengths)  # of each token in its sequence
    row = np.repeat(np.arange(len(lengths)), lengths)
    inside = place - lead[document][row]  # below 0: the prefix
    first = np.where(number == 0, np.maximum(lead[document], 1), lead[document] + context)
    source = (np.cumsum(encoded.lengths) - encoded.lengths)[document][row] + start[row] + np.maximum(inside, 0)
    leading = np.append(prefix, 0)[np.minimum(place, len(prefix))]
    ids = np.where(inside < 0, leading, np.append(encoded.ids, 0)[source])  # 0: a document may have no token
    mask = (place >= first[row]) & np.append(encoded.wanted, False)[source]
    captured = np.bincount(row, mask, len(lengths)) > 0
    counts = np.bincount(document[captured], minlength=len(counts))
    return Chunks(
        ids[captured[row]].astype(np.int32),
        mask[captured[row]],
        np.append(0, np.cumsum(lengths[captured])),
        document[captured],
        _within_groups(counts),
        counts[document[captured]],
    )


def row_schema_of(documents: pa.Table) -> pa.Schema:
    """``storage.schema.SEQUENCE`` and the columns that these documents carry."""
    return pa.schema([*SEQUENCE, *documents.select(documents.schema.names[len(DOCUMENT) :]).schema])


def split_of(document_id: str, eval_fraction: float) -> str:
    """The split of a document, which depends only on its id and the fraction."""
    digest = hashlib.blake2b(document_id.encode(), digest_size=8, person=b"softlabel split").digest()
    return "eval" if int.from_bytes(digest, "little") < eval_fraction * 2**64 else "train"


def to_rows(documents: pa.Table, chunks: Chunks, eval_fraction: float, schema: pa.Schema) -> pa.Table:
    """Rows of ``schema``: ``storage.schema.SEQUENCE`` and the documents' carried columns."""
    ids, mask, offsets = chunks.ids.astype("<i4"), chunks.mask, chunks.offsets
    bounds = list(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True))
    keys = [hashlib.blake2b(ids[a:b].tobytes() + mask[a:b].tobytes(), digest_size=16).digest() for a, b in bounds]
    splits = [split_of(name, eval_fraction) for name in documents.column("document_id").to_pylist()]
    offset32 = pa.array(offsets.astype(np.int32))
    own = {
        "key": pa.array(keys, pa.binary()),
        "chunk": pa.array(chunks.chunk.astype(np.int32)),
        "chunks": pa.array(chunks.chunks.astype(np.int32)),
        "token_ids": pa.ListArray.from_arrays(offset32, pa.array(chunks.ids)),
        "loss_mask": pa.ListArray.from_arrays(offset32, pa.array(mask)),
        "tokens": pa.array(np.diff(offsets).astype(np.int32)),
        "positions": pa.array(np.diff(np.append(0, np.cumsum(mask))[offsets]).astype(np.int32)),
    }
    # Without the contents: each chunk of a long document would get a copy of the whole document.
    wanted = documents.append_column("split", pa.array(splits, pa.string())).select(
        [name for name in schema.names if name not in own]
    )
    per_document = wanted.take(pa.array(chunks.documents))
    columns = [own[name] if name in own else per_document.column(name) for name in schema.names]
    return pa.table(columns, schema=schema)


def parts(documents: pa.Table) -> Iterator[pa.Table]:
    """Slices to tokenize at once: at most ``_CHARACTERS``, or a single longer document."""
    sizes = pc.utf8_length(documents.column("content")).to_numpy()
    start, held = 0, 0
    for i, size in enumerate(sizes.tolist()):
        if held and held + size > _CHARACTERS:
            yield documents.slice(start, i - start)
            start, held = i, 0
        held += size
    if start < documents.num_rows:
        yield documents.slice(start)


def _within_groups(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """0, 1, ... within each group, for groups of these sizes."""
    return np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
