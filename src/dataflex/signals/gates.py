"""Which experts a mixture-of-experts model sends the tokens of a row to.

A load is the number of tokens for which an expert is among the top k of its layer's router. The
probabilities are those of ``output_router_logits``; padding is left out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dataflex.errors import UnsupportedError
from dataflex.signals.anatomy import anatomy, narrow_head
from dataflex.signals.losses import model_inputs
from dataflex.signals.packing import real_tokens
from dataflex.signals.passes import preserved

__all__ = ["GateLoads"]


class GateLoads:
    """Reads the routers of a model.

    Args:
        model: The outermost module to call, not the DDP or DeepSpeed engine.

    Raises:
        UnsupportedError: The model does not say how many experts a token gets, or gives no router logits.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._parts = model, anatomy(model)
        self._shape: tuple[int, int] | None = None
        config = self._parts.text_config
        self._top_k = getattr(config, "num_experts_per_tok", None) or getattr(config, "num_experts_per_token", None)
        if not self._top_k:
            raise UnsupportedError(
                f"{type(self._parts.lm).__name__} is no mixture-of-experts model (its configuration has no "
                "num_experts_per_tok), so there are no gates to look at"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """MoE layers and experts.

        Raises:
            UnsupportedError: The model gives no router logits.
        """
        if self._shape is None:
            tokens = torch.zeros(1, 1, dtype=torch.int64, device=next(self._model.parameters()).device)
            with preserved(self._model):
                self._model.eval()
                loads = self({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})
            self._shape = (int(loads.shape[1]), int(loads.shape[2]))
        return self._shape

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any]) -> torch.Tensor:
        """Return the loads of each row and layer, fp32 [B, L, E]."""
        with narrow_head(self._parts):
            outputs = self._model(**model_inputs(batch), use_cache=False, output_router_logits=True)
        layers = getattr(outputs, "router_logits", None)
        if not layers:
            raise UnsupportedError(f"{type(self._parts.lm).__name__} gives no router logits (output_router_logits)")
        real = real_tokens(batch)
        rows, width = real.shape
        loads = []
        for logits in layers:
            chosen = logits.float().topk(self._top_k, dim=-1).indices
            hits = torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, chosen, 1.0)
            loads.append((hits.view(rows, width, -1) * real[:, :, None]).sum(dim=1))
        return torch.stack(loads, dim=1)
