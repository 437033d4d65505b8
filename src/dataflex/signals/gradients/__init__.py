"""Per-sample gradients of the parameters under training: exact, batched, and harmless to training."""

from __future__ import annotations

from dataflex.signals.gradients.consumers import (
    Block,
    Consumer,
    Dots,
    Norms,
    Segment,
    Sketch,
    TargetVectors,
    WeightedSums,
)
from dataflex.signals.gradients.engine import GradientEngine, supervised_losses
from dataflex.signals.gradients.factors import Factors
from dataflex.signals.gradients.layers import gradient_of
from dataflex.signals.gradients.parameters import choose_parameters
from dataflex.signals.gradients.precondition import (
    PRESETS,
    Moments,
    Precondition,
    adam_direction,
    moments_of,
    preconditioner,
)
from dataflex.signals.gradients.targets import TargetBuilder

__all__ = [
    "PRESETS",
    "Block",
    "Consumer",
    "Dots",
    "Factors",
    "GradientEngine",
    "Moments",
    "Norms",
    "Precondition",
    "Segment",
    "Sketch",
    "TargetBuilder",
    "TargetVectors",
    "WeightedSums",
    "adam_direction",
    "choose_parameters",
    "gradient_of",
    "moments_of",
    "preconditioner",
    "supervised_losses",
]
