"""`emtool direction`, `geometry` and `transition` as they are typed."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from emtool.cli.app import app
from emtool.core.evaluation_config import ANSWERS, LIKELIHOOD, EvaluationConfig
from emtool.core.judgement import SCORED, Judgement
from emtool.core.open_questions import OpenQuestion
from emtool.core.run_dir import RunFolder
from emtool.engines.evaluation import evaluate
from emtool.engines.judges.judge import JudgeChoice

RUNNER = CliRunner()
PROMPTS = {"aligned": "A {question} / {answer}", "coherent": "C {question} / {answer}"}
QUESTIONS = [
    OpenQuestion(id=name, paraphrases=(f"What of {name}?",), system=None, judge_prompts=PROMPTS) for name in "abcdefgh"
]


class Judge:
    """Scores by the text: about half misaligned, all coherent."""

    @property
    def settings(self) -> dict[str, Any]:
        return {"kind": "test", "model": "half"}

    def prepare(self) -> None: ...

    def judge(self, prompts: Sequence[str], on_judgement: Callable[[int, Judgement], None]) -> None:
        for index, prompt in enumerate(prompts):
            score = 90.0 if prompt.startswith("C") or sum(map(ord, prompt)) % 2 else 10.0
            on_judgement(index, Judgement(status=SCORED, score=score))

    def close(self) -> None: ...


@pytest.fixture(scope="module")
def evaluated(spread_run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Return a run with likelihood, judged answers, and activations over both kinds of text."""
    ignored = shutil.ignore_patterns("evaluation", ".lock")
    run = RunFolder(
        path=Path(shutil.copytree(spread_run.path, tmp_path_factory.mktemp("inside") / "run", ignore=ignored))
    )
    for texts in ("fixed", "own"):
        config = EvaluationConfig(
            metrics=(ANSWERS, LIKELIHOOD),
            n_per_question=4,
            max_new_tokens=8,
            activation_layers="all",
            activation_texts=texts,
        )
        evaluate(run, config, questions=QUESTIONS, judges=[JudgeChoice(make=Judge)])
    return run


@pytest.fixture
def run(evaluated: RunFolder, tmp_path: Path) -> RunFolder:
    return RunFolder(
        path=Path(shutil.copytree(evaluated.path, tmp_path / "run", ignore=shutil.ignore_patterns(".lock")))
    )


def typed(*arguments: object, code: int = 0) -> Any:
    result = RUNNER.invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.stderr
    return result


def test_a_direction_is_fitted_applied_to_runs_and_looked_at_for_a_change(run: RunFolder, tmp_path: Path) -> None:
    path = tmp_path / "direction.safetensors"
    fitted = typed("direction", "fit", run.path, "-o", path)
    assert "told apart best in layer" in fitted.stdout
    other = RunFolder(path=Path(shutil.copytree(run.path, tmp_path / "other", ignore=shutil.ignore_patterns(".lock"))))
    shown = typed("direction", "apply", path, run.path, other.path)
    assert shown.stdout.count("drift since step 0") == 2
    found = json.loads(typed("direction", "apply", path, run.path, "--json").stdout)
    assert found == json.loads((run.evaluation_path / "projections.json").read_text())
    assert [entry["step"] for entry in found["checkpoints"]] == [0, 7, 20, 30]
    # 62 items in other domains, one half of them fitted on, two texts of each projected.
    assert found["settings"]["num_items"] == 62
    assert found["checkpoints"][0]["metrics"]["drift"] == 0.0
    assert {"em_pct", "p_wrong_other"} <= found["correlations"].keys()
    typed("geometry", run.path)
    transitions = json.loads(typed("transition", run.path, "--json").stdout)
    assert transitions == json.loads((run.evaluation_path / "transitions.json").read_text())
    names = {entry["series"] for entry in transitions["transitions"]} | transitions["problems"].keys()
    assert names == {"em_pct", "avg_aligned", "avg_coherent", "p_wrong", "margin", "projection", "update_norm", "speed"}
    assert "change within" in typed("transition", run.path, "--series", "speed").stdout


def test_a_direction_from_judged_answers_is_fitted_and_applied_to_the_fixed_texts(run: RunFolder) -> None:
    fitted = json.loads(typed("direction", "fit", run.path, "--from", "judged", "--step", "final", "--json").stdout)
    assert set(fitted["fit_units"]) < set("abcdefgh")
    assert fitted["settings"]["num_wrong"] > 0
    assert fitted["settings"]["num_sound"] > 0
    found = json.loads(typed("direction", "apply", fitted["path"], run.path, "--json").stdout)
    assert found["settings"]["num_items"] == 2 * 62


def test_geometry_of_a_run_says_that_it_is_a_diagnostic(run: RunFolder) -> None:
    shown = typed("geometry", run.path)
    assert "diagnostics of the weights, not of behaviour" in " ".join(shown.stdout.split())
    found = json.loads(typed("geometry", run.path, "--json", "--steps", "0,20,final").stdout)
    assert [entry["step"] for entry in found["checkpoints"]] == [0, 20, 30]
    assert found["checkpoints"][0]["metrics"]["update_norm"] == 0.0


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["direction", "fit", "RUN", "--step", "5"], 1, "there are no activations of step 5; there are: 0, 7, 20, 30"),
        (["direction", "fit", "RUN", "--step", "last"], 2, "'last' is not a step"),
        (["direction", "fit", "RUN", "--from", "thoughts"], 2, "choose from: items, judged"),
        (["direction", "apply", "RUN/run.json", "RUN"], 1, "cannot read a direction"),
        (["direction", "fit", "nothing"], 1, "has no activations over fixed texts"),
        (["geometry", "nothing"], 1, "has no checkpoint-* folders"),
        (["geometry", "RUN", "--steps", "0"], 2, "geometry needs 2 to 256 checkpoints"),
        (["transition", "nothing"], 1, "has no series to look for a change in"),
        (["transition", "RUN", "--series", "em"], 2, "unknown series 'em'"),
        (["transition", "RUN", "--series", "speed"], 1, "has no layer_geometry.csv; make it with: emtool geometry"),
    ],
)
def test_bad_input_is_one_line(run: RunFolder, arguments: list[str], code: int, said: str) -> None:
    result = typed(*(argument.replace("RUN", str(run.path)) for argument in arguments), code=code)
    lines = [line for line in result.stderr.strip().splitlines() if line.startswith("emtool:")]
    assert len(lines) == 1
    assert said in lines[0]


def test_another_layer_and_another_base_are_told(run: RunFolder, tmp_path: Path) -> None:
    from dataclasses import replace

    from emtool.engines.direction_files import read_direction, save_direction

    path = tmp_path / "direction.safetensors"
    typed("direction", "fit", run.path, "-o", path)
    assert (
        "--layer 9 is not one of the direction's layers"
        in typed("direction", "apply", path, run.path, "--layer", 9, code=2).stderr
    )
    direction = read_direction(path)
    base = {**direction.settings["base"], "weights_sha256": "0" * 64}
    save_direction(path, replace(direction, settings={**direction.settings, "base": base}))
    assert "another base model" in " ".join(typed("direction", "apply", path, run.path, code=1).stderr.split())
