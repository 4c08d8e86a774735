"""The factors of a LoRA adapter's layers, read from its file layer by layer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from emtool.core.errors import CheckpointError
from emtool.core.integrity import ADAPTER_WEIGHTS
from emtool.core.plain_lora import check_plain, read_lora_config
from emtool.engines.composing import scale_of

# Shape suffixes: R rank, I inputs of a layer, O outputs of a layer.

#: Layers whose factors are held at a time, of all checkpoints.
_CHUNK = 8

_PREFIX = "base_model.model."

#: As safetensors names them.
_DTYPES = {"BF16", "F16", "F32", "F64"}

#: Far beyond any alpha over rank, and squares of them are still numbers.
_SCALES = (1e-30, 1e30)


@dataclass(frozen=True, kw_only=True)
class Factors:
    """The factors of one layer at one checkpoint.

    Attributes:
        a_RI: In the dtype of the file.
        b_OR: The same, without the scale.
        scale: The factor of the update B A.
        noise_a_R: Expected square of the rounding errors in each row of A.
        noise_b_R: The same for each column of B.
    """

    a_RI: torch.Tensor
    b_OR: torch.Tensor
    scale: float
    noise_a_R: torch.Tensor
    noise_b_R: torch.Tensor


class LoraFile:
    """An adapter's tensors, read layer by layer.

    Args:
        folder: A PEFT folder.

    Raises:
        ModelError: If it is no plain LoRA adapter.
        CheckpointError: If it cannot be read, or its tensors are not pairs of factors.
    """

    def __init__(self, folder: Path) -> None:
        from peft import LoraConfig

        check_plain(folder, read_lora_config(folder))
        self.path = folder / ADAPTER_WEIGHTS
        try:
            self._config = LoraConfig.from_pretrained(str(folder))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"cannot read {folder}: {error}") from error
        with self._open() as file:
            tensors = set(file.keys())
            self.layers = sorted(name.removesuffix(".lora_A.weight") for name in tensors if ".lora_A." in name)
            slices = {name: file.get_slice(name) for name in tensors}
            self.dtypes = {str(part.get_dtype()) for part in slices.values()}
            self.shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
        if odd := sorted(tensors ^ {f"{layer}.lora_{part}.weight" for layer in self.layers for part in "AB"}):
            raise CheckpointError(f"{self.path} has tensors that are not LoRA pairs, for instance {odd[0]}")
        if not self.layers:
            raise CheckpointError(f"{self.path} holds no tensors")
        if unknown := sorted(self.dtypes - _DTYPES):
            known = ", ".join(sorted(_DTYPES))
            raise CheckpointError(f"{self.path} holds numbers of type {unknown[0]}; known are: {known}")
        for layer in self.layers:
            self._check_shapes(layer)
            self._scale(layer)

    def outer_shape(self, layer: str) -> tuple[int, int]:
        """Return the outputs and inputs of a layer: the shape of its update."""
        return self.shapes[f"{layer}.lora_B.weight"][0], self.shapes[f"{layer}.lora_A.weight"][1]

    def _check_shapes(self, layer: str) -> None:
        a, b = (self.shapes[f"{layer}.lora_{part}.weight"] for part in "AB")
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or 0 in a + b:
            raise CheckpointError(f"{self.path}: the factors of {layer} do not belong together")

    def _scale(self, layer: str) -> float:
        rank = self.shapes[f"{layer}.lora_A.weight"][0]
        try:
            scale = scale_of(self._config, layer.removeprefix(_PREFIX), rank=rank)
        except re.error as error:
            raise CheckpointError(f"{self.path.parent}: a layer's pattern is no regular expression: {error}") from error
        if not _SCALES[0] < scale < _SCALES[1]:
            raise CheckpointError(f"{self.path.parent}: lora_alpha scales {layer} by {scale:g}, which no training uses")
        return scale

    def read(self, layers: Sequence[str]) -> list[Factors]:
        """Return the factors of some layers; the file is closed again, so that its pages need not stay."""
        with self._open() as file:
            return [self._factors(file, layer) for layer in layers]

    def _factors(self, file: Any, layer: str) -> Factors:
        a_RI, b_OR = (file.get_tensor(f"{layer}.lora_{part}.weight") for part in "AB")
        return Factors(
            a_RI=a_RI,
            b_OR=b_OR,
            scale=self._scale(layer),
            noise_a_R=_rounding_noise(a_RI, dim=1),
            noise_b_R=_rounding_noise(b_OR, dim=0),
        )

    def _open(self) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(self.path, "pt")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read {self.path}: {error}; the adapter is damaged or incomplete") from error


def read_factors(files: Sequence[LoraFile], layers: Sequence[str]) -> Iterator[tuple[str, list[Factors]]]:
    """Yield each layer with its factors at every checkpoint, reading a few layers at a time."""
    for begin in range(0, len(layers), _CHUNK):
        chunk = layers[begin : begin + _CHUNK]
        by_file = [file.read(chunk) for file in files]
        for place, layer in enumerate(chunk):
            yield layer.removeprefix(_PREFIX), [factors[place] for factors in by_file]


#: For each dtype of a file, an integer of its size and the bits of the exponent.
_EXPONENTS = {
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
    torch.float32: (torch.int32, 0x7F800000),
    torch.float64: (torch.int64, 0x7FF0000000000000),
}


def _rounding_noise(values: torch.Tensor, *, dim: int) -> torch.Tensor:
    """Return the expected square of the rounding errors of a tensor's numbers, summed along a dimension, float64.

    An error is taken as uniform within the unit in the last place, which is eps times the power of two below a number:
    what its bits show where only the exponent is left.
    """
    integer, mask = _EXPONENTS[values.dtype]
    powers = (values.view(integer) & mask).view(values.dtype)
    wide = powers if powers.dtype == torch.float64 else powers.float()
    return wide.square().sum(dim=dim, dtype=torch.float64) * torch.finfo(values.dtype).eps ** 2 / 12
