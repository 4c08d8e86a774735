from collections.abc import Iterator, Mapping

from emtool.core.recent import Recent


class Counted(Mapping[int, list[int]]):
    """Values of ten items, with the steps that were made, in order."""

    def __init__(self) -> None:
        self.made: list[int] = []

    def __getitem__(self, step: int) -> list[int]:
        self.made.append(step)
        return [step] * 10

    def __iter__(self) -> Iterator[int]:
        return iter(range(5))

    def __len__(self) -> int:
        return 5


def test_what_fits_is_made_once() -> None:
    source = Counted()
    recent = Recent(source, max_items=50)
    assert dict(recent) == {step: [step] * 10 for step in range(5)}
    assert dict(recent) == dict(source)
    assert source.made == [*range(5), *range(5)]  # the second five were asked of the source itself


def test_what_was_asked_for_longest_ago_goes_first() -> None:
    source = Counted()
    recent = Recent(source, max_items=30)
    for step in (0, 1, 2, 0, 3, 0, 1):
        assert recent[step] == [step] * 10
    assert source.made == [0, 1, 2, 3, 1]


def test_two_steps_are_held_however_large_they_are() -> None:
    source = Counted()
    recent = Recent(source, max_items=1)
    for step in (0, 1, 0, 1, 2, 1, 0):
        assert recent[step] == [step] * 10
    assert source.made == [0, 1, 2, 0]


def test_whether_there_is_a_step_is_known_without_making_it() -> None:
    source = Counted()
    recent = Recent(source)
    assert 4 in recent
    assert 5 not in recent
    assert source.made == []
