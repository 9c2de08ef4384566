"""How the fused loss behaves as a part of a model under autograd: chunks, frozen and tied heads, precision."""

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from pipeline.loss import distillation_loss
from pipeline.student_config import LossConfig
from storage.errors import StudentError
from tests.pipeline.dense import (
    DIVERGENCES,
    N,
    V,
    gradients,
    inputs,
    make_targets,
    next_ids,
    reference,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_chunks_change_nothing():
    hidden, weight, bias = inputs(n=23)
    targets = make_targets(n=23)
    config = LossConfig(hard_weight=0.5)
    results = []
    for chunk_bytes in (1, 5 * V * 8, None):
        loss = distillation_loss(hidden, weight, next_ids(23), targets, config, bias=bias, chunk_bytes=chunk_bytes)
        results.append([loss.total, loss.hard, loss.soft, *gradients(loss.total, hidden, weight, bias)])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_the_parts_add_up():
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
def test_what_is_frozen_gets_no_gradient(selection):
    hidden, weight, _ = inputs()
    moving = distillation_loss(hidden, weight, next_ids(), make_targets(), LossConfig())
    expected = dict(zip("hw", gradients(moving.total, hidden, weight), strict=True))
    frozen, free, name = (weight, hidden, "h") if selection == "frozen head" else (hidden, weight, "w")
    frozen.requires_grad_(False)
    loss = distillation_loss(hidden, weight, next_ids(), make_targets(), LossConfig())
    loss.total.backward()
    assert frozen.grad is None
    torch.testing.assert_close(free.grad, expected[name])


def test_any_outer_gradient_and_a_tied_head():
    """The embedding that is also the head gets both gradients; a sum of losses weighs each."""
    _, weight, _ = inputs()
    tokens = torch.arange(N)
    config = LossConfig(hard_weight=0.5)

    def gradient(loss):
        return torch.autograd.grad(3.0 * loss + 0.5 * loss.square(), weight)[0]

    found = gradient(distillation_loss(weight[tokens], weight, next_ids(), make_targets(), config).total)
    torch.testing.assert_close(found, gradient(reference(weight[tokens], weight, next_ids(), make_targets(), config)))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_recomputing_gives_the_same_any_number_of_times(temperature):
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


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_bfloat16_is_close_to_float32(divergence):
    hidden, weight, _ = inputs(n=64, dtype=torch.bfloat16, bias=False)
    targets, ids = make_targets(n=64, dtype=torch.float32), next_ids(64)
    config = LossConfig(divergence=divergence, hard_weight=0.5)
    exact = [tensor.detach().float().requires_grad_() for tensor in (hidden, weight)]
    rough = distillation_loss(hidden, weight, ids, targets, config).total
    fine = distillation_loss(*exact, ids, targets, config).total
    torch.testing.assert_close(rough, fine, rtol=0.01, atol=0.01)
    for a, b in zip(gradients(rough, hidden, weight), gradients(fine, *exact), strict=True):
        assert a.dtype == torch.bfloat16
        assert F.cosine_similarity(a.float().flatten(), b.flatten(), dim=0) > 0.999


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


def test_without_gradients_there_are_only_values():
    hidden, weight, _ = inputs()
    with torch.no_grad():
        value = distillation_loss(hidden, weight, next_ids(), make_targets(), LossConfig()).total
    assert not value.requires_grad
    torch.testing.assert_close(value, reference(hidden, weight, next_ids(), make_targets(), LossConfig()).detach())


def test_a_batch_without_captured_positions_has_loss_0_and_gradient_0():
    hidden, weight, _ = inputs()
    loss = distillation_loss(hidden[:0], weight, next_ids(0), make_targets()[:0], LossConfig(), normaliser=10)
    assert loss.total == 0
    assert (gradients(loss.total, weight)[0] == 0).all()
