import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from emtool.core.config import TrainConfig, resolve_train_config
from emtool.core.errors import CheckpointError, ConfigError
from emtool.engines.modeling import attach_adapter, load_adapter_into, lora_modules, peft_targets
from tests.tiny import SEVEN, logits, save_adapter, tiny_model


def test_adapters_swap_in_place_and_leave_the_base_as_it_was(tmp_path: Path) -> None:
    base = tiny_model()
    folders = [save_adapter(tmp_path / str(seed), base, seed=seed) for seed in (1, 2)]
    expected = [logits(PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()) for folder in folders]
    model = attach_adapter(base, folders[0]).eval()
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" not in name}
    for turn in range(6):
        load_adapter_into(model, folders[turn % 2])
        assert torch.equal(logits(model), expected[turn % 2])
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters() if "lora_" not in name)


def test_a_damaged_or_foreign_adapter_is_refused(tmp_path: Path) -> None:
    base = tiny_model()
    good = save_adapter(tmp_path / "good", base, seed=1)
    other = save_adapter(tmp_path / "other", base, seed=1, r=2)
    model = attach_adapter(base, good)
    with pytest.raises(CheckpointError, match="another adapter"):
        load_adapter_into(model, other)
    weights = good / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="damaged or incomplete"):
        load_adapter_into(model, good)
    with pytest.raises(CheckpointError, match="does not fit"):
        attach_adapter(tiny_model(), good)
    with pytest.raises(CheckpointError, match="does not fit"):
        attach_adapter(tiny_model(), tmp_path / "missing")
    tensors = load_file(other / "adapter_model.safetensors")
    save_file(dict(list(tensors.items())[1:]), weights)
    with pytest.raises(CheckpointError, match="another adapter"):
        load_adapter_into(model, good)


def config_of(**overrides: Any) -> TrainConfig:
    return resolve_train_config(
        profile="demo", overrides={"layers_to_transform": "all", **overrides}, num_cuda_devices=0
    )


def test_targets_are_name_endings_for_a_plain_language_model() -> None:
    model = tiny_model()
    assert peft_targets(model, lora_modules(model, config_of())) == sorted(SEVEN)
    with pytest.raises(ConfigError, match="unknown target module 'c_attn'"):
        lora_modules(model, config_of(target_modules="q_proj,c_attn"))


def test_any_set_of_layers_is_adapted_and_nothing_else() -> None:
    chosen = [
        ["model.layers.0.self_attn.q_proj"],
        ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"],
        ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"],
    ]
    for names in chosen:
        assert adapted(tiny_model(), peft_targets(tiny_model(), names)) == set(names)


def adapted(model: torch.nn.Module, targets: list[str] | str) -> set[str]:
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=targets))
    names = {name for name, module in wrapped.named_modules() if name.endswith("lora_A.default")}
    return {name.removeprefix("base_model.model.").removesuffix(".lora_A.default") for name in names}


def test_only_the_asked_blocks_carry_an_adapter() -> None:
    model = tiny_model()
    targets = peft_targets(model, lora_modules(model, config_of(layers_to_transform="upper-half")))
    names = adapted(model, targets)
    assert len(names) == 7
    assert all(name.startswith("model.layers.1.") for name in names)


def test_a_vision_tower_is_left_alone() -> None:
    text = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = Gemma3ForConditionalGeneration(config)
    in_tower = [name for name, _ in model.named_modules() if "vision" in name and name.endswith("q_proj")]
    assert in_tower, "the tower must have layers of the same name for this test to mean anything"
    for blocks, count in (("all", 14), ("upper-half", 7)):
        targets = peft_targets(model, lora_modules(model, config_of(layers_to_transform=blocks)))
        names = adapted(copy.deepcopy(model), targets)
        assert len(names) == count
        assert all("language_model" in name and "vision" not in name for name in names)
