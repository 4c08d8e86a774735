"""Two LoRA adapters as one: persona and trained adapter concatenated, for programs that know the bare base only.

The sum of two low-rank updates is a low-rank update of the summed rank: s1 B1 A1 + s2 B2 A2 = [s1 B1, s2 B2] [A1; A2].
The scales are folded into B, so that the result is plain LoRA with scale 1, and layers of a smaller rank are filled up
with zeros to one rank for all.

PEFT's `add_weighted_adapter(combination_type="cat")` is not used: it scales by `lora_alpha / r` of the first adapter,
which is another number where that one has rsLoRA.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from emtool.core.errors import CheckpointError, ModelError
from emtool.core.integrity import ADAPTER_WEIGHTS
from emtool.core.plain_lora import check_plain, read_lora_config

# Shape suffixes: R rank, I inputs of a layer, O outputs of a layer.

_PREFIX = "base_model.model."


@dataclass(frozen=True, kw_only=True)
class LoraUpdate:
    """The update of one layer: its weight grows by `b_OR @ a_RI`.

    Attributes:
        a_RI: Float32.
        b_OR: Float32, the scale folded in.
    """

    a_RI: torch.Tensor
    b_OR: torch.Tensor

    @property
    def rank(self) -> int:
        """Return the rank."""
        return self.a_RI.shape[0]

    def norm(self) -> float:
        """Return the Frobenius norm of the update, computed through the factors in float64."""
        a_RI, b_OR = self.a_RI.double(), self.b_OR.double()
        squared = ((a_RI @ a_RI.T) * (b_OR.T @ b_OR)).sum()
        return float(squared.clamp(min=0).sqrt())

    def minus(self, other: LoraUpdate) -> LoraUpdate:
        """Return the difference of two updates, as an update."""
        return LoraUpdate(a_RI=torch.cat([self.a_RI, other.a_RI]), b_OR=torch.cat([self.b_OR, -other.b_OR], dim=1))

    def cast(self, dtype: torch.dtype) -> LoraUpdate:
        """Return what is left of the update when its factors are stored in a dtype."""
        return LoraUpdate(a_RI=self.a_RI.to(dtype).float(), b_OR=self.b_OR.to(dtype).float())


def read_updates(folder: Path, linear: Container[str]) -> dict[str, LoraUpdate]:
    """Return the update of each layer that a PEFT folder holds, by the layer's name in the base model.

    Args:
        folder: The folder.
        linear: Names of the base model's linear layers. PEFT also loads adapters whose layers have the names of older
            versions of a model; these cannot be composed by name.

    Raises:
        ModelError: If it is not plain LoRA, or of layers that the base does not have.
        CheckpointError: If its weights cannot be read or are not the pairs that its configuration promises.
    """
    from peft import LoraConfig
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / ADAPTER_WEIGHTS
    _check_kind(folder)
    try:
        config = LoraConfig.from_pretrained(str(folder))
        tensors = load_file(path)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; the adapter is damaged or incomplete") from error
    layers = {name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")}
    expected = {f"{layer}.lora_{part}.weight" for layer in layers for part in "AB"}
    if odd := sorted(tensors.keys() ^ expected):
        raise CheckpointError(f"{path} has tensors that are not LoRA pairs, for instance {odd[0]}")
    updates = {}
    for layer in sorted(layers):
        name = layer.removeprefix(_PREFIX)
        if name not in linear:
            raise ModelError(f"{path} has the layer {name}, which the base model does not know by that name")
        a_RI, b_OR = (tensors[f"{layer}.lora_{part}.weight"].float() for part in "AB")
        if a_RI.dim() != 2 or b_OR.dim() != 2 or a_RI.shape[0] != b_OR.shape[1]:
            raise CheckpointError(f"{path}: the factors of {name} do not belong together")
        updates[name] = LoraUpdate(a_RI=a_RI, b_OR=b_OR * scale_of(config, name, rank=a_RI.shape[0]))
    return updates


def _check_kind(folder: Path) -> None:
    config = read_lora_config(folder)
    check_plain(folder, config)


def scale_of(config: Any, layer: str, *, rank: int) -> float:
    """Return the factor by which PEFT multiplies the update of a layer.

    Args:
        config: The adapter's `LoraConfig`.
        layer: The layer's name in the base model.
        rank: Its rank.

    Source: peft, tuners/lora/layer.py, `update_layer`: alpha / r, and alpha / sqrt(r) with rsLoRA (arXiv 2312.03732).
    """
    from peft.utils.other import get_pattern_key

    key = get_pattern_key(config.alpha_pattern.keys(), layer)
    alpha: float = config.alpha_pattern.get(key, config.lora_alpha)
    return alpha / (rank**0.5 if config.use_rslora else rank)


def compose_updates(parts: Sequence[Mapping[str, LoraUpdate]]) -> dict[str, LoraUpdate]:
    """Return the sum of several adapters as one, with the same rank in every layer.

    Args:
        parts: Adapters for the same base model; a layer may be in some of them only.

    Raises:
        ModelError: If two of them disagree about a layer's shape.
    """
    rank = sum(max((update.rank for update in part.values()), default=0) for part in parts)
    composed = {}
    for name in sorted({name for part in parts for name in part}):
        updates = [part[name] for part in parts if name in part]
        shapes = {(update.b_OR.shape[0], update.a_RI.shape[1]) for update in updates}
        if len(shapes) > 1:
            raise ModelError(f"the adapters belong to different base models: {name} has the shapes {sorted(shapes)}")
        (num_outputs, num_inputs) = shapes.pop()
        a_RI, b_OR = torch.zeros(rank, num_inputs), torch.zeros(num_outputs, rank)
        begin = 0
        for update in updates:
            end = begin + update.rank
            a_RI[begin:end], b_OR[:, begin:end] = update.a_RI, update.b_OR
            begin = end
        composed[name] = LoraUpdate(a_RI=a_RI, b_OR=b_OR)
    return composed


def peft_tensors(updates: Mapping[str, LoraUpdate], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return an adapter's tensors under the names that PEFT saves."""
    return {
        f"{_PREFIX}{name}.lora_{part}.weight": factor.to(dtype)
        for name, update in updates.items()
        for part, factor in (("A", update.a_RI), ("B", update.b_OR))
    }


def rounding_error(updates: Mapping[str, LoraUpdate], dtype: torch.dtype) -> float:
    """Return the largest relative error that storing the factors in a dtype causes in any layer's update.

    Frobenius norm of the difference over that of the update; layers without an update are left out.
    """
    errors = [
        update.minus(update.cast(dtype)).norm() / norm for update in updates.values() if (norm := update.norm()) > 0
    ]
    return max(errors, default=0.0)
