"""Every test starts from the same random state, on one thread: the models are so small that a second thread only waits. So do
the processes that tests start: threads that wait for each other on a busy machine are ten times slower."""

import os

import pytest
import torch

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers for a test whether it runs alone or with others."""
    torch.manual_seed(0)
