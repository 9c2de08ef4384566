"""Checks, before anything expensive runs, that a student can be built and trained on a teacher's soft labels.

The same checks run before a capture, when only the teacher's files exist, and before training, when there is a table.
Loads no weights.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from softlabel.pipeline.config.train import StudentConfig, TrainConfig
from softlabel.pipeline.loss.targets import Target, dropping, resolve_target
from softlabel.pipeline.models.context_length import configured_positions
from softlabel.pipeline.models.pretrained import load_config, load_tokenizer
from softlabel.pipeline.models.pruning import require_layers, require_neurons, spread
from softlabel.pipeline.models.student_loading import load_or_raise
from softlabel.pipeline.students.labels import LabelMap
from softlabel.pipeline.students.origin import Origin
from softlabel.pipeline.students.source import StudentSource
from softlabel.storage.errors import StudentError, UsageError


def require_fitting(config: StudentConfig, origin: Origin, source: StudentSource | None = None) -> StudentSource:
    """Refuse a student that can't be built, or can't be trained on these soft labels.

    Args:
        config: settings of the student.
        origin: the soft labels that it has to fit.
        source: the files that it is made from, if they have been found already.

    Returns:
        The files that it is made from.

    Raises:
        UsageError: unless exactly one source is set; if the teacher does not have that many layers or neurons; or if
            student.labels does not fit the teacher's classes.
        StudentError: if its configuration or tokenizer can't be loaded, or does not fit; or if it takes layers of the
            table's teacher, whose files have changed since the capture.
    """
    source = source or StudentSource.find(config, origin)
    _require_labels(config, origin)
    settings = load_or_raise(source.path, "configuration", lambda: load_config(source.path))
    if config.config is None:
        _require_tokenizer(source.path, origin)
    if config.depth is not None:
        spread(config.depth, settings.num_hidden_layers)
    if config.layers is not None:
        require_layers(settings, config.layers)
    if config.intermediate_size is not None:
        require_neurons(settings, config.intermediate_size)
    _require_vocabulary(settings, origin)
    _require_positions(settings, origin)
    source.require_unchanged()
    return source


def require_loss(config: TrainConfig, origin: Origin) -> Target | None:
    """Refuse a loss that can't be computed from these soft labels.

    Returns:
        The target of a language model's soft loss; None if there is no soft part, or for a classifier.

    Raises:
        UsageError: if the soft labels lack what the loss needs, or a setting does not apply to classifiers.
    """
    if origin.classes is not None:
        _require_class_settings(config)
    elif config.loss.soft_weight or config.loss.soft_weight_end:
        max_k = dropping(config.stream.max_k, origin.head)
        return resolve_target(config.loss, origin.temperatures, origin.draws, max_k)
    return None


def _require_labels(config: StudentConfig, origin: Origin) -> None:
    if origin.classes is not None:
        LabelMap.of(config.labels, origin.classes)
    elif config.labels:
        raise UsageError(
            "student.labels is only for classifiers, and this table's teacher is a language model",
            expected="no student.labels, or a table captured from a classifier",
            found=f"student.labels: {' '.join(config.labels)}",
            where=origin.location,
            do="leave student.labels out",
        )


def _require_class_settings(config: TrainConfig) -> None:
    if config.student.lora_r is not None:
        raise UsageError(
            "adapters are only for language models, and this table's teacher is a classifier",
            expected="no student.lora_r (a classifier's new head has to be trained in full)",
            found=f"student.lora_r: {config.student.lora_r}",
            do="leave student.lora_r out",
        )
    found = [f"stream.max_k: {config.stream.max_k}"] if config.stream.max_k is not None else []
    found += [f"loss.target: {config.loss.target}"] if config.loss.target != "auto" else []
    if found:
        raise UsageError(
            "a classifier is always trained on the teacher's whole distribution",
            expected="neither stream.max_k nor loss.target",
            found=", ".join(found),
            do="leave these settings out; student.labels chooses the classes that a student learns",
        )


def _require_tokenizer(source: Path, origin: Origin) -> None:
    """Refuse a model whose token ids mean other tokens, or that splits text differently."""
    student_tokenizer = load_or_raise(source, "tokenizer", lambda: load_tokenizer(source))
    teacher_tokenizer = origin.tokenizer()
    found, expected = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    if found != expected:
        different = {token for token, _ in found.items() ^ expected.items()}
        detail = f"{len(found)} tokens; {len(different)} differ, the first is {min(different)!r}"
    elif _rules(student_tokenizer) != _rules(teacher_tokenizer):
        detail = "the same tokens, but different rules for splitting text into them"
    else:
        return
    raise StudentError(
        "the student's tokenizer differs from the teacher's, so its token ids would mean something else",
        expected=f"the teacher's tokenizer, {len(expected)} tokens ({origin.location})",
        found=detail,
        where=source,
        do="choose a student of the teacher's family, prune the teacher (student.layers), or capture from a teacher "
        "with this tokenizer",
    )


def _rules(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Hash of the tokenization rules, without padding and truncation, which calls may have changed."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    rules = {key: value for key, value in json.loads(backend.to_str()).items() if key not in ("padding", "truncation")}
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()


def _require_vocabulary(settings: Any, origin: Origin) -> None:
    rows, ids = settings.get_text_config().vocab_size, origin.vocabulary
    if origin.classes is not None:
        ids = max(origin.tokenizer().get_vocab().values()) + 1
    if rows < ids:
        raise StudentError(
            "the student's vocabulary is smaller than the table's",
            expected=f"at least {ids} rows in its embedding and output layer (any further rows are padding)",
            found=f"{rows} rows",
            where=settings.name_or_path or "student.config",
            do=f"set vocab_size to {origin.padded_vocabulary} in its configuration",
        )


def _require_positions(settings: Any, origin: Origin) -> None:
    """Refuse a model for shorter sequences, which has no positions, or only untrained ones, for the longest."""
    limit = configured_positions(settings)
    if limit is None or limit >= origin.max_tokens:
        return
    needed = origin.longest()
    if limit < needed:
        raise StudentError(
            "the table's sequences are longer than the student can read",
            expected=f"at least {needed} positions (max_position_embeddings)",
            found=f"{limit} positions",
            where=settings.name_or_path or "student.config",
            do="raise max_position_embeddings in its configuration, choose another model, or capture again with a "
            "smaller sequences.max_tokens",
        )
