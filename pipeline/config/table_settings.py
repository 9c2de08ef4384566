"""The settings of a capture that its table determines: what a later capture takes for those that are left out.

Most are part of the table's identity. Where the teacher is, and the names of the documents' columns, are only in the
record of the newest capture; they may be given differently each time.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ValidationError

from softlabel.pipeline.config.base import summary
from softlabel.pipeline.config.capture import (
    CONTENT_COLUMNS,
    HEAD_AND_TAIL,
    CaptureConfig,
    ColumnsConfig,
    TeacherConfig,
)
from softlabel.pipeline.config.flags import as_flag, shown
from softlabel.storage.errors import IntegrityError, UsageError
from softlabel.storage.identity import Identity, SelectionIdentity
from softlabel.storage.table import Table
from softlabel.storage.upkeep.inspection import last_capture

_SECTIONS = ("teacher", "columns", "sequences", "selection", "shards")
TURNS = {"assistant": "all", "last_assistant": "last"}
"""sequences.assistant_turns, by the rule that marks a chat's captured tokens."""


class _Recorded(BaseModel):
    """What the newest capture recorded of its settings; what it did not record is not given."""

    teacher: str | None = None
    revision: str | None = None
    adapter: str | None = None
    engine: str | None = None
    columns: ColumnsConfig = ColumnsConfig()

    @classmethod
    def of(cls, table: Table) -> Self:
        """The record in the table's history.

        Raises:
            IntegrityError: if it is damaged.
        """
        message = last_capture(table)
        try:
            columns, teacher = message.config.get("columns", {}), message.config.get("teacher", {})
            return cls(
                teacher=message.teacher,
                revision=message.revision,
                adapter=teacher.get("adapter"),
                engine=teacher.get("engine"),
                columns=ColumnsConfig(
                    **{name: columns[name] for name in ColumnsConfig.model_fields if name in columns}
                ),
            )
        except (ValidationError, AttributeError, TypeError) as error:
            raise IntegrityError(
                "the table's log is damaged: the settings of its newest capture can't be read",
                expected="the settings as a capture records them",
                found=" ".join(str(error).split())[:200],
                where=table.location,
                do="restore the table's log from a copy",
            ) from None


def table_settings(table: Table) -> dict[str, Any]:
    """Every setting of a capture that the table determines, with its value, by name, such as ``selection.top_p``."""
    identity, recorded = table.identity, _Recorded.of(table)
    settings = _teacher(identity, recorded) | _columns(table, recorded) | _sequences(identity)
    if identity.classes is None:
        settings |= {f"selection.{name}": getattr(identity.selection, name) for name in SelectionIdentity.model_fields}
        settings["selection.temperatures"] = identity.temperatures
        settings["selection.tail_logprobs"] = identity.tail_logprobs
    settings["shards.eval_fraction"] = identity.sequences.eval_fraction
    return {name: value for name, value in settings.items() if not (value is None or value is False or value == ())}


def _teacher(identity: Identity, recorded: _Recorded) -> dict[str, Any]:
    where = {"teacher.model": recorded.teacher, "teacher.revision": recorded.revision}
    if not identity.teacher.files:
        return where | {"teacher.labels": identity.classes}
    return where | {
        "teacher.adapter": recorded.adapter if identity.teacher.adapter else None,
        "teacher.dtype": identity.teacher.dtype,
        "teacher.engine": recorded.engine,
        "teacher.trust_remote_code": any(name.endswith(".py") for name in identity.teacher.files),
    }


def _columns(table: Table, recorded: _Recorded) -> dict[str, Any]:
    columns = recorded.columns
    named = {"id": columns.id, **columns.contents, "label": columns.label} if columns.model_fields_set else {}
    return {f"columns.{name}": value for name, value in named.items()} | {"columns.carry": tuple(table.carried.names)}


def _sequences(identity: Identity) -> dict[str, Any]:
    sequences = identity.sequences
    of_tokens = {"sequences.context": sequences.context} if identity.classes is None else {}
    return {
        "sequences.max_tokens": sequences.max_tokens,
        **of_tokens,
        "sequences.assistant_turns": TURNS.get(sequences.mask),
        "sequences.special_tokens": sequences.special_tokens,
        "sequences.chat_template_kwargs": identity.tokenizer.chat_template_kwargs,
        "sequences.chat_template_date": identity.tokenizer.chat_template_date,
    }


def complete(config: CaptureConfig, table: Table | None) -> CaptureConfig:
    """The settings of a capture with nothing left out: from the table if it determines them, else the defaults.

    Args:
        config: the settings as they were given.
        table: the table, if it exists.

    Raises:
        UsageError: if they contradict each other or the table.
    """
    known = {} if table is None else table_settings(table)
    short = HEAD_AND_TAIL if config.selection.top_k is not None else ()
    sections = {
        "teacher": complete_teacher(config.teacher, known),
        "columns": complete_columns(config.columns, known),
        "sequences": config.sequences.taking(_of("sequences", known)),
        "selection": config.selection.taking(_of("selection", known, apart=short)),
        "shards": config.shards.taking(_of("shards", known)),
    }
    try:
        return config.model_copy(update=sections).completed()
    except ValidationError as invalid:
        raise _contradiction(invalid, config, known, table) from None


def complete_teacher(config: TeacherConfig, known: Mapping[str, Any]) -> TeacherConfig:
    """A teacher's settings with what is left out taken from the table.

    Code never is: neither an engine nor the model's own Python files run because a table names them.

    Args:
        config: the settings as they were given.
        known: from ``table_settings``.

    Raises:
        UsageError: if the teacher is left out, and the table names none, or its teacher ran with an engine.
    """
    if config.model is None and "teacher.model" not in known:
        raise UsageError(
            "the setting teacher.model is missing",
            expected="a teacher, because there is no table yet, or its history names no teacher",
            do="pass --teacher.model, or set it in a --config file",
        )
    if config.model is None and config.engine is None and "teacher.engine" in known:
        raise UsageError(
            "the table's teacher ran with an engine, and softlabel runs no code just because a table names it",
            expected="teacher.engine or teacher.model",
            found="neither",
            do=f"add {as_flag('teacher.engine', known['teacher.engine'])}; or, to run it with transformers, "
            + as_flag("teacher.model", known["teacher.model"]),
        )
    named = known.get("teacher.model")
    of_the_hub = config.model in (None, named) and named is not None and not Path(named).is_dir()
    apart = ("engine", "trust_remote_code") if of_the_hub else ("engine", "trust_remote_code", "revision")
    teacher = config.taking(_of("teacher", known, apart))
    return teacher.model_copy(update={name: _absolute(getattr(teacher, name)) for name in ("model", "adapter")})


def complete_columns(config: ColumnsConfig, known: Mapping[str, Any]) -> ColumnsConfig:
    """The names of the documents' columns, with what is left out taken from the table; see ``complete_teacher``.

    The columns of the content belong together, because they say what a document is: all are taken, or none.
    """
    return config.taking(_of("columns", known, apart=CONTENT_COLUMNS if config.gives_content else ()))


def _of(section: str, known: Mapping[str, Any], apart: Sequence[str] = ()) -> dict[str, Any]:
    """The settings of one section by their names in it, apart from some."""
    settings = {name.partition(".")[2]: value for name, value in known.items() if name.startswith(f"{section}.")}
    return {name: value for name, value in settings.items() if name not in apart}


def _absolute(name: str | None) -> str | None:
    """The absolute path of a folder, so that it is found from anywhere; a name on the hub stays as it is."""
    return str(Path(name).absolute()) if name is not None and Path(name).is_dir() else name


def _contradiction(
    invalid: ValidationError, config: CaptureConfig, known: Mapping[str, Any], table: Table | None
) -> UsageError:
    """The error for settings that contradict each other, or what the table determines."""
    places = {str(error["loc"][0]) if error["loc"] else "" for error in invalid.errors()}
    sections = {section for section in _SECTIONS if not places.isdisjoint({"", section})}
    given = [
        f"{name}: the table has {shown(value)}, this run {shown(now)} (to match: {as_flag(name, value)})"
        for name, value in known.items()
        for section, _, field in [name.partition(".")]
        if section in sections and (part := getattr(config, section)).gives(field)
        if (now := getattr(part, field)) != value
    ]
    return UsageError(
        summary(invalid),
        found="\n               ".join(given) or None,
        where=None if table is None else table.location,
        do="leave these settings out, because a capture takes them from the table" if given else None,
    )
