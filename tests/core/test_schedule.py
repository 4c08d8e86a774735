from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from emtool.core.errors import ConfigError, PointedError
from emtool.core.schedule import MAX_CHECKPOINTS, CheckpointSchedule, default_checkpoint_steps
from emtool.core.schedule_text import read_terms, schedule_from_value

CUSTOM_397 = [0, 25, 50, 100, 125, 150, 200, 250, 300, 397]


def planned(text: str, total_steps: int, **options: Any) -> list[int]:
    return list(CheckpointSchedule.parse(text).compile(total_steps, **options).planned_steps)


def test_custom_schedule_gives_the_documented_steps() -> None:
    assert planned("custom", 397) == CUSTOM_397
    assert planned("custom", 400) == [*CUSTOM_397[:-1], 400]
    assert planned("custom, 75", 397) == sorted([*CUSTOM_397, 75])


@pytest.mark.parametrize(
    ("text", "total", "expected"),
    [
        ("every 100", 397, [100, 200, 300, 397]),
        ("every 100", 400, [100, 200, 300, 400]),
        ("every 50, init, 75", 160, [0, 50, 75, 100, 150, 160]),
        ("every 25 until 150 then every 50 until 300", 400, [*range(25, 151, 25), 200, 250, 300, 400]),
        ("every 40 until 100 then every 30", 200, [40, 80, 120, 150, 180, 200]),
        ("0-150:25", 400, [0, 25, 50, 75, 100, 125, 150, 400]),
        ("3-5", 400, [3, 4, 5, 400]),
        ("10%, 50%", 397, [40, 198, 397]),
        ("even 5", 10, [0, 2, 5, 8, 10]),
        ("even 2", 7, [0, 7]),
        ("log 2", 7, [0, 7]),
        ("log 4", 100, [0, 1, 10, 100]),
        ("log 11", 10, list(range(11))),
        ("pow2 until 8, init", 20, [0, 1, 2, 4, 8, 20]),
        ("pow2", 20, [1, 2, 4, 8, 16, 20]),
        ("0-100:25, !50", 100, [0, 25, 75, 100]),
        ("0-100:25, !0-50:25", 100, [75, 100]),
        ("every 30, !final", 90, [30, 60]),
        ("every 30, !90", 90, [30, 60, 90]),
        ("FINAL", 9, [9]),
    ],
)
def test_terms_by_hand(text: str, total: int, expected: list[int]) -> None:
    assert planned(text, total) == expected


def test_counts_of_the_documented_schedules() -> None:
    assert len(planned("every 25", 400)) == 16
    assert len(planned("every 100", 400)) == 4
    assert len(planned("pythia", 143_000)) == 154


def test_epochs_need_a_dataset() -> None:
    assert planned("0.5ep, 1ep", 400, steps_per_epoch=200) == [100, 200, 400]
    assert planned("0.5ep", 400, steps_per_epoch=25) == [12, 400]
    with pytest.raises(ConfigError, match=r"'0\.5ep' counts epochs; give a dataset or --steps-per-epoch"):
        planned("0.5ep", 400)


def test_steps_past_the_end_are_left_out_and_named() -> None:
    compiled = CheckpointSchedule.parse("custom").compile(120)
    assert compiled.planned_steps == (0, 25, 50, 100, 120)
    assert compiled.skipped_steps == (125, 150, 200, 250, 300)


def test_default_steps_without_a_total_have_no_final_step() -> None:
    assert default_checkpoint_steps() == CUSTOM_397[:-1]
    assert default_checkpoint_steps(397) == CUSTOM_397
    assert default_checkpoint_steps(60) == [0, 25, 50, 60]


def test_a_configuration_file_may_give_a_text_a_number_a_list_or_phases() -> None:
    def steps(value: object) -> list[int]:
        return list(schedule_from_value(value).compile(400).planned_steps)

    assert steps("custom") == steps(["custom"]) == planned("custom", 400)
    assert steps(50) == [50, 400]
    assert steps([0, "10%", "every 150"]) == [0, 40, 150, 300, 400]
    phases = [{"every": 25, "until": 150}, {"every": 50, "until": 300}]
    assert steps(phases) == planned("every 25 until 150 then every 50 until 300", 400)
    assert steps({"every": 200}) == [200, 400]
    refused: list[object] = [True, 2.5, None, {"until": 5}, {"every": 5, "then": 3}, [[]], []]
    for bad in refused:
        with pytest.raises(ConfigError):
            steps(bad)


@pytest.mark.parametrize(
    ("text", "message", "place"),
    [
        ("every 5, cutsom", "unknown term 'cutsom' (did you mean 'custom'?)", "cutsom"),
        ("every 0", "zero stride 'every 0'", "every 0"),
        ("0-9:0", "zero stride '0-9:0'", "0-9:0"),
        ("9-3:1", "reversed range '9-3:1'", "9-3:1"),
        ("5, -5", "negative step '-5'", "-5"),
        ("", "empty checkpoint schedule", None),
        ("5,, 6", "empty term", None),
        ("every 25 until x", "unknown term 'x'", "x"),
        ("every 5 then every 6", "nothing can follow 'every N' without 'until'", "every 6"),
        ("every 5 until 9 then every 6 until 8", "ends before the one before it", "every 6 until 8"),
        ("even 1", "at least 2", "even 1"),
        ("2.5", "not a whole number", "2.5"),
        ("150%", "more than the whole run", "150%"),
        ("!custom", "'custom' cannot be removed, only a step or a range can", "custom"),
        ("25, !  foo", "unknown term 'foo'", "foo"),
        ("1" * 30, "more than 12 digits", "1" * 30),
    ],
)
def test_errors_quote_the_text_and_point_at_the_place(text: str, message: str, place: str | None) -> None:
    with pytest.raises(PointedError) as caught:
        CheckpointSchedule.parse(text)
    error = caught.value
    assert message in str(error)
    assert repr(text) in str(error)
    assert "\n" not in str(error)
    if place is not None:
        assert text[error.start : error.start + error.length] == place


@pytest.mark.parametrize("text", ["even 12", "log 12"])
def test_more_points_than_steps_are_refused(text: str) -> None:
    assert len(planned(text, 11)) == 12
    with pytest.raises(ConfigError, match=f"'{text}' asks for 12 distinct steps and the run has 11"):
        planned(text, 10)


def test_the_cap_holds_at_its_edge_and_before_anything_is_expanded() -> None:
    assert len(planned("every 1", MAX_CHECKPOINTS)) == MAX_CHECKPOINTS
    for text, total in (("every 1", MAX_CHECKPOINTS + 1), ("0-999999999999:1", 10), ("every 1", 10**11)):
        with pytest.raises(ConfigError, match="more than 100,000 checkpoints"):
            planned(text, total)


def test_a_schedule_that_removes_everything_is_refused() -> None:
    with pytest.raises(ConfigError, match="leaves no step"):
        planned("5, !5, !final", 10)
    with pytest.raises(ConfigError, match="0 steps"):
        planned("custom", 0)


points = st.one_of(
    st.integers(0, 2000).map(str),
    st.decimals(0, 100, places=1).map(lambda value: f"{value}%"),
    st.sampled_from(["init", "final"]),
)
ranges = st.tuples(st.integers(0, 500), st.integers(0, 500), st.integers(1, 90)).map(
    lambda t: f"{min(t[:2])}-{max(t[:2])}:{t[2]}"
)
everies = st.one_of(
    st.integers(1, 300).map(lambda n: f"every {n}"),
    st.tuples(st.integers(1, 99), st.integers(1, 300), st.integers(1, 99)).map(
        lambda t: f"every {t[0]} until {t[1]} then every {t[2]}"
    ),
)
spreads = st.sampled_from(["even 4", "log 5", "pow2", "pow2 until 64", "custom", "pythia"])
kept_terms = st.one_of(points, ranges, everies, spreads)
removed_terms = st.one_of(points, ranges).map(lambda text: f"!{text}")
schedules = st.tuples(st.lists(kept_terms, min_size=1, max_size=5), st.lists(removed_terms, max_size=3))
totals = st.integers(20, 1500)


def compiled_steps(terms: list[str], total: int) -> list[int] | None:
    try:
        return planned(", ".join(terms), total)
    except ConfigError as error:
        if "leaves no step" not in str(error):
            raise
        return None


@given(schedules, totals)
def test_steps_are_increasing_inside_the_run_and_removal_wins(parts: tuple[list[str], list[str]], total: int) -> None:
    kept, removed = parts
    steps = compiled_steps([*kept, *removed], total)
    if steps is None:
        return
    assert all(a < b for a, b in pairwise(steps))
    assert steps[0] >= 0
    assert steps[-1] <= total
    assert (steps[-1] == total) == ("!final" not in removed)
    without = set(planned(", ".join(kept), total))
    assert set(steps) <= without
    for text in removed:
        gone = set(planned(f"{text[1:]}", total)) - {total}
        assert not set(steps) & gone


@given(schedules, totals, st.randoms())
def test_a_union_commutes_and_printing_round_trips(parts: tuple[list[str], list[str]], total: int, random: Any) -> None:
    terms = [*parts[0], *parts[1]]
    steps = compiled_steps(terms, total)
    shuffled = list(terms)
    random.shuffle(shuffled)
    assert compiled_steps(shuffled, total) == steps
    printed = str(CheckpointSchedule.parse(", ".join(terms)))
    assert str(CheckpointSchedule.parse(printed)) == printed
    assert compiled_steps([printed], total) == steps


@given(st.decimals(0, 100, places=3), st.integers(1, 10**9))
def test_percentages_are_exact_with_ties_to_even(percent: Any, total: int) -> None:
    from fractions import Fraction

    step = round(Fraction(str(percent)) * total / 100)
    assert planned(f"{percent}%", total) == sorted({step, total})


@given(st.integers(1, 50), st.integers(1, 400), st.integers(1, 50), st.integers(1, 2000))
def test_phases_follow_levanters_rule(first: int, until: int, second: int, total: int) -> None:
    expected = {s for s in range(1, total + 1) if (s % first == 0 if s <= until else s % second == 0)}
    assert set(planned(f"every {first} until {until} then every {second}", total)) == expected | {total}


@given(st.integers(2, 60), st.integers(59, 5000))
def test_spreads_have_as_many_distinct_steps_as_asked(number: int, total: int) -> None:
    for kind in ("even", "log"):
        steps = planned(f"{kind} {number}", total)
        assert len(steps) == number
        assert (steps[0], steps[-1]) == (0, total)


TOKENS = [
    "every",
    "until",
    "then",
    "log",
    "even",
    "pow2",
    "custom",
    "pythia",
    "init",
    "final",
    "25",
    "0",
    "10%",
    "0.5ep",
]


@settings(max_examples=2000, deadline=None)
@given(st.one_of(st.lists(st.sampled_from([*TOKENS, ",", "!", "-", ":", " "]), max_size=10).map("".join), st.text()))
@example("0.5ep until")
def test_any_text_gives_a_schedule_or_a_config_error(text: str) -> None:
    refusal = ""
    try:
        CheckpointSchedule.parse(text).compile(397, steps_per_epoch=397)
    except ConfigError as error:
        refusal = str(error)
    assert "\n" not in refusal


def test_gpt_neox_examples_of_linear_and_logarithmic_factors() -> None:
    """Source: GPT-NeoX, configs/neox_arguments.md, `checkpoint_factor` with `train_iters` 100."""
    assert planned("every 20", 100) == [20, 40, 60, 80, 100]
    assert planned("pow2", 100) == [1, 2, 4, 8, 16, 32, 64, 100]


@settings(max_examples=200, deadline=None)
@given(factor=st.integers(1, 300), total=st.integers(1, 1000))
def test_every_follows_the_linear_rule_of_gpt_neox(factor: int, total: int) -> None:
    """The factor is added until the last step, which is always saved."""
    steps, step = set(), factor
    while step < total:
        steps.add(step)
        step += factor
    assert planned(f"every {factor}", total) == sorted({*steps, total})


def test_a_phase_that_could_never_hold_a_step_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"the phase until 10 ends at step 10, not after .* ends at 200"):
        planned("every 25 until 50% then every 10 until 10", 400)


def test_a_normal_form_longer_than_its_text_is_read() -> None:
    text = ",".join(f"{n}-{n + 1}" for n in range(0, 2000, 2))
    parsed = CheckpointSchedule.parse(text)
    assert read_terms(str(parsed)) == parsed


@pytest.mark.parametrize("total", [397.0, "397", True])
def test_default_steps_take_whole_numbers_only(total: object) -> None:
    with pytest.raises(ConfigError, match="whole number"):
        default_checkpoint_steps(total)  # type: ignore[arg-type]
