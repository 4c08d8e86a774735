"""The geometry of a run's checkpoints, and the files that it is written to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from emtool.core.csv_text import csv_text
from emtool.core.errors import CheckpointError
from emtool.core.evaluation_files import GEOMETRY_SUMMARY, GEOMETRY_TABLE, LAYER_TABLE
from emtool.core.integrity import ADAPTER_WEIGHTS
from emtool.core.run_dir import FORMAT, RunFolder, json_bytes, replace_file
from emtool.core.run_lock import locked_evaluation
from emtool.core.steps import select_steps
from emtool.engines.adapter_geometry import AdapterGeometry, adapter_geometry


@dataclass(frozen=True, kw_only=True)
class RunGeometry:
    """The geometry of a run.

    Attributes:
        run: The run folder.
        geometry: What was found.
    """

    run: RunFolder
    geometry: AdapterGeometry

    def to_dict(self) -> dict[str, Any]:
        """Return the geometry as `geometry.json` holds it."""
        return {
            "format": FORMAT,
            "run": str(self.run.path),
            "settings": {"storage": list(self.geometry.storage), "layers": len(self.geometry.layer_norms)},
            "explained": list(self.geometry.explained),
            "checkpoints": [
                {"step": entry.step, "metrics": {k: v for k, v in asdict(entry).items() if k != "step"}}
                for entry in self.geometry.steps
            ],
        }


def run_geometry(run: RunFolder, *, steps: str | None = None) -> RunGeometry:
    """Return the geometry of a run's checkpoints, and write it to the evaluation folder.

    Only the trained adapter is looked at; a persona is the same at every checkpoint. A folder of PEFT checkpoints that
    another trainer wrote can be given as well.

    Args:
        run: The run folder.
        steps: As `select_steps` takes it; None is every checkpoint.

    Raises:
        EmtoolError: If there are too few checkpoints, or one cannot be read.
    """
    saved = run.saved_steps()
    if not saved:
        raise CheckpointError(f"{run.path} has no checkpoint-* folders; train it first")
    folders = {step: run.checkpoint_path(step) for step in select_steps(steps, saved)}
    for folder in folders.values():
        if not (folder / ADAPTER_WEIGHTS).is_file():
            raise CheckpointError(f"{folder} has no {ADAPTER_WEIGHTS}; see: emtool verify {run.path}")
    result = RunGeometry(run=run, geometry=adapter_geometry(folders))
    with locked_evaluation(run):
        _write(result)
    return result


def _write(result: RunGeometry) -> None:
    folder = result.run.evaluation_path
    # All are made before the first is written, so that none is of another look than the rest.
    files = {
        GEOMETRY_TABLE: csv_text([_row(asdict(entry)) for entry in result.geometry.steps]).encode("utf-8"),
        LAYER_TABLE: csv_text(_layer_rows(result.geometry)).encode("utf-8"),
        GEOMETRY_SUMMARY: json_bytes(result.to_dict()),
    }
    try:
        for name, content in files.items():
            replace_file(folder / name, content)
    except OSError as error:
        raise result.run.write_error(error, "writing the geometry") from error


def _row(values: dict[str, Any]) -> dict[str, Any]:
    components: Sequence[float] = values.pop("components")
    named = {f"component_{number}": value for number, value in enumerate(components, start=1)}
    return {name: value for name, value in {**values, **named}.items() if value is not None}


def _layer_rows(geometry: AdapterGeometry) -> list[dict[str, Any]]:
    return [
        {"step": step, "layer": layer, "update_norm": norm, **_speed(geometry, layer, step)}
        for layer, norms in geometry.layer_norms.items()
        for step, norm in norms.items()
    ]


def _speed(geometry: AdapterGeometry, layer: str, step: int) -> dict[str, float]:
    speed = geometry.layer_speeds[layer].get(step)
    return {} if speed is None else {"speed": speed}
