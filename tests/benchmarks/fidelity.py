"""Measures how close each selection's gradient is to that of the teacher's full distribution, and what it costs.

``python -m tests.benchmarks.fidelity`` prints one table, sorted by size; the default selection was chosen from it. The
teacher is SmolLM2-135M (unpacked to .demo/teacher), and the text is Python's own manual. The student is the teacher
pruned to 7 of its 30 layers and trained for a minute on other pages; ``--student`` takes one from a folder instead.
Each selection goes through the real codec. Bytes per position are those of all soft-label columns of a real table. The
gradient of forward KL, with respect to every weight of the student's layers, is compared with the gradient of the dense
KL at the same positions. The differences are in percent of the length of the dense gradient:

- bias: distance of the mean over the seeds, corrected for the distance that so few seeds have by chance;
- spread: root mean square distance of one seed's gradient from the mean. Over n times as many positions, it shrinks by
  the root of n; the bias does not;
- error: both together, as the root of the sum of squares. A star marks selections that no smaller one beats.

A constant offset of the loss is harmless. It is shown because the loss curves of biased targets can't be compared.
"""

import argparse
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from softlabel.pipeline.config.capture import SelectionConfig, TeacherConfig
from softlabel.pipeline.config.train import LossConfig
from softlabel.pipeline.examples.language_model import prepare_teacher
from softlabel.pipeline.loss.fused import distillation_loss
from softlabel.pipeline.loss.targets import CompactTargets, Target, TokenIds, decode_targets
from softlabel.pipeline.models.pruning import prune
from softlabel.pipeline.selection.select import position_seeds, select
from softlabel.pipeline.selection.selection import Selection
from softlabel.pipeline.students.build import hidden_states, output_head
from softlabel.pipeline.teachers.teacher import TransformersTeacher
from softlabel.storage.codec import encode, flatten
from softlabel.storage.labels import SoftLabels
from softlabel.storage.table import Table
from softlabel.storage.upkeep.inspection import inspect
from softlabel.storage.writer import ShardWriter
from tests.benchmarks.table import Captured, make_table, sequences_of

LENGTH, LAYERS = 512, (0, 1, 7, 14, 21, 28, 29)
STORED, TRAINED = 8, 24
"""Number of sequences whose soft labels are stored, and of others for training the student."""
DEFAULT = SelectionConfig()
SIZES = ((0.95, 24, 24), (0.95, 32, 32), (0.95, 12, 24), (0.95, 12, 56), (0.95, 8, 64), (0.9, 16, 48))
"""Top-p mass, max k and draws of further selections with a head and a sampled tail."""
SELECTIONS: tuple[SelectionConfig, ...] = (
    DEFAULT,
    *(SelectionConfig(top_p=top_p, max_k=max_k, draws=draws) for top_p, max_k, draws in SIZES),
    *(SelectionConfig(min_k=0, max_k=0, draws=draws) for draws in (32, 50, 100)),
    *(SelectionConfig(top_k=k) for k in (16, 32, 64)),
)


@dataclass(frozen=True)
class Text:
    """Sequences of equal length, and the teacher's logits at all positions except the first."""

    sequences: NDArray[np.int32]
    """(S, L)"""
    logits: Tensor
    """(S x (L - 1), V) bfloat16, as the teacher computes them."""

    @property
    def next_ids(self) -> Tensor:
        return torch.from_numpy(self.sequences[:, 1:].reshape(-1)).long()

    def first(self, count: int) -> "Text":
        return Text(self.sequences[:count], self.logits[: count * (self.sequences.shape[1] - 1)])

    def one_by_one(self) -> Iterator["Text"]:
        for sequence, logits in zip(self.sequences, self.logits.split(self.sequences.shape[1] - 1), strict=True):
            yield Text(sequence[None], logits)


def read_text(folder: Path, counts: Sequence[int]) -> list[Text]:
    """Consecutive parts of the manual, one for each count of sequences."""
    teacher = TransformersTeacher(TeacherConfig(model=str(folder)))
    text = "\n".join(text for _, text in sorted(topics.items()))
    ids = np.array(AutoTokenizer.from_pretrained(folder)(text[: 8 * LENGTH * sum(counts)])["input_ids"], np.int32)
    places = np.arange(1, LENGTH, dtype=np.int32)
    parts = []
    for part in np.split(ids[: LENGTH * sum(counts)].reshape(-1, LENGTH), np.cumsum(counts)[:-1]):
        logits = [torch.zeros(0, teacher.vocabulary, dtype=torch.bfloat16)]
        for number, row in enumerate(part, 1):
            show_progress(f"teacher: sequence {number} of {len(part)}")
            logits += [chunk.bfloat16() for chunk in teacher.logits([row], [places])]
        parts.append(Text(part, torch.cat(logits)))
    return parts


def show_progress(text: str) -> None:
    print(f"\r{text:<80}", end="", file=sys.stderr, flush=True)


def states(student: PreTrainedModel, text: Text) -> Tensor:
    """(N, H) hidden states from which the positions of the text are predicted."""
    ids = torch.from_numpy(text.sequences).long()
    hidden = hidden_states(student, ids, torch.arange(ids.shape[1]).expand_as(ids))
    return hidden[:, :-1].reshape(-1, hidden.shape[2])


def dense_kl(hidden: Tensor, weight: Tensor, logits: Tensor) -> Tensor:
    """Forward KL over the whole vocabulary, summed over positions."""
    log_q = F.linear(hidden, weight).float().log_softmax(1)
    return F.kl_div(log_q, logits.float().log_softmax(1), log_target=True, reduction="sum")


def train(student: PreTrainedModel, text: Text) -> None:
    """One pass with one sequence per step, on the dense KL, so that the student is not biased towards any selection."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-4, weight_decay=0.0)
    for step, one in enumerate(text.one_by_one(), 1):
        loss = dense_kl(states(student, one), output_head(student).weight, one.logits) / len(one.next_ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        show_progress(f"training the student: step {step} of {TRAINED}, KL {loss:.2f}")


class Student:
    """Gradients of a student's layers, with its embedding and head frozen."""

    def __init__(self, model: PreTrainedModel, text: Text) -> None:
        self.head = output_head(model)
        self.head.weight.requires_grad_(False)
        self.weights = [weight for weight in model.parameters() if weight.requires_grad]
        self.text = text
        self.hidden = states(model, text)

    def dense(self) -> tuple[Tensor, float]:
        """Gradient of the mean dense KL, and that mean."""
        hidden = self.hidden.detach().requires_grad_()
        total = 0.0
        for part, logits in zip(hidden.split(256), self.text.logits.split(256), strict=True):
            loss = dense_kl(part, self.head.weight, logits) / len(hidden)
            loss.backward()
            total += loss.item()
        return self._flat(self.hidden, hidden.grad), total

    def sparse(self, compact: CompactTargets, token_ids: TokenIds, target: Target) -> tuple[Tensor, float]:
        """Gradient and mean of the loss on stored soft labels."""
        config = LossConfig(target=target)
        targets = decode_targets(compact, token_ids, (1.0,), config)
        loss = distillation_loss(self.hidden, self.head.weight, self.text.next_ids, targets, config)
        return self._flat(loss.total), loss.soft.item() / loss.positions

    def _flat(self, of: Tensor, gradient: Tensor | None = None) -> Tensor:
        parts = torch.autograd.grad(of, self.weights, gradient, retain_graph=True)
        return torch.cat([part.flatten() for part in parts])


@dataclass(frozen=True)
class Closeness:
    """Closeness of a selection's gradient and loss to the dense ones."""

    cosine: float
    bias: float
    spread: float
    loss: float

    @property
    def error(self) -> float:
        return math.hypot(self.bias, self.spread)


def square(vector: Tensor) -> float:
    """Squared length, summed in float64: in float32, the third digit would be wrong for so many numbers."""
    return vector.square().sum(dtype=torch.float64).item()


def closeness(gradients: Iterator[tuple[Tensor, float]], dense: Tensor, dense_loss: float) -> Closeness:
    """Compare one gradient and loss for each seed with the dense ones.

    Let d be the difference of a seed's gradient from the dense gradient. The mean of d·d' over pairs of different seeds
    is an unbiased estimate of the squared bias; the square of the mean difference would include the seeds' noise.
    """
    length = math.sqrt(square(dense))
    total, squares, cosines, losses = torch.zeros_like(dense), 0.0, [], []
    for gradient, loss in gradients:
        difference = gradient - dense
        total += difference
        squares += square(difference)
        along = (square(gradient) + length**2 - square(difference)) / 2
        cosines.append(along / length / math.sqrt(square(gradient)))
        losses.append(loss - dense_loss)
    n, mean_square = len(losses), squares / len(losses)
    bias_square = (square(total) - squares) / (n * (n - 1)) if n > 1 else mean_square
    spread = math.sqrt(max(0.0, mean_square - bias_square)) / length
    return Closeness(sum(cosines) / n, math.sqrt(max(0.0, bias_square)) / length, spread, sum(losses) / n)


def labels_of(text: Text, config: SelectionConfig) -> SoftLabels:
    """The soft labels that a capture of the text would store."""
    selection, parts = Selection.of(config), []
    places = torch.arange(1, text.sequences.shape[1])
    for one in text.one_by_one():
        seeds = position_seeds(selection, b"smollm2", one.sequences.tobytes(), places)
        parts.append(select(one.logits, one.next_ids, seeds, selection, one.logits.shape[1]))
    return SoftLabels.concatenate(parts)


def stored(labels: SoftLabels, text: Text) -> tuple[float, Table]:
    """Bytes per position of all soft-label columns, and the table; its files are deleted."""
    captured = Captured(labels, _lengths(text), text.logits.shape[1])
    with tempfile.TemporaryDirectory() as scratch:
        table = make_table(Path(scratch), captured)
        with ShardWriter(table) as writer:
            writer.append(sequences_of(captured, 0), labels)
            writer.commit({})
        table.numbering  # noqa: B018  (loaded while its file exists)
        return inspect(table.newest()).soft_label_bytes_per_position, table


def compact(labels: SoftLabels, text: Text, table: Table) -> CompactTargets:
    """Soft labels as they are read back from a shard."""
    flat = flatten(encode(labels, _lengths(text), table.numbering))
    flat["tail_log_masses"] = flat["tail_log_masses"][None]
    return CompactTargets(**{name: torch.from_numpy(values.copy()) for name, values in flat.items()})


def _lengths(text: Text) -> NDArray[np.int64]:
    return np.full(len(text.sequences), text.sequences.shape[1] - 1)


def name_of(config: SelectionConfig) -> str:
    if config.top_k:
        return f"top-{config.top_k}"
    if not config.max_k:
        return f"RS-{config.draws}"
    return f"head {config.top_p:g}, ≤{config.max_k}; {config.draws} draws" + (" (default)" if config == DEFAULT else "")


def measure(
    config: SelectionConfig, student: Student, text: Text, seeds: int, dense: tuple[Tensor, float]
) -> Iterator[tuple[str, float, str, Closeness]]:
    """For each target that the selection allows: name, bytes per position, ids and mass, and closeness."""
    labels = labels_of(text, config)
    size, table = stored(labels, text)
    token_ids = TokenIds(table.numbering)
    held = f"{labels.head_counts.mean():5.1f}{labels.tail_counts.mean():6.1f}"
    held += f"{1 - np.exp(labels.tail_log_masses[0], dtype=np.float64).mean():8.3f}"
    targets: tuple[Target, ...] = ("renormalized", "zero_tail", "bucket") if config.top_k else ("sampled",)
    for target in targets:
        gradients = (
            student.sparse(
                compact(labels_of(student.text, config.model_copy(update={"seed": seed})), student.text, table),
                token_ids,
                target,
            )
            for seed in range(1 if config.top_k else seeds)
        )
        name = name_of(config) + (f", {target.replace('_', ' ')}" if config.top_k else "")
        yield name, size, held, closeness(gradients, *dense)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", help="folder of a student of SmolLM2's family, instead of training one")
    parser.add_argument("--sequences", type=int, default=2, help=f"sequences of {LENGTH} tokens for the gradient")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    folder = Path(".demo/teacher")
    prepare_teacher(folder)
    torch.manual_seed(0)
    text, other = read_text(folder, (STORED, 0 if arguments.student else TRAINED))
    model = AutoModelForCausalLM.from_pretrained(arguments.student or folder, dtype=torch.float32)
    if not arguments.student:
        model = prune(model, LAYERS)
        train(model, other)
    student = Student(model.eval(), text.first(arguments.sequences))
    dense = student.dense()

    rows: list[tuple[str, float, str, Closeness]] = []
    for number, config in enumerate(SELECTIONS, 1):
        show_progress(f"selection {number} of {len(SELECTIONS)}: {name_of(config)}")
        rows += measure(config, student, text, arguments.seeds, dense)
    print(f"\r{len(student.hidden):,} positions, KL to the teacher {dense[1]:.3f}, {arguments.seeds} seeds")
    print(f"{'':<36}{'bytes':>7}{'head':>6}{'tail':>6}{'mass':>8}{'loss':>8}{'cosine':>8}", end="")
    print(f"{'bias':>8}{'spread':>8}{'error':>8}")
    best = math.inf
    for name, size, held, found in sorted(rows, key=lambda row: row[1]):
        star, best = " *" if found.error < best else "", min(best, found.error)
        print(f"{name:<36}{size:>7.1f} {held}{found.loss:>+8.3f}{found.cosine:>8.4f}", end="")
        print(f"{found.bias:>8.1%}{found.spread:>8.1%}{found.error:>8.1%}{star}")


if __name__ == "__main__":
    main()
