"""Quantized teachers are captured, where the packages that their quantization needs are installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
