"""The flow that keeps a table tidy: names versions, lets go of them, and deletes what nobody needs."""

from dataclasses import dataclass

from prefect import flow, task
from prefect.artifacts import create_table_artifact

from softlabel.pipeline.config.tables import MaintainConfig
from softlabel.storage.table import Table
from softlabel.storage.upkeep.maintenance import Maintenance, maintain
from softlabel.storage.versions import Pin, Tag, parse, pins, tag, tags, unpin, untag


@dataclass(frozen=True)
class MaintainReport:
    """What was deleted, and who needs which version now."""

    table: str
    deletion: Maintenance | None
    """None if only names were asked for."""
    tags: list[Tag]
    pins: list[Pin]


@task(name="names", task_run_name="names {config.table}", persist_result=False)
def change_names(config: MaintainConfig) -> bool:
    """Tag, untag and unpin; whether any of that was asked for."""
    table = parse(config.table)[0]
    if config.untag:
        untag(table, config.untag)
    if config.unpin:
        unpin(table, config.unpin)
    if config.tag:
        name, _, version = config.tag.partition("=")
        tag(table, Table.open(f"{table}@{version}" if version else config.table).version, name)
    return bool(config.untag or config.unpin or config.tag)


@task(name="delete", task_run_name="delete {config.table}", persist_result=False)
def delete(config: MaintainConfig) -> Maintenance:
    """Delete what is not needed."""
    keep_versions = config.keep_versions if config.vacuum else None
    return maintain(
        parse(config.table)[0], keep_versions=keep_versions, grace_hours=config.grace_hours, dry_run=config.dry_run
    )


@flow(name="maintain", flow_run_name="maintain {config.table}", persist_result=False)
def maintain_flow(config: MaintainConfig) -> MaintainReport:
    """Delete what no version of a table names and nobody is writing; or name versions, and let go of them."""
    table = Table.open(config.table).location
    named = change_names(config)
    deletion = delete(config) if config.vacuum or not named else None
    if deletion and deletion.deleted and not deletion.dry_run:
        rows = [vars(leftover) for leftover in deletion.deleted]
        create_table_artifact(rows, key="deleted", description=f"Deleted from {table}")
    return MaintainReport(table, deletion, list(tags(table).values()), pins(table))
