"""Paired measurements: whole processes, one after the other, in turn; and their ratios as Markdown.

Two programs are run in pairs, so that a machine whose speed changes from minute to minute changes both. A ratio is the
median of the pairs' ratios, with the lowest and the highest.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

#: Starts a command, and tells how long it took and its most memory. A small process does it: a new process counts the
#: memory of the one that it was forked from.
LAUNCHER = """
import os, sys, time
begun = time.perf_counter()
pid = os.spawnve(os.P_NOWAIT, sys.argv[2], sys.argv[2:], os.environ)
_, status, usage = os.wait4(pid, 0)
with open(sys.argv[1], "w") as file:
    file.write(f"{time.perf_counter() - begun} {usage.ru_maxrss}")
sys.exit(os.waitstatus_to_exitcode(status) and 1)
"""

ROOT = Path(__file__).resolve().parents[1]
EMTOOL = (sys.executable, "-m", "emtool")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One process that has ended.

    Attributes:
        seconds: From its start to its end.
        peak_bytes: Most resident memory of it, or of one of its children.
        stdout: What it wrote.
    """

    seconds: float
    peak_bytes: int
    stdout: str


def run(command: Sequence[str]) -> Run:
    """Run a process to its end.

    Raises:
        RuntimeError: If it fails; holds the end of what it said.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    with (
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as said,
        tempfile.NamedTemporaryFile() as told,
    ):
        launched = [sys.executable, "-I", "-S", "-c", LAUNCHER, told.name, *map(str, command)]
        process = subprocess.run(launched, stdout=out, stderr=said, env=environment, check=False)
        out.seek(0)
        said.seek(0)
        if process.returncode:
            raise RuntimeError(f"{' '.join(map(str, command))}: {said.read()[-2000:]}")
        seconds, peak_kib = Path(told.name).read_text().split()
        return Run(seconds=float(seconds), peak_bytes=int(peak_kib) * 1024, stdout=out.read())


def in_turn(variants: Mapping[str, Callable[[], Run]], rounds: int) -> dict[str, list[Run]]:
    """Run each variant once a round; every other round in the opposite order."""
    found: dict[str, list[Run]] = {name: [] for name in variants}
    for number in range(rounds):
        for name in list(variants) if number % 2 == 0 else reversed(list(variants)):
            say(f"  round {number + 1} of {rounds}: {name}")
            found[name].append(variants[name]())
    return found


def ratio(ours: Sequence[float], theirs: Sequence[float], *, digits: int = 2) -> str:
    """Return the ratio of paired measurements as text: the median, the lowest, the highest."""
    ratios = sorted(mine / other for mine, other in zip(ours, theirs, strict=True))
    middle, low, high = (f"{value:.{digits}f}" for value in (statistics.median(ratios), ratios[0], ratios[-1]))
    return middle if len(ratios) == 1 else f"{middle} ({low} to {high})"


def median(values: Sequence[float]) -> float:
    """Return the median."""
    return statistics.median(values)


def mib(num_bytes: float) -> str:
    """Return a number of bytes in MiB."""
    return f"{num_bytes / 2**20:,.0f} MiB"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, its first column to the left and the others to the right."""
    line = "|" + "---|" + "---:|" * (len(headings) - 1)
    return "\n".join(["| " + " | ".join(headings) + " |", line, *("| " + " | ".join(row) + " |" for row in rows)])


def say(text: str) -> None:
    """Write progress to stderr: stdout is the document."""
    print(text, file=sys.stderr, flush=True)
