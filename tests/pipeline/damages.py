"""Models with damaged weights, and the error for each."""

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

DAMAGES = [
    ("truncated", "can't be loaded"),
    ("other shape", "in the shape that its configuration gives"),
    ("no number", "weights are not finite numbers"),
]


def damaged(model: Path, folder: Path, damage: str) -> None:
    """Copy a model with its weights damaged, or with a configuration of another size."""
    shutil.copytree(model, folder)
    file, config = folder / "model.safetensors", folder / "config.json"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "other shape":
        settings = json.loads(config.read_text())
        config.write_text(json.dumps({**settings, "intermediate_size": settings["intermediate_size"] - 8}))
    else:
        weights = load_file(file)
        next(tensor for name, tensor in weights.items() if "layer" in name).view(-1)[0] = float("nan")
        save_file(weights, file, metadata={"format": "pt"})
