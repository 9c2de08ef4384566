"""The rules by which a tokenizer turns text into ids: in which of them two tokenizers differ, and how to drop one."""

import json
from typing import Any

from tokenizers import Tokenizer

_FLAGS = ("id", "content", "single_word", "lstrip", "rstrip")
"""What decides where an added token is found in a text. (Whether it is special only decides if text can hide it.)"""
_SAMPLE = "a"


def differing_rules(ours: Tokenizer, theirs: Tokenizer, *, may_add: bool = False) -> list[str]:
    """Names of the rules, as in tokenizer.json, in which two tokenizers differ.

    Args:
        ours: a tokenizer.
        theirs: another one.
        may_add: whether the first may have further added tokens, which the second does not know.
    """
    if ours.to_str() == theirs.to_str():
        return []
    mine, yours = json.loads(ours.to_str()), json.loads(theirs.to_str())
    different = [name for name in ("normalizer", "pre_tokenizer") if mine[name] != yours[name]]
    if _model(mine) != _model(yours):
        different.append("model")
    flags = _FLAGS + (("normalized",) if mine["normalizer"] or yours["normalizer"] else ())
    added, expected = _added(mine, flags), _added(yours, flags)
    if expected - added or (not may_add and added - expected):
        different.append("added_tokens")
    if not different and _with_template(ours) != _with_template(theirs):
        different.append("post_processor")
    return different


def without_dummy_prefix(tokenizer: Tokenizer) -> Tokenizer | None:
    """The same tokenizer, but one that puts no space before a text, for text that continues other text.

    None if the tokenizer puts none there.
    """
    rules = json.loads(tokenizer.to_str())
    for name in ("normalizer", "pre_tokenizer"):
        rules[name] = _bare(rules[name])
    return None if rules == json.loads(tokenizer.to_str()) else Tokenizer.from_str(json.dumps(rules))


def _bare(rule: dict[str, Any] | None) -> dict[str, Any] | None:
    """A rule, and the rules inside it, without the space that it puts before a text; None if nothing else remains."""
    if rule is None:
        return None
    match rule:
        case {"type": "Prepend"}:
            return None
        case {"type": "Metaspace"}:
            return rule | {"prepend_scheme": "never"}
        case {"type": "ByteLevel", "add_prefix_space": True}:
            return rule | {"add_prefix_space": False}
        case {"type": "Sequence", "normalizers": parts}:
            return rule | {"normalizers": [part for part in map(_bare, parts) if part is not None]}
        case {"type": "Sequence", "pretokenizers": parts}:
            return rule | {"pretokenizers": [part for part in map(_bare, parts) if part is not None]}
    return rule


def _model(rules: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer's model without settings that have no effect; its vocabulary includes that of the added tokens."""
    model = {name: value for name, value in rules["model"].items() if value}
    if "unk_token" not in model:
        model.pop("fuse_unk", None)
    added = {token["content"] for token in rules["added_tokens"]}
    if isinstance(model.get("vocab"), dict):
        model["vocab"] = {token: id for token, id in model["vocab"].items() if token not in added}
    return model


def _added(rules: dict[str, Any], flags: tuple[str, ...]) -> set[tuple[Any, ...]]:
    return {tuple(token[flag] for flag in flags) for token in rules["added_tokens"]}


def _with_template(tokenizer: Tokenizer) -> list[int]:
    """A text's ids with those that are put around every text."""
    return list(tokenizer.encode(_SAMPLE).ids)
