"""TRL's SFTTrainer from 1.16 on, which trains and measures without logits (``fused_lm_head``).

Where its loss is made from logits, by us or under label smoothing, it goes forward once more for its metrics, with
other dropout. Upstream names relied upon: ``router_aux_loss_coef`` of the trainer, and of the
outputs ``log_probs``, ``label_mask``, ``entropy``, ``is_top1`` and ``aux_loss``.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from dataflex.train.loss import token_losses


def fuses(trainer: Any) -> bool:
    """Return whether a trainer of stage sft is TRL's from 1.16 on."""
    return trainer.dataflex.setup.stage == "sft" and hasattr(trainer, "router_aux_loss_coef")


class Once:
    """A model for one ``compute_loss``: goes forward once, and gives TRL's metrics from the logits of that pass.

    Args:
        model: The model.
        labels: Labels of the batch [R, T].
    """

    def __init__(self, model: Any, labels: torch.Tensor | None) -> None:
        self._model, self._labels = model, labels
        self.outputs: Any = None

    def __call__(self, *, fused_lm_head: bool = False, **inputs: Any) -> Any:
        """Return the model's outputs; of a second pass without logits those that TRL's metrics are made from."""
        if fused_lm_head and self.outputs is not None and self._labels is not None:
            return self._measured(self.outputs.logits.detach(), self._labels)
        self.outputs = self._model(**inputs, **({"fused_lm_head": True} if fused_lm_head else {}))
        return self.outputs

    def _measured(self, logits: torch.Tensor, labels: torch.Tensor) -> SimpleNamespace:
        found = token_losses(logits, labels, entropy=True)
        assert found.entropy_BT is not None
        mask, right = found.mask_BT[:, :-1], logits[:, :-1].argmax(dim=-1).eq(labels[:, 1:].to(logits.device))
        return SimpleNamespace(
            label_mask=mask,
            entropy=torch.where(mask, found.entropy_BT[:, :-1], 0.0),
            is_top1=right & mask,
            aux_loss=getattr(self.outputs, "aux_loss", None),
        )
