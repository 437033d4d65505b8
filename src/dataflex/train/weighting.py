"""The one weighted loss: token losses, weights, an explicit denominator.

Every reweighting passes through ``weighted_loss``; no other module multiplies losses. Definitions
follow Z = weight_sum | num_tokens | num_sequences of ``method.Weighter``. With unit weights under ``weight_sum``
and ``num_tokens`` the value and the gradient are the stock Trainer's, bit for bit: the gradient of a sum
of unit-weighted token losses is that of ``cross_entropy(reduction="sum")``, and the reported value
is corrected for the order of summation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from dataflex import comm
from dataflex.errors import ComponentError
from dataflex.method import BatchView, Normalizer, Rows, Weighter
from dataflex.sequences import Sequences
from dataflex.signals.losses import token_cross_entropy
from dataflex.train.answers import check_weights

__all__ = [
    "IGNORE_INDEX",
    "TokenLosses",
    "checked",
    "document_sequences",
    "micro_batch_scale",
    "row_sequences",
    "sample_means",
    "token_losses",
    "view",
    "weighted_loss",
]

IGNORE_INDEX = -100


@dataclass(frozen=True, kw_only=True)
class TokenLosses:
    """Token losses of one micro-batch of R rows.

    Attributes:
        loss_BT: Cross-entropy per position [R, T] in fp32, with gradient; 0 where ``mask_BT`` is False.
        mask_BT: Positions whose next token is supervised.
        plain_sum: Detached sum, added up in the order of ``cross_entropy(reduction="sum")``.
        entropy_BT: Entropy of each prediction in nats, 0 where ``mask_BT`` is False; None if not asked for.
    """

    loss_BT: torch.Tensor
    mask_BT: torch.Tensor
    plain_sum: torch.Tensor
    entropy_BT: torch.Tensor | None = None


def row_sequences(rows: Rows) -> Sequences:
    """Return the rows of a micro-batch as its sequences."""
    return Sequences(rows_B=rows)


def document_sequences(documents_BT: torch.Tensor, mask_BT: torch.Tensor, rows: Rows) -> Sequences:
    """Return the documents with a supervised token as the sequences of a packed micro-batch.

    A position predicts the token after it and belongs to that token's document.

    Args:
        documents_BT: Document of each token in its row, see ``signals.packing.document_ids``.
        mask_BT: Positions whose next token is supervised.
        rows: Row ids of the micro-batch [R].
    """
    predicted = F.pad(documents_BT[:, 1:], (0, 1), value=0).clamp(min=0)
    width = int(predicted.max()) + 1 if predicted.numel() else 1
    keys_BT = torch.arange(len(rows), device=mask_BT.device)[:, None] * width + predicted
    keys, inverse = torch.unique(keys_BT[mask_BT], return_inverse=True)
    index_BT = torch.zeros_like(keys_BT)
    index_BT[mask_BT] = inverse
    return Sequences(rows_B=rows[(keys // width).cpu().numpy()], index_BT=index_BT)


def token_losses(logits: torch.Tensor, labels: torch.Tensor, *, entropy: bool = False) -> TokenLosses:
    """Return next-token losses of ``logits`` [R, T, V] against ``labels`` [R, T] (-100 is ignored)."""
    targets = F.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:].to(logits.device)
    mask_BT = targets.ne(IGNORE_INDEX)
    flat = targets.reshape(-1)
    loss, spread = token_cross_entropy(logits.view(-1, logits.shape[-1]), flat, IGNORE_INDEX, entropy=entropy)
    # The stock loss adds in the order of this kernel, whatever the number of classes: one class is enough for it.
    picked = torch.where(mask_BT.reshape(-1), 0, IGNORE_INDEX)
    plain = F.nll_loss(-loss.detach()[:, None], picked, ignore_index=IGNORE_INDEX, reduction="sum")
    return TokenLosses(
        loss_BT=loss.view(targets.shape),
        mask_BT=mask_BT,
        plain_sum=plain,
        entropy_BT=None if spread is None else spread.view(targets.shape),
    )


def sample_means(
    loss_BT: torch.Tensor, mask_BT: torch.Tensor, sequences: Sequences | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token-mean losses [B] (0 without supervised tokens) and supervised tokens [B]."""
    if sequences is None or sequences.index_BT is None:
        tokens_B = mask_BT.sum(dim=1)
        return loss_BT.sum(dim=1) / tokens_B.clamp(min=1), tokens_B
    tokens_B = sequences.sums(mask_BT.long())
    return sequences.sums(loss_BT) / tokens_B.clamp(min=1), tokens_B


def view(
    losses: TokenLosses,
    sequences: Sequences,
    *,
    domains_B: NDArray[np.int64],
    step: int,
    total_steps: int,
    num_micro_batches: int = 1,
    reference_BT: torch.Tensor | None = None,
    embeddings_BH: torch.Tensor | None = None,
    columns: Mapping[str, NDArray[Any]] | None = None,
) -> BatchView:
    """Build what a weighter sees of a micro-batch; gathers sample losses over the ranks (collective)."""
    loss_BT = losses.loss_BT.detach()
    loss_B, tokens_B = sample_means(loss_BT, losses.mask_BT, sequences)
    # Plans give every rank as many rows in a micro-batch, but packed rows hold any number of documents.
    equal = sequences.index_BT is None
    both, local = comm.gather_rows(torch.stack([loss_B, tokens_B.to(loss_B.dtype)], dim=1), equal=equal)
    return BatchView(
        rows_B=sequences.rows_B,
        domains_B=domains_B,
        loss_B=loss_B,
        tokens_B=tokens_B,
        loss_BT=loss_BT,
        mask_BT=losses.mask_BT,
        loss_M=both[:, 0],
        tokens_M=both[:, 1].to(torch.int64),
        local=local,
        step=step,
        total_steps=total_steps,
        num_micro_batches=num_micro_batches,
        sequence_BT=sequences.index_BT,
        reference_BT=reference_BT,
        entropy_BT=losses.entropy_BT,
        embeddings_BH=embeddings_BH,
        columns=columns or {},
    )


def checked(weights: torch.Tensor, weighter: Weighter, losses: TokenLosses, sequences: Sequences) -> torch.Tensor:
    """Return weights as fp32 [B, 1] by sequence or [R, T] by position, on the device of the losses.

    Raises:
        ComponentError: Wrong shape. Values are checked by ``WeightStats``.
    """
    count, shape = len(sequences.rows_B), tuple(losses.loss_BT.shape)
    check_weights(weighter, weights, [(count,), shape])
    weights = weights.detach().to(losses.loss_BT.device, torch.float32)
    return weights[:, None] if weights.dim() == 1 else weights


def micro_batch_scale(losses: TokenLosses, weights: torch.Tensor, sequences: Sequences) -> torch.Tensor:
    """Return what makes the weights of the micro-batch of all ranks 1 in the mean over its tokens (collective).

    Args:
        losses: Token losses of this rank's part.
        weights: [B, 1] or [R, T], from ``checked``.
        sequences: Which sequence each position belongs to.

    Returns:
        float64 scalar; 0 where all weights are.
    """
    if weights.shape[1] == 1:
        weights = sequences.spread(weights[:, 0])
    return comm.ratio_of_sums(losses.mask_BT.sum(), (weights * losses.mask_BT).sum())


def weighted_loss(
    losses: TokenLosses,
    weights: torch.Tensor,
    *,
    sequences: Sequences,
    normalizer: Normalizer,
    num_items: torch.Tensor | float,
    num_micro_batches: int,
    step_scale: torch.Tensor | float | None,
    replicas: int,
) -> torch.Tensor:
    """Return this micro-batch's share of the step's loss, to be summed over micro-batches and ranks.

    A step without a supervised token has loss 0 and no gradient; the stock loss would be NaN.

    Args:
        losses: Token losses of this rank's micro-batch.
        weights: [B, 1] or [R, T], from ``checked``.
        sequences: Which sequence each position belongs to.
        normalizer: ``weight_sum``, ``num_tokens`` or ``num_sequences``.
        num_items: Supervised tokens of the whole optimizer step (all ranks and micro-batches).
        num_micro_batches: Micro-batches of this optimizer step.
        step_scale: For ``weight_sum``: what makes the weights 1 in the mean, num_items / sum(w * tokens) over
            the step where they are known beforehand, else ``micro_batch_scale``.
        replicas: Factor that the caller does not apply itself (1 when it multiplies by the ranks).
    """
    loss_BT, mask_BT = losses.loss_BT, losses.mask_BT
    if normalizer == "num_sequences":
        loss_B, _ = sample_means(loss_BT, mask_BT, sequences)
        if len(weights) != len(loss_B) or weights.shape[1] != 1:
            raise ComponentError("normalizer 'num_sequences' takes one weight per sequence")
        return (weights[:, 0] * loss_B).sum() * (replicas / num_micro_batches)
    if weights.shape[1] == 1:
        weights = sequences.spread(weights[:, 0])
    if normalizer == "weight_sum":
        assert step_scale is not None
        weights = weights * torch.as_tensor(step_scale).to(weights)
    weighted = (weights * loss_BT).sum()
    # Unit weights report the very bits of the stock loss, whose kernel adds in another order.
    order = losses.plain_sum - loss_BT.detach().sum()
    mean = (weights * mask_BT).sum() / mask_BT.sum().clamp(min=1)
    weighted = weighted + order * mean
    return weighted / torch.as_tensor(num_items, device=weighted.device).clamp(min=1)
