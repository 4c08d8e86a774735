"""What names a judge and a backend on the command line.

A new kind of backend is an entry in `BACKENDS`; `docs/extending.md` shows how.
"""

from __future__ import annotations

from dataclasses import dataclass

from emtool.core.errors import ConfigError

OPENAI, LOCAL = "openai", "local"
JUDGE_KINDS = (OPENAI, LOCAL)

HF, SCRIPTED = "hf", "scripted"


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
        kind: A key of `BACKENDS`.
        argument: What follows the colon: for "openai" what the server calls a checkpoint, with `{step}` in it; for
            "scripted" the file. None where nothing follows.
    """

    kind: str
    argument: str | None = None


@dataclass(frozen=True, kw_only=True)
class BackendKind:
    """A kind of backend.

    Attributes:
        form: How one is written: "hf", "scripted:FILE", or "openai[:NAME]" where the part after the colon may be left
            out.
        opener: The function that opens one, as "module:function", which is imported when it is used. It takes a
            `BackendSetup` and returns a `Backend` (`emtool/engines/backends/backend.py`).
    """

    form: str
    opener: str

    def allows(self, argument: str) -> bool:
        """Return whether a backend of this kind can be written with a text after the colon, or with none, ""."""
        if "[:" in self.form:
            return True
        return bool(argument) == (":" in self.form)


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
    if kind not in BACKENDS or not BACKENDS[kind].allows(argument):
        forms = ", ".join(entry.form for entry in BACKENDS.values())
        raise ConfigError(f"--backend {text!r} names no backend; write one of: {forms} (openai with --backend-url)")
    if kind == OPENAI and set("{}") & set(argument.replace("{step}", "")):
        raise ConfigError(f"--backend {text!r}: the name may hold {{step}}, and no other braces")
    return BackendSpec(kind=kind, argument=argument or None)


#: The kinds of backend by name.
BACKENDS: dict[str, BackendKind] = {
    HF: BackendKind(form="hf", opener="emtool.engines.backends.hf:open_backend"),
    OPENAI: BackendKind(form="openai[:NAME-{step}]", opener="emtool.engines.backends.openai:open_backend"),
    SCRIPTED: BackendKind(form="scripted:FILE", opener="emtool.engines.backends.scripted:open_backend"),
}
