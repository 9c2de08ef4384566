"""Maps the teacher's classes to a student's labels: unchanged, merged, or only some of them.

Works on names and probabilities; reads no table and no model.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from softlabel.storage.errors import UsageError


@dataclass(frozen=True)
class LabelMap:
    """The student's label for each of the teacher's classes."""

    classes: tuple[str, ...]
    """The teacher's classes."""
    names: tuple[str, ...]
    """The student's labels."""
    members: tuple[int, ...]
    """For each class, the id of its label; -1 for none."""

    @classmethod
    def of(cls, labels: Sequence[str], classes: Sequence[str]) -> Self:
        """Parse student.labels.

        Args:
            labels: each NAME=CLASS,CLASS,... or the name of a class; empty for the teacher's classes themselves.
            classes: the teacher's classes.

        Raises:
            UsageError: if a label names an unknown class, two labels share a class or a name, a label has the name of
                a class that it does not include, or there are fewer than two labels.
        """
        names, members = [], dict.fromkeys(classes, -1)
        for number, label in enumerate(labels or classes):
            name, has_members, listed = label.partition("=")
            if label in members or not has_members:
                name = label
            names.append(name)
            for member in [label] if name == label else listed.split(","):
                if member not in members:
                    near = get_close_matches(member, classes, n=1)
                    raise _labels_error(
                        f"{label}: the teacher has no class {member!r}",
                        classes,
                        f"did you mean {near[0]!r}?" if near else "name only the teacher's classes after the =",
                    )
                if members[member] >= 0:
                    raise _labels_error(
                        f"{member} belongs to two labels", classes, "put each class into at most one label"
                    )
                members[member] = number
        ambiguous = [name for number, name in enumerate(names) if members.get(name, number) != number]
        if ambiguous:
            raise _labels_error(
                f"{ambiguous[0]} is the name of a class that is not part of the label {ambiguous[0]}",
                classes,
                f"give the label another name: for a document labelled {ambiguous[0]}, it would be unclear whether the "
                "class or the label is meant",
            )
        repeated = [name for name, count in Counter(names).items() if count > 1]
        if repeated or len(names) < 2:
            raise _labels_error(" ".join(names), classes, "give at least two labels, each with a different name")
        return cls(tuple(classes), tuple(names), tuple(members.values()))

    def ids(self, labels: Sequence[str | None]) -> NDArray[np.int64]:
        """(N,) id of the student's label for each document's label or class; -1 for none, or a class left out.

        Raises:
            UsageError: if a document's label is neither one of the student's labels nor one of the teacher's classes.
        """
        known = dict(zip(self.classes, self.members, strict=True)) | {name: i for i, name in enumerate(self.names)}
        unknown = sorted({label for label in labels if label is not None and label not in known})
        if unknown:
            raise UsageError(
                "some documents have labels that are neither the student's labels nor the teacher's classes",
                expected=f"{', '.join(self.names)}; or {', '.join(self.classes)}",
                found=", ".join(map(repr, unknown[:8])),
                do="correct the documents' labels and capture again, or leave these rows out with reprocess --where",
            )
        return np.array([-1 if label is None else known[label] for label in labels], np.int64)

    def merge(self, logprobs: NDArray[np.floating[Any]]) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        """The teacher's distribution over the student's labels.

        Classes are merged at temperature 1, so that a student with exactly this distribution is optimal at every
        temperature of the loss.

        Args:
            logprobs: (N, classes) nats.

        Returns:
            (N, labels) log-probabilities in nats, renormalized; all NaN where no class with a label has any
            probability. And (N,) the mass of the classes that are left out.
        """
        members, probabilities = np.array(self.members), np.exp(logprobs.astype(np.float64))
        merged = np.stack([probabilities[:, members == label].sum(1) for label in range(len(self.names))], 1)
        total = merged.sum(1, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.log(merged / total).astype(np.float32), np.clip(1 - total[:, 0], 0, 1)


def _labels_error(found: str, classes: Sequence[str], do: str) -> UsageError:
    return UsageError(
        "student.labels does not fit the teacher's classes",
        expected=f"student.labels: class names, or NAME=CLASS,CLASS,..., from the classes {', '.join(classes)}",
        found=found,
        do=do,
    )
