"""Two programs never use the same GPU: each holds a lock for every card that it uses, and waits for the others' cards.

A lock belongs to the card itself, whatever number CUDA_VISIBLE_DEVICES gives it, and is free as soon as its holder
ends, however that happens. Locks are files in a folder that all users of a machine share; containers have one each.
"""

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from softlabel.storage.lock import HeldError, held

FOLDER = Path("/tmp")
_SECONDS_BETWEEN_TRIES = 2.0

logger = logging.getLogger("softlabel")


@contextmanager
def holding(devices: Iterable[str]) -> Iterator[None]:
    """Hold the cards of these devices for a block, as soon as all of them are free; says so if it has to wait.

    Where no lock can be made, the block runs without it, with a warning.

    Args:
        devices: names of devices, as torch knows them; the CPU can be shared.
    """
    cards = {card(name) for name in devices} - {None}
    with ExitStack() as stack:
        for name in sorted(filter(None, cards)):  # in the same order everywhere, so that no two wait for each other
            _hold(name, stack)
        yield


def card(device: str) -> str | None:
    """Identifies the card of a device on this machine; None for a device that can be shared."""
    found = torch.device(device)
    if found.type != "cuda":
        return None
    number = torch.cuda.current_device() if found.index is None else found.index
    return f"GPU-{torch.cuda.get_device_properties(number).uuid}"


def _hold(name: str, stack: ExitStack) -> None:
    began, waits = time.monotonic(), False
    while True:
        try:
            stack.enter_context(held(FOLDER / f"softlabel-{name}.lock"))
            break
        except HeldError as error:
            if not waits:
                logger.warning("%s is in use by %s; this run waits until it is free", name, error or "another process")
            waits = True
            time.sleep(_SECONDS_BETWEEN_TRIES)
        except OSError as error:
            logger.warning("%s can't be locked, so other runs may use it at the same time: %s", name, error)
            break
    if waits:
        logger.info("%s is free, after %.0f seconds", name, time.monotonic() - began)
