"""Meeting a run folder that is there already."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from emtool.core.config import HOUSEKEEPING
from emtool.core.data import file_sha256
from emtool.core.disk import is_writable
from emtool.core.errors import CheckpointError, EmtoolError
from emtool.core.run_dir import RunFolder, free_name
from emtool.core.run_lock import in_use, lock_holder
from emtool.core.run_plan import RunPlan

#: Settings that a plan has under their whole names.
_NAMES = ("model", "dataset")


def finished_run(plan: RunPlan, *, resume: bool = False) -> RunFolder | None:
    """Return the run folder if it holds this very run, completed; None where training may begin or go on.

    Args:
        plan: The plan.
        resume: Whether a run that is not complete is gone on with.

    Raises:
        CheckpointError: If another process trains it, it holds something else, or this run, not complete, and `resume`
            is not asked for; the message shows the difference and the next step.
    """
    run = RunFolder(path=plan.output_path)
    if not run.path.exists():
        return None
    free = free_name(plan.output_path.parent, plan.output_path.name)
    instead = f"choose another folder, for instance --output-name {free}"
    if not run.manifest_path.exists():
        raise CheckpointError(f"{run.path} exists and is not a run; {instead}")
    manifest = run.read_manifest()
    if changes := list(_changes(manifest, plan)):
        raise CheckpointError(f"{run.path} holds a run of another configuration: {'; '.join(changes)}; {instead}")
    if lock_holder(run) is not None:
        raise in_use(run)
    if manifest.get("status") == "completed":
        return run
    if not resume:
        raise CheckpointError(
            f"{run.path} holds this run, {manifest.get('status')}: {run.how_to_go_on()}; or {instead}"
        )
    return None


def is_completed(path: Path) -> bool:
    """Return whether a folder holds a run that is complete, of whatever configuration."""
    try:
        return RunFolder(path=path).read_manifest().get("status") == "completed"
    except CheckpointError:
        return False


def changed_settings(manifest: Mapping[str, object], plan: RunPlan) -> list[str]:
    """Return what differs between the settings of a manifest's run and a plan's, however many processes train it."""
    before, now = _comparable(manifest.get("config")), _comparable(plan.config.to_dict())
    names = [name for name in sorted({*before, *now}) if name not in _NAMES]
    changes = [
        f"{name} was {before.get(name)}, is {now.get(name)}" for name in names if before.get(name) != now.get(name)
    ]
    return changes + list(_changed_plan(manifest, plan, _NAMES))


def _changes(manifest: Mapping[str, object], plan: RunPlan) -> Iterator[str]:
    """Yield what differs between the run of a manifest and a plan."""
    yield from changed_settings(manifest, plan)
    yield from _changed_plan(manifest, plan, ("total_steps", "num_processes"))
    if _comparable(manifest.get("config")).get("checkpoints") == plan.config.checkpoints:
        yield from _changed_plan(manifest, plan, ("planned_steps",))
    # A plan without its rows: they are fetched and compared before a run begins.
    if plan.dataset.path is not None:
        yield from changed_contents(manifest, plan, file_sha256(plan.dataset.path))


def changed_contents(manifest: Mapping[str, object], plan: RunPlan, sha256: str) -> Iterator[str]:
    """Yield how the rows of a manifest's run differ from those of a plan.

    Args:
        manifest: The manifest.
        plan: The plan.
        sha256: SHA-256 of the file of its dataset, in hexadecimal.
    """
    if (recorded := _dataset_sha256(manifest)) != sha256:
        yield f"the contents of {plan.dataset.name} have changed (SHA-256 was {recorded}, is {sha256})"


def _changed_plan(manifest: Mapping[str, object], plan: RunPlan, names: Sequence[str]) -> Iterator[str]:
    planned = manifest.get("plan")
    for name in names:
        old, new = planned.get(name) if isinstance(planned, dict) else None, plan.to_dict()[name]
        if old != new:
            yield f"{name} was {old}, is {new}"


def cannot_write(plan: RunPlan) -> str | None:
    """Return why the run folder cannot be made, or None if it can."""
    try:
        finished = finished_run(plan)
    except EmtoolError as error:
        return str(error)
    if finished is not None:
        return f"{finished.path} holds this run, completed"
    if not is_writable(plan.output_path.parent):
        return f"{plan.output_path.parent} cannot be written to; choose another --output-root"
    return None


def _dataset_sha256(manifest: Mapping[str, object]) -> object:
    lineage = manifest.get("lineage")
    dataset = lineage.get("dataset") if isinstance(lineage, dict) else None
    return dataset.get("sha256") if isinstance(dataset, dict) else None


def _comparable(config: object) -> dict[str, object]:
    names = config if isinstance(config, dict) else {}
    return {name: value for name, value in names.items() if name not in HOUSEKEEPING}
