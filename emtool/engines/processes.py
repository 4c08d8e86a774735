"""The processes of one training: one, or several that `torchrun` or `accelerate launch` started."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from accelerate import PartialState

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process among those of the training.

    Attributes:
        rank: Number of this process; the first is 0.
        count: How many there are.
        device: Device of this process, for what they exchange.
    """

    rank: int = 0
    count: int = 1
    device: str = "cpu"

    @property
    def is_first(self) -> bool:
        """Return whether this is the process that writes and reports."""
        return self.rank == 0

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.count > 1:
            torch.distributed.barrier()

    def maximum(self, values: Sequence[int]) -> list[int]:
        """Return the largest of each value over all processes, by one small exchange."""
        if self.count == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.int32, device=self.device)
        torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
        return [int(value) for value in tensor.tolist()]

    def gather(self, value: Any) -> list[Any]:
        """Return every process's value, by rank."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(values, value)
        return values

    def decide(self, function: Callable[[], Result]) -> Result:
        """Return in every process what the first one's function returns; it alone runs it.

        Raises:
            SystemExit: In the others, if it raises in the first, which tells the user.
        """
        if self.count == 1:
            return function()
        message: list[Any] = [None, False]
        try:
            if self.is_first:
                message = [function(), True]
        finally:
            torch.distributed.broadcast_object_list(message, src=0)
        if not message[1]:
            raise SystemExit(1)
        result: Result = message[0]
        return result


def launched_processes(device: str) -> Processes:
    """Return the processes of this training, connected with each other.

    Args:
        device: "cpu" or "cuda".
    """
    state = PartialState(cpu=device != "cuda")
    return Processes(rank=state.process_index, count=state.num_processes, device=str(state.device))
