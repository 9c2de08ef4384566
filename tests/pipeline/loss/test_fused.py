"""The fused loss against the same loss written densely, in float64, under autograd."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F  # noqa: N812

from softlabel.pipeline.config.train import LossConfig
from softlabel.pipeline.loss.fused import distillation_loss
from softlabel.pipeline.loss.targets import SparseTargets
from softlabel.storage.errors import UsageError
from tests.pipeline.dense import CASES, DIVERGENCES, K, N, V, gradients, inputs, make_targets, next_ids, reference

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("divergence", "target", "temperature"), CASES)
@pytest.mark.parametrize("log_rest", [-1.5, -16.0, -27.0])
@pytest.mark.parametrize("hard_weight", [0.0, 0.4])
def test_value_and_gradients_equal_those_of_the_dense_loss(divergence, target, temperature, log_rest, hard_weight):
    config = LossConfig(divergence=divergence, temperature=temperature, mix=0.3, hard_weight=hard_weight)
    hidden, weight, bias = inputs()
    targets = make_targets(target, log_rest=log_rest)
    expected = reference(hidden, weight, next_ids(), targets, config, bias)
    found = distillation_loss(hidden, weight, next_ids(), targets, config, bias=bias).total
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    for a, b in zip(gradients(found, hidden, weight, bias), gradients(expected, hidden, weight, bias), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("divergence", "target", "temperature"), CASES)
@pytest.mark.parametrize("log_rest", [-1.5, -16.0])
def test_gradients_equal_finite_differences_of_the_loss(divergence, target, temperature, log_rest):
    config = LossConfig(divergence=divergence, temperature=temperature, mix=0.6, hard_weight=0.4)
    targets = make_targets(target, n=3, log_rest=log_rest)

    def total(hidden, weight, bias):
        return distillation_loss(hidden, weight, next_ids(3), targets, config, bias=bias, recompute=True).total

    assert torch.autograd.gradcheck(total, inputs(n=3), fast_mode=True)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_temperature_squared_scales_the_gradient_as_well_as_the_loss(divergence):
    """The gradient is T² times that of the divergence, by finite differences of a loss without T²."""
    temperature, step = 2.0, 1e-6
    hidden, weight, bias = inputs()
    config = LossConfig(divergence=divergence, temperature=temperature)
    (found,) = gradients(distillation_loss(hidden, weight, next_ids(), make_targets(), config, bias=bias).total, bias)
    for i in range(4):
        nudge = torch.zeros(V, dtype=torch.float64).index_fill(0, torch.tensor(i), step)
        plain = [
            distillation_loss(
                hidden / temperature,
                weight,
                next_ids(),
                make_targets(),
                LossConfig(divergence=divergence),
                bias=(bias + sign * nudge) / temperature,
            ).total
            for sign in (1, -1)
        ]
        torch.testing.assert_close(found[i], temperature**2 * (plain[0] - plain[1]) / (2 * step), rtol=1e-5, atol=1e-8)


def test_temperature_changes_only_the_soft_part_on_every_path():
    """With and without hard labels, cap and recomputation, T changes the soft part and not the hard part."""
    hidden, weight, _ = inputs()
    settings = {"hard_weight": [0.0, 0.5], "soft_cap": [None, 30.0], "recompute": [False, True]}
    for hard_weight, soft_cap, recompute in itertools.product(*settings.values()):
        one, two = (
            distillation_loss(
                hidden,
                weight,
                next_ids(),
                make_targets(),
                LossConfig(temperature=temperature, hard_weight=hard_weight),
                soft_cap=soft_cap,
                recompute=recompute,
            )
            for temperature in (1.0, 2.0)
        )
        torch.testing.assert_close(one.hard, two.hard)
        assert not one.soft.isclose(two.soft, rtol=0.01)
        assert not gradients(one.total, hidden)[0].isclose(gradients(two.total, hidden)[0], rtol=0.01).all()


@pytest.mark.parametrize("tail_mass", [1e-7, 1e-12])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_tiny_bucket_gives_exact_values_and_gradients_in_float32(divergence, tail_mass):
    """Computed as 1 - Σ s in float32, the bucket would be 0 or wrong by nats. Both tails are tiny here."""
    config = LossConfig(divergence=divergence, mix=0.3)
    k = 3
    targets = make_targets(n=1, k=k + 1, log_rest=float(torch.tensor(tail_mass).log()))
    logits = torch.full((1, V), float(torch.tensor(tail_mass).log()) - 1, dtype=torch.float64)
    logits[0, targets.ids[0, :k]] = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    logits.requires_grad_()
    identity = torch.eye(V, dtype=torch.float64)
    expected = reference(logits, identity, next_ids(1), targets, config)
    (expected_gradient,) = gradients(expected, logits)
    single = logits.detach().float().requires_grad_()
    found = distillation_loss(single, identity.float(), next_ids(1), targets, config).total
    (gradient,) = gradients(found, single)
    torch.testing.assert_close(found.double(), expected.detach(), rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-6 * tail_mass**0.5)


extreme = st.one_of(st.floats(-20, 20), st.sampled_from([0.0, -80.0, 200.0, -torch.inf]))
rows = st.lists(extreme, min_size=7, max_size=7)


@given(student=rows, teacher=rows, divergence=st.sampled_from(DIVERGENCES), temperature=st.sampled_from([1.0, 3.0]))
@settings(max_examples=100)
def test_extreme_logits_give_finite_gradients(student, teacher, divergence, temperature):
    z = torch.tensor([student]).clamp(min=-1e4).requires_grad_()
    p = torch.tensor([[*teacher, 0.0]]).div(temperature).log_softmax(1)[:, :7]
    head = p.topk(3, 1)
    rest = p.scatter(1, head.indices, -torch.inf).logsumexp(1)
    targets = SparseTargets(head.indices, head.values, rest, torch.zeros(1), "bucket")
    config = LossConfig(divergence=divergence, temperature=temperature, hard_weight=1.0)
    loss = distillation_loss(z, torch.eye(7), torch.tensor([2]), targets, config)
    (gradient,) = gradients(loss.total, z)
    assert loss.total.isfinite()
    assert gradient.isfinite().all()
    assert gradient.sum().abs() < 1e-4 * temperature * (1 + gradient.abs().sum())


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_head_of_all_ids_gives_the_dense_divergence(divergence):
    """As for a classifier: without a bucket, its terms are 0 and not NaN."""
    config = LossConfig(divergence=divergence, mix=0.3, temperature=2.0)
    hidden, weight, _ = inputs()
    p = torch.randn(N, V, dtype=torch.float64).log_softmax(1)
    none = torch.full((N,), -torch.inf, dtype=torch.float64)
    targets = SparseTargets(torch.arange(V).expand(N, V), p, none, none, "bucket")
    expected = reference(hidden, weight, next_ids(), targets, config)
    found = distillation_loss(hidden, weight, next_ids(), targets, config).total
    torch.testing.assert_close(found, expected)
    for a, b in zip(gradients(found, hidden, weight), gradients(expected, hidden, weight), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_student_equal_to_its_teacher_has_zero_loss_and_gradient(divergence, temperature):
    hidden, weight, bias = inputs()
    p = ((hidden @ weight.t() + bias) / temperature).log_softmax(1).detach()
    head = p.topk(K, 1)
    rest = p.scatter(1, head.indices, -torch.inf).logsumexp(1)
    targets = SparseTargets(head.indices, head.values, rest, rest, "bucket")
    loss = distillation_loss(
        hidden, weight, next_ids(), targets, LossConfig(divergence=divergence, temperature=temperature), bias=bias
    )
    assert abs(loss.total.item()) < 1e-12
    if divergence != "total_variation":  # which has a kink there
        assert all(gradient.abs().max() < 1e-12 for gradient in gradients(loss.total, hidden, weight, bias))


def test_the_sampled_tails_gradient_is_unbiased():
    """The mean over many draws is the gradient for the dense teacher, within 5 standard errors."""
    generator = torch.Generator().manual_seed(0)
    draws, M = 4000, 3
    z = torch.randn(1, V, generator=generator, dtype=torch.float64)
    p = (2 * torch.randn(V, generator=generator, dtype=torch.float64)).softmax(0)
    head = p.topk(2).indices
    tail = p.index_fill(0, head, 0.0)
    drawn = torch.multinomial(tail, draws * M, replacement=True, generator=generator).view(draws, M)
    counts = torch.zeros(draws, V, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(draws, M).double())
    t = counts * tail.sum() / M
    t[:, head] = p[head]
    none = torch.full((draws,), -torch.inf, dtype=torch.float64)
    targets = SparseTargets(torch.arange(V).expand(draws, V), t.log(), none, torch.zeros(draws), "sampled")
    rows = z.expand(draws, V).clone().requires_grad_()
    loss = distillation_loss(
        rows, torch.eye(V, dtype=torch.float64), next_ids(draws), targets, LossConfig(), normalizer=1.0
    )
    (gradient,) = gradients(loss.total, rows)
    errors = (gradient.mean(0) - (z.softmax(1)[0] - p)) / (gradient.std(0) / draws**0.5).clamp(min=1e-6)
    assert errors.abs().max() < 5


def test_gradients_do_not_depend_on_micro_batches():
    """An average of averages would give positions of short micro-batches more weight."""
    hidden, weight, bias = inputs(n=20)
    targets, ids, config = make_targets(n=20), next_ids(20), LossConfig(hard_weight=0.5)

    def total(part):
        return distillation_loss(
            hidden[part], weight, ids[part], targets[part], config, bias=bias, normalizer=torch.tensor(20.0)
        ).total

    whole = gradients(total(slice(0, 20)), hidden, weight, bias)
    parts = gradients(sum(total(part) for part in (slice(0, 3), slice(3, 17), slice(17, 20))), hidden, weight, bias)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [V, V - 3])
def test_padding_rows_of_the_head_get_no_probability_and_no_gradient(size):
    """Students with 151,936 and 152,064 rows learn the same from 151,669 ids: padding rows never count."""
    hidden, weight, bias = inputs()
    targets, ids, config = make_targets(v=size), next_ids(v=size), LossConfig(hard_weight=0.5)
    loss = distillation_loss(hidden, weight, ids, targets, config, bias=bias, vocabulary_size=size).total
    found = gradients(loss, hidden, weight, bias)
    cut = distillation_loss(hidden, weight[:size], ids, targets, config, bias=bias[:size]).total
    torch.testing.assert_close(loss, cut)
    for a, b in zip(found, gradients(cut, hidden, weight, bias), strict=True):
        torch.testing.assert_close(a, b)
    assert (found[1][size:] == 0).all()
    assert (found[2][size:] == 0).all()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_soft_cap_and_logit_scale_are_part_of_the_loss(temperature):
    config = LossConfig(hard_weight=0.5, temperature=temperature)
    hidden, weight, bias = inputs()
    targets = make_targets(v=V - 2)
    expected = reference(hidden, weight, next_ids(), targets, config, bias, size=V - 2, cap=3.0, scale=0.7)
    found = distillation_loss(
        hidden, weight, next_ids(), targets, config, bias=bias, vocabulary_size=V - 2, soft_cap=3.0, logit_scale=0.7
    ).total
    torch.testing.assert_close(found, expected)
    for a, b in zip(gradients(found, hidden, weight, bias), gradients(expected, hidden, weight, bias), strict=True):
        torch.testing.assert_close(a, b)


def test_padding_entries_do_not_affect_id_0():
    """Padding entries point to id 0, which here is in the rest in some rows and kept in others."""
    hidden, weight, _ = inputs()
    full = make_targets(k=3)
    first = torch.zeros(N, 2, dtype=torch.int64), torch.full((N, 2), -torch.inf, dtype=torch.float64)
    ids, logprobs = torch.cat([full.ids, first[0]], 1), torch.cat([full.logprobs, first[1]], 1)
    ids[:2, 0] = 0
    full.ids[:2, 0] = 0
    padded = SparseTargets(ids, logprobs, full.log_rest, full.entropies, "bucket")
    losses = [distillation_loss(hidden, weight, next_ids(), t, LossConfig()).total for t in (full, padded)]
    torch.testing.assert_close(*losses)
    for a, b in zip(gradients(losses[0], hidden, weight), gradients(losses[1], hidden, weight), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("k", [0, 3])
def test_a_bucket_that_holds_everything_has_zero_loss_and_gradient(k):
    """As for a table without a head whose draws are not used; with and without heads at other positions."""
    hidden, weight, bias = inputs()
    nothing = torch.full((N, k), -torch.inf), torch.zeros(N)
    targets = SparseTargets(torch.zeros(N, k, dtype=torch.int64), *nothing, torch.zeros(N), "bucket")
    loss = distillation_loss(hidden, weight, next_ids(), targets, LossConfig(), bias=bias).total
    assert abs(loss.item()) < 1e-12
    assert all(gradient.abs().max() < 1e-12 for gradient in gradients(loss, hidden, weight, bias))


def test_only_hard_labels_give_plain_cross_entropy():
    hidden, weight, bias = inputs()
    config = LossConfig(hard_weight=1.0, soft_weight=0.0, temperature=2.0)
    loss = distillation_loss(hidden, weight, next_ids(), None, config, bias=bias)
    expected = F.cross_entropy(hidden @ weight.t() + bias, next_ids())
    torch.testing.assert_close(loss.total, expected)
    assert loss.soft == 0
    for a, b in zip(
        gradients(loss.total, hidden, weight, bias), gradients(expected, hidden, weight, bias), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_a_soft_loss_without_targets_is_refused():
    hidden, weight, _ = inputs()
    with pytest.raises(UsageError, match="a soft loss needs targets"):
        distillation_loss(hidden, weight, next_ids(), None, LossConfig(hard_weight=1.0))
