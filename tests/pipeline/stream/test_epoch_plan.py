"""Every sequence comes exactly once per epoch over all ranks, and every rank computes the same plan."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softlabel.pipeline.stream.epoch_plan import EpochPlan, accumulation, best_fit, occurrences, plan_epoch, share

CAPACITY = 64

groups = st.lists(st.lists(st.integers(2, CAPACITY), min_size=1, max_size=9), min_size=1, max_size=12)


def planned(groups: list[list[int]], **settings: object) -> EpochPlan:
    lengths = np.array([length for group in groups for length in group], np.int32)
    starts = np.concatenate([[0], np.cumsum([len(group) for group in groups])])
    defaults = {"max_length": CAPACITY, "window_tokens": 300, "seed": 0, "epoch": 0}
    return plan_epoch(lengths, starts, **{**defaults, **settings})


@given(groups, st.integers(0, 2**63), st.integers(0, 5), st.booleans(), st.sampled_from([CAPACITY, None]))
def test_an_epoch_holds_each_sequence_once_in_packs_that_fit(groups, seed, epoch, shuffle, max_length):
    plan = planned(groups, seed=seed, epoch=epoch, shuffle=shuffle, max_length=max_length)
    lengths = np.array([length for group in groups for length in group])
    assert sorted(plan.sequences) == list(range(len(lengths)))
    assert plan.packs == plan.window_starts[-1]
    assert max_length or plan.packs == len(lengths), "without packing, each sequence has its own row"
    for pack in range(plan.packs):
        assert 0 < lengths[plan.members(pack, pack + 1)].sum() <= CAPACITY
        window = plan.window(plan.window_of(pack))
        assert set(plan.members(pack, pack + 1)) <= set(window)


@given(groups, st.integers(0, 9))
def test_a_window_holds_whole_row_groups(groups, seed):
    plan = planned(groups, seed=seed)
    starts = np.cumsum([0] + [len(group) for group in groups])
    for number in range(plan.windows):
        window = set(plan.window(number).tolist())
        for first, last in itertools.pairwise(starts):
            assert len(window & set(range(first, last))) in (0, last - first)


def test_only_seed_and_epoch_decide_the_order():
    many = [[10 + i % 40 for i in range(20)] for _ in range(12)]
    same, again = planned(many, seed=1, epoch=2), planned(many, seed=1, epoch=2)
    assert (same.sequences == again.sequences).all()
    for other in (planned(many, seed=2, epoch=2), planned(many, seed=1, epoch=3), planned(many, shuffle=False)):
        assert (same.sequences != other.sequences).any()


def test_the_order_is_the_same_as_in_earlier_releases():
    """A run may be resumed with another version of numpy, which must not change the order."""
    plan = planned([[30, 20, 10], [40, 5], [25, 25, 25, 25]], seed=7, epoch=1)
    assert plan.sequences.tolist() == [6, 5, 4, 0, 7, 2, 8, 3, 1]
    assert plan.pack_starts.tolist() == [0, 1, 4, 7, 9]


def test_shuffling_mixes_row_groups_and_lengths():
    many = [[group + 2] * 8 for group in range(40)]
    plan = planned(many, seed=3, window_tokens=2000)
    first = plan.window(0) // 8
    assert first.max() - first.min() > 20 > len(set(first.tolist())), "a window takes row groups from all over"
    lengths = np.repeat(np.arange(40) + 2, 8)
    sizes = [lengths[plan.members(p, p + 1)].max() for p in range(plan.window_starts[1])]
    early, late = np.mean(sizes[: len(sizes) // 2]), np.mean(sizes[len(sizes) // 2 :])
    assert abs(early - late) < 6, "packs do not come longest first"


def test_without_shuffling_packs_follow_the_table():
    plan = planned([[40, 40], [20, 40], [20, 4]], shuffle=False, window_tokens=10**6)
    packs = [plan.members(p, p + 1).tolist() for p in range(plan.packs)]
    assert packs == [[0, 2, 5], [1, 4], [3]]


@given(st.lists(st.integers(1, CAPACITY), min_size=1, max_size=60))
def test_best_fit_wastes_little(lengths):
    packs = best_fit(np.array(lengths, np.int32), CAPACITY)
    loads = np.bincount(packs, lengths)
    assert loads.max() <= CAPACITY
    assert len(loads) <= 1.7 * sum(lengths) / CAPACITY + 1
    assert (np.sort(np.unique(packs, return_index=True)[1]) == np.unique(packs, return_index=True)[1]).all()


def test_packed_rows_are_nearly_full():
    lengths = np.random.default_rng(0).integers(2, 1025, 50_000, dtype=np.int32)
    starts = np.append(np.arange(0, len(lengths), 256), len(lengths))
    plan = plan_epoch(lengths, starts, 1024, 1 << 20, seed=0, epoch=0)
    assert lengths.sum() / (plan.packs * 1024) > 0.97


@settings(max_examples=200)
@given(
    st.integers(0, 50),
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4), st.integers(1, 20), st.integers(1, 3)), min_size=1),
)
def test_shares_deal_out_every_pack_once_over_changes_of_topology(packs, phases):
    """Each phase has its own world size, micro-batch, global batch and number of steps; the last runs to the end."""
    cursor, seen = 0, []
    for world_size, micro_batch_size, batch_size, steps in [*phases, (2, 2, 8, 50)]:
        for _ in range(steps):
            first, last = cursor, min(packs, cursor + batch_size)
            shares = [
                share(first, last, rank, world_size, micro_batch_size, micro)
                for rank in range(world_size)
                for micro in range(accumulation(batch_size, world_size, micro_batch_size))
            ]
            assert all(len(part) <= micro_batch_size for part in shares)
            seen += sorted(pack for part in shares for pack in part)
            cursor = last
    assert seen == list(range(packs))


@pytest.mark.parametrize("lengths", [[], [CAPACITY]])
def test_tables_of_few_or_no_sequences_can_be_planned(lengths):
    starts = np.arange(len(lengths) + 1)
    plan = plan_epoch(np.array(lengths, np.int32), starts, CAPACITY, 300, seed=0, epoch=0)
    assert plan.packs == len(lengths)


weights = st.one_of(st.floats(0.01, 5), st.sampled_from([0.1, 0.25, 1 / 3, 0.5, 1.0, 2.0, 3.0]))


@given(st.lists(weights, min_size=1, max_size=30), st.integers(0, 2**64 - 1), st.integers(1, 40))
def test_over_epochs_each_sequence_comes_as_often_as_its_weight_says(weights, seed, epochs):
    counts = np.array([occurrences(np.array(weights), seed, epoch) for epoch in range(epochs)])
    for weight, of_one in zip(weights, counts.T, strict=True):
        assert abs(of_one.sum() - weight * epochs) < 1 + 1e-9
        assert {*of_one.tolist()} <= {math.floor(weight), math.ceil(weight)}
        if weight == int(weight):
            assert (of_one == weight).all()


def test_sequences_of_half_weight_take_turns():
    counts = np.array([occurrences(np.full(1000, 0.5), 3, epoch) for epoch in range(4)])
    assert (counts[0] + counts[1] == 1).all()
    assert (counts[0] == counts[2]).all()
    assert 400 < counts[0].sum() < 600, "half of them in each epoch"


@given(groups, st.data(), st.integers(0, 9), st.booleans())
def test_a_plan_holds_each_sequence_as_often_as_its_count_says(groups, data, seed, shuffle):
    total = sum(map(len, groups))
    counts = np.array(data.draw(st.lists(st.integers(0, 3), min_size=total, max_size=total)), np.int64)
    plan = planned(groups, seed=seed, shuffle=shuffle, counts=counts)
    assert (np.bincount(plan.sequences, minlength=total) == counts).all()
    lengths = np.array([length for group in groups for length in group])
    assert all(lengths[plan.members(p, p + 1)].sum() <= CAPACITY for p in range(plan.packs))


def test_copies_of_a_sequence_are_spread_over_the_epoch():
    many = [[30] * 8 for _ in range(40)]
    plan = planned(many, seed=1, window_tokens=480, counts=np.full(320, 2))
    first, second = np.argsort(plan.sequences, kind="stable").reshape(-1, 2).T
    assert np.mean(second - first) > 100
