"""The text model inside a model that also reads images or sound.

Transformers saves such models as wrappers around a text model. As teachers and as sources of students, only the text
model counts; the loaded weights are used as they are.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from softlabel.pipeline.models.pretrained import blank_model, transformers
from softlabel.storage.errors import StudentError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROBE = 8
"""Tokens whose logits are compared."""


def architecture_of(config: Any) -> Any:
    """Which of transformers' Auto classes loads a language model with this configuration as it was saved."""
    return (
        transformers().AutoModelForImageTextToText
        if _wrapper(config) in (config.architectures or [])
        else transformers().AutoModelForCausalLM
    )


def text_model(model: "PreTrainedModel") -> "PreTrainedModel":
    """The causal language model inside a wrapper, which shares its weights; any other model as it is.

    Also a wrapper is returned as it is if transformers has no class for its text model alone.
    """
    import torch

    config = model.config.get_text_config()
    kind = transformers().AutoModelForCausalLM._model_mapping.get(type(config), None)
    if type(model).__name__ != _wrapper(model.config) or kind is None:
        return model
    inside = [part for part in model.modules() if type(part) is kind]
    text: PreTrainedModel = inside[0] if inside else _assembled(kind, config, model)
    text.config.name_or_path = model.config.name_or_path
    if text.can_generate():
        text.generation_config = model.generation_config
    ids = torch.arange(_PROBE, device=model.device)[None]
    with torch.no_grad():
        same = torch.equal(text(input_ids=ids, use_cache=False).logits, model(input_ids=ids, use_cache=False).logits)
    return text if same else model


def blank_text_model(config: Any, source: Path) -> "PreTrainedModel":
    """The language model of a configuration, or of a wrapper's, without weights; see ``blank_model``.

    Raises:
        StudentError: if transformers has no class for the text model alone.
    """
    text, auto = config.get_text_config(), transformers().AutoModelForCausalLM
    if text is not config and type(text) not in auto._model_mapping:
        raise no_text_model(_wrapper(config) or type(config).__name__, text, source)
    model: PreTrainedModel = blank_model(auto, text)
    model.config.name_or_path = str(source)
    return model


def no_text_model(wrapper: str, text: Any, source: Path) -> StudentError:
    """The error for a wrapper whose text model can't be used alone."""
    return StudentError(
        "this model also reads images, and its text model can't be used alone",
        expected="a text model for which transformers has a class of its own",
        found=f"{wrapper}, with a {type(text).__name__}",
        where=source,
        do="start the student from another model; this one can only be a teacher",
    )


def _assembled(kind: Any, config: Any, model: "PreTrainedModel") -> "PreTrainedModel":
    """A language model of this kind, made of a wrapper's text model and output layer."""
    import torch

    with torch.device("meta"):  # all of its weights are replaced
        text: PreTrainedModel = kind(config)
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    setattr(text, text.base_model_prefix, decoder)
    text.set_output_embeddings(head)
    text.config.tie_word_embeddings = head.weight is decoder.get_input_embeddings().weight
    return text.eval()


def _wrapper(config: Any) -> str | None:
    """Name of the class for a configuration whose models also read images; None for text alone."""
    kind = transformers().AutoModelForImageTextToText._model_mapping.get(type(config), None)
    return None if kind is None or config.get_text_config() is config else kind.__name__
