"""Narrows soft labels to fewer ids, draws and temperatures, without the teacher.

Works on stored codes, so that no kept value is rounded a second time. Only the mass of dropped ids is computed, from
their decoded probabilities. Reads and writes no files.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from softlabel.storage.codec import CODES_PER_NAT, UNKNOWN, ZERO_CODE, Flat, trim_log_masses
from softlabel.storage.identity import Identity
from softlabel.storage.numbering import gaps_of, running_sums

Array = NDArray[Any]

_POSITIONS = 4096
"""Positions to process at a time (at least one row); each id takes a few dozen numbers of memory meanwhile."""


@dataclass(frozen=True)
class Narrowing:
    """What to reduce a table's soft labels to.

    Attributes:
        source: identity of the rows to narrow.
        max_k: largest number of head ids to keep.
        draws: draws from the tail, where it has all the mass.
        temperatures: temperatures to keep.
        tail_logprobs: splits whose rows keep the log-probabilities of their draws.
    """

    source: Identity
    max_k: int
    draws: int
    temperatures: tuple[float, ...]
    tail_logprobs: Literal["eval", "all"] = "eval"

    @property
    def identity(self) -> Identity:
        """Identity of the narrowed rows. If heads and draws stay as they are, it is that of an ordinary capture."""
        old = self.source.selection
        new = old.model_copy(update={"max_k": self.max_k, "min_k": min(old.min_k, self.max_k), "draws": self.draws})
        changes: dict[str, Any] = {
            "selection": new,
            "temperatures": self.temperatures,
            "tail_logprobs": self.tail_logprobs,
        }
        if new != old:
            changes["derived_from"] = self.source.derived_from or old
        return self.source.model_copy(update=changes)

    @property
    def seed(self) -> bytes:
        """Seed of the draws, in addition to each row's key; different for each step of repeated narrowing."""
        return hashlib.blake2b(self.source.model_dump_json().encode(), digest_size=16).digest()


def narrow(flat: Flat, narrowing: Narrowing, keys: Sequence[bytes], row_positions: Array, seed: bytes) -> Flat:
    """The same positions with fewer ids, draws and temperatures.

    The first ``max_k`` ids of each head stay, with their codes. A dropped id's probability goes to the tail, at each
    temperature: there p = (1 - r) softmax(log p / T) over the head. The ceil(draws x r') new draws are sampled from the
    dropped ids (with their exact probabilities) and the M old draws (with r / M each), so that the expectation of head
    and tail stays the same. A position that loses no ids keeps its draws, unless their number changes. Whether the
    log-probabilities of the old draws are known does not matter for any of this.

    Args:
        flat: encoded values of the rows, with token ids (``storage.codec.with_token_ids``).
        narrowing: what to keep.
        keys: (R,) key of each row.
        row_positions: (R,) captured positions of each row.
        seed: seed of the draws, together with each row's key.

    Returns:
        The encoded values of the narrowed rows, with token ids.
    """
    ends = np.append(0, np.cumsum(row_positions, dtype=np.int64))
    cuts = np.flatnonzero(np.diff(ends[1:] // _POSITIONS, prepend=0)).tolist()
    parts = []
    for a, b in pairwise([0, *(cut for cut in cuts if cut), len(keys)]):
        part = _slice(flat, ends[a], ends[b], len(narrowing.source.temperatures))
        parts.append(_narrow(part, narrowing, keys[a:b], row_positions[a:b], seed))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _slice(flat: Flat, first: int, last: int, temperatures: int) -> Flat:
    """The encoded values of some positions."""
    heads, tails = (
        slice(*np.append(0, np.cumsum(flat[name], dtype=np.int64))[[first, last]])
        for name in ("head_counts", "tail_counts")
    )
    parts = dict.fromkeys(("head_ids", "head_codes"), heads)
    parts |= dict.fromkeys(("tail_ids", "tail_draws", "tail_codes"), tails)
    parts["tail_log_masses"] = slice(first * temperatures, last * temperatures)
    return {name: values[parts.get(name, slice(first, last))] for name, values in flat.items()}


def _narrow(flat: Flat, narrowing: Narrowing, keys: Sequence[bytes], row_positions: Array, seed: bytes) -> Flat:
    temperatures = narrowing.source.temperatures
    log_masses = flat["tail_log_masses"].reshape(-1, len(temperatures)).T.astype(np.float64)
    ids = _Ids.of(flat)
    head = ids.is_head & (ids.places < narrowing.max_k)
    masses = np.array([_log_mass(ids, head, mass, T) for mass, T in zip(log_masses, temperatures, strict=True)])
    before, after = _draws(ids, head, masses[0], narrowing)
    random = _random(keys, row_positions, before, after, seed)
    draws = _draw(ids, head, log_masses[0], before, after, *random)
    tail = draws > 0
    return flat | {
        "head_counts": ids.count(head),
        "head_ids": ids.token_ids[head],
        "head_codes": gaps_of(ids.codes[head], ids.count(head)),
        "tail_counts": ids.count(tail),
        "tail_ids": ids.token_ids[tail],
        "tail_draws": draws[tail],
        "tail_codes": _tail_codes(ids, log_masses[0], row_positions)[tail],
        "tail_log_masses": trim_log_masses(masses[[temperatures.index(T) for T in narrowing.temperatures]]).T.ravel(),
    }


def _tail_codes(ids: "_Ids", log_masses: Array, row_positions: Array) -> Array:
    """The code of each id as one of a tail; unknown in each row in which that of one of the old draws is unknown."""
    weights = _weights(ids, 1.0)
    total = ids.sum(weights)
    with np.errstate(divide="ignore", invalid="ignore"):
        logprobs = np.log(weights) + (np.log(-np.expm1(log_masses)) - np.log(total))[ids.positions]
    possible = np.isfinite(logprobs)
    of_heads = np.full(len(logprobs), ZERO_CODE)
    of_heads[possible] = np.rint(np.clip(-CODES_PER_NAT * logprobs[possible], 0, ZERO_CODE)).astype(np.int64)
    codes = np.where(ids.is_head, of_heads, ids.codes)
    rows = np.repeat(np.arange(len(row_positions)), row_positions)[ids.positions]
    unknown = np.bincount(rows, codes < 0, len(row_positions)) > 0
    return np.where(unknown[rows], UNKNOWN, codes)


@dataclass(frozen=True)
class _Ids:
    """Head and tail ids of N positions in one list, position after position, those of the head first."""

    token_ids: Array
    codes: Array
    """In a head, counted from its first id; in a tail, absolute."""
    draws: Array
    """0 in the head."""
    is_head: Array
    counts: Array
    """(N,) ids of each position."""
    positions: Array
    """Index of the position of each id."""
    places: Array
    """Index of each id within its position."""

    @classmethod
    def of(cls, flat: Flat) -> "_Ids":
        heads, tails = flat["head_counts"].astype(np.int64), flat["tail_counts"].astype(np.int64)
        counts = heads + tails
        positions = np.repeat(np.arange(len(counts)), counts)
        places = np.arange(counts.sum()) - _starts(counts)[positions]
        is_head = places < np.repeat(heads, counts)
        token_ids, codes, draws = (np.zeros(len(places), np.int64) for _ in range(3))
        token_ids[is_head], token_ids[~is_head] = flat["head_ids"], flat["tail_ids"]
        codes[is_head], codes[~is_head] = running_sums(flat["head_codes"], heads), flat["tail_codes"]
        draws[~is_head] = flat["tail_draws"]
        return cls(token_ids, codes, draws, is_head, counts, positions, places)

    def sum(self, values: Array) -> Array:
        """(N,) sum over the ids of each position."""
        total: Array = np.bincount(self.positions, values, len(self.counts))
        return total

    def count(self, chosen: Array) -> Array:
        """(N,) number of chosen ids at each position."""
        total: Array = np.bincount(self.positions[chosen], minlength=len(self.counts))
        return total


def _weights(ids: _Ids, T: float) -> Array:
    """Unnormalized probabilities of the head's ids at temperature T; 0 for the tail's ids."""
    weights = np.exp(ids.codes / (-CODES_PER_NAT * T))
    return np.where(ids.is_head & (ids.codes < ZERO_CODE), weights, 0.0)


def _shares(ids: _Ids, chosen: Array, T: float) -> Array:
    """(N,) share of the chosen ids in the head's mass."""
    weights = _weights(ids, T)
    total = ids.sum(weights)
    shares: Array = ids.sum(np.where(chosen, weights, 0.0)) / np.where(total > 0, total, 1.0)
    return shares


def _log_mass(ids: _Ids, kept: Array, log_mass: Array, T: float) -> Array:
    """(N,) log of the mass outside the kept ids, given the log of the mass outside the old head."""
    with np.errstate(divide="ignore"):
        head = np.log(-np.expm1(log_mass))
        dropped = head + np.log(_shares(ids, ids.is_head & ~kept, T))
    return np.where(ids.count(kept) > 0, np.minimum(np.logaddexp(log_mass, dropped), 0.0), 0.0)


def _draws(ids: _Ids, head: Array, log_masses: Array, narrowing: Narrowing) -> tuple[Array, Array]:
    """(N,) number of draws at each position before and after narrowing."""
    before = ids.sum(ids.draws).astype(np.int64)
    dropped = ids.count(_dropped(ids, head))
    after = np.ceil(narrowing.draws * np.exp(log_masses)).astype(np.int64)
    after[before + dropped == 0] = 0  # nothing to draw from: the remaining ids have probability 0
    same = narrowing.draws == narrowing.source.selection.draws
    return before, np.where((dropped == 0) & same, before, after)


def _random(keys: Sequence[bytes], row_positions: Array, before: Array, after: Array, seed: bytes) -> list[Array]:
    """uint64 random bits for the new draws and for the old draws, from a counter-based generator for each row."""
    ends = np.append(0, np.cumsum(row_positions))
    olds, news = (np.append(0, np.cumsum(counts))[ends] for counts in (before, after))
    parts = [np.zeros((0,), np.uint64)], [np.zeros((0,), np.uint64)]
    for key, new, old in zip(keys, np.diff(news).tolist(), np.diff(olds).tolist(), strict=True):
        if new:
            digest = hashlib.blake2b(seed + key, digest_size=16).digest()
            bits = np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(new + old)
            parts[0].append(bits[:new])
            parts[1].append(bits[new:])
        else:
            parts[1].append(np.zeros(old, np.uint64))
    return [np.concatenate(part) for part in parts]


def _draw(
    ids: _Ids, head: Array, log_masses: Array, before: Array, after: Array, choices: Array, shuffles: Array
) -> Array:
    """How often each id is drawn into the new tail.

    Each draw takes a dropped id with its probability, or else the next of the old draws in random order: all are
    equally likely, and none is taken twice before all were taken once.

    Args:
        ids: ids of N positions.
        head: which ids stay in the head.
        log_masses: (N,) log of the old tail's mass.
        before: (N,) number of old draws.
        after: (N,) number of new draws.
        choices: (sum of after,) random bits.
        shuffles: (sum of before,) random bits.
    """
    at = np.repeat(np.arange(len(after)), after)
    dropped = _dropped(ids, head)
    share = _dropped_share(ids, dropped, log_masses, before)
    uniforms = ((choices >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    from_head = uniforms < share[at]

    where = np.flatnonzero(dropped)
    weights = _weights(ids, 1.0)[where]
    total = np.bincount(ids.positions[where], weights, len(after))
    running = np.append(0.0, np.cumsum(weights / total[ids.positions[where]]))  # 1 more after each position
    counts = ids.count(dropped)
    position = at[from_head]
    targets = running[_starts(counts)[position]] + uniforms[from_head] / share[position]
    found = np.searchsorted(running[1:], targets, side="right")
    first = _starts(counts)[position]
    picked = where[np.clip(found, first, first + counts[position] - 1)]

    shuffled = np.repeat(np.arange(len(ids.draws)), ids.draws)
    shuffled = shuffled[np.lexsort((shuffles, ids.positions[shuffled]))]
    position = at[~from_head]
    number = np.cumsum(~from_head)[~from_head] - 1
    number -= np.append(0, np.cumsum(~from_head))[_starts(after)][position]  # of the old draw within its position
    again = shuffled[_starts(before)[position] + number % before[position]]
    times: Array = np.bincount(np.concatenate([picked, again]), minlength=len(ids.draws))
    return times


def _dropped(ids: _Ids, head: Array) -> Array:
    """Which ids are dropped from the head, without those of probability 0."""
    dropped: Array = ids.is_head & ~head & (ids.codes < ZERO_CODE)
    return dropped


def _dropped_share(ids: _Ids, dropped: Array, log_masses: Array, before: Array) -> Array:
    """(N,) share of the dropped ids in the mass that the new draws are sampled from."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        log_dropped = np.log(-np.expm1(log_masses)) + np.log(_shares(ids, dropped, 1.0))
        share: Array = 1 / (1 + np.exp(log_masses - log_dropped))
    share[log_dropped == -np.inf] = 0.0
    share[before == 0] = 1.0
    return share


def _starts(counts: Array) -> Array:
    starts: Array = np.cumsum(counts) - counts
    return starts
