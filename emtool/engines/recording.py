"""The life of a run folder: created with its manifest, closed with a status however the run ends."""

from __future__ import annotations

import contextlib
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import emtool
from emtool.core.data import file_sha256
from emtool.core.errors import CheckpointError, DiskSpaceError, Interrupted
from emtool.core.run_dir import RunFolder
from emtool.core.run_plan import RunPlan

PACKAGES = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "safetensors", "tokenizers")


def first_manifest(plan: RunPlan, lineage: Mapping[str, Any], command: Sequence[str]) -> dict[str, Any]:
    """Return the manifest of a run that is about to start.

    Args:
        plan: The plan.
        lineage: `base` and `persona`; the dataset is added.
        command: The command line.
    """
    assert plan.dataset.path is not None
    dataset = {"name": plan.dataset.name, "sha256": file_sha256(plan.dataset.path), "domain": plan.dataset.domain}
    return {
        "run_id": uuid.uuid4().hex,
        "status": "running",
        "plan": plan.to_dict(),
        "config": plan.config.to_dict(),
        "lineage": {**lineage, "dataset": dataset},
        "versions": {
            "emtool": emtool.__version__,
            "python": sys.version.split()[0],
            **{name: version(name) for name in PACKAGES},
        },
        "command": list(command),
        "started_at": _now(),
        "ended_at": None,
        "saved_steps": [],
    }


@contextlib.contextmanager
def recorded_run(run: RunFolder, manifest: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Create the run folder, and close its manifest however the block ends.

    Yields:
        Fields to add to the closed manifest.
    """
    results: dict[str, Any] = {}
    try:
        run.create(manifest)
        yield results
    except Interrupted as stop:
        _close(run, manifest, status="interrupted")
        kept = f"{len(run.saved_steps())} checkpoints are complete in {run.path}"
        raise Interrupted(stop.signum, kept) from stop
    except Exception as error:
        # The disk may be what failed; then the error that stopped the run matters more than its record.
        with contextlib.suppress(CheckpointError, DiskSpaceError):
            _close(run, manifest, status="failed", error=f"{type(error).__name__}: {error}")
        raise
    _close(run, manifest, status="completed", **results)


def _close(run: RunFolder, manifest: Mapping[str, Any], **fields: Any) -> None:
    if run.path.is_dir():
        run.write_manifest({**manifest, **fields, "ended_at": _now(), "saved_steps": run.saved_steps()})


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
