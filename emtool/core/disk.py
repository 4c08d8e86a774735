"""Bytes: what a checkpoint takes on disk and what the disk has left."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from emtool.core.architecture import LinearLayer
from emtool.core.errors import ConfigError

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
#: Adapter config, README and checkpoint.json together, rounded up from what a run writes (about 4 KB).
SMALL_FILES_BYTES = 5_000

_SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16"}


def adapter_file_bytes(layers: Sequence[LinearLayer], *, rank: int, dtype: str) -> int:
    """Return the size of a LoRA adapter's `adapter_model.safetensors`.

    Args:
        layers: The adapted linear layers.
        rank: LoRA rank.
        dtype: Storage dtype, a key of `DTYPE_BYTES`.

    Source: the safetensors format: 8 bytes of length, a JSON header padded to 8 bytes, the tensors.
    """
    shapes = {}
    for layer in layers:
        prefix = f"base_model.model.{layer.name}"
        shapes[f"{prefix}.lora_A.weight"] = [rank, layer.in_features]
        shapes[f"{prefix}.lora_B.weight"] = [layer.out_features, rank]
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in sorted(shapes.items()):
        end = offset + shape[0] * shape[1] * DTYPE_BYTES[dtype]
        header[name] = {"dtype": _SAFETENSORS_DTYPES[dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    header_bytes = len(json.dumps(header, separators=(",", ":")).encode())
    return 8 + -(-header_bytes // 8) * 8 + offset


def free_bytes(path: Path) -> int:
    """Return the free space of the file system that a folder is on or would be created on.

    Raises:
        ConfigError: If neither the folder nor any parent of it can be looked at.
    """
    for folder in (path, *path.absolute().parents):
        try:
            return shutil.disk_usage(folder).free
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ConfigError(f"cannot look at {folder} ({error.strerror}); choose another --output-root") from error
    raise ConfigError(f"no part of {path} exists; choose another --output-root")


def folder_bytes(path: Path) -> int:
    """Return the bytes of the files below a folder; a file with several hard links there counts once."""
    stats = (file.stat() for file in path.rglob("*") if file.is_file())
    return sum({(stat.st_dev, stat.st_ino): stat.st_size for stat in stats}.values())


def format_bytes(count: int) -> str:
    """Return a byte count for reading, in binary units: 1536 becomes "1.5 KiB"."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{int(size)} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} TiB"
