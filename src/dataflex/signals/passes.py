"""What every pass needs: batches by length, and the promise that training does not notice."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["bucketed", "preserved"]


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
