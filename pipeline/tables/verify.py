"""Check a table: every byte of it against its hash and, if its teacher is given, its rows against the teacher."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from softlabel.pipeline.config.tables import VerifyConfig
from softlabel.pipeline.progress import Progress, Watch, unwatched
from softlabel.storage.table import Table
from softlabel.storage.upkeep import verification
from softlabel.storage.upkeep.card import keeping_card
from softlabel.storage.upkeep.verification import Verification, damage, remove_damaged
from softlabel.storage.views.view import View, open_table
from softlabel.storage.views.view_inspection import whole

if TYPE_CHECKING:
    from softlabel.pipeline.tables.recheck import Recheck


@dataclass(frozen=True)
class VerifyReport(Verification):
    """Results of the check of every byte, and of the comparison with the teacher."""

    recheck: "Recheck | None" = None
    """None without a teacher."""
    dry_run: bool = False
    """Whether nothing was removed, and ``removed`` is what would be."""


def verify(config: VerifyConfig, watch: Watch = unwatched, *, dry_run: bool = False) -> VerifyReport:
    """Check every byte of a table; with ``config.teacher``, also compare a sample of its rows with the teacher.

    Args:
        config: the table, and whether to remove damaged shards.
        watch: called with the progress, first in kB of the table, then in tokens.
        dry_run: only report which shards would be removed.

    Raises:
        IntegrityError: if something is damaged and was not removed; ``details`` is the ``Verification``.
        DisagreementError: if the table disagrees with its teacher; ``details`` is the ``Recheck``.
        UsageError: if a view is to be repaired or compared with a teacher; only tables can be.
    """
    found = _check_bytes(config, watch, dry_run)
    if found.unsolved:
        raise damage(found)
    # A dry run still has what would be removed, on which a comparison would fail.
    recheck = None if dry_run and found.removed else _compare_with_teacher(config, watch)
    return VerifyReport(**vars(found), recheck=recheck, dry_run=dry_run)


def _check_bytes(config: VerifyConfig, watch: Watch, dry_run: bool) -> Verification:
    """Check the table, and remove damaged shards if ``config.remove_damaged`` is set.

    A view's tables are checked one after the other, up to the first with a finding.
    """
    only_a_table = config.remove_damaged or config.teacher is not None
    opened = Table.open(config.table) if only_a_table else open_table(config.table)
    sound = []
    for table in opened.tables:
        found = verification.verify(
            table,
            all_versions=config.all_versions,
            watch=lambda done, total: watch(Progress("verify", done // 1000, total // 1000, "kB")),
        )
        if found.findings:
            if not config.remove_damaged:
                return found
            with nullcontext() if dry_run else keeping_card(table.location):
                return remove_damaged(found, dry_run=dry_run)
        sound.append(found)
    return whole(opened, sound) if isinstance(opened, View) else found


def _compare_with_teacher(config: VerifyConfig, watch: Watch) -> "Recheck | None":
    if config.teacher is None:
        return None
    from softlabel.pipeline.tables.recheck import disagreement, recheck  # imports torch, which nothing else here needs

    found = recheck(Table.open(config.table), config.teacher, config.sequences, config.seed, watch)
    if found.disagreements:
        raise disagreement(found)
    return found
