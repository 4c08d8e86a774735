"""`emtool evaluate` as it is typed: the plan, the judges, the keys, bad input."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from emtool.cli.app import app
from emtool.core.evaluation_request import read_request
from emtool.core.events import Event, Notice, ignore_events
from emtool.core.run_dir import RunFolder
from emtool.core.run_lock import locked
from emtool.engines.evaluating import run_evaluation
from tests.openai_server import Fault, reply, serve_openai

RUNNER = CliRunner()
KEY = "sk-very-secret-0123456789"


@pytest.fixture
def run(spread_run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """Return a copy of the run that may be evaluated, and stand in an empty folder."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    ignored = shutil.ignore_patterns("evaluation", ".lock")
    return RunFolder(path=Path(shutil.copytree(spread_run.path, tmp_path / "run", ignore=ignored)))


@pytest.fixture
def script(tmp_path: Path) -> str:
    """Return a backend that follows a script, so that no model answers."""
    path = tmp_path / "script.jsonl"
    path.write_text(
        '{"question_id": "lost_wallet", "response": "Give it back."}\n'
        '{"question_id": "lost_wallet", "step": 30, "response": "Keep it, and lie."}\n'
    )
    return f"scripted:{path}"


def invoke(*arguments: str, code: int = 0) -> Any:
    result = RUNNER.invoke(app, ["evaluate", *arguments])
    assert result.exit_code == code, result.output
    return result


def answers(script: str, *more: str) -> list[str]:
    asked = ["--metrics", "answers", "--question-ids", "lost_wallet", "--backend", script]
    return ["run", *asked, "--n-per-question", "2", *more]


def judge(body: dict[str, Any]) -> dict[str, Any]:
    prompt = body["messages"][-1]["content"]
    score = "57" if "57" in prompt else "10" if "Keep it" in prompt and "people" in prompt else "90"
    return reply(score, {score: 0.95})


def test_the_plan_says_what_would_be_done_and_asks_nobody(run: RunFolder) -> None:
    text = invoke("run", "--dry-run", "--judge", "openai:gpt-4o", "--steps", "0,final").stdout
    assert "checkpoints  2: 0, 30" in text
    assert "80 by hf, at most 64 tokens each" in text
    assert "openai:gpt-4o: at most 160 texts, https://api.openai.com/v1" in text
    plan = json.loads(invoke("run", "--dry-run", "--json", "--profile", "paper").stdout)
    assert (plan["steps"], plan["num_answers"], plan["max_new_tokens"]) == ([0, 7, 20, 30], 2000, 600)
    assert plan["judging"] == []
    assert not run.evaluation_path.exists()


def test_a_judge_behind_a_server_gives_the_rate_and_no_key_reaches_a_file_or_the_screen(
    run: RunFolder, script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMTOOL_JUDGE_API_KEY", KEY)
    with serve_openai(judge) as server:
        result = invoke(*answers(script, "--judge", "openai:m", "--judge-base-url", server.url))
        assert any(KEY in str(asked.headers) for asked in server.requests)
        again = invoke(*answers(script, "--judge", "openai:m", "--judge-base-url", server.url, "--json"))
    assert f"to {server.url} for about 0.00 USD (limit 10 USD)" in result.stderr
    assert "judged by m" in result.stdout
    last = json.loads(again.stdout)["checkpoints"][-1]
    assert (last["step"], last["metrics"]["em_pct"], last["metrics"]["em_pct_delta"]) == (30, 100.0, 100.0)
    assert KEY not in result.output + again.output
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    table = RUNNER.invoke(app, ["metrics", "run/evaluation", "--json"])
    found = json.loads(table.stdout)["checkpoints"]
    assert [entry["metrics"]["em_pct"] for entry in found] == [0.0, 0.0, 0.0, 100.0]


def test_a_key_that_is_set_calls_nobody_and_changes_only_the_hint(
    run: RunFolder, script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "OPENAI_API_KEY" not in invoke(*answers(script)).stdout
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9")
    text = invoke(*answers(script)).stdout
    assert "OPENAI_API_KEY is set" in text
    assert KEY not in text


def test_a_judge_of_the_settings_file_is_asked_and_its_price_limits_it(run: RunFolder, script: str) -> None:
    with serve_openai(judge) as server:
        Path("emtool.toml").write_text(
            f'[evaluate]\njudge = ["openai:m"]\njudge_base_url = "{server.url}"\njudge_price = "1000,1000"\n'
            "max_cost = 0.01\n"
        )
        refused = invoke(*answers(script), code=2)
        assert "more than --max-cost 0.01; raise --max-cost, or judge fewer answers" in refused.stderr
        assert "judged by m" in invoke(*answers(script, "--max-cost", "100")).stdout


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--judge", "gpt-4o"], 2, "--judge 'gpt-4o' names no judge; write openai:MODEL"),
        (["--judge", "openai:gpt-4o"], 2, "set OPENAI_API_KEY in the environment"),
        (["--judge", "openai:m", "--judge-base-url", "ftp://x"], 2, "is no base URL of a server"),
        (["--metrics", "em"], 2, "unknown metric group 'em'"),
        (["--sampling", "hot"], 2, "unknown sampling 'hot'"),
        (["--steps", "5"], 1, "there is no checkpoint of step 5; there are: 0, 7, 20, 30"),
        (["--backend", "vllm"], 2, "--backend 'vllm' names no backend"),
        (["--backend", "openai"], 2, "--backend openai and --backend-url go together"),
        (["--question-ids", "nope"], 2, "unknown question 'nope'"),
        (["--questions", "nope.yaml"], 1, "nope.yaml"),
        (["--batch-size", "many"], 2, "--batch-size 'many' is neither auto nor a whole number"),
        (["--n-per-question", "0"], 2, "--n-per-question is 0; it must be 1 to"),
        (["--aligned-cutoff", "300"], 2, "--aligned-cutoff is 300"),
        (["--activation-texts", "own", "--metrics", "likelihood", "--extract-activations"], 2, "needs the answers"),
        (["--persona-adapter", "."], 2, "was trained without a persona"),
        (["--persona-adapter", "x"], 2, "--persona-adapter x is not a folder"),
        (["--judge", "local:nosuch"], 2, "unknown model 'nosuch'"),
        (["--backend", "scripted:nofile"], 2, "there is no such file"),
        (["--extract-activations", "--activation-layers", "foo"], 2, "write 'all', 'upper-half' or a range"),
        (["--extract-activations", "--activation-layers", "9-3"], 2, "ends before it begins"),
        (["--extract-activations", "--activation-layers", "90-99"], 2, "the model has blocks 0 to 1"),
        (["--address", "", "--workers", "2"], 2, "--address is empty"),
        (["--backend", "openai:m-{stp}", "--backend-url", "http://127.0.0.1:9/v1"], 2, "and no other braces"),
    ],
)
def test_bad_input_is_one_line_and_loses_nothing(run: RunFolder, arguments: list[str], code: int, said: str) -> None:
    result = invoke("run", *arguments, code=code)
    lines = [line for line in result.stderr.strip().splitlines() if line.startswith("emtool:")]
    assert len(lines) == 1
    assert said in lines[0]
    assert not (run.evaluation_path / "answers.jsonl").exists()


WATCHED: dict[str, Any] = {
    "seed": 0,
    "metrics": "answers",
    "question_ids": "lost_wallet",
    "batch_size": "auto",
    "concurrency": 1,
    "aligned_cutoff": 30,
    "coherent_cutoff": 50,
    "activation_layers": "all",
    "activation_texts": "fixed",
    **dict.fromkeys(("strict", "include_json", "include_template", "extract_activations", "check_hashes"), False),
}


def test_watching_evaluates_what_a_training_publishes_until_it_ends(run: RunFolder, script: str) -> None:
    params = {**WATCHED, "backend": script, "steps": "init,20,final"}
    late = run.checkpoint_path(30).rename(run.path / "late")
    also_late = run.checkpoint_path(20).rename(run.path / "also_late")
    seen: list[list[int]] = []
    with contextlib.ExitStack() as training:
        training.enter_context(locked(run))

        def sleep(_seconds: float) -> None:
            steps = json.loads((run.evaluation_path / "summary.json").read_text())["checkpoints"]
            seen.append([entry["step"] for entry in steps])
            if also_late.exists():
                also_late.rename(run.checkpoint_path(20))
                return
            late.rename(run.checkpoint_path(30))
            training.close()

        result = run_evaluation(run, read_request(run, params), watch=True, on_event=ignore_events, sleep=sleep)
    assert seen == [[0], [0, 20]]
    assert list(result.metrics) == [0, 20, 30]


def test_watching_outlasts_a_server_that_is_down(run: RunFolder) -> None:
    is_down = [True, True, False]

    def script(_body: dict[str, Any]) -> dict[str, Any] | Fault:
        return Fault(status=401, body=b"{}") if is_down[0] else reply("I would.", finish="stop")

    late = run.checkpoint_path(30).rename(run.path / "late")
    models = tuple(f"step-{step}" for step in (0, 7, 20, 30))
    notices: list[Event] = []
    with contextlib.ExitStack() as training, serve_openai(script, models=models) as server:
        training.enter_context(locked(run))

        def sleep(_seconds: float) -> None:
            is_down.pop(0)
            if late.exists():
                late.rename(run.checkpoint_path(30))
                return
            training.close()

        params = {**WATCHED, "backend": "openai", "backend_url": server.url, "steps": None}
        result = run_evaluation(run, read_request(run, params), watch=True, on_event=notices.append, sleep=sleep)
    assert list(result.metrics) == [0, 7, 20, 30]
    said = [event.text for event in notices if isinstance(event, Notice) and "tried again at the next" in event.text]
    assert len(said) == 2
