"""The fused loss as a part of a model under autograd: chunks, frozen and tied heads, precision."""

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from softlabel.pipeline.config.train import LossConfig
from softlabel.pipeline.loss.fused import distillation_loss
from softlabel.storage.errors import StudentError
from tests import memory
from tests.pipeline.dense import DIVERGENCES, N, V, gradients, inputs, make_targets, next_ids, reference

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("temperature", "soft_cap"), [(1.0, None), (2.0, None), (1.0, 5.0), (2.0, 5.0)])
def test_the_chunk_size_does_not_change_the_result(temperature, soft_cap):
    hidden, weight, bias = inputs(n=23)
    targets = make_targets(n=23)
    config, options = LossConfig(hard_weight=0.5, temperature=temperature), {"bias": bias, "soft_cap": soft_cap}
    results = []
    for chunk_bytes in (1, 5 * V * 8, None):
        loss = distillation_loss(hidden, weight, next_ids(23), targets, config, chunk_bytes=chunk_bytes, **options)
        results.append([loss.total, loss.hard, loss.soft, *gradients(loss.total, hidden, weight, bias)])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_copies_for_temperature_and_cap_are_small_compared_with_a_chunk():
    """By the peak resident set; the gradient of such a narrow head is negligible."""
    n, v = 1024, 16_384
    chunk = 4 * n * v
    hidden, weight, _ = inputs(n=n, v=v, dtype=torch.float32)
    ids, targets = next_ids(n, v), make_targets(n=1, v=v, dtype=torch.float32)[torch.zeros(n, dtype=torch.int64)]
    config = LossConfig(hard_weight=0.5, temperature=2.0)
    peaks = []
    for rows in (slice(0, 8), slice(0, n)):  # the first run allocates what libraries keep
        memory.reset_peak()
        before = memory.resident()
        loss = distillation_loss(
            hidden[rows], weight, ids[rows], targets[rows], config, soft_cap=30.0, chunk_bytes=chunk
        )
        peaks.append(memory.peak() - before)
        assert loss.total.isfinite()
    assert chunk / 2 < peaks[1] < 1.5 * chunk


def test_the_total_is_the_weighted_sum_of_the_parts():
    hidden, weight, _ = inputs()
    config = LossConfig(hard_weight=0.25, soft_weight=2.0, temperature=2.0)
    loss = distillation_loss(hidden, weight, next_ids(), make_targets(), config)
    torch.testing.assert_close(loss.total, (0.25 * loss.hard + 2.0 * loss.soft) / N)
    assert loss.positions == N
    assert not loss.hard.requires_grad
    assert not loss.soft.requires_grad
    torch.testing.assert_close(loss.hard, F.cross_entropy(hidden @ weight.t(), next_ids(), reduction="sum"))


def test_a_head_smaller_than_the_vocabulary_is_refused():
    hidden, weight, _ = inputs()
    with pytest.raises(StudentError, match="at least 20 rows"):
        distillation_loss(hidden, weight, next_ids(), make_targets(), LossConfig(), vocabulary_size=20)


@pytest.mark.parametrize("selection", ["frozen head", "frozen body"])
def test_frozen_parameters_get_no_gradient(selection):
    hidden, weight, _ = inputs()
    moving = distillation_loss(hidden, weight, next_ids(), make_targets(), LossConfig())
    expected = dict(zip("hw", gradients(moving.total, hidden, weight), strict=True))
    frozen, free, name = (weight, hidden, "h") if selection == "frozen head" else (hidden, weight, "w")
    frozen.requires_grad_(False)
    loss = distillation_loss(hidden, weight, next_ids(), make_targets(), LossConfig())
    loss.total.backward()
    assert frozen.grad is None
    torch.testing.assert_close(free.grad, expected[name])


def test_outer_gradients_and_tied_heads_are_supported():
    """The embedding that is also the head gets both gradients; a sum of losses weighs each."""
    _, weight, _ = inputs()
    tokens = torch.arange(N)
    config = LossConfig(hard_weight=0.5)

    def gradient(loss):
        return torch.autograd.grad(3.0 * loss + 0.5 * loss.square(), weight)[0]

    found = gradient(distillation_loss(weight[tokens], weight, next_ids(), make_targets(), config).total)
    torch.testing.assert_close(found, gradient(reference(weight[tokens], weight, next_ids(), make_targets(), config)))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_recomputing_allows_repeated_backward_passes_with_equal_gradients(temperature):
    hidden, weight, bias = inputs()
    config = LossConfig(hard_weight=0.5, temperature=temperature)
    along, later = (
        distillation_loss(hidden, weight, next_ids(), make_targets(), config, bias=bias, recompute=recompute).total
        for recompute in (False, True)
    )
    torch.testing.assert_close(along, later, rtol=0, atol=0)
    leaves = [hidden, weight, bias]
    expected = torch.autograd.grad(along, leaves, retain_graph=True)
    for _ in range(2):
        for a, b in zip(torch.autograd.grad(later, leaves, retain_graph=True), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="recompute=True"):
        torch.autograd.grad(along, leaves)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_second_derivative_is_refused(recompute):
    hidden, weight, _ = inputs()
    loss = distillation_loss(hidden, weight, next_ids(), make_targets(), LossConfig(), recompute=recompute).total
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_bfloat16_is_close_to_float32(divergence):
    """With realistic logits: their rounding on a CPU is the only coarse step."""
    hidden, weight, _ = inputs(n=64, v=512, dtype=torch.bfloat16, bias=False)
    hidden = (8 * hidden).detach().requires_grad_()
    targets, ids = make_targets(n=64, v=512, dtype=torch.float32), next_ids(64, 512)
    config = LossConfig(divergence=divergence, hard_weight=0.5)
    h, w = (tensor.detach().float().requires_grad_() for tensor in (hidden, weight))
    logits = (hidden @ weight.t()).detach().float().requires_grad_()
    rough, fine, rounded = (
        distillation_loss(*parts, ids, targets, config).total
        for parts in ((hidden, weight), (h, w), (logits, torch.eye(512)))
    )
    torch.testing.assert_close(rough, fine, rtol=2e-3, atol=0)
    torch.testing.assert_close(rough, rounded, rtol=1e-5, atol=0)
    (g,) = gradients(rounded, logits)
    found, expected = gradients(rough, hidden, weight), gradients(fine, h, w)
    for a, b, c in zip(found, expected, (g @ w, g.t() @ h), strict=True):
        assert a.dtype == torch.bfloat16
        assert (a - b).norm() < 0.015 * b.norm()
        assert (a - c).norm() < 0.004 * c.norm()


def test_autocast_computes_in_bfloat16_and_keeps_the_weights_gradient_in_float32():
    hidden, weight, bias = inputs(n=64, dtype=torch.float32)
    targets, ids = make_targets(n=64, dtype=torch.float32), next_ids(64)
    fine = gradients(distillation_loss(hidden, weight, ids, targets, LossConfig(), bias=bias).total, hidden, weight)
    for recompute in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            loss = distillation_loss(hidden, weight, ids, targets, LossConfig(), bias=bias, recompute=recompute)
        for a, b in zip(gradients(loss.total, hidden, weight), fine, strict=True):
            assert a.dtype == torch.float32
            assert not a.equal(b)
            assert F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.999


def test_without_gradients_the_values_are_the_same():
    hidden, weight, _ = inputs()
    with torch.no_grad():
        value = distillation_loss(hidden, weight, next_ids(), make_targets(), LossConfig()).total
    assert not value.requires_grad
    torch.testing.assert_close(value, reference(hidden, weight, next_ids(), make_targets(), LossConfig()).detach())


def test_a_batch_without_captured_positions_has_loss_0_and_gradient_0():
    hidden, weight, _ = inputs()
    loss = distillation_loss(hidden[:0], weight, next_ids(0), make_targets()[:0], LossConfig(), normalizer=10)
    assert loss.total == 0
    assert (gradients(loss.total, weight)[0] == 0).all()
