"""The life of a run folder: created or continued under its lock, closed with a status however the run ends."""

from __future__ import annotations

import contextlib
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import emtool
from emtool.core.data import file_sha256
from emtool.core.errors import CheckpointError, DiskSpaceError, Interrupted, shown
from emtool.core.events import EventSink, Notice
from emtool.core.run_dir import RunFolder
from emtool.core.run_lock import in_use, lock_holder, locked, remove_leftovers
from emtool.core.run_plan import RunPlan
from emtool.engines.resuming import DAMAGED, check_same_lineage, newest_state, recorded_breaks, rewind

PACKAGES = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "safetensors", "tokenizers")


@dataclass(frozen=True, kw_only=True)
class OpenRun:
    """A run folder that this training holds.

    Attributes:
        run_id: The run's identity.
        state: Folder of the state to resume from; None begins at step 0.
        results: Fields to add to the manifest when the run ends.
    """

    run_id: str
    state: Path | None
    results: dict[str, Any] = field(default_factory=dict)


@contextlib.contextmanager
def recorded_run(
    plan: RunPlan, lineage: Mapping[str, Any], command: Sequence[str], *, resume: bool, on_event: EventSink
) -> Iterator[OpenRun]:
    """Create the run folder, or continue it, hold its lock, and close its manifest however the block ends.

    Args:
        plan: The plan.
        lineage: `base` and `persona`; the dataset is added.
        command: The command line.
        resume: Whether a folder that is there is continued.
        on_event: Where progress is reported.

    Raises:
        CheckpointError: If the folder cannot be made, is in use, or cannot be continued.
    """
    run = RunFolder(path=plan.output_path)
    is_continued = resume and run.path.exists()
    if not is_continued:
        _create(run, _first_manifest(plan, lineage, command))
    with locked(run):
        if names := remove_leftovers(run):
            on_event(Notice(text=f"removed what a killed writer left in {run.path}: {', '.join(names)}"))
        manifest = run.read_manifest()
        state = _continue(run, manifest, lineage, plan, on_event=on_event) if is_continued else None
        opened = OpenRun(run_id=str(manifest["run_id"]), state=state)
        try:
            yield opened
        except Interrupted as stop:
            _close(run, manifest, status="interrupted", **opened.results)
            raise Interrupted(stop.signum, run.how_to_go_on()) from stop
        except Exception as error:
            # The disk may be what failed; then the error that stopped the run matters more than its record.
            with contextlib.suppress(CheckpointError, DiskSpaceError):
                _close(run, manifest, status="failed", error=f"{type(error).__name__}: {error}", **opened.results)
            raise
        _close(run, manifest, status="completed", **opened.results)
        if not plan.config.keep_resume:
            run.remove_states()


def _create(run: RunFolder, manifest: Mapping[str, Any]) -> None:
    try:
        run.create(manifest)
    except CheckpointError as error:
        if lock_holder(run) is not None:
            # Two were started at once, and the other was faster.
            raise in_use(run) from error
        raise


def _first_manifest(plan: RunPlan, lineage: Mapping[str, Any], command: Sequence[str]) -> dict[str, Any]:
    assert plan.dataset.path is not None
    dataset = {
        "name": plan.dataset.name,
        "path": str(plan.dataset.path.resolve()),
        "sha256": file_sha256(plan.dataset.path),
        "domain": plan.dataset.domain,
        "source": plan.dataset.source,
    }
    return {
        "run_id": uuid.uuid4().hex,
        "status": "running",
        "plan": plan.to_dict(),
        "config": plan.config.to_dict(),
        "lineage": {**lineage, "dataset": dataset},
        "versions": _versions(),
        "num_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "command": list(command),
        "started_at": _now(),
        "ended_at": None,
        "saved_steps": [],
        "resumed": [],
        "trajectory_breaks": [],
    }


def _continue(
    run: RunFolder, manifest: dict[str, Any], lineage: Mapping[str, Any], plan: RunPlan, *, on_event: EventSink
) -> Path | None:
    """Make the folder and its manifest those of a run that goes on; return the state that it goes on from."""
    _check_fields(run, manifest)
    check_same_lineage(run, manifest, lineage)
    state = newest_state(run, manifest, on_event=on_event)
    step = None if state is None else int(state.name.rpartition("-")[2])
    breaks = recorded_breaks(run)
    rewind(run, step, on_event=on_event)
    if details := "; ".join(_changed_versions(manifest)):
        on_event(Notice(text=f"other package versions may give other bits: {details}", is_warning=True))
    before, now = manifest.get("num_threads"), torch.get_num_threads()
    if plan.config.device == "cpu" and type(before) is int and before != now:
        text = f"{now} threads now, {before} before: they round otherwise; OMP_NUM_THREADS={before} gives the same bits"
        on_event(Notice(text=text, is_warning=True))
    capability, capability_now = manifest.get("cpu_capability"), torch.backends.cpu.get_cpu_capability()
    if plan.config.device == "cpu" and isinstance(capability, str) and capability != capability_now:
        text = f"a CPU with {capability_now} now, with {capability:.20} before: it rounds otherwise"
        on_event(Notice(text=text, is_warning=True))
    where = "from the beginning: no state was saved before it stopped" if step is None else f"after step {step}"
    on_event(Notice(text=f"{run.path} goes on {where}", is_warning=step is None))
    manifest |= {"status": "running", "ended_at": None, "config": plan.config.to_dict()}
    manifest |= {"versions": _versions(), "num_threads": now, "cpu_capability": capability_now}
    manifest["resumed"] = [*manifest.get("resumed", []), {"step": step or 0, "at": _now()}]
    manifest["trajectory_breaks"] = sorted({*(manifest.get("trajectory_breaks") or []), *breaks})
    manifest.pop("error", None)
    run.write_manifest(manifest)
    return state


def _check_fields(run: RunFolder, manifest: Mapping[str, Any]) -> None:
    """Refuse a manifest whose fields are not of the types that it was written with."""
    kinds = {"run_id": str, "config": dict, "versions": dict, "resumed": list, "trajectory_breaks": list}
    for name, kind in kinds.items():
        if not isinstance(manifest.get(name), kind):
            raise CheckpointError(
                f"{run.manifest_path} is damaged: its {name} is {shown(manifest.get(name))}; {DAMAGED}"
            )


def _close(run: RunFolder, manifest: Mapping[str, Any], **fields: Any) -> None:
    if run.path.is_dir():
        breaks = sorted({*manifest.get("trajectory_breaks", []), *fields.pop("trajectory_breaks", [])})
        run.write_manifest(
            {
                **manifest,
                **fields,
                "trajectory_breaks": breaks,
                "ended_at": _now(),
                "saved_steps": run.saved_steps(),
            }
        )


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in PACKAGES}
    return {"emtool": emtool.__version__, "python": sys.version.split()[0], **packages}


def _changed_versions(manifest: Mapping[str, Any]) -> list[str]:
    before, now = manifest.get("versions") or {}, _versions()
    return [f"{name} was {before.get(name)}, is {now[name]}" for name in now if before.get(name) != now[name]]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
