"""Counts what really goes through models: the tokens of every forward and every backward pass, by phase of the run.

A forward hook notes the tokens of a call, a hook on the gradient of its output those of a backward pass, whoever makes
it. Sums stay on the device until they are read. Evaluation and prediction are not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dataflex import comm
from dataflex.clock import PHASES
from dataflex.signals.gradients.parameters import shape_of

_FREE = ("evaluate", "predict")
_ADAPTERS = 0.2  # below this share of trained parameters a backward pass is one to layer inputs alone
_WAYS = ("forward", "backward")
_OUTPUTS = ("logits", "loss", "log_probs", "last_hidden_state")  # with a fused loss there are no logits


def backward_cost(model: torch.nn.Module) -> int:
    """Return what a backward pass of a token costs in forward passes: 2, or 1 where adapters alone are trained."""
    sizes = [(shape_of(p).numel(), p.requires_grad) for p in model.parameters()]
    trained, every = sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)
    return 1 if trained < _ADAPTERS * every else 2


class PassCounter:
    """The passes of a run through its model, and through others in tokens of the run's by their parameters.

    Args:
        model: The model under training.
        phase: Says in which phase of the clock the present moment is.
        device: Where ranks exchange their sums.
    """

    watching: PassCounter | None = None
    """The run in progress, which models that are loaded meanwhile are told to (``watch_other``)."""

    def __init__(self, model: torch.nn.Module, phase: Callable[[], str], device: torch.device) -> None:
        self._phase, self._size, self._hooks, self._device = phase, _size(model), list[Any](), device
        self._own: dict[str, Any] = {}  # sums of this process and rank: a number, or a tensor on the device
        self.before: dict[str, float] = {}
        """Sums of earlier processes of the same run, over ranks, up to the checkpoint."""
        self.backward_cost = backward_cost(model)
        self.watch(model, 1.0)
        PassCounter.watching = self

    def watch(self, model: torch.nn.Module, weight: float) -> None:
        """Count the calls of a model, each token ``weight`` times."""

        def note(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            tokens = _tokens(args, kwargs)
            if tokens is None or self._phase() in _FREE:
                return
            self._add("forward", tokens, weight)
            reached = set[str]()  # outputs that the backward pass in progress came by
            for name in _OUTPUTS:
                found = getattr(output, name, None)
                if isinstance(found, torch.Tensor) and found.requires_grad:
                    found.register_hook(self._backward(tokens, weight, name, reached))

        self._hooks.append(model.register_forward_hook(note, with_kwargs=True))

    def _backward(self, tokens: Any, weight: float, name: str, reached: set[str]) -> Callable[[torch.Tensor], None]:
        """Return a hook on an output, which counts a pass once, whichever outputs it comes by.

        In mixed precision the logits are copies in fp32, which a loss of the model's own does not come by.
        """

        def note(_: torch.Tensor) -> None:
            if not reached or name in reached:
                self._add("backward", tokens, weight)
                reached.clear()
            reached.add(name)

        return note

    def _add(self, way: str, tokens: Any, weight: float) -> None:
        key = f"{self._phase()}/{way}"
        self._own[key] = self._own.get(key, 0) + (tokens if weight == 1.0 else tokens * weight)

    def totals(self, beside: NDArray[np.int64]) -> tuple[dict[str, float], NDArray[np.int64]]:
        """Return ``PHASE/forward`` and ``PHASE/backward`` in tokens, over ranks and earlier processes (collective).

        ``beside`` has other counts of this rank; their sums over ranks come with it, in the same reduction.
        """
        keys = [f"{phase}/{way}" for phase in PHASES for way in _WAYS]
        own = np.concatenate([[float(self._own.get(key, 0)) for key in keys], beside.ravel()])
        sums = comm.gather_sum(torch.from_numpy(own).to(self._device)).cpu().numpy()
        passes = zip(keys, sums[: len(keys)].tolist(), strict=True)
        found = {key: round(self.before.get(key, 0.0) + value) for key, value in passes if value or key in self.before}
        return found, sums[len(keys) :].astype(np.int64).reshape(beside.shape)

    def close(self) -> None:
        """Stop counting."""
        for hook in self._hooks:
            hook.remove()
        if PassCounter.watching is self:
            PassCounter.watching = None


def compute(passes: Mapping[str, float], cost: float) -> float:
    """Return all passes in forward passes of one token."""
    return sum(value * (cost if key.endswith("/backward") else 1) for key, value in passes.items())


def watch_other(model: torch.nn.Module) -> None:
    """Count a model beside the one under training, in tokens of that one by the ratio of their parameters."""
    run = PassCounter.watching
    if run is not None:
        run.watch(model, _size(model) / max(run._size, 1))


def _size(model: torch.nn.Module) -> int:
    return sum(shape_of(parameter).numel() for parameter in model.parameters())


def _tokens(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return the real tokens of a call, on its device; None where they are not known."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    mask = kwargs.get("attention_mask")
    if not isinstance(ids, torch.Tensor):
        ids = kwargs.get("inputs_embeds")
    if not isinstance(ids, torch.Tensor) or ids.dim() < 2:
        return None
    if isinstance(mask, torch.Tensor) and mask.shape == ids.shape[:2]:
        return (mask != 0).sum()
    return ids.shape[0] * ids.shape[1]
