"""Refuses a capture that would not match its table, with each difference and the flag that would match."""

from collections.abc import Mapping
from typing import Any

from softlabel.pipeline.config.capture import CONTENT_COLUMNS, HEAD_AND_TAIL, CaptureConfig
from softlabel.pipeline.config.flags import as_flag, flag_of, shown
from softlabel.pipeline.config.table_settings import TURNS, table_settings
from softlabel.storage.identity import Identity
from softlabel.storage.table import Table

_NAMED_DIFFERENTLY = {
    "temperatures": "selection.temperatures",
    "tail_logprobs": "selection.tail_logprobs",
    "sequences.eval_fraction": "shards.eval_fraction",
    "tokenizer.chat_template_date": "sequences.chat_template_date",
    "tokenizer.chat_template_kwargs": "sequences.chat_template_kwargs",
}
"""Fields of the identity whose settings have other names."""


def require_match(table: Table, identity: Identity, config: CaptureConfig) -> None:
    """Refuse a capture whose rows would not be comparable with the table's.

    Args:
        table: to add to.
        identity: of the capture.
        config: the complete settings of the capture.

    Raises:
        ProvenanceError: with each difference.
    """
    ours, theirs = tuple(table.carried.names), config.columns.carry
    differences = table.identity.differences(identity)
    if not differences and ours == theirs:
        return
    known = table_settings(table)
    flags = {name: _matching_flags(name, table.identity, known, config) for name in differences}
    carried = []
    if ours != theirs:
        match = as_flag("columns.carry", ours)
        carried = [f"columns.carry: the table has {shown(ours)}, this run {shown(theirs)} (to match: {match})"]
    table.identity.require(identity, table.location, flags, carried)


def _matching_flags(name: str, identity: Identity, known: Mapping[str, Any], config: CaptureConfig) -> str:
    selection, top_k = identity.selection, config.selection.top_k
    if name.partition(".")[2] in HEAD_AND_TAIL and top_k is not None and name in known:
        if (selection.top_p, selection.min_k, selection.draws) == (1.0, selection.max_k, 0):
            return as_flag("selection.top_k", selection.max_k)
        return f"{as_flag(name, known[name])} instead of {as_flag('selection.top_k', top_k)}"
    if name == "sequences.mask":
        return _flags_for_content(identity.sequences.mask, known, config)
    setting = _NAMED_DIFFERENTLY.get(name, name)
    if setting == "classes" and "teacher.labels" in known:
        setting = "teacher.labels"
    if setting.endswith(".py"):
        return as_flag("teacher.trust_remote_code", True)
    if setting == "teacher.adapter" and setting not in known:
        hint = "with the adapter that the table's teacher had" if identity.teacher.adapter else "left out"
        return f"{flag_of(setting)} {hint}"
    if setting in known:
        return as_flag(setting, known[setting])
    if setting == "sequences.chat_template_kwargs":
        return f"{flag_of(setting)} left out"
    if name.startswith("derived_from"):
        return ""
    model = known.get("teacher.model")
    if model is None or model == config.teacher.model:
        return f"{flag_of('teacher.model')} with the files that made the table"
    return as_flag("teacher.model", model)


def _flags_for_content(mask: str, known: Mapping[str, Any], config: CaptureConfig) -> str:
    """The flags for documents like the table's: the columns of their content, or the turns of a chat."""
    if mask in TURNS and config.columns.content == "chat":
        return as_flag("sequences.assistant_turns", TURNS[mask])
    columns = [f"columns.{name}" for name in CONTENT_COLUMNS]
    return " ".join(as_flag(name, known[name]) for name in columns if name in known)
