"""Quantized teachers are captured, where the packages that their quantization needs are installed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from softlabel.pipeline.config.train import StudentConfig
from softlabel.pipeline.teachers.teacher import TransformersTeacher
from softlabel.storage.errors import StudentError, TeacherError
from softlabel.storage.table import Table
from tests.pipeline.building import built
from tests.pipeline.hostile import change
from tests.pipeline.teachers.test_teacher import settings, texts

BLOCK = 32
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}


def in_8_bits(folder: Path, teacher: Path, scale: str, **config: Any) -> dict[str, torch.Tensor]:
    """A copy of a model whose layers have weights in 8 bits, with a scale for each block; returns what they stand for.

    Args:
        folder: where to write it.
        teacher: the model.
        scale: what is appended to a weight's name for that of its scales.
        config: settings for config.json.
    """
    shutil.copytree(teacher, folder)
    stored, meant = {}, {}
    for name, weight in load_file(teacher / "model.safetensors").items():
        stored[name] = meant[name] = weight
        if "proj" in name:
            rows, columns = (size // BLOCK for size in weight.shape)
            blocks = weight.view(rows, BLOCK, columns, BLOCK)
            scales = blocks.abs().amax((1, 3)) / 448
            values = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
            stored[name], stored[name + scale] = values.view(weight.shape), scales
            meant[name] = (values.float() * scales[:, None, :, None]).view(weight.shape)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    change(folder / "config.json", **config)
    return meant


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU, the weights are used in 8 bits, by further kernels")
def test_a_teacher_in_8_bits_gives_the_logits_of_the_weights_that_it_stands_for(
    tiny_teacher: Path, tmp_path: Path
) -> None:
    meant = in_8_bits(tmp_path / "teacher", tiny_teacher, "_scale_inv", quantization_config=FP8)
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher, dtype=torch.float32).eval()
    model.load_state_dict(meant, strict=False)
    sequences, positions = texts()
    with torch.no_grad():
        every = [model(torch.from_numpy(sequence[None]).long()).logits[0, :, :500] for sequence in sequences]
    expected = torch.cat([logits[at - 1] for logits, at in zip(every, positions, strict=True)])
    teacher = TransformersTeacher(settings(tmp_path / "teacher"))
    torch.testing.assert_close(torch.cat(list(teacher.logits(sequences, positions))), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("scale", "config"),
    [
        ("_scale_inv", {}),
        ("_scale", {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}),
        ("_zero_point", {"compression_config": {"quant_method": "compressed-tensors"}}),
    ],
)
def test_scales_of_weights_that_transformers_would_leave_out_are_an_error(
    scale: str, config: dict[str, Any], table: Table, tiny_teacher: Path, tmp_path: Path
) -> None:
    """Without them, its logits are those of another model."""
    folder = tmp_path / "teacher"
    in_8_bits(folder, tiny_teacher, scale, **config)
    with pytest.raises(TeacherError, match=rf"14 scales of weights, such as model\S+{scale}"):
        TransformersTeacher(settings(folder))
    change(folder / "config.json", quantization_config=None)
    with pytest.raises(StudentError, match="14 scales of weights"):
        built(StudentConfig(model=str(folder)), table)


CHILD = """
import json, sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from softlabel.pipeline import CaptureConfig, capture, verify
from softlabel.pipeline.config.tables import VerifyConfig
plain, folder = Path(sys.argv[1]), Path(sys.argv[2])
documents = folder / "documents.jsonl"
documents.write_text("".join(json.dumps({"id": i, "text": f"Saturn has {i} rings."}) + "\\n" for i in range(8)))
for bits in (4, 8):
    teacher, table = folder / f"teacher-{bits}", str(folder / f"table-{bits}")
    settings = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=settings, dtype=torch.float32)
    model.save_pretrained(teacher)
    AutoTokenizer.from_pretrained(plain).save_pretrained(teacher)
    teacher = {"model": str(teacher), "dtype": "float32", "device": "cpu"}
    report = capture(CaptureConfig(documents=str(documents), table=table, teacher=teacher))
    verify(VerifyConfig(table=table, teacher=teacher))
    print(json.dumps([bits, report.sequences]))
"""


@pytest.mark.long
def test_teachers_of_4_and_8_bits_are_captured_and_agree_with_their_table(tiny_teacher: Path, tmp_path: Path) -> None:
    """Installs bitsandbytes, which also runs without a GPU, next to this environment's packages."""
    packages = tmp_path / "packages"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", packages, "bitsandbytes"]
    subprocess.run(install, check=True)
    found = subprocess.run(
        [sys.executable, "-c", CHILD, tiny_teacher, tmp_path],
        env=os.environ | {"PYTHONPATH": str(packages)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    assert [json.loads(line) for line in found.stdout.splitlines() if line.startswith("[")] == [[4, 8], [8, 8]]
