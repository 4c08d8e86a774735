"""The optimizers that a run can use, and the size of what each saves.

To add one, write its entry in `OPTIMIZERS` under the Trainer's name, with the source of the formula.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from emtool.core.adapter import Tensor
from emtool.core.file_sizes import DTYPE_BYTES, torch_file_bytes

#: bitsandbytes keeps the state of smaller parameters in float32, and one scale a block for the others.
MIN_8BIT_SIZE = 4096
BLOCK_SIZE = 256


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """An optimizer by the Trainer's name.

    Attributes:
        state: Bytes of each tensor that it keeps for one trained parameter.
        needs_cuda: Whether it runs on CUDA only, by the package bitsandbytes.
        source: Where the formula was read.
        is_measured: Whether a test compares the formula with the file that it writes.
    """

    state: Callable[[Tensor], Sequence[int]]
    needs_cuda: bool
    source: str
    is_measured: bool


def optimizer_file_bytes(name: str, tensors: Sequence[Tensor], *, archive: str = "archive") -> int:
    """Return the size of `optimizer.pt` after at least one step.

    Args:
        name: A key of `OPTIMIZERS`.
        tensors: What is trained.
        archive: First part of each record's name in the file: torch takes the file's own, or "archive" for a stream.
    """
    return torch_file_bytes(archive, optimizer_state_bytes(name, tensors))


def optimizer_state_bytes(name: str, tensors: Sequence[Tensor]) -> list[int]:
    """Return the bytes of each tensor that an optimizer keeps.

    Args:
        name: A key of `OPTIMIZERS`.
        tensors: What is trained.
    """
    state = OPTIMIZERS[name].state
    return [size for tensor in tensors for size in state(tensor)]


def _adamw(tensor: Tensor) -> Sequence[int]:
    moment = tensor.size * DTYPE_BYTES[tensor.dtype]
    return (4, moment, moment)


def _adamw_32bit(tensor: Tensor) -> Sequence[int]:
    return (4 * tensor.size, 4 * tensor.size)


def _adamw_8bit(tensor: Tensor) -> Sequence[int]:
    if tensor.size < MIN_8BIT_SIZE:
        return _adamw_32bit(tensor)
    scales = 4 * -(-tensor.size // BLOCK_SIZE)
    return (tensor.size, tensor.size, scales, scales)


def _adafactor(tensor: Tensor) -> Sequence[int]:
    if len(tensor.shape) < 2:
        return (4 * tensor.size, 4)
    rows = tensor.size // tensor.shape[-1]
    columns = tensor.size // tensor.shape[-2]
    return (4 * rows, 4 * columns, 4)


def _nothing(tensor: Tensor) -> Sequence[int]:
    return ()


_TORCH = "torch 2.13, optim/adamw.py: exp_avg and exp_avg_sq in the parameter's dtype, and a float32 step"
_BNB = "bitsandbytes 0.50, optim/optimizer.py: two states of one byte a value, and a float32 scale a block of 256"
_BNB_32 = "bitsandbytes 0.50, optim/optimizer.py: two float32 states"

OPTIMIZERS: dict[str, Optimizer] = {
    "adamw_torch": Optimizer(state=_adamw, needs_cuda=False, source=_TORCH, is_measured=True),
    "adamw_torch_fused": Optimizer(state=_adamw, needs_cuda=False, source=_TORCH, is_measured=True),
    "adamw_8bit": Optimizer(state=_adamw_8bit, needs_cuda=True, source=_BNB, is_measured=False),
    "paged_adamw_8bit": Optimizer(state=_adamw_8bit, needs_cuda=True, source=_BNB, is_measured=False),
    "paged_adamw_32bit": Optimizer(state=_adamw_32bit, needs_cuda=True, source=_BNB_32, is_measured=False),
    "adafactor": Optimizer(
        state=_adafactor,
        needs_cuda=False,
        source="transformers 5.23, optimization.py, Adafactor: float32 means of rows and columns, and one RMS",
        is_measured=True,
    ),
    "sgd": Optimizer(
        state=_nothing, needs_cuda=False, source="torch 2.13, optim/sgd.py: nothing without momentum", is_measured=True
    ),
}
CUDA_OPTIMIZERS = tuple(name for name, optimizer in OPTIMIZERS.items() if optimizer.needs_cuda)
