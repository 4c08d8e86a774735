"""Products of bfloat16 matrices on a CPU that has no instructions for them."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

#: What torch computes a product with: the first four where gradients are recorded, all six where they are not.
_PRODUCTS = frozenset(
    (
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten.bmm.default,
        torch.ops.aten.baddbmm.default,
        torch.ops.aten.linear.default,
        torch.ops.aten.matmul.default,
    )
)


class RoundedProducts(TorchDispatchMode):
    """Computes each product of bfloat16 matrices in float32, and rounds what comes out to bfloat16.

    Without instructions for bfloat16, torch takes up to 60 times as long for the backward pass of a linear layer as in
    float32, and 2 to 4 times for the forward pass. Both ways sum in float32 and round once; they differ by the order
    of the sum. The mode holds for the thread that enters it, and for a backward pass that starts there.
    """

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Compute one operation."""
        if func in _PRODUCTS and args[0].dtype == torch.bfloat16:
            floats = (None if tensor is None else tensor.float() for tensor in args)
            return func(*floats, **(kwargs or {})).bfloat16()
        return func(*args, **(kwargs or {}))


def has_bfloat16_products() -> bool:
    """Return whether torch finds instructions for products of bfloat16 matrices in this CPU."""
    found: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return found


def products_of(model: Any) -> AbstractContextManager[Any]:
    """Return the context to compute with a model in: `RoundedProducts` for bfloat16 on a CPU without instructions.

    Args:
        model: A transformers or PEFT model; its first weights tell device and dtype.
    """
    is_slow = model.device.type == "cpu" and model.dtype == torch.bfloat16 and not has_bfloat16_products()
    return RoundedProducts() if is_slow else contextlib.nullcontext()
