"""A sweep: every combination of a grid, each an ordinary run in one folder.

[train]                                    # options of every run, as in emtool.toml
max_steps = 100

[grid]                                     # an option of [train], and the values that it takes
persona = ["baseline", "goodness"]
seed = [0, 1, 2]

[evaluate]                                 # optional: how every run is evaluated, the options of `emtool evaluate`
metrics = "likelihood"

[job]                                      # optional: what a run takes of a cluster, and what starts it
num_gpus = 2
launcher = "accelerate launch --num_processes 2 -m"
"""

from __future__ import annotations

import itertools
import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from emtool.core.config import HOUSEKEEPING
from emtool.core.errors import ConfigError, shown, unknown_name
from emtool.core.models import slugify
from emtool.core.record_file import settings_id, text_sha256
from emtool.core.settings import (
    SCHEDULE_KEYS,
    Layer,
    Settings,
    check_finite,
    checked_options,
    read_tables,
    resolve_settings,
)

_TABLES = ("train", "grid", "evaluate", "job")
_EXAMPLE = "[grid] seed = [0, 1, 2]"
_JOB_KEYS = ("num_cpus", "num_gpus", "launcher")

#: Where the runs are and what they are called is the sweep's to say.
_OWN = ("output_root", "output_name")

#: Options whose values stand in a cell's name by themselves.
_PLAIN = ("model", "dataset", "persona")

#: More cells than anyone reads a table of.
MAX_CELLS = 10_000

#: What to write for a schedule that an option leaves out.
_INSTEAD = 'write checkpoints = ["custom", ...], a list of schedules'

#: What a sweep's folder holds besides its runs.
_TAKEN = ("logs", "plots", "sweep.csv", "sweep.json")

#: Characters of a file name that every file system takes, with room for what is put before and behind.
_MAX_NAME = 200


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One combination of the grid.

    Attributes:
        name: Name of its run folder.
        shown: Grid option to its value, as the file has it.
        values: Fields of `TrainConfig`.
    """

    name: str
    shown: Mapping[str, object]
    values: Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """What a run takes of a cluster, and what starts it.

    Attributes:
        num_cpus: CPUs.
        num_gpus: GPUs; None is one where the run's device is CUDA, else none.
        launcher: What starts the training instead of Python alone.
    """

    num_cpus: float = 1
    num_gpus: float | None = None
    launcher: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What a sweep file asks for.

    Attributes:
        path: The file.
        train: Options of every run, as fields of `TrainConfig`.
        cells: The cells, the last grid option the fastest.
        evaluate: Options of `emtool evaluate`; None does not evaluate.
        job: What a run takes.
    """

    path: Path
    train: Mapping[str, object]
    cells: Sequence[Cell]
    evaluate: Mapping[str, object] | None
    job: JobOptions

    def cell(self, name: str) -> Cell:
        """Return a cell by its name.

        Raises:
            ConfigError: If there is none.
        """
        found = {cell.name: cell for cell in self.cells}
        if name not in found:
            raise unknown_name(f"cell in {self.path}", name, found)
        return found[name]

    def settings(self, cell: Cell, folder: Path, *, layers: Sequence[Layer], num_cuda_devices: int) -> Settings:
        """Return the settings of a cell: the grid, then `[train]`, then the settings files, then the profile.

        Args:
            cell: The cell.
            folder: Folder that holds the runs.
            layers: The settings files.
            num_cuda_devices: CUDA devices on this machine.

        Raises:
            ConfigError: If a value is not allowed.
        """
        place = Layer(origin="sweep", values={"output_root": folder, "output_name": cell.name})
        own = [
            Layer(origin=f"{self.path}, [grid]", values=cell.values),
            Layer(origin=str(self.path), values=self.train),
        ]
        outer = [replace(layer, values=_without(layer.values, _OWN)) for layer in layers]
        nearest = replace(_as_one([place, *own], origin=str(self.path)), tables="[grid] and [train]")
        return resolve_settings([nearest, *outer], num_cuda_devices=num_cuda_devices)


def read_sweep(path: Path) -> Sweep:
    """Return what a sweep file asks for.

    Raises:
        ConfigError: If it cannot be read, names an unknown option or a value of a wrong type, gives a value twice, or
            has no grid.
    """
    tables = read_tables(path, names=_TABLES, example=_EXAMPLE)
    for table in ("train", "grid"):
        for key in (*_OWN, *(name for name in HOUSEKEEPING if table == "grid")):
            if key in tables.get(table, {}):
                raise ConfigError(f"{path}: [{table}] {key} does not go with a sweep: {_why_not(key)}")
    train, grid = checked_options(tables.get("train", {}), path), tables.get("grid", {})
    if not grid:
        raise ConfigError(f"{path} has no [grid]; name an option and its values, for instance {_EXAMPLE}")
    if both := {_meaning(key) for key in grid} & {_meaning(key) for key in tables.get("train", {})}:
        raise ConfigError(f"{path}: {', '.join(sorted(both))} stands in [train] and in [grid]; give it once")
    for key, value in tables.get("evaluate", {}).items():
        check_finite(value if isinstance(value, list) else [value], path, table="evaluate", key=key)
    return Sweep(
        path=path,
        train=train,
        cells=_cells(grid, path),
        # Even an empty table asks for an evaluation.
        evaluate=tables.get("evaluate"),
        job=_job(tables.get("job", {}), path),
    )


def _why_not(key: str) -> str:
    return "it names the folders itself" if key in _OWN else "it does not shape what a run computes"


def _meaning(key: str) -> str:
    """Return the field that an option sets: three of them name the schedule."""
    return "checkpoints" if key in SCHEDULE_KEYS else key


def _as_one(layers: Sequence[Layer], *, origin: str) -> Layer:
    """Return layers as one, the first the nearest: its parts are right only together."""
    values: dict[str, object] = {}
    for layer in layers:
        values = {**layer.values, **values}
    return Layer(origin=origin, values=values)


def _without(values: Mapping[str, object], names: Sequence[str]) -> dict[str, object]:
    return {key: value for key, value in values.items() if key not in names}


def _cells(grid: Mapping[str, object], path: Path) -> list[Cell]:
    axes: list[list[tuple[str, object, Mapping[str, object]]]] = []
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{path}: [grid] {key} = {shown(values)} is not a list of values")
        check_finite(values, path, table="grid", key=key)
        checked = [checked_options({key: value}, path, table="grid") for value in values]
        if not all(checked):
            # Left out, it would take what a settings file says.
            raise ConfigError(f"{path}: [grid] {key} = {values[checked.index({})]!r} asks for nothing; {_INSTEAD}")
        meant = [tuple(fields.items()) for fields in checked]
        counts = Counter(meant)
        if again := [value for value, same in zip(values, meant, strict=True) if counts[same] > 1]:
            raise ConfigError(f"{path}: [grid] {key} has {shown(again[0])} more than once; give each value once")
        axes.append([(key, value, fields) for value, fields in zip(values, checked, strict=True)])
    names = Counter(map(_meaning, grid))
    if twice := [key for key in grid if names[_meaning(key)] > 1]:
        raise ConfigError(f"{path}: [grid] {' and '.join(twice)} name the same thing; put all values into one of them")
    if (count := math.prod(map(len, axes))) > MAX_CELLS:
        raise ConfigError(f"{path}: the grid has {count:,} cells; at most {MAX_CELLS:,} are allowed")
    cells = [
        Cell(
            name="_".join(_part(key, value) for key, value, _ in combination),
            shown={key: value for key, value, _ in combination},
            values={name: value for _, _, checked in combination for name, value in checked.items()},
        )
        for combination in itertools.product(*axes)
    ]
    if taken := [cell.name for cell in cells if cell.name in _TAKEN or cell.name.startswith("report")]:
        raise ConfigError(
            f"{path}: a cell would be called {taken[0]}, which the sweep's own files are; rename its value"
        )
    # Models of two publishers may have one name. The first keeps it: it may be there already, and values are appended.
    first = {cell.name: cell for cell in reversed(cells)}
    cells = [cell if first[cell.name].shown == cell.shown else replace(cell, name=_with_hash(cell)) for cell in cells]
    if twice := [name for name, number in Counter(cell.name for cell in cells).items() if number > 1]:
        raise ConfigError(f"{path}: two cells would be called {twice[0]}; rename a value")
    if long := [cell.name for cell in cells if len(cell.name) > _MAX_NAME]:
        raise ConfigError(f"{path}: the name of a cell is longer than {_MAX_NAME} characters: {long[0][:40]}...")
    return cells


def _with_hash(cell: Cell) -> str:
    return f"{cell.name}-{settings_id(cell.shown)[:6]}"


def _part(key: str, value: object) -> str:
    """Return what a value contributes to the name of a cell's folder."""
    text = Path(value).name if key in _PLAIN and isinstance(value, str) else str(value)
    slug = slugify(text)
    if not text.isascii():
        # Letters that a folder's name does without can be all that tells two values apart.
        slug += f"-{text_sha256(text)[:6]}"
    return slug if key in _PLAIN else f"{slugify(_meaning(key))}-{slug}"


def _job(values: Mapping[str, object], path: Path) -> JobOptions:
    for key in values:
        if key not in _JOB_KEYS:
            raise unknown_name(f"option in {path}, [job]", key, _JOB_KEYS)
    for key in ("num_cpus", "num_gpus"):
        value = values.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 10_000:
            raise ConfigError(f"{path}: [job] {key} = {shown(value)} is not a number from 0 to 10,000")
        if value > 1 and value != int(value):
            raise ConfigError(f"{path}: [job] {key} = {shown(value)}: above 1, Ray deals whole ones")
    num_gpus = values.get("num_gpus")
    return JobOptions(
        num_cpus=float(values.get("num_cpus", 1)),  # type: ignore[arg-type]
        num_gpus=None if num_gpus is None else float(num_gpus),  # type: ignore[arg-type]
        launcher=_launcher(values.get("launcher", []), path),
    )


def _launcher(value: object, path: Path) -> tuple[str, ...]:
    parts: object = value
    if isinstance(value, str):
        try:
            parts = shlex.split(value)
        except ValueError as error:
            raise ConfigError(f"{path}: [job] launcher = {shown(value)} is not a command: {error}") from error
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise ConfigError(f"{path}: [job] launcher = {shown(value)} is not a command")
    if value and not any(part.strip() for part in parts):
        raise ConfigError(f"{path}: [job] launcher = {shown(value)} names no command")
    return tuple(parts)
