"""The protocol that every judge follows, and how one is chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from emtool.core.judge_prices import JudgePlan
from emtool.core.judgement import Judgement

#: Takes the index of a prompt and its judgement, in the caller's thread, as soon as there is one.
JudgementSink = Callable[[int, Judgement], None]


class Judge(Protocol):
    """Scores filled judge prompts from 0 to 100.

    Attributes:
        settings: What shapes the scores beside the prompt: JSON values, no secrets.
    """

    @property
    def settings(self) -> Mapping[str, Any]:
        """Return the effective settings. Some are known only after `prepare`."""
        ...

    def prepare(self) -> None:
        """Find out whether and how the judge can be asked, once, before settings are read or prompts are scored.

        Raises:
            BackendError: If it cannot be asked at all.
        """
        ...

    def judge(self, prompts: Sequence[str], on_judgement: JudgementSink) -> None:
        """Score prompts, in any order; each exactly once. What fails for one prompt is its judgement's error.

        Raises:
            BackendError: If going on is pointless (expired key, no such model); what was returned before stands.
        """
        ...

    def close(self) -> None:
        """Let go of what is held: connections, memory."""
        ...


@dataclass(frozen=True, kw_only=True)
class JudgeChoice:
    """A judge that was asked for.

    Attributes:
        make: Makes it. It is called when there is something to judge: a local judge loads a model of its own.
        plan: Returns what judging prompts asks of its server; None for a judge that needs none. What a server said is
            kept for other runs too.
        possible_settings: With `plan`: every settings that the judge may turn out to have once it is prepared. Where
            the record holds every judgement under one of them, the server is not asked at all.
    """

    make: Callable[[], Judge]
    plan: Callable[[Iterable[str]], JudgePlan] | None = None
    possible_settings: Sequence[Mapping[str, Any]] = ()
