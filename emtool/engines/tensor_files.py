"""Files of tensors, written one tensor at a time: a library would make a copy of the whole in memory first."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from emtool.core.adapter import Tensor
from emtool.core.file_sizes import safetensors_header, safetensors_order

_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


class Sink(Protocol):
    """Takes bytes."""

    def write(self, data: Any, /) -> int:
        """Take a piece of memory whole, and return how many bytes it has."""


def write_safetensors(file: Sink, tensors: Mapping[str, torch.Tensor], *, dtype: str | None = None) -> None:
    """Write a safetensors file, byte for byte as its library writes it.

    Args:
        file: Where to.
        tensors: Float32 or bfloat16 tensors on the CPU, by name.
        dtype: Dtype to store all of them in; None keeps each one's own.
    """
    described = describe(tensors)
    file.write(safetensors_header(described, dtype=dtype))
    for entry in safetensors_order(described, dtype=dtype):
        tensor = tensors[entry.name].detach().to(_DTYPES[dtype or entry.dtype]).contiguous()
        file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def encode_safetensors(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Return the contents of a small safetensors file."""
    buffer = io.BytesIO()
    write_safetensors(buffer, tensors)
    return buffer.getvalue()


def read_sample(path: Path) -> dict[str, torch.Tensor] | None:
    """Return the tensors of a small safetensors file; None if it is not there or not readable."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
    except (OSError, SafetensorError):
        return None
    return tensors


def describe(tensors: Mapping[str, torch.Tensor]) -> list[Tensor]:
    """Return names, shapes and dtypes of tensors."""
    return [
        Tensor(name=name, shape=tuple(tensor.shape), dtype=_NAMES[tensor.dtype]) for name, tensor in tensors.items()
    ]
