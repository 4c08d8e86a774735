import os
from pathlib import Path

import pytest

from emtool.core import hardware
from emtool.core.errors import BackendError, ConfigError
from emtool.core.hardware import cuda_device_count, find_device, parse_device, select_device


@pytest.mark.parametrize(("text", "expected"), [("auto", ("auto", 0)), ("cpu", ("cpu", 0)), ("cuda:3", ("cuda", 3))])
def test_device_options(text: str, expected: tuple[str, int]) -> None:
    assert parse_device(text) == expected


@pytest.mark.parametrize("text", ["gpu", "cpu:1", "auto:0", "cuda:", "cuda:-1", ""])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="choose from: auto, cpu, cuda, cuda:N"):
        parse_device(text)


def test_one_device_is_left_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "cuda_device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    assert select_device("cuda:1") == "cuda"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "6"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert select_device("auto") == "cuda"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"
    with pytest.raises(BackendError, match="cuda:5 was asked for and 3 CUDA devices"):
        select_device("cuda:5")


def test_what_is_started_from_here_sees_every_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "cuda_device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [find_device(device) for device in ("cuda:1", "auto", "cpu")] == ["cuda", "cuda", "cpu"]
    with pytest.raises(BackendError, match="cuda:5 was asked for and 3 CUDA devices"):
        find_device("cuda:5")
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_hidden_devices_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert cuda_device_count() == 0
    assert select_device("auto") == "cpu"
    with pytest.raises(BackendError, match="use --device cpu"):
        select_device("cuda")


@pytest.mark.parametrize(
    ("name", "content", "period", "expected"),
    [
        ("cpu.max", "max 100000", "", 8),
        ("cpu.max", "150000 100000", "", 2),
        ("cpu.max", "50000 100000", "", 1),
        ("cpu.max", "9900000 100000", "", 8),
        ("cpu.max", "nonsense", "", 8),
        ("cpu.cfs_quota_us", "-1", "100000", 8),
        ("cpu.cfs_quota_us", "300000", "100000", 3),
    ],
)
def test_threads_are_as_many_as_a_container_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str, period: str, expected: int
) -> None:
    (tmp_path / name).write_text(content)
    (tmp_path / "cpu.cfs_period_us").write_text(period)
    monkeypatch.setattr(hardware, "_QUOTA_FILES", (tmp_path / "none", tmp_path / name))
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    # Set first, so that whatever the function sets is undone.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert hardware.usable_cpu_count() == expected
    hardware.limit_threads()
    assert os.environ.get("OMP_NUM_THREADS") == (None if expected == 8 else str(expected))
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    hardware.limit_threads()
    assert os.environ["OMP_NUM_THREADS"] == "5"
