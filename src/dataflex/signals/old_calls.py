"""The calls of before, until selectors ask with signals."""

from __future__ import annotations

from typing import Any

from dataflex.signals import kinds

__all__ = ["OldCalls"]


class OldCalls:
    """Turns the methods of before into signals."""

    def __getattr__(self, name: str) -> Any:
        ask: Any = self
        calls = {
            "losses": lambda rows, target=None, **how: ask(kinds.TokenLoss(**how), rows, target=target),
            "answer_losses": lambda rows, target=None, **how: ask(kinds.ResponseLoss(**how), rows, target=target),
            "adapted_losses": lambda rows, **how: ask(kinds.AdaptedLoss(**how), rows),
            "el2n": lambda rows, target=None: ask(kinds.EL2N(), rows, target=target),
            "embeddings": lambda rows, spec, target=None, encoder=None: ask(
                kinds.Embedding(**{**vars(spec), "encoder": encoder}), rows, target=target
            ),
            "gradient_scores": lambda rows, spec, targets: ask(
                kinds.GradientScores(**vars(spec), targets=tuple(targets)), rows
            ),
            "gradient_norms": lambda rows, spec, target=None: ask(
                kinds.GradientNorms(**vars(spec)), rows, target=target
            ),
            "gradient_sketches": lambda rows, spec, dim, target=None: ask(
                kinds.GradientSketches(**vars(spec), dim=dim), rows, target=target
            ),
            "gradient_products": lambda rows, spec, **how: _products(ask, rows, spec, **how),
            "answer_scores": lambda rows, spec, answers: ask(
                kinds.ResponseGradientScores(**vars(spec), responses=answers), rows
            ),
            "perturbed_losses": lambda rows, target=None, **how: ask(kinds.PerturbedLoss(**how), rows, target=target),
            "logit_nuclear_norms": lambda rows, spec: ask(spec, rows)[:, 0],
            "logit_sketches": lambda rows, spec: ask(spec, rows)[:, 1:],
        }
        if name not in calls:
            raise AttributeError(f"{type(self).__name__} has no {name!r}")
        return calls[name]


def _products(ask: Any, rows: Any, spec: Any, *, targets: Any, target_rows: Any = None) -> Any:
    signal = kinds.GradientProducts(**vars(spec), targets=tuple(targets), target_rows=target_rows or {})
    return signal.split(ask(signal, rows))
