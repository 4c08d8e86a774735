"""The hash of an adapter folder, whatever the process that wrote it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from emtool.core.data import file_sha256
from emtool.core.errors import CheckpointError
from emtool.core.integrity import ADAPTER_CONFIG, ADAPTER_WEIGHTS


def adapter_sha256(folder: Path) -> str:
    """Return the SHA-256 of a PEFT adapter: its weights, and its configuration whatever the order of its lists.

    PEFT writes sets as lists in an order that differs between processes, so the file itself cannot be hashed.

    Raises:
        CheckpointError: If a file cannot be read.
    """
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        weights = file_sha256(folder / ADAPTER_WEIGHTS)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read the adapter in {folder}: {error}") from error
    kept = {
        key: sorted(map(str, value)) if isinstance(value, list) else value
        for key, value in config.items()
        if key != "peft_version"
    }
    text = f"{ADAPTER_WEIGHTS}:{weights}\n{ADAPTER_CONFIG}:{json.dumps(kept, sort_keys=True)}\n"
    return hashlib.sha256(text.encode()).hexdigest()
