"""The embedded server survives a Ctrl-C that is meant for the run, and ends when the process of the run is killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.flows.servers import answers, wait_until

SCRIPT = """
import sys, time
from softlabel.flows import server

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


def test_the_server_survives_an_interrupt_but_ends_with_its_process(prefect_home: Path):
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
    wait_until(lambda: not answers(url), seconds=20)
