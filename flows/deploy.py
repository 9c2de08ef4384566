"""Installs what ``deployments`` describes on the configured Prefect server, and changes only what differs.

Nothing that it does not describe is touched: other pools, deployments and automations stay as they are. Only what our
deployments no longer have, such as a time limit, is deleted.
"""

import asyncio
import logging
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal
from uuid import UUID, uuid4

import httpx
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate, WorkPoolCreate
from prefect.client.schemas.responses import DeploymentResponse
from prefect.events.schemas.automations import Automation, AutomationCore
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.settings import get_current_settings
from prefect.utilities.callables import parameter_schema
from prefect.workers.utilities import get_default_base_job_template_for_infrastructure_type
from pydantic import ValidationError

from softlabel.flows.deployments import (
    QUEUES,
    TAG,
    DeployConfig,
    DeploymentConfig,
    automation_names,
    automations,
    entrypoint,
    flow_of,
)
from softlabel.flows.running.logs import line
from softlabel.storage.credentials import masked
from softlabel.storage.errors import SoftlabelError, UsageError

Change = Literal["created", "updated", "unchanged", "deleted"]

_SECONDS_TO_START = 60.0
"""Time to wait for a server that was just started: its first start creates the database."""


@dataclass(frozen=True)
class Installed:
    """One object on the server."""

    kind: str
    """work pool, queue, deployment or automation."""
    name: str
    change: Change
    schedule: str | None = None
    """A deployment's schedule, as cron's expression and on or off; None if it has none."""


@dataclass(frozen=True)
class DeployReport:
    """What ``deploy`` found and changed."""

    server: str
    """Address of the server's API."""
    work_pool: str
    installed: tuple[Installed, ...]
    dry_run: bool = False
    """Whether nothing was changed, and this is what would be."""

    @property
    def changed(self) -> int:
        """Number of objects that were created, updated or deleted."""
        return sum(each.change != "unchanged" for each in self.installed)


def deploy(config: DeployConfig, *, dry_run: bool = False) -> DeployReport:
    """Install the work pool, its queues, all deployments and the automations; what is there and equal stays untouched.

    Args:
        config: what to install.
        dry_run: only compare it with the server.

    Raises:
        UsageError: if no server is configured, or the settings of a deployment are not valid.
        SoftlabelError: if the server can't be reached, or refuses something.
    """
    server = get_current_settings().api.url
    if server is None:
        raise UsageError(
            "softlabel deploy needs a Prefect server, and none is configured",
            expected="PREFECT_API_URL, in the environment or the active profile",
            do="start one with: prefect server start; then: export PREFECT_API_URL=http://127.0.0.1:4200/api",
        )
    for deployment in config.all_deployments:
        _require_valid(deployment, config.schedules)
    try:
        return asyncio.run(_install(config, server, dry_run))
    except SoftlabelError:
        raise
    except Exception as error:  # the client raises httpx's errors, its own, and bare ones
        raise SoftlabelError(
            "the Prefect server did not accept the deployments",
            found=f"{type(error).__name__}: {error}".splitlines()[0],
            where=server,
            do="check that the server answers and that PREFECT_API_AUTH_STRING is its password, then deploy again",
        ) from error


def _require_valid(deployment: DeploymentConfig, schedules: bool) -> None:
    """Refuse settings that no run could use; settings that are missing matter only to runs that nobody fills in."""
    model = flow_of(deployment).fn.__annotations__["config"]
    by_itself = deployment.after_version_of or (schedules and deployment.parameters and deployment.cron)
    try:
        model.model_validate(deployment.parameters)
    except ValidationError as invalid:
        errors = [error for error in invalid.errors() if by_itself or error["type"] != "missing"]
        if errors:
            found = [f"{'.'.join(map(str, error['loc']))}: {error['msg']}" for error in errors[:4]]
            raise UsageError(
                f"the settings of the deployment {deployment.full_name} are not valid",
                expected=f"settings of softlabel {deployment.flow}, as in its --config file"
                + (", with all required ones, because it also runs when nobody fills in the form" if by_itself else ""),
                found="; ".join(found),
                where=f"deployments, {deployment.full_name}, parameters",
            ) from None


async def _install(config: DeployConfig, server: str, dry_run: bool) -> DeployReport:
    async with get_client() as client:
        await _started(client, server)
        installed = [await _work_pool(client, config.work_pool, dry_run)]
        installed += [await _queue(client, config.work_pool, name, text, dry_run) for name, text in QUEUES.items()]
        ids: dict[str, UUID] = {}
        for deployment in config.all_deployments:
            ids[deployment.full_name], result = await _deployment(client, config, deployment, dry_run)
            installed.append(result)
        notify = await _block(client, config.notify) if config.notify else None
        wanted = automations(config, ids, notify)
        for automation in wanted:
            installed.append(await _automation(client, automation, dry_run))
        former = {name for each in config.all_deployments for name in automation_names(each)}
        for name in sorted(former - {each.name for each in wanted}):
            if gone := await _automations_named(client, name):
                await _delete(client, gone, dry_run)
                installed.append(Installed("automation", name, "deleted"))
    return DeployReport(masked(server), config.work_pool, tuple(installed), dry_run)


async def _started(client: PrefectClient, server: str) -> None:
    """Wait until the server accepts connections.

    Raises:
        httpx.TransportError: if it still does not after a minute.
    """
    began = time.monotonic()
    waited = False
    while isinstance(problem := await client.api_healthcheck(), httpx.TransportError):
        if time.monotonic() - began > _SECONDS_TO_START:
            raise problem
        if not waited:
            print(line(logging.INFO, f"waiting for the Prefect server at {masked(server)}"), file=sys.stderr)
        waited = True
        await asyncio.sleep(1)


async def _work_pool(client: PrefectClient, name: str, dry_run: bool) -> Installed:
    try:
        await client.read_work_pool(name)
    except ObjectNotFound:
        template = await get_default_base_job_template_for_infrastructure_type("process")
        if not dry_run:
            with suppress(ObjectAlreadyExists):  # someone else deploys at the same time
                await client.create_work_pool(
                    WorkPoolCreate(name=name, type="process", base_job_template=template or {})
                )
        return Installed("work pool", name, "created")
    return Installed("work pool", name, "unchanged")


async def _queue(client: PrefectClient, pool: str, name: str, description: str, dry_run: bool) -> Installed:
    try:
        await client.read_work_queue_by_name(name, work_pool_name=pool)
    except ObjectNotFound:
        if not dry_run:
            with suppress(ObjectAlreadyExists):
                await client.create_work_queue(name, description=description, work_pool_name=pool)
        return Installed("queue", name, "created")
    return Installed("queue", name, "unchanged")


async def _deployment(
    client: PrefectClient, config: DeployConfig, deployment: DeploymentConfig, dry_run: bool
) -> tuple[UUID, Installed]:
    flow = flow_of(deployment)
    try:
        before: DeploymentResponse | None = await client.read_deployment_by_name(deployment.full_name)
    except ObjectNotFound:
        before = None
    wanted: dict[str, Any] = {
        "entrypoint": entrypoint(deployment),
        "path": None,
        "description": flow.description,
        "tags": [TAG, deployment.flow],
        "work_pool_name": config.work_pool,
        "work_queue_name": deployment.work_queue,
        "parameters": {"config": deployment.parameters} if deployment.parameters else {},
        "parameter_openapi_schema": parameter_schema(flow).model_dump(mode="json", exclude_unset=True),
        "job_variables": {"env": {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(config.heartbeat_seconds)}},
        "pull_steps": [],
        "enforce_parameter_schema": True,
    }
    active, schedules = _schedule(config, deployment, before)
    shown = f"{deployment.cron} {deployment.timezone}, {'on' if active else 'off'}" if deployment.cron else None
    limit = deployment.concurrency_limit
    if before and _same(before, wanted) and _same_schedule(before, schedules) and _limit(before) == limit:
        return before.id, Installed("deployment", deployment.full_name, "unchanged", shown)
    result = Installed("deployment", deployment.full_name, "updated" if before else "created", shown)
    if dry_run:
        return before.id if before else uuid4(), result
    identifier = await client.create_deployment(
        flow_id=await client.create_flow_from_name(flow.name),
        name=deployment.name,
        schedules=schedules,
        concurrency_limit=limit,
        paused=before.paused if before else False,
        **wanted,
    )
    return identifier, result


def _schedule(
    config: DeployConfig, deployment: DeploymentConfig, before: DeploymentResponse | None
) -> tuple[bool, list[DeploymentScheduleCreate]]:
    """Whether the deployment's schedule is to be on, and the schedule.

    A schedule that people turned on or off stays so, unless all are turned on. One without parameters can't run.
    """
    if deployment.schedule is None:
        return False, []
    was_active = bool(before and any(each.active for each in before.schedules))
    active = was_active or (config.schedules and bool(deployment.parameters))
    return active, [DeploymentScheduleCreate(schedule=deployment.schedule, active=active)]


def _same(before: DeploymentResponse, wanted: dict[str, Any]) -> bool:
    return all(getattr(before, name) == value for name, value in wanted.items() if name != "pull_steps") and not (
        before.pull_steps
    )


def _same_schedule(before: DeploymentResponse, schedules: list[DeploymentScheduleCreate]) -> bool:
    def plain(schedule: Any) -> dict[str, Any]:
        return schedule.model_dump(include={"schedule", "active"})  # type: ignore[no-any-return]

    return list(map(plain, before.schedules)) == list(map(plain, schedules))


def _limit(before: DeploymentResponse) -> int | None:
    return before.global_concurrency_limit.limit if before.global_concurrency_limit else None


async def _block(client: PrefectClient, name: str) -> UUID:
    kind, _, block = name.partition("/")
    try:
        return (await client.read_block_document_by_name(block, kind)).id
    except ObjectNotFound:
        raise UsageError(
            "the block that notify names does not exist on the Prefect server",
            expected="a notification block, as TYPE/NAME such as slack-webhook/team",
            found=name,
            do="create it in the UI under Blocks, then deploy again",
        ) from None


async def _automation(client: PrefectClient, wanted: AutomationCore, dry_run: bool) -> Installed:
    found = await _automations_named(client, wanted.name)
    if not found:
        if not dry_run:
            await client.create_automation(wanted)
            repeated = (await _automations_named(client, wanted.name))[1:]  # if someone else deploys at the same time
            await _delete(client, repeated, dry_run)
        return Installed("automation", wanted.name, "created")
    before, *repeated = found
    await _delete(client, repeated, dry_run)
    wanted.enabled = before.enabled  # someone may have paused it on purpose
    if _content(before) == _content(wanted):
        return Installed("automation", wanted.name, "updated" if repeated else "unchanged")
    if not dry_run:
        await client.update_automation(before.id, wanted)
    return Installed("automation", wanted.name, "updated")


async def _automations_named(client: PrefectClient, name: str) -> list[Automation]:
    """The automations of this name, in an order that is the same for everyone."""
    return sorted(await client.read_automations_by_name(name), key=lambda each: each.id)


async def _delete(client: PrefectClient, gone: Sequence[Automation], dry_run: bool) -> None:
    for each in [] if dry_run else gone:
        await client.delete_automation(each.id)


def _content(automation: AutomationCore) -> dict[str, Any]:
    return AutomationCore.model_validate(automation.model_dump()).model_dump()
