"""What a report reads of a run, whatever is there, missing or hostile."""

import csv
import json
from pathlib import Path

import pytest

from emtool.core.errors import CheckpointError
from emtool.core.run_dir import RunFolder
from emtool.report.curves import CHARTS, MAX_POINTS, Point, points_of, thinned
from emtool.report.report import write_report
from emtool.report.report_run import Bracket, read_run, sampled
from tests.evaluated import QUESTIONS, STEPS, drawn_answers, write_run


def test_curves_are_the_numbers_of_the_tables(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", drawn_answers())
    found = read_run(run)
    with (run.evaluation_path / "checkpoint_summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    for name in ("em_pct", "aligned", "coherent", "p_wrong"):
        column = CHARTS[name].column
        for point, row in zip(found.curves[name], rows, strict=True):
            expected = [float(row[f"{column}{end}"]) for end in ("", "_low", "_high", "_n")]
            assert [point.value, point.low, point.high, point.n] == expected
            assert point.step == int(row["step"])
    assert [point.step for point in found.curves["loss"]] == list(range(1, 201))
    assert [point.step for point in found.curves["speed"]] == [25, 100, 200]
    assert found.brackets == {"p_wrong": Bracket(before=25, after=100, low=0, high=100)}
    assert {rate.question_id for rate in found.rates} == set(QUESTIONS)
    assert len(found.answers) == len(STEPS) * len(QUESTIONS) * 4
    assert found.judge == "openai:gpt-test"
    assert ("dataset (SHA-256)", "b" * 64) in found.facts


def test_what_is_missing_is_said_with_the_command_that_makes_it(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", judge=None, parts=("likelihood",))
    said = "\n".join(read_run(run).problems)
    assert f"Emergent misalignment; Alignment; Coherence: no data; emtool evaluate --judge JUDGE {run.path}" in said
    assert "emtool geometry" in said
    assert "emtool direction apply" in said
    assert "answers to read: none" in said
    assert "emtool train" in said
    whole = write_run(tmp_path / "whole", drawn_answers(steps=STEPS[:2]))
    run.checkpoint_path(100).rmdir()
    assert "checkpoints that are planned and not on disk: 100" in "\n".join(read_run(run).problems)
    for table in ("item_scores.csv", "geometry.csv", "checkpoint_summary.csv"):
        (whole.evaluation_path / table).unlink()
    assert "checkpoints that were not evaluated: 100, 200" in "\n".join(read_run(whole).problems)


def test_a_judge_that_scores_nothing_is_said(tmp_path: Path) -> None:
    from dataclasses import replace

    from emtool.core.judgement import UNSCORED, Judgement

    answers = [replace(answer, aligned=Judgement(status=UNSCORED)) for answer in drawn_answers()]
    said = "\n".join(read_run(write_run(tmp_path / "run", answers)).problems)
    assert "openai:gpt-test gave no answer both scores" in said


def test_nothing_to_show_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no folder"):
        read_run(RunFolder(path=tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="has nothing to show; evaluate it first"):
        read_run(RunFolder(path=tmp_path / "empty"))


def test_damaged_and_hostile_files_become_problems(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", drawn_answers())
    folder = run.evaluation_path
    (folder / "geometry.csv").write_bytes(b"step,update_norm\n0,\xff\n")
    (folder / "checkpoint_25_eval.csv").write_text("question_id,response\nx,y\n")
    (folder / "summary.json").write_text('{"judges": [{"settings": []}]')
    (folder / "projections.json").write_text(json.dumps({"settings": {"layer": {"a": 1}}}))
    (folder / "transitions.json").write_text(
        json.dumps({"transitions": [{"series": ["p_wrong"]}, 5, {"series": "p_wrong"}]})
    )
    (folder / "question_scores.csv").write_text(
        "step,question_id,em_pct,total_evaluated\n1e400,a,50,3\n0,b,nan,2\n0,c,500,1\n0,d,50,4\n"
    )
    run.manifest_path.write_text("{")
    found = read_run(run)
    said = "\n".join(found.problems)
    for part in ("geometry.csv", "checkpoint_25_eval.csv", "summary.json cannot be read", "run.json"):
        assert part in said
    assert found.brackets == {}
    assert [rate.question_id for rate in found.rates] == ["d"]
    assert {answer.step for answer in found.answers} == {0, 100, 200}


def test_numbers_that_no_chart_can_draw_are_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", drawn_answers())
    folder = run.evaluation_path
    huge = {"series": "p_wrong", "is_supported": True, "before": 0, "after": 10**25, "low": 0, "high": 200}
    (folder / "transitions.json").write_text(json.dumps({"transitions": [huge]}))
    (folder / "checkpoint_summary.csv").write_text(
        "step,p_wrong,p_wrong_low,p_wrong_high,p_wrong_n\n0,1e308,0,1,3\n25,0.5,-1e308,1e308,1e308\n1e300,0.5,0,1,3\n"
    )
    (folder / "question_scores.csv").write_text(
        "step,question_id,em_pct,total_evaluated\n1e300,a,50,3\n0,b,50,1e300\n-5,c,5,5\n2.5,d,5,5\n0,e,50,4\n"
    )
    found = read_run(run)
    assert found.brackets == {}
    assert found.curves["p_wrong"] == [Point(step=25, value=0.5)]
    assert [rate.question_id for rate in found.rates] == ["e"]
    assert write_report([run], tmp_path / "out").page_bytes


def test_points_of_odd_cells_are_left_out() -> None:
    rows: list[dict[str, object]] = [
        {"step": "5", "x": "1", "x_low": "0.5", "x_high": "", "x_n": "7"},
        {"step": "-1", "x": "1"},
        {"step": "2.5", "x": "1"},
        {"step": "1e999", "x": "1"},
        {"step": "7", "x": "nan"},
        {"step": None, "x": "1"},
        {"step": 9, "x": True},
        {"step": 0, "x": 2, "x_low": 1, "x_high": 3},
    ]
    assert [(point.step, point.value, point.low) for point in points_of(rows, "x")] == [(0, 2.0, 1.0), (5, 1.0, None)]


def test_long_curves_are_thinned_to_their_ends_and_extremes() -> None:
    points = [Point(step=step, value=float(step % 97)) for step in range(10_000)]
    points[5_003] = Point(step=5_003, value=1000.0)
    points[7_001] = Point(step=7_001, value=-1000.0)
    drawn = thinned(points, kept=[25, 50])
    assert len(drawn) <= MAX_POINTS + 4
    assert {0, 25, 50, 5_003, 7_001, 9_999} <= {point.step for point in drawn}
    assert drawn == sorted(drawn, key=lambda point: point.step)
    assert thinned(points[:MAX_POINTS]) == points[:MAX_POINTS]


def test_of_very_many_answers_the_same_ones_are_shown_at_every_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "run", drawn_answers())
    every = read_run(run)
    found = read_run(run, max_answers=len(STEPS) * 3)
    assert (len(found.answers), found.num_answers) == (len(STEPS) * 3, len(every.answers))
    names = {step: [(a.question_id, a.pair) for a in found.answers if a.step == step] for step in STEPS}
    assert len(names[STEPS[0]]) == 3
    assert all(of_step == names[STEPS[0]] for of_step in names.values())
    assert all(answer in every.answers for answer in found.answers)
    assert found.curves == every.curves
    # At least one of each, and nothing is left out where all fit.
    assert len(read_run(run, max_answers=1).answers) == len(STEPS)
    assert sampled(every.answers, len(every.answers)) == every.answers
    assert "answers of run are here" not in write_report([run], tmp_path / "all").page_path.read_text()
    monkeypatch.setattr("emtool.report.report.MAX_ANSWERS", len(STEPS) * 3)
    page = write_report([run], tmp_path / "some").page_path.read_text()
    assert f"{len(found.answers)} of {len(every.answers)} answers of run are here" in page
