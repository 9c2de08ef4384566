"""Finds the addresses that processes listen on, and sets a trap that records code run from a folder."""

import ipaddress
import struct
from pathlib import Path

NAMES = (
    *("json", "logging", "torch", "uvicorn", "prefect", "sitecustomize", "usercustomize", "numpy", "accelerate"),
    *("uvloop", "httptools", "websockets", "triton", "mako", "aiosqlite", "pipeline", "storage", "flows", "tests"),
)
"""Module names: of Python, of libraries, of modules that libraries look for, and ours."""
_LISTENING = "0A"


def family(process: int) -> set[int]:
    """A process and its descendants."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # the process has ended meanwhile
            continue
    found = {process}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def listening(processes: set[int]) -> set[str]:
    """Addresses on which the processes accept connections."""
    ours = {link for process in processes for link in _links(process)}
    found = set()
    for kind in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{kind}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == _LISTENING and f"socket:[{inode}]" in ours:
                found.add(_address(local.partition(":")[0]))
    return found


def only_here(addresses: set[str]) -> bool:
    """Whether all addresses are reachable only from this machine."""
    return all(ipaddress.ip_address(address).is_loopback for address in addresses)


def _links(process: int) -> list[str]:
    found = []
    for descriptor in Path(f"/proc/{process}/fd").glob("*"):
        try:
            found.append(str(descriptor.readlink()))
        except OSError:
            continue
    return found


def _address(digits: str) -> str:
    words = bytes.fromhex(digits)
    packed = b"".join(struct.pack(">I", word) for (word,) in struct.iter_unpack("=I", words))
    address = ipaddress.ip_address(packed)
    return str(getattr(address, "ipv4_mapped", None) or address)


def trap(folder: Path) -> Path:
    """Fill a folder with modules and settings that leave a trace if anything loads them from there.

    Returns:
        File with one line for each of them that was run.
    """
    folder.mkdir(exist_ok=True)
    caught = folder.with_name(f"{folder.name}-was-run")
    note = f"open({str(caught)!r}, 'a').write(f'{{__name__}} {{__file__}}\\n')\n"
    hook = folder / "__editable__.softlabel-0.1.0.finder.__path_hook__"
    for place in (folder, hook):
        for name in NAMES:
            (place / name).mkdir(parents=True)
            (place / name / "__init__.py").write_text(note)
    logging = folder / "logging.yml"
    logging.write_text(
        "{version: 1, handlers: {here: {class: subprocess.Popen, args: "
        f"[sh, -c, 'echo logging >> {caught}']}}}}, root: {{handlers: [here]}}}}"
    )
    (folder / "prefect.toml").write_text(f'[logging]\nconfig_path = "{logging}"\n')
    (folder / "pyproject.toml").write_text(f'[tool.prefect.logging]\nconfig_path = "{logging}"\n')
    (folder / ".env").write_text(f"PREFECT_LOGGING_CONFIG_PATH={logging}\n")
    return caught
