"""The provenance of a table: its identity, which determines its numbers, and the circumstances, which should not.

An identity must match in every field before anything is added to a table. Circumstances, such as library versions, are
recorded with each commit and may change: a rebuilt image must not stop a nightly run.
"""

import getpass
import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import date
from functools import cache
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, model_serializer

from softlabel.storage.errors import ProvenanceError, UsageError

_LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "pyarrow", "polars", "deltalake")
_VARIABLES = {"run": "SOFTLABEL_RUN", "flow": "SOFTLABEL_FLOW"}
"""Environment variables that tell a child process for which run of a scheduler it works."""
_INHERITED = {name: os.environ[variable] for name, variable in _VARIABLES.items() if os.environ.get(variable)}
_RUN: ContextVar[Mapping[str, str]] = ContextVar("run")


class _Part(BaseModel):
    # Later versions of softlabel may write more, which stays part of the identity.
    model_config = ConfigDict(frozen=True, extra="allow", use_attribute_docstrings=True)


class TeacherIdentity(_Part):
    """The model, identified by its files: the same bytes under another name or revision are the same teacher."""

    files: dict[str, str]
    """SHA-256 of the configuration and of each weight file, by name."""
    dtype: str
    adapter: str | None = None
    """SHA-256 of an adapter's weights."""


class TokenizerIdentity(_Part):
    """The tokenizer and the chat template."""

    files: str
    """SHA-256 over the tokenizer's files."""
    chat_template: str | None
    """SHA-256 of the chat template; None without one."""
    chat_template_date: date
    chat_template_kwargs: str | None = None
    """Further values for the chat template, as a JSON object with sorted keys; None without any."""

    @model_serializer(mode="wrap")
    def _as_before_if_without_kwargs(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the field if it is None, as in the identities of tables that are older than it."""
        fields: dict[str, Any] = serialize(self)
        if self.chat_template_kwargs is None:
            del fields["chat_template_kwargs"]
        return fields


class SelectionIdentity(_Part):
    """Which part of each distribution is stored."""

    top_p: float
    min_k: int
    max_k: int
    draws: int
    seed: int


class SequencesIdentity(_Part):
    """How documents become sequences, and which of their tokens are captured."""

    max_tokens: int
    context: int
    mask: str
    """Name of the rule that decides which tokens are captured."""
    special_tokens: str = "text"
    """Whether the name of a special token in a document is plain text ("text") or the special token ("parse")."""
    eval_fraction: float


class Identity(_Part):
    """Everything that determines a table's numbers."""

    teacher: TeacherIdentity
    tokenizer: TokenizerIdentity
    vocabulary: int
    """Number of token ids of the tokenizer, or number of classes: the support of every distribution."""
    padded_vocabulary: int
    """Rows of the teacher's output layer or, for a classifier, of its embedding; larger than every token id."""
    classes: tuple[str, ...] | None = None
    """Names of a classifier's classes, in the order of their ids: each row is a document, and its distribution is over
    these. None if the teacher predicts tokens."""
    selection: SelectionIdentity
    temperatures: tuple[float, ...]
    sequences: SequencesIdentity
    tail_logprobs: Literal["eval", "all"] = "eval"
    """Splits whose rows store the log-probabilities of their sampled tails."""
    unknown: tuple[str, ...] = ()
    """Columns in which values may be unknown, because another program made the soft labels."""
    derived_from: SelectionIdentity | None = None
    """Selection of the original capture, if this table was narrowed from it without the teacher: its tail masses then
    differ slightly from those of a capture. None for a captured table."""

    @model_serializer(mode="wrap")
    def _as_before_without_what_is_usual(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the fields that older identities lack, if they have their usual values."""
        fields: dict[str, Any] = serialize(self)
        usual = [name for name, value in (("tail_logprobs", "eval"), ("unknown", ())) if getattr(self, name) == value]
        return {name: value for name, value in fields.items() if name not in usual}

    def require_known(self, columns: Iterable[str], where: str, purpose: str, do: str) -> None:
        """Refuse a purpose that needs values which may be unknown.

        Raises:
            UsageError: if some may be; it names their columns.
        """
        unknown = [name for name in columns if name in self.unknown]
        if unknown:
            raise UsageError(
                f"this table can't be used for {purpose}: values that it needs may be unknown",
                expected="soft labels with all their values, as softlabel captures them",
                found=f"values that may be unknown in {', '.join(unknown)}",
                where=where,
                do=do,
            )

    def differences(self, other: "Identity") -> dict[str, tuple[Any, Any]]:
        """Dotted name of each field that differs, with the values of ``self`` and ``other``."""
        mine, theirs = _flatten(self.model_dump(mode="json")), _flatten(other.model_dump(mode="json"))
        return {
            name: (mine.get(name), theirs.get(name))
            for name in sorted({*mine, *theirs})
            if mine.get(name) != theirs.get(name)
        }

    def require(
        self, other: "Identity", where: str, matching: Mapping[str, str] | None = None, further: Sequence[str] = ()
    ) -> None:
        """Refuse to add rows of another identity to a table of this identity.

        Args:
            other: identity of the rows.
            where: location of the table.
            matching: for a field, the flags with which it would match.
            further: further differences, one per line.

        Raises:
            ProvenanceError: if they differ; it names each field that does.
        """
        differences = self.differences(other)
        if differences or further:
            one_is_reduced = (self.derived_from is None) != (other.derived_from is None)
            lines = [
                f"{name}: the table has {a}, this run {b}{_to_match((matching or {}).get(name))}"
                for name, (a, b) in differences.items()
                if not (one_is_reduced and name.startswith("derived_from"))
            ]
            lines += further
            do = (
                "leave these settings out, because a capture takes them from the table (softlabel inspect shows them);"
                " or make a new table in another folder"
            )
            if one_is_reduced and self.derived_from is not None:
                lines.append("derived_from: softlabel reprocess has reduced the table, but not the rows of this run")
                do = (
                    "make a new table in another folder: softlabel reprocess has reduced this one, so only rows that"
                    " were reduced in the same way can be added to it"
                )
            elif one_is_reduced:
                lines.append("derived_from: softlabel reprocess has reduced the rows of this run, but not the table")
            raise ProvenanceError(
                "this run can't add to this table: its results would not be comparable with the table's",
                expected="the same teacher, tokenizer, selection and chunking that made the table",
                found="\n               ".join(lines),
                where=where,
                do=do,
            )


def _to_match(flags: str | None) -> str:
    return f" (to match: {flags})" if flags else ""


def circumstances(**more: str) -> dict[str, str]:
    """The circumstances of a run: library versions, machine, user, and what the caller adds (device, kernel).

    If a scheduler started it, also the scheduler's id of this run and the name of its flow.
    """
    machine = {"python": platform.python_version(), "machine": platform.machine()}
    return {"user": user(), **_RUN.get(_INHERITED), **machine, **_versions(), **more}


@cache
def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in _LIBRARIES if _installed(name)}


@contextmanager
def working_for(run: str, flow: str) -> Iterator[None]:
    """Record a scheduler's run in everything that the block writes, in this process and in its child processes.

    Args:
        run: the scheduler's id of the run.
        flow: name of what it runs.
    """
    token = _RUN.set({"run": run, "flow": flow})
    try:
        yield
    finally:
        _RUN.reset(token)


def run_id() -> str | None:
    """The scheduler's id of the run that this code works for; None if no scheduler started it."""
    return _RUN.get(_INHERITED).get("run")


def run_variables() -> dict[str, str]:
    """Environment variables with which a child process works for the same run."""
    return {_VARIABLES[name]: value for name, value in _RUN.get(_INHERITED).items()}


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def user() -> str:
    """Name of the current user in the operating system."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # in a container, the user id may have no name
        return "unknown"


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = json.dumps(value) if isinstance(value, list) else value
    return flat
