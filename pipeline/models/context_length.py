"""How long a sequence may be that a teacher reads: some architectures have a table with a row for each position, and
nothing for those after the last. Others, such as those with rotary positions, work any position out.
"""

from typing import Any

from torch import nn

from softlabel.pipeline.config.capture import SequencesConfig
from softlabel.pipeline.models.checkpoint import Checkpoint
from softlabel.storage.errors import UsageError

_ROWS_BEFORE = 2
"""Rows that a table may have before that of the first position, beside those that its configuration speaks of."""


def positions_said(settings: Any) -> int | None:
    """Positions that a model's configuration speaks of, if it does; XLNet, which has no limit, says -1."""
    said: int = getattr(settings.get_text_config(), "max_position_embeddings", None) or 0
    return said if said > 0 else None


def longest(checkpoint: Checkpoint, settings: SequencesConfig) -> int:
    """Tokens of the longest sequence, special tokens included; of a classifier, no more than it was made for.

    Raises:
        UsageError: if a language model has no positions for sequences of ``max_tokens``.
    """
    said = positions_said(checkpoint.config)
    if checkpoint.classes is None:
        _require_positions(checkpoint, settings.max_tokens, said)
        return settings.max_tokens
    limit = said if said is None or checkpoint.labels else _in_table(checkpoint.blank(), said) or said
    return min(settings.max_tokens, int(checkpoint.tokenizer.model_max_length), limit or settings.max_tokens)


def _require_positions(checkpoint: Checkpoint, max_tokens: int, said: int | None) -> None:
    """Refuse sequences that are longer than a language model's table of positions."""
    before = 1 + (checkpoint.config.get_text_config().pad_token_id or 0)
    if said is None or max_tokens <= said - before:  # whatever the architecture, that is room enough
        return
    limit = _in_table(checkpoint.blank(), said)
    if limit is not None and max_tokens > limit:
        raise UsageError(
            "the teacher can't read sequences of this length",
            expected=f"sequences.max_tokens of at most {limit}, the number of positions in the teacher's table",
            found=f"sequences.max_tokens: {max_tokens}",
            where=checkpoint.folder / "config.json",
            do=f"set sequences.max_tokens to {limit} or less; longer documents are then cut into more chunks",
        )


def _in_table(model: Any, said: int) -> int | None:
    """Tokens that a model's table of positions has room for; None if it has none.

    Args:
        model: with or without weights.
        said: positions, by its configuration; a table is known by having as many rows.
    """
    for module in model.modules():
        if not isinstance(module, nn.Embedding) or module is model.get_input_embeddings():
            continue
        if 0 <= module.num_embeddings - said <= _ROWS_BEFORE:
            # RoBERTa and its kin count positions from the row after the padding's.
            return said if module.padding_idx is None else said - module.padding_idx - 1
    fixed = (values for name, values in model.named_buffers() if "pos" in name.rpartition(".")[2])
    return said if any(values.ndim == 2 and len(values) == said for values in fixed) else None
