"""A selection: which part of a distribution is stored, with all defaults of the settings resolved."""

from dataclasses import dataclass, fields
from typing import Self

from softlabel.pipeline.config.capture import SelectionConfig


@dataclass(frozen=True)
class Selection:
    """A selection with all defaults resolved: the settings that the numbers of a table depend on."""

    top_p: float
    min_k: int
    max_k: int
    draws: int
    temperatures: tuple[float, ...]
    """The first is 1."""
    seed: int

    @classmethod
    def of(cls, config: SelectionConfig) -> Self:
        """Resolve the settings; top_k is a shorthand for top_p 1, min_k = max_k = top_k, draws 0."""
        chosen = {field.name: getattr(config, field.name) for field in fields(cls)}
        if config.top_k is not None:
            chosen |= {"top_p": 1.0, "min_k": config.top_k, "max_k": config.top_k, "draws": 0}
        return cls(**chosen)
