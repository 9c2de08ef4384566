"""A finished student works elsewhere: it ends where it has learned to, and transformers 4 loads the same model."""

import json
import math
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GenerationConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    ModernBertDecoderConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from softlabel.pipeline.capturing.capture import capture
from softlabel.pipeline.config.capture import CaptureConfig
from softlabel.pipeline.models.pretrained import load_tokenizer
from softlabel.pipeline.students.serving import write_older_names
from softlabel.pipeline.training.train import train
from softlabel.storage.table import Table
from tests.pipeline.trainings import settings

pytestmark = pytest.mark.usefixtures("one_thread")
ONE_STEP = {"max_steps": 1, "num_train_epochs": 1}
IM_START, IM_END, TEXT_END = 1, 2, 0


def base_model(folder: Path, tiny_teacher: Path, ends: int | list[int]) -> str:
    """A model that ends at other tokens than the teacher of the table."""
    shutil.copytree(tiny_teacher, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config = GenerationConfig(eos_token_id=ends, temperature=0.5, do_sample=True)
    model.config.eos_token_id = ends
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("base", "ends"),
    [(TEXT_END, IM_END), ([TEXT_END, 7], IM_END), ([TEXT_END, IM_END], [TEXT_END, IM_END]), (IM_END, IM_END)],
    ids=str,
)
def test_generation_ends_where_the_student_has_learned_to(
    base: int | list[int], ends: int | list[int], table: Table, tiny_teacher: Path, tmp_path: Path
) -> None:
    model = base_model(tmp_path / "base", tiny_teacher, base)
    folder = train(
        settings(table, tmp_path / "student", student={"layers": None, "model": model}, optimizer=ONE_STEP)
    ).output
    generation = GenerationConfig.from_pretrained(folder)
    assert generation.eos_token_id == ends
    assert generation.temperature == 0.5, "what else the base says about generation is kept"
    assert json.loads(Path(folder, "config.json").read_text())["eos_token_id"] == ends


def test_generation_also_ends_at_the_end_of_a_turn(tiny_teacher: Path, tmp_path: Path) -> None:
    """Some templates end a turn with another token than the tokenizer's end token."""
    teacher = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    tokenizer = teacher / "tokenizer_config.json"
    tokenizer.write_text(tokenizer.read_text().replace('"eos_token": "<|im_end|>"', '"eos_token": "<|endoftext|>"'))
    documents = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "Which planet?"}, {"role": "assistant", "content": "Saturn."}]
    documents.write_text("".join(json.dumps({"id": i, "messages": turns * (i + 1)}) + "\n" for i in range(4)))
    capture(
        CaptureConfig(
            documents=str(documents),
            table=str(tmp_path / "table"),
            teacher={"model": str(teacher), "device": "cpu"},
            columns={"messages": "messages"},
            shards={"eval_fraction": 0.0},
        )
    )
    table = Table.open(str(tmp_path / "table"))
    folder = train(settings(table, tmp_path / "student", stream={"max_length": 256}, optimizer=ONE_STEP)).output
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [TEXT_END, IM_END]


SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "initializer_range": 0.3,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
ROPES: dict[str, tuple[PretrainedConfig, dict[str, Any]]] = {
    "llama": (LlamaConfig(**SIZES, rope_theta=5e5), {"rope_theta": 5e5}),
    "llama 3": (
        LlamaConfig(**SIZES, rope_theta=4e5, rope_scaling=LLAMA3 | {"original_max_position_embeddings": 16}),
        {"rope_theta": 4e5, "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 16}},
    ),
    "yarn": (
        Qwen3Config(**SIZES, rope_theta=1e6, rope_scaling={"rope_type": "yarn", "factor": 4.0}),
        {
            "rope_theta": 1e6,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        },
    ),
    "two frequencies": (
        Gemma3TextConfig(
            **SIZES,
            layer_types=["sliding_attention", "full_attention"],
            sliding_window=16,
            rope_theta=3e5,
            rope_local_base_freq=2e4,
            rope_scaling={"rope_type": "linear", "factor": 8.0},
        ),
        {
            "rope_theta": 3e5,
            "rope_local_base_freq": 2e4,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
    "long": (
        Phi3Config(**SIZES, original_max_position_embeddings=16, rope_scaling={"rope_type": "longrope", **LONG}),
        {"original_max_position_embeddings": 16, "rope_scaling": {"type": "longrope", **LONG}},
    ),
    "a part of each head": (
        Phi3Config(**SIZES, rope_theta=2e4, partial_rotary_factor=0.5),
        {"rope_theta": 2e4, "partial_rotary_factor": 0.5},
    ),
    "by other names": (
        GPTNeoXConfig(
            vocab_size=512,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            rotary_pct=0.5,
            rotary_emb_base=5000,
            initializer_range=0.3,
        ),
        {"rotary_emb_base": 5000, "rotary_pct": 0.5},
    ),
    "experts by another name": (
        Qwen3MoeConfig(**SIZES, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16, rope_theta=3e6),
        {"num_experts": 2, "num_local_experts": 2, "rope_theta": 3e6},
    ),
    "experts": (MixtralConfig(**SIZES, num_local_experts=2, rope_theta=3e6), {"rope_theta": 3e6}),
}


BERT_SIZES = {name: value for name, value in SIZES.items() if name not in ("head_dim", "num_key_value_heads")}
NAMED = ROPES | {
    "one frequency by other names": (
        ModernBertDecoderConfig(**BERT_SIZES, global_rope_theta=3e4, local_rope_theta=3e4),
        {"global_rope_theta": 3e4, "local_rope_theta": 3e4},
    ),
    "other names of two frequencies": (
        ModernBertDecoderConfig(**BERT_SIZES),
        {"global_rope_theta": 160000.0, "local_rope_theta": 10000.0},
    ),
    "settings that the architecture checks": (
        Gemma4TextConfig(**SIZES, layer_types=["sliding_attention", "full_attention"], num_kv_shared_layers=0),
        {},
    ),
}


@pytest.mark.filterwarnings("ignore:transformers 4, and servers")
@pytest.mark.parametrize("name", NAMED)
def test_renamed_settings_are_also_where_transformers_4_looks(name: str, tmp_path: Path) -> None:
    config, older = NAMED[name]
    config.save_pretrained(tmp_path)
    before = type(config).from_pretrained(tmp_path)
    write_older_names(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert {key: written.get(key) for key in older} == older
    after = type(config).from_pretrained(tmp_path).rope_parameters
    assert {key: value for key, value in after.items() if key != "type"} == before.rope_parameters


@pytest.mark.parametrize("name", NAMED)
def test_what_transformers_4_can_not_compute_is_said(name: str, tmp_path: Path) -> None:
    NAMED[name][0].save_pretrained(tmp_path)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        write_older_names(tmp_path)
    messages = [str(warning.message) for warning in said if "transformers 4" in str(warning.message)]
    assert len(messages) == (name == "other names of two frequencies")
    assert all("(160000) in sliding attention, where the student has 10000" in message for message in messages)


CHILD = """
import json, sys, torch
import transformers
assert transformers.__version__.startswith("4."), transformers.__version__
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    ids = torch.arange(3, 60)[None]
    loss = model(input_ids=ids, labels=ids).loss.item()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ends = GenerationConfig.from_pretrained(folder).eos_token_id
    print(json.dumps([loss, tokenizer("In 2024 there were 12345 rings.").input_ids, ends]))
"""


@pytest.mark.long
def test_transformers_4_computes_the_same_perplexity(table: Table, tmp_path: Path) -> None:
    """Installs transformers 4.57 next to this environment's other packages."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    [site] = (tmp_path / "venv" / "lib").glob("*/site-packages")
    (site / "zz_ours.pth").write_text(str(Path(torch.__file__).parents[1]))
    install = [tmp_path / "venv" / "bin" / "pip", "install", "--quiet", "transformers==4.57.*"]
    subprocess.run(install, check=True)
    students = []
    for name, (config, _) in ROPES.items():
        file = tmp_path / f"{name}.json"
        file.write_text(config.to_json_string())
        student = {"layers": None, "config": str(file)}
        students.append(train(settings(table, tmp_path / name, student=student, optimizer=ONE_STEP)).output)
    python = tmp_path / "venv" / "bin" / "python"
    found = subprocess.run([python, "-c", CHILD, *students], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr[-2000:]
    for folder, line in zip(students, found.stdout.splitlines(), strict=True):
        theirs, ids, ends = json.loads(line)
        model, sequence = AutoModelForCausalLM.from_pretrained(folder).eval(), torch.arange(3, 60)[None]
        with torch.no_grad():
            ours = model(input_ids=sequence, labels=sequence).loss.item()
        assert math.isclose(ours, theirs, rel_tol=1e-4), folder
        assert ids == load_tokenizer(Path(folder))("In 2024 there were 12345 rings.").input_ids
        assert ids == AutoTokenizer.from_pretrained(folder)("In 2024 there were 12345 rings.").input_ids
        assert ends == IM_END


@pytest.mark.parametrize("adapted", [False, True])
def test_what_is_not_trained_of_a_mixture_of_experts_is_said(adapted: bool, table: Table, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(ROPES["experts"][0].to_json_string())
    student: dict[str, Any] = {"layers": None, "config": str(file)} | ({"lora_r": 2} if adapted else {})
    with pytest.warns(UserWarning, match="router's load balanced is not part") as said:
        train(settings(table, tmp_path / "student", student=student, optimizer=ONE_STEP))
    about = [str(warning.message) for warning in said if "mixture of experts" in str(warning.message)]
    assert len(about) == 1
    assert ("not the experts" in about[0]) == adapted
