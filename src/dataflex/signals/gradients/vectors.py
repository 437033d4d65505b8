"""Vectors of the size of the differentiated parameters, kept as one tensor per parameter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

__all__ = ["TargetVectors"]


@dataclass(frozen=True, kw_only=True)
class TargetVectors:
    """M vectors, each as large as all parameters together.

    Attributes:
        tensors: By parameter name, fp32 [M, *parameter.shape], contiguous.
    """

    tensors: dict[str, torch.Tensor]

    @classmethod
    def zeros(cls, num: int, shapes: Mapping[str, torch.Size], device: torch.device | str) -> TargetVectors:
        """Return ``num`` zero vectors."""
        return cls(
            tensors={
                name: torch.zeros(num, *shape, dtype=torch.float32, device=device) for name, shape in shapes.items()
            }
        )

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def flat(self, name: str) -> torch.Tensor:
        """Return a parameter's part as a view [M, numel]."""
        tensor = self.tensors[name]
        return tensor.view(len(tensor), -1)

    def norms(self) -> torch.Tensor:
        """Return the L2 norms [M], fp32."""
        squares = sum(self.flat(name).double().square().sum(dim=1) for name in self.tensors)
        assert torch.is_tensor(squares)
        return squares.sqrt().float()

    def one(self, index: int) -> dict[str, torch.Tensor]:
        """Return one vector as {parameter name: tensor of its shape}."""
        return {name: tensor[index] for name, tensor in self.tensors.items()}

    def scale_(self, factors: torch.Tensor) -> TargetVectors:
        """Multiply vector k by ``factors[k]`` in place and return self."""
        for tensor in self.tensors.values():
            tensor.mul_(factors.to(tensor).view(-1, *([1] * (tensor.dim() - 1))))
        return self
