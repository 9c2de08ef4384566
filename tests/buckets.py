"""Servers that speak S3, each a process of its own with a bucket in it, and the environment that leads there."""

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
    """A server that knows S3's answers, but is no judge of races."""
    [port] = free_ports(1)
    with _server([sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", str(port)], port) as url:
        put(url, "", b"")
        yield url


def put(url: str, key: str, content: bytes) -> None:
    """Put an object as nobody in particular, under a key that may end with a slash; without a key, the bucket."""
    address = f"{url}/{BUCKET.removeprefix('s3://')}" + (f"/{urllib.parse.quote(key)}" if key else "")
    headers = {"Content-Type": "application/octet-stream"}  # a form of no bytes is waited for
    urllib.request.urlopen(urllib.request.Request(address, content, headers, method="PUT"), timeout=30).close()


@contextmanager
def seaweedfs(folder: Path) -> Iterator[str]:
    """A server that teams run; it keeps conditional puts apart by locks."""
    names, free = ("s3", "master", "volume", "filer"), free_ports(8)
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
    finally:  # a server that is killed leaves its sockets
        for port in (*ports.values(), *inner.values()):
            for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                path.unlink()


@contextmanager
def environment(url: str) -> Iterator[None]:
    """The usual variables."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**KEYS, "AWS_ENDPOINT_URL": url, "AWS_ALLOW_HTTP": "true"}.items():
            patch.setenv(name, value)
        yield


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens at, each another."""
    with ExitStack() as open_:
        probes = [open_.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [probe.getsockname()[1] for probe in probes]


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
