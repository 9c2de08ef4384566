"""The average of teachers as a target, against the dense average in float64."""

import pytest
import torch

from softlabel.pipeline.config.train import LossConfig
from softlabel.pipeline.loss.averaging import AveragedTargets, decode_batch, require_average
from softlabel.pipeline.loss.fused import distillation_loss
from softlabel.pipeline.loss.targets import TokenIds
from softlabel.storage.errors import UsageError
from tests.pipeline.loss.test_targets import NUMBERING, TEMPERATURES, V, capture, compact_of, dense

WEIGHTS = (0.7, 0.3)
SEEDS = 400


def average(first, second, **selection) -> AveragedTargets:
    """Captures of two teachers, with different seeds."""
    parts = [capture(logits, seed, **selection) for seed, logits in enumerate((first, second), 1)]
    return AveragedTargets(tuple(map(compact_of, parts)), WEIGHTS)


def decoded(averaged):
    return decode_batch(averaged, TokenIds(NUMBERING), TEMPERATURES, LossConfig())


@pytest.fixture(scope="module")
def teachers():
    """Logits (1, V) of two teachers that differ."""
    generator = torch.Generator().manual_seed(0)
    return [2 * torch.randn(1, V, generator=generator, dtype=torch.float64) for _ in WEIGHTS]


def mean(teachers):
    return sum(weight * logits.softmax(1) for weight, logits in zip(WEIGHTS, teachers, strict=True))


def gradient_and_loss(targets, z):
    """(N, V) ∂/∂z of each position's loss, and its value summed over positions."""
    rows = z.expand(len(targets.ids), V).clone().requires_grad_()
    head = torch.eye(V, dtype=torch.float64)
    loss = distillation_loss(rows, head, torch.zeros(len(rows), dtype=int), targets, LossConfig(), normalizer=1.0)
    return torch.autograd.grad(loss.total, rows)[0], loss.soft


@pytest.mark.parametrize("selection", [{}, {"top_p": 0.5, "max_k": 4, "draws": 12}, {"min_k": 0, "max_k": 0}])
def test_the_gradient_is_that_of_the_average_and_the_loss_is_the_mean_kl(teachers, selection):
    targets = decoded(average(*(logits.expand(SEEDS, V) for logits in teachers), **selection))
    z = torch.randn(1, V, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    gradient, loss = gradient_and_loss(targets, z)
    # Compared along a few random directions, because a single rare id may never be drawn.
    directions = torch.randn(V, 16, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    seen, expected = gradient @ directions, ((z.softmax(1) - mean(teachers)) @ directions)[0]
    rounding = (mean(teachers) @ directions.abs())[0] / 128  # of a head's codes
    assert ((seen.mean(0) - expected).abs() < rounding + 4 * seen.std(0) / SEEDS**0.5).all()
    kls = [(p * (p.log() - z.log_softmax(1))).sum() for p in (logits.softmax(1) for logits in teachers)]
    expected_kl = sum(weight * kl for weight, kl in zip(WEIGHTS, kls, strict=True))
    assert abs(loss / SEEDS - expected_kl) < 0.05 * expected_kl


def test_with_heads_of_all_ids_the_average_is_exact(teachers):
    targets = decoded(average(*teachers, top_k=V))
    torch.testing.assert_close(dense(targets).double(), mean(teachers), rtol=1 / 64, atol=1e-7)
    z = torch.zeros(1, V, dtype=torch.float64)
    gradient, _ = gradient_and_loss(targets, z)
    torch.testing.assert_close(gradient, z.softmax(1) - mean(teachers), rtol=1 / 32, atol=1e-4)


def test_each_id_comes_once_and_the_most_likely_comes_first(teachers):
    targets = decoded(average(*(logits.expand(20, V) for logits in teachers)))
    for ids, logprobs in zip(targets.ids, targets.logprobs, strict=True):
        kept = ids[logprobs > -torch.inf].tolist()
        assert len(kept) == len(set(kept))
        assert (logprobs.diff()[: len(kept) - 1] <= 0).all()
    torch.testing.assert_close(dense(targets).sum(1), torch.ones(20))
    assert (targets.ids[:, 0] == mean(teachers).argmax()).all()


def test_the_next_tokens_probability_is_averaged_and_the_entropy_is_the_mean(teachers):
    averaged = average(*teachers)
    torch.testing.assert_close(averaged.next_logprobs.exp().double(), mean(teachers)[:, 0], rtol=1e-2, atol=0)
    entropies = [-(p * p.log()).sum() for p in (logits.softmax(1) for logits in teachers)]
    expected = sum(weight * entropy for weight, entropy in zip(WEIGHTS, entropies, strict=True))
    assert abs(decoded(averaged).entropies.item() - expected) < 1 / 128


def test_an_average_of_no_positions_decodes_to_nothing(teachers):
    """A rank without rows left still takes part in the step."""
    parts = average(*teachers).parts
    empty = [type(part)(**{name: values[..., :0] for name, values in vars(part).items()}) for part in parts]
    targets = AveragedTargets(tuple(empty), WEIGHTS).to("cpu")
    assert (targets.positions, len(targets.next_logprobs), len(targets.head_counts)) == (0, 0, 0)
    assert len(decoded(targets).ids) == 0


@pytest.mark.parametrize(
    ("loss", "max_k", "message"),
    [
        ({"divergence": "reverse_kl"}, None, "loss.divergence: reverse_kl"),
        ({"temperature": 2.0}, None, "loss.temperature: 2"),
        ({"target": "bucket"}, None, "loss.target: bucket"),
        ({}, 4, "stream.max_k: 4"),
    ],
)
def test_a_loss_that_an_average_does_not_support_is_refused(loss, max_k, message):
    with pytest.raises(UsageError, match=message):
        require_average(LossConfig(**loss), max_k)
