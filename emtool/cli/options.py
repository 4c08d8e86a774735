"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from emtool.core.errors import unknown_name
from emtool.core.file_sizes import DTYPE_BYTES
from emtool.core.hardware import parse_device


def _check_dtype(value: str) -> str:
    if value not in ("auto", *DTYPE_BYTES):
        raise unknown_name("dtype", value, ("auto", *DTYPE_BYTES))
    return value


def _check_device(value: str) -> str:
    parse_device(value)
    return value


Device = Annotated[str, typer.Option(callback=_check_device, help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(callback=_check_dtype, help="Dtype of the base model: auto, float32 or bfloat16.")]
OutputRoot = Annotated[Path, typer.Option(help="Folder that holds the run folders.")]
