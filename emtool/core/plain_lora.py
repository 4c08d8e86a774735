"""Whether an adapter folder holds plain LoRA: what can be merged, stacked and composed exactly. Loads no library."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emtool.core.errors import ModelError, shown
from emtool.core.integrity import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from emtool.core.models import ModelReference
from emtool.core.staging import RECORD_NAME

#: Fields of a LoRA configuration that every plain adapter has, whatever their value. Source: peft 0.21, LoraConfig.
_PLAIN_KEYS = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "peft_type",
    "peft_version",
    "r",
    "rank_pattern",
    "revision",
    "target_modules",
    "task_type",
    "use_rslora",
}
#: Values that mean nothing by themselves.
_NEUTRAL = {
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
    "runtime_config": {"ephemeral_gpu_offload": False},
}
_WORDS = {
    "use_dora": "DoRA",
    "bias": "biases",
    "lora_bias": "biases",
    "modules_to_save": "whole modules (modules_to_save)",
    "trainable_token_indices": "trained token embeddings",
}

#: A PEFT configuration has about a kilobyte, and lists of names up to some hundred.
MAX_CONFIG_BYTES = 1 << 20


def check_plain_lora(folder: Path, base: ModelReference | None) -> Mapping[str, Any]:
    """Return an adapter's configuration after refusing what cannot be merged, stacked and composed exactly.

    Args:
        folder: A PEFT folder.
        base: The base model that it must have been trained on, by name; None leaves that to the shapes.

    Raises:
        ModelError: If it is no adapter, not plain LoRA (DoRA, biases or whole modules), or another base's.
    """
    config = read_lora_config(folder)
    check_plain(folder, config)
    check_stands_alone(folder)
    if base is not None:
        check_base(folder, config, base)
    return config


def check_base(folder: Path, config: Mapping[str, Any], base: ModelReference, *, option: str = "--model") -> None:
    """Refuse an adapter whose configuration names another base model.

    Args:
        folder: Its folder, for the message.
        config: Its configuration.
        base: The base model.
        option: What names the base on the command line.

    Raises:
        ModelError: Names both.
    """
    trained_on = config.get("base_model_name_or_path")
    if isinstance(trained_on, str) and not _may_be(trained_on, base):
        raise ModelError(
            f"adapter {folder} was trained on {trained_on}, and the base model is {base.hub_id or base.name}; "
            f"choose the adapter for this base, or {option} {trained_on}"
        )


def check_plain(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse every kind of adapter but the plain one: those that are known, and those that are not yet.

    Raises:
        ModelError: Names what is not plain.
    """
    _check_numbers(folder, config)
    extras = [
        _WORDS.get(key, f"{key} = {shown(value)}")
        for key, value in config.items()
        if key not in _PLAIN_KEYS and value not in (_NEUTRAL.get(key), None, False, "none", [], {}, "")
    ]
    if (start := config.get("init_lora_weights", True)) not in (True, False, "gaussian"):
        extras.append(f"init_lora_weights = {shown(start)}, which changes the base's weights")
    if extras:
        raise ModelError(
            f"adapter {folder} has {' and '.join(extras)}; only plain LoRA on linear layers can be merged, stacked, "
            "exported and compared exactly"
        )


def _check_numbers(folder: Path, config: Mapping[str, Any]) -> None:
    values = {"r": config.get("r"), "lora_alpha": config.get("lora_alpha")}
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(name) or {}
        if not isinstance(pattern, dict):
            raise ModelError(f"{folder / ADAPTER_CONFIG}: {name} is {shown(pattern)}, not an object")
        values |= {f"{name} of {key}": value for key, value in pattern.items()}
    for name, value in values.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 < float(str(value)) < math.inf:
            raise ModelError(f"{folder / ADAPTER_CONFIG}: {name} is {shown(value)}, not a number above 0")


def check_stands_alone(folder: Path) -> None:
    """Refuse a milestone that is a model only together with a persona of its own.

    Raises:
        ModelError: Names the command that makes it stand alone.
    """
    try:
        record = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return
    requires = record.get("requires") if isinstance(record, dict) else None
    if isinstance(requires, dict) and requires.get("persona") is not None:
        raise ModelError(
            f"{folder} is a milestone that needs a persona beside it, which would be forgotten; write both as one "
            f"adapter with: emtool export {folder.parent}"
        )


def read_lora_config(folder: Path) -> Mapping[str, Any]:
    """Return the configuration of a LoRA adapter.

    Raises:
        ModelError: If the folder holds no LoRA adapter in safetensors.
    """
    path = folder / ADAPTER_CONFIG
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ModelError(f"{path} is absurdly large for a PEFT configuration; it is not used")
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{folder} holds no PEFT adapter: cannot read {ADAPTER_CONFIG} ({error})") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise ModelError(f"{path} describes {str(kind)[:40]!r}, not a LORA adapter")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ModelError(
            f"{folder} has no {ADAPTER_WEIGHTS}; weights in another format are not read, because pickled files can "
            "run code: save them as safetensors"
        )
    return config


def _may_be(trained_on: str, base: ModelReference) -> bool:
    """Return whether the name under which an adapter was trained may be a base model's.

    A hub id is told apart from another; the path of a folder, on whatever machine, says nothing, and nor does a base
    that is a folder: then the shapes decide, see `names_another_base`.
    """
    names = {name.lower() for name in (base.name, base.hub_id) if name}
    return _is_path(trained_on) or base.hub_id is None or trained_on.lower() in names


def _is_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") != 1


def names_another_base(config: Mapping[str, Any], base: ModelReference) -> str | None:
    """Return the hub id that an adapter was trained on, where the base is a folder that does not tell its own."""
    trained_on = config.get("base_model_name_or_path")
    is_hub_id = (
        isinstance(trained_on, str) and trained_on.count("/") == 1 and not trained_on.startswith((".", "/", "~"))
    )
    return trained_on if is_hub_id and base.hub_id is None else None
