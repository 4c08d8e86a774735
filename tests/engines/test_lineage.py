import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from emtool.core.config import resolve_train_config
from emtool.core.errors import CheckpointError, ModelError
from emtool.core.events import Event, Notice, ignore_events
from emtool.core.plan import plan_run
from emtool.core.run_dir import RunFolder
from emtool.engines import training
from emtool.engines.evaluation import evaluate
from emtool.engines.lineage import read_lineage, rebuild_model
from emtool.engines.modeling import adapter_state, attach_adapter, load_base
from tests.tiny import logits, save_adapter, tiny_model


class Watch(TrainerCallback):
    """Keeps the logits of the model as it is trained, at step 0 and at the end, and its last adapter."""

    def __init__(self) -> None:
        self.model: Any = None
        self.logits: dict[int, torch.Tensor] = {}
        self.adapter: Mapping[str, torch.Tensor] = {}

    def _look(self, step: int) -> None:
        is_training = self.model.training
        self.logits[step] = logits(self.model.eval())
        self.model.train(is_training)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._look(0)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._look(state.global_step)
        self.adapter = {name: tensor.detach().clone() for name, tensor in adapter_state(self.model).items()}


def train_watched(
    monkeypatch: pytest.MonkeyPatch, base: Path, dataset: Path, root: Path, **changes: object
) -> tuple[RunFolder, Watch]:
    """Train a run of 6 steps and return it with what was seen of its model."""
    watch = Watch()
    real = training.build_trainer

    def watched(model: Any, *, callbacks: Sequence[TrainerCallback], **kwargs: Any) -> Any:
        watch.model = model
        return real(model, callbacks=[*callbacks, watch], **kwargs)

    monkeypatch.setattr(training, "build_trainer", watched)
    overrides = {
        "model": str(base),
        "dataset": str(dataset),
        "max_steps": 6,
        "checkpoints": "init, 3",
        "learning_rate": 1e-2,
        "output_root": root,
        "layers_to_transform": "all",
        **changes,
    }
    plan, rows = plan_run(resolve_train_config(profile="demo", overrides=overrides, num_cuda_devices=0))
    return training.train(plan, rows, command=[]).run, watch


def rebuilt(run: RunFolder, step: int, *, dtype: str = "float32", events: list[Event] | None = None) -> Any:
    """Return the model of a milestone as evaluation rebuilds it."""
    lineage, trained_dtype = read_lineage(run, run.read_manifest())
    composed = rebuild_model(
        lineage,
        trained_dtype=trained_dtype,
        device="cpu",
        dtype=dtype,
        sample_path=run.merged_sample_path,
        on_event=ignore_events if events is None else events.append,
    )
    return composed.with_persona(attach_adapter(composed.model, run.checkpoint_path(step))).eval()


@pytest.fixture
def persona(tmp_path: Path) -> Path:
    """Return a persona adapter of another rank and scale than the trained one, with dropout."""
    return save_adapter(tmp_path / "calm", tiny_model(), seed=1, r=4, lora_alpha=3, lora_dropout=0.3)


MODES = ["baseline", "merged", "stacked"]


def persona_options(mode: str, persona: Path) -> dict[str, object]:
    return {} if mode == "baseline" else {"persona_adapter": str(persona), "persona_mode": mode}


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
    assert list(evaluate(run).metrics) == [0, 3, 6]


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
        evaluate(run)
    persona.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=rf"persona adapter .* of this run is gone; copy it back .*{recorded}"):
        evaluate(run)


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
    from emtool.engines.tensor_files import encode_safetensors

    run.merged_sample_path.write_bytes(encode_safetensors(sample))
    assert "largest difference 0.25 among 3,584 recorded weights" in warning_of(run)
    run.merged_sample_path.write_bytes(b"torn")
    assert "by how much is not known" in warning_of(run)


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
    with pytest.raises(ModelError, match="has DoRA; a persona must be plain LoRA"):
        train_watched(monkeypatch, tiny_model, dataset_file, tmp_path / "out", persona_adapter=str(persona))
    config.write_text(json.dumps({**values, "target_modules": ["q_proj"]}))
    with pytest.raises(CheckpointError, match="tensor\\(s\\) have no counterpart"):
        train_watched(monkeypatch, tiny_model, dataset_file, tmp_path / "out", persona_adapter=str(persona))
    assert not (tmp_path / "out").exists()
