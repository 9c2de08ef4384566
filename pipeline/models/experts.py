"""The experts of a mixture of experts, and how many of a model's parameters one token uses."""

from torch import nn
from transformers import PreTrainedModel

_CHOSEN = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")
"""Names under which configurations say how many experts read a token."""


def experts(model: nn.Module) -> list[nn.Module]:
    """The modules that hold a layer's experts: with fused weights, or with one module for each expert."""
    return [
        part for name, part in model.named_modules() if "Experts" in type(part).__name__ or name.endswith(".experts")
    ]


def active_parameters(model: PreTrainedModel) -> int | None:
    """Number of parameters that one token uses: without those of the experts that do not read it.

    None if it is not known how many experts read a token.
    """
    config = model.config.get_text_config()
    chosen = next((found for name in _CHOSEN if isinstance(found := getattr(config, name, None), int)), None)
    unused = 0
    for part in experts(model):
        if "Shared" in type(part).__name__:  # these read every token
            continue
        count = len(part) if isinstance(part, nn.ModuleList | nn.ModuleDict) else getattr(part, "num_experts", None)
        if chosen is None or count is None:
            return None
        size = _size(part)
        unused += size - size * min(chosen, count) // count
    return _size(model) - unused


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
