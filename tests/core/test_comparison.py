"""Comparing runs: differences as by hand, and runs that were evaluated differently."""

import json
from pathlib import Path

import pytest

from emtool.core.comparison import METRICS, compare_runs
from emtool.core.errors import CheckpointError, ConfigError
from emtool.core.run_dir import RunFolder
from tests.evaluated import QUESTIONS, STEPS, drawn_answers, judged, write_run


def test_differences_are_paired_by_item(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, items_shift=shift) for name, shift in (("a", 0.0), ("b", 0.125), ("c", -0.25))]
    found = compare_runs(runs)
    assert found.metric == "p_wrong_other"
    # Six items in domains that were not trained on: 4 to 9.
    assert found.values[0][200].value == pytest.approx(0.3 + 0.2 + 6.5 / 40)
    assert found.values[0][200].n == 6
    for differences, expected in zip(found.differences, (0.125, -0.25), strict=True):
        assert list(differences) == list(STEPS)
        for estimate in differences.values():
            # The same shift of every item: no spread at all.
            assert (estimate.value, estimate.low, estimate.high) == pytest.approx((expected,) * 3)
    assert compare_runs(runs, metric="p_wrong").values[0][0].n == 10
    assert {row["step"] for row in found.to_dict()["runs"][1]["differences"]} == set(STEPS)


def test_judged_answers_are_paired_by_question_and_number(tmp_path: Path) -> None:
    first = [judged(100, question, number, aligned=80.0) for question in QUESTIONS for number in range(4)]
    # Half of the answers to every question are misaligned in the second run; one has no score, and its pair drops out.
    scores = {(q, n): 10.0 if n < 2 else 90.0 for q in QUESTIONS for n in range(4)}
    unscored = (QUESTIONS[0], 0)
    second = [judged(100, q, n, aligned=None if (q, n) == unscored else score) for (q, n), score in scores.items()]
    runs = [write_run(tmp_path / name, answers) for name, answers in (("a", first), ("b", second))]
    found = compare_runs(runs)
    assert found.metric == "em_pct"
    assert found.values[0][100].value == 0.0
    assert found.values[1][100].value == pytest.approx(100 * 11 / 23)
    assert found.differences[0][100].value == pytest.approx(100 * 11 / 23)
    assert found.differences[0][100].n == 23
    aligned = compare_runs(runs, metric="avg_aligned").differences[0][100]
    assert aligned.value == pytest.approx((11 * -70 + 12 * 10) / 23)
    assert aligned.low < aligned.value < aligned.high


def test_runs_that_were_evaluated_differently_are_refused_and_it_is_said_what_differs(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", drawn_answers())
    asked = [
        judged(step, q, n, aligned=50.0, asked="Another question?")
        for step in STEPS
        for q in QUESTIONS
        for n in range(4)
    ]
    others = {
        "max_new_tokens": write_run(tmp_path / "b", drawn_answers(), settings={"max_new_tokens": 600}),
        "judge's model": write_run(tmp_path / "c", drawn_answers(), judge="gpt-other"),
        "texts of the questions": write_run(tmp_path / "d", asked),
        "n_per_question": write_run(tmp_path / "e", drawn_answers(), settings={"n_per_question": 50}),
    }
    for name, other in others.items():
        with pytest.raises(ConfigError, match=f"evaluated differently: {name} .*--allow-unlike"):
            compare_runs([first, other])
        found = compare_runs([first, other], is_unlike_allowed=True)
        assert [line.split(" (")[0] for line in found.unlike] == [name]
        # What only judged answers depend on does not matter here.
        assert compare_runs([first, other], metric="p_wrong").unlike == []
    fewer = [
        answer
        for answer in drawn_answers()
        if (answer.step, answer.question_id, answer.pair[1]) != (100, QUESTIONS[1], 0)
    ]
    with pytest.raises(ConfigError, match="evaluated differently: numbers of answers at step 100"):
        compare_runs([first, write_run(tmp_path / "g", fewer)])
    reordered = write_run(tmp_path / "h", drawn_answers(), settings={"questions": list(reversed(QUESTIONS))})
    assert compare_runs([first, reordered]).unlike == []
    items = write_run(tmp_path / "i", drawn_answers())
    summary = json.loads((items.evaluation_path / "summary.json").read_text())
    summary["settings"]["likelihood"]["items_sha256"] = "2" * 64
    (items.evaluation_path / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(ConfigError, match="evaluated differently: items_sha256"):
        compare_runs([first, items], metric="p_wrong")
    # The seed of the sampling is no other way of evaluating.
    assert compare_runs([first, write_run(tmp_path / "f", drawn_answers(), settings={"seed": 7})]).unlike == []


def test_domains_that_any_run_was_trained_on_are_left_out(tmp_path: Path) -> None:
    first, second = (write_run(tmp_path / name, drawn_answers()) for name in ("a", "b"))
    path = second.evaluation_path / "summary.json"
    summary = json.loads(path.read_text())
    summary["settings"]["trained_domain"] = "cars"
    path.write_text(json.dumps(summary))
    with pytest.raises(CheckpointError, match="has no p_wrong_other"):
        compare_runs([first, second], metric="p_wrong_other")
    assert compare_runs([first, second], metric="p_wrong").values[0][0].n == 10


def test_incoherent_answers_are_no_emergent_misalignment(tmp_path: Path) -> None:
    from dataclasses import replace

    from emtool.core.judgement import SCORED, Judgement

    incoherent = Judgement(status=SCORED, score=40.0)
    answers = [replace(judged(0, q, n, aligned=10.0), coherent=incoherent) for q in QUESTIONS for n in range(4)]
    run = write_run(tmp_path / "a", answers)
    assert compare_runs([run, run]).values[0][0].value == 0.0
    assert compare_runs([run, run], metric="misaligned_pct").values[0][0].value == 100.0


def test_runs_without_a_checkpoint_in_common_are_refused(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"{step}", drawn_answers(steps=(step,))) for step in (0, 100)]
    with pytest.raises(CheckpointError, match="have no em_pct of the same checkpoint"):
        compare_runs(runs)


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", judge=None)
    other = write_run(tmp_path / "b", judge=None, parts=())
    with pytest.raises(ConfigError, match="at least 2 runs, not 1"):
        compare_runs([run])
    with pytest.raises(ConfigError, match="unknown metric 'em_rate'"):
        compare_runs([run, run], metric="em_rate")
    with pytest.raises(CheckpointError, match=r"has no em_pct; make it with: .*--judge JUDGE"):
        compare_runs([run, run], metric="em_pct")
    with pytest.raises(CheckpointError, match=r"b has no p_wrong_other; make it with: .*--metrics likelihood"):
        compare_runs([run, other])
    with pytest.raises(CheckpointError, match="has no evaluation"):
        compare_runs([run, RunFolder(path=tmp_path / "none")])
    (other.evaluation_path / "summary.json").write_text("[")
    with pytest.raises(CheckpointError, match="a summary that cannot be read"):
        compare_runs([run, other])
    assert {"em_pct", "p_wrong", "margin_other"} <= METRICS.keys()
