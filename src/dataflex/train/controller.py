"""Decides the next stretch of the id stream: runs the methods of an interval and lays out the plan.

The order of decisions is fixed: pool, selector, then the mixer's quotas over what the selector kept, then the orderer
arranges what is served. A method that has a slower cadence than another is not asked in between: what it decided last
stands. Everything that is decided is a function of (seed, interval, state of the methods, signals), equal on every
rank.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dataflex import comm
from dataflex.clock import PhaseClock
from dataflex.config.schema import DynamicConfig, MethodConfig
from dataflex.errors import DataError
from dataflex.method import Context, Method, Mixer, Orderer, Rows, Selection, Selector, State, Weighter
from dataflex.plan.live import Served, by_name, whole
from dataflex.plan.mixture import MixtureSampler
from dataflex.plan.orders import OrderedEpochs
from dataflex.plan.plan import BatchShape, DataPlan
from dataflex.plan.planner import (
    Candidates,
    ResumedEpochs,
    ShuffledEpochs,
    epoch_fill,
    epoch_stream,
    quota_rows,
    spread,
    warmup_rows,
)
from dataflex.plan.proportions import apply_min_proportion, by_domain, floors_by_domain, per_domain
from dataflex.plan.rollouts import RolloutAccount
from dataflex.plan.schedule import Interval, Schedule, pool_sizes, wanted_rows
from dataflex.record.read import thinned
from dataflex.record.recorder import NullRecorder, RunRecorder
from dataflex.record.text import middle
from dataflex.rng import stream
from dataflex.select.choose import top_k, worn
from dataflex.signals.runner import SignalRunner
from dataflex.signals.specs import GradientSpec
from dataflex.signals.sweep import preserve_state
from dataflex.train.counts import DomainTotals, Repeats
from dataflex.train.feedback import LOGGED_DOMAINS
from dataflex.train.in_run import Asked, InRun
from dataflex.train.ledger import Ledger
from dataflex.train.ordering import Ordering
from dataflex.train.row_space import RowSpace
from dataflex.train.screening import piloted, screened
from dataflex.validate import check_mix, check_selection, check_state, order_of

logger = logging.getLogger(__name__)

_LOGGED_INTERVALS = 64


@dataclass(kw_only=True)
class Controller:
    """Holds the methods, the mixture stream and the plan in progress."""

    config: DynamicConfig
    space: RowSpace
    schedule: Schedule
    shape: BatchShape
    seed: int
    signals: SignalRunner
    selector: Selector | None
    mixer: Mixer | None
    orderer: Orderer | None = None
    recorder: RunRecorder = field(default_factory=NullRecorder)
    plan: DataPlan | None = None
    ends_at: int | None = None  # step at which the data run out under ``at_cap: stop``
    decided: int = 0  # number of decisions before this run, unless the plan in progress tells it
    clock: PhaseClock = field(default_factory=PhaseClock)
    rollouts: RolloutAccount | None = None  # what was generated, where rows are prompts
    weighs_documents: bool = False  # a weighter may weigh the documents of a packed row differently

    def __post_init__(self) -> None:
        config, domains, batch = self.config, self.space.domains, self.shape.global_batch
        usable = self.space.supervised > 0
        self.served = Served(domains if self.mixer is not None else whole(self.space.num_rows))
        self.totals = DomainTotals(domains, self.served)
        self.resumed_epochs: ResumedEpochs | None = None  # whole epochs over a pool that was changed
        self._shares: tuple[DataPlan, NDArray[np.float64]] | None = None
        # Rows served since the selector's interval began: another method decided since then, or a longer run took it
        # up where a shorter one had cut it.
        self._earlier: Rows = np.empty(0, dtype=np.int64)
        self._until = {"selector": 0, "mixer": 0}  # the step to whose beginning each decided last
        self._kept: Rows | None = None  # what the selector chose last
        self._kept_weights: NDArray[np.float64] | None = None  # their weights in the loss, where it gave any [n]
        self._row_weights: NDArray[np.float64] | None = None  # the same of all rows [N]
        self._nominal: NDArray[np.float64] | None = None  # what the mixer said last [K]
        self._carried = np.zeros(len(domains.names))  # what quotas were rounded off so far [K]
        self._told_lost: set[str] = set()  # domains of which nothing was kept, as the log was told
        # Sampling proportions of sequences in the plan in progress.
        self.proportions: NDArray[np.float64] = np.asarray(domains.num_rows / domains.num_rows.sum())
        self.sampler: MixtureSampler | None = None
        if self.mixer is not None and not self.selects_subset:
            caps, key = config.max_epochs, "dynamic.max_epochs"
            self.sampler = MixtureSampler(
                domains,
                seed=self.seed,
                # A step that has fewer sequences than there are domains shows little of the proportions.
                block=batch * -(-len(domains.names) // batch),
                max_epochs=None if caps is None else per_domain(caps, domains.names, key, missing=np.inf),
                at_cap=config.at_cap,
                unit=self.shape.micro_batch_size if self.mixer.requires().pure_micro_batches else 1,
                interleave=config.interleave,
                shuffle=self.shape.shuffle,
                order=None if self.orderer is None else order_of(self.orderer),
            )
            if never := self.sampler.never:
                told = (
                    "dynamic.max_epochs leaves fewer rows of %s than a micro-batch of one domain has (%d): never served"
                )
                logger.warning(told, ", ".join(never), self.sampler.unit)
        self.ordering: Ordering | None = None
        if self.orderer is not None:
            self.ordering = Ordering(
                orderer=self.orderer,
                space=self.space,
                schedule=self.schedule,
                shape=self.shape,
                seed=self.seed,
                context=lambda own: self._context(own, config.orderer),
                whole_pool=self.mixer is None and not self.selects_subset,
            )
        options = config.signals
        self.in_run: InRun | None = None  # what a run with a budget knows of its rows
        if config.watches is not None:
            asked = Asked.by(config)
            params = None if config.selector is None or options.budget is None else config.selector.params
            scale = getattr(params, "precondition", "true_adam" if params is None else "none")
            self.in_run = InRun(
                signals=self.signals,
                space=self.space,
                **vars(asked),
                budget=options.budget,
                seed=self.seed,
                spec=GradientSpec(
                    parameters=getattr(params, "parameters", None),
                    last_blocks=getattr(params, "last_blocks", None),
                    precondition="none" if scale in ("none", "sign") else "true_adam",
                    normalize=getattr(params, "normalize", not asked.products),
                ),
                total_steps=self.schedule.total_steps,
                explore=options.explore,
                thompson=options.explore_by == "thompson",
                rank=options.in_run_rank,
                weighs_documents=self.weighs_documents,
            )
        self.ledger: Ledger | None = None  # what helped the targets
        if config.ledger is not None:
            self.ledger = Ledger(
                access=self.signals.access, space=self.space, options=config.ledger, seed=self.seed, clock=self.clock
            )
        self._pool_sizes = pool_sizes(self.space.num_rows, options.pool_fraction, options.screen_fraction)
        """Rows drawn for a pool, and those left once they are screened."""
        self.floors = floors_by_domain(config.min_proportion, domains.names)
        self._unplanned = np.ones(len(usable), dtype=np.bool_) if config.exclude_seen else None
        """Rows of no plan yet, warm-up included [N]."""
        self.repeats: Repeats | None = None
        if self.selector is not None and self.selects_subset:
            self.repeats = Repeats(self.space.num_rows, config.max_repeats, self.selector.name)
        self.candidates: Candidates | None = None
        if config.candidate_batches is not None:
            self.candidates = Candidates(
                np.flatnonzero(usable),
                batches=config.candidate_batches,
                global_batch=batch,
                schedule=self.schedule.of("selector"),
                seed=self.seed,
            )
        self.initial: NDArray[np.float64] | None = None
        if config.initial_proportions is not None:
            self.initial = by_domain(config.initial_proportions, domains.names, "dynamic.initial_proportions")

    @property
    def selects_subset(self) -> bool:
        """Whether a selector leaves rows out."""
        return self.selector is not None and self.selector.selects_subset

    @property
    def listeners(self) -> list[InRun | Ledger]:
        """What listens to the forward and backward passes of training."""
        return [part for part in (self.in_run, self.ledger) if part is not None]

    def decides_at(self, step: int) -> bool:
        """Whether ``step`` has no plan yet."""
        return self.plan is None or not self.plan.interval.start_step <= step < self.plan.interval.stop_step

    def plan_for(self, step: int) -> DataPlan:
        """Return the plan that covers ``step``, deciding it first if need be (collective).

        Under ``at_cap: stop`` the plan returned last may hold no step at all.
        """
        if self.ends_at is not None and step >= self.ends_at:
            assert self.plan is not None
            return self.plan
        if self.decides_at(step):
            if self.plan is not None:
                self.totals.count(self.plan, step)
            self.plan = self._decide(self._next(step)) or self.plan
        if self.plan is None:
            raise DataError(
                "dynamic.max_epochs: not one whole step can be served before a domain is at its cap "
                f"({', '.join(self.sampler.stopped_by if self.sampler else ())}) and training ends "
                "(at_cap: stop). Raise max_epochs, or set 'at_cap: redistribute'."
            )
        return self.plan

    def _next(self, step: int) -> Interval:
        """Return what is decided at ``step``: an interval of the schedule, or the rest of one that was cut.

        A shorter run, a lower cap or a fresh plan (resume_plan: ignore) may have ended inside it. The index is a
        running number, so that streams, files and lines of the record are those of one decision.
        """
        whole = self.schedule.interval(step)
        if step == self.schedule.of("selector").interval(step).start_step:
            self._earlier = self._earlier[:0]
        elif self.plan is not None and self.selects_subset:
            self._earlier = np.concatenate([self._earlier, self.plan.rows])
        index = max(whole.index, self.decided) if self.plan is None else self.plan.interval.index + 1
        return replace(whole, index=index, start_step=step)

    def _decide(self, interval: Interval) -> DataPlan | None:
        # A method may be a user's: its draws and switches must not affect the training.
        with self.clock.phase("decide"), preserve_state(self.signals.access.model):
            return self._decided(interval)

    def _decided(self, interval: Interval) -> DataPlan | None:
        """Decide an interval; None where domains at their caps leave no step of it (at_cap: stop)."""
        started = time.perf_counter()
        self.signals.begin(interval.start_step)
        own, asked = self._own_interval("selector", interval)
        ctx = self._context(own, self.config.selector)
        pool = self.space.all_rows()
        selection = None
        if self.in_run is not None and (asked or self.in_run.budget is None):
            self.in_run.decide(own, self.shape.global_batch)
        if self.selects_subset and own.kind == "dynamic":
            if asked:
                pool, note = self._pool(ctx)
                selection = self._select(pool, ctx)
                if note:
                    selection = replace(selection, reason=f"{selection.reason}; {note}")
                self._kept = selection.rows
                self._weigh(selection.weights)
            else:
                assert self._kept is not None
                selection = Selection(rows=self._kept, reason="the selection stands")
        else:
            self._weigh(None)
        rows, proportions, reason = self._lay_out(interval, ctx, pool, selection, asked)
        if self.in_run is not None and selection is None:
            before = self._earlier if self.selects_subset else self._earlier[:0]
            self.in_run.explored = np.union1d(before, rows[rows >= 0])
        self.signals.end()
        whole_steps = len(rows) // self.shape.global_batch
        if whole_steps < interval.steps:  # at_cap: stop
            assert self.sampler is not None
            interval = replace(interval, stop_step=interval.start_step + whole_steps)
            self.ends_at = interval.stop_step
            told = f"at its cap: {', '.join(self.sampler.stopped_by)}; training ends here (at_cap: stop)"
            if whole_steps == 0:
                logger.info("step %d: %s", interval.start_step, told)
                return None
            reason = f"{reason}; {told}"
        if self.repeats is not None:
            reason = "; ".join(filter(None, [reason, self.repeats.take(rows)]))
        plan = DataPlan(
            interval=interval,
            rows=rows,
            fill=self._fill(interval),
            global_batch=self.shape.global_batch,
            row_space=self.space.fingerprint,
            trace={"reason": reason},
        )
        comm.agree(f"plan of interval {interval.index}", plan.digest())
        if self._unplanned is not None:
            self._unplanned[rows[rows >= 0]] = False
        total = time.perf_counter() - started
        self.clock.move(self.signals.seconds, "signals")
        phases = {"signals": self.signals.seconds, "decide": total - self.signals.seconds}
        self._record(plan, pool, selection if asked else None, proportions, phases)
        return plan

    def _own_interval(self, kind: str, interval: Interval) -> tuple[Interval, bool]:
        """Return the rest of a method's own interval, and whether it is asked now."""
        own, asked = self.schedule.own_interval(kind, interval, self._until[kind])
        if asked:
            self._until[kind] = own.stop_step
        return own, asked

    def _weigh(self, weights: NDArray[Any] | None) -> None:
        """Note the weights of the rows kept [n], or that they have none."""
        self._kept_weights = self._row_weights = None
        if weights is not None:
            assert self._kept is not None
            self._kept_weights, self._row_weights = np.asarray(weights, np.float64), np.ones(self.space.num_rows)
            self._row_weights[self._kept] = self._kept_weights

    def weights_of(self, rows: Rows) -> NDArray[np.float64]:
        """Return the weights in the loss that the selector gave rows [len(rows)]; 1 where it gave none."""
        return np.ones(len(rows)) if self._row_weights is None else self._row_weights[rows]

    def _context(self, interval: Interval, method: MethodConfig | None) -> Context:
        return Context(
            interval=interval,
            seed=self.seed,
            domains=self.space.domains,
            signals=self.signals,
            targets=method.targets if method else (),
            columns=self.space.columns,
            total_sequences=self.schedule.total_steps * self.shape.global_batch,
            global_batch=self.shape.global_batch,
            unit=self.config.unit,
            learning_rate=self.signals.access.learning_rate(),
        )

    def prepare(self, weighter: Weighter, step: int) -> None:
        """Let a weighter that is due at ``step`` ask the signals what it needs (collective)."""
        if self.plan is None or not weighter.due(step):
            return
        batch = self.shape.global_batch
        # An interval of its own for each step, so that each has its own random numbers.
        interval = replace(self.plan.interval, index=step, start_step=step, stop_step=step + 1)
        first = (step - self.plan.interval.start_step) * batch
        rows = self.plan.rows[first : first + batch]
        with self.clock.phase("decide"), preserve_state(self.signals.access.model):
            self.signals.begin(step)
            weighter.prepare(self._context(interval, self.config.weighter), rows[rows >= 0])
            self.clock.move(self.signals.seconds, "signals")

    def _select(self, pool: Rows, ctx: Context) -> Selection:
        assert self.selector is not None
        wanted = self._wanted(ctx.interval, len(pool) if self._unplanned is None else self._pool_sizes[1])
        if self.in_run is not None and self.in_run.budget is not None:
            return self._select_and_draw(self.in_run, pool, min(wanted, len(pool)), ctx)
        selection = self.selector.select(pool, min(wanted, len(pool)), ctx)
        check_selection(self.selector, selection, pool, wanted)
        return selection

    def _select_and_draw(self, in_run: InRun, pool: Rows, wanted: int, ctx: Context) -> Selection:
        """Select by predictions as many rows as they are trusted with, and draw the others uniformly."""
        assert self.selector is not None
        chosen, selection = in_run.chosen(wanted, ctx.interval), Selection(rows=pool[:0])
        if chosen:
            selection = self.selector.select(pool, chosen, ctx)
            check_selection(self.selector, selection, pool, chosen)
            selection = self._in_turns(selection, pool)
        drawn = in_run.drawn(pool, selection.rows, wanted - len(selection.rows), ctx.interval)
        reason = "; ".join(filter(None, [selection.reason, f"{len(drawn)} rows drawn uniformly", in_run.reason]))
        return replace(selection, rows=np.concatenate([selection.rows, drawn]), reason=reason)

    def _in_turns(self, selection: Selection, pool: Rows) -> Selection:
        """Let rows that are nearly as good as the best take turns, where those of the largest scores were selected.

        A few rows served again and again are learnt by heart, long before all of their kind.
        """
        scores, count = selection.scores, len(selection.rows)
        if scores is None or self.repeats is None or selection.weights is not None:
            return selection
        if not np.array_equal(np.sort(pool[top_k(scores, count)]), np.sort(selection.rows)):
            return selection
        scores = worn(scores, self.repeats.times(pool))
        return replace(selection, rows=pool[top_k(scores, count)], scores=scores)

    def _wanted(self, interval: Interval, pool_size: int) -> int:
        """Return how many rows a selector is asked for."""
        ratio, mixes = self.config.keep_ratio, self.mixer is not None
        return wanted_rows(interval, self.shape.global_batch, pool_size, ratio, mixes)

    def _pool(self, ctx: Context) -> tuple[Rows, str]:
        """Return the rows that a selector is given, ascending, and a note for the record.

        They are all rows, those of no plan yet, candidates, or a drawn share.
        """
        if self.candidates is not None:
            return self.candidates.pool(ctx.interval), ""
        rows, (drawn, left), note = self.space.all_rows(), self._pool_sizes, ""
        if self._unplanned is not None:
            wanted = self._wanted(ctx.interval, left)
            usable = int((self._unplanned & (self.space.supervised > 0)).sum())
            if usable < wanted and not self._unplanned.all():
                note = f"{usable:,} rows are unseen and {wanted:,} are wanted: every row is in the pool again"
                logger.info("exclude_seen: %s", note)
                self._unplanned[:] = True
            rows = np.flatnonzero(self._unplanned).astype(np.int64)
        elif len(self._earlier):
            rows = self._unserved(rows, ctx.interval)
        if drawn < len(rows):
            rows = np.sort(stream(self.seed, "pool", ctx.interval.index).choice(rows, size=drawn, replace=False))
        if left < len(rows):
            if self.config.signals.screen_by == "pilot":
                rows = piloted(rows, left, self.signals, ctx.targets, seed=self.seed, interval=ctx.interval.index)
            else:
                rows = screened(rows, left / len(rows), self.signals, ctx.targets)
        return rows, note

    def _unserved(self, rows: Rows, interval: Interval) -> Rows:
        """Leave out the rows of an interval before it was cut, unless it would have repeated rows anyway."""
        whole = self.schedule.of("selector").interval(interval.start_step)
        size = self._pool_sizes[1]
        once = self._wanted(whole, size) == whole.steps * self.shape.global_batch
        if self.mixer is not None or not once or len(np.unique(self._earlier)) < len(self._earlier):
            return rows
        left = np.setdiff1d(rows, self._earlier)
        enough = int((self.space.supervised[left] > 0).sum()) >= self._wanted(interval, size)
        return left if enough else rows

    def _lay_out(
        self, interval: Interval, ctx: Context, pool: Rows, selection: Selection | None, fresh: bool
    ) -> tuple[Rows, NDArray[np.float64] | None, str]:
        """Return serving order, nominal proportions if a mixer set them, and the reason for the record.

        ``ctx`` is the selector's, and ``fresh`` says that the selection was made now.
        """
        batch = self.shape.global_batch
        total = interval.steps * batch
        reasons = [selection.reason] if selection is not None and selection.reason else []
        shuffle = self.shape.shuffle and not (selection is not None and selection.ordered)
        if self.mixer is not None:
            own, asked = self._own_interval("mixer", interval)
            if asked:
                self._nominal, why = self._mix(replace(ctx, interval=own))
                reasons.append(why)
            assert self._nominal is not None
            proportions, step = self._nominal, interval.start_step
            if asked or self.sampler is None:
                self.proportions = self.space.domains.sequence_proportions(proportions, self.config.unit)
            shares = self.proportions
            if self.sampler is not None:
                if asked:
                    rest = step != self.schedule.of("mixer").interval(step).start_step
                    self.sampler.append(shares, start=step * batch, decided_at_step=step, reason=why, go_on=rest)
                if self.ordering is not None:
                    keys, order = self.ordering.keys(interval, self.sampler.wanted)
                    self.sampler.order(keys, step, self.schedule.total_steps)
                    reasons.append(order)
                rows = self.sampler.draw(total, whole=batch)
            else:
                kept = selection.rows if selection is not None else self.space.all_rows()
                reasons.append(self._lost(kept, shares * total))
                rows, self._carried = quota_rows(
                    kept,
                    shares,
                    total,
                    interval,
                    self.space.domains,
                    seed=self.seed,
                    repeat=self.config.repeat,
                    shuffle=shuffle,
                    earlier=self._earlier,
                    carried=self._carried,
                )
                if selection is not None and self.ordering is not None:
                    rows, order = self.ordering.quota(interval, pool, selection, fresh, rows)
                    reasons.append(order)
            return rows, proportions, "; ".join(filter(None, reasons))
        if selection is not None:
            laid = None
            if fresh:
                draws = stream(self.seed, "order", interval.index) if shuffle else None
                # keep_ratio sets the share of the pool that is served, however long the interval is: rows may repeat.
                repeat = self.config.repeat or self.config.keep_ratio is not None
                laid = spread(selection.rows, ctx.interval.steps, batch, draws, repeat, pool_rows=len(pool))
            if self.ordering is not None:
                laid, order = self.ordering.selection(interval, pool, selection, laid)
                reasons.append(order)
            assert laid is not None, "only an orderer decides within a selection"
            return laid, None, "; ".join(filter(None, reasons))
        if self.selects_subset:
            rows = warmup_rows(self.space.all_rows(), interval, batch, self.seed, self._earlier)
            return rows, None, "warm-up: uniform"
        if self.ordering is not None:
            rows, order = self.ordering.pool(interval, self.resumed_epochs)
            return rows, None, order
        resumed = self.resumed_epochs
        rows = resumed.stream(interval) if resumed else epoch_stream(pool, interval, self.shape, self.seed)
        return rows, None, "every row, epoch by epoch"

    def _lost(self, kept: Rows, wanted: NDArray[np.float64]) -> str:
        """Tell the domains of which nothing was kept, though rows are wanted [K]; the log hears of each once."""
        lost = (self.space.domains.counts(kept) == 0) & (wanted >= 1)
        if not lost.any():
            return ""
        names = np.array(self.space.domains.names)
        told = "the selector kept nothing of %s, whose share goes to the other domains"
        if new := [name for name in names[lost].tolist() if name not in self._told_lost]:
            logger.warning(told, ", ".join(new))
            self._told_lost.update(new)
        return told % ", ".join(names[lost])

    def proportions_at(self, step: int) -> NDArray[np.float64]:
        """Return the proportions of sequences under which a step of the plan in progress was drawn, caps heeded [K]."""
        if self.sampler is not None:
            first = step * self.shape.global_batch
            for segment in reversed(self.sampler.segments):
                if segment.start <= first:
                    return segment.proportions
        return self.proportions

    def drawn_at(self, step: int) -> NDArray[np.float64]:
        """Return the same in the run's unit [K]."""
        return self.space.domains.unit_proportions(self.proportions_at(step), self.config.unit)

    def _mix(self, ctx: Context) -> tuple[NDArray[np.float64], str]:
        assert self.mixer is not None
        asked = replace(
            ctx,
            targets=self.config.mixer.targets if self.config.mixer else (),
            benefit=None if self.ledger is None else self.ledger.benefit(),
        )
        if ctx.interval.kind == "warmup" and self.initial is not None:
            if self.mixer.observes:  # it learns from the first step on, and must know the domains
                self.mixer.mix(asked)
            return self.initial, "warm-up: initial proportions"
        mix = self.mixer.mix(asked)
        proportions = check_mix(self.mixer, mix, self.space.domains.names)
        raised = apply_min_proportion(proportions, self.floors)
        if raised is proportions:
            return proportions, mix.reason
        low = [self.space.domains.names[k] for k in np.flatnonzero(raised > proportions)]
        told = ", ".join(low[:8]) + (f", {len(low) - 8} more" if len(low) > 8 else "")
        return raised, f"{mix.reason}; raised to min_proportion: {told}"

    def _fill(self, interval: Interval) -> Rows:
        """Return the rows that even out short steps over ranks; only whole epochs have short steps."""
        if self.config.full_steps:
            return np.zeros(0, dtype=np.int64)
        whole = self.schedule.interval(interval.start_step)  # the rest of a cut one is filled as it would have been
        ordered = self.ordering.epochs if self.ordering else None
        return epoch_fill(self.space.all_rows(), whole, self.shape, self.seed, ordered)

    def _record(
        self,
        plan: DataPlan,
        pool: Rows,
        selection: Selection | None,
        proportions: NDArray[np.float64] | None,
        seconds: dict[str, float],
    ) -> None:
        names, reason = self.space.domains.names, plan.trace["reason"]
        counts = dict(zip(names, self.space.domains.counts(plan.rows).tolist(), strict=True))
        self.recorder.planned(
            seconds=seconds,
            reason=reason,
            domain_counts=counts,
            proportions=None if proportions is None else dict(zip(names, proportions.tolist(), strict=True)),
            pool=pool if selection is not None and len(pool) < self.space.num_rows else None,
            scores=None if selection is None else selection.scores,
            kept=None if selection is None else selection.rows,
            nearest=None if selection is None else selection.nearest,
            plan=plan,
        )
        told = plan.interval.kind == "dynamic" or plan.interval.index == 0
        if told and thinned(plan.interval.index, _LOGGED_INTERVALS):
            top, total = sorted(counts.items(), key=lambda item: -item[1])[:5], sum(counts.values())
            logger.info(
                "interval %d (steps %d to %d): %d rows; %s%s",
                plan.interval.index,
                plan.interval.start_step,
                plan.interval.stop_step,
                total,
                ", ".join(f"{middle(name, 24)} {count / total:.0%}" for name, count in top if count),
                ", .." if sum(map(bool, counts.values())) > len(top) else "",
            )
            logger.debug("interval %d: %s", plan.interval.index, reason)

    def scalars(self, step: int, known: Collection[str] = ()) -> dict[str, float]:
        """Return numbers for the training log after ``step`` optimizer steps.

        They are the interval, the time of decisions, and for each domain its share of the plan, its nominal share, and
        the tokens, sequences and epochs since the run began. Of very many domains only those ``known`` to have been
        trained on since the last log are told.
        """
        names, told = self.space.domains.names, {}
        columns: dict[str, NDArray[Any]] = {}
        if self.plan is not None:
            spent = self.clock.totals()
            deciding = spent.get("signals", 0.0) + spent.get("decide", 0.0)
            told = {"interval": float(self.plan.interval.index), "decide_seconds": deciding}
            self.totals.count(self.plan, step)
            if self._shares is None or self._shares[0] is not self.plan:
                counts = self.space.domains.counts(self.plan.rows)
                self._shares = self.plan, counts / max(counts.sum(), 1)
            columns["mix"] = self._shares[1]
        columns |= {
            "tokens": self.totals.tokens,
            "sequences": self.totals.rows,
            "epochs": self.totals.rows / self.space.domains.num_rows,
        }
        if self.rollouts is not None:
            told |= self.rollouts.scalars()
        if self.mixer is not None:
            columns["nominal"] = self.proportions
        few = len(names) <= LOGGED_DOMAINS
        which = [k for k, name in enumerate(names) if few or name in known]
        for what, values in columns.items():
            told |= {f"{what}/{names[k]}": float(values[k]) for k in which}
        return told

    def state_dict(self) -> State:
        """Everything but the plan, which is saved as arrays of its own."""
        return {
            **{
                k: check_state(part) if isinstance(part, Method) else part.state_dict()
                for k, part in self._parts().items()
            },
            "ends_at": self.ends_at,
            "limits": self.sampler.limits if self.sampler else None,
            "resumed_epochs": None if self.resumed_epochs is None else self.resumed_epochs.state_dict(),
            "unplanned": None if self._unplanned is None else np.packbits(self._unplanned),
            "earlier": self._earlier,
            **(self.ordering.state_dict() if self.ordering else {}),
            "proportions": self.proportions,
            "until": self._until,
            "kept": self._kept,
            "kept_weights": self._kept_weights,
            "nominal": self._nominal,
            "carried": self._carried,
        }

    def _parts(self) -> dict[str, Any]:
        """Return what else has a state, by its key in the checkpoint."""
        parts = {
            "selector": self.selector,
            "mixer": self.mixer,
            "orderer": self.orderer,
            "sampler": self.sampler,
            "signals": self.signals,
            "repeats": self.repeats,
            "served": self.served,
            "totals": self.totals,
            "in_run": self.in_run,
            "ledger": self.ledger,
            "rollouts": self.rollouts,
        }
        return {key: part for key, part in parts.items() if part is not None}

    def load_state_dict(self, state: State) -> None:
        """Take back what ``state_dict`` gave."""
        for key, part in self._parts().items():
            part.load_state_dict(state[key])
        if epochs := state["resumed_epochs"]:
            served = np.unpackbits(epochs["served"], count=self.space.num_rows).astype(np.bool_)
            self._resume_epochs(served, int(epochs["step"]))
        if self.ordering is not None:
            self.ordering.load_state_dict(state)
        # The end of the data follows from the caps: with other caps the next decision finds it again.
        capped = self.sampler is not None and self.config.at_cap == "stop"
        same = self.sampler is not None and np.array_equal(state["limits"], self.sampler.limits)
        self.ends_at = state["ends_at"] if capped and same else None
        self._earlier, self.proportions = state["earlier"], state["proportions"]
        self._until = {**state["until"]}
        self._kept, self._nominal, self._carried = state["kept"], state["nominal"], state["carried"]
        self._weigh(state["kept_weights"])
        if self._unplanned is not None:
            self._unplanned = np.unpackbits(state["unplanned"], count=self.space.num_rows).astype(np.bool_)

    def _resume_epochs(self, served: NDArray[np.bool_], step: int) -> None:
        """Go on with whole epochs over a pool that was changed after ``step`` steps, given the rows served [N]."""
        rows, name = self.space.all_rows(), f"all rows from step {step}"
        epochs: ShuffledEpochs | OrderedEpochs
        if self.ordering is not None:
            epochs = self.ordering.begin(name)
        else:
            epochs = ShuffledEpochs(rows, name, self.seed, shuffle=self.shape.shuffle)
        self.resumed_epochs = ResumedEpochs(served, step, self.shape, epochs)

    def take_over(
        self,
        state: State,
        plan: DataPlan | None,
        step: int,
        *,
        before: Sequence[str],
        served: Served,
        found: NDArray[np.int64],
        kept: Collection[str],
    ) -> None:
        """Go on after ``step`` optimizer steps of a run over another pool, or with other settings.

        What is left of the plan in progress is decided anew.

        Args:
            state: What ``state_dict`` gave there.
            plan: The plan in progress there.
            step: Optimizer steps done.
            before: Names of the domains there.
            served: Which rows of this pool were served.
            found: Row there of each row of this pool [N], -1 for new ones.
            kept: Which of selector, mixer and parts keep their states.
        """
        for key, part in self._parts().items():
            if key in kept:
                part.load_state_dict(state[key])
        names = self.space.domains.names
        self.served, totals = served, state["totals"]
        self.totals = DomainTotals(self.space.domains, served)
        counts = {key: by_name(before, totals[key], names) for key in ("rows", "tokens")}
        self.totals.load_state_dict({**counts, "step": step})
        if self.sampler is not None:
            self.sampler.go_on(served.epochs, served.marks, state.get("sampler"))
        elif not self.selects_subset and (self.orderer is None or not self.orderer.paced):
            self._resume_epochs(served.marks, step)
        earlier, dropped = state["earlier"], np.empty(0, dtype=np.int64)
        if plan is not None:
            self.decided = plan.interval.index + 1
            done, dropped = np.split(plan.rows, [(step - plan.interval.start_step) * plan.global_batch])
            earlier = np.concatenate([earlier, done])
        places = np.full(max(found.max(initial=0), earlier.max(initial=0)) + 2, -1, dtype=np.int64)
        places[found] = self.space.all_rows()
        self._earlier = places[earlier][(earlier >= 0) & (places[earlier] >= 0)]
        if self._unplanned is not None:
            self._unplanned = ~served.marks
        if self.repeats is not None and "repeats" in state:
            self.repeats.take_over(state["repeats"], dropped[dropped >= 0], found)
