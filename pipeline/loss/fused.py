"""A student's loss from its hidden states: linear head, divergence and cross-entropy fused into one function.

Logits exist for a chunk of positions at a time and are overwritten with their own gradient, so that memory does not
grow with positions x vocabulary, and the work is three matrix products, as for plain cross-entropy. The caller says
what to divide the sums by: a call rarely has all positions of a step.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softlabel.pipeline.config.train import LossConfig
from softlabel.pipeline.loss.divergence import cross_entropy, divergence_terms
from softlabel.pipeline.loss.targets import SparseTargets
from softlabel.storage.errors import StudentError, UsageError

_CHUNK_BYTES = {"cpu": 22 << 20, "cuda": 512 << 20}
"""Logits of a chunk: large enough for efficient matrix products, small compared with the gradient of the head."""
_PARTS = 12  # a temperature or a cap needs copies of logits: of one part of a chunk at a time


@dataclass(frozen=True)
class Loss:
    """The loss of one call, and its parts for the curves."""

    total: Tensor
    """Scalar with gradient: (hard_weight x hard + soft_weight x soft) / normalizer."""
    hard: Tensor
    """Scalar, detached: cross-entropy with the token that follows at temperature 1, nats, summed over positions."""
    soft: Tensor
    """Scalar, detached: divergence x temperature², summed over positions; 0 if soft_weight is 0."""
    positions: int
    """Number of positions of this call, N."""


def distillation_loss(
    hidden: Tensor,
    weight: Tensor,
    next_ids: Tensor,
    targets: SparseTargets | None,
    config: LossConfig,
    *,
    bias: Tensor | None = None,
    vocabulary_size: int | None = None,
    soft_cap: float | None = None,
    logit_scale: float = 1.0,
    normalizer: float | Tensor | None = None,
    recompute: bool = False,
    chunk_bytes: int | None = None,
) -> Loss:
    """Loss of N positions, with gradients for the hidden states and, unless they are frozen, the head's parameters.

    The student's logits are z = logit_scale · (hidden · weightᵀ + bias), then soft_cap · tanh(z / soft_cap) if capped.
    The soft part compares softmax(z / T) with the targets and counts T² times (Hinton et al., arXiv 1503.02531, §2),
    so its gradient is T · ∂D/∂(z/T). A sampled target's divergence is its cross-entropy less the teacher's entropy.

    Args:
        hidden: (N, H) states that predict the captured positions; float64, float32, bfloat16 or float16. Products are
            taken in this precision, or in that of an enclosing autocast, and their logits kept in float32 (float64 for
            float64). A CPU rounds 16-bit products, logits too, to 16 bits: in float32 they take three times as long.
        weight: (V, H) of the head; rows from vocabulary_size on are padding, without probability or gradient.
        next_ids: (N,) int64, the token that follows.
        targets: targets of the same N positions, at the temperature of config; None only if config.soft_weight is 0.
        config: divergence, mix, temperature and weights.
        bias: (V,) of the head.
        vocabulary_size: number of ids in the vocabulary; all V rows if None.
        soft_cap: bound of the logits, as in Gemma 2.
        logit_scale: factor on the logits, as in Cohere and Granite.
        normalizer: what to divide by: captured positions of the global batch, all micro-batches and devices; N if None.
        recompute: compute gradients in the backward pass instead of together with the loss. This costs a fourth matrix
            product; it is for heads whose weights and gradients must not outlive their pass (FSDP), and for more than
            one backward pass.
        chunk_bytes: bytes of logits in memory at a time. Affects speed and memory, and the result only by rounding.

    Raises:
        StudentError: if the head has fewer rows than the vocabulary.
        UsageError: if there are no targets for a soft loss.
    """
    rows = weight.shape[0]
    if vocabulary_size is not None and vocabulary_size > rows:
        raise StudentError(
            "the student's output layer is smaller than the teacher's vocabulary",
            expected=f"at least {vocabulary_size} rows",
            found=f"{rows} rows",
            do="choose a student with the teacher's tokenizer",
        )
    if targets is None and config.soft_weight > 0:
        raise UsageError("a soft loss needs targets", found="none", do="pass targets, or set loss.soft_weight to 0")
    problem = _Problem(
        next_ids=next_ids,
        targets=targets if config.soft_weight > 0 else None,
        config=config,
        vocabulary_size=rows if vocabulary_size is None else vocabulary_size,
        soft_cap=soft_cap,
        logit_scale=logit_scale,
        compute=_compute_dtype(hidden),
        chunk_bytes=chunk_bytes or _CHUNK_BYTES.get(hidden.device.type, _CHUNK_BYTES["cuda"]),
    )
    eager = torch.is_grad_enabled() and not recompute
    total, hard, soft = _FusedLoss.apply(hidden, weight, bias, problem, eager)  # type: ignore[no-untyped-call]
    positions = hidden.shape[0]
    return Loss(total / (max(positions, 1) if normalizer is None else normalizer), hard, soft, positions)


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


@dataclass(frozen=True)
class _Problem:
    """Everything that the loss depends on and that has no gradient."""

    next_ids: Tensor
    targets: SparseTargets | None
    config: LossConfig
    vocabulary_size: int
    soft_cap: float | None
    logit_scale: float
    compute: torch.dtype
    chunk_bytes: int


_Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


class _FusedLoss(torch.autograd.Function):
    """Sums of the loss; gradients are computed with it and scaled in the backward pass, or only computed there."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, problem: _Problem, eager: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        wanted = tuple(needed and eager for needed in ctx.needs_input_grad[:3])
        hard, soft, ctx.gradients = _sweep(hidden, weight, bias, problem, wanted)
        ctx.eager, ctx.problem = eager, problem
        ctx.dtypes = hidden.dtype, weight.dtype, bias.dtype if bias is not None else None
        if not eager:
            ctx.save_for_backward(hidden, weight, bias)
        ctx.mark_non_differentiable(hard, soft)
        return problem.config.hard_weight * hard + problem.config.soft_weight * soft, hard, soft

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, *parts: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("the fused loss has no second derivative: call backward without create_graph")
        if ctx.eager:
            gradients, ctx.gradients = ctx.gradients, None
            if gradients is None:
                raise RuntimeError(
                    "the gradients were used up by an earlier backward pass; pass recompute=True to repeat it"
                )
        else:
            hidden, weight, bias = ctx.saved_tensors
            _, _, gradients = _sweep(hidden, weight, bias, ctx.problem, ctx.needs_input_grad[:3])
        # In place, which is safe because no one else holds these: the head's gradient is the largest tensor here.
        scaled = [
            None if gradient is None else gradient.mul_(grad_output).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        ]
        return *scaled, None, None


def _sweep(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, problem: _Problem, wanted: tuple[bool, ...]
) -> tuple[Tensor, Tensor, _Gradients]:
    """Sums of the hard and the soft part, and the requested gradients of their weighted sum, chunk by chunk."""
    precision = torch.promote_types(problem.compute, torch.float32)
    (N, H), V, scale = hidden.shape, weight.shape[0], problem.logit_scale
    h, w = hidden.to(problem.compute), weight.to(problem.compute)
    d_hidden = torch.empty_like(h) if wanted[0] else None
    d_weight = weight.new_zeros(V, H, dtype=precision) if wanted[1] else None
    d_bias = weight.new_zeros(V, dtype=precision) if wanted[2] else None
    hard, soft = h.new_zeros(N, dtype=precision), h.new_zeros(N, dtype=precision)

    chunk_rows = _rows(N, problem.chunk_bytes, V * precision.itemsize)
    copied = problem.soft_cap is not None or problem.config.temperature != 1
    part_rows = -(-chunk_rows // _PARTS) if copied else chunk_rows
    buffer = h.new_empty(chunk_rows, V, dtype=precision)
    with torch.autocast(h.device.type, enabled=False):
        for chunk in _slices(0, N, chunk_rows):
            z = buffer[: chunk.stop - chunk.start]
            _product(z, h[chunk], w.t(), scale, add=False)
            for rows in _slices(chunk.start, chunk.stop, part_rows):
                part = z[rows.start - chunk.start : rows.stop - chunk.start]
                hard[rows], soft[rows] = _overwrite(part, bias, problem, rows)
            if not any(wanted):
                continue
            g = z.to(problem.compute)
            if d_hidden is not None:
                torch.mm(g, w, out=d_hidden[chunk])
            if d_weight is not None:
                _product(d_weight, g.t(), h[chunk], scale, add=True)
            if d_bias is not None:
                d_bias.add_(z.sum(0), alpha=scale)
    if d_hidden is not None and scale != 1:
        d_hidden.mul_(scale)
    return hard.sum(), soft.sum(), (d_hidden, d_weight, d_bias)


def _overwrite(z: Tensor, bias: Tensor | None, problem: _Problem, rows: slice) -> tuple[Tensor, Tensor]:
    """Turn raw logits z (n, V), in place, into the gradient of the weighted loss with respect to them.

    Returns the hard and the soft part of each row, (n,) each, not weighted.
    """
    config, next_ids, cap = problem.config, problem.next_ids[rows], problem.soft_cap
    targets = None if problem.targets is None else problem.targets[rows]
    if bias is not None:
        z.add_(bias, alpha=problem.logit_scale)
    if cap is not None:
        z.div_(cap).tanh_()
        slope = z.square().neg_().add_(1)
        z.mul_(cap)
    z[:, problem.vocabulary_size :] = -torch.inf

    T = config.temperature
    if targets is None or T == 1:
        hard, soft = _differentiate(z, next_ids, config.hard_weight, targets, config.soft_weight, config)
    else:
        plain = z.clone()
        hard, _ = _differentiate(plain, next_ids, config.hard_weight, None, 0.0, config)
        _, soft = _differentiate(z.div_(T), next_ids, 0.0, targets, T * config.soft_weight, config)
        z.add_(plain)
        soft *= T * T
    if cap is not None:
        z.mul_(slope)
    return hard, soft


def _differentiate(
    z: Tensor,
    next_ids: Tensor,
    hard_weight: float,
    targets: SparseTargets | None,
    soft_weight: float,
    config: LossConfig,
) -> tuple[Tensor, Tensor]:
    """Turn logits z (n, V), in place, into hard_weight · ∂hard/∂z + soft_weight · ∂soft/∂z; return hard and soft.

    With g = ∂soft/∂log s of each kept id, g_ρ of the bucket and G their sum, ∂soft/∂z is g - s·G on the kept ids and
    softmax(z over the rest) · (g_ρ - ρ·G) on the rest. log ρ is a logsumexp over the rest: 1 - Σ s would lose a small
    ρ to rounding, and dividing by it would overflow.
    """
    next_logits = z.gather(1, next_ids[:, None])[:, 0]
    kept_logits = z[:, :0]
    if targets is not None:
        kept = targets.logprobs > -torch.inf
        kept_logits = z.gather(1, targets.ids).masked_fill(~kept, -torch.inf)
        # Added, not assigned: padding entries all point to id 0, which may be kept or one of the rest.
        z.scatter_add_(1, targets.ids, torch.where(kept, -torch.inf, 0.0).to(z.dtype))

    # Where every id is kept, the rest is all -inf and its sum 0: a finite maximum avoids NaN.
    top = z.amax(1).clamp(min=torch.finfo(z.dtype).min)
    z.sub_(top[:, None]).exp_()
    rest_sum = z.sum(1)
    # Logs are relative to a level near the largest logit, because large logits have few digits after the point.
    level = torch.maximum(top, kept_logits.logsumexp(1))
    kept_logits = kept_logits - level[:, None]
    log_rest = top - level + rest_sum.log()
    log_total = torch.logaddexp(log_rest, kept_logits.logsumexp(1))
    hard = log_total - (next_logits - level)

    if targets is None:
        soft, rest_gradient = torch.zeros_like(hard), torch.full_like(hard, hard_weight)
    else:
        log_s = torch.cat([kept_logits, log_rest[:, None]], 1) - log_total[:, None]
        log_t = torch.cat([targets.logprobs, targets.log_rest[:, None]], 1).to(z.dtype)
        terms, g = divergence_terms(config.divergence, log_t, log_s, config.mix)
        soft = cross_entropy(log_t, log_s) - targets.entropies if targets.target == "sampled" else terms.sum(1)
        s = log_s.exp()
        gradients = soft_weight * (g - s * g.sum(1, keepdim=True)) + hard_weight * s
        rest_gradient = gradients[:, -1]

    z.mul_((rest_gradient / rest_sum.clamp(min=torch.finfo(z.dtype).tiny))[:, None])
    if targets is not None:
        z.scatter_add_(1, targets.ids, gradients[:, :-1])
    z.scatter_add_(1, next_ids[:, None], z.new_full((len(z), 1), -hard_weight))
    return hard, soft


def _product(out: Tensor, a: Tensor, b: Tensor, scale: float, add: bool) -> None:
    """out = scale · a @ b, or out += scale · a @ b, accumulated in the precision of out where the device can."""
    if a.dtype == out.dtype:
        out.addmm_(a, b, beta=float(add), alpha=scale)
    elif out.is_cuda:
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=float(add), alpha=scale, out=out)
    elif add:
        out.add_(a @ b, alpha=scale)
    else:
        out.copy_(a @ b).mul_(scale)


def _rows(count: int, budget: int, row_bytes: int) -> int:
    """Rows per part, when a number of rows is cut into even parts within a budget of bytes."""
    parts = -(-count * row_bytes // budget)
    return max(1, -(-count // max(parts, 1)))


def _slices(begin: int, end: int, rows: int) -> list[slice]:
    return [slice(start, min(start + rows, end)) for start in range(begin, end, rows)]
