"""Targets of the loss: the table's integers, decoded on the training device.

``CompactTargets`` are the soft-label columns as they are stored, small enough to transfer; ``decode_targets`` turns
them into ``SparseTargets``, a few ids and log-probabilities per position, without a loop over positions.
``resolve_target`` chooses the form of the target, and refuses one that the table can't provide. Reads no files and
knows no student.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Literal, Self

import torch
from torch import Tensor, nn

from softlabel.pipeline.config.train import LossConfig
from softlabel.storage.codec import CODES_PER_NAT, ENTROPY_CODES_PER_NAT, ZERO_CODE
from softlabel.storage.errors import UsageError
from softlabel.storage.numbering import Numbering

Target = Literal["bucket", "sampled", "renormalized", "zero_tail"]


@dataclass(frozen=True)
class CompactTargets:
    """Soft labels of N positions, flat, as a shard stores them (``storage.schema``, FORMAT.md)."""

    head_counts: Tensor
    """(N,) int16: number of ids that are stored exactly."""
    head_clusters: Tensor
    """(N,) int16: cluster in the table's numbering of token ids."""
    head_ids: Tensor
    """(sum of head_counts,) int32: numbers of the ids' places."""
    head_codes: Tensor
    """(sum of head_counts,) int16: log-probabilities as gaps of 1/64 nat, from that of the first id."""
    tail_counts: Tensor
    """(N,) int16: number of distinct ids that were drawn from outside the head."""
    tail_ids: Tensor
    """(sum of tail_counts,) int32: numbers of the gaps between the ids' places."""
    tail_draws: Tensor
    """(sum of tail_counts,) int16: how often each id was drawn."""
    tail_codes: Tensor
    """(sum of tail_counts,) int16: log-probabilities in 1/64 nat; -1 where the table does not store them."""
    tail_log_masses: Tensor
    """(T, N) float32: log of the mass outside the head at each of the table's temperatures."""
    entropies: Tensor
    """(N,) int16: entropy of the whole distribution in 1/256 nat."""
    next_logprobs: Tensor
    """(N,) float32: the teacher's log-probability of the token that follows, in nats."""

    @property
    def positions(self) -> int:
        """Number of positions, N."""
        return self.head_counts.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Copy to another device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Copy to page-locked memory, for asynchronous transfers to a GPU."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        return type(self)(**{field.name: change(getattr(self, field.name)) for field in fields(self)})


class TokenIds(nn.Module):
    """The token ids that a table's numbers stand for, on the training device (``storage.numbering.Numbering``)."""

    places: Tensor
    ids: Tensor
    starts: Tensor

    def __init__(self, numbering: Numbering) -> None:
        super().__init__()
        self._listed = numbering.lists.shape[1]
        self._vocabulary = len(numbering.vocabulary)
        self.register_buffer("places", torch.tensor(numbering.places), persistent=False)
        self.register_buffer("ids", torch.tensor(numbering.token_ids), persistent=False)
        self.register_buffer("starts", torch.tensor(numbering.starts), persistent=False)

    def __len__(self) -> int:
        """Number of token ids."""
        return self._vocabulary

    def of_heads(self, compact: CompactTargets, rows: Tensor) -> Tensor:
        """(sum of head_counts,) int64 ids in heads, given the position of each."""
        return self._at(self.places[compact.head_ids], compact, rows)

    def of_tails(self, compact: CompactTargets, rows: Tensor) -> Tensor:
        """(sum of tail_counts,) int64 ids in tails, given the position of each."""
        return self._at(_running_sums(self.places[compact.tail_ids], compact.tail_counts, rows), compact, rows)

    def _at(self, places: Tensor, compact: CompactTargets, rows: Tensor) -> Tensor:
        own = self.starts[compact.head_clusters.long()][rows]
        return self.ids[places + torch.where(places < self._listed, own, 0)].long()


@dataclass(frozen=True)
class SparseTargets:
    """A target distribution at each of N positions: at most K ids, and one bucket for all others."""

    ids: Tensor
    """(N, K) int64: distinct token ids; padded with 0 where a position has fewer than K."""
    logprobs: Tensor
    """(N, K) float: log of each id's target probability, in nats; -inf where a position has fewer than K ids."""
    log_rest: Tensor
    """(N,) float: log of the bucket's target probability; -inf where the target ignores the other ids."""
    entropies: Tensor
    """(N,) float: exact entropy of the teacher's whole distribution at temperature 1, in nats."""
    target: Target
    """Form of the target."""

    def __getitem__(self, positions: slice) -> Self:
        """The targets of some positions."""
        return type(self)(
            self.ids[positions],
            self.logprobs[positions],
            self.log_rest[positions],
            self.entropies[positions],
            self.target,
        )


@dataclass(frozen=True)
class Draws:
    """The sampled tail at each of N positions: at most K distinct ids, each drawn in proportion to its probability."""

    ids: Tensor
    """(N, K) int64: distinct token ids, none of them in the head; padded with 0 where a position has fewer than K."""
    counts: Tensor
    """(N, K) float: how often each was drawn; 0 in the padding."""
    logprobs: Tensor
    """(N, K) float: the teacher's log-probability of each at temperature 1, in nats, within 1/128; 0 in the padding."""

    def __getitem__(self, positions: slice) -> Self:
        """The draws at some positions."""
        return type(self)(self.ids[positions], self.counts[positions], self.logprobs[positions])


def dropping(max_k: int | None, head: int) -> int | None:
    """``max_k`` if it drops any id of a head with at most ``head`` ids; otherwise None."""
    return max_k if max_k is not None and max_k < head else None


def resolve_target(loss: LossConfig, temperatures: Sequence[float], draws: bool, max_k: int | None = None) -> Target:
    """Choose the form of a loss's target, so that a wrong request fails before anything runs.

    Args:
        loss: divergence, target and temperature.
        temperatures: temperatures that the table stores.
        draws: whether the table has a sampled tail.
        max_k: number of the head's ids to use, if fewer than the head has.

    Raises:
        UsageError: if the table or the divergence does not allow it.
    """
    if loss.temperature not in temperatures:
        raise UsageError(
            f"the table does not store temperature {loss.temperature:g}",
            expected=f"loss.temperature: one of {', '.join(f'{t:g}' for t in temperatures)}",
            found=f"loss.temperature: {loss.temperature:g}",
            do="choose one of these, or capture again with this temperature in selection.temperatures",
        )
    obstacles = {
        f"loss.divergence: {loss.divergence} (the sampled tail is only unbiased for forward_kl)": loss.divergence
        != "forward_kl",
        f"loss.temperature: {loss.temperature:g} (the tail was sampled at temperature 1)": loss.temperature != 1,
        f"stream.max_k: {max_k} (the sampled tail does not cover the head ids that it drops)": max_k is not None,
        "a table without a sampled tail": not draws,
    }
    found = [obstacle for obstacle, present in obstacles.items() if present]
    if loss.target == "auto":
        return "bucket" if found else "sampled"
    if loss.target == "sampled" and found:
        raise UsageError(
            "loss.target: sampled does not work with these settings or this table",
            expected="forward_kl at temperature 1, without stream.max_k, and a table with a sampled tail",
            found="; ".join(found),
            do="set loss.target to bucket, or meet the conditions above",
        )
    if loss.target in ("renormalized", "zero_tail") and loss.divergence == "reverse_kl":
        raise UsageError(
            f"reverse_kl is infinite with a {loss.target} target, whose probability is 0 outside the head",
            expected="loss.target: auto or bucket",
            found=f"loss.target: {loss.target}",
            do="set loss.target to bucket, or choose another loss.divergence",
        )
    return loss.target


def decode_targets(
    compact: CompactTargets,
    token_ids: TokenIds,
    temperatures: Sequence[float],
    loss: LossConfig,
    max_k: int | None = None,
) -> SparseTargets:
    """Decode targets of N positions, on the device of the compact ones.

    Args:
        compact: soft labels as they are stored.
        token_ids: those of the table's numbers, on the same device.
        temperatures: temperatures of ``compact.tail_log_masses``, in its order.
        loss: form and temperature of the target.
        max_k: number of the head's ids to use; the mass of the others goes to the bucket.

    Raises:
        UsageError: see ``resolve_target``.
    """
    target = resolve_target(loss, temperatures, _has_draws(compact, temperatures, loss), max_k)
    log_rest = compact.tail_log_masses[list(temperatures).index(loss.temperature)]
    rows, columns = _places(compact.head_counts, compact.head_ids)
    width = _width(compact.head_counts)
    ids = compact.head_ids.new_zeros((compact.positions, width), dtype=torch.int64)
    ids[rows, columns] = token_ids.of_heads(compact, rows)
    logprobs = log_rest.new_full(ids.shape, -torch.inf)
    codes = _running_sums(compact.head_codes, compact.head_counts, rows)
    logprobs[rows, columns] = _logprobs(codes, log_rest.dtype) / loss.temperature
    logprobs = logprobs + _shift(_log1mexp(log_rest) - logprobs.logsumexp(1))

    if target == "sampled":
        tail_ids, tail_logprobs = _tail(compact, token_ids, log_rest)
        ids, logprobs = torch.cat([ids, tail_ids], 1), torch.cat([logprobs, tail_logprobs], 1)
    elif max_k is not None and max_k < width:
        log_rest = torch.logaddexp(log_rest, logprobs[:, max_k:].logsumexp(1))
        ids, logprobs = ids[:, :max_k], logprobs[:, :max_k]
    if target == "renormalized":
        logprobs = logprobs + _shift(-logprobs.logsumexp(1))
    if target != "bucket":
        log_rest = torch.full_like(log_rest, -torch.inf)
    entropies = (compact.entropies.to(log_rest.dtype) / ENTROPY_CODES_PER_NAT).masked_fill(
        compact.entropies < 0, torch.nan
    )
    return SparseTargets(ids, logprobs, log_rest, entropies, target)


def decode_draws(compact: CompactTargets, token_ids: TokenIds) -> Draws:
    """Decode the sampled tail of N positions with the teacher's probabilities, which only evaluation needs.

    Draws whose probabilities the table does not store count as not drawn.

    Args:
        compact: soft labels as they are stored.
        token_ids: those of the table's numbers, on the same device.
    """
    rows, columns = _places(compact.tail_counts, compact.tail_ids)
    ids = compact.tail_ids.new_zeros((compact.positions, _width(compact.tail_counts)), dtype=torch.int64)
    ids[rows, columns] = token_ids.of_tails(compact, rows)
    known = compact.tail_codes >= 0
    counts = compact.tail_log_masses.new_zeros(ids.shape)
    counts[rows, columns] = torch.where(known, compact.tail_draws, 0).to(counts.dtype)
    logprobs = torch.zeros_like(counts)
    logprobs[rows, columns] = torch.where(known, _logprobs(compact.tail_codes, counts.dtype), 0.0)
    return Draws(ids, counts, logprobs)


def _has_draws(compact: CompactTargets, temperatures: Sequence[float], loss: LossConfig) -> bool:
    """Whether the tail is sampled. A batch without any tail mass needs no draws, so it counts as sampled."""
    if compact.tail_ids.numel():
        return True
    masses = compact.tail_log_masses[list(temperatures).index(1.0)]
    return loss.target == "sampled" and bool((masses.exp() == 0).all())


def _logprobs(codes: Tensor, dtype: torch.dtype) -> Tensor:
    return (codes.to(dtype) / -CODES_PER_NAT).masked_fill(codes >= ZERO_CODE, -torch.inf)


def _tail(compact: CompactTargets, token_ids: TokenIds, log_mass: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and log-weights of the draws, (N, K) each: each draw has an equal share of the tail's mass."""
    rows, columns = _places(compact.tail_counts, compact.tail_ids)
    ids = compact.tail_ids.new_zeros((compact.positions, _width(compact.tail_counts)), dtype=torch.int64)
    ids[rows, columns] = token_ids.of_tails(compact, rows)
    draws = log_mass.new_zeros(ids.shape)
    draws[rows, columns] = compact.tail_draws.to(log_mass.dtype)
    total = draws.sum(1, keepdim=True).clamp(min=1)
    return ids, log_mass[:, None] + (draws / total).log()


def _running_sums(gaps: Tensor, counts: Tensor, rows: Tensor) -> Tensor:
    """The values whose gaps are given: a running sum over all gaps, minus its value before each position."""
    running = gaps.cumsum(0, dtype=torch.int64)
    return running - torch.cat([running.new_zeros(1), running])[_starts(counts)][rows]


def _places(counts: Tensor, flat: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column, in a padded matrix, of each entry of a flat list."""
    rows = torch.repeat_interleave(counts.long(), output_size=flat.shape[0])
    return rows, torch.arange(flat.shape[0], device=flat.device) - _starts(counts)[rows]


def _starts(counts: Tensor) -> Tensor:
    return counts.cumsum(0, dtype=torch.int64) - counts


def _width(counts: Tensor) -> int:
    return int(counts.max()) if counts.numel() else 0


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0, exact at both ends."""
    return torch.where(x > -0.6931, (-torch.expm1(x)).log(), torch.log1p(-x.exp()))


def _shift(shift: Tensor) -> Tensor:
    """(N, 1) shift of a position's log-probabilities; 0 where it has no ids."""
    return shift.nan_to_num(nan=0.0, posinf=0.0, neginf=-torch.inf)[:, None]
