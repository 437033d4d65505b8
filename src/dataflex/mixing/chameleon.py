"""Weights of domains from their embeddings, by ridge leverage scores.

Source: Chameleon (Xie et al., ICML 2025, arXiv 2505.24844).

A domain that the others explain well (low score) is general: pre-training weighs it up. One that
they do not (high score) is unique: fine-tuning weighs it up.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import DataError

__all__ = ["PURPOSES", "Purpose", "gram", "leverage", "weights"]

Floats = NDArray[np.float64]
Purpose = Literal["pretraining", "finetuning"]

PURPOSES: tuple[Purpose, ...] = get_args(Purpose)

_LEAST = 1e-9
_RIDGE = 10.0


def gram(means_KE: Floats) -> Floats:
    """Return the centred linear kernel [K, K] of the domains' mean embeddings [K, E]: H M M' H, H = I - 1/K."""
    centred = means_KE - means_KE.mean(axis=0)
    return centred @ centred.T


def leverage(gram_KK: Floats, ridge: float = _RIDGE) -> Floats:
    """Return S = diag(G (G + ridge K I)^-1), normalised to sum 1 [K].

    Args:
        gram_KK: Kernel of the domains [K, K], symmetric and positive semi-definite.
        ridge: lambda; it is multiplied by the number of domains.

    Raises:
        DataError: The kernel is not finite, or zero: all domains look alike.
    """
    num = len(gram_KK)
    if gram_KK.shape != (num, num) or num < 2 or not np.isfinite(gram_KK).all():
        raise DataError(f"the kernel of the domains must be finite and square, at least 2 x 2, found {gram_KK.shape}")
    raw = np.diag(np.linalg.solve(gram_KK + ridge * num * np.eye(num), gram_KK)).copy()
    raw[raw < 0] = 0.0  # rounding
    if not raw.sum() > _LEAST:
        raise DataError("the domains' mean embeddings are all alike, so that nothing tells the domains apart")
    return raw / raw.sum()


def weights(scores_K: Floats, purpose: Purpose, names: tuple[str, ...] = ()) -> Floats:
    """Return proportions [K]: softmax((1/S) / 5) for pre-training, softmax(S / 0.2) for fine-tuning.

    Raises:
        DataError: A score is near 0, where 1/S has no meaning: that domain is the mean of all.
    """
    if purpose == "finetuning":
        logits = scores_K / 0.2
    else:
        least = int(scores_K.argmin())
        if scores_K[least] < _LEAST:
            name = names[least] if names else f"number {least}"
            raise DataError(
                f"domain {name} is the mean of all domains up to rounding (score {scores_K[least]:.2g}), so that its "
                "pre-training weight is not defined; use more samples, another model, or --purpose finetuning"
            )
        logits = (1.0 / scores_K) / 5.0
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()
