"""Forward passes over rows of a data set: bucketed by length, shared out over ranks, harmless to training.

Batches are formed from all rows, before they are shared out, so that a row's batch, and with it
the last bit of its loss, does not depend on the number of ranks.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dataflex.core.protocols import Rows
from dataflex.dist import comm

__all__ = ["bucketed", "preserved", "run_pass"]


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
def preserved(*modules: torch.nn.Module) -> Iterator[None]:
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


def run_pass(
    dataset: Any,
    rows: Rows,
    lengths: NDArray[np.int64],
    *,
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
    score: Callable[[dict[str, Any]], torch.Tensor],
    token_budget: int,
    device: torch.device,
    progress: Callable[[int, int, float], None] | None = None,
) -> NDArray[np.float32]:
    """Score rows batch by batch on all ranks (collective).

    Args:
        dataset: Anything that gives features by row id.
        rows: Row ids to score [n]; may repeat.
        lengths: Tokens of those rows [n].
        collate: Features to a batch of CPU tensors.
        score: Batch on the device to one fp32 score per row [b].
        token_budget: Padded tokens of a batch at most.
        device: Where batches go.
        progress: Called with rows done, rows in all, seconds so far.

    Returns:
        Scores in the order of ``rows`` [n], equal on every rank.
    """
    batches = bucketed(lengths, token_budget)
    world, rank = comm.world(), comm.rank()
    rounds = -(-len(batches) // world) if batches else 0
    mine: list[torch.Tensor] = []
    positions: list[NDArray[np.int64]] = []
    started = time.perf_counter()
    done = 0
    for turn in range(rounds):
        index = turn * world + rank
        # A rank without a batch left repeats the last one: partitioned parameters need equal numbers of passes.
        batch = batches[min(index, len(batches) - 1)]
        features = collate(_fetch(dataset, rows[batch]))
        moved = {key: value.to(device) if torch.is_tensor(value) else value for key, value in features.items()}
        scored = score(moved).detach().float()
        if index < len(batches):
            mine.append(scored)
            positions.append(batch)
        done += sum(len(batches[i]) for i in range(turn * world, min((turn + 1) * world, len(batches))))
        if progress is not None:
            progress(done, len(rows), time.perf_counter() - started)
    values = torch.cat(mine) if mine else torch.zeros(0, device=device)
    where = torch.from_numpy(np.concatenate(positions) if positions else np.zeros(0, dtype=np.int64)).to(device)
    all_values, _ = comm.gather_rows(values)
    all_where, _ = comm.gather_rows(where)
    out = np.full(len(rows), np.nan, dtype=np.float32)
    out[all_where.cpu().numpy()] = all_values.cpu().numpy()
    return out


def _fetch(dataset: Any, rows: Rows) -> list[dict[str, Any]]:
    ids = rows.tolist()
    if hasattr(dataset, "__getitems__"):
        return list(dataset.__getitems__(ids))
    return [dataset[row] for row in ids]
