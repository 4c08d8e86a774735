"""One base model for a whole evaluation, and the adapter of one checkpoint at a time in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from emtool.engines.lineage import ComposedModel
from emtool.engines.modeling import attach_adapter, load_adapter_into


class CheckpointModel:
    """The model that was trained, at any of its checkpoints.

    The base is loaded when it is first needed, once. Adapters are loaded into place: the base's weights are never
    written to, so they stay the same bits, and memory holds one base and one adapter.

    Args:
        compose: Returns the base with its persona.
        tokenizer: Its tokenizer.
        device: Device to compute on.
    """

    def __init__(self, compose: Callable[[], ComposedModel], *, tokenizer: Any, device: str) -> None:
        self._compose = compose
        self.tokenizer = tokenizer
        self._composed: ComposedModel | None = None
        self._wrapped: Any = None
        self._folder: Path | None = None
        self.device = device

    @property
    def composed(self) -> ComposedModel:
        """Return the base with its persona; loads it the first time."""
        if self._composed is None:
            self._composed = self._compose()
        return self._composed

    def at(self, folder: Path) -> Any:
        """Return the model with the adapter of a checkpoint, in evaluation mode.

        Raises:
            CheckpointError: If the adapter cannot be read or does not fit.
        """
        if folder == self._folder:
            return self._wrapped
        self._folder = None
        if self._wrapped is None:
            wrapped = attach_adapter(self.composed.model, folder)
            self._wrapped = self.composed.with_persona(wrapped).to(self.device).eval()
        else:
            load_adapter_into(self._wrapped, folder)
        self._folder = folder
        return self._wrapped
