"""S3 servers, each in its own process with one bucket, and the environment variables for them."""

import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import obstore
import pytest
from obstore.store import S3Store

BUCKET = "s3://softlabel"
KEYS = {"AWS_ACCESS_KEY_ID": "softlabel", "AWS_SECRET_ACCESS_KEY": "a-secret", "AWS_REGION": "us-east-1"}


@contextmanager
def moto() -> Iterator[str]:
    """Run moto, which answers like S3 but does not reproduce races; yields its URL."""
    with (
        reserved_ports(1) as [port],
        _server([sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", str(port)], port) as url,
    ):
        put(url, "", b"")
        yield url


def put(url: str, key: str, content: bytes) -> None:
    """Put an object without credentials, under a key that may end with a slash; an empty key creates the bucket."""
    address = f"{url}/{BUCKET.removeprefix('s3://')}" + (f"/{urllib.parse.quote(key)}" if key else "")
    headers = {"Content-Type": "application/octet-stream"}  # moto would wait for the content of an empty form
    urllib.request.urlopen(urllib.request.Request(address, content, headers, method="PUT"), timeout=30).close()


@contextmanager
def seaweedfs(folder: Path) -> Iterator[str]:
    """Run SeaweedFS, a server for production use, which guards conditional puts with locks; yields its URL."""
    with reserved_ports(8) as free:
        yield from _seaweedfs(folder, free)


def _seaweedfs(folder: Path, free: Sequence[int]) -> Iterator[str]:
    names = ("s3", "master", "volume", "filer")
    ports, inner = dict(zip(names, free[:4], strict=True)), dict(zip(names, free[4:], strict=True))
    keys = f'[{{"accessKey": "{KEYS["AWS_ACCESS_KEY_ID"]}", "secretKey": "{KEYS["AWS_SECRET_ACCESS_KEY"]}"}}]'
    config = folder / "s3.json"
    config.write_text(f'{{"identities": [{{"name": "test", "credentials": {keys}, "actions": ["Admin"]}}]}}')
    command = [str(Path(sys.executable).with_name("weed")), "server", f"-dir={folder}", "-s3", f"-s3.config={config}"]
    command += ["-ip=127.0.0.1", "-master.telemetry=false", "-s3.port.iceberg=0", "-master.volumeSizeLimitMB=64"]
    command += [f"-{name}.port={port}" for name, port in ports.items()]
    command += [f"-{name}.port.grpc={port}" for name, port in inner.items()]
    try:
        with _server(command, ports["s3"]) as url, environment(url):
            _until(lambda: obstore.put(S3Store.from_url(BUCKET), "made", b""))
            yield url
    finally:  # a killed server leaves its sockets behind
        for port in (*ports.values(), *inner.values()):
            for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                path.unlink()


@contextmanager
def environment(url: str) -> Iterator[None]:
    """Set the environment variables for the server at this URL."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**KEYS, "AWS_ENDPOINT_URL": url, "AWS_ALLOW_HTTP": "true"}.items():
            patch.setenv(name, value)
        yield


@contextmanager
def reserved_ports(count: int) -> Iterator[list[int]]:
    """Different ports on which nothing listens, and which nobody gets who does not ask for them by number."""
    with ExitStack() as open_:
        held = [open_.enter_context(socket.socket()) for _ in range(count)]
        for each in held:
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server can listen there all the same
            each.bind(("127.0.0.1", 0))
        yield [each.getsockname()[1] for each in held]


@contextmanager
def _server(command: Sequence[str], port: int) -> Iterator[str]:
    url = f"http://127.0.0.1:{port}"
    with (
        tempfile.TemporaryFile() as output,
        subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as server,
    ):
        try:
            _until(lambda: _answers(url, server, output))
            yield url
        finally:
            server.kill()


def _answers(url: str, server: "subprocess.Popen[bytes]", output: IO[bytes]) -> None:
    if server.poll() is not None:
        output.seek(0)
        raise AssertionError(f"the server has ended: {output.read().decode()[-2000:]}")
    try:
        urllib.request.urlopen(url, timeout=5)
    except urllib.error.HTTPError:
        return


def _until(attempt) -> None:
    deadline = time.monotonic() + 90
    while True:
        try:
            attempt()
            return
        except (OSError, obstore.exceptions.BaseError):
            assert time.monotonic() < deadline, "no answer"
            time.sleep(0.1)
