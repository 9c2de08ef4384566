"""Errors over documents: intervals hold the truth as often as they say, and equal students are rarely told apart."""

import numpy as np
import pytest

from softlabel.pipeline.evaluation.bootstrap import Sums, difference, effective, estimate, seed_of

PAIRS = 400


def corpus(rng, documents):
    """Positions of each document, and what is hard about each: documents differ more than their positions do."""
    sizes = np.ceil(rng.lognormal(3, 0.5, documents)).astype(np.int64)
    return sizes, rng.gamma(2, 0.5, documents)


def measured(rng, sizes, hardness, level):
    """(n, 2) positions and summed divergence of each document, of a student with this mean divergence."""
    means = level * hardness * rng.gamma(20, 1 / 20, len(sizes))
    return np.stack([sizes, sizes * means + np.sqrt(sizes) * rng.normal(size=len(sizes)) * 0.3], 1)


def replicates(seeds, sums):
    total = Sums({"all": 2})
    for part in np.array_split(np.arange(len(seeds)), 3):
        total.add(seeds[part], {"all": sums[part]})
    return total.values["all"][:, 1] / total.values["all"][:, 0]


@pytest.mark.parametrize("documents", [12, 60])
def test_intervals_of_paired_differences_hold_the_truth_in_95_of_100_cases(documents):
    """Half of the pairs are equal: those are told apart in at most about 5 of 100 cases."""
    rng, covered, told_apart = np.random.default_rng(documents), [], []
    for pair in range(PAIRS):
        sizes, hardness = corpus(rng, documents)
        seeds = np.array([seed_of(f"{pair} {number}") for number in range(documents)])
        gap = 0.0 if pair % 2 else 0.25
        a, b = (replicates(seeds, measured(rng, sizes, hardness, level)) for level in (1.0, 1.0 - gap))
        found = difference(a, b, effective(sizes))
        if found.interval is not None:
            covered.append(found.interval[0] <= gap <= found.interval[1])
        told_apart.append(found.is_real)
    equal, different = told_apart[1::2], told_apart[::2]
    assert len(covered) > 0.95 * PAIRS
    assert 0.92 < np.mean(covered) < 0.98
    assert np.mean(equal) < 0.09
    assert np.mean(different) > (0.9 if documents == 60 else 0.4)


def test_the_order_and_the_parts_of_the_documents_change_nothing():
    rng = np.random.default_rng(0)
    seeds, sums = np.array([seed_of(str(number)) for number in range(30)]), rng.random((30, 2))
    whole, parts = Sums({"all": 2}), Sums({"all": 2})
    whole.add(seeds, {"all": sums})
    for number in rng.permutation(30):
        for share in (0.25, 0.75):  # a document that comes in two batches
            parts.add(seeds[[number]], {"all": share * sums[[number]]})
    np.testing.assert_allclose(parts.values["all"], whole.values["all"], rtol=1e-12)


def test_few_documents_or_a_single_large_one_give_no_error():
    values = np.random.default_rng(0).normal(size=501)
    assert estimate(values, effective(np.full(4, 100))).error is None
    assert estimate(values, effective(np.array([100_000, *[5] * 50]))).error is None
    assert estimate(values, effective(np.full(5, 100))).error is not None
    assert not difference(values, values - 1e9, 4.0).is_real
