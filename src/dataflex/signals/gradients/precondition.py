"""What an optimizer would make of a gradient: Adam's direction with its moments held fixed, or signs.

Adam, for all samples alike: m' = beta1 m + (1 - beta1) g, v' = beta2 v + (1 - beta2) g^2 and
direction = m' / (sqrt(v') + eps). Source: LESS (arXiv 2402.04333), equation in section 3.1. The
original code puts eps inside the root and leaves out the bias correction; with the tiny moments of
real LoRA runs that is another ranking, so both are presets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from dataflex.errors import ConfigError, did_you_mean
from dataflex.signals.gradients.blocks import Block, Columns, Segment
from dataflex.signals.gradients.moments import Moments

__all__ = ["PRESETS", "Precondition", "Preconditioner", "adam_direction", "adam_scaled", "preconditioner"]

Preconditioner = Callable[[tuple[Segment, ...], torch.Tensor], torch.Tensor]
"""(what the columns are, fp32 gradients [b, columns]) -> directions; may change the gradients in place."""


@dataclass(frozen=True, kw_only=True)
class Precondition:
    """How gradients are preconditioned.

    Attributes:
        kind: "none", "adam" or "sign".
        eps_mode: "outside": sqrt(v) + eps; "inside": sqrt(v + eps).
        bias_correction: Divide the moments by 1 - beta^(t + 1), t being the optimizer's steps so far.
        include_momentum: Keep the term beta1 m, which all samples share.
        own_square: Add the sample's own g^2 to v. Without, all samples are scaled alike and there is no momentum term:
            (1 - beta1) sqrt(1 - beta2^t) / (1 - beta1^t) g / (sqrt(v) + eps), t the coming step (OPUS,
            arXiv 2602.05400).
        betas: Instead of the optimizer's own.
        eps: Instead of the optimizer's own.
    """

    kind: Literal["none", "adam", "sign"] = "none"
    eps_mode: Literal["outside", "inside"] = "outside"
    bias_correction: bool = True
    include_momentum: bool = True
    own_square: bool = True
    betas: tuple[float, float] | None = None
    eps: float | None = None

    @classmethod
    def preset(cls, name: str) -> Precondition:
        """Return a preset by name.

        Raises:
            ConfigError: Unknown name.
        """
        if name not in PRESETS:
            known = ", ".join(PRESETS)
            raise ConfigError(
                f"gradients: unknown precondition {name!r}{did_you_mean(name, list(PRESETS))} (known: {known})"
            )
        return PRESETS[name]


PRESETS: dict[str, Precondition] = {
    "none": Precondition(),
    "sign": Precondition(kind="sign"),
    "true_adam": Precondition(kind="adam"),
    "adam_scale": Precondition(kind="adam", own_square=False, include_momentum=False),
    "paper_repo": Precondition(kind="adam", eps_mode="inside", bias_correction=False, betas=(0.9, 0.999), eps=1e-8),
}


def adam_direction(
    gradient: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    *,
    step: int,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    eps_mode: Literal["outside", "inside"] = "outside",
    bias_correction: bool = True,
    include_momentum: bool = True,
) -> torch.Tensor:
    """Return the direction of Adam's next step for each gradient.

    Args:
        gradient: fp32 [b, n].
        first: First moment m [n] after ``step`` steps.
        second: Second moment v [n].
        step: Optimizer steps so far.
        betas: Adam's.
        eps: Adam's.
        eps_mode: Where eps stands.
        bias_correction: As ``Precondition``.
        include_momentum: As ``Precondition``.

    Returns:
        fp32 [b, n].
    """
    beta1, beta2 = betas
    correct1 = 1 - beta1 ** (step + 1) if bias_correction else 1.0
    correct2 = 1 - beta2 ** (step + 1) if bias_correction else 1.0
    # Corrections are moved into the scalars and the moments, so that the large tensor is read fewer times:
    # (m' / c1) / (sqrt(v' / c2) + eps) = (m' sqrt(c2) / c1) / (sqrt(v') + eps sqrt(c2)).
    scale = correct2**0.5 / correct1
    if eps_mode == "inside":
        root = torch.addcmul(second * beta2 + eps * correct2, gradient, gradient, value=1 - beta2).sqrt_()
    else:
        root = torch.addcmul(second * beta2, gradient, gradient, value=1 - beta2).sqrt_().add_(eps * correct2**0.5)
    if include_momentum:
        return torch.add(first * (beta1 * scale), gradient, alpha=(1 - beta1) * scale).div_(root)
    return (gradient * ((1 - beta1) * scale)).div_(root)


def adam_scaled(
    gradient: torch.Tensor, second: torch.Tensor, *, step: int, betas: tuple[float, float], eps: float
) -> torch.Tensor:
    """Return gradients scaled as Adam's next step would, with its second moment as it is (OPUS, arXiv 2602.05400).

    Args:
        gradient: fp32 [b, n].
        second: Second moment v [n].
        step: Optimizer steps so far.
        betas: Adam's.
        eps: Adam's.

    Returns:
        fp32 [b, n], linear in the gradient.
    """
    beta1, beta2 = betas
    factor = (1 - beta1) * (1 - beta2 ** (step + 1)) ** 0.5 / (1 - beta1 ** (step + 1))
    return gradient * (factor / (second.sqrt() + eps))


def preconditioner(spec: Precondition, moments: Mapping[str, Moments] | None = None) -> Preconditioner | None:
    """Return the function that turns blocks of gradients into directions; None where gradients stay as they are.

    Args:
        spec: What to do.
        moments: By parameter name, from ``moments_of``; only Adam needs them.
    """
    if spec.kind == "none":
        return None
    if spec.kind == "sign":
        return lambda _segments, gradient: gradient.sign_()
    assert moments is not None
    first, second = (
        Columns(lambda name: moments[name].first.flatten()),
        Columns(lambda name: moments[name].second.flatten()),
    )

    def settings(state: Moments) -> tuple[int, tuple[float, float], float]:
        return state.step, spec.betas or state.betas, state.eps if spec.eps is None else spec.eps

    def direction(segments: tuple[Segment, ...], gradient: torch.Tensor) -> torch.Tensor:
        step, betas, eps = settings(moments[segments[0].name])
        if len(segments) > 1 and any(settings(moments[one.name]) != (step, betas, eps) for one in segments):
            parts = Block(segments=segments, values=gradient).parts()
            return torch.cat([direction((segment,), values) for segment, values in parts], dim=1)
        if not spec.own_square:
            return adam_scaled(gradient, second.of(segments, gradient.device), step=step, betas=betas, eps=eps)
        return adam_direction(
            gradient,
            first.of(segments, gradient.device),
            second.of(segments, gradient.device),
            step=step,
            betas=betas,
            eps=eps,
            eps_mode=spec.eps_mode,
            bias_correction=spec.bias_correction,
            include_momentum=spec.include_momentum,
        )

    return direction
