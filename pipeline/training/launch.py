"""Training by several processes on one machine, none of which outlives whoever started them.

Each rank is ``rank`` and trains with the same settings; the first one's progress and report come back, and any rank's
error as the error that it was. They find each other through a file in a folder that is this user's alone, and listen to
nothing but this machine: whoever can speak to a rank can have it do anything. Knows nothing of what is trained.
"""

import os
import sys
import warnings
from typing import Any

import torch
from torch import distributed

from softlabel.pipeline.config.train import OptimizerConfig, TrainConfig
from softlabel.pipeline.exclusive import scratch
from softlabel.pipeline.processes import Child, ChildDiedError, listen
from softlabel.pipeline.progress import Progress, Watch
from softlabel.storage.errors import UsageError, WorkerError

_LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
_ON_LOOPBACK = {
    "GLOO_SOCKET_IFNAME": _LOOPBACK,
    "NCCL_SOCKET_IFNAME": f"={_LOOPBACK}",
    "NCCL_RAS_ENABLE": "0",  # a port of its own, for questions that nobody asks
}
_ELSEWHERE = {"MASTER_ADDR", "MASTER_PORT", "NCCL_COMM_ID"}
"""Where another launcher's ranks would meet."""


def on_cpu(settings: OptimizerConfig) -> bool:
    """Whether the CPU is asked for; otherwise each rank takes the GPU that has its local rank.

    Raises:
        UsageError: if a certain GPU is asked for, or one where there is none.
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
    """How many processes this one has to start; 0 if it trains itself, as a rank or alone.

    Raises:
        UsageError: if there are fewer GPUs.
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


def join(rendezvous: str, settings: OptimizerConfig) -> None:
    """In a rank: meet the others at a file, where torch by itself would open a port to everybody.

    Args:
        rendezvous: the file, which is there as soon as the first of them is.
        settings: say whether the CPU trains.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    backend = "gloo" if on_cpu(settings) else "nccl"
    store = distributed.FileStore(rendezvous, size)  # type: ignore[attr-defined]
    distributed.init_process_group(backend, store=store, rank=rank, world_size=size)


def train_by(processes: int, config: TrainConfig, watch: Watch) -> dict[str, Any]:
    """Train by so many processes; none of them is there any more when this returns or raises.

    Returns:
        The fields of the first rank's TrainReport.

    Raises:
        SoftlabelError: what a rank raised.
        WorkerError: if a process died, or what else one raised.
    """
    ranks: list[Child] = []
    with scratch() as private:
        try:
            for rank in range(processes):
                log, environment = private / f"rank-{rank}.log", _environment(rank, processes)
                arguments = config.model_dump_json(), str(private / "rendezvous")
                ranks.append(Child("softlabel.pipeline.training.rank", *arguments, log=log, environment=environment))
            for child, kind, value in listen(ranks):
                match kind:
                    case "progress":
                        watch(Progress(**value))
                    case "warning":
                        warnings.warn(value, stacklevel=3)
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


def _environment(rank: int, processes: int) -> dict[str, str]:
    """Of a rank: it takes its place from here, whatever launcher this process itself was started by."""
    threads = str(max(1, torch.get_num_threads() // processes))
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    kept = {name: value for name, value in os.environ.items() if name not in _ELSEWHERE}
    return {"OMP_NUM_THREADS": threads} | kept | {name: str(number) for name, number in place.items()} | _ON_LOOPBACK
