"""Shapes from config.json and from weight files, against the real classes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from emtool.core.architecture import FAMILIES, HEAD, LINEAR, ModelShapes, shapes_from_config
from emtool.core.errors import ConfigError, ModelError
from emtool.core.models import MODELS, ModelFacts, resolve_model
from emtool.core.shapes import find_shapes, shapes_from_weights
from emtool.engines.empty_model import empty_shapes, shapes_of
from tests.tiny import save_tiny_model

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "vision_use_head": False,
}
CASES: dict[str, dict[str, Any]] = {
    "llama": {**SMALL, "attention_bias": True, "mlp_bias": True, "head_dim": 24},
    "mistral": SMALL,
    "qwen2": {**SMALL, "tie_word_embeddings": True},
    "qwen3": {**SMALL, "head_dim": 32},
    "gemma2": {**SMALL, "head_dim": 32},
    "gemma3_text": {**SMALL, "head_dim": 32},
    "gemma3": {"text_config": {**SMALL, "head_dim": 32, "model_type": "gemma3_text"}, "vision_config": VISION},
    "phi3": SMALL,
    "gpt_neox": {key: value for key, value in SMALL.items() if key != "num_key_value_heads"},
}


def build(config: dict[str, Any]) -> Any:
    fields = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(str(config["model_type"]), **fields))


def check(shapes: ModelShapes | None, model: Any) -> None:
    assert shapes is not None
    assert {p.name: p.shape for p in shapes.parameters if not p.is_tied} == {
        name: tuple(parameter.shape) for name, parameter in model.named_parameters()
    }
    real = shapes_of(model, num_blocks=shapes.num_blocks)
    assert {p.name for p in shapes.parameters if p.kind == LINEAR} == {
        p.name for p in real.parameters if p.kind == LINEAR
    }
    assert [(p.name, p.shape, p.is_tied) for p in shapes.parameters if p.kind == HEAD] == [
        (p.name, p.shape, p.is_tied) for p in real.parameters if p.kind == HEAD
    ]
    assert shapes.num_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("facts", MODELS.values(), ids=lambda facts: facts.name)
def test_catalogue_shapes_equal_the_real_class_on_the_meta_device(facts: ModelFacts) -> None:
    shapes = shapes_from_config(facts.config)
    check(shapes, build(dict(facts.config)))
    assert shapes is not None
    assert shapes.num_parameters == facts.num_parameters


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_equals_its_real_class(family: str) -> None:
    config = {"model_type": family, **CASES[family]}
    real = build(config)
    written = json.loads(json.dumps({**config, "tie_word_embeddings": real.config.tie_word_embeddings}))
    check(shapes_from_config(written), real)


def test_an_unknown_family_or_a_field_left_to_the_library_is_not_guessed() -> None:
    assert shapes_from_config({"model_type": "mystery"}) is None
    assert shapes_from_config({"model_type": "llama", "hidden_size": 64}) is None
    assert shapes_from_config({**SMALL, "model_type": "gemma2"}) is None, "its head_dim is not hidden_size / heads"
    for bad in (0, -1, "64", True, 1.5):
        with pytest.raises(ConfigError, match="hidden_size="):
            shapes_from_config({**SMALL, "model_type": "llama", "hidden_size": bad})


def test_weight_files_tell_the_shapes_of_a_family_that_is_not_known(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    known = find_shapes(resolve_model(str(folder)), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mystery"}))
    read = find_shapes(resolve_model(str(folder)), folder)
    assert known is not None
    assert read is not None
    assert {(p.name, p.shape, p.kind) for p in read.parameters} == {
        (p.name, p.shape, p.kind) for p in known.parameters if not p.is_tied
    }
    assert (read.num_blocks, read.is_exact, known.is_exact) == (2, False, True)


def test_a_damaged_weight_file_is_one_error_and_reads_little(tmp_path: Path) -> None:
    assert shapes_from_weights(tmp_path) is None
    bad = {
        "empty": b"",
        "long": (2**40).to_bytes(8, "little") + b"{}",
        "text": (5).to_bytes(8, "little") + b"hello",
        "list": (2).to_bytes(8, "little") + b"[]",
        "shape": (14).to_bytes(8, "little") + b'{"a": {"b":1}}',
    }
    for name, contents in bad.items():
        (tmp_path / "model.safetensors").write_bytes(contents)
        with pytest.raises(ModelError, match="is not a safetensors file"):
            shapes_from_weights(tmp_path)
        assert name


def test_the_class_tells_the_shapes_where_nothing_else_does(tmp_path: Path) -> None:
    fields = {**SMALL, "num_hidden_layers": 2}
    AutoConfig.for_model("olmo2", **fields).save_pretrained(tmp_path)
    model = resolve_model(str(tmp_path))
    assert find_shapes(model, tmp_path) is None
    shapes = empty_shapes(model)
    real = build({"model_type": "olmo2", **fields})
    assert shapes is not None
    assert shapes.num_parameters == sum(p.numel() for p in real.parameters())
    assert len(shapes.linear_weights) == 14
    (tmp_path / "config.json").write_text('{"model_type": "mystery"}')
    assert empty_shapes(resolve_model(str(tmp_path))) is None


@pytest.mark.parametrize("entry", ['{"shape":[Infinity,2]}', '{"shape":[-5,2]}', '{"shape":[true,"12"]}', "5"])
def test_a_header_with_impossible_shapes_is_refused(tmp_path: Path, entry: str) -> None:
    header = f'{{"a":{entry}}}'.encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ModelError, match="not a safetensors file"):
        shapes_from_weights(tmp_path)


def test_only_the_files_that_a_library_would_load_are_counted(tmp_path: Path) -> None:
    header = b'{"model.layers.0.q_proj.weight":{"dtype":"F32","shape":[8,8],"data_offsets":[0,256]}}'
    other = header.replace(b"q_proj", b"v_proj")
    for name, text in (("model.safetensors", header), ("consolidated.safetensors", other)):
        (tmp_path / name).write_bytes(len(text).to_bytes(8, "little") + text)
    shapes = shapes_from_weights(tmp_path)
    assert shapes is not None
    assert shapes.num_parameters == 64
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"b": "consolidated.safetensors"}}')
    shapes = shapes_from_weights(tmp_path)
    assert shapes is not None
    assert [p.name for p in shapes.parameters] == ["model.layers.0.v_proj.weight"]


@pytest.mark.parametrize("config", [{"text_config": 5}, {"num_hidden_layers": 10**8}])
def test_a_config_that_no_model_can_have_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"config\.json"):
        shapes_from_config({"model_type": "llama", **config})
