"""Whole passes over rows, harmless to training: token losses and embeddings of the model under training.

All functions are collective. They run in eval mode without gradient and leave random states, modes,
parameters and hooks as they were.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dataflex.signals.embeddings import embed_batch, embedding_size
from dataflex.signals.logits import GateLoads, LogitScorer, TokenLosses, TokenScorer
from dataflex.signals.specs import EmbeddingSpec
from dataflex.signals.store import ResumablePass
from dataflex.signals.sweep import Sweep, preserve_state, row_pass, token_pass

__all__ = ["row_embeddings", "row_gate_loads", "row_logits", "segment_sums", "token_losses", "token_means"]

Around = Callable[[], AbstractContextManager[Any]]


def token_losses(
    model: nn.Module, sweep: Sweep, *, el2n: bool = False, entropy: bool = False, around: Around = nullcontext
) -> TokenLosses:
    """Return the cross-entropy of every supervised token of the sweep's rows, equal on every rank.

    Args:
        model: The outermost module to call, not the DDP or DeepSpeed engine.
        sweep: The rows.
        el2n: Also EL2N per token.
        entropy: Also the entropy per token.
        around: Entered around each forward, as the trainer's autocast.
    """
    with preserve_state(model), torch.no_grad():
        model.eval()
        return token_pass(sweep, TokenScorer(model, el2n=el2n, entropy=entropy), around)


def token_means(
    model: nn.Module,
    sweep: Sweep,
    value: Literal["loss", "el2n"],
    *,
    around: Around = nullcontext,
    work: ResumablePass | None = None,
) -> NDArray[Any]:
    """Return a value averaged over each row's supervised tokens [n], equal on every rank; NaN without any.

    Args:
        model: The outermost module to call, not the DDP or DeepSpeed engine.
        sweep: The rows.
        value: What is averaged.
        around: Entered around each forward, as the trainer's autocast.
        work: Write to disk as they come, and go on after a kill; None holds them in memory.
    """
    scorer = TokenScorer(model, el2n=value == "el2n")
    return _quiet_pass(model, sweep, lambda batch: scorer(batch).means(value), (), around, work)


def row_embeddings(
    model: nn.Module,
    sweep: Sweep,
    spec: EmbeddingSpec,
    *,
    around: Around = nullcontext,
    work: ResumablePass | None = None,
) -> NDArray[Any]:
    """Return one vector per row of the sweep [n, D], equal on every rank; NaN where there is nothing to pool.

    Args:
        model: The outermost module to call, not the DDP or DeepSpeed engine.
        sweep: The rows.
        spec: How hidden states become a vector.
        around: Entered around each forward, as the trainer's autocast.
        work: Write the vectors to disk as they come, go on after a kill, and return them memory-mapped
            in the type that it was opened with; None holds them in memory as float32.
    """
    tail = () if work is not None else (embedding_size(model),)
    return _quiet_pass(model, sweep, lambda batch: embed_batch(model, batch, spec), tail, around, work)


def segment_sums(
    model: nn.Module, sweep: Sweep, around: Around = nullcontext, work: ResumablePass | None = None
) -> NDArray[np.float32]:
    """Return the sum of the losses of each sequence and its number of supervised tokens, float32 [P, 2].

    Args:
        model: The outermost module to call, in eval mode; the caller keeps random states.
        sweep: The sequences.
        around: Entered around each forward, as the trainer's autocast.
        work: Write to disk as they come, and go on after a kill; None holds them in memory.
    """
    scorer = TokenScorer(model)

    def score(batch: dict[str, Any]) -> torch.Tensor:
        with around():
            tokens = scorer(batch)
        sums = tokens.loss.new_zeros(tokens.num_rows).index_add_(0, tokens.row, tokens.loss)
        return torch.stack([sums, torch.bincount(tokens.row, minlength=tokens.num_rows).float()], dim=1)

    with torch.no_grad():
        return row_pass(sweep, score, (2,), work)


def row_gate_loads(
    model: nn.Module, gates: GateLoads, sweep: Sweep, *, around: Around = nullcontext, work: ResumablePass | None = None
) -> NDArray[Any]:
    """Return the expert loads of each row of the sweep [n, layers, experts], equal on every rank."""
    return _quiet_pass(model, sweep, gates, gates.shape, around, work)


def row_logits(
    model: nn.Module,
    scorer: LogitScorer,
    sweep: Sweep,
    width: int,
    *,
    around: Around = nullcontext,
    work: ResumablePass | None = None,
) -> NDArray[Any]:
    """Return the nuclear norm and the sketch of each row's logits [n, width], equal on every rank."""
    return _quiet_pass(model, sweep, scorer, (width,), around, work)


def _quiet_pass(
    model: nn.Module,
    sweep: Sweep,
    score: Callable[[dict[str, Any]], torch.Tensor],
    tail: tuple[int, ...],
    around: Around,
    work: ResumablePass | None,
) -> NDArray[Any]:
    """Score rows in eval mode without gradient, under ``around``, and leave modes and random states as they were."""

    def scored(batch: dict[str, Any]) -> torch.Tensor:
        with around():
            return score(batch)

    with preserve_state(model), torch.no_grad():
        model.eval()
        return row_pass(sweep, scored, tail, work)
