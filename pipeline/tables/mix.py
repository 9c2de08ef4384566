"""Combine several tables with the same tokenizer into a view, which can be used like one table."""

from softlabel.pipeline.config.tables import MixConfig
from softlabel.storage.views.mixing import make_view
from softlabel.storage.views.view_inspection import ViewInspection, inspect_view


def mix(config: MixConfig) -> ViewInspection:
    """Make a view, and return what it holds.

    Raises:
        ProvenanceError: if the tables can't be combined.
        TableError: if the folder already holds a different view.
        TableNotFoundError: if a table does not exist.
    """
    weights = config.weights or (1.0,) * len(config.tables)
    return inspect_view(make_view(config.view, config.tables, weights, config.how))
