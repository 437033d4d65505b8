"""An optimizer's update as a sum of lines: one for each domain, weight decay, and what was in the moments before.

Given the second moments, the updates of Adam and of SGD are linear in the gradient. Each line has its own momentum,
m_l <- b1 m_l + (1 - b1) c G_l, where G_l is its share of the gradient and c what clipping, loss scale and the mean over
ranks made of it. The parameters move by the sum over lines of -lr m_l / ((1 - b1^t) (sqrt(v / (1 - b2^t)) + eps)),
exactly. Hooks on the optimizer's own step look at the gradient that it consumes, and at the moments after it. Under
FSDP2 and ZeRO-1/2 both are brought together from the ranks; DeepSpeed steps its groups of parameters one by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from dataflex import comm
from dataflex.errors import UnsupportedError
from dataflex.signals.gradients.consumers import TargetVectors
from dataflex.signals.gradients.in_run import adam_scale
from dataflex.signals.gradients.parameters import shape_of
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
        if any("betas" not in group for group in base.param_groups):
            raise UnsupportedError("ledger: Muon's update is not linear in the gradient, so it is not split by domain")
    if any(group.get("maximize") for group in base.param_groups):
        raise UnsupportedError(f"ledger: {type(base).__name__} maximizes; only losses that fall are accounted for")
    return base


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor that FSDP2 shards as a whole (collective there); any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


class _Partitions:
    """DeepSpeed's ZeRO-1 or 2 optimizer: each rank steps a flat part of each group of parameters, in fp32."""

    def __init__(self, zero: Any) -> None:
        self._zero, self._groups = zero, list(zero.optimizer.param_groups)

    @classmethod
    def of(cls, optimizer: Any) -> _Partitions | None:
        """Return those of the optimizer inside accelerate's wrapper; None without DeepSpeed."""
        while hasattr(optimizer, "optimizer"):
            if hasattr(optimizer, "single_partition_of_fp32_groups"):
                return cls(optimizer)
            optimizer = optimizer.optimizer
        return None

    def groups(self) -> dict[int, Any]:
        """Return the group of each parameter, by its id."""
        lists = zip(self._groups, self._zero.bit16_groups, strict=True)
        return {id(parameter): group for group, parameters in lists for parameter in parameters}

    @property
    def _flat(self) -> torch.Tensor:
        """The part on this rank of the group that is stepped now."""
        found: torch.Tensor = self._zero.optimizer.param_groups[0]["params"][0]
        return found

    def _whole(self, parameter: Any, flat: torch.Tensor) -> torch.Tensor:
        """Return a parameter's part of flat parts of its group, fp32 (collective)."""
        mapping, found = parameter._hp_mapping, torch.zeros(parameter.numel(), device=parameter.device)
        if mapping is not None:
            ours, theirs = mapping.lp_fragment_address, mapping.hp_fragment_address
            found[ours.start : ours.start + ours.numel] = flat[theirs.start : theirs.start + theirs.numel]
        return comm.gather_sum(found).view(parameter.shape)

    def gradient(self, parameter: Any) -> torch.Tensor:
        """Return the gradient that the step of the parameter's group consumes (collective)."""
        assert self._flat.grad is not None
        return self._whole(parameter, self._flat.grad)

    def moments(self, parameters: Mapping[str, Any]) -> dict[str, Moments]:
        """Return Adam's moments after the step of the parameters' group, which DeepSpeed has not linked yet then."""
        group, state = self._zero.optimizer.param_groups[0], self._zero.optimizer.state[self._flat]
        (beta1, beta2), eps = map(float, group["betas"]), float(group["eps"])
        step = int(state["step"] if "step" in state else group["step"])  # of the group in DeepSpeed's own Adam
        found = {}
        for name, parameter in parameters.items():
            first, second = (self._whole(parameter, state[kind]) for kind in ("exp_avg", "exp_avg_sq"))
            found[name] = Moments(first=first, second=second, step=step, betas=(beta1, beta2), eps=eps)
        return found

    @property
    def clipped(self) -> float:
        """What clipping multiplied the gradient by."""
        most, norm = float(self._zero.clip_grad), self._zero._global_grad_norm
        return min(1.0, most / (float(norm) + 1e-6)) if most and norm is not None else 1.0


class Updates:
    """The lines of what ``parameters``, by name, are moved by.

    All but ``open`` and ``close`` is local to a rank, but where FSDP2 or DeepSpeed shard gradients and moments.

    Shares may be those of this rank's rows alone: sums over ranks are taken where lines are compared with vectors.
    """

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], num_domains: int) -> None:
        self.parameters = dict(parameters)
        shapes = {name: shape_of(parameter) for name, parameter in self.parameters.items()}
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
        self._partitions: _Partitions | None = None
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
        self._partitions = _Partitions.of(optimizer)
        groups = {id(parameter): group for group in base.param_groups for parameter in group["params"]}
        groups = groups if self._partitions is None else self._partitions.groups()
        self._groups = {name: groups[id(p)] for name, p in self.parameters.items() if id(p) in groups}
        moments = {} if self._is_sgd or not afresh else self._moments(list(self._groups))
        for name in self._groups if afresh else ():
            state = base.state.get(self.parameters[name], {})
            held = moments[name].first if name in moments else state.get("momentum_buffer")
            held = None if held is None else whole(held)
            if held is not None and comm.rank() == 0:
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

    def _moments(self, names: Sequence[str]) -> dict[str, Moments]:
        backend: Any = "plain" if self._partitions is None else "zero"
        found = moments_of(self._wrapper, {name: self.parameters[name] for name in names}, backend)
        return {name: kept for name, kept in found.items() if isinstance(kept, Moments)}

    def directions(self, vectors: TargetVectors) -> TargetVectors:
        """Return vectors times the learning rate and what Adam multiplies a gradient by; zero before its first step."""
        found = {}
        moments = {} if self._is_sgd else self._moments(list(self._groups))
        for name, tensor in self.shares.tensors.items():
            vector, group = vectors.tensors[name], self._groups.get(name)
            scale: Any = 0.0 if group is None else float(group["lr"])
            if name in moments:
                scale = scale * adam_scale(moments[name]) if moments[name].step else 0.0
            found[name] = vector.to(tensor.device) * scale
        return TargetVectors(tensors=found)

    def _gradients(self) -> dict[str, torch.Tensor]:
        """Return the whole gradients of parameters that have one; under DeepSpeed, of the group that is stepped."""
        if self._partitions is None:
            return {name: whole(p.grad.detach()) for name, p in self.parameters.items() if p.grad is not None}
        stepped = self._optimizer.param_groups
        found = {}
        for name, parameter in self.parameters.items():
            if any(self._groups.get(name) is group for group in stepped):
                found[name] = self._partitions.gradient(parameter)
        return found

    def summed(self) -> None:
        """Note the gradient's length once it is summed up, before it is clipped; DeepSpeed tells it by itself."""
        if self._partitions is None:
            self._unclipped = float(_squares(self._gradients()).sum())

    def _scale(self) -> float:
        """Return the loss scale that a gradient before clipping still has."""
        scaler = getattr(self._wrapper, "scaler", None)
        return float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else 1.0

    def _factor(self, gradients: Mapping[str, torch.Tensor], squares_P: np.ndarray[Any, Any]) -> float:
        """Return c of g = c sum G over the ranks, from <g, g> / <g, sum G> (collective).

        Parameters of which hooks saw a part only have another ratio, and are left out.
        """
        products = [
            (self.shares.flat(name).sum(dim=0) * gradient.flatten()).sum(dtype=torch.float64)
            for name, gradient in gradients.items()
        ]
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
        gradients = self._gradients()
        if not gradients:
            return
        squares_P = _squares(gradients).cpu().numpy()
        factor, squared = self._factor(gradients, squares_P), float(squares_P.sum())
        if not math.isfinite(squared):  # a loss scale that overflowed: the step is undone
            return
        inside = getattr(self._optimizer, "grad_scale", None)  # fused optimizers divide by it themselves
        scale = 1.0 if inside is None else float(inside)
        factor /= scale
        if self._partitions is not None:
            clipped = self._partitions.clipped
        else:
            clipped = math.sqrt(squared / self._unclipped) * self._scale() / scale if self._unclipped else 1.0
        clipped = min(clipped, 1.0) or 1.0
        for name in gradients:
            if name in self._groups:
                self._consumed[name] = float(self._groups[name]["lr"])
                self._add(name, self.parameters[name], factor, clipped)
        self.taken(factor)

    def _add(self, name: str, parameter: torch.nn.Parameter, factor: float, clipped: float) -> None:
        group, shares = self._groups[name], self.shares.flat(name)
        momenta, moved = self._momenta.flat(name), self.moved.flat(name)
        values = whole(parameter.detach()).float().flatten()
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
        moments: dict[str, Moments] = {}
        if self._partitions is not None and self._consumed:
            moments = self._partitions.moments({name: self.parameters[name] for name in self._consumed})
        elif not self._is_sgd and self._consumed:
            moments = self._moments(list(self._consumed))
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


def _squares(gradients: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the squared length of each gradient, float64 [P]."""
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients.values()]
    return torch.stack(norms).square() if norms else torch.zeros(0, dtype=torch.float64)


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
