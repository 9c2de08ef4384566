"""One rank of training by several processes: ``python -m softlabel.pipeline.training.rank SETTINGS RENDEZVOUS``.

Sends progress, warnings, the report and errors to ``launch``, which started it. Ends when its standard input closes.
"""

import os
import sys
import traceback
import warnings
from functools import partial
from threading import Thread

from softlabel.pipeline.processes import message_sender, serialized


def main() -> None:
    """Train as one rank."""
    parent = Thread(target=_end_with_parent, daemon=True)
    parent.start()
    send = message_sender()
    settings, rendezvous = sys.argv[1:]
    if os.environ["RANK"] == "0":
        warnings.showwarning = lambda message, *_, **__: send("warning", str(message))
    try:
        from softlabel.pipeline.config.train import TrainConfig
        from softlabel.pipeline.training.launch import join
        from softlabel.pipeline.training.train import train

        config = TrainConfig.model_validate_json(settings)
        join(rendezvous, config.optimizer)
        send("report", train(config, partial(send, "progress")))
    except Exception as error:
        traceback.print_exc()
        send("error", serialized(error))
    # Wait to be ended: exiting would break the other ranks' connections, and they would report that error instead.
    parent.join()


def _end_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)  # even in the middle of a step: checkpoints are written atomically


if __name__ == "__main__":
    main()
