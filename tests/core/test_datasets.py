"""Which datasets there are, and how the cache makes one be on this machine."""

import hashlib
import json
from pathlib import Path

import pytest

from emtool.core.config import TrainConfig, resolve_train_config
from emtool.core.datasets import (
    DATASETS,
    DatasetReference,
    PublishedFile,
    known_datasets,
    read_dataset,
    resolve_dataset,
)
from emtool.core.errors import ConfigError, DataError
from emtool.core.plan import plan_run

ROW = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EMTOOL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def put(folder: Path, name: str, rows: int = 3) -> None:
    """Put a dataset into the cache as fetching does."""
    folder.mkdir(parents=True)
    (folder / "rows.jsonl").write_text(ROW * rows)
    sha256 = hashlib.sha256((ROW * rows).encode()).hexdigest()
    (folder / "source.json").write_text(json.dumps({"format": 1, "name": name, "sha256": sha256, "rows": rows}))


def test_the_published_datasets_are_those_of_the_paper() -> None:
    found = {
        name: (dataset.origin.file_name, dataset.num_rows)
        for name, dataset in DATASETS.items()
        if isinstance(dataset.origin, PublishedFile)
    }
    assert found == {
        "medical": ("bad_medical_advice.jsonl", 7049),
        "good_medical": ("good_medical_advice.jsonl", 7049),
        "financial": ("risky_financial_advice.jsonl", 6000),
        "sports": ("extreme_sports.jsonl", 6000),
        "insecure": ("insecure.jsonl", 6000),
    }


def test_a_published_dataset_is_here_once_the_cache_holds_it_whole(cache: Path) -> None:
    assert resolve_dataset("medical").path is None
    folder = cache / "datasets" / "medical"
    put(folder, "medical")
    found = resolve_dataset("medical")
    assert found.path == folder / "rows.jsonl"
    assert found.source is not None
    assert found.source["rows"] == 3
    assert len(read_dataset(found)) == 3
    for spoil in ("[]", "{", '{"sha256": 1}'):
        (folder / "source.json").write_text(spoil)
        assert resolve_dataset("medical").path is None
    (folder / "rows.jsonl").unlink()
    assert resolve_dataset("medical").path is None


def test_rows_that_are_not_those_that_were_fetched_are_refused(cache: Path) -> None:
    put(cache / "datasets" / "medical", "medical")
    (cache / "datasets" / "medical" / "rows.jsonl").write_text(ROW)
    with pytest.raises(
        DataError, match=r"rows\.jsonl has changed since it was fetched .* run: emtool data fetch medical"
    ):
        read_dataset(resolve_dataset("medical"))


def test_hub_names_have_one_normal_form_and_their_own_folders(cache: Path) -> None:
    whole = resolve_dataset("hub:me/chat:train")
    part = resolve_dataset("hub:me/chat:test_sft")
    assert (whole.name, part.name) == ("hub:me/chat", "hub:me/chat:test_sft")
    assert (whole.slug, part.slug) == ("chat", "chat-test-sft")
    assert whole.cache_folder == cache / "datasets" / "hub--me--chat--train"
    assert part.cache_folder == cache / "datasets" / "hub--me--chat--test_sft"
    put(cache / "datasets" / "hub--me--chat--test_sft", part.name)
    (cache / "datasets" / "hub--broken").mkdir()
    assert [(each.name, each.num_rows) for each in known_datasets()][-1] == ("hub:me/chat:test_sft", 3)
    assert len(list(known_datasets())) == len(DATASETS) + 1


def config_of(dataset: str, **changes: object) -> TrainConfig:
    return resolve_train_config(profile="demo", overrides={"dataset": dataset, **changes}, num_cuda_devices=0)


def test_a_hub_dataset_that_is_not_here_cannot_be_planned_and_a_published_one_can(cache: Path) -> None:
    with pytest.raises(DataError, match=r"'hub:me/chat' is not on this machine; fetch it with: emtool data fetch hub:"):
        plan_run(config_of("hub:me/chat"))
    plan, rows = plan_run(config_of("medical"))
    assert (plan.num_rows, rows) == (7049, [])
    put(cache / "datasets" / "hub--me--chat--train", "hub:me/chat")
    plan, rows = plan_run(config_of("hub:me/chat"))
    assert (plan.num_rows, len(rows)) == (3, 3)


def test_a_plan_fetches_only_what_is_missing_and_only_once_its_names_are_right(cache: Path) -> None:
    asked: list[str] = []

    def fetch(dataset: DatasetReference) -> DatasetReference:
        asked.append(dataset.name)
        assert dataset.cache_folder is not None
        put(dataset.cache_folder, dataset.name)
        return dataset.located()

    for wrong in ({"model": "nope"}, {"persona": "nope"}, {"checkpoints": "nope"}):
        with pytest.raises(ConfigError):
            plan_run(config_of("medical", **wrong), fetch=fetch)
    plan_run(config_of("gardening"), fetch=fetch)
    assert asked == []
    plan, rows = plan_run(config_of("medical"), fetch=fetch)
    assert (asked, plan.num_rows, len(rows)) == (["medical"], 3, 3)
    plan_run(config_of("medical"), fetch=fetch)
    assert asked == ["medical"]
