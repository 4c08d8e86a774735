"""What saving costs: how long training waits, how long a run takes, memory and disk, beside the Trainer's own saves.

    python scripts/bench_saving.py              about 15 minutes on two cores; needs SmolLM2-135M, fetched once
    python scripts/bench_saving.py stall        one of: stall, whole, space

SmolLM2-135M with LoRA r 256 on all projections has 78 million trained parameters, about as many as the published
setting (80.7 million). Ratios are of measurements in the same process, one after the other.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# The Trainer's save asks the hub for a config: without an answer it must not wait for one.
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from paired import say, table

from emtool.core.config import resolve_train_config
from emtool.core.disk import folder_bytes
from emtool.core.events import Event, StepFinished, ignore_events
from emtool.core.plan import plan_run
from emtool.core.run_dir import RunFolder
from emtool.engines import training
from emtool.engines.fitting import RunTrainer, build_trainer

#: LoRA r 256 on every projection of every block: 78 million parameters.
LARGE = {"lora_r": 256, "lora_alpha": 512, "layers_to_transform": "all", "max_length": 96}
STALL_ROUNDS = 7
WHOLE_ROUNDS = 4
WHOLE_STEPS = 40

Row = tuple[str, ...]
Part = Callable[[Path], list[Row]]


class Measured:
    """A training in this process, with its Trainer at hand."""

    def __init__(self, root: Path, **overrides: Any) -> None:
        values = {"model": "smollm2-135m", "dataset": "gardening", "output_root": root, "output_name": "run"}
        config = resolve_train_config(profile="demo", overrides={**values, **overrides}, num_cuda_devices=0)
        self.plan, self.rows = plan_run(config)
        self.trainer: RunTrainer | None = None
        self.run = RunFolder(path=self.plan.output_path)

    def train(self, on_event: Callable[[Event], None] = ignore_events) -> float:
        """Train, and return the seconds of steps and saves."""

        def keep(model: Any, **arguments: Any) -> RunTrainer:
            self.trainer = build_trainer(model, **arguments)
            return self.trainer

        original, training.build_trainer = training.build_trainer, keep  # type: ignore[attr-defined]
        try:
            return training.train(self.plan, self.rows, command=[], on_event=on_event).seconds
        finally:
            training.build_trainer = original  # type: ignore[attr-defined]


def stall(root: Path) -> list[Row]:
    """Train with a save of emtool's at each even step and one of the Trainer's at each odd one; compare the stalls."""
    steps = list(range(2, 2 * STALL_ROUNDS + 1, 2))
    measured = Measured(
        root, **LARGE, checkpoints=", ".join(map(str, steps)), max_steps=steps[-1] + 1, held_out_fraction=0.0
    )
    theirs: list[float] = []
    memory: dict[bool, list[int]] = {True: [], False: []}

    def compare(event: Event) -> None:
        if not isinstance(event, StepFinished):
            return
        checkpoints: Any = measured.trainer.checkpoints  # type: ignore[union-attr]
        is_saved = event.step in steps
        if event.step > 2:
            # What follows an even step is a save and the next step; what follows an odd one, the next step alone.
            checkpoints.finish()
            memory[not is_saved].append(_status("VmHWM"))
        if not is_saved and event.step > 1:
            theirs.append(_trainer_save(measured, root))
        Path("/proc/self/clear_refs").write_text("5")

    measured.train(compare)
    trainer = measured.trainer
    assert trainer is not None
    lines = [json.loads(line) for line in measured.run.metrics_path.read_text().splitlines()]
    saves = [line for line in lines if str(line.get("saved")).startswith("checkpoint") and line["step"] in steps]
    ours = [line["stall_seconds"] for line in saves]
    writes = [
        sum(line["write_seconds"] for line in lines if "saved" in line and line["step"] == step) for step in steps
    ]
    count = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    # The first of each is the warm-up: its pages, its file cache.
    ratios = sorted(mine / other for mine, other in zip(ours[1:], theirs[1:], strict=True))
    buffer = trainer.checkpoints._buffer.num_bytes  # type: ignore[union-attr]
    growth = statistics.median(memory[True]) - statistics.median(memory[False])
    say(f"host memory: {growth / 2**20:+.0f} MiB while writing")
    shown = f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
    pairs = f"{STALL_ROUNDS - 1} pairs"
    return [
        (
            f"training waits for a save, {count:,} trained parameters, {pairs}",
            f"{statistics.median(theirs[1:]):.2f} s",
            f"{statistics.median(ours[1:]):.3f} s",
            shown,
        ),
        ("the save is written beside training", "", f"{statistics.median(writes[1:]):.1f} s", ""),
        (
            "host memory: the buffer, beside the saved state",
            f"{_state_bytes(trainer) / 2**20:,.0f} MiB",
            f"{buffer / 2**20:,.0f} MiB",
            "",
        ),
    ]


def _trainer_save(measured: Measured, root: Path) -> float:
    trainer = measured.trainer
    assert trainer is not None
    output_dir, trainer.args.output_dir = trainer.args.output_dir, str(root / "trainer")
    begun = time.perf_counter()
    trainer.save_by_itself()
    seconds = time.perf_counter() - begun
    trainer.args.output_dir = output_dir
    shutil.rmtree(root / "trainer")
    os.sync()
    return seconds


def _status(name: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def _state_bytes(trainer: Any) -> int:
    parameters = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    return sum(3 * parameter.numel() * parameter.element_size() for parameter in parameters)


def whole(root: Path) -> list[Row]:
    """Time the same run with ten milestones and with none, in turn."""
    steps = ", ".join(str(round(WHOLE_STEPS * place / 9)) for place in range(10))
    ratios, with_saves, without = [], [], []
    for number in range(WHOLE_ROUNDS):
        pair = {}
        # In turn first, so that a machine that slows down favours neither.
        for saves in (True, False) if number % 2 else (False, True):
            measured = Measured(
                root / f"{number}-{saves}", checkpoints=steps, max_steps=WHOLE_STEPS, held_out_fraction=0.0
            )
            with contextlib.nullcontext() if saves else _no_saves():
                pair[saves] = measured.train()
            if saves:
                assert len(measured.run.saved_steps()) == 10, measured.run.saved_steps()
            shutil.rmtree(root / f"{number}-{saves}")
        with_saves.append(pair[True])
        without.append(pair[False])
        ratios.append(pair[True] / pair[False])
    ratios.sort()
    return [
        (
            f"run of {WHOLE_STEPS} steps with ten milestones, beside none, {WHOLE_ROUNDS} pairs",
            f"{statistics.median(without):.1f} s",
            f"{statistics.median(with_saves):.1f} s",
            f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})",
        )
    ]


@contextlib.contextmanager
def _no_saves() -> Iterator[None]:
    """Train without a save: the same steps, and nothing is written."""
    from emtool.engines.saving import RunCheckpoints

    save, check = RunCheckpoints._save, training.lost_milestones
    RunCheckpoints._save = lambda self, due: None  # type: ignore[method-assign]
    training.lost_milestones = lambda *arguments, **options: []
    try:
        yield
    finally:
        RunCheckpoints._save, training.lost_milestones = save, check  # type: ignore[method-assign]


def space(root: Path) -> list[Row]:
    """Measure what ten milestones in bfloat16 take, at rest, at the peak and when the run is complete."""
    measured = Measured(
        root, **LARGE, checkpoints="every 1", max_steps=10, save_dtype="bfloat16", held_out_fraction=0.0
    )
    sizes: list[int] = []
    resting: list[int] = []
    trainer_bytes: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            sizes.append(folder_bytes(measured.run.path))

    def look(event: Event) -> None:
        if isinstance(event, StepFinished) and event.step == 10:
            checkpoints: Any = measured.trainer.checkpoints  # type: ignore[union-attr]
            checkpoints.finish()
            resting.append(folder_bytes(measured.run.path))
            _trainer_size(measured, root, trainer_bytes)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        measured.train(look)
    finally:
        done.set()
        watcher.join()
    ten = 10 * trainer_bytes[0]
    finished = folder_bytes(measured.run.path)
    return [
        (
            f"disk for ten milestones in bfloat16, {name}",
            f"{ten / 2**30:.2f} GiB",
            f"{size / 2**30:.2f} GiB",
            f"{size / ten:.3f}",
        )
        for name, size in (("complete", finished), ("running, at rest", max(resting)), ("running, peak", max(sizes)))
    ]


def _trainer_size(measured: Measured, root: Path, found: list[int]) -> None:
    trainer = measured.trainer
    assert trainer is not None
    output_dir, trainer.args.output_dir = trainer.args.output_dir, str(root / "trainer")
    trainer.save_by_itself()
    trainer.args.output_dir = output_dir
    found.append(folder_bytes(root / "trainer"))
    shutil.rmtree(root / "trainer")


PARTS: dict[str, Part] = {"stall": stall, "whole": whole, "space": space}


def measure(parts: dict[str, Part], description: str | None) -> list[Row]:
    """Return the rows of the parts that the command line names, or of all, each made in a folder of its own."""
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=(description or "").split("\n", 1)[0])
    parser.add_argument("parts", nargs="*", choices=[*parts, []], help="what to measure")
    rows: list[Row] = []
    for name in parser.parse_args().parts or parts:
        say(name)
        with tempfile.TemporaryDirectory(prefix="emtool-bench-", dir=".") as folder:
            rows += parts[name](Path(folder))
    return rows


def main() -> None:
    """Measure and print."""
    rows = measure(PARTS, __doc__)
    print("## What saving costs\n")
    print(
        "SmolLM2-135M with LoRA r 256 on all projections (the published setting has 80,740,352 trained parameters), "
        "AdamW in float32, beside the Trainer's own saves; the whole run has the demo's adapter, and in its row the "
        "second column is the same run without any save.\n"
    )
    print(table(("", "Trainer", "emtool", "ratio"), rows))


if __name__ == "__main__":
    main()
