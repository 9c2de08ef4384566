"""Padding for classifiers, which read whole sequences: the padding token, and padded batches."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softlabel.storage.errors import TeacherError


def padding_id(model: Any, tokenizer: Any) -> int:
    """The id of the padding token. It is also set in the model's configuration if that lacks it, since some
    architectures use it to find the last real token.

    Raises:
        TeacherError: if neither the model nor the tokenizer has a padding token.
    """
    config = model.config
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    if config.pad_token_id is None:
        raise TeacherError(
            "the model has no padding token",
            expected="pad_token_id in config.json, or a pad token in the tokenizer",
            found="neither",
            where=config.name_or_path,
            do="set one of them, and save the model and the tokenizer again",
        )
    return int(config.pad_token_id)


def padded(sequences: Sequence[NDArray[np.int32]], pad: int) -> dict[str, Tensor]:
    """Inputs of a classifier: input_ids and attention_mask, (N, longest) int64, padded on the right."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    ids = torch.full_like(mask, pad)
    ids[mask.bool()] = torch.from_numpy(np.concatenate(sequences)).long()
    return {"input_ids": ids, "attention_mask": mask}
