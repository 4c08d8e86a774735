"""What run folders there are, and how far each came."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from emtool.core.disk import folder_bytes
from emtool.core.errors import CheckpointError, ConfigError
from emtool.core.run_dir import RunFolder


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """One run folder.

    Attributes:
        name: Folder name.
        status: As in the manifest: running, completed, interrupted or failed; "unreadable" where it cannot be read.
        last_step: Step of the newest milestone.
        total_steps: Planned optimizer steps.
        num_checkpoints: Milestones on disk.
        num_planned: Milestones planned.
        num_bytes: Size of the folder, files with several links counted once.
        started_at: UTC time as in the manifest.
        problem: Why the manifest cannot be read.
    """

    name: str
    status: str
    last_step: int | None
    total_steps: int | None
    num_checkpoints: int
    num_planned: int | None
    num_bytes: int
    started_at: str | None = None
    problem: str | None = None

    def to_dict(self) -> dict[str, object]:
        """Return the summary as JSON values."""
        return asdict(self)


def list_runs(output_root: Path) -> list[RunSummary]:
    """Return the runs of a folder, the newest last; a damaged manifest is reported as such.

    Raises:
        ConfigError: If the folder is not there.
    """
    if not output_root.is_dir():
        raise ConfigError(f"no folder {str(output_root)!r}; choose another --output-root, or start a run")
    summaries = [_summary(RunFolder(path=path.parent)) for path in output_root.glob("*/run.json")]
    return sorted(summaries, key=lambda run: (run.started_at or "", run.name))


def _summary(run: RunFolder) -> RunSummary:
    steps = run.saved_steps()
    plan: dict[str, object] = {}
    status, started_at, problem = "unreadable", None, None
    try:
        manifest = run.read_manifest()
    except CheckpointError as error:
        problem = str(error)
    else:
        status, started_at = str(manifest.get("status", "unknown")), str(manifest.get("started_at"))
        if isinstance(manifest.get("plan"), dict):
            plan = manifest["plan"]  # type: ignore[assignment]
    return RunSummary(
        name=run.path.name,
        status=status,
        last_step=steps[-1] if steps else None,
        total_steps=_number(plan.get("total_steps")),
        num_checkpoints=len(steps),
        num_planned=_number(plan.get("num_checkpoints")),
        num_bytes=folder_bytes(run.path),
        started_at=started_at,
        problem=problem,
    )


def _number(value: object) -> int | None:
    return value if isinstance(value, int) else None
