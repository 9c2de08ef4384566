"""The student: a model to go on from, a teacher pruned to some of its layers, or a fresh one from a configuration.

Builds it, checks that it fits its table, and says how it turns hidden states into logits, so that a fused loss can do
the same in pieces. Never trains, and loads nothing but safetensors.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pipeline.pruning import narrow, prune, spread
from pipeline.student_config import StudentConfig
from storage.errors import StudentError, UsageError
from storage.groups import load, outlines
from storage.inspection import last_capture
from storage.view import AnyTable

T = TypeVar("T")

CALIBRATION_TOKENS = 4096
"""Tokens of the table on which the activity of a teacher's neurons is measured."""


@dataclass(frozen=True)
class OutputHead:
    """How a model turns hidden states h into logits: cap(scale x (W h + bias)), with cap(z) = c tanh(z / c)."""

    weight: Tensor
    """(V, H), padded rows included."""
    bias: Tensor | None
    scale: float
    soft_cap: float | None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., H)."""
        logits = nn.functional.linear(hidden, self.weight, self.bias) * self.scale
        return logits if self.soft_cap is None else self.soft_cap * torch.tanh(logits / self.soft_cap)


def build(config: StudentConfig, table: AnyTable) -> PreTrainedModel:
    """The student that the settings describe, on the CPU, ready for a table's labels.

    Raises:
        UsageError: unless exactly one place is named, or if the teacher has not so many layers or neurons.
        StudentError: if it can't be loaded, or its tokenizer, vocabulary or output layer does not fit.
    """
    require_one_source(config)
    dtype = getattr(torch, config.dtype)
    if config.config is not None:
        student = _fresh(config.config, table, dtype)
    else:
        student = from_weights(config, table, lambda source, revision: _load(source, dtype, revision))
    _require_vocabulary(student, table)
    _require_head(student)
    return student


def require_one_source(config: StudentConfig) -> None:
    """Refuse a student that comes from nowhere, or from two places.

    Raises:
        UsageError: unless exactly one place is named.
    """
    if len(config.given) != 1:
        raise UsageError(
            "a student comes from exactly one place",
            expected="one of student.model, student.layers, student.depth and student.config",
            found=", ".join(config.given) or "none of them",
            do="give a model to go on from, layers to keep of the teacher, or a configuration for a fresh model",
        )


def require_files(config: StudentConfig) -> None:
    """Refuse a student whose files are not there: at once, and not when a teacher has run for hours.

    Raises:
        UsageError: unless exactly one place is named.
        StudentError: if nothing is there that says what model it is.
    """
    require_one_source(config)
    source = config.model or config.config or config.teacher
    if source is not None:
        explained(source, "configuration", lambda: AutoConfig.from_pretrained(source, trust_remote_code=False))


def from_weights(
    config: StudentConfig, table: AnyTable, load: Callable[[str, str | None], PreTrainedModel]
) -> PreTrainedModel:
    """A model to go on from, or what the settings leave of the teacher.

    Args:
        config: of the student.
        table: whose tokenizer it has to have.
        load: makes a model of its folder or hub name and its revision.
    """
    named = config.model or config.teacher
    source, revision = (named, None) if named else _teacher_of(table)
    require_tokenizer(source, table, revision)
    student = load(source, revision)
    if config.intermediate_size is not None:
        student = narrow(student, config.intermediate_size, _some_sequences(table))
    if config.depth is not None:
        student = prune(student, spread(config.depth, student.config.num_hidden_layers))
    if config.layers is not None:
        student = prune(student, config.layers)
    return student


def hidden_states(model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    """(rows, L, H) states that the output layer would see; attention stays inside each packed sequence.

    Args:
        model: a causal language model.
        input_ids: (rows, L) int64.
        position_ids: (rows, L) int64, starting again at 0 with each sequence.
    """
    body = model.get_decoder()
    # Without a cache and a mask, transformers finds the packed sequences by their position ids.
    hidden: Tensor = body(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
    return hidden


def output_head(model: PreTrainedModel) -> OutputHead:
    """The model's output layer, with the scale and soft cap of its configuration."""
    layer, config = model.get_output_embeddings(), model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    scale *= getattr(config, "lm_head_multiplier", None) or 1.0  # Falcon-H1
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
    soft_cap = getattr(config, "final_logit_softcapping", None)  # Gemma
    return OutputHead(layer.weight, getattr(layer, "bias", None), float(scale), soft_cap)


def parameters(model: nn.Module) -> int:
    """Parameters of a model, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def require_tokenizer(source: str, table: AnyTable, revision: str | None = None) -> None:
    """Refuse a model whose tokenizer is not the one that made the table.

    Raises:
        StudentError: if its ids mean other tokens, or text becomes other ids.
    """
    theirs = explained(source, "tokenizer", lambda: AutoTokenizer.from_pretrained(source, revision=revision or "main"))
    ours = AutoTokenizer.from_pretrained(table.tokenizer)
    found, expected = theirs.get_vocab(), ours.get_vocab()
    if found != expected:
        other = {token for token, _ in found.items() ^ expected.items()}
        detail = f"{len(found)} tokens; {len(other)} differ, the first is {min(other)!r}"
    elif _rules(theirs) != _rules(ours):
        detail = "the same tokens, but other rules that split text into them"
    else:
        return
    raise StudentError(
        "the student's tokenizer is not the table's: its ids would mean other tokens",
        expected=f"the teacher's tokenizer, {len(expected)} tokens ({table.tokenizer})",
        found=detail,
        where=source,
        do="take a student of the teacher's family, prune the teacher (student.layers), or capture with a teacher "
        "that has this tokenizer",
    )


def _load(source: str, dtype: torch.dtype, revision: str | None) -> PreTrainedModel:
    student, report = explained(
        source,
        "model",
        lambda: AutoModelForCausalLM.from_pretrained(
            source,
            revision=revision or "main",
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        ),
    )
    if report["missing_keys"]:  # transformers would fill them with random numbers
        raise StudentError(
            "the student's files lack weights",
            expected=f"every weight of {type(student).__name__}",
            found=f"{len(report['missing_keys'])} missing, the first {min(report['missing_keys'])}",
            where=source,
            do="fetch or save the model again",
        )
    return student


def _fresh(source: str, table: AnyTable, dtype: torch.dtype) -> PreTrainedModel:
    config = explained(source, "configuration", lambda: AutoConfig.from_pretrained(source, trust_remote_code=False))
    tokenizer = AutoTokenizer.from_pretrained(table.tokenizer)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    return explained(source, "model", lambda: AutoModelForCausalLM.from_config(config, dtype=dtype))


def explained(source: str, what: str, load: Callable[[], T]) -> T:
    """The loaded thing, or an error that says where it was looked for."""
    try:
        return load()
    except (OSError, ValueError, KeyError) as error:
        raise StudentError(
            f"the student's {what} can't be loaded",
            expected="a folder, or a hub name, with config.json, *.safetensors and a tokenizer",
            found=str(error).strip().splitlines()[0] if str(error).strip() else repr(error),
            where=Path(source).absolute() if Path(source).exists() else source,
            do="check the path (student.teacher says where a teacher is now); a model that needs code of its own, or "
            "has no safetensors, is not loaded",
        ) from error


def _some_sequences(table: AnyTable) -> Iterator[Tensor]:
    """Token ids (L,) of the first sequences that students are trained on, about CALIBRATION_TOKENS of them."""
    tokens = 0
    for group, _ in outlines(table, ["key"], "train"):
        for ids in load(table, group, ["token_ids"]).column("token_ids"):
            if tokens >= CALIBRATION_TOKENS:
                return
            tokens += len(ids)
            yield torch.tensor(ids.values.to_numpy(), dtype=torch.int64)


def _teacher_of(table: AnyTable) -> tuple[str, str | None]:
    """Where the table's teacher was when it was last captured from, and the revision of a hub model."""
    captures = [last_capture(part) for part in table.tables]
    named = list({(capture["teacher"], capture.get("revision")) for capture in captures if "teacher" in capture})
    if len(named) == 1:
        return named[0]
    raise UsageError(
        "the table does not say which teacher is meant" if named else "the table does not say where its teacher is",
        expected="student.teacher, beside student.layers",
        found=", ".join(sorted(name for name, _ in named)) or "neither that nor a teacher in the table's history",
        where=table.location,
        do="name the teacher's folder with student.teacher",
    )


def _rules(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Hash of what turns text into ids, without the padding and truncation that a call may have left behind."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    rules = {key: value for key, value in json.loads(backend.to_str()).items() if key not in ("padding", "truncation")}
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()


def _require_vocabulary(student: PreTrainedModel, table: AnyTable) -> None:
    rows = student.get_output_embeddings().weight.shape[0]
    identity = table.tables[0].identity
    if rows < identity.vocabulary:
        raise StudentError(
            "the student has no room for the table's vocabulary",
            expected=f"at least {identity.vocabulary} rows in its output layer (more are padding)",
            found=rows,
            where=student.config.name_or_path or "student.config",
            do=f"set vocab_size to {identity.padded_vocabulary} in its configuration",
        )


@torch.no_grad()
def _require_head(student: PreTrainedModel) -> None:
    """A kind of model whose logits are made otherwise would silently be trained on wrong ones."""
    ids = torch.arange(8)[None]
    logits = student.eval()(input_ids=ids, use_cache=False).logits.float()
    ours = output_head(student)(hidden_states(student, ids, ids)).float()
    tolerance = (0.03 if student.dtype == torch.bfloat16 else 1e-3) * float(logits.abs().max())
    difference = float((ours - logits).abs().max())
    if not difference <= tolerance:
        raise StudentError(
            f"{type(student).__name__} makes its logits in a way that the loss does not know",
            expected="scale x (W h + bias), soft-capped, as its configuration says",
            found=f"logits that differ by up to {difference:.3g}",
            where=student.config.name_or_path or "student.config",
            do="take a student of another architecture",
        )
