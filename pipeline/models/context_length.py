"""The longest sequence that a teacher can read.

Some architectures have a table with one row per position and can't read longer sequences. Others, such as those with
rotary position embeddings, can compute any position.
"""

import warnings
from collections.abc import Mapping
from typing import Any

from softlabel.pipeline.config.capture import SequencesConfig
from softlabel.pipeline.models.checkpoint import Checkpoint
from softlabel.storage.errors import UsageError

_ROWS_BEFORE = 2
"""Extra rows that a table may have before the first position, on top of those that the configuration gives."""


def configured_positions(config: Any) -> int | None:
    """Number of positions that a model's configuration gives, if it does; XLNet, which has no limit, gives -1."""
    positions: int = getattr(config.get_text_config(), "max_position_embeddings", None) or 0
    return positions if positions > 0 else None


def trained_positions(config: Any) -> int | None:
    """Number of positions that a model is meant for, after the scaling of its rotary embeddings; None without limit."""
    positions = configured_positions(config)
    if positions is None or getattr(config.get_text_config(), "alibi", False):
        return None
    given = getattr(config.get_text_config(), "rope_parameters", None) or {}
    each = [rope for rope in (given, *given.values()) if isinstance(rope, dict)]  # some models have one for each kind
    return max([positions, *(_scaled(rope, positions) for rope in each)])


def _scaled(rope: Mapping[str, Any], positions: int) -> int:
    """Number of positions of rotary embeddings with these settings."""
    if rope.get("rope_type") == "yarn":
        positions = rope.get("original_max_position_embeddings") or positions
    elif rope.get("rope_type") not in ("linear", "dynamic"):  # the others are scaled to the configured number
        return positions
    return int(positions * (rope.get("factor") or 1))


def require_trained_positions(checkpoint: Checkpoint, settings: SequencesConfig, is_new: bool) -> None:
    """Refuse sequences that are longer than a language model is meant for; for a table that exists, only warn.

    Args:
        checkpoint: the language model's files.
        settings: the maximum length.
        is_new: whether there is no table yet.

    Raises:
        UsageError: if they are, and the table is new.
    """
    limit = trained_positions(checkpoint.config)
    if limit is None or settings.max_tokens <= limit:
        return
    error = UsageError(
        "the teacher is not meant for sequences of this length, so its predictions far into them would be poor",
        expected=f"sequences.max_tokens of at most {limit}, the teacher's positions (max_position_embeddings, and the "
        "scaling of its rotary embeddings)",
        found=f"sequences.max_tokens: {settings.max_tokens}",
        where=checkpoint.folder / "config.json",
        do=f"set sequences.max_tokens to {limit} or less; longer documents are then cut into more chunks"
        if is_new
        else "go on if the table's documents are shorter than that; otherwise make a new table with a smaller "
        "sequences.max_tokens",
    )
    if is_new:
        raise error
    warnings.warn(str(error), stacklevel=2)


def longest_document(checkpoint: Checkpoint, settings: SequencesConfig) -> int:
    """Tokens of the longest document that a classifier reads whole, with special tokens."""
    limit = positions = configured_positions(checkpoint.config)
    if positions is not None and not checkpoint.labels:
        limit = _table_length(checkpoint.blank(), positions) or positions
    return min(settings.max_tokens, int(checkpoint.tokenizer.model_max_length), limit or settings.max_tokens)


def require_positions(checkpoint: Checkpoint, settings: SequencesConfig) -> None:
    """Refuse sequences that are longer than a language model's position table.

    Raises:
        UsageError: if they are.
    """
    max_tokens, positions = settings.max_tokens, configured_positions(checkpoint.config)
    before = 1 + (checkpoint.config.get_text_config().pad_token_id or 0)
    if positions is None or max_tokens <= positions - before:  # enough for every architecture
        return
    limit = _table_length(checkpoint.blank(), positions)
    if limit is not None and max_tokens > limit:
        raise UsageError(
            "the teacher can't read sequences of this length",
            expected=f"sequences.max_tokens of at most {limit}, the number of positions that the teacher has "
            "embeddings for",
            found=f"sequences.max_tokens: {max_tokens}",
            where=checkpoint.folder / "config.json",
            do=f"set sequences.max_tokens to {limit} or less; longer documents are then cut into more chunks",
        )


def _table_length(model: Any, positions: int) -> int | None:
    """Number of tokens that fit a model's position table; None if it has no such table.

    Args:
        model: with or without weights.
        positions: number of positions in its configuration; the table is recognized by having as many rows.
    """
    for module in model.modules():
        rows = getattr(module, "num_embeddings", None)  # only an embedding has them
        if rows is None or module is model.get_input_embeddings():
            continue
        if 0 <= rows - positions <= _ROWS_BEFORE:
            # RoBERTa and similar models count positions from the row after the padding token's.
            return positions if module.padding_idx is None else positions - module.padding_idx - 1
    fixed = (values for name, values in model.named_buffers() if "pos" in name.rpartition(".")[2])
    return positions if any(values.ndim == 2 and len(values) == positions for values in fixed) else None
