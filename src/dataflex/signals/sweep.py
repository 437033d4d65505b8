"""One pass over rows: batches by length, shared out over ranks, scored, and gathered.

Batches are formed from all rows before ranks and interrupted passes are considered, so that a row's batch, and with it
the last bit of its value, depends on neither.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.utils.rnn import pad_sequence

from dataflex import comm
from dataflex.console import progress
from dataflex.plan.domains import Rows
from dataflex.signals.store import ResumablePass


class Turn(NamedTuple):
    """One batch of this rank: positions [b] in the rows of the pass, and the collated batch on the device.

    ``mine`` is False where the rank only keeps step with the others: the batch is scored and its values are dropped.
    """

    positions: NDArray[np.int64]
    batch: dict[str, Any]
    mine: bool


Share = Callable[[list[NDArray[np.int64]]], Iterator[NDArray[np.int64]]]
"""Gives those of a pass's batches that this process is to score."""


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The rows of a pass and how to feed them."""

    dataset: Any  # anything that gives features by row id
    rows: Rows  # row ids [n]; may repeat
    lengths: NDArray[np.int64]  # number of tokens of those rows [n]
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]  # features to a batch of CPU tensors
    token_budget: int  # largest number of padded tokens in a batch
    device: torch.device  # where batches go
    what: str | None = None  # name of the pass in progress lines; None for no progress lines
    combine: Callable[[NDArray[np.float32]], NDArray[np.float32]] | None = (
        None  # values [n, ...] to those of the rows asked about
    )

    def turns(self, done: NDArray[np.bool_] | None = None, share: Share | None = None) -> Iterator[Turn]:
        """Give this rank its batches, the same number on every rank; ``done`` [n] marks positions that are finished.

        ``share`` says instead which of all batches are for this process to score.
        """
        batches = bucketed(self.lengths, self.token_budget)
        if share is not None:
            for positions in share(batches):
                yield Turn(positions, self._batch(positions), mine=True)
            return
        if done is not None:
            batches = [batch for batch in batches if not done[batch].all()]
        world, rank = comm.world(), comm.rank()
        count = len(self.rows) - sum(len(batch) for batch in batches)
        with progress(self.what, len(self.rows), count) as told:
            for first in range(0, len(batches), world):
                index = first + rank
                # A rank without a batch left repeats the last: partitioned parameters need equal numbers of passes.
                positions = batches[min(index, len(batches) - 1)]
                yield Turn(positions, self._batch(positions), mine=index < len(batches))
                count += sum(len(batch) for batch in batches[first : first + world])
                told(count)

    def _batch(self, positions: NDArray[np.int64]) -> dict[str, Any]:
        return to_device(self.collate(fetch(self.dataset, self.rows[positions])), self.device)


class Collector:
    """Takes the values [b, *tail] of a pass batch by batch, and gathers them over ranks at the end.

    ``work`` is the stored array that takes them as they come; None keeps them in memory.
    """

    def __init__(self, sweep: Sweep, tail: tuple[int, ...], work: ResumablePass | None = None) -> None:
        self._shape, self._device, self._work = (len(sweep.rows), *tail), sweep.device, work
        self._values = [torch.zeros(0, *tail, device=sweep.device)]
        self._places = [np.zeros(0, dtype=np.int64)]

    def take(self, turn: Turn, scored: torch.Tensor) -> None:
        """Keep the values of a batch [b, *tail]."""
        scored = scored.detach().float()
        if turn.mine and self._work is not None:
            self._work.record(turn.positions, scored.cpu().numpy())
        elif turn.mine:
            self._values.append(scored)
            self._places.append(turn.positions)

    def finish(self) -> NDArray[np.float32]:
        """Return all values [n, *tail] in the order of the rows, equal on every rank (collective)."""
        if self._work is not None:
            return self._work.finish()
        whole, _ = comm.gather_rows(torch.cat(self._values))
        where, _ = comm.gather_rows(torch.from_numpy(np.concatenate(self._places)).to(self._device))
        out = np.full(self._shape, np.nan, dtype=np.float32)
        out[where.cpu().numpy()] = whole.cpu().numpy()
        return out


def row_pass(
    sweep: Sweep, score: Callable[[dict[str, Any]], torch.Tensor], tail: tuple[int, ...]
) -> NDArray[np.float32]:
    """Score rows on all ranks (collective): float32 [n, *tail] in the order of the rows, equal on every rank."""
    collector = Collector(sweep, tail)
    for turn in sweep.turns():
        collector.take(turn, score(turn.batch))
    return collector.finish()


def fetch(dataset: Any, rows: Rows) -> list[dict[str, Any]]:
    """Return the features of rows of anything that gives features by row id."""
    ids = rows.tolist()
    return list(dataset.__getitems__(ids)) if hasattr(dataset, "__getitems__") else [dataset[row] for row in ids]


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return a batch with its tensors on the device."""
    return {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}


def padded(sequences: Sequence[Sequence[int]], fill: int, side: str = "right") -> torch.Tensor:
    """Return sequences of integers as the rows of one tensor, int64 [n, longest]."""
    rows = [torch.as_tensor(sequence, dtype=torch.int64) for sequence in sequences]
    return pad_sequence(rows, batch_first=True, padding_value=fill, padding_side=side)


def mask_of(sequences: Sequence[Sequence[int]], side: str = "right") -> torch.Tensor:
    """Return the mask of ``padded`` sequences: 1 where there is a token, int64 [n, longest]."""
    return padded([[1] * len(sequence) for sequence in sequences], 0, side)


def bucketed(lengths: NDArray[np.int64], token_budget: int) -> list[NDArray[np.int64]]:
    """Group positions into batches whose padded size, rows x longest row, stays within ``token_budget``.

    A longer row is its own batch. Longest rows come first, so that memory runs out at once or never.
    """
    order = np.argsort(-lengths, kind="stable")
    batches = []
    start = 0
    while start < len(order):
        longest = max(int(lengths[order[start]]), 1)
        stop = start + max(1, token_budget // longest)
        batches.append(order[start:stop])
        start = stop
    return batches


@contextmanager
def preserve_state(*modules: torch.nn.Module) -> Iterator[None]:
    """Keep random states and every module's training mode as they were, whatever happens inside."""
    training = [(module, module.training) for top in modules for module in top.modules()]
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        for module, mode in training:
            module.training = mode
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if cuda_states:
            torch.cuda.set_rng_state_all(cuda_states)
