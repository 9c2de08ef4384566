"""Memory of this process. Not from getrusage, where a process inherits the peak of the one that started it."""

import ctypes
from pathlib import Path


def resident() -> int:
    """Resident bytes now."""
    return _bytes("VmRSS")


def peak() -> int:
    """Highest resident bytes since the process started, or since ``reset_peak``."""
    return _bytes("VmHWM")


def reset_peak() -> None:
    """Let ``peak`` start again from here.

    Freed memory is returned to the system first, because memory that the process reuses would not show in the peak.
    """
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def _bytes(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition(f"{name}:")[2].split()[0])
