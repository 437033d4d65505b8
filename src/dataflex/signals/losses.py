"""Per-sample losses: cross-entropy averaged over a row's supervised tokens, in eval mode.

Preference rows (stages dpo) are scored by their chosen answer, kto rows by their answer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from dataflex.signals.cross_entropy import token_cross_entropy

__all__ = ["model_inputs", "row_losses", "token_mean_losses"]

_IGNORE = -100
_NOT_FOR_THE_MODEL = frozenset({"labels", "kto_tags"})


def model_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a collated batch that the model's forward takes, without labels."""
    return {
        key: value
        for key, value in batch.items()
        if key not in _NOT_FOR_THE_MODEL and not key.startswith("kl_") and value is not None
    }


def token_mean_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the token-mean loss of each row, NaN where no token is supervised.

    Args:
        logits: [B, T, V] in any floating dtype.
        labels: [B, T], -100 is ignored.

    Returns:
        fp32 [B].
    """
    targets = F.pad(labels, (0, 1), value=_IGNORE)[..., 1:].to(logits.device)
    losses, _ = token_cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), _IGNORE)
    return losses.view(targets.shape).sum(dim=1) / targets.ne(_IGNORE).sum(dim=1)


def row_losses(model: torch.nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """Run the model on a collated batch and return ``token_mean_losses`` [B], with gradient if enabled."""
    outputs = model(**model_inputs(batch), use_cache=False)
    return token_mean_losses(outputs.logits, batch["labels"])
