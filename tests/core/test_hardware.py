import os

import pytest

from emtool.core import hardware
from emtool.core.errors import BackendError, ConfigError
from emtool.core.hardware import cuda_device_count, parse_device, select_device


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


def test_hidden_devices_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert cuda_device_count() == 0
    assert select_device("auto") == "cpu"
    with pytest.raises(BackendError, match="use --device cpu"):
        select_device("cuda")
