"""Formulas of the built-in layer kinds.

LoRA's A and B are plain linear layers inside peft's wrapper and need nothing of their own. A module
is matched by the very ``forward`` it runs: a subclass that overrides it computes something else.
Source: methods of per-sample gradients by layer inputs and output gradients, Goodfellow 2015
(arXiv 1510.01799); magnitude of DoRA: arXiv 2402.09353, section 4.3 (the norm is held constant).
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from dataflex.errors import UnsupportedError
from dataflex.signals.gradients.pieces import Factors, Piece
from dataflex.signals.gradients.registry import Kept, gradient_of

__all__: list[str] = []


def _tokens(tensor: torch.Tensor) -> torch.Tensor:
    """View [b, ..., n] as [b, T, n]."""
    return tensor.unsqueeze(1) if tensor.dim() == 2 else tensor.flatten(1, -2)


def _summed(per_token: torch.Tensor, trailing: int = 1) -> torch.Tensor:
    """Sum [b, ..., *trailing] over everything between, in fp32."""
    between = tuple(range(1, per_token.dim() - trailing))
    return per_token.sum(dim=between, dtype=torch.float32) if between else per_token.float()


@gradient_of("linear", matches=lambda m: type(m).forward is nn.Linear.forward, parameters=("weight", "bias"))
def _linear(module: nn.Linear, kept: Kept, grad: torch.Tensor, wanted: frozenset[str]) -> dict[str, Piece]:
    pieces: dict[str, Piece] = {}
    if "weight" in wanted:
        pieces["weight"] = Factors(left=_tokens(grad), right=_tokens(kept[0].to(grad.dtype)))
    if "bias" in wanted:
        pieces["bias"] = _summed(grad)
    return pieces


@gradient_of("conv1d", matches=lambda m: type(m).forward is Conv1D.forward, parameters=("weight", "bias"))
def _conv1d(module: nn.Module, kept: Kept, grad: torch.Tensor, wanted: frozenset[str]) -> dict[str, Piece]:
    pieces: dict[str, Piece] = {}
    if "weight" in wanted:  # stored as [inputs, outputs]
        pieces["weight"] = Factors(left=_tokens(kept[0].to(grad.dtype)), right=_tokens(grad))
    if "bias" in wanted:
        pieces["bias"] = _summed(grad)
    return pieces


def _is_embedding(module: nn.Module) -> bool:
    if type(module).forward is not nn.Embedding.forward:
        return False
    return module.max_norm is None and not module.scale_grad_by_freq  # both couple the samples of a batch


@gradient_of("embedding", matches=_is_embedding, parameters=("weight",))
def _embedding(module: nn.Embedding, kept: Kept, grad: torch.Tensor, wanted: frozenset[str]) -> dict[str, Piece]:
    ids, grad = kept[0].reshape(len(grad), -1), grad.reshape(len(grad), -1, grad.shape[-1])
    if module.padding_idx is not None:  # torch gives this row no gradient
        grad = grad.masked_fill(ids.eq(module.padding_idx).unsqueeze(-1), 0.0)
    return {"weight": Factors(left=ids, right=grad)}


@gradient_of("layer norm", matches=lambda m: type(m).forward is nn.LayerNorm.forward, parameters=("weight", "bias"))
def _layer_norm(module: nn.LayerNorm, kept: Kept, grad: torch.Tensor, wanted: frozenset[str]) -> dict[str, Piece]:
    pieces: dict[str, Piece] = {}
    trailing = len(module.normalized_shape)
    if "weight" in wanted:
        normalized = nn.functional.layer_norm(kept[0].float(), module.normalized_shape, eps=module.eps)
        pieces["weight"] = _summed(grad.float() * normalized, trailing)
    if "bias" in wanted:
        pieces["bias"] = _summed(grad, trailing)
    return pieces


def _rms_eps(module: Any, x: torch.Tensor) -> float:
    for name in ("variance_epsilon", "eps", "epsilon"):
        value = getattr(module, name, None)
        if value is not None:
            return float(value)
    return float(torch.finfo(x.dtype).eps)  # torch.nn.RMSNorm(eps=None)


def _rms_normalized(module: Any, x: torch.Tensor) -> torch.Tensor:
    values = x.float()
    return values * torch.rsqrt(values.square().mean(dim=-1, keepdim=True) + _rms_eps(module, x))


def _is_rms_norm(module: nn.Module) -> bool:
    own = dict(module.named_parameters(recurse=False))
    return type(module).__name__.endswith("RMSNorm") and set(own) == {"weight"} and not list(module.children())


def _check_rms_norm(module: nn.Module, kept: Kept, output: torch.Tensor) -> str | None:
    """Make sure that the output is (weight or 1 + weight) * normalized input, whatever the class is called."""
    sample = kept[0].reshape(-1, kept[0].shape[-1])[:64]
    given = output.reshape(-1, output.shape[-1])[:64].float()
    weight: Any = module.weight
    if weight.dim() != 1 and weight.numel():
        return "its weight has more than one dimension"
    normalized = _rms_normalized(module, sample)
    tolerance = 1e-4 if output.dtype == kept[0].dtype == torch.float32 else 3e-2
    if weight.numel() == normalized.shape[-1] and type(weight.data) in (torch.Tensor, nn.Parameter):
        candidates = [weight.detach().float(), 1 + weight.detach().float()]
    else:  # partitioned over ranks, released after the forward: fit the weight
        candidates = [(given * normalized).sum(dim=0) / normalized.square().sum(dim=0).clamp_min(1e-30)]
    if any(torch.allclose(given, w * normalized, rtol=tolerance, atol=tolerance) for w in candidates):
        return None
    return "its output is not weight * x / rms(x)"


@gradient_of("rms norm", matches=_is_rms_norm, parameters=("weight",), check=_check_rms_norm)
def _rms_norm(module: nn.Module, kept: Kept, grad: torch.Tensor, wanted: frozenset[str]) -> dict[str, Piece]:
    return {"weight": _summed(grad.float() * _rms_normalized(module, kept[0]))}


def _is_dora(module: nn.Module) -> bool:
    peft = sys.modules.get("peft.tuners.lora.dora")  # not imported: no module can be of its classes
    return peft is not None and type(module).forward is peft.DoraLinearLayer.forward


def _keep_dora(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> Kept:
    """Keep output + base result = magnitude * direction, from which the magnitude is divided out later."""
    layer, base = kwargs["base_layer"], kwargs.get("base_result")
    if base is None:
        base = layer(args[0])
    return (output + base if layer.bias is None else output + base - layer.bias,)


@gradient_of("dora magnitude", matches=_is_dora, parameters=("weight",), keep=_keep_dora)
def _dora(module: Any, kept: Kept, grad: torch.Tensor, wanted: frozenset[str]) -> dict[str, Piece]:
    magnitude = module.weight.detach().float()
    if magnitude.numel() != grad.shape[-1]:
        raise UnsupportedError(
            "gradients of DoRA's magnitudes need whole parameters, but they are partitioned over ranks"
        )
    return {"weight": _summed(grad.float() * kept[0].float()) / magnitude}
