"""How far the adapter moves: equal to what the saved milestones say."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from emtool.core.config import resolve_train_config
from emtool.core.plan import plan_run
from emtool.engines.movement import AdapterMovement
from emtool.engines.training import train


def test_each_step_records_the_change_of_the_trained_parameters(tiny_model: Path, tmp_path: Path) -> None:
    overrides = {"model": str(tiny_model), "max_steps": 4, "checkpoints": "init, every 1", "output_root": tmp_path}
    plan, rows = plan_run(resolve_train_config(profile="demo", overrides=overrides, num_cuda_devices=0))
    run = train(plan, rows, command=[]).run
    weights = [load_file(run.checkpoint_path(step) / "adapter_model.safetensors") for step in range(5)]
    records = {r["step"]: r for r in map(json.loads, run.metrics_path.read_text().splitlines()) if "loss" in r}
    for step in range(1, 5):
        squares = [(weights[step][name] - weights[step - 1][name]).double().square().sum() for name in weights[0]]
        assert records[step]["adapter_movement"] == pytest.approx(math.sqrt(sum(squares)), rel=1e-5)
        assert records[step]["grad_norm"] > 0


def test_only_trained_parameters_are_watched() -> None:
    frozen, trained = torch.nn.Linear(3, 3).requires_grad_(False), torch.nn.Linear(3, 3)
    movement = AdapterMovement(torch.nn.Sequential(frozen, trained))
    with torch.no_grad():
        frozen.weight += 100
        trained.weight[0, 0] += 3
        trained.bias[1] -= 4
    assert movement.measure().item() == pytest.approx(5)
    assert movement.measure().item() == 0.0
