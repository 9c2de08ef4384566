"""Makes a finished student's folder work in other programs: its end tokens, and settings where transformers 4 looks.

Transformers 5 renamed settings in config.json and tokenizer_config.json. Servers that are built on transformers 4 would
silently compute with defaults instead of them, so the older names are written as well.
"""

import json
import warnings
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from softlabel.pipeline.models.pretrained import load_config
from softlabel.storage.views.row_groups import load, outlines
from softlabel.storage.views.view import AnyTable

_GROUPS = 4
"""Row groups that are searched for the token with which documents end."""
_NESTED = {
    "full_attention": ("rope_theta", "global_rope_theta"),
    "sliding_attention": ("rope_local_base_freq", "local_rope_theta"),
}
"""Older names of the base frequency, for architectures with one for each kind of attention."""
_ONE_FREQUENCY = ("modernbert-decoder",)
"""Kinds of models with two base frequencies, of which transformers 4 uses that of full attention everywhere."""


def name_end_tokens(student: PreTrainedModel, table: AnyTable, tokenizer: Any) -> None:
    """Let generation end where the student has learned to end, which may differ from where its source did.

    These are the tokenizer's end token, and the special token that most documents of the table end with (that of a
    turn, in chats). If the source ended at further tokens besides, they are kept.
    """
    if not student.can_generate():
        return
    ends = {token for token in (tokenizer.eos_token_id, _last_token(table, tokenizer)) if token is not None}
    before = student.generation_config.eos_token_id
    known = set(before) if isinstance(before, list) else {before}
    own = sorted(ends | known if ends <= known else ends)
    if own:
        named = own[0] if len(own) == 1 else own
        student.generation_config.eos_token_id = student.config.eos_token_id = named


def _last_token(table: AnyTable, tokenizer: Any) -> int | None:
    """The special token that most of the first documents end with; None if they end with ordinary tokens."""
    counts: Counter[int] = Counter()
    for group, _ in islice(outlines(table, ["key"]), _GROUPS):
        rows = load(table, group, ["token_ids", "loss_mask", "chunk", "chunks"]).to_pylist()
        for row in rows:
            wanted = [token for token, mask in zip(row["token_ids"], row["loss_mask"], strict=True) if mask]
            if row["chunk"] == row["chunks"] - 1 and wanted:
                counts[wanted[-1]] += 1
    [(token, count)] = counts.most_common(1) or [(0, 0)]
    added = tokenizer.added_tokens_decoder.get(token)
    return token if 2 * count > counts.total() and added is not None and added.special else None


def write_older_names(folder: Path) -> None:
    """Add the names of transformers 4 to a student's config.json and tokenizer_config.json.

    Warns if transformers 4 computes something else than transformers 5 whatever the files say.
    """
    path = folder / "config.json"
    before, settings = _read(folder), json.loads(path.read_text(encoding="utf-8"))
    _write(path, _aliases(folder, settings) | settings | _older_rope(settings) | _older_dtype(settings))
    if not _reads_as(before, folder):  # an architecture for which these names mean something else
        _write(path, settings)
    _warn_of_one_frequency(settings)
    path = folder / "tokenizer_config.json"
    if path.is_file():
        tokenizer = json.loads(path.read_text(encoding="utf-8"))
        if tokenizer.get("tokenizer_class") == "TokenizersBackend":
            tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
        if isinstance(tokenizer.get("extra_special_tokens"), list):
            tokenizer["additional_special_tokens"] = tokenizer.pop("extra_special_tokens")
        _write(path, tokenizer)


def _read(folder: Path) -> tuple[Any, ...]:
    """What transformers reads from a folder for the settings whose older names are added."""
    config = load_config(folder)
    rope = getattr(config, "rope_parameters", None) or {}
    return {name: value for name, value in rope.items() if name != "type"}, config.dtype  # an older name of rope_type


def _reads_as(expected: tuple[Any, ...], folder: Path) -> bool:
    try:
        return _read(folder) == expected
    except Exception:  # some architectures check their settings, and refuse names that they don't have
        return False


def _warn_of_one_frequency(settings: dict[str, Any]) -> None:
    rope = settings.get("rope_parameters") or {}
    full, sliding = ((rope.get(kind) or {}).get("rope_theta") for kind in _NESTED)
    if settings["model_type"] in _ONE_FREQUENCY and full != sliding:
        warnings.warn(
            "transformers 4, and servers that are built on it, compute other logits with this student: for model_type "
            f"{settings['model_type']}, they also use the base frequency of full attention ({full:g}) in sliding "
            f"attention, where the student has {sliding:g}. Serve it with transformers 5.",
            stacklevel=2,
        )


def _aliases(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings by further names that the architecture knows them by, such as the number of experts."""
    return {other: settings[name] for other, name in load_config(folder).attribute_map.items() if name in settings}


def _older_rope(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of the rotary embeddings by their older names."""
    rope = settings.get("rope_parameters") or {}
    if not any(isinstance(value, dict) for value in rope.values()):
        older = _older(rope, ("rope_theta",))
        if settings["model_type"].startswith("gpt_neox"):
            older |= {"rotary_emb_base": rope.get("rope_theta"), "rotary_pct": rope.get("partial_rotary_factor")}
        return older
    named: dict[str, Any] = {}
    for kind, names in _NESTED.items():
        older = _older(rope.get(kind) or {}, names)
        if kind == "sliding_attention":  # transformers 4 never scales it
            older.pop("rope_scaling", None)
        named |= older
    return named


def _older(rope: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    base, part = rope.get("rope_theta"), rope.get("partial_rotary_factor")
    older = {} if base is None else dict.fromkeys(names, base)
    if part is not None:
        older["partial_rotary_factor"] = part
    if rope.get("rope_type", "default") != "default":
        scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
        if scaling["rope_type"] == "longrope":  # Phi-3's was checked for having these three fields
            scaling = {"type": scaling.pop("rope_type"), **scaling}
            if trained := scaling.pop("original_max_position_embeddings", None):
                older["original_max_position_embeddings"] = trained
        older["rope_scaling"] = scaling
    return older


def _older_dtype(settings: dict[str, Any]) -> dict[str, Any]:
    return {"torch_dtype": settings["dtype"]} if isinstance(settings.get("dtype"), str) else {}


def _write(path: Path, settings: dict[str, Any]) -> None:
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
