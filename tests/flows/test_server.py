"""The embedded server: a Ctrl-C that is meant for the run spares it, and it ends when its process is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx

SCRIPT = """
import sys, time
from flows import server

url = server.start()
server.wait(url)
try:
    print(url, flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    server.wait(url)
    print("still there", flush=True)
time.sleep(60)
"""


def test_outlives_an_interrupt_and_not_its_process(prefect_home: Path):
    environment = {**os.environ, "PREFECT_HOME": str(prefect_home)}
    run = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert run.stdout
    url = run.stdout.readline().strip()
    os.killpg(run.pid, signal.SIGINT)
    assert run.stdout.readline() == "still there\n"

    run.kill()
    run.wait()
    deadline = time.monotonic() + 20
    while answers(url):
        assert time.monotonic() < deadline, "the server outlived the process that started it"
        time.sleep(0.1)


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").is_success
    except httpx.HTTPError:
        return False
