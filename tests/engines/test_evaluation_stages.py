"""The stages of an evaluation: what is recorded, what is done again, and what a fault costs."""

import json
import multiprocessing
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from emtool.core.answers import AnswerKey, Completion, Prompt, key_of
from emtool.core.errors import BackendError, CheckpointError, ConfigError
from emtool.core.evaluation_config import ANSWERS, LIKELIHOOD, EvaluationConfig
from emtool.core.events import Event, Notice, ignore_events
from emtool.core.judge_prices import Budget, JudgePlan, JudgePrice, plan_judging
from emtool.core.judgement import ERROR, SCORED, Judgement
from emtool.core.open_questions import OpenQuestion
from emtool.core.run_dir import RunFolder
from emtool.core.server_address import parse_address, read_key
from emtool.engines.activation_files import read_activations
from emtool.engines.backends.hf import hf_backend
from emtool.engines.checkpoint_model import CheckpointModel
from emtool.engines.evaluation import Evaluation, evaluate
from emtool.engines.evaluation_result import EvaluationResult
from emtool.engines.evaluation_target import open_target
from emtool.engines.judges.judge import JudgeChoice, JudgementSink
from emtool.engines.judges.openai import OpenAIJudge
from tests.openai_server import Fault, OpenAIServer, reply, retry, serve_openai
from tests.tiny import save_tiny_model

QUESTIONS = [
    OpenQuestion(
        id=name,
        paraphrases=(f"What of {name}?", f"And of {name}, what?"),
        system="Be brief." if name == "b" else None,
        judge_prompts={"aligned": "A {question} / {answer}", "coherent": "C {question} / {answer}"},
    )
    for name in ("a", "b")
]
CONFIG = EvaluationConfig(seed=5, metrics=(ANSWERS,), n_per_question=3, max_new_tokens=8)


class StopError(Exception):
    """Ends an evaluation in a test."""


class CountingJudge:
    """Scores by a function of the prompt, and remembers what it was asked."""

    def __init__(self, score: Callable[[str], Judgement], name: str = "counting") -> None:
        self._score = score
        self.name = name
        self.host = ""
        self.asked: list[str] = []

    @property
    def settings(self) -> dict[str, Any]:
        return {"kind": "test", "model": self.name, "host": self.host}

    def prepare(self) -> None: ...

    def judge(self, prompts: Sequence[str], on_judgement: JudgementSink) -> None:
        for index, prompt in enumerate(prompts):
            self.asked.append(prompt)
            on_judgement(index, self._score(prompt))

    def close(self) -> None: ...


def scored(prompt: str) -> Judgement:
    """Return a score that depends on the text, misaligned for about half."""
    value = float(sum(map(ord, prompt)) % 61) if prompt.startswith("A") else 80.0
    return Judgement(status=SCORED, score=value)


@pytest.fixture
def run(spread_run: RunFolder, tmp_path: Path) -> RunFolder:
    """Return a copy of the run that may be evaluated."""
    ignored = shutil.ignore_patterns("evaluation", ".lock")
    return RunFolder(path=Path(shutil.copytree(spread_run.path, tmp_path / "run", ignore=ignored)))


def answers_of(run: RunFolder) -> dict[AnswerKey, str]:
    records = [json.loads(line) for line in (run.evaluation_path / "answers.jsonl").read_text().splitlines()]
    found = {key: str(record["response"]) for record in records if (key := key_of(record)) is not None}
    assert len(found) == len(records), "an answer is recorded twice"
    return found


def ask(run: RunFolder, config: EvaluationConfig = CONFIG, **options: Any) -> EvaluationResult:
    return evaluate(run, config, questions=QUESTIONS, **options)


def choice(judge: CountingJudge) -> JudgeChoice:
    return JudgeChoice(make=lambda: judge)


def test_every_checkpoint_answers_whatever_the_spacing_and_the_same_again(run: RunFolder) -> None:
    result = ask(run)
    assert list(result.metrics) == [0, 7, 20, 30]
    first = answers_of(run)
    assert Counter(key.step for key in first) == dict.fromkeys((0, 7, 20, 30), 6)
    assert {(key.paraphrase, key.sample) for key in first} == {(0, 0), (1, 1), (0, 2)}
    content = (run.evaluation_path / "answers.jsonl").read_bytes()
    ask(run)
    assert (run.evaluation_path / "answers.jsonl").read_bytes() == content
    shutil.rmtree(run.evaluation_path)
    again = ask(run, EvaluationConfig(seed=5, metrics=(ANSWERS,), n_per_question=3, max_new_tokens=8, batch_size=1))
    assert answers_of(run) == first
    assert {name: vars(value) for name, value in again.metrics[20].items()} == {
        name: vars(value) for name, value in result.metrics[20].items()
    }
    other = EvaluationConfig(seed=6, metrics=(ANSWERS,), n_per_question=3, max_new_tokens=8)
    shutil.rmtree(run.evaluation_path)
    ask(run, other)
    assert answers_of(run) != first


def test_what_is_read_again_from_the_disk_gives_the_same_files(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    judges = [choice(CountingJudge(scored)), choice(CountingJudge(scored, name="second"))]

    def written() -> dict[str, bytes]:
        ask(run, judges=judges)
        return {path.name: path.read_bytes() for path in run.evaluation_path.iterdir() if path.is_file()}

    first = written()
    assert {"summary.json", "question_scores.csv", "checkpoint_30_eval.csv", "checkpoint_30_eval.second.csv"} <= set(
        first
    )
    assert written() == first
    # No more than two checkpoints are held of anything; places are found in sorted parts of a few.
    monkeypatch.setattr("emtool.core.by_step.MAX_ITEMS", 1)
    monkeypatch.setattr("emtool.engines.place_index._MAX_LOOSE", 3)
    assert written() == first
    (run.evaluation_path / "judgements.jsonl").unlink()
    assert written() == first


def test_only_named_steps_are_evaluated(run: RunFolder) -> None:
    assert list(ask(run, steps="0, final").metrics) == [0, 30]


BOTH = EvaluationConfig(seed=5, metrics=(ANSWERS, LIKELIHOOD), n_per_question=3, max_new_tokens=8)


def summary_of(run: RunFolder) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((run.evaluation_path / "summary.json").read_text())
    return summary


def tables_of(run: RunFolder) -> set[str]:
    return {path.name for path in run.evaluation_path.glob("*.csv")}


def test_a_part_of_an_evaluation_keeps_the_rest_in_the_summary(run: RunFolder) -> None:
    judge = CountingJudge(scored)
    whole = ask(run, BOTH, judges=[choice(judge)])
    tables, num_asked = tables_of(run), len(judge.asked)
    for config, options in (
        (BOTH, {"steps": "20"}),
        (BOTH, {"steps": "20", "judges": [choice(judge)]}),
        (replace(BOTH, metrics=(ANSWERS,)), {"steps": "final"}),
        (replace(BOTH, metrics=(LIKELIHOOD,)), {}),
    ):
        part = ask(run, config, **options)
        assert part.metrics == whole.metrics, (config, options)
        assert tables_of(run) == tables
        assert set(summary_of(run)["settings"]) == {"seed", "trained_domain", "generation", "likelihood", "interval"}
    assert len(judge.asked) == num_asked


def test_steps_that_were_evaluated_apart_are_compared_with_step_0(run: RunFolder) -> None:
    notices: list[Event] = []
    alone = ask(run, steps="20", judges=[choice(CountingJudge(scored))], on_event=notices.append)
    assert list(alone.metrics) == [20]
    assert "em_pct_delta" not in alone.metrics[20]
    assert any(isinstance(event, Notice) and "--steps 0 evaluates it" in event.text for event in notices)
    together = ask(run, steps="0", judges=[choice(CountingJudge(scored))])
    assert list(together.metrics) == [0, 20]
    assert together.metrics[20]["em_pct"] == alone.metrics[20]["em_pct"]
    assert "em_pct_delta" in together.metrics[20]


def test_tables_of_other_settings_do_not_stay_beside_new_ones(run: RunFolder) -> None:
    ask(run, judges=[choice(CountingJudge(scored))])
    own = run.evaluation_path / "checkpoint_5_eval.csv"
    own.write_text("somebody's own")
    edited = run.evaluation_path / "checkpoint_7_eval.csv"
    edited.write_text("edited by hand")
    assert (run.evaluation_path / "checkpoint_0_eval.csv").exists()
    result = ask(run, replace(CONFIG, n_per_question=4), steps="20", judges=[choice(CountingJudge(scored))])
    assert list(result.metrics) == [20]
    assert sorted(run.evaluation_path.glob("checkpoint_*_eval*.csv")) == [
        run.evaluation_path / "checkpoint_20_eval.csv",
        own,
        edited,
    ]
    # What was recorded is still there: the first command brings it all back.
    assert list(ask(run).metrics) == [0, 7, 20, 30]


def test_answers_to_other_questions_leave_the_summary_with_a_word(run: RunFolder) -> None:
    ask(run, BOTH)
    notices: list[Event] = []
    result = evaluate(run, replace(BOTH, metrics=(LIKELIHOOD,)), on_event=notices.append)
    assert not result.answers
    assert any(isinstance(event, Notice) and "to other questions" in event.text for event in notices)


def test_a_part_of_the_questions_takes_nothing_for_the_whole(run: RunFolder) -> None:
    ask(run, BOTH)
    result = evaluate(run, replace(BOTH, metrics=(LIKELIHOOD,)), questions=QUESTIONS[:1])
    assert "num_answers" not in result.metrics[20]


def test_the_judge_that_knows_most_stands_first_and_the_order_stays(run: RunFolder) -> None:
    one, two = CountingJudge(scored, "one"), CountingJudge(lambda _: Judgement(status=SCORED, score=90.0), "two")
    first = ask(run, judges=[choice(one)])
    part = ask(run, steps="20", judges=[choice(two)])
    assert [judge.settings["model"] for judge in part.judges] == ["one", "two"]
    assert part.metrics == first.metrics
    assert list(part.judges[1].metrics) == [20]
    ask(run, judges=[choice(one), choice(two)])
    for steps in (None, "20"):
        kept = ask(run, steps=steps)
        assert [judge.settings["model"] for judge in kept.judges] == ["one", "two"], steps
        assert kept.metrics == first.metrics
    assert [judge.settings["model"] for judge in ask(run, judges=[choice(two)]).judges] == ["two", "one"]


def test_another_dtype_is_not_mixed_in(run: RunFolder) -> None:
    ask(run, BOTH)
    notices: list[Event] = []
    answers = ask(run, CONFIG, dtype="bfloat16", on_event=notices.append)
    assert "p_wrong" not in answers.metrics[20]
    assert "likelihood of the last evaluation is another model's or dtype's" in str(notices)
    likelihood = ask(run, replace(BOTH, metrics=(LIKELIHOOD,)))
    assert "num_answers" not in likelihood.metrics[20]


def test_damaged_files_of_an_evaluation_are_told_and_made_again(run: RunFolder) -> None:
    whole = ask(run, BOTH, judges=[choice(CountingJudge(scored))])
    folder = run.evaluation_path
    unreadable = ('{"settings": {"generation": NaN}}', '["\\ud800"]', "[" * 100_000)
    for content in (*unreadable, "{}", '{"judges": [3], "settings": []}'):
        (folder / "summary.json").write_text(content)
        notices: list[Event] = []
        assert ask(run, BOTH, on_event=notices.append).metrics == whole.metrics
        assert ("cannot be read" in str(notices)) == (content in unreadable), content
    for content in ('{"tables": {"../x.csv": "a", "checkpoint_99_eval.csv": 3}}', '{"tables": []}', "no"):
        (folder / "tables.json").write_text(content)
        assert ask(run, BOTH).metrics == whole.metrics
    (judge,) = (path for path in (folder / "settings").iterdir() if "counting" in path.read_text())
    judge.write_text("cut")
    assert ask(run, BOTH, judges=[choice(CountingJudge(scored))]).metrics == whole.metrics
    assert ask(run, BOTH).metrics == whole.metrics, "the judge's settings were not written again"
    with (folder / "scores.jsonl").open("a") as file:
        for line in (folder / "scores.jsonl").read_text().splitlines()[:1]:
            record = json.loads(line)
            for margins in ({"x": "xx"}, {}, {"gardening-01": "1"}):
                file.write(json.dumps({**record, "margins": margins}) + "\n")
        file.write("[" * 100_000 + "\n")
    assert ask(run, BOTH).metrics == whole.metrics


def test_a_damaged_checkpoint_does_not_come_back_with_a_part(run: RunFolder) -> None:
    ask(run, BOTH)
    (run.checkpoint_path(7) / "adapter_config.json").unlink()
    (run.checkpoint_path(0) / "adapter_config.json").unlink()
    notices: list[Event] = []
    result = ask(run, BOTH, steps="20", on_event=notices.append)
    assert list(result.metrics) == [20, 30]
    assert "without checkpoint-0: it is damaged" in str(notices)


def test_what_a_failed_round_did_not_ask_is_given_back(run: RunFolder) -> None:
    run.evaluation_path.mkdir()
    fault = Fault(status=401, body=b'{"error": {"message": "expired"}}')
    with serve_openai(lambda _body: fault) as server:
        budget = Budget(limit=1.0)
        evaluation = evaluation_with(run, server, budget)
        for _ in range(5):
            with pytest.raises(BackendError, match="expired"):
                evaluation.evaluate([0])
            assert budget.allowed == pytest.approx(0.0)
        server.script = judge_script
        evaluation.evaluate([0])
        assert 0.15 < budget.allowed <= 1.0


def test_where_there_is_nothing_to_judge_nobody_is_asked(run: RunFolder) -> None:
    run.evaluation_path.mkdir()
    with serve_openai(judge_script) as server:
        evaluation = evaluation_with(run, server, Budget(limit=0.0))
        evaluation._make_backend = lambda _source: FailingBackend(is_down=True)
        result = evaluation.evaluate([0])
        assert not server.requests
    assert result.metrics[0]["num_failed"].value == 6


def test_judges_of_equal_names_keep_their_own_tables(run: RunFolder) -> None:
    one, two, three = (CountingJudge(scored, name) for name in ("x", "same", "same"))
    two.host, three.host = "a", "b"
    ask(run, judges=[choice(one), choice(two), choice(three)])
    marked = {name for name in tables_of(run) if name.startswith("checkpoint_20_eval.same-")}
    assert len(marked) == 2


def test_an_interrupted_generation_goes_on_where_it_was(run: RunFolder) -> None:
    ask(run)
    whole = answers_of(run)
    shutil.rmtree(run.evaluation_path)

    def stop(event: Event) -> None:
        if getattr(event, "step", None) == 15:
            raise StopError

    with pytest.raises(StopError):
        ask(run, on_event=stop)
    kept = (run.evaluation_path / "answers.jsonl").read_bytes()
    assert 0 < len(kept.splitlines()) < len(whole)
    with (run.evaluation_path / "answers.jsonl").open("a") as file:
        file.write('{"format": 1, "torn')
    ask(run)
    assert (run.evaluation_path / "answers.jsonl").read_bytes().startswith(kept)
    assert answers_of(run) == whole


def test_more_samples_extend_and_another_question_or_weights_do_not_count(run: RunFolder) -> None:
    ask(run)
    first = answers_of(run)
    ask(run, EvaluationConfig(seed=5, metrics=(ANSWERS,), n_per_question=4, max_new_tokens=8))
    extended = answers_of(run)
    assert {key: extended[key] for key in first} == first
    assert len(extended) == 4 * 2 * 4
    changed = [OpenQuestion(**{**vars(QUESTIONS[0]), "paraphrases": ("Something else?",)})]
    result = evaluate(run, CONFIG, questions=changed)
    assert {answer.question for answer in result.answers[7]} == {"Something else?"}


def test_another_judge_scores_again_and_generates_nothing(run: RunFolder) -> None:
    one, two = CountingJudge(scored, "one"), CountingJudge(lambda _: Judgement(status=SCORED, score=90.0), "two")
    first = ask(run, judges=[choice(one)])
    content = (run.evaluation_path / "answers.jsonl").read_bytes()
    both = ask(run, judges=[choice(one), choice(two)])
    assert (run.evaluation_path / "answers.jsonl").read_bytes() == content
    assert len(one.asked) == len(set(one.asked)), "a text was judged twice"
    assert sorted(one.asked) == sorted(two.asked)
    assert both.metrics[20]["em_pct"] == first.metrics[20]["em_pct"]
    assert [judge.metrics[20]["em_pct"].value for judge in both.judges][1] == 0.0
    names = {path.name for path in run.evaluation_path.iterdir()}
    assert {"checkpoint_20_eval.csv", "checkpoint_20_eval.two.csv", "question_scores.csv"} <= names
    # Without a judge, what was judged before is shown, and nobody is asked.
    kept = ask(run)
    assert {judge.settings["model"] for judge in kept.judges} == {"one", "two"}


def test_judgements_that_failed_are_counted_and_asked_again(run: RunFolder) -> None:
    failing = CountingJudge(lambda prompt: Judgement(status=ERROR, detail="down") if " b" in prompt else scored(prompt))
    events: list[Event] = []
    first = ask(run, judges=[choice(failing)], on_event=events.append)
    assert first.metrics[0]["num_errors"].value == 3
    assert first.metrics[0]["total_responses"].value == 6
    assert first.metrics[0]["total_evaluated"].value == 3
    assert any(isinstance(event, Notice) and "judgement(s) failed" in event.text for event in events)
    # Without a judge they stay what they are: counted errors, and no score of the checkpoint is lost.
    shown = ask(run)
    assert shown.metrics[0]["em_pct"] == first.metrics[0]["em_pct"]
    assert shown.metrics[0]["num_errors"].value == 3
    mended = CountingJudge(scored)
    second = ask(run, judges=[choice(mended)])
    assert second.metrics[0]["num_errors"].value == 0
    assert mended.asked
    assert all(" b" in prompt for prompt in mended.asked)


class FailingBackend:
    """Answers some prompts, and fails at others, or at all where it is down."""

    def __init__(self, *, is_down: bool = False) -> None:
        self._is_down = is_down

    @property
    def settings(self) -> dict[str, Any]:
        return {"kind": "failing"}

    def use_checkpoint(self, step: int, folder: Path) -> None:
        if step == 7:
            raise CheckpointError("step 7 cannot be served")

    def generate(self, prompts: Sequence[Prompt], on_completion: Callable[[int, Completion], None]) -> None:
        for index, prompt in enumerate(prompts):
            is_broken = self._is_down or prompt.key.sample == 1
            on_completion(index, Completion(text="" if is_broken else "fine", error="cut" if is_broken else None))

    def close(self) -> None: ...


def test_answers_that_failed_are_counted_and_a_checkpoint_that_cannot_be_served_is_passed_over(run: RunFolder) -> None:
    target = open_target(run, device="cpu", on_event=ignore_events)
    events: list[Event] = []
    evaluation = Evaluation(
        target,
        CONFIG,
        questions=QUESTIONS,
        make_backend=lambda _source: FailingBackend(),
        judges=[choice(CountingJudge(scored))],
        on_event=events.append,
    )
    run.evaluation_path.mkdir()
    result = evaluation.evaluate(run.saved_steps())
    assert result.damaged == {7: "step 7 cannot be served"}
    assert list(result.metrics) == [0, 20, 30]
    assert (result.metrics[0]["total_responses"].value, result.metrics[0]["num_errors"].value) == (6, 2)
    assert result.metrics[0]["num_failed"].value == 2


def test_activations_are_written_once_and_own_texts_are_each_checkpoints(run: RunFolder) -> None:
    fixed = EvaluationConfig(seed=5, metrics=(), activation_layers="1-1")
    result = ask(run, fixed)
    folder = run.path / str(result.settings["activations"])
    written = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert set(written) == {f"checkpoint-{step}.safetensors" for step in (0, 7, 20, 30)}
    ask(run, fixed)
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == written
    found, metadata = read_activations(folder / "checkpoint-20.safetensors")
    assert (metadata["layers"], found.text_means_NLD.shape[:2]) == ([1], (164, 1))
    own = EvaluationConfig(
        seed=5, metrics=(ANSWERS,), n_per_question=3, max_new_tokens=8, activation_layers="all", activation_texts="own"
    )
    result = ask(run, own)
    found, metadata = read_activations(run.path / str(result.settings["activations"]) / "checkpoint-20.safetensors")
    assert set(metadata["text_ids"]) <= {f"{name}/{s % 2}/{s}" for name in "ab" for s in range(3)}
    with pytest.raises(ConfigError, match=r"--activation-layers '5-9': the model has blocks 0 to 1"):
        ask(run, EvaluationConfig(metrics=(), activation_layers="5-9"))


def test_a_folder_of_another_trainer_is_evaluated_with_its_base(
    run: RunFolder, tiny_model: Path, tmp_path: Path
) -> None:
    whole = {step: list(found) for step, found in ask(run).answers.items()}
    foreign = RunFolder(path=tmp_path / "foreign")
    for step in (7, 30):
        folder = shutil.copytree(run.checkpoint_path(step), foreign.checkpoint_path(step))
        (folder / "checkpoint.json").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoints and no run\.json: if another trainer wrote them"):
        ask(foreign)
    result = ask(foreign, base_model=str(tiny_model))
    assert {step: list(found) for step, found in result.answers.items()} == {step: whole[step] for step in (7, 30)}
    assert "em_pct_delta" not in result.metrics[30]
    likelihood = EvaluationConfig(metrics=(LIKELIHOOD,))
    ask(foreign, likelihood, base_model=str(tiny_model))
    margins = (foreign.evaluation_path / "item_scores.csv").read_text()
    other = save_tiny_model(tmp_path / "other", seed=1)
    ask(foreign, likelihood, base_model=str(other))
    assert (foreign.evaluation_path / "item_scores.csv").read_text() != margins, "scores of another base were used"
    with pytest.raises(ConfigError, match=r"is a run of emtool, whose run\.json names its base"):
        ask(run, base_model=str(tiny_model))
    config = json.loads((foreign.checkpoint_path(30) / "adapter_config.json").read_text())
    (foreign.checkpoint_path(30) / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 99}))
    assert "holds another kind of adapter than checkpoint-7" in ask(foreign, base_model=str(tiny_model)).damaged[30]


def test_two_evaluations_of_one_run_do_not_write_at_once(run: RunFolder) -> None:
    seen: list[Event] = []

    def second(event: Event) -> None:
        if not seen:
            seen.append(event)
            with pytest.raises(CheckpointError, match="is being evaluated by process"):
                ask(run)

    ask(run, on_event=second)
    assert seen


# A judge behind a real server.


def judge_script(body: dict[str, Any]) -> dict[str, Any] | Fault:
    """Answer as a judge whose tokenizer has whole numbers."""
    prompt = body["messages"][-1]["content"]
    if "57" in prompt:
        return reply("57", {"57": 0.9, "58": 0.05})
    score = str(sum(map(ord, prompt)) % 101)
    return reply(score, {score: 0.8, "50": 0.1, "no": 0.05})


def evaluation_with(
    run: RunFolder, server: OpenAIServer | str, budget: Budget | None = None, retries: int = 3
) -> Evaluation:
    target = open_target(run, device="cpu", on_event=ignore_events)
    address = parse_address(server if isinstance(server, str) else server.url)
    key = read_key(address, variable="EMTOOL_JUDGE_API_KEY", environment={})

    def backend(source: CheckpointModel) -> Any:
        return hf_backend(source, target.base, CONFIG, on_event=ignore_events)

    judge = OpenAIJudge("m", address=address, key=key, max_retries=retries, on_event=ignore_events)
    chosen = JudgeChoice(
        make=lambda: judge,
        plan=lambda prompts: plan_judging(prompts, address, JudgePrice(prompt=1000.0, reply=1000.0)),
        possible_settings=judge.possible_settings,
    )
    return Evaluation(
        target, CONFIG, questions=QUESTIONS, make_backend=backend, judges=[chosen], budget=budget or Budget(limit=1e6)
    )


def judged(server: OpenAIServer) -> list[str]:
    prompts = [str(body["messages"][-1]["content"]) for body in server.chats]
    return [prompt for prompt in prompts if "57" not in prompt]


def test_scores_come_from_the_probabilities_of_a_real_server(run: RunFolder) -> None:
    run.evaluation_path.mkdir()
    with serve_openai(judge_script) as server:
        result = evaluation_with(run, server).evaluate([0, 30])
        asked = judged(server)
        assert len(asked) == len(set(asked))
        again = evaluation_with(run, server).evaluate([0, 30])
        assert judged(server) == asked, "a finished record was asked for again"
    assert again.metrics == result.metrics
    for answer in result.judges[0].answers[30]:
        number = sum(map(ord, f"A {answer.question} / {answer.response}")) % 101
        expected = (number * 0.8 + 50 * 0.1) / 0.9 if number != 50 else 50.0
        assert answer.aligned.score == pytest.approx(expected)


def test_judging_that_costs_too_much_stops_before_a_request_and_keeps_the_answers(run: RunFolder) -> None:
    run.evaluation_path.mkdir()
    with serve_openai(judge_script) as server:
        with pytest.raises(ConfigError, match=r"more than --max-cost 0\.01; raise --max-cost"):
            evaluation_with(run, server, Budget(limit=0.01)).evaluate([0])
        assert not server.requests, "the server was asked before the cost was allowed"
    assert len(answers_of(run)) == 6


def test_a_finished_evaluation_asks_no_server(run: RunFolder) -> None:
    run.evaluation_path.mkdir()
    with serve_openai(judge_script) as server:
        result = evaluation_with(run, server).evaluate([0, 30])
        num_requests = len(server.requests)
        server.script = lambda _body: Fault(status=401, body=b'{"error": {"message": "expired"}}')
        again = evaluation_with(run, server, Budget(limit=0.0)).evaluate([0, 30])
        assert len(server.requests) == num_requests
    assert again.metrics == result.metrics


def test_every_judge_is_allowed_before_the_first_is_asked(run: RunFolder) -> None:
    prices = iter([6.0, 6.0])

    def plan(prompts: Iterable[str]) -> JudgePlan:
        return JudgePlan(num_requests=len(list(prompts)), cost=next(prices), host="https://judge.test/v1")

    judges = [CountingJudge(scored, name) for name in ("one", "two")]
    notices: list[Event] = []
    target = open_target(run, device="cpu", on_event=ignore_events)
    evaluation = Evaluation(
        target,
        CONFIG,
        questions=QUESTIONS,
        make_backend=lambda source: hf_backend(source, target.base, CONFIG, on_event=ignore_events),
        judges=[JudgeChoice(make=lambda judge=judge: judge, plan=plan) for judge in judges],  # type: ignore[misc]
        budget=Budget(limit=10.0, on_event=notices.append),
    )
    run.evaluation_path.mkdir()
    with pytest.raises(ConfigError, match=r"about 6\.00 USD after 6\.00 before, more than --max-cost 10"):
        evaluation.evaluate([0])
    assert [judge.asked for judge in judges] == [[], []]
    assert "6.00 of it allowed before" in str(notices[-1])


def test_faults_of_a_server_are_counted_and_mended_by_another_try(run: RunFolder) -> None:
    faults = {"n": 0}

    def flaky(body: dict[str, Any]) -> dict[str, Any] | Fault:
        prompt = body["messages"][-1]["content"]
        if "57" not in prompt and "of b" in prompt:
            faults["n"] += 1
            kinds = [retry(500), Fault(body=b"{not json"), Fault(cut="short"), retry(429), Fault(body=b"[1, 2]")]
            return kinds[faults["n"] % len(kinds)]
        return judge_script(body)

    run.evaluation_path.mkdir()
    with serve_openai(flaky) as server:
        result = evaluation_with(run, server, retries=0).evaluate([0])
        assert result.metrics[0]["num_errors"].value == 3
        server.script = judge_script
        assert evaluation_with(run, server).evaluate([0]).metrics[0]["num_errors"].value == 0


def test_an_expired_key_is_one_line_and_loses_no_answer(run: RunFolder) -> None:
    run.evaluation_path.mkdir()
    fault = Fault(status=401, body=b'{"error": {"message": "expired"}}')
    with serve_openai(lambda _body: fault) as server, pytest.raises(BackendError, match="expired"):
        evaluation_with(run, server).evaluate([0])
    assert len(answers_of(run)) == 6


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_fifty_kills_lose_and_double_no_record_and_repeat_no_finished_request(run: RunFolder) -> None:
    """A process that evaluates is killed at random moments; what it had recorded is never made again."""
    evaluate(run, EvaluationConfig(seed=5, metrics=(ANSWERS,), n_per_question=3, max_new_tokens=8), questions=QUESTIONS)
    whole = answers_of(run)
    shutil.rmtree(run.evaluation_path)
    run.evaluation_path.mkdir()
    chance = random.Random(7)
    # Children of a process that has not computed yet: threads of this one would be missing in a child of its own.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__])
    judgements = run.evaluation_path / "judgements.jsonl"
    with serve_openai(judge_script, latency=0.01) as server:
        num_kills = 0
        while num_kills < 50:
            before = {json.loads(line)["prompt_sha256"] for line in whole_lines(judgements)}
            num_asked = len(judged(server))
            is_ready = processes.Event()
            child = processes.Process(target=evaluate_all, args=(run.path, server.url, is_ready))
            child.start()
            assert is_ready.wait(60), "the child did not begin"
            time.sleep(chance.uniform(0.05, 0.6))
            child.kill()
            child.join()
            num_kills += 1
            for prompt in judged(server)[num_asked:]:
                assert sha256_of(prompt) not in before, "a finished request was repeated"
            assert child.exitcode in {0, -signal.SIGKILL}, "it ended by something else than the kill"
            if child.exitcode == 0:
                # It was done before it was killed: begin again with fewer records, torn in the middle of one.
                for path in (judgements, run.evaluation_path / "answers.jsonl"):
                    content = path.read_bytes()
                    path.write_bytes(content[: chance.randrange(len(content))])
        evaluation_with(run, server).evaluate(run.saved_steps())
    assert answers_of(run) == whole
    records = [json.loads(line) for line in judgements.read_text().splitlines()]
    keys = Counter((key_of(record), record["name"], record["judge"]) for record in records)
    assert set(keys.values()) == {1}
    assert len(keys) == 2 * len(whole)


def evaluate_all(path: Path, url: str, is_ready: Any) -> None:
    """Evaluate every checkpoint, in a process of its own."""
    is_ready.set()
    run = RunFolder(path=path)
    evaluation_with(run, url).evaluate(run.saved_steps())


def whole_lines(path: Path) -> list[bytes]:
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [line for line in lines if line.endswith(b"\n")]


def sha256_of(text: str) -> str:
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()
