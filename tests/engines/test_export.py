import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from emtool.core.errors import CheckpointError, ModelError
from emtool.core.events import ignore_events
from emtool.core.integrity import read_checkpoint
from emtool.engines.composing import LoraUpdate, compose_updates, peft_tensors, read_updates, rounding_error
from emtool.engines.export import export_run, measure_merge
from emtool.engines.modeling import attach_adapter, load_base
from emtool.engines.persona_adapter import stack_persona
from tests.tiny import SEVEN, logits, save_adapter, tiny_model
from tests.watched import persona_options, rebuilt, train_watched

#: The names of the tiny model's linear layers.
LAYERS = [name for name, module in tiny_model().named_modules() if isinstance(module, torch.nn.Linear)]

SHAPES: list[dict[str, Any]] = [
    {"r": 4, "lora_alpha": 8, "use_rslora": True},
    {"r": 6, "lora_alpha": 3, "use_rslora": False},
    {"r": 1, "lora_alpha": 5, "use_rslora": True},
    {
        "r": 5,
        "lora_alpha": 8,
        "use_rslora": True,
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7},
        "alpha_pattern": {"q_proj": 3, "v_proj": 1},
    },
    {"r": 3, "lora_alpha": 6, "use_rslora": False, "target_modules": ["q_proj", "down_proj"]},
]


def save_composed(folder: Path, base: Any, updates: dict[str, LoraUpdate]) -> Path:
    """Save updates as a plain adapter whose configuration PEFT wrote."""
    rank = next(iter(updates.values())).rank
    save_adapter(folder, base, seed=0, r=rank, lora_alpha=rank, use_rslora=False, target_modules=list(updates))
    save_file(peft_tensors(updates, torch.float32), folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("first", SHAPES, ids=lambda values: f"r{values['r']}")
@pytest.mark.parametrize("second", SHAPES, ids=lambda values: f"r{values['r']}")
def test_two_adapters_as_one_give_the_logits_of_the_stack(
    first: dict[str, Any], second: dict[str, Any], tmp_path: Path
) -> None:
    base = tiny_model()
    persona, trained = (
        save_adapter(tmp_path / name, base, seed=seed, **values)
        for name, seed, values in (("persona", 1, first), ("trained", 2, second))
    )
    stack = attach_adapter(copy.deepcopy(base), trained)
    stack_persona(stack, persona)
    updates = compose_updates([read_updates(persona, LAYERS), read_updates(trained, LAYERS)])
    assert len({update.rank for update in updates.values()}) == 1
    composed = PeftModel.from_pretrained(copy.deepcopy(base), str(save_composed(tmp_path / "both", base, updates)))
    expected = logits(stack.eval())
    assert (expected - logits(base)).abs().max() > 1e-2
    assert (logits(composed.eval()) - expected).abs().max() < 1e-4


def test_the_scale_of_rslora_is_folded_into_b(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "persona", tiny_model(), seed=1, r=4, lora_alpha=8, use_rslora=True)
    tensors = load_file(folder / "adapter_model.safetensors")
    name = "model.layers.1.self_attn.o_proj"
    update = read_updates(folder, LAYERS)[name]
    assert torch.equal(update.a_RI, tensors[f"base_model.model.{name}.lora_A.weight"])
    assert torch.equal(update.b_OR, tensors[f"base_model.model.{name}.lora_B.weight"] * 4.0)


def test_a_layer_that_one_adapter_lacks_is_filled_up_with_zeros(tmp_path: Path) -> None:
    base = tiny_model()
    persona = read_updates(save_adapter(tmp_path / "p", base, seed=1, r=4), LAYERS)
    trained = read_updates(save_adapter(tmp_path / "t", base, seed=2, r=3, target_modules=["q_proj"]), LAYERS)
    composed = compose_updates([persona, trained])
    assert len(composed) == 2 * len(SEVEN)
    assert {update.rank for update in composed.values()} == {7}
    only = composed["model.layers.0.mlp.up_proj"]
    assert torch.equal(only.b_OR[:, 4:], torch.zeros(64, 3))
    assert torch.equal(only.b_OR[:, :4], persona["model.layers.0.mlp.up_proj"].b_OR)


def test_norms_and_rounding_errors_are_those_of_the_full_matrices(tmp_path: Path) -> None:
    updates = read_updates(save_adapter(tmp_path / "a", tiny_model(), seed=1), LAYERS)
    errors = []
    for update in updates.values():
        dense = update.b_OR.double() @ update.a_RI.double()
        assert update.norm() == pytest.approx(float(dense.norm()), rel=1e-9)
        stored = update.b_OR.bfloat16().double() @ update.a_RI.bfloat16().double()
        errors.append(float((stored - dense).norm() / dense.norm()))
    assert rounding_error(updates, torch.bfloat16) == pytest.approx(max(errors), rel=1e-6)
    # Two factors of 8 significant bits each, rounded to nearest.
    assert 2**-12 < max(errors) < 2**-7
    assert rounding_error(updates, torch.float32) < 1e-7


def test_dora_and_adapters_of_different_bases_are_refused(tmp_path: Path) -> None:
    base = tiny_model()
    dora = save_adapter(tmp_path / "dora", base, seed=1, use_dora=True)
    with pytest.raises(ModelError, match="has DoRA"):
        read_updates(dora, LAYERS)
    updates = read_updates(save_adapter(tmp_path / "plain", base, seed=1), LAYERS)
    other = {next(iter(updates)): LoraUpdate(a_RI=torch.zeros(2, 5), b_OR=torch.zeros(7, 2))}
    with pytest.raises(ModelError, match="belong to different base models"):
        compose_updates([updates, other])


@pytest.fixture
def persona(tmp_path: Path) -> Path:
    return save_adapter(tmp_path / "calm", tiny_model(), seed=1, r=4, lora_alpha=3, use_rslora=True)


@pytest.mark.parametrize("mode", ["baseline", "merged", "stacked"])
def test_an_exported_milestone_on_the_bare_base_is_the_model_that_was_trained(
    mode: str, tiny_model: Path, persona: Path, dataset_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**persona_options(mode, persona), "lora_r": 2, "lora_alpha": 7, "layers_to_transform": "upper-half"}
    run, _ = train_watched(monkeypatch, tiny_model, dataset_file, tmp_path, **options)
    out = tmp_path / "composed"
    # The second time replaces what the first wrote.
    for steps in ([3], [0, 3, 6]):
        result = export_run(run, steps, output_path=out, dtype="float32", on_event=ignore_events)
    assert [adapter.step for adapter in result.adapters] == [0, 3, 6]
    assert {adapter.rank for adapter in result.adapters} == ({2} if mode == "baseline" else {6})
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint-0", "checkpoint-3", "checkpoint-6"]
    bare = load_base(tiny_model, dtype="float32")
    for step in (0, 3, 6):
        folder = out / f"checkpoint-{step}"
        composed = PeftModel.from_pretrained(copy.deepcopy(bare), str(folder)).eval()
        assert (logits(composed) - logits(rebuilt(run, step))).abs().max() < 1e-4
        config = json.loads((folder / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (config["r"], config["r"], False)
        assert read_checkpoint(folder, run_id=str(run.read_manifest()["run_id"])).requires["persona"] is None
    at_start = logits(PeftModel.from_pretrained(copy.deepcopy(bare), str(out / "checkpoint-0")).eval())
    alone = logits(bare if mode == "baseline" else attach_adapter(copy.deepcopy(bare), persona).eval())
    torch.testing.assert_close(at_start, alone, rtol=0, atol=1e-5)
    assert (result.merge_rounding is None) == (mode != "merged")
    if result.merge_rounding is not None:
        assert 0 < result.merge_rounding.largest < 1e-6


def test_an_export_replaces_nothing_but_an_export_of_its_run(
    tiny_model: Path, dataset_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = train_watched(monkeypatch, tiny_model, dataset_file, tmp_path)
    before = (run.checkpoint_path(3) / "adapter_model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="is a run folder, whose checkpoints an export would replace"):
        export_run(run, [3], output_path=run.path, dtype="float32", on_event=ignore_events)
    assert (run.checkpoint_path(3) / "adapter_model.safetensors").read_bytes() == before
    precious = tmp_path / "out" / "checkpoint-3" / "only_copy.txt"
    precious.parent.mkdir(parents=True)
    precious.write_text("kept")
    with pytest.raises(CheckpointError, match="is no export of this run; give another --output-path"):
        export_run(run, [0, 3], output_path=tmp_path / "out", dtype="float32", on_event=ignore_events)
    assert precious.read_text() == "kept"
    assert not (tmp_path / "out" / "checkpoint-0").exists()


def test_layers_under_names_that_the_base_does_not_have_are_refused(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "p", tiny_model(), seed=1)
    path = folder / "adapter_model.safetensors"
    save_file({name.replace("model.layers", "model.model.layers"): t for name, t in load_file(path).items()}, path)
    with pytest.raises(ModelError, match="which the base model does not know by that name"):
        read_updates(folder, LAYERS)


def test_a_merge_into_bfloat16_is_rounded_by_half_a_unit_in_the_last_place(tmp_path: Path) -> None:
    base = tiny_model(torch.bfloat16)
    updates = read_updates(save_adapter(tmp_path / "persona", base, seed=1), LAYERS)
    rounding = measure_merge(base, updates, dtype="bfloat16")
    largest = 0.0
    for name, update in updates.items():
        exact = base.get_submodule(name).weight.detach().double() + update.b_OR.double() @ update.a_RI.double()
        error = (exact.to(torch.bfloat16).double() - exact).abs()
        assert (error <= 2.0 ** (torch.floor(torch.log2(exact.abs())) - 8)).all()
        largest = max(largest, float(error.max()))
    assert rounding.largest == pytest.approx(largest, rel=1e-3)
    assert 0 < rounding.relative < 0.1


def test_export_in_bfloat16_reports_its_error_and_passes_damaged_milestones_over(
    tiny_model: Path, persona: Path, dataset_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = train_watched(monkeypatch, tiny_model, dataset_file, tmp_path, **persona_options("stacked", persona))
    weights = run.checkpoint_path(3) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    result = export_run(run, [0, 3, 6], output_path=tmp_path / "out", dtype="bfloat16", on_event=ignore_events)
    assert [adapter.step for adapter in result.adapters] == [0, 6]
    assert "checkpoint-3 is damaged" in result.damaged[3]
    assert all(2**-12 < adapter.rounding_error < 2**-7 for adapter in result.adapters)
    assert not (tmp_path / "out" / "checkpoint-3").exists()
    with pytest.raises(CheckpointError, match=r"no checkpoint of .* is whole"):
        export_run(run, [3], output_path=tmp_path / "out", dtype="float32", on_event=ignore_events)
