"""The flow that checks every byte of a table and, if its teacher is given, asks the teacher again."""

from typing import TYPE_CHECKING, cast

from prefect import flow
from prefect.artifacts import create_table_artifact

from softlabel.flows.progress import watching
from softlabel.pipeline.config.tables import VerifyConfig
from softlabel.pipeline.tables.verify import VerifyReport, verify
from softlabel.storage.errors import DisagreementError, IntegrityError
from softlabel.storage.upkeep.verification import Verification

if TYPE_CHECKING:
    from softlabel.pipeline.tables.recheck import Recheck


@flow(name="verify", flow_run_name="verify {config.table}", persist_result=False)
def verify_flow(config: VerifyConfig) -> VerifyReport:
    """Check every byte of a table, and ask its teacher again if that is given; any difference fails."""
    try:
        with watching() as watch:
            report = verify(config, watch)
    except IntegrityError as error:
        if isinstance(error.details, Verification):
            _keep_findings(error.details)
        raise
    except DisagreementError as error:
        _keep_disagreements(cast("Recheck", error.details))
        raise
    if report.findings:
        _keep_findings(report)
    return report


def _keep_findings(found: Verification) -> None:
    rows = [{"file": finding.path, "problem": finding.problem} for finding in found.findings]
    create_table_artifact(rows, key="damage", description=f"Damage in {found.location}@{found.version}")


def _keep_disagreements(found: "Recheck") -> None:
    rows = [vars(sequence) for sequence in found.disagreements]
    create_table_artifact(rows, key="disagreement", description=f"{found.table}@{found.version} and its teacher")
