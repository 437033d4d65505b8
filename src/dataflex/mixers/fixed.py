"""Proportions that no model changes: equal, by size, as written, by a schedule, or drawn at random."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import numpy as np

from dataflex.errors import DataError
from dataflex.method import Card, Context, Mix, Mixer, Requires, param
from dataflex.method import Params as BaseParams
from dataflex.mixers._lib import equal, mix_of, sizes
from dataflex.plan.domains import Floats
from dataflex.plan.proportions import by_domain, check_numbers, normalized, read_proportions


class Uniform(Mixer):
    """Serve every domain equally often.

    On average no learned mixture beats it clearly.
    """

    name = "uniform"
    card = Card(summary="Serves every domain equally often.", paper="baseline (stratified sampling)", cost="none")

    def mix(self, ctx: Context) -> Mix:
        num = len(ctx.domains.names)
        return Mix(proportions=equal(num), reason=f"equal shares of {num} domains")


class Size(Mixer):
    """Serve each domain in proportion to its size, in the unit of the run.

    What concatenating the data sets would give.
    """

    name = "size"
    card = Card(summary="Serves each domain in proportion to its size.", paper="baseline", cost="none")

    def mix(self, ctx: Context) -> Mix:
        return mix_of(ctx.domains.names, sizes(ctx, self.name), f"by {ctx.unit}")


def tempered(sizes_K: Floats, tau: float) -> Floats:
    """Return proportions [K] ~ size ** (1 / tau); empty domains get 0, an infinite tau equal shares."""
    filled = sizes_K > 0
    log_sizes = np.log(sizes_K, where=filled, out=np.zeros_like(sizes_K)) / tau
    return normalized(np.where(filled, np.exp(log_sizes - log_sizes[filled].max()), 0.0))


class Temperature(Mixer):
    """Serve each domain in proportion to its size to the power 1 / tau.

    Between concatenation and equal shares.
    """

    name = "temperature"
    card = Card(
        summary="Serves each domain in proportion to its size to the power 1 / tau.",
        paper="Cross-lingual Language Model Pretraining (XLM), NeurIPS 2019, arXiv 1901.07291",
        cost="none",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(BaseParams):
        tau: float = param(2.0, "1 is by size, .inf equal shares; mBERT 1.43, XLM 2, XLM-R and mT5 3.33", above=0.0)

    params: Params

    def mix(self, ctx: Context) -> Mix:
        tau = self.params.tau
        return mix_of(ctx.domains.names, tempered(sizes(ctx, self.name), tau), f"tau {tau:g} by {ctx.unit}")


def allocate(sizes_K: Floats, budget: float, max_epochs: float) -> Floats:
    """Return how much of ``budget`` each domain gets [K], at most its cap: ``max_epochs`` times its size (algorithm 1).

    Domains are visited from small to large; each takes an equal share of what is left, or its cap.
    """
    left = budget
    amounts = np.zeros(len(sizes_K), dtype=np.float64)
    for visited, k in enumerate(np.argsort(sizes_K, kind="stable")):
        amounts[k] = min(left / (len(sizes_K) - visited), max_epochs * sizes_K[k])
        left -= amounts[k]
    return amounts


class UniMax(Mixer):
    """Serve domains equally, but none for more than ``max_epochs`` epochs.

    The best of the size heuristics in independent comparisons. It refuses to spend a budget that the
    data cannot fill within the cap, unless told to repeat.
    """

    name = "unimax"
    card = Card(
        summary="Serves domains equally, but small ones for at most max_epochs epochs.",
        paper="UniMax: Fairer and More Effective Language Sampling for Large-Scale Multilingual Pretraining "
        "(Chung et al.), ICLR 2023, arXiv 2304.09151",
        cost="none",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(BaseParams):
        max_epochs: float = param(4.0, "most epochs of any domain over the whole run", above=0.0)
        overflow: Literal["error", "repeat"] = param(
            "error", "when the run is longer than max_epochs of all data: refuse, or repeat all alike"
        )

    params: Params

    def mix(self, ctx: Context) -> Mix:
        """Return amounts / sum of amounts for the budget of the whole run: ``ctx.total_sequences``.

        With another unit it is multiplied by the mean tokens (or documents) per row of the whole data set, which is
        what the run serves only when lengths are alike across domains.
        """
        sizes_K, epochs = sizes(ctx, self.name), self.params.max_epochs
        everything, rows = float(sizes_K.sum()), float(ctx.domains.num_rows.sum())
        budget = ctx.total_sequences * (1.0 if ctx.unit == "sequences" else everything / rows)
        most = epochs * everything
        mix = mix_of(ctx.domains.names, allocate(sizes_K, budget, epochs), f"budget {budget:,.0f} {ctx.unit}")
        if budget <= most * (1 + 1e-9):
            return mix
        told = (
            f"the run serves {budget:,.0f} {ctx.unit}, but {epochs:g} epochs of all {everything:,.0f} are {most:,.0f}, "
            f"short by {budget - most:,.0f}"
        )
        if self.params.overflow == "error":
            enough = float(np.ceil(100 * budget / everything) / 100)
            raise DataError(
                f"unimax: {told}. Set max_epochs: {enough:.2f} or more, train fewer steps, or set overflow: repeat"
            )
        return replace(mix, reason=f"{mix.reason}; {told}: all domains repeat alike")


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
            if self.proportions is not None:
                if self.from_file is not None:
                    raise ValueError("proportions: given together with 'from'; write one or the other")
                check_numbers(self.proportions, "proportions")
            elif self.from_file is None:
                raise ValueError("proportions: missing; give one number per domain, or a file with 'from: FILE'")

    params: Params
    proportions: dict[str, float] | None = None
    """What was read from the file: a resumed run keeps the proportions that it began with."""
    made_by = ""

    def mix(self, ctx: Context) -> Mix:
        """Return the proportions as written, divided by their sum; a file is read once."""
        names, file = ctx.domains.names, self.params.from_file
        if self.params.proportions is not None:
            return mix_of(names, by_domain(self.params.proportions, names, "dynamic.mixer.proportions"), "as written")
        assert file is not None
        if self.proportions is None:
            content = read_proportions(file, "dynamic.mixer.from")
            self.proportions, self.made_by = content.by_name, content.method
        proportions = by_domain(self.proportions, names, f"dynamic.mixer.from ({file})")
        return mix_of(names, proportions, f"from {file} ({self.made_by})")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of the schedule."""

    start_step: int = param(help="first optimizer step of the stage, counted from 0", minimum=0)
    proportions: tuple[float, ...] | dict[str, float] = param(
        help="one number per domain, as a list in their order or by name, divided by their sum", minimum=0.0
    )

    def __post_init__(self) -> None:
        check_numbers(self.proportions, "proportions")


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
        """
        names, step, stop = ctx.domains.names, ctx.interval.start_step, ctx.interval.stop_step
        starts = [stage.start_step for stage in self.params.stages]
        stages_SK = [
            by_domain(stage.proportions, names, f"dynamic.mixer.stages[{i}].proportions")
            for i, stage in enumerate(self.params.stages)
        ]
        at = int(np.searchsorted(starts, step, side="right")) - 1
        if self.params.interpolation == "step":
            mix = mix_of(names, stages_SK[at], f"step {step}")
            late = [start for start in starts if step < start < stop]
            told = f"{mix.reason}; the stage of step {late[-1]} takes effect at step {stop}" if late else mix.reason
            return replace(mix, reason=told)
        proportions = stages_SK[at]
        if at + 1 < len(starts):
            share = (step - starts[at]) / (starts[at + 1] - starts[at])
            proportions = (1 - share) * proportions + share * stages_SK[at + 1]
        return mix_of(names, proportions, f"step {step}")


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
