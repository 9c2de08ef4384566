"""Random numbers of the tests of the loss."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same numbers in every run, whichever tests have run before in this process."""
    torch.manual_seed(0)
