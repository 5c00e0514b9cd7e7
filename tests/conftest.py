"""Every test starts from the same random state, on one thread: the models are so small that a second thread only waits."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers for a test whether it runs alone or with others."""
    torch.manual_seed(0)
