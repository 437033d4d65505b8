"""Dynamic mixing for mixture-of-experts models: domains that are routed unlike the others are served more."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import DataError
from dataflex.method import Card, Context, Passes, Requires
from dataflex.mixers import simplex
from dataflex.mixers.exponentiated import ExponentiatedMixer, InitialParams
from dataflex.mixers.held_out import check_targets

__all__ = ["DynamicMoe", "distances"]

Floats = NDArray[np.float64]


def distances(loads_KE: Floats, measure: str) -> Floats:
    """Return the mean distance of each domain's loads to those of all domains, itself included [K].

    Args:
        loads_KE: Gate loads by domain and expert; each row is divided by its sum.
        measure: ``l2`` or ``cosine`` (1 - cosine).
    """
    shares = loads_KE / loads_KE.sum(axis=1, keepdims=True)
    if measure == "cosine":
        unit = shares / np.linalg.norm(shares, axis=1, keepdims=True)
        pairs = np.maximum(1.0 - unit @ unit.T, 0.0)
        np.fill_diagonal(pairs, 0.0)
    else:
        pairs = np.linalg.norm(shares[:, None, :] - shares[None, :, :], axis=2)
    return pairs.mean(axis=1)


class DynamicMoe(ExponentiatedMixer):
    """Serve domains more, the further their expert loads are from those of the other domains."""

    name = "dynamic_moe"
    card = Card(
        summary="Serves domains more, the less their expert loads are like those of the other domains (MoE only).",
        paper="Dynamic Data Mixing Maximizes Instruction Tuning for Mixture-of-Experts (Zhu et al.), NAACL 2025, "
        "arXiv 2406.11256",
        cost="F over the held-out data",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(InitialParams):
        """Parameters of dynamic mixing for mixture-of-experts models."""

        initial: tuple[float, ...] | dict[str, float] | str = field(
            default="uniform", metadata={"help": "proportions at first: size, uniform, or numbers as a list or by name"}
        )
        eta: float = field(default=10.0, metadata={"help": "step size of the proportions", "above": 0.0})
        smoothing: float = field(
            default=0.05,
            metadata={"help": "share of equal proportions mixed in each time", "minimum": 0.0, "maximum": 1.0},
        )
        distance: Literal["l2", "cosine"] = field(
            default="l2", metadata={"help": "how the loads of two domains are compared"}
        )
        layers: Literal["last", "all"] = field(
            default="last", metadata={"help": "the last MoE layer, as in the paper, or the mean over all of them"}
        )

    params: Params

    def requires(self) -> Requires:
        """State what the run must have."""
        return Requires(
            signals=frozenset({"gates"}),
            targets=True,
            domains=2,
            stages=("pt", "sft"),
            needs_interval=True,
            passes=Passes(targets=(1.0, 0.0)),
        )

    def _moved(self, ctx: Context) -> tuple[Floats, str]:
        """Return (1 - c) softmax(log p + eta D) + c / K with the mean distances D.

        Raises:
            UnsupportedError: The model is no mixture of experts.
            DataError: A held-out data set has no tokens.
        """
        check_targets(ctx, self.name)
        loads = []
        for name in ctx.targets:
            rows = np.arange(ctx.signals.num_rows(name), dtype=np.int64)
            summed = np.asarray(ctx.signals.gate_loads(rows, target=name), dtype=np.float64).sum(axis=0)
            if not (summed.sum(axis=1) > 0).all():
                raise DataError(f"dynamic.mixer.targets: {name!r} has no tokens that experts could be chosen for")
            loads.append(summed)
        loads_KLE = np.stack(loads)
        layers = [loads_KLE.shape[1] - 1] if self.params.layers == "last" else range(loads_KLE.shape[1])
        scores = np.mean([distances(loads_KLE[:, layer], self.params.distance) for layer in layers], axis=0)
        moved = simplex.exponentiated(self.log_shares, scores, eta=self.params.eta, smoothing=self.params.smoothing)
        worst = int(np.argmax(scores))
        return moved, f"largest distance {scores[worst]:.3g} ({self.names[worst]})"
