"""Where a model's shapes are read: its `config.json`, else the headers of its safetensors files.

A header says name, dtype and shape of every tensor, so a few kilobytes are read of a file of any size.

Source: the safetensors format, 8 bytes of length (little-endian) and a JSON object.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from emtool.core.architecture import (
    BLOCK_NUMBER,
    EMBEDDING,
    HEAD,
    LINEAR,
    OTHER,
    ModelShapes,
    Parameter,
    shapes_from_config,
)
from emtool.core.errors import ModelError
from emtool.core.models import ModelReference

#: The format's own limit; a longer header is refused by its reader too.
MAX_HEADER_BYTES = 100_000_000

#: Above any dimension of a tensor.
MAX_SIZE = 10**9

_HEADS = ("lm_head", "embed_out", "output")
_EMBEDDING = re.compile(r"embed|^wte$|^wpe$|^word_embeddings$")
_TEXT_ONLY = re.compile(r"vision|visual|audio|multi_modal|image")


def find_shapes(model: ModelReference, folder: Path | None) -> ModelShapes | None:
    """Return a model's shapes without loading it, or None where nothing on this machine tells them.

    Args:
        model: The model, with its config where that is known.
        folder: Its folder, if it is on this machine.

    Raises:
        EmtoolError: If its config or a weight file is malformed.
    """
    shapes = None if model.config is None else shapes_from_config(model.config)
    if shapes is not None or folder is None:
        return shapes
    return shapes_from_weights(folder)


def shapes_from_weights(folder: Path) -> ModelShapes | None:
    """Return a model's shapes from its weight files, or None where there are none.

    What a tensor is follows from its name and its number of dimensions, so a layer of an unusual kind may be taken for
    a linear one. The names are those of the files, which may differ from the loaded model's by a prefix.

    Raises:
        ModelError: If a file is not in the safetensors format.
    """
    files = _weight_files(folder)
    shapes = {name: shape for path in files for name, shape in _read_header(path).items()}
    if not shapes:
        return None
    parameters = tuple(Parameter(name=name, shape=shape, kind=_kind(name, shape)) for name, shape in shapes.items())
    blocks = {int(match[1]) for p in parameters if p.kind == LINEAR and (match := BLOCK_NUMBER.search(p.name))}
    return ModelShapes(
        parameters=parameters, num_blocks=len(blocks), source="the headers of its safetensors files", is_exact=False
    )


def _weight_files(folder: Path) -> list[Path]:
    """Return the files that a library would load: those of the index, else the one file, else its shards."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            return [folder / Path(name).name for name in names]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ModelError(f"{index} is not an index of weight files") from error
    single = folder / "model.safetensors"
    return [single] if single.is_file() else sorted(folder.glob("model-*.safetensors"))


def _size(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < MAX_SIZE:
        raise ValueError(value)
    return value


def _kind(name: str, shape: tuple[int, ...]) -> str:
    module = name.removesuffix(".weight").rpartition(".")[2]
    if len(shape) != 2 or not name.endswith(".weight"):
        return OTHER
    if module in _HEADS:
        return HEAD
    if _EMBEDDING.search(module):
        return EMBEDDING
    return OTHER if _TEXT_ONLY.search(name) else LINEAR


def _read_header(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_HEADER_BYTES:
                raise ModelError(f"{path} is not a safetensors file: its header would be {length:,} bytes long")
            header = json.loads(file.read(length))
        return {
            str(name): tuple(_size(size) for size in entry["shape"])
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path} is not a safetensors file: its header cannot be read") from error
