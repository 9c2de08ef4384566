"""Narrowing is exact where the numbers are known, and unbiased where ids are drawn again."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from softlabel.storage import narrowing as module
from softlabel.storage.codec import assemble, decode, encode, flatten, number, with_token_ids
from softlabel.storage.identity import SelectionIdentity
from softlabel.storage.labels import SoftLabels
from softlabel.storage.narrowing import Narrowing
from softlabel.storage.narrowing import narrow as narrow_flat
from softlabel.storage.schema import SOFT_LABELS
from tests.numberings import random_numbering
from tests.storage.tables import VOCABULARY, identity, soft_labels

VOCAB = random_numbering(VOCABULARY)
TEMPERATURES = (1.0, 2.0)


def narrowing(
    k: int, draws: int, new_k: int, new_draws: int, temperatures: tuple[float, ...] = TEMPERATURES
) -> Narrowing:
    selection = SelectionIdentity(top_p=1.0, min_k=min(k, 1), max_k=k, draws=draws, seed=0)
    return Narrowing(identity(TEMPERATURES, selection=selection), new_k, new_draws, temperatures)


def captured(logits: NDArray[Any], k: int, draws: int) -> SoftLabels:
    """As a capture draws: ceil(draws x the mass left) times at each position."""
    rng = np.random.default_rng(5)
    parts = []
    for row in logits:
        mass = np.exp(soft_labels(row[None], [k], 0, (1.0,), rng).tail_log_masses[0, 0])
        parts.append(soft_labels(row[None], [k], int(np.ceil(draws * mass)), TEMPERATURES, np.random.default_rng(5)))
    return SoftLabels.concatenate(parts)


def encoded(labels: SoftLabels, rows: int = 1) -> pa.Table:
    """As so many rows, of as even a number of positions as can be."""
    positions = np.array([len(part) for part in np.array_split(np.arange(labels.positions), rows)])
    columns = encode(labels, positions, VOCAB)
    keys = pa.array([b"%016d" % i for i in range(rows)], pa.binary())
    return columns.append_column("key", keys).append_column("positions", pa.array(positions.astype(np.int32)))


def narrow(rows: pa.Table, wish: Narrowing, seed: bytes) -> pa.Table:
    """Rows narrowed as a rewrite does it."""
    positions = rows.column("positions").to_numpy().astype(np.int64)
    flat = with_token_ids(flatten(rows), VOCAB)
    narrowed = narrow_flat(flat, wish, rows.column("key").to_pylist(), positions, seed)
    columns = assemble(number(narrowed, positions, VOCAB), positions)
    for name in columns.column_names:
        rows = rows.set_column(rows.column_names.index(name), SOFT_LABELS.field(name), columns.column(name))
    return rows


def hostile(kind: str, seed: int) -> NDArray[np.float64]:
    """Logits on bf16's grid, so that there are ties."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(7, VOCABULARY)) * 3
    if kind == "flat":
        logits *= 0
    elif kind == "one-hot":
        logits[:, 7] = 60
    elif kind == "steep":
        logits = -np.arange(VOCABULARY) * rng.uniform(0.1, 2, (7, 1))
    elif kind == "impossible":
        logits[:, 10:] = -np.inf
    return np.round(logits * 16) / 16


kinds = st.sampled_from(["plain", "flat", "one-hot", "steep", "impossible"])


@settings(max_examples=60)
@given(kinds, st.integers(0, 1000), st.integers(1, 64))
def test_narrowing_to_a_smaller_k_equals_a_capture_with_that_k(kind: str, seed: int, k: int) -> None:
    logits = hostile(kind, seed)
    large, small = captured(logits, 64, 0), captured(logits, k, 0)
    found, wanted = narrow(encoded(large), narrowing(64, 0, k, 0), b""), encoded(small)
    for name in set(SOFT_LABELS.names) - {"tail_log_masses"}:
        assert found.column(name).equals(wanted.column(name)), name
    got, true = (decode(rows, VOCAB).tail_log_masses for rows in (found, wanted))
    possible = true > -100  # ids below exp(-511) are stored as impossible
    assert np.abs(got[possible] - true[possible]).max(initial=0) <= 1 / 64
    assert (got <= 0).all()


def test_without_a_head_the_tail_has_all_the_mass() -> None:
    logits = hostile("plain", 0)
    rows = narrow(encoded(captured(logits, 8, 6)), narrowing(8, 6, 0, 6), b"")
    labels = decode(rows, VOCAB)
    assert labels.head_counts.sum() == 0
    assert (labels.tail_log_masses == 0).all()
    assert np.add.reduceat(labels.tail_draws, np.append(0, np.cumsum(labels.tail_counts))[:-1]).tolist() == [6] * 7


@settings(max_examples=60)
@given(kinds, st.integers(0, 1000), st.integers(0, 12), st.integers(0, 12))
def test_the_number_of_draws_is_proportional_to_the_tail_mass(kind: str, seed: int, k: int, draws: int) -> None:
    if k == 0 == draws:
        return
    rows = encoded(captured(hostile(kind, seed), 12, 12), 3)
    found = decode(narrow(rows, narrowing(12, 12, k, draws), b""), VOCAB)
    before = decode(rows, VOCAB)
    at = np.repeat(np.arange(7), found.tail_counts)
    total = np.bincount(at, found.tail_draws, 7)
    expected = np.ceil(draws * np.exp(found.tail_log_masses[0].astype(float)) - 1e-4)
    assert (np.abs(total - expected) <= 1).all()
    assert (found.tail_draws > 0).all()
    ids = np.concatenate([found.head_ids, found.tail_ids]) + VOCABULARY * np.append(
        np.repeat(np.arange(7), found.head_counts), at
    )
    assert len(set(ids.tolist())) == len(ids), "no id twice at a position"
    known = np.concatenate([before.head_ids, before.tail_ids]) + VOCABULARY * np.append(
        np.repeat(np.arange(7), before.head_counts), np.repeat(np.arange(7), before.tail_counts)
    )
    assert set(ids.tolist()) <= set(known.tolist())


def test_positions_that_lose_nothing_stay_unchanged() -> None:
    rows = encoded(captured(hostile("plain", 1), 12, 12), 3)
    same = narrow(rows, narrowing(12, 12, 12, 12), b"")
    assert same.equals(rows.select(same.column_names))
    colder = narrow(rows, narrowing(12, 12, 12, 12, (1.0,)), b"")
    for name in set(SOFT_LABELS.names) - {"tail_log_masses"}:
        assert colder.column(name).equals(rows.column(name)), name
    masses = rows.column("tail_log_masses").combine_chunks().flatten().to_numpy()[::2]
    assert (colder.column("tail_log_masses").combine_chunks().flatten().to_numpy() == masses).all()


def test_fewer_draws_are_a_subset_of_the_old_draws() -> None:
    rows = encoded(captured(hostile("plain", 1), 12, 12))
    before, after = decode(rows, VOCAB), decode(narrow(rows, narrowing(12, 12, 12, 5), b""), VOCAB)
    times = dict(
        zip(
            zip(np.repeat(np.arange(7), before.tail_counts), before.tail_ids, strict=True),
            before.tail_draws,
            strict=True,
        )
    )
    for position, token, draws in zip(
        np.repeat(np.arange(7), after.tail_counts), after.tail_ids, after.tail_draws, strict=True
    ):
        assert draws <= times[position, token]
    assert after.tail_draws.sum() < before.tail_draws.sum()


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    rows = encoded(captured(hostile("plain", 2), 12, 12), 3)
    together = narrow(rows, narrowing(12, 12, 4, 8), b"seed")
    separately = pa.concat_tables([narrow(rows.slice(i, 1), narrowing(12, 12, 4, 8), b"seed") for i in range(3)])
    assert together.equals(separately)
    assert not narrow(rows, narrowing(12, 12, 4, 8), b"other").equals(together)


def test_an_empty_table_is_narrowed_to_itself() -> None:
    rows = encoded(captured(hostile("plain", 2), 12, 12), 3).slice(0, 0)
    assert narrow(rows, narrowing(12, 12, 4, 8), b"").equals(rows)


def deviations(new_k: int, new_draws: int, seeds: int = 1000) -> NDArray[np.float64]:
    """How many standard errors the mean tail is from the distribution that it is drawn from, by id and position."""
    labels = captured(hostile("plain", 3) * 0.6, 12, 20)
    rows, wish = encoded(labels), narrowing(12, 20, new_k, new_draws)
    stored = decode(rows, VOCAB)
    target = np.zeros((7, VOCABULARY))
    for position, at in enumerate(np.split(np.arange(len(stored.head_ids)), np.cumsum(stored.head_counts)[:-1])):
        target[position, stored.head_ids[at[new_k:]]] = np.exp(stored.head_logprobs[at[new_k:]].astype(float))
    target += tail(stored)
    found = np.array([tail(decode(narrow(rows, wish, b"%d" % seed), VOCAB)) for seed in range(seeds)])
    spread = np.maximum(found.std(0, ddof=1), 1e-6) / np.sqrt(seeds)
    return (found.mean(0) - target) / spread


def tail(labels: SoftLabels) -> NDArray[np.float64]:
    """(P, V) what the drawn tail says: draws x r / M."""
    dense = np.zeros((labels.positions, VOCABULARY))
    at = np.repeat(np.arange(labels.positions), labels.tail_counts)
    M = np.bincount(at, labels.tail_draws, labels.positions)
    np.add.at(dense, (at, labels.tail_ids), labels.tail_draws * (np.exp(labels.tail_log_masses[0]) / M)[at])
    return dense


@pytest.mark.parametrize(("k", "draws"), [(4, 20), (0, 20), (12, 7), (4, 6)])
def test_drawing_again_keeps_the_expectation(k: int, draws: int) -> None:
    found = np.abs(deviations(k, draws))
    assert found.max() < 5, "the largest of some hundred"
    assert (found[found > 1e-3] ** 2).mean() < 1.4


@pytest.mark.parametrize("bias", [0.8, 1.2])
def test_the_test_of_the_expectation_detects_a_bias(bias: float, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = module._dropped_share
    monkeypatch.setattr(module, "_dropped_share", lambda *args: np.minimum(honest(*args) * bias, 1))
    assert np.abs(deviations(4, 20)).max() > 5


def test_the_narrowed_identity_names_the_selection_it_was_derived_from() -> None:
    fewer = narrowing(64, 0, 16, 0).identity
    assert (fewer.selection.max_k, fewer.selection.min_k) == (16, 1)
    assert fewer.derived_from == narrowing(64, 0, 16, 0).source.selection
    assert Narrowing(fewer, 8, 0, TEMPERATURES).identity.derived_from == fewer.derived_from, "of the capture"
    colder = narrowing(64, 0, 64, 0, (1.0,))
    assert colder.identity.derived_from is None, "what a capture would have stored"
    assert colder.identity.differences(colder.source) == {"temperatures": ("[1.0]", "[1.0, 2.0]")}
