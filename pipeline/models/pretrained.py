"""All calls to the loaders of transformers and peft, for configurations, tokenizers and models, are in this module.

Code that comes with the files runs only if the user trusts it by a setting; there is never a prompt. Weights are read
from safetensors only.

Transformers and torch are imported on first use: together they take two seconds, and a capture that finds nothing to do
only compares the hashes of the teacher's files.
"""

import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from softlabel.pipeline.models.files import UntrustedCodeError
from softlabel.pipeline.models.tokenizer_rules import differing_rules

if TYPE_CHECKING:
    import torch

_ADAPTER = "adapter_config.json"
_TOKENIZER, _TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
_SCALE = re.compile(r"(weight|proj)\w*_(scales?|scale_inv|scale_2|zero_point)$")
"""Name of numbers by which quantized weights have to be multiplied, or which have to be taken from them."""
_MODULES_OF_CODE = "transformers_modules"
"""Package in which transformers puts code that comes with a model."""


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
    """A tokenizer with exactly the rules of its tokenizer.json, if it has one; see ``load_config``.

    Transformers builds many tokenizers anew, by the rules of a class that a setting or the kind of the model names. If
    these differ from the file's, the file is loaded as it is; only the special tokens that the class names are kept.

    Raises:
        ValueError: if transformers does not load the file as it is.
    """
    with _untrusted_code_errors(trust_remote_code):
        tokenizer = transformers().AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, **settings
        )
    file = Path(folder) / _TOKENIZER
    is_code = type(tokenizer).__module__.startswith(_MODULES_OF_CODE)
    if is_code or not file.is_file():
        return tokenizer
    rules = Tokenizer.from_file(str(file))
    if tokenizer.is_fast and not differing_rules(tokenizer.backend_tokenizer, rules, may_add=True):
        return tokenizer
    return _as_in_the_file(folder, rules, tokenizer)


def _as_in_the_file(folder: Path, rules: Tokenizer, tokenizer: Any) -> Any:
    """The tokenizer with these rules, and with the special tokens that another tokenizer names."""
    plain = transformers().PreTrainedTokenizerFast.from_pretrained(folder)
    for token in rules.get_added_tokens_decoder().values():  # other settings may have changed how they are found
        (plain.backend_tokenizer.add_special_tokens if token.special else plain.backend_tokenizer.add_tokens)([token])
    known = plain.get_vocab()
    for name, token in tokenizer.special_tokens_map.items():
        if name in plain.SPECIAL_TOKENS_ATTRIBUTES and getattr(plain, name) is None and token in known:
            setattr(plain, name, token)
    different = differing_rules(plain.backend_tokenizer, rules, may_add=True)
    if different:
        raise ValueError(f"transformers does not load {_TOKENIZER} as it is: {', '.join(different)} would differ")
    return plain


def keep_rules(folder: Path, tokenizer: Any) -> None:
    """Make sure that transformers loads this tokenizer, with the same rules, from a folder with its files.

    If transformers would apply the rules of a class instead, the folder's files are rewritten so that it does not.

    Raises:
        ValueError: if it does so in any case, because of the kind of the model in the folder.
    """
    if not _differing(folder, tokenizer):
        return
    path = folder / _TOKENIZER_CONFIG
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for name in ("auto_map", "added_tokens_decoder"):
        settings.pop(name, None)
    named = {name: getattr(tokenizer, name) for name in tokenizer.SPECIAL_TOKENS_ATTRIBUTES}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast"} | named
    path.write_text(json.dumps(settings, indent=2), encoding="utf-8")
    tokenizer.backend_tokenizer.save(str(folder / _TOKENIZER))
    different = _differing(folder, tokenizer)
    if different:
        raise ValueError(
            f"transformers replaces the rules of {_TOKENIZER} ({', '.join(different)}) by those of "
            f"{type(transformers().AutoTokenizer.from_pretrained(folder)).__name__}, whatever the tokenizer's files say"
        )


def rules_of_its_own(config: Any, tokenizer: Any) -> str | None:
    """Why transformers can't load this tokenizer for a finished model of this configuration; None if it can.

    For some kinds of models it has rules of its own, which replace those of any tokenizer.json.
    """
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        try:
            keep_rules(Path(folder), tokenizer)
        except ValueError as error:
            return str(error)
    return None


def _differing(folder: Path, tokenizer: Any) -> list[str]:
    """In what transformers' own way to load a folder's tokenizer differs from a tokenizer."""
    try:
        loaded = transformers().AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception:  # code that is not in the folder, a class that transformers does not know, ...
        return ["it can't be loaded"]
    if not loaded.is_fast:
        return ["the tokenizer's class"]
    different = differing_rules(loaded.backend_tokenizer, tokenizer.backend_tokenizer)
    names = [name for name in loaded.SPECIAL_TOKENS_ATTRIBUTES if getattr(loaded, name) != getattr(tokenizer, name)]
    return different + names


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
        Exception: if it can't be read, or has quantized weights that transformers would take as they are.
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
    scales = sorted(filter(_SCALE.search, loaded[1]["unexpected_keys"]))
    if scales:
        raise ValueError(
            f"its weights are quantized in a way that transformers does not know: it would leave out {len(scales)} "
            f"scales of weights, such as {scales[0]}"
        )
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
