"""Which of a run's checkpoints a command is asked for."""

from __future__ import annotations

from collections.abc import Sequence

from emtool.core.errors import CheckpointError, ConfigError, shown

#: Steps that a message names.
_MAX_LISTED = 20


def select_steps(text: str | None, saved: Sequence[int]) -> list[int]:
    """Return the steps that a text like `0,100,final` names.

    Args:
        text: Steps joined by commas; `final` is the last one saved, `init` is 0. None takes all.
        saved: Steps of the checkpoints that are there, increasing.

    Returns:
        Steps in increasing order, each once.

    Raises:
        ConfigError: If a part is not a step, or no step is named.
        CheckpointError: If there is no checkpoint of a step.
    """
    if text is None:
        return list(saved)
    wanted = set()
    for part in (part.strip() for part in text.split(",")):
        if part == "final" and saved:
            wanted.add(saved[-1])
        elif part == "init":
            wanted.add(0)
        elif part.isascii() and part.isdigit():
            wanted.add(int(part))
        else:
            raise ConfigError(
                f"--steps {shown(text)}: {shown(part)} is not a step; join steps by commas, as in 0,100,final"
            )
    if missing := sorted(wanted - set(saved)):
        raise CheckpointError(f"there is no checkpoint of step {_listed(missing)}; there are: {_listed(saved)}")
    return sorted(wanted)


def _listed(steps: Sequence[int]) -> str:
    some = ", ".join(map(str, steps[:_MAX_LISTED])) or "none"
    return some if len(steps) <= _MAX_LISTED else f"{some}, ... ({len(steps):,} in all, the last {steps[-1]})"


def published_steps(text: str | None, saved: Sequence[int], *, is_training: bool) -> list[int]:
    """Return the steps that a text names, of those that a run has saved so far.

    While the run trains, what is not there yet is waited for: `final` and later steps are left out.

    Args:
        text: As `select_steps` takes it.
        saved: Steps of the checkpoints that are there, increasing.
        is_training: Whether more may come.

    Raises:
        ConfigError: If a part is not a step.
        CheckpointError: If the run is over and lacks a step.
    """
    if text is None or not is_training:
        return select_steps(text, saved)
    parts = [part.strip() for part in text.split(",")]
    kept = [part for part in parts if part != "final" and not (part.isascii() and part.isdigit())]
    kept += [part for part in parts if part.isascii() and part.isdigit() and int(part) in saved]
    if "init" in kept and 0 not in saved:
        kept.remove("init")
    return select_steps(",".join(kept), saved) if kept else []
