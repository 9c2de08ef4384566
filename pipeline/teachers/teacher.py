"""The teacher: the model whose next-token distributions are stored, and how batches of sequences go through it.

It turns token ids into logits at the positions asked for, and nothing else: what is kept of them is
``pipeline.selection.select``'s business. Where its files come from is ``pipeline.models.checkpoint``'s.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from softlabel.pipeline.config.capture import TeacherConfig
from softlabel.pipeline.devices import device
from softlabel.pipeline.models.checkpoint import Checkpoint
from softlabel.pipeline.models.files import first_line
from softlabel.storage.errors import SoftlabelError, TeacherError

CPU_CHUNK_BYTES, GPU_CHUNK_BYTES = 64 << 20, 256 << 20
"""Logits that are held at a time."""
_PROBE = 2
"""Tokens of the sequences that show whether a model is causal; in few tokens, one counts for much."""
_LEAK = 0.01
"""Share of a token's effect on the logits after it that counts as an effect on those before it; in a causal model it
is 0 or, where sums are cut up otherwise, noise."""

Result = TypeVar("Result")


class Teacher(Protocol):
    """What is asked of a teacher. Any class with these members can run one: ``teacher.engine`` names it, and it is
    made from the settings and the checkpoint, once in each process. Where memory runs out, it raises
    ``torch.OutOfMemoryError``, and is asked about fewer sequences then.
    """

    checkpoint: Checkpoint
    """The files that it runs: what the table says its teacher is."""
    vocabulary: int
    """The checkpoint's: token ids that the tokenizer knows, the support of every distribution."""
    device: torch.device
    """That the logits are on."""

    @property
    def parameters(self) -> int | None:
        """Numbers that the model has learned, for the table's history; None if that is not known."""
        ...

    def logits(
        self, sequences: Sequence[NDArray[np.int32]], positions: Sequence[NDArray[np.int32]]
    ) -> Iterator[torch.Tensor]:
        """Logits of one forward pass, (n, vocabulary) of any float dtype on the teacher's device, in chunks.

        Args:
            sequences: token ids, each (length,).
            positions: for each sequence, the positions (from 1) of the tokens to be predicted, ascending; the logits
                for position i are computed from the tokens before it.

        Yields:
            The sequences' positions one after the other, n of them at a time.
        """
        ...


class TransformersTeacher:
    """A causal language model run by transformers.

    Raises:
        TeacherError: if it can't be loaded or run, or sees the token that it is to predict.
        UsageError: if there is no such device.
    """

    def __init__(self, config: TeacherConfig, checkpoint: Checkpoint | None = None) -> None:
        self.checkpoint = checkpoint or Checkpoint.find(config)
        self.vocabulary = self.checkpoint.vocabulary
        self.device = device(config.device)
        self._model = self.checkpoint.load(config.device_map or {"": self.device}, config.attn_implementation)
        self._body = self._model.base_model
        chunk_bytes = CPU_CHUNK_BYTES if self.device.type == "cpu" else GPU_CHUNK_BYTES
        self._chunk = max(1, chunk_bytes // (self._model.dtype.itemsize * self.checkpoint.padded_vocabulary))
        if self.checkpoint.classes is None:
            self._require_causal()

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
        """Logits (n, vocabulary) of hidden states (n, width), by the model's own way from one to the other.

        The model's own forward runs with its body standing still, so that whatever an architecture does after the
        body (scale, soft-capping, a bias) is done, for every architecture, without knowing what it is.
        """
        with _standing_still(self._body, kind(last_hidden_state=hidden[None])) as calls:
            ids = torch.zeros((1, len(hidden)), dtype=torch.int64, device=hidden.device)
            logits: torch.Tensor = self._model(input_ids=ids, use_cache=False).logits
        if calls != [1]:
            raise self._inseparable()
        return logits[0, :, : self.vocabulary]

    def _require_causal(self) -> None:
        """Refuse a model whose logits depend on the tokens that they predict, or that can't be run at all."""
        if self._body is self._model:
            raise self._inseparable()
        ids = np.random.default_rng(0).integers(self.vocabulary, size=_PROBE).astype(np.int32)
        other = np.append(ids[:-1], (ids[-1] + self.vocabulary // 2) % self.vocabulary).astype(np.int32)
        positions = np.arange(1, _PROBE + 1, dtype=np.int32)  # the last is that of the token after these
        try:
            one, two = torch.cat(list(self.logits([ids, other], [positions] * 2))).float().chunk(2)
        except SoftlabelError:
            raise
        except Exception as error:  # what an architecture lacks shows in as many ways as there are
            raise TeacherError(
                "the teacher can't be run",
                expected=f"logits for {_PROBE} tokens",
                found=f"{type(error).__name__}: {first_line(error)}",
                where=self.checkpoint.folder,
                do="try another teacher.dtype, teacher.attn_implementation or teacher.device",
            ) from error
        apart = (one - two).square().mean(1).sqrt()
        if apart[:-1].max() > _LEAK * apart[-1]:
            raise TeacherError(
                "the teacher sees the token that it should predict",
                expected="a causal language model: logits that depend only on earlier tokens",
                found=f"{type(self._model).__name__}: changing the last token changes the logits before it",
                where=self.checkpoint.folder,
                do="use a causal language model; if this one was trained as one, its config.json does not say so "
                "(BERT and similar models need is_decoder: true)",
            )

    def _inseparable(self) -> TeacherError:
        """The error for an architecture that ``_head`` can't be had of."""
        return TeacherError(
            "this architecture's output layer can't be run separately from its base model",
            expected="a forward() that calls its base model exactly once",
            found=f"{type(self._model).__name__} does not",
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
                "the device does not have enough memory for a single sequence",
                expected=f"memory for {longest} tokens",
                found="out of memory",
                do="lower sequences.max_tokens, set teacher.dtype to bfloat16, or use a larger device",
            )


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
