"""The identity that a table of this capture has, as far as possible without loading the teacher's tokenizer.

Part of an identity is read from the teacher's files by transformers, which takes seconds to load. Where these files are
the ones that made an existing table, that part is as the table's identity says.
"""

from dataclasses import asdict
from typing import NamedTuple

from softlabel.pipeline.config.capture import CaptureConfig
from softlabel.pipeline.models.checkpoint import Checkpoint
from softlabel.pipeline.sequences.tokenizer import template_hash, tokenizer_hash
from softlabel.pipeline.teachers.kind import kind_of
from softlabel.storage.identity import Identity, SelectionIdentity, SequencesIdentity, TokenizerIdentity


def identify(config: CaptureConfig, checkpoint: Checkpoint) -> Identity:
    """Everything that the soft labels of this capture depend on.

    Raises:
        TeacherError: if the tokenizer can't be loaded.
        UsageError: if the teacher can't read sequences that long, or does not support the selection.
    """
    kind = kind_of(checkpoint.classes)
    read = _Read(
        template_hash(checkpoint),
        kind.vocabulary(checkpoint),
        checkpoint.padded_vocabulary,
        checkpoint.classes,
        kind.longest(checkpoint, config.sequences),
    )
    return _identity(config, checkpoint, read)


def presumed(config: CaptureConfig, checkpoint: Checkpoint, table: Identity) -> Identity | None:
    """What ``identify`` gives if these are the teacher and the tokenizer of a table; nothing is loaded for it.

    Returns:
        None if it takes the tokenizer to tell. With other files than the table's, the result differs from the table's
        identity too, but possibly in fewer fields than what ``identify`` gives.

    Raises:
        UsageError: if the teacher does not support the selection.
    """
    if not kind_of(table.classes).can_presume(table, checkpoint, config.sequences):
        return None
    read = _Read(
        table.tokenizer.chat_template,
        table.vocabulary,
        table.padded_vocabulary,
        config.teacher.labels or table.classes,
        config.sequences.max_tokens,
    )
    return _identity(config, checkpoint, read)


class _Read(NamedTuple):
    """The part of an identity that transformers reads from the teacher's files."""

    chat_template: str | None
    vocabulary: int
    padded_vocabulary: int
    classes: tuple[str, ...] | None
    max_tokens: int


def _identity(config: CaptureConfig, checkpoint: Checkpoint, read: _Read) -> Identity:
    kind = kind_of(read.classes)
    selection = asdict(kind.selection(config.selection))
    return Identity(
        teacher=checkpoint.identity,
        tokenizer=TokenizerIdentity(
            files=tokenizer_hash(checkpoint.folder),
            chat_template=read.chat_template,
            chat_template_date=config.sequences.chat_template_date,
            chat_template_kwargs=config.sequences.chat_template_kwargs,
        ),
        vocabulary=read.vocabulary,
        padded_vocabulary=read.padded_vocabulary,
        classes=read.classes,
        temperatures=selection.pop("temperatures"),
        tail_logprobs="eval" if read.classes else config.selection.tail_logprobs,
        selection=SelectionIdentity(**selection),
        sequences=SequencesIdentity(
            max_tokens=read.max_tokens,
            context=kind.context(config.sequences),
            mask=kind.mask(config.sequences, config.columns.content),
            special_tokens=config.sequences.special_tokens,
            eval_fraction=config.shards.eval_fraction,
        ),
    )
