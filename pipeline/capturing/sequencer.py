"""Make the sequences of a capture from its documents, for a language model or a classifier."""

from collections.abc import Callable

import pyarrow as pa

from softlabel.pipeline.capturing.identity import identify, presumed
from softlabel.pipeline.config.capture import CaptureConfig
from softlabel.pipeline.documents.documents import Reject
from softlabel.pipeline.models.checkpoint import Checkpoint
from softlabel.pipeline.sequences.chunking import row_schema_of, to_sequences
from softlabel.pipeline.sequences.tokenizer import DocumentTokenizer
from softlabel.pipeline.sequences.whole_documents import WholeDocuments
from softlabel.storage.errors import UsageError
from softlabel.storage.identity import Identity
from softlabel.storage.table import Table

_Cut = Callable[[pa.Table, float], tuple[pa.Table, list[Reject]]]


class Sequencer:
    """Makes sequences of documents, as the teacher reads them.

    If the teacher's files are the ones that made the table, the tokenizer is loaded only for the first document.

    Args:
        config: settings of the capture.
        checkpoint: the teacher's files.
        table: the table to add to, if it exists.

    Raises:
        ProvenanceError: if the table was made with another teacher or other settings.
        TeacherError: if the teacher's files can't be used.
        UsageError: if the settings contradict the teacher.
    """

    def __init__(self, config: CaptureConfig, checkpoint: Checkpoint, table: Table | None = None) -> None:
        self._config, self._checkpoint, self._table = config, checkpoint, table
        self._whole: WholeDocuments | None = None
        self._cut: _Cut | None = None
        known = None if table is None else presumed(config, checkpoint, table.identity)
        if known is None:
            self._cut = self._load()
        self.identity: Identity = known or identify(config, checkpoint)
        """Identity of a table with these sequences."""
        self._require(self.identity)
        if self.identity.classes is not None:
            _require_text_and_labels(config, checkpoint)

    @property
    def truncated(self) -> int:
        """Number of documents truncated so far to the longest sequence that a classifier reads."""
        return 0 if self._whole is None else self._whole.truncated

    def sequences(self, documents: pa.Table, eval_fraction: float) -> tuple[pa.Table, list[Reject]]:
        """Rows of ``storage.schema.SEQUENCE`` and the carried columns, and rejects for documents without a row.

        Args:
            documents: rows of ``documents.DOCUMENT`` and any carried columns.
            eval_fraction: share of the documents that goes to the eval split, by a hash of their ids.

        Raises:
            ProvenanceError: if the tokenizer, once loaded, turns out not to be the one that made the table.
        """
        if not documents.num_rows:
            return row_schema_of(documents).empty_table(), []
        if self._cut is None:
            self._cut = self._load()
            self._require(identify(self._config, self._checkpoint))
        return self._cut(documents, eval_fraction)

    def _require(self, identity: Identity) -> None:
        if self._table is not None:
            self._table.identity.require(identity, self._config.table)

    def _load(self) -> _Cut:
        config, checkpoint = self._config, self._checkpoint
        if checkpoint.classes is not None:
            self._whole = WholeDocuments(checkpoint, config.sequences)
            return self._whole.sequences
        tokenizer = DocumentTokenizer(checkpoint, config.sequences, config.columns.content)
        return lambda documents, fraction: to_sequences(documents, tokenizer, config.sequences, fraction)


def _require_text_and_labels(config: CaptureConfig, checkpoint: Checkpoint) -> None:
    """Refuse documents for a classifier that are not plain text, or that need labels and have none."""
    if config.columns.content != "text":
        raise UsageError(
            "a classifier reads only plain text, not chats or prompts",
            expected="columns.text",
            found=", ".join(f"columns.{setting}: {name}" for setting, name in config.columns.contents.items()),
            where=checkpoint.folder,
            do="put the whole text of each document into one column, and name it in columns.text "
            "(without columns.messages, prompt and completion)",
        )
    if checkpoint.labels and config.columns.label is None:
        raise UsageError(
            "teacher.labels stores the documents' own labels, but no column for them is given",
            expected="columns.label as well as teacher.labels",
            found=f"teacher.labels: {' '.join(checkpoint.labels)}",
            do="set columns.label to the column that holds the labels",
        )
