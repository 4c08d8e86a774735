import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, LlamaForCausalLM

from emtool.core.config import TrainConfig, resolve_train_config
from emtool.core.errors import CheckpointError, ConfigError
from emtool.engines.modeling import attach_adapter, load_adapter_into, lora_modules, merge_adapter, peft_targets
from tests.tiny import tiny_config

SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def tiny_model(dtype: torch.dtype = torch.float32, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(tiny_config()).to(dtype).eval()


def save_adapter(folder: Path, model: LlamaForCausalLM, *, seed: int, **changes: object) -> Path:
    """Save an adapter with random A and B: a fresh B is zero and would change nothing."""
    values = {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": list(SEVEN), **changes}
    wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(task_type="CAUSAL_LM", **values))
    torch.manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    wrapped.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=torch.arange(3, 40).unsqueeze(0)).logits
    return result


def test_merging_equals_the_attached_adapter_and_is_rounded_once(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        base = tiny_model(dtype)
        folder = save_adapter(tmp_path / str(dtype), base, seed=1)
        before = base.model.layers[0].mlp.up_proj.weight.detach().clone()
        expected = logits(attach_adapter(copy.deepcopy(base), folder))
        merged, digest = merge_adapter(copy.deepcopy(base), folder)
        tolerance = 1e-5 if dtype == torch.float32 else 5e-2
        torch.testing.assert_close(logits(merged).float(), expected.float(), rtol=tolerance, atol=tolerance)
        tensors = load_file(folder / "adapter_model.safetensors")
        a, b = (tensors[f"base_model.model.model.layers.0.mlp.up_proj.lora_{k}.weight"].float() for k in ("A", "B"))
        by_hand = (before.float() + (8 / 4**0.5) * (b @ a)).to(dtype)
        assert torch.equal(merged.model.layers[0].mlp.up_proj.weight, by_hand)
        assert not any("lora" in name for name, _ in merged.named_parameters())
        again, digest_again = merge_adapter(copy.deepcopy(base), folder)
        assert digest == digest_again
        assert torch.equal(logits(again), logits(merged))


def test_another_adapter_has_another_hash(tmp_path: Path) -> None:
    base = tiny_model()
    first, second = (save_adapter(tmp_path / str(seed), base, seed=seed) for seed in (1, 2))
    assert merge_adapter(copy.deepcopy(base), first)[1] != merge_adapter(copy.deepcopy(base), second)[1]


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
