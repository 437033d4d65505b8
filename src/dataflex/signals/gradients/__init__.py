"""Per-sample gradients of the parameters under training: exact, batched, and harmless to training."""

from __future__ import annotations

from dataflex.signals.gradients.blocks import Block, Segment
from dataflex.signals.gradients.consume import Consumer, Dots, Gram, Norms, WeightedSums
from dataflex.signals.gradients.documents import Documents
from dataflex.signals.gradients.engine import GradientEngine
from dataflex.signals.gradients.moments import Moments, moments_of
from dataflex.signals.gradients.narrow import supervised_losses
from dataflex.signals.gradients.oracle import oracle_row_gradients
from dataflex.signals.gradients.pieces import Factors
from dataflex.signals.gradients.precondition import PRESETS, Precondition, adam_direction, preconditioner
from dataflex.signals.gradients.registry import gradient_of, kinds
from dataflex.signals.gradients.sketch import Sketch
from dataflex.signals.gradients.targets import TargetBuilder
from dataflex.signals.gradients.units import choose_parameters
from dataflex.signals.gradients.vectors import TargetVectors

__all__ = [
    "PRESETS",
    "Block",
    "Consumer",
    "Documents",
    "Dots",
    "Factors",
    "GradientEngine",
    "Gram",
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
    "kinds",
    "moments_of",
    "oracle_row_gradients",
    "preconditioner",
    "supervised_losses",
]
