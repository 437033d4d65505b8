"""Inverse curvature in Kronecker-factored eigenbases (EK-FAC), for the gradients that rows are compared with.

The gradient of a matrix [m, n] in row i is G_i = sum_t g_it a_it', with inputs a and output gradients g. In the
eigenbases U of S = E[g g'] and V of A = E[a a'], the Fisher matrix is taken for diagonal: D = E[(U' G V)^2], and
t -> U ((U' t V) / (D + lambda)) V' with lambda = damping x mean(D) stands for the damped inverse. The map is symmetric,
<t, (F + lambda)^-1 g> = <(F + lambda)^-1 t, g>, so that rows cost what they cost without it. Sources: George et al.
2018 (arXiv 1806.03884); Grosse et al. 2023 (arXiv 2308.03296; damping 0.1, sampled labels).

E is over training rows whose supervised labels are drawn from the model (the true Fisher matrix), each row's loss its
tokens' sum over the root of their number: then E[G G'] is the curvature of the mean of rows' token-mean losses. Sides
wider than ``WIDEST``, and parameters that are no matrices used on tokens, keep their own coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from dataflex import comm
from dataflex.errors import UnsupportedError
from dataflex.plan.domains import Rows
from dataflex.rng import uniforms
from dataflex.signals.gradients.consumers import Block, Consumer, TargetVectors
from dataflex.signals.gradients.engine import GradientEngine, supervised_sums
from dataflex.signals.gradients.factors import Factors, FactorShape, SampleGradients, mapped
from dataflex.signals.gradients.in_run import MATRICES
from dataflex.signals.gradients.precondition import Preconditioner
from dataflex.signals.losses import IGNORE, model_inputs
from dataflex.signals.model_access import ModelAccess
from dataflex.signals.model_parts import logits_in

WIDEST = 2**14
"""A wider side has no basis of its own: 1 GiB in fp32, and hours to find."""
_POSITIONS = 2**32


def sides_of(engine: GradientEngine) -> dict[str, list[int]]:
    """Return which sides of every parameter have a basis of their own, as its dimensions."""
    matrices = {
        unit.parameters["weight"]
        for unit in engine.units
        if unit.kind is not None and unit.kind.name in MATRICES and "weight" in unit.parameters
    }
    return {
        name: [side for side, width in enumerate(shape) if name in matrices and width <= WIDEST]
        for name, shape in engine.shapes.items()
    }


@dataclass(frozen=True, kw_only=True)
class Curvature:
    """Eigenbases by parameter and side, fp32 [width, width], and the diagonal in them, fp32 [*shape]."""

    bases: Mapping[str, Mapping[int, torch.Tensor]]
    diagonal: Mapping[str, torch.Tensor]

    def turned(self, name: str, gradients: SampleGradients, *, back: bool = False) -> SampleGradients:
        """Return U' G V, or U G V' on the way back."""
        left, right = self.bases[name].get(0), self.bases[name].get(1)
        if back:
            return mapped(gradients, left, None if right is None else right.T)
        return mapped(gradients, None if left is None else left.T, right)

    def inverse(self, vectors: TargetVectors, damping: float) -> TargetVectors:
        """Return (F + lambda)^-1 vectors; zero where a parameter has no curvature at all."""
        found = {}
        for name, vector in vectors.tensors.items():
            diagonal = self.diagonal[name].to(vector.device)
            inside = self.turned(name, vector)
            assert isinstance(inside, torch.Tensor)
            inside = (inside / (diagonal + damping * diagonal.mean())).nan_to_num(0.0, 0.0, 0.0)
            back = self.turned(name, inside, back=True)
            assert isinstance(back, torch.Tensor)
            found[name] = back
        return TargetVectors(tensors=found)

    def flat(self) -> torch.Tensor:
        """Return all numbers in one row, fp32 [1, P]."""
        parts = [[*self.bases[name].values(), self.diagonal[name]] for name in self.diagonal]
        return torch.cat([part.flatten().cpu() for every in parts for part in every]).unsqueeze(0)


class _Sums(Consumer):
    """Adds up statistics of batches; one that is started again counts once, and one that is not ``mine`` not at all."""

    mine = True

    def __init__(self) -> None:
        self.rows = 0
        self.totals: dict[Any, torch.Tensor] = {}

    def begin(self, finite: torch.Tensor) -> None:
        self._batch: dict[Any, torch.Tensor] = {}
        self._rows = int(finite.sum())

    def finish(self) -> dict[str, torch.Tensor]:
        if self.mine:
            self.rows += self._rows
            for key, part in self._batch.items():
                self.totals[key] = self.totals[key] + part if key in self.totals else part
        self._batch = {}
        return {}


class _Covariances(_Sums):
    """S and A of matrices, by parameter and side; parameters in no factored form have none."""

    name = "covariances"

    def __init__(self, sides: Mapping[str, list[int]]) -> None:
        super().__init__()
        self._sides = sides

    def dense_cost(self, shape: FactorShape) -> float:
        return math.inf

    def ghost_cost(self, shape: FactorShape) -> float:
        return 0.0

    def add(self, block: Block) -> None:
        pass

    def add_factors(self, name: str, uses: list[Factors], shape: torch.Size) -> None:
        for use in uses:
            left, right = (part.float().flatten(0, 1) if part.dim() == 3 else None for part in (use.left, use.right))
            if left is not None and right is not None:  # padding has an input, and no gradient
                right = right[left.any(dim=1)]
            for side, tokens in enumerate((left, right)):
                if side in self._sides[name] and tokens is not None:
                    part = tokens.T @ tokens
                    key = name, side
                    self._batch[key] = self._batch[key] + part if key in self._batch else part


class _Squares(_Sums):
    """Sums of rows' squared coordinates, by parameter, flat."""

    name = "squares"

    def __init__(self, shapes: Mapping[str, torch.Size]) -> None:
        super().__init__()
        self._shapes = shapes

    def add(self, block: Block) -> None:
        for (name, start, stop), values in block.parts():
            if name not in self._batch:
                self._batch[name] = values.new_zeros(self._shapes[name].numel())
            self._batch[name][start:stop] += values.square().sum(dim=0)


def sampled(access: ModelAccess, batch: dict[str, Any], rows: Rows) -> dict[str, Any]:
    """Return a batch whose supervised labels are drawn from the model, by (seed, row, position) only."""
    with torch.no_grad(), access.autocast():
        logits = logits_in(access.model(**model_inputs(batch), use_cache=False))
    labels = batch["labels"].clone()
    row, place = labels[:, 1:].ne(IGNORE).nonzero(as_tuple=True)
    counters = rows[row.cpu().numpy()].astype(np.int64) * _POSITIONS + place.cpu().numpy()
    draws = torch.from_numpy(uniforms(access.seed, "ekfac labels", 0, counters)).to(logits.device)
    up_to = logits[row, place].double().softmax(dim=-1).cumsum(dim=-1)
    drawn = torch.searchsorted(up_to, (draws * up_to[:, -1])[:, None]).squeeze(1)
    labels[row, place + 1] = drawn.clamp(max=logits.shape[-1] - 1).to(labels.dtype)
    return {**batch, "labels": labels}


def curvature(access: ModelAccess, engine: GradientEngine, num_rows: int) -> Curvature:
    """Return the model's curvature over a sample of ``num_rows`` training rows (collective).

    It takes two passes over them. With a store its numbers are kept there, and taken from there if they are of this
    model, these rows and this seed.

    Raises:
        UnsupportedError: Rows are pairs, or none of the sample has a supervised token.
    """
    if access.preferences is not None:
        raise UnsupportedError("ekfac: labels of pairs of answers cannot be drawn from the model; use stage pt or sft")
    everyone = np.arange(len(access.train.lengths), dtype=np.int64)
    order = np.argsort(uniforms(access.seed, "ekfac rows", 0, everyone), kind="stable")
    rows, shapes, sides = np.sort(order[:num_rows]), engine.shapes, sides_of(engine)
    numbers = sum(sum(shape[side] ** 2 for side in sides[name]) + shape.numel() for name, shape in shapes.items())
    work = None
    if access.work is not None:
        told = {"seed": access.seed, "sides": sides}
        data = f"{access.train.identity} {rows.tolist()}"
        work = access.work("ekfac", told, model="", data=data, corpus="", shape=(1, numbers))
    if work is None or not work.complete:
        found = _fitted(access, engine, rows, sides)
        if work is None:
            return found
        if comm.rank() == 0:
            work.record(np.zeros(1, dtype=np.int64), found.flat().numpy())
    return _unpacked(torch.from_numpy(np.array(work.finish()[0])).to(engine.device), shapes, sides)


def _unpacked(numbers: torch.Tensor, shapes: Mapping[str, torch.Size], sides: Mapping[str, list[int]]) -> Curvature:
    bases: dict[str, dict[int, torch.Tensor]] = {}
    diagonal, start = {}, 0
    for name, shape in shapes.items():
        bases[name] = {}
        for side in sides[name]:
            width = shape[side]
            bases[name][side] = numbers[start : start + width**2].view(width, width)
            start += width**2
        diagonal[name] = numbers[start : start + shape.numel()].view(shape)
        start += shape.numel()
    return Curvature(bases=bases, diagonal=diagonal)


def _fitted(access: ModelAccess, engine: GradientEngine, rows: Rows, sides: Mapping[str, list[int]]) -> Curvature:
    shapes, device = engine.shapes, engine.device
    sums_of = supervised_sums(access.model, engine.parameters.values())

    def losses(batch: dict[str, Any]) -> torch.Tensor:
        sums, tokens = sums_of(batch)
        return torch.where(tokens > 0, sums / tokens.clamp_min(1).sqrt(), torch.nan)

    drawn = GradientEngine(
        access.model, loss=losses, autocast=access.autocast, parameters=engine.parameters, release=access.release
    )
    sweep = access.trained(rows, None, "curvature")

    def over(sums: _Sums, precondition: Preconditioner | None = None) -> int:
        with drawn.observing():
            for turn in sweep.turns():
                sums.mine = turn.mine
                batch = sampled(access, turn.batch, rows[turn.positions])
                drawn.run(batch, [sums], precondition=precondition)
        return int(comm.gather_sum(torch.tensor([sums.rows], device=device))[0])

    covariances, bases = _Covariances(sides), {name: dict[int, torch.Tensor]() for name in shapes}
    if not over(covariances):
        raise UnsupportedError("ekfac: no row of the sample has a supervised token; use more rows (ekfac_rows)")
    for name, shape in shapes.items():
        for side in sides[name]:
            own = covariances.totals.pop((name, side), torch.zeros(shape[side], shape[side], device=device))
            bases[name][side] = torch.linalg.eigh(comm.gather_sum(own).double())[1].float()
    found, squares = Curvature(bases=bases, diagonal={}), _Squares(shapes)
    turning = {
        name: partial(lambda uses, name: [found.turned(name, use) for use in uses], name=name)
        for name in shapes
        if sides[name]
    }
    count = over(squares, Preconditioner(elements=lambda _segments, gradient: gradient, matrices=turning))
    diagonal = {}
    for name, shape in shapes.items():
        own = squares.totals.pop(name, torch.zeros(shape.numel(), device=device))
        diagonal[name] = (comm.gather_sum(own) / count).view(shape)
    return Curvature(bases=bases, diagonal=diagonal)
