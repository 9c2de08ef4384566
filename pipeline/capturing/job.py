"""What a capture has decided before it reads a document: its settings, its teacher's files and its identity.

``resolve`` decides all of it once. The steps of the capture get the resulting job, in any process, and ask none of this
again.
"""

import warnings
from dataclasses import dataclass, replace

from pydantic import TypeAdapter

from softlabel.pipeline.capturing.identity import identify, presumed
from softlabel.pipeline.capturing.match import require_match
from softlabel.pipeline.config.capture import CaptureConfig
from softlabel.pipeline.config.flags import flag_of
from softlabel.pipeline.config.table_settings import complete
from softlabel.pipeline.documents.readers import find
from softlabel.pipeline.models.checkpoint import Checkpoint
from softlabel.pipeline.selection.selection import Selection
from softlabel.pipeline.sequences.tokenizer import tokenizer_hash
from softlabel.pipeline.teachers.kind import Kind, kind_of
from softlabel.storage.errors import ProvenanceError, TeacherError, UsageError
from softlabel.storage.identity import Identity
from softlabel.storage.records.versions import parse
from softlabel.storage.table import Table
from softlabel.storage.writer import require_current_format


@dataclass(frozen=True)
class CaptureJob:
    """A capture whose settings, teacher and identity are settled."""

    settings: CaptureConfig
    """Complete: nothing is left out."""
    checkpoint: Checkpoint
    """The teacher's files."""
    identity: Identity
    """Everything that the soft labels depend on."""
    presumed: bool = False
    """Whether part of the identity is the table's, because the teacher's files are; see ``capturing.identity``."""

    is_correction: bool = False
    """Whether its rows are staged, to replace wrong ones together (see ``capturing.corrections``), not committed."""

    @property
    def table(self) -> str:
        """Location of the table."""
        return self.settings.table

    @property
    def teacher(self) -> str:
        """Name of the teacher: its folder's absolute path, or its name on the hub."""
        assert self.settings.teacher.model is not None, "a teacher was found"
        return self.settings.teacher.model

    @property
    def kind(self) -> Kind:
        """Language model or classifier: what differs between the two."""
        return kind_of(self.identity.classes)

    @property
    def selection(self) -> Selection:
        """What is stored of each distribution."""
        return Selection(**dict(self.identity.selection), temperatures=self.identity.temperatures)

    def on(self, device: str) -> "CaptureJob":
        """The same job for one process on this device."""
        teacher = self.settings.teacher.model_copy(update={"device": device, "workers": 1})
        return replace(self, settings=self.settings.model_copy(update={"teacher": teacher}))

    def require_unchanged(self) -> None:
        """Refuse to go on if the teacher's or the tokenizer's files are no longer those that the job was made for.

        Raises:
            ProvenanceError: naming each field of the identity that differs.
        """
        tokenizer = self.identity.tokenizer.model_copy(update={"files": tokenizer_hash(self.checkpoint.folder)})
        now = self.identity.model_copy(update={"teacher": self.checkpoint.identity, "tokenizer": tokenizer})
        differences = self.identity.differences(now)
        if differences:
            raise ProvenanceError(
                "the teacher has changed since this capture was planned; this shard was not stored",
                expected="the same files for the whole capture",
                found="\n               ".join(f"{name}: {a} then, {b} now" for name, (a, b) in differences.items()),
                where=self.checkpoint.folder,
                do="run the same command again",
            )

    def to_json(self) -> str:
        """The job as text, for another process."""
        return _ADAPTER.dump_json(self).decode()

    @classmethod
    def from_json(cls, text: str) -> "CaptureJob":
        """The job that ``to_json`` wrote."""
        return _ADAPTER.validate_json(text)


_ADAPTER = TypeAdapter(CaptureJob)


def resolve(config: CaptureConfig) -> CaptureJob:
    """Decide everything about a capture, once. Nothing is written.

    Raises:
        DocumentsError: if there are no documents.
        ProvenanceError: if the existing table was made with another teacher or other settings.
        TeacherError: if there is no such teacher.
        UsageError: if the settings contradict each other, the teacher or this machine; if no teacher is known; or if
            the table is a view, or given with a version.
    """
    location, version = parse(config.table)
    if version is not None:
        raise UsageError(
            "rows can only be added to the newest version of a table",
            expected=f"the table without a version or tag: {location}",
            found=config.table,
            do="leave out the version or tag",
        )
    if config.teacher.device not in ("auto", "cpu"):
        # Imported here: torch takes over a second, and every machine has these two.
        from softlabel.pipeline.devices import device

        device(config.teacher.device)
    table = Table.open(config.table) if Table.exists(config.table) else None
    if table is not None:
        require_current_format(table)
    settings = complete(config, table)
    find(settings.documents)  # before the teacher is downloaded or hashed
    checkpoint = _find_teacher(settings, named_by_the_table=config.teacher.model is None)
    known = None if table is None else presumed(settings, checkpoint, table.identity)
    try:
        job = CaptureJob(settings, checkpoint, known or identify(settings, checkpoint), presumed=known is not None)
    except UsageError:
        if table is not None and table.identity.teacher != checkpoint.identity:  # the table's settings suit its own
            require_match(table, table.identity.model_copy(update={"teacher": checkpoint.identity}), settings)
        raise
    if table is None:
        job.kind.require_trained_positions(checkpoint, settings.sequences, is_new=True)
        _warn_of_own_rules(checkpoint)
    else:
        require_match(table, job.identity, settings)
    job.kind.require_documents(settings, checkpoint.folder)
    return job


def _warn_of_own_rules(checkpoint: Checkpoint) -> None:
    """Warn of a teacher whose own pruned student would be refused."""
    # Imported here: together with transformers, it takes seconds, and a later capture may not need it.
    from softlabel.pipeline.models.pretrained import rules_of_its_own, transformers

    config = checkpoint.config.get_text_config()
    as_the_file_says = type(checkpoint.tokenizer) is transformers().PreTrainedTokenizerFast
    if not as_the_file_says or not type(config).__module__.startswith("transformers."):
        return
    if found := rules_of_its_own(config, checkpoint.tokenizer):
        error = TeacherError(
            "this teacher can be captured, but no student can be pruned from it",
            expected="a kind of model that transformers loads with the rules of the teacher's tokenizer.json",
            found=f"model_type {config.model_type}: {found}",
            where=checkpoint.folder,
            do="make students of another architecture with student.config: llama and most others take any tokenizer",
        )
        warnings.warn(str(error), stacklevel=2)


def _find_teacher(settings: CaptureConfig, named_by_the_table: bool) -> Checkpoint:
    try:
        return Checkpoint.find(settings.teacher)
    except TeacherError as error:
        if not named_by_the_table:
            raise
        raise TeacherError(
            "the teacher of the table's newest capture can't be used",
            expected="the files that made the table, where they were then",
            found=str(error).splitlines()[0],
            where=settings.teacher.model,
            do=f"give {flag_of('teacher.model')} with the folder or hub name where these files are now",
        ) from error
