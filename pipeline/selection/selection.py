"""A selection: which part of a distribution is stored, with all defaults of the settings resolved."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

from softlabel.pipeline.config.capture import SelectionConfig
from softlabel.storage.errors import UsageError


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


def selection_of(config: SelectionConfig, classes: Sequence[str] | None) -> Selection:
    """The selection of the settings; of a distribution over classes, everything is kept.

    Raises:
        UsageError: if a selection is set for a classifier.
    """
    if classes is None:
        return Selection.of(config)
    if config != SelectionConfig():
        given = config.model_dump(exclude_defaults=True)
        raise UsageError(
            "selection settings don't apply to a classifier: every class is kept, at every temperature",
            expected="no selection settings",
            found=", ".join(f"selection.{name}: {value}" for name, value in given.items()),
            do="leave these settings out",
        )
    return Selection(top_p=1.0, min_k=len(classes), max_k=len(classes), draws=0, temperatures=(1.0,), seed=0)
