"""Students: their sources, the checks against their table, and how they compute their logits."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from pydantic import ValidationError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
    DeepseekV3Config,
    FalconConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    Lfm2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    ModernBertDecoderConfig,
    OPTConfig,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from softlabel.pipeline.config.train import StreamConfig, StudentConfig
from softlabel.pipeline.stream.dataset import SoftLabelDataset
from softlabel.pipeline.students import build as student
from softlabel.storage.errors import StudentError, UsageError
from tests.pipeline.building import built
from tests.pipeline.captured import PADDED, make_table
from tests.pipeline.damages import DAMAGES, damaged
from tests.pipeline.streams import unpacked

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "untied, with a bias": lambda: _with_bias(LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False))),
    "gemma2, soft-capped": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=1.5)),
    "granite, scaled": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=8.0)),
    "smollm3, settings by layer": lambda: SmolLM3ForCausalLM(SmolLM3Config(**SIZES)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=4, n_head=4, n_positions=64)),
}


def _with_bias(model):
    model.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, 64))
    return model


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def table(tmp_path_factory, tiny_teacher):
    return make_table(tmp_path_factory.mktemp("student") / "table", tiny_teacher, train=4, held_out=0)


@pytest.fixture(params=FAMILIES, scope="module")
def model(request):
    torch.manual_seed(0)
    return FAMILIES[request.param]().eval()


@torch.no_grad()
def test_hidden_states_and_head_give_the_models_own_logits(model):
    ids = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(12).expand(2, 12)
    ours = student.output_head(model)(student.hidden_states(model, ids, positions))
    torch.testing.assert_close(ours, model(input_ids=ids).logits)


@torch.no_grad()
def test_packed_sequences_do_not_see_each_other(model):
    assert student.separates(model)
    ids = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(1))
    packed = student.hidden_states(model, ids, torch.tensor([[*range(5), *range(7)], [*range(9), *range(3)]]))
    for row, first, last in ((0, 0, 5), (0, 5, 12), (1, 0, 9), (1, 9, 12)):
        alone = student.hidden_states(model, ids[row : row + 1, first:last], torch.arange(last - first)[None])
        torch.testing.assert_close(packed[row, first:last], alone[0], rtol=1e-4, atol=1e-5)


WIDTH = {"vocab_size": PADDED, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = {**WIDTH, "num_attention_heads": 4}
LAYERS = {"num_key_value_heads": 2, "intermediate_size": 48, "layer_types": ["conv", "full_attention"]}
SHARING = {
    "recurrent": lambda: MambaConfig(**WIDTH, state_size=4),
    "convolutions": lambda: Lfm2Config(**HEADS, **LAYERS),
    "a mask of its own": lambda: FalconConfig(**HEADS),
    "learned positions": lambda: OPTConfig(**HEADS, ffn_dim=32, word_embed_proj_dim=32),
}


@pytest.mark.parametrize("family", SHARING)
def test_packed_sequences_that_see_each_other_are_refused_and_padded_ones_are_not(family, table, tmp_path):
    SHARING[family]().save_pretrained(tmp_path)
    for dtype in ("bfloat16", "float32"):
        with pytest.raises(
            StudentError, match=r"(?s)mixes the sequences that share a training row.*set stream\.packing false"
        ):
            built(StudentConfig(config=str(tmp_path), dtype=dtype), table, packing=True)
    model = built(StudentConfig(config=str(tmp_path)), table).eval()
    (batch,) = SoftLabelDataset(table, StreamConfig(packing=False))
    with torch.no_grad():
        padded = student.hidden_states(model, batch.input_ids, batch.position_ids).flatten(0, 1)[batch.positions]
        alone = []
        for row in unpacked(batch):
            ids = torch.tensor([row["ids"]])
            alone.append(student.hidden_states(model, ids, torch.arange(ids.shape[1])[None])[0, list(row["from"])])
    torch.testing.assert_close(padded, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_a_student_that_sees_the_tokens_it_has_to_predict_is_refused():
    with pytest.raises(StudentError, match="sees the tokens it has to predict"):
        student._require_separation(BertLMHeadModel(BertConfig(**HEADS, intermediate_size=48)), packing=False)


def test_a_causal_model_whose_norms_have_no_gradient_at_a_padding_token_is_accepted():
    """A padding token's embedding is 0."""
    config = Gemma3nTextConfig(
        **SIZES,
        vocab_size_per_layer_input=64,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=0,
        laurel_rank=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        activation_sparsity_pattern=[0.0] * 4,
    )
    student._require_separation(Gemma3nForCausalLM(config), packing=True)


def test_a_model_that_names_its_output_layer_as_its_decoder_is_refused_for_its_logits(table, tmp_path):
    ModernBertDecoderConfig(**HEADS, pad_token_id=0).save_pretrained(tmp_path)
    with pytest.raises(StudentError, match="computes its logits in a way that the loss does not support"):
        built(StudentConfig(config=str(tmp_path)), table)


def test_a_student_that_can_not_be_run_is_an_error_that_says_why(table, tmp_path):
    """As where an architecture needs a package for its layers, or its configuration contradicts itself."""
    sizes = {name: WIDTH[name] for name in ("vocab_size", "num_hidden_layers")}
    config = DeepseekV3Config(**sizes, num_attention_heads=4, num_key_value_heads=1, hidden_size=32, q_lora_rank=None)
    config.save_pretrained(tmp_path)
    with pytest.raises(StudentError, match=r"(?s)the student can't be run.*RuntimeError: The size of tensor"):
        built(StudentConfig(config=str(tmp_path)), table)


def test_layers_come_from_the_teacher_that_the_table_names(table, tiny_teacher):
    pruned = built(StudentConfig(layers=(1,)), table)
    teacher = AutoModelForCausalLM.from_pretrained(tiny_teacher, dtype=torch.float32)
    assert torch.equal(pruned.model.layers[0].mlp.up_proj.weight, teacher.model.layers[1].mlp.up_proj.weight)
    assert student.parameters(pruned) < student.parameters(teacher)


def test_layers_and_neurons_are_pruned_to_the_requested_sizes(table):
    whole = built(StudentConfig(depth=2), table)
    narrow = built(StudentConfig(depth=2, intermediate_size=100), table)
    assert (whole.config.num_hidden_layers, narrow.config.num_hidden_layers) == (2, 2)
    assert student.parameters(whole) - student.parameters(narrow) == 2 * 3 * 28 * 64


def test_only_a_pruned_teacher_is_narrowed():
    with pytest.raises(ValidationError, match="give layers or depth"):
        StudentConfig(model="a", intermediate_size=8)


def test_a_model_with_other_padding_rows_is_accepted(table, tiny_teacher, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_teacher, dtype=torch.float32)
    model.resize_token_embeddings(PADDED + 64)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_teacher).save_pretrained(tmp_path)
    found = built(StudentConfig(model=str(tmp_path), dtype="bfloat16"), table)
    assert student.output_head(found).weight.shape == (PADDED + 64, 64)
    assert found.dtype == torch.bfloat16


def test_a_configuration_gives_a_new_random_model(table, tmp_path):
    LlamaConfig(**{**SIZES, "vocab_size": PADDED}).save_pretrained(tmp_path)
    for source in (tmp_path, tmp_path / "config.json"):
        found = built(StudentConfig(config=str(source)), table)
        assert found.config.num_hidden_layers == 4
        assert found.config.eos_token_id == AutoTokenizer.from_pretrained(table.tokenizer).eos_token_id


def test_a_vocabulary_smaller_than_the_tables_is_refused(table, tmp_path):
    LlamaConfig(**SIZES).save_pretrained(tmp_path)
    with pytest.raises(StudentError, match="at least 500 rows") as error:
        built(StudentConfig(config=str(tmp_path)), table)
    assert "set vocab_size to 512" in str(error.value)


@pytest.mark.parametrize("given", [{}, {"model": "a", "layers": (0,)}, {"depth": 2, "config": "b"}])
def test_zero_or_several_sources_of_a_student_are_refused(given, table):
    with pytest.raises(UsageError, match="exactly one setting"):
        built(StudentConfig(**given), table)


def test_another_vocabulary_of_equal_size_is_refused(table, tiny_teacher, tmp_path):
    shutil.copytree(tiny_teacher, tmp_path / "model")
    file = tmp_path / "model" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(StudentError) as error:
        built(StudentConfig(model=str(tmp_path / "model")), table)
    for message in ("expected:", "500 tokens", "2 differ", str(tmp_path / "model"), "what to do:"):
        assert message in str(error.value)


def test_the_same_vocabulary_with_other_splitting_rules_is_refused(table, tiny_teacher, tmp_path):
    shutil.copytree(tiny_teacher, tmp_path / "model")
    file = tmp_path / "model" / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["pre_tokenizer"]["add_prefix_space"] = True
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(StudentError, match="different rules"):
        built(StudentConfig(model=str(tmp_path / "model")), table)


@pytest.mark.parametrize("missing", ["tokenizer.json", "model.safetensors", "config.json"])
def test_a_model_with_a_missing_file_is_refused(missing, table, tiny_teacher, tmp_path):
    shutil.copytree(tiny_teacher, tmp_path / "model")
    (tmp_path / "model" / missing).unlink()
    with pytest.raises(StudentError) as error:
        built(StudentConfig(model=str(tmp_path / "model")), table)
    assert str(tmp_path / "model") in str(error.value)


def test_pickled_weights_are_not_loaded(table, tiny_teacher, tmp_path):
    shutil.copytree(tiny_teacher, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(StudentError, match="can't be loaded"):
        built(StudentConfig(model=str(tmp_path / "model")), table)


def test_an_adapter_next_to_a_model_is_not_loaded_silently(table, tiny_teacher, tmp_path):
    shutil.copytree(tiny_teacher, tmp_path / "model")
    adapter = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_teacher), LoraConfig(init_lora_weights=False))
    adapter.save_pretrained(tmp_path / "model")
    with pytest.raises(StudentError, match=r"adapter_config\.json"):
        built(StudentConfig(model=str(tmp_path / "model")), table)


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_damaged_weights_are_refused(damage, message, table, tiny_teacher, tmp_path):
    damaged(tiny_teacher, tmp_path / "model", damage)
    with pytest.raises(StudentError, match=message):
        built(StudentConfig(model=str(tmp_path / "model")), table)


def test_missing_weights_are_refused_and_not_initialized_at_random(table, tiny_teacher, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_teacher, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights = load_file(file)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(StudentError, match="lack some of its weights"):
        built(StudentConfig(model=str(tmp_path / "model")), table)


def test_a_model_with_an_unsupported_computation_of_logits_is_refused():
    config = Gemma2Config(**{**SIZES, "vocab_size": PADDED}, final_logit_softcapping=1.5)
    model = Gemma2ForCausalLM(config)
    student._require_head(model)
    head = model.lm_head.forward
    model.lm_head.forward = lambda hidden: 1.1 * head(hidden)
    with pytest.raises(StudentError, match="in a way that the loss does not support"):
        student._require_head(model)
