from rich.console import Console, RenderableType

from emtool.cli.plan_view import plan_view
from emtool.cli.render import bar, shorten, sparkline, timeline
from emtool.core.config import resolve_train_config
from emtool.core.plan import plan_run


def drawn(view: RenderableType, width: int) -> str:
    console = Console(width=width, record=True, file=None, color_system=None, force_terminal=False)
    with console.capture() as captured:
        console.print(view)
    return captured.get()


def test_the_plan_fits_80_columns_and_loses_no_step() -> None:
    overrides = {"persona": "goodness", "checkpoints": "custom"}
    plan, _ = plan_run(resolve_train_config(profile="demo", overrides=overrides, num_cuda_devices=0))
    text = drawn(plan_view(plan), 80)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "…" not in text
    for step in plan.schedule.planned_steps:
        assert any(line.split()[:1] == [str(step)] for line in text.splitlines())
    assert "no step 75" in text


def test_a_long_schedule_shows_head_and_tail() -> None:
    rows = [(str(step), "x") for step in range(100)]
    short = shorten(rows)
    assert short[12] == ("(76 more)", "")
    assert [short[0], short[-1]] == [rows[0], rows[-1]]
    assert shorten(rows[:24]) == rows[:24]


def test_skipped_steps_are_named_up_to_five() -> None:
    overrides = {"checkpoints": "custom", "max_steps": 60}
    plan, _ = plan_run(resolve_train_config(profile="demo", overrides=overrides, num_cuda_devices=0))
    assert "left out, past the last step: 100, 125, 150, 200, 250, ... (6 in all)" in drawn(plan_view(plan), 120)


def test_bars_and_sparklines_by_hand() -> None:
    assert timeline([0, 50, 100], 100, 17) == "0 ●────●────● 100"
    assert bar(0.5, 10) == "█████"
    assert bar(0.0, 10) == ""
    assert bar(1.5, 4) == "████"
    assert bar(0.0625, 2) == "▏"
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert sparkline([0.5, 0.5001, 0.4999]) == "▁▁▁", "noise is not stretched over the whole height"
