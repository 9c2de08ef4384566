"""Decoded against encoded soft labels, including extreme distributions."""

import dataclasses
import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from softlabel.storage.codec import decode, encode
from softlabel.storage.labels import SoftLabels
from softlabel.storage.numbering import Numbering
from softlabel.storage.schema import SOFT_LABELS
from softlabel.storage.shard_file import parquet_options
from tests.numberings import by_id, random_numbering
from tests.storage.tables import log_mass, log_softmax, random_labels, soft_labels

NAT = 1 / 64 + 1e-4
"""1/64 for the codes; 1e-4 for float32 and for the tail's mass, which is stored to 2^-17, at the head's expense."""
LOWEST = -511.0
"""Log-probabilities below this decode to -inf."""


@st.composite
def logits_of_a_position(draw: st.DrawFn, V: int) -> NDArray[np.float64]:
    """One-hot, flat, steep, tied, with impossible ids, with a head that leaves from 1e-250 to nearly everything."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = rng.normal(size=V) * draw(st.sampled_from([0.0, 1e-3, 1.0, 10.0, 150.0]))
    gap = draw(st.one_of(st.just(0.0), st.floats(0, 600), st.floats(0, 30)))
    logits[rng.permutation(V)[: draw(st.integers(0, V))]] -= gap
    if draw(st.booleans()):  # ties, as a bf16 teacher makes them
        logits = np.round(logits * 4) / 4
    if draw(st.booleans()):
        logits[rng.permutation(V)[: draw(st.integers(0, V - 1))]] = -np.inf
    return logits


@st.composite
def distributions(draw: st.DrawFn) -> tuple[NDArray[np.float64], list[int], SoftLabels]:
    V, P = draw(st.integers(1, 40)), draw(st.integers(1, 6))
    logits = np.stack([draw(logits_of_a_position(V)) for _ in range(P)])
    possible = np.isfinite(logits).sum(1).tolist()
    head_counts = [draw(st.one_of(st.just(0), st.just(n), st.integers(0, n))) for n in possible]
    temperatures = draw(st.sampled_from([(1.0,), (1.0, 2.0), (1.0, 0.5, 4.0)]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return logits, head_counts, soft_labels(logits, head_counts, draw(st.integers(0, 30)), temperatures, rng)


def rows_of(positions: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Captured positions of some rows, some of them without any."""
    cuts = np.sort(rng.integers(0, positions + 1, rng.integers(0, 5)))
    return np.diff(np.concatenate([[0], cuts, [positions]])).astype(np.int64)


def assert_same(a: SoftLabels, b: SoftLabels) -> None:
    for field in dataclasses.fields(SoftLabels):
        np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name), err_msg=field.name)


def assert_close(found: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    """Within 1/64 nat; what is below the lowest code is -inf or next to it."""
    low = expected < LOWEST
    np.testing.assert_array_less(np.abs(found[~low] - expected[~low]), NAT)
    assert (found[low] < LOWEST + NAT).all()


@settings(max_examples=150)
@given(case=distributions(), seed=st.integers(0, 2**32 - 1))
def test_decoding_returns_what_was_encoded(case, seed):
    logits, _, labels = case
    rng = np.random.default_rng(seed)
    numbering = random_numbering(logits.shape[1], seed, clusters=1 + seed % 4)
    found = by_id(decode(encode(labels, rows_of(labels.positions, rng), numbering), numbering))
    labels = by_id(labels)

    for name in ("head_counts", "head_ids", "tail_counts", "tail_ids", "tail_draws"):
        np.testing.assert_array_equal(getattr(found, name), getattr(labels, name), err_msg=name)
    assert_close(found.head_logprobs, labels.head_logprobs)
    assert_close(found.tail_logprobs, labels.tail_logprobs)
    assert np.abs(found.entropies - labels.entropies).max() <= 1 / 512 + 1e-6
    finite = np.isfinite(labels.next_logprobs)
    assert (np.abs(found.next_logprobs[finite] - labels.next_logprobs[finite]) <= 2**-10).all()
    assert (np.isneginf(found.next_logprobs) == ~finite).all()
    assert all(array.dtype in (np.int32, np.float32) for array in vars(found).values())


@settings(max_examples=100)
@given(case=distributions())
def test_mass_adds_up_and_order_is_kept(case):
    logits, _, labels = case
    identity = Numbering.of_ids(logits.shape[1])
    found = decode(encode(labels, np.array([labels.positions]), identity), identity)
    heads = np.split(found.head_logprobs.astype(np.float64), np.cumsum(found.head_counts)[:-1])
    tails = np.split(found.tail_logprobs, np.cumsum(found.tail_counts)[:-1])
    for i, (head, tail) in enumerate(zip(heads, tails, strict=True)):
        total = np.exp(log_mass(head)) + np.exp(float(found.tail_log_masses[0, i]))
        assert total <= 1 + 1e-6
        assert not len(head) or total >= 1 - 1e-6
        assert (head[1:] <= head[:-1]).all()
        assert not len(head) or not len(tail) or tail.max() <= head[-1] + 1 / 64


@settings(max_examples=100)
@given(case=distributions())
def test_the_tail_mass_agrees_with_float64(case):
    logits, head_counts, labels = case
    identity = Numbering.of_ids(logits.shape[1])
    found = decode(encode(labels, np.array([labels.positions]), identity), identity)
    for i, k in enumerate(head_counts):
        exact = log_mass(np.sort(log_softmax(logits[i]))[: logits.shape[1] - k])
        if k == np.isfinite(logits[i]).sum():
            assert np.isneginf(found.tail_log_masses[:, i]).all(), "a head that is everything leaves nothing"
        elif exact > np.log(1e-20):
            assert abs(np.expm1(found.tail_log_masses[0, i] - exact)) < 1e-5


@pytest.mark.parametrize("exponent", range(1, 13))
def test_tail_masses_near_0_and_near_1_keep_their_precision(exponent):
    """The tail has mass 10^-n, or 1 - 10^-n: that stays within 1e-5, and what it leaves the head within 1e-4."""
    r = 10.0**-exponent
    masses = np.array([[np.log(r), np.log1p(-r)]], np.float32)
    heads = np.array([np.log1p(-r), np.log(r)], np.float32)
    one, none = np.ones(2, np.int32), np.zeros(0, np.int32)
    zeros = np.zeros(2, np.float32)
    empty = np.zeros(0, np.float32)
    labels = SoftLabels(one, one, heads, zeros.astype(np.int32), none, none, empty, masses, zeros, zeros)
    identity = Numbering.of_ids(2)
    found = decode(encode(labels, np.array([2]), identity), identity)
    np.testing.assert_allclose(np.exp(found.tail_log_masses[0].astype(np.float64)), [r, 1 - r], rtol=1e-5)
    np.testing.assert_allclose(np.exp(found.head_logprobs.astype(np.float64)), [1 - r, r], rtol=1e-4)


def test_positions_without_ids_and_rows_without_positions_are_decoded():
    logits = np.zeros((3, 5))
    labels = soft_labels(logits, [0, 0, 0], 0, (1.0, 2.0), np.random.default_rng(0))
    identity = Numbering.of_ids(5)
    found = decode(encode(labels, np.array([0, 2, 0, 1]), identity), identity)
    assert found.positions == 3
    assert len(found.head_ids) == len(found.tail_ids) == 0
    assert (found.tail_log_masses == 0).all()


def test_rows_without_any_position_are_decoded_and_joined():
    """Rows whose mask captures nothing decode to no positions, and join with rows that have some."""
    labels = random_labels(4, vocabulary=30, temperatures=2)
    identity = Numbering.of_ids(30)
    none = encode(random_labels(0, vocabulary=30, temperatures=2), np.array([0, 0]), identity)
    for rows in (none, none.slice(0, 0), SOFT_LABELS.empty_table()):
        nothing = decode(rows, identity)
        assert nothing.positions == 0
        some = decode(encode(labels, np.array([4]), identity), identity)
        assert_same(SoftLabels.concatenate([nothing, some, nothing]), some)


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32 - 1))
def test_chunks_slices_and_row_groups_decode_alike(seed):
    rng = np.random.default_rng(seed)
    labels = random_labels(int(rng.integers(1, 30)), seed, vocabulary=50, temperatures=2)
    vocabulary = random_numbering(50, seed)
    rows = encode(labels, rows_of(labels.positions, rng), vocabulary)
    whole = decode(rows, vocabulary)
    cut = int(rng.integers(0, len(rows) + 1))
    parts = [rows.slice(0, cut), rows.slice(cut)]
    assert_same(SoftLabels.concatenate([decode(part, vocabulary) for part in parts]), whole)
    assert_same(decode(pa.concat_tables(parts), vocabulary), whole)
    assert_same(decode(pa.concat_tables([rows, rows]).slice(len(rows)), vocabulary), whole)
    assert_same(decode(rows.combine_chunks(), vocabulary), whole)

    sink = io.BytesIO()
    pq.write_table(rows, sink, row_group_size=max(1, cut), **parquet_options(rows.schema))
    read = pq.read_table(sink)
    assert read.schema.equals(SOFT_LABELS)
    assert_same(decode(read, vocabulary), whole)


@settings(max_examples=50)
@given(seed=st.integers(0, 2**32 - 1))
def test_encoding_again_moves_log_probabilities_by_at_most_one_code(seed):
    """Decoded soft labels that are encoded again move by a code at most, so that copies of copies do not drift."""
    labels = random_labels(20, seed, vocabulary=50)
    identity = Numbering.of_ids(50)
    once = decode(encode(labels, np.array([20]), identity), identity)
    twice = decode(encode(once, np.array([20]), identity), identity)
    assert np.abs(twice.head_logprobs - once.head_logprobs).max() < NAT
    np.testing.assert_array_equal(twice.tail_log_masses, once.tail_log_masses)
    assert np.abs(twice.tail_logprobs - once.tail_logprobs).max() <= NAT


def test_a_tail_that_a_decoded_head_has_moved_past_can_be_encoded_again():
    """Head and tail of one code, between two: the shift by which a head's mass adds up takes some heads to the next."""
    codes = np.arange(100, 400)
    logprobs = (-(codes + 0.4999999) / 64).astype(np.float32)
    ones = np.ones(len(codes), np.int32)
    labels = dataclasses.replace(
        random_labels(len(codes), vocabulary=50),
        head_counts=ones,
        head_ids=0 * ones,
        head_logprobs=logprobs,
        tail_counts=ones,
        tail_ids=ones,
        tail_draws=ones,
        tail_logprobs=logprobs,
        tail_log_masses=np.log(-np.expm1(logprobs))[None],
    )
    identity, rows = Numbering.of_ids(50), np.array([len(codes)])
    once = decode(encode(labels, rows, identity), identity)
    assert (np.rint(-64 * once.head_logprobs) > np.rint(-64 * once.tail_logprobs)).any()
    twice = decode(encode(once, rows, identity), identity)
    assert np.abs(twice.tail_logprobs - once.tail_logprobs).max() <= NAT


def test_encoded_columns_have_the_types_of_the_schema():
    encoded = encode(random_labels(7, vocabulary=50), np.array([3, 0, 4]), Numbering.of_ids(50))
    assert encoded.schema.equals(SOFT_LABELS)
    assert encoded.column("head_counts").to_pylist()[1] == []
    encoded.validate(full=True)


def test_more_ids_than_fit_the_count_are_refused():
    """A count that would wrap around must never reach a table."""
    labels = soft_labels(np.zeros((1, 40_000)), [40_000], 0, (1.0,), np.random.default_rng(0))
    with pytest.raises(AssertionError, match="32767"):
        encode(labels, np.array([1]), Numbering.of_ids(40_000))


def test_unordered_ids_are_refused():
    labels = random_labels(5, vocabulary=50)
    wrong = dataclasses.replace(labels, head_logprobs=labels.head_logprobs[::-1].copy())
    with pytest.raises(AssertionError, match="order"):
        encode(wrong, np.array([5]), Numbering.of_ids(50))
