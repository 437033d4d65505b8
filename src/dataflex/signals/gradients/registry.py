"""Which layer kinds have a formula for per-sample gradients.

A kind is one decorated function. Given what was kept of a call (usually the layer's input) and the
gradient of the summed row losses with respect to the layer's output, it returns the per-sample
gradients of the layer's own parameters:

    @gradient_of("scale", matches=lambda m: type(m) is Scale, parameters=("weight",))
    def _scale(module, kept, grad, wanted):
        return {"weight": (grad * kept[0]).sum(dim=1)}

Kinds are asked in reverse order of registration, so a user's kind goes before the built-in ones.
A module that no kind matches is differentiated by ``torch.func`` (see ``local``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from dataflex.signals.gradients.pieces import Piece

__all__ = ["LayerKind", "Sampler", "first_input", "gradient_of", "kind_of", "kinds"]

Kept = tuple[torch.Tensor, ...]


class Sampler(Protocol):
    """Formula of a kind."""

    def __call__(self, module: Any, kept: Kept, grad: torch.Tensor, wanted: frozenset[str]) -> Mapping[str, Piece]:
        """Return per-sample gradients of the ``wanted`` parameters.

        Args:
            module: The layer.
            kept: What the kind kept of the call, first dimension b.
            grad: Gradient of the sum of row losses with respect to the layer's output [b, ...].
            wanted: Names of the layer's parameters.

        Returns:
            By name: ``Factors``, or a tensor [b, *parameter.shape].
        """
        ...


def first_input(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: torch.Tensor) -> Kept:
    """Keep the layer's first input."""
    return (args[0] if args else next(iter(kwargs.values())),)


@dataclass(frozen=True, kw_only=True)
class LayerKind:
    """A layer kind.

    Attributes:
        name: For messages.
        matches: Whether a module is of this kind; must be exact, since a subclass may compute something else.
        parameters: Names of the parameters that the formula covers.
        sample: The formula.
        keep: What to keep of a call (module, args, kwargs, output); tensors with first dimension b.
        check: Optional look at the first call (module, kept, output): the reason why the formula does
            not hold there, or None.
    """

    name: str
    matches: Callable[[nn.Module], bool]
    parameters: tuple[str, ...]
    sample: Sampler
    keep: Callable[[nn.Module, tuple[Any, ...], dict[str, Any], torch.Tensor], Kept] = first_input
    check: Callable[[nn.Module, Kept, torch.Tensor], str | None] | None = None


_KINDS: list[LayerKind] = []


def gradient_of(
    name: str,
    *,
    matches: Callable[[nn.Module], bool],
    parameters: tuple[str, ...],
    keep: Callable[[nn.Module, tuple[Any, ...], dict[str, Any], torch.Tensor], Kept] = first_input,
    check: Callable[[nn.Module, Kept, torch.Tensor], str | None] | None = None,
) -> Callable[[Sampler], Sampler]:
    """Register the decorated formula; see ``LayerKind`` for the arguments."""

    def register(sample: Sampler) -> Sampler:
        _KINDS.append(
            LayerKind(name=name, matches=matches, parameters=parameters, sample=sample, keep=keep, check=check)
        )
        return sample

    return register


def kind_of(module: nn.Module) -> LayerKind | None:
    """Return the kind of a module, the latest registered first, or None."""
    return next((kind for kind in reversed(_KINDS) if kind.matches(module)), None)


def kinds() -> list[str]:
    """Return the names of all registered kinds."""
    return [kind.name for kind in _KINDS]
