import pytest

from emtool.core.by_step import ByStep, Recent


class Counted:
    """Makes ten items for a step, and knows the steps that were made, in order."""

    def __init__(self) -> None:
        self.made: list[int] = []

    def __call__(self, step: int) -> list[int]:
        self.made.append(step)
        return [step] * 10


def test_a_value_is_made_whenever_it_is_asked_for() -> None:
    make = Counted()
    values = ByStep([3, 1], make)
    assert (list(values), len(values)) == ([3, 1], 2)
    assert dict(values) == {3: [3] * 10, 1: [1] * 10}
    assert values[3] == [3] * 10
    assert make.made == [3, 1, 3]


def test_a_step_that_is_none_has_no_value() -> None:
    make = Counted()
    for values in (ByStep([3], make), Recent([3], make)):
        assert values.get(2) is None
        with pytest.raises(KeyError):
            values[2]
    assert make.made == []


def test_what_fits_is_made_once() -> None:
    make = Counted()
    recent = Recent(range(5), make, max_items=50)
    for _ in range(2):
        assert dict(recent) == {step: [step] * 10 for step in range(5)}
    assert make.made == [*range(5)]


def test_what_was_asked_for_longest_ago_goes_first() -> None:
    make = Counted()
    recent = Recent(range(5), make, max_items=30)
    for step in (0, 1, 2, 0, 3, 0, 1):
        assert recent[step] == [step] * 10
    assert make.made == [0, 1, 2, 3, 1]


def test_two_steps_are_held_however_large_they_are() -> None:
    make = Counted()
    recent = Recent(range(5), make, max_items=1)
    for step in (0, 1, 0, 1, 2, 1, 0):
        assert recent[step] == [step] * 10
    assert make.made == [0, 1, 2, 0]


def test_whether_there_is_a_step_is_known_without_making_it() -> None:
    make = Counted()
    for values in (ByStep(range(5), make), Recent(range(5), make)):
        assert 4 in values
        assert 5 not in values
    assert make.made == []
