"""Fixed proportions, as written, or from a file that ``dataflex mix`` made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dataflex.method import Card, Context, Mix, Mixer, State
from dataflex.method import Params as BaseParams
from dataflex.plan.proportions import by_domain, check_numbers, read_proportions, shares

__all__ = ["Static"]


class Static(Mixer):
    """Serve the domains in fixed proportions."""

    name = "static"
    card = Card(summary="Serves the domains in fixed proportions.", paper="baseline", cost="none")

    @dataclass(frozen=True, kw_only=True)
    class Params(BaseParams):
        """Parameters of the static mixer: one of the two."""

        proportions: tuple[float, ...] | dict[str, float] | None = field(
            default=None,
            metadata={
                "help": "one number per domain, as a list in their order or by name, divided by their sum; "
                "for equal shares use the uniform mixer",
                "minimum": 0.0,
            },
        )
        from_file: str | None = field(
            default=None,
            metadata={"key": "from", "help": "instead of them, a proportions file that 'dataflex mix' wrote"},
        )

        def __post_init__(self) -> None:
            if (self.proportions is None) == (self.from_file is None):
                if self.proportions is None:
                    raise ValueError("proportions: missing; give one number per domain, or a file with 'from: FILE'")
                raise ValueError("proportions: given together with 'from'; write one or the other")
            if self.proportions is not None:
                check_numbers(self.proportions, "proportions")

    params: Params

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self._read: dict[str, float] | None = None
        self._made_by = ""

    def mix(self, ctx: Context) -> Mix:
        """Return the proportions as written, divided by their sum.

        The file is read once; a resumed run keeps the proportions that it began with.

        Raises:
            ConfigError: The list has the wrong length, names are unknown or missing, or the file cannot be read.
        """
        names = ctx.domains.names
        if self.params.proportions is not None:
            proportions = by_domain(self.params.proportions, names, "dynamic.mixer.proportions")
            return Mix(proportions=proportions, reason=f"as written: {shares(names, proportions)}")
        if self._read is None:
            assert self.params.from_file is not None
            content = read_proportions(self.params.from_file, "dynamic.mixer.from")
            self._read, self._made_by = content.by_name, content.method
        proportions = by_domain(self._read, names, f"dynamic.mixer.from ({self.params.from_file})")
        source = f"from {self.params.from_file} ({self._made_by})"
        return Mix(proportions=proportions, reason=f"{source}: {shares(names, proportions)}")

    def state_dict(self) -> State:
        """Return what was read from the file; nothing for written proportions."""
        return {} if self._read is None else {"proportions": dict(self._read), "made_by": self._made_by}

    def load_state_dict(self, state: State) -> None:
        """Take back what ``state_dict`` gave."""
        if not state:
            return
        if self.params.from_file is None:
            raise ValueError(f"static keeps no state without 'from', but was given {sorted(state)}")
        self._read, self._made_by = dict(state["proportions"]), str(state["made_by"])
