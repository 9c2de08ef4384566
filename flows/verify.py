"""The flow that looks at every byte of a table and, if its teacher is there, asks that again; any difference fails."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from prefect import flow, task
from prefect.artifacts import create_table_artifact

from softlabel.flows.progress import watching
from softlabel.pipeline.config.tables import VerifyConfig
from softlabel.pipeline.progress import Progress
from softlabel.storage.table import Table
from softlabel.storage.upkeep.verification import Verification, damage, remove_damaged, verify
from softlabel.storage.views.view import View, open_table
from softlabel.storage.views.view_inspection import whole

if TYPE_CHECKING:
    from softlabel.pipeline.tables.recheck import Recheck


@dataclass(frozen=True)
class VerifyReport(Verification):
    """What a look at every byte has found, and what the teacher says now."""

    recheck: "Recheck | None" = None
    """None if it was not asked."""


@task(name="verify", task_run_name="verify {config.table}", persist_result=False)
def verify_table(config: VerifyConfig) -> Verification:
    """Look at the table, showing how far it is, and take out what is damaged if that is asked for.

    Of a view, each of its tables is looked at, up to the first in which something is wrong.
    """
    tables_alone = config.remove_damaged or config.teacher is not None
    opened = Table.open(config.table) if tables_alone else open_table(config.table)
    sound = []
    for table in opened.tables:
        with watching() as watch:
            found = verify(
                table,
                all_versions=config.all_versions,
                watch=lambda done, total: watch(Progress("verify", done // 1000, total // 1000, "kB")),
            )
        if found.findings:
            return remove_damaged(found) if config.remove_damaged else found
        sound.append(found)
    return whole(opened, sound) if isinstance(opened, View) else found


@task(name="recheck", task_run_name="recheck {config.table}", persist_result=False)
def ask_teacher(config: VerifyConfig) -> "Recheck | None":
    """Ask the teacher again, if there is one."""
    if config.teacher is None:
        return None
    from softlabel.pipeline.tables.recheck import disagreement, recheck  # torch, which nothing else here needs

    with watching() as watch:
        found = recheck(Table.open(config.table), config.teacher, config.sequences, config.seed, watch)
    if found.disagreements:
        rows = [vars(sequence) for sequence in found.disagreements]
        create_table_artifact(rows, key="disagreement", description=f"{found.table}@{found.version} and its teacher")
        raise disagreement(found)
    return found


@flow(name="verify", flow_run_name="verify {config.table}", persist_result=False)
def verify_flow(config: VerifyConfig) -> VerifyReport:
    """Look at every byte of a table, and ask its teacher again if that is given."""
    found = verify_table(config)
    if found.findings:
        rows = [{"file": finding.path, "problem": finding.problem} for finding in found.findings]
        create_table_artifact(rows, key="damage", description=f"Damage in {found.location}@{found.version}")
    if found.unsolved:
        raise damage(found)
    return VerifyReport(**vars(found), recheck=ask_teacher(config))
