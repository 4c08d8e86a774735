"""`emtool direction`, `geometry` and `transition` as they are typed."""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import save
from typer.testing import CliRunner

from emtool.cli.app import app
from emtool.core.evaluation_config import ANSWERS, LIKELIHOOD, EvaluationConfig
from emtool.core.judgement import SCORED, Judgement
from emtool.core.open_questions import OpenQuestion
from emtool.core.run_dir import RunFolder
from emtool.core.run_series import SERIES
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
    # 62 items in other domains, one half of them fitted on.
    assert found["settings"]["num_items"] == 31
    assert found["checkpoints"][0]["metrics"]["drift"] == 0.0
    assert {"em_pct", "p_wrong_other"} <= found["correlations"].keys()
    typed("geometry", run.path)
    transitions = json.loads(typed("transition", run.path, "--json").stdout)
    assert transitions == json.loads((run.evaluation_path / "transitions.json").read_text())
    names = {entry["series"] for entry in transitions["transitions"]} | transitions["problems"].keys()
    assert names == set(SERIES)
    assert "change within" in typed("transition", run.path, "--series", "speed").stdout


def test_a_direction_from_judged_answers_is_fitted_and_applied_to_the_fixed_texts(run: RunFolder) -> None:
    fitted = json.loads(typed("direction", "fit", run.path, "--from", "judged", "--step", "final", "--json").stdout)
    assert set(fitted["fit_units"]) < set("abcdefgh")
    assert fitted["settings"]["num_wrong"] > 0
    assert fitted["settings"]["num_sound"] > 0
    found = json.loads(typed("direction", "apply", fitted["path"], run.path, "--json").stdout)
    assert found["settings"]["num_items"] == 62


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
        (["geometry", "RUN", "--steps", "0"], 2, "at least 2 are needed, not 1"),
        (["transition", "nothing"], 1, "has no series to look for a change in"),
        (["transition", "RUN\udcff"], 2, "is not a path in UTF-8"),
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


def fixed_files(run: RunFolder) -> list[Path]:
    """Return the activations over the fixed texts, by step."""
    from emtool.engines.direction_files import find_activations

    return list(find_activations(run, texts="fixed").files.values())


def rewrite(path: Path, *, metadata: dict[str, str] | None = None, value: float | None = None) -> None:
    """Change the metadata of a file of activations, or one of its numbers."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        found = dict(file.metadata())
    if value is not None:
        tensors["text_means"][3, 0, 0] = value
    path.write_bytes(save(tensors, {**found, **(metadata or {})}))


@pytest.mark.parametrize(
    ("metadata", "value", "said"),
    [
        (None, math.nan, "not finite"),
        ({"text_ids": '"5"'}, None, "does not hold what its metadata say"),
        ({"text_ids": "[1, 2]"}, None, "does not hold what its metadata say"),
        ({"text_ids": '["\\ud800"]'}, None, "cannot read the activations"),
        ({"settings": '{"layers": 2}'}, None, "does not hold what its metadata say"),
        ({"settings": '{"layers": ["a"]}'}, None, "does not hold what its metadata say"),
        ({"settings": "[" * 100_000}, None, "nested too deep"),
        ({"settings": '{"layers": [0, 1], "texts": "fixed"}'}, None, "taken with other settings"),
    ],
)
def test_hostile_activations_are_one_line_and_leave_nothing_behind(
    run: RunFolder, tmp_path: Path, metadata: dict[str, str] | None, value: float | None, said: str
) -> None:
    path = tmp_path / "direction.safetensors"
    typed("direction", "fit", run.path, "-o", path)
    rewrite(fixed_files(run)[-1], metadata=metadata, value=value)
    result = typed("direction", "apply", path, run.path, code=1)
    assert said in " ".join(result.stderr.split())
    assert not list(run.evaluation_path.glob("*projections*"))


def test_of_several_sets_of_activations_the_one_of_the_summary_is_taken(run: RunFolder, tmp_path: Path) -> None:
    folder = fixed_files(run)[0].parent
    (folder.parent / "damaged").mkdir()
    (folder.parent / "damaged" / "checkpoint-0.safetensors").write_bytes(b"cut")
    path = tmp_path / "direction.safetensors"
    typed("direction", "fit", run.path, "-o", path)
    shutil.copytree(folder, folder.parent / "other")
    assert "has 2 sets of activations over fixed texts" in typed("direction", "apply", path, run.path, code=1).stderr
    summary = json.loads((run.evaluation_path / "summary.json").read_text())
    summary["settings"]["activations"] = f"evaluation/activations/{folder.name}"
    (run.evaluation_path / "summary.json").write_text(json.dumps(summary))
    typed("direction", "apply", path, run.path)
    shutil.rmtree(folder)
    shutil.rmtree(folder.parent / "other")
    assert "cannot read the activations" in typed("direction", "fit", run.path, code=1).stderr


def test_the_trained_domain_is_left_out_without_a_summary_and_what_is_not_known_is_said(run: RunFolder) -> None:
    (run.evaluation_path / "summary.json").unlink()
    shown = typed("direction", "fit", run.path).stdout
    assert "fitted on 31 of 62 items" in " ".join(shown.split())
    assert "31 wrong and 31 sound texts" in " ".join(shown.split())
    assert "items of gardening, which was trained on, left out" in shown
    (run.checkpoint_path(0) / "adapter_model.safetensors").unlink()
    shown = typed("direction", "fit", run.path).stdout
    assert "does not tell which layers training changes" in " ".join(shown.split())
    run.manifest_path.unlink()
    assert "which one was trained on is not known" in typed("direction", "fit", run.path).stdout
    run.manifest_path.write_text("{")
    typed("direction", "fit", run.path, code=1)


def test_a_layer_before_the_first_adapter_is_told(run: RunFolder, tmp_path: Path) -> None:
    path = tmp_path / "direction.safetensors"
    typed("direction", "fit", run.path, "-o", path)
    first = json.loads(typed("direction", "apply", path, run.path, "--json").stdout)["settings"]["first_adapted_layer"]
    assert first == 1
    shown = " ".join(typed("direction", "apply", path, run.path, "--layer", first - 1).stdout.split())
    assert f"training changed layers from {first} on: nothing moves in layer {first - 1}" in shown
    assert "nothing moves" not in typed("direction", "apply", path, run.path, "--layer", first).stdout


def test_a_base_that_is_not_named_is_refused(run: RunFolder, tmp_path: Path) -> None:
    path = tmp_path / "direction.safetensors"
    typed("direction", "fit", run.path, "-o", path)
    for file in fixed_files(run):
        with safe_open(file, "pt") as opened:
            settings = json.loads(opened.metadata()["settings"])
        rewrite(file, metadata={"settings": json.dumps({**settings, "base": "tiny"})})
    said = typed("direction", "apply", path, run.path, code=1).stderr
    assert "it is not said which base model" in " ".join(said.split())


def test_runs_that_are_done_are_shown_before_one_that_fails(run: RunFolder, tmp_path: Path) -> None:
    path = tmp_path / "direction.safetensors"
    typed("direction", "fit", run.path, "-o", path)
    shown = typed("direction", "apply", path, run.path, tmp_path / "nothing", code=1)
    assert "drift since step 0" in shown.stdout
    assert (run.evaluation_path / "projections.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["direction", "fit", "RUN", "-o", "."], 1),
        (["direction", "fit", "RUN", "-o", "/"], 1),
        (["direction", "fit", "RUN", "-o", ""], 1),
        (["direction", "fit", "RUN", "--seed", str(2**64)], 2),
        (["direction", "apply", "RUN/x", "RUN", "--seed", str(2**64)], 2),
        (["transition", "RUN", "--seed", str(2**64)], 2),
    ],
)
def test_folders_as_files_and_absurd_seeds_are_refused(run: RunFolder, arguments: list[str], code: int) -> None:
    result = typed(*(argument.replace("RUN", str(run.path)) for argument in arguments), code=code)
    assert "is a folder" in result.stderr or "is too large; the most is 4294967295" in result.stderr


def test_tables_that_others_wrote_are_read_and_what_lacks_values_is_said(run: RunFolder) -> None:
    table = run.evaluation_path / "item_scores.csv"
    whole = typed("transition", run.path, "--series", "margin", "--json").stdout
    lines = table.read_text().splitlines()
    # As a spreadsheet saves it.
    table.write_bytes("\ufeff".encode() + "\r\n".join(lines).encode())
    assert typed("transition", run.path, "--series", "margin", "--json").stdout == whole
    table.write_text("\n".join(lines[:-1]) + "\n")
    shown = " ".join(typed("transition", run.path, "--series", "margin").stdout.split())
    assert "margin: 1 item left out, values are missing" in shown
    table.write_text("\n".join([*lines, lines[-1]]) + "\n")
    before = (run.evaluation_path / "transitions.json").read_bytes()
    assert "repeats step 30" in typed("transition", run.path, "--series", "margin", code=1).stderr
    table.write_text(lines[0] + "\n")
    assert (
        "item_scores.csv without rows of margin" in typed("transition", run.path, "--series", "margin", code=1).stderr
    )
    table.write_text(lines[0] + "\n" + "9" * 5000 + lines[1][1:] + "\n")
    assert "is no step" in typed("transition", run.path, "--series", "margin", code=1).stderr
    assert (run.evaluation_path / "transitions.json").read_bytes() == before


def test_a_part_of_the_series_is_shown_and_the_rest_stays_recorded(run: RunFolder) -> None:
    typed("transition", run.path)
    whole = (run.evaluation_path / "transitions.json").read_bytes()
    shown = typed("transition", run.path, "--series", "margin").stdout
    assert "p_wrong" not in shown
    assert (run.evaluation_path / "transitions.json").read_bytes() == whole
    found = {entry["series"]: entry for entry in json.loads(whole)["transitions"]}
    assert (found["p_wrong"]["num_units"], found["p_wrong_other"]["num_units"]) == (82, 62)


def test_only_a_direction_is_overwritten_by_one(run: RunFolder) -> None:
    summary = run.evaluation_path / "summary.json"
    before = summary.read_bytes()
    assert "is no direction; it is not overwritten" in typed("direction", "fit", run.path, "-o", summary, code=1).stderr
    assert summary.read_bytes() == before
    typed("direction", "fit", run.path)
    typed("direction", "fit", run.path, "--seed", 1)


def test_correlations_are_those_of_the_numbers_written(run: RunFolder, tmp_path: Path) -> None:
    path = tmp_path / "direction.safetensors"
    typed("direction", "fit", run.path, "-o", path)
    found = json.loads(typed("direction", "apply", path, run.path, "--json").stdout)
    summary = json.loads((run.evaluation_path / "summary.json").read_text())
    levels = [entry["metrics"]["projection"] for entry in found["checkpoints"]]
    metric = [entry["metrics"]["p_wrong_other"] for entry in summary["checkpoints"]]
    assert found["correlations"]["p_wrong_other"]["r"] == pytest.approx(np.corrcoef(levels, metric)[0, 1], abs=1e-9)
    assert found["correlations"]["p_wrong_other"]["n"] == 4


@pytest.mark.parametrize("kind", ["text", "dtype"])
def test_other_texts_and_other_dtypes_at_one_checkpoint_are_refused(run: RunFolder, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "direction.safetensors"
    typed("direction", "fit", run.path, "-o", path)
    file = fixed_files(run)[-1]
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        metadata = dict(opened.metadata())
    if kind == "text":
        metadata["answer_sha256"] = json.dumps(["0" * 64, *json.loads(metadata["answer_sha256"])[1:]])
    else:
        tensors["text_means"] = tensors["text_means"].double() * 1e300
    file.write_bytes(save(tensors, metadata))
    said = "is over other texts" if kind == "text" else "does not hold what its metadata say"
    assert said in " ".join(typed("direction", "apply", path, run.path, code=1).stderr.split())


def test_a_damaged_adapter_leaves_the_geometry_that_was_there(run: RunFolder) -> None:
    typed("geometry", run.path)
    before = {path.name: path.read_bytes() for path in run.evaluation_path.glob("*geometry*")}
    config = run.checkpoint_path(30) / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 1e-320}))
    assert "which no training uses" in " ".join(typed("geometry", run.path, code=1).stderr.split())
    assert {path.name: path.read_bytes() for path in run.evaluation_path.glob("*geometry*")} == before
