"""One rank of a training by several processes: ``python -m softlabel.pipeline.training.rank SETTINGS RENDEZVOUS``.

Tells ``launch``, which started it, what it wants to know. It ends when its standard input does.
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
    tell = message_sender()
    settings, rendezvous = sys.argv[1:]
    if os.environ["RANK"] == "0":
        warnings.showwarning = lambda message, *_, **__: tell("warning", str(message))
    try:
        from softlabel.pipeline.config.train import TrainConfig
        from softlabel.pipeline.training.launch import join
        from softlabel.pipeline.training.train import train

        config = TrainConfig.model_validate_json(settings)
        join(rendezvous, config.optimizer)
        tell("report", train(config, partial(tell, "progress")))
    except Exception as error:
        traceback.print_exc()
        tell("error", serialized(error))
    # It does not end by itself: the others would lose their connection, and that would be what they have to say.
    parent.join()


def _end_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)  # also in the middle of a step: a checkpoint is whole or not there


if __name__ == "__main__":
    main()
