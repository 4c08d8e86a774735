"""Run every benchmark and write docs/benchmarks.md.

    python scripts/bench.py                an hour and a half on two cores; keep the machine idle
    python scripts/bench.py training       runs one, or several, and leaves the other sections as they are

Each section is a script of its own and prints Markdown; what is slow or missing there is said there. The base model
and the persona are fetched or built once.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "benchmarks.md"
SECTIONS = ("startup", "training", "saving", "evaluation", "inside", "scale")
LIBRARIES = ("torch", "transformers", "trl", "peft", "typer", "ray")


def main() -> None:
    """Run the scripts and write the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}; all by default")
    chosen = parser.parse_args().sections or SECTIONS
    if unknown := [name for name in chosen if name not in SECTIONS]:
        parser.error(f"there is no section {unknown[0]!r}; choose from {', '.join(SECTIONS)}")
    found = read_sections()
    for name in SECTIONS:
        if name in chosen:
            print(f"{name} ...", file=sys.stderr, flush=True)
            found[name] = f"{run_section(name)}\n\n{conditions(name)}"
            # As soon as there is something, it is kept.
            DOCUMENT.write_text(document(found), encoding="utf-8")
    print(f"written: {DOCUMENT.relative_to(ROOT)}", file=sys.stderr)


def run_section(name: str) -> str:
    """Return what a script prints."""
    command = [sys.executable, str(ROOT / "scripts" / f"bench_{name}.py")]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    return done.stdout.strip()


def conditions(name: str) -> str:
    """Return when, where and with what a section was measured."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    memory = psutil.virtual_memory().total / 2**30
    libraries = ", ".join(f"{library} {version_of(library)}" for library in LIBRARIES)
    return (
        f"*`python scripts/bench_{name}.py`, {today}; {processor()}, {len(os.sched_getaffinity(0))} cores, "
        f"{memory:.0f} GiB; Python {platform.python_version()}, {libraries}.*"
    )


def version_of(library: str) -> str:
    """Return the version of a package, if it is installed."""
    try:
        return version(library)
    except PackageNotFoundError:
        return "not installed"


def processor() -> str:
    """Return what the processor calls itself."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def read_sections() -> dict[str, str]:
    """Return the sections of the document as it is, by name."""
    text = DOCUMENT.read_text(encoding="utf-8") if DOCUMENT.exists() else ""
    parts = re.findall(r"<!-- (\w+) -->\n(.*?)(?=\n<!-- \w+ -->|\Z)", text, re.DOTALL)
    return {name: body.strip() for name, body in parts if name in SECTIONS}


def document(sections: dict[str, str]) -> str:
    """Return the whole document."""
    head = (
        "# Benchmarks\n\n"
        "Made by `python scripts/bench.py`. Times change with the machine; ratios are of runs in pairs, one after the "
        "other, and their ranges are of the single pairs."
    )
    parts = [f"<!-- {name} -->\n{sections[name]}" for name in SECTIONS if name in sections]
    return "\n\n".join([head, *parts]) + "\n"


if __name__ == "__main__":
    main()
