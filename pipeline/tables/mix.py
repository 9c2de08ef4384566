"""Make a view: several tables with one tokenizer that can be trained on, evaluated and inspected like one."""

from softlabel.pipeline.config.tables import MixConfig
from softlabel.storage.views.mixing import make_view
from softlabel.storage.views.view_inspection import ViewInspection, inspect_view


def mix(config: MixConfig) -> ViewInspection:
    """Make the view that the settings describe, and return what it holds.

    Raises:
        ProvenanceError: if the tables do not fit together.
        TableError: if another view is there already.
        TableNotFoundError: if a table is not there.
    """
    weights = config.weights or (1.0,) * len(config.tables)
    return inspect_view(make_view(config.view, config.tables, weights, config.how))
