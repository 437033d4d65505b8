"""Runs ``dataflex score``: LLaMA-Factory's own data pipeline and model, and methods asked instead of a training run.

LLaMA-Factory's workflow builds tokenizer, data, model and trainer as for training; our trainer's ``train``
scores and stops there. Passes write into a store as they go, so that a killed run goes on where it was.
Upstream names relied upon: those of ``llamafactory.trainer`` and ``bridge``; of the Trainer ``train``,
``create_optimizer`` and ``_load_from_checkpoint``.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy as np
import torch
from numpy.typing import NDArray

from dataflex import comm
from dataflex.config.mappings import as_mapping, plain
from dataflex.config.schema import MethodConfig
from dataflex.errors import CheckpointError, ComponentError, ConfigError, DataError, DataFlexError
from dataflex.llamafactory.loading import Origin, watched_origins
from dataflex.llamafactory.loop import loop_of
from dataflex.llamafactory.swap import swapped
from dataflex.method import Context, Rows, RunFacts, Selection, Selector, Signals
from dataflex.offline.files import file_records
from dataflex.offline.request import ScoreRequest
from dataflex.offline.table import ScoreTable, write_scores
from dataflex.plan.schedule import Interval
from dataflex.plan.validate import check_selection
from dataflex.printable import redacted
from dataflex.signals.identity import model_identity
from dataflex.signals.kinds import GradientScores, Signal
from dataflex.signals.runner import SignalRunner
from dataflex.signals.sweep import preserve_state
from dataflex.train.row_space import RowSpace
from dataflex.train.session import Setup, refuse_unsupported, signal_runner
from dataflex.version import versions

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column about every row.

    Attributes:
        name: ``METHOD`` (its scores), ``METHOD/TARGET`` (scores for one target) or ``METHOD.rank``.
        values: float [N], NaN where there is none; for ranks int64 [N], -1 where the row was not chosen.
        told: What it holds, in words.
    """

    name: str
    values: NDArray[Any]
    told: str


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
        digest = hashlib.blake2b(np.ascontiguousarray(rows).tobytes(), digest_size=16).hexdigest()
        plain = replace(signal, targets=())
        if any((digest, plain, name) not in self._known for name in signal.targets):
            scores = self._signals(signal, rows)
            self._known.update({(digest, plain, name): scores[:, t] for t, name in enumerate(signal.targets)})
        return np.stack([self._known[digest, plain, name] for name in signal.targets], axis=1)


def ask(method: MethodConfig, pool: Rows, budget: int, ctx: Context) -> list[Column]:
    """Return what a selector says about every row of ``pool`` (collective).

    Args:
        method: The selector.
        pool: Row ids [N].
        budget: Rows that it is asked to choose, at most N.
        ctx: Context; its targets are set here.

    Returns:
        Scores where the method gives any, for each target too where there are several; and the order of
        preference.

    Raises:
        ComponentError: The method broke its contract.
    """
    name = method.name
    ctx = replace(ctx, targets=method.targets, signals=cast(Signals, _Remembering(ctx.signals)))
    chosen = _select(method, pool, budget, ctx)
    columns: list[Column] = []
    towards = f" towards {', '.join(method.targets)}" if method.targets else ""
    if chosen.scores is None:
        logger.info("%s gives no scores, only an order: column %s.rank", name, name)
    else:
        columns.append(Column(name=name, values=_floats(chosen.scores), told=f"scores of {name}{towards}"))
        _warn_about(columns[0])
        if len(method.targets) > 1:
            columns += _by_target(method, pool, budget, ctx)
    ranks = np.full(len(pool), -1, dtype=np.int64)
    places = np.searchsorted(pool, chosen.rows)
    # A method that repeats rows counts with the first place.
    ranks[places[::-1]] = np.arange(len(places) - 1, -1, -1)
    told = f"order of preference of {name}{towards}, 0 first, among {budget:,} rows asked for ({chosen.reason})"
    columns.append(Column(name=f"{name}.rank", values=ranks, told=told))
    return columns


def _select(method: MethodConfig, pool: Rows, budget: int, ctx: Context) -> Selection:
    selector = method.build()
    if not isinstance(selector, Selector):
        raise ComponentError(f"{method.name} is no selector")
    selection = selector.select(pool, min(budget, len(pool)), ctx)
    check_selection(selector, selection, pool, budget)
    return selection


def _by_target(method: MethodConfig, pool: Rows, budget: int, ctx: Context) -> list[Column]:
    columns = []
    for target in method.targets:
        try:
            one = _select(replace(method, targets=(target,)), pool, budget, replace(ctx, targets=(target,)))
        except DataFlexError as error:  # a method may need several tasks
            logger.info("%s gives no scores for %s alone: %s", method.name, target, error)
            continue
        if one.scores is not None:
            told = f"scores of {method.name} towards {target}"
            columns.append(Column(name=f"{method.name}/{target}", values=_floats(one.scores), told=told))
    return columns


def _floats(scores: NDArray[Any]) -> NDArray[np.floating]:
    values = np.asarray(scores)
    return values if values.dtype == np.float32 else values.astype(np.float64)


def _warn_about(column: Column) -> None:
    finite = column.values[np.isfinite(column.values)]
    if not len(finite):
        logger.warning("%s: no row has a score", column.name)
    elif len(finite) > 1 and (finite == finite[0]).all():
        logger.warning("%s: all %d scores are equal (%g), so they say nothing", column.name, len(finite), finite[0])


if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object


class _Scored(Exception):
    def __init__(self, columns: list[Column], model: str, seed: int) -> None:
        super().__init__("scored")
        self.columns, self.model, self.seed = columns, model, seed


class _ScoringMixin(_Trainer):
    """A trainer that scores every row instead of training."""

    dataflex_setup: ClassVar[Setup]
    dataflex_request: ClassVar[ScoreRequest]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse_unsupported(loop_of(self, self.dataflex_setup, 1), self.dataflex_setup.config, RunFacts())

    def train(self, *_args: Any, **_kwargs: Any) -> Any:
        """Score, and leave the workflow."""
        setup, request = self.dataflex_setup, self.dataflex_request
        step = 0 if request.checkpoint is None else _take_checkpoint(self, request.checkpoint)
        seed = self.args.seed if setup.config.seed is None else setup.config.seed
        runner = signal_runner(setup, loop_of(self, setup, 1), seed)
        optimizer = _optimizer(self, request.checkpoint)
        rate = float(self.args.learning_rate)
        runner.access = replace(runner.access, optimizer=optimizer, learning_rate=lambda: rate)
        columns = _columns(runner, setup, request, seed, step)
        raise _Scored(columns, model_identity(self.model), seed)


def _take_checkpoint(trainer: Any, checkpoint: Path) -> int:
    """Load a checkpoint's weights as a resumed run would; return its optimizer step."""
    trainer._load_from_checkpoint(str(checkpoint))
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        return int(state["global_step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"resume_from_checkpoint: {checkpoint} has no readable trainer_state.json") from error


def _optimizer(trainer: Any, checkpoint: Path | None) -> Callable[[], Any]:
    """Return what gives the checkpoint's optimizer, loaded when it is first asked for."""
    loaded: list[Any] = []

    def give() -> Any:
        if checkpoint is None:
            raise ConfigError(
                "a method asks for the moments of a run's optimizer, and without training there are none; set its "
                "'precondition=none', or name a checkpoint: 'resume_from_checkpoint=saves/run/checkpoint-100'"
            )
        if not loaded:
            optimizer = trainer.create_optimizer()
            state = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True)
            try:
                optimizer.load_state_dict(state)
            except ValueError as error:
                raise CheckpointError(
                    f"resume_from_checkpoint: the optimizer of {checkpoint} is of other parameters: {error}"
                ) from error
            loaded.append(optimizer)
        return loaded[0]

    return give


def _columns(runner: SignalRunner, setup: Setup, request: ScoreRequest, seed: int, step: int) -> list[Column]:
    space = setup.rows
    runner.begin(step)
    ctx = Context(
        interval=Interval(index=0, kind="dynamic", start_step=step, stop_step=step + 1),
        seed=seed,
        domains=space.domains,
        signals=runner,
        columns=space.columns,
        total_sequences=space.num_rows,
        unit=setup.config.unit,
        learning_rate=runner.access.learning_rate(),
    )
    pool, columns = space.all_rows(), []
    budget = space.num_rows if request.budget is None else request.budget
    if budget > space.num_rows:
        raise DataError(f"--budget: {budget:,} rows of {space.num_rows:,}")
    for method in request.config.scorers:
        with preserve_state(runner.access.model):
            columns += ask(method, pool, budget, ctx)
        logger.info("%s: %s rows scored", method.name, f"{space.num_rows:,}")
    digest = hashlib.blake2b(digest_size=16)
    for column in columns:
        digest.update(np.ascontiguousarray(column.values).tobytes())
    comm.agree("scores", digest.hexdigest())
    return columns


def run_score(request: ScoreRequest) -> str:
    """Score on this rank, write the table on rank 0, and return what to print ("" on other ranks).

    Raises:
        DataFlexError: Anything that the user can mend.
    """
    for note in request.notes:
        logger.info("%s", note)
    stage = str(request.lf.get("stage", "sft"))
    mixin = type("ScoringMixin", (_ScoringMixin,), {"dataflex_request": request})
    tuner = importlib.import_module("llamafactory.train.tuner")
    records = [file_records(source.path) for source in request.sources]  # before loading: what is scored is what it was
    with watched_origins(stage) as found, swapped(request.config, request.lf, mixin) as setup:
        try:
            tuner.run_exp(dict(request.lf))
        except _Scored as done:
            scored = done
    rows = setup.rows
    table = _table(request, rows, found[: len(request.sources)], records, scored)
    text = ""
    if comm.rank() == 0:
        write_scores(request.out, table)
        shutil.rmtree(request.work, ignore_errors=True)
        text = _told(request, table, scored.columns)
    comm.barrier()
    return text


def _table(
    request: ScoreRequest, space: RowSpace, origins: list[Origin], records: list[Any], scored: _Scored
) -> ScoreTable:
    names = [source.name for source in request.sources]
    sizes = [space.sources[name] for name in names]
    for name, size, origin in zip(names, sizes, origins, strict=True):
        if len(origin.kept) != size:
            raise DataError(
                f"{name}: {len(origin.kept):,} rows of its files were to become {size:,} training rows, so that scores "
                "cannot be given back to rows of the files"
            )
    parts = zip(names, origins, records, strict=True)
    provenance = {
        "config": {key: value for key, value in request.lf.items() if key not in ("output_dir",)},
        "dynamic": {
            key: value
            for key, value in as_mapping(request.config).items()
            if key in ("seed", "domain_column", "domain_path", "plugins")
        },
        "methods": [plain(method) for method in request.config.scorers],
        "budget": request.budget,
        "seed": scored.seed,
        "model": {
            "name_or_path": request.lf.get("model_name_or_path"),
            "adapter": request.lf.get("adapter_name_or_path"),
            "checkpoint": None if request.checkpoint is None else str(request.checkpoint),
            "identity": scored.model,
        },
        "data": {
            "fingerprint": space.fingerprint,
            "dataset_dir": request.lf.get("dataset_dir", "data"),
            "sources": [
                {
                    "name": name,
                    "rows": len(origin.kept),
                    "rows_read": origin.num_rows,
                    "entry": request.entries.get(name),
                    "files": [asdict(record) for record in files],
                }
                for name, origin, files in parts
            ],
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


def _told(request: ScoreRequest, table: ScoreTable, columns: list[Column]) -> str:
    lines = [f"{table.num_rows:,} rows of {', '.join(table.datasets)} -> {request.out}"]
    for column in columns:
        there = int((column.values >= 0).sum() if column.name.endswith(".rank") else np.isfinite(column.values).sum())
        lines.append(f"  {column.name}: {there:,} values; {column.told}")
    return "\n".join(lines)
