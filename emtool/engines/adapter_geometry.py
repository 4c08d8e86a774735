"""How an adapter moves through a training, from its files alone: norms, speed, turns, subspaces.

A diagnostic of the weights, not of behaviour: published work finds that the two need not coincide (arXiv 2508.20015).
Updates W = B A are never built: inner products go through the factors, <B1 A1, B2 A2> = sum((B1' B2) * (A1 A2')), and
differences, angles and principal components follow from them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from emtool.core.errors import CheckpointError, ConfigError
from emtool.core.integrity import ADAPTER_WEIGHTS
from emtool.core.plain_lora import check_plain, read_lora_config
from emtool.engines.composing import scale_of

# Shape suffixes: T checkpoints, R rank, P ranks of all checkpoints together, I inputs of a layer, O outputs of a layer,
# C components.

#: All pairs of checkpoints are compared; more would take hours, and say no more.
MAX_CHECKPOINTS = 256

#: Principal components of the trajectory that are kept.
NUM_COMPONENTS = 3

#: Parts in which inner products are computed, of which the lower triangle is left out.
_BLOCKS = 5

#: Layers whose factors are held at a time, of all checkpoints.
_CHUNK = 8

_PREFIX = "base_model.model."


@dataclass(frozen=True, kw_only=True)
class StepGeometry:
    """One checkpoint of a trajectory. Lengths are Frobenius norms over all layers; angles are in degrees.

    Attributes:
        step: Optimizer step.
        a_norm: Norm of the factors A.
        b_norm: Norm of the factors B.
        update_norm: Norm of the update, the scaled product of B and A.
        noise: Norm of what rounding to the storage dtype may have changed in the update, as expected.
        change: Norm of the change of the update since the checkpoint before; None for the first.
        speed: The change by optimizer step.
        path_length: Sum of the changes so far.
        rotation: Angle between the change to this checkpoint and the one from it; None at the ends, and where one of
            them is 0.
        cosine_to_final: Cosine between this update and the last one; None where one is 0.
        effective_rank: Entropy rank of a layer's update, mean over the layers that have one.
        compression: Effective rank over that of the last checkpoint.
        angle_to_final: Principal angles between the column spaces of this update and the last one: mean over angles and
            layers.
        angle_to_previous: The same to the checkpoint before.
        share_in_final: Share of the update's square that lies within the column space of the last one.
        components: Coordinates on the first principal components of the trajectory.
    """

    step: int
    a_norm: float
    b_norm: float
    update_norm: float
    noise: float
    change: float | None
    speed: float | None
    path_length: float
    rotation: float | None
    cosine_to_final: float | None
    effective_rank: float | None
    compression: float | None
    angle_to_final: float | None
    angle_to_previous: float | None
    share_in_final: float | None
    components: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class AdapterGeometry:
    """The trajectory of an adapter.

    Attributes:
        steps: One entry a checkpoint, by step.
        explained: Share of the trajectory's variance along each of the first principal components.
        storage: Dtypes of the files.
        layer_norms: Layer to step to the norm of its update.
        layer_speeds: Layer to step to the norm of its change by optimizer step, without the first step.
    """

    steps: Sequence[StepGeometry]
    explained: Sequence[float]
    storage: Sequence[str]
    layer_norms: Mapping[str, Mapping[int, float]]
    layer_speeds: Mapping[str, Mapping[int, float]]


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """What one layer adds to the whole.

    Attributes:
        gram_TT: Inner products of its updates, float64.
        a_T: Squared norms of the factors A.
        b_T: Squared norms of the factors B.
        noise_T: Expected square of what rounding changed.
        rank_T: Effective rank; NaN where the update is 0.
        final_T: Mean principal angle to the last checkpoint; NaN where one is 0.
        previous_T: The same to the one before; NaN for the first.
        inside_T: Square of the part of the update within the column space of the last one.
    """

    gram_TT: torch.Tensor
    a_T: torch.Tensor
    b_T: torch.Tensor
    noise_T: torch.Tensor
    rank_T: torch.Tensor
    final_T: torch.Tensor
    previous_T: torch.Tensor
    inside_T: torch.Tensor


def adapter_geometry(folders: Mapping[int, Path]) -> AdapterGeometry:
    """Return the geometry of an adapter's checkpoints. No model is loaded, and no full matrix is built.

    Args:
        folders: Step to PEFT folder, all of one training.

    Raises:
        ConfigError: If there are fewer than two, or more than `MAX_CHECKPOINTS`.
        ModelError: If one is no plain LoRA adapter.
        CheckpointError: If one cannot be read, or the folders do not hold the same layers.

    Source: Frobenius inner products through the factors, as in arXiv 2506.11613 for rank 1; effective rank of Roy and
    Vetterli 2007 (EUSIPCO); principal angles of Bjorck and Golub 1973 (Mathematics of Computation 27).
    """
    if not 2 <= len(folders) <= MAX_CHECKPOINTS:
        raise ConfigError(
            f"geometry needs 2 to {MAX_CHECKPOINTS} checkpoints, and there are {len(folders)}; choose some with --steps"
        )
    steps = sorted(folders)
    files = [_AdapterFile(folders[step]) for step in steps]
    names = files[0].layers
    for file in files[1:]:
        if file.layers != names:
            raise CheckpointError(f"{file.path.parent} holds other layers than {files[0].path.parent}")
    buffers = _Buffers()
    layers = {name: _layer_geometry(name, factors, buffers) for name, factors in _factors(files, names)}
    storage = sorted({dtype for file in files for dtype in file.dtypes})
    return _collect(steps, layers, storage)


@dataclass(frozen=True, kw_only=True)
class _Factors:
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


class _AdapterFile:
    """An adapter's tensors, read layer by layer.

    Args:
        folder: A PEFT folder.

    Raises:
        ModelError: If it is no plain LoRA adapter.
        CheckpointError: If it cannot be read.
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
            self.dtypes = {str(file.get_slice(name).get_dtype()) for name in tensors}
        if odd := sorted(tensors ^ {f"{layer}.lora_{part}.weight" for layer in self.layers for part in "AB"}):
            raise CheckpointError(f"{self.path} has tensors that are not LoRA pairs, for instance {odd[0]}")

    def read(self, layers: Sequence[str]) -> list[_Factors]:
        """Return the factors of some layers; the file is closed again, so that its pages need not stay."""
        with self._open() as file:
            return [self._factors(file, layer) for layer in layers]

    def _factors(self, file: Any, layer: str) -> _Factors:
        a_RI, b_OR = (file.get_tensor(f"{layer}.lora_{part}.weight") for part in "AB")
        if a_RI.dim() != 2 or b_OR.dim() != 2 or a_RI.shape[0] != b_OR.shape[1]:
            raise CheckpointError(f"{self.path}: the factors of {layer} do not belong together")
        scale = scale_of(self._config, layer.removeprefix(_PREFIX), rank=a_RI.shape[0])
        return _Factors(
            a_RI=a_RI,
            b_OR=b_OR,
            scale=scale,
            noise_a_R=_rounding_noise(a_RI, dim=1),
            noise_b_R=_rounding_noise(b_OR, dim=0),
        )

    def _open(self) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(self.path, "pt")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read {self.path}: {error}; the adapter is damaged or incomplete") from error


def _factors(files: Sequence[_AdapterFile], layers: Sequence[str]) -> Iterator[tuple[str, list[_Factors]]]:
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
    return powers.float().square().sum(dim=dim, dtype=torch.float64) * torch.finfo(values.dtype).eps ** 2 / 12


class _Buffers:
    """Memory that layers of equal shape share: fresh memory costs more than what is done in it."""

    def __init__(self) -> None:
        self._by_shape: dict[tuple[int, int], torch.Tensor] = {}

    def inner_products(self, parts: Sequence[torch.Tensor], scales: Sequence[float]) -> torch.Tensor:
        """Return the inner products between all rows of some matrices, each matrix times its scale, in float64."""
        shape = (sum(len(part) for part in parts), parts[0].shape[1])
        if shape not in self._by_shape:
            self._by_shape[shape] = torch.empty(shape, dtype=torch.float64)
        rows = self._by_shape[shape]
        for place, part, scale in zip(rows.split([len(part) for part in parts]), parts, scales, strict=True):
            place.copy_(part).mul_(scale)
        products = torch.empty(shape[0], shape[0], dtype=torch.float64)
        # The other half is the same.
        size = -(-shape[0] // _BLOCKS)
        for begin in range(0, shape[0], size):
            products[begin : begin + size, begin:] = rows[begin : begin + size] @ rows[begin:].T
        return products.triu() + products.triu(1).T


def _layer_geometry(name: str, factors: Sequence[_Factors], buffers: _Buffers) -> _Layer:
    """Return what one layer adds, from the inner products of its factors' rows and columns."""
    ranks = [one.a_RI.shape[0] for one in factors]
    a_PP = buffers.inner_products([one.a_RI for one in factors], [1.0] * len(factors))
    b_PP = buffers.inner_products([one.b_OR.T for one in factors], [one.scale for one in factors])
    is_of_TP = torch.eye(len(ranks), dtype=torch.float64).repeat_interleave(torch.tensor(ranks), dim=1)
    if not (a_PP.diagonal().isfinite().all() and b_PP.diagonal().isfinite().all()):
        raise CheckpointError(f"the factors of layer {name} are not finite at every checkpoint; see: emtool verify")
    products = _Products(
        a=[list(row.split(ranks, dim=1)) for row in a_PP.split(ranks)],
        b=[list(row.split(ranks, dim=1)) for row in b_PP.split(ranks)],
    )
    spaces = [_column_space(products.b[index][index], products.a[index][index]) for index in range(len(ranks))]
    last = len(ranks) - 1
    angles = [_mean_angle(products, spaces, index, last) for index in range(len(ranks))]
    steps = [_mean_angle(products, spaces, index, index - 1) for index in range(1, len(ranks))]
    return _Layer(
        gram_TT=is_of_TP @ (a_PP * b_PP) @ is_of_TP.T,
        a_T=is_of_TP @ a_PP.diagonal(),
        b_T=is_of_TP @ b_PP.diagonal() / _tensor(one.scale**2 for one in factors),
        noise_T=_tensor(_product_noise(one, products, index) for index, one in enumerate(factors)),
        rank_T=_tensor(space.effective_rank for space in spaces),
        final_T=_tensor(angles),
        previous_T=_tensor([math.nan, *steps]),
        inside_T=_tensor(_square_within(products, spaces[last], index, last) for index in range(len(ranks))),
    )


@dataclass(frozen=True, kw_only=True)
class _Products:
    """Inner products between the factors of a layer at two checkpoints, by their indices.

    Attributes:
        a: A_i A_j', shape (R, R) each.
        b: B_i' B_j, scales folded in.
    """

    a: Sequence[Sequence[torch.Tensor]]
    b: Sequence[Sequence[torch.Tensor]]


def _product_noise(one: _Factors, products: _Products, index: int) -> float:
    """Return the expected square of what the rounding of its factors changes in an update."""
    a_R = products.a[index][index].diagonal()
    b_R = products.b[index][index].diagonal()
    noise_b_R = one.noise_b_R * one.scale**2
    return float((noise_b_R * a_R + b_R * one.noise_a_R + noise_b_R * one.noise_a_R).sum())


@dataclass(frozen=True, kw_only=True)
class _ColumnSpace:
    """The column space of an update B A.

    Attributes:
        basis_RC: B times it is an orthonormal basis; no columns where the update is 0.
        effective_rank: Exponential of the entropy of the squared singular values' shares; NaN where the update is 0.
    """

    basis_RC: torch.Tensor
    effective_rank: float


#: Squared singular values below this share of the largest are rounding.
_TOLERANCE = 1e-13


def _column_space(b_RR: torch.Tensor, a_RR: torch.Tensor) -> _ColumnSpace:
    """Return the column space of B A from B'B and A A', by two decompositions of the size of the rank."""
    squares_C, vectors_RC = _positive_part(b_RR)
    half_RC = vectors_RC * squares_C.sqrt()
    values_C, turns_CC = _positive_part(half_RC.T @ a_RR @ half_RC)
    if not len(values_C):
        return _ColumnSpace(basis_RC=b_RR[:, :0], effective_rank=math.nan)
    shares_C = values_C / values_C.sum()
    entropy = float(-(shares_C * shares_C.log()).sum())
    return _ColumnSpace(basis_RC=vectors_RC / squares_C.sqrt() @ turns_CC, effective_rank=math.exp(entropy))


def _positive_part(symmetric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the eigenvalues of a matrix that has none below 0, without those that are 0, and their vectors."""
    if not len(symmetric):
        return symmetric.diagonal(), symmetric
    values_C, vectors_RC = torch.linalg.eigh((symmetric + symmetric.T) / 2)
    is_there_C = values_C > _TOLERANCE * values_C[-1].clamp(min=0)
    return values_C[is_there_C], vectors_RC[:, is_there_C]


def _mean_angle(products: _Products, spaces: Sequence[_ColumnSpace], one: int, other: int) -> float:
    """Return the mean principal angle between two updates' column spaces in degrees, NaN where one is empty."""
    inner = spaces[one].basis_RC.T @ products.b[one][other] @ spaces[other].basis_RC
    if 0 in inner.shape:
        return math.nan
    if one == other:
        return 0.0
    return float(torch.linalg.svdvals(inner).clamp(max=1.0).acos().mean().rad2deg())


def _square_within(products: _Products, space: _ColumnSpace, index: int, of: int) -> float:
    """Return the square of the part of an update that lies within the column space of another."""
    part_CR = space.basis_RC.T @ products.b[of][index]
    return float(((part_CR @ products.a[index][index]) * part_CR).sum())


def _collect(steps: Sequence[int], layers: Mapping[str, _Layer], storage: Sequence[str]) -> AdapterGeometry:
    """Return the geometry of all layers together."""
    gram_TT = _sum(layer.gram_TT for layer in layers.values())
    squares_T, changes_T = gram_TT.diagonal(), _change_norms(gram_TT)
    gaps_T = torch.tensor([later - earlier for earlier, later in itertools.pairwise(steps)])
    coordinates_TC, explained_C = _principal_components(gram_TT)
    ranks = [_mean_of(layer.rank_T[index] for layer in layers.values()) for index in range(len(steps))]
    a_T, b_T, noise_T = (_sum(getattr(layer, name) for layer in layers.values()) for name in ("a_T", "b_T", "noise_T"))
    inside_T = _sum(layer.inside_T for layer in layers.values())
    path_T = torch.cat([torch.zeros(1, dtype=torch.float64), changes_T.cumsum(0)])
    entries = [
        StepGeometry(
            step=step,
            a_norm=math.sqrt(a_T[index]),
            b_norm=math.sqrt(b_T[index]),
            update_norm=math.sqrt(squares_T[index]),
            noise=math.sqrt(noise_T[index]),
            change=float(changes_T[index - 1]) if index else None,
            speed=float(changes_T[index - 1] / gaps_T[index - 1]) if index else None,
            path_length=float(path_T[index]),
            rotation=_rotation(gram_TT, index),
            cosine_to_final=_cosine(gram_TT, index),
            effective_rank=ranks[index],
            compression=_ratio(ranks[index], ranks[-1]),
            angle_to_final=_mean_of(layer.final_T[index] for layer in layers.values()),
            angle_to_previous=_mean_of(layer.previous_T[index] for layer in layers.values()),
            share_in_final=_ratio(float(inside_T[index]), float(squares_T[index])),
            components=coordinates_TC[index].tolist(),
        )
        for index, step in enumerate(steps)
    ]
    return AdapterGeometry(
        steps=entries,
        explained=explained_C.tolist(),
        storage=storage,
        layer_norms={
            name: dict(zip(steps, layer.gram_TT.diagonal().clamp(min=0).sqrt().tolist(), strict=True))
            for name, layer in layers.items()
        },
        layer_speeds={
            name: dict(zip(steps[1:], (_change_norms(layer.gram_TT) / gaps_T).tolist(), strict=True))
            for name, layer in layers.items()
        },
    )


def _change_norms(gram_TT: torch.Tensor) -> torch.Tensor:
    """Return the norm of each change from one checkpoint to the next, shape (T - 1,)."""
    squares_T = gram_TT.diagonal()
    return (squares_T[1:] + squares_T[:-1] - 2 * gram_TT.diagonal(1)).clamp(min=0).sqrt()


def _rotation(gram_TT: torch.Tensor, index: int) -> float | None:
    """Return the angle between the change to a checkpoint and the one from it, in degrees."""
    if not 0 < index < len(gram_TT) - 1:
        return None
    before, here, after = index - 1, index, index + 1
    inner = gram_TT[here, after] - gram_TT[here, here] - gram_TT[before, after] + gram_TT[before, here]
    lengths = _change_norms(gram_TT)[before] * _change_norms(gram_TT)[here]
    return None if lengths == 0 else math.degrees(math.acos(max(-1.0, min(1.0, float(inner / lengths)))))


def _cosine(gram_TT: torch.Tensor, index: int) -> float | None:
    lengths = (gram_TT[index, index] * gram_TT[-1, -1]).clamp(min=0).sqrt()
    return None if lengths == 0 else float((gram_TT[index, -1] / lengths).clamp(-1, 1))


def _principal_components(gram_TT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return coordinates (T, C) and explained shares (C,) of the trajectory, from its inner products alone.

    Each component points to where the last checkpoint is.
    """
    num = len(gram_TT)
    centre_TT = torch.eye(num, dtype=torch.float64) - 1 / num
    values_T, vectors_TT = torch.linalg.eigh(centre_TT @ gram_TT @ centre_TT)
    order = values_T.argsort(descending=True)[: min(NUM_COMPONENTS, num - 1)]
    kept_C = values_T[order].clamp(min=0)
    coordinates_TC = vectors_TT[:, order] * kept_C.sqrt()
    total = values_T.clamp(min=0).sum()
    signs_C = torch.where(coordinates_TC[-1] < 0, -1.0, 1.0)
    return coordinates_TC * signs_C, kept_C / total if total > 0 else kept_C


def _tensor(values: Any) -> torch.Tensor:
    return torch.tensor(list(values), dtype=torch.float64)


def _sum(tensors: Any) -> torch.Tensor:
    return torch.stack(list(tensors)).sum(dim=0)


def _mean_of(values: Any) -> float | None:
    """Return the mean of the values that are numbers, None where none is."""
    kept = [float(value) for value in values if not math.isnan(value)]
    return math.fsum(kept) / len(kept) if kept else None


def _ratio(value: float | None, of: float | None) -> float | None:
    return None if value is None or not of else value / of
