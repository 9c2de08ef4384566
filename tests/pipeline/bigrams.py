"""Teachers that need no transformers to run: a process that uses one starts in a third of the time."""

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from softlabel.pipeline.config.capture import TeacherConfig
from softlabel.pipeline.models.checkpoint import Checkpoint
from softlabel.storage.errors import TeacherError


class Bigrams:
    """A bigram model in plain numpy: products of a token's embedding with all others."""

    device = torch.device("cpu")
    parameters = None

    def __init__(self, config: TeacherConfig, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.vocabulary = Tokenizer.from_file(str(checkpoint.folder / "tokenizer.json")).get_vocab_size()
        self._embedding = load_file(checkpoint.weights[0])["model.embed_tokens.weight"][: self.vocabulary]

    def logits(
        self, sequences: Sequence[NDArray[np.int32]], positions: Sequence[NDArray[np.int32]]
    ) -> Iterator[torch.Tensor]:
        """See ``pipeline.teachers.teacher.Teacher``."""
        for ids, wanted in zip(sequences, positions, strict=True):
            yield torch.from_numpy(self._embedding[ids[wanted - 1]] @ self._embedding.T)


class Unhurried(Bigrams):
    """Waits before each pass, so that several workers have work at the same time, however late one of them starts."""

    def logits(
        self, sequences: Sequence[NDArray[np.int32]], positions: Sequence[NDArray[np.int32]]
    ) -> Iterator[torch.Tensor]:
        """See ``pipeline.teachers.teacher.Teacher``."""
        time.sleep(0.1)
        return super().logits(sequences, positions)


class Meeting(Bigrams):
    """Waits before its first pass until another process gets there, too. The environment names a folder for that."""

    def logits(
        self, sequences: Sequence[NDArray[np.int32]], positions: Sequence[NDArray[np.int32]]
    ) -> Iterator[torch.Tensor]:
        """See ``pipeline.teachers.teacher.Teacher``."""
        folder, deadline = Path(os.environ["MEETING"]), time.monotonic() + 120
        (folder / str(os.getpid())).touch()
        while len(list(folder.iterdir())) < 2:
            assert time.monotonic() < deadline, "nobody else came"
            time.sleep(0.02)
        return super().logits(sequences, positions)


class RefusalError(TeacherError):
    """A class that only the user's engine knows."""


class Refusing:
    """An engine that refuses every teacher."""

    def __init__(self, *_: object) -> None:
        raise RefusalError("not this one", details={"model": 1})


BIGRAMS, UNHURRIED, MEETING, REFUSING = (
    f"{__name__}:{engine.__name__}" for engine in (Bigrams, Unhurried, Meeting, Refusing)
)
"""Names for ``teacher.engine``."""
