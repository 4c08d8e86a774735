"""The protocol that every backend follows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from emtool.core.answers import Completion, Prompt
from emtool.core.evaluation_request import EvaluationRequest
from emtool.core.events import EventSink
from emtool.core.judge_spec import BACKENDS
from emtool.engines.checkpoint_model import CheckpointModel
from emtool.engines.modeling import BaseModel

#: Takes the index of a prompt and its completion, in the caller's thread, as soon as there is one.
CompletionSink = Callable[[int, Completion], None]


class Backend(Protocol):
    """Answers prompts with one checkpoint at a time.

    Attributes:
        settings: What shapes the answers beside checkpoint, prompt and key: JSON values, effective ones, no secrets.
    """

    @property
    def settings(self) -> Mapping[str, Any]:
        """Return the effective settings."""
        ...

    def use_checkpoint(self, step: int, folder: Path) -> None:
        """Answer with a checkpoint from here on.

        Raises:
            CheckpointError: If it cannot be used; the backend stays usable for another one.
            BackendError: If the backend cannot serve checkpoints at all.
        """
        ...

    def generate(self, prompts: Sequence[Prompt], on_completion: CompletionSink) -> None:
        """Answer prompts, in any order; each exactly once, by a completion or one with an error.

        Raises:
            BackendError: If going on is pointless (wrong key, no such model); what was returned before stands.
        """
        ...

    def close(self) -> None:
        """Let go of what is held: connections, memory."""
        ...


@dataclass(frozen=True, kw_only=True)
class BackendSetup:
    """What a backend is opened with.

    Attributes:
        request: The evaluation as it was asked for; `request.backend.argument` is what follows the colon.
        source: The model of the run at any checkpoint, for a backend in this process; it is loaded on its first use.
        base: The base model.
        on_event: Where the backend reports.
    """

    request: EvaluationRequest
    source: CheckpointModel
    base: BaseModel
    on_event: EventSink


def open_backend(setup: BackendSetup) -> Backend:
    """Return the backend that an evaluation asks for."""
    module, _, name = BACKENDS[setup.request.backend.kind].opener.partition(":")
    backend: Backend = getattr(import_module(module), name)(setup)
    return backend
