"""How far the trained parameters move in each step."""

from __future__ import annotations

from typing import Any

import torch

#: Numbers that are compared at a time: what fits into a processor's cache is read from memory once.
_PART = 1 << 17


class AdapterMovement:
    """Measures the change of the trained parameters from one step to the next, at the cost of one copy of them.

    Args:
        model: The model; its parameters that require gradients are watched.
    """

    def __init__(self, model: Any) -> None:
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._before = [
            parameter.detach().clone(memory_format=torch.contiguous_format) for parameter in self._parameters
        ]

    @torch.no_grad()
    def measure(self) -> torch.Tensor:
        """Return the Euclidean norm of the change since the last call, or since the beginning, as a scalar tensor."""
        norms: list[torch.Tensor] = []
        for parameter, before in zip(self._parameters, self._before, strict=True):
            parts = zip(parameter.reshape(-1).split(_PART), before.view(-1).split(_PART), strict=True)
            for now, then in parts:
                norms.append(torch.linalg.vector_norm(then.sub_(now), dtype=torch.float32))
                then.copy_(now)
        total: torch.Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return total
