"""What rows are compared by, by name: vectors from a model, gradients, or the scores of any other selector.

A representation gives vectors (of rows and of target rows), scores by target, or one score a row. Any registered
selector that scores the pool is one too, by its own name and with its own parameters: the larger its score, the
better. With targets it is asked target by target.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import ComponentError, ConfigError, did_you_mean
from dataflex.method import Card, Context, Needs, Params, Rows, Selector
from dataflex.parts import Part
from dataflex.registry import find, find_variant, names
from dataflex.selectors.representations import (
    Embed,
    Gradient,
    Influence,
    Loss,
    RdsPlusVectors,
    embed,
    gradient,
    influence,
    loss,
    rds_plus,
)

__all__ = ["REPRESENTATIONS", "Kind", "Represent", "Spec", "selector_scores"]

Kind = Literal["vectors", "tasks", "scores"]

_BOTH = ("pt", "sft")
_WITHOUT_SCORES = ("all", "random", "random_balanced", "compose", "greats", "opus", "uds")


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One representation.

    Attributes:
        kind: ``vectors``, scores by target (``tasks``), or one score a row (``scores``).
        params: Its parameters.
        needs: What it asks of its surroundings.
        adaptive: Whether it depends on the model under training or the step.
        cost: Forward and backward passes per pool row and decision.
        once: Forward passes of other models per pool row, once.
        call: For vectors ``(rows, target or None, ctx, params)`` to float32 [n, D]; for tasks ``(rows, ctx, params)``
            to [T, n]; for scores the same to [n]. NaN where a row has none. None for a selector.
    """

    kind: Kind
    params: type[Params]
    needs: Needs
    adaptive: bool = True
    cost: tuple[float, float] = (1.0, 0.0)
    once: float = 0.0
    call: Callable[..., NDArray[np.floating]] | None = None


def _needs(signal: str, targets: bool = False, stages: tuple[str, ...] = _BOTH) -> Needs:
    return Needs(signals=frozenset({signal}), targets=targets, stages=stages)


REPRESENTATIONS: Final[dict[str, Spec]] = {
    "rds_plus": Spec(kind="vectors", params=RdsPlusVectors, needs=_needs("embeddings"), call=rds_plus),
    "embed": Spec(kind="vectors", params=Embed, needs=_needs("embeddings"), call=embed),
    "gradient": Spec(kind="vectors", params=Gradient, needs=_needs("gradients"), cost=(1.0, 1.0), call=gradient),
    "influence": Spec(
        kind="tasks", params=Influence, needs=_needs("gradients", targets=True), cost=(1.0, 1.0), call=influence
    ),
    "loss": Spec(kind="scores", params=Loss, needs=_needs("losses", stages=("pt", "sft", "dpo", "kto")), call=loss),
}


@dataclass(frozen=True)
class Represent(Part):
    """A representation with its parameters."""

    what = "representation"

    @classmethod
    def known(cls) -> list[str]:
        """Return the names of all representations, then those of the selectors that can stand for one."""
        others = [name for name in names("selector") if name not in REPRESENTATIONS and name not in _WITHOUT_SCORES]
        return [*REPRESENTATIONS, *others]

    @classmethod
    def params_of(cls, name: str) -> type[Params]:
        """Return a representation's parameters.

        Raises:
            ConfigError: There is no such representation.
            ComponentError: The registry names something that is no selector.
        """
        if name in REPRESENTATIONS:
            return REPRESENTATIONS[name].params
        if name in _WITHOUT_SCORES:
            raise ConfigError(f"the {name} selector gives no scores to choose by (known: {', '.join(cls.known())})")
        if name not in cls.known():
            known = cls.known()
            raise ConfigError(f"unknown representation {name!r}{did_you_mean(name, known)} (known: {', '.join(known)})")
        return find("selector", name).Params

    @property
    def spec(self) -> Spec:
        """What it gives and needs; of a selector, what its class says."""
        if self.name in REPRESENTATIONS:
            return REPRESENTATIONS[self.name]
        cls = find_variant("selector", self.name, self.params)
        card: Card = cls.card
        return Spec(
            kind="tasks" if cls.needs.targets else "scores",
            params=cls.Params,
            needs=cls.needs,
            adaptive=cls.adaptive,
            cost=(card.forward_per_pool_row, card.backward_per_pool_row),
            once=card.forward_once_per_pool_row,
        )

    def selector(self) -> Selector | None:
        """Return a new instance of the selector that it names, or None."""
        if self.name in REPRESENTATIONS:
            return None
        method = find_variant("selector", self.name, self.params)(self.params)
        assert isinstance(method, Selector)
        return method


def selector_scores(selector: Selector, pool: Rows, ctx: Context) -> NDArray[np.float64]:
    """Return the score that a selector gives every pool row [n].

    Raises:
        ComponentError: It gives none.
    """
    found: Any = selector.select(pool, len(pool), ctx).scores
    if found is None or np.shape(found) != (len(pool),):
        raise ComponentError(f"represent: the {selector.name} selector gave no score for each of {len(pool):,} rows")
    return np.asarray(found, dtype=np.float64)
