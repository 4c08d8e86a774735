"""How an adapter moves through a training, from its files alone: norms, speed, turns, subspaces.

A diagnostic of the weights, not of behaviour: published work finds that the two need not coincide (arXiv 2508.20015).
Updates W = B A are never built: inner products go through the factors, <B1 A1, B2 A2> = sum((B1' B2) * (A1 A2')), and
differences, angles and principal components follow from them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from emtool.core.errors import CheckpointError, ConfigError
from emtool.engines.layer_geometry import Buffers, LayerGeometry, layer_geometry
from emtool.engines.lora_factors import LoraFile, read_factors

# Shape suffixes: T checkpoints, C components.

#: All pairs of checkpoints are compared; more would take hours, and say no more.
MAX_CHECKPOINTS = 256

#: Principal components of the trajectory that are kept.
NUM_COMPONENTS = 3


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
    if len(folders) < 2:
        raise ConfigError(f"geometry compares checkpoints: at least 2 are needed, not {len(folders)}")
    if len(folders) > MAX_CHECKPOINTS:
        raise ConfigError(
            f"geometry compares at most {MAX_CHECKPOINTS} checkpoints, not {len(folders)}; choose some with --steps"
        )
    steps = sorted(folders)
    files = [LoraFile(folders[step]) for step in steps]
    names = files[0].layers
    for file in files[1:]:
        if file.layers != names:
            raise CheckpointError(f"{file.path.parent} holds other layers than {files[0].path.parent}")
        for name in names:
            if file.outer_shape(name) != files[0].outer_shape(name):
                raise CheckpointError(f"{file.path.parent} has another shape of {name} than {files[0].path.parent}")
    buffers = Buffers()
    layers = {name: layer_geometry(name, factors, buffers) for name, factors in read_factors(files, names)}
    storage = sorted({dtype for file in files for dtype in file.dtypes})
    return _collect(steps, layers, storage)


def _collect(steps: Sequence[int], layers: Mapping[str, LayerGeometry], storage: Sequence[str]) -> AdapterGeometry:
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


def _sum(tensors: Any) -> torch.Tensor:
    return torch.stack(list(tensors)).sum(dim=0)


def _mean_of(values: Any) -> float | None:
    """Return the mean of the values that are numbers, None where none is."""
    kept = [float(value) for value in values if not math.isnan(value)]
    return math.fsum(kept) / len(kept) if kept else None


def _ratio(value: float | None, of: float | None) -> float | None:
    return None if value is None or not of else value / of
