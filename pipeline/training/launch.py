"""Starts training by several processes on one machine; none of them outlives the process that started it.

Each process runs ``rank`` with the same settings. The first rank's progress and report, and any rank's error, come back
to the caller. The ranks find each other through a file in a folder that only this user can read, and use only the
loopback interface, because anyone who can connect to a rank can run code in it. Knows nothing of models.
"""

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import distributed

from softlabel.pipeline.config.train import OptimizerConfig, TrainConfig
from softlabel.pipeline.exclusive import scratch
from softlabel.pipeline.processes import Child, ChildDiedError, messages
from softlabel.pipeline.progress import Progress, Watch
from softlabel.pipeline.training.stop import Stop, StoppedError
from softlabel.storage.errors import UsageError, WorkerError

_LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
_ON_LOOPBACK = {
    "GLOO_SOCKET_IFNAME": _LOOPBACK,
    "NCCL_SOCKET_IFNAME": f"={_LOOPBACK}",
    "NCCL_RAS_ENABLE": "0",  # would open another port, for diagnostics that are not used
}
_OTHER_LAUNCHER = {"MASTER_ADDR", "MASTER_PORT", "NCCL_COMM_ID"}
"""Rendezvous variables of another launcher."""


def on_cpu(settings: OptimizerConfig) -> bool:
    """Whether to train on the CPU; otherwise each rank trains on the GPU with the index of its local rank.

    Raises:
        UsageError: if the settings name a particular GPU, or a GPU where there is none.
    """
    name = settings.device
    if name not in ("auto", "cpu", "cuda") or (name == "cuda" and not torch.cuda.is_available()):
        raise UsageError(
            f"a student can't be trained on optimizer.device {name!r} on this machine",
            expected="optimizer.device: auto or cpu, or cuda on a machine with a GPU",
            found=f"optimizer.device: {name}, {torch.cuda.device_count()} GPUs",
            do="choose one of these; CUDA_VISIBLE_DEVICES chooses among several GPUs, and optimizer.processes sets how "
            "many of them train",
        )
    return name == "cpu" or not torch.cuda.is_available()


def to_start(settings: OptimizerConfig) -> int:
    """Number of processes to start; 0 if this process trains, as a rank or as the only process.

    Raises:
        UsageError: if there are fewer GPUs than processes.
    """
    if distributed.is_initialized() or distributed.is_torchelastic_launched():
        return 0
    gpus = None if on_cpu(settings) else torch.cuda.device_count()
    wanted = settings.processes or gpus or 1
    if gpus is not None and wanted > gpus:
        raise UsageError(
            "there are more training processes than GPUs",
            expected=f"optimizer.processes: at most {gpus}",
            found=f"optimizer.processes: {wanted}",
            do="leave it out to use every GPU, or train on the CPU with optimizer.device cpu",
        )
    return wanted if wanted > 1 else 0


def devices(settings: OptimizerConfig, processes: int) -> list[str]:
    """The devices that this process and those that it starts train on.

    Args:
        settings: the device.
        processes: from ``to_start``.
    """
    if on_cpu(settings):
        return ["cpu"]
    ranks = range(processes) if processes else [int(os.environ.get("LOCAL_RANK", "0"))]
    return [f"cuda:{rank}" for rank in ranks]


def join(rendezvous: str, settings: OptimizerConfig) -> None:
    """Join the process group, from within a rank, through a file: torch's default opens a port to the network.

    Args:
        rendezvous: path of the file, which the first rank to join creates.
        settings: device and number of processes.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    backend = "gloo" if on_cpu(settings) else "nccl"
    store = distributed.FileStore(rendezvous, size)  # type: ignore[attr-defined]
    distributed.init_process_group(backend, store=store, rank=rank, world_size=size)


def train_by(processes: int, config: TrainConfig, watch: Watch, stop: Stop) -> dict[str, Any]:
    """Train with several processes, all of which have ended when this returns or raises.

    A request to stop is handed to the ranks.

    Returns:
        The fields of the first rank's TrainReport.

    Raises:
        SoftlabelError: if a rank raised it.
        WorkerError: if a process died or raised any other error.
        StoppedError: if the training was asked to stop, and has written a checkpoint.
    """
    ranks: list[Child] = []
    with scratch() as private:
        try:
            for rank in range(processes):
                log, environment = private / f"rank-{rank}.log", _environment(rank, processes)
                arguments = config.model_dump_json(), str(private / "rendezvous")
                ranks.append(Child("softlabel.pipeline.training.rank", *arguments, log=log, environment=environment))
            stop.on_request = partial(_ask_to_stop, ranks)
            for child, kind, value in messages(ranks):
                match kind:
                    case "begin":
                        stop.begin()
                    case "stopped" if child is ranks[0]:
                        raise StoppedError
                    case "progress":
                        watch(Progress(**value))
                    case "report" if child is ranks[0]:
                        return dict(value)
        except ChildDiedError as death:
            raise WorkerError(
                "a training process died",
                found=death.child.death(),
                where=f"{config.output}, rank {ranks.index(death.child)} of {processes}",
                do="run the same command again; it continues from the last checkpoint",
            ) from None
        finally:
            for child in ranks:
                child.process.kill()
            for child in ranks:
                child.process.wait()
    raise AssertionError("a rank never exits before it is stopped")


def _ask_to_stop(ranks: Sequence[Child]) -> None:
    """Ask the ranks to stop. It may run in a signal handler, so it takes no lock."""
    for child in ranks:
        assert child.process.stdin
        with suppress(BrokenPipeError):
            os.write(child.process.stdin.fileno(), b"\n")


def _environment(rank: int, processes: int) -> dict[str, str]:
    """Environment of a rank, without the variables of a launcher that may have started this process."""
    threads = str(max(1, torch.get_num_threads() // processes))
    rank_variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    inherited = {name: value for name, value in os.environ.items() if name not in _OTHER_LAUNCHER}
    return (
        {"OMP_NUM_THREADS": threads}
        | inherited
        | {name: str(number) for name, number in rank_variables.items()}
        | _ON_LOOPBACK
    )
