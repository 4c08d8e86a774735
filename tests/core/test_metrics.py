import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emtool.core.metrics import Estimate, bootstrap_difference, bootstrap_mean, exact, flat, sigmoid


def test_sigmoid_by_hand_and_without_overflow() -> None:
    assert sigmoid(0.0) == 0.5
    assert sigmoid(math.log(3)) == pytest.approx(0.75)
    assert sigmoid(-1000.0) == 0.0
    assert sigmoid(1000.0) == 1.0


def test_same_seed_same_interval_and_another_seed_another() -> None:
    values = [0.1, 0.4, 0.35, 0.9, 0.2]
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1)
    assert bootstrap_mean(values, seed=1) != bootstrap_mean(values, seed=2)


def test_interval_has_the_width_of_the_normal_theory() -> None:
    values = [float(i % 10) for i in range(400)]
    estimate = bootstrap_mean(values, seed=0)
    half = 1.96 * math.sqrt(8.25 / 400)
    assert estimate.value == pytest.approx(4.5)
    assert estimate.high - estimate.value == pytest.approx(half, rel=0.05)
    assert estimate.value - estimate.low == pytest.approx(half, rel=0.05)
    assert estimate.n == 400


def test_a_paired_difference_removes_what_items_share() -> None:
    before = [0.0, 10.0, 20.0, 30.0]
    after = [value + 1.0 for value in before]
    difference = bootstrap_difference(after, before, seed=0)
    assert (difference.value, difference.low, difference.high) == (1.0, 1.0, 1.0)
    assert difference.excludes_zero
    assert not bootstrap_difference(before, before, seed=0).excludes_zero


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=12), st.integers(0, 9))
def test_the_mean_lies_within_the_range_and_the_interval_is_ordered(values: list[float], seed: int) -> None:
    estimate = bootstrap_mean(values, seed=seed)
    assert min(values) - 1e-9 <= estimate.low <= estimate.high <= max(values) + 1e-9


def test_bounded_memory_draws_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [0.1, 0.4, 0.35, 0.9, 0.2, 0.7, 0.3]
    whole = bootstrap_mean(values, seed=1)
    monkeypatch.setattr("emtool.core.metrics.MAX_DRAWS", 1000)
    assert bootstrap_mean(values, seed=1) == whole


def test_what_is_exact_is_written_as_its_value_alone() -> None:
    metrics = {"num_answers": exact(3, n=3), "mean": Estimate(value=1.0, low=0.5, high=2.0, n=4)}
    assert flat(metrics) == {"num_answers": 3, "mean": 1.0, "mean_low": 0.5, "mean_high": 2.0, "mean_n": 4}
