"""Make the sequences of a capture from its documents, for a language model or a classifier."""

from collections.abc import Callable

import pyarrow as pa

from softlabel.pipeline.capturing.identity import identify
from softlabel.pipeline.capturing.job import CaptureJob
from softlabel.pipeline.capturing.match import require_match
from softlabel.pipeline.documents.documents import Reject
from softlabel.pipeline.sequences.chunking import row_schema_of, to_sequences
from softlabel.pipeline.sequences.tokenizer import DocumentTokenizer
from softlabel.pipeline.sequences.whole_documents import WholeDocuments
from softlabel.storage.table import Table

_Cut = Callable[[pa.Table, float], tuple[pa.Table, list[Reject]]]


class Sequencer:
    """Makes sequences of documents, as the teacher reads them.

    If the job's identity is presumed, the tokenizer is loaded only for the first document.

    Args:
        job: the capture.

    Raises:
        TeacherError: if the teacher's files can't be used.
        UsageError: if the settings contradict the teacher.
    """

    def __init__(self, job: CaptureJob) -> None:
        self._job = job
        self._whole: WholeDocuments | None = None
        self._tokenizer: DocumentTokenizer | None = None
        self._cut: _Cut | None = None if job.presumed else self._load()

    @property
    def truncated(self) -> int:
        """Number of documents truncated so far to the longest sequence that a classifier reads."""
        return 0 if self._whole is None else self._whole.truncated

    @property
    def answers(self) -> int:
        """Number of answers in chats so far; see ``DocumentTokenizer``."""
        return 0 if self._tokenizer is None else self._tokenizer.answers

    @property
    def partial_answers(self) -> int:
        """Number of these that the chat template does not write whole."""
        return 0 if self._tokenizer is None else self._tokenizer.partial_answers

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, special tokens included."""
        backend = self._job.checkpoint.tokenizer.backend_tokenizer
        return str(backend.decode(ids, skip_special_tokens=False))

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
            settings = self._job.settings
            require_match(Table.open(self._job.table), identify(settings, self._job.checkpoint), settings)
        return self._cut(documents, eval_fraction)

    def _load(self) -> _Cut:
        settings, checkpoint = self._job.settings, self._job.checkpoint
        if self._job.identity.classes is not None:
            self._whole = WholeDocuments(checkpoint, settings.sequences)
            return self._whole.sequences
        self._tokenizer = tokenizer = DocumentTokenizer(checkpoint, settings.sequences, settings.columns.content)
        return lambda documents, fraction: to_sequences(documents, tokenizer, settings.sequences, fraction)
