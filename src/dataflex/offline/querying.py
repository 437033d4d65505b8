"""Answers a query: target gradients by LLaMA-Factory's own pipeline, compared with the rows of an index.

The model is asked about the targets, and about a sample of the rows, whose exact scores say how far those of the index
can be trusted.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import load_from_disk
from numpy.typing import NDArray

from dataflex import comm
from dataflex.config.data import target_data_sets
from dataflex.config.schema import MethodConfig
from dataflex.errors import DataError, UnsupportedError, without_loss
from dataflex.method import Rows
from dataflex.offline.index import FINGERPRINTS, SAMPLE, Agreement, Index, agreement, told_agreement, write_bergson
from dataflex.offline.query import QueryRequest
from dataflex.offline.scoring import Column, WorkflowMixin, ask, context, left_by, written
from dataflex.plan.domains import Domains
from dataflex.printable import Answer, redacted
from dataflex.score_table import ScoreTable, write_scores
from dataflex.selectors.influence import Less, lr_weighted
from dataflex.signals.gradients.projection import gradients, products, second_moment, whitened_cosines, whitening
from dataflex.signals.gradients.scorers import GradientScorers
from dataflex.signals.kinds import GradientScores, Signal
from dataflex.signals.model_access import Corpus
from dataflex.signals.runner import SignalRunner
from dataflex.signals.specs import GradientSpec
from dataflex.signals.sweep import row_pass
from dataflex.signals.texts import row_tokens
from dataflex.train.row_space import RowSpace, measure, row_fingerprints, target_corpus

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What the model says about M targets.

    Attributes:
        aims: By checkpoint, the targets' projected vectors [M, k]; with whitening, by target those of its rows [n, k].
        exact: By checkpoint, exact scores of the sample [n, M]; empty without a sample.
        targets: Tokenized targets by name.
    """

    aims: tuple[Sequence[NDArray[np.float32]] | NDArray[np.float32], ...]
    exact: tuple[NDArray[np.float32], ...]
    targets: Mapping[str, Corpus]


def scores_of(
    index: Index, aims: Sequence[Any], rows: Rows | None = None, whiten: float | None = None
) -> NDArray[np.float32]:
    """Return the scores of an index's rows towards targets [N, M], averaged over checkpoints by learning rate.

    ``aims`` are as in ``Answers``; ``rows`` are some rows instead of all; ``whiten`` is the weight of the second moment
    of a target's own rows in what gradients are whitened by.
    """
    normalize, found = bool(index.params["normalize"]), []
    for part, aim in zip(index.parts, aims, strict=True):
        kept = index.rows(part)
        kept = kept if rows is None else kept[rows]
        found.append(products(kept, aim, normalize=normalize) if whiten is None else _whitened(kept, aim, whiten))
    return lr_weighted(found, [part.rate for part in index.parts]).astype(np.float32)


def _whitened(rows: NDArray[np.void], targets: Sequence[NDArray[np.float32]], weight: float) -> NDArray[np.float32]:
    """Return the mean cosines of rows with the rows of each target [N, M], whitened for each target by itself."""
    pool, least = second_moment(rows)
    found = []
    for target in targets:
        own = target.T.astype(np.float64) @ target / len(target)
        turn = whitening(weight * own + (1 - weight) * pool, (1 - weight) * least)
        found.append(whitened_cosines(rows, target, turn))
    return np.stack(found, axis=1)


class _Answered(Exception):
    def __init__(self, answers: Answers) -> None:
        super().__init__("answered")
        self.answers = answers


class _QueryMixin(WorkflowMixin):
    """A trainer that asks the model about targets instead of training."""

    dataflex_request: ClassVar[QueryRequest]

    def dataflex_ask(self) -> None:
        """Ask under every checkpoint, and leave the workflow."""
        request = self.dataflex_request
        index, names = request.index, request.method.targets
        corpora = targets_of(self.dataflex_setup.rows, names)
        sample: Any = load_from_disk(str(index.folder / SAMPLE)).select(range(len(index.sample)))
        measures = measure(sample)
        pool = Corpus(dataset=sample, lengths=measures.lengths, identity=measures.fingerprint)
        asked = _asked(request)
        aims, exact = [], []
        for part in index.parts:
            checkpoint = None if part.checkpoint is None else Path(part.checkpoint)
            step = 0 if checkpoint is None else self.dataflex_take(checkpoint)
            runner = self.dataflex_runner(checkpoint)
            runner.access = replace(runner.access, train=pool, targets=corpora)
            if part.model and part.model != runner.cache.model_identity():
                raise DataError(
                    f"{index.folder}: was made with other weights or settings than those of "
                    f"{checkpoint or request.lf['model_name_or_path']} now; write it again, or restore them"
                )
            runner.begin(step)
            options = _params(request).options(sketch_seed=index.seed)
            ask = _aims if request.whiten is None else _rows
            aims.append(ask(runner, index, part.projection, options, names))
            if len(asked):
                exact.append(runner(GradientScores(targets=names, **{**options, "sketch_size": None}), asked))
        raise _Answered(Answers(aims=tuple(aims), exact=tuple(exact), targets=corpora))


def _asked(request: QueryRequest) -> Rows:
    """Return which rows of the index's sample are asked about, spread over all of it."""
    return np.linspace(0, len(request.index.sample) - 1, request.sample).round().astype(np.int64)


def _params(request: QueryRequest) -> Less.Params:
    params = request.method.params
    assert isinstance(params, Less.Params)
    return params


def _aims(
    runner: SignalRunner, index: Index, projection: str, options: Mapping[str, Any], names: tuple[str, ...]
) -> NDArray[np.float32]:
    """Return the targets' vectors as the index's rows are kept: projected [M, k] (collective)."""
    signal = GradientScores(targets=names, **{**options, "sketch_size": None})
    scorers = GradientScorers(runner.access, signal)
    with torch.no_grad():
        vectors = signal.vectors(scorers, runner.access)
        wide = scorers.wide_sketch(size=index.wide, seed=index.seed).of(vectors).cpu()
        if signal.normalize and not signal.mean_of_cosines:
            wide = wide / vectors.norms().cpu().clamp_min(1e-30).unsqueeze(1)
    return wide.numpy() @ index.array(projection).astype(np.float32)


def _rows(
    runner: SignalRunner, index: Index, projection: str, options: Mapping[str, Any], names: tuple[str, ...]
) -> list[NDArray[np.float32]]:
    """Return the rows of each target, projected as the index's rows are, Adam included [n, k] (collective).

    Rows without a loss are left out; DataError where a target has no others.
    """
    access, found = runner.access, []
    scorers = GradientScorers(access, GradientSpec(**{**options, "sketch_size": None}))
    score = scorers.of(scorers.wide_sketch(size=index.wide, seed=index.seed))
    matrix = torch.from_numpy(index.array(projection).astype(np.float32)).to(scorers.engine.device)
    with torch.no_grad(), scorers.engine.observing():
        for name in names:
            sweep = access.target_sweep(name)
            rows = row_pass(sweep, lambda batch: score(batch) @ matrix, (matrix.shape[1],))
            known = np.isfinite(rows).all(axis=1)
            if not known.any():
                responses = row_tokens(access.corpus(name).dataset, sweep.rows, "completion")
                raise without_loss(f"target {name!r}", labelled=any(map(len, responses)))
            found.append(rows[known])
    return found


def targets_of(space: RowSpace, names: tuple[str, ...]) -> dict[str, Corpus]:
    """Return the rows of each target, of a row space whose data sets are those of all targets, one after the other."""
    starts, start = {}, 0
    for name, size in space.sources.items():
        starts[name] = range(start, start + size)
        start += size
    corpora = {}
    for target in names:
        rows = [row for name in target_data_sets(target) for row in starts[name]]
        corpora[target] = target_corpus(target, space.dataset.select(rows))
    return corpora


class _Indexed:
    """Answers methods from an index: gradient scores towards the targets that were asked about, and nothing else."""

    def __init__(self, targets: tuple[str, ...], scores: NDArray[np.float32]) -> None:
        self._places = {name: place for place, name in enumerate(targets)}
        self._scores = scores

    def __call__(self, signal: Signal, rows: Rows, *, target: str | None = None) -> NDArray[np.float32]:
        """Return scores [len(rows), targets of the signal]."""
        if not isinstance(signal, GradientScores) or target is not None:
            raise UnsupportedError(f"an index answers gradient scores of its rows, and was asked for {signal.name}")
        return self._scores[rows][:, [self._places[name] for name in signal.targets]]


def run_query(request: QueryRequest) -> Answer:
    """Ask the model on this rank, write the scores on rank 0, and return what to print ("" on other ranks)."""
    mixin = type("QueryMixin", (_QueryMixin,), {"dataflex_request": request})
    answers = left_by(_Answered, request.config, request.lf, mixin)[0].answers
    lines, values = [], {}
    if comm.rank() == 0:
        index, names = request.index, request.method.targets
        table, began = index.table(), time.perf_counter()
        scores = scores_of(index, answers.aims, whiten=request.whiten)
        columns = columns_of(request.method, table, scores, seed=index.seed)
        seconds = time.perf_counter() - began
        found = _agreements(request, answers)
        _tell_leaks(index, answers.targets)
        if request.bergson is not None:
            _write_gradients(request.bergson, index, np.asarray(answers.aims[0]))
        write_scores(request.out, _with_columns(request, table, columns, answers, found))
        shutil.rmtree(request.work, ignore_errors=True)
        told = f"{table.num_rows:,} rows of {', '.join(table.datasets)} -> {request.out}"
        lines.append(f"{told} ({len(names)} target(s) in {seconds:.1f} s)")
        lines += [column.tell() for column in columns]
        for name in names if answers.exact else ():
            one = found[name]
            lines.append(f"  {name}: {'too few rows of the sample have a score' if one is None else one.tell()}")
        values = {**written(request.out, table, columns), "agreement": told_agreement(found, names)}
    comm.barrier()
    return Answer("\n".join(lines), values)


def _write_gradients(folder: Path, index: Index, aims: NDArray[np.float32]) -> None:
    """Write the rows' and the targets' projected gradients, whose products are the scores, as bergson reads them."""
    rows, size = index.rows(index.parts[0]), aims.shape[1]
    write_bergson(folder / "rows", gradients(rows, normalize=bool(index.params["normalize"])), len(rows), size)
    write_bergson(folder / "targets", [aims], len(aims), size)


def columns_of(method: MethodConfig, table: ScoreTable, scores: NDArray[np.float32], *, seed: int) -> list[Column]:
    """Return what LESS makes of scores towards its targets [N, M]: together, by target, the order of preference."""
    domains = Domains(names=table.domains, domain_of=np.asarray(table.domain_of, dtype=np.int32), lengths=table.tokens)
    ctx = context(domains, _Indexed(method.targets, scores), seed=seed)
    return ask(method, np.arange(table.num_rows, dtype=np.int64), table.num_rows, ctx)


def _agreements(request: QueryRequest, answers: Answers) -> dict[str, Agreement | None]:
    """Return by target how scores of the index agree with exact ones on the sample."""
    if not answers.exact:
        return {}
    index = request.index
    found = scores_of(index, answers.aims, index.sample[_asked(request)])
    exact = lr_weighted(list(answers.exact), [part.rate for part in index.parts])
    return {name: agreement(exact[:, t], found[:, t]) for t, name in enumerate(request.method.targets)}


def _tell_leaks(index: Index, targets: Mapping[str, Corpus]) -> None:
    pool = np.load(index.folder / FINGERPRINTS, allow_pickle=False)
    for name, corpus in targets.items():
        own = row_fingerprints(corpus.dataset)
        if count := int(np.isin(own, pool).sum()):
            logger.warning("target %r: %d of its %d rows are also rows of the index", name, count, len(own))


def _with_columns(
    request: QueryRequest,
    table: ScoreTable,
    columns: list[Column],
    answers: Answers,
    found: Mapping[str, Agreement | None],
) -> ScoreTable:
    """Return the index's rows with the columns, and where they come from."""
    names = request.method.targets
    provenance = {
        **table.provenance,
        "methods": [{**request.index.params, "targets": list(names)}],
        "targets": {name: answers.targets[name].identity for name in names},
        "columns": {column.name: column.told for column in columns},
        "index": {
            "folder": str(request.index.folder),
            "agreement": told_agreement(found, names),
            "whiten": request.whiten,
        },
    }
    told = redacted(json.loads(json.dumps(provenance, default=str)))
    return replace(table, columns={column.name: column.values for column in columns}, provenance=told)
