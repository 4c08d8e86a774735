"""Sizes of the files that tensors are saved in, without writing them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar

DTYPE_BYTES = {"float32": 4, "bfloat16": 2}

_SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16"}
#: Bytes of a tensor's description in the pickle of a torch file, and of everything else in it; measured.
_PICKLE_BYTES_A_TENSOR = 78
_PICKLE_BYTES = 320


class Named(Protocol):
    """What a safetensors header says of a tensor."""

    @property
    def name(self) -> str:
        """Return its name."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Return its shape."""

    @property
    def dtype(self) -> str:
        """Return its dtype, a key of `DTYPE_BYTES`."""

    @property
    def size(self) -> int:
        """Return the number of values."""


AnyNamed = TypeVar("AnyNamed", bound=Named)


def tensor_bytes(tensors: Iterable[Named], *, dtype: str | None = None) -> int:
    """Return the bytes of the values.

    Args:
        tensors: The tensors.
        dtype: Dtype to store all of them in; None keeps each one's own.
    """
    return sum(tensor.size * DTYPE_BYTES[dtype or tensor.dtype] for tensor in tensors)


def safetensors_bytes(tensors: Iterable[Named], *, dtype: str | None = None) -> int:
    """Return the exact size of a safetensors file with the metadata that PEFT and transformers write.

    Args:
        tensors: The tensors.
        dtype: Dtype to store all of them in; None keeps each one's own.

    Source: the safetensors format, as its library writes it.
    """
    listed = list(tensors)
    return len(safetensors_header(listed, dtype=dtype)) + tensor_bytes(listed, dtype=dtype)


def safetensors_order(tensors: Iterable[AnyNamed], *, dtype: str | None = None) -> list[AnyNamed]:
    """Return tensors in the order of a safetensors file: those of a wider dtype first, by name within a dtype."""
    return sorted(tensors, key=lambda t: (-DTYPE_BYTES[dtype or t.dtype], t.name))


def safetensors_header(tensors: Iterable[Named], *, dtype: str | None = None) -> bytes:
    """Return what a safetensors file holds before its tensors: a length, and a JSON header padded to 8 bytes.

    Args:
        tensors: The tensors.
        dtype: Dtype to store all of them in; None keeps each one's own.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in safetensors_order(tensors, dtype=dtype):
        stored = dtype or tensor.dtype
        end = offset + tensor.size * DTYPE_BYTES[stored]
        header[tensor.name] = {
            "dtype": _SAFETENSORS_DTYPES[stored],
            "shape": tensor.shape,
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    padded = text.ljust(_align(len(text), 8))
    return len(padded).to_bytes(8, "little") + padded


def torch_file_bytes(name: str, storages: Sequence[int]) -> int:
    """Return the size of a file that `torch.save` writes, within a few hundred bytes.

    Args:
        name: File name without its suffix, which is the first part of each record's name.
        storages: Bytes of each tensor's storage.

    Source: the ZIP format without compression, as torch writes it: a header of 30 bytes and the name, values aligned
    to 64 bytes, a descriptor of 16, an entry of 46 and the name in the directory.
    """
    records = [(f"{name}/data.pkl", _PICKLE_BYTES + _PICKLE_BYTES_A_TENSOR * len(storages))]
    records += [(f"{name}/.format_version", 1), (f"{name}/.storage_alignment", 2), (f"{name}/byteorder", 6)]
    records += [(f"{name}/data/{index}", size) for index, size in enumerate(storages)]
    records += [(f"{name}/version", 2), (f"{name}/.data/serialization_id", 40)]
    position = 0
    for record, size in records:
        position = _align(position + 30 + len(record) + 4, 64) + size + 16
    directory = sum(46 + len(record) for record, _ in records)
    return position + directory + 98


def _align(position: int, unit: int) -> int:
    return -(-position // unit) * unit
