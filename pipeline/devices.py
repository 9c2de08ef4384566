"""Which devices this machine has for a model, by the names that the settings use."""

import torch

from softlabel.pipeline.config.capture import TeacherConfig
from softlabel.storage.errors import UsageError


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
            f"this machine has no device {name!r}",
            expected="auto, cpu, cuda, cuda:1, ...",
            found=str(error).partition("\n")[0],
            do="choose a device that this machine has, or auto",
        ) from None
    return found
