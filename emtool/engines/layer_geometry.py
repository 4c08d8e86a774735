"""What one layer of an adapter adds to its geometry, from the inner products of its factors alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from emtool.core.errors import CheckpointError
from emtool.engines.lora_factors import Factors

# Shape suffixes: T checkpoints, R rank, P ranks of all checkpoints together, C dimensions of a column space.

#: Parts in which inner products are computed, of which the lower triangle is left out.
_BLOCKS = 5

#: Far above any square of an update's norm, and far below where sums over layers would leave float64.
_LARGEST = 1e200

#: Squared singular values below this share of the largest are rounding.
_TOLERANCE = 1e-13


@dataclass(frozen=True, kw_only=True)
class LayerGeometry:
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


class Buffers:
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


def layer_geometry(name: str, factors: Sequence[Factors], buffers: Buffers) -> LayerGeometry:
    """Return what one layer adds, from the inner products of its factors' rows and columns."""
    ranks = [one.a_RI.shape[0] for one in factors]
    a_PP = buffers.inner_products([one.a_RI for one in factors], [1.0] * len(factors))
    b_PP = buffers.inner_products([one.b_OR.T for one in factors], [one.scale for one in factors])
    is_of_TP = torch.eye(len(ranks), dtype=torch.float64).repeat_interleave(torch.tensor(ranks), dim=1)
    largest = a_PP.diagonal().max() * b_PP.diagonal().max()
    if not (a_PP.isfinite().all() and b_PP.isfinite().all() and largest < _LARGEST):
        raise CheckpointError(
            f"the factors of layer {name} are not finite at every checkpoint, or absurdly large; see: emtool verify"
        )
    products = _Products(
        a=[list(row.split(ranks, dim=1)) for row in a_PP.split(ranks)],
        b=[list(row.split(ranks, dim=1)) for row in b_PP.split(ranks)],
    )
    spaces = [_column_space(products.b[index][index], products.a[index][index]) for index in range(len(ranks))]
    last = len(ranks) - 1
    angles = [_mean_angle(products, spaces, index, last) for index in range(len(ranks))]
    steps = [_mean_angle(products, spaces, index, index - 1) for index in range(1, len(ranks))]
    return LayerGeometry(
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


def _product_noise(one: Factors, products: _Products, index: int) -> float:
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


def _tensor(values: Iterable[float]) -> torch.Tensor:
    return torch.tensor(list(values), dtype=torch.float64)
