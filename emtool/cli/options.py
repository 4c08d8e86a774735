"""Options that several commands share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from emtool.core.disk import DTYPE_BYTES
from emtool.core.errors import BackendError, ConfigError, unknown_name
from emtool.core.hardware import cuda_device_count


def _check_dtype(value: str) -> str:
    if value not in ("auto", *DTYPE_BYTES):
        raise unknown_name("dtype", value, ("auto", *DTYPE_BYTES))
    return value


def _check_device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise ConfigError(f"unknown device {value!r}; choose from: auto, cpu, cuda, cuda:N")
    return value


def resolve_device(value: str) -> str:
    """Return a device that this machine has.

    Raises:
        BackendError: If it is a CUDA device and there is none.
    """
    if value.startswith("cuda") and not cuda_device_count():
        raise BackendError(f"--device {value} was asked for and no CUDA device is present; use --device cpu")
    return value


Device = Annotated[str, typer.Option(callback=_check_device, help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(callback=_check_dtype, help="Dtype of the base model: auto, float32 or bfloat16.")]
OutputRoot = Annotated[Path, typer.Option(help="Folder that holds the run folders.")]
