"""Weights of tokens by a function of what the model thinks of them: named functions, one of your own, focal loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from dataflex.errors import ComponentError, did_you_mean
from dataflex.method import BatchView, Card, Reference, Requires, Weighter, WeighterParams, param
from dataflex.registry import load_function

if TYPE_CHECKING:
    import torch

_INPUTS = ("logp", "entropy", "reference")


def dft(logp: torch.Tensor) -> torch.Tensor:
    """Weigh by the token's probability p (DFT, Wu et al., arXiv 2508.05629)."""
    return logp.exp()


def focal(logp: torch.Tensor, *, gamma: float = 2.0) -> torch.Tensor:
    """Weigh by (1 - p) ^ gamma (focal loss, Lin et al., ICCV 2017, arXiv 1708.02002)."""
    return (-logp.expm1()).clamp(min=0.0).pow(gamma)  # 1 - p without cancellation


def entropy_share(entropy: torch.Tensor, *, power: float = 1.0) -> torch.Tensor:
    """Weigh by (H / 3) ^ power, H the entropy in nats, as ``use_eaft_loss`` of the 20 likeliest tokens (ln 20 ~ 3)."""
    return (entropy / 3.0).clamp(min=0.0).pow(power)


def clip_quantile(logp: torch.Tensor, *, quantile: float = 0.9) -> torch.Tensor:
    """Leave out the tokens whose loss is above a quantile of the micro-batch; ``logp`` [S]."""
    loss = -logp
    if loss.numel() == 0:
        return loss
    place = (loss.numel() - 1) * quantile
    ordered = loss.sort().values
    below = ordered[int(place)]
    edge = below + (place - int(place)) * (ordered[min(int(place) + 1, loss.numel() - 1)] - below)
    return (loss <= edge).to(loss.dtype)


def excess_gate(logp: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Weigh by the sigmoid of the excess loss over the reference: a soft form of ``slm``."""
    return (reference - logp).sigmoid()


# Those by token look at one token at a time, so that tokens need not be picked out of the batch.
BY_TOKEN: dict[str, Callable[..., Any]] = {"dft": dft, "focal": focal, "entropy": entropy_share, "excess": excess_gate}
NAMED: dict[str, Callable[..., Any]] = {**BY_TOKEN, "clip_quantile": clip_quantile}


def token_function(name: str, **settings: float) -> Callable[..., Any]:
    """Return a named function, with the ``settings`` that it knows, or ``module:function``, or ``file.py:function``."""
    if name in NAMED:
        known = inspect.signature(NAMED[name]).parameters
        return partial(NAMED[name], **{key: value for key, value in settings.items() if key in known})
    if ":" not in name:
        raise ValueError(
            f"unknown {name!r}{did_you_mean(name, list(NAMED))} (known: {', '.join(NAMED)}; or 'module:function')"
        )
    function = load_function(name, "tokens")
    inputs_of(function)
    return function


def inputs_of(function: Callable[..., Any]) -> frozenset[str]:
    """Return which of ``logp``, ``entropy`` and ``reference`` a function takes; one of them at least, and no other."""
    parameters = inspect.signature(function).parameters.values()
    other = [p.name for p in parameters if p.name not in _INPUTS and p.default is inspect.Parameter.empty]
    taken = frozenset(p.name for p in parameters if p.name in _INPUTS)
    if other or not taken:
        raise ValueError(
            f"takes {', '.join(other) or 'nothing'}, but a function of tokens takes any of {', '.join(_INPUTS)}"
        )
    return taken


class TokenWeighter(Weighter):
    """Weigh each token by a function of its log-probability, the entropy of the prediction and a reference.

    Named functions: ``dft`` (p), ``focal`` ((1 - p) ^ gamma), ``entropy`` ((H / 3) ^ power), ``clip_quantile`` (0 above
    a quantile of the loss), ``excess`` (sigmoid of the excess over a reference); or a function of one's own,
    ``module:function`` or ``file.py:function``, which takes any of ``logp``, ``entropy``, ``reference`` by name
    (tensors of the supervised tokens of the micro-batch over all ranks [S]) and returns weights [S].
    """

    name = "token"
    by_token: bool = True
    card = Card(
        summary="Weighs each token by a function of its log-probability, the entropy and a reference model.",
        paper="On the Generalization of SFT (DFT), arXiv 2508.05629, and others",
        cost="none; with entropy one more product per logit; with a reference as slm",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(WeighterParams):
        function: str = param(
            "dft", "dft, focal, entropy, clip_quantile, excess, or module:function (file.py:function)"
        )
        normalizer: Literal["num_tokens", "weight_sum"] = param(
            "num_tokens", "num_tokens: as DFT is; weight_sum: weighted mean, only ratios matter"
        )
        gamma: float = param(2.0, "exponent of focal", minimum=0.0)
        power: float = param(1.0, "exponent of entropy", minimum=0.0)
        quantile: float = param(0.9, "quantile of clip_quantile; above it tokens are left out", above=0.0, maximum=1.0)
        reference: str | None = param(None, "folder of a reference model, for functions that take one")
        reference_cache: bool = param(
            True, "score a row with the reference once, when first served, and keep that; else in every step"
        )

        def __post_init__(self) -> None:
            try:
                taken = inputs_of(token_function(self.function))
            except ValueError as error:
                raise ValueError(f"function: {error}") from error
            if "reference" in taken and not (self.reference or "").strip():
                raise ValueError(f"reference: missing; {self.function} compares with a reference model")
            if "reference" not in taken and self.reference is not None:
                raise ValueError(f"reference: {self.function} does not look at it; remove the key")

    params: Params

    def requires(self) -> Requires:
        p = self.params
        reference = None if p.reference is None else Reference(p.reference, p.reference_cache)
        return Requires(
            stages=("pt", "sft"), reference=reference, entropy="entropy" in inputs_of(token_function(p.function))
        )

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        settings = {"gamma": params.gamma, "power": params.power, "quantile": params.quantile}
        self._function = token_function(params.function, **settings)
        self._taken = inputs_of(self._function)
        self.normalizer = params.normalizer

    def weigh(self, batch: BatchView) -> torch.Tensor:
        """Return weights [R, T], 0 where nothing is supervised (collective unless each token is for itself)."""
        mask, reference = batch.mask_BT, batch.reference_BT
        given = {
            "logp": -batch.loss_BT,
            "reference": None if reference is None else -reference,
            "entropy": batch.entropy_BT,
        }
        values = {name: value for name, value in given.items() if name in self._taken and value is not None}
        if self.params.function in BY_TOKEN:
            weights: torch.Tensor = self._function(**values)
            return weights.masked_fill(~mask, 0.0)
        import torch

        from dataflex import comm

        tokens, local = comm.gather_rows(torch.stack([value[mask] for value in values.values()], dim=1))
        found = self._function(**dict(zip(values, tokens.unbind(dim=1), strict=True)))
        if getattr(found, "shape", None) != tokens.shape[:1]:
            raise ComponentError(
                f"{self.name}: {self.params.function} returned {getattr(found, 'shape', type(found).__name__)}, "
                f"expected a tensor of shape ({len(tokens)},)"
            )
        out = batch.loss_BT.new_zeros(mask.shape)
        out[mask] = found.detach()[local].to(out)
        return out


class Focal(Weighter):
    """The less likely a token is to the model, the more it counts.

    The cross-entropy of each token is multiplied by (1 - p) ^ gamma and divided by the number of tokens. It is the
    opposite of DFT (``token``); tokens that are wrong in the data are unlikely, and gain. The defaults are the paper's.
    """

    name = "focal"
    by_token: bool = True
    card = Card(
        summary="Weighs each token by how unlikely it is to the model.",
        paper="Focal Loss for Dense Object Detection, ICCV 2017, arXiv 1708.02002",
        cost="none",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(WeighterParams):
        gamma: float = param(2.0, "exponent; 0 is the plain loss", minimum=0.0)
        normalizer: Literal["num_tokens", "weight_sum"] = param(
            "num_tokens", "num_tokens: divided by the tokens, as the paper's; weight_sum: weighted mean"
        )

    params: Params

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        self.normalizer = params.normalizer

    def weigh(self, batch: BatchView) -> torch.Tensor:
        """Return weights [R, T], 0 where nothing is supervised."""
        return focal(-batch.loss_BT, gamma=self.params.gamma).masked_fill(~batch.mask_BT, 0.0)
