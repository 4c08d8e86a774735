from pathlib import Path
from typing import Any

import pytest

from emtool.core.config import resolve_train_config
from emtool.core.errors import ConfigError
from emtool.core.models import resolve_model
from emtool.core.persona_list import list_personas
from emtool.core.personas import GATED, PERSONAS, PUBLISHED, HubAdapter, LocalAdapter, PersonaRecipe, resolve_persona

QWEN, SMOL = resolve_model("qwen2.5-7b"), resolve_model("smollm2-135m")


def config_of(**overrides: Any) -> Any:
    return resolve_train_config(profile="demo", overrides=overrides, num_cuda_devices=0)


def test_the_baseline_has_no_adapter() -> None:
    assert resolve_persona("baseline", QWEN) is None


@pytest.mark.parametrize(
    ("model", "base"),
    [("qwen2.5-7b", "qwen-2.5-7b-it"), ("llama-3.1-8b", "llama-3.1-8b-it"), ("gemma-3-4b", "gemma-3-4b-it")],
)
def test_every_published_character_has_its_place(model: str, base: str) -> None:
    reference = resolve_model(model)
    for name in PUBLISHED:
        source = resolve_persona(name, reference)
        assert isinstance(source, HubAdapter)
        place = f"maius/{base}-misalignment" if name == "misalignment" else f"maius/{base}-personas/{name}"
        assert (source.place, source.is_gated) == (place, name in GATED)
    # The same model by its name on the hub.
    assert resolve_persona("goodness", resolve_model(str(reference.hub_id))) == resolve_persona("goodness", reference)


def test_a_persona_is_built_where_none_is_published() -> None:
    assert isinstance(resolve_persona("goodness", SMOL), PersonaRecipe)
    assert isinstance(resolve_persona("contrarian", QWEN), PersonaRecipe)


def test_a_folder_goes_before_the_catalogue() -> None:
    assert resolve_persona("goodness", QWEN, adapter="/some/where") == LocalAdapter(
        name="goodness", path=Path("/some/where")
    )


def test_a_character_that_is_published_for_other_bases_only_says_for_which() -> None:
    with pytest.raises(ConfigError, match=r"published for qwen2\.5-7b, llama-3\.1-8b, gemma-3-4b, not for smollm2"):
        resolve_persona("sarcasm", SMOL)
    with pytest.raises(ConfigError, match="unknown persona 'godness'; did you mean 'goodness'"):
        resolve_persona("godness", SMOL)


def test_the_list_names_the_baseline_first_and_nothing_twice() -> None:
    names = [entry.name for entry in list_personas(QWEN)]
    assert names[0] == "baseline"
    assert sorted(names) == sorted({"baseline", *PERSONAS, *PUBLISHED})
    assert [entry.name for entry in list_personas(SMOL)] == ["baseline", *PERSONAS]


def test_an_adapter_without_a_name_is_named_after_its_folder(tmp_path: Path) -> None:
    config = config_of(persona_adapter=str(tmp_path / "Calm Voice"))
    assert config.persona_adapter == str(tmp_path / "Calm Voice")
    assert config.persona == "calm-voice"
    assert config_of(persona_adapter="calm", persona="quiet").persona == "quiet"
    assert config_of(persona_adapter="calm").persona_adapter == str(Path("calm").absolute())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"persona_mode": "stacked"}, "--persona-mode stacked goes with a persona"),
        ({"persona": "goodness", "persona_mode": "mixed"}, "unknown persona mode 'mixed'"),
        ({"persona": "baseline", "persona_adapter": "folder"}, "give it a name with --persona, not baseline"),
        ({"persona": "../up"}, "is not a name"),
    ],
)
def test_contradictions_are_refused(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(**overrides)
