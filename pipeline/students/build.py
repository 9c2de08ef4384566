"""Builds students that are language models: from an existing model, some of the teacher's layers, or a configuration.

Checks that a student's architecture can be trained, and describes how it turns hidden states into logits, so that the
fused loss can do so chunk by chunk. Never trains.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from softlabel.pipeline.config.train import StudentConfig
from softlabel.pipeline.models.body import inner
from softlabel.pipeline.models.files import first_line
from softlabel.pipeline.models.multimodal import architecture_of, no_text_model, text_model
from softlabel.pipeline.models.pretrained import fresh_model, load_config
from softlabel.pipeline.models.pruning import narrow, prune, spread
from softlabel.pipeline.models.student_loading import load_or_raise, load_student_model, require_weights
from softlabel.pipeline.students.source import StudentSource
from softlabel.storage.errors import StudentError
from softlabel.storage.views.row_groups import load, outlines
from softlabel.storage.views.view import AnyTable

_PROBE_TOKENS = 6
"""Tokens of each of the two sequences that test which tokens a student's states depend on."""
CALIBRATION_TOKENS = 4096
"""Number of the table's tokens on which the activity of a teacher's neurons is measured."""


@dataclass(frozen=True)
class OutputHead:
    """How a model turns hidden states h into logits: cap(scale x (W h + bias)), with cap(z) = c tanh(z / c)."""

    weight: Tensor
    """(V, H), including padding rows."""
    bias: Tensor | None
    scale: float
    soft_cap: float | None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., H)."""
        hidden = hidden.to(self.weight.dtype)  # Mamba keeps its residual stream in float32
        logits = nn.functional.linear(hidden, self.weight, self.bias) * self.scale
        return logits if self.soft_cap is None else self.soft_cap * torch.tanh(logits / self.soft_cap)


def build(config: StudentConfig, table: AnyTable, source: StudentSource, packing: bool = False) -> PreTrainedModel:
    """The language model that the settings describe, on the CPU, ready for a table's labels.

    Args:
        config: settings of the student.
        table: the table that it has to fit.
        source: the files that it is made from, which ``require_fitting`` has checked.
        packing: whether sequences will share rows.

    Raises:
        StudentError: if it can't be loaded, if its output layer does not fit, or if its states depend on tokens that
            they must not depend on.
    """
    dtype = getattr(torch, config.dtype)
    student = _fresh(source, dtype) if config.config else pruned(_load(source.path, dtype), config, table)
    _require_head(student)
    _require_separation(student, packing)
    return student


def pruned(student: PreTrainedModel, config: StudentConfig, table: AnyTable) -> PreTrainedModel:
    """The model with only the layers and neurons that the settings keep; the table's text ranks the neurons."""
    if config.intermediate_size is not None:
        student = narrow(student, config.intermediate_size, _some_sequences(table))
    if config.depth is not None:
        student = prune(student, spread(config.depth, student.config.num_hidden_layers))
    if config.layers is not None:
        student = prune(student, config.layers)
    return student


def name_special_tokens(config: Any, tokenizer: Any) -> None:
    """Give a configuration the ids of a tokenizer's special tokens, except those that only the architecture needs."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        try:
            setattr(config, name, getattr(tokenizer, name))
        except Exception:  # transformers' own kind of error, for an architecture that can't be without this token
            if getattr(tokenizer, name) is not None:
                raise


def hidden_states(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """(rows, L, H) inputs of the output layer; those of packed sequences are independent if ``separates``.

    Args:
        model: a causal language model.
        input_ids: (rows, L) int64.
        position_ids: (rows, L) int64, restarting at 0 with each sequence.
    """
    body = inner(model, model.get_decoder())
    # With neither a cache nor a mask, transformers detects packed sequences by their position ids.
    hidden: Tensor = body(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
    return hidden


def separates(model: PreTrainedModel) -> bool:
    """Whether sequences that share a row are independent: not every architecture separates them by position ids."""
    positions = torch.arange(_PROBE_TOKENS).repeat(2)
    return not _depends(model, positions, slice(_PROBE_TOKENS, None), slice(_PROBE_TOKENS))


def output_head(model: PreTrainedModel) -> OutputHead:
    """The model's output layer, with the scale and soft cap of its configuration."""
    layer, config = model.get_output_embeddings(), model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    scale *= getattr(config, "lm_head_multiplier", None) or 1.0  # Falcon-H1
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
    soft_cap = getattr(config, "final_logit_softcapping", None)  # Gemma
    return OutputHead(layer.weight, getattr(layer, "bias", None), float(scale), soft_cap)


def parameters(model: nn.Module) -> int:
    """Number of parameters of a model; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _load(source: Path, dtype: torch.dtype) -> PreTrainedModel:
    config = load_or_raise(source, "configuration", lambda: load_config(source))
    if getattr(config, "quantization_config", None) is not None:
        raise StudentError(
            "a student can't be made from a quantized model",
            expected="weights in float32, bfloat16 or float16",
            found="a quantization_config",
            where=source / "config.json",
            do="use the same model without quantization",
        )
    model, wrong = load_student_model(architecture_of(config), source, dtype)
    require_weights(model, source, wrong)
    student = text_model(model)
    if config.get_text_config() is not config and student.config.get_text_config() is not student.config:
        raise no_text_model(type(model).__name__, config.get_text_config(), source)
    return student


def _fresh(source: StudentSource, dtype: torch.dtype) -> PreTrainedModel:
    folder, tokenizer = source.path, source.origin.tokenizer()
    config = load_or_raise(folder, "configuration", lambda: load_config(folder))
    name_special_tokens(config, tokenizer)
    return load_or_raise(folder, "model", lambda: fresh_model(AutoModelForCausalLM, config, dtype=dtype))


def _some_sequences(table: AnyTable) -> Iterator[Tensor]:
    """Token ids (L,) of the first train sequences, about CALIBRATION_TOKENS tokens in all."""
    tokens = 0
    for group, _ in outlines(table, ["key"], "train"):
        for ids in load(table, group, ["token_ids"]).column("token_ids"):
            if tokens >= CALIBRATION_TOKENS:
                return
            tokens += len(ids)
            yield torch.tensor(ids.values.to_numpy(), dtype=torch.int64)


@torch.no_grad()
def _require_head(student: PreTrainedModel) -> None:
    """Refuse a model whose logits ``output_head`` does not reproduce: it would be trained on wrong logits."""
    ids = torch.arange(8)[None]
    try:
        logits = student.eval()(input_ids=ids, use_cache=False).logits.float()
    except Exception as error:  # architectures fail in many different ways
        raise StudentError(
            "the student can't be run",
            expected=f"logits for {ids.numel()} tokens",
            found=f"{type(error).__name__}: {first_line(error)}",
            where=student.config.name_or_path or "student.config",
            do="correct its configuration, install the package that it needs, or choose another student",
        ) from error
    reproduced = output_head(student)(hidden_states(student, ids, ids)).float()
    tolerance = (0.03 if student.dtype == torch.bfloat16 else 1e-3) * float(logits.abs().max())
    difference = float((reproduced - logits).abs().max())
    if not difference <= tolerance:
        raise StudentError(
            f"{type(student).__name__} computes its logits in a way that the loss does not support",
            expected="logits = scale x (W h + bias), with the scale and soft cap of its configuration",
            found=f"logits that differ from these by up to {difference:.3g}",
            where=student.config.name_or_path or "student.config",
            do="choose a student of another architecture",
        )


def _require_separation(student: PreTrainedModel, packing: bool) -> None:
    """Refuse a student whose states depend on later tokens or on other sequences: it would silently learn from them."""
    ahead = _depends(student, torch.arange(2 * _PROBE_TOKENS), slice(_PROBE_TOKENS), slice(_PROBE_TOKENS, None))
    if ahead or (packing and not separates(student)):
        raise StudentError(
            f"{type(student).__name__} "
            + ("sees the tokens it has to predict" if ahead else "mixes the sequences that share a training row"),
            expected="a causal model" if ahead else "a model that keeps sequences that share a row separate",
            found=f"hidden states that depend on {'later tokens' if ahead else 'the sequence before'}",
            where=student.config.name_or_path or "student.config",
            do="choose a model that predicts the next token (a model like BERT does if its is_decoder is true)"
            if ahead
            else "set stream.packing false, so that each sequence gets its own padded row",
        )


def _depends(model: PreTrainedModel, positions: Tensor, states: slice, tokens: slice) -> bool:
    """Whether some hidden states of a row depend on some of its tokens, found by a gradient.

    Without a dependence the gradient is exactly 0 in any precision, so even the weak dependence of an untrained model
    is not taken for rounding. The tokens' embeddings are replaced by arbitrary numbers: a padding token's are 0, where
    some norms have no gradient.

    Args:
        model: a causal language model.
        positions: (L,) position ids of the row.
        states: positions of the states.
        tokens: positions of the tokens.
    """
    embedded: list[Tensor] = []

    def start_gradient(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        numbers = torch.arange(output.numel(), device=output.device).view_as(output).sin()
        embedded.append(numbers.to(output.dtype).requires_grad_())
        return embedded[0].clone()

    was_training, device = model.training, model.device
    hook = model.get_input_embeddings().register_forward_hook(start_gradient)
    try:
        with torch.enable_grad():
            ids = torch.arange(len(positions), device=device)[None]
            hidden = hidden_states(model.eval(), ids, positions[None].to(device))[0, states]
            # Sums and squares of normalized states are constant, so each state gets a weight of its own.
            factors = torch.linspace(-1, 1, hidden.numel(), device=device).view_as(hidden).sin()
            (gradient,) = torch.autograd.grad((hidden.float() * factors).sum(), embedded[0])
    finally:
        hook.remove()
        model.train(was_training)
    return bool(gradient[0, tokens].any())
