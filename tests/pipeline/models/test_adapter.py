"""Teachers with a merged adapter, and teachers spread over several devices."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from softlabel.pipeline.config.capture import TeacherConfig
from softlabel.pipeline.devices import worker_devices
from softlabel.pipeline.models.checkpoint import Checkpoint
from softlabel.pipeline.teachers.teacher import TransformersTeacher
from softlabel.storage.errors import TeacherError, UsageError
from tests.pipeline.teachers.test_teacher import HEADS, SMALL, another, settings, texts

torch.set_num_threads(1)

LORA = LoraConfig(
    r=4,
    target_modules=["q_proj", "down_proj"],
    init_lora_weights=False,
    layers_to_transform=[0, 1],
    task_type="CAUSAL_LM",
)


def adapter(folder: Path, base: Path, config: Any = LORA, **saving: Any) -> Path:
    """Save an adapter with random weights."""
    torch.manual_seed(3)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder, **saving)
    return folder


def logits_of(teacher: TransformersTeacher) -> torch.Tensor:
    return torch.cat(list(teacher.logits(*texts())))


def test_a_merged_adapter_gives_the_logits_of_peft(tiny_teacher: Path, tmp_path: Path) -> None:
    adapted = settings(tiny_teacher, adapter=str(adapter(tmp_path / "adapter", tiny_teacher)))
    sequences, positions = texts()
    logits = logits_of(TransformersTeacher(adapted))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_teacher), tmp_path / "adapter").eval()
    with torch.no_grad():
        every = [model(torch.from_numpy(sequence[None]).long()).logits[0, :, :500] for sequence in sequences]
    own = [logits[at - 1] for logits, at in zip(every, positions, strict=True)]
    torch.testing.assert_close(logits, torch.cat(own), rtol=1e-4, atol=1e-4)
    plain = TransformersTeacher(settings(tiny_teacher))
    assert (logits - logits_of(plain)).abs().max() > 0.1
    identity = Checkpoint.find(adapted).identity
    assert identity.adapter
    assert identity.model_copy(update={"adapter": None}) == plain.checkpoint.identity
    other = adapter(
        tmp_path / "other", tiny_teacher, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    )
    assert Checkpoint.find(settings(tiny_teacher, adapter=str(other))).identity.adapter != identity.adapter


TIED = {
    "output layer": LoraConfig(target_modules=["lm_head"]),
    "embedding": LoraConfig(target_modules=["embed_tokens"]),
    "both": LoraConfig(target_modules=["embed_tokens", "lm_head", "v_proj"]),
    "both, tied": LoraConfig(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True),
    "output layer, saved whole": LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "embedding, saved whole": LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    "scales of the output layer": IA3Config(target_modules=["lm_head"], feedforward_modules=[]),
    "DoRA": LoraConfig(target_modules=["lm_head"], use_dora=True),
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("kind", TIED)
def test_an_adapter_of_tied_weights_gives_the_logits_of_peft(kind: str, tiny_teacher: Path, tmp_path: Path) -> None:
    """The tiny teacher's output layer has the embedding's weights."""
    torch.manual_seed(5)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_teacher), TIED[kind])
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data.add_(torch.randn_like(weight), alpha=0.3)
    model.save_pretrained(tmp_path / "adapter")
    sequences, positions = texts()
    model.eval()
    with torch.no_grad():
        every = [model(torch.from_numpy(sequence[None]).long()).logits[0, :, :500] for sequence in sequences]
    expected = torch.cat([logits[at - 1] for logits, at in zip(every, positions, strict=True)])
    adapted = settings(tiny_teacher, adapter=str(tmp_path / "adapter"))
    torch.testing.assert_close(logits_of(TransformersTeacher(adapted)), expected, rtol=1e-4, atol=1e-3)
    assert (expected - logits_of(TransformersTeacher(settings(tiny_teacher)))).abs().max() > 0.1
    half = logits_of(TransformersTeacher(settings(tiny_teacher, adapter=adapted.adapter, dtype="bfloat16")))
    assert (half.float() - expected).abs().mean() < 0.1 * expected.std(), "rounding is not refused"


def test_a_merge_that_changes_the_logits_is_refused(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = adapter(tmp_path / "adapter", tiny_teacher)
    monkeypatch.setattr("peft.tuners.lora.layer.Linear.get_delta_weight", lambda layer, name: layer.weight * 0.5)
    with pytest.raises(TeacherError, match=r"(?s)changes what the model computes.*logits that differ by"):
        TransformersTeacher(settings(tiny_teacher, adapter=str(folder)))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "can't find the adapter"),
        ("pickled", "this folder does not contain an adapter"),
        ("damaged", "can't be applied to its model"),
        ("of a larger model", "made for another model"),
        ("of a smaller model", "made for another model"),
        ("of a larger vocabulary", r"made for another model[\s\S]*size mismatch for \S*embed_tokens"),
        ("with biases that the model does not have", "can't be merged into the model's weights"),
        ("a prompt", "can't be merged"),
        ("of other folders' adapters", "can't be merged"),
        ("of no kind", "can't be merged"),
    ],
)
def test_an_unusable_adapter_is_an_error(how: str, message: str, tiny_teacher: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    kinds = {
        "a prompt": PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
        "of a larger vocabulary": LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
        "with biases that the model does not have": LoraConfig(target_modules=["q_proj"], lora_bias=True),
    }
    base = tiny_teacher
    if how == "of a larger vocabulary":
        base = tmp_path / "larger"
        larger = AutoModelForCausalLM.from_pretrained(tiny_teacher)
        larger.resize_token_embeddings(520)
        larger.save_pretrained(base)
    if how != "missing":
        adapter(folder, base, kinds.get(how, LORA))
    weights, description = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    match how:
        case "pickled":
            weights.rename(folder / "adapter_model.bin")
        case "damaged":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "of other folders' adapters":
            mixture = {"peft_type": "XLORA", "hidden_size": 64, "adapters": {"a": str(tmp_path / "other")}}
            description.write_text(json.dumps(mixture))
        case "of no kind":
            description.write_text("{}")
        case "of a larger model":
            description.write_text(description.read_text().replace('"down_proj"', '"k_proj"'))
        case "of a smaller model":
            description.write_text(description.read_text().replace('"down_proj"', '"down_proj", "k_proj"'))
    with pytest.raises(TeacherError, match=message) as caught:
        TransformersTeacher(settings(tiny_teacher, adapter=str(folder)))
    assert str(folder) in str(caught.value)


def test_without_peft_an_adapter_is_refused(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match=r"softlabel\[adapters\]"):
        Checkpoint.find(settings(tiny_teacher, adapter=str(tmp_path)))


def test_a_teacher_spread_over_devices_gives_the_same_logits(
    tiny_teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts that don't fit are loaded in each pass, here from disk: the same code moves parts among GPUs."""
    folder = another(tmp_path / "teacher", tiny_teacher, LlamaConfig(**SMALL, **HEADS))
    load = AutoModelForCausalLM.from_pretrained
    parts = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.rotary_emb": "cpu"}
    parts |= {"model.layers.1": "disk", "model.norm": "disk", "lm_head": "disk"}

    def spread(*arguments: Any, device_map: Any, **named: Any) -> Any:
        assert device_map == "auto"
        return load(*arguments, device_map=parts, offload_folder=str(tmp_path), **named)

    plain = logits_of(TransformersTeacher(settings(folder)))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", spread)
    teacher = TransformersTeacher(settings(folder, device="auto", device_map="auto"))
    assert {p.device.type for p in teacher._model.parameters()} == {"cpu", "meta"}
    for _ in range(2):
        torch.testing.assert_close(logits_of(teacher), plain, rtol=0, atol=0)


@pytest.mark.gpu
def test_a_teacher_split_between_gpu_and_cpu_gives_the_same_logits(
    tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = AutoModelForCausalLM.from_pretrained
    parts = {"": 0, "model.layers.1": "cpu"}
    plain = logits_of(TransformersTeacher(settings(tiny_teacher, device="cuda:0")))
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *a, device_map, **named: load(*a, device_map=parts, **named)
    )
    spread = logits_of(TransformersTeacher(settings(tiny_teacher, device="auto", device_map="auto")))
    assert spread.device.type == "cuda"
    torch.testing.assert_close(spread, plain, rtol=1e-4, atol=1e-4)


def test_device_auto_means_every_gpu_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(**more: Any) -> list[str]:
        return worker_devices(TeacherConfig(model="teacher", **more))

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert of() == ["cuda:0", "cuda:1", "cuda:2"]
    assert of(device="cuda:1") == ["cuda:1"]
    assert of(device="cpu", workers=2) == ["cpu", "cpu"]
    assert len(of(device_map="auto")) == len(of(labels=("a", "b"))) == 1
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert of(workers=2) == ["cpu", "cpu"]
    with pytest.raises(ValueError, match="whole machine"):
        of(device_map="auto", workers=2)
