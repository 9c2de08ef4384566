"""Training by several processes on one machine: torchrun as a child that never outlives whoever started it.

Each rank is ``pipeline.rank`` and trains with the same settings; the first one's progress and report come back as lines
of JSON, any rank's error as the error that it was. Knows nothing of what is trained.
"""

import json
import os
import subprocess
import sys
import tempfile
import warnings
from typing import Any

import torch
from torch.distributed import is_torchelastic_launched

from pipeline.config import TrainConfig
from pipeline.progress import Progress, Watch
from pipeline.student_config import OptimiserConfig
from pipeline.workers import same_modules
from storage import errors
from storage.errors import UsageError, WorkerError

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")


def on_cpu(settings: OptimiserConfig) -> bool:
    """Whether the CPU is asked for; otherwise each rank takes the GPU that has its local rank.

    Raises:
        UsageError: if a certain GPU is asked for, or one where there is none.
    """
    name = settings.device
    if name not in ("auto", "cpu", "cuda") or (name == "cuda" and not torch.cuda.is_available()):
        raise UsageError(
            f"a student can't be trained on {name!r} here",
            expected="optimiser.device: auto, cpu, or cuda where there is a GPU",
            found=f"optimiser.device: {name}, {torch.cuda.device_count()} GPUs",
            do="CUDA_VISIBLE_DEVICES chooses among several GPUs, optimiser.processes says how many train",
        )
    return name == "cpu" or not torch.cuda.is_available()


def to_start(settings: OptimiserConfig) -> int:
    """How many processes this one has to start; 0 if it trains itself, as a rank of torchrun's or alone.

    Raises:
        UsageError: if there are fewer GPUs.
    """
    if is_torchelastic_launched():
        return 0
    gpus = None if on_cpu(settings) else torch.cuda.device_count()
    wanted = settings.processes or gpus or 1
    if gpus is not None and wanted > gpus:
        raise UsageError(
            "there is not a GPU for each process",
            expected=f"optimiser.processes: at most {gpus}",
            found=f"optimiser.processes: {wanted}",
            do="leave it out to use every GPU, or train on the CPU with optimiser.device cpu",
        )
    return wanted if wanted > 1 else 0


def train_by(processes: int, config: TrainConfig, watch: Watch) -> dict[str, Any]:
    """Train by so many processes; none of them is there any more when this returns or raises.

    Returns:
        The fields of the first rank's TrainReport.

    Raises:
        SoftlabelError: what a rank raised.
        WorkerError: if a process died.
    """
    threads = str(max(1, torch.get_num_threads() // processes))
    with tempfile.TemporaryFile("w+") as log:
        # The standard input of torchrun, and so of each rank, is a pipe of ours that closes with us; a session of its
        # own keeps our signals from it.
        torchrun = subprocess.Popen(
            [*TORCHRUN, f"--nproc-per-node={processes}", "-m", "pipeline.rank", config.model_dump_json()],
            env={"OMP_NUM_THREADS": threads} | os.environ | same_modules(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            encoding="utf-8",
            start_new_session=True,
        )
        try:
            report = _listen(torchrun, watch)
        finally:
            _end(torchrun)
        if report is None:
            log.seek(0)
            raise WorkerError(
                "a process that trained died",
                found="\n               ".join(log.read().splitlines()[-15:]) or f"exit code {torchrun.returncode}",
                where=f"{config.output}, {processes} processes",
                do="the same command goes on from the last checkpoint",
            )
        return report


def _listen(torchrun: "subprocess.Popen[str]", watch: Watch) -> dict[str, Any] | None:
    """The report, if there is one; returns when it has come, or when no rank is left that could write one."""
    assert torchrun.stdout
    for line in torchrun.stdout:
        if not line.endswith("\n"):
            break
        kind, value = json.loads(line)
        match kind:
            case "progress":
                watch(Progress(**value))
            case "warning":
                warnings.warn(value, stacklevel=4)
            case "error":
                name, message = value
                raise getattr(errors, name)(message)
            case "report":
                return dict(value)
    return None


def _end(torchrun: "subprocess.Popen[str]") -> None:
    """End whoever is still there, and wait until nobody is: the pipe that they all write to is closed then."""
    assert torchrun.stdin
    assert torchrun.stdout
    torchrun.stdin.close()
    torchrun.kill()
    torchrun.stdout.read()
    torchrun.stdout.close()
    torchrun.wait()
