"""Functions of a token's log-probability, the entropy of its prediction and a reference: the weights of tokens.

A function takes any of ``logp``, ``entropy`` and ``reference`` by name (fp32 tensors of equal shape, in nats;
``reference`` is the reference model's log-probability) and returns weights >= 0 of that shape. No torch at import.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dataflex.errors import did_you_mean

if TYPE_CHECKING:
    import torch

__all__ = ["NAMED", "asked", "clip_quantile", "dft", "entropy_share", "excess_gate", "focal", "load"]

_INPUTS = ("logp", "entropy", "reference")


def dft(logp: torch.Tensor) -> torch.Tensor:
    """Weigh by the token's probability p (DFT, Wu et al., arXiv 2508.05629)."""
    return logp.exp()


def focal(logp: torch.Tensor, *, gamma: float = 2.0) -> torch.Tensor:
    """Weigh by (1 - p) ^ gamma (focal loss, Lin et al., ICCV 2017, arXiv 1708.02002)."""
    return (-logp.expm1()).clamp(min=0.0).pow(gamma)  # 1 - p without cancellation


def entropy_share(entropy: torch.Tensor, *, power: float = 1.0) -> torch.Tensor:
    """Weigh by (H / 3) ^ power, H the entropy of the prediction in nats.

    As LLaMA-Factory's ``use_eaft_loss``, which takes the entropy of the 20 likeliest tokens, at most ln 20 or about 3.
    """
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


NAMED: dict[str, Callable[..., Any]] = {
    "dft": dft,
    "focal": focal,
    "entropy": entropy_share,
    "clip_quantile": clip_quantile,
    "excess": excess_gate,
}
"""What ``function`` of the ``token`` weighter knows by name."""

BY_TOKEN = frozenset({"dft", "focal", "entropy", "excess"})
"""Those that look at one token at a time, so that tokens need not be picked out of the batch."""


def load(name: str, **settings: float) -> Callable[..., Any]:
    """Return the function that a name stands for, or ``module:function``, or ``file.py:function``.

    Args:
        name: As above; a file is looked for from the working directory.
        settings: ``gamma``, ``power``, ``quantile``; a named function takes those that it knows.

    Raises:
        ValueError: No such function, or one that takes something else.
    """
    if name in NAMED:
        known = inspect.signature(NAMED[name]).parameters
        return partial(NAMED[name], **{key: value for key, value in settings.items() if key in known})
    where, colon, attribute = name.rpartition(":")
    if not colon:
        raise ValueError(
            f"unknown {name!r}{did_you_mean(name, list(NAMED))} (known: {', '.join(NAMED)}; or 'module:function')"
        )
    function = getattr(_module(where), attribute, None)
    if not callable(function):
        raise ValueError(f"{where} has no function {attribute!r}")
    asked(function)
    loaded: Callable[..., Any] = function
    return loaded


def _module(where: str) -> Any:
    try:
        if not where.endswith(".py"):
            return importlib.import_module(where)
        file = Path(where).expanduser()
        if not file.is_file():
            raise ValueError(f"no such file: {where}")
        spec = importlib.util.spec_from_file_location(f"dataflex_tokens_{file.stem}", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ValueError:
        raise
    except Exception as error:  # the user's own code: told with its cause
        raise ValueError(f"{where} cannot be imported: {type(error).__name__}: {error}") from error
    return module


def asked(function: Callable[..., Any]) -> frozenset[str]:
    """Return which of ``logp``, ``entropy`` and ``reference`` a function takes.

    Raises:
        ValueError: It takes none of them, or cannot do without something else.
    """
    parameters = inspect.signature(function).parameters.values()
    other = [p.name for p in parameters if p.name not in _INPUTS and p.default is inspect.Parameter.empty]
    taken = frozenset(p.name for p in parameters if p.name in _INPUTS)
    if other or not taken:
        raise ValueError(
            f"takes {', '.join(other) or 'nothing'}, but a function of tokens takes any of {', '.join(_INPUTS)}"
        )
    return taken
