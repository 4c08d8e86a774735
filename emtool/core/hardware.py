"""What the machine has, found without torch."""

from __future__ import annotations

import ctypes
import math
import os
import re
import sys
from pathlib import Path

from emtool.core.errors import BackendError, ConfigError

#: Where a process in a container finds its control group.
_QUOTA_FILES = (Path("/sys/fs/cgroup/cpu.max"), Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"))

_LIBRARY = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"
_COUNT = (
    f"import ctypes\ndriver = ctypes.CDLL({_LIBRARY!r})\ncount = ctypes.c_int(0)\n"
    "ok = driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0\n"
    "print(count.value if ok else 0)"
)


def cuda_device_count() -> int:
    """Return the number of CUDA devices this process may use.

    Asks the driver library directly, which takes milliseconds where importing torch takes seconds. The question is
    put in a process of its own: the driver reads CUDA_VISIBLE_DEVICES once, when it starts, and `select_device` must
    still be able to change it here. A machine without the driver, or with one that does not start, has none.

    Source: CUDA Driver API, cuInit and cuDeviceGetCount.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return 0
    try:
        ctypes.CDLL(_LIBRARY)
    except OSError:
        return 0
    import subprocess

    done = subprocess.run([sys.executable, "-S", "-c", _COUNT], capture_output=True, text=True, check=False)
    return int(done.stdout) if done.returncode == 0 else 0


def usable_cpu_count() -> int:
    """Return how many CPUs this process may keep busy: those it may run on, and its control group's quota.

    A container often sees all CPUs of its machine and is given the time of a few; torch counts those it sees.

    Source: Linux, cpu.max of control groups version 2, and cpu.cfs_quota_us of version 1.
    """
    seen = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    quotas = [quota for path in _QUOTA_FILES if (quota := _quota(path)) is not None]
    return max(1, min([seen, *(math.ceil(quota) for quota in quotas)]))


def limit_threads() -> None:
    """Let the libraries that are imported later compute with no more threads than there is CPU time for.

    A number that the user has set stays, and so does the libraries' own where nothing limits the process.
    """
    seen = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    if (usable := usable_cpu_count()) < seen:
        os.environ.setdefault("OMP_NUM_THREADS", str(usable))


def _quota(path: Path) -> float | None:
    """Return the CPUs that a control group may keep busy, or None where it is not limited."""
    try:
        words = path.read_text(encoding="ascii").split()
        if path.name == "cpu.cfs_quota_us":
            words.append(path.with_name("cpu.cfs_period_us").read_text(encoding="ascii").strip())
        time, period = (float(word) for word in words)
    except (OSError, ValueError):
        return None
    return time / period if time > 0 and period > 0 else None


def launched_count() -> int:
    """Return how many processes `torchrun` or `accelerate launch` started for this training; 1 without them."""
    return _environment_count("WORLD_SIZE", default=1)


def launched_rank() -> int:
    """Return the number of this process among those of the training; the first is 0."""
    return _environment_count("RANK", default=0)


def _environment_count(name: str, *, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 7 else default


def parse_device(device: str) -> tuple[str, int]:
    """Return the kind of a device option, "auto", "cpu" or "cuda", and the number of the CUDA device.

    Raises:
        ConfigError: If the text is none of auto, cpu, cuda and cuda:N.
    """
    match = re.fullmatch(r"(auto|cpu|cuda)(?::(?<=cuda:)(\d+))?", device)
    if match is None:
        raise ConfigError(f"unknown device {device!r}; choose from: auto, cpu, cuda, cuda:N")
    return match[1], int(match[2] or 0)


def find_device(device: str) -> str:
    """Return "cpu" or "cuda" for a device option, and change nothing: processes started from here see every device.

    Args:
        device: "auto" (the first CUDA device where there is one), "cpu", "cuda" (the first) or "cuda:N".

    Raises:
        BackendError: If there is no such device.
    """
    kind, index = parse_device(device)
    count = 0 if kind == "cpu" else cuda_device_count()
    if kind == "cpu" or (kind == "auto" and not count):
        return "cpu"
    # Where a launcher started several processes, each has a device of its own, which the launcher numbers.
    if index >= count and launched_count() == 1:
        raise BackendError(f"--device {device} was asked for and {count} CUDA devices are present; use --device cpu")
    return "cuda"


def select_device(device: str) -> str:
    """Return "cpu" or "cuda" for a device option, and hide every other CUDA device from this process.

    One process computes on one device: a Trainer that sees several would spread the batch over them. So this must run
    before torch touches CUDA, and where a model is about to be loaded: what is started from here sees no other either.

    Args:
        device: As `find_device` takes it.

    Raises:
        BackendError: If there is no such device.
    """
    kind = find_device(device)
    if kind == "cuda" and launched_count() == 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(number) for number in range(cuda_device_count())]
        os.environ["CUDA_VISIBLE_DEVICES"] = names[parse_device(device)[1]]
    return kind
