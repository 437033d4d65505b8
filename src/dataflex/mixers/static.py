"""Fixed proportions, as written."""

from __future__ import annotations

from dataclasses import dataclass, field

from dataflex.core.protocols import Card, Context, Mix, Mixer
from dataflex.core.protocols import Params as BaseParams
from dataflex.mixers.proportions import by_domain, check_numbers, shares

__all__ = ["Static"]


class Static(Mixer):
    """Serve the domains in fixed proportions."""

    name = "static"
    card = Card(summary="Serves the domains in fixed proportions.", paper="baseline", cost="none")

    @dataclass(frozen=True, kw_only=True)
    class Params(BaseParams):
        """Parameters of the static mixer."""

        proportions: tuple[float, ...] | dict[str, float] = field(
            metadata={
                "help": "one number per domain, as a list in their order or by name, divided by their sum; "
                "for equal shares use the uniform mixer",
                "minimum": 0.0,
            },
        )

        def __post_init__(self) -> None:
            check_numbers(self.proportions, "proportions")

    params: Params

    def mix(self, ctx: Context) -> Mix:
        """Return the proportions as written, divided by their sum.

        Raises:
            ConfigError: The list has the wrong length, or names are unknown or missing.
        """
        proportions = by_domain(self.params.proportions, ctx.domains.names, "dynamic.mixer.proportions")
        return Mix(proportions=proportions, reason=f"as written: {shares(ctx.domains.names, proportions)}")
