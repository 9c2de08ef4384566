"""A teacher for tests of workers: it takes its time, warns, writes down what it reads, and waits or fails if told."""

import logging
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from softlabel.pipeline.teachers.teacher import TransformersTeacher
from softlabel.storage.errors import WorkerError


class Paced(TransformersTeacher):
    """Waits before each forward pass; the environment says how long, and where to write."""

    def logits(
        self, sequences: Sequence[NDArray[np.int32]], positions: Sequence[NDArray[np.int32]]
    ) -> Iterator[torch.Tensor]:
        """See ``pipeline.teachers.teacher.Teacher``."""
        time.sleep(float(os.environ.get("PACED_SECONDS", "0")))
        while Path(os.environ.get("PACED_HOLD", "")).is_file():
            time.sleep(0.1)
        logging.getLogger("library").warning("of the library")
        warnings.warn("of the engine", stacklevel=1)
        failure = Path(os.environ.get("PACED_FAILURE", ""))
        if failure.is_file():
            failure.unlink()
            raise WorkerError("a worker died, as the test wanted")
        if passes := os.environ.get("PACED_PASSES"):
            with Path(passes).open("a") as file:
                file.writelines(f"{ids.tobytes().hex()}\n" for ids in sequences)
        yield from super().logits(sequences, positions)
