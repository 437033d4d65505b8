"""Passes whose answer per row is more than one number: vectors, or the tokens of a row.

Batches are formed from all rows before ranks or earlier interruptions are looked at, so that a row's
batch, and with it the last bit of its answer, depends on neither.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from dataflex import comm
from dataflex.console import progress
from dataflex.method import Rows
from dataflex.signals.store import ResumablePass

if TYPE_CHECKING:
    from dataflex.signals.logits import TokenLosses, TokenScorer

__all__ = [
    "Sweep",
    "Turn",
    "bucketed",
    "fetch",
    "preserve_state",
    "row_pass",
    "stored_pass",
    "token_pass",
    "vector_pass",
]


def bucketed(lengths: NDArray[np.int64], token_budget: int) -> list[NDArray[np.int64]]:
    """Group positions into batches whose padded size stays within ``token_budget``.

    Args:
        lengths: Tokens of each row [n].
        token_budget: Largest rows x longest row of a batch; a longer single row is its own batch.

    Returns:
        Positions by batch, longest rows first, so that memory runs out at once or never.
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


_INTEGERS = frozenset({"place", "position", "document"})


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One batch of this rank.

    Attributes:
        positions: Positions [b] in the rows of the pass.
        batch: Collated, on the device.
        mine: False where the rank only keeps step with the others: score it, drop the result.
    """

    positions: NDArray[np.int64]
    batch: dict[str, Any]
    mine: bool


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The rows of a pass and how to feed them.

    Attributes:
        dataset: Anything that gives features by row id.
        rows: Row ids [n]; may repeat.
        lengths: Tokens of those rows [n].
        collate: Features to a batch of CPU tensors.
        token_budget: Padded tokens of a batch at most.
        device: Where batches go.
        what: What the pass is for, told while it goes; None tells nothing.
    """

    dataset: Any
    rows: Rows
    lengths: NDArray[np.int64]
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]
    token_budget: int
    device: torch.device
    what: str | None = None

    def turns(self, done: NDArray[np.bool_] | None = None) -> Iterator[Turn]:
        """Give this rank its batches; every rank is given equally many.

        Args:
            done: Positions that are finished [n], equal on every rank; a batch is left out when all of it is.
        """
        finished = np.zeros(len(self.rows), dtype=bool) if done is None else done
        batches = [batch for batch in bucketed(self.lengths, self.token_budget) if not finished[batch].all()]
        world, rank = comm.world(), comm.rank()
        count = len(self.rows) - sum(len(batch) for batch in batches)
        with progress(self.what, len(self.rows), count) as told:
            for first in range(0, len(batches), world):
                index = first + rank
                # A rank without a batch left repeats the last: partitioned parameters need equal numbers of passes.
                positions = batches[min(index, len(batches) - 1)]
                features = self.collate(fetch(self.dataset, self.rows[positions]))
                batch = {key: x.to(self.device) if torch.is_tensor(x) else x for key, x in features.items()}
                yield Turn(positions=positions, batch=batch, mine=index < len(batches))
                count += sum(len(batch) for batch in batches[first : first + world])
                told(count)


def vector_pass(
    sweep: Sweep, score: Callable[[dict[str, Any]], torch.Tensor], tail: tuple[int, ...]
) -> NDArray[np.float32]:
    """Score rows on all ranks (collective) and hold the answers in memory.

    Args:
        sweep: The rows.
        score: Batch on the device to one array per row [b, *tail].
        tail: Shape of one row's answer.

    Returns:
        float32 [n, *tail] in the order of the rows, equal on every rank.
    """
    values, places = [torch.zeros(0, *tail, device=sweep.device)], [np.zeros(0, dtype=np.int64)]
    for turn in sweep.turns():
        scored = score(turn.batch).detach().float()
        if turn.mine:
            values.append(scored)
            places.append(turn.positions)
    whole, _ = comm.gather_rows(torch.cat(values))
    where, _ = comm.gather_rows(torch.from_numpy(np.concatenate(places)).to(sweep.device))
    out = np.full((len(sweep.rows), *tail), np.nan, dtype=np.float32)
    out[where.cpu().numpy()] = whole.cpu().numpy()
    return out


def row_pass(
    sweep: Sweep, score: Callable[[dict[str, Any]], torch.Tensor], tail: tuple[int, ...], work: ResumablePass | None
) -> NDArray[Any]:
    """Score rows on all ranks (collective): into ``work`` (``stored_pass``), or in memory if it is None."""
    return vector_pass(sweep, score, tail) if work is None else stored_pass(sweep, score, work)


def stored_pass(sweep: Sweep, score: Callable[[dict[str, Any]], torch.Tensor], work: ResumablePass) -> NDArray[Any]:
    """Score rows on all ranks (collective) into a stored array, going on where an earlier try stopped.

    Args:
        sweep: The rows.
        score: Batch on the device to one array per row [b, ...] of the shape that ``work`` holds.
        work: Where the answers go, one entry per row of the sweep; opened by every rank.

    Returns:
        The whole array, memory-mapped, on every rank.
    """
    for turn in sweep.turns(work.done_at_start):
        scored = score(turn.batch).detach()
        if turn.mine:
            work.record(turn.positions, scored.float().cpu().numpy())
    return work.finish()


def token_pass(
    sweep: Sweep, scorer: TokenScorer, around: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> TokenLosses:
    """Score the tokens of rows on all ranks (collective).

    Args:
        sweep: The rows.
        scorer: Which values are computed.
        around: Entered around each forward, as the trainer's autocast.

    Returns:
        The tokens of row i of the sweep at ``offsets[i]:offsets[i + 1]``, equal on every rank.
    """
    from dataflex.signals.logits import TokenLosses

    names = ("position", "document", *scorer.values)
    columns: dict[str, list[torch.Tensor]] = {
        name: [torch.zeros(0, dtype=torch.int64 if name in _INTEGERS else torch.float32, device=sweep.device)]
        for name in ("place", *names)
    }
    for turn in sweep.turns():
        with around():
            tokens = scorer(turn.batch)
        if turn.mine:
            columns["place"].append(torch.from_numpy(turn.positions).to(sweep.device)[tokens.row])
            for name in names:
                columns[name].append(getattr(tokens, name))
    flat = {name: comm.gather_rows(torch.cat(parts))[0].cpu().numpy() for name, parts in columns.items()}
    place = flat.pop("place")
    order = np.argsort(place, kind="stable")  # tokens of a row are together and in order already
    offsets = np.concatenate([[0], np.cumsum(np.bincount(place, minlength=len(sweep.rows)))])
    return TokenLosses(
        offsets=offsets.astype(np.int64),
        **{name: column[order].astype(np.int32 if name in _INTEGERS else np.float32) for name, column in flat.items()},
    )


def fetch(dataset: Any, rows: Rows) -> list[dict[str, Any]]:
    """Return the features of rows of anything that gives features by row id."""
    ids = rows.tolist()
    if hasattr(dataset, "__getitems__"):
        return list(dataset.__getitems__(ids))
    return [dataset[row] for row in ids]
