"""Where students part from their teacher: a few held-out places, with the tokens that each model finds likeliest.

The numbers of a report are means; these places show what is behind them. They are chosen from one batch, so that they
cost next to nothing, by the KL of the student that is shown first.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from softlabel.pipeline.evaluation.metrics import Teacher, in_chunks, quantities, teacher_of
from softlabel.pipeline.evaluation.positions import Known
from softlabel.pipeline.loss.targets import TokenIds
from softlabel.storage.views.view import AnyTable

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from softlabel.pipeline.stream.holdout import HeldOutBatch

BATCH_TOKENS = 4096
"""Tokens of the batch that places are chosen from."""
PLACES = 8
"""Places that are shown, at most two of a sequence."""
TOKENS = 3
"""Likeliest tokens of each model."""
_CONTEXT = 24
"""Tokens that are shown before a place."""


@dataclass(frozen=True)
class Likely:
    """A token, and the probability that a model gives it."""

    token: str
    probability: float


@dataclass(frozen=True)
class Place:
    """A position of a held-out text, and the likeliest next tokens there."""

    document: str
    before: str
    """The end of the text before it."""
    token: str
    """The token that really follows."""
    teacher: tuple[Likely, ...]
    students: tuple[tuple[Likely, ...], ...]
    """In the order of the report's students."""


@dataclass(frozen=True)
class Likeliest:
    """The likeliest tokens of one model at the N positions of a batch."""

    ids: Tensor
    """(N, TOKENS) int64."""
    logprobs: Tensor
    """(N, TOKENS) nats; -inf where nothing is known."""
    kl: Tensor
    """(N,) nats: distance from the teacher; 0 for the teacher itself."""


@torch.no_grad()
def of_student(model: "PreTrainedModel", held: "HeldOutBatch", table: AnyTable) -> Likeliest:
    """The likeliest tokens of a student."""
    was_training = model.training
    model.eval()
    try:
        found = in_chunks(model, held.batch, table, _likeliest)
    finally:
        model.train(was_training)
    return Likeliest(found["ids"], found["logprobs"], found["kl"])


def of_teacher(held: "HeldOutBatch", table: AnyTable) -> Likeliest:
    """The likeliest tokens of the teacher, as far as the table's heads have them."""
    teacher = teacher_of(held.batch, TokenIds(table.numbering), table)
    head = teacher.head if isinstance(teacher, Known) else teacher
    ids, logprobs = head.ids[:, :TOKENS], head.logprobs[:, :TOKENS]
    return Likeliest(ids, logprobs, torch.zeros(len(ids)))


def places(
    held: "HeldOutBatch", teacher: Likeliest, students: Sequence[Likeliest], tokenizer: Any
) -> tuple[Place, ...]:
    """The places of a batch at which the first student is farthest from the teacher, if the teacher is known there."""
    known, sequence = teacher.logprobs.isfinite().any(1).tolist(), held.sequence.tolist()
    chosen: list[int] = []
    for number in students[0].kl.argsort(descending=True).tolist():
        if known[number] and [sequence[other] for other in chosen].count(sequence[number]) < 2:
            chosen.append(number)
        if len(chosen) == PLACES:
            break
    return tuple(_place(held, number, teacher, students, tokenizer) for number in sorted(chosen))


def _likeliest(logprobs: Tensor, teacher: Teacher, next_ids: Tensor, next_cross_entropy: Tensor) -> dict[str, Tensor]:
    top = logprobs.topk(min(TOKENS, logprobs.shape[1]), 1)
    kl = quantities(logprobs, teacher, next_ids, next_cross_entropy)["forward_kl"]
    return {"ids": top.indices.cpu(), "logprobs": top.values.cpu(), "kl": kl.cpu()}


def _place(
    held: "HeldOutBatch", number: int, teacher: Likeliest, students: Sequence[Likeliest], tokenizer: Any
) -> Place:
    flat, state = held.batch.input_ids.flatten(), int(held.batch.positions[number])
    first = state - int(held.batch.position_ids.flatten()[state])
    before = flat[max(first, state + 1 - _CONTEXT) : state + 1]
    return Place(
        document=held.documents[int(held.sequence[number])],
        before=tokenizer.decode(before.tolist()),
        token=_text(tokenizer, int(held.batch.next_ids[number])),
        teacher=_likely(teacher, number, tokenizer),
        students=tuple(_likely(student, number, tokenizer) for student in students),
    )


def _likely(model: Likeliest, number: int, tokenizer: Any) -> tuple[Likely, ...]:
    pairs = zip(model.ids[number].tolist(), model.logprobs[number].exp().tolist(), strict=True)
    return tuple(Likely(_text(tokenizer, token), probability) for token, probability in pairs if probability > 0)


def _text(tokenizer: Any, token: int) -> str:
    return str(tokenizer.decode([token]))
