"""The teacher: the model whose next-token distributions are stored, and how batches of sequences go through it.

It turns token ids into logits at the positions asked for, and nothing else: what is kept of them is
``pipeline.selection``'s business. Where its files come from is ``pipeline.checkpoint``'s.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.checkpoint import Checkpoint
from pipeline.config import TeacherConfig
from storage.errors import TeacherError, UsageError

CPU_CHUNK_BYTES, GPU_CHUNK_BYTES = 64 << 20, 512 << 20
"""Logits in float32 that are held at a time."""

Result = TypeVar("Result")


class Teacher(Protocol):
    """What a capture asks of a teacher; another engine can be put in its place."""

    vocabulary: int
    """Token ids that the tokenizer knows, the support of every distribution."""

    def logits(
        self, sequences: Sequence[NDArray[np.int32]], positions: Sequence[NDArray[np.int32]]
    ) -> Iterator[torch.Tensor]:
        """Logits of one forward pass, float32 (n, vocabulary) on the teacher's device, in chunks.

        Args:
            sequences: token ids, each (length,).
            positions: for each sequence, the positions (from 1) of the tokens to be predicted, ascending; the logits
                for position i are computed from the tokens before it.

        Yields:
            The sequences' positions one after the other, n of them at a time.
        """
        ...


class TransformersTeacher:
    """A causal language model run by transformers."""

    def __init__(self, config: TeacherConfig, checkpoint: Checkpoint | None = None) -> None:
        self.checkpoint = checkpoint or Checkpoint.find(config)
        self.vocabulary = self.checkpoint.vocabulary
        self.device = device(config.device)
        self._model = self.checkpoint.load(config.device_map or {"": self.device}, config.attention)
        self._body = self._model.base_model
        chunk_bytes = CPU_CHUNK_BYTES if self.device.type == "cpu" else GPU_CHUNK_BYTES
        self._chunk = max(1, chunk_bytes // (4 * self.checkpoint.padded_vocabulary))

    @property
    def parameters(self) -> int:
        """Numbers that the model has learned."""
        return int(self._model.num_parameters())

    @torch.inference_mode()
    def logits(
        self, sequences: Sequence[NDArray[np.int32]], positions: Sequence[NDArray[np.int32]]
    ) -> Iterator[torch.Tensor]:
        """See ``Teacher.logits``. Sequences are padded on the right, where causal attention never looks."""
        ids = np.zeros((len(sequences), max(map(len, sequences))), np.int64)
        for row, sequence in zip(ids, sequences, strict=True):
            row[: len(sequence)] = sequence
        rows = np.repeat(np.arange(len(sequences)), [len(p) for p in positions])
        columns = np.concatenate(positions) - 1  # a token is predicted at the position before its own
        output = self._body(input_ids=torch.from_numpy(ids).to(self.device), use_cache=False)
        hidden, kind = output.last_hidden_state, type(output)
        wanted = hidden[torch.from_numpy(rows).to(hidden.device), torch.from_numpy(columns).to(hidden.device)]
        del output, hidden
        for chunk in wanted.split(self._chunk):
            yield self._head(chunk, kind)

    def _head(self, hidden: torch.Tensor, kind: type) -> torch.Tensor:
        """Float32 logits (n, vocabulary) of hidden states (n, width), by the model's own way from one to the other.

        The model's own forward runs with its body standing still, so that whatever an architecture does after the
        body (scale, soft-capping, a bias) is done, for every architecture, without knowing what it is.
        """
        with _standing_still(self._body, kind(last_hidden_state=hidden[None])) as calls:
            ids = torch.zeros((1, len(hidden)), dtype=torch.int64, device=hidden.device)
            logits: torch.Tensor = self._model(input_ids=ids, use_cache=False).logits
        if calls != [1]:
            raise TeacherError(
                "this architecture's output layer can't be run apart from its body",
                expected=f"a forward() that calls its {type(self._body).__name__} once",
                found=f"{type(self._model).__name__} does not",
                where=self.checkpoint.folder,
                do="give a class with pipeline.teacher.Teacher's method for it",
            )
        return logits[0, :, : self.vocabulary].float()


def each_batch(
    teacher: Teacher,
    sequences: Sequence[NDArray[np.int32]],
    positions: Sequence[NDArray[np.int32]],
    work: Callable[[NDArray[np.int64], Iterator[torch.Tensor]], Result],
    batch_tokens: int,
) -> Iterator[Result]:
    """Run all sequences through the teacher, the longest first, and yield what ``work`` makes of each batch.

    A batch holds sequences of about the same length, ``batch_tokens`` with padding at most (or one sequence). If the
    device runs out of memory, anywhere from the forward pass to the end of ``work``, the budget is halved and the
    batch is done again.

    Args:
        teacher: whose logits are wanted.
        sequences: token ids, each (length,).
        positions: for each sequence, the positions of the predicted tokens (see ``Teacher.logits``).
        work: called with the indices of the batch's sequences and their logits, chunk by chunk, in that order. It may
            be called again for the same sequences, so it has no effect but its result.
        batch_tokens: tokens of one forward pass, padding included.

    Raises:
        TeacherError: if the device has no room for a single sequence.
    """
    order = np.argsort([-len(sequence) for sequence in sequences], kind="stable")
    while len(order):
        longest = len(sequences[order[0]])
        batch = order[: max(1, batch_tokens // longest)]
        try:
            result = work(batch, teacher.logits([sequences[i] for i in batch], [positions[i] for i in batch]))
        except torch.OutOfMemoryError:
            fits = False  # what the traceback holds is freed when this block ends
        else:
            fits = True
        if fits:
            order = order[len(batch) :]
            yield result
        elif len(batch) > 1:
            torch.cuda.empty_cache()
            batch_tokens = len(batch) * longest // 2
        else:
            raise TeacherError(
                "the device has no room for a single sequence",
                expected=f"memory for {longest} tokens",
                found="out of memory",
                do="set sequences.max_tokens lower, teacher.dtype to bfloat16, or take a larger device",
            )


def places(config: TeacherConfig) -> list[str]:
    """The device of each process that is to run the teacher: auto is every GPU of the machine, or else the CPU.

    Raises:
        UsageError: if there is no such device.
    """
    device(config.device)
    if config.device_map is not None or config.labels:
        return [config.device]
    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return (gpus or ["cpu"] if config.device == "auto" else [config.device]) * config.workers


def device(name: str) -> torch.device:
    """The device of that name; auto is a GPU if there is one.

    Raises:
        UsageError: if there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(name)
        if found.type != "cuda" or (found.index or 0) >= torch.cuda.device_count():
            torch.empty(1, device=found)  # not on a GPU that is there: that would take of its memory for good
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"there is no device {name!r}",
            expected="auto, cpu, cuda, cuda:1, ...",
            found=str(error).partition("\n")[0],
        ) from None
    return found


@contextmanager
def _standing_still(body: Any, output: Any) -> Iterator[list[int]]:
    """Let the body answer every call with this output; the list's one number counts the calls."""
    calls, forward = [0], body.forward

    def answer(*_: Any, **__: Any) -> Any:
        calls[0] += 1
        return output

    body.forward = answer
    try:
        yield calls
    finally:
        body.forward = forward
