"""How far the trained parameters move in each step."""

from __future__ import annotations

from typing import Any

import torch


class AdapterMovement:
    """Measures the change of the trained parameters from one step to the next, at the cost of one copy of them.

    Args:
        model: The model; its parameters that require gradients are watched.
    """

    def __init__(self, model: Any) -> None:
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._before = [parameter.detach().flatten().clone() for parameter in self._parameters]

    @torch.no_grad()
    def measure(self) -> torch.Tensor:
        """Return the Euclidean norm of the change since the last call, or since the beginning, as a scalar tensor."""
        squares: list[torch.Tensor] = []
        for parameter, before in zip(self._parameters, self._before, strict=True):
            now = parameter.flatten()
            change = before.sub_(now).float()
            # One pass over memory; a norm along a dimension takes longer.
            squares.append(torch.dot(change, change))
            before.copy_(now)
        return torch.stack(squares).sum().sqrt()
