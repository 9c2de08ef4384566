"""All calls to the loaders of transformers and peft, for configurations, tokenizers and models, are in this module.

Code that comes with the files runs only if the user trusts it by a setting; there is never a prompt. Weights are read
from safetensors only.

Transformers and torch are imported on first use: together they take two seconds, and a capture that finds nothing to do
only compares the hashes of the teacher's files.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softlabel.pipeline.models.files import UntrustedCodeError

if TYPE_CHECKING:
    import torch

_ADAPTER = "adapter_config.json"


def transformers() -> Any:
    """The library."""
    import transformers

    return transformers


def load_config(path: Path, *, trust_remote_code: bool = False, **settings: Any) -> Any:
    """A model's configuration.

    Args:
        path: folder, or the JSON file itself.
        trust_remote_code: whether code that comes with it may run.
        settings: values that replace the configuration's own.

    Raises:
        UntrustedCodeError: if it needs code that is not trusted.
        Exception: if it can't be read.
    """
    with _untrusted_code_errors(trust_remote_code):
        config = transformers().AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, **settings)
    if not trust_remote_code:
        for part in _parts(config):
            vars(part).pop("auto_map", None)  # inner models must be of a kind that transformers has
    return config


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False, **settings: Any) -> Any:
    """A tokenizer; see ``load_config``."""
    with _untrusted_code_errors(trust_remote_code):
        return transformers().AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, **settings)


def load_model(
    architecture: Any, folder: Path, *, trust_remote_code: bool = False, **settings: Any
) -> tuple[Any, dict[str, Any]]:
    """A model with weights from safetensors, and transformers' report of missing and mismatched weights.

    Args:
        architecture: one of transformers' Auto classes.
        folder: folder with the configuration and the weights.
        trust_remote_code: whether code that comes with them may run.
        settings: further arguments of transformers' ``from_pretrained``.

    Raises:
        UntrustedCodeError: if it needs code that is not trusted.
        MemoryError: if the device does not have enough memory.
        Exception: if it can't be read.
    """
    import torch

    if (folder / _ADAPTER).exists():
        raise ValueError(
            f"an adapter ({_ADAPTER}) is in the model's folder and would be applied to it: merge it or move it away"
        )
    try:
        with _untrusted_code_errors(trust_remote_code):
            loaded: tuple[Any, dict[str, Any]] = architecture.from_pretrained(
                folder,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
                **settings,
            )
    except torch.OutOfMemoryError as error:
        raise MemoryError(str(error)) from error
    return loaded


def fresh_model(
    architecture: Any, config: Any, *, trust_remote_code: bool = False, dtype: "torch.dtype | None" = None
) -> Any:
    """A model with random weights; see ``load_model``."""
    with _untrusted_code_errors(trust_remote_code):
        return architecture.from_config(config, trust_remote_code=trust_remote_code, dtype=dtype)


def blank_model(architecture: Any, config: Any, *, trust_remote_code: bool = False) -> Any:
    """A model without weights, which takes no memory; see ``load_model``."""
    import torch

    with torch.device("meta"):
        return fresh_model(architecture, config, trust_remote_code=trust_remote_code)


def load_adapter_config(folder: Path) -> Any:
    """The configuration of a peft adapter.

    Raises:
        Exception: if it can't be read.
    """
    from peft import PeftConfig  # imported here: only an adapter needs it

    return PeftConfig.from_pretrained(str(folder))


def _parts(config: Any) -> Iterator[Any]:
    """Configurations of the models inside a model, at any depth."""
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if isinstance(part, transformers().PreTrainedConfig):
            yield part
            yield from _parts(part)


@contextmanager
def _untrusted_code_errors(trust_remote_code: bool) -> Iterator[None]:
    """Turn transformers' refusal to run code into an UntrustedCodeError; other errors pass."""
    from transformers import dynamic_module_utils

    # Transformers would otherwise ask on the terminal whether to run code, and wait this many seconds: for a model
    # inside a model even if the setting is given for the whole. It would read any piped input as the answer.
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    try:
        yield
    except ValueError as error:
        if trust_remote_code or "trust_remote_code" not in str(error):
            raise
        raise UntrustedCodeError from error
