"""Formulas for the per-sample gradients of a layer's parameters, one decorated function a kind of layer.

Given what was kept of a call (usually the layer's input) and the gradient of the summed row losses with respect to
the layer's output, a formula returns the per-sample gradients of the layer's own parameters:

    @gradient_of("scale", matches=lambda m: type(m) is Scale, parameters=("weight",))
    def _scale(module, kept, grad, wanted):
        return {"weight": (grad * kept[0]).sum(dim=1)}

The latest kind that matches is taken, so that a user's kind goes before the built-in ones. A module is matched by the
very ``forward`` it runs: a subclass that overrides it computes something else. A module that no kind matches is
differentiated by ``torch.func``. LoRA's A and B are plain linear layers inside peft's wrapper.

Sources: Goodfellow 2015 (arXiv 1510.01799); magnitude of DoRA: arXiv 2402.09353, section 4.3 (norm held constant).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from dataflex.errors import UnsupportedError
from dataflex.signals.gradients.factors import Factors, SampleGradients

Kept: TypeAlias = tuple[torch.Tensor, ...]
Found: TypeAlias = dict[str, SampleGradients]
Formula: TypeAlias = Callable[[Any, Kept, torch.Tensor, frozenset[str]], Mapping[str, SampleGradients]]
"""(layer, what was kept [b, ...], gradient of the layer's output [b, ...], names of the parameters) -> by name."""


def _first_input(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: torch.Tensor) -> Kept:
    return (args[0] if args else next(iter(kwargs.values())),)


@dataclass(frozen=True, kw_only=True)
class LayerKind:
    """A layer kind.

    ``keep`` is what to keep of a call (module, args, kwargs, output), tensors [b, ...]; the first input if left out.
    ``check`` looks at the first call (module, kept, output): the reason why the formula does not hold there, or None.
    """

    name: str  # for messages
    matches: Callable[[nn.Module], bool]  # exact, since a subclass may compute something else
    parameters: tuple[str, ...]  # names of the parameters that the formula covers
    sample: Formula  # the formula
    keep: Callable[[nn.Module, tuple[Any, ...], dict[str, Any], torch.Tensor], Kept] = _first_input
    check: Callable[[nn.Module, Kept, torch.Tensor], str | None] | None = None


_KINDS: list[LayerKind] = []


def gradient_of(name: str, **options: Any) -> Callable[[Formula], Formula]:
    """Register the decorated formula; ``options`` are the other fields of ``LayerKind``."""

    def register(sample: Formula) -> Formula:
        _KINDS.append(LayerKind(name=name, sample=sample, **options))
        return sample

    return register


def kind_of(module: nn.Module) -> LayerKind | None:
    """Return the kind of a module, the latest registered first, or None."""
    return next((kind for kind in reversed(_KINDS) if kind.matches(module)), None)


def _tokens(tensor: torch.Tensor) -> torch.Tensor:
    """View [b, ..., n] as [b, T, n]."""
    return tensor.unsqueeze(1) if tensor.dim() == 2 else tensor.flatten(1, -2)


def _summed(per_token: torch.Tensor, trailing: int = 1) -> torch.Tensor:
    """Sum [b, ..., *trailing] over everything between, in fp32."""
    between = tuple(range(1, per_token.dim() - trailing))
    return per_token.sum(dim=between, dtype=torch.float32) if between else per_token.float()


def _of_matrix(left: torch.Tensor, right: torch.Tensor, grad: torch.Tensor, wanted: frozenset[str]) -> Found:
    found: Found = {}
    if "weight" in wanted:
        found["weight"] = Factors(left=_tokens(left), right=_tokens(right))
    if "bias" in wanted:
        found["bias"] = _summed(grad)
    return found


@gradient_of("linear", matches=lambda m: type(m).forward is nn.Linear.forward, parameters=("weight", "bias"))
def _linear(module: nn.Linear, kept: Kept, grad: torch.Tensor, wanted: frozenset[str]) -> Found:
    return _of_matrix(grad, kept[0].to(grad.dtype), grad, wanted)


@gradient_of("conv1d", matches=lambda m: type(m).forward is Conv1D.forward, parameters=("weight", "bias"))
def _conv1d(module: nn.Module, kept: Kept, grad: torch.Tensor, wanted: frozenset[str]) -> Found:
    return _of_matrix(kept[0].to(grad.dtype), grad, grad, wanted)  # the weight is stored as [inputs, outputs]


def _is_embedding(module: nn.Module) -> bool:
    if type(module).forward is not nn.Embedding.forward:
        return False
    return module.max_norm is None and not module.scale_grad_by_freq  # both couple the samples of a batch


@gradient_of("embedding", matches=_is_embedding, parameters=("weight",))
def _embedding(module: nn.Embedding, kept: Kept, grad: torch.Tensor, wanted: frozenset[str]) -> Found:
    ids, grad = kept[0].reshape(len(grad), -1), grad.reshape(len(grad), -1, grad.shape[-1])
    if module.padding_idx is not None:  # torch gives this row no gradient
        grad = grad.masked_fill(ids.eq(module.padding_idx).unsqueeze(-1), 0.0)
    return {"weight": Factors(left=ids, right=grad)}


@gradient_of("layer norm", matches=lambda m: type(m).forward is nn.LayerNorm.forward, parameters=("weight", "bias"))
def _layer_norm(module: nn.LayerNorm, kept: Kept, grad: torch.Tensor, wanted: frozenset[str]) -> Found:
    found: Found = {}
    trailing = len(module.normalized_shape)
    if "weight" in wanted:
        normalized = nn.functional.layer_norm(kept[0].float(), module.normalized_shape, eps=module.eps)
        found["weight"] = _summed(grad.float() * normalized, trailing)
    if "bias" in wanted:
        found["bias"] = _summed(grad, trailing)
    return found


def _rms_scale(module: Any, x: torch.Tensor) -> torch.Tensor:
    """Return what an RMS norm multiplies x [..., n] by, before its weight, fp32 [..., 1]."""
    given = [getattr(module, name, None) for name in ("variance_epsilon", "eps", "epsilon")]
    # None is what torch.nn.RMSNorm(eps=None) has.
    eps = next((float(value) for value in given if value is not None), float(torch.finfo(x.dtype).eps))
    norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32)).float()
    return torch.rsqrt(norms.square() / x.shape[-1] + eps)


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
    normalized = sample.float() * _rms_scale(module, sample)
    tolerance = 1e-4 if output.dtype == kept[0].dtype == torch.float32 else 3e-2
    if weight.numel() == normalized.shape[-1] and type(weight.data) in (torch.Tensor, nn.Parameter):
        candidates = [weight.detach().float(), 1 + weight.detach().float()]
    else:  # partitioned over ranks, released after the forward: fit the weight
        candidates = [(given * normalized).sum(dim=0) / normalized.square().sum(dim=0).clamp_min(1e-30)]
    if any(torch.allclose(given, w * normalized, rtol=tolerance, atol=tolerance) for w in candidates):
        return None
    return "its output is not weight * x / rms(x)"


@gradient_of("rms norm", matches=_is_rms_norm, parameters=("weight",), check=_check_rms_norm)
def _rms_norm(module: nn.Module, kept: Kept, grad: torch.Tensor, wanted: frozenset[str]) -> Found:
    scales, products = _tokens(_rms_scale(module, kept[0])), _tokens(grad.float() * kept[0].float())
    return {"weight": torch.bmm(scales.transpose(1, 2), products).squeeze(1)}  # what is normalized is never formed


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
def _dora(module: Any, kept: Kept, grad: torch.Tensor, wanted: frozenset[str]) -> Found:
    magnitude = module.weight.detach().float()
    if magnitude.numel() != grad.shape[-1]:
        raise UnsupportedError("gradients of DoRA's magnitudes need whole parameters, but ranks hold parts of them")
    return {"weight": _summed(grad.float() * kept[0].float()) / magnitude}
