"""A copy of what is saved, in host memory that is allocated once, so that training goes on while it is written."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

logger = logging.getLogger(__name__)

#: Each tensor starts at a multiple of this.
ALIGNMENT = 64


class SnapshotBuffer:
    """One buffer of host memory that holds one copy of a tree of tensors.

    The copy is made beside the computation, on CUDA by the device into pinned memory, else by the thread that writes:
    `wait` before the tensors change, which is at the next optimizer step, and `finish` before the copy is read.

    Args:
        num_bytes: Bytes to allocate, which are touched, because the first use of memory is slow; a larger tree makes
            the buffer grow.
        is_pinned: Whether a CUDA device copies into it.
    """

    def __init__(self, num_bytes: int, *, is_pinned: bool) -> None:
        self._is_pinned = is_pinned
        self._memory = self._allocate(num_bytes)
        self._stream = torch.cuda.Stream() if is_pinned else None
        self._event: torch.cuda.Event | None = None
        self._pending: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._is_copied = threading.Event()
        self._is_copied.set()

    @property
    def num_bytes(self) -> int:
        """Return the size of the buffer."""
        return self._memory.numel()

    def begin(self, tree: Any) -> Any:
        """Begin the copy of a tree; what the buffer held before is overwritten.

        Args:
            tree: Nested dicts, lists and tuples with tensors among their leaves.

        Returns:
            The tree with each tensor replaced by its copy, to be read after `finish`. Each copy has storage of its
            own, so that a library saves it alone.
        """
        leaves, structure = tree_flatten(tree)
        tensors = [leaf.detach() for leaf in leaves if isinstance(leaf, torch.Tensor)]
        needed = sum(_aligned(tensor.numel() * tensor.element_size()) for tensor in tensors)
        if needed > self.num_bytes:
            logger.debug("the snapshot buffer grows from %d to %d bytes", self.num_bytes, needed)
            self._memory = self._allocate(needed)
        copies = list(self._views(tensors))
        self._pending = list(zip(copies, tensors, strict=True))
        self._is_copied.clear()
        if self._stream is not None:
            self._copy_on_device()
        remaining = iter(copies)
        return tree_unflatten(
            [next(remaining) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves], structure
        )

    def wait(self) -> None:
        """Return when the tensors may change: on CUDA, when the device will change them only after they are copied."""
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)
        else:
            self._is_copied.wait()

    def finish(self) -> None:
        """Return when the copy is complete; without CUDA it is made here, in the thread that calls."""
        try:
            if self._event is not None:
                self._event.synchronize()
            else:
                for target, source in self._pending:
                    target.copy_(source)
        finally:
            self._pending = []
            self._is_copied.set()

    def _copy_on_device(self) -> None:
        assert self._stream is not None
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for target, source in self._pending:
                target.copy_(source, non_blocking=True)
                if source.is_cuda:
                    source.record_stream(self._stream)
            self._event = torch.cuda.Event()
            self._event.record(self._stream)

    def _views(self, tensors: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        memory, offset = self._memory.numpy(), 0
        for tensor in tensors:
            if tensor.numel() == 0:
                yield torch.empty(tensor.shape, dtype=tensor.dtype)
                continue
            flat = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
            yield flat.view(tensor.shape)
            offset += _aligned(tensor.numel() * tensor.element_size())

    def _allocate(self, num_bytes: int) -> torch.Tensor:
        return torch.zeros(max(num_bytes, 1), dtype=torch.uint8, pin_memory=self._is_pinned).fill_(0)


def snapshot_bytes(sizes: Mapping[str, int] | list[int]) -> int:
    """Return the bytes that a buffer needs for tensors of these sizes."""
    values = sizes.values() if isinstance(sizes, Mapping) else sizes
    return sum(map(_aligned, values))


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
