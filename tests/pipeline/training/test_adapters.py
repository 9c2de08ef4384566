"""Adapters and kernels for a student's body: which weights are trained, and that a saved student needs neither."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from softlabel.pipeline.config.train import StudentConfig
from softlabel.pipeline.students import build as student
from softlabel.pipeline.training.train import train
from softlabel.storage.errors import UsageError
from tests.pipeline.building import built
from tests.pipeline.trainings import history, interrupt_at, settings, weights

pytestmark = pytest.mark.usefixtures("one_thread")
LORA = {"lora_r": 4, "lora_target_modules": ("q_proj", "down_proj")}


def test_adapters_are_trained_and_merged(table, tmp_path):
    """Only the named layers change, by a matrix of at most the given rank; also after an interruption."""
    config = settings(table, tmp_path / "student", student=LORA, optimizer={"learning_rate": 1e-2})
    report = train(config)
    before, after = built(StudentConfig(layers=(1,)), table).state_dict(), weights(report.output)
    assert report.parameters == student.parameters(AutoModelForCausalLM.from_pretrained(report.output))
    for name, tensor in after.items():
        if "q_proj" in name or "down_proj" in name:
            assert torch.linalg.matrix_rank(tensor - before[name], rtol=1e-3) == 4
        else:
            assert torch.equal(tensor, before[name]), name
    evaluated = [entry["eval_kl"] for entry in history(report.output) if "eval_kl" in entry]
    assert evaluated[-1] < evaluated[0]

    again = config.model_copy(update={"output": str(tmp_path / "again")})
    with pytest.raises(KeyboardInterrupt):
        train(again, interrupt_at(6))
    checkpoint = load_file(Path(f"{again.output}.training", "checkpoint-4", "model.safetensors"))
    assert any("lora_A" in name for name in checkpoint)
    assert train(again).resumed_from == 4
    for name, tensor in weights(again.output).items():
        assert torch.equal(tensor, after[name]), name


@pytest.mark.parametrize("name", ["nothing_proj", "lm_head", "embed_tokens"])
def test_unknown_layers_or_the_head_are_refused_as_lora_targets(name, table, tmp_path):
    """An unknown name is refused even next to a known one."""
    config = settings(table, tmp_path / "student", student={"lora_r": 4, "lora_target_modules": ("q_proj", name)})
    with pytest.raises(UsageError, match=f"lora_target_modules: {name}") as error:
        train(config)
    assert "gate_proj, k_proj" in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no GPU")
def test_liger_without_a_gpu_is_refused(table, tmp_path):
    with pytest.raises(UsageError, match=r"optimizer\.use_liger_kernel"):
        train(settings(table, tmp_path / "student", optimizer={"use_liger_kernel": True}))


@pytest.mark.gpu
def test_liger_changes_no_more_than_rounding(table, tmp_path):
    pytest.importorskip("liger_kernel")
    plain, fast = (
        train(settings(table, tmp_path / name, optimizer={"device": "cuda", "processes": 1, "use_liger_kernel": liger}))
        for name, liger in (("plain", False), ("fast", True))
    )
    assert fast.metrics["eval_kl"] == pytest.approx(plain.metrics["eval_kl"], rel=1e-2)
