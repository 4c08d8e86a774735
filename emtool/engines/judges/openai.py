"""A judge behind a server that speaks the OpenAI protocol, with log-probabilities where the server gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from emtool.core.errors import BackendError
from emtool.core.events import EventSink, Notice
from emtool.core.judgement import (
    ERROR,
    MIN_MASS,
    Judgement,
    judgement_of_logprobs,
    judgement_of_text,
)
from emtool.core.server_address import ServerAddress, ServerKey
from emtool.engines.judges.judge import JudgementSink
from emtool.engines.openai_client import Failure, JsonObject, Request, Server
from emtool.engines.openai_reply import Choice, read_choice
from emtool.engines.request_pump import ask_once, fatal_message, run_many

#: How the score is read: from the first token's log-probabilities, or from a few tokens of text.
LOGPROBS, TEXT = "logprobs", "text"

#: Alternatives that are asked for, the most that OpenAI gives. Source: Betley et al. 2025, judge code.
TOP_LOGPROBS = 20

#: Tokens of a reply in text: "100/100." and REFUSAL in any tokenizer, and no explanation.
TEXT_TOKENS = 8

#: A reply with two digits: a tokenizer that splits digits begins it with "5".
PROBE = "Reply with the number 57 and nothing else."


class OpenAIJudge:
    """Scores prompts by a chat model at a server.

    Args:
        model: The model's name at the server.
        address: The server.
        key: The key that it is sent.
        concurrency: Most requests in flight.
        timeout_seconds: How long one try may wait.
        max_retries: How often a request is repeated.
        on_event: Told once if the score must be read from text.
    """

    def __init__(
        self,
        model: str,
        *,
        address: ServerAddress,
        key: ServerKey,
        on_event: EventSink,
        concurrency: int = 32,
        timeout_seconds: float = 60.0,
        max_retries: int = 6,
    ) -> None:
        self._model = model
        self._server = Server(address=address, key=key, timeout_seconds=timeout_seconds, max_retries=max_retries)
        self._concurrency = concurrency
        self._on_event = on_event
        self._method: str | None = None
        self._num_failed = 0

    @property
    def settings(self) -> Mapping[str, Any]:
        """Return what shapes the scores, after `prepare`."""
        assert self._method is not None, "prepare() finds the method out"
        return self._settings_with(self._method)

    @property
    def possible_settings(self) -> list[Mapping[str, Any]]:
        """Return every settings that there may be after `prepare`, the better first."""
        return [self._settings_with(method) for method in (LOGPROBS, TEXT)]

    def _settings_with(self, method: str) -> dict[str, Any]:
        return {
            "kind": "openai",
            "model": self._model,
            "host": self._server.address.url,
            "temperature": 0.0,
            "method": method,
            "min_mass": MIN_MASS,
        }

    def prepare(self) -> None:
        """Send one request that tells whether key, model and host work, and how the score can be read; once.

        Raises:
            BackendError: If the judge cannot be asked.
            MissingDependencyError: If the `openai` package is not installed.
        """
        if self._method is not None:
            return
        answer = ask_once(self._server, self._request(PROBE, LOGPROBS))
        if isinstance(answer, Failure) and answer.is_refusal_of_request:
            self._accept_text(answer.text)
            return
        top = self._choice_of_probe(answer).top
        if top is None:
            self._use_text("it gives no log-probabilities")
        elif not _has_whole_numbers(top):
            self._use_text("its first token does not hold a whole number")
        else:
            self._method = LOGPROBS

    def judge(self, prompts: Sequence[str], on_judgement: JudgementSink) -> None:
        """Score prompts, many at a time, after `prepare` if that has not been called.

        Raises:
            BackendError: If every further prompt would fail as well; what was returned before stands.
        """
        self.prepare()
        method = self._method or TEXT
        requests = (self._request(prompt, method) for prompt in prompts)
        # Where this call ends in an error, the next one begins anew: time has passed, and the user has been told.
        before, self._num_failed = self._num_failed, 0
        self._num_failed = run_many(
            self._server,
            requests,
            lambda index, reply: on_judgement(index, _judgement(reply, method)),
            concurrency=self._concurrency,
            num_failed=before,
        )

    def close(self) -> None:
        """Do nothing: connections end with each call of `judge`."""

    def _request(self, prompt: str, method: str) -> Request:
        asked: dict[str, Any] = (
            {"max_tokens": 1, "logprobs": True, "top_logprobs": TOP_LOGPROBS}
            if method == LOGPROBS
            else {"max_tokens": TEXT_TOKENS}
        )
        messages = [{"role": "user", "content": prompt}]
        return Request(body={"model": self._model, "messages": messages, "temperature": 0.0, **asked})

    def _accept_text(self, reason: str) -> None:
        answer = ask_once(self._server, self._request(PROBE, TEXT))
        if isinstance(answer, Failure) and answer.is_refusal_of_request:
            raise BackendError(
                f"{self._model} at {self._server.address.url} refuses temperature 0 with max_tokens ({answer.text}); "
                "reasoning models cannot judge so: choose a chat model, for instance gpt-4o"
            )
        self._choice_of_probe(answer)
        self._use_text(f"the server refuses {TOP_LOGPROBS} log-probabilities ({reason})")

    def _choice_of_probe(self, answer: JsonObject | Failure) -> Choice:
        if isinstance(answer, Failure):
            raise BackendError(fatal_message(self._server, answer))
        choice = read_choice(answer)
        if choice is None:
            raise BackendError(
                f"{self._server.address.url} does not answer as the OpenAI protocol has it; check the base URL, which "
                "often ends in /v1"
            )
        return choice

    def _use_text(self, reason: str) -> None:
        self._method = TEXT
        text = f"judge {self._model}: {reason}; scores are read from its text, one integer a reply"
        self._on_event(Notice(text=text, is_warning=True))


def _has_whole_numbers(top: Sequence[tuple[str, float]]) -> bool:
    """Return whether numbers of two and three digits are likelier than single digits."""
    whole = judgement_of_logprobs([(token, logprob) for token, logprob in top if len(token.strip()) > 1]).mass or 0.0
    digits = judgement_of_logprobs([(token, logprob) for token, logprob in top if len(token.strip()) == 1]).mass or 0.0
    return whole > digits


def _judgement(reply: JsonObject | Failure, method: str) -> Judgement:
    if isinstance(reply, Failure):
        return Judgement(status=ERROR, detail=reply.text)
    choice = read_choice(reply)
    if choice is None:
        return Judgement(status=ERROR, detail="the server's answer is no chat completion")
    if method == TEXT:
        return judgement_of_text(choice.text)
    if choice.top is None:
        return Judgement(status=ERROR, detail="no log-probabilities in the answer")
    return judgement_of_logprobs(choice.top)
