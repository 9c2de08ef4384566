"""The flow that checks every byte of a table and, if its teacher is given, compares a sample with the teacher."""

from contextlib import nullcontext
from typing import TYPE_CHECKING, cast

from prefect import flow
from prefect.artifacts import create_table_artifact

from softlabel.flows.running.artifacts import publishing_progress
from softlabel.flows.running.events import announcing
from softlabel.flows.running.outages import publish, reported
from softlabel.flows.running.retries import retrying
from softlabel.flows.running.runs import recorded
from softlabel.pipeline.config.tables import VerifyConfig
from softlabel.pipeline.tables.verify import VerifyReport, verify
from softlabel.storage.errors import DisagreementError, IntegrityError
from softlabel.storage.upkeep.verification import Verification

if TYPE_CHECKING:
    from softlabel.pipeline.tables.recheck import Recheck


@flow(name="verify", flow_run_name="verify {config.table}", persist_result=False)
def verify_flow(config: VerifyConfig) -> VerifyReport:
    """Check every byte of a table and, if its teacher is given, compare a sample with it; any difference fails."""
    changing = announcing(config.table, "verify") if config.remove_damaged else nullcontext()
    try:
        with recorded(), retrying(), changing, reported(), publishing_progress("verify-progress") as watch:
            report = verify(config, watch)
    except IntegrityError as error:
        if isinstance(error.details, Verification):
            _publish_findings(error.details)
        raise
    except DisagreementError as error:
        _publish_disagreements(cast("Recheck", error.details))
        raise
    if report.findings:
        _publish_findings(report)
    return report


def _publish_findings(report: Verification) -> None:
    rows = [{"file": finding.path, "problem": finding.problem} for finding in report.findings]
    publish(create_table_artifact, rows, key="damage", description=f"Damage in {report.location}@{report.version}")


def _publish_disagreements(recheck: "Recheck") -> None:
    rows = [vars(sequence) for sequence in recheck.disagreements]
    description = f"Sequences on which {recheck.table}@{recheck.version} and its teacher differ"
    publish(create_table_artifact, rows, key="disagreement", description=description)
