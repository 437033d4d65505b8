"""Token losses of a reference model for the rows in training, from a store or computed beside each batch.

A reference tells what there is to be learned in a token only if it reads the same tokens: one with another
tokenizer is refused. With the cache, every row is scored once before training, by all ranks together, and
the model is let go; a later run over the same data takes the stored losses after comparing some rows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dataflex.core.protocols import Rows
from dataflex.core.rng import stream
from dataflex.errors import CheckpointError, DataError
from dataflex.signals.fingerprint import Fingerprint
from dataflex.signals.packing import real_tokens
from dataflex.signals.passes import preserved
from dataflex.signals.reference_model import KEY, check_folder, check_tokenizer, load_reference, losses_key
from dataflex.signals.resumable import ResumablePass
from dataflex.signals.store import ArrayStore
from dataflex.signals.sweep import Sweep
from dataflex.signals.token_losses import TokenScorer
from dataflex.signals.token_store import (
    KEPT_DTYPE,
    TOLERANCE,
    largest_difference,
    row_offsets,
    some_rows,
    stored_token_pass,
)

__all__ = ["ReferenceLosses"]

logger = logging.getLogger(__name__)

_COMPARED_ROWS = 64


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
    _scorer: TokenScorer | None = field(default=None, repr=False)
    _kept: NDArray[Any] | None = field(default=None, repr=False)
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
            cache: Whether all rows are scored once, instead of each batch in every step.

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
        )

    def begin(self) -> None:
        """Load the model and, with the cache, score every row that is not stored yet (collective).

        Raises:
            ConfigError: The model cannot be loaded, or has fewer tokens than the tokenizer.
            CheckpointError: The stored losses are not those that the model gives now.
        """
        with preserved(), torch.no_grad():
            model = load_reference(self.folder, self.tokenizer, self.device)
            self._scorer = TokenScorer(model)
            self._offsets = row_offsets(self.lengths)
            if not self.cache:
                return
            assert self.store is not None
            key = losses_key(
                model,
                tokenizer=self.tokenizer,
                data=self.fingerprint,
                dataset=self.dataset,
                num_rows=len(self.lengths),
                collate=self.collate,
                autocast=self.autocast,
            )
            work = ResumablePass(
                ArrayStore(self.store),
                key,
                shape=(int(self._offsets[-1]),),
                dtype=KEPT_DTYPE,
                offsets=self._offsets,
                device=self.device,
            )
            logger.info("%s: losses of %d rows, %s", self.folder, len(self.lengths), _progress_words(work))
            sweep = self._sweep()
            self._kept = stored_token_pass(sweep, self._scorer, work, self.autocast)
            self._compare(sweep, key)
        self._scorer = None  # the model goes with it

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
        found_BT = self._computed(batch, mask_BT) if self._kept is None else self._looked_up(batch, rows, mask_BT)
        bad = (mask_BT & found_BT.isnan()).any()
        self._pending = bad
        if bad.device.type == "cpu":
            self._check_pending()
        return torch.where(mask_BT, found_BT, 0.0)

    def _looked_up(self, batch: dict[str, Any], rows: Rows, mask_BT: torch.Tensor) -> torch.Tensor:
        assert self._kept is not None
        width = mask_BT.shape[1]
        table = np.full((len(rows), width), np.nan, dtype=KEPT_DTYPE)
        for at, row in enumerate(rows.tolist()):
            values = self._kept[self._offsets[row] : self._offsets[row + 1]][:width]
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

    def _sweep(self) -> Sweep:
        return Sweep(
            dataset=self.dataset,
            rows=np.arange(len(self.lengths), dtype=np.int64),
            lengths=self.lengths,
            collate=self.collate,
            token_budget=self.token_budget,
            device=self.device,
            what="losses of the reference model",
        )

    def _compare(self, sweep: Sweep, key: Fingerprint) -> None:
        """Score some rows anew and refuse losses that do not agree.

        Raises:
            CheckpointError: On every rank.
        """
        assert self._scorer is not None
        assert self._kept is not None
        some = some_rows(sweep, _COMPARED_ROWS, stream(0, key.name))
        worst, row = largest_difference(some, self._scorer, self._kept, self._offsets, self.autocast)
        if worst > TOLERANCE:
            raise CheckpointError(
                f"{KEY}: the stored losses in {self.store} are not those of {self.folder}: row {row} differs by "
                f"{worst:.3g} nats per token ({TOLERANCE} are allowed). Remove the folder {self.store / key.name}"  # type: ignore[operator]
            )


def _progress_words(work: ResumablePass) -> str:
    done = int(work.done_at_start.sum())
    if work.complete:
        return "stored by an earlier run"
    return f"{done} of them from an earlier try" if done else "computed once"
