"""How time and memory grow with checkpoints, answers, questions, samples and the size of the model.

    python scripts/bench_scale.py                  prints a section of docs/benchmarks.md
    python scripts/bench_scale.py checkpoints      one of: checkpoints, records, questions, size

Run folders are simulated (scripts/simulated_run.py); the commands are real, and each is a whole process. A million
answers take most of the time, and 2 GB in the folder for temporary files: --answers says otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paired import EMTOOL, Run, mib, run, say, table
from simulated_run import simulate_records, simulate_run, simulate_tables, train_pattern

from emtool.core.disk import folder_bytes, format_bytes
from emtool.core.run_dir import RunFolder
from tests.tiny import byte_tokenizer, tiny_config

CHECKPOINTS = (100, 1_000, 10_000)
#: Processes of each command on checkpoints, which take a second or two.
PROCESSES = 3
ANSWERS = (10_000, 100_000, 1_000_000)
#: Answers of a checkpoint: 40 questions, 25 each.
QUESTIONS, SAMPLES = 40, 25
ASKED, ANSWERED = (25, 100, 400), (2, 8, 32)
WIDTHS = (64, 128, 256, 512)
STEPS = 5
MODELS = ("qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-7b", "qwen2.5-14b", "qwen2.5-32b")


def main() -> None:
    """Measure and print."""
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], metavar="PART")
    parser.add_argument("--checkpoints", type=int, nargs="+", default=CHECKPOINTS)
    parser.add_argument("--answers", type=int, nargs="+", default=ANSWERS)
    options = parser.parse_args()
    print("## How cost grows\n")
    print("Run folders are simulated, commands are real; each figure is of a whole process, its start included.")
    with tempfile.TemporaryDirectory(prefix="emtool-bench-") as folder:
        for name in options.parts or PARTS:
            root = Path(folder) / name
            root.mkdir()
            print(f"\n{PARTS[name](root, options)}", flush=True)
            shutil.rmtree(root)


def pattern_of(root: Path) -> RunFolder:
    """Return the run that simulated ones are made after; training must not write to stdout, which is the document."""
    with contextlib.redirect_stdout(sys.stderr):
        return train_pattern(root)


def emtool(*arguments: object) -> Run:
    """Run a command of emtool's."""
    say(f"  emtool {' '.join(map(str, arguments))[:100]}")
    return run([*EMTOOL, *map(str, arguments)])


def checkpoints(root: Path, options: argparse.Namespace) -> str:
    """Return what commands on one run folder cost by its number of checkpoints."""
    pattern = pattern_of(root)
    found: dict[str, list[Run]] = {}
    for count in options.checkpoints:
        say(f"a run of {count:,} checkpoints")
        of_runs = root / f"runs-{count}"
        of_runs.mkdir()
        simulated = simulate_run(pattern, of_runs / "run", num_checkpoints=count)
        simulate_tables(simulated)
        schedule = ["--profile", "paper", "--total-steps", count - 1, "--checkpoints", "init, every 1"]
        commands: dict[str, Sequence[object]] = {
            "`schedule preview`": ("schedule", "preview", *schedule),
            "discovery: `runs --json`": ("runs", "--output-root", of_runs, "--json"),
            "discovery: `evaluate --dry-run`": ("evaluate", simulated.path, "--dry-run"),
            "`verify --sizes-only`": ("verify", simulated.path, "--sizes-only"),
            "`verify`, contents too": ("verify", simulated.path),
            "`report`": ("report", simulated.path),
        }
        for name, arguments in commands.items():
            found.setdefault(name, []).append(middle([emtool(*arguments) for _ in range(PROCESSES)]))
        shutil.rmtree(of_runs)
    text = f"### Checkpoints of one run\n\nThe median of {PROCESSES} processes, one after the other.\n\n"
    return text + growth(options.checkpoints, found)


def middle(runs: Sequence[Run]) -> Run:
    """Return the run of the median time."""
    return sorted(runs, key=lambda one: one.seconds)[len(runs) // 2]


def growth(sizes: Sequence[int], found: dict[str, list[Run]], *, per: str = "") -> str:
    """Return seconds and peak memory by size, and how they grow between the last two sizes.

    Args:
        sizes: What was measured.
        found: Name of a command to its run of each size.
        per: What memory is divided by between the last two sizes; empty leaves that column out.
    """
    last = f"{sizes[-2]:,} to {sizes[-1]:,}" if len(sizes) > 1 else ""
    headings = ["", *(f"{size:,}" for size in sizes)]
    headings += [f"time, {last}"] if last else []
    headings += [f"bytes/{per}, {last}"] if last and per else []
    rows = []
    for name, runs in found.items():
        cells = [name, *(f"{one.seconds:.2f} s, {mib(one.peak_bytes)}" for one in runs)]
        if last:
            cells.append(f"x {runs[-1].seconds / runs[-2].seconds:.1f}")
        if last and per:
            cells.append(f"{(runs[-1].peak_bytes - runs[-2].peak_bytes) / (sizes[-1] - sizes[-2]):,.0f}")
        rows.append(cells)
    return table(headings, rows)


def records(root: Path, options: argparse.Namespace) -> str:
    """Return what commands on recorded answers cost by their number."""
    pattern = pattern_of(root)
    found: dict[str, list[Run]] = {}
    for count in options.answers:
        say(f"a run of {count:,} answers")
        path = root / f"run-{count}"
        simulated = simulate_run(pattern, path, num_checkpoints=max(1, count // (QUESTIONS * SAMPLES)))
        written = simulate_records(simulated, num_questions=QUESTIONS, num_samples=SAMPLES)
        assert written.num_answers == count, "answers come in checkpoints of 1,000"
        found.setdefault("`evaluate` again", []).append(emtool("evaluate", path, *written.arguments))
        found.setdefault("`metrics`", []).append(emtool("metrics", path / "evaluation"))
        found.setdefault("`report`", []).append(emtool("report", path))
        copy = root / f"copy-{count}"
        (copy / "evaluation").mkdir(parents=True)
        shutil.copy(path / "run.json", copy)
        for file in (path / "evaluation").iterdir():
            if file.suffix in (".csv", ".json"):
                (copy / "evaluation" / file.name).hardlink_to(file)
        found.setdefault("`compare`, with a copy", []).append(emtool("compare", path, copy))
        shutil.rmtree(path)
        shutil.rmtree(copy)
    text = (
        f"### Answers of one run\n\nCheckpoints of {QUESTIONS * SAMPLES:,} answers of 45 words, each with two "
        "judgements; all are recorded, and `evaluate` asks nobody.\n\n"
    )
    return text + growth(options.answers, found, per="answer")


def questions(root: Path, options: argparse.Namespace) -> str:
    """Return how long a tiny model takes to answer, by questions and samples."""
    made = pattern_of(root)
    rows = []
    for asked in ASKED:
        path = root / f"{asked}.yaml"
        entries = [{"id": f"question_{n}", "paraphrases": [f"What of {n}?"]} for n in range(asked)]
        path.write_text(json.dumps(entries))
        cells = [f"{asked} questions"]
        for answered in ANSWERED:
            copy = root / f"run-{asked}-{answered}"
            shutil.copytree(made.path, copy)
            sampling = ["--n-per-question", answered, "--max-new-tokens", 32, "--steps", "0,3", "--device", "cpu"]
            done = emtool("evaluate", copy, "--metrics", "answers", "--questions", path, *sampling)
            cells.append(f"{done.seconds:.2f} s")
        rows.append(cells)
    text = "### Questions and samples\n\nA tiny model answers at two checkpoints, at most 32 tokens an answer.\n\n"
    return text + table(["", *(f"{count} samples" for count in ANSWERED)], rows)


def save_model(folder: Path, width: int) -> Path:
    """Save an untrained model of two blocks of a width."""
    from transformers import LlamaForCausalLM

    LlamaForCausalLM(tiny_config(hidden_size=width, intermediate_size=4 * width)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def size(root: Path, options: argparse.Namespace) -> str:
    """Return bytes of a checkpoint and seconds of a step by the width of tiny models, and bytes for the catalogue's."""
    rows = []
    for width in WIDTHS:
        with contextlib.redirect_stdout(sys.stderr):
            model = save_model(root / f"model-{width}", width)
        name = f"run-{width}"
        length = ["--max-steps", STEPS, "--checkpoints", "every 1", "--resume-every", 0]
        where = ["--output-root", root, "--output-name", name, "--device", "cpu"]
        emtool("train", "--profile", "demo", "--model", model, *length, *where)
        log = [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]
        seconds = [entry["seconds"] for entry in log if "loss" in entry and "seconds" in entry]
        step = (seconds[-1] - seconds[0]) / (len(seconds) - 1)
        milestone = folder_bytes(RunFolder(path=root / name).checkpoint_path(STEPS))
        rows.append([f"{width}", format_bytes(folder_bytes(model)), f"{step:.3f} s", format_bytes(milestone)])
    text = "### Size of the model\n\nTrained here: tiny models of growing width.\n\n"
    text += table(["width", "model on disk", "one step", "one checkpoint"], rows)
    computed = []
    for name in MODELS:
        done = emtool("disk-estimate", "--model", name, "--total-steps", 400, "--json")
        estimate = json.loads(done.stdout)
        parts = [format_bytes(estimate[part]) for part in ("checkpoint_bytes", "total_bytes", "resume_bytes")]
        computed.append([name, *parts, f"{done.seconds:.2f} s"])
    text += "\n\nComputed, not trained: `disk-estimate` at the published setting, 400 steps.\n\n"
    headings = ["model", "one checkpoint", "the custom schedule", "state to resume from", "planning"]
    return text + table(headings, computed)


#: What is measured, by name.
PARTS: dict[str, Callable[[Path, argparse.Namespace], str]] = {
    "checkpoints": checkpoints,
    "records": records,
    "questions": questions,
    "size": size,
}

if __name__ == "__main__":
    main()
