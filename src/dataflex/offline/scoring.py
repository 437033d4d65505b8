"""Runs ``dataflex score``: LLaMA-Factory's own data pipeline and model, and methods asked instead of a training run.

LLaMA-Factory's workflow builds tokenizer, data, model and trainer as for training; our trainer's ``train``
scores and stops there. Passes write into a store as they go, so that a killed run goes on where it was.
Upstream names relied upon: those of ``huggingface.trainer``; of the Trainer ``train``, ``create_optimizer``,
``_load_from_checkpoint``, ``_prepare_for_training``, ``_load_optimizer_and_scheduler`` and ``model_wrapped``.
"""

from __future__ import annotations

import functools
import importlib
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.integrations.deepspeed import deepspeed_load_checkpoint

from dataflex import comm
from dataflex.config.files import FileRecord, file_records
from dataflex.config.mappings import plain
from dataflex.config.schema import DynamicConfig, MethodConfig
from dataflex.errors import CheckpointError, ConfigError, DataError, DataFlexError
from dataflex.huggingface.loop import loop_of, moments_by_name, sharding_of
from dataflex.llamafactory.loading import Origin, watched_origins
from dataflex.llamafactory.swap import loads_told, swapped
from dataflex.method import Context, Rows, RunFacts, Selection, Selector, Signals
from dataflex.offline.request import ScoreRequest
from dataflex.plan.domains import Domains
from dataflex.plan.schedule import Interval
from dataflex.printable import Answer, redacted
from dataflex.score_table import ScoreTable, write_scores
from dataflex.select.scoring import PoolSelector
from dataflex.signals.identity import model_identity
from dataflex.signals.kinds import GradientScores, Signal
from dataflex.signals.runner import SignalRunner
from dataflex.signals.store import ResumablePass
from dataflex.signals.sweep import Share, preserve_state
from dataflex.state import blake2b, read_json
from dataflex.train.row_space import RowSpace
from dataflex.train.session import Setup, refuse_unsupported, signal_runner
from dataflex.validate import check_selection
from dataflex.version import versions

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

logger = logging.getLogger(__name__)


class Column(NamedTuple):
    """``METHOD`` (scores), ``METHOD/TARGET`` (scores for one target) or ``METHOD.rank``: values [N], and what they are.

    Scores are NaN where there are none; ranks are int64, -1 where the row was not chosen.
    """

    name: str
    values: NDArray[Any]
    told: str

    def tell(self) -> str:
        """Return it as one line."""
        return f"  {self.name}: {self.known:,} values; {self.told}"

    @property
    def known(self) -> int:
        """Number of rows that have a value."""
        return int((self.values >= 0).sum() if self.name.endswith(".rank") else np.isfinite(self.values).sum())


class _Remembering:
    """Passes signals on; scores towards several targets are remembered by target, so that each costs nothing."""

    def __init__(self, signals: Signals) -> None:
        self._signals = signals
        self._known: dict[tuple[str, Signal, str], NDArray[np.float32]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._signals, name)

    def __call__(self, signal: Signal, rows: Rows, *, target: str | None = None) -> NDArray[np.float32]:
        """Return values [len(rows), ...]."""
        if not isinstance(signal, GradientScores):
            return self._signals(signal, rows, target=target)
        digest = _digest(rows)
        untargeted = replace(signal, targets=())
        if any((digest, untargeted, name) not in self._known for name in signal.targets):
            scores = self._signals(signal, rows)
            self._known.update({(digest, untargeted, name): scores[:, t] for t, name in enumerate(signal.targets)})
        return np.stack([self._known[digest, untargeted, name] for name in signal.targets], axis=1)


def _digest(*arrays: NDArray[Any]) -> str:
    return blake2b(*(np.ascontiguousarray(array).tobytes() for array in arrays)).hex()


def ask(method: MethodConfig, pool: Rows, budget: int, ctx: Context) -> list[Column]:
    """Return what a selector says about every row of ``pool`` [N] when asked for ``budget`` rows (collective).

    These are scores if the method gives any, also for each of several targets, and the order of preference.
    """
    name = method.name
    ctx = replace(ctx, signals=cast(Signals, _Remembering(ctx.signals)))
    chosen = _selection(method, pool, budget, ctx)
    columns: list[Column] = []
    towards = f" towards {', '.join(method.targets)}" if method.targets else ""
    if chosen.scores is None:
        logger.info("%s gives no scores, only an order: column %s.rank", name, name)
    else:
        scores = _floats(chosen.scores)
        columns.append(Column(name, scores, f"scores of {name}{towards}"))
        finite = scores[np.isfinite(scores)]
        if not len(finite):
            logger.warning("%s: no row has a score", name)
        elif len(finite) > 1 and (finite == finite[0]).all():
            logger.warning("%s: all %d scores are equal (%g), so they say nothing", name, len(finite), finite[0])
    for target in method.targets if columns and len(method.targets) > 1 else ():
        try:
            one = _selection(replace(method, targets=(target,)), pool, budget, ctx, scores_only=True)
        except DataFlexError as error:  # a method may need several tasks
            logger.info("%s gives no scores for %s alone: %s", name, target, error)
            continue
        if one.scores is not None:
            columns.append(Column(f"{name}/{target}", _floats(one.scores), f"scores of {name} towards {target}"))
    ranks = np.full(len(pool), -1, dtype=np.int64)
    places = np.searchsorted(pool, chosen.rows)
    # A method that repeats rows counts with the first place.
    ranks[places[::-1]] = np.arange(len(places) - 1, -1, -1)
    told = f"order of preference of {name}{towards}, 0 first, among {budget:,} rows asked for ({chosen.reason})"
    return [*columns, Column(f"{name}.rank", ranks, told)]


def _selection(method: MethodConfig, pool: Rows, budget: int, ctx: Context, *, scores_only: bool = False) -> Selection:
    selector = method.build()
    assert isinstance(selector, Selector)
    if scores_only and type(selector).select is PoolSelector.select:
        budget = 1  # scores do not depend on it, and nothing is sorted
    selection = selector.select(pool, budget, replace(ctx, targets=method.targets))
    check_selection(selector, selection, pool, budget)
    return selection


def _floats(scores: NDArray[Any]) -> NDArray[np.floating]:
    values = np.asarray(scores)
    return values if values.dtype == np.float32 else values.astype(np.float64)


class Scored(Exception):
    """Leaves the workflow with what was found: model's identity, seed, scores by column, and what else was asked."""

    def __init__(self, columns: list[Column], model: str, seed: int, also: Any = None) -> None:
        super().__init__("scored")
        self.columns, self.model, self.seed, self.also = columns, model, seed, also


class WorkflowMixin(_Trainer):
    """A trainer that asks the model about rows instead of training it."""

    dataflex_setup: ClassVar[Setup]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse_unsupported(loop_of(self, self.dataflex_setup, 1), self.dataflex_setup.config, RunFacts())

    @property
    def dataflex_seed(self) -> int:
        """Seed of all decisions."""
        seed = self.dataflex_setup.config.seed
        return int(self.args.seed) if seed is None else seed

    def train(self, *_args: Any, **_kwargs: Any) -> Any:
        """Partition the model as training would, where its settings say so, and ask (collective)."""
        if self._dataflex_partitioned:
            self._prepare_for_training(1, None, None)
        self.dataflex_ask()

    def dataflex_ask(self) -> None:
        """Ask, and leave the workflow by an exception that holds what was found."""
        raise NotImplementedError

    @property
    def _dataflex_partitioned(self) -> bool:
        return sharding_of(self) in ("zero3", "fsdp2")

    def dataflex_take(self, checkpoint: Path) -> int:
        """Load a checkpoint's weights as a resumed run would; return its optimizer step (collective)."""
        if not self._dataflex_partitioned:
            self._load_from_checkpoint(str(checkpoint))
        elif self.is_deepspeed_enabled:
            strict = not hasattr(self.model, "peft_config")
            deepspeed_load_checkpoint(self.model_wrapped, str(checkpoint), load_module_strict=strict)
        else:
            self._load_from_checkpoint(str(checkpoint), self.model_wrapped)
            with moments_by_name(self):
                self._load_optimizer_and_scheduler(str(checkpoint))
        try:
            state = read_json(checkpoint / "trainer_state.json")
            return int(state["global_step"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"resume_from_checkpoint: {checkpoint} has no readable trainer_state.json") from error

    def dataflex_runner(self, checkpoint: Path | None) -> SignalRunner:
        """Return signals of the model as it is now, with the moments of a checkpoint that was taken."""
        setup, rate = self.dataflex_setup, float(self.args.learning_rate)
        runner = signal_runner(setup, loop_of(self, setup, 1), self.dataflex_seed)
        optimizer = runner.access.optimizer  # taken with the checkpoint where the model is partitioned
        if checkpoint is None or not self._dataflex_partitioned:
            optimizer = functools.cache(lambda: _optimizer(self, checkpoint))  # loaded when it is first asked for
        runner.access = replace(runner.access, optimizer=optimizer, learning_rate=lambda: rate)
        return runner


class _ScoringMixin(WorkflowMixin):
    """A trainer that scores every row instead of training."""

    dataflex_request: ClassVar[ScoreRequest]
    dataflex_also: ClassVar[Callable[[SignalRunner, RowSpace], Any]]
    dataflex_share: ClassVar[Callable[[ResumablePass], Share] | None]

    def dataflex_ask(self) -> None:
        """Score, and leave the workflow."""
        setup, request = self.dataflex_setup, self.dataflex_request
        space, rate = setup.rows, float(self.args.learning_rate)
        step = 0 if request.checkpoint is None else self.dataflex_take(request.checkpoint)
        runner = self.dataflex_runner(request.checkpoint)
        runner.share = type(self).dataflex_share
        runner.begin(step)
        ctx = context(space.domains, runner, seed=self.dataflex_seed, step=step, learning_rate=rate)
        ctx = replace(ctx, columns=space.columns, unit=setup.config.unit)
        budget = space.num_rows if request.budget is None else request.budget
        if budget > space.num_rows:
            raise DataError(f"--budget: {budget:,} rows of {space.num_rows:,}")
        columns: list[Column] = []
        for method in request.config.scorers:
            with preserve_state(runner.access.model):
                columns += ask(method, space.all_rows(), budget, ctx)
            logger.info("%s: %s rows scored", method.name, f"{space.num_rows:,}")
        comm.agree("scores", _digest(*(column.values for column in columns)))
        also = type(self).dataflex_also(runner, space)
        raise Scored(columns, model_identity(self.model), self.dataflex_seed, also)


def context(domains: Domains, signals: Any, *, seed: int, step: int = 0, learning_rate: float = 0.0) -> Context:
    """Return the context of one decision about all rows."""
    return Context(
        interval=Interval(index=0, kind="dynamic", start_step=step, stop_step=step + 1),
        seed=seed,
        domains=domains,
        signals=signals,
        total_sequences=len(domains.domain_of),
        learning_rate=learning_rate,
    )


def _optimizer(trainer: Any, checkpoint: Path | None) -> Any:
    """Return the checkpoint's optimizer."""
    if checkpoint is None:
        raise ConfigError(
            "a method asks for the moments of a run's optimizer, and without training there are none; set its "
            "'precondition=none', or name a checkpoint: 'resume_from_checkpoint=saves/run/checkpoint-100'"
        )
    optimizer = trainer.create_optimizer()
    state = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True)
    try:
        optimizer.load_state_dict(state)
    except ValueError as error:
        raise CheckpointError(
            f"resume_from_checkpoint: the optimizer of {checkpoint} is of other parameters: {error}"
        ) from error
    return optimizer


def run_score(request: ScoreRequest) -> Answer:
    """Score on this rank, write the table on rank 0, and return what to print ("" on other ranks)."""
    scored, table = scored_table(request)
    told = finished(request, scored.columns, table) if comm.rank() == 0 else Answer("", {})
    comm.barrier()
    return told


def finished(request: ScoreRequest, columns: Sequence[Column], table: ScoreTable) -> Answer:
    """Write the table, remove the unfinished passes, and return what to print."""
    write_scores(request.out, table)
    shutil.rmtree(request.work, ignore_errors=True)
    lines = [f"{table.num_rows:,} rows of {', '.join(table.datasets)} -> {request.out}"]
    return Answer("\n".join([*lines, *(column.tell() for column in columns)]), written(request.out, table, columns))


def written(out: Path, table: ScoreTable, columns: Sequence[Column]) -> dict[str, Any]:
    """Return what was written as JSON values."""
    told = {column.name: {"values": column.known, "told": column.told} for column in columns}
    return {"out": str(out), "rows": table.num_rows, "datasets": list(table.datasets), "columns": told}


def scored_table(
    request: ScoreRequest,
    also: Callable[[SignalRunner, RowSpace], Any] = lambda *_: None,
    share: Callable[[ResumablePass], Share] | None = None,
) -> tuple[Scored, ScoreTable]:
    """Score on this rank; columns and table are equal on every rank (collective).

    ``also`` is asked of the model after the scores; what it returns is the first value's ``also``. ``share`` shares
    passes among processes that are no ranks (``SignalRunner.share``).
    """
    shares = share if share is None else staticmethod(share)
    more = {"dataflex_request": request, "dataflex_also": staticmethod(also), "dataflex_share": shares}
    mixin = type("ScoringMixin", (_ScoringMixin,), more)
    scored, _, table = run_workflow(request, mixin, Scored)
    return scored, table


S = TypeVar("S", bound=Scored)


def run_workflow(request: ScoreRequest, mixin: type[WorkflowMixin], ended: type[S]) -> tuple[S, RowSpace, ScoreTable]:
    """Run LLaMA-Factory's workflow with ``mixin``, whose ``train`` raises ``ended``; return that, rows and table."""
    for note in request.notes:
        logger.info("%s", note)
    stage = str(request.lf.get("stage", "sft"))
    files = [file_records(source.path) for source in request.sources]  # before loading: what is scored is what it was
    with watched_origins(stage) as found:
        scored, setup = left_by(ended, request.config, request.lf, mixin)
    return scored, setup.rows, _table(request, setup.rows, found[: len(request.sources)], files, scored)


E = TypeVar("E", bound=Exception)


def left_by(ended: type[E], config: DynamicConfig, lf: dict[str, Any], mixin: type[WorkflowMixin]) -> tuple[E, Setup]:
    """Run LLaMA-Factory's workflow with ``mixin``, whose ``train`` raises ``ended``; return that and the set-up."""
    tuner = importlib.import_module("llamafactory.train.tuner")
    with loads_told(str(lf.get("stage", "sft"))), swapped(config, lf, mixin) as setup:
        try:
            tuner.run_exp(dict(lf))
        except ended as done:
            return done, setup
    raise AssertionError("LLaMA-Factory's workflow ended without training")


def _checkpoint_told(checkpoints: tuple[Path, ...]) -> Any:
    """Return one checkpoint as text, several as a list, none as None."""
    told = [str(one) for one in checkpoints]
    return told if len(told) > 1 else next(iter(told), None)


def _table(
    request: ScoreRequest, space: RowSpace, origins: list[Origin], files: list[list[FileRecord]], scored: Scored
) -> ScoreTable:
    names = [source.name for source in request.sources]
    sizes = [space.sources[name] for name in names]
    sources = []
    for name, size, origin, records in zip(names, sizes, origins, files, strict=True):
        if len(origin.kept) != size:
            raise DataError(
                f"{name}: {len(origin.kept):,} rows of its files were to become {size:,} training rows, so that scores "
                "cannot be given back to rows of the files"
            )
        counts = {"rows": len(origin.kept), "rows_read": len(origin.raw), "entry": request.entries.get(name)}
        sources.append({"name": name, **counts, "files": [asdict(record) for record in records]})
    ours = ("seed", "domain_column", "domain_path", "plugins")
    provenance = {
        "config": {key: value for key, value in request.lf.items() if key != "output_dir"},
        "dynamic": {key: plain(getattr(request.config, key)) for key in ours},
        "methods": [plain(method) for method in request.config.scorers],
        "budget": request.budget,
        "seed": scored.seed,
        "model": {
            "name_or_path": request.lf.get("model_name_or_path"),
            "adapter": request.lf.get("adapter_name_or_path"),
            "checkpoint": _checkpoint_told(request.checkpoints),
            "identity": scored.model,
        },
        "data": {
            "fingerprint": space.fingerprint,
            "dataset_dir": request.lf.get("dataset_dir", "data"),
            "sources": sources,
        },
        "targets": {name: target.identity for name, target in space.targets.items()},
        "columns": {column.name: column.told for column in scored.columns},
        "versions": versions(),
    }
    return ScoreTable(
        datasets=tuple(names),
        dataset_of=np.repeat(np.arange(len(names), dtype=np.int64), sizes),
        domains=space.domains.names,
        domain_of=np.asarray(space.domains.domain_of, dtype=np.int64),
        position=np.concatenate([np.zeros(0, dtype=np.int64), *(origin.kept for origin in origins)]),
        tokens=space.lengths,
        supervised_tokens=space.supervised,
        columns={column.name: column.values for column in scored.columns},
        provenance=redacted(json.loads(json.dumps(provenance, default=str))),
    )
