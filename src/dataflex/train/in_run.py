"""Decisions that training pays for: scores of the rows just served, predictions of all others, and a budget.

During an interval the rows of every micro-batch are scored in their own backward pass (``StepCapture``). When the next
decision comes, a few target rows give the next direction, some pilots are scored by a pass of their own where the
budget allows, and ridge regression predicts the rest of the pool (``select.predict``). A part of every plan is drawn
uniformly; how well its scores were predicted decides how much of the next plan follows the predictions.

The budget is the most that all this may cost, in passes, relative to the training itself: a forward pass of a token
counts 1, a backward pass 2, with adapters 1.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dataflex import comm
from dataflex.config.schema import MethodConfig
from dataflex.method import Rows
from dataflex.plan.schedule import Interval
from dataflex.rng import uniforms
from dataflex.select.predict import TokenFeatures, fitted, rank_correlation, row_effects
from dataflex.signals.gradients.consumers import Consumer, Dots, Norms, TargetVectors
from dataflex.signals.gradients.engine import GradientEngine
from dataflex.signals.gradients.in_run import Directions, StepCapture, capturable, directions
from dataflex.signals.gradients.parameters import Unit, choose_parameters, shape_of
from dataflex.signals.gradients.scorers import GradientScorers, target_vectors
from dataflex.signals.kinds import GradientNorms, GradientScores, Signal, TokenLoss
from dataflex.signals.runner import SignalRunner
from dataflex.signals.specs import GradientSpec
from dataflex.signals.sweep import row_pass
from dataflex.state import State
from dataflex.train.loader import ROWS
from dataflex.train.row_space import RowSpace

logger = logging.getLogger(__name__)

Floats = NDArray[np.float64]

_LEAST_WEIGHT = 0.01
_JUDGED_INTERVALS, _JUDGED_ROWS = 3, 32
_LEAST_ROWS = 8
_SKETCH = 8
_ADAPTERS = 0.2  # below this share of trained parameters a backward pass is one to layer inputs alone
_FIRST_AIM_STEP = 2


def asked_of_rows(selector: MethodConfig) -> tuple[str, ...]:
    """Return what a selector asks of training rows beside products with targets' gradients: "norm", "loss"."""
    signals = selector.requires.signals
    norm = ("norm",) if "gradients" in signals and not selector.targets else ()
    return (*norm, *(("loss",) if "losses" in signals else ()))


@dataclass(frozen=True, kw_only=True)
class Observations:
    """Scores of rows that became known.

    Attributes:
        rows: Row ids [n].
        groups: Group whose level the score shares: 2 x interval where served, 2 x interval + 1 for its pilots [n].
        steps: Optimizer steps [n].
        values: What was seen of each: products with K directions, and what else is asked of rows [n, Q].
        unbiased: Whether the row was drawn uniformly [n].
    """

    rows: Rows
    groups: NDArray[np.int64]
    steps: NDArray[np.int64]
    values: Floats
    unbiased: NDArray[np.bool_]

    @classmethod
    def none(cls, num_columns: int) -> Observations:
        """Return no observations."""
        empty = np.zeros(0, dtype=np.int64)
        return cls(
            rows=empty, groups=empty, steps=empty, values=np.zeros((0, num_columns)), unbiased=np.zeros(0, dtype=bool)
        )

    def where(self, kept: NDArray[np.bool_]) -> Observations:
        """Return some of them."""
        return Observations(**{name: value[kept] for name, value in vars(self).items()})

    def and_(self, more: Observations) -> Observations:
        """Return them and ``more``."""
        return Observations(**{name: np.concatenate([value, vars(more)[name]]) for name, value in vars(self).items()})


@dataclass(kw_only=True)
class InRun:
    """What a run with a budget knows of its rows. Methods called by the controller and the session are collective.

    Attributes:
        signals: The run's signals; its passes are counted there.
        space: Training rows and targets.
        targets: Names of the targets.
        asked: What else is asked of rows: ``loss``, ``norm`` (of the gradient).
        budget: Most that decisions cost, relative to the training.
        seed: Of all draws.
        rank: Rank of the factors of large matrices' directions.
        explore: Share of a plan that is drawn uniformly.
        forgetting: What an observation's weight is multiplied by with each interval.
        smoothing: Weight of earlier directions in the next, where not all target rows were looked at.
        precondition: Whether targets' gradients are scaled as Adam would.
    """

    signals: SignalRunner
    space: RowSpace
    targets: tuple[str, ...]
    asked: tuple[str, ...]
    budget: float
    seed: int
    rank: int = 8
    explore: float = 0.2
    forgetting: float = 0.7
    smoothing: float = 0.5
    precondition: bool = True
    told: dict[str, float] = field(default_factory=dict)
    """Numbers of the last decision, for the record."""

    def __post_init__(self) -> None:
        self.seen = Observations.none(len(self.targets) + len(self.asked))
        self.capture: StepCapture | None = None
        self.aims: Directions | None = None
        self.trust = 0.0
        self.explored: Rows = np.zeros(0, dtype=np.int64)
        self._interval = 0
        self._judged: list[Floats] = []
        self._looked = np.zeros(len(self.targets), dtype=np.int64)
        self._carried = 0.0
        self._pending: list[tuple[int, Rows, torch.Tensor]] = []
        self._rows: Rows | None = None
        self._losses: torch.Tensor | None = None
        self._features: TokenFeatures | None = None
        self._predicted: Floats | None = None
        self.signals.instead = self.answer

    @property
    def _aims_at(self) -> bool:
        """Whether gradients are looked at, and not losses alone."""
        return bool(self.targets) or "norm" in self.asked

    # -- while a step is trained ------------------------------------------------------------------

    def begin(self, batch: dict[str, Any], device: torch.device) -> None:
        """Listen to the forward and backward pass of a micro-batch."""
        if self.capture is None and self._aims_at:
            return
        self._rows = batch[ROWS]
        if self.capture is not None:
            shape = batch["input_ids"].shape
            self.capture.begin((int(shape[0]), int(shape[1])), device)

    def watch(self, losses: Any) -> None:
        """Take the micro-batch's token losses, and what each counts in the loss that is differentiated."""
        if self._rows is None:
            return
        tokens_B = losses.mask_BT.sum(dim=1)
        means_B = losses.loss_BT.detach().sum(dim=1) / tokens_B.clamp(min=1)
        self._losses = means_B.masked_fill(tokens_B == 0, torch.nan)
        if self.capture is not None:
            self.capture.watch(losses.loss_BT, losses.mask_BT)

    def take(self, step: int) -> None:
        """Keep what was seen of the micro-batch whose backward pass is over."""
        if self._rows is None or self._losses is None:
            return
        columns = []
        if self.capture is not None:
            scores, norms = self.capture.take()
            columns += [*scores.unbind(dim=1), *([] if norms is None else [norms])]
        columns += [self._losses] if "loss" in self.asked else []
        self._pending.append((step, self._rows, torch.stack(columns, dim=1)))
        self._rows = self._losses = None

    def end_step(self) -> None:
        """Stop listening until the next step."""
        if self.capture is not None:
            self.capture.end()

    # -- between steps ------------------------------------------------------------------------------

    def gather(self) -> None:
        """Bring the scores of all ranks together."""
        mine = [(np.full(len(rows), step), rows, values.cpu().numpy()) for step, rows, values in self._pending]
        self._pending = []
        everyone = [part for parts in comm.gather_objects(mine) for part in parts]
        if not everyone:
            return
        steps, rows, values = (np.concatenate(column) for column in zip(*everyone, strict=True))
        order = np.lexsort((rows, steps))
        steps, rows, values = steps[order], rows[order], values[order].astype(np.float64)
        # A loss scale that overflowed skipped the step: nothing of it counts.
        skipped = np.unique(steps[np.isinf(values).any(axis=1)])
        known = np.isfinite(values).all(axis=1) & ~np.isin(steps, skipped)
        new = Observations(
            rows=rows,
            groups=np.full(len(rows), 2 * self._interval),
            steps=steps,
            values=values,
            unbiased=np.isin(rows, self.explored),
        )
        self.seen = self.seen.and_(new.where(known))

    def _price(self, interval: Interval, global_batch: int) -> tuple[float, float]:
        """Return the tokens that an interval serves, about, and what training on one costs (F + B)."""
        parameters = list(self.signals.access.model.parameters())
        sizes = [(shape_of(p).numel(), p.requires_grad) for p in parameters]
        trained = sum(size for size, trains in sizes if trains)
        tokens = interval.steps * global_batch * float(self.space.lengths.mean())
        return tokens, 2.0 if trained < _ADAPTERS * sum(size for size, _ in sizes) else 3.0

    def decide(self, interval: Interval, global_batch: int) -> None:
        """Judge the predictions of the interval that is over, aim, score pilots, and predict anew (collective)."""
        self.gather()
        tokens, both = self._price(interval, global_batch)
        allowed = self.budget * tokens * both
        left = allowed + self._carried
        self._judge()
        if self._aims_at:
            if interval.start_step:
                left -= self._aim(left, tokens, both)
                left -= self._pilots(interval, left, both)
        self._carried = min(max(left, 0.0), allowed)
        self._interval, self._predicted = interval.index, None
        if len(self.seen.rows) >= _LEAST_ROWS:
            self._predicted = self._scores(self.seen, self.space.all_rows())
            self._predicted[self.space.supervised == 0] = np.nan
        self.told |= {"budget_left": left, "observations": float(len(self.seen.rows)), "trust": self.trust}

    def aim_late(self, step: int, interval: Interval, global_batch: int) -> None:
        """Aim during warm-up, once the optimizer has moments and adapters are no longer zero (collective)."""
        if step == interval.start_step + _FIRST_AIM_STEP and self.capture is None and self._aims_at:
            self._carried = max(self._carried - self._aim(self._carried, *self._price(interval, global_batch)), 0.0)

    def _aim(self, left: float, tokens: float, both: float) -> float:
        """Take the gradients of as many target rows as there is budget for; return what that and the hooks cost."""
        access = self.signals.access
        scorers = GradientScorers(access, GradientSpec(precondition="true_adam" if self.precondition else "none"))
        capture = self.capture
        if capture is None:
            layers, left_out = capturable(access.model, scorers.engine.units)
            capture = self._listen(layers)
            if left_out:
                told = "; ".join(f"{name}: {reason}" for name, reason in list(left_out.items())[:3])
                logger.info("scores from the training step leave out %d parameters (%s)", len(left_out), told)
        if not self.targets:
            capture.aim(Directions.none(capture.layers))
            return tokens * capture.cost(access.model)
        hooks = tokens * capture.cost(access.model) if self.aims is not None else 0.0
        share, spent = max(left - hooks, 0.0) / len(self.targets), hooks
        sweeps, whole = [], True
        for k, name in enumerate(self.targets):
            lengths = access.corpus(name).lengths
            order = np.argsort(uniforms(self.seed, f"in_run target {name}", 0, np.arange(len(lengths))))
            order = np.roll(order, -int(self._looked[k]))
            cost = np.cumsum(lengths[order]) * both
            count = max(int(np.searchsorted(cost, share, side="right")), min(_LEAST_ROWS, len(order)))
            whole, spent = whole and count == len(order), spent + float(cost[count - 1])
            self._looked[k] = (self._looked[k] + count) % len(order)
            sweeps.append(access.target_sweep(name, np.sort(order[:count])))
        self._count(sum(len(sweep.rows) for sweep in sweeps))
        gradients = target_vectors(scorers.engine, sweeps, normalize_rows=False)
        moments = scorers.moments() if self.precondition else None
        new = directions(gradients, moments, capture.layers, rank=self.rank, seed=self.seed)
        if self.aims is not None and not whole and self.smoothing:
            new = new.blended(self.aims, self.smoothing)
        self.aims = new
        capture.aim(new)
        self.told |= {"coverage": float(new.coverage.min()), "captured": float(new.captured.min())}
        return spent

    def _count(self, rows: int) -> None:
        self.signals.forward_rows += rows
        self.signals.backward_rows += rows

    def _pilots(self, interval: Interval, left: float, both: float) -> float:
        """Look at rows by a pass of their own while there is budget, at such that were never seen first."""
        lengths, usable = self.space.lengths, np.flatnonzero(self.space.supervised > 0)
        order = self._unseen_first(usable, "in_run pilots", interval)
        cost = np.cumsum(lengths[order]) * both
        count = int(np.searchsorted(cost, left, side="right"))
        if count < _LEAST_ROWS:
            return 0.0
        rows = np.sort(order[:count])
        values = self._exact(rows).astype(np.float64)
        new = Observations(
            rows=rows,
            groups=np.full(count, 2 * interval.index + 1),
            steps=np.full(count, interval.start_step),
            values=values,
            unbiased=np.ones(count, dtype=bool),
        )
        self.seen = self.seen.and_(new.where(np.asarray(np.isfinite(values).all(axis=1))))
        return float(cost[count - 1])

    def _unseen_first(self, rows: Rows, name: str, interval: Interval) -> Rows:
        """Return rows in an order that is drawn anew each interval, those that were never looked at first."""
        order = rows[np.argsort(uniforms(self.seed, name, interval.index, rows), kind="stable")]
        known = np.bincount(self.seen.rows, minlength=self.space.num_rows)[order] > 0
        return np.concatenate([order[~known], order[known]])

    def _exact(self, rows: Rows) -> NDArray[np.float32]:
        """Return what is asked of rows by a pass of their own [n, Q]."""
        assert self.capture is not None
        access = self.signals.access
        captured = {name for unit in self.capture.layers for name in unit.parameters.values()}
        parameters = {name: p for name, p in choose_parameters(access.model).items() if name in captured}
        engine = GradientEngine(access.model, autocast=access.autocast, parameters=parameters, release=access.release)
        consumers: list[Consumer] = [Norms()] if "norm" in self.asked else []
        if self.aims is not None:
            consumers.append(Dots(TargetVectors(tensors=self.aims.whole(parameters)), normalize="none"))

        def score(batch: dict[str, Any]) -> torch.Tensor:
            found = engine.run(batch, consumers)
            columns = [*found["dots"].unbind(dim=1)] if self.aims is not None else []
            columns += [found[key] for key, name in (("norms", "norm"), ("losses", "loss")) if name in self.asked]
            return torch.stack(columns, dim=1)

        self._count(len(rows))
        with engine.observing():
            return row_pass(access.sweep(rows, None, "pilots"), score, (self.seen.values.shape[1],))

    # -- predictions -----------------------------------------------------------------------------------

    @property
    def features(self) -> TokenFeatures:
        """What rows are made of, read once."""
        if self._features is None:
            signals = self.signals
            self._features = TokenFeatures.of(
                self.space.num_rows,
                lambda rows: (signals.tokens(rows, part="prompt"), signals.tokens(rows, part="completion")),
                self.space.domains.domain_of.astype(np.int64),
                len(self.space.domains.names),
            )
        return self._features

    def _scores(self, seen: Observations, rows: Rows) -> Floats:
        """Return predictions of rows [n, Q] from observations, the same on every rank."""

        def compute() -> Floats:
            age = (seen.groups.max() - seen.groups) // 2
            weights = self.forgetting ** age.astype(np.float64)
            recent = weights >= _LEAST_WEIGHT
            known, used = seen.where(recent), weights[recent]
            values, scale = known.values.copy(), np.ones(known.values.shape[1])
            for group in np.unique(known.groups):  # gradients shrink: intervals differ in scale
                own = known.groups == group
                scale = np.maximum(values[own].std(axis=0), 1e-30)
                values[own] /= scale
            fit = fitted(self.features.matrix(known.rows), known.groups, values, used)
            effects = row_effects(known.rows, fit.residuals, used, self.space.num_rows)
            return (self.features.times(rows, fit.weights) + fit.offset + effects[rows]) * scale

        return comm.on_one_rank("predicting scores", compute)

    def _judge(self) -> None:
        """Compare what the newest interval's uniformly drawn rows showed with what earlier observations say of them."""
        self.trust, seen = 0.0, self.seen
        served = seen.groups % 2 == 0
        if served.any():
            last = seen.groups[served].max()
            before, newest = seen.groups < last, seen.groups == last
            if not before.any():  # the first interval: its second half by its first
                middle = np.median(seen.steps[newest])
                before, newest = newest & (seen.steps <= middle), newest & (seen.steps > middle)
            newest &= seen.unbiased
            if before.sum() >= _LEAST_ROWS and newest.sum() >= 4:
                rows = seen.rows[newest]
                pairs = np.stack([self._scores(seen.where(before), rows), seen.values[newest]])
                ranks = pairs.argsort(axis=1).argsort(axis=1) / (len(rows) - 1.0)
                self._judged = [*self._judged, ranks][-_JUDGED_INTERVALS:]
        if not self._judged:
            return
        pooled = np.concatenate(self._judged, axis=1)
        found = np.array([rank_correlation(*pooled[:, :, k]) for k in range(pooled.shape[2])])
        correlation, lower = found.mean(axis=0)
        self.trust = float(lower > 0 and pooled.shape[1] >= _JUDGED_ROWS)
        self.told |= {"correlation": float(correlation), "correlation_low": float(lower)}

    def answer(self, signal: Signal, rows: Rows) -> NDArray[np.float32] | None:
        """Return what training rows would say to a signal, predicted, float32; None where it has to be asked."""
        if self._predicted is None:
            return None
        if isinstance(signal, GradientScores) and set(signal.targets) <= set(self.targets):
            columns = [self.targets.index(name) for name in signal.targets]
            return self._predicted[rows][:, columns].astype(np.float32)
        kinds = {GradientNorms: "norm", TokenLoss: "loss"}
        name = kinds.get(type(signal))
        if name not in self.asked:
            return None
        return self._predicted[rows, len(self.targets) + self.asked.index(name)].astype(np.float32)

    # -- what a plan is made of ------------------------------------------------------------------------

    def chosen(self, wanted: int) -> int:
        """Return how many of ``wanted`` rows predictions may choose; the others are drawn."""
        if self._predicted is None:
            return 0
        return round(wanted * (1 - self.explore) * self.trust)

    def drawn(self, pool: Rows, taken: Rows, count: int, interval: Interval) -> Rows:
        """Return ``count`` rows of the pool beside ``taken``, uniformly, rows that were never scored first."""
        self.explored = np.sort(self._unseen_first(np.setdiff1d(pool, taken), "in_run explore", interval)[:count])
        return self.explored

    @property
    def reason(self) -> str:
        """What the last decision was made of, for the record."""
        return ", ".join(f"{name} {value:.3g}" for name, value in self.told.items())

    # -- state ---------------------------------------------------------------------------------------------

    def state_dict(self) -> State:
        """Return everything that a resumed run needs; ``gather`` comes first."""
        return {
            "seen": dict(vars(self.seen)),
            "explored": self.explored,
            "interval": self._interval,
            "judged": list(self._judged),
            "looked": self._looked,
            "carried": self._carried,
            "trust": self.trust,
            "captures": self.capture is not None,
            "aims": {} if self.aims is None else self.aims.state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        """Take back what ``state_dict`` gave."""
        self.seen = Observations(**{name: np.asarray(value) for name, value in state["seen"].items()})
        self.explored = np.asarray(state["explored"], dtype=np.int64)
        self._interval, self.trust = int(state["interval"]), float(state["trust"])
        self._judged = [np.asarray(each) for each in state["judged"]]
        self._looked = np.asarray(state["looked"], dtype=np.int64)
        self._carried = float(state["carried"])
        if state["captures"]:
            access = self.signals.access
            units = GradientScorers(access, GradientSpec(precondition="none")).engine.units
            capture = self._listen(capturable(access.model, units)[0])
            if state["aims"]:
                self.aims = Directions.of_state(state["aims"], access.device)
            capture.aim(self.aims or Directions.none(capture.layers))

    def _listen(self, layers: Sequence[Unit]) -> StepCapture:
        self.capture = StepCapture(layers, sketch=_SKETCH if "norm" in self.asked else 0, seed=self.seed)
        return self.capture
