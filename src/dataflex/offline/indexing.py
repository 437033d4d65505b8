"""Writes an index: sketches of the rows' gradients, by checkpoint, through LLaMA-Factory's own pipeline.

A sample of the rows is sketched widely first and says what all rows are projected by; sketches are recorded as they
come, so that a killed run goes on where it was.
"""

from __future__ import annotations

import functools
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from dataflex import comm
from dataflex.config.mappings import plain
from dataflex.errors import CheckpointError
from dataflex.method import Rows
from dataflex.offline.index import FINGERPRINTS, ROWS, SAMPLE, STORE, TOLD, Index, Part, write_told
from dataflex.offline.request import ScoreRequest
from dataflex.offline.scoring import Scored, WorkflowMixin, run_workflow, written
from dataflex.printable import Answer, without_secrets
from dataflex.rng import uniforms
from dataflex.score_table import write_scores
from dataflex.signals.gradients.consumers import Sketch
from dataflex.signals.gradients.projection import fitted, packed, row_type
from dataflex.signals.gradients.scorers import GradientScorers
from dataflex.signals.model_parts import is_partitioned
from dataflex.signals.runner import rows_digest
from dataflex.signals.specs import GradientSpec, InfluenceOptions, Precision
from dataflex.signals.store import ArrayStore, CacheKey, ResumablePass
from dataflex.signals.sweep import Sweep
from dataflex.state import blake2b, replacing
from dataflex.train.row_space import RowSpace, row_fingerprints

logger = logging.getLogger(__name__)

WIDE = 2**16
"""Numbers of a wide sketch: its error in a cosine is about 1 / sqrt(WIDE)."""
FITTED = 2048
"""Most rows that are sketched widely: four for each number kept, and never fewer than numbers kept."""
SAMPLE_ROWS = 256
"""Rows that are kept for exact scores."""
_RECORDED = 256


def drawn(supervised: NDArray[np.int64], size: int, seed: int) -> tuple[Rows, Rows]:
    """Return the rows of the sample, and the rows that the projection is fitted to, both ascending.

    They are apart where there are rows enough for both, so that the sample is like rows that nothing was fitted to.
    ``supervised`` [N] are the rows' supervised tokens, ``size`` the numbers kept.
    """
    rows = np.flatnonzero(supervised > 0).astype(np.int64)
    order = rows[np.argsort(uniforms(seed, "index sample", 0, rows), kind="stable")]
    wanted = max(size, min(4 * size, FITTED))
    first = min(SAMPLE_ROWS, max(0, len(rows) - wanted))
    return np.sort(order[:SAMPLE_ROWS]), np.sort(order[first : first + wanted])


_Wide = Callable[[], NDArray[np.float32]]
"""Gives the wide sketches of the fitted rows, and in the last column their norms [F, W + 1] (collective)."""
_Take = Callable[[Rows, torch.Tensor, torch.Tensor], None]
"""Takes places of rows [b], their wide sketches [b, W] and norms [b]."""


@dataclass(frozen=True, kw_only=True)
class _Sketching:
    """Sketches of rows' gradients under the model as it is now.

    Attributes:
        scorers: The gradients.
        sketch: The wide sketch.
        size: Numbers kept.
        precision: How they are kept.
        seed: Of sketches and sample.
        store: Where arrays are written.
        key: Method and further parameters to the key of an array.
        sweep: Rows to a pass over them.
    """

    scorers: GradientScorers
    sketch: Sketch
    size: int
    precision: Precision
    seed: int
    store: ArrayStore
    key: Callable[..., CacheKey]
    sweep: Callable[[Rows], Sweep]

    def run(self, rows: Rows, done: NDArray[np.bool_], take: _Take) -> None:
        """Sketch rows widely, but for those done, and hand ``take`` their places among ``rows`` (collective)."""
        engine, precondition = self.scorers.engine, self.scorers.precondition()
        with torch.no_grad(), engine.observing():
            for turn in self.sweep(rows).turns(done):
                found = engine.run(turn.batch, [self.sketch], precondition=precondition)
                if turn.mine:
                    take(turn.positions, found["sketch"], found["sketch.norms"])

    def wide(self, rows: Rows) -> NDArray[np.float32]:
        """Return wide sketches of rows, and in the last column their norms [F, W + 1], memory-mapped (collective)."""
        key = self.key("index sample", rows=rows_digest(rows))
        work = ResumablePass(self.store, key, shape=(len(rows), self.sketch.size + 1), dtype=np.float32)

        def take(positions: Rows, sketches: torch.Tensor, norms: torch.Tensor) -> None:
            work.record(positions, torch.cat([sketches, norms.unsqueeze(1)], dim=1).float().cpu().numpy())

        if not work.complete:
            self.run(rows, work.done_at_start, take)
        return work.finish()

    def projection(self, wide: _Wide, rows: Rows) -> tuple[CacheKey, NDArray[np.float32]]:
        """Return what wide sketches are projected by [W, k], fitted on rank 0 and kept in 16 bits (collective)."""
        key = self.key("index projection", rows=rows_digest(rows), size=self.size)
        what = "projection of the index"
        if not comm.on_one_rank(what, lambda: self.store.get(key) is not None, CheckpointError):
            sketches = wide()

            def fit() -> None:
                matrix = fitted(np.asarray(sketches[:, :-1]), self.size, self.seed)
                with self.store.create(key, shape=matrix.shape, dtype=np.float16) as array:
                    array[:] = matrix

            comm.on_one_rank(what, fit, CheckpointError)
        matrix = self.store.get(key)
        if matrix is None:
            raise CheckpointError(f"{self.store.directory}: a rank does not see the folder; all ranks must share it")
        return key, matrix.astype(np.float32)

    def rows(self, matrix: NDArray[np.float32], name: str, num_rows: int, known: Rows, wide: _Wide) -> CacheKey:
        """Sketch all rows but those ``known``, whose wide sketches are there; return the array's key (collective)."""
        kind = row_type(self.size, self.precision)
        key = self.key("index rows", projection=name, precision=self.precision)
        work = ResumablePass(self.store, key, shape=(num_rows,), dtype=kind)
        if work.complete:
            work.finish()
            return key
        done, sketches = work.done_at_start, wide()
        if comm.rank() == 0:
            on_cpu = torch.from_numpy(matrix)
            for start in range(0, len(known), _RECORDED):
                part = known[start : start + _RECORDED]
                if not done[part].all():
                    values = torch.from_numpy(np.array(sketches[start : start + _RECORDED]))
                    work.record(part, packed(values[:, :-1], values[:, -1], on_cpu, kind))
        rest = np.setdiff1d(np.arange(num_rows, dtype=np.int64), known)
        on_device = torch.from_numpy(matrix).to(self.scorers.engine.device)

        def take(positions: Rows, found: torch.Tensor, norms: torch.Tensor) -> None:
            work.record(rest[positions], packed(found, norms, on_device, kind))

        self.run(rest, done[rest], take)
        work.finish()
        return key


class _Indexed(Scored):
    """Leaves the workflow with the parts of the index and its sample."""

    parts: tuple[Part, ...]
    sample: Rows


class _IndexingMixin(WorkflowMixin):
    """A trainer that sketches every row's gradient instead of training."""

    dataflex_request: ClassVar[ScoreRequest]

    def dataflex_ask(self) -> None:
        """Sketch under every checkpoint, and leave the workflow."""
        request = self.dataflex_request
        params = request.config.scorers[0].params
        assert isinstance(params, InfluenceOptions)
        assert params.sketch_size is not None
        sample, fit = drawn(self.dataflex_setup.rows.supervised, params.sketch_size, self.dataflex_seed)
        parts = [self._part(checkpoint, params, fit) for checkpoint in request.checkpoints or (None,)]
        ended = _Indexed([], parts[0].model, self.dataflex_seed)
        ended.parts, ended.sample = tuple(parts), sample
        raise ended

    def _part(self, checkpoint: Path | None, params: InfluenceOptions, fit: Rows) -> Part:
        request, space = self.dataflex_request, self.dataflex_setup.rows
        sketching, model, rate = self._sketching(checkpoint, params)
        wide = functools.cache(lambda: sketching.wide(fit))  # not asked for where all is there
        name, matrix = sketching.projection(wide, fit)
        rows = sketching.rows(matrix, name.name, space.num_rows, fit, wide)
        logger.info("%s: %s rows sketched", checkpoint or request.lf["model_name_or_path"], f"{space.num_rows:,}")
        where = None if checkpoint is None else str(checkpoint)
        return Part(checkpoint=where, rate=rate, model=model, rows=rows.name, projection=name.name)

    def _sketching(self, checkpoint: Path | None, params: InfluenceOptions) -> tuple[_Sketching, str, float]:
        request, space, seed = self.dataflex_request, self.dataflex_setup.rows, self.dataflex_seed
        size, rate = params.sketch_size, 0.0
        assert size is not None
        assert request.precision is not None
        if checkpoint is not None:
            self.dataflex_take(checkpoint)
            rate = rate_of(checkpoint)
        runner = self.dataflex_runner(checkpoint)
        access, cache = runner.access, runner.cache
        scorers = GradientScorers(access, GradientSpec(**params.options(sketch_seed=seed)))
        model = cache.model_identity()
        options = {**params.options(), "wide": WIDE, "seed": seed, "moments": scorers.moments_identity()}
        del options["sketch_size"], options["mean_of_cosines"]
        options.pop("normalize", None)
        options |= {"token_budget": access.gradient_budget, **cache.surroundings("")}

        def key(what: str, **more: Any) -> CacheKey:
            return CacheKey(model=model, data=space.fingerprint, method=what, parameters={**options, **more})

        sketching = _Sketching(
            scorers=scorers,
            sketch=scorers.wide_sketch(size=WIDE, seed=seed),
            size=size,
            precision=request.precision,
            seed=seed,
            store=ArrayStore(request.out / STORE),
            key=key,
            sweep=functools.partial(access.trained, target=None, what="gradients"),
        )
        return sketching, "" if is_partitioned(access.model) else model, rate


def rate_of(checkpoint: Path) -> float:
    """Return the learning rate of a checkpoint's next step, its weight among several (LESS, equation 2)."""
    try:
        state = torch.load(checkpoint / "scheduler.pt", map_location="cpu", weights_only=True)
        return float(state["_last_lr"][0])
    except (OSError, RuntimeError, KeyError, IndexError, TypeError) as error:
        raise CheckpointError(f"resume_from_checkpoint: {checkpoint} has no readable scheduler.pt") from error


def run_index(request: ScoreRequest) -> Answer:
    """Sketch on this rank, write the index on rank 0, and return what to print ("" on other ranks)."""
    mixin = type("IndexingMixin", (_IndexingMixin,), {"dataflex_request": request})
    ended, space, table = run_workflow(request, mixin, _Indexed)
    lines, values = [], {}
    if comm.rank() == 0:
        folder, method = request.out, request.config.scorers[0]
        params = plain(method)
        index = Index(
            folder=folder,
            lf=without_secrets({key: value for key, value in request.lf.items() if key != "output_dir"}),
            params=params,
            seed=ended.seed,
            wide=WIDE,
            parts=ended.parts,
            sample=ended.sample,
        )
        (folder / TOLD).unlink(missing_ok=True)  # until all of it is of one run
        write_scores(folder / ROWS, table)
        _write_sample(space, ended.sample, folder)
        with replacing(folder / FINGERPRINTS, None) as file:
            np.save(file, row_fingerprints(space.dataset))
        write_told(index)
        _clear(index)
        shutil.rmtree(request.work, ignore_errors=True)
        kept = f"{params['sketch_size']} {request.precision} numbers a row, {len(ended.parts)} checkpoint(s)"
        lines.append(f"{table.num_rows:,} rows of {', '.join(table.datasets)} -> {folder} ({kept})")
        values = {**written(folder, table, []), "numbers": params["sketch_size"], "checkpoints": len(ended.parts)}
    comm.barrier()
    return Answer("\n".join(lines), values)


def _write_sample(space: RowSpace, rows: Rows, folder: Path) -> None:
    """Write the tokenized rows of the sample, whole or not at all."""
    scratch, final = folder / f".{SAMPLE}.tmp", folder / SAMPLE
    shutil.rmtree(scratch, ignore_errors=True)
    told = blake2b(row_fingerprints(space.dataset)[rows].tobytes(), size=8)  # else drawn, and in a file of the sample
    space.dataset.select(rows, new_fingerprint=told.hex()).save_to_disk(str(scratch))
    shutil.rmtree(final, ignore_errors=True)
    scratch.rename(final)


def _clear(index: Index) -> None:
    """Remove arrays that the index does not name: those of an earlier one, and wide sketches."""
    named = {name for part in index.parts for name in (part.rows, part.projection)}
    store = ArrayStore(index.folder / STORE)
    for entry in store.entries():
        if entry.name not in named:
            shutil.rmtree(store.directory / entry.name)
