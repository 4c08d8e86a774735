"""Run a command that is asked to stop when the process that started it is gone.

    python -m emtool.core.tied PID COMMAND...

A worker that is killed cannot stop what it started. On Linux the kernel does it: the command gets SIGTERM, upon which
a training saves its state. Elsewhere the command runs on, and who comes next waits for its lock.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

#: Source: prctl(2), PR_SET_PDEATHSIG. The setting outlives exec.
_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    """Tie this process to its parent and become the command."""
    parent, *command = arguments
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):
        # It went before it could be tied to.
        sys.exit(128 + signal.SIGTERM)
    os.execvp(command[0], command)  # noqa: S606 - becoming the command is the point


if __name__ == "__main__":
    main(sys.argv[1:])
