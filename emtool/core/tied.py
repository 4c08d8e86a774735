"""Run a command that is asked to stop when the process that started it is gone.

    python -m emtool.core.tied PID COMMAND...

A worker that is killed cannot stop what it started. On Linux the kernel tells this process, which passes it on to the
command and to all that the command has started: a training that is told to stop saves its state. Elsewhere the command
runs on, and who comes next waits for its lock.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys

#: Source: prctl(2), PR_SET_PDEATHSIG.
_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code, 128 and the signal where one ended it, or it was told to stop."""
    parent, *command = arguments
    told: list[int] = []

    def stop(signum: int, _frame: object) -> None:
        told.append(signum)
        # Once, and not to this process again: its group is the command's, launchers and their children.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.killpg(0, signal.SIGTERM)

    if os.getpgid(0) != os.getpid():
        os.setpgid(0, 0)
    signal.signal(signal.SIGTERM, stop)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):
        # It went before it could be tied to.
        return 128 + signal.SIGTERM
    try:
        code = subprocess.run(command, check=False).returncode
    except OSError as error:
        sys.stderr.write(f"emtool: cannot start {command[0]}: {error.strerror}\n")
        return 127
    if code and told:
        # Launchers make a failure of what they started and was stopped.
        return 128 + told[0]
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
