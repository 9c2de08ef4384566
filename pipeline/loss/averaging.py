"""The average of several teachers as a target: their soft labels at the same positions, and how these are decoded.

Only forward KL supports an average: its gradient is linear in the target, so the weighted union of the tables' unbiased
estimates is an unbiased estimate of the average. The loss is the weighted mean of the KL to each teacher, which is the
KL to their average plus how far the teachers differ from it; the second part does not depend on the student.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from softlabel.pipeline.config.train import LossConfig
from softlabel.pipeline.loss import targets
from softlabel.pipeline.loss.targets import CompactTargets, SparseTargets
from softlabel.storage.errors import UsageError


@dataclass(frozen=True)
class AveragedTargets:
    """Soft labels of N positions by several teachers with the same vocabulary."""

    parts: tuple[CompactTargets, ...]
    """Each teacher's soft labels, only used at temperature 1."""
    weights: tuple[float, ...]
    """Each teacher's weight; they add up to 1."""

    @property
    def positions(self) -> int:
        """Number of positions, N."""
        return self.parts[0].positions

    @property
    def head_counts(self) -> Tensor:
        """(N,) int16: number of ids in the heads of all teachers."""
        return torch.stack([part.head_counts for part in self.parts]).sum(0, dtype=torch.int16)

    @property
    def next_logprobs(self) -> Tensor:
        """(N,) float32: the average's log-probability of the token that follows, in nats."""
        log_weights = self.parts[0].next_logprobs.new_tensor(self.weights).log()
        return (torch.stack([part.next_logprobs for part in self.parts], 1) + log_weights).logsumexp(1)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Copy to another device."""
        return self._each(lambda part: part.to(device, non_blocking))

    def pin_memory(self) -> Self:
        """Copy to page-locked memory, for asynchronous transfers to a GPU."""
        return self._each(lambda part: part.pin_memory())

    def _each(self, change: Callable[[CompactTargets], CompactTargets]) -> Self:
        return type(self)(tuple(map(change, self.parts)), self.weights)


def require_average(loss: LossConfig, max_k: int | None) -> None:
    """Refuse a loss that can't be computed from an average of teachers, before anything runs.

    Raises:
        UsageError: with the settings that conflict.
    """
    conflicts = {
        f"loss.divergence: {loss.divergence}": loss.divergence != "forward_kl",
        f"loss.temperature: {loss.temperature:g}": loss.temperature != 1,
        f"loss.target: {loss.target}": loss.target not in ("auto", "sampled"),
        f"stream.max_k: {max_k}": max_k is not None,
    }
    found = [setting for setting, conflict in conflicts.items() if conflict]
    if found:
        raise UsageError(
            "an average of teachers can only be trained on with forward KL at temperature 1",
            expected="loss.divergence: forward_kl, loss.temperature: 1, loss.target: auto, and no stream.max_k",
            found="; ".join(found),
            do="leave these settings out, or train on one of the tables, or on a concatenation of them",
        )


def decode_batch(
    compact: CompactTargets | AveragedTargets,
    token_ids: targets.TokenIds,
    temperatures: Sequence[float],
    loss: LossConfig,
    max_k: int | None = None,
) -> SparseTargets:
    """Targets of N positions, from one teacher (``pipeline.loss.targets.decode_targets``) or from an average.

    For an average, ids are in the order of their estimated probability, and the entropy is the teachers' mean.

    Raises:
        UsageError: see ``pipeline.loss.targets.decode_targets`` and ``require_average``.
    """
    if isinstance(compact, CompactTargets):
        return targets.decode_targets(compact, token_ids, temperatures, loss, max_k)
    require_average(loss, max_k)
    sampled = loss.model_copy(update={"target": "sampled"})
    parts = [targets.decode_targets(part, token_ids, temperatures, sampled) for part in compact.parts]
    weighted = list(zip(parts, compact.weights, strict=True))
    ids = torch.cat([part.ids for part in parts], 1)
    probabilities = torch.cat([part.logprobs.exp() * weight for part, weight in weighted], 1)
    ids, probabilities = _merge(ids, probabilities)
    entropies = torch.stack([part.entropies * weight for part, weight in weighted]).sum(0)
    return SparseTargets(ids, probabilities.log(), parts[0].log_rest, entropies, "sampled")


def _merge(ids: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """Each position's distinct ids with their summed probabilities, the most probable first, padded with zeros."""
    ids, order = ids.sort(1)
    is_new = torch.ones_like(ids, dtype=torch.bool)
    is_new[:, 1:] = ids[:, 1:] != ids[:, :-1]
    places = is_new.cumsum(1) - 1
    merged = torch.zeros_like(probabilities).scatter_add_(1, places, probabilities.gather(1, order))
    merged, order = merged.sort(stable=True, dim=1, descending=True)
    distinct = torch.zeros_like(ids).scatter_(1, places, ids).gather(1, order)
    width = int((merged > 0).sum(1).max()) if len(ids) else 0
    return distinct[:, :width], merged[:, :width]
