"""Draws a weighted sample of the sequences that a capture would run its teacher over.

All documents are read, which is cheap, but only a few are tokenized, which is not. Each byte of the text has the same
chance to be sampled, whatever its position and the length of its document: of long texts only pieces are taken. Texts
that another document has too are recognized by their fingerprints and sampled separately, because a capture copies
their soft labels.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from softlabel.pipeline.capturing.job import CaptureJob
from softlabel.pipeline.capturing.plan import Known
from softlabel.pipeline.capturing.sequencer import Sequencer
from softlabel.pipeline.documents.documents import DocumentBatch, Documents
from softlabel.pipeline.progress import Progress, Watch
from softlabel.storage.errors import DocumentsError

_PIECE = 12
"""Characters per token in a piece of a long text: enough for a sequence of full length."""


@dataclass(frozen=True)
class Weighted:
    """Sequences, each standing for a number of sequences."""

    rows: pa.Table
    """R rows of ``storage.schema.SEQUENCE`` and the carried columns."""
    weights: NDArray[np.float64]
    """(R,) how many sequences each one stands for."""

    @property
    def tokens(self) -> NDArray[np.int64]:
        """(R,) length of each sequence."""
        tokens: NDArray[np.int64] = self.rows.column("tokens").to_numpy().astype(np.int64)
        return tokens

    def total(self, column: str | None = None) -> int:
        """How many sequences these stand for, or the weighted sum of a column."""
        values = self.rows.column(column).to_numpy() if column else np.ones_like(self.weights)
        return round(float(self.weights @ values))


@dataclass(frozen=True)
class Sample:
    """Sequences that stand for all sequences that the table lacks."""

    documents: int
    """Documents that can be read and are no obvious rejects."""
    pending: int
    """Those of them that the table does not hold completely."""
    reread: int
    """Others that are read again, because an older version of this program has captured them."""
    replacing: int
    """Sequences of these documents that replace others."""
    rejects: int
    """Documents that can't be used."""
    sequences: Weighted
    """Sequences for the teacher."""
    copies: Weighted
    """Sequences whose soft labels will be copied from another document."""
    share: float
    """Share of the pending text that was tokenized."""
    seconds: float
    """Time that a plan takes: reading all documents, and tokenizing the pending ones."""


def draw_sample(job: CaptureJob, documents: Documents, sequencer: Sequencer, budget: float, watch: Watch) -> Sample:
    """Read all documents, twice, and tokenize some of them.

    Args:
        job: the capture.
        documents: to sample from.
        sequencer: makes sequences of documents.
        budget: approximate number of bytes of text to tokenize.
        watch: called after each batch of documents.

    Raises:
        DocumentsError: if there is no usable document.
        ProvenanceError: if the existing table was made with another teacher or other settings.
    """
    started = time.perf_counter()
    known, config = Known(job, documents.carried), job.settings
    found = rejects = 0
    sizes, fingerprints, again = [np.zeros(0, np.int64)], [np.zeros(0, np.uint64)], [np.zeros(0, np.bool_)]
    for batch in known.permitted(documents):
        changed, outdated = _to_read(known, batch)
        again.append(outdated)
        found += batch.documents.num_rows
        rejects += len(batch.rejects)
        sizes.append(pc.binary_length(changed.column("content")).to_numpy().astype(np.int64))
        names = b"".join(value[:8] for value in changed.column("fingerprint").to_pylist())
        fingerprints.append(np.frombuffer(names, np.uint64))
        watch(Progress("read", found, None, "documents"))
    if not found:
        raise DocumentsError(
            "no document can be used",
            found=f"{rejects:,} documents that can't be used, and {known.taken_down:,} that were taken down",
            where=config.sources,
            do="check columns.id and columns.text (or .messages, .prompt, .completion); capture lists the reasons",
        )
    read, size, reread = time.perf_counter() - started, np.concatenate(sizes), np.concatenate(again)
    repeated = np.zeros(len(size), np.bool_)
    if job.kind.copies:
        repeated[:] = True
        repeated[np.unique(np.concatenate(fingerprints), return_index=True)[1]] = False
        repeated[reread] = False
    is_text = config.columns.content == "text" and job.kind.cuts
    piece = _PIECE * config.sequences.max_tokens if is_text else int(size.max(initial=1))
    whole = int(size.max(initial=1))  # the rows of a document that is read again are compared with those of the table
    parts = ((~repeated & ~reread, piece), (repeated, piece), (reread, whole))
    chosen = [_choose(np.where(part, size, 0), longest, budget) for part, longest in parts]
    choice = _Choice(*(np.sum(column, axis=0) for column in zip(*chosen, strict=True)))
    pieces, origins = _read_pieces(known, documents, choice, np.where(reread, whole, piece))
    started, sampled = time.perf_counter(), pc.sum(pc.binary_length(pieces.column("content"))).as_py() or 0
    sequences, _ = sequencer.sequences(pieces, eval_fraction=0)
    numbers, weights = _weights(sequences, origins, config.sequences.max_tokens)
    statuses = known.statuses(sequences).to_numpy(zero_copy_only=False)
    counted, is_copy = (statuses != "present") & (weights > 0), (statuses == "copy") | repeated[numbers]
    for_teacher, copies = (
        Weighted(sequences.filter(pa.array(part)), weights[part]) for part in (counted & ~is_copy, counted & is_copy)
    )
    return Sample(
        documents=found,
        pending=int((~reread).sum()),
        reread=int(reread.sum()),
        replacing=round(float(weights[counted & reread[numbers]].sum())),
        rejects=rejects,
        sequences=for_teacher,
        copies=copies,
        share=min(1.0, sampled / max(int(size.sum()), 1)),
        seconds=read + (time.perf_counter() - started) * int(size.sum()) / max(sampled, 1),
    )


def _to_read(known: Known, batch: DocumentBatch) -> tuple[pa.Table, NDArray[np.bool_]]:
    """The documents that a capture would tokenize, and which of them it would read again."""
    missing, outdated = known.outdated(batch.documents)
    return batch.documents.filter(pa.array(missing | outdated)), outdated[missing | outdated]


class _Origin(NamedTuple):
    """Where a piece of text is from."""

    document: int
    """Number of its document."""
    stands_for: float
    """How many pieces of its size it stands for."""
    is_part: bool
    """Whether it is only a part of the document's text."""


class _Choice(NamedTuple):
    """What is sampled of each document."""

    pieces: NDArray[np.int64]
    """Number of pieces; 0 for most documents."""
    bytes: NDArray[np.floating]
    """How many bytes of the whole text these pieces stand for."""


def _choose(sizes: NDArray[np.int64], piece: int, budget: float) -> _Choice:
    """Choose pieces at equal distances along all text, with the documents ordered by size to represent every size."""
    total = int(sizes.sum())
    if total <= budget:
        return _Choice(-(-sizes // piece), sizes.astype(np.float64))
    typical = (sizes * np.minimum(sizes, piece)).sum(dtype=np.float64) / total  # size of a piece around a random byte
    points = max(1, int(budget / typical))
    order = np.argsort(sizes, kind="stable")
    places = (np.arange(points) + 0.5) * (total / points)
    hits = np.zeros_like(sizes)
    hits[order] = np.bincount(np.searchsorted(np.cumsum(sizes[order]), places, side="right"), minlength=len(sizes))
    return _Choice(hits, hits * (total / points))


def _read_pieces(
    known: Known, documents: Documents, choice: _Choice, longest: NDArray[np.int64]
) -> tuple[pa.Table, dict[bytes, _Origin]]:
    """The pieces as documents, each with a fingerprint of its own, and the origin of each piece by fingerprint."""
    tables: list[pa.Table] = []
    origins: dict[bytes, _Origin] = {}
    start = 0
    for batch in known.permitted(documents):
        changed, _ = _to_read(known, batch)
        wanted = np.flatnonzero(choice.pieces[start : start + len(changed)])
        rows = changed.take(pa.array(wanted))
        parts: list[tuple[int, str, bytes]] = []
        for row, (number, content) in enumerate(zip(start + wanted, rows.column("content").to_pylist(), strict=True)):
            cut = _cut(content, int(choice.pieces[number]), int(longest[number]))
            for i, text in enumerate(cut):
                name = blake2b(b"%d %d" % (number, i), digest_size=16).digest()
                count = choice.bytes[number] / len(cut) / len(text.encode())
                origins[name] = _Origin(int(number), count, len(text) < len(content))
                parts.append((row, text, name))
        start += len(changed)
        sources, contents, names = zip(*parts, strict=True) if parts else ((), (), ())
        rows = rows.take(pa.array(sources, pa.int64()))
        tables.append(_with(_with(rows, "content", contents), "fingerprint", names))
    return pa.concat_tables(tables), origins


def _weights(
    sequences: pa.Table, origins: dict[bytes, _Origin], max_tokens: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(R,) number of each sequence's document, and (R,) how many sequences each stands for.

    The last sequence of a piece is cut short where the text goes on: it gets weight 0, and the others stand for it too.
    """
    if not len(sequences):
        return np.zeros(0, np.int64), np.zeros(0)
    names, which = np.unique(np.array(sequences.column("fingerprint").to_pylist(), "V16"), return_inverse=True)
    numbers, counts, parts = map(np.array, zip(*(origins[name.tobytes()] for name in names), strict=True))
    tokens = sequences.column("tokens").to_numpy().astype(np.float64)
    whole = tokens == max_tokens
    kept = whole | ~(parts & (np.bincount(which, whole) > 0))[which]
    share = np.bincount(which, tokens * kept) / np.bincount(which, tokens)
    return numbers[which], (counts / share)[which] * kept


def _cut(text: str, pieces: int, size: int) -> list[str]:
    """This many pieces of the text at equal distances, or the whole text if they would cover it."""
    if pieces * size >= len(text):
        return [text]
    starts = ((2 * i + 1) * (len(text) - size) // (2 * pieces) for i in range(pieces))
    return [text[start : start + size] for start in starts]


def _with(rows: pa.Table, name: str, values: Sequence[object]) -> pa.Table:
    """The rows with new values in one column."""
    field = rows.schema.field(name)
    return rows.set_column(rows.schema.get_field_index(name), field, pa.array(values, field.type))
