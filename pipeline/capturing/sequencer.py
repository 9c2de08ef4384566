"""Make the sequences of a capture from its documents, for a language model or a classifier."""

import pyarrow as pa

from softlabel.pipeline.capturing.identity import identify
from softlabel.pipeline.capturing.job import CaptureJob
from softlabel.pipeline.capturing.match import require_match
from softlabel.pipeline.documents.documents import Reject
from softlabel.pipeline.sequences.chunking import row_schema_of
from softlabel.pipeline.teachers.kind import SequencesOfDocuments
from softlabel.storage.table import Table


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
        self._reader: SequencesOfDocuments | None = None if job.presumed else self._load()

    @property
    def truncated(self) -> int:
        """Number of documents truncated so far to the longest sequence that a classifier reads."""
        return 0 if self._reader is None else self._reader.truncated

    @property
    def answers(self) -> int:
        """Number of answers in chats so far; see ``DocumentTokenizer``."""
        return 0 if self._reader is None else self._reader.answers

    @property
    def partial_answers(self) -> int:
        """Number of these that the chat template does not write whole."""
        return 0 if self._reader is None else self._reader.partial_answers

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
        if self._reader is None:
            self._reader = self._load()
            settings = self._job.settings
            require_match(Table.open(self._job.table), identify(settings, self._job.checkpoint), settings)
        return self._reader.sequences(documents, eval_fraction)

    def _load(self) -> SequencesOfDocuments:
        settings = self._job.settings
        return self._job.kind.reader(self._job.checkpoint, settings.sequences, settings.columns.content)
