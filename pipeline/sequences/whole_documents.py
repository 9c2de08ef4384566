"""Sequences for a classifier: one per document, truncated if necessary, with one distribution over the classes.

All classes are kept, so no selection is needed and any temperature is possible.
``pipeline.teachers.classifier_teacher`` runs the classifier.
"""

from collections.abc import Sequence
from itertools import chain

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from tokenizers import Tokenizer

from softlabel.pipeline.config.capture import SequencesConfig
from softlabel.pipeline.documents.documents import Reject
from softlabel.pipeline.models.checkpoint import Checkpoint
from softlabel.pipeline.models.context_length import longest_document
from softlabel.pipeline.sequences.chunking import Chunks, parts, row_schema_of, to_rows

MASK = "document"
"""Name of the rule that marks only the last token of a sequence, whose distribution is for the whole sequence."""


class WholeDocuments:
    """Makes one sequence of each document, with the special tokens that the classifier's tokenizer adds.

    Args:
        checkpoint: the classifier's files.
        settings: the maximum length; the classifier's own limit also applies.
    """

    answers = partial_answers = 0

    def __init__(self, checkpoint: Checkpoint, settings: SequencesConfig) -> None:
        self._labels, self._rows = checkpoint.labels, checkpoint.padded_vocabulary
        self._backend = Tokenizer.from_str(checkpoint.tokenizer.backend_tokenizer.to_str())
        self._backend.no_padding()
        self._backend.encode_special_tokens = settings.special_tokens == "text"
        self._backend.enable_truncation(longest_document(checkpoint, settings))
        self.truncated = 0
        """Number of documents truncated so far."""

    def sequences(self, documents: pa.Table, eval_fraction: float) -> tuple[pa.Table, list[Reject]]:
        """Rows of ``storage.schema.SEQUENCE`` and the carried columns, and rejects for documents without a row.

        Args:
            documents: rows of ``documents.DOCUMENT`` and any carried columns.
            eval_fraction: share of the documents that goes to the eval split, by a hash of their ids.
        """
        tables, rejects = [row_schema_of(documents).empty_table()], list[Reject]()
        for part in parts(documents):
            rows, refused = self._part(part, eval_fraction)
            tables.append(rows)
            rejects += refused
        return pa.concat_tables(tables), rejects

    def _part(self, documents: pa.Table, eval_fraction: float) -> tuple[pa.Table, list[Reject]]:
        names, labels = (documents.column(name).to_pylist() for name in ("document_id", "label"))
        encodings = self._backend.encode_batch(documents.column("content").to_pylist())
        reasons = [
            "it has no tokens"
            if not encoding.ids
            else f"the teacher has no embedding for the token id {max(encoding.ids)} (there are {self._rows} rows)"
            if max(encoding.ids) >= self._rows
            else "it has no label"
            if self._labels and label is None
            else f"its label is {label!r}, which is not in teacher.labels"
            if self._labels and label not in self._labels
            else None
            for encoding, label in zip(encodings, labels, strict=True)
        ]
        usable = [i for i, reason in enumerate(reasons) if reason is None]
        self.truncated += sum(bool(encodings[i].overflowing) for i in usable)
        lengths = np.array([len(encodings[i].ids) for i in usable], np.int64)
        offsets = np.append(0, np.cumsum(lengths))
        mask = np.zeros(int(offsets[-1]), bool)
        mask[offsets[1:] - 1] = True
        ids = np.fromiter(chain.from_iterable(encodings[i].ids for i in usable), np.int32, len(mask))
        one = np.ones(len(usable), np.int64)
        chunks = Chunks(ids, mask, offsets, np.array(usable, np.int64), one - 1, one)
        rows = to_rows(documents, chunks, eval_fraction, row_schema_of(documents))
        return rows, [Reject(name, reason) for name, reason in zip(names, reasons, strict=True) if reason]


def class_ids(labels: Sequence[str | None], classes: Sequence[str]) -> NDArray[np.int64]:
    """(N,) id of each document's class; -1 for a document without a label, or whose label is not a class."""
    ids = {name: index for index, name in enumerate(classes)}
    return np.array([-1 if label is None else ids.get(label, -1) for label in labels], np.int64)
