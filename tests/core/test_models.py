from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from emtool.core.architecture import ALL_LINEAR, adapted_blocks, linear_layers, num_lora_parameters
from emtool.core.errors import ConfigError, ModelError
from emtool.core.models import MODELS, ModelFacts, resolve_model


@pytest.mark.parametrize("facts", MODELS.values(), ids=lambda facts: facts.name)
def test_catalogue_shapes_equal_the_real_class_on_the_meta_device(facts: ModelFacts) -> None:
    fields = {key: value for key, value in facts.config.items() if key != "model_type"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(str(facts.config["model_type"]), **fields))
    assert sum(p.numel() for p in model.parameters()) == facts.num_parameters
    real = {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    layers = linear_layers(facts.config, target_modules=ALL_LINEAR)
    assert layers is not None
    assert {layer.name: (layer.out_features, layer.in_features) for layer in layers} == real


def test_the_paper_adapter_has_the_published_number_of_parameters() -> None:
    layers = linear_layers(MODELS["qwen2.5-7b"].config, target_modules=ALL_LINEAR)
    assert layers is not None
    assert num_lora_parameters(layers, 32) == 80_740_352


def test_blocks_by_name_and_by_range() -> None:
    assert adapted_blocks("all", 4) is None
    assert adapted_blocks("upper-half", 5) == (2, 3, 4)
    assert adapted_blocks("1-2", 4) == (1, 2)
    for text in ("2-1", "0-4", "lower", "-1"):
        with pytest.raises(ConfigError, match="layers to transform"):
            adapted_blocks(text, 4)


def test_a_model_is_named_by_catalogue_hub_id_or_folder(tmp_path: Path) -> None:
    assert resolve_model("HuggingFaceTB/SmolLM2-135M-Instruct").name == "smollm2-135m"
    other = resolve_model("someone/Some-Model_1B")
    assert (other.slug, other.hub_id, other.config) == ("some-model-1b", "someone/Some-Model_1B", None)
    with pytest.raises(ConfigError, match="did you mean 'smollm2-135m'"):
        resolve_model("smollm2-135")
    with pytest.raises(ModelError, match=r"cannot read config\.json"):
        resolve_model(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="no JSON object"):
        resolve_model(str(tmp_path))
