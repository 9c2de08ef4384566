"""The flow that trains one student from a table."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prefect import flow
from prefect._internal import control_listener

from softlabel.flows.running.artifacts import publishing_progress
from softlabel.flows.running.events import announce_student
from softlabel.flows.running.outages import reported
from softlabel.flows.running.retries import retrying
from softlabel.flows.running.runs import recorded
from softlabel.pipeline.config.train import TrainConfig
from softlabel.pipeline.training.train import TrainReport, train


@flow(name="train", flow_run_name="train {config.output}", persist_result=False)
def train_flow(config: TrainConfig) -> TrainReport:
    """Train a student from a table; a student that is already trained with these settings is left unchanged."""
    with recorded(output=config.output):
        with retrying(), _cancellable(), reported(), publishing_progress("train-progress") as watch:
            report = train(config, watch)
        announce_student(report)  # once the server can take the event
    return report


@contextmanager
def _cancellable() -> Iterator[None]:
    """Accept a cancellation from Prefect's worker although the training handles SIGTERM itself, and passes it on late.

    The worker announces a cancellation before it sends SIGTERM. Prefect accepts it only while SIGTERM goes straight to
    Prefect's own handler; unaccepted, the run would end as crashed rather than cancelled.
    """
    usual = control_listener.commit_control_intent_and_ack  # type: ignore[attr-defined]
    control_listener.commit_control_intent_and_ack = _accept  # type: ignore[attr-defined]
    try:
        yield
    finally:
        control_listener.commit_control_intent_and_ack = usual  # type: ignore[attr-defined]


def _accept(
    commit_intent: Callable[[], None],
    clear_intent: Callable[[], None],
    send_ack: Callable[[], None],
    trigger_cancel: Callable[[], None] | None = None,
) -> bool:
    """What Prefect's function of this signature does, without the look at the handler."""
    commit_intent()
    try:
        send_ack()
    except OSError:
        clear_intent()
        return False
    return True
