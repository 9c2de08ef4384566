"""Combine several tables with the same tokenizer into a view, which can be used like one table."""

from dataclasses import dataclass

from softlabel.pipeline.config.tables import MixConfig
from softlabel.storage.opening import is_view
from softlabel.storage.views.mixing import make_view
from softlabel.storage.views.view_inspection import ViewInspection, inspect_view


@dataclass(frozen=True)
class MixReport(ViewInspection):
    """What the view holds."""

    dry_run: bool = False
    """Whether nothing was written, and this is what the view would hold."""
    exists: bool = False
    """Whether the same view was there already."""


def mix(config: MixConfig, *, dry_run: bool = False) -> MixReport:
    """Make a view, and return what it holds.

    Args:
        config: the tables and how to combine them.
        dry_run: only report what the view would hold.

    Raises:
        ProvenanceError: if the tables can't be combined.
        TableError: if the folder already holds a different view.
        TableNotFoundError: if a table does not exist.
    """
    weights, exists = config.weights or (1.0,) * len(config.tables), is_view(config.view)
    view = make_view(config.view, config.tables, weights, config.how, dry_run=dry_run)
    return MixReport(**vars(inspect_view(view)), dry_run=dry_run, exists=exists)
