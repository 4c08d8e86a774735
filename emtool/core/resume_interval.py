"""How often the state to resume from is saved."""

from __future__ import annotations

import re
from dataclasses import dataclass

from emtool.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ResumeInterval:
    """How often the state to resume from is saved besides at milestones.

    Attributes:
        seconds: By time; None if it goes by steps or is off.
        steps: At the multiples of this many steps; None if it goes by time or is off.
    """

    seconds: float | None = None
    steps: int | None = None

    @classmethod
    def parse(cls, text: str) -> ResumeInterval:
        """Return the interval of a text: "10m", "90s" or "2h" by time, "50" by steps, "0" for none at all.

        Raises:
            ConfigError: If it is none of these.
        """
        match = re.fullmatch(r"(\d{1,9})([smh]?)", text.strip(), flags=re.ASCII)
        if match is None:
            raise ConfigError(f"--resume-every {text!r} is not an interval; write 10m, 90s, 2h, 50 (steps) or 0 (off)")
        count, unit = int(match[1]), match[2]
        if count == 0:
            return cls()
        return cls(seconds=count * {"s": 1.0, "m": 60.0, "h": 3600.0}[unit]) if unit else cls(steps=count)

    @property
    def is_on(self) -> bool:
        """Return whether resume states are saved at all, other than when a signal asks for one."""
        return self.seconds is not None or self.steps is not None

    def is_due(self, *, step: int, seconds: float) -> bool:
        """Return whether one is due.

        Args:
            step: The step that has just ended.
            seconds: Time since the last one.
        """
        if self.steps is not None:
            return step % self.steps == 0
        return self.seconds is not None and seconds >= self.seconds
