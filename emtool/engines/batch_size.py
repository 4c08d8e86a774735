"""How much is done at a time: what the free memory holds."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import psutil
import torch

from emtool.core.errors import BackendError

#: Larger batches gain nothing there.
MAX_ON_CPU, MAX_ON_CUDA = 64, 512

#: Part of the free memory that a batch may take; the rest is for what is not counted here.
_SHARE = 0.5

#: Copies of a row's logits in float32 that sampling holds at once: the model's, the processors', the noise.
_LOGIT_COPIES = 6


def auto_batch_size(model: Any, num_tokens: int) -> int:
    """Return how many answers fit into the memory that is free now, at least 1.

    Args:
        model: Causal language model.
        num_tokens: Tokens of a prompt and its answer together, at most.
    """
    is_on_cuda = model.device.type == "cuda"
    free = _free_on_cuda(model.device) if is_on_cuda else psutil.virtual_memory().available
    most = MAX_ON_CUDA if is_on_cuda else MAX_ON_CPU
    return max(1, min(most, int(free * _SHARE) // row_bytes(model, num_tokens)))


def _free_on_cuda(device: torch.device) -> int:
    """Return the bytes that are free on a device, those that torch keeps for itself and does not use included."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + kept


def row_bytes(model: Any, num_tokens: int) -> int:
    """Return about how many bytes an answer needs while it is generated: keys and values, twice, and logits."""
    config = model.config.get_text_config(decoder=True)
    # A cache that grows is copied as it grows. Not every family names its head size.
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    cache = 2 * 2 * config.num_hidden_layers * heads * head_dim * num_tokens * model.dtype.itemsize
    return int(cache + _LOGIT_COPIES * 4 * config.vocab_size)


def run_batches(batches: Iterable[list[int]], run: Callable[[list[int]], None]) -> None:
    """Run batches, each whole or in parts: one that does not fit into memory is halved, and so are those after it.

    Args:
        batches: Indices of what is run together.
        run: Runs some of them; called again with fewer where torch had no memory for it.

    Raises:
        BackendError: If one alone does not fit.
    """
    waiting = deque(batches)
    most: int | None = None
    while waiting:
        batch = waiting.popleft()
        if most is not None and len(batch) > most:
            waiting.appendleft(batch[most:])
            batch = batch[:most]
        try:
            run(batch)
            continue
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # Outside of the handler: the error holds on to the tensors of the batch.
        free_memory()
        if len(batch) == 1:
            raise BackendError(
                "out of memory for a single text; use --dtype bfloat16, a GPU with more memory, or a smaller model"
            )
        most = len(batch) // 2
        waiting.appendleft(batch)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether torch could not have memory: not every part of it says so by its own kind of error."""
    texts = ("not enough memory", "can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in texts)


def free_memory() -> None:
    """Let go of what nothing refers to, on the GPU too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
