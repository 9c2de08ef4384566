"""The flow that looks at every byte of a table, and fails if one of them is not the one that was written."""

from prefect import flow, task
from prefect.artifacts import create_table_artifact

from flows.progress import watching
from pipeline.progress import Progress
from pipeline.table_config import VerifyConfig
from storage.table import Table
from storage.verification import Verification, damage, remove_damaged, verify
from storage.view import View, open_table
from storage.view_inspection import whole


@task(name="verify", task_run_name="verify {config.table}", persist_result=False)
def verify_table(config: VerifyConfig) -> Verification:
    """Look at the table, showing how far it is, and take out what is damaged if that is asked for.

    Of a view, each of its tables is looked at, up to the first in which something is wrong.
    """
    opened = Table.open(config.table) if config.remove_damaged else open_table(config.table)
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


@flow(name="verify", persist_result=False)
def verify_flow(config: VerifyConfig) -> Verification:
    """Look at every byte of a table, without its teacher."""
    found = verify_table(config)
    if found.findings:
        rows = [{"file": finding.path, "problem": finding.problem} for finding in found.findings]
        create_table_artifact(rows, key="damage", description=f"Damage in {found.location}@{found.version}")
    if found.unsolved:
        raise damage(found)
    return found
