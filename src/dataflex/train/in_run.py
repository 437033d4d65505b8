"""Decisions that training pays for: scores of the rows just served, predictions of all others, and a budget.

During an interval every row leaves a sketch of its gradient in its own backward pass (``StepCapture``). When the next
decision comes, some target rows give the directions, in Adam's scale, and products of the sketches with those of the
directions are scores of the rows that were served; where the budget allows, pilots leave sketches in a pass of their
own. Ridge regression predicts the rest of the pool (``select.predict``). A part of every plan is drawn uniformly; how
well its scores were predicted decides whether the next plan follows the predictions. Where the targets' own losses fall
no more, plans choose less and draw more.

The budget is the most that all this may cost, in passes, relative to the training itself: a forward pass of a token
counts 1, a backward pass 2, with adapters 1.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dataflex import comm
from dataflex.config.schema import DynamicConfig
from dataflex.errors import UnsupportedError
from dataflex.method import Rows
from dataflex.plan.schedule import Interval
from dataflex.rng import uniforms
from dataflex.select.predict import TokenFeatures, fitted, rank_correlation, row_effects
from dataflex.sequences import Sequences
from dataflex.signals import kinds
from dataflex.signals.gradients.in_run import Directions, StepCapture, adam_scale, capturable
from dataflex.signals.gradients.parameters import shape_of
from dataflex.signals.gradients.scorers import GradientScorers, targets_seen
from dataflex.signals.kinds import GradientNorms, GradientScores, Signal, TokenLoss
from dataflex.signals.losses import model_inputs
from dataflex.signals.model_parts import model_parts
from dataflex.signals.runner import SignalRunner
from dataflex.signals.specs import GradientSpec
from dataflex.signals.sweep import Turn, preserve_state, row_pass
from dataflex.state import State
from dataflex.train.loader import ROWS
from dataflex.train.loss import TokenLosses, sample_means, token_losses
from dataflex.train.row_space import RowSpace

logger = logging.getLogger(__name__)

Floats = NDArray[np.float64]

_LEAST_WEIGHT = 0.01
_JUDGED_INTERVALS = 3
_FEWEST_COMPARED = 4  # target rows whose losses are compared with earlier ones
_LEAST_ROWS = 8
_PARTS = 10
_KEPT_ROWS, _KEPT_SKETCHES = 2**20, 4096  # newest observations that are kept, and those with sketches
_SKETCH = 16
_ADAPTERS = 0.2  # below this share of trained parameters a backward pass is one to layer inputs alone


def levels(steps: NDArray[np.int64], pilots: NDArray[np.bool_], goals: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return numbers of what has a level of its own: neighbouring steps with ``_LEAST_ROWS`` of them, or pilots.

    What all gradients of a step share moves from step to step, most of all while the learning rate rises. Rows of
    targets (``goals``) have the level of the pilots of their decision, or of the last steps before it.
    """
    keys, index = np.unique(2 * steps + ~(pilots | goals), return_inverse=True)
    counts = np.bincount(index, ~goals, len(keys))  # a pass of its own comes before the step of its number
    passes, blocks, size = keys % 2 == 0, np.zeros(len(keys), dtype=np.int64), 0.0
    for i in range(1, len(keys)):
        size += counts[i - 1]
        apart = counts[i] >= _LEAST_ROWS if passes[i] else passes[i - 1] or size >= _LEAST_ROWS
        blocks[i] = blocks[i - 1] + apart
        size = 0.0 if apart else size
    last = blocks == blocks[-1]
    if counts[last].sum() < _LEAST_ROWS and not last.all() and not passes[np.flatnonzero(~last)[-1]]:
        blocks[last] -= 1
    return blocks[index]


def centred(values: Floats, groups: NDArray[np.int64]) -> Floats:
    """Return ``values`` [n, K] less the means of their groups, which are numbered from 0."""
    counts = np.bincount(groups)[:, None]
    means = np.stack([np.bincount(groups, column) for column in values.T], axis=1) / counts
    found: Floats = values - means[groups]
    return found


def asked_of_rows(config: DynamicConfig) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return what methods ask of training steps: targets, and "norm" or "loss" beside them."""
    targets: list[str] = []
    asked: set[str] = set()
    for method in config.methods:
        signals = method.requires.signals
        if method is config.selector and config.signals.budget is not None:
            scored = "gradients" in signals
            targets += method.targets if scored else ()
            asked |= {"norm"} if scored and not method.targets else set()
            asked |= {"loss"} if "losses" in signals else set()
        targets += method.targets if "in_run_scores" in signals else ()
        asked |= {what for what in ("norm", "loss") for name in signals if name.startswith(f"in_run_{what}")}
        asked |= {"norm"} if "in_run_scores" in signals and not method.targets else set()
    return tuple(dict.fromkeys(targets)), tuple(what for what in ("norm", "loss") if what in asked)


@dataclass(frozen=True, kw_only=True)
class Observations:
    """What became known of rows."""

    rows: Rows  # [n]; those of targets follow those of the pool
    intervals: NDArray[np.int64]  # in which they were looked at [n]
    steps: NDArray[np.int64]  # likewise [n]
    sketches: NDArray[np.float32]  # of their gradients [n, D]; D = 0 where no target asks for them
    values: Floats  # what else is asked of them [n, Q]
    unbiased: NDArray[np.bool_]  # whether they were drawn uniformly [n]
    pilots: NDArray[np.bool_]  # whether they were looked at in a pass of their own [n]

    def where(self, kept: Any) -> Observations:
        """Return some of them."""
        return Observations(**{name: value[kept] for name, value in vars(self).items()})

    def and_(self, more: Observations) -> Observations:
        """Return the newest of them and ``more``."""
        kept = _KEPT_SKETCHES if self.sketches.shape[1] else _KEPT_ROWS
        both = {name: np.concatenate([value, vars(more)[name]])[-kept:] for name, value in vars(self).items()}
        return Observations(**both)


@dataclass(kw_only=True)
class InRun:
    """What a run with a budget knows of its rows. All but what a step does is collective."""

    signals: SignalRunner  # passes are counted there
    space: RowSpace
    targets: tuple[str, ...]
    asked: tuple[str, ...]  # from ``asked_of_rows``
    budget: float | None  # None: nothing is predicted, all target rows are looked at
    seed: int
    spec: GradientSpec  # which gradients; whether Adam's moments scale the targets', and whether cosines are compared
    total_steps: int  # of the run
    explore: float = 0.2  # share of a plan that is drawn uniformly
    forgetting: float = 0.7  # weight of an observation from one interval to the next
    smoothing: float = 0.7  # what earlier target rows count in a direction, where not all were looked at again
    told: dict[str, float] = field(default_factory=dict)  # numbers of the last decision

    def __post_init__(self) -> None:
        self.seen: Observations | None = None
        self.aims: Floats | None = None  # sketches of the targets' directions, of length 1 [K, D]
        self.aimed = np.zeros(len(self.targets))  # number of target rows behind each, earlier ones counting less [K]
        self.explored: Rows = np.zeros(0, dtype=np.int64)  # rows of the plan in progress that were drawn uniformly
        self.trust = 0.0
        self._interval = self._aimed_at = 0
        self._judged: list[Floats] = []
        sizes = [len(self.signals.access.corpus(name).lengths) for name in self.targets]
        self._firsts = self.space.num_rows + np.cumsum([0, *sizes])  # first row of each target, among all [K + 1]
        self._target_losses = np.full(int(sum(sizes)), np.nan)  # of target rows when they were last looked at
        self.share = 1.0  # of what predictions are trusted with; less where the targets' losses fall no more
        self._own = np.zeros(len(self.targets))  # share of a target row of the last decision in its direction [K]
        self._looked = np.zeros(len(self.targets), dtype=np.int64)  # where each target's rotation stands
        self._spent = 0.0  # on targets and pilots, in tokens times passes
        self._capture: StepCapture | None = None
        self._pending: list[tuple[int, Rows, torch.Tensor]] = []
        self._rows: Rows | None = None
        self._losses: torch.Tensor | None = None
        self._features: TokenFeatures | None = None
        self._predicted: Floats | None = None
        self.signals.instead = self.answer

    @property
    def capture(self) -> StepCapture | None:
        """The hooks on the model's layers; None where losses alone are looked at."""
        if self._capture is None and (self.targets or "norm" in self.asked):
            access = self.signals.access
            layers, left_out = capturable(access.model, self._scorers().engine.units)
            self._capture = StepCapture(layers, sketch=_SKETCH, seed=self.seed)
            self._capture.aim(Directions.none(layers))
            if left_out:
                told = "; ".join(f"{name}: {reason}" for name, reason in list(left_out.items())[:3])
                logger.info("scores from training steps leave out %d parameters (%s)", len(left_out), told)
        return self._capture

    def _scorers(self) -> GradientScorers:
        return GradientScorers(self.signals.access, self.spec)

    # -- while a step is trained ------------------------------------------------------------------

    def begin(self, batch: dict[str, Any], device: torch.device) -> None:
        """Listen to the forward and backward pass of a micro-batch."""
        self._rows = batch[ROWS]
        if self.capture is not None:
            shape = batch["input_ids"].shape
            self.capture.begin((int(shape[0]), int(shape[1])), device)

    def watch(self, losses: TokenLosses) -> None:
        """Take the micro-batch's token losses, and what each counts in the loss that is differentiated."""
        if self._rows is None:
            return
        means_B, tokens_B = sample_means(losses.loss_BT.detach(), losses.mask_BT, Sequences(rows_B=self._rows))
        self._losses = means_B.masked_fill(tokens_B == 0, torch.nan)
        if self.capture is not None:
            self.capture.watch(losses.loss_BT, losses.mask_BT)

    def take(self, step: int) -> None:
        """Keep what was seen of the micro-batch whose backward pass is over."""
        if self._rows is not None and self._losses is not None:
            self._pending.append((step, self._rows, self._taken(self._losses)))
        self._rows = self._losses = None

    def _taken(self, losses_B: torch.Tensor) -> torch.Tensor:
        """Return sketches, if targets ask for them, and what else is asked of the rows [B, D + Q]."""
        columns = []
        if self.capture is not None:
            found = self.capture.take()
            assert found.norms is not None
            columns += [found.sketches] if self.targets else []
            columns += [found.norms[:, None]] if "norm" in self.asked else []
        return torch.cat([*columns, *([losses_B[:, None]] if "loss" in self.asked else [])], dim=1)

    def end_step(self) -> None:
        """Stop listening until the next step."""
        if self._capture is not None:
            self._capture.end()

    def gather(self) -> None:
        """Bring together what the ranks have seen."""
        mine = [(np.full(len(rows), step), rows, values.cpu().numpy()) for step, rows, values in self._pending]
        self._pending = []
        everyone = [part for parts in comm.gather_objects(mine) for part in parts]
        if not everyone:
            return
        steps, rows, values = (np.concatenate(column) for column in zip(*everyone, strict=True))
        order = np.lexsort((rows, steps))
        steps, rows, values = steps[order], rows[order], values[order]
        skipped = np.unique(steps[np.isinf(values).any(axis=1)])  # a loss scale that overflowed: the step was undone
        known = ~np.isnan(values).any(axis=1) & ~np.isin(steps, skipped)
        unbiased = np.isin(rows, self.explored)[known]
        self._note(rows[known], self._interval, steps[known], values[known], unbiased=unbiased, pilots=False)

    def _note(
        self,
        rows: Rows,
        interval: int,
        steps: NDArray[np.int64],
        values: NDArray[np.float32],
        *,
        unbiased: Any,
        pilots: bool,
    ) -> None:
        """Keep what became known of rows in an interval."""
        size = values.shape[1] - len(self.asked)
        new = Observations(
            rows=rows,
            intervals=np.full(len(rows), interval),
            steps=steps,
            sketches=values[:, :size],
            values=values[:, size:].astype(np.float64),
            unbiased=np.broadcast_to(unbiased, len(rows)),
            pilots=np.full(len(rows), pilots),
        )
        self.seen = new if self.seen is None else self.seen.and_(new)

    # -- between intervals --------------------------------------------------------------------------

    def _price(self, interval: Interval, global_batch: int) -> tuple[float, float]:
        """Return the tokens that an interval serves, about, and what training on one costs (F + B)."""
        sizes = [(shape_of(p).numel(), p.requires_grad) for p in self.signals.access.model.parameters()]
        trained = sum(size for size, trains in sizes if trains)
        tokens = interval.steps * global_batch * float(self.space.lengths.mean())
        return tokens, 2.0 if trained < _ADAPTERS * sum(size for size, _ in sizes) else 3.0

    def _left(self, interval: Interval, tokens: float, both: float) -> float:
        """Return what may be spent on targets and pilots now.

        By the end of step t of T it is the share sqrt(t / T) of the whole run's, hooks paid: early decisions know least
        and last longest.
        """
        if self.budget is None:
            return np.inf
        hooks = 0.0 if self.capture is None else self.capture.cost(self.signals.access.model)
        total = (self.budget * both - hooks) * tokens / interval.steps * self.total_steps
        return total * min(interval.stop_step / self.total_steps, 1.0) ** 0.5 - self._spent

    def decide(self, interval: Interval, global_batch: int) -> None:
        """Look at the targets, judge the predictions of the interval that is over, look at pilots, and predict anew."""
        self.gather()
        tokens, both = self._price(interval, global_batch)
        self._predicted = None
        left = self._left(interval, tokens, both)
        if interval.start_step:
            if self.targets:
                self._spent += self._aim(interval, left, both)
            if self.budget is not None:
                self._judge()
            left = self._left(interval, tokens, both)
            if self.capture is not None and self.budget is not None:
                self._spent += self._pilots(interval, left, both)
            if self.budget is not None and self.seen is not None and len(self.seen.rows) >= _LEAST_ROWS:
                self._predicted = self._scores(self.seen, self.space.all_rows())
                self._predicted[self.space.supervised == 0] = np.nan
        self._interval = interval.index
        self.told |= {"trust": self.trust, "spent": self._spent / (tokens / interval.steps * self.total_steps * both)}

    def _aim(self, interval: Interval, left: float, both: float) -> float:
        """Take the gradients of as many target rows as there is budget for, others each time; return their cost."""
        access, capture, scorers = self.signals.access, self.capture, self._scorers()
        assert capture is not None
        sweeps, spent = [], 0.0
        counts, whole = np.zeros(len(self.targets)), True
        for k, name in enumerate(self.targets):
            lengths = access.corpus(name).lengths
            order = np.argsort(uniforms(self.seed, f"in_run target {name}", 0, np.arange(len(lengths))))
            order = np.roll(order, -int(self._looked[k]))
            cost = np.cumsum(lengths[order]) * both
            share = max(left, 0.0) / len(self.targets)
            count = max(int(np.searchsorted(cost, share, side="right")), min(_LEAST_ROWS, len(order)))
            whole, spent = whole and count == len(order), spent + float(cost[count - 1])
            counts[k] = count
            self._looked[k] = (self._looked[k] + count) % len(order)
            sweeps.append(access.target_sweep(name, np.sort(order[:count])))
        self._count(sum(len(sweep.rows) for sweep in sweeps))
        found: list[tuple[Rows, NDArray[np.float32]]] = []
        builder = targets_seen(
            scorers.engine,
            sweeps,
            normalize_rows=False,
            around=lambda k, turn: self._sketching(self._firsts[k] + sweeps[k].rows[turn.positions], turn, found),
        )
        gradients = builder.finish()
        self._compare([(self._firsts[k] + sweeps[k].rows[at], losses) for k, at, losses in builder.row_losses])
        capture.end()
        moments = scorers.moments() if self.spec.precondition == "true_adam" else None
        names = [name for unit in capture.layers for name in unit.parameters.values()]
        inside = total = np.zeros(len(self.targets))
        directions = {}
        for name, gradient in gradients.tensors.items():
            scaled = gradient if moments is None else gradient * adam_scale(moments[name]).to(gradient.device)
            product = (gradient * scaled).flatten(1).double().sum(dim=1).cpu().numpy()
            total = total + product
            if name in names:
                inside, directions[name] = inside + product, scaled
        aims = capture.sketch_of(directions).double().cpu().numpy()
        plain = capture.sketch_of({name: gradients.tensors[name] for name in directions}).double().cpu().numpy()
        # In Adam's scale the share of one row is not known by its sketch; the mean scale is that of the sum.
        scale = (aims * plain).sum(axis=1) / np.maximum((plain**2).sum(axis=1), 1e-300)
        lengths = np.maximum(np.linalg.norm(aims, axis=1), 1e-30)
        aims, weights = aims / lengths[:, None], counts.copy()
        if self.aims is not None and not whole:
            before = self.smoothing * self.aimed
            aims = counts[:, None] * aims + before[:, None] * self.aims
            weights = np.maximum(np.linalg.norm(aims, axis=1), 1e-30)
            aims /= weights[:, None]
            counts = counts + before
        self.aimed = counts
        self.aims, self._own = comm.broadcast_object((aims, scale / lengths / weights))
        self.told["coverage"] = float((inside / np.maximum(total, 1e-300)).min())
        self._note_goals(found, interval)
        return spent

    def _compare(self, found: list[tuple[Rows, Floats]]) -> None:
        """Compare target rows' losses with those of the last time that each was looked at (collective).

        Where their mean does not fall, the rows that pay have been learnt: half as many are chosen from here on, and
        twice as many again where it falls.
        """
        everyone = [part for parts in comm.gather_objects(found) for part in parts]
        if not everyone:
            return
        rows, losses = (np.concatenate(column) for column in zip(*everyone, strict=True))
        order = np.argsort(rows)
        rows, losses = rows[order] - self.space.num_rows, losses[order]
        change = losses - self._target_losses[rows]
        self._target_losses[rows] = losses
        change = change[np.isfinite(change)]
        if len(change) >= _FEWEST_COMPARED:
            self.share = self.share / 2 if change.mean() >= 0 else min(2 * self.share, 1.0)
            self.told |= {"target change": float(change.mean()), "share": self.share}

    @contextmanager
    def _sketching(self, rows: Rows, turn: Turn, found: list[tuple[Rows, NDArray[np.float32]]]) -> Iterator[None]:
        """Add the sketches of rows whose gradients are taken inside, in one pass of the model or several alike."""
        access, capture = self.signals.access, self.capture
        assert capture is not None
        batch, width = turn.batch["input_ids"].shape

        def begin(_module: Any, _args: Any) -> None:
            capture.begin((int(batch), int(width)), access.device)

        handle = access.model.register_forward_pre_hook(begin)
        try:
            yield
        finally:
            handle.remove()
        sketches = capture.take(weights_B=torch.ones(int(batch))).sketches
        assert sketches is not None
        if turn.mine:
            found.append((rows, sketches.cpu().numpy()))

    def _note_goals(self, found: list[tuple[Rows, NDArray[np.float32]]], interval: Interval) -> None:
        """Keep what became known of target rows: predictions may learn from them what scores well (collective)."""
        everyone = [part for parts in comm.gather_objects(found) for part in parts]
        if self.budget is None or not everyone:
            return
        rows, sketches = (np.concatenate(column) for column in zip(*everyone, strict=True))
        order = np.argsort(rows)
        rows, sketches = rows[order], sketches[order]
        known = np.linalg.norm(sketches, axis=1) > 0
        values = np.concatenate([sketches, np.full((len(rows), len(self.asked)), np.nan, np.float32)], axis=1)
        steps = np.full(int(known.sum()), interval.start_step)
        self._note(rows[known], interval.index, steps, values[known], unbiased=False, pilots=True)
        self._aimed_at = interval.index

    def _count(self, rows: int) -> None:
        self.signals.forward_rows += rows
        self.signals.backward_rows += rows

    def _pilots(self, interval: Interval, left: float, both: float) -> float:
        """Look at rows in a pass of their own while there is budget, at such that were never seen first."""
        order = self._unseen_first(np.flatnonzero(self.space.supervised > 0), "in_run pilots", interval)
        cost = np.cumsum(self.space.lengths[order]) * both
        count = int(np.searchsorted(cost, left, side="right"))
        if count < _LEAST_ROWS:
            return 0.0
        rows = np.sort(order[:count])
        values = self._looked_at(rows)
        known = np.isfinite(values).all(axis=1)
        steps = np.full(int(known.sum()), interval.start_step)
        self._note(rows[known], interval.index, steps, values[known], unbiased=True, pilots=True)
        return float(cost[count - 1])

    def _unseen_first(self, rows: Rows, name: str, interval: Interval) -> Rows:
        """Return rows in an order that is drawn anew each interval, those that were never looked at first."""
        order = rows[np.argsort(uniforms(self.seed, name, interval.index, rows), kind="stable")]
        known = np.isin(order, [] if self.seen is None else self.seen.rows)
        return np.concatenate([order[~known], order[known]])

    def _looked_at(self, rows: Rows) -> NDArray[np.float32]:
        """Return what training steps would show of rows, in eval mode and without a parameter's gradient [n, D + Q]."""
        access, capture = self.signals.access, self.capture
        assert capture is not None
        embeddings = model_parts(access.model).lm.get_input_embeddings()
        leaves: list[torch.Tensor] = []

        def lift(_module: Any, _args: Any, output: torch.Tensor) -> torch.Tensor:
            leaves.append(output.detach().requires_grad_())  # the backward pass goes down to here, past every layer
            return leaves[-1]

        def score(batch: dict[str, Any]) -> torch.Tensor:
            rows, width = batch["input_ids"].shape
            capture.begin((int(rows), int(width)), access.device)
            handle = embeddings.register_forward_hook(lift)
            try:
                with torch.enable_grad(), access.autocast():
                    logits = access.model(**model_inputs(batch), use_cache=False).logits
                    losses = token_losses(logits, batch["labels"])
                    capture.watch(losses.loss_BT, losses.mask_BT)
                    means_B, tokens_B = sample_means(
                        losses.loss_BT, losses.mask_BT, Sequences(rows_B=np.arange(len(logits)))
                    )
                    torch.autograd.grad(means_B.sum(), [leaves.pop()])
            finally:
                handle.remove()
            return self._taken(means_B.detach().masked_fill(tokens_B == 0, torch.nan))

        self._count(len(rows))
        size = capture.size if self.targets else 0
        with preserve_state(access.model):
            access.model.eval()
            found = row_pass(access.sweep(rows, None, "pilots"), score, (size + len(self.asked),))
        capture.end()
        return found

    # -- predictions -----------------------------------------------------------------------------------

    @property
    def features(self) -> TokenFeatures:
        """What rows are made of, read once."""
        if self._features is None:
            signals, firsts = self.signals, self._firsts
            sources = [(None, 0), *zip(self.targets, firsts, strict=False)]

            def tokens(rows: Rows) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]]:
                which = np.searchsorted(firsts, rows, side="right")
                prompts, responses = [], []
                for number in np.unique(which):  # ascending, as rows are
                    target, first = sources[number]
                    own = rows[which == number] - first
                    prompts += signals.tokens(own, target=target, part="prompt")
                    responses += signals.tokens(own, target=target, part="completion")
                return prompts, responses

            domains = np.full(int(firsts[-1]), -1, dtype=np.int64)
            domains[: self.space.num_rows] = self.space.domains.domain_of
            self._features = TokenFeatures.of(len(domains), tokens, domains, len(self.space.domains.names))
        return self._features

    def _of(self, seen: Observations, normalize: bool | None = None) -> Floats:
        """Return what is to be predicted of rows that were looked at [n, K + Q]."""
        normalize = self.spec.normalize if normalize is None else normalize
        if self.aims is None:
            return seen.values
        sketches = seen.sketches.astype(np.float64)
        scores, squares = sketches @ self.aims.T, (sketches**2).sum(axis=1)
        lengths = np.ones_like(scores)
        goals = np.flatnonzero((seen.rows >= self.space.num_rows) & (seen.intervals == self._aimed_at))
        of = np.searchsorted(self._firsts, seen.rows[goals], side="right") - 1
        share = self._own[of]  # a target row is compared with the direction of the others
        both = scores[goals, of]
        lengths[goals, of] = np.sqrt(np.maximum(1 - 2 * share * both + share**2 * squares[goals], 1e-30))
        scores[goals, of] -= share * squares[goals]
        scores /= lengths
        if normalize:
            scores /= np.maximum(np.sqrt(squares), 1e-30)[:, None]
        return np.concatenate([scores, seen.values], axis=1)

    def _scores(self, seen: Observations, rows: Rows) -> Floats:
        """Return predictions of rows [n, K + Q] from observations, the same on every rank."""

        def compute() -> Floats:
            weights = self.forgetting ** (seen.intervals.max() - seen.intervals).astype(np.float64)
            recent = weights >= _LEAST_WEIGHT
            known, used = seen.where(recent), weights[recent]
            goals = known.rows >= self.space.num_rows
            groups = levels(known.steps, known.pilots, goals)
            values = self._of(known)
            spread, scale = centred(values[~goals], groups[~goals]), np.ones(values.shape[1])
            kinds = 2 * known.intervals + known.pilots
            for kind in np.unique(kinds):  # gradients shrink: intervals differ in scale
                own = kinds == kind
                if own[~goals].any():
                    scale = np.maximum(spread[own[~goals]].std(axis=0), 1e-30)
                values[own] /= scale
            out, num = np.empty((len(rows), values.shape[1])), len(self.targets)
            for columns, those in ((slice(num), slice(None)), (slice(num, None), ~goals)):
                if not values[:, columns].shape[1]:
                    continue
                ids, weight = known.rows[those], used[those]
                fit = fitted(self.features.matrix(ids), groups[those], values[those, columns], weight)
                effects = row_effects(ids, fit.residuals, weight, int(self._firsts[-1]))
                out[:, columns] = self.features.times(rows, fit.weights) + fit.offset + effects[rows]
            return out * scale

        return comm.on_one_rank("predicting scores", compute)

    def _judge(self) -> None:
        """Compare what the newest interval's uniformly drawn rows showed with what earlier observations say of them."""
        self.trust, seen = 0.0, self.seen
        if seen is None:
            return
        goals = seen.rows >= self.space.num_rows
        last = seen.intervals[~seen.pilots].max(initial=-1)
        before, newest = seen.intervals < last, (seen.intervals == last) & ~seen.pilots & seen.unbiased
        if newest.sum() >= 4:
            shown = seen.where(newest)
            if (before & ~goals).sum() >= _LEAST_ROWS:
                predicted = self._scores(seen.where(before), shown.rows)
            else:  # the first interval: every part by the others
                parts = np.arange(len(shown.rows)) % _PARTS
                predicted = np.empty((len(shown.rows), len(self.targets) + len(self.asked)))
                for part in range(_PARTS):
                    own = parts == part
                    others = goals.copy()
                    others[np.flatnonzero(newest)[~own]] = True
                    predicted[own] = self._scores(seen.where(others), shown.rows[own])
            groups = levels(shown.steps, shown.pilots, np.zeros(len(shown.rows), dtype=np.bool_))
            both = np.stack([centred(predicted, groups), centred(self._of(shown), groups)])
            ranks = both.argsort(axis=1).argsort(axis=1) / (len(shown.rows) - 1.0)
            self._judged = [*self._judged, ranks][-_JUDGED_INTERVALS:]
        if not self._judged:
            return
        pooled = np.concatenate(self._judged, axis=1)
        found = np.array([rank_correlation(*pooled[:, :, k]) for k in range(pooled.shape[2])])
        correlation, above = found.mean(axis=0)
        self.trust = max(2 * float(above) - 1, 0.0)  # 0 where they are no better than chance
        self.told |= {"correlation": float(correlation)}

    def answer(self, signal: Signal, rows: Rows) -> NDArray[np.float32] | None:
        """Return what training rows would say to a signal, predicted, float32; None where it has to be asked."""
        if isinstance(signal, kinds.InRun):
            return self._shown(signal, rows)
        if self._predicted is None:
            return None
        if isinstance(signal, GradientScores) and set(signal.targets) <= set(self.targets):
            columns = [self.targets.index(name) for name in signal.targets]
            return self._predicted[rows][:, columns].astype(np.float32)
        name = {GradientNorms: "norm", TokenLoss: "loss"}.get(type(signal))
        if name not in self.asked:
            return None
        return self._predicted[rows, len(self.targets) + self.asked.index(name)].astype(np.float32)

    def _shown(self, signal: kinds.InRun, rows: Rows) -> NDArray[np.float32]:
        """Return what the newest step that served a row showed, and that step; NaN for others [n, K + 1] (collective).

        Raises:
            UnsupportedError: No method said that it asks for it.
        """
        self.gather()
        columns = [self.targets.index(name) for name in signal.targets if name in self.targets]
        what = {"losses": "loss", "norms": "norm"}.get(signal.what)
        if what in self.asked:
            columns = [len(self.targets) + self.asked.index(what)]
        if not columns or len(columns) < len(signal.targets):
            raise UnsupportedError(
                f"{signal.needs} {' '.join(signal.targets)}: no method states that it asks for it in its Requires"
            )
        table = np.full((self.space.num_rows, len(columns) + 1), np.nan)
        seen = None if self.seen is None else self.seen.where(~self.seen.pilots)
        if seen is not None and (self.aims is not None or not self.targets):
            values = self._of(seen, signal.normalize)[:, columns]
            table[seen.rows] = np.column_stack([values, seen.steps])  # of several the last, which is the newest
        return table[rows].astype(np.float32)

    # -- what a plan is made of ------------------------------------------------------------------------

    def chosen(self, wanted: int, interval: Interval) -> int:
        """Return how many of ``wanted`` rows predictions may choose; the others are drawn.

        The last interval explores nothing, since no decision follows that could use it.
        """
        if self._predicted is None:
            return 0
        explore = self.explore if interval.stop_step < self.total_steps else 0.0
        return round(wanted * (1 - explore) * self.trust * self.share)

    def drawn(self, pool: Rows, taken: Rows, count: int, interval: Interval) -> Rows:
        """Return ``count`` rows of the pool beside ``taken``, uniformly, rows that were never looked at first."""
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
            "seen": {} if self.seen is None else dict(vars(self.seen)),
            "aims": self.aims,
            "explored": self.explored,
            "interval": self._interval,
            "judged": list(self._judged),
            "looked": self._looked,
            "own": self._own,
            "aimed_at": self._aimed_at,
            "aimed": self.aimed,
            "spent": self._spent,
            "trust": self.trust,
            "target_losses": self._target_losses,
            "share": self.share,
        }

    def load_state_dict(self, state: State) -> None:
        """Take back what ``state_dict`` gave."""
        self.seen = Observations(**state["seen"]) if state["seen"] else None
        self.aims, self.explored, self._looked = state["aims"], state["explored"], state["looked"]
        self._interval, self._spent, self.trust = int(state["interval"]), float(state["spent"]), state["trust"]
        self._target_losses, self.share = state["target_losses"], float(state["share"])
        self.aimed = state["aimed"]
        self._own, self._aimed_at = state["own"], int(state["aimed_at"])
        self._judged = list(state["judged"])
