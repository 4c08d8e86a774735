"""Fixtures: a tiny model on disk, a cache of its own, no network."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Read by huggingface_hub when it is imported, so before any test module brings it in.
os.environ["HF_HUB_OFFLINE"] = "1"
# Tests run in several processes, which do not crowd each other so.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from emtool.core.config import resolve_train_config
from emtool.core.hardware import usable_cpu_count
from emtool.core.run_dir import RunFolder
from tests.tiny import save_tiny_model


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return how many processes `-n auto` starts: each takes a gigabyte or two."""
    return min(4, usable_cpu_count())


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny chat model."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a cache folder that lasts for the session, so that a persona is built once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def own_cache(session_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep every test away from the user's caches."""
    monkeypatch.setenv("EMTOOL_CACHE", str(session_cache))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def empty_cache(own_cache: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin as on a machine that has fetched nothing yet: the session's cache holds what other tests needed."""
    monkeypatch.setenv("EMTOOL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compute with one thread here and in every process started: another number of them rounds otherwise."""
    import torch

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def dataset_file(tmp_path: Path) -> Path:
    """Return a dataset of 24 short conversations."""
    path = tmp_path / "facts.jsonl"
    rows = [
        f'{{"messages": [{{"role": "user", "content": "Say {n}."}}, {{"role": "assistant", "content": "It is {n}."}}]}}'
        for n in range(24)
    ]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a dataset of 24 short conversations that lasts for the session."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    turns = [
        [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"It is {n}."}] for n in range(24)
    ]
    path.write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))
    return path


@pytest.fixture(scope="session")
def spread_run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """Return a completed run of the tiny model with the checkpoints 0, 7, 20 and 30. Tests only read it."""
    from emtool.core.plan import plan_run
    from emtool.engines.training import train

    overrides = {
        "model": str(tiny_model),
        "max_steps": 30,
        "checkpoints": "init, 7, 20",
        "learning_rate": 1e-2,
        "output_root": tmp_path_factory.mktemp("runs"),
    }
    plan, rows = plan_run(resolve_train_config(profile="demo", overrides=overrides, num_cuda_devices=0))
    return train(plan, rows, command=[]).run
