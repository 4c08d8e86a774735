"""What the machine has, found without torch."""

from __future__ import annotations

import ctypes
import os


def cuda_device_count() -> int:
    """Return the number of CUDA devices this process may use.

    Asks the driver library directly, which takes milliseconds where importing torch takes seconds. The driver itself
    honours CUDA_VISIBLE_DEVICES. A machine without the driver, or with one that does not start, has none.

    Source: CUDA Driver API, cuInit and cuDeviceGetCount.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return 0
    try:
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value
