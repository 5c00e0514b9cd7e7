"""What an evaluation is told to do."""

import pytest

from owlfuse.evaluation.validation import LEAST, Evaluation


@pytest.mark.parametrize("name", [*LEAST, "max_questions"])
def test_numbers_that_leave_nothing_to_do_are_refused_before_the_training(name):
    Evaluation(**{name: max(1, LEAST.get(name, 1))})
    with pytest.raises(ValueError, match=rf"evaluation.{name} is -1, expected at least \d"):
        Evaluation(**{name: -1})
    if LEAST.get(name, 1):
        with pytest.raises(ValueError, match=f"evaluation.{name} is 0, expected at least 1"):
            Evaluation(**{name: 0})
