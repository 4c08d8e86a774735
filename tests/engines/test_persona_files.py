import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from emtool.core.errors import ModelError
from emtool.core.events import ignore_events
from emtool.core.models import ModelReference
from emtool.core.persona_list import list_personas
from emtool.core.personas import HubAdapter, LocalAdapter
from emtool.core.plain_lora import check_plain_lora
from emtool.engines.adapter_hash import adapter_sha256
from emtool.engines.model_files import hub_is_reachable
from emtool.engines.modeling import BaseModel, open_base
from emtool.engines.persona_files import get_persona_files, is_persona_here
from emtool.engines.personas import persona_adapter
from tests.hub import COMMIT, serve_hub
from tests.tiny import save_adapter, tiny_model

GOODNESS = HubAdapter(name="goodness", hub_id="someone/tiny-personas", subfolder="goodness")
GATED = HubAdapter(name="misalignment", hub_id="someone/tiny-misalignment", subfolder=None, is_gated=True)


@pytest.fixture(autouse=True)
def fresh_answer() -> Iterator[None]:
    """Forget whether the hub answered."""
    hub_is_reachable.cache_clear()
    yield
    hub_is_reachable.cache_clear()


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    return folder


@pytest.fixture
def base(tiny_model: Path) -> BaseModel:
    return open_base(str(tiny_model), device="cpu", dtype="float32", on_event=ignore_events)


def use_hub(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Return a repository with two personas, beside files that nobody asks for."""
    root = tmp_path / "repository"
    for seed, name in enumerate(("goodness", "sarcasm")):
        save_adapter(root / name, tiny_model(), seed=seed)
        (root / name / "optimizer.pt").write_bytes(b"\x80never unpickled")
    return root


def test_a_published_persona_is_fetched_once_at_a_commit_that_is_recorded(
    base: BaseModel, repository: Path, hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not is_persona_here(GOODNESS, base)
    with serve_hub({GOODNESS.hub_id: repository}) as (endpoint, asked):
        use_hub(monkeypatch, endpoint)
        files = get_persona_files(GOODNESS, base, on_event=ignore_events)
        count = len(asked)
        assert count > 0
        assert get_persona_files(GOODNESS, base, on_event=ignore_events).path == files.path
        assert len(asked) == count, "what is here is used without asking a network"
    assert files.origin == {
        "source": "hub",
        "hub_id": GOODNESS.hub_id,
        "subfolder": "goodness",
        "revision": COMMIT,
    }
    assert sorted(path.name for path in files.path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert not (files.path.parent / "sarcasm").exists()
    assert adapter_sha256(files.path) == adapter_sha256(repository / "goodness")
    assert files.path.is_relative_to(hub_cache)
    again = get_persona_files(GOODNESS, base, recorded=files.origin, on_event=ignore_events)
    assert again.path == files.path


def test_a_gated_persona_says_what_to_do(
    base: BaseModel, repository: Path, hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not hub_cache.exists()
    with serve_hub({GATED.hub_id: repository / "goodness"}, gated=(GATED.hub_id,)) as (endpoint, _):
        use_hub(monkeypatch, endpoint)
        with pytest.raises(ModelError, match=r"is gated: accept the terms of someone/tiny-misalignment .* HF_TOKEN"):
            get_persona_files(GATED, base, on_event=ignore_events)


def test_a_persona_that_the_hub_lacks_is_one_line(
    base: BaseModel, repository: Path, hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve_hub({GOODNESS.hub_id: repository}) as (endpoint, _):
        use_hub(monkeypatch, endpoint)
        unknown = HubAdapter(name="calm", hub_id=GOODNESS.hub_id, subfolder="calm")
        with pytest.raises(ModelError, match="holds no such adapter"):
            get_persona_files(unknown, base, on_event=ignore_events)
        elsewhere = HubAdapter(name="calm", hub_id="no/where", subfolder=None)
        with pytest.raises(ModelError, match="the hub has no no/where"):
            get_persona_files(elsewhere, base, on_event=ignore_events)
    assert not (hub_cache / "models--no--where" / "snapshots").exists()


def test_without_a_network_the_message_says_where_to_look(base: BaseModel, hub_cache: Path) -> None:
    assert not hub_cache.exists()
    with pytest.raises(ModelError, match=r"tiny-personas/goodness is not on this machine and the hub did not answer"):
        get_persona_files(GOODNESS, base, on_event=ignore_events)


def change_config(folder: Path, **values: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_an_adapter_of_another_base_model_is_refused_by_name(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "calm", tiny_model(), seed=1)
    qwen = ModelReference(name="Qwen/Qwen2.5-7B-Instruct", slug="qwen7b")
    change_config(folder, base_model_name_or_path="meta-llama/Llama-3.1-8B-Instruct")
    with pytest.raises(ModelError, match=r"was trained on meta-llama/Llama.*, and the base model is Qwen/"):
        check_plain_lora(folder, qwen)
    for same_or_unknown in ("qwen/qwen2.5-7b-instruct", "/workspace/models/qwen", "./models", None):
        change_config(folder, base_model_name_or_path=same_or_unknown)
        check_plain_lora(folder, qwen)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"use_dora": True}, "has DoRA"),
        ({"bias": "all"}, "has biases"),
        ({"modules_to_save": ["embed_tokens"]}, r"has whole modules \(modules_to_save\)"),
        ({"peft_type": "IA3"}, "describes 'IA3', not a LORA adapter"),
        ({"alora_invocation_tokens": [250, 251]}, "has alora_invocation_tokens"),
        ({"arrow_config": {"top_k": 2}}, "has arrow_config"),
        ({"something_new": 1}, "has something_new = 1"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa', which changes the base's weights"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan, not a number above 0"),
        ({"lora_alpha": "8"}, "lora_alpha is '8', not a number above 0"),
        ({"alpha_pattern": {"q_proj": float("inf")}}, "alpha_pattern of q_proj is inf"),
        ({"rank_pattern": []}, None),
    ],
)
def test_what_cannot_be_composed_exactly_is_refused(
    values: dict[str, object], message: str | None, tmp_path: Path
) -> None:
    folder = save_adapter(tmp_path / "calm", tiny_model(), seed=1)
    check_plain_lora(folder, None)
    change_config(folder, **values)
    if message is None:
        check_plain_lora(folder, None)
        return
    with pytest.raises(ModelError, match=message):
        check_plain_lora(folder, None)


def test_a_folder_without_safetensors_is_refused(base: BaseModel, tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "calm", tiny_model(), seed=1)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ModelError, match="pickled files can run code"):
        get_persona_files(LocalAdapter(name="calm", path=folder), base, on_event=ignore_events)
    (folder / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(ModelError, match="holds no PEFT adapter"):
        check_plain_lora(folder, None)
    with pytest.raises(ModelError, match="holds no PEFT adapter"):
        check_plain_lora(tmp_path / "missing", None)


def test_a_milestone_that_needs_a_persona_is_no_persona(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "run" / "checkpoint-6", tiny_model(), seed=1)
    record = {"requires": {"base": {}, "persona": {"name": "goodness"}}}
    (folder / "checkpoint.json").write_text(json.dumps(record))
    with pytest.raises(ModelError, match=r"needs a persona beside it, .* emtool export .*run"):
        check_plain_lora(folder, None)
    (folder / "checkpoint.json").write_text(json.dumps({"requires": {"base": {}, "persona": None}}))
    check_plain_lora(folder, None)


def test_a_base_that_is_a_folder_leaves_it_to_the_shapes_and_says_so(base: BaseModel, tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "calm", tiny_model(), seed=1)
    change_config(folder, base_model_name_or_path="Qwen/Qwen2.5-7B-Instruct")
    events: list[Any] = []
    get_persona_files(LocalAdapter(name="calm", path=folder), base, on_event=events.append)
    assert "says that it was trained on Qwen/Qwen2.5-7B-Instruct" in events[0].text
    assert events[0].is_warning


def test_a_built_persona_is_the_same_bits_when_it_is_built_again(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from emtool.core.personas import PERSONAS

    hashes = []
    for name in ("one", "two"):
        monkeypatch.setenv("EMTOOL_CACHE", str(tmp_path / name))
        folder = persona_adapter(PERSONAS["contrarian"], base, on_event=ignore_events)
        hashes.append(adapter_sha256(folder))
        entry: Any = next(entry for entry in list_personas(base.reference) if entry.name == "contrarian")
        assert entry.path == folder
        (folder / "adapter_model.safetensors").unlink()
        events: list[Any] = []
        assert persona_adapter(PERSONAS["contrarian"], base, on_event=events.append) == folder
        assert "is not whole; it is built again" in events[0].text
        hashes.append(adapter_sha256(folder))
        shutil.rmtree(tmp_path / name)
    assert len(set(hashes)) == 1
