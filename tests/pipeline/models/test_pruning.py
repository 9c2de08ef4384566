"""Pruned teachers have the right layers and neurons, and give the same logits after a reload."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    JambaConfig,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from softlabel.pipeline.models.multimodal import blank_text_model
from softlabel.pipeline.models.pruning import layer_stack, narrow, prune, require_prunable, spread
from softlabel.pipeline.students.build import _require_head, parameters
from softlabel.storage.errors import StudentError, UsageError
from tests.pipeline.students.test_build import SIZES

pytestmark = pytest.mark.usefixtures("one_thread")


@torch.no_grad()
def test_a_pruned_teacher_has_the_requested_layers(tmp_path):
    torch.manual_seed(0)
    teacher = SmolLM3ForCausalLM(SmolLM3Config(**SIZES, no_rope_layers=[1, 0, 1, 0])).eval()
    weights = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    pruned = prune(teacher, (0, 3)).eval()
    assert pruned.config.num_hidden_layers == 2
    assert pruned.config.no_rope_layers == [1, 0]
    for new, old in ((0, 0), (1, 3)):
        for name, tensor in pruned.model.layers[new].state_dict().items():
            assert torch.equal(tensor, weights[f"model.layers.{old}.{name}"])
    assert torch.equal(pruned.model.norm.weight, weights["model.norm.weight"])

    pruned.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.arange(3, 13)[None]
    whole = pruned(input_ids=ids).logits
    assert torch.equal(again(input_ids=ids).logits, whole)
    # With a cache, which each layer keeps under its own number.
    cache = again(input_ids=ids[:, :6], use_cache=True).past_key_values
    torch.testing.assert_close(again(input_ids=ids[:, 6:], past_key_values=cache).logits, whole[:, 6:])


@pytest.mark.parametrize("layers", [(), (0, 0), (0, 4), (-1,)])
def test_layers_that_the_teacher_does_not_have_are_refused(layers):
    with pytest.raises(UsageError, match="distinct layers between 0 and 3"):
        prune(LlamaForCausalLM(LlamaConfig(**SIZES)), layers)


@pytest.mark.parametrize(
    ("depth", "count", "layers"),
    [(1, 30, (0,)), (2, 30, (0, 29)), (7, 30, (0, 5, 10, 14, 19, 24, 29)), (4, 4, (0, 1, 2, 3))],
)
def test_layers_are_spread_evenly(depth, count, layers):
    assert spread(depth, count) == layers


def test_more_layers_than_the_teacher_has_are_refused():
    with pytest.raises(UsageError, match="at most 4"):
        spread(5, 4)


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
def test_a_narrowed_teacher_keeps_the_active_neurons(bias, tmp_path):
    """Removing neurons that are always silent does not change the logits, wherever they are."""
    torch.manual_seed(0)
    teacher = LlamaForCausalLM(LlamaConfig(**SIZES, mlp_bias=bias)).eval()
    for layer in teacher.model.layers:
        silent = torch.randperm(SIZES["intermediate_size"])[:20]
        layer.mlp.gate_proj.weight[silent] = 0
        if bias:
            torch.nn.init.normal_(layer.mlp.up_proj.bias)
            layer.mlp.gate_proj.bias[silent] = 0
    ids = torch.arange(3, 13)[None]
    expected, size = teacher(input_ids=ids).logits, parameters(teacher)
    kept = SIZES["intermediate_size"] - 20
    student = narrow(teacher, kept, [torch.arange(20, 40), torch.arange(5)])
    assert size - parameters(student) == 20 * SIZES["num_hidden_layers"] * (3 * SIZES["hidden_size"] + 2 * bias)
    torch.testing.assert_close(student(input_ids=ids).logits, expected)

    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.intermediate_size == kept
    torch.testing.assert_close(again(input_ids=ids).logits, expected)


def test_more_neurons_or_another_kind_of_layer_are_refused():
    with pytest.raises(UsageError, match="at most 48"):
        narrow(LlamaForCausalLM(LlamaConfig(**SIZES)), 49, [])
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4))
    with pytest.raises(StudentError, match="2 feed-forward layers of one size with gate_proj"):
        narrow(gpt2, 16, [])


@pytest.mark.parametrize("name", ["shared keys", "dense layers by number"])
def test_a_model_without_one_number_of_neurons_can_not_be_narrowed(name):
    with pytest.raises(StudentError, match="can't be made narrower"):
        require_prunable(blank_text_model(IRREGULAR[name](), Path()), None, 16)


MOE = {**SIZES, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "initializer_range": 0.3}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
DEEPSEEK = {name: value for name, value in SIZES.items() if name not in ("head_dim", "num_key_value_heads")}
DEEPSEEK |= {**LATENT, "n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1}
DEEPSEEK |= {"moe_intermediate_size": 16, "first_k_dense_replace": 2, "initializer_range": 0.3}
MAMBA = {"mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False, "num_experts": 2}
IRREGULAR = {
    "dense layers by number": lambda: Qwen3MoeConfig(**MOE, mlp_only_layers=[1, 2]),
    "every second layer": lambda: Qwen3MoeConfig(**MOE, decoder_sparse_step=2),
    "dense at first": lambda: DeepseekV3Config(**DEEPSEEK),
    "experts by number": lambda: Llama4TextConfig(
        **SIZES, intermediate_size_mlp=48, num_local_experts=2, moe_layers=[1, 3], no_rope_layers=[1, 0, 1, 1]
    ),
    "attention by place": lambda: JambaConfig(
        **{n: v for n, v in SIZES.items() if n != "head_dim"}, **MAMBA, attn_layer_period=2, attn_layer_offset=1
    ),
    "kinds of attention": lambda: Gemma3TextConfig(
        **SIZES, layer_types=["sliding_attention", "full_attention"] * 2, sliding_window=4
    ),
    "settings of single layers": lambda: Gemma4TextConfig(
        **SIZES,
        global_head_dim=16,
        num_kv_shared_layers=0,
        hidden_size_per_layer_input=0,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=4,
    ),
    "shared keys": lambda: Gemma3nTextConfig(
        **{**SIZES, "vocab_size": 64},
        vocab_size_per_layer_input=64,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=2,
        laurel_rank=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        activation_sparsity_pattern=[0.0] * 4,
    ),
}
RIGHT = {
    "dense layers by number": [(0, 1), (1, 3), (0, 2, 3)],
    "every second layer": [(0, 1), (1, 3), (0, 2)],
    "dense at first": [(0, 2), (1, 3), (2, 3)],
    "experts by number": [(0, 1), (1, 2), (0, 3)],
    "attention by place": [(0, 1), (2, 3)],
    "kinds of attention": [(0, 1), (1, 3), (1, 2)],
    "settings of single layers": [(0, 1), (0, 3), (2, 3)],
    "shared keys": [],
}
WRONG = {"attention by place": [(0, 2), (1, 3), (1,)], "dense at first": [(2, 0)], "shared keys": [(0, 1), (2, 3)]}


@torch.no_grad()
@pytest.mark.parametrize("name", IRREGULAR)
def test_layers_of_an_irregular_stack_keep_their_kind_or_are_refused(name, tmp_path):
    """Each layer of the student gives the same output as the teacher's, after a reload too."""
    torch.manual_seed(0)
    config = IRREGULAR[name]()
    config.save_pretrained(tmp_path / "teacher")
    first = AutoModelForCausalLM.from_config(config).eval()
    weights = {key: tensor.clone() for key, tensor in first.state_dict().items()}

    def teacher():
        model = AutoModelForCausalLM.from_config(IRREGULAR[name]()).eval()
        model.load_state_dict(weights)
        return model

    for layers in RIGHT[name]:
        stack = layer_stack(teacher())[1]
        student = prune(teacher(), layers).eval()
        for new, layer in zip(layer_stack(student)[1], layers, strict=True):
            assert {n: type(part) for n, part in new.named_modules()} == {
                n: type(part) for n, part in stack[layer].named_modules()
            }
            for setting in ("use_rope", "attention_type", "sliding_window", "is_moe_layer"):
                for (_, a), (_, b) in zip(new.named_modules(), stack[layer].named_modules(), strict=True):
                    assert getattr(a, setting, None) == getattr(b, setting, None), setting
            for key, tensor in new.state_dict().items():
                assert torch.equal(tensor, stack[layer].state_dict()[key])
        folder = tmp_path / "-".join(map(str, layers))
        student.save_pretrained(folder)
        ids = torch.arange(3, 13)[None]
        again = AutoModelForCausalLM.from_pretrained(folder).eval()
        torch.testing.assert_close(again(input_ids=ids).logits, student(input_ids=ids).logits)
        _require_head(again)
    for layers in WRONG.get(name, []):
        with pytest.raises(StudentError, match="do not make a model of its architecture"):
            prune(teacher(), layers)


@pytest.mark.parametrize("name", IRREGULAR)
def test_what_can_not_be_pruned_is_told_without_weights(name):
    """Before a capture is paid for, only the configuration is known."""
    for layers in RIGHT[name]:
        require_prunable(blank_text_model(IRREGULAR[name](), Path()), layers, None)
    for layers in WRONG.get(name, []):
        with pytest.raises(StudentError, match="do not make a model of its architecture"):
            require_prunable(blank_text_model(IRREGULAR[name](), Path()), layers, None)


def test_what_can_not_be_narrowed_is_told_without_weights():
    require_prunable(blank_text_model(LlamaConfig(**SIZES), Path()), (0, 2), 16)
    gpt2 = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)
    with pytest.raises(StudentError, match="can't be made narrower"):
        require_prunable(blank_text_model(gpt2, Path()), None, 16)
