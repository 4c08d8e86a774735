from pathlib import Path

import pytest

from emtool.core.errors import ConfigError, ModelError
from emtool.core.models import resolve_model


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
