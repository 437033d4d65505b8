"""Token losses of a reference model for the rows in training, from a store or computed beside each batch.

A reference tells what there is to be learned in a token only if it reads the same tokens: one with another
tokenizer is refused. With the cache, a row is scored once, by all ranks together, when it is first asked for
(``train.reference``); after the last pass the model is let go.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dataflex import comm
from dataflex.errors import CheckpointError, DataError
from dataflex.method import Rows, State
from dataflex.rng import stream
from dataflex.signals.identity import model_identity, surroundings
from dataflex.signals.logits import TokenScorer
from dataflex.signals.losses import real_tokens
from dataflex.signals.other_models import KEY, check_folder, check_tokenizer, load_reference
from dataflex.signals.store import ArrayStore, CacheKey, ResumablePass
from dataflex.signals.sweep import Sweep, Turn, preserve_state

KEPT_DTYPE = np.float16
TOLERANCE = 0.02
"""Most by which a row's tokens may differ from a fresh pass on average, in nats."""

Around = Callable[[], AbstractContextManager[Any]]


def row_offsets(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return where each row begins in the flat array, and its end: int64 [n + 1]."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def stored_token_pass(
    sweep: Sweep, scorer: TokenScorer, work: ResumablePass, around: Around = nullcontext
) -> NDArray[Any]:
    """Score rows on all ranks (collective) into a stored flat array, going on where an earlier try stopped.

    Args:
        sweep: The rows, in the order of the array.
        scorer: The model, in eval mode.
        work: Opened with the offsets of ``row_offsets(sweep.lengths)``.
        around: Entered around each forward, as the trainer's autocast.

    Returns:
        The whole array, memory-mapped, on every rank.

    Raises:
        DataError: A loss is not finite.
    """
    for turn in sweep.turns(work.done_at_start):
        values = _scored(sweep, turn, scorer, around)
        if turn.mine:
            work.record(turn.positions, values)
    return work.finish()


def largest_difference(
    sweep: Sweep, scorer: TokenScorer, kept: Callable[[int], NDArray[Any]], around: Around = nullcontext
) -> tuple[float, int]:
    """Score some rows anew (collective) and compare with what was kept.

    Args:
        sweep: The rows to compare.
        scorer: The model, in eval mode.
        kept: Gives what was kept of a row, by its id.
        around: Entered around each forward.

    Returns:
        The largest mean absolute difference of a row's tokens, and that row's id; infinite where
        other tokens are supervised than were then.
    """
    worst, where = 0.0, -1
    for turn in sweep.turns():
        values = _scored(sweep, turn, scorer, around)
        start = 0
        for position in turn.positions:
            row, length = int(sweep.rows[position]), int(sweep.lengths[position])
            fresh = values[start : start + length].astype(np.float64)
            before = np.asarray(kept(row), dtype=np.float64)
            start += length
            difference = _mean_difference(fresh, before)
            if difference > worst:
                worst, where = difference, row
    pairs, _ = comm.gather_rows(torch.tensor([[worst, float(where)]], dtype=torch.float64, device=sweep.device))
    top = pairs[int(pairs[:, 0].argmax())]
    return float(top[0]), int(top[1])


def some_rows(sweep: Sweep, count: int, rng: np.random.Generator) -> Sweep:
    """Return a sweep over ``count`` rows drawn from another one, or over all if there are fewer."""
    size = len(sweep.rows)
    chosen: Rows = np.sort(rng.choice(size, size=min(count, size), replace=False))
    return replace(sweep, rows=sweep.rows[chosen], lengths=sweep.lengths[chosen], what=None)


def _mean_difference(fresh: NDArray[np.float64], kept: NDArray[np.float64]) -> float:
    supervised = ~np.isnan(fresh)
    if len(fresh) != len(kept) or (supervised != ~np.isnan(kept)).any():
        return float("inf")
    return float(np.abs(fresh - kept)[supervised].mean()) if supervised.any() else 0.0


def _scored(sweep: Sweep, turn: Turn, scorer: TokenScorer, around: Around) -> NDArray[np.float32]:
    """Return the entries of a batch's rows, one row after the other, NaN where nothing is supervised."""
    with around():
        tokens = scorer(turn.batch)
    offsets = row_offsets(sweep.lengths[turn.positions])
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


logger = logging.getLogger(__name__)

_COMPARED_ROWS = 64


@dataclass(kw_only=True)
class ReferencePasses:
    """The passes of one run.

    Attributes:
        lengths: Tokens of each row [N].
        key: What the losses of all rows are computed from.
        store: Folder of the arrays.
        sweep: Makes a sweep over rows.
        scorer: Gives the model, ready to score.
        autocast: The trainer's mixed-precision context.
        whole: Whether the first pass is over all rows, and not only those asked for.
    """

    lengths: NDArray[np.int64]
    key: CacheKey
    store: Path
    sweep: Callable[[Rows], Sweep]
    scorer: Callable[[], TokenScorer]
    autocast: Callable[[], AbstractContextManager[Any]]
    whole: bool
    _arrays: dict[int, NDArray[Any]] = field(default_factory=dict, repr=False)
    _to_compare: int = _COMPARED_ROWS
    _trusted: set[int] = field(default_factory=set, repr=False)

    def __post_init__(self) -> None:
        self.pass_of: NDArray[np.int32] = np.full(len(self.lengths), -1, dtype=np.int32)
        """The pass that scored each row [N]; -1 for none."""
        self._start = np.zeros(len(self.lengths), dtype=np.int64)

    @property
    def complete(self) -> bool:
        """Whether every row was scored."""
        return bool((self.pass_of >= 0).all())

    def cover(self, rows: Rows) -> None:
        """Score those of ``rows`` that were not, in one pass, and have the losses of all at hand (collective).

        Args:
            rows: Row ids; may repeat, negative ones are none.

        Raises:
            CheckpointError: Stored losses are not those that the model gives now.
        """
        wanted = np.unique(rows[rows >= 0])
        everything = self.whole and len(wanted) and not (self.pass_of >= 0).any()
        scored = np.arange(len(self.lengths), dtype=np.int64) if everything else wanted
        new = scored[self.pass_of[scored] < 0]
        if len(new):
            self.pass_of[new] = self.pass_of.max() + 1
        self._arrays = {
            number: self._arrays[number] if number in self._arrays else self._array(number)
            for number in np.unique(self.pass_of[wanted]).tolist()
        }

    def kept(self, row: int) -> NDArray[Any]:
        """Return the losses of a row that ``cover`` was last asked for; empty for any other."""
        values = self._arrays.get(int(self.pass_of[row]), np.zeros(0, dtype=KEPT_DTYPE))
        return self._part(values, row)

    def state_dict(self) -> State:
        """Return which rows shared a pass, from which their losses follow."""
        return {"pass_of": self.pass_of.copy()} if (self.pass_of >= 0).any() else {}

    def load_state_dict(self, state: State) -> None:
        """Take back what ``state_dict`` gave."""
        if state:
            self.pass_of, self._arrays = np.array(state["pass_of"], dtype=np.int32), {}

    def _part(self, values: NDArray[Any], row: int) -> NDArray[Any]:
        return values[self._start[row] : self._start[row] + self.lengths[row]]

    def _array(self, number: int) -> NDArray[Any]:
        """Return the losses of the rows of a pass, one after the other; it is run unless it is stored (collective)."""
        rows, key = np.flatnonzero(self.pass_of == number), self.key
        if len(rows) < len(self.lengths):
            digest = hashlib.blake2b(rows.astype("<i8").tobytes(), digest_size=16).hexdigest()
            key = replace(key, parameters={**key.parameters, "rows": digest})
        offsets, sweep = row_offsets(self.lengths[rows]), self.sweep(rows)
        self._start[rows] = offsets[:-1]
        work = ResumablePass(ArrayStore(self.store), key, shape=(int(offsets[-1]),), dtype=KEPT_DTYPE, offsets=offsets)
        known = number in self._trusted  # a pass of this very process, which the plan before did not need
        if not known:
            logger.info("%s: losses of %d of %d rows, %s", KEY, len(rows), len(self.lengths), _progress_words(work))
        compared = min(self._to_compare, len(rows)) if work.done_at_start.any() and not known else 0
        self._trusted.add(number)
        if work.complete and not compared:
            return work.finish()
        scorer = self.scorer()
        losses = stored_token_pass(sweep, scorer, work, self.autocast)
        if compared:
            self._to_compare -= compared
            some = some_rows(sweep, compared, stream(0, key.name))
            worst, row = largest_difference(some, scorer, lambda row: self._part(losses, row), self.autocast)
            if worst > TOLERANCE:
                raise CheckpointError(
                    f"{KEY}: the stored losses in {self.store} are not those of the model: row {row} differs by "
                    f"{worst:.3g} nats per token ({TOLERANCE} are allowed). Remove the folder {self.store / key.name}"
                )
        return losses


def _progress_words(work: ResumablePass) -> str:
    done = int(work.done_at_start.sum())
    if work.complete:
        return "stored before"
    return f"{done} of them from an earlier try" if done else "computed once"


@dataclass(kw_only=True)
class ReferenceLosses:
    """Token losses of a reference model; made by ``open``, ready after ``begin``."""

    folder: Path
    dataset: Any
    lengths: NDArray[np.int64]
    fingerprint: str
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]
    tokenizer: Any
    device: torch.device
    token_budget: int
    autocast: Callable[[], AbstractContextManager[Any]]
    store: Path | None
    cache: bool
    whole: bool = False
    passes: ReferencePasses | None = field(default=None, repr=False)
    """What was scored so far; None without the cache, and before ``begin``."""
    _model: torch.nn.Module | None = field(default=None, repr=False)
    _scorer: TokenScorer | None = field(default=None, repr=False)
    _pending: torch.Tensor | None = field(default=None, repr=False)

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        dataset: Any,
        lengths: NDArray[np.int64],
        fingerprint: str,
        collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
        tokenizer: Any,
        device: torch.device,
        token_budget: int,
        autocast: Callable[[], AbstractContextManager[Any]],
        store: Path | None,
        cache: bool,
        whole: bool = False,
    ) -> ReferenceLosses:
        """Check folder and tokenizer; the model is loaded by ``begin``.

        Args:
            folder: Folder of the model, or of a PEFT adapter.
            dataset: Features by row id.
            lengths: Tokens of each row [N].
            fingerprint: Identity of the rows.
            collate: Features to a batch with ``labels``, as in training.
            tokenizer: The run's.
            device: Where the model runs.
            token_budget: Padded tokens of a scoring batch at most.
            autocast: The trainer's mixed-precision context.
            store: Folder of the cached losses; needed with ``cache``.
            cache: Whether rows are scored once, instead of each batch in every step.
            whole: Whether the first pass is over all rows, and not only those of the first plan.

        Raises:
            ConfigError: No such folder, no model in it, or another tokenizer.
        """
        path = check_folder(folder)
        check_tokenizer(tokenizer, path)
        if cache and store is None:
            raise ValueError("a cache of reference losses needs a store")
        return cls(
            folder=path,
            dataset=dataset,
            lengths=np.asarray(lengths, dtype=np.int64),
            fingerprint=fingerprint,
            collate=collate,
            tokenizer=tokenizer,
            device=torch.device(device),
            token_budget=token_budget,
            autocast=autocast,
            store=store,
            cache=cache,
            whole=whole,
        )

    def begin(self) -> None:
        """Load the model (collective).

        Raises:
            ConfigError: The model cannot be loaded, or has fewer tokens than the tokenizer.
        """
        with preserve_state(), torch.no_grad():
            self._ready()
            if not self.cache:
                return
            assert self.store is not None
            assert self._model is not None
            device = next(self._model.parameters()).device
            key = CacheKey(
                model=model_identity(self._model),
                data=self.fingerprint,
                method="reference-losses",
                parameters=surroundings(
                    self.dataset, len(self.lengths), self.collate, self.tokenizer, self.autocast, device
                ),
            )
        self.passes = ReferencePasses(
            lengths=self.lengths,
            key=key,
            store=self.store,
            sweep=self._sweep,
            scorer=self._ready,
            autocast=self.autocast,
            whole=self.whole,
        )

    def cover(self, rows: Rows, *, last: bool = False) -> None:
        """With the cache, score those of ``rows`` that were not, and have the losses of all at hand (collective).

        Between two passes the model waits in the host's memory.

        Args:
            rows: Row ids; may repeat, negative ones are none.
            last: Whether no other rows will be asked for; the model is let go.

        Raises:
            CheckpointError: Stored losses are not those that the model gives now.
        """
        if self.passes is None:
            return
        with preserve_state(), torch.no_grad():
            self.passes.cover(rows)
        if last or self.passes.complete:
            self._model = self._scorer = None
        elif self._model is not None:
            self._model.to("cpu")

    def state_dict(self) -> State:
        """Return which rows shared a pass."""
        return {} if self.passes is None else self.passes.state_dict()

    def load_state_dict(self, state: State) -> None:
        """Take back what ``state_dict`` gave."""
        if self.passes is not None:
            self.passes.load_state_dict(state)

    def of(self, batch: dict[str, Any], rows: Rows, mask_BT: torch.Tensor) -> torch.Tensor:
        """Return the reference's loss at every supervised position of a training batch.

        Args:
            batch: Collated; ``input_ids`` [B, T], and ``labels`` [B, T] where there is no cache.
            rows: Row ids [B].
            mask_BT: Positions t whose next token is supervised.

        Returns:
            fp32 [B, T], on the device of the mask: at t the loss of token t + 1; 0 where the mask is False.

        Raises:
            DataError: A supervised position has no reference loss (on an accelerator: told at the next call).
        """
        self._check_pending()
        found_BT = self._computed(batch, mask_BT) if self.passes is None else self._looked_up(batch, rows, mask_BT)
        bad = (mask_BT & found_BT.isnan()).any()
        self._pending = bad
        if bad.device.type == "cpu":
            self._check_pending()
        return torch.where(mask_BT, found_BT, 0.0)

    def _looked_up(self, batch: dict[str, Any], rows: Rows, mask_BT: torch.Tensor) -> torch.Tensor:
        assert self.passes is not None
        width = mask_BT.shape[1]
        table = np.full((len(rows), width), np.nan, dtype=KEPT_DTYPE)
        for at, row in enumerate(rows.tolist()):
            values = self.passes.kept(row)[:width]
            table[at, : len(values)] = values
        table_BT = torch.from_numpy(table).to(mask_BT.device).float()
        first_B = real_tokens(batch).to(mask_BT.device).long().argmax(dim=1)
        index_BT = torch.arange(1, width + 1, device=mask_BT.device) - first_B[:, None]
        return table_BT.gather(1, index_BT.clamp(0, width - 1))

    @torch.no_grad()
    def _computed(self, batch: dict[str, Any], mask_BT: torch.Tensor) -> torch.Tensor:
        assert self._scorer is not None, "begin was not called"
        with self.autocast():
            tokens = self._scorer(batch)
        first_B = real_tokens(batch).long().argmax(dim=1)
        found_BT = torch.full(mask_BT.shape, torch.nan, device=tokens.loss.device)
        found_BT[tokens.row, tokens.position + first_B[tokens.row] - 1] = tokens.loss.float()
        return found_BT.to(mask_BT.device)

    def _check_pending(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None and bool(pending):
            raise DataError(
                f"{KEY}: a supervised token of the training batch has no reference loss; rows are not collated in "
                "training as they are for scoring"
            )

    def _ready(self) -> TokenScorer:
        """Return the scorer, its model on the device (collective)."""
        if self._model is None or self._scorer is None:
            self._model = load_reference(self.folder, self.tokenizer, self.device)
            self._scorer = TokenScorer(self._model)
        self._model.to(self.device)
        return self._scorer

    def _sweep(self, rows: Rows) -> Sweep:
        return Sweep(
            dataset=self.dataset,
            rows=rows,
            lengths=self.lengths[rows],
            collate=self.collate,
            token_budget=self.token_budget,
            device=self.device,
            what="losses of the reference model",
        )
