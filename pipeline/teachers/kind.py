"""What differs between capturing a language model and capturing a classifier.

``Kind`` is the protocol, with one implementation for each; ``kind_of`` chooses between the two. Nothing else that
captures or maintains tables asks for the kind of a teacher. Neither torch nor transformers is loaded for it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from softlabel.pipeline.config.capture import CaptureConfig, Content, SelectionConfig, SequencesConfig
from softlabel.pipeline.documents.documents import Reject
from softlabel.pipeline.models.checkpoint import Checkpoint
from softlabel.pipeline.models.context_length import longest_document, require_positions, require_trained_positions
from softlabel.pipeline.selection.selection import Selection
from softlabel.pipeline.sequences.chunking import ChunkedDocuments
from softlabel.pipeline.sequences.tokenizer import mask_rule
from softlabel.pipeline.sequences.whole_documents import MASK, WholeDocuments, class_ids
from softlabel.storage.errors import UsageError
from softlabel.storage.identity import Identity


class SequencesOfDocuments(Protocol):
    """Makes sequences of documents, and counts what a user should hear of."""

    @property
    def truncated(self) -> int:
        """Number of documents truncated so far to the longest sequence that a classifier reads."""

    @property
    def answers(self) -> int:
        """Number of answers in chats so far; see ``DocumentTokenizer``."""

    @property
    def partial_answers(self) -> int:
        """Number of these that the chat template does not write whole."""

    def sequences(self, documents: pa.Table, eval_fraction: float) -> tuple[pa.Table, list[Reject]]:
        """Rows of ``storage.schema.SEQUENCE`` and the carried columns, and rejects for documents without a row.

        Args:
            documents: rows of ``documents.DOCUMENT`` and any carried columns.
            eval_fraction: share of the documents that goes to the eval split, by a hash of their ids.
        """


class Kind(Protocol):
    """How a teacher of one kind reads documents, and what is stored of its distributions."""

    @property
    def engine(self) -> str:
        """The class that runs such a teacher unless the settings name another, as in ``teacher.engine``."""

    @property
    def causal(self) -> bool:
        """Whether a distribution may depend only on the tokens before its position."""

    @property
    def cuts(self) -> bool:
        """Whether long texts are cut into several sequences, so that a piece of a text is read as all of it is."""

    @property
    def copies(self) -> bool:
        """Whether soft labels may be copied to the same sequence of another document."""

    def require_documents(self, settings: CaptureConfig, teacher: Path) -> None:
        """Refuse documents that such a teacher can't read.

        Args:
            settings: the complete settings of the capture.
            teacher: the teacher's folder.

        Raises:
            UsageError: if there are any.
        """

    def can_presume(self, table: Identity, checkpoint: Checkpoint, settings: SequencesConfig) -> bool:
        """Whether what a table of this kind says about its teacher holds for a capture; see ``capturing.identity``."""

    def selection(self, config: SelectionConfig) -> Selection:
        """What is stored of each distribution.

        Raises:
            UsageError: if the settings don't apply to such a teacher.
        """

    def compared(self, requested: Selection, alternatives: Mapping[str, SelectionConfig]) -> dict[str, Selection]:
        """The requested selection by name, and the alternatives to it that this kind has, at the same temperatures."""

    def require_narrowing(self, wanted: Mapping[str, object], table: str) -> None:
        """Refuse to store less of the distributions of a table.

        Args:
            wanted: the selection settings that are given.
            table: location and version of the table.

        Raises:
            UsageError: if all of each distribution has to stay.
        """

    def vocabulary(self, checkpoint: Checkpoint) -> int:
        """Number of token ids, or of classes, that a distribution is over."""

    def longest(self, checkpoint: Checkpoint, settings: SequencesConfig) -> int:
        """Tokens of the longest sequence, with special tokens.

        Raises:
            UsageError: if the teacher can't read sequences of ``max_tokens``, and documents are not truncated.
        """

    def require_trained_positions(self, checkpoint: Checkpoint, settings: SequencesConfig, is_new: bool) -> None:
        """Refuse sequences that are longer than the teacher is meant for; for a table that exists, only warn.

        Raises:
            UsageError: if they are, and the table is new.
        """

    def context(self, settings: SequencesConfig) -> int:
        """Tokens that a sequence repeats of the one before it."""

    def mask(self, settings: SequencesConfig, content: Content) -> str:
        """Name of the rule that marks the positions that are captured."""

    def reader(self, checkpoint: Checkpoint, settings: SequencesConfig, content: Content) -> SequencesOfDocuments:
        """Makes the sequences of documents with this content; loads the tokenizer.

        Raises:
            TeacherError: if the teacher's files can't be used.
            UsageError: if the settings contradict the teacher.
        """

    def next_ids(self, rows: pa.Table, batch: NDArray[np.int64]) -> NDArray[np.integer[Any]]:
        """(P,) what the documents actually have at the captured positions of some rows, one row after the other.

        These are tokens or classes; -1 where a document's class is not known.

        Args:
            rows: with the columns token_ids and loss_mask, and label for a classifier.
            batch: numbers of the rows.
        """


class LanguageModel:
    """A teacher that predicts the next token, at any position of a sequence."""

    engine = "softlabel.pipeline.teachers.teacher:TransformersTeacher"
    causal = True
    cuts = True
    copies = True

    def require_documents(self, settings: CaptureConfig, teacher: Path) -> None:
        """Does nothing: texts, chats and prompts can all be read."""

    def can_presume(self, table: Identity, checkpoint: Checkpoint, settings: SequencesConfig) -> bool:
        """Always: what is presumed depends on files that are compared with the table's in any case."""
        return True

    def selection(self, config: SelectionConfig) -> Selection:
        """See ``Kind.selection``."""
        return Selection.of(config)

    def compared(self, requested: Selection, alternatives: Mapping[str, SelectionConfig]) -> dict[str, Selection]:
        """See ``Kind.compared``."""
        shared = {"temperatures": requested.temperatures, "seed": requested.seed}
        others = {name: Selection.of(each.model_copy(update=shared)) for name, each in alternatives.items()}
        name = next((name for name, each in others.items() if each == requested), "requested")
        return {name: requested} | others

    def require_narrowing(self, wanted: Mapping[str, object], table: str) -> None:
        """Does nothing: a head can be shortened, and draws left out."""

    def vocabulary(self, checkpoint: Checkpoint) -> int:
        """The token ids that both the tokenizer and the model know."""
        return checkpoint.vocabulary

    def longest(self, checkpoint: Checkpoint, settings: SequencesConfig) -> int:
        """As set; refused if the model has too few positions."""
        require_positions(checkpoint, settings)
        return settings.max_tokens

    def require_trained_positions(self, checkpoint: Checkpoint, settings: SequencesConfig, is_new: bool) -> None:
        """See ``Kind.require_trained_positions``."""
        require_trained_positions(checkpoint, settings, is_new)

    def context(self, settings: SequencesConfig) -> int:
        """See ``Kind.context``."""
        return settings.context

    def mask(self, settings: SequencesConfig, content: Content) -> str:
        """See ``Kind.mask``."""
        return mask_rule(content, settings)

    def reader(self, checkpoint: Checkpoint, settings: SequencesConfig, content: Content) -> SequencesOfDocuments:
        """See ``Kind.reader``."""
        return ChunkedDocuments(checkpoint, settings, content)

    def next_ids(self, rows: pa.Table, batch: NDArray[np.int64]) -> NDArray[np.integer[Any]]:
        """See ``Kind.next_ids``."""
        chosen = rows.select(["token_ids", "loss_mask"]).take(pa.array(batch)).combine_chunks()
        tokens, mask = (column.combine_chunks().flatten() for column in chosen.columns)
        return np.array(tokens.filter(mask), np.int32)


@dataclass(frozen=True)
class Classifier:
    """A teacher that gives each document one distribution over classes, all of which are stored."""

    classes: Sequence[str]
    """In the order of their ids."""

    engine = "softlabel.pipeline.teachers.classifier_teacher:ClassifierTeacher"
    causal = False
    cuts = False
    copies = False  # a row holds its document's label

    def require_documents(self, settings: CaptureConfig, teacher: Path) -> None:
        """Refuse documents that are not plain text, or that need labels and have none."""
        columns, labels = settings.columns, settings.teacher.labels
        if columns.content != "text":
            raise UsageError(
                "a classifier reads only plain text, not chats or prompts",
                expected="columns.text",
                found=", ".join(f"columns.{setting}: {name}" for setting, name in columns.contents.items()),
                where=teacher,
                do="put the whole text of each document into one column, and name it in columns.text "
                "(without columns.messages, prompt and completion)",
            )
        if labels and columns.label is None:
            raise UsageError(
                "teacher.labels stores the documents' own labels, but no column for them is given",
                expected="columns.label as well as teacher.labels",
                found=f"teacher.labels: {' '.join(labels)}",
                do="set columns.label to the column that holds the labels",
            )

    def can_presume(self, table: Identity, checkpoint: Checkpoint, settings: SequencesConfig) -> bool:
        """The table's limit may be the classifier's, or that of its settings; another teacher may be no classifier."""
        return table.sequences.max_tokens >= settings.max_tokens and checkpoint.identity == table.teacher

    def selection(self, config: SelectionConfig) -> Selection:
        """See ``Kind.selection``."""
        if config != SelectionConfig():
            given = config.model_dump(exclude_defaults=True)
            raise UsageError(
                "selection settings don't apply to a classifier: every class is kept, at every temperature",
                expected="no selection settings",
                found=", ".join(f"selection.{name}: {value}" for name, value in given.items()),
                do="leave these settings out",
            )
        count = len(self.classes)
        return Selection(top_p=1.0, min_k=count, max_k=count, draws=0, temperatures=(1.0,), seed=0)

    def compared(self, requested: Selection, alternatives: Mapping[str, SelectionConfig]) -> dict[str, Selection]:
        """There is only one selection."""
        return {"all classes": requested}

    def require_narrowing(self, wanted: Mapping[str, object], table: str) -> None:
        """Refuse it."""
        raise UsageError(
            "a classifier's table can't be narrowed: it stores every class at every temperature",
            expected="no selection",
            found=", ".join(f"selection.{name}: {value}" for name, value in wanted.items()),
            where=table,
            do="to train a student on fewer labels, set student.labels",
        )

    def vocabulary(self, checkpoint: Checkpoint) -> int:
        """The classes."""
        return len(self.classes)

    def longest(self, checkpoint: Checkpoint, settings: SequencesConfig) -> int:
        """At most as set, and what the model reads; longer documents are truncated."""
        return longest_document(checkpoint, settings)

    def require_trained_positions(self, checkpoint: Checkpoint, settings: SequencesConfig, is_new: bool) -> None:
        """Does nothing: longer documents are truncated."""

    def context(self, settings: SequencesConfig) -> int:
        """There is one sequence per document."""
        return 0

    def mask(self, settings: SequencesConfig, content: Content) -> str:
        """See ``Kind.mask``."""
        return MASK

    def reader(self, checkpoint: Checkpoint, settings: SequencesConfig, content: Content) -> SequencesOfDocuments:
        """See ``Kind.reader``."""
        return WholeDocuments(checkpoint, settings)

    def next_ids(self, rows: pa.Table, batch: NDArray[np.int64]) -> NDArray[np.integer[Any]]:
        """See ``Kind.next_ids``."""
        return class_ids(rows.column("label").take(pa.array(batch)).to_pylist(), self.classes)


def kind_of(classes: Sequence[str] | None) -> Kind:
    """The kind of a teacher with these classes, or of a language model if there are none."""
    return LanguageModel() if classes is None else Classifier(classes)
