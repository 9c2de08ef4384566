"""What this process holds in memory. Not from getrusage: a process inherits its peak from the one that started it."""

import ctypes
from pathlib import Path


def resident() -> int:
    """Bytes now."""
    return _bytes("VmRSS")


def peak() -> int:
    """Bytes at the highest, since the process began or ``reset_peak``."""
    return _bytes("VmHWM")


def reset_peak() -> None:
    """From here on, ``peak`` is of what comes.

    What was freed goes back to the system first: memory that the process keeps and takes again would not be seen.
    """
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def _bytes(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{name}:")[2].split()[0])
