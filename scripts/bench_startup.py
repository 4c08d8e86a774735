"""Time the planning commands as whole processes, beside the import of typer and rich alone.

python scripts/bench_startup.py        prints a section of docs/benchmarks.md; about a minute
"""

from __future__ import annotations

import sys
from functools import partial

from paired import EMTOOL, in_turn, median, mib, ratio, run, table

ROUNDS = 15
IMPORT = "import of typer and rich"
COMMANDS = {
    "emtool schedule preview --total-steps 397": ["schedule", "preview", "--profile", "paper", "--total-steps", "397"],
    "emtool disk-estimate": ["disk-estimate"],
    "emtool train --custom-checkpoints --dry-run": ["train", "--profile", "paper", "--custom-checkpoints", "--dry-run"],
}


def main() -> None:
    """Measure and print."""
    variants = {IMPORT: partial(run, [sys.executable, "-c", "import typer, rich.table"])}
    variants |= {name: partial(run, [*EMTOOL, *arguments]) for name, arguments in COMMANDS.items()}
    for work in variants.values():
        work()  # what has never been read comes from the disk
    runs = in_turn(variants, ROUNDS)
    found = {name: [one.seconds for one in each] for name, each in runs.items()}
    rows = [
        (
            name,
            f"{median(seconds):.2f} s",
            "1" if name == IMPORT else ratio(seconds, found[IMPORT]),
            mib(median([one.peak_bytes for one in runs[name]])),
        )
        for name, seconds in found.items()
    ]
    print("## How long planning takes\n")
    print(f"Whole processes, {ROUNDS} pairs.\n")
    print(table(("", "median", "ratio", "peak memory"), rows))


if __name__ == "__main__":
    main()
