"""How far a student is from its teacher: one pass over captured positions, and the sums that come of it.

The teacher's side comes from the table, so that no teacher is needed. Logits exist for a chunk of positions at a time.
Nothing here trains, reads files, or decides which sequences are measured.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from softlabel.pipeline.config.train import LossConfig
from softlabel.pipeline.loss.averaging import decode
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
class Estimate:
    """A mean over positions, and its standard error if sequences, rather than positions, are independent."""

    mean: float
    error: float | None
    """None for a single sequence."""

    def tells_from(self, other: "Estimate") -> bool:
        """Whether two means differ by more than two standard errors of their difference.

        Of the same sequences this is cautious: what is hard for one student is hard for the other, and their errors are
        added as if they had nothing in common.
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
    """A student's numbers over positions, in nats at temperature 1, beside the teacher's own."""

    sequences: int
    positions: int
    cross_entropy: Estimate
    """With the token that really follows."""
    kl: Estimate
    """Forward KL, from the teacher to the student."""
    kl_kind: Literal["unbiased", "lower bound", "mean over teachers"]
    """Unbiased where the table has a sampled tail or keeps everything; a lower bound where what the head leaves counts
    as one outcome; of an average, unbiased too, but the mean of the KL from each teacher: the KL from their average,
    and what the teachers differ from that."""
    agreement: Estimate | None
    """Share of positions at which both hold the same token most likely; None if the table keeps no head."""
    teacher_cross_entropy: Estimate
    teacher_entropy: Estimate
    by_entropy: tuple[EntropyBin, ...]
    """In the order of the entropy; bins without positions are left out."""


@torch.no_grad()
def measure(model: "PreTrainedModel", batches: "Iterable[Batch]", table: AnyTable) -> Metrics:
    """Measure a student, without changing whether it is in training mode.

    The KL is the cross-entropy with head and weighted draws, less the teacher's exact entropy, which is stored: that is
    an unbiased estimate of the KL over the whole vocabulary. Without draws it is the KL of the head and one bucket
    for the rest.

    Args:
        model: the student.
        batches: at least one captured position in all; their targets are the table's.
        table: says the vocabulary, the temperatures, and whether there are draws.
    """
    was_training = model.training
    model.eval()
    try:
        average = isinstance(table, View) and table.average
        return _summarise(list(_by_batch(model, batches, table)), "mean over teachers" if average else "unbiased")
    finally:
        model.train(was_training)


@dataclass(frozen=True)
class _Sums:
    """Of one batch: sums by sequence, and by bin of the teacher's entropy."""

    by_sequence: Tensor
    """(sequences, 1 + quantities): positions, then each quantity's sum."""
    by_bin: Tensor
    """(bins, 2): positions, and their KL's sum."""
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
        targets = decode(batch.targets, vocabulary, table.temperatures, loss)
        likeliest = targets.ids[:, 0].masked_fill(batch.targets.head_counts == 0, -1)
        budget = _CHUNK_BYTES.get(model.device.type, _CHUNK_BYTES["cuda"])
        rows = max(1, budget // (4 * head.weight.shape[0]))
        chunks = [slice(start, start + rows) for start in range(0, len(states), rows)]
        student = torch.cat(
            [_student(head, len(vocabulary), states[c], targets[c], batch.next_ids[c], likeliest[c]) for c in chunks]
        )
        values = torch.cat([student, -batch.targets.next_logprobs[:, None], targets.entropies[:, None]], 1).double()
        # A packed row holds several sequences; each begins where the position ids begin again.
        starts = (batch.position_ids.flatten() == 0).cumsum(0)
        sequence = torch.unique(starts[batch.positions], return_inverse=True)[1]
        bins = (targets.entropies / ENTROPY_BIN).floor().long().clamp(min=0)
        yield _Sums(
            _sums(sequence, values),
            _sums(bins, values[:, [_QUANTITIES.index("kl")]]),
            bounded=bool((targets.log_rest > -torch.inf).any()),
        )


def _student(
    head: OutputHead, vocabulary: int, states: Tensor, targets: SparseTargets, next_ids: Tensor, likeliest: Tensor
) -> Tensor:
    """(n, 3) cross-entropy, KL and agreement (1, 0, or NaN if the teacher's likeliest token is not known)."""
    logits = head(states)[:, :vocabulary].float()
    top, argmax = logits.max(1, keepdim=True)
    log_total = top + (logits - top).exp_().sum(1, keepdim=True).log()
    hard = log_total - logits.gather(1, next_ids[:, None])
    agreement = (argmax[:, 0] == likeliest).float().masked_fill(likeliest < 0, torch.nan)
    log_s = logits.gather(1, targets.ids) - log_total
    if targets.target == "sampled":
        kl = cross_entropy(targets.logprobs, log_s) - targets.entropies
    else:
        # Added, not written: entries that pad a row all name id 0, which may be kept, or one of the rest.
        kept = targets.logprobs > -torch.inf
        logits.scatter_add_(1, targets.ids, torch.where(kept, -torch.inf, 0.0))
        log_s = torch.cat([log_s, logits.logsumexp(1, keepdim=True) - log_total], 1)
        log_t = torch.cat([targets.logprobs, targets.log_rest[:, None]], 1)
        kl = divergence_terms("forward_kl", log_t, log_s, mix=0.5)[0].sum(1)
    return torch.stack([hard[:, 0], kl, agreement], 1)


def _sums(groups: Tensor, values: Tensor) -> Tensor:
    """(groups, 1 + quantities) on the CPU: how many rows of ``values`` each group has, and their sum."""
    counted = torch.cat([torch.ones_like(values[:, :1]), values], 1)
    sums = counted.new_zeros(int(groups.max()) + 1 if len(groups) else 0, counted.shape[1])
    return sums.index_add_(0, groups, counted).cpu()


def _summarise(parts: list[_Sums], kl_kind: Literal["unbiased", "mean over teachers"]) -> Metrics:
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


def _estimate(positions: Tensor, sums: Tensor) -> Estimate:
    """Mean a position of per-sequence sums; its error by the residuals of a ratio of two sums over sequences."""
    total, sequences = positions.sum(), len(positions)
    mean = sums.sum() / total
    if sequences < 2:
        return Estimate(float(mean), None)
    residuals = sums - mean * positions
    variance = residuals.square().sum() * sequences / (sequences - 1)
    return Estimate(float(mean), float(variance.sqrt() / total))
