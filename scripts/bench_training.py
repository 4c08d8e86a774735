"""A training step of `emtool train`, beside TRL's SFTTrainer as it comes and beside a hand-written loop.

    python scripts/bench_training.py       prints a section of docs/benchmarks.md; 20 minutes on two cores

SmolLM2-135M with the demo's adapter (LoRA r 8), batch 2, the same rows, labels, order, dtype and threads. Each is a
process of its own. The loop (baseline_torch.py) is the floor: no Trainer, logits where they carry loss only.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from paired import EMTOOL, ROOT, Run, in_turn, median, mib, ratio, run, say, table

from emtool.engines.rounded_products import has_bfloat16_kernels

#: Steps that are not counted: they warm caches up.
WARM_UP = 4
OURS, TRL, LOOP, DEFAULTS = "emtool train", "TRL, gradient checkpointing off", "hand-written loop", "TRL's defaults"
ROUNDED = "hand-written loop, products rounded as emtool's"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print("## A training step\n")
    print(
        "SmolLM2-135M, LoRA r 8, batch 2, the same rows, labels, order and threads; whole processes in turn, the "
        f"median step of each, the first {WARM_UP} left out. The hand-written loop is the floor: no Trainer, and "
        "logits only where they carry loss. TRL's defaults are gradient checkpointing and bfloat16 autocast. emtool's "
        "peak memory is that of the held-out loss at the end, which the others do not measure.\n"
    )
    print(section("float32", (OURS, TRL, LOOP), rounds=options.rounds, steps=options.steps), flush=True)
    print(
        f"\nFetching and padding a batch takes {batch_milliseconds():.1f} ms of a step, and tokenizing is done once "
        "before: a process that prefetches would take more from two cores than it gives."
    )
    if has_bfloat16_kernels():
        print("\n" + section("bfloat16", (OURS, TRL, LOOP, DEFAULTS), rounds=options.rounds, steps=options.steps))
        return
    names = (OURS, TRL, LOOP, ROUNDED, DEFAULTS)
    text = section("bfloat16", names, rounds=min(2, options.rounds), steps=3, warm_up=1)
    print(
        "\nTorch has no kernels for bfloat16 on this CPU and takes a slow loop for its products; emtool computes them "
        "in float32 and rounds the result. A loop that does so too is the floor for what emtool adds. Two steps of "
        f"each run:\n\n{text}"
    )


def batch_milliseconds() -> float:
    """Return the time in which the Trainer has a batch ready."""
    from baseline_rows import start

    from emtool.engines.fitting import build_trainer

    begin = start(dtype="float32", max_steps=1)
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(
            begin.model,
            tokenizer=begin.tokenizer,
            train_rows=begin.rows,
            config=begin.config,
            output_path=Path(folder),
            callbacks=[],
        )
        begun = time.perf_counter()
        count = sum(1 for _ in trainer.get_train_dataloader())
        return 1000 * (time.perf_counter() - begun) / count


def section(dtype: str, names: Sequence[str], *, rounds: int, steps: int, warm_up: int = WARM_UP) -> str:
    """Return the table of one dtype."""
    say(f"{dtype}, {steps} steps")
    found = in_turn({name: variants(dtype, steps)[name] for name in names}, rounds)
    seconds = {name: [step_seconds(one)[warm_up:] for one in runs] for name, runs in found.items()}
    medians = {name: [median(times) for times in each] for name, each in seconds.items()}
    rows = []
    for name in names:
        peak = mib(median([one.peak_bytes for one in found[name]]))
        step = f"{median(medians[name]):.2f} s"
        rows.append(
            (name, step, "" if name == OURS else ratio(medians[OURS], medians[name]), peak, loss_gap(found, name))
        )
    return table((dtype, "step", "emtool's share of it", "peak memory", "largest difference of a loss"), rows)


def loss_gap(found: dict[str, list[Run]], name: str) -> str:
    """Return how far any loss is from emtool's of that step at most, as a share of it."""
    if name == OURS:
        return ""
    pairs = [
        pair
        for ours, theirs in zip(found[OURS], found[name], strict=True)
        for pair in zip(losses(ours), losses(theirs), strict=True)
    ]
    gap = max(abs(mine - other) / abs(other) for mine, other in pairs)
    return "none" if gap == 0 else f"{gap:.0e}"


def losses(one: Run) -> list[float]:
    """Return the loss of each step."""
    found: list[float] = json.loads(one.stdout.strip().splitlines()[-1])["losses"]
    return found


def step_seconds(one: Run) -> list[float]:
    """Return the seconds of each step."""
    found: list[float] = json.loads(one.stdout.strip().splitlines()[-1])["seconds"]
    return found


def variants(dtype: str, steps: int) -> dict[str, Callable[[], Run]]:
    """Return what is run."""
    options = ["--dtype", dtype, "--steps", str(steps)]
    loop = [sys.executable, str(ROOT / "scripts" / "baseline_torch.py"), *options]
    trl = [sys.executable, str(ROOT / "scripts" / "baseline_trl.py"), *options]
    return {
        OURS: partial(ours, dtype, steps),
        TRL: partial(run, trl),
        LOOP: partial(run, loop),
        ROUNDED: partial(run, [*loop, "--rounded"]),
        DEFAULTS: partial(run, [*trl, "--defaults"]),
    }


def ours(dtype: str, steps: int) -> Run:
    """Run `emtool train`, and return what its records say in the words of the baselines."""
    with tempfile.TemporaryDirectory() as folder:
        where = ["--output-root", folder, "--output-name", "run"]
        length = ["--max-steps", str(steps), "--checkpoints", "final"]
        done = run([*EMTOOL, "train", "--profile", "demo", "--dtype", dtype, *length, *where])
        lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss" in line]
    ends = [0.0, *(line["seconds"] for line in trained)]
    record = {
        "seconds": [end - before for before, end in itertools.pairwise(ends)],
        "losses": [line["loss"] for line in trained],
    }
    return Run(seconds=done.seconds, peak_bytes=done.peak_bytes, stdout=json.dumps(record))


if __name__ == "__main__":
    main()
