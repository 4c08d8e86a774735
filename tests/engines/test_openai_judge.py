"""The judge against a real server that speaks the OpenAI protocol."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from emtool.core.errors import BackendError
from emtool.core.events import Event, Notice
from emtool.core.judgement import CODE, ERROR, REFUSAL, SCORED, UNSCORED, Judgement
from emtool.core.server_address import ServerKey, parse_address
from emtool.engines.judges.openai import PROBE, OpenAIJudge
from tests.openai_server import Fault, OpenAIServer, Script, reply, retry, serve_openai

KEY = "sk-judge-0123456789"


def judge_at(served: OpenAIServer, events: list[Event], *, retries: int = 2, concurrency: int = 32) -> OpenAIJudge:
    return OpenAIJudge(
        "gpt-4o",
        address=parse_address(served.url),
        key=ServerKey(variable="EMTOOL_JUDGE_API_KEY", value=KEY),
        on_event=events.append,
        max_retries=retries,
        concurrency=concurrency,
    )


def asked(body: dict[str, Any]) -> str:
    return str(body["messages"][0]["content"])


def with_probe(script: Script, probe: dict[str, Any] | Fault) -> Script:
    return lambda body: probe if asked(body) == PROBE else script(body)


def scores(judge: OpenAIJudge, prompts: list[str]) -> list[Judgement]:
    judgements: dict[int, Judgement] = {}
    judge.judge(prompts, judgements.__setitem__)
    assert sorted(judgements) == list(range(len(prompts)))
    return [judgements[index] for index in range(len(prompts))]


WHOLE = reply("57", {"57": 0.9, "5": 0.05})


def test_a_server_that_is_down_is_noticed_over_many_short_calls() -> None:
    events: list[Event] = []
    with serve_openai(with_probe(lambda _body: Fault(cut="reset"), WHOLE)) as served:
        judge = judge_at(served, events, retries=0, concurrency=4)
        found = [scores(judge, [f"{call}-{number}" for number in range(5)]) for call in range(3)]
        assert {judgement.status for of_call in found for judgement in of_call} == {ERROR}
        with pytest.raises(BackendError, match="failed 16 requests in a row"):
            scores(judge, ["a", "b", "c", "d", "e"])


def test_scores_are_expectations_of_the_first_token() -> None:
    answers = {
        "a": reply("80", {"80": 0.5, "90": 0.25, "The": 0.2}),
        "b": reply("REF", {"REF": 0.9}),
        "c": reply("CO", {"CO": 0.9}),
        "d": reply("I", {"I": 0.8, "5": 0.1}),
        "e": {"choices": []},
        "f": reply("80"),
    }
    events: list[Event] = []
    with serve_openai(with_probe(lambda body: answers[asked(body)], WHOLE)) as served:
        judge = judge_at(served, events)
        result = scores(judge, list(answers))
        body = served.chats[-1]
    assert [one.status for one in result] == [SCORED, REFUSAL, CODE, UNSCORED, ERROR, ERROR]
    assert result[0].score == pytest.approx(83 + 1 / 3)
    assert result[3].mass == pytest.approx(0.1)
    assert not events
    assert {name: body[name] for name in body if name != "messages"} == {
        "model": "gpt-4o",
        "max_tokens": 1,
        "temperature": 0.0,
        "logprobs": True,
        "top_logprobs": 20,
    }
    assert judge.settings == {
        "kind": "openai",
        "model": "gpt-4o",
        "host": served.url,
        "temperature": 0.0,
        "method": "logprobs",
        "min_mass": 0.25,
    }


def test_there_is_one_probe_however_often_it_is_prepared() -> None:
    with serve_openai(with_probe(lambda _body: WHOLE, WHOLE)) as served:
        judge = judge_at(served, [])
        judge.prepare()
        judge.prepare()
        scores(judge, ["a"])
        scores(judge, ["b"])
        assert sorted(map(asked, served.chats)) == sorted([PROBE, "a", "b"])


@pytest.mark.parametrize(
    ("probe", "said"),
    [
        (reply("57"), "no log-probabilities"),
        (reply("5", {"5": 0.9, "57": 0.01}), "does not hold a whole number"),
        (reply("Sure", {"Sure": 0.9}), "does not hold a whole number"),
        ({**reply("57"), "choices": [{"message": {"content": "57"}, "logprobs": {"content": [{}]}}]}, "no log-prob"),
    ],
)
def test_without_usable_log_probabilities_text_is_read_and_that_is_said(probe: dict[str, Any], said: str) -> None:
    events: list[Event] = []
    texts = {"a": "57", "b": "REFUSAL", "c": "Well, 57", "d": "CODE."}
    with serve_openai(with_probe(lambda body: reply(texts[asked(body)]), probe)) as served:
        judge = judge_at(served, events)
        result = scores(judge, list(texts))
        scores(judge, ["a"])
        body = served.chats[-1]
    assert [one.status for one in result] == [SCORED, REFUSAL, UNSCORED, CODE]
    assert (result[0].score, result[2].detail) == (57, "Well, 57")
    (notice,) = events
    assert isinstance(notice, Notice)
    assert notice.is_warning
    assert said in notice.text
    assert (body["max_tokens"], "logprobs" in body) == (8, False)
    assert judge.settings["method"] == "text"


def test_a_server_that_refuses_twenty_log_probabilities_is_read_as_text() -> None:
    events: list[Event] = []
    refusal = Fault(status=400, body=b'{"error": {"message": "top_logprobs must be at most 5"}}')
    with serve_openai(lambda body: refusal if "logprobs" in body else reply("57")) as served:
        assert scores(judge_at(served, events), ["a"])[0].score == 57
    assert [event.text for event in events if isinstance(event, Notice)] == [
        "judge gpt-4o: the server refuses 20 log-probabilities (400: top_logprobs must be at most 5); scores are read "
        "from its text, one integer a reply"
    ]


@pytest.mark.parametrize(
    ("probe", "said"),
    [
        (
            Fault(status=400, body=b'{"error": {"message": "use max_completion_tokens"}}'),
            "reasoning models cannot judge",
        ),
        (
            Fault(status=401, body=f'{{"error": {{"message": "bad {KEY}"}}}}'.encode()),
            r"EMTOOL_JUDGE_API_KEY \(401: bad",
        ),
        (Fault(status=404), "check the model's name"),
        (retry(500), "cannot be used: 500: try again"),
        (Fault(body=b"<html>"), "not JSON"),
        ({"hello": "world"}, "does not answer as the OpenAI protocol has it"),
    ],
)
def test_a_judge_that_cannot_be_asked_is_one_line_before_any_prompt(probe: dict[str, Any] | Fault, said: str) -> None:
    with serve_openai(lambda _body: probe) as served:
        judge = judge_at(served, [])
        with pytest.raises(BackendError, match=said) as caught:
            scores(judge, ["a", "b"])
        assert not [body for body in served.chats if asked(body) != PROBE]
    assert "\n" not in str(caught.value)
    assert KEY not in str(caught.value)


def test_what_fails_for_one_prompt_is_its_error() -> None:
    faults: dict[str, dict[str, Any] | Fault] = {
        "429": retry(429),
        "500": retry(500),
        "cut": Fault(body=b"{"),
        "400": Fault(status=400, body=b'{"error": "prompt too long"}'),
        "shape": {"choices": [{"message": "x"}]},
        "nan": reply("1", {"1": 0.5}) | {"choices": [bad_logprob()]},
        "good": reply("100", {"100": 1.0}),
    }
    with serve_openai(with_probe(lambda body: faults[asked(body)], WHOLE)) as served:
        result = dict(zip(faults, scores(judge_at(served, []), list(faults)), strict=True))
    assert [one.status for one in result.values()] == [ERROR] * 6 + [SCORED]
    assert result["429"].detail == "429: try again"
    assert result["400"].detail == "400: prompt too long"
    assert result["nan"].detail == "a log-probability of nan, which is none"


def bad_logprob() -> dict[str, Any]:
    top = [{"token": "1", "logprob": float("nan")}]
    return {"message": {"content": "1"}, "logprobs": {"content": [{"top_logprobs": top}]}}


def test_thirty_two_are_in_flight() -> None:
    meeting = threading.Barrier(32)

    def script(_body: dict[str, Any]) -> dict[str, Any]:
        meeting.wait(timeout=20)
        return WHOLE

    with serve_openai(with_probe(script, WHOLE)) as served:
        scores(judge_at(served, []), [str(index) for index in range(64)])
        assert served.most_in_flight == 32


def test_an_expired_key_stops_it_and_keeps_what_was_judged() -> None:
    def script(body: dict[str, Any]) -> dict[str, Any] | Fault:
        return WHOLE if int(asked(body)) < 5 else Fault(status=401, body=b'{"error": {"message": "expired"}}')

    judgements: dict[int, Judgement] = {}
    with serve_openai(with_probe(script, WHOLE)) as served:
        judge = judge_at(served, [], concurrency=1)
        with pytest.raises(BackendError, match="expired"):
            judge.judge([str(index) for index in range(50)], judgements.__setitem__)
    assert sorted(judgements) == list(range(5))


@pytest.mark.parametrize("show", [lambda judge: repr(judge.settings), repr, str])
def test_the_key_does_not_show(show: Callable[[OpenAIJudge], str]) -> None:
    with serve_openai(lambda _body: WHOLE) as served:
        judge = judge_at(served, [])
        judge.prepare()
        assert KEY not in show(judge)
