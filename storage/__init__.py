"""The soft-label table, and every error that a user can cause. Never torch, transformers or Prefect.

Names are loaded when they are asked for, so that an error costs no more than its own module.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from storage.codec import SoftLabels
    from storage.errors import (
        DocumentsError,
        IntegrityError,
        ProvenanceError,
        PurgedError,
        SoftlabelError,
        StudentError,
        TableError,
        TableNotFoundError,
        TeacherError,
        TrainingError,
        UsageError,
    )
    from storage.inspection import history, inspect
    from storage.provenance import Identity
    from storage.reader import read
    from storage.table import Shard, Table

__all__ = [
    "DocumentsError",
    "Identity",
    "IntegrityError",
    "ProvenanceError",
    "PurgedError",
    "Shard",
    "SoftLabels",
    "SoftlabelError",
    "StudentError",
    "Table",
    "TableError",
    "TableNotFoundError",
    "TeacherError",
    "TrainingError",
    "UsageError",
    "history",
    "inspect",
    "read",
]

_ELSEWHERE = {
    "Identity": "provenance",
    "Shard": "table",
    "SoftLabels": "codec",
    "Table": "table",
    "history": "inspection",
    "inspect": "inspection",
    "read": "reader",
}
"""Modules of the names that are no errors."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ELSEWHERE.get(name, 'errors')}"), name)
