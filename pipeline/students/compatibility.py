"""Checks, before anything expensive runs, that a student can be built and trained on a teacher's soft labels.

The same checks run before a capture, when only the teacher's files exist, and before training, when there is a table.
Loads no weights.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from softlabel.pipeline.config.train import StudentConfig
from softlabel.pipeline.models.context_length import trained_positions
from softlabel.pipeline.models.pretrained import load_config, load_tokenizer, rules_of_its_own
from softlabel.pipeline.models.pruning import require_layers, require_neurons, require_prunable, spread
from softlabel.pipeline.models.student_loading import load_or_raise
from softlabel.pipeline.models.tokenizer_rules import differing_rules
from softlabel.pipeline.students.origin import Origin
from softlabel.pipeline.students.source import StudentSource
from softlabel.storage.errors import StudentError


def require_fitting(
    config: StudentConfig,
    origin: Origin,
    blank: Callable[[Any, Path], PreTrainedModel],
    source: StudentSource | None = None,
) -> StudentSource:
    """Refuse a student that can't be built, or can't be trained on these soft labels.

    Args:
        config: settings of the student.
        origin: the soft labels that it has to fit.
        blank: makes a model without weights, of a configuration from these files.
        source: the files that it is made from, if they have been found already.

    Returns:
        The files that it is made from.

    Raises:
        UsageError: unless exactly one source is set, or if the teacher does not have that many layers or neurons.
        StudentError: if its configuration or tokenizer can't be loaded, or does not fit; or if it takes layers of the
            table's teacher, whose files have changed since the capture.
    """
    source = source or StudentSource.find(config, origin)
    settings = load_or_raise(source.path, "configuration", lambda: load_config(source.path))
    if config.config is None:
        _require_tokenizer(source.path, origin)
    text = settings.get_text_config()
    text.name_or_path = settings.name_or_path
    layers = config.layers
    if config.depth is not None:
        layers = spread(config.depth, text.num_hidden_layers)
    if layers is not None:
        require_layers(text, layers)
    if config.intermediate_size is not None:
        require_neurons(text, config.intermediate_size)
    if layers is not None or config.intermediate_size is not None:
        require_prunable(blank(settings, source.path), layers, config.intermediate_size)
    _require_vocabulary(settings, origin)
    _require_positions(settings, origin)
    source.require_unchanged()
    return source


def require_same_tokens_elsewhere(source: StudentSource, origin: Origin) -> None:
    """Refuse a student whose finished folder transformers would load with other rules for splitting text into tokens.

    Raises:
        StudentError: if transformers has rules of its own for this kind of model, which differ from the teacher's.
    """
    settings = load_or_raise(source.path, "configuration", lambda: load_config(source.path)).get_text_config()
    tokenizer = origin.tokenizer()
    if found := rules_of_its_own(settings, tokenizer):
        raise StudentError(
            "transformers would split text differently for a student of this kind than for the teacher",
            expected=f"a kind of model that transformers loads with the teacher's tokenizer ({origin.location})",
            found=f"model_type {settings.model_type}: {found}",
            where=source.path,
            do="choose a student of another architecture: llama and most others take any tokenizer",
        )


def _require_tokenizer(source: Path, origin: Origin) -> None:
    """Refuse a model whose token ids mean other tokens, or that splits text differently."""
    student_tokenizer = load_or_raise(source, "tokenizer", lambda: load_tokenizer(source))
    teacher_tokenizer = origin.tokenizer()
    found, expected = student_tokenizer.get_vocab(), teacher_tokenizer.get_vocab()
    if found != expected:
        different = {token for token, _ in found.items() ^ expected.items()}
        detail = f"{len(found)} tokens; {len(different)} differ, the first is {min(different)!r}"
    elif not student_tokenizer.is_fast:
        detail = f"a tokenizer without tokenizer.json ({type(student_tokenizer).__name__})"
    elif differing_rules(student_tokenizer.backend_tokenizer, teacher_tokenizer.backend_tokenizer):
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


def _require_vocabulary(settings: Any, origin: Origin) -> None:
    """Refuse a model without a row for an id that occurs; ids that never occur (spare ones) need none."""
    rows, ids = settings.get_text_config().vocab_size, origin.token_ids
    if rows >= ids:
        return
    highest = origin.highest()
    if rows <= highest:
        raise StudentError(
            "the student's vocabulary is smaller than the table's",
            expected=f"at least {ids} rows in its embedding and output layer (any further rows are padding); or fewer, "
            "if the table never has the last ids",
            found=f"{rows} rows, and the token id {highest} occurs",
            where=settings.name_or_path or "student.config",
            do=f"set vocab_size to {origin.padded_vocabulary} in its configuration",
        )


def _require_positions(settings: Any, origin: Origin) -> None:
    """Refuse a model for shorter sequences, which has no positions, or only untrained ones, for the longest."""
    limit = trained_positions(settings)
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
