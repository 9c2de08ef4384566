"""How far a student is from its teacher, measured in one pass over captured positions.

The teacher's predictions come from the table, so no teacher is needed. Logits exist for a chunk of positions at a time.
Nothing here trains, reads files, or decides which sequences are measured.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from softlabel.pipeline.config.train import LossConfig
from softlabel.pipeline.loss.averaging import decode_batch
from softlabel.pipeline.loss.divergence import cross_entropy, divergence_terms
from softlabel.pipeline.loss.targets import SparseTargets
from softlabel.pipeline.students.build import OutputHead, hidden_states, output_head
from softlabel.storage.views.view import AnyTable, View

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from softlabel.pipeline.stream.batch import Batch

ENTROPY_BIN = 0.5
"""Width in nats of the bins by the teacher's entropy."""
_CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}
"""Logits in float32 that are held at a time, by kind of device."""
_QUANTITIES = ("cross_entropy", "kl", "agreement", "teacher_cross_entropy", "teacher_entropy")


@dataclass(frozen=True)
class MeanWithError:
    """A mean over positions, and its standard error if sequences, rather than positions, are independent."""

    mean: float
    error: float | None
    """None for a single sequence."""

    def tells_from(self, other: "MeanWithError") -> bool:
        """Whether two means differ by more than two standard errors of their difference.

        This is conservative for means over the same sequences: their errors are correlated, since what is hard for one
        student is hard for the other, but are added as if they were independent.
        """
        if self.error is None or other.error is None:
            return False
        return abs(self.mean - other.mean) > 2 * math.hypot(self.error, other.error)


@dataclass(frozen=True)
class EntropyBin:
    """Positions at which the teacher's entropy (nats) is in [low, high), and the mean KL there."""

    low: float
    high: float
    positions: int
    kl: float


@dataclass(frozen=True)
class Metrics:
    """A student's metrics over positions, in nats at temperature 1, and the teacher's."""

    sequences: int
    positions: int
    cross_entropy: MeanWithError
    """With the token that actually follows."""
    kl: MeanWithError
    """Forward KL, from the teacher to the student."""
    kl_kind: Literal["unbiased", "lower bound", "mean over teachers"]
    """Unbiased if the table has a sampled tail or stores whole distributions; a lower bound if all tokens outside the
    head count as one outcome; for an average of teachers, the (unbiased) mean of the KL from each teacher, which is the
    KL from their average plus how far the teachers differ from it."""
    agreement: MeanWithError | None
    """Share of positions at which both have the same most likely token; None if the table has no head."""
    teacher_cross_entropy: MeanWithError
    teacher_entropy: MeanWithError
    by_entropy: tuple[EntropyBin, ...]
    """In order of entropy; bins without positions are left out."""


@torch.no_grad()
def measure(model: "PreTrainedModel", batches: "Iterable[Batch]", table: AnyTable) -> Metrics:
    """Measure a student; its training mode is restored afterwards.

    The KL is the cross-entropy with the head and the weighted draws, minus the teacher's stored exact entropy: an
    unbiased estimate of the KL over the whole vocabulary. Without draws it is the KL over the head and one bucket for
    the rest.

    Args:
        model: the student.
        batches: batches of the table, with at least one captured position in all.
        table: the table that the batches are from.
    """
    was_training = model.training
    model.eval()
    try:
        average = isinstance(table, View) and table.average
        return _summarize(list(_by_batch(model, batches, table)), "mean over teachers" if average else "unbiased")
    finally:
        model.train(was_training)


@dataclass(frozen=True)
class _Sums:
    """Sums over one batch, by sequence and by bin of the teacher's entropy."""

    by_sequence: Tensor
    """(sequences, 1 + quantities): number of positions, then each quantity's sum."""
    by_bin: Tensor
    """(bins, 2): number of positions, and the sum of their KL."""
    bounded: bool
    """Whether any KL is only a lower bound."""


def _by_batch(model: "PreTrainedModel", batches: "Iterable[Batch]", table: AnyTable) -> Iterator[_Sums]:
    head, vocabulary = output_head(model), torch.tensor(table.vocabulary, device=model.device)
    loss = LossConfig(target="sampled" if table.draws else "bucket")
    for batch in batches:
        if not len(batch.positions):
            continue
        batch = batch.to(model.device)
        states = hidden_states(model, batch.input_ids, batch.position_ids).flatten(0, 1)[batch.positions]
        targets = decode_batch(batch.targets, vocabulary, table.temperatures, loss)
        most_likely = targets.ids[:, 0].masked_fill(batch.targets.head_counts == 0, -1)
        budget = _CHUNK_BYTES.get(model.device.type, _CHUNK_BYTES["cuda"])
        rows = max(1, budget // (4 * head.weight.shape[0]))
        chunks = [slice(start, start + rows) for start in range(0, len(states), rows)]
        student = torch.cat(
            [_student(head, len(vocabulary), states[c], targets[c], batch.next_ids[c], most_likely[c]) for c in chunks]
        )
        values = torch.cat([student, -batch.targets.next_logprobs[:, None], targets.entropies[:, None]], 1).double()
        # A packed row holds several sequences; each begins where the position ids restart at 0.
        starts = (batch.position_ids.flatten() == 0).cumsum(0)
        sequence = torch.unique(starts[batch.positions], return_inverse=True)[1]
        bins = (targets.entropies / ENTROPY_BIN).floor().long().clamp(min=0)
        yield _Sums(
            _sums(sequence, values),
            _sums(bins, values[:, [_QUANTITIES.index("kl")]]),
            bounded=bool((targets.log_rest > -torch.inf).any()),
        )


def _student(
    head: OutputHead, vocabulary: int, states: Tensor, targets: SparseTargets, next_ids: Tensor, most_likely: Tensor
) -> Tensor:
    """(n, 3) cross-entropy, KL and agreement (1, 0, or NaN if the teacher's most likely token is unknown)."""
    logits = head(states)[:, :vocabulary].float()
    top, argmax = logits.max(1, keepdim=True)
    log_total = top + (logits - top).exp_().sum(1, keepdim=True).log()
    hard = log_total - logits.gather(1, next_ids[:, None])
    agreement = (argmax[:, 0] == most_likely).float().masked_fill(most_likely < 0, torch.nan)
    log_s = logits.gather(1, targets.ids) - log_total
    if targets.target == "sampled":
        kl = cross_entropy(targets.logprobs, log_s) - targets.entropies
    else:
        # Added, not assigned: padding entries all point to id 0, which may be in the head or in the rest.
        kept = targets.logprobs > -torch.inf
        logits.scatter_add_(1, targets.ids, torch.where(kept, -torch.inf, 0.0))
        log_s = torch.cat([log_s, logits.logsumexp(1, keepdim=True) - log_total], 1)
        log_t = torch.cat([targets.logprobs, targets.log_rest[:, None]], 1)
        kl = divergence_terms("forward_kl", log_t, log_s, mix=0.5)[0].sum(1)
    return torch.stack([hard[:, 0], kl, agreement], 1)


def _sums(groups: Tensor, values: Tensor) -> Tensor:
    """(groups, 1 + quantities) on the CPU: each group's number of rows in ``values``, and their sums."""
    counted = torch.cat([torch.ones_like(values[:, :1]), values], 1)
    sums = counted.new_zeros(int(groups.max()) + 1 if len(groups) else 0, counted.shape[1])
    return sums.index_add_(0, groups, counted).cpu()


def _summarize(parts: list[_Sums], kl_kind: Literal["unbiased", "mean over teachers"]) -> Metrics:
    by_sequence = torch.cat([part.by_sequence for part in parts])
    means = {name: _estimate(by_sequence[:, 0], by_sequence[:, 1 + i]) for i, name in enumerate(_QUANTITIES)}
    by_bin = torch.zeros(max(len(part.by_bin) for part in parts), 2, dtype=torch.float64)
    for part in parts:
        by_bin[: len(part.by_bin)] += part.by_bin
    agreement = means.pop("agreement")
    return Metrics(
        sequences=len(by_sequence),
        positions=int(by_sequence[:, 0].sum()),
        kl_kind="lower bound" if any(part.bounded for part in parts) else kl_kind,
        agreement=None if math.isnan(agreement.mean) else agreement,
        by_entropy=tuple(
            EntropyBin(i * ENTROPY_BIN, (i + 1) * ENTROPY_BIN, int(positions), kl / positions)
            for i, (positions, kl) in enumerate(by_bin.tolist())
            if positions
        ),
        **means,
    )


def _estimate(positions: Tensor, sums: Tensor) -> MeanWithError:
    """Mean per position of per-sequence sums, with the standard error of a ratio estimator over sequences."""
    total, sequences = positions.sum(), len(positions)
    mean = sums.sum() / total
    if sequences < 2:
        return MeanWithError(float(mean), None)
    residuals = sums - mean * positions
    variance = residuals.square().sum() * sequences / (sequences - 1)
    return MeanWithError(float(mean), float(variance.sqrt() / total))
