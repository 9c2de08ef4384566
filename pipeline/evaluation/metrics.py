"""How far a student is from its teacher, summed up in one pass over captured positions.

The teacher's predictions come from the table, so no teacher is needed. Logits exist for a chunk of positions at a time,
and of all positions only sums are kept: over everything, by groups, and for each replicate of ``bootstrap``. Nothing
here trains, or decides which sequences are measured.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from softlabel.pipeline.config.train import LossConfig
from softlabel.pipeline.evaluation.bootstrap import Floats, Sums, seed_of
from softlabel.pipeline.evaluation.positions import DIVERGENCES, Known, compare
from softlabel.pipeline.loss.averaging import AveragedTargets, decode_batch
from softlabel.pipeline.loss.divergence import cross_entropy
from softlabel.pipeline.loss.targets import SparseTargets, TokenIds, decode_draws, decode_targets
from softlabel.pipeline.students.build import hidden_states, output_head
from softlabel.storage.errors import StudentError
from softlabel.storage.views.view import AnyTable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from softlabel.pipeline.stream.batch import Batch
    from softlabel.pipeline.stream.holdout import HeldOutBatch

DRAFT = 4
"""Tokens that a draft model proposes at a time, for the tokens per step."""
Teacher = Known | SparseTargets
OfPositions = Callable[[Tensor, Teacher, Tensor, Tensor], dict[str, Tensor]]

ENTROPY_BIN, ENTROPY_BINS = 0.5, 32
"""Width in nats, and number, of the bins by the teacher's entropy."""
POSITION_BINS = 24
"""Bins by the position in the sequence: 1, 2-3, 4-7, and so on."""
CONFIDENCE_BINS = 10
"""Bins by the probability of the most likely token."""
_CHUNK_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}
"""Logits in float32 that are held at a time, by kind of device."""

QUANTITIES = (
    *("positions", "bytes", "cross_entropy", "teacher_cross_entropy", "teacher_entropy", "unsampled"),
    *(f"{name}{part}" for name in DIVERGENCES for part in ("", "_low", "_high", "_variance")),
    *("agreement", "agreement_known", "top", "top_known", "top_low", "top_high"),
    *("windows", "steps", "steps_low", "steps_high", "confidence", "correct"),
)
"""Quantities that are summed over positions; ``_known`` counts those at which the quantity is known."""
BINNED = {
    "calibration": ("confidence", ("positions", "confidence", "correct", "teacher", "teacher_low", "teacher_high")),
    "teacher's calibration": ("teacher_confidence", ("positions", "teacher_confidence", "teacher_correct")),
}
"""What is summed by bins of a confidence: whose confidence, and the quantities."""


def empty_sums(groups: Mapping[str, Sequence[str]]) -> Sums:
    """The sums before the first batch: of each part, over all positions or over groups of them.

    Args:
        groups: values of each column to group by.
    """
    cells = {"overall": 1, "entropy": ENTROPY_BINS, "position": POSITION_BINS}
    cells |= {f"column {name}": len(values) for name, values in groups.items()}
    shapes = {part: count * len(QUANTITIES) for part, count in cells.items()}
    for kind, (_, names) in BINNED.items():
        shapes |= {f"{part}: {kind}": count * CONFIDENCE_BINS * len(names) for part, count in cells.items()}
    return Sums(shapes)


@torch.no_grad()
def measure(
    model: "PreTrainedModel",
    batches: "Iterable[HeldOutBatch]",
    table: AnyTable,
    sizes: NDArray[np.int64],
    sums: Sums,
    done: "Callable[[HeldOutBatch], object]" = lambda _: None,
) -> None:
    """Add a student's measurements to sums; its training mode is restored afterwards.

    Args:
        model: the student.
        batches: batches of the table.
        table: the table that the batches are from.
        sizes: (V,) bytes of text that each token id stands for.
        sums: from ``empty_sums``.
        done: called with each batch after it has been added.

    Raises:
        StudentError: if the student's predictions are not numbers.
    """
    was_training = model.training
    model.eval()
    bytes_of = torch.from_numpy(sizes)
    try:
        for held in batches:
            if len(held.batch.positions):
                values = {name: value.cpu() for name, value in _quantities(model, held.batch, table).items()}
                nan = values["cross_entropy"].isnan()
                require_numbers(int(nan.sum()), len(nan), "positions", model)
                values["bytes"] = bytes_of[held.batch.next_ids].double()
                _add(sums, held, values)
            done(held)
    finally:
        model.train(was_training)


@torch.no_grad()
def means(model: "PreTrainedModel", batches: "Iterable[Batch]", table: AnyTable) -> dict[str, float]:
    """Means over all positions of a few quantities, for the curves of a training; NaN where nothing is known."""
    was_training = model.training
    model.eval()
    try:
        parts = [_quantities(model, batch, table) for batch in batches if len(batch.positions)]
    finally:
        model.train(was_training)
    values = {name: torch.cat([part[name] for part in parts]) for name in ("forward_kl", "cross_entropy", "agreement")}
    known = {"agreement": values["agreement"][~values["agreement"].isnan()]}
    return {name: float(value.mean()) for name, value in (values | known).items()}


def _quantities(model: "PreTrainedModel", batch: "Batch", table: AnyTable) -> dict[str, Tensor]:
    """(N,) float64 by name, at each captured position of a batch."""
    values = in_chunks(model, batch, table, quantities)
    return values | {"position": batch.position_ids.flatten()[batch.positions].double().to(model.device) + 1}


def in_chunks(model: "PreTrainedModel", batch: "Batch", table: AnyTable, of: OfPositions) -> dict[str, Tensor]:
    """What a function finds at each captured position of a batch, with the logits of a chunk of them at a time."""
    head, token_ids = output_head(model), TokenIds(table.numbering).to(model.device)
    batch = batch.to(model.device)
    states = hidden_states(model, batch.input_ids, batch.position_ids).flatten(0, 1)[batch.positions]
    teacher = teacher_of(batch, token_ids, table)
    budget = _CHUNK_BYTES.get(model.device.type, _CHUNK_BYTES["cuda"])
    rows = max(1, budget // (4 * (head.weight.shape[0] + _ids(teacher))))
    parts = []
    for start in range(0, len(states), rows):
        chunk = slice(start, start + rows)
        logits = head(states[chunk])[:, : len(token_ids)].float()
        top = logits.amax(1, keepdim=True)
        logits -= top + (logits - top).exp_().sum(1, keepdim=True).log()
        parts.append(of(logits, teacher[chunk], batch.next_ids[chunk], -batch.targets.next_logprobs[chunk].double()))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def quantities(logprobs: Tensor, teacher: Teacher, next_ids: Tensor, next_cross_entropy: Tensor) -> dict[str, Tensor]:
    """(n,) float64 by name: all that is summed up, see ``positions.compare``; of an average of teachers, what is known.

    Args:
        logprobs: (n, V) of the student, in nats; overwritten.
        teacher: from ``teacher_of``.
        next_ids: (n,) the tokens that follow.
        next_cross_entropy: (n,) the teacher's cross-entropy with them.
    """
    more = {"teacher_cross_entropy": next_cross_entropy}
    if isinstance(teacher, Known):
        return compare(logprobs, teacher, next_ids) | more | {"teacher_entropy": teacher.head.entropies.double()}
    log_s = logprobs.gather(1, teacher.ids)
    return more | {
        "teacher_entropy": teacher.entropies.double(),
        "cross_entropy": -logprobs.gather(1, next_ids[:, None])[:, 0].double(),
        "forward_kl": (cross_entropy(teacher.logprobs, log_s) - teacher.entropies).double(),
        "agreement": (logprobs.argmax(1) == teacher.ids[:, 0]).double(),
    }


def teacher_of(batch: "Batch", token_ids: TokenIds, table: AnyTable) -> Teacher:
    """What the table knows of the teacher; of an average of teachers, only an unbiased estimate."""
    if isinstance(batch.targets, AveragedTargets):
        return decode_batch(batch.targets, token_ids, table.temperatures, LossConfig(target="sampled"))
    head = decode_targets(batch.targets, token_ids, table.temperatures, LossConfig(target="bucket"))
    draws = decode_draws(batch.targets, token_ids)
    derived = any(part.identity.derived_from is not None for part in table.tables)
    return Known(head, draws, mass_error=1 / 64 if derived else 2e-5)


def _ids(teacher: Teacher) -> int:
    """Roughly, how many logits would take as much memory as the computations with the teacher's stored ids."""
    ids = [teacher.ids] if isinstance(teacher, SparseTargets) else [teacher.head.ids, teacher.draws.ids]
    return 16 * sum(part.shape[1] for part in ids)


def require_numbers(wrong: int, count: int, unit: str, model: "PreTrainedModel") -> None:
    """Refuse a student whose predictions for a batch are not numbers.

    Args:
        wrong: how many predictions have NaN, ...
        count: ... of how many.
        unit: what is predicted: positions or documents.
        model: the student.

    Raises:
        StudentError: if there are any.
    """
    if wrong:
        raise StudentError(
            "this student's predictions are not numbers",
            expected=f"finite logits for all {unit}",
            found=f"NaN for {wrong:,} of {count:,} {unit} of a batch",
            where=model.config.name_or_path,
            do="its weights are broken: train it again, with a smaller optimizer.learning_rate if the loss became NaN; "
            "evaluate the other students without it",
        )


def _add(sums: Sums, held: "HeldOutBatch", values: dict[str, Tensor]) -> None:
    """Add the values at each position to the sums, by document and by group."""
    known = {name: ~value.isnan() for name, value in values.items() if name in ("agreement", "top")}
    values |= {f"{name}_known": mask.double() for name, mask in known.items()}
    values |= {name: torch.where(mask, values[name], 0.0) for name, mask in known.items()}
    values["positions"] = torch.ones_like(values["cross_entropy"])
    values |= _steps(values, held.batch.positions)
    documents, number = np.unique(np.array([seed_of(name) for name in held.documents]), return_inverse=True)
    document = torch.from_numpy(number[held.sequence])
    cells = {
        "overall": torch.zeros_like(document),
        "entropy": _bin(values["teacher_entropy"] / ENTROPY_BIN, ENTROPY_BINS),
        "position": _bin(values["position"].log2(), POSITION_BINS),
    }
    cells |= {f"column {name}": torch.from_numpy(each[held.sequence]) for name, each in held.groups.items()}
    parts = {}
    for part, cell in cells.items():
        count = sums.values[part].shape[1] // len(QUANTITIES)
        parts[part] = _summed(values, document, len(documents), cell, count, QUANTITIES)
        for kind, (by, names) in BINNED.items():
            if by in values:
                known_here = ~values[by].isnan()
                here = {each: values[each][known_here] for each in names}
                binned = cell[known_here] * CONFIDENCE_BINS + _bin(here[by] * CONFIDENCE_BINS, CONFIDENCE_BINS)
                size = count * CONFIDENCE_BINS
                parts[f"{part}: {kind}"] = _summed(here, document[known_here], len(documents), binned, size, names)
    sums.add(documents, parts)


def _summed(
    values: Mapping[str, Tensor], document: Tensor, documents: int, group: Tensor, groups: int, names: Sequence[str]
) -> Floats:
    """(documents, groups x names) sums; a quantity that was not measured counts as 0."""
    nothing = torch.zeros(len(group), dtype=torch.float64)
    columns = torch.stack([values.get(name, nothing) for name in names], 1)
    summed = torch.zeros(documents * groups, len(names), dtype=torch.float64)
    result: Floats = summed.index_add_(0, document * groups + group, columns).view(documents, -1).numpy()
    return result


def _bin(values: Tensor, bins: int) -> Tensor:
    return values.floor().long().clamp(0, bins - 1)


def _steps(values: Mapping[str, Tensor], positions: Tensor) -> dict[str, Tensor]:
    """Tokens that the teacher would accept at a time if the student drafted DRAFT of them from each position, plus 1.

    Known where DRAFT captured positions follow each other. A token is accepted with probability Σ min(t, s), and only
    if all before it are.
    """
    if "total_variation" not in values:
        return {}
    size = max(0, len(positions) - DRAFT + 1)
    whole = positions[DRAFT - 1 :] - positions[:size] == DRAFT - 1
    ends = {"steps": "", "steps_low": "_high", "steps_high": "_low"}  # more variation is less acceptance
    result = {"windows": _padded(whole.double(), len(positions))}
    for name, end in ends.items():
        accepted = (1 - values[f"total_variation{end}"]).clamp(max=1.0)
        accepted = accepted.clamp(min=0.0) if end else accepted
        windows = torch.stack([accepted[place : place + size] for place in range(DRAFT)], 1)
        result[name] = _padded(torch.where(whole, 1 + windows.cumprod(1).sum(1), 0.0), len(positions))
    return result


def _padded(values: Tensor, size: int) -> Tensor:
    return torch.cat([values, values.new_zeros(size - len(values))])
