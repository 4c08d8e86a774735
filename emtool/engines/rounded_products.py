"""Products of bfloat16 matrices on a CPU for which torch has no kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

#: What torch computes a product with, and which argument is the left matrix, before the right one: the first four in
#: training, all of them in inference mode.
_PRODUCTS = {
    torch.ops.aten.mm.default: 0,
    torch.ops.aten.addmm.default: 1,
    torch.ops.aten.bmm.default: 0,
    torch.ops.aten.baddbmm.default: 1,
    torch.ops.aten.linear.default: 0,
    torch.ops.aten.matmul.default: 0,
}

#: Rows of the left matrix from which it pays to convert both; with fewer, the copy of the weights takes longer.
_MIN_ROWS = 32


class RoundedProducts(TorchDispatchMode):
    """Computes products of bfloat16 matrices in float32, and rounds what comes out to bfloat16.

    Without kernels for bfloat16, torch takes up to 60 times as long for the backward pass of a linear layer as in
    float32, and 2 to 4 times for the forward pass of many tokens. Both ways sum in float32 and round once; they differ
    by the order of the sum. Attention, which torch computes in one operation, and the steps of a generation for fewer
    than 32 texts stay torch's own. The mode holds for the thread that enters it, and for a backward pass that starts
    there.
    """

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Compute one operation."""
        if func in _PRODUCTS and _pays(func, args):
            floats = (None if tensor is None else tensor.float() for tensor in args)
            return func(*floats, **(kwargs or {})).bfloat16()
        return func(*args, **(kwargs or {}))


def _pays(func: Any, args: Sequence[torch.Tensor | None]) -> bool:
    """Return whether a product takes less time in float32: torch's own is slow for many rows, and by a plain matrix."""
    if any(tensor is not None and tensor.dtype != torch.bfloat16 for tensor in args):
        return False
    left, right = args[_PRODUCTS[func]], args[_PRODUCTS[func] + 1]
    assert left is not None
    assert right is not None
    num_rows = left.numel() // max(1, left.shape[-1])
    is_transposed = func is torch.ops.aten.linear.default or (right.ndim > 1 and right.stride(-1) != 1)
    return num_rows >= _MIN_ROWS or not is_transposed


def has_bfloat16_kernels() -> bool:
    """Return whether torch has kernels for products of bfloat16 matrices on this CPU."""
    found: bool = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return found


def products_of(model: Any) -> AbstractContextManager[Any]:
    """Return the context to compute with a model in: `RoundedProducts` for bfloat16 on a CPU without kernels for it.

    Args:
        model: A transformers or PEFT model; its first weights tell device and dtype.
    """
    is_slow = torch.device(model.device).type == "cpu" and model.dtype == torch.bfloat16 and not has_bfloat16_kernels()
    return RoundedProducts() if is_slow else contextlib.nullcontext()
