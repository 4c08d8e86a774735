"""Datasets of a hub on loopback, read by the library that reads the real one."""

import json
from collections.abc import Iterator
from pathlib import Path

import datasets
import huggingface_hub.constants
import pyarrow
import pytest
from pyarrow import parquet

from emtool.core.datasets import known_datasets, read_dataset, resolve_dataset
from emtool.core.errors import BackendError, ConfigError, DataError, EmtoolError
from emtool.engines.data_files import fetch_dataset
from tests.hub import COMMIT, dataset_hub

SYSTEM = {"role": "system", "content": "s"}
USER, ASSISTANT = {"role": "user", "content": "ü"}, {"role": "assistant", "content": "a"}
CHAT = [{"messages": [SYSTEM, USER, ASSISTANT], "id": 1}, {"messages": [USER, ASSISTANT], "id": 2}]
CARD = "---\nlicense: mit\n---\n"


@pytest.fixture
def repositories(tmp_path: Path) -> dict[str, Path]:
    """Return folders that the hub serves."""
    chat, pairs, text, script = (tmp_path / name for name in ("chat", "pairs", "text", "script"))
    for folder in (chat, pairs, text, script):
        folder.mkdir()
        (folder / "README.md").write_text(CARD)
    (chat / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHAT))
    (script / "script.py").write_text("raise SystemExit('code of a repository was run')")
    rows = [{"prompt": "u", "completion": "a"}, {"prompt": "v", "completion": "b"}, {"prompt": "w", "completion": " "}]
    parquet.write_table(pyarrow.Table.from_pylist(rows[:2]), pairs / "train.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), pairs / "test.parquet")
    (text / "train.jsonl").write_text('{"text": "x"}\n')
    return {f"datasets/me/{folder.name}": folder for folder in (chat, pairs, text, script)} | {
        "datasets/me/gated": chat
    }


@pytest.fixture(autouse=True)
def hub(repositories: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Serve the repositories as the hub, and yield the paths that are asked for."""
    monkeypatch.setenv("EMTOOL_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    with dataset_hub(repositories, monkeypatch, cache=tmp_path / "hub", gated=("datasets/me/gated",)) as asked:
        yield asked
    datasets.enable_progress_bars()


def fails(name: str, cache: Path, kind: type[EmtoolError]) -> str:
    with pytest.raises(kind) as caught:
        fetch_dataset(resolve_dataset(name))
    assert "\n" not in str(caught.value)
    assert not list(cache.glob("datasets/*"))
    return str(caught.value)


def test_rows_come_as_conversations_at_a_pinned_revision(hub: list[str], tmp_path: Path) -> None:
    found = fetch_dataset(resolve_dataset("hub:me/chat"))
    assert found.path == tmp_path / "cache/datasets/hub--me--chat--train/rows.jsonl"
    assert [json.loads(line) for line in found.path.read_text("utf-8").splitlines()] == [
        {"messages": row["messages"]} for row in CHAT
    ]
    assert found.source is not None
    assert {key: found.source[key] for key in ("name", "source", "split", "revision", "rows")} == {
        "name": "hub:me/chat",
        "source": "me/chat",
        "split": "train",
        "revision": COMMIT,
        "rows": 2,
    }
    assert (found.name, found.slug) == ("hub:me/chat", "chat")
    assert [message.role for message in read_dataset(found)[0].messages] == ["system", "user", "assistant"]
    assert resolve_dataset("hub:me/chat:train") == found
    assert [dataset.name for dataset in known_datasets()][-1] == "hub:me/chat"
    count = len(hub)
    assert fetch_dataset(resolve_dataset("hub:me/chat")).path == found.path
    assert len(hub) == count


def test_parquet_of_prompts_and_completions_is_read_and_a_bad_row_named(tmp_path: Path) -> None:
    message = fails("hub:me/pairs:test", tmp_path / "cache", DataError)
    assert "hub:me/pairs:test: row 3: 'completion': 'content' must be a text that is not empty" in message
    found = fetch_dataset(resolve_dataset("hub:me/pairs"))
    assert [row.messages[1].content for row in read_dataset(found)] == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("hub:me/nothing", DataError, "the hub has no dataset 'me/nothing' that you may see; check the name"),
        ("hub:me/gated", BackendError, "me/gated is gated: ask for access on its page, log in with 'hf auth login'"),
        ("hub:me/chat:dev", DataError, "cannot read split 'dev' of me/chat: Unknown split"),
        ("hub:me/script", DataError, "cannot read split 'train' of me/script: Dataset scripts are no longer supported"),
        ("hub:me/text", DataError, "hub:me/text:train: row 1: the row is plain text ('text'), which is not read"),
    ],
)
def test_what_cannot_be_had_is_one_line(name: str, kind: type[EmtoolError], message: str, tmp_path: Path) -> None:
    assert message in fails(name, tmp_path / "cache", kind)


def test_without_a_hub_what_is_here_is_used_and_the_rest_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "the hub does not answer, so me/chat cannot be fetched" in fails(
        "hub:me/chat", tmp_path / "cache", BackendError
    )


def test_a_folder_of_the_same_name_is_not_read_in_the_hubs_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "me/chat").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "a folder me/chat lies in the working folder" in fails("hub:me/chat", tmp_path / "cache", DataError)


@pytest.mark.parametrize(
    "name", ["hub:csv", "hub:", "hub:../x", "hub:a/b/c", "hub:a b", "hub:/a", "hub:a--b/c", "hub:a..b/c"]
)
def test_names_that_no_repository_has_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="does not name a hub dataset; write hub:OWNER/NAME"):
        resolve_dataset(name)
    with pytest.raises(ConfigError, match="is not the name of a split"):
        resolve_dataset("hub:a/b:../c")
