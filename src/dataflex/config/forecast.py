"""Forecast of a run from its configuration and files: rows, steps, schedule, mixture.

Nothing is tokenized and no model is looked at, so a packed or remote data set leaves the numbers
open (None) rather than guessed.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NoReturn, cast

import numpy as np
from numpy.typing import NDArray

from dataflex.config.args import LlamaFactoryArgs, env_enabled, env_processes
from dataflex.config.data import Source, count_rows, loaded_values, target_data_sets, train_rows
from dataflex.config.schema import DynamicConfig
from dataflex.errors import UnsupportedError
from dataflex.method import Context, Mixer, Signals
from dataflex.plan.domains import Domains, unusable_labels
from dataflex.plan.mixture import expected_epochs
from dataflex.plan.plan import BatchShape
from dataflex.plan.proportions import apply_min_proportion, by_domain, floors_by_domain
from dataflex.plan.schedule import Interval, Schedule, pool_sizes
from dataflex.validate import check_mix


def batch_of(lf: LlamaFactoryArgs) -> BatchShape:
    """Return the batch shape that the keys and the environment give.

    Processes are counted from ``WORLD_SIZE`` (under torchrun), from ``NPROC_PER_NODE`` and ``NNODES``
    when ``FORCE_TORCHRUN`` is on, or from ``ray_num_workers`` when ``USE_RAY`` is on; else there is one.
    """
    world = 1
    if os.getenv("WORLD_SIZE", "").isdigit():
        world = max(1, int(os.environ["WORLD_SIZE"]))
    elif env_enabled("USE_RAY"):
        world = lf.ray_num_workers
    elif env_enabled("FORCE_TORCHRUN"):
        world = env_processes()[0]
    return BatchShape(
        micro_batch_size=lf.per_device_train_batch_size,
        accumulation=lf.gradient_accumulation_steps,
        world=world,
        rank=0,
        drop_last=lf.dataloader_drop_last,
        shuffle=not lf.disable_shuffling,
    )


def total_steps(lf: LlamaFactoryArgs, rows: int | None) -> int | None:
    """Return the optimizer steps of the run as the Trainer counts them, or None when rows are not known.

    Raises:
        DataError: ``dataloader_drop_last`` leaves no rows.
    """
    epoch = batch_of(lf).steps_per_epoch(rows) if rows else None
    if lf.max_steps > 0:
        return lf.max_steps
    return None if epoch is None else math.ceil(lf.num_train_epochs * epoch)


_MOST_DECISIONS = 2_000
_MOST_ROWS = 200_000_000  # beyond it, an array with the domain of every row is not quick to make


class _NoSignals:
    """Signals before training: there is no model to ask."""

    def __call__(self, signal: object, *_: object, **__: object) -> NoReturn:
        self.__getattr__(type(signal).__name__)

    def __getattr__(self, asked: str) -> NoReturn:
        raise UnsupportedError(f"this method looks at the model ({asked}), which is not known before training")


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Rows that a selector is given in one interval."""

    rows: int  # of how many
    drawn: int  # drawn from them
    left: int  # of those, left once screened


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What is known of a run before it is loaded; None for numbers that are not known."""

    dynamic: DynamicConfig
    batch: BatchShape
    counts: Mapping[str, int | None]  # rows that each data set gives at most
    packs: bool  # whether several samples share a row, so that rows are not known
    rows: int | None  # rows to train on, val_size set aside
    steps: int | None  # optimizer steps of the run
    targets: Mapping[str, int | None] = field(default_factory=dict)  # rows that each target gives at most
    labelled: Mapping[str, int] | None = None  # rows of each domain that a column names
    row_passes: tuple[float, float] = (1.0, 1.0)  # F and B of a row in training, or for its gradient

    @property
    def sequences(self) -> int | None:
        """Sequences that are trained on; the last step of a whole epoch may be short."""
        if self.steps is None:
            return None
        size = self.batch.global_batch
        if not self.rows or self.dynamic.full_steps or self.batch.world > 1:
            return self.steps * size
        epoch = self.batch.rows_per_epoch(self.rows)
        epochs, rest = divmod(self.steps, self.batch.steps_per_epoch(self.rows))
        return epochs * epoch + min(rest * size, epoch)

    @property
    def pool(self) -> Pool | None:
        """The selector's pool in the first interval that it decides for; None without a selector, or unknown."""
        first, options, batches = self.first_decision("selector"), self.dynamic.signals, self.dynamic.candidate_batches
        if not self.dynamic.selects_subset or not self.rows or first is None:
            return None
        drawn, left = pool_sizes(self.rows, options.pool_fraction, options.screen_fraction)
        if batches is not None:
            drawn = left = min(self.rows, batches * first.steps * self.batch.global_batch)
        return Pool(rows=self.rows, drawn=drawn, left=left)

    @cached_property
    def schedule(self) -> Schedule | None:
        """The intervals of the run; None where its length is not known."""
        return None if self.steps is None else self.dynamic.schedule(self.steps)

    def first_decision(self, kind: str) -> Interval | None:
        """Return the first interval that the method of a kind decides; None where none is known."""
        return None if self.schedule is None else self.schedule.of(kind).first_decision

    def num_decisions(self, kind: str) -> int:
        """Return the number of decisions of the method of a kind; 0 where the run's length is not known."""
        return 0 if self.schedule is None else self.schedule.of(kind).num_decisions

    @cached_property
    def domains(self) -> Domains | None:
        """The domains, each reduced by its share of ``val_size``; None where rows are unknown."""
        found = self.counts if self.dynamic.domains_are_sources else self.labelled
        if found is None:
            return None
        sizes = [count for count in found.values() if count is not None]
        total = sum(count for count in self.counts.values() if count is not None)
        if self.packs or not self.rows or total > _MOST_ROWS:
            return None
        left = [max(1, round(size * self.rows / total)) for size in sizes]
        return Domains.from_sizes(list(found), left)

    def context(self, interval: Interval, domains: Domains) -> Context:
        """Return the context of a mixer before training."""
        return Context(
            interval=interval,
            seed=self.dynamic.seed or 0,
            domains=domains,
            signals=cast(Signals, _NoSignals()),
            targets=self.dynamic.mixer.targets if self.dynamic.mixer else (),
            total_sequences=(self.steps or 1) * self.batch.global_batch,
            global_batch=self.batch.global_batch,
        )

    def mixture(self) -> Iterator[tuple[int, NDArray[np.float64]]]:
        """Yield stretches of the run: optimizer steps, and the proportions of their sequences, float64 [K].

        Raises:
            ConfigError: Proportions that do not fit the domains.
            DataError: Domains that cannot be served as asked.
            UnsupportedError: The mixer looks at the model, or decides too often to add it up.
        """
        dynamic, domains = self.dynamic, self.domains
        assert dynamic.mixer is not None
        assert domains is not None
        assert self.schedule is not None
        schedule = self.schedule.of("mixer")
        first, warmup_steps = schedule.first_decision, schedule.all_warmup_steps
        mixer = dynamic.mixer.build()
        assert isinstance(mixer, Mixer)
        if warmup_steps:
            yield warmup_steps, self.warmup_shares(domains, mixer)
        if first is None:
            return
        if not dynamic.mixer.requires.needs_interval:
            yield schedule.total_steps - warmup_steps, self.mixed(mixer, first)
            return
        if schedule.num_decisions > _MOST_DECISIONS:
            raise UnsupportedError("it decides too often to add it up")
        yield from ((interval.steps, self.mixed(mixer, interval)) for interval in schedule.decided())

    def mixed(self, mixer: Mixer, interval: Interval) -> NDArray[np.float64]:
        """Return the mixer's proportions in an interval, with minimum proportions applied, float64 [K]."""
        assert self.domains is not None
        proportions = check_mix(mixer, mixer.mix(self.context(interval, self.domains)), self.domains.names)
        return apply_min_proportion(proportions, floors_by_domain(self.dynamic.min_proportion, self.domains.names))

    def warmup_shares(self, domains: Domains, mixer: Mixer) -> NDArray[np.float64]:
        """Return the proportions of the warm-up: those written, else the mixer's at step 0."""
        if self.dynamic.initial_proportions is not None:
            return by_domain(self.dynamic.initial_proportions, domains.names, "dynamic.initial_proportions")
        assert self.schedule is not None
        return self.mixed(mixer, self.schedule.of("mixer").interval(0))

    def served(self) -> NDArray[np.float64]:
        """Return the expected sequences of each domain over the whole run, caps followed, float64 [K].

        With ``at_cap: error`` the caps are left aside, so that one sees by how much they are passed.
        All warm-ups are taken to come first. Raises what ``mixture`` raises.
        """
        assert self.domains is not None
        sizes = self.domains.num_rows
        served = np.zeros(len(sizes), dtype=np.float64)
        for steps, shares in self.mixture():
            total = steps * self.batch.global_batch
            drawn = np.rint(served).astype(np.int64)
            epochs = expected_epochs(sizes, shares, total, self.caps(), self.dynamic.at_cap, drawn, unit=self.unit)
            served = epochs * sizes
        return served

    @cached_property
    def serves_all_again(self) -> bool:
        """Whether every row is expected to be served more than once; False where that is unknown."""
        dynamic = self.dynamic
        if self.rows is None or self.steps is None or dynamic.selects_subset or dynamic.paces:
            return False
        if dynamic.mixer is None:
            return self.steps * self.batch.global_batch > self.rows
        if self.domains is None or dynamic.mixer.requires.needs_interval or dynamic.unit != "sequences":
            return False
        try:
            return bool((self.served() > self.domains.num_rows).all())
        except UnsupportedError:
            return False

    @property
    def unit(self) -> int:
        """Sequences that are of one domain together: those of a micro-batch where the mixer wants it so."""
        mixer = self.dynamic.mixer
        return self.batch.micro_batch_size if mixer is not None and mixer.requires.pure_micro_batches else 1

    def caps(self) -> NDArray[np.float64]:
        """Return the most epochs of each domain, float64 [K]; infinite where there is no cap."""
        assert self.domains is not None
        caps = self.dynamic.max_epochs
        each = [caps.get(name) if isinstance(caps, Mapping) else caps for name in self.domains.names]
        return np.array([math.inf if cap is None else cap for cap in each], dtype=np.float64)


def row_passes(stage: str, *, compares: bool = True) -> tuple[float, float]:
    """Return the passes (F, B) that training takes of a row; of a pair both answers, also under the reference."""
    return (4.0 if compares else 2.0, 2.0) if stage == "dpo" else (1.0, 1.0)


def _rows_of_targets(targets: Sequence[str], lf: LlamaFactoryArgs, sources: Sequence[Source]) -> dict[str, int | None]:
    """Return the rows of each target, of all its data sets; None where one of them is not known."""
    whole = LlamaFactoryArgs.read({key: value for key, value in lf.items() if key != "max_samples"})
    rows = {source.name: count_rows(source, whole) for source in sources}
    counts = {target: [rows.get(name) for name in target_data_sets(target)] for target in targets}
    return {
        target: None if None in found else sum(each for each in found if each is not None)
        for target, found in counts.items()
    }


def labelled_rows(dynamic: DynamicConfig, lf: LlamaFactoryArgs, sources: Sequence[Source]) -> dict[str, int] | None:
    """Return the rows of each domain that a column names, ``val_size`` among them; None where that is not quick."""
    if dynamic.domain_column is None or lf.packed or lf.streaming or not sources:
        return None
    labels: list[str] = []
    for source in sources:
        found = loaded_values(source, lf, dynamic.domain_column)
        if found is None or unusable_labels(value for _, value in found).any():
            return None
        labels += [value for _, value in found]
    return dict(Counter(labels)) or None


def forecast(
    dynamic: DynamicConfig, lf: LlamaFactoryArgs, sources: list[Source], targets: Sequence[Source] = ()
) -> Forecast:
    """Return what is known of the run over ``sources`` towards ``targets`` before it is loaded."""
    known = {source.name: None if lf.tokenized else count_rows(source, lf) for source in sources}
    rows = None if lf.packed else train_rows(list(known.values()), lf)
    return Forecast(
        dynamic=dynamic,
        batch=batch_of(lf),
        counts=known,
        packs=lf.packed,
        rows=rows,
        steps=total_steps(lf, rows),
        targets=_rows_of_targets(dynamic.targets, lf, targets),
        labelled=labelled_rows(dynamic, lf, sources),
        row_passes=row_passes(lf.stage, compares=lf.pref_loss not in ("orpo", "simpo")),
    )
