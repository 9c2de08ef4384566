"""Whether a student can be made for a teacher, and taught by it: found out from settings, before anyone pays.

The same questions before a capture, when only the teacher's files are there, and before a training, when there is a
table. Loads no weights.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

import pyarrow.compute as pc
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from pipeline.checkpoint import Checkpoint
from pipeline.class_labels import LabelMap
from pipeline.classes import selection_of
from pipeline.config import CaptureConfig, TrainConfig
from pipeline.positions import longest, positions_said
from pipeline.pruning import require_layers, require_neurons, spread
from pipeline.student_config import StudentConfig
from pipeline.targets import resolve_target
from storage.errors import StudentError, UsageError
from storage.groups import outlines
from storage.inspection import last_capture
from storage.view import AnyTable

T = TypeVar("T")


@dataclass(frozen=True)
class Origin:
    """Where soft labels come from, or are to come from: what a student of theirs has to fit."""

    location: str | Path
    """Of the table or, before there is one, of the teacher."""
    tokenizer: Path
    """A folder that holds it."""
    vocabulary: int
    """Token ids that the tokenizer knows, or the number of classes."""
    padded_vocabulary: int
    """Rows of the teacher's output layer."""
    max_tokens: int
    """Tokens that a sequence may have."""
    longest: Callable[[], int]
    """Tokens that the longest has, or may have as long as there is none: a table's, which are not read in vain."""
    classes: tuple[str, ...] | None
    """Of a classifier."""
    temperatures: tuple[float, ...]
    """Whose tail mass is stored."""
    draws: bool
    """Whether tails are sampled."""
    teachers: Callable[[], Sequence[tuple[str, str | None]]]
    """Folder or hub name of each teacher, and its revision on the hub: from a table's history, not read in vain."""

    @classmethod
    def of(cls, table: AnyTable) -> Self:
        """That of a table, as its history tells it."""
        identity = table.tables[0].identity
        return cls(
            location=table.location,
            tokenizer=table.tokenizer,
            vocabulary=identity.vocabulary,
            padded_vocabulary=identity.padded_vocabulary,
            max_tokens=max(part.identity.sequences.max_tokens for part in table.tables),
            longest=partial(_longest_of, table),
            classes=identity.classes,
            temperatures=table.temperatures,
            draws=table.draws,
            teachers=partial(_teachers_of, table),
        )

    @classmethod
    def of_capture(cls, config: CaptureConfig) -> Self:
        """That of the table that a capture would make.

        Raises:
            TeacherError: if there is no teacher.
        """
        teacher = Checkpoint.find(config.teacher)
        selection = selection_of(config.selection, teacher.classes)
        most = config.sequences.max_tokens if teacher.classes is None else longest(teacher, config.sequences)
        return cls(
            location=teacher.folder,
            tokenizer=teacher.folder,
            vocabulary=teacher.vocabulary,
            padded_vocabulary=teacher.padded_vocabulary,
            max_tokens=most,
            longest=lambda: most,
            classes=teacher.classes,
            temperatures=selection.temperatures,
            draws=selection.draws > 0,
            teachers=lambda: [(config.teacher.model, teacher.revision)],
        )


def require_fitting(config: StudentConfig, origin: Origin) -> tuple[str, str | None]:
    """Refuse a student that can't be made, or could not be trained on these soft labels.

    Returns:
        Folder or hub name of the model or configuration that it is made from, and its revision on the hub.

    Raises:
        UsageError: unless exactly one place is named that it comes from; if the teacher has not so many layers or
            neurons; or if its labels can't be made.
        StudentError: if its configuration or tokenizer can't be loaded, or does not fit.
    """
    _require_one_source(config)
    _require_labels(config, origin)
    source, revision = _source(config, origin)
    settings = explained(
        source,
        "configuration",
        lambda: AutoConfig.from_pretrained(source, revision=revision or "main", trust_remote_code=False),
    )
    if config.config is None:
        _require_tokenizer(source, revision, origin)
    if config.depth is not None:
        spread(config.depth, settings.num_hidden_layers)
    if config.layers is not None:
        require_layers(settings, config.layers)
    if config.intermediate_size is not None:
        require_neurons(settings, config.intermediate_size)
    _require_vocabulary(settings, origin)
    _require_positions(settings, origin)
    return source, revision


def require_loss(config: TrainConfig, origin: Origin) -> None:
    """Refuse a loss that these soft labels can't give.

    Raises:
        UsageError: if they lack what it is measured against, or it asks for a part of a classifier's distribution.
    """
    if origin.classes is not None:
        _require_class_settings(config)
    elif config.loss.soft_weight or config.loss.soft_weight_end:
        resolve_target(config.loss, origin.temperatures, origin.draws, config.stream.max_k)


def explained(source: str, what: str, load: Callable[[], T]) -> T:
    """The loaded thing, or an error that says where it was looked for."""
    try:
        return load()
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise StudentError(
            f"the student's {what} can't be loaded",
            expected="a folder, or a hub name, with config.json, *.safetensors and a tokenizer",
            found=str(error).strip().splitlines()[0] if str(error).strip() else repr(error),
            where=Path(source).absolute() if Path(source).exists() else source,
            do="check the path (student.teacher says where a teacher is now), or fetch a damaged file again; a model "
            "that needs code of its own, or has no safetensors, is not loaded",
        ) from error


def _teachers_of(table: AnyTable) -> list[tuple[str, str | None]]:
    captures = [last_capture(part) for part in table.tables]
    return list(dict.fromkeys((said["teacher"], said.get("revision")) for said in captures if "teacher" in said))


def _source(config: StudentConfig, origin: Origin) -> tuple[str, str | None]:
    named = config.model or config.config or config.teacher
    if named is not None:
        return named, None
    teachers = origin.teachers()
    if len(teachers) == 1:
        return teachers[0]
    raise UsageError(
        f"the table does not say {'which teacher is meant' if teachers else 'where its teacher is'}",
        expected="student.teacher, beside student.layers",
        found=", ".join(sorted(name for name, _ in teachers)) or "neither that nor a teacher in the table's history",
        where=origin.location,
        do="name the teacher's folder with student.teacher",
    )


def _require_one_source(config: StudentConfig) -> None:
    if len(config.given) != 1:
        raise UsageError(
            "a student comes from exactly one place",
            expected="one of student.model, student.layers, student.depth and student.config",
            found=", ".join(config.given) or "none of them",
            do="give a model to go on from, layers to keep of the teacher, or a configuration for a fresh model",
        )


def _require_labels(config: StudentConfig, origin: Origin) -> None:
    if origin.classes is not None:
        LabelMap.of(config.labels, origin.classes)
    elif config.labels:
        raise UsageError(
            "labels are a classifier's, and this table's teacher predicts tokens",
            expected="no student.labels, or a table that a classifier made",
            found=f"student.labels: {' '.join(config.labels)}",
            where=origin.location,
            do="leave them out",
        )


def _require_class_settings(config: TrainConfig) -> None:
    if config.student.lora_rank is not None:
        raise UsageError(
            "adapters are for language models",
            expected="no student.lora_rank: a classifier's head is new, and has to be trained whole",
            found=f"student.lora_rank: {config.student.lora_rank}",
            do="leave it out",
        )
    found = [f"stream.max_k: {config.stream.max_k}"] if config.stream.max_k is not None else []
    found += [f"loss.target: {config.loss.target}"] if config.loss.target != "auto" else []
    if found:
        raise UsageError(
            "the whole of a classifier's distribution is the target",
            expected="neither stream.max_k nor loss.target",
            found=", ".join(found),
            do="leave it out; student.labels says which classes a student learns",
        )


def _require_tokenizer(source: str, revision: str | None, origin: Origin) -> None:
    """Refuse a model whose ids mean other tokens, or that makes other ids of a text."""
    theirs = explained(source, "tokenizer", lambda: AutoTokenizer.from_pretrained(source, revision=revision or "main"))
    ours = AutoTokenizer.from_pretrained(origin.tokenizer)
    found, expected = theirs.get_vocab(), ours.get_vocab()
    if found != expected:
        other = {token for token, _ in found.items() ^ expected.items()}
        detail = f"{len(found)} tokens; {len(other)} differ, the first is {min(other)!r}"
    elif _rules(theirs) != _rules(ours):
        detail = "the same tokens, but other rules that split text into them"
    else:
        return
    raise StudentError(
        "the student's tokenizer is not the teacher's: its ids would mean other tokens",
        expected=f"the teacher's tokenizer, {len(expected)} tokens ({origin.tokenizer})",
        found=detail,
        where=source,
        do="take a student of the teacher's family, prune the teacher (student.layers), or capture with a teacher "
        "that has this tokenizer",
    )


def _rules(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Hash of what turns text into ids, without the padding and truncation that a call may have left behind."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    rules = {key: value for key, value in json.loads(backend.to_str()).items() if key not in ("padding", "truncation")}
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()


def _require_vocabulary(settings: Any, origin: Origin) -> None:
    rows, ids = settings.get_text_config().vocab_size, origin.vocabulary
    if origin.classes is not None:
        ids = max(AutoTokenizer.from_pretrained(origin.tokenizer).get_vocab().values()) + 1
    if rows < ids:
        raise StudentError(
            "the student has no room for the table's vocabulary",
            expected=f"at least {ids} rows in its embedding and output layer (more are padding)",
            found=rows,
            where=settings.name_or_path or "student.config",
            do=f"set vocab_size to {origin.padded_vocabulary} in its configuration",
        )


def _require_positions(settings: Any, origin: Origin) -> None:
    """Refuse a model for shorter sequences: learned positions would run out, others would be used beyond what they
    are meant for."""
    limit = positions_said(settings)
    if limit is None or limit >= origin.max_tokens:
        return
    needed = origin.longest()
    if limit < needed:
        raise StudentError(
            "the student can't read the table's sequences",
            expected=f"at least {needed} positions (max_position_embeddings)",
            found=limit,
            where=settings.name_or_path or "student.config",
            do="set max_position_embeddings in its configuration, take another model, or capture with a smaller "
            "sequences.max_tokens",
        )


def _longest_of(table: AnyTable) -> int:
    return max((pc.max(rows.column("tokens")).as_py() or 0 for _, rows in outlines(table, ["tokens"])), default=0)
