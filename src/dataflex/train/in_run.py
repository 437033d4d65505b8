"""Decisions that training pays for: scores of some rows, predictions of all others, and a budget.

At a decision some target rows give the directions, in Adam's scale, and pilots, which are rows of the pool, leave
sketches of their gradients in a pass of their own; scores are products of these with the directions. As long as the
budget does not pay for enough pilots, rows that are served leave sketches too, in their own backward pass
(``StepCapture``). Directions turn: pilots and target rows keep the scores of their own decision, served rows are
compared with the newest directions, and count less beside pilots. Ridge regression predicts the rest
(``select.predict``). A part of every plan is drawn uniformly; how well the scores of these rows and of the pilots are
predicted by others decides whether the plan follows the predictions.

The budget is the most that all this may cost, in passes, relative to the training itself: a forward pass of a token
counts 1, a backward pass 2, with adapters 1.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from dataflex import comm
from dataflex.config.schema import DynamicConfig
from dataflex.errors import UnsupportedError
from dataflex.method import Rows
from dataflex.plan.schedule import Interval
from dataflex.rng import stream, uniforms
from dataflex.select.predict import TokenFeatures, fitted, rank_correlation, row_effects
from dataflex.sequences import Joined, Sequences
from dataflex.signals import kinds
from dataflex.signals.embeddings import pool
from dataflex.signals.gradients.consumers import TargetVectors
from dataflex.signals.gradients.in_run import (
    Directions,
    StepCapture,
    Taken,
    capturable,
    checkpointed,
    directions,
    scaled,
)
from dataflex.signals.gradients.precondition import OptimizerState
from dataflex.signals.gradients.scorers import GradientScorers, targets_seen
from dataflex.signals.kinds import GradientNorms, GradientProducts, GradientScores, Signal, TokenLoss
from dataflex.signals.losses import document_ids, model_inputs, real_tokens
from dataflex.signals.model_parts import capture_hidden, model_parts
from dataflex.signals.passes import backward_cost
from dataflex.signals.runner import SignalRunner
from dataflex.signals.specs import HELD_ROWS, LEAST_ROWS, SKETCH, EmbeddingSpec, GradientSpec
from dataflex.signals.sweep import Turn, preserve_state, row_pass
from dataflex.state import State
from dataflex.train.loader import ROWS, by_rows
from dataflex.train.loss import TokenLosses, sample_means, token_losses
from dataflex.train.observations import Newest, Observations, centred, fitted_to, levels, spreads
from dataflex.train.row_space import RowSpace

logger = logging.getLogger(__name__)

Floats = NDArray[np.float64]

_LEAST_WEIGHT = 0.01
_JUDGED_INTERVALS, _JUDGED_ROWS = 3, 64  # the least of what was drawn uniformly, by which predictions are judged
_PARTS = 10
_GRAM = 64  # numbers that stand for a row's sketch where products of rows are predicted
_SERVED = 0.3  # what a row that was served counts beside pilots, which count 1
_ENOUGH = 16  # pilots beside which training steps are not listened to; half of what is left pays for them
_FEWEST_PILOTS = 4
_SAVED = tuple("aims aimed explored trust deaf _heard _interval _looked _rounded _spent".split())


_Shown: TypeAlias = tuple[int, Rows, dict[str, torch.Tensor]]
"""Step, rows, and what a micro-batch showed of them by what it is, "" for what predictions are made of."""


def _on_host(shown: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: values.cpu() for key, values in shown.items()}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What methods ask of training steps."""

    targets: tuple[str, ...] = ()  # whose gradients rows are compared with
    asked: tuple[str, ...] = ()  # "norm" or "loss"
    scores: tuple[str, ...] = ()  # those of the targets that the signal ``InRun`` is asked about
    products: bool = False  # of rows' gradients with one another
    embeddings: tuple[EmbeddingSpec, ...] = ()

    @classmethod
    def by(cls, config: DynamicConfig) -> Asked:
        """Return what the methods of a run ask."""
        targets: list[str] = []
        scores: list[str] = []
        values: set[str] = set()
        products = False
        embeddings: list[EmbeddingSpec] = []
        for method in config.methods:
            needs = method.requires
            if method is config.selector and config.signals.budget is not None:
                scored = "gradients" in needs.signals
                targets += method.targets if scored else ()
                products = scored and needs.within_batch
                values |= {"norm"} if scored and not method.targets else set()
                values |= {"loss"} if "losses" in needs.signals else set()
            scores += method.targets if "in_run_scores" in needs.signals else ()
            shown = {"in_run_losses": "loss", "in_run_norms": "norm"}
            values |= {value for name, value in shown.items() if name in needs.signals}
            embeddings += [plain_embedding(needs.embedding)] if "in_run_embeddings" in needs.signals else []
        return cls(
            targets=tuple(dict.fromkeys([*targets, *scores])),
            asked=tuple(what for what in ("norm", "loss") if what in values),
            scores=tuple(dict.fromkeys(scores)),
            products=products,
            embeddings=tuple(dict.fromkeys(embeddings)),
        )


def plain_embedding(spec: EmbeddingSpec | None) -> EmbeddingSpec:
    """Return the specification alone; the default for None."""
    return EmbeddingSpec(**{each.name: getattr(spec, each.name) for each in fields(EmbeddingSpec)} if spec else {})


@dataclass(kw_only=True)
class InRun:
    """What a run with a budget knows of its rows. All but what a step does is collective."""

    signals: SignalRunner  # passes are counted there
    space: RowSpace
    targets: tuple[str, ...]
    asked: tuple[str, ...]  # "norm" or "loss"
    scores: tuple[str, ...] = ()  # targets whose products with rows' gradients are taken in the steps, exactly
    products: bool = False  # whether rows' products with one another are predicted too
    embeddings: tuple[EmbeddingSpec, ...] = ()
    budget: float | None  # None: nothing is predicted, all target rows are looked at
    seed: int
    spec: GradientSpec  # which gradients; whether Adam's moments scale the targets', and whether cosines are compared
    total_steps: int  # of the run
    explore: float = 0.2  # share of a plan that is drawn uniformly
    thompson: bool = False  # predictions that choose are drawn from their posterior, but for the last interval
    forgetting: float = 0.9  # weight of an observation from one interval to the next
    smoothing: float = 0.7  # what earlier target rows count in a direction, where not all were looked at again
    rank: int = 8  # of the directions of ``scores`` where more than adapters is trained
    weighs_documents: bool = False  # rows hold several documents, which a weighter may weigh differently
    told: dict[str, float] = field(default_factory=dict)  # numbers of the last decision

    def __post_init__(self) -> None:
        self.seen: Observations | None = None
        self.aims: Floats | None = None  # sketches of the targets' directions, of length 1 [K, D]
        self.aimed = np.zeros(len(self.targets))  # number of target rows behind each, earlier ones counting less [K]
        self.explored: Rows = np.zeros(0, dtype=np.int64)  # rows of the plan in progress that were drawn uniformly
        self.trust = 0.0
        self._interval = 0
        self.deaf = False  # whether steps are not listened to
        self._heard = 0  # number of steps that were listened to
        sizes = [len(self.signals.access.corpus(name).lengths) for name in self.targets]
        self._firsts = self.space.num_rows + np.cumsum([0, *sizes])  # first row of each target, among all [K + 1]
        self._looked = np.zeros(len(self.targets), dtype=np.int64)  # where each target's rotation stands
        self._rounded = 0.0  # by what the rows that predictions chose were rounded off so far
        self._spent = 0.0  # on targets and pilots, in tokens times passes
        self._capture: StepCapture | None = None
        self._directions: Directions | None = None  # of ``scores``, since the last decision
        self._newest: dict[str, Newest] = {}  # by what it is: scores have norms behind them
        self._pending: list[_Shown] = []  # since the last decision or checkpoint
        self._sketched: deque[_Shown] = deque()  # sketches likewise, of the newest rows alone: they are large
        self._num_pending = self._num_sketched = 0  # rows of these on the device
        self._batch: dict[str, Any] | None = None  # with its rows apart
        self._joined: Joined | None = None
        self._losses: torch.Tensor | None = None
        self._forward = ExitStack()
        self._hidden: list[list[torch.Tensor]] = []
        self._pooled: dict[str, torch.Tensor] = {}
        self._features: TokenFeatures | None = None
        self._predicted: Floats | None = None
        self.signals.instead = self.answer

    @property
    def capture(self) -> StepCapture | None:
        """The hooks on the model's layers; None where losses alone are looked at."""
        if self._capture is None and (self.targets or "norm" in self.asked):
            access = self.signals.access
            layers, left_out = capturable(access.model, self._scorers().engine.units)
            sketch = SKETCH if self.budget is not None or "norm" in self.asked else 0
            held = not checkpointed(access.model)
            self._capture = StepCapture(layers, sketch=sketch, seed=self.seed, held=held)
            self._capture.aim(self._directions or Directions.none(layers))
            if left_out:
                told = "; ".join(f"{name}: {reason}" for name, reason in list(left_out.items())[:3])
                logger.info("scores from training steps leave out %d parameters (%s)", len(left_out), told)
        return self._capture

    def _scorers(self) -> GradientScorers:
        return GradientScorers(self.signals.access, self.spec)

    # -- while a step is trained ------------------------------------------------------------------

    def begin(self, batch: dict[str, Any], device: torch.device) -> None:
        """Listen to the forward and backward pass of a micro-batch."""
        if self.deaf:
            return
        self._batch, self._joined = by_rows(batch, device)
        if self.capture is not None:
            shape = batch["input_ids"].shape
            self.capture.begin((int(shape[0]), int(shape[1])), device, self._joined)
        self._forward.close()
        parts = model_parts(self.signals.access.model) if self.embeddings else None
        self._hidden = [
            self._forward.enter_context(capture_hidden(parts, spec.layer)) for spec in self.embeddings if parts
        ]

    def watch(self, losses: TokenLosses) -> None:
        """Take the micro-batch's token losses, and what each counts in the loss that is differentiated."""
        batch = self._batch
        if batch is None:
            return
        self._forward.close()
        for number, (spec, seen) in enumerate(zip(self.embeddings, self._hidden, strict=True)):
            hidden = seen[-1].detach() if self._joined is None else self._joined.split(seen[-1].detach())
            mask, labels = (each.to(hidden.device) for each in (real_tokens(batch), batch["labels"]))
            self._pooled[f"embeddings {number}"] = pool(hidden, mask, labels, spec)
        self._hidden = []
        sequences = Sequences(rows_B=batch[ROWS])
        means_B, tokens_B = sample_means(losses.loss_BT.detach(), losses.mask_BT, sequences)
        self._losses = means_B.masked_fill(tokens_B == 0, torch.nan)
        if self.capture is not None:
            documents = document_ids(batch).to(losses.mask_BT.device) if self.weighs_documents else None
            self.capture.watch(losses.loss_BT, losses.mask_BT, documents)

    def take(self, step: int) -> None:
        """Keep what was seen of the micro-batch whose backward pass is over."""
        if self._batch is not None and self._losses is not None:
            found = None if self.capture is None else self.capture.take()
            shown = {**self._pooled, "losses": self._losses[:, None]}
            if found is not None and found.norms is not None:
                shown["norms"] = found.norms[:, None]
            if found is not None and found.scores.shape[1]:  # none within a budget, until it pays for targets
                shown["scores"] = torch.cat([found.scores, *([shown["norms"]] if "norms" in shown else [])], dim=1)
            if self.budget is not None:
                shown[""] = self._seen(found, self._losses)
            self._hold(step, self._batch[ROWS], shown)
        self._batch, self._losses, self._pooled = None, None, {}

    def _hold(self, step: int, rows: Rows, shown: dict[str, torch.Tensor]) -> None:
        """Keep what a micro-batch showed until ``gather``; the device holds what is of the newest rows.

        Of sketches no others are used. All else goes to the host, of ``HELD_ROWS`` rows at once, since each copy makes
        the device wait.
        """
        if self._sketches:
            self._sketched.append((step, rows, {"": shown.pop("")}))
            self._num_sketched += len(rows)
            while self._num_sketched > max(HELD_ROWS, len(rows)):
                self._num_sketched -= len(self._sketched.popleft()[1])
        self._pending.append((step, rows, shown))
        self._num_pending += len(rows)
        if self._num_pending > HELD_ROWS:
            self._pending = [(step, rows, _on_host(shown)) for step, rows, shown in self._pending]
            self._num_pending = 0

    def _seen(self, found: Taken | None, losses_B: torch.Tensor) -> torch.Tensor:
        """Return sketches, if predictions ask for them, and what else is asked of the rows [B, D + Q]."""
        columns = []
        if found is not None:
            assert found.sketches is not None
            assert found.norms is not None
            columns += [found.sketches] if self._sketches else []
            columns += [found.norms[:, None]] if "norm" in self.asked else []
        columns += [losses_B[:, None]] if "loss" in self.asked else []
        return torch.cat(columns, dim=1) if columns else losses_B.new_zeros(len(losses_B), 0)

    @property
    def _asks_steps(self) -> bool:
        """Whether methods ask for what every step shows."""
        return bool(self.budget is None or self.asked or self.scores or self.embeddings)

    @property
    def _sketches(self) -> bool:
        """Whether sketches are kept, to be compared with directions of later decisions."""
        return bool(self.targets) and self.budget is not None

    def end_step(self) -> None:
        """Stop listening until the next step."""
        self._forward.close()
        if self._capture is not None:
            self._capture.end()

    def gather(self) -> None:
        """Bring together what the ranks have seen."""
        mine = [
            (np.full(len(rows), step), rows, {key: values.cpu().numpy() for key, values in shown.items()})
            for step, rows, shown in (*self._pending, *self._sketched)
        ]
        self._pending, self._num_pending = [], 0
        self._sketched.clear()
        self._num_sketched = 0
        everyone = [part for parts in comm.gather_objects(mine) for part in parts]
        overflowed = [part[0] for part in everyone if any(np.isinf(values).any() for values in part[2].values())]
        undone = np.unique(np.concatenate(overflowed)) if overflowed else ()  # by their loss scale
        for key in dict.fromkeys(key for part in everyone for key in part[2]):
            parts = [(steps, rows, shown[key]) for steps, rows, shown in everyone if key in shown]
            steps, rows, values = (np.concatenate(column) for column in zip(*parts, strict=True))
            known = ~np.isin(steps, undone) & ~np.isnan(values if key == "" else values[:, :1]).any(axis=1)
            order = np.lexsort((rows, steps))
            order = order[known[order]]
            steps, rows, values = steps[order], rows[order], values[order]
            if key == "":
                self._note(rows, self._interval, steps, values, unbiased=np.isin(rows, self.explored))
                continue
            new = Newest(rows=rows, steps=steps, values=values)
            self._newest[key] = self._newest[key].and_(new) if key in self._newest else new.and_()

    def _note(
        self,
        rows: Rows,
        interval: int,
        steps: NDArray[np.int64],
        values: NDArray[np.float32],
        *,
        unbiased: Any,
        scores: Floats | None = None,
    ) -> None:
        """Keep what became known of rows in an interval; ``scores`` [n, K] where a pass of their own had it."""
        size = values.shape[1] - len(self.asked)
        new = Observations(
            rows=rows,
            intervals=np.full(len(rows), interval),
            steps=steps,
            sketches=values[:, :size],
            values=values[:, size:].astype(np.float64),
            scores=np.full((len(rows), len(self.targets)), np.nan) if scores is None else scores,
            unbiased=np.broadcast_to(unbiased, len(rows)),
            pilots=np.full(len(rows), scores is not None),
        )
        self.seen = new if self.seen is None else self.seen.and_(new)

    # -- between intervals --------------------------------------------------------------------------

    def _price(self, interval: Interval, global_batch: int) -> tuple[float, float]:
        """Return the tokens that an interval serves, about, and what training on one costs (F + B)."""
        tokens = interval.steps * global_batch * float(self.space.lengths.mean())
        return tokens, 1.0 + backward_cost(self.signals.access.model)

    def _left(self, interval: Interval, tokens: float, both: float) -> float:
        """Return what may be spent on targets and pilots now.

        By the end of step t of T it is the share sqrt(t / T) of the whole run's, hooks paid, to the end of the run as
        long as they are needed: early decisions know least and last longest.
        """
        if self.budget is None:
            return np.inf
        hooks = 0.0 if self.capture is None else self.capture.cost(self.signals.access.model)
        if self.deaf or self._last(interval):
            hooks *= self._heard / self.total_steps
        total = (self.budget * both - hooks) * tokens / interval.steps * self.total_steps
        return total * min(interval.stop_step / self.total_steps, 1.0) ** 0.5 - self._spent

    @threadpool_limits.wrap(limits=1, user_api="blas")  # numpy's: threads spin longer than matrices this small take
    def decide(self, interval: Interval, global_batch: int) -> None:
        """Look at the targets and at pilots, judge how well rows that were drawn are predicted, and predict."""
        self.gather()
        tokens, both = self._price(interval, global_batch)
        self._predicted, self.told = None, {}  # also what a resumed run begins with
        left = self._left(interval, tokens, both)
        if interval.start_step or (self.scores and self.budget is None):
            if self.targets:
                self._spent += self._aim(interval, left, both)
                self._score_served()
            left = self._left(interval, tokens, both)
            if self.capture is not None and self.budget is not None:
                self._spent += self._pilots(interval, left, both)
            if self.budget is not None:
                self._judge()
            if self.budget is not None and self.seen is not None and len(self.seen.rows) >= LEAST_ROWS:
                explores = self.thompson and interval.stop_step < self.total_steps
                draw = (stream(self.seed, "in_run thompson", interval.index),) if explores else ()
                self._predicted = self._scores(self.seen, self.space.all_rows(), *draw)
                self._predicted[self.space.supervised == 0] = np.nan
        self.deaf = self._last(interval) or self._knows_enough(interval)
        self._heard += 0 if self.deaf else interval.steps
        self._interval = interval.index
        self.told |= {"trust": self.trust, "spent": self._spent / (tokens / interval.steps * self.total_steps * both)}

    def _last(self, interval: Interval) -> bool:
        """Return whether no decision follows that could use what steps show, and nothing else does."""
        return not self._asks_steps and interval.stop_step >= self.total_steps

    def _knows_enough(self, interval: Interval) -> bool:
        """Return whether nothing asks for what steps show, and predictions have enough pilots without them."""
        return not self._asks_steps and bool((self._pilots_count(interval) >= _LEAST_WEIGHT).sum() >= _ENOUGH)

    def _pilots_count(self, interval: Interval) -> Floats:
        """Return what each pilot counts, less from decision to decision."""
        if self.seen is None:
            return np.zeros(0)
        pilots = self.seen.pilots & self.seen.unbiased
        return self.forgetting ** (interval.index - self.seen.intervals[pilots]).astype(np.float64)

    def _for_targets(self, interval: Interval, left: float, both: float) -> float:
        """Return what is for targets of what is left: half, if the other half makes the pilots enough, else all."""
        if self.budget is None:
            return left
        pilots = left / 2 / (float(self.space.lengths.mean()) * both)
        return left / 2 if self._pilots_count(interval).sum() + pilots >= _ENOUGH else left

    def _aim(self, interval: Interval, left: float, both: float) -> float:
        """Take the gradients of as many target rows as there is budget for, others each time; return their cost."""
        access, capture, scorers = self.signals.access, self.capture, self._scorers()
        assert capture is not None
        sweeps, spent = [], 0.0
        counts, whole = np.zeros(len(self.targets)), True
        share = self._for_targets(interval, max(left, 0.0), both) / len(self.targets)
        for k, name in enumerate(self.targets):
            lengths = access.corpus(name).lengths
            order = np.argsort(uniforms(self.seed, f"in_run target {name}", 0, np.arange(len(lengths))))
            order = np.roll(order, -int(self._looked[k]))
            cost = np.cumsum(lengths[order]) * both
            count = max(int(np.searchsorted(cost, share, side="right")), min(LEAST_ROWS, len(order)))
            whole, spent = whole and count == len(order), spent + float(cost[count - 1])
            counts[k] = count
            self._looked[k] = (self._looked[k] + count) % len(order)
            sweeps.append(access.target_sweep(name, np.sort(order[:count])))
        self._count(sum(len(sweep.rows) for sweep in sweeps))
        found: list[tuple[Rows, NDArray[np.float32]]] = []

        def sketching(k: int, turn: Turn) -> AbstractContextManager[None]:
            rows = self._firsts[k] + sweeps[k].rows[turn.positions]
            return self._sketching(rows, turn, found) if self._sketches else nullcontext()

        by_name = dict(zip(self.targets, sweeps, strict=True))
        gradients = targets_seen(scorers.engine, by_name, normalize_rows=False, around=sketching).finish()
        capture.end()
        moments = scorers.moments() if self.spec.precondition == "true_adam" else None
        self._direct(gradients, moments)
        if not self._sketches:
            return spent
        names = [name for unit in capture.layers for name in unit.parameters.values()]
        inside = total = np.zeros(len(self.targets))
        scaled_by: dict[str, torch.Tensor] = {}
        for name, gradient in gradients.tensors.items():
            vector = gradient if moments is None else scaled(gradient, moments[name])
            product = (gradient * vector).flatten(1).double().sum(dim=1).cpu().numpy()
            total = total + product
            if name in names:
                inside, scaled_by[name] = inside + product, vector
        aims = capture.sketch_of(scaled_by).double().cpu().numpy()
        plain = capture.sketch_of({name: gradients.tensors[name] for name in scaled_by}).double().cpu().numpy()
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
        self.aims, own = comm.broadcast_object((aims, scale / lengths / weights))
        self.told["coverage"] = float((inside / np.maximum(total, 1e-300)).min())
        self._note_goals(found, interval, own)
        return spent

    def _direct(self, gradients: TargetVectors, moments: Mapping[str, OptimizerState] | None) -> None:
        """Compare the rows of the next steps with the targets of ``scores``, if there are any (collective)."""
        capture, device = self.capture, self.signals.access.device
        if capture is None or not self.scores:
            return
        which = [self.targets.index(name) for name in self.scores]
        scored = TargetVectors(tensors={name: tensor[which] for name, tensor in gradients.tensors.items()})
        rank = None if backward_cost(self.signals.access.model) == 1 else self.rank
        found = directions(scored, moments, capture.layers, rank=rank, seed=self.seed)
        self._directions = comm.broadcast_object(found.to(torch.device("cpu"))).to(device)
        capture.aim(self._directions)
        self.told |= {"captured": float(found.captured.min()), "coverage": float(found.coverage.min())}
        told = "scores of training steps: directions keep %.3f of their squared norm, the layers have %.3f of <q, V>"
        logger.info(told, self.told["captured"], self.told["coverage"])

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
        capture.end()  # hooks of the next batch come after the engine's, without which first layers have no gradient
        if turn.mine:
            found.append((rows, sketches.cpu().numpy()))

    def _note_goals(self, found: list[tuple[Rows, NDArray[np.float32]]], interval: Interval, own: Floats) -> None:
        """Keep what became known of target rows: predictions may learn from them what scores well (collective).

        ``own`` is the share of a target row in its target's direction [K].
        """
        everyone = [part for parts in comm.gather_objects(found) for part in parts]
        if self.budget is None or not everyone:
            return
        rows, sketches = (np.concatenate(column) for column in zip(*everyone, strict=True))
        order = np.argsort(rows)
        rows, sketches = rows[order], sketches[order]
        known = np.linalg.norm(sketches, axis=1) > 0
        rows, sketches = rows[known], sketches[known]
        values = np.concatenate([sketches, np.full((len(rows), len(self.asked)), np.nan, np.float32)], axis=1)
        target = np.searchsorted(self._firsts, rows, side="right") - 1
        shares = own * (target[:, None] == np.arange(len(own)))
        steps = np.full(len(rows), interval.start_step)
        self._note(rows, interval.index, steps, values, unbiased=False, scores=self._compared(sketches, shares))

    def _count(self, rows: int) -> None:
        self.signals.forward_rows += rows
        self.signals.backward_rows += rows

    def _pilots(self, interval: Interval, left: float, both: float) -> float:
        """Look at rows in a pass of their own while there is budget, at such that were never seen first."""
        order = self._unseen_first(np.flatnonzero(self.space.supervised > 0), "in_run pilots", interval)
        cost = np.cumsum(self.space.lengths[order]) * both
        count = int(np.searchsorted(cost, left, side="right"))
        if count < _FEWEST_PILOTS:
            return 0.0
        rows = np.sort(order[:count])
        values = self._looked_at(rows)
        known = np.isfinite(values).all(axis=1)
        rows, values = rows[known], values[known]
        steps = np.full(len(rows), interval.start_step)
        scores = self._compared(values[:, : values.shape[1] - len(self.asked)])
        self._note(rows, interval.index, steps, values, unbiased=True, scores=scores)
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
            return self._seen(capture.take(), means_B.detach().masked_fill(tokens_B == 0, torch.nan))

        self._count(len(rows))
        size = capture.size if self.targets else 0
        with preserve_state(access.model):
            access.model.eval()
            found = row_pass(access.trained(rows, None, "pilots"), score, (size + len(self.asked),))
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

    def _compared(self, sketches: NDArray[np.float32], shares: Floats | None = None) -> Floats:
        """Return products of sketches with the newest directions, cosines where asked [n, K].

        ``shares`` [n, K] is what a target row is of a direction: it is compared with the direction of the others.
        """
        if self.aims is None:
            return np.zeros((len(sketches), 0))
        exact = sketches.astype(np.float64)
        found, squares = exact @ self.aims.T, (exact**2).sum(axis=1, keepdims=True)
        if shares is not None:
            lengths = np.sqrt(np.maximum(1 - 2 * shares * found + shares**2 * squares, 1e-30))
            found = (found - shares * squares) / lengths
        return found / np.maximum(np.sqrt(squares), 1e-30) if self.spec.normalize else found

    def _score_served(self) -> None:
        """Compare rows that were served with the newest directions, which have the most target rows behind them."""
        if self.seen is None or self.aims is None:
            return
        scores, served = self.seen.scores.copy(), ~self.seen.pilots
        scores[served] = self._compared(self.seen.sketches[served])
        self.seen = replace(self.seen, scores=scores)

    def _of(self, seen: Observations) -> Floats:
        """Return what is to be predicted of rows that were looked at [n, K + Q], and what stands for sketches."""
        if self.aims is None:
            return seen.values
        folded = seen.sketches[:, :0].astype(np.float64)
        if self.products:
            draws = stream(self.seed, "in_run products", 0).standard_normal((seen.sketches.shape[1], _GRAM))
            folded = seen.sketches.astype(np.float64) @ draws / np.sqrt(_GRAM)
        return np.concatenate([seen.scores, seen.values, folded], axis=1)

    def _scores(self, seen: Observations, rows: Rows, draw: np.random.Generator | None = None) -> Floats:
        """Return predictions of rows, as ``_of`` has them, the same on every rank; with ``draw`` as drawn."""

        def compute() -> Floats:
            weights = self.forgetting ** (seen.intervals.max() - seen.intervals).astype(np.float64)
            if (seen.pilots & seen.unbiased & (weights >= _LEAST_WEIGHT)).sum() >= LEAST_ROWS:
                weights[~seen.pilots] *= _SERVED
            recent = weights >= _LEAST_WEIGHT
            known, used = seen.where(recent), weights[recent]
            goals = known.rows >= self.space.num_rows
            groups = levels(known.steps, known.pilots, goals)
            values = self._of(known)
            around = np.zeros_like(values)
            around[~goals] = centred(values[~goals], groups[~goals])
            scales = spreads(around, known.kinds, ~goals)
            values /= scales
            out, num = np.empty((len(rows), values.shape[1])), len(self.targets)
            for columns, those in ((slice(num), slice(None)), (slice(num, None), ~goals)):
                if not values[:, columns].shape[1]:
                    continue
                ids, weight, group, wanted = known.rows[those], used[those], groups[those], values[those, columns]
                part = fitted_to(known.pilots[those])
                features = self.features.matrix(ids[part])
                noise = None
                if draw is not None:
                    noise = (
                        draw.standard_normal(wanted[part].shape),
                        draw.standard_normal((features.shape[1], wanted.shape[1])),
                    )
                fit = fitted(features, group[part], wanted[part], weight[part], perturbed=noise)
                residuals = fit.residuals
                if len(part) < len(ids):
                    left = wanted - self.features.times(ids, fit.weights)
                    residuals = centred(left, np.unique(group, return_inverse=True)[1])
                effects = row_effects(ids, residuals, weight, int(self._firsts[-1]))
                out[:, columns] = self.features.times(rows, fit.weights) + fit.offset + effects[rows]
            return out * scales[np.argmax(known.kinds)]  # of the newest

        return comm.on_one_rank("predicting scores", compute)

    def _judge(self) -> None:
        """Compare what rows that were drawn uniformly showed of late with what the others say of them, part by part.

        They are the pilots and explored rows of the newest intervals. About a tenth of what is known is held out at a
        time; of many rows, some parts are enough.
        """
        self.trust, seen = 0.0, self.seen
        when = np.zeros(0) if seen is None else np.sort(seen.intervals[seen.unbiased])[-_JUDGED_ROWS:]
        if seen is None or len(when) < LEAST_ROWS:
            return
        first = min(when[0], when[-1] + 1 - _JUDGED_INTERVALS)
        shown, asked = seen.where(seen.unbiased & (seen.intervals >= first)), len(self.targets) + len(self.asked)
        rows, numbers = np.unique(shown.rows, return_inverse=True)
        if len(rows) < LEAST_ROWS:
            return
        predicted, known = np.zeros((len(shown.rows), asked)), np.zeros(len(shown.rows), dtype=np.bool_)
        parts = max(-(-_PARTS * len(shown.rows) // len(seen.rows)), 2)
        for part in range(min(parts, len(rows))):
            if known.sum() < 4 * _JUDGED_ROWS:
                own = numbers % parts == part
                found = self._scores(seen.where(~np.isin(seen.rows, shown.rows[own])), shown.rows)[:, :asked]
                predicted[own] = (found - found.mean(axis=0))[own]  # levels without a part fall where it is high
                known |= own
        groups = levels(shown.steps, shown.pilots, np.zeros(len(known), dtype=np.bool_))
        observed = centred(self._of(shown)[:, :asked], groups)
        observed /= spreads(observed, shown.kinds, True)
        own_levels = centred(predicted[known], np.unique(groups[known], return_inverse=True)[1])
        pairs = zip(own_levels.T, observed[known].T, strict=True)
        correlation, above = np.array([rank_correlation(*pair) for pair in pairs]).mean(axis=0)
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
        if isinstance(signal, GradientProducts) and self.products:
            columns, first = [self.targets.index(name) for name in signal.targets], len(self.targets) + len(self.asked)
            folded = self._predicted[rows, first:]
            return np.concatenate([self._predicted[rows][:, columns], folded @ folded.T], axis=1).astype(np.float32)
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
        key: str = signal.what
        columns = [0]
        asked = {"losses": "loss", "norms": "norm"}.get(signal.what) in self.asked
        if signal.what == "scores":
            columns = [self.scores.index(name) for name in signal.targets if name in self.scores]
            asked = 0 < len(columns) == len(signal.targets) and ("norm" in self.asked or not signal.normalize)
        elif signal.what == "embeddings":
            spec = plain_embedding(signal.embedding)
            asked = spec in self.embeddings
            key = f"embeddings {self.embeddings.index(spec)}" if asked else key
        if not asked:
            raise UnsupportedError(
                f"{signal.needs} {' '.join(signal.targets)}: no method states that it asks for it in its Requires"
            )
        found = np.full((len(rows), *signal.tail(self.signals.access)), np.nan, dtype=np.float32)
        if (newest := self._newest.get(key)) is not None:
            values = newest.values if signal.what == "embeddings" else newest.values[:, columns]
            if signal.what == "scores" and signal.normalize:
                values = values / newest.values[:, -1:].clip(1e-30)
            place = np.full(self.space.num_rows, -1)
            place[newest.rows] = np.arange(len(newest.rows))
            known = place[rows] >= 0
            found[known] = np.column_stack([values, newest.steps])[place[rows[known]]]
        return found

    # -- what a plan is made of ------------------------------------------------------------------------

    def chosen(self, wanted: int, interval: Interval) -> int:
        """Return how many of ``wanted`` rows predictions may choose; the others are drawn.

        The last interval explores nothing, since no decision follows that could use it.
        """
        if self._predicted is None:
            return 0
        explore = self.explore if interval.stop_step < self.total_steps else 0.0
        exact = wanted * (1 - explore) * self.trust + self._rounded
        count = min(wanted, round(exact))
        self._rounded = exact - count
        return count

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
            **{name.lstrip("_"): getattr(self, name) for name in _SAVED},
            "seen": {} if self.seen is None else dict(vars(self.seen)),
            "directions": {} if self._directions is None else self._directions.state_dict(),
            "newest": {key: dict(vars(newest)) for key, newest in self._newest.items()},
        }

    def load_state_dict(self, state: State) -> None:
        """Take back what ``state_dict`` gave."""
        for name in _SAVED:
            setattr(self, name, state[name.lstrip("_")])
        self.seen = Observations(**state["seen"]) if state["seen"] else None
        self._newest = {key: Newest(**kept) for key, kept in state["newest"].items()}
        if state["directions"]:
            self._directions = Directions.from_state(state["directions"]).to(self.signals.access.device)
