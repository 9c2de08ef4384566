"""Terms and their gradients against the textbook formulas under autograd, in float64."""

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from softlabel.pipeline.config.train import LossConfig
from softlabel.pipeline.loss.divergence import cross_entropy, divergence_terms

MIX = 0.3


def kl(p, q):
    return torch.xlogy(p, p) - torch.where(p > 0, p * q.log(), 0.0)


TEXTBOOK = {
    "forward_kl": lambda t, s: kl(t, s),
    "reverse_kl": lambda t, s: kl(s, t),
    "jsd": lambda t, s: MIX * kl(t, MIX * t + (1 - MIX) * s) + (1 - MIX) * kl(s, MIX * t + (1 - MIX) * s),
    "skew_forward_kl": lambda t, s: kl(t, MIX * t + (1 - MIX) * s),
    "skew_reverse_kl": lambda t, s: kl(s, (1 - MIX) * t + MIX * s),
    "total_variation": lambda t, s: 0.5 * (t - s).abs(),
}
NAMES = get_args(LossConfig.model_fields["divergence"].annotation)

hostile = st.lists(
    st.one_of(
        st.floats(-30, 30),
        st.just(0.0),  # ties
        st.just(-60.0),
        st.just(-torch.inf),
        st.just(300.0),  # one-hot
    ),
    min_size=5,
    max_size=5,
).filter(lambda logits: max(logits) > -torch.inf)


@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients_equal_those_of_the_textbook(name):
    generator = torch.Generator().manual_seed(0)
    log_t = (3 * torch.randn(6, 9, generator=generator, dtype=torch.float64)).log_softmax(1)
    log_s = (3 * torch.randn(6, 9, generator=generator, dtype=torch.float64)).log_softmax(1).requires_grad_()
    expected = TEXTBOOK[name](log_t.exp(), log_s.exp())
    (expected_gradients,) = torch.autograd.grad(expected.sum(), log_s)
    terms, gradients = divergence_terms(name, log_t, log_s.detach(), MIX)
    torch.testing.assert_close(terms, expected.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mass", [1e-7, 1e-12])
def test_a_tiny_mass_is_exact_in_float32(name, mass):
    log_t = torch.tensor([1 - mass, mass], dtype=torch.float64).log()
    log_s = torch.tensor([1 - 20 * mass, 20 * mass], dtype=torch.float64).log().requires_grad_()
    expected = TEXTBOOK[name](log_t.exp(), log_s.exp())
    (expected_gradients,) = torch.autograd.grad(expected.sum(), log_s)
    terms, gradients = divergence_terms(name, log_t.float(), log_s.detach().float(), MIX)
    torch.testing.assert_close(terms[1].double(), expected[1].detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(gradients[1].double(), expected_gradients[1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", NAMES)
@given(teacher=hostile, student=hostile)
@settings(max_examples=100)
def test_extreme_distributions_give_finite_terms_of_a_divergence(name, teacher, student):
    log_t = torch.tensor(teacher).log_softmax(0)
    log_s = torch.tensor(student).log_softmax(0)
    terms, gradients = divergence_terms(name, log_t, log_s, MIX)
    assert gradients.isfinite().all()
    assert not terms.isnan().any()
    assert terms.sum() > -1e-5
    if name != "forward_kl":  # which is infinite where the student rules out what the teacher does not
        assert terms.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
@given(logits=hostile)
@settings(max_examples=50)
def test_identical_distributions_have_zero_divergence(name, logits):
    logprobs = torch.tensor(logits).log_softmax(0)
    terms, gradients = divergence_terms(name, logprobs, logprobs, MIX)
    assert terms.sum().abs() < 1e-6
    # Gradients with respect to log s may differ from 0 by a multiple of s, which a softmax takes away.
    pull = gradients - logprobs.exp() * gradients.sum()
    assert pull.abs().max() < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_entries_that_are_zero_in_both_add_nothing(name):
    terms, gradients = divergence_terms(name, torch.tensor([-torch.inf]), torch.tensor([-torch.inf]), MIX)
    assert terms.item() == gradients.item() == 0


def test_reverse_kl_is_large_but_finite_where_the_teachers_probability_is_zero():
    terms, gradients = divergence_terms("reverse_kl", torch.tensor([-torch.inf]), torch.tensor([0.5]).log(), MIX)
    assert 200 < terms.item() < gradients.item() < 300


def test_cross_entropy_is_forward_kl_plus_the_entropy():
    log_t, log_s = torch.randn(2, 4, 7, dtype=torch.float64).log_softmax(2)
    entropy = -(log_t.exp() * log_t).sum(1)
    expected = divergence_terms("forward_kl", log_t, log_s, MIX)[0].sum(1)
    torch.testing.assert_close(cross_entropy(log_t, log_s) - entropy, expected)
