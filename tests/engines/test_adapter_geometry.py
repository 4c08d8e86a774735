"""Geometry through the factors equals what full matrices give, for any rank and spacing."""

import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file

from emtool.core.errors import CheckpointError, ConfigError, ModelError
from emtool.core.run_dir import RunFolder
from emtool.engines.adapter_geometry import MAX_CHECKPOINTS, AdapterGeometry, adapter_geometry
from emtool.engines.run_geometry import run_geometry

LAYERS = {"model.layers.0.q_proj": (24, 12), "model.layers.1.down_proj": (9, 30)}
STEPS = (0, 3, 10, 11, 40)
Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]


def draw(generator: torch.Generator, rank: int, *, is_zero: bool = False) -> Factors:
    """Return random factors A and B of each layer; at step 0, B is 0."""
    found = {}
    for name, (outputs, inputs) in LAYERS.items():
        a_RI = torch.randn(rank, inputs, generator=generator)
        b_OR = torch.randn(outputs, rank, generator=generator) * (0 if is_zero else 1)
        found[name] = (a_RI, b_OR)
    return found


def write(folder: Path, factors: Factors, *, dtype: torch.dtype = torch.float32, **config: object) -> Path:
    folder.mkdir(parents=True)
    rank = next(iter(factors.values()))[0].shape[0]
    values = {"r": rank, "lora_alpha": 2 * rank, "target_modules": ["q_proj", "down_proj"], **config}
    LoraConfig(**values).save_pretrained(str(folder))
    tensors = {}
    for name, (a_RI, b_OR) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = a_RI.to(dtype).contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = b_OR.to(dtype).contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def trajectory(path: Path, rank: int) -> tuple[dict[int, Path], dict[int, Factors]]:
    generator = torch.Generator().manual_seed(rank)
    factors: dict[int, Factors] = {}
    for step in STEPS:
        factors[step] = draw(generator, rank, is_zero=step == 0)
    return {step: write(path / f"checkpoint-{step}", one) for step, one in factors.items()}, factors


def dense(factors: Factors, scale: float) -> torch.Tensor:
    """Return all layers' updates as one vector, from full matrices."""
    return torch.cat([(scale * b_OR.double() @ a_RI.double()).flatten() for a_RI, b_OR in factors.values()])


def angles(one: torch.Tensor, other: torch.Tensor) -> list[float]:
    """Return the principal angles between two column spaces in degrees, from full matrices."""
    bases = []
    for matrix in (one, other):
        left, values, _ = torch.linalg.svd(matrix, full_matrices=False)
        bases.append(left[:, values > 1e-10 * values[0]])
    return [math.degrees(math.acos(min(1.0, float(v)))) for v in torch.linalg.svdvals(bases[0].T @ bases[1])]


@pytest.mark.parametrize("rank", range(1, 9))
def test_every_number_equals_that_of_full_matrices(rank: int, tmp_path: Path) -> None:
    folders, factors = trajectory(tmp_path, rank)
    found = adapter_geometry(folders)
    updates = [dense(factors[step], 2.0) for step in STEPS]
    changes = [later - earlier for earlier, later in itertools.pairwise(updates)]
    path = 0.0
    for index, entry in enumerate(found.steps):
        assert entry.step == STEPS[index]
        assert entry.update_norm == pytest.approx(float(updates[index].norm()), rel=1e-6)
        a_square = sum(float(a.double().square().sum()) for a, _ in factors[entry.step].values())
        b_square = sum(float(b.double().square().sum()) for _, b in factors[entry.step].values())
        assert (entry.a_norm, entry.b_norm) == pytest.approx((a_square**0.5, b_square**0.5), rel=1e-6)
        if index:
            length = float(changes[index - 1].norm())
            path += length
            assert entry.change == pytest.approx(length, rel=1e-6)
            assert entry.speed == pytest.approx(length / (STEPS[index] - STEPS[index - 1]), rel=1e-6)
            cosine = float(torch.cosine_similarity(updates[index], updates[-1], dim=0))
            assert entry.cosine_to_final == pytest.approx(cosine, abs=1e-6)
        assert entry.path_length == pytest.approx(path, rel=1e-6)
        if 0 < index < len(STEPS) - 1:
            cosine = float(torch.cosine_similarity(changes[index - 1], changes[index], dim=0))
            assert entry.rotation == pytest.approx(math.degrees(math.acos(cosine)), abs=1e-5)
    assert (found.steps[0].rotation, found.steps[0].cosine_to_final, found.steps[0].effective_rank) == (None,) * 3
    assert found.steps[0].share_in_final is None
    check_spaces(found, factors)
    check_components(found, updates)


def check_spaces(found: AdapterGeometry, factors: Mapping[int, Factors]) -> None:
    """Compare ranks, angles and shares layer by layer with singular value decompositions of full matrices."""
    full = {
        step: {name: 2.0 * b_OR.double() @ a_RI.double() for name, (a_RI, b_OR) in one.items()}
        for step, one in factors.items()
    }
    for entry in found.steps[1:]:
        ranks, means, inside, total = [], [], 0.0, 0.0
        for name in LAYERS:
            here, last = full[entry.step][name], full[STEPS[-1]][name]
            shares = torch.linalg.svdvals(here).square()
            shares = shares[shares > 1e-18 * shares[0]] / shares.sum()
            ranks.append(math.exp(float(-(shares * shares.log()).sum())))
            found_angles = angles(here, last)
            means.append(sum(found_angles) / len(found_angles))
            left, values, _ = torch.linalg.svd(last, full_matrices=False)
            basis = left[:, values > 1e-10 * values[0]]
            inside += float((basis.T @ here).square().sum())
            total += float(here.square().sum())
        assert entry.effective_rank == pytest.approx(sum(ranks) / len(ranks), rel=1e-6)
        # Angles come from cosines, which say little of tiny ones.
        assert entry.angle_to_final == pytest.approx(sum(means) / len(means), abs=1e-4)
        assert entry.share_in_final == pytest.approx(inside / total, rel=1e-6)
    assert found.steps[-1].compression == 1.0
    assert found.steps[-1].angle_to_final == 0.0


def check_components(found: AdapterGeometry, updates: list[torch.Tensor]) -> None:
    """Compare the principal components with those of the updates as vectors."""
    centred = torch.stack(updates) - torch.stack(updates).mean(dim=0)
    left, values, _ = torch.linalg.svd(centred, full_matrices=False)
    expected = (left * values)[:, : len(found.explained)]
    expected *= torch.where(expected[-1] < 0, -1.0, 1.0)
    assert torch.tensor([entry.components for entry in found.steps]).double() == pytest.approx(expected, abs=1e-5)
    shares = values.square()[: len(found.explained)] / values.square().sum()
    assert found.explained == pytest.approx(shares.tolist(), rel=1e-6)


def test_scales_patterns_and_other_ranks_count(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    small, large = draw(generator, 2), draw(generator, 8)
    folders = {
        1: write(tmp_path / "a", small, lora_alpha=6, use_rslora=True),
        2: write(tmp_path / "b", large, alpha_pattern={"q_proj": 1}, lora_alpha=4),
    }
    found = adapter_geometry(folders)
    first = dense(small, 6 / math.sqrt(2))
    scales = {"model.layers.0.q_proj": 1 / 8, "model.layers.1.down_proj": 4 / 8}
    second = torch.cat([scales[n] * (b.double() @ a.double()).flatten() for n, (a, b) in large.items()])
    assert found.steps[0].update_norm == pytest.approx(float(first.norm()), rel=1e-6)
    assert found.steps[1].change == pytest.approx(float((second - first).norm()), rel=1e-6)


def test_a_tiny_change_and_a_tiny_angle_are_not_lost(tmp_path: Path) -> None:
    factors = draw(torch.Generator().manual_seed(1), 4)
    near = {name: (a_RI, b_OR * (1 + 1e-5)) for name, (a_RI, b_OR) in factors.items()}
    found = adapter_geometry({0: write(tmp_path / "a", factors), 5: write(tmp_path / "b", near)})
    expected = dense({name: (near[name][0], near[name][1]) for name in near}, 2.0) - dense(factors, 2.0)
    assert found.steps[1].change == pytest.approx(float(expected.norm()), rel=1e-4)
    assert found.steps[1].angle_to_previous is not None
    assert found.steps[1].angle_to_previous < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_noise_band_is_what_rounding_does(dtype: torch.dtype, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(2)
    exact = {
        name: (
            torch.randn(8, inputs, generator=generator).double(),
            torch.randn(outputs, 8, generator=generator).double(),
        )
        for name, (outputs, inputs) in LAYERS.items()
    }
    jitter = {name: (a * (1 + 1e-9), b * (1 + 1e-9)) for name, (a, b) in exact.items()}
    folders = {step: write(tmp_path / f"{step}", one, dtype=dtype) for step, one in ((0, exact), (1, jitter))}
    found = adapter_geometry(folders)
    rounded = {name: (a.to(dtype).double(), b.to(dtype).double()) for name, (a, b) in exact.items()}
    # float32 numbers were drawn: to float32 they are exact already.
    error = float((dense(rounded, 2.0) - dense(exact, 2.0)).norm())
    if dtype == torch.float32:
        assert error == 0.0
        assert 0 < found.steps[0].noise < 1e-4
    else:
        assert found.steps[0].noise == pytest.approx(error, rel=0.2)


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    one = write(tmp_path / "a", draw(generator, 2))
    with pytest.raises(ConfigError, match="at least 2 are needed, not 1"):
        adapter_geometry({0: one})
    with pytest.raises(ConfigError, match="choose some with --steps"):
        adapter_geometry(dict.fromkeys(range(MAX_CHECKPOINTS + 1), one))
    fewer = dict(list(draw(generator, 2).items())[:1])
    with pytest.raises(CheckpointError, match="holds other layers"):
        adapter_geometry({0: one, 1: write(tmp_path / "b", fewer)})
    broken = draw(generator, 2)
    broken["model.layers.0.q_proj"][0][0, 0] = math.nan
    with pytest.raises(CheckpointError, match="not finite"):
        adapter_geometry({0: one, 1: write(tmp_path / "c", broken)})
    with pytest.raises(ModelError, match="DoRA"):
        adapter_geometry({0: one, 1: write(tmp_path / "d", draw(generator, 2), use_dora=True)})
    for number, (value, said) in enumerate(
        (
            ({"model.layers.0.q_proj": (torch.ones(2, 12), torch.ones(7, 2))}, "another shape of"),
            ({"model.layers.0.q_proj": (torch.ones(2, 12), torch.ones(24, 3))}, "do not belong together"),
            ({"model.layers.0.q_proj": (torch.ones(0, 12), torch.ones(24, 0))}, "do not belong together"),
            ({"model.layers.0.q_proj": (torch.ones(2, 12, 1), torch.ones(24, 2))}, "do not belong together"),
        )
    ):
        other = write(tmp_path / f"shape-{number}", {**draw(generator, 2), **value}, r=2, lora_alpha=4)
        with pytest.raises(CheckpointError, match=said):
            adapter_geometry({0: one, 1: other})
    huge = {name: (a.double() * 1e100, b.double() * 1e100) for name, (a, b) in draw(generator, 2).items()}
    with pytest.raises(CheckpointError, match="absurdly large"):
        adapter_geometry({0: one, 1: write(tmp_path / "huge", huge, dtype=torch.float64)})
    with pytest.raises(CheckpointError, match="numbers of type I32"):
        adapter_geometry({0: one, 1: write(tmp_path / "whole", draw(generator, 2), dtype=torch.int32)})
    with pytest.raises(CheckpointError, match="no regular expression"):
        adapter_geometry({0: one, 1: write(tmp_path / "pattern", draw(generator, 2), alpha_pattern={"(": 4})})
    save_file({}, write(tmp_path / "empty", draw(generator, 2)) / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="holds no tensors"):
        adapter_geometry({0: tmp_path / "empty", 1: tmp_path / "empty"})
    (tmp_path / "a" / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="damaged or incomplete"):
        adapter_geometry({0: one, 1: one})


def test_a_run_gets_tables_of_all_layers_and_of_each(tmp_path: Path) -> None:
    trajectory(tmp_path, 2)
    run = RunFolder(path=tmp_path)
    result = run_geometry(run)
    summary = json.loads((run.evaluation_path / "geometry.json").read_text())
    assert summary == json.loads(json.dumps(result.to_dict()))
    rows = (run.evaluation_path / "geometry.csv").read_text().splitlines()
    assert len(rows) == 1 + len(STEPS)
    layers = (run.evaluation_path / "layer_geometry.csv").read_text().splitlines()
    assert len(layers) == 1 + len(STEPS) * len(LAYERS)
    assert [entry.step for entry in run_geometry(run, steps="0,final").geometry.steps] == [0, 40]
