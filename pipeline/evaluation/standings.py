"""The order of several students by their distance from the teacher, as far as the documents tell it."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from softlabel.pipeline.evaluation.bootstrap import Difference, Estimate


class Pair(Protocol):
    """Two students, and how much larger the first one's KL is."""

    @property
    def student(self) -> str:
        """Name of the first one."""
        ...

    @property
    def other(self) -> str:
        """Name of the second one."""
        ...

    @property
    def kl(self) -> Difference:
        """The difference."""
        ...


@dataclass(frozen=True)
class Gap:
    """Two models between which it is shown how far each student gets."""

    control: str
    """Name of the model at which the gap starts."""
    reference: str | None
    """Name of the model at which it ends; None for the teacher."""


@dataclass(frozen=True)
class Standing:
    """One student's place."""

    student: str
    place: int
    """1 plus the number of students that are really closer to the teacher: those that can't be told apart share it."""
    gap_closed: Estimate | None
    """Share of the gap between control and reference that it closes: 0 is as far from the teacher as the control, and 1
    as close as the reference. None without a control."""


def standings_of(
    names: Sequence[str],
    kl: Sequence[Estimate],
    pairs: Sequence[Pair],
    closed: Sequence[Estimate | None],
    apart: Collection[str] = (),
) -> tuple[Standing, ...]:
    """The students, the closest to the teacher first.

    Args:
        names: of all models.
        kl: of each model.
        pairs: each pair of models.
        closed: share of the gap that each model closes.
        apart: names that are not ranked, because they are those of the teacher itself.
    """
    closer = dict.fromkeys(names, 0)
    for pair in pairs:
        if pair.kl.is_real and not {pair.student, pair.other}.intersection(apart):
            closer[pair.student if pair.kl.mean > 0 else pair.other] += 1
    ranked = [number for number, name in enumerate(names) if name not in apart]
    order = sorted(ranked, key=lambda number: kl[number].mean)
    return tuple(Standing(names[number], 1 + closer[names[number]], closed[number]) for number in order)
