"""One rank of training by several processes: ``python -m softlabel.pipeline.training.rank SETTINGS RENDEZVOUS``.

Sends progress, warnings, the report and errors to ``launch``, which started it. Stops when it reads a line, and ends
when its standard input closes.
"""

import os
import signal
import sys
import traceback
from functools import partial
from threading import Thread

from softlabel.pipeline.processes import message_sender, send_warnings, serialized
from softlabel.pipeline.training.stop import Stop, StoppedError


def main() -> None:
    """Train as one rank."""
    for number in (signal.SIGINT, signal.SIGTERM):  # service managers send them to all processes: the parent decides
        signal.signal(number, signal.SIG_IGN)
    send = message_sender()
    stop = Stop(partial(send, "begin", None))
    parent = Thread(target=_obey_parent, args=(stop,), daemon=True)
    parent.start()
    settings, rendezvous = sys.argv[1:]
    if os.environ["RANK"] == "0":
        send_warnings(send)
    try:
        from softlabel.pipeline.config.train import TrainConfig
        from softlabel.pipeline.training.launch import join
        from softlabel.pipeline.training.train import train_here

        config = TrainConfig.model_validate_json(settings)
        join(rendezvous, config.optimizer)
        send("report", train_here(config, partial(send, "progress"), stop))
    except StoppedError:
        send("stopped", None)
    except Exception as error:
        traceback.print_exc()
        send("error", serialized(error))
    # Wait to be ended: exiting would break the other ranks' connections, and they would report that error instead.
    parent.join()


def _obey_parent(stop: Stop) -> None:
    while os.read(sys.stdin.fileno(), 1):
        stop.request()
    os._exit(1)  # even in the middle of a step: checkpoints are written atomically


if __name__ == "__main__":
    main()
