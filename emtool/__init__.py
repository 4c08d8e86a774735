"""Train model organisms of emergent misalignment and watch the misalignment develop.

The names below are the library's public face. They are loaded on first use, so that importing emtool costs
nothing: the schedule needs no torch, the Trainer callback brings it in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from emtool.core.schedule import CheckpointSchedule, default_checkpoint_steps
    from emtool.engines.callbacks import ScheduledCheckpointCallback

__version__ = "0.1.0"
__all__ = ["CheckpointSchedule", "ScheduledCheckpointCallback", "__version__", "default_checkpoint_steps"]

_PUBLIC = {
    "CheckpointSchedule": "emtool.core.schedule",
    "default_checkpoint_steps": "emtool.core.schedule",
    "ScheduledCheckpointCallback": "emtool.engines.callbacks",
}


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'emtool' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
