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
from emtool.engines.composing import LoraUpdate, scale_of

# Shape suffixes: T checkpoints, R rank, I inputs of a layer, O outputs of a layer, C components.

#: All pairs of checkpoints are compared; more would take hours, and say no more.
MAX_CHECKPOINTS = 256

#: Principal components of the trajectory that are kept.
NUM_COMPONENTS = 3

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
    layers = {name: _layer_geometry(updates) for name, updates in _updates(files, names)}
    storage = sorted({dtype for file in files for dtype in file.dtypes})
    return _collect(steps, layers, storage)


@dataclass(frozen=True, kw_only=True)
class _Factors:
    """The factors of one layer at one checkpoint.

    Attributes:
        update: The update in float64, its scale folded into B.
        scale: That scale.
        noise: Expected square of what rounding changed in the update.
    """

    update: LoraUpdate
    scale: float
    noise: float


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
        if not (a_RI.isfinite().all() and b_OR.isfinite().all()):
            raise CheckpointError(f"{self.path}: the factors of {layer} are not finite")
        scale = scale_of(self._config, layer.removeprefix(_PREFIX), rank=a_RI.shape[0])
        noise = scale**2 * _product_noise(a_RI, b_OR)
        update = LoraUpdate(a_RI=a_RI.double(), b_OR=b_OR.double() * scale)
        return _Factors(update=update, scale=scale, noise=noise)

    def _open(self) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(self.path, "pt")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read {self.path}: {error}; the adapter is damaged or incomplete") from error


def _updates(files: Sequence[_AdapterFile], layers: Sequence[str]) -> Iterator[tuple[str, list[_Factors]]]:
    """Yield each layer with its factors at every checkpoint, reading a few layers at a time."""
    for begin in range(0, len(layers), _CHUNK):
        chunk = layers[begin : begin + _CHUNK]
        by_file = [file.read(chunk) for file in files]
        for place, layer in enumerate(chunk):
            yield layer.removeprefix(_PREFIX), [factors[place] for factors in by_file]


def _product_noise(a_RI: torch.Tensor, b_OR: torch.Tensor) -> float:
    """Return the expected square of the rounding error of B A, for factors rounded to the dtype that they have.

    Each element's error is taken as uniform within its unit in the last place, and independent of the others.
    """
    spread_a_RI, spread_b_OR = _rounding_variance(a_RI), _rounding_variance(b_OR)
    a_R, b_R = a_RI.double().square().sum(dim=1), b_OR.double().square().sum(dim=0)
    noise_a_R, noise_b_R = spread_a_RI.sum(dim=1), spread_b_OR.sum(dim=0)
    return float((noise_b_R * a_R + b_R * noise_a_R + noise_b_R * noise_a_R).sum())


def _rounding_variance(values: torch.Tensor) -> torch.Tensor:
    """Return the variance of each element's rounding error: that of a uniform one as wide as its unit."""
    _, exponents = torch.frexp(values.float())
    # frexp gives a mantissa of 0.5 to 1; eps is the unit of numbers from 1 to 2.
    units = torch.ldexp(torch.tensor(torch.finfo(values.dtype).eps, dtype=torch.float64), exponents.double() - 1)
    return torch.where(values == 0, 0.0, units.square() / 12)


def _layer_geometry(factors: Sequence[_Factors]) -> _Layer:
    updates = [one.update for one in factors]
    gram_TT = _gram(updates)
    spaces = [_column_space(update) for update in updates]
    final = spaces[-1].basis_OC
    return _Layer(
        gram_TT=gram_TT,
        a_T=_tensor(float(one.update.a_RI.square().sum()) for one in factors),
        b_T=_tensor(float(one.update.b_OR.square().sum()) / one.scale**2 for one in factors),
        noise_T=_tensor(one.noise for one in factors),
        rank_T=_tensor(space.effective_rank for space in spaces),
        final_T=_tensor(_mean_angle(space.basis_OC, final) for space in spaces),
        previous_T=_tensor([math.nan, *(_mean_angle(b.basis_OC, a.basis_OC) for a, b in itertools.pairwise(spaces))]),
        inside_T=_tensor(_square_within(update, final) for update in updates),
    )


def _gram(updates: Sequence[LoraUpdate]) -> torch.Tensor:
    """Return the inner products of all pairs of updates, shape (T, T)."""
    num = len(updates)
    gram_TT = torch.zeros(num, num, dtype=torch.float64)
    for row, update in enumerate(updates):
        others = updates[row:]
        ranks = [other.rank for other in others]
        b_products = (update.b_OR.T @ torch.cat([other.b_OR for other in others], dim=1)).split(ranks, dim=1)
        a_products = (update.a_RI @ torch.cat([other.a_RI for other in others]).T).split(ranks, dim=1)
        for column, (b_RR, a_RR) in enumerate(zip(b_products, a_products, strict=True), start=row):
            gram_TT[row, column] = gram_TT[column, row] = (b_RR * a_RR).sum()
    return gram_TT


@dataclass(frozen=True, kw_only=True)
class _ColumnSpace:
    """The column space of an update.

    Attributes:
        basis_OC: Orthonormal basis; no columns where the update is 0.
        effective_rank: Exponential of the entropy of the squared singular values' shares; NaN where the update is 0.
    """

    basis_OC: torch.Tensor
    effective_rank: float


def _column_space(update: LoraUpdate) -> _ColumnSpace:
    """Return the column space of an update, from decompositions of the size of its rank."""
    basis_OR, b_RR = torch.linalg.qr(update.b_OR)
    _, a_RR = torch.linalg.qr(update.a_RI.T)
    left_RC, values_C, _ = torch.linalg.svd(b_RR @ a_RR.T, full_matrices=False)
    largest = float(values_C[0]) if len(values_C) else 0.0
    tolerance = largest * max(update.b_OR.shape[0], update.a_RI.shape[1]) * torch.finfo(torch.float64).eps
    is_there_C = values_C > tolerance
    if not is_there_C.any():
        return _ColumnSpace(basis_OC=update.b_OR[:, :0], effective_rank=math.nan)
    shares_C = values_C[is_there_C].square()
    shares_C = shares_C / shares_C.sum()
    entropy = float(-(shares_C * shares_C.clamp(min=1e-300).log()).sum())
    return _ColumnSpace(basis_OC=basis_OR @ left_RC[:, is_there_C], effective_rank=math.exp(entropy))


def _mean_angle(one_OC: torch.Tensor, other_OC: torch.Tensor) -> float:
    """Return the mean principal angle between two column spaces in degrees, NaN where one is empty.

    Small angles are taken from their sines: the cosine of a tiny angle is 1 in floating point.
    """
    if not one_OC.shape[1] or not other_OC.shape[1]:
        return math.nan
    if one_OC.shape[1] < other_OC.shape[1]:
        one_OC, other_OC = other_OC, one_OC
    inner = one_OC.T @ other_OC
    cosines = torch.linalg.svdvals(inner).clamp(max=1.0)
    sines = torch.linalg.svdvals(other_OC - one_OC @ inner).clamp(max=1.0).flip(0)
    angles = torch.where(cosines.square() > 0.5, sines.asin(), cosines.acos())
    return float(angles.mean().rad2deg())


def _square_within(update: LoraUpdate, basis_OC: torch.Tensor) -> float:
    """Return the square of the part of an update that lies within a column space."""
    part = LoraUpdate(a_RI=update.a_RI, b_OR=basis_OC.T @ update.b_OR)
    return part.norm() ** 2


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
