"""The options of commands that spread their work, and what they make of them."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from emtool.core.errors import ConfigError
from emtool.core.hardware import usable_cpu_count
from emtool.core.jobs import InSequence, Pool

WORKERS = "Workers (need the extra 'ray')"

Workers = Annotated[
    int | None,
    typer.Option(
        min=1, max=10_000, help="Jobs at a time, on Ray. \\[default: one, without Ray]", rich_help_panel=WORKERS
    ),
]
Address = Annotated[
    str | None,
    typer.Option(
        help="Ray cluster that is there already, for instance auto or 10.0.0.5:6379. \\[default: one on this machine, "
        "for the time of the command]",
        rich_help_panel=WORKERS,
    ),
]


def check_workers(workers: int | None, address: str | None) -> None:
    """Refuse a cluster that is named without a number of workers, or by nothing.

    Raises:
        ConfigError: If it is.
    """
    if workers is None and address is not None:
        raise ConfigError("--address goes with --workers, the number of jobs at a time")
    if address is not None and not address.strip():
        raise ConfigError("--address is empty; leave it out for a cluster on this machine")


def refuse_numbered_device(device: str, *, option: str) -> None:
    """Refuse a device option that names one of several, where Ray gives each job its own.

    Raises:
        ConfigError: If it does.
    """
    if ":" in device:
        raise ConfigError(
            f"{option} {device} does not go with --workers: Ray gives each its device; name cuda, and in "
            "CUDA_VISIBLE_DEVICES those that may be taken"
        )


def make_pool(workers: int | None, address: str | None, *, num_cpus: float = 1, num_gpus: float = 0) -> Pool:
    """Return what runs the jobs: Ray where workers are asked for, else this machine in sequence.

    Raises:
        ConfigError: If a cluster is named without a number of workers.
        MissingDependencyError: If Ray is needed and not installed.
    """
    check_workers(workers, address)
    if workers is None:
        return InSequence()
    from emtool.engines.ray_pool import RayPool, check_ray

    check_ray()
    return RayPool(workers=workers, address=address, num_cpus=num_cpus, num_gpus=num_gpus)


def threads_of(workers: int | None, address: str | None) -> int | None:
    """Return the threads of each of some processes that share this machine; None leaves that to Ray and torch.

    To be called before a library is loaded: its limit would pass for a number that the user has set.
    """
    if workers is None or address is not None or "OMP_NUM_THREADS" in os.environ:
        return None
    return max(1, usable_cpu_count() // workers)
