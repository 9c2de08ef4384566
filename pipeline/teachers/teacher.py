"""The teacher: the model whose next-token distributions are stored, and running batches of sequences through it.

It only turns token ids into logits at given positions. ``pipeline.selection.select`` decides what is kept of them, and
``pipeline.models.checkpoint`` finds its files.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from softlabel.pipeline.config.capture import TeacherConfig
from softlabel.pipeline.devices import device
from softlabel.pipeline.models.body import inner
from softlabel.pipeline.models.checkpoint import Checkpoint
from softlabel.pipeline.models.files import first_line
from softlabel.pipeline.teachers.kind import kind_of
from softlabel.storage.errors import SoftlabelError, TeacherError

CPU_CHUNK_BYTES, GPU_CHUNK_BYTES = 64 << 20, 256 << 20
"""Bytes of logits held at a time."""
_PROBE = 2
"""Length of the sequences that test whether a model is causal; in short ones, one token has a large effect."""
_LEAK = 0.01
"""A token must change the logits before it by less than this share of what it changes those after it. In a causal model
the share is 0, or rounding noise where sums are split differently."""

Result = TypeVar("Result")


class Teacher(Protocol):
    """The interface of a teacher. ``teacher.engine`` can name any class with these members; it is called with the
    settings and the checkpoint, once in each process. When memory runs out, it should raise
    ``torch.OutOfMemoryError``; it is then called again with fewer sequences.
    """

    checkpoint: Checkpoint
    """The teacher's files, which the table records as its teacher."""
    vocabulary: int
    """Number of token ids that the tokenizer knows (``Checkpoint.vocabulary``), or of classes: the support
    of every distribution."""
    device: torch.device
    """Device that the logits are on."""

    @property
    def parameters(self) -> int | None:
        """Number of the model's parameters, for the table's history; None if it is not known."""
        ...

    def logits(
        self, sequences: Sequence[NDArray[np.int32]], positions: Sequence[NDArray[np.int32]]
    ) -> Iterator[torch.Tensor]:
        """Logits of one forward pass, (n, vocabulary) of any float dtype on the teacher's device, in chunks.

        Args:
            sequences: token ids, each (length,).
            positions: for each sequence, the positions (from 1) of the tokens to predict, ascending; the logits for
                position i depend only on the tokens before it.

        Yields:
            Logits of n positions at a time, in the order of the sequences.
        """
        ...


class TransformersTeacher:
    """A causal language model run by transformers.

    Raises:
        TeacherError: if it can't be loaded or run, or sees the token that it should predict.
        UsageError: if this machine does not have the device.
    """

    def __init__(self, config: TeacherConfig, checkpoint: Checkpoint | None = None) -> None:
        self.checkpoint = checkpoint or Checkpoint.find(config)
        kind = kind_of(self.checkpoint.classes)
        self.vocabulary = kind.vocabulary(self.checkpoint)
        self.device = device(config.device)
        self._model = self.checkpoint.load(config.device_map or {"": self.device}, config.attn_implementation)
        self._body = inner(self._model, self._model.base_model)
        chunk_bytes = CPU_CHUNK_BYTES if self.device.type == "cpu" else GPU_CHUNK_BYTES
        self._chunk = max(1, chunk_bytes // (self._model.dtype.itemsize * self.checkpoint.padded_vocabulary))
        if kind.causal:
            self._require_causal()

    @property
    def parameters(self) -> int:
        """Number of the model's parameters."""
        return int(self._model.num_parameters())

    @torch.inference_mode()
    def logits(
        self, sequences: Sequence[NDArray[np.int32]], positions: Sequence[NDArray[np.int32]]
    ) -> Iterator[torch.Tensor]:
        """See ``Teacher.logits``. Sequences are padded on the right, which causal attention ignores."""
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
        """Logits (n, vocabulary) of hidden states (n, width), computed by the model's own output layer.

        The model's own forward() runs, but its base model returns these hidden states. So whatever an architecture
        does after the base model (scaling, soft-capping, a bias) is done here, too.
        """
        with _fixed_output(self._body, kind(last_hidden_state=hidden[None])) as calls:
            ids = torch.zeros((1, len(hidden)), dtype=torch.int64, device=hidden.device)
            logits: torch.Tensor = self._model(input_ids=ids, use_cache=False).logits
        if calls != [1]:
            raise self._inseparable()
        return logits[0, :, : self.vocabulary]

    def _require_causal(self) -> None:
        """Refuse a model that can't be run, or whose logits depend on the tokens that they should predict."""
        if self._body is self._model:
            raise self._inseparable()
        ids = np.random.default_rng(0).integers(self.vocabulary, size=_PROBE).astype(np.int32)
        other = np.append(ids[:-1], (ids[-1] + self.vocabulary // 2) % self.vocabulary).astype(np.int32)
        positions = np.arange(1, _PROBE + 1, dtype=np.int32)  # the last one is the token after the sequence
        try:
            one, two = torch.cat(list(self.logits([ids, other], [positions] * 2))).float().chunk(2)
        except SoftlabelError:
            raise
        except Exception as error:  # architectures fail in many different ways
            raise TeacherError(
                "the teacher can't be run",
                expected=f"logits for {_PROBE} tokens",
                found=f"{type(error).__name__}: {first_line(error)}",
                where=self.checkpoint.folder,
                do="try another teacher.dtype, teacher.attn_implementation or teacher.device",
            ) from error
        change = (one - two).square().mean(1).sqrt()
        if change[:-1].max() > _LEAK * change[-1]:
            raise TeacherError(
                "the teacher sees the token that it should predict",
                expected="a causal language model: logits that depend only on earlier tokens",
                found=f"{type(self._model).__name__}: changing the last token changes the logits before it",
                where=self.checkpoint.folder,
                do="use a causal language model; if this one was trained as one, its config.json does not say so "
                "(BERT and similar models need is_decoder: true)",
            )

    def _inseparable(self) -> TeacherError:
        """The error for an architecture for which ``_head`` does not work."""
        return TeacherError(
            "this architecture's output layer can't be run separately from its base model",
            expected="a forward() that calls its base model exactly once",
            found=f"{type(self._model).__name__}, whose forward() does not",
            where=self.checkpoint.folder,
            do="use another teacher, or set teacher.engine to a class of your own that runs this one "
            "(softlabel.pipeline.teachers.teacher.Teacher describes it)",
        )


def each_batch(
    teacher: Teacher,
    sequences: Sequence[NDArray[np.int32]],
    positions: Sequence[NDArray[np.int32]],
    work: Callable[[NDArray[np.int64], Iterator[torch.Tensor]], Result],
    batch_tokens: int,
) -> Iterator[Result]:
    """Run all sequences through the teacher, the longest first, and yield what ``work`` makes of each batch.

    A batch has sequences of about the same length and at most ``batch_tokens`` tokens with padding (or one sequence).
    If the device runs out of memory during the forward pass or ``work``, the number of tokens is halved and the batch
    is repeated.

    Args:
        teacher: the teacher to run.
        sequences: token ids, each (length,).
        positions: for each sequence, the positions of the predicted tokens (see ``Teacher.logits``).
        work: called with the indices of the batch's sequences and their logits, chunk by chunk, in that order. It may
            be called again for the same sequences, so it must have no side effects.
        batch_tokens: tokens of one forward pass, padding included.

    Raises:
        TeacherError: if the device does not have enough memory for a single sequence.
    """
    order = np.argsort([-len(sequence) for sequence in sequences], kind="stable")
    while len(order):
        longest = len(sequences[order[0]])
        batch = order[: max(1, batch_tokens // longest)]
        try:
            result = work(batch, teacher.logits([sequences[i] for i in batch], [positions[i] for i in batch]))
        except torch.OutOfMemoryError:
            fits = False  # the memory that the traceback refers to is freed when this block ends
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
                "the device does not have enough memory for a single sequence",
                expected=f"memory for {longest} tokens",
                found="out of memory",
                do="lower sequences.max_tokens, set teacher.dtype to bfloat16, or use a larger device",
            )


@contextmanager
def _fixed_output(body: Any, output: Any) -> Iterator[list[int]]:
    """Make the base model return this output for every call; the list's only number counts the calls."""
    calls, forward = [0], body.forward

    def answer(*_: Any, **__: Any) -> Any:
        calls[0] += 1
        return output

    body.forward = answer
    try:
        yield calls
    finally:
        body.forward = forward
