import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from emtool.core.errors import CheckpointError
from emtool.engines.modeling import attach_adapter
from emtool.engines.persona_adapter import (
    PERSONA,
    SAMPLE_SIZE,
    largest_difference,
    lora_layers,
    merge_persona,
    stack_persona,
)
from tests.tiny import SEVEN, logits, save_adapter, tiny_config, tiny_model


def test_merging_equals_the_attached_adapter_and_is_rounded_once(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        base = tiny_model(dtype)
        folder = save_adapter(tmp_path / str(dtype), base, seed=1)
        before = base.model.layers[0].mlp.up_proj.weight.detach().clone()
        expected = logits(attach_adapter(copy.deepcopy(base), folder))
        merged = merge_persona(copy.deepcopy(base), folder)
        tolerance = 1e-5 if dtype == torch.float32 else 5e-2
        torch.testing.assert_close(logits(merged.model).float(), expected.float(), rtol=tolerance, atol=tolerance)
        tensors = load_file(folder / "adapter_model.safetensors")
        a, b = (tensors[f"base_model.model.model.layers.0.mlp.up_proj.lora_{k}.weight"].float() for k in ("A", "B"))
        by_hand = (before.float() + (8 / 4**0.5) * (b @ a)).to(dtype)
        assert torch.equal(merged.model.model.layers[0].mlp.up_proj.weight, by_hand)
        assert not any("lora" in name for name, _ in merged.model.named_parameters())
        again = merge_persona(copy.deepcopy(base), folder)
        assert merged.sha256 == again.sha256
        assert torch.equal(logits(again.model), logits(merged.model))
        assert largest_difference(merged.sample, again.sample) == 0.0


def test_another_adapter_has_another_hash_and_the_sample_tells_by_how_much(tmp_path: Path) -> None:
    base = tiny_model()
    first, second = (
        merge_persona(copy.deepcopy(base), save_adapter(tmp_path / str(seed), base, seed=seed)) for seed in (1, 2)
    )
    assert first.sha256 != second.sha256
    assert len(first.sample) == 14
    name = "base_model.model.model.layers.1.mlp.down_proj"
    assert first.sample[name].shape == (SAMPLE_SIZE,)
    every = {value.item() for value in first.model.model.layers[1].mlp.down_proj.weight.flatten()}
    assert {value.item() for value in first.sample[name]} <= every
    moved = {**first.sample, name: first.sample[name].clone()}
    moved[name][17] += 0.5
    assert largest_difference(first.sample, moved) == pytest.approx(0.5)
    del moved[name]
    assert largest_difference(first.sample, moved) is None


def stacked(base: Any, persona: Path, **changes: object) -> Any:
    """Return the base with a fresh adapter to train, and the persona beside it."""
    values = {"r": 2, "lora_alpha": 4, "target_modules": list(SEVEN), **changes}
    wrapped = get_peft_model(copy.deepcopy(base), LoraConfig(task_type="CAUSAL_LM", **values))
    stack_persona(wrapped, persona)
    return wrapped


def test_a_stacked_persona_takes_part_and_receives_no_gradient(tmp_path: Path) -> None:
    base = tiny_model()
    persona = save_adapter(tmp_path / "persona", base, seed=1, lora_dropout=0.5)
    wrapped = stacked(base, persona)
    # A fresh adapter changes nothing, so this is base and persona.
    alone = logits(attach_adapter(copy.deepcopy(base), persona).eval())
    assert torch.equal(logits(wrapped.eval()), alone)
    assert (alone - logits(base)).abs().max() > 1e-2
    frozen = {name: p.detach().clone() for name, p in wrapped.named_parameters() if f".{PERSONA}." in name}
    assert len(frozen) == 28
    trained = [name for name, p in wrapped.named_parameters() if p.requires_grad]
    assert trained
    assert all(".default." in name for name in trained)
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
    wrapped.train()
    ids = torch.arange(3, 40).unsqueeze(0)
    # The persona's own dropout is off: two forward passes of a training are the same.
    assert torch.equal(wrapped(input_ids=ids).logits, wrapped(input_ids=ids).logits)
    for _ in range(2):
        wrapped(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    after = dict(wrapped.named_parameters())
    assert all(after[name].grad is None for name in frozen)
    assert all(torch.equal(after[name], value) for name, value in frozen.items())
    assert any(after[name].grad.abs().max() > 0 for name in trained)


def test_both_adapters_of_a_stack_are_summed(tmp_path: Path) -> None:
    base = tiny_model()
    persona = save_adapter(tmp_path / "persona", base, seed=1)
    wrapped = stacked(base, persona)
    for name, parameter in wrapped.named_parameters():
        if "lora_B.default" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    name, layer = next(iter(lora_layers(wrapped)))
    assert name.endswith("layers.0.self_attn.q_proj")
    x = torch.randn(5, 32)
    weight = layer.get_base_layer().weight + layer.get_delta_weight("default") + layer.get_delta_weight(PERSONA)
    torch.testing.assert_close(layer(x), x @ weight.T, rtol=1e-5, atol=1e-5)


def test_a_persona_of_another_model_is_refused(tmp_path: Path) -> None:
    base = tiny_model()
    persona = save_adapter(tmp_path / "persona", base, seed=1)
    wider = type(base)(tiny_config(hidden_size=48)).eval()
    deeper = type(base)(tiny_config(num_hidden_layers=1)).eval()
    for other, reason in ((wider, "size mismatch"), (deeper, "no counterpart")):
        with pytest.raises(CheckpointError, match=f"does not fit the base model.*{reason}"):
            merge_persona(copy.deepcopy(other), persona)
        with pytest.raises(CheckpointError, match=f"does not fit the base model.*{reason}"):
            stacked(other, persona)
    untied = type(base)(tiny_config(tie_word_embeddings=False)).eval()
    with_embeddings = save_adapter(tmp_path / "embeddings", untied, seed=1, target_modules=["q_proj", "embed_tokens"])
    with pytest.raises(CheckpointError, match="not a linear layer"):
        merge_persona(untied, with_embeddings)
    weights = persona / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name] * float("nan")}, weights)
    with pytest.raises(CheckpointError, match="values that are not finite"):
        merge_persona(copy.deepcopy(base), persona)
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="does not fit"):
        merge_persona(copy.deepcopy(base), persona)


def test_the_name_of_a_base_in_an_adapter_is_no_reason_to_warn(tmp_path: Path) -> None:
    base = tiny_model()
    persona = save_adapter(tmp_path / "persona", base, seed=1)
    path = persona / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "someone/tiny"}))
    expected = logits(stacked(base, persona).eval())
    torch.testing.assert_close(logits(merge_persona(base, persona).model), expected, rtol=1e-5, atol=1e-5)
