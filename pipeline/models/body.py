"""The part of a model that computes hidden states, without the output layer."""

from torch import nn
from transformers import PreTrainedModel


def inner(model: PreTrainedModel, named: nn.Module) -> nn.Module:
    """The body of a model.

    Args:
        model: the model.
        named: what transformers names as its body; the model itself if the architecture does not tell, as Llama 4's.

    Returns:
        The body; the model itself if it has none.
    """
    if named is not model:
        return named
    return next((part for part in model.children() if isinstance(part, PreTrainedModel)), model)
