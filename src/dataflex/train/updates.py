"""An optimizer's update as a sum of lines: one for each domain, weight decay, and what was in the moments before.

Given the second moments, the updates of Adam and of SGD are linear in the gradient. Each line has its own momentum,
m_l <- b1 m_l + (1 - b1) c G_l, where G_l is its share of the gradient and c what clipping, loss scale and the mean over
ranks made of it. The parameters move by the sum over lines of -lr m_l / ((1 - b1^t) (sqrt(v / (1 - b2^t)) + eps)),
exactly. Hooks on the optimizer's own step look at the gradient that it consumes, and at the moments after it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from dataflex import comm
from dataflex.errors import UnsupportedError
from dataflex.signals.gradients.consumers import TargetVectors
from dataflex.signals.gradients.in_run import adam_scale
from dataflex.signals.gradients.precondition import Moments, moments_of
from dataflex.state import State

_ALIKE = 0.01
"""Parameters whose gradients and shares have ratios that differ by less are seen as a whole."""
OTHERS = ("weight decay", "before", "clipping")
"""Lines after those of the domains; ``clipping`` is what it took off the domains' lines, and not part of the sum."""


def base_of(optimizer: Any) -> Any:
    """Return the optimizer inside the wrappers of accelerate.

    Raises:
        UnsupportedError: It is neither Adam nor SGD.
    """
    base = optimizer
    while hasattr(base, "optimizer"):
        base = base.optimizer
    if type(base).__name__ != "SGD":
        moments_of(base, {})
    if any(group.get("maximize") for group in base.param_groups):
        raise UnsupportedError(f"ledger: {type(base).__name__} maximizes; only losses that fall are accounted for")
    return base


class Updates:
    """The lines of what ``parameters``, by name, are moved by. All but ``open`` and ``close`` is local to a rank.

    Shares may be those of this rank's rows alone: sums over ranks are taken where lines are compared with vectors.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], num_domains: int) -> None:
        self.parameters = dict(parameters)
        shapes = {name: parameter.shape for name, parameter in self.parameters.items()}
        device = next(iter(self.parameters.values())).device
        num = num_domains + len(OTHERS)
        self.shares = TargetVectors.zeros(num_domains, shapes, device)
        """Gradients of the step in progress by domain, in the scale of ``.grad``."""
        self.moved = TargetVectors.zeros(num, shapes, device)
        """Movements by line since they were last set to zero."""
        self._momenta = TargetVectors.zeros(num, shapes, device)
        self._decay, self._before, self._clipping = range(num_domains, num)
        self._optimizer: Any = None
        self._wrapper: Any = None
        self._handles: list[Any] = []
        self._groups: dict[str, Any] = {}
        self._unclipped = 0.0
        self._consumed: dict[str, float] = {}  # learning rate of the parameters that take part in a step
        self.taken: Callable[[float], None] = lambda factor: None
        """Called before each step with the factor by which shares enter the update."""

    # -- around a step ------------------------------------------------------------------------------

    def begin(self) -> None:
        """Begin the shares of a step."""
        for tensor in self.shares.tensors.values():
            tensor.zero_()

    def open(self, optimizer: Any, *, afresh: bool) -> None:
        """Listen to the optimizer's steps; ``afresh``: what its moments hold already is the line ``before``."""
        self._wrapper, base = optimizer, base_of(optimizer)
        self._optimizer = base
        groups = {id(parameter): group for group in base.param_groups for parameter in group["params"]}
        self._groups = {name: groups[id(p)] for name, p in self.parameters.items() if id(p) in groups}
        if afresh and comm.rank() == 0:
            for name, parameter in self.parameters.items():
                state = base.state.get(parameter, {})
                held = state.get("momentum_buffer") if self._is_sgd else self._moments()[name].first
                if held is not None:
                    self._momenta.tensors[name][self._before].copy_(held)
        self._handles = [
            base.register_step_pre_hook(lambda *_: self._begin_step()),
            base.register_step_post_hook(lambda *_: self._end_step()),
        ]

    def close(self) -> None:
        """Listen no more."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @property
    def is_open(self) -> bool:
        """Whether it listens."""
        return bool(self._handles)

    @property
    def _is_sgd(self) -> bool:
        return type(self._optimizer).__name__ == "SGD"

    def _moments(self) -> dict[str, Moments]:
        return moments_of(self._optimizer, {name: self.parameters[name] for name in self._groups})

    def directions(self, vectors: TargetVectors) -> TargetVectors:
        """Return vectors times the learning rate and what Adam multiplies a gradient by; zero before its first step."""
        found = {}
        moments = {} if self._is_sgd else self._moments()
        for name, tensor in self.shares.tensors.items():
            vector, group = vectors.tensors[name], self._groups.get(name)
            scale: Any = 0.0 if group is None else float(group["lr"])
            if name in moments:
                scale = scale * adam_scale(moments[name]) if moments[name].step else 0.0
            found[name] = vector.to(tensor.device) * scale
        return TargetVectors(tensors=found)

    def _squares(self) -> torch.Tensor:
        """Return the squared length of the gradient of each parameter, float64 [P]; 0 where there is none."""
        zero = torch.zeros((), dtype=torch.float64, device=self._device)
        norms = [
            zero if p.grad is None else torch.linalg.vector_norm(p.grad.detach(), dtype=torch.float64)
            for p in self.parameters.values()
        ]
        return torch.stack(norms).square()

    @property
    def _device(self) -> torch.device:
        return next(iter(self.parameters.values())).device

    def summed(self) -> None:
        """Note the gradient's length once it is summed up, before it is clipped."""
        self._unclipped = float(self._squares().sum())

    def _scale(self) -> float:
        """Return the loss scale that a gradient before clipping still has."""
        scaler = getattr(self._wrapper, "scaler", None)
        return float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else 1.0

    def _factor(self, squares_P: np.ndarray[Any, Any]) -> float:
        """Return c of g = c sum G over the ranks, from <g, g> / <g, sum G> (collective).

        Parameters of which hooks saw a part only have another ratio, and are left out.
        """
        products = [torch.zeros((), dtype=torch.float64, device=self._device)] * len(self.parameters)
        for place, (name, parameter) in enumerate(self.parameters.items()):
            if parameter.grad is not None:
                product = self.shares.flat(name).sum(dim=0) * parameter.grad.detach().flatten()
                products[place] = product.sum(dtype=torch.float64)
        along_P = comm.gather_sum(torch.stack(products)).cpu().numpy()
        ratios = np.divide(squares_P, along_P, out=np.full(len(along_P), np.nan), where=along_P != 0)
        ratios[~np.isfinite(ratios)] = np.nan
        if np.isnan(ratios).all():
            return 0.0
        whole = np.abs(ratios / np.nanmedian(ratios) - 1) < _ALIKE
        return float(squares_P[whole].sum() / along_P[whole].sum())

    def _begin_step(self) -> None:
        """Add the shares to the buffers (collective)."""
        self._consumed = {}
        squares_P = self._squares().cpu().numpy()
        factor, squared = self._factor(squares_P), float(squares_P.sum())
        if not math.isfinite(squared):  # a loss scale that overflowed: the step is undone
            return
        inside = getattr(self._optimizer, "grad_scale", None)  # fused optimizers divide by it themselves
        scale = 1.0 if inside is None else float(inside)
        factor /= scale
        clipped = math.sqrt(squared / self._unclipped) * self._scale() / scale if self._unclipped else 1.0
        clipped = min(clipped, 1.0) or 1.0
        for name, parameter in self.parameters.items():
            if parameter.grad is not None and name in self._groups:
                self._consumed[name] = float(self._groups[name]["lr"])
                self._add(name, parameter, factor, clipped)
        self.taken(factor)

    def _add(self, name: str, parameter: torch.nn.Parameter, factor: float, clipped: float) -> None:
        group, shares = self._groups[name], self.shares.flat(name)
        momenta, moved = self._momenta.flat(name), self.moved.flat(name)
        values = parameter.detach().float().flatten()
        # What is of no rank's rows is accounted for on the first one.
        decay = float(group["weight_decay"]) if comm.rank() == 0 else 0.0
        coupled = self._is_sgd or not _decoupled(self._optimizer, group)
        if self._is_sgd:
            keep = float(group["momentum"])
            goes_on = keep and self._optimizer.state.get(parameter, {}).get("momentum_buffer") is not None
            new = 1.0 - float(group["dampening"]) if goes_on else 1.0
        else:
            keep = float(group["betas"][0])
            new = 1.0 - keep
        momenta.mul_(keep)
        momenta[: len(shares)].add_(shares, alpha=new * factor)
        if clipped < 1.0:
            momenta[self._clipping].add_(shares.sum(dim=0), alpha=new * factor * (1.0 - 1.0 / clipped))
        if decay and coupled:
            momenta[self._decay].add_(values, alpha=new * decay)
        elif decay:
            moved[self._decay].add_(values, alpha=-self._consumed[name] * decay)
        if self._is_sgd and group["nesterov"]:
            rate = -self._consumed[name]
            moved[: len(shares)].add_(shares, alpha=rate * factor)
            moved[self._clipping].add_(shares.sum(dim=0), alpha=rate * factor * (1.0 - 1.0 / clipped))
            moved[self._decay].add_(values, alpha=rate * decay)

    def _end_step(self) -> None:
        """Add what the buffers moved the parameters by."""
        moments = {} if self._is_sgd or not self._consumed else self._moments()
        for name, rate in self._consumed.items():
            momenta, moved = self._momenta.flat(name), self.moved.flat(name)
            if name not in moments:
                group = self._groups[name]
                nesterov = group["nesterov"]
                moved.add_(momenta, alpha=-rate * (float(group["momentum"]) if nesterov else 1.0))
                continue
            (beta1, beta2), step = moments[name].betas, moments[name].step
            root = (moments[name].second / (1 - beta2**step)).sqrt_().add_(moments[name].eps).flatten()
            moved.addcdiv_(momenta, root, value=-rate / (1 - beta1**step))
        self._consumed = {}

    # -- state --------------------------------------------------------------------------------------

    def bring_together(self) -> None:
        """Put the sums over ranks on rank 0 and zeros elsewhere, as in a resumed run (collective)."""
        if comm.world() == 1:
            return
        for vectors in (self._momenta, self.moved):
            vectors.add_up()
            if comm.rank():
                for tensor in vectors.tensors.values():
                    tensor.zero_()

    def state_dict(self) -> State:
        """Return the buffers; ``bring_together`` comes first."""
        return {"momenta": packed(self._momenta), "moved": packed(self.moved)}

    def load_state_dict(self, state: State) -> None:
        """Take back what ``state_dict`` gave; rank 0 holds the sums of all."""
        if comm.rank() == 0:
            unpack(state["momenta"], self._momenta)
            unpack(state["moved"], self.moved)


def _decoupled(optimizer: Any, group: Mapping[str, Any]) -> bool:
    """Whether weight decay acts on the parameters themselves, as in AdamW, and not through the gradient."""
    return bool(group.get("decoupled_weight_decay", type(optimizer).__name__ != "Adam"))


def packed(vectors: TargetVectors) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return vectors over the parameters as one array float32 [M, numbers]."""
    found: np.ndarray[Any, np.dtype[np.float32]] = torch.cat(
        [vectors.flat(n).cpu() for n in vectors.tensors], 1
    ).numpy()
    return found


def unpack(array: np.ndarray[Any, Any], into: TargetVectors) -> None:
    """Copy what ``packed`` gave into vectors over the same parameters."""
    sizes = [into.flat(name).shape[1] for name in into.tensors]
    for name, part in zip(into.tensors, torch.from_numpy(np.ascontiguousarray(array)).split(sizes, 1), strict=True):
        into.flat(name).copy_(part)
