"""Pruned teachers have the right layers and neurons, and give the same logits after a reload."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from softlabel.pipeline.models.pruning import narrow, prune, spread
from softlabel.pipeline.students.build import parameters
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
