import pytest

from emtool.core.errors import CheckpointError, ConfigError
from emtool.core.steps import select_steps

SAVED = [0, 25, 50, 397]


def test_steps_are_named_in_any_order_and_taken_once() -> None:
    assert select_steps(None, SAVED) == SAVED
    assert select_steps("final, 25,init,25", SAVED) == [0, 25, 397]


@pytest.mark.parametrize("text", ["", "25,,50", "-1", "every 25", "1.5", "²"])
def test_what_is_not_a_step_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a step"):
        select_steps(text, SAVED)


def test_a_step_without_a_checkpoint_names_those_that_are_there() -> None:
    with pytest.raises(CheckpointError, match="no checkpoint of step 30, 31; there are: 0, 25, 50, 397"):
        select_steps("25,31,30", SAVED)
    with pytest.raises(ConfigError, match="'final' is not a step"):
        select_steps("final", [])
