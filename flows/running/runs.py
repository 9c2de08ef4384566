"""The Prefect run of a flow: everything that the flow writes records its id."""

from collections.abc import Iterator
from contextlib import contextmanager

from prefect.context import FlowRunContext

from softlabel.storage.identity import working_for


@contextmanager
def recorded() -> Iterator[None]:
    """Record the current flow run in the commits, records and students that the block writes."""
    context = FlowRunContext.get()
    if context is None or context.flow_run is None or context.flow is None:
        yield
        return
    with working_for(str(context.flow_run.id), context.flow.name):
        yield
