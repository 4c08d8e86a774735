"""Time the planning commands as whole processes, beside the import of typer and rich alone.

Run it with the Python that has emtool: `python scripts/bench_startup.py`. It prints medians of paired runs and their
ratio to the import.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

ROUNDS = 15
IMPORT = [sys.executable, "-c", "import typer, rich.table"]
COMMANDS = {
    "schedule preview": ["schedule", "preview", "--profile", "paper", "--total-steps", "397"],
    "disk-estimate": ["disk-estimate"],
    "train --dry-run": ["train", "--profile", "paper", "--custom-checkpoints", "--dry-run"],
}


def seconds(command: list[str]) -> float:
    """Return how long a process takes, in seconds."""
    begun = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - begun


def main() -> None:
    """Measure and print a table."""
    commands = {name: [sys.executable, "-m", "emtool", *arguments] for name, arguments in COMMANDS.items()}
    seconds(IMPORT)
    times: dict[str, list[float]] = {name: [] for name in ("import typer, rich.table", *commands)}
    for _ in range(ROUNDS):
        times["import typer, rich.table"].append(seconds(IMPORT))
        for name, command in commands.items():
            times[name].append(seconds(command))
    base = times["import typer, rich.table"]
    print(f"{'whole process':<26} {'median':>8} {'ratio':>6}  (paired, lowest to highest)")
    for name, measured in times.items():
        ratios = sorted(mine / other for mine, other in zip(measured, base, strict=True))
        median = statistics.median(ratios)
        print(f"{name:<26} {statistics.median(measured):>6.2f} s {median:>6.2f}  ({ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
