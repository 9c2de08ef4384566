"""One worker of a capture: a process that is given shards one by one, and keeps the teacher loaded between them.

``python -m pipeline.worker THREADS`` reads requests and writes answers, a line of JSON each; ``pipeline.workers`` is at
the other end. It ends when its standard input does, so it never outlives the process that started it.
"""

import json
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

import torch

from pipeline.capturing import capture_shard
from pipeline.config import CaptureConfig
from pipeline.model_folder import remember
from pipeline.progress import Progress
from storage.errors import SoftlabelError


def main() -> None:
    """Answer requests until there are no more."""
    # Whatever a library prints must not come between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def answer(kind: str, value: Any) -> None:
        print(json.dumps([kind, value]), file=answers, flush=True)

    def watch(progress: Progress) -> None:
        answer("progress", asdict(progress))

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # by an exception, so that half a shard is thrown away
    requests: SimpleQueue[tuple[Any, str, dict[str, str]]] = SimpleQueue()
    Thread(target=_listen, args=(requests,), daemon=True).start()
    torch.set_num_threads(int(sys.argv[1]))
    while True:
        settings, path, hashes = requests.get()
        remember(hashes)  # of the teacher's files, which take minutes to read
        try:
            answer("commit", asdict(capture_shard(CaptureConfig.model_validate(settings), Path(path), watch)))
        except SoftlabelError as error:
            answer("error", [type(error).__name__, str(error)])


def _listen(requests: "SimpleQueue[tuple[Any, str, dict[str, str]]]") -> None:
    for line in sys.stdin:
        requests.put(json.loads(line))
    os._exit(1)  # also in the middle of a shard: nobody is there to hear of it


if __name__ == "__main__":
    main()
