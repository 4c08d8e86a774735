"""Whether an adapter folder holds plain LoRA: what can be merged, stacked and composed exactly. Loads no library."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emtool.core.errors import ModelError
from emtool.core.integrity import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from emtool.core.models import ModelReference

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
    extras = [
        words
        for words, is_there in {
            "DoRA": config.get("use_dora"),
            "biases": config.get("bias", "none") != "none" or config.get("lora_bias"),
            "whole modules (modules_to_save)": config.get("modules_to_save"),
            "trained token embeddings": config.get("trainable_token_indices"),
        }.items()
        if is_there
    ]
    if extras:
        raise ModelError(
            f"adapter {folder} has {' and '.join(extras)}; a persona must be plain LoRA on linear layers, so that it "
            "can be merged, stacked and exported exactly"
        )
    trained_on = config.get("base_model_name_or_path")
    if base is not None and isinstance(trained_on, str) and not _may_be(trained_on, base):
        raise ModelError(
            f"adapter {folder} was trained on {trained_on}, and the base model is {base.hub_id or base.name}; "
            f"choose the adapter for this base, or --model {trained_on}"
        )
    return config


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

    A hub id is told apart from another; the path of a folder, on whatever machine, says nothing.
    """
    is_path = trained_on.startswith((".", "/", "~")) or trained_on.count("/") != 1
    names = {name.lower() for name in (base.name, base.hub_id) if name}
    return is_path or base.hub_id is None or trained_on.lower() in names
