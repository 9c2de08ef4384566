"""A dense reference of the loss, and small random inputs for comparing the fused loss with it."""

import itertools
from typing import get_args

import torch
from torch.nn import functional as F  # noqa: N812

from softlabel.pipeline.config.train import LossConfig
from softlabel.pipeline.loss.targets import SparseTargets

N, H, V, K = 6, 5, 19, 4
DIVERGENCES = get_args(LossConfig.model_fields["divergence"].annotation)
CASES = [
    (divergence, target, temperature)
    for divergence, target, temperature in itertools.product(
        DIVERGENCES, ("bucket", "sampled", "renormalized", "zero_tail"), (1.0, 2.0)
    )
    if target == "bucket"
    or (target == "sampled" and divergence == "forward_kl" and temperature == 1)
    or (target in ("renormalized", "zero_tail") and divergence != "reverse_kl")
]


def inputs(seed=0, n=N, v=V, dtype=torch.float64, bias=True):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(n, H), (v, H), (v,)]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    hidden, weight, offset = (tensor.requires_grad_() for tensor in tensors)
    return hidden, weight, offset if bias else None


def next_ids(n=N, v=V):
    return torch.arange(n) * 7 % v


def make_targets(target="bucket", n=N, v=V, k=K, log_rest=None, seed=1, dtype=torch.float64) -> SparseTargets:
    """k distinct ids per position; the last position has one fewer, and its last entry is padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(v, generator=generator)[:k] for _ in range(n)])
    rest = torch.full((n,), -1.5 if log_rest is None else log_rest, dtype=dtype)
    logprobs = torch.randn(n, k, generator=generator, dtype=dtype)
    logprobs[-1, -1], ids[-1, -1] = -torch.inf, 0
    mass = torch.ones_like(rest) if target in ("sampled", "renormalized") else -torch.expm1(rest)
    logprobs = logprobs.log_softmax(1) + mass.log()[:, None]
    if target != "bucket":
        rest = torch.full_like(rest, -torch.inf)
    return SparseTargets(ids, logprobs, rest, torch.full((n,), 0.7, dtype=dtype), target)


def divergence_of(config, t, s, log_s):
    """Row sums of the textbook formula for probabilities (N, K + 1), in which padding has t = s = 0."""
    mix = config.mix

    def kl(p, q):
        return torch.where(p > 0, p * (p.clamp(min=1e-300).log() - q.clamp(min=1e-300).log()), 0.0).sum(1)

    match config.divergence:
        case "forward_kl":
            return torch.where(t > 0, t * (t.clamp(min=1e-300).log() - log_s), 0.0).sum(1)
        case "reverse_kl":
            return kl(s, t)
        case "jsd":
            m = mix * t + (1 - mix) * s
            return mix * kl(t, m) + (1 - mix) * kl(s, m)
        case "skew_forward_kl":
            return kl(t, mix * t + (1 - mix) * s)
        case "skew_reverse_kl":
            return kl(s, (1 - mix) * t + mix * s)
        case "total_variation":
            return 0.5 * (s - t).abs().sum(1)
    raise NotImplementedError(config.divergence)


def reference(hidden, weight, ids, targets, config, bias=None, size=None, cap=None, scale=1.0):
    """Mean of the total loss over positions, computed densely."""
    z = hidden @ weight.t()
    z = scale * (z if bias is None else z + bias)
    z = (z if cap is None else cap * torch.tanh(z / cap))[:, :size]
    total = config.hard_weight * F.cross_entropy(z, ids)
    if config.soft_weight == 0:
        return total
    log_q = (z / config.temperature).log_softmax(1)
    kept = targets.logprobs > -torch.inf
    inside = torch.zeros(z.shape).scatter_add(1, targets.ids, kept.float()) > 0
    log_rho = log_q.masked_fill(inside, -torch.inf).logsumexp(1)
    log_s = torch.cat([log_q.gather(1, targets.ids), log_rho[:, None]], 1)
    valid = torch.cat([kept, torch.ones(len(z), 1, dtype=torch.bool)], 1)
    s = torch.where(valid, log_s.exp(), 0.0)
    t = torch.cat([targets.logprobs, targets.log_rest[:, None]], 1).exp()
    if targets.target == "sampled":
        soft = -torch.where(t > 0, t * log_s, 0.0).sum(1) - targets.entropies
    else:
        soft = divergence_of(config, t, s, log_s)
    return total + config.soft_weight * config.temperature**2 * soft.mean()


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, [tensor for tensor in tensors if tensor is not None])
