"""A sample of the sequences that a capture would run its teacher over, each with how many it stands for.

All documents are read, which is cheap, and a few of them tokenised, which is not. Each byte of the text has the same
chance to be looked at, wherever it stands and however long its document is: of long texts only pieces are taken.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.config import CaptureConfig
from pipeline.documents import Documents
from pipeline.planning import Known
from pipeline.progress import Progress, Watch
from storage.errors import DocumentsError
from storage.provenance import Identity

_PIECE = 12
"""Characters of a piece of a long text, for each token of a sequence: enough for one that is as long as can be."""

Sequencer = Callable[[pa.Table], pa.Table]


@dataclass(frozen=True)
class Sample:
    """Sequences that stand for all that are pending."""

    documents: int
    """Documents that were found and are no obvious rejects ..."""
    pending: int
    """... those of them that the table does not hold whole ..."""
    rejects: int
    """... and the others."""
    sequences: pa.Table
    """Rows of ``storage.schema.SEQUENCE`` and the carried columns."""
    weights: NDArray[np.float64]
    """(R,) how many of the pending sequences each stands for."""
    share: float
    """Of the pending text, that was tokenised."""
    seconds: float
    """That a plan takes: reading all documents, and tokenising those that are pending."""

    @property
    def tokens(self) -> NDArray[np.int64]:
        """(R,) of each sequence."""
        tokens: NDArray[np.int64] = self.sequences.column("tokens").to_numpy().astype(np.int64)
        return tokens

    def total(self, column: str | None = None) -> int:
        """How many sequences are pending, or what a column of theirs sums up to."""
        values = self.sequences.column(column).to_numpy() if column else np.ones_like(self.weights)
        return round(float(self.weights @ values))


def draw_sample(
    config: CaptureConfig, documents: Documents, cut: Sequencer, identity: Identity, budget: float, watch: Watch
) -> Sample:
    """Read all documents, twice, and tokenise some of them.

    Args:
        config: of the capture.
        documents: its documents.
        cut: makes sequences of some documents.
        identity: of its table.
        budget: bytes of text to tokenise, about.
        watch: told of each batch of documents.

    Raises:
        DocumentsError: if there is no usable document.
        ProvenanceError: if the table that is there was made otherwise.
    """
    started = time.perf_counter()
    known = Known(config, identity, documents.carried)
    found = rejects = 0
    sizes, fingerprints = [np.zeros(0, np.int64)], [np.zeros(0, np.uint64)]
    for batch in known.welcome(documents):
        changed = known.changed(batch.documents)
        found += batch.documents.num_rows
        rejects += len(batch.rejects)
        sizes.append(pc.binary_length(changed.column("content")).to_numpy().astype(np.int64))
        names = b"".join(value[:8] for value in changed.column("fingerprint").to_pylist())
        fingerprints.append(np.frombuffer(names, np.uint64))
        watch(Progress("read", found, None, "documents"))
    if not found:
        raise DocumentsError("no document can be used", found=f"{rejects} that can't", where=config.documents)
    read, size = time.perf_counter() - started, np.concatenate(sizes)
    repeated = np.ones(len(size), np.bool_)
    repeated[np.unique(np.concatenate(fingerprints), return_index=True)[1]] = False
    is_text = config.columns.content == "text" and identity.classes is None
    piece = _PIECE * config.sequences.max_tokens if is_text else int(size.max(initial=1))
    choice = _choose(np.where(repeated, 0, size), piece, budget)
    pieces, weights = _read_pieces(known, documents, choice, piece)
    started, sampled = time.perf_counter(), pc.sum(pc.binary_length(pieces.column("content"))).as_py() or 0
    sequences = cut(pieces)
    sequences, counts = _weighted(sequences.filter(pc.equal(known.fates(sequences), "pending")), weights, config)
    unique = int(size[~repeated].sum())
    return Sample(
        documents=found,
        pending=len(size),
        rejects=rejects,
        sequences=sequences,
        weights=counts,
        share=min(1.0, sampled / max(unique, 1)),
        seconds=read + (time.perf_counter() - started) * int(size.sum()) / max(sampled, 1),
    )


_Weights = dict[bytes, tuple[float, bool]]


class _Choice(NamedTuple):
    """What is looked at, document by document."""

    pieces: NDArray[np.int64]
    """How many; 0 of most."""
    bytes: NDArray[np.floating]
    """For how many bytes of the whole text they stand."""


def _choose(sizes: NDArray[np.int64], piece: int, budget: float) -> _Choice:
    """Pieces at equal distances along the text, its documents laid out by size, so that every size has its share."""
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


def _read_pieces(known: Known, documents: Documents, choice: _Choice, piece: int) -> tuple[pa.Table, _Weights]:
    """The pieces, as documents; and by its fingerprint how many of itself each stands for, and if it is a part."""
    tables: list[pa.Table] = []
    weights: _Weights = {}
    start = 0
    for batch in known.welcome(documents):
        changed = known.changed(batch.documents)
        wanted = np.flatnonzero(choice.pieces[start : start + len(changed)])
        rows = changed.take(pa.array(wanted))
        contents, names = (rows.column(name).to_pylist() for name in ("content", "fingerprint"))
        parts: list[tuple[int, str, bytes]] = []
        for row, number in enumerate(start + wanted):
            cut = _cut(contents[row], int(choice.pieces[number]), piece)
            for i, text in enumerate(cut):
                # A piece is told from the others by its fingerprint; a whole document keeps its own.
                name = names[row] if len(cut) == 1 else blake2b(names[row] + b"%d" % i, digest_size=16).digest()
                weights[name] = choice.bytes[number] / len(cut) / len(text.encode()), len(text) < len(contents[row])
                parts.append((row, text, name))
        start += len(changed)
        sources, contents, names = zip(*parts, strict=True) if parts else ((), (), ())
        rows = rows.take(pa.array(sources, pa.int64()))
        tables.append(_with(_with(rows, "content", contents), "fingerprint", names))
    return pa.concat_tables(tables), weights


def _weighted(sequences: pa.Table, weights: _Weights, config: CaptureConfig) -> tuple[pa.Table, NDArray[np.float64]]:
    """The sequences that count, and how many each stands for.

    Where a text was cut, its last sequence is shorter than any in the text is: the others stand for it too.
    """
    if not len(sequences):
        return sequences, np.zeros(0)
    names, which = np.unique(np.array(sequences.column("fingerprint").to_pylist(), "V16"), return_inverse=True)
    counts, parts = (np.array(column) for column in zip(*(weights[name.tobytes()] for name in names), strict=True))
    tokens = sequences.column("tokens").to_numpy().astype(np.float64)
    whole = tokens == config.sequences.max_tokens
    kept = whole | ~(parts & (np.bincount(which, whole) > 0))[which]
    share = np.bincount(which, tokens * kept) / np.bincount(which, tokens)
    return sequences.filter(pa.array(kept)), (counts / share)[which][kept]


def _cut(text: str, pieces: int, size: int) -> list[str]:
    """So many pieces at equal distances, or the whole if they would cover it."""
    if pieces * size >= len(text):
        return [text]
    starts = ((2 * i + 1) * (len(text) - size) // (2 * pieces) for i in range(pieces))
    return [text[start : start + size] for start in starts]


def _with(rows: pa.Table, name: str, values: Sequence[object]) -> pa.Table:
    """The rows with other values in one column."""
    field = rows.schema.field(name)
    return rows.set_column(rows.schema.get_field_index(name), field, pa.array(values, field.type))
