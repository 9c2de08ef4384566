"""A student against its teacher at single positions: bounds that always hold, and estimates without bias.

The references are dense and in float64, over a small vocabulary; the soft labels take the whole way through selection
and storage.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from softlabel.pipeline.config.train import LossConfig
from softlabel.pipeline.evaluation.positions import CODE_ERROR, DIVERGENCES, TOP, Known, compare
from softlabel.pipeline.loss.targets import CompactTargets, TokenIds, decode_draws, decode_targets
from softlabel.pipeline.selection.select import select
from softlabel.pipeline.selection.selection import Selection
from softlabel.storage.codec import decode, encode
from softlabel.storage.schema import SOFT_LABELS
from tests.numberings import random_numbering

V = 37
WHOLE = Selection(top_p=1.0, min_k=V, max_k=V, draws=0, temperatures=(1.0,), seed=0)
SELECTIONS = {
    "whole": WHOLE,
    "top-1": replace(WHOLE, min_k=1, max_k=1),
    "top-4": replace(WHOLE, min_k=4, max_k=4),
    "default": replace(WHOLE, top_p=0.9, min_k=1, max_k=8, draws=12),
    "few draws": replace(WHOLE, top_p=0.5, min_k=1, max_k=4, draws=2),
    "draws only": replace(WHOLE, top_p=0.5, min_k=0, max_k=0, draws=20),
}


def distributions(seed, n, scale):
    logits = np.random.default_rng(seed).normal(size=(n, V)) * scale
    return torch.from_numpy(logits).log_softmax(1)


def stored(teacher, next_ids, selection, seed=0):
    """What a table keeps of the teacher's (n, V) distributions."""
    seeds = torch.arange(len(teacher)) + 1_000_003 * seed
    labels = select(teacher.float(), next_ids, seeds, selection, V)
    numbering = random_numbering(V)
    columns = encode(labels, np.array([labels.positions]), numbering)
    flat = {name: torch.from_numpy(columns[name].chunk(0).flatten().to_numpy().copy()) for name in SOFT_LABELS.names}
    flat["tail_log_masses"] = flat["tail_log_masses"].reshape(labels.positions, -1).T
    return CompactTargets(**flat), numbering, columns


def known(teacher, next_ids, selection, seed=0):
    compact, numbering, _ = stored(teacher, next_ids, selection, seed)
    head = decode_targets(compact, TokenIds(numbering), (1.0,), LossConfig(target="bucket"))
    return Known(head, decode_draws(compact, TokenIds(numbering)), mass_error=2e-5)


def divergences(t, s):
    """(n,) of each divergence, from (n, V) log-probabilities in float64."""
    m = torch.logaddexp(t, s) - np.log(2)
    kl = lambda p, q: (p.exp() * (p - q)).sum(1)  # noqa: E731
    return {
        "forward_kl": kl(t, s),
        "reverse_kl": kl(s, t),
        "jsd": (kl(t, m) + kl(s, m)) / 2,
        "total_variation": 1 - torch.minimum(t.exp(), s.exp()).sum(1),
    }


def top_agreement(t, s):
    sets = [logprobs.topk(TOP, 1).indices for logprobs in (t, s)]
    return (sets[0][:, :, None] == sets[1][:, None]).sum((1, 2)) / TOP


scales = st.floats(0.1, 8)
seeds = st.integers(0, 2**31)


@given(st.sampled_from(sorted(SELECTIONS)), seeds, scales, st.sampled_from(["independent", "close", "equal"]), scales)
def test_certain_bounds_hold_the_truth(name, seed, scale, relation, other_scale):
    t = distributions(seed, 20, scale)
    s = {
        "independent": distributions(seed + 1, 20, other_scale),
        "close": (t + 0.1 * distributions(seed + 1, 20, 1.0)).log_softmax(1),
        "equal": t,
    }[relation]
    next_ids = torch.arange(20) % V
    found = compare(s.clone(), known(t, next_ids, SELECTIONS[name]), next_ids)
    truths = divergences(t, s) | {"top": top_agreement(t, s)}
    truths |= {"teacher": t.exp().gather(1, s.argmax(1, keepdim=True))[:, 0]}
    for quantity, truth in truths.items():
        low, high = found[f"{quantity}_low"], found[f"{quantity}_high"]
        assert ((low - 1e-6 <= truth) & (truth <= high + 1e-6)).all(), quantity
        assert (low >= -1e-6).all()
    torch.testing.assert_close(found["cross_entropy"], -s.gather(1, next_ids[:, None])[:, 0])
    known_top = ~found["top"].isnan()
    torch.testing.assert_close(found["top"][known_top], truths["top"][known_top].double())
    has_head = ~found["agreement"].isnan()
    assert torch.equal(found["agreement"][has_head], (t.argmax(1) == s.argmax(1)).double()[has_head])
    assert has_head.all() == (name != "draws only")


@pytest.mark.parametrize(("name", "spread"), [("default", 0.3), ("few draws", 1.0), ("draws only", 1.0)])
def test_estimates_are_unbiased_and_their_errors_true(name, spread):
    """The mean over many captures of the same positions is the truth, and varies as the variance says."""
    positions, captures = 40, 80
    t = distributions(5, positions, 1.5)
    s = (t + spread * torch.from_numpy(np.random.default_rng(6).normal(size=t.shape))).log_softmax(1)
    next_ids = t.argmax(1)
    found = [compare(s.clone(), known(t, next_ids, SELECTIONS[name], seed), next_ids) for seed in range(captures)]
    truths = divergences(t, s) | {"teacher": t.exp().gather(1, s.argmax(1, keepdim=True))[:, 0]}
    for quantity, truth in truths.items():
        means = torch.stack([each[quantity].mean() for each in found])
        error = float(means.std()) / captures**0.5
        assert abs(float(means.mean() - truth.mean())) < 4 * error + 2e-4, quantity  # the latter for rounded codes
        if quantity in DIVERGENCES:
            stated = torch.stack([each[f"{quantity}_variance"].sum() for each in found]).mean().sqrt() / positions
            assert float(means.std()) < 1.3 * stated
            if name == "draws only":  # no position with a single draw, whose variance is overstated
                assert float(means.std()) > 0.7 * stated


@pytest.mark.parametrize("name", sorted(SELECTIONS))
def test_the_teacher_itself_has_almost_no_divergence_from_its_table(name):
    t = distributions(5, 400, 2.0)
    next_ids = torch.arange(400) % V
    found = compare(t.clone(), known(t, next_ids, SELECTIONS[name]), next_ids)
    for quantity in DIVERGENCES:
        assert float(found[quantity].abs().mean()) < 2 * CODE_ERROR
        assert abs(float(found["forward_kl"].mean())) < 2e-4


def test_a_whole_distribution_leaves_nothing_uncertain_but_the_codes():
    t, s = distributions(5, 50, 1.0), distributions(6, 50, 1.0)
    next_ids = torch.zeros(50, dtype=torch.int64)
    found = compare(s.clone(), known(t, next_ids, WHOLE), next_ids)
    for quantity, truth in divergences(t, s).items():
        assert float((found[f"{quantity}_high"] - found[f"{quantity}_low"]).max()) < 0.1
        assert float(found[quantity].mean()) == pytest.approx(float(truth.mean()), abs=5e-4)
        assert not found[f"{quantity}_variance"].any()
    assert not found["unsampled"].any()


def test_without_draws_the_estimate_is_the_lower_bound_and_says_so():
    t, s = distributions(5, 50, 1.0), distributions(6, 50, 1.0)
    next_ids = torch.zeros(50, dtype=torch.int64)
    found = compare(s.clone(), known(t, next_ids, SELECTIONS["top-4"]), next_ids)
    assert found["unsampled"].all()
    for quantity, truth in divergences(t, s).items():
        assert (found[quantity] <= truth + 1e-3).all()
        assert (found[quantity] >= found[f"{quantity}_low"]).all()
    assert found["reverse_kl_high"].isinf().all()


@pytest.mark.parametrize("name", ["default", "few draws", "draws only"])
def test_draws_have_the_probabilities_that_the_table_stores(name):
    t = distributions(5, 60, 2.0)
    compact, numbering, columns = stored(t, torch.zeros(60, dtype=torch.int64), SELECTIONS[name])
    draws, labels = decode_draws(compact, TokenIds(numbering)), decode(columns, numbering)
    drawn = draws.counts > 0
    assert draws.ids[drawn].tolist() == labels.tail_ids.tolist()
    assert draws.counts[drawn].tolist() == labels.tail_draws.tolist()
    np.testing.assert_array_equal(draws.logprobs[drawn].numpy(), labels.tail_logprobs)
    stored_here = t.gather(1, draws.ids)[drawn]
    assert float((stored_here - draws.logprobs[drawn]).abs().max()) < 1 / 128 + 1e-5
