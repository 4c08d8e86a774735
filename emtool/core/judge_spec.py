"""What names a judge and a backend on the command line."""

from __future__ import annotations

from dataclasses import dataclass

from emtool.core.errors import ConfigError

OPENAI, LOCAL = "openai", "local"
JUDGE_KINDS = (OPENAI, LOCAL)

HF, SCRIPTED = "hf", "scripted"
BACKEND_KINDS = (HF, OPENAI, SCRIPTED)


@dataclass(frozen=True, kw_only=True)
class JudgeSpec:
    """A judge as it is named.

    Attributes:
        kind: "openai" for a model behind a server that speaks that protocol, "local" for one in this process.
        model: The model's name: the server's, or a base model's.
    """

    kind: str
    model: str


@dataclass(frozen=True, kw_only=True)
class BackendSpec:
    """What answers, as it is named.

    Attributes:
        kind: "hf", "openai" or "scripted".
        argument: What follows the colon: for "openai" what the server calls a checkpoint, with `{step}` in it; for
            "scripted" the file. None where nothing follows.
    """

    kind: str
    argument: str | None = None


def parse_judge(text: str) -> JudgeSpec:
    """Return the judge that a text like `openai:gpt-4o` names.

    Raises:
        ConfigError: If it names none.
    """
    kind, _, model = text.partition(":")
    if kind not in JUDGE_KINDS or not model.strip():
        raise ConfigError(
            f"--judge {text!r} names no judge; write openai:MODEL (with --judge-base-url for another server), or "
            "local:MODEL for a model in this process"
        )
    return JudgeSpec(kind=kind, model=model.strip())


def parse_backend(text: str) -> BackendSpec:
    """Return the backend that a text like `hf` or `scripted:answers.jsonl` names.

    Raises:
        ConfigError: If it names none.
    """
    kind, _, argument = text.partition(":")
    is_known = kind in BACKEND_KINDS and bool(argument) >= (kind == SCRIPTED) and not (kind == HF and argument)
    if not is_known:
        raise ConfigError(
            f"--backend {text!r} names no backend; write hf, openai or openai:NAME-{{step}} (with --backend-url), or "
            "scripted:FILE"
        )
    return BackendSpec(kind=kind, argument=argument or None)
