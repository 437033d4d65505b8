"""Token losses of a reference model for the rows in training, from a store or computed beside each batch.

A reference must read the same tokens: one with another tokenizer is refused. With the cache, a row is scored once, by
all ranks together, when it is first asked for; after the last pass the model is freed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dataflex import comm
from dataflex.errors import CheckpointError, DataError
from dataflex.method import Rows, State
from dataflex.rng import stream
from dataflex.sequences import Joined
from dataflex.signals.identity import model_identity, surroundings
from dataflex.signals.logits import TokenScorer
from dataflex.signals.losses import real_tokens
from dataflex.signals.model_access import ModelAccess
from dataflex.signals.other_models import KEY, check_folder, check_tokenizer, load_reference
from dataflex.signals.runner import rows_digest
from dataflex.signals.store import ArrayStore, CacheKey, ResumablePass
from dataflex.signals.sweep import Sweep, Turn, preserve_state

logger = logging.getLogger(__name__)

KEPT_DTYPE = np.float16
TOLERANCE = 0.02  # largest mean difference of a row's tokens from a fresh pass, in nats
_COMPARED_ROWS = 64


class ReferenceLosses:
    """Token losses of a reference model, loaded from the folder of a model or a PEFT adapter (collective).

    ``access`` gives the training rows, and how they are collated and scored. With ``cached`` rows are scored once, into
    the folder ``store``, instead of each batch in every step; the first pass is over the rows of the first plan, or
    over the ``whole`` pool. Rows that share a pass also share an array in the store; which pass scored a row is the
    state that a resumed run needs.

    Raises:
        ConfigError: No folder or model, another tokenizer, or fewer embeddings than the tokenizer has ids.
    """

    def __init__(self, folder: str | Path, access: ModelAccess, *, store: Path, cached: bool, whole: bool) -> None:
        self.folder = check_folder(folder)
        check_tokenizer(access.known_tokenizer("a reference model"), self.folder)
        self._access, self.store, self._cached, self._whole = access, store, cached, whole
        self.model: torch.nn.Module | None = None
        self._scorer: TokenScorer | None = None
        self._pending: torch.Tensor | None = None
        lengths = access.train.lengths
        self.pass_of: NDArray[np.int32] = np.full(len(lengths), -1, dtype=np.int32)
        """The pass that scored each row [N]; -1 for none."""
        self._start = np.zeros(len(lengths), dtype=np.int64)
        self._arrays: dict[int, NDArray[Any]] = {}
        self._to_compare = _COMPARED_ROWS
        self._trusted: set[int] = set()
        with preserve_state(), torch.no_grad():
            self._ready()
            if cached:
                self._key = self._cache_key()

    def _cache_key(self) -> CacheKey:
        access, model = self._access, self.model
        assert model is not None
        around = surroundings(
            access.train.dataset,
            len(access.train.lengths),
            access.collate,
            access.tokenizer,
            access.autocast,
            next(model.parameters()).device,
        )
        identity = model_identity(model)
        return CacheKey(model=identity, data=access.train.identity, method="reference-losses", parameters=around)

    def cover(self, rows: Rows, *, last: bool = False) -> None:
        """With the cache, score those of ``rows`` that were not, and keep the losses of all at hand (collective).

        Rows may repeat, negative ids are none. Between two passes the model waits in the host's memory; after the
        ``last`` rows it is freed.

        Raises:
            CheckpointError: Stored losses are not those that the model gives now.
        """
        if not self._cached:
            return
        wanted = np.unique(rows[rows >= 0])
        everything = self._whole and len(wanted) and not (self.pass_of >= 0).any()
        scored = np.arange(len(self.pass_of), dtype=np.int64) if everything else wanted
        new = scored[self.pass_of[scored] < 0]
        if len(new):
            self.pass_of[new] = self.pass_of.max() + 1
        with preserve_state(), torch.no_grad():
            self._arrays = {
                number: self._arrays[number] if number in self._arrays else self._array(number)
                for number in np.unique(self.pass_of[wanted]).tolist()
            }
        if last or (self.pass_of >= 0).all():
            self.model = self._scorer = None
        elif self.model is not None:
            self.model.to("cpu")

    def kept(self, row: int) -> NDArray[Any]:
        """Return the losses of a row that ``cover`` was last asked for; empty for any other."""
        values = self._arrays.get(int(self.pass_of[row]), np.zeros(0, dtype=KEPT_DTYPE))
        return values[self._start[row] : self._start[row] + self._access.train.lengths[row]]

    def state_dict(self) -> State:
        """Return which rows shared a pass, from which their losses follow."""
        return {"pass_of": self.pass_of.copy()} if (self.pass_of >= 0).any() else {}

    def load_state_dict(self, state: State) -> None:
        """Take back what ``state_dict`` gave."""
        if state:
            self.pass_of, self._arrays = np.array(state["pass_of"], dtype=np.int32), {}

    def of(
        self, batch: dict[str, Any], rows: Rows, mask_BT: torch.Tensor, joined: Joined | None = None
    ) -> torch.Tensor:
        """Return the reference's loss at every supervised position of a training batch.

        ``mask_BT`` says at which positions t the next token is supervised; ``joined``, where the rows lie in the batch.

        Returns:
            fp32 [B, T], on the device of the mask: at t the loss of token t + 1; 0 where the mask is False.

        Raises:
            DataError: A supervised position has no reference loss (on an accelerator: told at the next call).
        """
        self._check_pending()
        if self._cached:
            found_BT = self._looked_up(batch, rows, mask_BT, joined)
        else:
            found_BT = self._computed(batch).to(mask_BT.device)
            found_BT = found_BT if joined is None else joined.split(found_BT)
        bad = (mask_BT & found_BT.isnan()).any()
        self._pending = bad
        if bad.device.type == "cpu":
            self._check_pending()
        return torch.where(mask_BT, found_BT, 0.0)

    def _looked_up(
        self, batch: dict[str, Any], rows: Rows, mask_BT: torch.Tensor, joined: Joined | None
    ) -> torch.Tensor:
        width = mask_BT.shape[1]
        table = np.full((len(rows), width), np.nan, dtype=KEPT_DTYPE)
        for at, row in enumerate(rows.tolist()):
            values = self.kept(row)[:width]
            table[at, : len(values)] = values
        table_BT = torch.from_numpy(table).to(mask_BT.device).float()
        real = real_tokens(batch).to(mask_BT.device) if joined is None else joined.there_RT
        first_B = real.long().argmax(dim=1)
        index_BT = torch.arange(1, width + 1, device=mask_BT.device) - first_B[:, None]
        return table_BT.gather(1, index_BT.clamp(0, width - 1))

    @torch.no_grad()
    def _computed(self, batch: dict[str, Any]) -> torch.Tensor:
        with self._access.autocast():
            tokens = self._ready()(batch)
        first_B = real_tokens(batch).long().argmax(dim=1)
        found_BT = torch.full(batch["labels"].shape, torch.nan, device=tokens.loss.device)
        found_BT[tokens.row, tokens.position + first_B[tokens.row] - 1] = tokens.loss.float()
        return found_BT

    def _check_pending(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None and bool(pending):
            raise DataError(
                f"{KEY}: a supervised token of the training batch has no reference loss; rows are not collated in "
                "training as they are for scoring"
            )

    def _ready(self) -> TokenScorer:
        """Return the scorer, its model on the device (collective)."""
        if self.model is None or self._scorer is None:
            self.model = load_reference(self.folder, self._access.tokenizer, self._access.device)
            self._scorer = TokenScorer(self.model)
        self.model.to(self._access.device)
        return self._scorer

    def _array(self, number: int) -> NDArray[Any]:
        """Return the losses of the rows of a pass, one after the other; it is run unless it is stored (collective)."""
        rows, key, lengths = np.flatnonzero(self.pass_of == number), self._key, self._access.train.lengths
        if len(rows) < len(lengths):
            key = replace(key, parameters={**key.parameters, "rows": rows_digest(rows)})
        sweep = self._access.sweep(rows, None, "reference losses")
        offsets = _offsets(sweep.lengths)
        self._start[rows] = offsets[:-1]
        work = ResumablePass(ArrayStore(self.store), key, shape=(int(offsets[-1]),), dtype=KEPT_DTYPE, offsets=offsets)
        known = number in self._trusted  # a pass of this process that the previous plan did not need
        self._trusted.add(number)
        done = int(work.done_at_start.sum())
        if not known:
            stored = "stored before" if work.complete else f"{done} of them from an earlier try"
            logger.info(
                "%s: losses of %d of %d rows, %s", KEY, len(rows), len(lengths), stored if done else "computed once"
            )
        compared = min(self._to_compare, len(rows)) if done and not known else 0
        if work.complete and not compared:
            return work.finish()
        scorer = self._ready()
        for turn in sweep.turns(work.done_at_start):
            values = _scored(sweep, turn, scorer, self._access.autocast)
            if turn.mine:
                work.record(turn.positions, values)
        losses = work.finish()
        if compared:
            self._to_compare -= compared
            some = np.sort(stream(0, key.name).choice(len(rows), size=compared, replace=False))
            worst, row = self._largest_difference(self._access.sweep(rows[some], None, "comparison"), losses)
            if worst > TOLERANCE:
                raise CheckpointError(
                    f"{KEY}: the stored losses in {self.store} are not those of the model: row {row} differs by "
                    f"{worst:.3g} nats per token ({TOLERANCE} are allowed). Remove the folder {self.store / key.name}"
                )
        return losses

    def _largest_difference(self, sweep: Sweep, losses: NDArray[Any]) -> tuple[float, int]:
        """Return the largest mean difference of a row's tokens from a new pass over the rows, and its id (collective).

        It is infinite where other tokens are supervised than were then.
        """
        scorer, worst, where = self._ready(), 0.0, -1
        for turn in sweep.turns():
            values = _scored(sweep, turn, scorer, self._access.autocast).astype(np.float64)
            starts = _offsets(sweep.lengths[turn.positions])
            for row, fresh in zip(sweep.rows[turn.positions].tolist(), np.split(values, starts[1:-1]), strict=True):
                kept = losses[self._start[row] : self._start[row] + len(fresh)].astype(np.float64)
                supervised = ~np.isnan(fresh)
                difference = float(np.abs(fresh - kept)[supervised].mean()) if supervised.any() else 0.0
                if (supervised != ~np.isnan(kept)).any():
                    difference = float("inf")
                if difference > worst:
                    worst, where = difference, row
        pairs, _ = comm.gather_rows(torch.tensor([[worst, float(where)]], dtype=torch.float64, device=sweep.device))
        worst, where = pairs[int(pairs[:, 0].argmax())].tolist()
        return worst, int(where)


def _scored(
    sweep: Sweep, turn: Turn, scorer: TokenScorer, autocast: Callable[[], AbstractContextManager[Any]]
) -> NDArray[np.float32]:
    """Return the losses of a batch's rows, one row after the other, NaN where nothing is supervised."""
    with autocast():
        tokens = scorer(turn.batch)
    offsets = _offsets(sweep.lengths[turn.positions])
    out = np.full(int(offsets[-1]), np.nan, dtype=np.float32)
    row, position = tokens.row.cpu().numpy(), tokens.position.cpu().numpy()
    losses = tokens.loss.float().cpu().numpy()
    if not np.isfinite(losses).all():
        bad = sweep.rows[turn.positions[row[~np.isfinite(losses)][0]]]
        raise DataError(f"reference: the loss of row {int(bad)} is not finite; the model is broken or overflows")
    inside = position < np.diff(offsets)[row]
    if not inside.all():
        bad = sweep.rows[turn.positions[row[~inside][0]]]
        raise DataError(f"reference: row {int(bad)} has more tokens in its batch than in the data set")
    out[offsets[row] + position] = losses
    return out


def _offsets(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return where each row begins in the flat array, and its end [n + 1]."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
