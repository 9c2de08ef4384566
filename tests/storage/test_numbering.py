"""A table's numbering of token ids: any one returns what it is given, and the one that is found saves bytes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softlabel.storage import clustering
from softlabel.storage.clustering import fit
from softlabel.storage.codec import decode, encode
from softlabel.storage.labels import SoftLabels
from softlabel.storage.numbering import Numbering
from tests.numberings import by_id, random_numbering
from tests.storage.tables import log_softmax, soft_labels

WORDS = 2000


def topical(positions: int, seed: int) -> SoftLabels:
    """Heads of 20 ids and a few draws, at positions of ten topics with words of their own."""
    rng = np.random.default_rng(seed)
    words = np.random.default_rng(0).normal(size=(10, WORDS)) * 2 - 0.7 * np.log1p(np.arange(WORDS))
    logits = words[rng.integers(0, 10, positions)] + rng.normal(size=(positions, WORDS))
    order = np.argsort(-logits, 1)
    heads, tails = order[:, :20], np.sort(order[:, 30:34], 1)
    count = np.ones(positions, np.int32)
    logprobs = np.take_along_axis(log_softmax(logits), order, 1).astype(np.float32)
    return SoftLabels(
        head_counts=20 * count,
        head_ids=heads.ravel().astype(np.int32),
        head_logprobs=logprobs[:, :20].ravel(),
        tail_counts=4 * count,
        tail_ids=tails.ravel().astype(np.int32),
        tail_draws=np.ones(4 * positions, np.int32),
        tail_logprobs=np.full(4 * positions, -7, np.float32),
        tail_log_masses=np.full((1, positions), -1, np.float32),
        entropies=count.astype(np.float32),
        next_logprobs=-count.astype(np.float32),
    )


@pytest.fixture
def few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try fewer numbers of clusters and listed ids, to save time."""
    monkeypatch.setattr(clustering, "_CLUSTERS", (16,))
    monkeypatch.setattr(clustering, "_LISTED", (256,))


@settings(max_examples=60)
@given(
    vocabulary=st.integers(1, 60),
    clusters=st.integers(1, 6),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**32 - 1),
    everything=st.booleans(),
)
def test_every_numbering_returns_what_it_was_given(
    vocabulary: int, clusters: int, share: float, seed: int, everything: bool
) -> None:
    """Empty heads and tails, one position, all ids; any clusters, also from a file, and from one to another."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(int(rng.integers(1, 5)), vocabulary)) * rng.choice([0, 1, 200])
    heads = [vocabulary if everything else int(rng.integers(0, vocabulary + 1)) for _ in logits]
    labels = by_id(soft_labels(logits, heads, int(rng.integers(0, 9)), (1.0,), rng))
    made = random_numbering(vocabulary, seed, clusters, int(share * vocabulary))
    numbering = Numbering.from_parquet(made.to_parquet())
    positions = np.array([labels.positions])
    rows = encode(labels, positions, made)
    assert rows.equals(encode(labels, positions, numbering))
    found = decode(rows, numbering)
    other = random_numbering(vocabulary, seed + 1, clusters)
    again = by_id(decode(encode(found, positions, other), other))
    for name in ("head_counts", "head_ids", "tail_counts", "tail_ids", "tail_draws"):
        np.testing.assert_array_equal(getattr(by_id(found), name), getattr(labels, name), err_msg=name)
        np.testing.assert_array_equal(getattr(again, name), getattr(labels, name), err_msg=name)


@pytest.mark.usefixtures("few_shapes")
def test_a_large_sample_gets_clusters_that_save_bytes_elsewhere() -> None:
    sample, elsewhere = topical(3500, 1), topical(1000, 2)
    found = fit(sample, WORDS)
    assert len(found.lists) > 1
    plain = Numbering.by_rank(found.vocabulary)
    ids = clustering._Ids(elsewhere.head_ids, elsewhere.head_counts, elsewhere.tail_ids, elsewhere.tail_counts)
    saved = ids.bytes(plain) - ids.bytes(found)
    assert saved > 0.1 * ids.bytes(plain)


@pytest.mark.parametrize("vocabulary", [30, 200, 256, 257, 1024])
def test_a_small_vocabulary_can_be_numbered(vocabulary: int) -> None:
    """Even if a list would have more ids than there are."""
    labels = topical(3500, 1)
    small = SoftLabels(**{**vars(labels), **{n: getattr(labels, n) % vocabulary for n in ("head_ids", "tail_ids")}})
    numbering = fit(small, vocabulary)
    np.testing.assert_array_equal(np.sort(numbering.vocabulary), np.arange(vocabulary))
    assert numbering.lists.shape[1] < vocabulary


@pytest.mark.usefixtures("few_shapes")
def test_a_small_table_does_not_pay_for_clusters() -> None:
    found = fit(topical(200, 1), WORDS)
    assert found.lists.shape == (1, 0)
    np.testing.assert_array_equal(found.numbers, np.arange(WORDS))


@pytest.mark.usefixtures("few_shapes")
def test_a_sample_without_structure_gets_no_clusters() -> None:
    labels = topical(3500, 1)
    shuffled = np.random.default_rng(0).integers(0, WORDS, labels.head_ids.shape).astype(np.int32)
    assert len(fit(SoftLabels(**{**vars(labels), "head_ids": shuffled}), WORDS).lists) == 1


@pytest.mark.parametrize("seed", range(3))
def test_any_cluster_is_a_valid_one(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On another machine, or by another writer, a position may be put into another cluster."""
    numbering = random_numbering(WORDS, seed, 5)
    labels, rng = by_id(topical(50, seed)), np.random.default_rng(seed)
    monkeypatch.setattr(Numbering, "assign", lambda self, ids, counts: rng.integers(0, 5, len(counts)).astype("int16"))
    found = by_id(decode(encode(labels, np.array([50]), numbering), numbering))
    np.testing.assert_array_equal(found.head_ids, labels.head_ids)
    np.testing.assert_array_equal(found.tail_ids, labels.tail_ids)
