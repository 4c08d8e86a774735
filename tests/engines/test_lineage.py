import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from emtool.core.errors import CheckpointError, ModelError
from emtool.core.events import Event, Notice
from emtool.core.run_dir import RunFolder
from emtool.engines.modeling import load_base
from emtool.engines.tensor_files import encode_safetensors
from tests.scoring import score
from tests.tiny import logits, save_adapter, tiny_model
from tests.watched import MODES, persona_options, rebuilt, train_watched


@pytest.fixture
def persona(tmp_path: Path) -> Path:
    """Return a persona adapter of another rank and scale than the trained one, with dropout."""
    return save_adapter(tmp_path / "calm", tiny_model(), seed=1, r=4, lora_alpha=3, lora_dropout=0.3)


@pytest.mark.parametrize("mode", MODES)
def test_evaluation_rebuilds_the_bits_of_the_model_that_was_trained(
    mode: str, tiny_model: Path, persona: Path, dataset_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, watch = train_watched(monkeypatch, tiny_model, dataset_file, tmp_path, **persona_options(mode, persona))
    bare = logits(load_base(tiny_model, dtype="float32"))
    for step in (0, 6):
        assert torch.equal(logits(rebuilt(run, step)), watch.logits[step])
    assert torch.equal(watch.logits[0], bare) == (mode == "baseline")
    assert not torch.equal(watch.logits[6], watch.logits[0])
    recorded = run.read_manifest()["lineage"]["persona"]  # type: ignore[index]
    if mode == "baseline":
        assert recorded is None
    else:
        assert (recorded["name"], recorded["mode"], recorded["source"]) == ("calm", mode, "folder")
        assert ("merged_sha256" in recorded) == (mode == "merged") == run.merged_sample_path.exists()
    saved = load_file(run.checkpoint_path(6) / "adapter_model.safetensors")
    assert saved.keys() == watch.adapter.keys(), "a milestone holds the trained adapter and nothing of the persona"
    assert list(score(run).metrics) == [0, 3, 6]


@pytest.mark.parametrize("mode", MODES)
def test_a_milestone_in_bfloat16_is_the_trained_adapter_rounded_once(
    mode: str, tiny_model: Path, persona: Path, dataset_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {**persona_options(mode, persona), "dtype": "bfloat16"}
    run, watch = train_watched(monkeypatch, tiny_model, dataset_file, tmp_path, **options)
    saved = load_file(run.checkpoint_path(6) / "adapter_model.safetensors")
    for name, tensor in watch.adapter.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(saved[name], tensor.to(torch.bfloat16))
    model = rebuilt(run, 6, dtype="bfloat16")
    base = {name: p for name, p in model.named_parameters() if "lora_" not in name}
    trained = {name: p for name, p in watch.model.named_parameters() if "lora_" not in name}
    assert base.keys() == trained.keys()
    assert all(torch.equal(base[name], p) for name, p in trained.items())
    # A unit in the last place of logits of this size is 2 ** -9.
    assert (logits(model).float() - watch.logits[6].float()).abs().max() < 2**-6


@pytest.mark.parametrize("mode", ["merged", "stacked"])
def test_evaluation_refuses_another_adapter_and_names_the_hashes(
    mode: str, tiny_model: Path, persona: Path, dataset_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = train_watched(monkeypatch, tiny_model, dataset_file, tmp_path, **persona_options(mode, persona))
    recorded = run.read_manifest()["lineage"]["persona"]["adapter_sha256"]  # type: ignore[index]
    weights = persona / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"its SHA-256 is [0-9a-f]{{12}}\.\.\., {recorded[:12]}\.\.\. is needed"):
        score(run)
    persona.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=rf"persona adapter .* of this run is gone; copy it from .*{recorded}"):
        score(run)


def test_another_merge_is_a_warning_with_the_largest_difference(
    tiny_model: Path, persona: Path, dataset_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = train_watched(monkeypatch, tiny_model, dataset_file, tmp_path, persona_adapter=str(persona))
    manifest: Any = run.read_manifest()
    manifest["lineage"]["persona"]["merged_sha256"] = "0" * 64
    run.write_manifest(manifest)
    sample = load_file(run.merged_sample_path)
    name = "base_model.model.model.layers.0.mlp.up_proj"
    sample[name][3] += 0.25
    run.merged_sample_path.write_bytes(encode_safetensors(sample))
    assert "largest difference 0.25 among 3,584 recorded weights" in warning_of(run)
    run.merged_sample_path.write_bytes(b"torn")
    assert "by how much is not known" in warning_of(run)


def test_a_changed_adapter_configuration_is_found_without_asking_for_hashes(
    tiny_model: Path, dataset_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = train_watched(monkeypatch, tiny_model, dataset_file, tmp_path)
    path = run.checkpoint_path(3) / "adapter_config.json"
    text = path.read_text()
    assert '"lora_alpha": 16' in text
    path.write_text(text.replace('"lora_alpha": 16', '"lora_alpha": 61'))
    result = score(run)
    assert list(result.metrics) == [0, 6]
    assert "adapter_config.json has changed" in result.damaged[3]


def test_a_run_goes_on_when_its_persona_s_cache_has_moved(
    tiny_model: Path, dataset_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMTOOL_CACHE", str(tmp_path / "here"))
    options: dict[str, Any] = {"persona": "goodness", "keep_resume": True}
    run, _ = train_watched(monkeypatch, tiny_model, dataset_file, tmp_path / "out", **options)
    manifest: Any = run.read_manifest()
    shutil.rmtree(run.checkpoint_path(6))
    run.write_manifest({**manifest, "status": "running"})
    (tmp_path / "here").rename(tmp_path / "there")
    monkeypatch.setenv("EMTOOL_CACHE", str(tmp_path / "there"))
    again, _ = train_watched(monkeypatch, tiny_model, dataset_file, tmp_path / "out", resume=True, **options)
    assert again.saved_steps() == [0, 3, 6]
    assert list(score(again).metrics) == [0, 3, 6]


def warning_of(run: RunFolder) -> str:
    events: list[Event] = []
    rebuilt(run, 0, events=events)
    (warning,) = [event.text for event in events if isinstance(event, Notice) and event.is_warning]
    return warning


def test_a_persona_of_another_base_is_refused_before_anything_is_created(
    tiny_model: Path, persona: Path, dataset_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = persona / "adapter_config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "use_dora": True}))
    with pytest.raises(ModelError, match="has DoRA; only plain LoRA"):
        train_watched(monkeypatch, tiny_model, dataset_file, tmp_path / "out", persona_adapter=str(persona))
    config.write_text(json.dumps({**values, "target_modules": ["q_proj"]}))
    with pytest.raises(CheckpointError, match="tensor\\(s\\) have no counterpart"):
        train_watched(monkeypatch, tiny_model, dataset_file, tmp_path / "out", persona_adapter=str(persona))
    assert not (tmp_path / "out").exists()
