"""The soft-label table, and every error that a user can cause. Never torch, transformers or Prefect.

Names are loaded when they are asked for, so that an error costs no more than its own module.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from softlabel.storage.codec import SoftLabels
    from softlabel.storage.errors import (
        DisagreementError,
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
        WorkerError,
    )
    from softlabel.storage.identity import Identity
    from softlabel.storage.reader import read
    from softlabel.storage.state import Shard
    from softlabel.storage.table import Table
    from softlabel.storage.upkeep.inspection import history, inspect
    from softlabel.storage.upkeep.maintenance import Maintenance, maintain
    from softlabel.storage.upkeep.verification import Verification, remove_damaged, verify
    from softlabel.storage.versions import Pin, Tag, pin, pins, tag, tags, unpin, untag
    from softlabel.storage.views.mixing import make_view
    from softlabel.storage.views.view import View, open_table

__all__ = [
    "DisagreementError",
    "DocumentsError",
    "Identity",
    "IntegrityError",
    "Maintenance",
    "Pin",
    "ProvenanceError",
    "PurgedError",
    "Shard",
    "SoftLabels",
    "SoftlabelError",
    "StudentError",
    "Table",
    "TableError",
    "TableNotFoundError",
    "Tag",
    "TeacherError",
    "TrainingError",
    "UsageError",
    "Verification",
    "View",
    "WorkerError",
    "history",
    "inspect",
    "maintain",
    "make_view",
    "open_table",
    "pin",
    "pins",
    "read",
    "remove_damaged",
    "tag",
    "tags",
    "unpin",
    "untag",
    "verify",
]

_ELSEWHERE = {
    "Identity": "provenance",
    "Maintenance": "maintenance",
    "Pin": "versions",
    "Shard": "state",
    "SoftLabels": "codec",
    "Table": "table",
    "Tag": "versions",
    "Verification": "verification",
    "View": "view",
    "history": "inspection",
    "inspect": "inspection",
    "maintain": "maintenance",
    "make_view": "mixing",
    "open_table": "view",
    "pin": "versions",
    "pins": "versions",
    "read": "reader",
    "remove_damaged": "verification",
    "tag": "versions",
    "tags": "versions",
    "unpin": "versions",
    "untag": "versions",
    "verify": "verification",
}
"""Modules of the names that are no errors."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ELSEWHERE.get(name, 'errors')}"), name)
