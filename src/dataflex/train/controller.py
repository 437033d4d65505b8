"""Decides the next stretch of the id stream: runs the methods of an interval and lays out the plan.

The order of decisions is fixed: pool, selector narrows, mixer sets quotas over what is left. The
controller knows nothing of the Hugging Face Trainer; ``llamafactory.trainer`` drives it. Everything it decides is
a function of (seed, interval, state of the methods, signals), equal on every rank.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from dataflex import comm
from dataflex.config.schema import DynamicConfig, MethodConfig
from dataflex.errors import CheckpointError, ConfigError, DataError
from dataflex.method import Context, Mixer, Rows, Selection, Selector, State, Weighter
from dataflex.plan.domains import Domains
from dataflex.plan.mixture import MixtureSampler
from dataflex.plan.plan import DataPlan
from dataflex.plan.planner import EpochLayout, ShuffledEpochs, epoch_fill, epoch_stream, spread, warmup_rows
from dataflex.plan.proportions import apply_min_proportion, by_domain, floors_by_domain
from dataflex.plan.schedule import Interval, Schedule, pool_sizes, wanted_rows
from dataflex.plan.validate import caps, check_mix, check_selection, check_state, quota_rows
from dataflex.record.clock import PhaseClock
from dataflex.record.read import thinned
from dataflex.record.recorder import NullRecorder, RunRecorder
from dataflex.rng import stream
from dataflex.signals.runner import SignalRunner
from dataflex.signals.sweep import preserve_state
from dataflex.train.row_space import RowSpace
from dataflex.train.screening import piloted, screened


class Candidates:
    """Gives every interval its pool, a function of (seed, optimizer step) alone.

    Every row is a candidate once before any is one again, whether it was chosen or not. Nothing is remembered: a
    resumed run, or one on other ranks, is given the same.

    Args:
        usable: Rows with a supervised token, the only ones that can be chosen [n].
        batches: Candidates for each row that is served.
        global_batch: Rows of one optimizer step.
        schedule: Intervals of the run; warm-up takes no candidates.
        seed: Seed of the run.

    Raises:
        ConfigError: An interval would look at more rows than there are.
        DataError: No row has a supervised token.
    """

    def __init__(self, usable: Rows, *, batches: int, global_batch: int, schedule: Schedule, seed: int) -> None:
        if not len(usable):
            raise DataError("no training row has a supervised token, so there is no candidate to choose")
        self._per_step = batches * global_batch
        self._first_step = schedule.warmup_steps
        wanted = self._per_step * min(schedule.interval_steps, max(1, schedule.total_steps - schedule.warmup_steps))
        if wanted > len(usable):
            raise ConfigError(
                f"dynamic.candidate_batches: {batches} x {schedule.interval_steps:,} steps x {global_batch:,} rows are "
                f"{wanted:,} candidates, and only {len(usable):,} rows have a supervised token; lower it, or "
                "interval_steps"
            )
        self._epochs = ShuffledEpochs(usable, "dynamic.candidate_batches", seed)

    def pool(self, interval: Interval) -> Rows:
        """Return the candidates of an interval, ascending and distinct.

        Where one epoch ends and the next begins, a row that is in both parts is one candidate, so that there may be
        fewer than usual; with two batches or more they are enough.
        """
        first = (interval.start_step - self._first_step) * self._per_step
        return np.unique(self._epochs.take(first, interval.steps * self._per_step)).astype(np.int64)


logger = logging.getLogger(__name__)

_SHARE = 0.1
"""Share of an interval's places from which on repeats are worth a word."""


class Repeats:
    """Counts how often every row is served, and warns once when much of an interval goes to rows served very often.

    Args:
        num_rows: Rows of the training set.
        most: ``dynamic.max_repeats``, how often a row may be served without a word; None: always.
        selector: Name of the selector, for the message.
    """

    def __init__(self, num_rows: int, most: int | None, selector: str) -> None:
        self._most, self._selector = most, selector
        self._served = np.zeros(num_rows, dtype=np.uint16)
        self._told = False

    def take(self, rows: Rows) -> str:
        """Count the rows of a plan; return a word for the record where a tenth of them repeat more than they may.

        Args:
            rows: Rows of an interval in serving order; negative ids are none.
        """
        rows = rows[rows >= 0]
        each, added = np.unique(rows, return_counts=True)
        self._served[each] = np.minimum(self._served[each] + added, np.iinfo(np.uint16).max)
        if self._most is None or not len(rows):
            return ""
        times: NDArray[np.uint16] = self._served[rows]
        share = float((times > self._most).mean())
        if share < _SHARE:
            return ""
        told = f"{share:.0%} of the rows were served more than {self._most} times by now, up to {times.max()}"
        if not self._told:
            self._told = True
            logger.warning(
                "%s of an interval (dynamic.max_repeats: %d). What the %s selector says of rows that are known by "
                "heart wears out, and so does what they teach: keep more rows, train fewer steps, set exclude_seen "
                "where the pool has many rows of the kind, or see its note (dataflex methods selector/%s)",
                told,
                self._most,
                self._selector,
                self._selector,
            )
        return told

    def state_dict(self) -> State:
        """Return the counts."""
        return {"served": self._served.copy(), "told": self._told}

    def load_state_dict(self, state: State) -> None:
        """Take back what ``state_dict`` gave."""
        self._served = np.array(state["served"], dtype=np.uint16)
        self._told = bool(state["told"])


class SeenRows:
    """Notes the rows of every plan, warm-up included.

    Args:
        usable_N: Whether a row can be chosen at all: it has a supervised token.
    """

    def __init__(self, usable_N: NDArray[np.bool_]) -> None:
        self._usable = usable_N
        self._seen = np.zeros(len(usable_N), dtype=np.bool_)
        self.note = ""
        """What happened at the last decision, for the record."""

    def unseen(self, wanted: int) -> Rows:
        """Return the rows that were not served yet, ascending; all of them again where fewer than ``wanted`` are left.

        Args:
            wanted: Rows that the interval asks the selector for.
        """
        left = int((self._usable & ~self._seen).sum())
        self.note = ""
        if left < wanted and self._seen.any():
            self.note = f"{left:,} rows are unseen and {wanted:,} are wanted: every row is in the pool again"
            logger.info("exclude_seen: %s", self.note)
            self._seen[:] = False
        return np.flatnonzero(~self._seen).astype(np.int64)

    def mark(self, rows: Rows) -> None:
        """Note the rows of a plan; negative ids are none."""
        self._seen[rows[rows >= 0]] = True

    def state_dict(self) -> State:
        """Return one bit a row."""
        return {"seen": np.packbits(self._seen)}

    def load_state_dict(self, state: State) -> None:
        """Take back what ``state_dict`` gave."""
        self._seen = np.unpackbits(state["seen"], count=len(self._usable)).astype(np.bool_)


class ServedCounts:
    """Counts by domain, up to a step.

    Args:
        domains: Domains of the training rows, with their lengths.
    """

    def __init__(self, domains: Domains) -> None:
        self._domains = domains
        self.rows: NDArray[np.int64] = np.zeros(len(domains.names), dtype=np.int64)
        self.tokens: NDArray[np.int64] = np.zeros(len(domains.names), dtype=np.int64)
        self._step = 0

    def count(self, plan: DataPlan, step: int) -> None:
        """Take in what ``plan`` served before ``step`` and was not counted yet."""
        first = plan.interval.start_step
        start, stop = ((at - first) * plan.global_batch for at in (max(self._step, first), step))
        rows = plan.rows[start : max(stop, start)]
        rows = rows[rows >= 0]
        assert self._domains.lengths is not None
        weights, labels = self._domains.lengths[rows], self._domains.domain_of[rows]
        self.rows = self.rows + self._domains.counts(rows)
        self.tokens = self.tokens + np.bincount(labels, weights=weights, minlength=len(self.rows)).astype(np.int64)
        self._step = max(self._step, step)

    def state_dict(self) -> State:
        """Return the counts and the step up to which they go."""
        return {"rows": self.rows, "tokens": self.tokens, "step": self._step}

    def load_state_dict(self, state: State) -> None:
        """Take back what ``state_dict`` gave."""
        self.rows = np.asarray(state["rows"], dtype=np.int64)
        self.tokens = np.asarray(state["tokens"], dtype=np.int64)
        self._step = int(state["step"])


_LOGGED_DOMAINS = 32
_LOGGED_INTERVALS = 64


@dataclass(frozen=True, kw_only=True)
class BatchShape:
    """How one optimizer step is cut up.

    Attributes:
        micro_batch_size: Sequences per rank and micro-batch.
        accumulation: Micro-batches per optimizer step.
        world: Data-parallel ranks.
        rank: This rank.
        drop_last: ``dataloader_drop_last``.
        shuffle: Whether rows are shuffled (``disable_shuffling: false``): those of whole epochs, of a mixture's
            domains, and of a selection, which else is served in the selector's order.
    """

    micro_batch_size: int
    accumulation: int
    world: int
    rank: int
    drop_last: bool
    shuffle: bool

    @property
    def global_batch(self) -> int:
        """Sequences of one optimizer step."""
        return self.micro_batch_size * self.accumulation * self.world

    def layout(self, num_rows: int) -> EpochLayout:
        """Return how whole epochs over ``num_rows`` rows fall into steps, as in the stock Trainer."""
        return EpochLayout(
            num_rows=num_rows,
            global_batch=self.global_batch,
            micro_batch_size=self.micro_batch_size,
            world=self.world,
            drop_last=self.drop_last,
        )


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
    recorder: RunRecorder = field(default_factory=NullRecorder)
    plan: DataPlan | None = None
    ends_at: int | None = None
    """Step at which the data run out under ``at_cap: stop``."""
    decided: int = 0
    """Decisions made before, where no plan is taken up that tells."""
    clock: PhaseClock = field(default_factory=PhaseClock)

    def __post_init__(self) -> None:
        domains = self.space.domains
        self.layout = self.shape.layout(self.space.num_rows)
        self.sampler: MixtureSampler | None = None
        pure = self.mixer is not None and self.mixer.requires().pure_micro_batches
        self.served = ServedCounts(domains)
        self._shares: tuple[DataPlan, NDArray[np.float64]] | None = None
        self._earlier: Rows = np.empty(0, dtype=np.int64)
        """What the interval in progress served before a longer run took it up where a shorter one had cut it."""
        self.proportions: NDArray[np.float64] = np.asarray(domains.num_rows / domains.num_rows.sum())
        """Sampling proportions of sequences in the plan in progress."""
        if self.mixer is not None and not self.narrows:
            self.sampler = MixtureSampler(
                domains,
                seed=self.seed,
                # A step that has fewer sequences than there are domains shows little of the proportions.
                block=self.shape.global_batch * -(-len(domains.names) // self.shape.global_batch),
                max_epochs=caps(self.config.max_epochs, domains.names),
                at_cap=self.config.at_cap,
                unit=self.shape.micro_batch_size if pure else 1,
                interleave=self.config.interleave,
                shuffle=self.shape.shuffle,
            )
        self.floors = floors_by_domain(self.config.min_proportion, domains.names)
        self.seen = SeenRows(self.space.supervised > 0) if self.config.exclude_seen else None
        self.repeats: Repeats | None = None
        if self.selector is not None and self.narrows:
            self.repeats = Repeats(self.space.num_rows, self.config.max_repeats, self.selector.name)
        self.candidates: Candidates | None = None
        if self.config.candidate_batches is not None:
            self.candidates = Candidates(
                np.flatnonzero(self.space.supervised > 0),
                batches=self.config.candidate_batches,
                global_batch=self.shape.global_batch,
                schedule=self.schedule,
                seed=self.seed,
            )
        self.initial: NDArray[np.float64] | None = None
        if self.config.initial_proportions is not None:
            self.initial = by_domain(self.config.initial_proportions, domains.names, "dynamic.initial_proportions")

    @property
    def narrows(self) -> bool:
        """Whether a selector leaves rows out."""
        return self.selector is not None and self.selector.selects_subset

    @property
    def ragged(self) -> bool:
        """Whether rows flow as whole epochs, whose last step may be short, as in the stock Trainer."""
        return self.mixer is None and not self.narrows

    def plan_for(self, step: int) -> DataPlan:
        """Return the plan that covers ``step``, deciding it first if need be (collective).

        Under ``at_cap: stop`` the plan returned last may hold no step at all.
        """
        if self.ends_at is not None and step >= self.ends_at:
            assert self.plan is not None
            return self.plan
        if self.plan is None or not self.plan.interval.start_step <= step < self.plan.interval.stop_step:
            if self.plan is not None:
                self.served.count(self.plan, step)
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
        if self.plan is None or step == whole.start_step:
            self._earlier = self._earlier[:0]
        elif self.narrows:
            self._earlier = np.concatenate([self._earlier, self.plan.rows])
        index = max(whole.index, self.decided) if self.plan is None else self.plan.interval.index + 1
        return replace(whole, index=index, start_step=step)

    def _cut(self, interval: Interval) -> bool:
        """Whether an interval is the rest of one of the schedule."""
        return interval.start_step != self.schedule.interval(interval.start_step).start_step

    def _decide(self, interval: Interval) -> DataPlan | None:
        # Methods may be anyone's: what they draw or switch stays here.
        with self.clock.phase("decide"), preserve_state(self.signals.access.model):
            return self._decided(interval)

    def _decided(self, interval: Interval) -> DataPlan | None:
        """Decide an interval; None where domains at their caps leave no step of it (at_cap: stop)."""
        started = time.perf_counter()
        self.signals.begin(interval.start_step)
        ctx = self._context(interval, self.config.selector)
        pool = self.space.all_rows()
        selection = None
        if self.narrows and interval.kind == "dynamic":
            pool = self._pool(ctx)
            selection = self._select(pool, ctx)
            if self.seen is not None and self.seen.note:
                selection = replace(selection, reason=f"{selection.reason}; {self.seen.note}")
        rows, proportions, reason = self._lay_out(ctx, pool, selection)
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
        if self.seen is not None:
            self.seen.mark(plan.rows)
        total = time.perf_counter() - started
        self.clock.move(self.signals.seconds, "signals")
        phases = {"signals": self.signals.seconds, "decide": total - self.signals.seconds}
        self._record(plan, pool, selection, proportions, reason, phases)
        return plan

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
        interval = replace(self.plan.interval, start_step=step, stop_step=step + 1)
        first = (step - self.plan.interval.start_step) * batch
        rows = self.plan.rows[first : first + batch]
        with self.clock.phase("decide"), preserve_state(self.signals.access.model):
            self.signals.begin(step)
            weighter.prepare(self._context(interval, self.config.weighter), rows[rows >= 0])
            self.clock.move(self.signals.seconds, "signals")

    def _select(self, pool: Rows, ctx: Context) -> Selection:
        assert self.selector is not None
        wanted = self._wanted(ctx.interval, len(pool) if self.seen is None else self._pool_sizes()[1])
        selection = self.selector.select(pool, min(wanted, len(pool)), ctx)
        check_selection(self.selector, selection, pool, wanted)
        return selection

    def _wanted(self, interval: Interval, pool_size: int) -> int:
        """Return how many rows a selector is asked for."""
        ratio, mixes = self.config.keep_ratio, self.mixer is not None
        return wanted_rows(interval, self.shape.global_batch, pool_size, ratio, mixes)

    def _pool_sizes(self) -> tuple[int, int]:
        """Return the rows drawn for a pool, and those left once they are screened; shares are of all rows."""
        options = self.config.signals
        return pool_sizes(self.space.num_rows, options.pool_fraction, options.screen_fraction)

    def _pool(self, ctx: Context) -> Rows:
        """Return the rows that a selector is given, ascending: all, the unseen, candidates, or a drawn share."""
        if self.candidates is not None:
            return self.candidates.pool(ctx.interval)
        rows, (drawn, left) = self.space.all_rows(), self._pool_sizes()
        if self.seen is not None:
            rows = self.seen.unseen(self._wanted(ctx.interval, left))
        elif len(self._earlier):
            rows = self._unserved(rows, ctx.interval)
        if drawn < len(rows):
            rows = np.sort(stream(self.seed, "pool", ctx.interval.index).choice(rows, size=drawn, replace=False))
        if left < len(rows):
            if self.config.signals.screen_by == "pilot":
                return piloted(rows, left, self.signals, ctx.targets, seed=self.seed, interval=ctx.interval.index)
            rows = screened(rows, left / len(rows), self.signals, ctx.targets)
        return rows

    def _unserved(self, rows: Rows, interval: Interval) -> Rows:
        """Leave out what a cut interval served already, where whole it would have served no row twice."""
        whole = self.schedule.interval(interval.start_step)
        sizes = self._pool_sizes()[1]
        once = self._wanted(whole, sizes) == whole.steps * self.shape.global_batch
        if self.mixer is not None or not once or len(np.unique(self._earlier)) < len(self._earlier):
            return rows
        left = np.setdiff1d(rows, self._earlier)
        enough = int((self.space.supervised[left] > 0).sum()) >= self._wanted(interval, sizes)
        return left if enough else rows

    def _lay_out(
        self, ctx: Context, pool: Rows, selection: Selection | None
    ) -> tuple[Rows, NDArray[np.float64] | None, str]:
        """Return serving order, nominal proportions if a mixer set them, and the reason for the record."""
        interval, batch = ctx.interval, self.shape.global_batch
        total = interval.steps * batch
        reasons = [selection.reason] if selection is not None and selection.reason else []
        if self.mixer is not None:
            proportions, why = self._mix(ctx)
            reasons.append(why)
            shares = self.space.domains.sequence_proportions(proportions, self.config.unit)
            self.proportions = shares
            if self.sampler is not None:
                start = interval.start_step * batch
                step, go_on = interval.start_step, self._cut(interval)
                self.sampler.append(shares, start=start, decided_at_step=step, reason=why, go_on=go_on)
                rows = self.sampler.draw(total, whole=batch)
            else:
                kept = selection.rows if selection is not None else self.space.all_rows()
                rows = quota_rows(
                    kept,
                    shares,
                    total,
                    interval,
                    self.space.domains,
                    seed=self.seed,
                    repeat=self.config.repeat,
                    shuffle=self.shape.shuffle,
                    earlier=self._earlier if len(self._earlier) else None,
                )
            return rows, proportions, "; ".join(filter(None, reasons))
        if selection is not None:
            order = stream(self.seed, "order", interval.index) if self.shape.shuffle else None
            rows = spread(selection.rows, interval.steps, batch, order, self._repeats(), pool_rows=len(pool))
            return rows, None, "; ".join(reasons)
        if self.narrows:
            rows = warmup_rows(self.space.all_rows(), interval, batch, self.seed, self._earlier)
            return rows, None, "warm-up: uniform"
        rows = epoch_stream(self.space.all_rows(), interval, self.layout, self.seed, self.shape.shuffle)
        return rows, None, "every row, epoch by epoch"

    def proportions_at(self, step: int) -> NDArray[np.float64]:
        """Return the proportions of sequences under which a step of the plan in progress was drawn [K].

        Those that the mixer set, or what domains at their caps have left of them.
        """
        if self.sampler is not None:
            first = step * self.shape.global_batch
            for segment in reversed(self.sampler.segments):
                if segment.start <= first:
                    return segment.proportions
        return self.proportions

    def _repeats(self) -> bool:
        # keep_ratio says how much of the pool is served, however long the interval is: copies are meant.
        return self.config.repeat or self.config.keep_ratio is not None

    def _mix(self, ctx: Context) -> tuple[NDArray[np.float64], str]:
        assert self.mixer is not None
        asked = replace(ctx, targets=self.config.mixer.targets if self.config.mixer else ())
        if ctx.interval.kind == "warmup" and self.initial is not None:
            if self.mixer.observes:  # it learns already, and has to know the domains for that
                self.mixer.mix(asked)
            return self.initial, "warm-up: initial proportions"
        mix = self.mixer.mix(asked)
        proportions = check_mix(self.mixer, mix, self.space.domains.names)
        served = apply_min_proportion(proportions, self.floors)
        if served is proportions:
            return proportions, mix.reason
        low = [self.space.domains.names[k] for k in np.flatnonzero(served > proportions)]
        told = ", ".join(low[:8]) + (f", {len(low) - 8} more" if len(low) > 8 else "")
        return served, f"{mix.reason}; raised to min_proportion: {told}"

    def _fill(self, interval: Interval) -> Rows:
        """Return the rows that even out short steps over ranks; only whole epochs have short steps."""
        if not self.ragged:
            return np.zeros(0, dtype=np.int64)
        whole = self.schedule.interval(interval.start_step)  # the rest of a cut one is filled as it would have been
        return epoch_fill(self.space.all_rows(), whole, self.layout, self.seed, self.shape.shuffle)

    def _record(
        self,
        plan: DataPlan,
        pool: Rows,
        selection: Selection | None,
        proportions: NDArray[np.float64] | None,
        reason: str,
        seconds: dict[str, float],
    ) -> None:
        names = self.space.domains.names
        served = plan.rows[plan.rows >= 0]
        counts = dict(zip(names, self.space.domains.counts(served).tolist(), strict=True))
        self.recorder.planned(
            seconds=seconds,
            reason=reason,
            domain_counts=counts,
            proportions=None if proportions is None else dict(zip(names, proportions.tolist(), strict=True)),
            pool=pool if selection is not None and len(pool) < self.space.num_rows else None,
            scores=None if selection is None else selection.scores,
            plan=plan,
        )
        told = plan.interval.kind == "dynamic" or plan.interval.index == 0
        if told and thinned(plan.interval.index, _LOGGED_INTERVALS):
            top = sorted(counts.items(), key=lambda item: -item[1])[:4]
            logger.info(
                "interval %d (steps %d to %d): %d rows; %s%s",
                plan.interval.index,
                plan.interval.start_step,
                plan.interval.stop_step,
                len(served),
                ", ".join(f"{name} {count / max(len(served), 1):.1%}" for name, count in top),
                f"; {reason}" if reason else "",
            )

    def scalars(self, step: int) -> dict[str, float]:
        """Return numbers for the training log after ``step`` optimizer steps.

        Interval, time spent deciding, and by domain: its share of the plan, the nominal one, and the tokens and
        epochs served since the run began.
        """
        if self.plan is None:
            return {}
        spent = self.clock.totals()
        deciding = spent.get("signals", 0.0) + spent.get("decide", 0.0)
        told = {"interval": float(self.plan.interval.index), "decide_seconds": deciding}
        names = self.space.domains.names
        if len(names) > _LOGGED_DOMAINS:  # hundreds of curves help nobody; the record holds them all
            return told
        self.served.count(self.plan, step)
        if self._shares is None or self._shares[0] is not self.plan:
            counts = self.space.domains.counts(self.plan.rows)
            self._shares = self.plan, counts / max(counts.sum(), 1)
        columns = {
            "mix": self._shares[1],
            "tokens": self.served.tokens,
            "epochs": self.served.rows / self.space.domains.num_rows,
        }
        if self.mixer is not None:
            columns["nominal"] = self.proportions
        for what, values in columns.items():
            told |= {f"{what}/{name}": float(value) for name, value in zip(names, values, strict=True)}
        return told

    def state_dict(self) -> State:
        """Everything but the plan, which is saved as arrays of its own."""
        return {
            "selector": check_state(self.selector) if self.selector else {},
            "mixer": check_state(self.mixer) if self.mixer else {},
            "sampler": self.sampler.state_dict() if self.sampler else {},
            "signals": self.signals.state_dict(),
            "seen": self.seen.state_dict() if self.seen else {},
            "repeats": self.repeats.state_dict() if self.repeats else {},
            "ends_at": self.ends_at,
            "limits": self.sampler.limits if self.sampler else None,
            "earlier": self._earlier,
            "proportions": self.proportions,
            "served": self.served.state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        """Take back what ``state_dict`` gave."""
        if self.selector:
            self.selector.load_state_dict(state["selector"])
        if self.mixer:
            self.mixer.load_state_dict(state["mixer"])
        if self.sampler:
            self.sampler.load_state_dict(state["sampler"])
        self.signals.load_state_dict(state["signals"])
        if self.seen and state.get("seen"):
            self.seen.load_state_dict(state["seen"])
        if self.repeats and state.get("repeats"):
            self.repeats.load_state_dict(state["repeats"])
        # Where the data end follows from the caps: with others, the next decision finds it anew.
        capped = self.sampler is not None and self.config.at_cap == "stop"
        same = capped and np.array_equal(state.get("limits", ()), self.sampler.limits if self.sampler else ())
        self.ends_at = state["ends_at"] if same else None
        self._earlier = np.asarray(state.get("earlier", ()), dtype=np.int64)
        if (
            self.sampler
            and self.plan
            and self.sampler.position != self.plan.interval.stop_step * self.plan.global_batch
        ):
            raise CheckpointError(
                "resume: the checkpoint was written by an earlier version of DataFlex after the data had run out "
                "(at_cap: stop), and no step can follow it. Resume from an earlier checkpoint of the run."
            )
        self.proportions = np.asarray(state["proportions"], dtype=np.float64)
        self.served.load_state_dict(state["served"])
