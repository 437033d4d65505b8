"""Batches and their losses: what the model is fed, which document a token is of, cross-entropy in chunks.

LLaMA-Factory packs in several forms. ``neat_packing`` numbers the documents 1, 2, ... in the attention mask (0 is
padding); its collator turns that into a block-diagonal [B, 1, T, T] mask, or drops it for FlashAttention and leaves
only ``position_ids``, which restart at each document. Plain ``packing`` restarts them and has a mask of ones.

Values and gradients are those of ``log_softmax`` and ``nll_loss`` over the whole, bit for bit. On a CPU only supervised
positions are computed. On an accelerator, picking them out would make the device wait for their number, so chunks are
slices of all positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F

IGNORE = -100
"""Label of a position that is not supervised."""
_NOT_FOR_THE_MODEL = frozenset({"labels", "kto_tags"})
_Where: TypeAlias = slice | torch.Tensor
_MOSTLY = 0.8  # from this share of supervised positions on, gathering them costs more than it saves
_KEPT_ELEMENTS = 2**24  # 64 MiB
_CHUNK_ELEMENTS = 2**25  # logits of a chunk: 128 MiB in fp32
_CHUNK_ELEMENTS_CPU = 2**21  # stays in the cache: a fifth faster than chunks of 128 MiB
_FEWEST_TOKENS = 256  # fewer would read the weights of a large head again and again


def chunk_tokens(vocabulary: int, device: torch.device) -> int:
    """Return the number of tokens whose logits are computed together."""
    elements = _CHUNK_ELEMENTS_CPU if device.type == "cpu" else _CHUNK_ELEMENTS
    return max(_FEWEST_TOKENS, elements // vocabulary)


def token_cross_entropy(
    logits_NV: torch.Tensor, targets_N: torch.Tensor, *, entropy: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the cross-entropy of each position, fp32 [N] in nats, and the entropy of its prediction or None.

    Positions whose target is -100 have loss 0, no gradient and entropy 0; entropies have no gradient.
    """
    chunks = list(_chunks(targets_N, logits_NV.shape[1]))
    loss_N, entropy_N = _CrossEntropy.apply(logits_NV, targets_N, chunks, entropy)
    return loss_N, entropy_N if entropy else None


class _CrossEntropy(torch.autograd.Function):
    """Keeps the logits and computes log-probabilities twice; of few fp32 logits it keeps log-probabilities instead."""

    @staticmethod
    def forward(
        ctx: Any, logits_NV: torch.Tensor, targets_N: torch.Tensor, chunks: list[_Where], entropy: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        loss_N = torch.zeros(len(targets_N), dtype=torch.float32, device=logits_NV.device)
        entropy_N = torch.zeros_like(loss_N) if entropy else loss_N.new_zeros(0)
        keeps = logits_NV.dtype == torch.float32 and logits_NV.numel() <= _KEPT_ELEMENTS
        ctx.kept = [] if keeps else None
        for where in chunks:
            log_p, targets = F.log_softmax(logits_NV[where].float(), dim=-1), targets_N[where]
            if keeps:
                ctx.kept.append(log_p)
            loss_N[where] = F.nll_loss(log_p, targets, ignore_index=IGNORE, reduction="none")
            if entropy:
                told = -(log_p.exp() * log_p.clamp(min=-1e4)).sum(dim=-1)  # 0 x -inf would be NaN
                entropy_N[where] = told.masked_fill(targets.eq(IGNORE), 0.0)
        saved = [targets_N] if keeps else [targets_N, logits_NV]
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        ctx.chunks, ctx.shape, ctx.dtype = chunks, logits_NV.shape, logits_NV.dtype
        ctx.mark_non_differentiable(entropy_N)
        return loss_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[torch.Tensor, None, None, None]:
        (targets_N, *logits), gradient_N = ctx.saved_tensors, gradients[0]
        whole = bool(ctx.chunks) and isinstance(ctx.chunks[0], slice)
        out_NV = (torch.empty if whole else torch.zeros)(ctx.shape, dtype=ctx.dtype, device=targets_N.device)
        for place, where in enumerate(ctx.chunks):
            targets, log_p = targets_N[where], _log_p(ctx, logits, place)
            slope = torch.where(targets.ne(IGNORE), gradient_N[where], 0.0)
            part = torch.zeros_like(log_p).scatter_(1, targets.clamp(min=0)[:, None], -slope[:, None])
            # The gradient of log_softmax itself: writing p - onehot(y) out would round otherwise.
            out_NV[where] = torch._log_softmax_backward_data(part, log_p, -1, torch.float32).to(ctx.dtype)
        return out_NV, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[torch.Tensor, None]:
        (targets_N, *logits), tangent_NV = ctx.saved_tensors, tangents[0]
        out_N = torch.zeros(len(targets_N), dtype=torch.float32, device=targets_N.device)
        for place, where in enumerate(ctx.chunks):
            targets, tangent = targets_N[where], tangent_NV[where].float()
            mean = (_log_p(ctx, logits, place).exp() * tangent).sum(dim=-1)
            change = mean - tangent.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
            out_N[where] = change.masked_fill(targets.eq(IGNORE), 0.0)
        return out_N, None


def _log_p(ctx: Any, logits: list[torch.Tensor], place: int) -> torch.Tensor:
    """Return the log-probabilities of a chunk, kept or worked out again."""
    if ctx.kept is not None:
        kept: torch.Tensor = ctx.kept[place]
        return kept
    return F.log_softmax(logits[0][ctx.chunks[place]].float(), dim=-1)


def _chunks(targets_N: torch.Tensor, vocabulary: int) -> Iterator[_Where]:
    size = chunk_tokens(vocabulary, targets_N.device)
    if targets_N.device.type == "cpu":
        supervised = targets_N.ne(IGNORE).nonzero().squeeze(1)
        if len(supervised) < _MOSTLY * len(targets_N):
            yield from supervised.split(size)
            return
    yield from (slice(start, start + size) for start in range(0, len(targets_N), size))


def model_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a collated batch that the model's forward takes, without labels."""
    return {
        key: value
        for key, value in batch.items()
        if key not in _NOT_FOR_THE_MODEL and not key.startswith("kl_") and value is not None
    }


def token_mean_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the token-mean loss of each row, fp32 [B], NaN where no token is supervised.

    Logits are [B, T, V] in any floating dtype, labels [B, T].
    """
    sums, tokens = _summed(logits, labels)
    return sums / tokens


def _summed(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    targets = F.pad(labels, (0, 1), value=IGNORE)[..., 1:].to(logits.device)
    losses, _ = token_cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))
    return losses.view(targets.shape).sum(dim=1), targets.ne(IGNORE).sum(dim=1)


def row_losses(model: torch.nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """Run the model on a collated batch and return ``token_mean_losses`` [B], with gradient if enabled."""
    outputs = model(**model_inputs(batch), use_cache=False)
    return token_mean_losses(outputs.logits, batch["labels"])


def row_sums(model: torch.nn.Module, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sums of each row's token losses, fp32 [B], and their numbers [B], as ``row_losses`` does."""
    outputs = model(**model_inputs(batch), use_cache=False)
    return _summed(outputs.logits, batch["labels"])


def real_tokens(batch: dict[str, Any]) -> torch.Tensor:
    """Return bool [B, T]: True where there is a token and not padding."""
    mask = batch.get("attention_mask")
    if mask is None:
        return torch.ones_like(batch["input_ids"], dtype=torch.bool)
    if mask.dim() == 4:  # a real token may look at itself; additive masks hold 0 there, boolean ones True
        diagonal = mask[:, 0].diagonal(dim1=-2, dim2=-1)
        return diagonal if diagonal.dtype == torch.bool else diagonal.eq(0)
    return mask.ne(0)


def document_ids(batch: dict[str, Any]) -> torch.Tensor:
    """Return int64 [B, T]: the document of each token, counted from 0 in its row; -1 for padding.

    Padding that plain packing marks as real comes out as documents of one token each.
    """
    real = real_tokens(batch)
    mask = batch.get("attention_mask")
    if mask is not None and mask.dim() == 4:
        before = mask[:, 0].diagonal(offset=-1, dim1=-2, dim2=-1)
        linked = before if before.dtype == torch.bool else before.eq(0)
        starts = real & ~F.pad(linked, (1, 0), value=False)
    elif mask is not None and bool((mask > 1).any()):
        starts = real & F.pad(mask[:, 1:].ne(mask[:, :-1]), (1, 0), value=True)
    else:
        starts = real & ~F.pad(real[:, :-1], (1, 0), value=False)
        positions = batch.get("position_ids")
        if positions is not None:
            at_zero = positions.eq(0)
            starts = starts | (real & (at_zero.all(dim=0) if at_zero.dim() == 3 else at_zero))
    return torch.where(real, starts.long().cumsum(dim=1) - 1, -1)
