"""The `openai` package against a real server: retries, bounds, interrupts, and where keys go."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from emtool.core.errors import BackendError, Interrupted, MissingDependencyError
from emtool.core.interrupts import interruptible
from emtool.core.server_address import ServerKey, parse_address
from emtool.engines.openai_client import MAX_BODY_BYTES, Failure, JsonObject, Request, Server
from emtool.engines.request_pump import ask_once, run_many
from tests.openai_server import Fault, reply, retry, serve_openai

KEY = "sk-very-secret-0123456789"


def connect(url: str, *, key: str | None = KEY, retries: int = 2, timeout: float = 10.0) -> Server:
    return Server(
        address=parse_address(url),
        key=ServerKey(variable="SOME_KEY", value=key),
        timeout_seconds=timeout,
        max_retries=retries,
    )


def prompts(count: int) -> list[Request]:
    return [Request(body={"messages": [{"role": "user", "content": str(index)}]}) for index in range(count)]


def number(body: dict[str, Any]) -> int:
    return int(body["messages"][0]["content"])


def collect(server: Server, count: int, **options: int) -> dict[int, JsonObject | Failure]:
    replies: dict[int, JsonObject | Failure] = {}

    def keep(index: int, answer: JsonObject | Failure) -> None:
        assert threading.current_thread() is threading.main_thread()
        assert index not in replies
        replies[index] = answer

    run_many(server, prompts(count), keep, **options)
    return replies


def content(answer: JsonObject | Failure) -> str:
    assert not isinstance(answer, Failure), answer
    return str(answer["choices"][0]["message"]["content"])


def test_every_prompt_gets_its_own_answer() -> None:
    with serve_openai(lambda body: reply(f"answer {number(body)}")) as served:
        replies = collect(connect(served.url), 40, concurrency=8)
    assert {index: content(answer) for index, answer in replies.items()} == {n: f"answer {n}" for n in range(40)}


def test_as_many_are_in_flight_as_allowed_and_no_more() -> None:
    meeting = threading.Barrier(5)

    def script(body: dict[str, Any]) -> dict[str, Any]:
        meeting.wait(timeout=10)
        return reply("x")

    with serve_openai(script) as served:
        assert len(collect(connect(served.url), 20, concurrency=5)) == 20
        assert served.most_in_flight == 5


@pytest.mark.parametrize("fault", [retry(429), retry(500), retry(503), Fault(cut="reset"), Fault(cut="short")])
def test_what_passes_is_tried_again(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    faults = [fault, fault]
    with serve_openai(lambda _body: faults.pop() if faults else reply("x")) as served:
        assert content(collect(connect(served.url), 1)[0]) == "x"
        assert len(served.chats) == 3


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (retry(429, text="slow down"), "429: slow down"),
        (retry(500), "500: try again"),
        (Fault(status=400, body=b'{"message": "too long"}'), "400: too long"),
        (Fault(status=422, body=b"<h1>no\x1b[2J\n</h1>"), "422: <h1>no [2J </h1>"),
        (Fault(status=400, body=b'{"error": {"message": 7}}'), '400: {"error": {"message": 7}}'),
        (Fault(status=400, body=b"\xff" * 5000), "400: " + "\ufffd" * 200),
        (Fault(status=400, body=b"[" * 100_000), "400: " + "[" * 200),
        (Fault(cut="reset"), "the connection broke or could not be made"),
        (Fault(cut="short", body=b"{"), "the connection broke or could not be made"),
        (Fault(cut="hang"), "no answer within 0.2 s, tries: 3"),
        (Fault(body=b"not json"), "not JSON"),
        (Fault(body=b""), "not JSON"),
        (Fault(body=b"[" * 100_000), "not JSON"),
        (Fault(body=b"9" * 10_000), "not JSON"),
        (Fault(body=b"[]"), "not a JSON object"),
        (Fault(body=b"x" * (MAX_BODY_BYTES + 1)), "longer than 4,194,304 bytes"),
        (Fault(status=500, headers={"Retry-After": "0.01"}, body=b"x" * (MAX_BODY_BYTES + 1)), "longer than"),
        (Fault(body=b"{}", headers={"Content-Encoding": "gzip"}), "compressed"),
    ],
)
def test_what_stays_wrong_is_one_lines_failure_and_the_others_go_on(
    fault: Fault, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    with serve_openai(lambda body: fault if number(body) == 1 else reply("x")) as served:
        replies = collect(connect(served.url, timeout=0.2 if fault.cut == "hang" else 10), 4)
    assert [content(replies[index]) for index in (0, 2, 3)] == ["x"] * 3
    failure = replies[1]
    assert isinstance(failure, Failure)
    assert said in failure.text
    assert failure.text.isprintable()
    assert not failure.is_fatal


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault(status=401, body=b'{"error": {"message": "expired"}}'), r"refuses the key in SOME_KEY \(401: expired\)"),
        (Fault(status=403), "refuses the key"),
        (
            Fault(status=404, body=b'{"error": {"message": "no model"}}'),
            r"does not have .*\(404: no model\); check the",
        ),
        (Fault(status=307, headers={"Location": "http://127.0.0.1:1/"}), "redirects elsewhere"),
        (
            Fault(status=429, body=b'{"error": {"code": "insufficient_quota"}}', headers={"Retry-After": "0.01"}),
            "refuses the key",
        ),
    ],
)
def test_what_every_request_would_share_ends_it_and_keeps_what_was_done(fault: Fault, said: str) -> None:
    replies: dict[int, JsonObject | Failure] = {}
    with serve_openai(lambda body: reply("x") if number(body) < 3 else fault) as served:
        with pytest.raises(BackendError, match=said) as caught:
            run_many(connect(served.url), prompts(1000), replies.__setitem__, concurrency=1)
        assert len(served.chats) <= 3 + 3
    assert sorted(replies) == [0, 1, 2]
    assert "\n" not in str(caught.value)


def test_a_server_that_is_down_ends_it_early() -> None:
    with serve_openai(lambda _body: Fault(cut="reset")) as served:
        replies: dict[int, JsonObject | Failure] = {}
        with pytest.raises(BackendError, match=r"failed \d+ requests in a row: the connection broke"):
            run_many(connect(served.url, retries=0), prompts(5000), replies.__setitem__, concurrency=10)
    assert 20 <= len(replies) < 40
    with pytest.raises(BackendError, match="in a row"):
        run_many(connect(served.url, retries=0), prompts(5000), replies.__setitem__, concurrency=10)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_at_once_and_hands_over_what_was_done(signum: signal.Signals) -> None:
    replies: dict[int, JsonObject | Failure] = {}
    hanging = threading.Semaphore(0)

    def script(body: dict[str, Any]) -> dict[str, Any] | Fault:
        if number(body) < 6:
            return reply("x")
        hanging.release()
        return Fault(cut="hang")

    def interrupt() -> None:
        for _ in range(4):
            hanging.acquire()
        # What is just being handed over may be lost: this is about what was there before.
        end = time.monotonic() + 60
        while len(replies) < 6 and time.monotonic() < end:
            time.sleep(0.01)
        os.kill(os.getpid(), signum)

    with serve_openai(script) as served, interruptible():
        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(Interrupted):
            run_many(connect(served.url), prompts(1000), replies.__setitem__, concurrency=4)
        thread.join()
        assert len(served.chats) == 10
    assert sorted(replies) == list(range(6))
    assert not [one for one in threading.enumerate() if one.name == "emtool-requests"]


def test_an_interrupt_while_a_reply_is_handed_over_neither_doubles_nor_loses_another() -> None:
    seen: list[int] = []

    def keep(index: int, _reply: JsonObject | Failure) -> None:
        seen.append(index)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with serve_openai(lambda _body: reply("x")) as served:
        with pytest.raises(KeyboardInterrupt):
            run_many(connect(served.url), prompts(500), keep, concurrency=4)
        assert len(seen) >= len(served.chats) - 4
    assert len(set(seen)) == len(seen)


def test_what_the_sink_raises_ends_it() -> None:
    def keep(_index: int, _reply: JsonObject | Failure) -> None:
        raise OSError("disk full")

    with serve_openai(lambda _body: reply("x")) as served, pytest.raises(OSError, match="disk full"):
        run_many(connect(served.url), prompts(500), keep)


def test_a_fault_in_making_requests_surfaces() -> None:
    def broken() -> Any:
        yield prompts(1)[0]
        raise ZeroDivisionError

    with serve_openai(lambda _body: reply("x")) as served, pytest.raises(ExceptionGroup) as caught:
        run_many(connect(served.url), broken(), lambda _index, _reply: None)
    assert caught.group_contains(ZeroDivisionError)


def test_the_packages_own_settings_do_not_leak_in(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_WEBHOOK_SECRET"):
        monkeypatch.setenv(name, "leaked")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/leaked")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Leaked: leaked\nAuthorization: Bearer leaked\naccept: leaked")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1/")
    with serve_openai(lambda _body: reply("x")) as served:
        collect(connect(served.url), 1)
        collect(connect(served.url, key=None), 1)
        headers = [asked.headers for asked in served.requests]
    assert [one["Authorization"] for one in headers] == [f"Bearer {KEY}", "Bearer none"]
    assert "leaked" not in repr(headers)
    assert not [name for name in headers[0] if name.lower().startswith(("x-", "openai"))]


def test_a_redirect_carries_nothing_to_another_place() -> None:
    with serve_openai(lambda _body: reply("x")) as other:
        to = Fault(status=308, headers={"Location": f"{other.url}/chat/completions"})
        with serve_openai(lambda _body: to) as served:
            answer = ask_once(connect(served.url), prompts(1)[0])
        assert isinstance(answer, Failure)
        assert answer.is_fatal
        assert other.requests == []


def echoes() -> list[Callable[[dict[str, Any]], dict[str, Any] | Fault]]:
    said = json.dumps({"error": {"message": f"bad key\n{KEY}\r\nsk-very-\u0000secret"}}).encode()
    return [
        lambda _body: Fault(status=401, body=said),
        lambda _body: Fault(status=400, body=KEY.encode()),
        lambda _body: Fault(status=400, body=b"x" * 190 + KEY.encode()),
        lambda _body: Fault(status=500, body=said, headers={"Retry-After": "0.01"}),
        lambda _body: Fault(body=KEY.encode()),
        lambda _body: reply(KEY, {KEY: 0.5}),
        lambda _body: {KEY: [{"a": KEY}]},
        lambda _body: Fault(cut="reset"),
    ]


@pytest.mark.parametrize("script", echoes())
def test_a_key_reaches_no_text(
    script: Callable[[dict[str, Any]], dict[str, Any] | Fault],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    texts = []
    with caplog.at_level(logging.DEBUG), serve_openai(script) as served:
        for name in ("openai", "httpx2", "httpcore2"):
            caplog.set_level(logging.DEBUG, logger=name)
        server = connect(served.url)
        texts += [repr(server), repr(ask_once(server, prompts(1)[0]))]
        try:
            texts.append(repr(collect(server, 1)))
        except BackendError as error:
            texts += [str(error), repr(error), repr(error.__cause__), repr(error.__context__)]
    assert any(record.name.startswith("openai") for record in caplog.records)
    texts += [record.getMessage() for record in caplog.records]
    assert not [text for text in texts if KEY in text or KEY[:-3] in text]


def test_texts_that_no_file_can_hold_are_mended() -> None:
    with serve_openai(lambda _body: Fault(body=b'{"choices": "a\\ud800b"}')) as served:
        assert collect(connect(served.url), 1)[0] == {"choices": "a?b"}


def test_without_the_package_the_message_holds_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'emtool\[judge\]'"):
        ask_once(connect("http://127.0.0.1:1/v1"), prompts(1)[0])
