"""Find the devices of this machine by the names that the settings use."""

import torch

from softlabel.pipeline.config.capture import TeacherConfig
from softlabel.storage.errors import UsageError


def worker_devices(config: TeacherConfig) -> list[str]:
    """One device per teacher process: auto means every GPU of the machine, or the CPU if there is none.

    Raises:
        UsageError: if this machine does not have the device.
    """
    device(config.device)
    if config.device_map is not None or config.labels:
        return [config.device]
    return (_gpus() or ["cpu"] if config.device == "auto" else [config.device]) * config.workers


def occupied(config: TeacherConfig, processes: int = 1) -> list[str]:
    """The devices on which that many teacher processes run."""
    if config.labels:
        return []
    if config.device_map is not None:
        return _gpus()
    return worker_devices(config)[:processes]


def _gpus() -> list[str]:
    return [f"cuda:{number}" for number in range(torch.cuda.device_count())]


def device(name: str) -> torch.device:
    """The device with this name; auto means a GPU if there is one, else the CPU.

    Raises:
        UsageError: if this machine does not have the device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        result = torch.device(name)
        if result.type != "cuda" or (result.index or 0) >= torch.cuda.device_count():
            # Not on an existing GPU: this would reserve memory there until the process ends.
            torch.empty(1, device=result)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"this machine has no device {name!r}",
            expected="auto, cpu, cuda, cuda:1, ...",
            found=str(error).partition("\n")[0],
            do="choose a device that this machine has, or auto",
        ) from None
    return result
