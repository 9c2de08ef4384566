"""The one door through which transformers and peft load files: configurations, tokenizers, models.

Code that comes with the files is run if the user has said that it is trusted, and only then; nobody is ever asked. Of
weights, only safetensors are read.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, dynamic_module_utils

from softlabel.pipeline.models.files import UntrustedCodeError

# For so many seconds, transformers would ask on the terminal whether to run code: that of a model inside a model even
# if it was told for the whole. A line that was piped in for something else would be its answer.
dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0

_ADAPTER = "adapter_config.json"


def load_config(path: Path, *, trust_remote_code: bool = False, **settings: Any) -> Any:
    """A model's configuration.

    Args:
        path: folder, or the JSON file itself.
        trust_remote_code: whether code that comes with it may be run.
        settings: in the place of its own.

    Raises:
        UntrustedCodeError: if it needs code that is not trusted.
        Exception: if it can't be read.
    """
    with _refusing(trust_remote_code):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **settings)
    if not trust_remote_code:
        for part in _parts(config):
            vars(part).pop("auto_map", None)  # what is within is of a kind that transformers has, or can't be loaded
    return config


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False, **settings: Any) -> Any:
    """A tokenizer; see ``load_config``."""
    with _refusing(trust_remote_code):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, **settings)


def load_model(
    architecture: Any, folder: Path, *, trust_remote_code: bool = False, **settings: Any
) -> tuple[Any, dict[str, Any]]:
    """A model with the weights of its safetensors, and transformers' report of what these lack.

    Args:
        architecture: one of transformers' Auto classes.
        folder: with configuration and weights.
        trust_remote_code: whether code that comes with them may be run.
        settings: of transformers' ``from_pretrained``.

    Raises:
        UntrustedCodeError: if it needs code that is not trusted.
        Exception: if it can't be read.
    """
    if (folder / _ADAPTER).exists():
        raise ValueError(
            f"an adapter ({_ADAPTER}) is in the model's folder and would be applied to it: merge it or move it away"
        )
    with _refusing(trust_remote_code):
        loaded: tuple[Any, dict[str, Any]] = architecture.from_pretrained(
            folder,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            **settings,
        )
    return loaded


def fresh_model(
    architecture: Any, config: Any, *, trust_remote_code: bool = False, dtype: torch.dtype | None = None
) -> Any:
    """A model with random weights; see ``load_model``."""
    with _refusing(trust_remote_code):
        return architecture.from_config(config, trust_remote_code=trust_remote_code, dtype=dtype)


def load_adapter_config(folder: Path) -> Any:
    """What a peft adapter is.

    Raises:
        Exception: if it can't be read.
    """
    from peft import PeftConfig  # only an adapter needs it

    return PeftConfig.from_pretrained(str(folder))


def _parts(config: Any) -> Iterator[PreTrainedConfig]:
    """Configurations of the models within a model, however deep."""
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            yield part
            yield from _parts(part)


@contextmanager
def _refusing(trust_remote_code: bool) -> Iterator[None]:
    """Tell transformers' refusal to run code from its other errors."""
    try:
        yield
    except ValueError as error:
        if trust_remote_code or "trust_remote_code" not in str(error):
            raise
        raise UntrustedCodeError from error
