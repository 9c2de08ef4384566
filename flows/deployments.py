"""What ``softlabel deploy`` installs on a Prefect server: a work pool, queues, deployments and automations.

This file only describes them; ``deploy`` compares the description with a server and installs what differs. A team
describes its own deployments, and how they differ from the shipped ones, in a YAML file of ``DeployConfig``.
"""

from collections.abc import Collection
from datetime import timedelta
from importlib import import_module
from typing import Any, Literal, Self, get_args
from uuid import UUID

from prefect import Flow
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.schedules import CronSchedule
from prefect.events.actions import CancelFlowRun, ChangeFlowRunState, RunDeployment, SendNotification
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from softlabel.flows.running.events import NEW_VERSION, table_resource
from softlabel.pipeline.config.base import Location, Settings

FlowName = Literal[
    "capture", "estimate", "train", "evaluate", "compare", "distill", "reprocess", "mix", "verify", "maintain"
]
Queue = Literal["cpu", "gpu"]

TAG = "softlabel"
"""Tag of every run of our deployments; the automations act on these runs alone."""
QUEUES: dict[Queue, str] = {
    "gpu": "Runs that load a model. Start one worker with --limit 1 for each GPU.",
    "cpu": "Runs that only read and write tables.",
}
_ON_CPU: tuple[FlowName, ...] = ("reprocess", "mix", "maintain")
_NIGHTLY, _WEEKLY_CHECK, _WEEKLY_CLEANING = "0 2 * * *", "0 5 * * 0", "0 7 * * 0"
_SILENT_HEARTBEATS = 3
"""A run is lost when so many of its heartbeats in a row do not arrive."""
_SECONDS_TO_SEND = 30
"""After an outage of the server, the heartbeats of a live run arrive again with the next one, a little later."""
_ONCE = timedelta(seconds=10)
"""The server may handle an event several times; within this time, the same one triggers an automation only once."""
_STARTS = 3
"""A run whose process dies is started again, up to this many starts in all."""
_RUNNING = "prefect.flow-run.Running"
_ENDED = {
    f"prefect.flow-run.{state}"
    for state in ("Completed", "Failed", "Crashed", "Lost", "Cancelled", "AwaitingRetry", "Paused", "Suspended")
}
"""Events after which a run need not show that it is alive."""


class DeploymentConfig(Settings):
    """One deployment of a flow: the settings of its runs, when it runs, and where."""

    flow: FlowName
    """Flow to deploy: the verb of the command line."""
    name: str = Field("softlabel", pattern=r"^[^/%&><]+$")
    """Name of the deployment; several deployments of a flow have different names."""
    parameters: dict[str, Any] = Field(default_factory=dict)
    """Settings of a run, as in the file of ``softlabel FLOW --config``. Prefect's form asks for what is left out."""
    queue: Queue | None = None
    """Queue of the runs: gpu for runs that load a model, cpu for the others. Default: by flow."""
    cron: str | None = None
    """Schedule as a cron expression: minute, hour, day of the month, month, day of the week."""
    timezone: str = "UTC"
    """Time zone of the schedule."""
    after_version_of: Location | None = None
    """Table whose new versions each start a run of this deployment."""
    concurrency_limit: PositiveInt | None = None
    """Most runs of this deployment at once; further runs wait. Default: no limit."""
    time_limit_hours: PositiveFloat | None = None
    """A run that has not ended this long after a start is cancelled. Default: no limit."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.cron is not None:
            _ = self.schedule
        return self

    @property
    def full_name(self) -> str:
        """FLOW/NAME, as Prefect's command line writes it."""
        return f"{self.flow}/{self.name}"

    @property
    def schedule(self) -> CronSchedule | None:
        """The schedule, if there is one.

        Raises:
            ValueError: if the cron expression or the time zone is not valid.
        """
        return CronSchedule(cron=self.cron, timezone=self.timezone) if self.cron else None

    @property
    def work_queue(self) -> Queue:
        """The queue of its runs."""
        return self.queue or ("cpu" if self.flow in _ON_CPU else "gpu")


SHIPPED = (
    DeploymentConfig(flow="capture", cron=_NIGHTLY),
    DeploymentConfig(flow="estimate"),
    DeploymentConfig(flow="train"),
    DeploymentConfig(flow="evaluate"),
    DeploymentConfig(flow="compare"),
    DeploymentConfig(flow="distill"),
    DeploymentConfig(flow="reprocess"),
    DeploymentConfig(flow="mix"),
    DeploymentConfig(flow="verify", cron=_WEEKLY_CHECK, concurrency_limit=1),
    DeploymentConfig(flow="maintain", cron=_WEEKLY_CLEANING, concurrency_limit=1),
)
"""A deployment of each flow."""
assert {each.flow for each in SHIPPED} == set(get_args(FlowName))


class DeployConfig(Settings):
    """Install the deployments of all flows on the configured Prefect server, with a work pool and automations.

    If you run it again, it changes only what differs.
    """

    schedules: bool = False
    """Turn on the schedules of all deployments that have parameters. Otherwise new schedules are off, and existing
    ones stay as they are."""
    work_pool: str = "softlabel"
    """Work pool that the workers serve. If it does not exist, it is created with the type process."""
    heartbeat_seconds: int = Field(180, ge=30)
    """Seconds between two heartbeats of a run. After three of these intervals without a heartbeat, the run counts as
    crashed and is started again. With less than 100, this takes up to 15 minutes after a restart of the server."""
    pending_minutes: PositiveInt = 30
    """A run that a worker has taken, but not started within this many minutes, is handed out again."""
    notify: str | None = Field(None, pattern=r"^[^/]+/[^/]+$")
    """Prefect block, as TYPE/NAME such as slack-webhook/team, that is told when a run fails, crashes, is lost or
    exceeds its time limit."""
    deployments: tuple[DeploymentConfig, ...] = ()
    """Deployments of your own. One with the same flow and name as a shipped deployment replaces it."""

    @property
    def all_deployments(self) -> tuple[DeploymentConfig, ...]:
        """The shipped deployments, with those of the same name replaced, and then the others."""
        named = {each.full_name: each for each in (*SHIPPED, *self.deployments)}
        return tuple(named.values())

    @model_validator(mode="after")
    def _unique(self) -> Self:
        names = [each.full_name for each in self.deployments]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two deployments have the name {', '.join(twice)}; give each a name of its own")
        return self


def flow_of(deployment: DeploymentConfig) -> Flow[..., Any]:
    """The deployment's flow."""
    flow: Flow[..., Any] = getattr(import_module(f"softlabel.flows.{deployment.flow}"), f"{deployment.flow}_flow")
    return flow


def entrypoint(deployment: DeploymentConfig) -> str:
    """Where a worker finds the flow: in the installed package, wherever that is."""
    return f"softlabel.flows.{deployment.flow}.{deployment.flow}_flow"


def automations(config: DeployConfig, ids: dict[str, UUID], notify: UUID | None) -> list[AutomationCore]:
    """The automations of all deployments.

    Args:
        config: what to deploy.
        ids: the server's id of each deployment, by its full name.
        notify: id of the block to notify of failures.
    """
    silent = timedelta(seconds=_SILENT_HEARTBEATS * config.heartbeat_seconds)
    lost = {"prefect.flow-run.Lost"}
    alive = {_RUNNING, "prefect.flow-run.heartbeat"}
    pending = {"prefect.flow-run.Pending", "prefect.flow-run.Submitting", "prefect.flow-run.InfrastructurePending"}
    again = silent / _SILENT_HEARTBEATS + timedelta(seconds=_SECONDS_TO_SEND)
    found = [
        _automation(
            "lost runs",
            f"A run without a heartbeat for {silent} (hours:minutes:seconds) is lost and frees its slot.",
            _missing(alive, alive | _ENDED, silent),
            _state(
                StateType.CRASHED,
                "Lost",
                f"No heartbeat for {silent}: its process or machine, or this server, was gone",
            ),
        ),
        _automation(
            "lost runs that are alive",
            "A lost run with a heartbeat is running: it was the server that was gone.",
            _reactive({"prefect.flow-run.heartbeat"}, after=lost, within=silent),
            _state(StateType.RUNNING, "Running", "Its heartbeats have arrived again."),
        ),
        _automation(
            "start lost runs again",
            f"A lost run that does not show up within {again} is started again, at most {_STARTS} starts in all.",
            _missing(lost, ({_RUNNING} | _ENDED) - lost, again, match=_STARTED),
            _again("The run was lost, and is started again."),
        ),
        _automation(
            "runs that never start",
            f"A run that a worker took but did not start in {config.pending_minutes} minutes is handed out again.",
            _missing(pending, pending | {_RUNNING} | _ENDED, timedelta(minutes=config.pending_minutes)),
            _again(f"A worker took this run, but did not start it in {config.pending_minutes} minutes."),
        ),
        _automation(
            "start crashed runs again",
            f"A run whose process died is started again, at most {_STARTS} starts in all.",
            _reactive({"prefect.flow-run.Crashed"}, _STARTED),
            _again("The run crashed, and is started again."),
        ),
    ]
    if notify:
        failed = {"prefect.flow-run.Failed", "prefect.flow-run.Crashed"} | lost
        found.append(
            _automation(
                "failures",
                f"Tells {config.notify} of each run that fails, crashes or is lost.",
                _reactive(failed),
                _message(notify, "{{ flow_run.state.name }}", "{{ flow_run.state.message }}"),
            )
        )
    for each in config.all_deployments:
        found += _automations_of(each, ids[each.full_name], notify)
    return found


def _automations_of(deployment: DeploymentConfig, identifier: UUID, notify: UUID | None) -> list[AutomationCore]:
    found = []
    its_runs = {"prefect.resource.id": f"prefect.deployment.{identifier}", "prefect.resource.role": "deployment"}
    if hours := deployment.time_limit_hours:
        actions: list[CancelFlowRun | SendNotification] = [CancelFlowRun()]
        if notify:
            actions.append(_message(notify, "is cancelled", f"It has run for {hours:g} hours, its time limit."))
        found.append(
            _automation(
                _time_limit(deployment),
                f"A run of {deployment.full_name} that runs for {hours:g} hours after a start is cancelled.",
                _missing({_RUNNING}, {_RUNNING} | _ENDED, timedelta(hours=hours), its_runs),
                *actions,
            )
        )
    if table := deployment.after_version_of:
        found.append(
            _automation(
                _after_version(deployment),
                f"Each new version of {table} starts a run of {deployment.full_name}.",
                EventTrigger(
                    match={"prefect.resource.id": table_resource(table)},
                    expect={NEW_VERSION},
                    posture=Posture.Reactive,
                    within=_ONCE,
                ),
                RunDeployment(deployment_id=identifier, source="selected"),
            )
        )
    return found


def automation_names(deployment: DeploymentConfig) -> list[str]:
    """Names of the automations that this deployment may have, depending on its settings."""
    return [f"{TAG}: {name}" for name in (_time_limit(deployment), _after_version(deployment))]


def _time_limit(deployment: DeploymentConfig) -> str:
    return f"time limit of {deployment.full_name}"


def _after_version(deployment: DeploymentConfig) -> str:
    return f"{deployment.full_name} after each version"


_RUNS: dict[str, Any] = {"prefect.resource.id": "prefect.flow-run.*"}
# Not 0: a run that can't even be loaded would crash again at once, for ever.
_STARTED = _RUNS | {"prefect.run-count": [str(count) for count in range(1, _STARTS)]}
_OURS = {"prefect.resource.id": f"prefect.tag.{TAG}", "prefect.resource.role": "tag"}


def _missing(
    after: set[str],
    expected: set[str],
    within: timedelta,
    related: dict[str, str] = _OURS,
    match: dict[str, Any] = _RUNS,
) -> EventTrigger:
    """Fires for a run that had one of the events, and none of the expected ones within the time.

    If events of ``after`` are expected, too, the time begins again with each of them. Otherwise, the server does not
    watch a run that has had an expected event and starts again, until the time since its first start is over.
    """
    return EventTrigger(
        match=match,
        match_related=related,
        after=after,
        expect=expected,
        for_each={"prefect.resource.id"},
        posture=Posture.Proactive,
        threshold=1,
        within=within,
    )


def _reactive(
    expected: set[str],
    match: dict[str, Any] = _RUNS,
    after: Collection[str] = (),
    within: timedelta = _ONCE,
) -> EventTrigger:
    """Fires once for a run that has one of the expected events; with ``after``, within a time after one of these."""
    return EventTrigger(
        match=match,
        match_related=_OURS,
        after=set(after),
        expect=expected,
        for_each={"prefect.resource.id"},
        posture=Posture.Reactive,
        within=within,
    )


def _state(kind: StateType, name: str, message: str) -> ChangeFlowRunState:
    return ChangeFlowRunState(state=kind, name=name, message=message)


def _again(message: str) -> ChangeFlowRunState:
    return _state(StateType.SCHEDULED, "AwaitingRetry", message)


def _message(block: UUID, event: str, text: str) -> SendNotification:
    """Tell people what has become of a run."""
    subject = f"{TAG}: {{{{ flow_run.name }}}} {event}"
    return SendNotification(block_document_id=block, subject=subject, body=f"{text}\n{{{{ flow_run|ui_url }}}}")


def _automation(name: str, description: str, trigger: EventTrigger, *actions: Any) -> AutomationCore:
    return AutomationCore(name=f"{TAG}: {name}", description=description, trigger=trigger, actions=[*actions])
