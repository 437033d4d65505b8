"""Per-sample gradients of one module without a formula: run just that module again, sample by sample.

``torch.func`` (``vmap`` over ``grad`` of ``functional_call``) does it for all samples at once; where
the module cannot be vectorized (its control flow looks at values), a loop over the samples does.
The outputs of the second run are compared with the first: a module that mixes samples is found out.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils import _pytree as pytree

__all__ = ["LocalCall", "NotSeparable", "local_gradients"]

logger = logging.getLogger(__name__)

Tensors = tuple[torch.Tensor, ...]

_said: set[str] = set()


class NotSeparable(Exception):
    """The module's outputs cannot be taken apart by sample."""


@dataclass(frozen=True, kw_only=True)
class LocalCall:
    """A call taken apart into tensors and the rest.

    Attributes:
        leaves: Leaves of (args, kwargs), None at the places of tensors.
        tensor_at: Places of the tensors.
        inputs: Those tensors, detached.
        outputs: Floating tensors of the output.
    """

    leaves: tuple[Any, ...]
    spec: Any
    tensor_at: tuple[int, ...]
    inputs: Tensors
    out_leaves: tuple[Any, ...]
    out_spec: Any
    out_at: tuple[int, ...]
    outputs: Tensors

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> LocalCall:
        """Take a call apart."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        out_leaves, out_spec = pytree.tree_flatten(output)
        tensor_at = tuple(i for i, leaf in enumerate(leaves) if torch.is_tensor(leaf))
        out_at = tuple(i for i, leaf in enumerate(out_leaves) if torch.is_tensor(leaf) and leaf.is_floating_point())
        return cls(
            leaves=tuple(None if i in tensor_at else leaf for i, leaf in enumerate(leaves)),
            spec=spec,
            tensor_at=tensor_at,
            inputs=tuple(leaves[i].detach() for i in tensor_at),
            out_leaves=tuple(out_leaves),
            out_spec=out_spec,
            out_at=out_at,
            outputs=tuple(out_leaves[i] for i in out_at),
        )

    @property
    def kept(self) -> Tensors:
        """What must be there for the second run: inputs, then outputs to compare with."""
        return (*self.inputs, *(tensor.detach() for tensor in self.outputs))

    def without_tensors(self) -> LocalCall:
        """Return the call without its tensors, which autograd keeps instead."""
        return replace(self, inputs=(), outputs=(), out_leaves=())

    def output_with(self, tapped: Tensors) -> Any:
        """Return the output with other tensors in the places of its own."""
        leaves = list(self.out_leaves)
        for place, tensor in zip(self.out_at, tapped, strict=True):
            leaves[place] = tensor
        return pytree.tree_unflatten(leaves, self.out_spec)

    def arguments(self, inputs: Tensors) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return (args, kwargs) with ``inputs`` in the places of the tensors."""
        leaves = list(self.leaves)
        for place, tensor in zip(self.tensor_at, inputs, strict=True):
            leaves[place] = tensor
        return pytree.tree_unflatten(leaves, self.spec)

    def outputs_of(self, output: Any) -> Tensors:
        """Return the floating tensors of a second run's output."""
        leaves = pytree.tree_leaves(output)
        return tuple(leaves[i] for i in self.out_at)


def local_gradients(
    module: nn.Module, wanted: Collection[str], call: LocalCall, kept: Tensors, grads: Tensors, *, rows: int
) -> dict[str, torch.Tensor]:
    """Return per-sample gradients of a module's parameters for one of its calls.

    Args:
        module: The module.
        wanted: Names of the parameters, relative to the module.
        call: The call, without tensors.
        kept: Its inputs, then its outputs.
        grads: Gradients of the summed row losses with respect to the outputs.
        rows: Samples b. Input tensors with two or more dimensions and b in front are taken apart by
            sample; the others are shared.

    Returns:
        fp32 [b, *parameter.shape] by name.

    Raises:
        NotSeparable: With the reason.
    """
    inputs, outputs = kept[: len(call.tensor_at)], kept[len(call.tensor_at) :]
    if any(tensor.dim() == 0 or tensor.shape[0] != rows for tensor in outputs):
        raise NotSeparable("its outputs do not have the samples in front")
    split = tuple(tensor.dim() >= 2 and tensor.shape[0] == rows for tensor in inputs)
    parameters = {name: module.get_parameter(name).detach() for name in sorted(wanted)}
    if any(type(p) not in (torch.Tensor, nn.Parameter) or hasattr(p, "ds_id") for p in parameters.values()):
        raise NotSeparable("its parameters are partitioned over ranks, and it has no formula")
    try:
        found, again = _vectorized(module, parameters, call, inputs, split, grads)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if type(module).__name__ not in _said:
            _said.add(type(module).__name__)
            logger.warning("%s cannot be vectorized, samples are looped over: %s", type(module).__name__, reason)
        found, again = _looped(module, parameters, call, inputs, split, grads)
    for first, second in zip(outputs, again, strict=True):
        tolerance = 1e-4 if first.dtype == torch.float32 else 3e-2
        if not torch.allclose(first.float(), second.float(), rtol=tolerance, atol=tolerance, equal_nan=True):
            raise NotSeparable("run again sample by sample, it gave other outputs: it mixes samples or keeps a state")
    return {name: gradient.float() for name, gradient in found.items()}


def _vectorized(
    module: nn.Module,
    parameters: dict[str, torch.Tensor],
    call: LocalCall,
    inputs: Tensors,
    split: tuple[bool, ...],
    grads: Tensors,
) -> tuple[dict[str, torch.Tensor], Tensors]:
    def product(weights: dict[str, torch.Tensor], one: Tensors, one_grads: Tensors) -> tuple[torch.Tensor, Tensors]:
        mine = tuple(tensor.unsqueeze(0) if apart else tensor for tensor, apart in zip(one, split, strict=True))
        args, kwargs = call.arguments(mine)
        outs = call.outputs_of(functional_call(module, weights, args, kwargs, tie_weights=False))
        total = sum((out.squeeze(0).float() * g.float()).sum() for out, g in zip(outs, one_grads, strict=True))
        return total, tuple(out.squeeze(0) for out in outs)

    dims = tuple(0 if apart else None for apart in split)
    run = vmap(grad(product, has_aux=True), in_dims=(None, dims, 0))
    return run(parameters, inputs, grads)


def _looped(
    module: nn.Module,
    parameters: dict[str, torch.Tensor],
    call: LocalCall,
    inputs: Tensors,
    split: tuple[bool, ...],
    grads: Tensors,
) -> tuple[dict[str, torch.Tensor], Tensors]:
    found: dict[str, list[torch.Tensor]] = {name: [] for name in parameters}
    again: list[Tensors] = []
    for i in range(len(grads[0])):
        args, kwargs = call.arguments(
            tuple(tensor[i : i + 1] if apart else tensor for tensor, apart in zip(inputs, split, strict=True))
        )
        weights = {name: parameter.requires_grad_() for name, parameter in parameters.items()}
        try:
            with torch.enable_grad():
                outs = call.outputs_of(functional_call(module, weights, args, kwargs, tie_weights=False))
            mine = torch.autograd.grad(
                outs, list(weights.values()), [g[i : i + 1] for g in grads], allow_unused=True, retain_graph=False
            )
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise NotSeparable(f"it cannot be run sample by sample: {type(error).__name__}: {error}") from error
        again.append(tuple(out.detach() for out in outs))
        for (name, parameter), gradient in zip(weights.items(), mine, strict=True):
            found[name].append(torch.zeros_like(parameter) if gradient is None else gradient)
    return (
        {name: torch.stack(gradients) for name, gradients in found.items()},
        tuple(torch.cat([one[k] for one in again]) for k in range(len(again[0]))),
    )
