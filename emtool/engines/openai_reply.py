"""What a server that speaks the OpenAI protocol answered, checked field by field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The first choice of a chat completion.

    Attributes:
        text: The answer; empty where there is none.
        finish_reason: As the server names it; None where it is not told.
        num_tokens: Tokens of the answer as the server counts them; None where it does not tell.
        top: Texts and log-probabilities of the likeliest first tokens; None where there are none.
    """

    text: str
    finish_reason: str | None
    num_tokens: int | None
    top: list[tuple[str, float]] | None


def read_choice(reply: Mapping[str, Any]) -> Choice | None:
    """Return the first choice of a chat completion, or None where the reply is none."""
    choice = _first(reply.get("choices"))
    message = choice.get("message") if choice is not None else None
    if choice is None or not isinstance(message, dict):
        return None
    text, finish_reason = message.get("content"), choice.get("finish_reason")
    if not isinstance(text, str | None) or not isinstance(finish_reason, str | None):
        return None
    usage = reply.get("usage")
    count = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return Choice(
        text=text or "",
        finish_reason=finish_reason,
        num_tokens=count if type(count) is int and count >= 0 else None,
        top=_top(choice.get("logprobs")),
    )


def _first(values: Any) -> dict[str, Any] | None:
    return values[0] if isinstance(values, list) and values and isinstance(values[0], dict) else None


def _top(logprobs: Any) -> list[tuple[str, float]] | None:
    position = _first(logprobs.get("content")) if isinstance(logprobs, dict) else None
    alternatives = None if position is None else position.get("top_logprobs")
    if not isinstance(alternatives, list) or not alternatives:
        return None
    top = []
    for alternative in alternatives:
        values = alternative if isinstance(alternative, dict) else {}
        token, logprob = values.get("token"), values.get("logprob")
        if not isinstance(token, str) or type(logprob) not in {int, float}:
            return None
        try:
            top.append((token, float(logprob)))  # type: ignore[arg-type]
        except OverflowError:
            return None
    return top
