"""Proportions that no model changes: equal, as written, by a schedule, or drawn at random."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import numpy as np

from dataflex.errors import CheckpointError
from dataflex.method import Card, Context, Mix, Mixer, Requires, State, param
from dataflex.method import Params as BaseParams
from dataflex.mixers._lib import equal, mix_of, sizes
from dataflex.plan.domains import Floats
from dataflex.plan.proportions import by_domain, check_numbers, normalized, read_proportions


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of the schedule."""

    start_step: int = param(help="first optimizer step of the stage, counted from 0", minimum=0)
    proportions: tuple[float, ...] | dict[str, float] = param(
        help="one number per domain, as a list in their order or by name, divided by their sum", minimum=0.0
    )

    def __post_init__(self) -> None:
        check_numbers(self.proportions, "proportions")


def blended(step: int, starts: list[int], stages_SK: Floats, linear: bool) -> Floats:
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
    """Serve the domains in proportions that follow a written schedule.

    A curriculum over domains.
    """

    name = "staged"
    card = Card(
        summary="Serves the domains in proportions that follow a written schedule of steps.",
        paper="baseline (curriculum by stages)",
        cost="none",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(BaseParams):
        stages: tuple[Stage, ...] = param(help="[{start_step: 0, proportions: [...]}, ...], steps rising from 0")
        interpolation: Literal["step", "linear"] = param(
            "step", "step: keep a stage's proportions until the next; linear: go straight to the next one's"
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
        mix = mix_of(ctx.domains.names, proportions, f"step {step}")
        late = [start for start in starts if step < start < stop]
        if late and self.params.interpolation == "step":
            return replace(mix, reason=f"{mix.reason}; the stage of step {late[-1]} takes effect at step {stop}")
        return mix


class Static(Mixer):
    """Serve the domains in fixed proportions.

    As written, or from a file that ``dataflex mix`` made.
    """

    name = "static"
    saved = ("proportions", "made_by")
    card = Card(summary="Serves the domains in fixed proportions.", paper="baseline", cost="none")

    @dataclass(frozen=True, kw_only=True)
    class Params(BaseParams):
        proportions: tuple[float, ...] | dict[str, float] | None = param(
            None,
            "one number per domain, as a list in their order or by name, divided by their sum; "
            "for equal shares use the uniform mixer",
            minimum=0.0,
        )
        from_file: str | None = param(None, "instead of them, a proportions file that 'dataflex mix' wrote", key="from")

        def __post_init__(self) -> None:
            if (self.proportions is None) == (self.from_file is None):
                if self.proportions is None:
                    raise ValueError("proportions: missing; give one number per domain, or a file with 'from: FILE'")
                raise ValueError("proportions: given together with 'from'; write one or the other")
            if self.proportions is not None:
                check_numbers(self.proportions, "proportions")

    params: Params
    proportions: dict[str, float] | None = None
    """What was read from the file: a resumed run keeps the proportions that it began with."""
    made_by = ""

    def mix(self, ctx: Context) -> Mix:
        """Return the proportions as written, divided by their sum; a file is read once.

        Raises:
            ConfigError: The list has the wrong length, names are unknown or missing, or the file cannot be read.
        """
        names = ctx.domains.names
        if self.params.proportions is not None:
            return mix_of(names, by_domain(self.params.proportions, names, "dynamic.mixer.proportions"), "as written")
        if self.proportions is None:
            assert self.params.from_file is not None
            content = read_proportions(self.params.from_file, "dynamic.mixer.from")
            self.proportions, self.made_by = content.by_name, content.method
        proportions = by_domain(self.proportions, names, f"dynamic.mixer.from ({self.params.from_file})")
        return mix_of(names, proportions, f"from {self.params.from_file} ({self.made_by})")

    def load_state_dict(self, state: State) -> None:
        """Take back what was read from the file; written proportions keep no state."""
        if state and self.params.from_file is None:
            raise CheckpointError(f"static keeps no state without 'from', but was given {', '.join(sorted(state))}")
        super().load_state_dict(state)


class Uniform(Mixer):
    """Serve every domain equally often.

    On average no learned mixture beats it clearly.
    """

    name = "uniform"
    card = Card(summary="Serves every domain equally often.", paper="baseline (stratified sampling)", cost="none")

    def mix(self, ctx: Context) -> Mix:
        """Return 1/K for each of the K domains."""
        num = len(ctx.domains.names)
        return Mix(proportions=equal(num), reason=f"equal shares of {num} domains")


class RandomShares(Mixer):
    """Serve domains in proportions drawn anew for every interval.

    The baseline that any mixer should beat.
    """

    name = "random"
    card = Card(
        summary="Serves domains in proportions that are drawn anew for every interval.",
        paper="baseline (Dirichlet draws)",
        cost="none",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(BaseParams):
        concentration: float = param(
            1.0, "mean of the Dirichlet parameters: 1 draws widely, large stays near the centre", above=0.0
        )
        around: str = param("uniform", "centre of the draws", choices=("uniform", "size"))

    params: Params

    def requires(self) -> Requires:
        return Requires(needs_interval=True)

    def mix(self, ctx: Context) -> Mix:
        """Return a draw from Dirichlet(K x concentration x centre), the same on every rank."""
        names = ctx.domains.names
        centre = normalized(sizes(ctx, self.name)) if self.params.around == "size" else equal(len(names))
        alpha = np.maximum(len(names) * self.params.concentration * centre, 1e-12)
        drawn = ctx.rng("random mixer").gamma(alpha)
        return mix_of(names, drawn if drawn.any() else centre)
