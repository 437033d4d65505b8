"""What weights look like while a run goes on: their spread since the last log, and each row's mean weight.

Weights are told relative to equal ones, which are 1. Nothing is read from an accelerator between two logs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from dataflex import comm
from dataflex.errors import ComponentError
from dataflex.method import Rows, State

__all__ = ["RowWeights", "WeighedRow", "WeightStats"]

_QUANTILES = {"p05": 0.05, "p50": 0.5, "p95": 0.95}
_PENDING = 64


class WeightStats:
    """Effective sample size, quantiles and the largest weight since the last ``read``, over all ranks.

    ESS = (sum w)^2 / sum w^2 over the sequences.

    Args:
        name: Name of the weighter, for messages.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._sequences: list[torch.Tensor] = []
        self._range: torch.Tensor | None = None

    def add(self, weights: torch.Tensor, by_sequence: torch.Tensor | None = None) -> None:
        """Take in the weights of one micro-batch.

        They are checked here at once on a CPU, and at the next ``read`` on an accelerator, where
        looking at a value would make the device wait.

        Args:
            weights: [B, 1] by sequence, or [R, T] by position.
            by_sequence: Mean weight of each sequence [B]; the mean of each row of ``weights`` if left out.

        Raises:
            ComponentError: A weight is negative or not finite.
        """
        w = weights.detach()
        span = torch.stack([w.min(), -w.max()]) if w.numel() else w.new_zeros(2)
        self._range = span if self._range is None else torch.minimum(self._range, span)
        self._sequences.append((w.mean(dim=1) if by_sequence is None else by_sequence.detach()).float())
        if len(self._sequences) > _PENDING:
            self._sequences = [torch.cat(self._sequences)]
        if w.device.type == "cpu":
            self._check()

    def _check(self) -> float:
        assert self._range is not None
        smallest, largest = float(self._range[0]), -float(self._range[1])
        if not (math.isfinite(largest) and smallest >= 0.0):
            raise ComponentError(f"weighter {self._name!r} returned negative or non-finite weights")
        return largest

    def read(self) -> dict[str, float]:
        """Return ``weight_ess`` (share of the sequences, 0 to 1), quantiles and ``weight_max``, and start anew.

        Collective. Raises ComponentError as ``add`` does.
        """
        if self._range is None:
            return {}
        self._range = comm.gather_rows(self._range[None], equal=True)[0].amin(dim=0)
        largest = self._check()
        w = comm.gather_rows(torch.cat(self._sequences))[0].double().cpu().numpy()
        self._sequences, self._range = [], None
        if not len(w):
            return {}
        squares = float(np.square(w).sum())
        told = {"weight_ess": float(w.sum()) ** 2 / squares / len(w) if squares > 0 else 0.0}
        told |= {f"weight_{name}": float(np.quantile(w, share)) for name, share in _QUANTILES.items()}
        return {**told, "weight_max": largest}

    def since_read(self) -> State:
        """Return what was added on all ranks since the last ``read`` (collective); nothing where nothing was."""
        if self._range is None:
            return {}
        spans = comm.gather_rows(self._range[None], equal=True)[0].amin(dim=0)
        weights = comm.gather_rows(torch.cat(self._sequences))[0]
        return {"range": spans.double().cpu().numpy(), "weights": weights.cpu().numpy()}

    def restore(self, state: State, device: torch.device) -> None:
        """Take back what ``since_read`` gave: rank 0 holds all of it."""
        if not state:
            return
        weights = state["weights"] if comm.rank() == 0 else state["weights"][:0]
        self._range = torch.tensor(state["range"], device=device, dtype=torch.float64)
        self._sequences = [torch.tensor(weights, device=device)]


@dataclass(frozen=True, kw_only=True)
class WeighedRow:
    """A row with its mean weight, and how many of its sequences were weighed."""

    row: int
    weight: float
    times: int


class RowWeights:
    """Mean weight of each row that was weighed, as the runs goes on; one rank's rows are a sample of all."""

    def __init__(self) -> None:
        self._rows = np.zeros(0, dtype=np.int64)
        self._sums = np.zeros(0, dtype=np.float64)
        self._counts = np.zeros(0, dtype=np.int64)
        self._pending: list[tuple[Rows, torch.Tensor]] = []

    def add(self, rows_B: Rows, weights_B: torch.Tensor) -> None:
        """Take in the weights of one micro-batch's sequences."""
        self._pending.append((rows_B, weights_B.detach()))
        if len(self._pending) >= _PENDING:
            self._settle()

    def _settle(self) -> None:
        """Merge what is pending into the sorted table."""
        if not self._pending:
            return
        rows = np.concatenate([self._rows, *(rows for rows, _ in self._pending)])
        new = torch.cat([weights for _, weights in self._pending]).double().cpu().numpy()
        sums = np.concatenate([self._sums, new])
        counts = np.concatenate([self._counts, np.ones(len(new), dtype=np.int64)])
        self._pending = []
        self._rows, place = np.unique(rows, return_inverse=True)
        self._sums = np.asarray(np.bincount(place, weights=sums, minlength=len(self._rows)), dtype=np.float64)
        self._counts = np.bincount(place, weights=counts, minlength=len(self._rows)).astype(np.int64)

    def extremes(self, most: int) -> tuple[list[WeighedRow], list[WeighedRow]]:
        """Return up to ``most`` rows of the largest mean weight, and as many of the smallest, ties by row id."""
        self._settle()
        means = self._sums / np.maximum(self._counts, 1)
        order = np.argsort(-means, kind="stable")
        most = min(most, len(order) // 2) if len(order) > 1 else len(order)

        def told(places: NDArray[np.int64]) -> list[WeighedRow]:
            return [
                WeighedRow(row=int(self._rows[i]), weight=float(means[i]), times=int(self._counts[i])) for i in places
            ]

        return told(order[:most]), told(np.argsort(means, kind="stable")[:most])

    def __len__(self) -> int:
        self._settle()
        return len(self._rows)

    def state_dict(self) -> State:
        """Return the table."""
        self._settle()
        return {"rows": self._rows, "sums": self._sums, "counts": self._counts}

    def load_state_dict(self, state: State) -> None:
        """Take back what ``state_dict`` gave; nothing where the checkpoint has none."""
        self._pending = []
        if state:
            self._rows = np.asarray(state["rows"], dtype=np.int64)
            self._sums = np.asarray(state["sums"], dtype=np.float64)
            self._counts = np.asarray(state["counts"], dtype=np.int64)
