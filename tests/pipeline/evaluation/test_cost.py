"""What it costs to use a model: sizes, rates and memory are the model's, under the conditions that are stated."""

import json
import time
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    DeepseekV3Config,
    GenerationConfig,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen2MoeConfig,
)

from softlabel.flows.display.evaluations import show_cost
from softlabel.pipeline.config.evaluate import CostConfig, EvaluateConfig
from softlabel.pipeline.evaluation import evaluate as evaluation
from softlabel.pipeline.evaluation.cost import Lengths, cost_of
from softlabel.pipeline.evaluation.evaluate import evaluate, preview_evaluate
from softlabel.pipeline.models import experts
from softlabel.pipeline.models.experts import active_parameters
from softlabel.storage.errors import StudentError, UsageError
from tests.pipeline.evaluation.test_evaluate import drawings, make_student, recorded, without_drawings  # noqa: F401

pytestmark = pytest.mark.usefixtures("speed", "one_thread")

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LENGTHS = Lengths(batch_size=2, prompt_tokens=12, new_tokens=4)
SETTINGS = {"prompt_tokens": 12, "new_tokens": 4, "batch_size": 2, "runs": 2}


@pytest.fixture
def model():
    return AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))


def measured(model, lengths=LENGTHS, runs=2, task="text-generation"):
    return cost_of(model, "x", [], lengths, runs, task).speed


@pytest.fixture(scope="module")
def students(tiny_teacher, table, tmp_path_factory):
    folder = tmp_path_factory.mktemp("students")
    names = {"good": 0.01, "[b]<script>": 0.05}
    return [str(make_student(folder / name, tiny_teacher, recorded(table), noise=n)) for name, n in names.items()]


def config(table, students, folder, **cost):
    return EvaluateConfig(
        table=table.location, students=tuple(students), report=str(folder), device="cpu", cost={**SETTINGS, **cost}
    )


@pytest.mark.usefixtures("drawings")
def test_every_model_has_its_cost_in_the_report(table, students, tiny_teacher, tmp_path, capsys):
    found = evaluate(config(table, [*students, str(tiny_teacher)], tmp_path))
    content, page = json.loads(Path(found.json).read_text()), Path(found.html).read_text()
    assert [each["name"] for each in content["students"]] == [each.name for each in found.students]
    for student, score in zip(content["students"], found.students, strict=True):
        cost, speed = student["cost"], student["cost"]["speed"]
        weights = Path(student["folder"]) / "model.safetensors"
        assert (cost["bytes"], cost["active_parameters"]) == (weights.stat().st_size, student["parameters"])
        assert (speed["lengths"], speed["runs"]) == ({k: SETTINGS[k] for k in speed["lengths"]}, 2)
        assert (speed["dtype"], speed["device"].endswith(", 1 thread")) == ("float32", True)
        for rate in (speed["prefill"], speed["decode"]):
            assert 0 < rate["slowest"] <= rate["median"] <= rate["fastest"]
        assert speed["memory"] >= 4 * student["parameters"]
        assert score.cost.speed.decode.median == speed["decode"]["median"]
    assert "Cost of use" in page
    assert page.count("Quality against") == 2  # size and speed
    show_cost(found.students)
    shown = " ".join(capsys.readouterr().out.split())
    assert all(name in shown for name in ("good", "[b]<script>", "teacher", "2 prompts of 12 tokens and 4 new ones"))


def test_without_measuring_only_the_size_is_shown(table, students, tmp_path, capsys):
    found = evaluate(config(table, students, tmp_path, measure=False))
    assert [each.cost.speed for each in found.students] == [None, None]
    assert all(each.cost.bytes > 0 for each in found.students)
    show_cost(found.students)
    assert capsys.readouterr().out == ""
    assert "tokens per second" not in Path(found.html).read_text()


def test_reading_and_generating_are_timed_apart(model, monkeypatch):
    """A model that takes 30 ms for a prompt, and 10 ms for each further token, by a clock of its own."""
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)

    def slow(module, arguments, named):
        nonlocal now
        now += 0.03 if named["input_ids"].shape[1] > 1 else 0.01

    model.register_forward_pre_hook(slow, with_kwargs=True)
    found = measured(model)
    for rate in (found.prefill.slowest, found.prefill.median, found.prefill.fastest):
        assert rate == pytest.approx(24 / 0.03)
    for rate in (found.decode.slowest, found.decode.median, found.decode.fastest):
        assert rate == pytest.approx(2 / 0.01)


@pytest.mark.parametrize("blocks", [1, 24])
def test_memory_is_the_weights_and_what_a_run_adds_at_a_time(model, blocks):
    size = 6 * 2**20 // blocks

    def wasteful(module, arguments, named):
        for _ in range(3):
            [torch.ones(size // 4) for _ in range(blocks)]
        model.lm_head.weight.t()  # what shares the weights' memory adds nothing

    model.register_forward_pre_hook(wasteful, with_kwargs=True)
    weights = sum(each.numel() * 4 for each in model.parameters())
    found = measured(model, Lengths(1, 4, 1), runs=1).memory
    assert 0 <= found - weights - 6 * 2**20 < 4_000
    assert measured(model, Lengths(1, 4, 1), runs=1).memory == found


def test_memory_grows_with_what_a_model_has_read(model):
    """By the keys and values of each token, in each layer."""
    short, long = (measured(model, Lengths(1, tokens, 1), runs=1).memory for tokens in (40, 80))
    assert long - short >= 40 * 2 * 2 * 32 * 4


def moe(kind, chosen, count):
    more = {"num_experts_per_tok": chosen}
    return AutoModelForCausalLM.from_config(
        {
            "mixtral": lambda: MixtralConfig(**SIZES, **more, num_local_experts=count),
            "qwen": lambda: Qwen2MoeConfig(
                **SIZES, **more, num_experts=count, moe_intermediate_size=16, shared_expert_intermediate_size=24
            ),
            "gpt-oss": lambda: GptOssConfig(**SIZES, **more, num_local_experts=count, head_dim=16),
            "deepseek": lambda: DeepseekV3Config(
                **SIZES,
                **more,
                n_routed_experts=count,
                moe_intermediate_size=16,
                n_group=1,
                topk_group=1,
                first_k_dense_replace=1,
                kv_lora_rank=8,
                q_lora_rank=8,
                qk_rope_head_dim=8,
                qk_nope_head_dim=8,
                v_head_dim=8,
            ),
        }[kind]()
    )


@pytest.mark.parametrize("kind", ["mixtral", "qwen", "gpt-oss", "deepseek"])
def test_a_token_uses_the_parameters_of_the_experts_that_read_it(kind, monkeypatch):
    """As many as in the model that has only so many experts, and a router for all of them."""

    def size(model, router):
        named = model.named_parameters()
        return sum(p.numel() for name, p in named if ("gate." in name or "router." in name) == router)

    model, smaller = moe(kind, 2, 8), moe(kind, 2, 2)
    assert active_parameters(model) == size(smaller, router=False) + size(model, router=True)
    assert active_parameters(model) < model.num_parameters()
    monkeypatch.setattr(experts, "_CHOSEN", ())  # of a configuration that does not say it
    assert active_parameters(model) is None


def test_all_models_are_measured_with_lengths_that_each_of_them_can_read(table, students, tiny_teacher, tmp_path):
    short = make_student(tmp_path / "short", tiny_teacher, recorded(table))
    content = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(content | {"max_position_embeddings": 48}))
    models = (students[0], str(short))
    chosen = EvaluateConfig(table=table.location, students=models, report=str(tmp_path / "r"), cost={"runs": 1})
    lengths = {each.cost.speed.lengths for each in evaluate(chosen).students}
    assert lengths == {Lengths(batch_size=1, prompt_tokens=32, new_tokens=16)}
    for given in ({"prompt_tokens": 40, "new_tokens": 9}, {"prompt_tokens": 49}, {"new_tokens": 48}):
        refused = chosen.model_copy(update={"cost": CostConfig(**given)})
        for verb in (evaluate, preview_evaluate):
            with pytest.raises(UsageError, match=r"short can't read(.|\n)*at most 48"):
                verb(refused)


def test_the_models_own_settings_for_generating_change_nothing(model):
    own = GenerationConfig(num_beams=3, eos_token_id=list(range(64)), max_length=14, repetition_penalty=1.5)
    model.generation_config = own
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    measured(model, runs=1)
    assert len(calls) == 2 * (1 + LENGTHS.new_tokens)
    assert model.generation_config is own


def test_an_evaluation_that_is_continued_keeps_costs_of_this_machine_only(table, students, tmp_path, monkeypatch):
    asked, costs = [], []

    def dies_at_the_second(*arguments):
        asked.append(arguments[1])
        if len(asked) == 2:
            raise KeyboardInterrupt
        costs.append(cost_of(*arguments))
        return costs[-1]

    monkeypatch.setattr(evaluation, "cost_of", dies_at_the_second)
    settings = config(table, students, tmp_path)
    for machine in ("this", "another"):
        monkeypatch.setattr(evaluation.platform, "node", lambda machine=machine: machine)
        del asked[:]
        with pytest.raises(KeyboardInterrupt):
            evaluate(settings)
        assert asked == ["good", "[b]<script>"]
    found = evaluate(settings)
    assert asked == ["good", "[b]<script>", "[b]<script>"]
    assert [each.cost for each in found.students] == costs[1:]
    assert not (tmp_path / "unfinished").exists()


def test_a_classifier_has_documents_per_second():
    sizes = {**SIZES, "id2label": {0: "a", 1: "b", 2: "c"}}
    speed = measured(BertForSequenceClassification(BertConfig(**sizes)), Lengths(3, 20, 0), task="text-classification")
    assert speed.decode is None
    assert speed.prefill.median == pytest.approx(20 * speed.documents.median)


@pytest.mark.parametrize(
    ("fault", "error", "what"),
    [
        (NotImplementedError("no cache"), StudentError, "can't be measured"),
        (TypeError("unexpected argument"), StudentError, "can't be measured"),
        (torch.OutOfMemoryError("CUDA out of memory"), UsageError, "memory is too small"),
    ],
)
def test_a_model_that_cannot_be_run_is_named_with_what_to_do(model, fault, error, what, monkeypatch):
    def fails(*_):
        raise fault

    model.register_forward_pre_hook(fails)
    with pytest.raises(error, match=rf"{what}(.|\n)*{fault}(.|\n)*--cost\.no-measure"):
        measured(model)


@pytest.mark.gpu
def test_memory_of_a_gpu_is_what_the_model_allocates_there(model):
    other = torch.ones(2**24, device="cuda")  # 64 MB that are not the model's
    model = model.cuda()
    weights = sum(each.numel() * 4 for each in model.parameters())
    speed = measured(model)
    assert weights < speed.memory < weights + other.numel() * 4
    assert speed.device == torch.cuda.get_device_name()
