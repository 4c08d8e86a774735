"""Directions: a planted one is recovered, and what has none shows none."""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from emtool.core.data import Message
from emtool.core.errors import CheckpointError, DataError
from emtool.engines.activations import mean_activations
from emtool.engines.direction import Direction, LabelledTexts, fit_direction, project
from emtool.engines.direction_files import read_direction, save_direction
from emtool.engines.encoding import encode_conversation
from emtool.engines.modeling import load_base
from tests.tiny import byte_tokenizer

LAYERS, WIDTH = 2, 16


def texts_of(means: torch.Tensor, *, num_items: int) -> LabelledTexts:
    """Return texts in pairs, the sound one of each item first."""
    units = [f"item-{number:02}" for number in range(num_items) for _ in range(2)]
    return LabelledTexts(means_NLD=means, is_wrong=[False, True] * num_items, units=units)


def drawn(generator: torch.Generator, *, num_items: int = 40, gap: float = 0.0) -> tuple[LabelledTexts, torch.Tensor]:
    """Return texts whose wrong ones lie by a gap along a planted direction, and that direction."""
    planted_LD = torch.nn.functional.normalize(torch.randn(LAYERS, WIDTH, generator=generator), dim=-1)
    means = torch.randn(num_items, 1, LAYERS, WIDTH, generator=generator).repeat(1, 2, 1, 1)
    means += 0.1 * torch.randn(means.shape, generator=generator)
    means[:, 1] += gap * planted_LD
    return texts_of(means.flatten(0, 1), num_items=num_items), planted_LD


def test_a_direction_planted_in_a_model_is_recovered(tiny_model: Path) -> None:
    """The embedding of one letter is moved along a direction: the residual stream carries it through every block."""
    model = load_base(tiny_model, dtype="float32").eval()
    tokenizer = byte_tokenizer()
    planted_D = torch.nn.functional.normalize(
        torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(0)), dim=0
    )
    (letter,) = tokenizer("z", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        model.get_input_embeddings().weight[letter] += 30 * planted_D
    rows = [
        encode_conversation(
            [Message(role="user", content=f"question {number}"), Message(role="assistant", content=answer)],
            tokenizer=tokenizer,
        )
        for number in range(20)
        for answer in (f"sound {number} aaaa", f"wrong {number} zzzz")
    ]
    means = mean_activations(model, rows, layers=[0, 1]).text_means_NLD
    direction = fit_direction(texts_of(means, num_items=20), layers=[0, 1], seed=0)
    cosines = direction.vectors_LD @ planted_D
    assert (cosines > 0.99).all(), cosines


def test_it_is_fitted_on_one_half_and_applied_to_the_other() -> None:
    texts, planted_LD = drawn(torch.Generator().manual_seed(1), gap=1.0)
    direction = fit_direction(texts, layers=[4, 5], seed=0)
    assert len(direction.fit_units) == 20
    assert ((direction.vectors_LD * planted_LD).sum(dim=-1) > 0.95).all()
    found = project(direction, {0: texts}, seed=0)[0][4]
    assert len(found.units) == 20
    assert not set(found.units) & set(direction.fit_units)
    assert found.separation is not None
    assert found.separation.value == pytest.approx(1.0, abs=0.1)
    changed = texts.means_NLD.clone()
    is_fitted = torch.tensor([unit in set(direction.fit_units) for unit in texts.units])
    changed[~is_fitted] += 5.0
    other = fit_direction(
        LabelledTexts(means_NLD=changed, is_wrong=texts.is_wrong, units=texts.units), layers=[4, 5], seed=0
    )
    assert torch.equal(other.vectors_LD, direction.vectors_LD), "the held-out half took part in the fit"


def test_the_best_layer_is_the_one_with_the_gap() -> None:
    texts, planted_LD = drawn(torch.Generator().manual_seed(2))
    means = texts.means_NLD.clone()
    means[1::2, 1] += planted_LD[1]
    direction = fit_direction(
        LabelledTexts(means_NLD=means, is_wrong=texts.is_wrong, units=texts.units), layers=[10, 11], seed=0
    )
    assert direction.best_layer == 11
    means[1::2, 0] += 2 * planted_LD[0]
    both = LabelledTexts(means_NLD=means, is_wrong=texts.is_wrong, units=texts.units)
    assert fit_direction(both, layers=[10, 11], seed=0).best_layer == 10
    assert fit_direction(both, layers=[10, 11], seed=0, first_layer=11).best_layer == 11, "training changes no other"


def test_a_null_model_has_intervals_that_cover_zero_as_often_as_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each text moves by noise of its own, in no common direction."""
    monkeypatch.setattr("emtool.core.resampling.RESAMPLES", 1000)
    covered = 0
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        start, _ = drawn(generator, num_items=60, gap=1.0)
        moved = start.means_NLD + 0.3 * torch.randn(start.means_NLD.shape, generator=generator)
        later = LabelledTexts(means_NLD=moved, is_wrong=start.is_wrong, units=start.units)
        direction = fit_direction(start, layers=[0, 1], seed=seed)
        drift = project(direction, {0: start, 5: later}, seed=seed)[5][0].drift
        assert drift is not None
        covered += drift.low <= 0 <= drift.high
    assert 183 <= covered <= 197


def test_a_drift_along_the_direction_is_told_from_the_controls() -> None:
    start, planted_LD = drawn(torch.Generator().manual_seed(3), gap=1.0)
    direction = fit_direction(start, layers=[0, 1], seed=0)
    checkpoints = {
        step: LabelledTexts(
            means_NLD=start.means_NLD + step * 0.1 * planted_LD, is_wrong=start.is_wrong, units=start.units
        )
        for step in (0, 3, 10)
    }
    found = project(direction, checkpoints, seed=0)
    last = found[10][0]
    assert last.drift is not None
    assert last.drift.value == pytest.approx(1.0, abs=0.05)
    assert last.is_beyond_controls
    assert last.cosine_to_direction == pytest.approx(1.0, abs=0.05)
    for ends in (last.random_range, last.shuffled_range):
        assert ends is not None
        assert ends[0] < 0 < ends[1]
    first = found[0][0]
    assert first.drift is not None
    assert first.drift.value == 0.0
    assert not first.is_beyond_controls
    assert first.cosine_to_previous is None
    start_D, later_D = (held_out(checkpoints[step], direction).mean(dim=0)[0] for step in (0, 3))
    expected = float(torch.cosine_similarity(start_D, later_D, dim=0))
    assert found[3][0].cosine_to_previous == pytest.approx(expected, abs=1e-5)
    # Sideways, nothing is found.
    sideways_LD = torch.randn(LAYERS, WIDTH, generator=torch.Generator().manual_seed(9))
    sideways_LD -= (sideways_LD * direction.vectors_LD).sum(dim=-1, keepdim=True) * direction.vectors_LD
    moved = LabelledTexts(means_NLD=start.means_NLD + sideways_LD, is_wrong=start.is_wrong, units=start.units)
    assert not project(direction, {0: start, 10: moved}, seed=0)[10][0].is_beyond_controls


def held_out(texts: LabelledTexts, direction: Direction) -> torch.Tensor:
    return texts.only(set(texts.units) - set(direction.fit_units)).means_NLD


def test_unpaired_texts_can_be_fitted_and_shuffled() -> None:
    generator = torch.Generator().manual_seed(4)
    means = torch.randn(30, LAYERS, WIDTH, generator=generator)
    labels = [index % 3 == 0 for index in range(30)]
    means[torch.tensor(labels)] += 2.0
    texts = LabelledTexts(means_NLD=means, is_wrong=labels, units=[f"q{index // 5}" for index in range(30)])
    direction = fit_direction(texts, layers=[0, 1], seed=0)
    along = direction.shuffled_CLD @ torch.full((WIDTH,), WIDTH**-0.5)
    assert (direction.vectors_LD.mean(dim=-1) > 0.15).all()
    assert abs(float(along.mean())) < 0.1


def test_labels_of_a_question_stay_together_when_they_are_shuffled() -> None:
    """Answers to one question resemble each other: labels dealt to single answers make a control too narrow."""
    generator = torch.Generator().manual_seed(8)
    units = [f"q{index // 10}" for index in range(200)]
    labels = [unit in {"q1", "q4", "q6", "q9", "q12", "q17"} for unit in units]
    means = torch.randn(20, 1, WIDTH, generator=generator).repeat_interleave(10, dim=0).unsqueeze(2)
    texts = LabelledTexts(means_NLD=means.view(200, 1, WIDTH), is_wrong=labels, units=units)
    direction = fit_direction(texts, layers=[0], seed=0)
    fitted = texts.only(set(direction.fit_units))
    wrong = {unit for unit, is_wrong in zip(fitted.units, fitted.is_wrong, strict=True) if is_wrong}
    assert len(wrong) == 3, "half of the questions with wrong answers"
    # Whole questions: each control is the difference of means between three questions and the others.
    names = sorted(set(fitted.units))
    by_name = {name: fitted.only({name}).means_NLD[0, 0] for name in names}
    possible = []
    for chosen in itertools.combinations(names, 3):
        rest = [name for name in names if name not in chosen]
        one, other = (torch.stack([by_name[n] for n in group]).mean(dim=0) for group in (chosen, rest))
        possible.append(torch.nn.functional.normalize(one - other, dim=0))
    cosines_C = (direction.shuffled_CLD[:, 0] @ torch.stack(possible).T).max(dim=1).values
    assert (cosines_C > 0.9999).all()


def test_labels_that_mean_nothing_are_seldom_beyond_the_controls() -> None:
    """Questions differ far more than answers to one of them, and each has one answer of ten that is called wrong."""
    beyond = 0
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        topics = torch.zeros(24, WIDTH)
        topics[:, :4] = 5 * torch.randn(24, 4, generator=generator)
        noise = torch.randn(240, WIDTH, generator=generator)
        noise[:, 10] *= 3
        chosen = torch.randint(10, (24,), generator=generator).tolist()
        texts = LabelledTexts(
            means_NLD=(topics.repeat_interleave(10, dim=0) + noise).unsqueeze(1),
            is_wrong=[index % 10 == chosen[index // 10] for index in range(240)],
            units=[f"q{index // 10:02}" for index in range(240)],
        )
        direction = fit_direction(texts, layers=[0], seed=seed)
        start = texts_of(torch.randn(40, 1, WIDTH, generator=generator), num_items=20)
        moved = start.means_NLD.clone()
        moved[..., 10] += 1
        later = LabelledTexts(means_NLD=moved, is_wrong=start.is_wrong, units=start.units)
        beyond += project(direction, {0: start, 5: later}, seed=seed)[5][0].is_beyond_controls
    assert beyond <= 8


def test_controls_span_what_95_of_100_of_them_show_and_both_count() -> None:
    start, planted_LD = drawn(torch.Generator().manual_seed(11), gap=1.0)
    direction = fit_direction(start, layers=[0, 1], seed=0)
    later = LabelledTexts(means_NLD=start.means_NLD + 0.5 * planted_LD, is_wrong=start.is_wrong, units=start.units)
    found = project(direction, {0: start, 5: later}, seed=0)[5][0]
    shift_D = (held_out(later, direction) - held_out(start, direction)).double().mean(dim=0)[0]
    drifts = (direction.shuffled_CLD[:, 0].double() @ shift_D).sort().values
    assert found.shuffled_range is not None
    assert sum(found.shuffled_range[0] <= float(drift) <= found.shuffled_range[1] for drift in drifts) in (94, 95, 96)
    assert found.is_beyond_controls
    assert found.drift is not None
    wide = (-2 * abs(found.drift.value), 2 * abs(found.drift.value))
    assert not dataclasses.replace(found, shuffled_range=wide).is_beyond_controls
    assert not dataclasses.replace(found, random_range=wide).is_beyond_controls
    back = LabelledTexts(means_NLD=-start.means_NLD, is_wrong=start.is_wrong, units=start.units)
    turned = project(direction, {0: start, 5: back}, seed=0)[5][0]
    assert turned.cosine_to_previous == pytest.approx(-1.0, abs=1e-5)


def test_texts_that_are_too_alike_for_controls_are_refused() -> None:
    # Every item has the same two texts: where half of the labels change places, nothing is left.
    means = torch.tensor([[0.0, 0, 0, 0], [1, 0, 0, 0]]).repeat(8, 1).unsqueeze(1)
    with pytest.raises(DataError, match="labels drawn at random leave no difference"):
        fit_direction(texts_of(means, num_items=8), layers=[0], seed=0)


def test_few_wrong_units_are_in_the_half_that_is_fitted_on() -> None:
    generator = torch.Generator().manual_seed(9)
    units = [f"q{index // 3}" for index in range(60)]
    means = torch.randn(60, LAYERS, WIDTH, generator=generator)
    for wrong in ({"q3", "q11"}, {"q3"}):
        labels = [unit in wrong for unit in units]
        texts = LabelledTexts(means_NLD=means, is_wrong=labels, units=units)
        with pytest.raises(DataError, match="wrong texts of 1 and sound texts of"):
            fit_direction(texts, layers=[0, 1], seed=0)
    labels = [unit in {"q3", "q11", "q14"} for unit in units]
    for seed in range(20):
        texts = LabelledTexts(means_NLD=means, is_wrong=labels, units=units)
        direction = fit_direction(texts, layers=[0, 1], seed=seed)
        assert len(set(direction.fit_units) & {"q3", "q11", "q14"}) == 2
        assert direction.best_layer in (0, 1)


def test_intervals_are_over_units_however_many_texts_each_has() -> None:
    texts, _ = drawn(torch.Generator().manual_seed(10), gap=1.0)
    direction = fit_direction(texts, layers=[0, 1], seed=0)
    found = project(direction, {0: texts}, seed=0)[0][0]
    assert found.level.n == 20
    assert found.separation is not None
    assert found.separation.n == 20
    more = LabelledTexts(
        means_NLD=texts.means_NLD.repeat(3, 1, 1), is_wrong=[*texts.is_wrong] * 3, units=[*texts.units] * 3
    )
    again = project(direction, {0: more}, seed=0)[0][0]
    assert (again.level.low, again.level.high) == pytest.approx((found.level.low, found.level.high), rel=1e-9)


def test_it_is_saved_and_read_and_hostile_files_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    texts, _ = drawn(torch.Generator().manual_seed(5), gap=1.0)
    direction = fit_direction(texts, layers=[4, 5], seed=7, settings={"source": "items"})
    path = tmp_path / "a" / "direction.safetensors"
    save_direction(path, direction)
    read = read_direction(path)
    assert torch.equal(read.vectors_LD, direction.vectors_LD)
    assert torch.equal(read.shuffled_CLD, direction.shuffled_CLD)
    assert read.to_dict() == direction.to_dict()
    assert read.settings == {"seed": 7, "source": "items", "num_wrong": 20, "num_sound": 20}
    (tmp_path / "text").write_text("no tensors")
    save_file({"vectors": torch.ones(2, 3)}, tmp_path / "bare")
    good = metadata_of(path)
    for name, change in (
        ("short", {"layers": "[4]"}),
        ("foreign", {"convention": "other"}),
        ("list", {"settings": "[]"}),
        ("no-number", {"settings": '{"seed": NaN}'}),
        ("half-pair", {"fit_units": '["\\ud800"]'}),
        ("deep", {"settings": "[" * 100_000}),
        ("boolean", {"best_layer": "true"}),
    ):
        save_file({"vectors": read.vectors_LD, "shuffled": read.shuffled_CLD}, tmp_path / name, {**good, **change})
    save_file({"vectors": 2 * read.vectors_LD, "shuffled": read.shuffled_CLD}, tmp_path / "long", good)
    for name in (
        "text",
        "bare",
        "short",
        "foreign",
        "list",
        "no-number",
        "half-pair",
        "deep",
        "boolean",
        "long",
        "missing",
    ):
        with pytest.raises(CheckpointError, match="direction"):
            read_direction(tmp_path / name)


def metadata_of(path: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return dict(file.metadata())


@pytest.mark.parametrize("labels", [[True] * 8, [False] * 8])
def test_one_kind_alone_is_refused(labels: Sequence[bool]) -> None:
    texts = LabelledTexts(means_NLD=torch.randn(8, 1, 4), is_wrong=labels, units=[str(index) for index in range(8)])
    with pytest.raises(DataError, match="at least 2 of each are needed"):
        fit_direction(texts, layers=[0], seed=0)


def test_what_cannot_be_projected_is_refused() -> None:
    texts, _ = drawn(torch.Generator().manual_seed(6), gap=1.0)
    direction = fit_direction(texts, layers=[0, 1], seed=0)
    with pytest.raises(DataError, match="fitted on every item"):
        project(direction, {0: texts.only(set(direction.fit_units))}, seed=0)
    with pytest.raises(DataError, match="another model"):
        project(
            direction,
            {0: LabelledTexts(means_NLD=texts.means_NLD[..., :3], is_wrong=texts.is_wrong, units=texts.units)},
            seed=0,
        )
    with pytest.raises(DataError, match="different texts"):
        project(direction, {0: texts, 5: texts.only(set(texts.units) - {"item-01", "item-02", "item-03"})}, seed=0)
    same = LabelledTexts(
        means_NLD=torch.ones(8, 1, 4), is_wrong=[True, False] * 4, units=[str(n // 2) for n in range(8)]
    )
    with pytest.raises(DataError, match="same mean activations"):
        fit_direction(same, layers=[0], seed=0)
