"""Settings from several places: the command line, two `emtool.toml` files, the profile.

Each place is a layer; the first that names a value wins:

    command line > emtool.toml in the working folder > emtool.toml in the user's config folder > profile

    [train]
    checkpoints = "custom"                                   # also a list, or {every = 25, until = 150} mappings
    learning_rate = 1e-4

    [data]
    source = "/srv/copies/training_datasets.zip.enc"         # also a URL or a folder: where `data fetch` looks

    [evaluate]
    judge = "openai:gpt-4o"                                  # also a list: `EVALUATE_OPTIONS` has the other keys
    max_cost = 5.0
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import get_args, get_type_hints

from platformdirs import user_config_path

from emtool.core.config import DEFAULT_SAVE_STEPS, PROFILES, TrainConfig, resolve_train_config
from emtool.core.errors import ConfigError, shown, unknown_name
from emtool.core.hardware import parse_device
from emtool.core.schedule_text import schedule_from_value

FILE_NAME = "emtool.toml"
COMMAND_LINE = "command line"

#: Three ways to name one schedule; a layer may use one of them.
SCHEDULE_KEYS = ("checkpoints", "custom_checkpoints", "save_steps")
_NOT_SETTABLE = ("profile_reason",)
_TABLES = ("train", "data", "evaluate")
_DATA_KEYS = ("source",)
#: Whole numbers in TOML have 64 bits with their sign.
_LIMIT = 1 << 63

#: Options of `emtool evaluate` that a settings file may give, and their types.
EVALUATE_OPTIONS: Mapping[str, object] = {
    "judge": tuple[str, ...],
    "judge_base_url": str,
    "judge_price": str,
    "max_cost": float,
    "questions": str,
    "n_per_question": int,
    "max_new_tokens": int,
    "sampling": str,
    "metrics": str,
}


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Values from one place.

    Attributes:
        origin: The place, as it is shown.
        values: Fields of `TrainConfig` by name; the schedule under "checkpoints".
        tables: What they stand in there, for messages.
    """

    origin: str
    values: Mapping[str, object]
    tables: str = "[train]"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A resolved configuration and where each value came from.

    Attributes:
        config: The configuration.
        origins: Place by field name.
        device_option: The device as it was asked for, "auto", "cpu", "cuda" or "cuda:N".
    """

    config: TrainConfig
    origins: Mapping[str, str]
    device_option: str


#: What says how long a run is.
_STEPS_OR_EPOCHS = ("max_steps", "num_train_epochs")
_LENGTH = (
    *_STEPS_OR_EPOCHS,
    "profile",
    "dataset",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "held_out_fraction",
)


def user_file() -> Path:
    """Return the path of the user's own settings file, whether it is there or not."""
    return user_config_path("emtool", appauthor=False) / FILE_NAME


def file_layers(folder: Path | None = None) -> list[Layer]:
    """Return the layers of the settings files that exist, the nearest first.

    Args:
        folder: The project's folder; None is the working folder.

    Raises:
        ConfigError: If a file cannot be read, or names an unknown option or a value of the wrong type.
    """
    return [Layer(origin=shown, values=read_settings(path)) for path, shown in _files(folder).items()]


def data_source(folder: Path | None = None) -> str | None:
    """Return where published datasets are fetched from, as the nearest settings file says: a URL or a path.

    Args:
        folder: The project's folder; None is the working folder.

    Raises:
        ConfigError: If a file cannot be read or is wrong in its `[data]` table.
    """
    sources = (_data_source(_tables(path)["data"], path) for path in _files(folder))
    return next((source for source in sources if source is not None), None)


def _files(folder: Path | None) -> dict[Path, str]:
    """Return the settings files that exist, the nearest first, and how each is shown."""
    project = (folder or Path()) / FILE_NAME
    paths = {project.resolve(): str(project), user_file().resolve(): str(user_file())}
    return {path: shown for path, shown in paths.items() if os.path.lexists(path)}


def read_settings(path: Path) -> dict[str, object]:
    """Return the values of a settings file's `[train]` table, as fields of `TrainConfig`.

    Raises:
        ConfigError: If it cannot be read, or names an unknown option or a value of the wrong type.
    """
    tables = _tables(path)
    _data_source(tables["data"], path)
    _evaluate_options(tables["evaluate"], path)
    return checked_options(tables["train"], path)


def _tables(path: Path) -> dict[str, dict[str, object]]:
    found = read_tables(path, names=_TABLES, example="[train] checkpoints = 'custom'")
    return {name: found.get(name, {}) for name in _TABLES}


def read_tables(path: Path, *, names: Sequence[str], example: str) -> dict[str, dict[str, object]]:
    """Return the tables of a TOML file.

    Args:
        path: The file.
        names: The tables that it may have.
        example: What it may hold, for the message.

    Raises:
        ConfigError: If it cannot be read, or holds anything else.
    """
    import tomllib

    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    for name in tables:
        if name not in names:
            raise unknown_name(f"table in {path}", name, names, f"for instance {example}")
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise ConfigError(
                f"{path}: {name} = {shown(table)} is not a table; write [{name}] and the options below it"
            )
        for key, value in table.items():
            if large := [number for number in _whole_numbers(value) if not -_LIMIT <= number < _LIMIT]:
                raise ConfigError(f"{path}: [{name}] {key} holds {shown(large[0])}, which is more than TOML can hold")
    return tables


def _whole_numbers(value: object) -> Iterator[int]:
    """Yield the whole numbers of a value, however deep they lie in lists and tables."""
    waiting = [value]
    while waiting:
        match waiting.pop():
            case int() as number:
                yield number
            case list() as items:
                waiting += items
            case dict() as table:
                waiting += table.values()


def check_finite(values: Sequence[object], path: Path, *, table: str, key: str) -> None:
    """Refuse numbers of an option that no record can hold.

    Raises:
        ConfigError: Names the first.
    """
    for value in values:
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{path}: [{table}] {key} = {value} is no finite number")


def evaluate_options(folder: Path | None = None) -> dict[str, object]:
    """Return the options of `emtool evaluate` that the settings files give; the nearest file wins.

    Args:
        folder: The project's folder; None is the working folder.

    Raises:
        ConfigError: If a file cannot be read, or names an unknown option or a value of the wrong type.
    """
    found: dict[str, object] = {}
    for path in _files(folder):
        found = {**_evaluate_options(_tables(path)["evaluate"], path), **found}
    return found


def _evaluate_options(values: Mapping[str, object], path: Path) -> dict[str, object]:
    for key, value in values.items():
        if key not in EVALUATE_OPTIONS:
            raise unknown_name(f"option in {path}, [evaluate]", key, EVALUATE_OPTIONS)
        check_finite([value], path, table="evaluate", key=key)
    return {
        key: _coerced(value, EVALUATE_OPTIONS[key], f"{path}: [evaluate] {key} = {shown(value)}")
        for key, value in values.items()
    }


def _data_source(values: Mapping[str, object], path: Path) -> str | None:
    for key in values:
        if key not in _DATA_KEYS:
            raise unknown_name(f"option in {path}, [data]", key, _DATA_KEYS)
    source = values.get("source")
    if source is None:
        return None
    if not isinstance(source, str) or not source or "\0" in source:
        raise ConfigError(f"{path}: [data] source = {shown(source)} is not the text of a URL or a path")
    # A path is meant from the file that it stands in.
    return source if "://" in source else str(path.parent / Path(source).expanduser())


def schedule_option(values: Mapping[str, object], *, name: Callable[[str], str]) -> str | None:
    """Return the schedule that one layer names, or None where it names none.

    Args:
        values: The layer's values; `SCHEDULE_KEYS` are looked at.
        name: How a key is written in this layer, for the message.

    Raises:
        ConfigError: If it names more than one, or one that cannot be read.
    """
    given: dict[str, str] = {}
    if (value := values.get("checkpoints")) is not None:
        given["checkpoints"] = str(schedule_from_value(value))
    if values.get("custom_checkpoints"):
        given["custom_checkpoints"] = "custom"
    if (value := values.get("save_steps")) is not None:
        given["save_steps"] = str(schedule_from_value(f"every {value}"))
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(map(name, given))} name two schedules; give one")
    return next(iter(given.values()), None)


def resolve_settings(
    layers: Sequence[Layer],
    *,
    num_cuda_devices: int,
    defaults: Mapping[str, object] | None = None,
    default_steps: int | None = None,
) -> Settings:
    """Return the configuration that the layers make.

    Args:
        layers: The nearest first.
        num_cuda_devices: CUDA devices on this machine.
        defaults: What a command takes where no layer says otherwise, above the profile.
        default_steps: Optimizer steps where no layer says anything about the length of the run.

    Raises:
        ConfigError: If a name or a value is not allowed; names the file that it stands in.
    """
    own = dict(defaults or {})
    if default_steps is not None and not any(layer.values.get(key) is not None for layer in layers for key in _LENGTH):
        own["max_steps"] = default_steps
    for layer in layers:
        if layer.origin != COMMAND_LINE:
            _check_alone(layer)
    stack = [*layers, Layer(origin="default of this command", values=own)]
    merged: dict[str, object] = {}
    origins: dict[str, str] = {}
    for layer in stack:
        # A run's length is given in steps or in epochs: the nearer place wins, whichever it names.
        has_length = any(key in merged for key in _STEPS_OR_EPOCHS)
        for key, value in layer.values.items():
            if key not in merged and value is not None and not (has_length and key in _STEPS_OR_EPOCHS):
                merged[key], origins[key] = value, layer.origin
    profile = str(merged.pop("profile", "auto"))
    if profile != "auto":
        by = "--profile" if origins["profile"] == COMMAND_LINE else origins["profile"]
        merged["profile_reason"] = f"by {by}"
    device_option = str(merged.get("device", "auto"))
    kind, _ = parse_device(device_option)
    config = resolve_train_config(
        profile=profile,
        overrides={**merged, "device": kind},
        num_cuda_devices=num_cuda_devices,
    )
    for field in fields(TrainConfig):
        asked = merged.get(field.name)
        if field.name not in origins or asked == "auto":
            origins[field.name] = _origin_of_default(field.name, config)
    return Settings(config=config, origins=origins, device_option=device_option)


def _check_alone(layer: Layer) -> None:
    """Refuse a settings file that is wrong by itself, in words that name it."""
    values = dict(layer.values)
    profile, device = str(values.pop("profile", "auto")), str(values.pop("device", "auto"))
    try:
        parse_device(device)
        resolve_train_config(profile=profile, overrides=values, num_cuda_devices=0)
    except ConfigError as error:
        raise ConfigError(f"{layer.origin}, {layer.tables}: {error}") from error


def _origin_of_default(name: str, config: TrainConfig) -> str:
    if name == "profile":
        return config.profile_reason
    if name == "device":
        return "this machine"
    if name == "save_dtype":
        return "the base model's dtype"
    if name == "checkpoints":
        return f"default, every {DEFAULT_SAVE_STEPS}"
    return f"profile {config.profile}" if name in PROFILES[config.profile] else "default"


def checked_options(values: Mapping[str, object], path: Path, *, table: str = "train") -> dict[str, object]:
    """Return the options of a table of a settings file as fields of `TrainConfig`.

    Args:
        values: The table.
        path: The file, for messages.
        table: The table's name, for messages.

    Raises:
        ConfigError: If an option is unknown or of a wrong type; the schedule is read.
    """
    hints = {name: hint for name, hint in get_type_hints(TrainConfig).items() if name not in _NOT_SETTABLE}
    known = {*hints, *SCHEDULE_KEYS}
    checked: dict[str, object] = {}
    for key, value in values.items():
        if key not in known:
            raise unknown_name(f"option in {path}, [{table}]", key, known)
        if key == "target_modules" and isinstance(value, list):
            if not all(isinstance(part, str) for part in value):
                raise ConfigError(f"{path}: [{table}] {key} = {shown(value)} is not a list of texts")
            checked[key] = ",".join(value)
        elif key == "resume_every" and isinstance(value, int) and not isinstance(value, bool):
            checked[key] = str(value)
        elif key not in SCHEDULE_KEYS:
            checked[key] = _coerced(value, hints[key], f"{path}: [{table}] {key} = {shown(value)}")
    for key, kind in (("custom_checkpoints", bool), ("save_steps", int)):
        if key in values:
            _coerced(values[key], kind, f"{path}: [{table}] {key} = {shown(values[key])}")
    if (schedule := schedule_option(values, name=lambda key: f"{path}: {key}")) is not None:
        checked["checkpoints"] = schedule
    return checked


def _coerced(value: object, hint: object, where: str) -> object:
    """Return a TOML value as a field's type takes it."""
    if hint == tuple[str, ...]:
        parts = value.split(",") if isinstance(value, str) else value
        if isinstance(parts, list) and all(isinstance(part, str) for part in parts):
            return tuple(part.strip() for part in parts if part.strip())
        raise ConfigError(f"{where} is not a list of texts")
    kinds = get_args(hint) or (hint,)
    if bool in kinds and isinstance(value, bool):
        return value
    if int in kinds and isinstance(value, int) and not isinstance(value, bool):
        return value
    if float in kinds and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, str) and (str in kinds or Path in kinds):
        if "\0" in value:
            raise ConfigError(f"{where} holds a null character")
        return Path(value).expanduser() if Path in kinds else value
    names = {bool: "true or false", int: "a whole number", float: "a number", Path: "a path", str: "a text"}
    raise ConfigError(f"{where} is not {next(text for kind, text in names.items() if kind in kinds)}")
