from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emtool.core.errors import ConfigError
from emtool.core.schedule import CheckpointSchedule, default_checkpoint_steps

CUSTOM_397 = [0, 25, 50, 100, 125, 150, 200, 250, 300, 397]


def planned(text: str, total_steps: int) -> list[int]:
    return list(CheckpointSchedule.parse(text).compile(total_steps).planned_steps)


def test_custom_schedule_gives_the_documented_steps() -> None:
    assert planned("custom", 397) == CUSTOM_397
    assert planned("custom", 400) == [*CUSTOM_397[:-1], 400]


def test_every_counts_multiples_and_adds_the_final_step() -> None:
    assert planned("every 100", 397) == [100, 200, 300, 397]
    assert planned("every 100", 400) == [100, 200, 300, 400]
    assert len(planned("every 25", 400)) == 16


def test_terms_form_a_union_whatever_their_order() -> None:
    assert planned("every 50, init, 75", 160) == planned("75,init,every 50,50", 160) == [0, 50, 75, 100, 150, 160]


def test_steps_past_the_end_are_left_out_and_named() -> None:
    compiled = CheckpointSchedule.parse("custom").compile(120)
    assert compiled.planned_steps == (0, 25, 50, 100, 120)
    assert compiled.skipped_steps == (125, 150, 200, 250, 300)


def test_default_steps_without_a_total_have_no_final_step() -> None:
    assert default_checkpoint_steps() == CUSTOM_397[:-1]
    assert default_checkpoint_steps(397) == CUSTOM_397
    assert default_checkpoint_steps(60) == [0, 25, 50, 60]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cutsom", "unknown schedule 'cutsom'; did you mean 'custom'"),
        ("every 0", "zero stride in schedule term 'every 0'"),
        ("", "empty checkpoint schedule"),
        (" , ", "empty checkpoint schedule"),
        ("-5", "unknown schedule '-5'"),
    ],
)
def test_bad_schedules_are_one_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        CheckpointSchedule.parse(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_without_steps_is_refused() -> None:
    with pytest.raises(ConfigError, match="0 steps"):
        CheckpointSchedule.parse("custom").compile(0)


@given(
    points=st.lists(st.integers(0, 2000), max_size=8),
    stride=st.integers(1, 500),
    total=st.integers(1, 1500),
)
def test_planned_steps_are_increasing_inside_the_run_and_end_with_it(
    points: list[int], stride: int, total: int
) -> None:
    compiled = CheckpointSchedule.parse(",".join([*map(str, points), f"every {stride}"])).compile(total)
    steps = compiled.planned_steps
    assert all(a < b for a, b in pairwise(steps))
    assert steps[0] >= 0
    assert steps[-1] == total
    assert set(compiled.skipped_steps) == {point for point in points if point > total}
    assert set(steps) == {p for p in points if p <= total} | set(range(stride, total + 1, stride)) | {total}
