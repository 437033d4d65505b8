"""A written schedule of proportions: a curriculum over domains."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dataflex.method import Card, Context, Mix, Mixer, Requires
from dataflex.method import Params as BaseParams
from dataflex.mixers.proportions import by_domain, check_numbers, shares

__all__ = ["Stage", "Staged", "blended"]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of the schedule.

    Attributes:
        start_step: First optimizer step of the stage, counted from 0.
        proportions: One number per domain, as a list or by name; divided by their sum.
    """

    start_step: int = field(metadata={"help": "first optimizer step of the stage, counted from 0", "minimum": 0})
    proportions: tuple[float, ...] | dict[str, float] = field(
        metadata={
            "help": "one number per domain, as a list in their order or by name, divided by their sum",
            "minimum": 0.0,
        }
    )

    def __post_init__(self) -> None:
        check_numbers(self.proportions, "proportions")


def blended(step: int, starts: list[int], stages_SK: NDArray[np.float64], linear: bool) -> NDArray[np.float64]:
    """Return the proportions [K] at ``step``; the last stage holds to the end.

    Args:
        step: Optimizer step, at least ``starts[0]``.
        starts: Rising first steps of the stages [S].
        stages_SK: Proportions of each stage, rows summing to one.
        linear: Whether to go straight from one stage's proportions to the next one's, reached at its start.
    """
    at = int(np.searchsorted(starts, step, side="right")) - 1
    if not linear or at == len(starts) - 1:
        return stages_SK[at]
    share = (step - starts[at]) / (starts[at + 1] - starts[at])
    return (1 - share) * stages_SK[at] + share * stages_SK[at + 1]


class Staged(Mixer):
    """Serve the domains in proportions that follow a written schedule."""

    name = "staged"
    card = Card(
        summary="Serves the domains in proportions that follow a written schedule of steps.",
        paper="baseline (curriculum by stages)",
        cost="none",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(BaseParams):
        """Parameters of the staged mixer."""

        stages: tuple[Stage, ...] = field(
            metadata={"help": "[{start_step: 0, proportions: [...]}, ...], steps rising from 0"}
        )
        interpolation: Literal["step", "linear"] = field(
            default="step",
            metadata={"help": "step: keep a stage's proportions until the next; linear: go straight to the next one's"},
        )

        def __post_init__(self) -> None:
            steps = [stage.start_step for stage in self.stages]
            if not steps or steps[0] != 0:
                raise ValueError(f"stages: the first must have start_step 0, found {steps[0] if steps else 'no stage'}")
            for before, after in pairwise(steps):
                if after <= before:
                    raise ValueError(f"stages: start_step {after} must come after {before}")

    params: Params

    def requires(self) -> Requires:
        """State what the run must have."""
        return Requires(needs_interval=True)

    def mix(self, ctx: Context) -> Mix:
        """Return the proportions at the first step of the interval.

        A stage that begins inside an interval takes effect at the next one; the reason says so.

        Raises:
            ConfigError: A list of the wrong length, or names that are unknown or missing.
        """
        step, stop = ctx.interval.start_step, ctx.interval.stop_step
        starts = [stage.start_step for stage in self.params.stages]
        stages_SK = np.stack(
            [
                by_domain(stage.proportions, ctx.domains.names, f"dynamic.mixer.stages[{i}].proportions")
                for i, stage in enumerate(self.params.stages)
            ]
        )
        proportions = blended(step, starts, stages_SK, self.params.interpolation == "linear")
        reason = f"step {step}: {shares(ctx.domains.names, proportions)}"
        late = [start for start in starts if step < start < stop]
        if late and self.params.interpolation == "step":
            reason += f"; the stage of step {late[-1]} takes effect at step {stop}"
        return Mix(proportions=proportions, reason=reason)
