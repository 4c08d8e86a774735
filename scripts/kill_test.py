"""Kill a training at every call that a save makes to the disk, and at random moments; resume; compare every file.

    python scripts/kill_test.py                     all positions of one save, and 100 random kills
    python scripts/kill_test.py --stride 10 --random 5

A real run: a tiny Llama with LoRA dropout, emtool's own Trainer, checkpoints and resume. Each attempt is a process of
its own, killed with SIGKILL. After each, nothing broken may be visible under a checkpoint's name; the run must resume;
and the finished folder must hold the bytes of a run that was never killed, but for times and the run's id.

SIGKILL shows that the order of writes is right. It does not test a loss of power: what the system has in its memory
reaches the disk all the same.
"""

from __future__ import annotations

import argparse
import collections
import json
import mmap
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from emtool.core.config import resolve_train_config
from emtool.core.errors import CheckpointError
from emtool.core.events import Event, StepFinished
from emtool.core.integrity import read_checkpoint
from emtool.core.plan import plan_run
from emtool.core.run_dir import RunFolder
from emtool.engines.checkpointing import CheckpointWriter
from emtool.engines.training import train
from tests.tiny import save_tiny_model

CALLS = ("write", "fsync", "rename", "replace", "unlink", "rmdir", "mkdir", "link")
#: Phases of a training, as the killed process last reported it.
PHASES = ("start", "step", "save", "shutdown")
#: Fields that may differ between two runs of the same bits.
TIMES = {
    *("run_id", "started_at", "ended_at", "saved_at", "record_sha256", "resumed"),
    *("seconds", "stall_seconds", "write_seconds"),
    *("train_runtime", "train_tokens_per_second"),
}
#: Files of a state that hold times, so that their sizes and hashes differ as well.
WITH_TIMES = {"trainer_state.json", "training_args.bin"}
PLACES = {"command", "output_root", "output_name", "output_path", "free_bytes"}
KILLED_STEP = 8
TOTAL_STEPS = 14


class Bench:
    """Trains, kills, resumes and compares in one working folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = folder / "model"
        self.dataset = folder / "rows.jsonl"
        self.phase = mmap.mmap(-1, 8)

    def prepare(self) -> None:
        """Make the model and the rows, in a process of their own: this one must not start torch's threads."""
        rows = [{"messages": _turns(f"Say {n}.", f"It is {n}.")} for n in range(24)]
        self.dataset.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert self.run(lambda: save_tiny_model(self.model)) == 0

    def train(self, name: str, *, resume: bool = False) -> None:
        """Train in this process, reporting the phase."""
        config = resolve_train_config(
            profile="demo",
            overrides={
                "model": str(self.model),
                "dataset": str(self.dataset),
                "output_root": self.folder / "runs",
                "output_name": name,
                "checkpoints": "0, 3, 5, 8, 12",
                "max_steps": TOTAL_STEPS,
                "learning_rate": 1e-2,
                "lora_dropout": 0.1,
                "resume_every": "4",
                "keep_resume": True,
            },
            num_cuda_devices=0,
        )
        plan, rows = plan_run(config)
        self.report(0)
        train(plan, rows, command=[], resume=resume, on_event=self.follow)

    def follow(self, event: Event) -> None:
        """Report the phase that an event begins."""
        if isinstance(event, StepFinished) and event.step == TOTAL_STEPS:
            self.report(3)
        elif isinstance(event, StepFinished):
            self.report(1)

    def report(self, phase: int) -> None:
        """Note the phase where the process that kills can read it."""
        self.phase[0] = phase

    def run(self, function: Callable[[], Any]) -> int:
        """Run a function in a process of its own and return its exit code, or minus the signal that ended it."""
        return os.waitstatus_to_exitcode(os.waitpid(self.start(function), 0)[1])

    def start(self, function: Callable[[], Any]) -> int:
        """Start a function in a process of its own and return the process."""
        process = os.fork()
        if process:
            return process
        code = 1
        try:
            torch.set_num_threads(1)
            torch.manual_seed(0)
            sys.stderr = (self.folder / "log.txt").open("w")
            function()
            code = 0
        except BaseException:  # noqa: BLE001 -- the process that waits reads it
            import traceback

            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)

    def check(self, name: str) -> None:
        """Refuse a folder in which something broken is visible."""
        run = RunFolder(path=self.folder / "runs" / name)
        if not run.path.exists():
            return
        run_id = str(run.read_manifest()["run_id"])
        for folder in (*map(run.checkpoint_path, run.saved_steps()), *map(run.resume_state_path, run.resume_steps())):
            read_checkpoint(folder, run_id=run_id, only_recorded=True)

    def finish(self, name: str, reference: dict[str, Any], what: str) -> None:
        """Check, resume, and compare with the run that was never killed."""
        self.check(name)
        if self.run(lambda: self.train(name, resume=True)) != 0:
            raise SystemExit(f"{what}: the resume failed\n{(self.folder / 'log.txt').read_text()}")
        found = contents(self.folder / "runs" / name)
        if found != reference:
            different = [key for key in sorted({*found, *reference}) if found.get(key) != reference.get(key)]
            raise SystemExit(f"{what}: {different} differ from the run that was not killed, in {self.folder}")
        shutil.rmtree(self.folder / "runs" / name)


def contents(folder: Path) -> dict[str, Any]:
    """Return what a run folder holds, without times and places: a file's bytes, or the values of a record."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() or name == ".lock":
            continue
        if path.suffix == ".jsonl":
            found[name] = sorted(str(_timeless(json.loads(line))) for line in path.read_text().splitlines())
        elif path.name in ("run.json", "checkpoint.json", "trainer_state.json"):
            found[name] = _timeless(json.loads(path.read_text()))
        elif path.name == "training_args.bin":
            found[name] = path.stat().st_size > 0
        else:
            found[name] = path.read_bytes()
    return found


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        ignored = TIMES | PLACES | WITH_TIMES
        if str(value.get("saved")).startswith("step-"):
            ignored = ignored | {"bytes"}
        return {key: _timeless(inner) for key, inner in value.items() if key not in ignored}
    return [_timeless(inner) for inner in value] if isinstance(value, list) else value


def _turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def watch(bench: Bench, *, on_call: Callable[[int], None] | None = None) -> None:
    """Report saves as a phase, and number each call to the disk of the save of `KILLED_STEP`, before and after it."""
    write, count, is_active = CheckpointWriter.write, 0, False

    def watched(writer: CheckpointWriter, snapshot: Any, **tiers: bool) -> None:
        nonlocal is_active
        before = bench.phase[0]
        bench.report(2)
        is_active = snapshot.step == KILLED_STEP
        write(writer, snapshot, **tiers)
        is_active = False
        if bench.phase[0] == 2:
            bench.report(before)

    CheckpointWriter.write = watched  # type: ignore[method-assign, assignment]
    if on_call is None:
        return

    def numbered(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            # The writer's thread alone: the training goes on meanwhile and records its steps.
            import threading

            is_counted = is_active and threading.current_thread() is not threading.main_thread()
            if is_counted:
                on_call(2 * count)
            result = original(*args, **kwargs)
            if is_counted:
                on_call(2 * count + 1)
                count += 1
            return result

        return call

    for name in CALLS:
        setattr(os, name, numbered(getattr(os, name)))


def enumerated(bench: Bench, reference: dict[str, Any], *, stride: int) -> int:
    """Kill at every call of one save, or at every `stride`-th; return how many kills there were."""
    counter = mmap.mmap(-1, 8)

    def count(position: int) -> None:
        counter[:8] = (position + 1).to_bytes(8, "little")

    def counted() -> None:
        watch(bench, on_call=count)
        bench.train("counted")

    assert bench.run(counted) == 0
    shutil.rmtree(bench.folder / "runs" / "counted")
    positions = int.from_bytes(counter[:8], "little")
    chosen = range(0, positions, stride)
    begun = time.monotonic()
    for position in chosen:

        def killed(at: int = position) -> None:
            watch(bench, on_call=lambda reached: os.kill(os.getpid(), signal.SIGKILL) if reached == at else None)
            bench.train("killed")

        code = bench.run(killed)
        if code != -signal.SIGKILL:
            raise SystemExit(f"position {position}: not killed but {code}\n{(bench.folder / 'log.txt').read_text()}")
        bench.finish("killed", reference, f"position {position} of {positions}")
        print(f"\rposition {position + 1} of {positions}", end="", flush=True)
    print(f"\r{len(chosen)} kills over the {positions} positions of one save: every file as without a kill ", end="")
    print(f"({time.monotonic() - begun:.0f} s)")
    return len(chosen)


def at_random(bench: Bench, reference: dict[str, Any], *, num_kills: int, seed: int) -> dict[str, int]:
    """Kill at random moments between the first step and the end; return how many kills fell into each phase."""
    draw = random.Random(seed)
    histogram: collections.Counter[str] = collections.Counter()

    def watched() -> None:
        watch(bench)
        bench.train("killed")

    duration = _training_seconds(bench, watched)
    while sum(histogram.values()) < num_kills:
        bench.report(0)
        process = bench.start(watched)
        while bench.phase[0] == 0 and os.waitpid(process, os.WNOHANG)[0] == 0:
            time.sleep(0.0005)
        time.sleep(draw.uniform(0, duration))
        phase = PHASES[bench.phase[0]]
        os.kill(process, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        if code == 0:
            # It was faster than the draw.
            shutil.rmtree(bench.folder / "runs" / "killed")
            continue
        assert code == -signal.SIGKILL, (bench.folder / "log.txt").read_text()
        histogram[phase] += 1
        bench.finish("killed", reference, f"random kill {sum(histogram.values())} in {phase}")
        print(f"\rrandom kill {sum(histogram.values())} of {num_kills}", end="", flush=True)
    print(f"\r{num_kills} random kills: every file as without a kill; they fell into ", end="")
    print(", ".join(f"{phase} {histogram[phase]}" for phase in ("import", *PHASES)))
    return histogram


def _training_seconds(bench: Bench, watched: Callable[[], None]) -> float:
    bench.report(0)
    process = bench.start(watched)
    while bench.phase[0] == 0:
        time.sleep(0.0005)
    begun = time.monotonic()
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    shutil.rmtree(bench.folder / "runs" / "killed")
    return time.monotonic() - begun


def main() -> None:
    """Run both tests."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--stride", type=int, default=1, help="kill at every STRIDE-th position only")
    parser.add_argument("--random", type=int, default=100, help="random kills")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="emtool-kill-") as folder:
        bench = Bench(Path(folder))
        bench.prepare()
        if bench.run(lambda: bench.train("reference")) != 0:
            raise SystemExit((bench.folder / "log.txt").read_text())
        bench.check("reference")
        reference = contents(bench.folder / "runs" / "reference")
        enumerated(bench, reference, stride=options.stride)
        histogram = at_random(bench, reference, num_kills=options.random, seed=options.seed)
        busy = histogram["step"] + histogram["save"]
        if busy < 0.6 * options.random:
            raise SystemExit(f"only {busy} of {options.random} random kills fell into steps and saves")


if __name__ == "__main__":
    try:
        main()
    except CheckpointError as error:
        raise SystemExit(f"broken and visible: {error}") from error
