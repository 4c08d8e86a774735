"""A direction from sound to wrong in a model's activations, and how far checkpoints move along it.

Fitted on one half of the items and applied to the other: what is projected was not fitted on. Every checkpoint is
projected over the same texts, so a difference between checkpoints is one of the model and not of what it read.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from emtool.core.errors import DataError
from emtool.core.metrics import LEVEL, Estimate
from emtool.core.resampling import Resamples

# Shape suffixes: N texts, U units (items or questions), L layers, D hidden size, C control directions.

#: Directions of each kind of control: their 95% range has 2.5 of them beyond either end.
NUM_CONTROLS = 100


@dataclass(frozen=True, kw_only=True)
class LabelledTexts:
    """Mean activations over texts, each sound or wrong.

    Attributes:
        means_NLD: Mean over each text's tokens, float32.
        is_wrong: Whether each text is wrong, or misaligned.
        units: The item or question of each text; texts of one unit are fitted on together or not at all.
    """

    means_NLD: torch.Tensor
    is_wrong: Sequence[bool]
    units: Sequence[str]

    def only(self, units: Collection[str]) -> LabelledTexts:
        """Return the texts of some units."""
        kept = [index for index, unit in enumerate(self.units) if unit in units]
        return LabelledTexts(
            means_NLD=self.means_NLD[kept],
            is_wrong=[self.is_wrong[index] for index in kept],
            units=[self.units[index] for index in kept],
        )

    def by_unit(self, values_NX: torch.Tensor) -> tuple[list[str], torch.Tensor]:
        """Return the units in order, and the mean of each one's values, shape (U, X), float64."""
        names = sorted(set(self.units))
        places = {name: place for place, name in enumerate(names)}
        places_N = torch.tensor([places[unit] for unit in self.units])
        sums_UX = torch.zeros(len(names), values_NX.shape[1], dtype=torch.float64)
        sums_UX.index_add_(0, places_N, values_NX.double())
        return names, sums_UX / places_N.bincount(minlength=len(names)).unsqueeze(1)

    def kinds(self) -> dict[str, frozenset[bool]]:
        """Return whether each unit has wrong texts, sound ones, or both."""
        found: dict[str, set[bool]] = {}
        for unit, is_wrong in zip(self.units, self.is_wrong, strict=True):
            found.setdefault(unit, set()).add(is_wrong)
        return {unit: frozenset(kinds) for unit, kinds in found.items()}

    def difference(self) -> torch.Tensor | None:
        """Return the mean of the wrong texts less that of the sound ones, float64; None where one kind is missing."""
        wrong_N = torch.tensor(self.is_wrong, dtype=torch.bool)
        if wrong_N.all() or not wrong_N.any():
            return None
        means_NLD = self.means_NLD.double()
        return means_NLD[wrong_N].mean(dim=0) - means_NLD[~wrong_N].mean(dim=0)


@dataclass(frozen=True, kw_only=True)
class Direction:
    """A direction for each layer, from sound to wrong.

    Attributes:
        vectors_LD: Of unit length, float32.
        shuffled_CLD: The same, fitted with the labels of whole units drawn at random.
        layers: Decoder blocks by index, 0 is the first.
        best_layer: The layer in which wrong and sound texts are told apart best, by cross-validation within the half
            that was fitted on, of those that training can change.
        fit_units: Items or questions that were fitted on; they are never projected.
        settings: What else shaped it: JSON values.
    """

    vectors_LD: torch.Tensor
    shuffled_CLD: torch.Tensor
    layers: Sequence[int]
    best_layer: int
    fit_units: Sequence[str]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return what the direction is, without its vectors, as JSON values."""
        return {
            "layers": list(self.layers),
            "best_layer": self.best_layer,
            "fit_units": list(self.fit_units),
            "settings": dict(self.settings),
        }


def fit_direction(
    texts: LabelledTexts,
    *,
    layers: Sequence[int],
    seed: int,
    first_layer: int = 0,
    settings: Mapping[str, Any] | None = None,
) -> Direction:
    """Return the difference of means between wrong and sound texts, of unit length, from a random half of the units.

    The half is one of the units with wrong texts, of those with sound texts, and of those with both.

    Args:
        texts: Texts of one checkpoint.
        layers: What the second dimension of their means is.
        seed: Seed of the halves and of the shuffled labels.
        first_layer: The first layer that may be the best one: before the first block with an adapter, training changes
            nothing.
        settings: What else shaped it, kept with the direction.

    Raises:
        DataError: If there are too few texts of a kind, or they do not differ.

    Source: difference in means as in Marks and Tegmark 2023 (arXiv 2310.06824) and Soligo et al. 2025 (arXiv
    2506.11618).
    """
    generator = torch.Generator().manual_seed(seed)
    fit_units = _half(texts, generator)
    fitted = texts.only(set(fit_units))
    num_units = {is_wrong: sum(is_wrong in kinds for kinds in fitted.kinds().values()) for is_wrong in (True, False)}
    difference_LD = fitted.difference()
    if difference_LD is None or min(num_units.values()) < 2:
        raise DataError(
            f"the half to fit a direction on has wrong texts of {num_units[True]} and sound texts of "
            f"{num_units[False]} items or questions; at least 2 of each are needed"
        )
    if not difference_LD.isfinite().all() or (difference_LD.norm(dim=1) == 0).any():
        raise DataError("wrong and sound texts have the same mean activations in a layer, or one that is not finite")
    shuffled_CLD = _shuffled(fitted, generator)
    if not shuffled_CLD.isfinite().all():
        raise DataError("labels drawn at random leave no difference between wrong and sound texts: they are too alike")
    return Direction(
        vectors_LD=_unit(difference_LD).float(),
        shuffled_CLD=shuffled_CLD,
        layers=list(layers),
        best_layer=_best_layer(_told_apart(fitted, fit_units), layers, first_layer),
        fit_units=fit_units,
        settings={
            "seed": seed,
            "num_wrong": sum(fitted.is_wrong),
            "num_sound": len(fitted.is_wrong) - sum(fitted.is_wrong),
            **(settings or {}),
        },
    )


def _half(texts: LabelledTexts, generator: torch.Generator) -> list[str]:
    kinds = texts.kinds()
    names = sorted(kinds)
    groups: dict[frozenset[bool], list[str]] = {}
    for index in torch.randperm(len(names), generator=generator).tolist():
        groups.setdefault(kinds[names[index]], []).append(names[index])
    return sorted(unit for group in groups.values() for unit in group[: (len(group) + 1) // 2])


def _best_layer(told_apart_L: torch.Tensor, layers: Sequence[int], first_layer: int) -> int:
    """Return the layer in which texts are told apart best, of those that training can change, if any is there."""
    places = [place for place, layer in enumerate(layers) if layer >= first_layer] or range(len(layers))
    return layers[max(places, key=lambda place: float(told_apart_L[place]))]


def _unit(vectors_LD: torch.Tensor) -> torch.Tensor:
    unit_LD: torch.Tensor = vectors_LD / vectors_LD.norm(dim=-1, keepdim=True)
    return unit_LD


def _shuffled(texts: LabelledTexts, generator: torch.Generator) -> torch.Tensor:
    """Return directions fitted with labels drawn at random, shape (C, L, D).

    The labels of each unit are put in random order, and those of all units, one after another, dealt to the units'
    texts in another order of units. So a unit has about as many wrong texts as some unit has; of units with one text of
    each kind, the two labels change places or stay.
    """
    names = sorted(set(texts.units))
    places_N = torch.tensor([names.index(unit) for unit in texts.units])
    wrong_N = torch.tensor(texts.is_wrong, dtype=torch.bool)
    labels_CN = torch.empty(NUM_CONTROLS, len(wrong_N), dtype=torch.bool)
    for labels_N in labels_CN:
        mixed_N = torch.randperm(len(wrong_N), generator=generator)
        by_unit_N = mixed_N[places_N[mixed_N].argsort(stable=True)]
        order_U = torch.randperm(len(names), generator=generator)
        labels_N[order_U[places_N].argsort(stable=True)] = wrong_N[by_unit_N]
    weights_CN = labels_CN / labels_CN.sum(dim=1, keepdim=True) - ~labels_CN / (~labels_CN).sum(dim=1, keepdim=True)
    differences_CLD = torch.einsum("cn,nld->cld", weights_CN.double(), texts.means_NLD.double())
    return _unit(differences_CLD).float()


def _told_apart(texts: LabelledTexts, units: Sequence[str]) -> torch.Tensor:
    """Return, for each layer, how far apart wrong and sound texts are along directions fitted without their unit.

    Returns:
        Difference of the means over the pooled standard deviation, shape (L,).
    """
    scores_LN: list[torch.Tensor] = []
    labels: list[bool] = []
    for unit in units:
        difference_LD = texts.only(set(units) - {unit}).difference()
        assert difference_LD is not None, "at least two units have texts of each kind"
        left_out = texts.only({unit})
        scores_LN.append(torch.einsum("nld,ld->ln", left_out.means_NLD.double(), _unit(difference_LD)))
        labels += left_out.is_wrong
    wrong_N = torch.tensor(labels, dtype=torch.bool)
    all_LN = torch.cat(scores_LN, dim=1)
    wrong_LN, sound_LN = all_LN[:, wrong_N], all_LN[:, ~wrong_N]
    spread_L = ((_variance(wrong_LN) + _variance(sound_LN)) / 2).sqrt()
    gap_L = wrong_LN.mean(dim=1) - sound_LN.mean(dim=1)
    return torch.nan_to_num(gap_L / spread_L.clamp(min=1e-12), nan=-math.inf)


def _variance(values_LN: torch.Tensor) -> torch.Tensor:
    return values_LN.var(dim=1, correction=0)


@dataclass(frozen=True, kw_only=True)
class LayerProjection:
    """One checkpoint's texts along the direction of one layer, over units that were not fitted on.

    Attributes:
        level: Mean over units of their texts' projections, in the units of the activations.
        drift: Mean over units of the change of that since step 0; None without step 0.
        separation: Mean over units of wrong less sound texts; None where no unit has both.
        cosine_to_previous: Cosine between the mean activations here and at the checkpoint before; None for the first.
        cosine_to_direction: Cosine between the change of the mean activations since step 0 and the direction: which
            part of all movement goes along it; None without movement.
        random_range: 95% range of the drift along random directions of the same length.
        shuffled_range: The same along directions that were fitted with shuffled labels.
        units: Unit to the mean of its projections.
    """

    level: Estimate
    drift: Estimate | None
    separation: Estimate | None
    cosine_to_previous: float | None
    cosine_to_direction: float | None
    random_range: tuple[float, float] | None
    shuffled_range: tuple[float, float] | None
    units: Mapping[str, float]

    @property
    def is_beyond_controls(self) -> bool:
        """Return whether the drift lies outside of what either kind of control direction shows."""
        ranges = [one for one in (self.random_range, self.shuffled_range) if one is not None]
        return self.drift is not None and all(not low <= self.drift.value <= high for low, high in ranges)


def project(
    direction: Direction, checkpoints: Mapping[int, LabelledTexts], *, seed: int
) -> dict[int, dict[int, LayerProjection]]:
    """Return the projections of every checkpoint, by step and layer.

    Args:
        direction: The direction.
        checkpoints: Step to the texts there: the same texts at every step, and the direction's layers. Units that the
            direction was fitted on are left out.
        seed: Seed of the bootstrap over units, and of the random directions.

    Raises:
        DataError: If no text is left, or the checkpoints have other texts.
    """
    kept = {step: _held_out(direction, texts) for step, texts in sorted(checkpoints.items())}
    first = next(iter(kept.values()))
    if not first.units:
        raise DataError("the direction was fitted on every item that there are activations of")
    if any((texts.units, texts.is_wrong) != (first.units, first.is_wrong) for texts in kept.values()):
        raise DataError("the checkpoints have activations over different texts; only equal texts can be compared")
    random_CLD = _random_directions(direction, seed)
    found: dict[int, dict[int, LayerProjection]] = {}
    previous: LabelledTexts | None = None
    for step, texts in kept.items():
        found[step] = _project_checkpoint(direction, texts, kept.get(0), previous, random_CLD=random_CLD, seed=seed)
        previous = texts
    return found


def _held_out(direction: Direction, texts: LabelledTexts) -> LabelledTexts:
    if texts.means_NLD.shape[1:] != direction.vectors_LD.shape:
        raise DataError(
            f"the direction has {tuple(direction.vectors_LD.shape)} layers and dimensions, the activations "
            f"{tuple(texts.means_NLD.shape[1:])}: another model, or other layers"
        )
    return texts.only(set(texts.units) - set(direction.fit_units))


def _random_directions(direction: Direction, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return _unit(torch.randn(NUM_CONTROLS, *direction.vectors_LD.shape, generator=generator))


def _project_checkpoint(
    direction: Direction,
    texts: LabelledTexts,
    start: LabelledTexts | None,
    previous: LabelledTexts | None,
    *,
    random_CLD: torch.Tensor,
    seed: int,
) -> dict[int, LayerProjection]:
    vectors_LD = direction.vectors_LD.double()
    levels_NL = torch.einsum("nld,ld->nl", texts.means_NLD.double(), vectors_LD)
    units, levels_UL = texts.by_unit(levels_NL)
    columns = {f"level {place}": levels_UL[:, place].tolist() for place in range(len(vectors_LD))}
    shift_LD = None
    if start is not None:
        _, drifts_UL = texts.by_unit(levels_NL - torch.einsum("nld,ld->nl", start.means_NLD.double(), vectors_LD))
        columns |= {f"drift {place}": drifts_UL[:, place].tolist() for place in range(len(vectors_LD))}
        shift_LD = _unit_mean(texts) - _unit_mean(start)
    estimates = Resamples(units, seed).means(columns)
    separations = _separations(texts, levels_NL, seed)
    here_LD, before_LD = _unit_mean(texts), None if previous is None else _unit_mean(previous)
    found = {}
    for place, layer in enumerate(direction.layers):
        shift_D = None if shift_LD is None else shift_LD[place]
        found[layer] = LayerProjection(
            level=estimates[f"level {place}"],
            drift=estimates.get(f"drift {place}"),
            separation=separations.get(place),
            cosine_to_previous=None if before_LD is None else _cosine(here_LD[place], before_LD[place]),
            cosine_to_direction=None if shift_D is None else _cosine(shift_D, vectors_LD[place]),
            random_range=_range(random_CLD[:, place], shift_D),
            shuffled_range=_range(direction.shuffled_CLD[:, place], shift_D),
            units=dict(zip(units, levels_UL[:, place].tolist(), strict=True)),
        )
    return found


def _unit_mean(texts: LabelledTexts) -> torch.Tensor:
    """Return the mean activations over all units, shape (L, D), float64."""
    _, means_UX = texts.by_unit(texts.means_NLD.flatten(1))
    return means_UX.mean(dim=0).view(texts.means_NLD.shape[1:])


def _separations(texts: LabelledTexts, levels_NL: torch.Tensor, seed: int) -> dict[int, Estimate]:
    """Return, by place of the layer, the mean over units of their wrong texts less their sound ones."""
    rows: dict[str, dict[bool, list[int]]] = {}
    for index, unit in enumerate(texts.units):
        rows.setdefault(unit, {True: [], False: []})[texts.is_wrong[index]].append(index)
    pairs = {unit: kinds for unit, kinds in rows.items() if kinds[True] and kinds[False]}
    if not pairs:
        return {}
    gaps_UL = torch.stack([levels_NL[k[True]].mean(dim=0) - levels_NL[k[False]].mean(dim=0) for k in pairs.values()])
    columns = {str(place): gaps_UL[:, place].tolist() for place in range(gaps_UL.shape[1])}
    return {int(place): found for place, found in Resamples(list(pairs), seed).means(columns).items()}


def _range(controls_CD: torch.Tensor, shift_D: torch.Tensor | None) -> tuple[float, float] | None:
    """Return the 95% range of a shift along control directions."""
    if shift_D is None:
        return None
    drifts_C = controls_CD.double() @ shift_D
    low, high = drifts_C.quantile(torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)).tolist()
    return low, high


def _cosine(one_D: torch.Tensor, other_D: torch.Tensor) -> float | None:
    lengths = one_D.norm() * other_D.norm()
    return None if lengths == 0 else float((one_D @ other_D / lengths).clamp(-1, 1))
