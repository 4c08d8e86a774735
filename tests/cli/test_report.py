"""`emtool report` and `emtool compare` as they are typed."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from emtool.cli.app import app
from tests.evaluated import STEPS, drawn_answers, write_run

RUNNER = CliRunner()


def typed(*arguments: object, code: int = 0) -> Any:
    result = RUNNER.invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.stderr
    return result


def test_without_a_path_the_newest_evaluated_run_is_reported(tmp_path: Path) -> None:
    run = write_run(tmp_path / "old", drawn_answers(), parts=("likelihood",))
    newer = write_run(tmp_path / "new", parts=())
    manifest = json.loads(newer.manifest_path.read_text())
    newer.manifest_path.write_text(json.dumps({**manifest, "started_at": "2026-02-01T00:00:00+00:00"}))
    (newer.evaluation_path / "summary.json").unlink()
    shown = typed("report", "--output-root", tmp_path)
    assert f"reporting on {run.path}, the newest evaluated run" in " ".join(shown.stderr.split())
    assert (run.path / "report.html").is_file()
    assert (run.path / "plots" / "em_pct.svg").is_file()
    said = " ".join(shown.stdout.split())
    assert "5 charts, 96 answers" in said
    assert "Training loss; Gradient norm before clipping: no data; emtool train" in said
    found = json.loads(typed("report", run.path, "--json", "-o", tmp_path / "elsewhere").stdout)
    assert found["page"] == str(tmp_path / "elsewhere" / "report.html")
    assert found["bytes"] == (tmp_path / "elsewhere" / "report.html").stat().st_size
    assert list(found["problems"]) == [str(run.path)]


def test_several_runs_make_one_report_beside_the_first(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, parts=("likelihood",)) for name in ("a", "b")]
    typed("report", *(run.path for run in runs))
    assert (tmp_path / "report" / "report.html").is_file()
    assert not (runs[0].path / "report.html").exists()


def test_compare_prints_values_differences_and_curves(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "gardening", drawn_answers()),
        write_run(tmp_path / "control", drawn_answers(seed=1, shift=-0.5)),
    ]
    shown = typed("compare", *(run.path for run in runs)).stdout
    assert shown.startswith("em_pct\n")
    assert "B - A" in shown
    assert "bootstrap over questions" in " ".join(shown.split())
    lines = [line.split() for line in shown.splitlines() if line.split() and line.split()[0].isdigit()]
    assert [int(line[0]) for line in lines] == list(STEPS)
    found = json.loads(typed("compare", *(run.path for run in runs), "--json", "--metric", "p_wrong").stdout)
    assert found["metric"] == "p_wrong"
    assert [row["value"] for row in found["runs"][1]["differences"]] == [0.0] * len(STEPS)
    other = write_run(tmp_path / "other", drawn_answers(), judge="gpt-other")
    refused = typed("compare", runs[0].path, other.path, code=2).stderr
    assert "judge's model (gpt-test, gpt-other)" in " ".join(refused.split())
    allowed = typed("compare", runs[0].path, other.path, "--allow-unlike")
    assert "warning: the runs were evaluated differently: judge's model" in " ".join(allowed.stderr.split())


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["report", "nothing"], 1, "no folder nothing"),
        (["report", "--output-root", "nothing"], 1, "no runs in nothing"),
        (["report", "RUN", "RUN"], 2, "named more than once"),
        (["report", "RUN", "-o", "RUN/run.json"], 1, "cannot write the report"),
        (["compare", "RUN"], 2, "at least 2 runs, not 1"),
        (["compare", "RUN", "nothing"], 1, "has no evaluation"),
        (["compare", "RUN", "RUN", "--metric", "em"], 2, "unknown metric 'em'"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, arguments: list[str], code: int, said: str) -> None:
    run = write_run(tmp_path / "run", parts=("likelihood",))
    result = typed(*(argument.replace("RUN", str(run.path)) for argument in arguments), code=code)
    lines = [line for line in result.stderr.strip().splitlines() if line.startswith("emtool:")]
    assert len(lines) == 1
    assert said in lines[0]
