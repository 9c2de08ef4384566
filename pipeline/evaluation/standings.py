"""The order of students by their distance from the teacher, as far as the documents tell it, and which are outdone.

A student is outdone by another that is closer to the teacher and costs no more to use.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from softlabel.pipeline.evaluation.bootstrap import Difference, Estimate
from softlabel.pipeline.evaluation.cost import Rate

_NAMED = 3
"""Names that ``in_words`` has room for."""


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
class Use:
    """What one student costs to use."""

    parameters: int | None
    rate: Rate | None
    """Tokens generated or documents classified in a second; None if it was not measured."""

    def exceeds(self, other: "Use") -> bool:
        """Whether it is larger or, by more than the spread of the runs, slower than another."""
        larger = (self.parameters or 0) > (other.parameters or 0)
        if self.rate is None or other.rate is None:
            return larger
        return larger or self.rate.fastest < other.rate.slowest


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
    outdone_by: tuple[str, ...] = ()
    """Students that are really closer to the teacher, and neither larger nor, as far as it was measured, slower."""


def standings_of(
    names: Sequence[str],
    kl: Sequence[Estimate],
    pairs: Sequence[Pair],
    closed: Sequence[Estimate | None],
    uses: Sequence[Use],
    apart: Collection[str] = (),
) -> tuple[Standing, ...]:
    """The students, the closest to the teacher first.

    Args:
        names: of all models.
        kl: of each model.
        pairs: each pair of models.
        closed: share of the gap that each model closes.
        uses: what each model costs to use.
        apart: names that are not ranked, because they are those of the teacher itself.
    """
    closer: dict[str, list[str]] = {name: [] for name in names}
    for pair in pairs:
        if pair.kl.is_real and not {pair.student, pair.other}.intersection(apart):
            near, far = (pair.other, pair.student) if pair.kl.mean > 0 else (pair.student, pair.other)
            closer[far].append(near)
    ranked = [number for number, name in enumerate(names) if name not in apart]
    use = dict(zip(names, uses, strict=True))
    return tuple(
        Standing(
            student=(name := names[number]),
            place=1 + len(closer[name]),
            gap_closed=closed[number],
            outdone_by=tuple(near for near in closer[name] if not use[near].exceeds(use[name])),
        )
        for number in sorted(ranked, key=lambda number: kl[number].mean)
    )


def in_words(names: Sequence[str]) -> str:
    """A few names, and how many more there are."""
    more = len(names) - _NAMED
    return ", ".join(names) if more <= 1 else f"{', '.join(names[:_NAMED])} and {more:,} more"
