"""The part of a model that computes hidden states, without the output layer."""

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def inner(model: "PreTrainedModel", named: nn.Module) -> nn.Module:
    """The body of a model.

    Args:
        model: the model.
        named: what transformers names as its body. It may be wrong: Llama 4 names itself, ModernBERT its output layer.

    Returns:
        The body; the model itself if it has none.
    """
    from transformers import PreTrainedModel  # imported here: three seconds, which an engine of one's own does not need

    body: nn.Module = named
    if body is model or not isinstance(named, PreTrainedModel):
        body = next((part for part in model.children() if isinstance(part, PreTrainedModel)), model)
    return body
