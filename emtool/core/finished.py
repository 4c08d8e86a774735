"""Meeting a run folder that is there already."""

from __future__ import annotations

from collections.abc import Mapping

from emtool.core.data import file_sha256
from emtool.core.disk import is_writable
from emtool.core.errors import CheckpointError, EmtoolError
from emtool.core.run_dir import RunFolder, free_name
from emtool.core.run_plan import RunPlan


def finished_run(plan: RunPlan) -> RunFolder | None:
    """Return the run folder if it holds this very run, completed; None where the folder is free.

    Raises:
        CheckpointError: If it holds something else; names a free folder.
    """
    run = RunFolder(path=plan.output_path)
    if not run.path.exists():
        return None
    free = free_name(plan.output_path.parent, plan.output_path.name)
    instead = f"choose another folder, for instance --output-name {free}"
    if not run.manifest_path.exists():
        raise CheckpointError(f"{run.path} exists and is not a run; {instead}")
    manifest = run.read_manifest()
    if _comparable(manifest.get("config")) != _comparable(plan.config.to_dict()):
        raise CheckpointError(f"{run.path} holds a run of another configuration; {instead}")
    if _dataset_sha256(manifest) != (plan.dataset.path and file_sha256(plan.dataset.path)):
        raise CheckpointError(f"{run.path} holds a run on other contents of {plan.dataset.name}; {instead}")
    if manifest.get("status") != "completed":
        raise CheckpointError(
            f"{run.path} holds this run, {manifest.get('status')} with {len(run.saved_steps())} checkpoints; "
            f"if no process is training it, remove the folder to train it anew, or {instead}"
        )
    return run


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
    ignored = ("profile", "profile_reason", "output_root", "output_name")
    return {name: value for name, value in names.items() if name not in ignored}
