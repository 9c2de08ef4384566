"""Models that also read images, as teachers of text and as sources of students."""

import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3nConfig,
    Llama4Config,
    LlavaConfig,
    Mistral3Config,
    PretrainedConfig,
    Qwen3_5Config,
    Qwen3VLConfig,
)

from softlabel.pipeline.config.train import StudentConfig
from softlabel.pipeline.models.checkpoint import Checkpoint
from softlabel.pipeline.teachers.teacher import TransformersTeacher
from softlabel.pipeline.training.train import train
from softlabel.storage.errors import StudentError, TeacherError
from softlabel.storage.table import Table
from tests.pipeline.building import built
from tests.pipeline.hostile import change
from tests.pipeline.teachers.test_teacher import settings as teacher_settings
from tests.pipeline.teachers.test_teacher import texts
from tests.pipeline.trainings import settings

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "initializer_range": 0.3,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
QWEN_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
QWEN_VISION |= {"patch_size": 8, "num_position_embeddings": 16}
LINEAR = {f"linear_{of}_head_dim": 8 for of in ("key", "value")} | {
    f"linear_num_{of}_heads": 2 for of in ("key", "value")
}
WRAPPERS: dict[str, Callable[[], PretrainedConfig]] = {
    "gemma 3": lambda: Gemma3Config(
        text_config=TEXT | {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 8},
        vision_config=VISION,
        mm_tokens_per_image=4,
    ),
    "mistral 3": lambda: Mistral3Config(
        text_config=TEXT | {"model_type": "mistral"}, vision_config=VISION | {"model_type": "pixtral", "head_dim": 8}
    ),
    "qwen 3.5": lambda: Qwen3_5Config(
        text_config=TEXT | LINEAR | {"layer_types": ["linear_attention", "full_attention"] * 2},
        vision_config=QWEN_VISION,
    ),
    "llava": lambda: LlavaConfig(
        text_config=TEXT | {"model_type": "llama"}, vision_config=VISION | {"model_type": "clip_vision_model"}
    ),
    "llama 4": lambda: Llama4Config(
        text_config=TEXT
        | {"intermediate_size_mlp": 48, "num_local_experts": 2, "num_experts_per_tok": 1, "moe_layers": [1, 3]}
        | {"no_rope_layers": [1, 1, 1, 0], "attention_chunk_size": 64, "pad_token_id": 0},
        vision_config=VISION | {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16},
    ),
    "qwen 3 vl": lambda: Qwen3VLConfig(
        text_config=TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}},
        vision_config=QWEN_VISION | {"deepstack_visual_indexes": [0]},
    ),
}


def wrapper(folder: Path, tiny_teacher: Path, name: str) -> Path:
    """A random model of this kind, with the tiny teacher's tokenizer."""
    shutil.copytree(tiny_teacher, folder)
    (folder / "generation_config.json").unlink()
    torch.manual_seed(1)
    AutoModelForImageTextToText.from_config(WRAPPERS[name]()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_multimodal_teacher_gives_its_own_logits_for_text(name: str, tiny_teacher: Path, tmp_path: Path) -> None:
    folder = wrapper(tmp_path / "teacher", tiny_teacher, name)
    teacher = TransformersTeacher(teacher_settings(folder))
    assert (teacher.vocabulary, teacher.checkpoint.padded_vocabulary) == (500, 512)
    sequences, positions = texts()
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        every = [model(input_ids=torch.from_numpy(s[None]).long()).logits[0, :, :500] for s in sequences]
    expected = torch.cat([logits[at - 1] for logits, at in zip(every, positions, strict=True)])
    torch.testing.assert_close(torch.cat(list(teacher.logits(sequences, positions))), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", [name for name in WRAPPERS if name != "qwen 3 vl"])
def test_a_student_has_the_text_model_of_a_multimodal_one(
    name: str, table: Table, tiny_teacher: Path, tmp_path: Path
) -> None:
    folder = wrapper(tmp_path / "source", tiny_teacher, name)
    whole = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.arange(3, 20)[None]
    student = built(StudentConfig(model=str(folder)), table).eval()
    with torch.no_grad():
        torch.testing.assert_close(student(input_ids=ids).logits, whole(input_ids=ids).logits)
    student.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, whole(input_ids=ids).logits)
    pruned = built(StudentConfig(teacher=str(folder), layers=(0, 1)), table)
    assert pruned.config.num_hidden_layers == 2


def test_a_student_of_a_multimodal_teacher_is_trained(table: Table, tiny_teacher: Path, tmp_path: Path) -> None:
    folder = wrapper(tmp_path / "source", tiny_teacher, "mistral 3")
    config = settings(
        table,
        tmp_path / "student",
        student={"layers": (0, 3), "teacher": str(folder)},
        optimizer={"max_steps": 1, "num_train_epochs": 1},
    )
    model = AutoModelForCausalLM.from_pretrained(train(config).output)
    assert type(model).__name__ == "MistralForCausalLM"


def test_a_multimodal_model_without_a_text_model_of_its_own_is_refused_as_a_student(
    table: Table, tiny_teacher: Path, tmp_path: Path
) -> None:
    folder = wrapper(tmp_path / "source", tiny_teacher, "qwen 3 vl")
    with pytest.raises(StudentError, match="text model can't be used alone"):
        built(StudentConfig(model=str(folder)), table)


@pytest.mark.skipif(find_spec("timm") is not None, reason="says that timm is missing")
def test_a_package_that_an_architecture_needs_is_named(table: Table, tiny_teacher: Path, tmp_path: Path) -> None:
    """Gemma 3n's images are read by a model of timm."""
    folder = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    config = Gemma3nConfig(text_config=TEXT, audio_config={"hidden_size": 16, "conf_num_hidden_layers": 1})
    config.architectures = ["Gemma3nForConditionalGeneration"]
    config.save_pretrained(folder)
    with pytest.raises(TeacherError, match=r"(?s)timm library.*install this package"):
        TransformersTeacher(teacher_settings(folder))
    with pytest.raises(StudentError, match=r"(?s)timm library.*install this package"):
        built(StudentConfig(model=str(folder)), table)


QUANTIZED = {
    "4 bits": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "8 bits": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "another": {"quant_method": "gptq", "bits": 4},
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no GPU")
@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_quantized_teacher_that_can_not_be_loaded_here_is_an_error_that_says_so(
    kind: str, table: Table, tiny_teacher: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    change(folder / "config.json", quantization_config=QUANTIZED[kind])
    method = QUANTIZED[kind]["quant_method"]
    with pytest.raises(TeacherError, match=rf"(?s)quantized teacher can't be loaded on this machine.*{method}"):
        TransformersTeacher(teacher_settings(folder))
    assert Checkpoint.find(teacher_settings(folder)).vocabulary == 500
    with pytest.raises(StudentError, match="can't be made from a quantized model"):
        built(StudentConfig(model=str(folder)), table)
