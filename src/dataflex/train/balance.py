"""The balance loss of a mixture of experts, which models add to the cross-entropy by themselves."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["balance_loss"]

_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")


def balance_loss(outputs: Any, config: Any) -> torch.Tensor | None:
    """Return what a model adds to its loss for balanced routers, as it would; None where it adds nothing.

    Args:
        outputs: Output of the model.
        config: Its configuration; for a model of several modes, that of its language part is looked at.
    """
    balance: Any = getattr(outputs, "aux_loss", None)
    if not torch.is_tensor(balance):  # 0 where the routers are not looked at
        return None
    text = config.get_text_config()
    coefficient: float = next((getattr(text, name) for name in _COEFFICIENTS if hasattr(text, name)), 0.0)
    found: torch.Tensor = coefficient * balance
    return found
