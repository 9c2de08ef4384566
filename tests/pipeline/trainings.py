"""Helpers for tests of training: small settings, a process that trains and is killed at a given point, its results."""

import json
import os
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from softlabel.pipeline.config.train import TrainConfig
from tests.conftest import ROOT

STREAM = {"max_length": 40, "batch_size": 8, "micro_batch_size": 3}
OPTIMIZER = {"num_train_epochs": 3, "eval_steps": 5, "save_steps": 4, "learning_rate": 1e-3, "device": "cpu"}
OPTIMIZER |= {"report_to": ["tensorboard"]}

CHILD = """
import json, os, signal, sys
import torch
torch.set_num_threads(1)
from softlabel.pipeline.config.train import TrainConfig
from softlabel.pipeline.training.train import train

settings, die = json.loads(sys.argv[1]), json.loads(sys.argv[2])
if "saving" in die:
    save, count = torch.save, [0]
    def dying_save(value, path, *more, **others):
        if f"checkpoint-{die['saving']}" in str(path):
            save({}, path)
            os.kill(os.getpid(), signal.SIGKILL)
        save(value, path, *more, **others)
    torch.save = dying_save

def watch(progress):
    if progress.done == die.get("step"):
        os.kill(os.getpid(), signal.SIGKILL)

train(TrainConfig.model_validate(settings), watch)
"""


def settings(table, output, **changes):
    groups = {"student": {"layers": (1,)}, "loss": {}, "stream": STREAM, "optimizer": OPTIMIZER}
    changed = {name: {**values, **changes.get(name, {})} for name, values in groups.items()}
    return TrainConfig.model_validate({"table": table.location, "output": str(output), **changed})


def run(command, config, **die):
    """Train in a child process that is killed at a given step, or while it saves a given checkpoint."""
    return subprocess.run(
        [sys.executable, *command, config.model_dump_json(), json.dumps(die)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def history(folder):
    return json.loads((Path(folder) / "softlabel.json").read_text())["history"]


def curve(folder, quantity):
    """Steps and values that TensorBoard shows."""
    events = EventAccumulator(str(Path(folder, "tensorboard"))).Reload()
    return [(event.step, event.value) for event in events.Scalars(f"train/{quantity}")]


def interrupt_at(step):
    def watch(progress):
        if progress.done == step:
            raise KeyboardInterrupt

    return watch


def processes_of(output):
    """Other processes whose command line has a student's path."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if str(output).encode() in command and int(process.name) != os.getpid():
            found.append(int(process.name))
    return found
