"""One worker of a capture: a process that captures shards one by one, and keeps the teacher loaded between them.

``python -m softlabel.pipeline.capturing.worker THREADS`` reads requests and writes answers, one line of JSON each;
``workers`` is at the other end. It ends when its standard input does, so it never outlives the process that started it.
"""

import json
import os
import signal
import sys
from functools import lru_cache, partial
from pathlib import Path
from queue import SimpleQueue
from threading import Thread

import torch

from softlabel.pipeline.capturing.job import CaptureJob
from softlabel.pipeline.capturing.shard import capture_shard
from softlabel.pipeline.models.files import remember
from softlabel.pipeline.processes import message_sender, send_warnings, serialized
from softlabel.storage.errors import SoftlabelError


def main() -> None:
    """Answer requests until there are no more."""
    answer = message_sender()
    send_warnings(answer)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # an exception, so that a partly written shard is deleted
    watch = partial(answer, "progress")
    requests: SimpleQueue[tuple[str, str, dict[str, str]]] = SimpleQueue()
    Thread(target=_read_requests, args=(requests,), daemon=True).start()
    torch.set_num_threads(int(sys.argv[1]))
    while True:
        job, path, hashes = requests.get()
        remember(hashes)  # hashing the teacher's files takes minutes
        try:
            answer("commit", capture_shard(_read_job(job), Path(path), watch))
        except SoftlabelError as error:
            answer("error", serialized(error))


@lru_cache(maxsize=1)
def _read_job(text: str) -> CaptureJob:
    """The job of a request; all requests of a capture have the same."""
    return CaptureJob.from_json(text)


def _read_requests(requests: "SimpleQueue[tuple[str, str, dict[str, str]]]") -> None:
    for line in sys.stdin:
        requests.put(json.loads(line))
    os._exit(1)  # even in the middle of a shard: the process that wants it is gone


if __name__ == "__main__":
    main()
