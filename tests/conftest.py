"""Every test starts from the same random state, on one thread: the models are so small that a
second thread only waits. So do the processes that tests start: threads that wait for each other on
a busy machine are ten times slower."""

import os

import pytest
import torch

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def seeded():
    """The same random numbers for a test whether it runs alone or with others."""
    torch.manual_seed(0)


LONGEST = (
    *(
        "test_experiments.py",
        "test_parallel.py",
        "test_ablate.py",
        "test_train.py",
        "test_checkpoints.py",
        "test_sharded_export.py",
        "test_recipe.py",
    ),
    *("test_eval_task.py", "test_export.py"),
)


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what is slow
def pytest_collection_modifyitems(items):
    """The files that take longest come first: at the end one worker would be alone with them. Of
    the cases of a test marked `fast_cases`, all but so many are slow."""
    items.sort(
        key=lambda item: (
            LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST)
        )
    )
    cases = {}
    for item in items:
        if item.get_closest_marker("fast_cases"):
            cases.setdefault((item.path, item.originalname), []).append(item)
    for of_test in cases.values():
        (count,) = of_test[0].get_closest_marker("fast_cases").args
        # spread, so that each of several parameters has more than one of its values
        fast = {len(of_test) * index // count for index in range(count)}
        for index, item in enumerate(of_test):
            if index not in fast:
                item.add_marker(pytest.mark.slow)
