"""The flow that makes a view over several tables."""

from prefect import flow, task

from softlabel.pipeline.config.tables import MixConfig
from softlabel.storage.views.mixing import make_view
from softlabel.storage.views.view_inspection import ViewInspection, inspect_view


@task(name="mix", task_run_name="mix {config.view}", persist_result=False)
def mix_tables(config: MixConfig) -> ViewInspection:
    """Make the view, and see what it holds."""
    weights = config.weights or (1.0,) * len(config.tables)
    return inspect_view(make_view(config.view, config.tables, weights, config.how))


@flow(name="mix", flow_run_name="mix {config.view}", persist_result=False)
def mix_flow(config: MixConfig) -> ViewInspection:
    """Make a view: several tables with one tokenizer that can be read like one."""
    return mix_tables(config)
