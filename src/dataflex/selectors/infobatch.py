"""InfoBatch: a random share of the rows that are known well is left out, and the others of them count for more."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dataflex.method import Card, Context, Requires, Rows, Selection, Selector, param
from dataflex.method import Params as BaseParams
from dataflex.plan.proportions import whole_part
from dataflex.signals.kinds import InRun


class InfoBatch(Selector):
    """Leave out a random share of the rows whose loss is below the mean, and weigh up the rest of those.

    A row's loss is that of the training step that served it last, so that nothing is asked of the model. At a decision,
    of the n rows below the mean (strictly), int((1 - r) n) are kept with weight n / kept in the loss, all others with
    weight 1; rows that were never served are kept. The loss is the sum of weight times token loss over the number of
    tokens: in expectation a pass over the kept rows makes the update of one over all rows, in fewer steps. Intervals
    that stop after the share ``delta`` of the run serve all rows with weight 1.

    The paper decides once per epoch. Here an interval serves as many rows as its steps take: drawn from the kept ones
    where these are more, and fewer rows are left out where they are not. So an interval should be shorter than an
    epoch: 0.75 of one with the default r.
    """

    name = "infobatch"
    gives_scores = False
    card = Card(
        summary="Leaves out a random share of the rows of low training loss, and weighs up the rest of those.",
        paper="InfoBatch: Lossless Training Speed Up by Unbiased Dynamic Data Pruning, ICLR 2024, arXiv 2303.04947",
        cost="none: losses are those of the training steps",
        note="The authors weigh by 1 / (1 - r), which is n / kept only where (1 - r) n is a whole number. It saves the "
        "steps that you no longer ask for: a run of the same number of steps takes as long as before. The mean is over "
        "rows that were served; losses are means over tokens, of a pack where rows are packed.",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(BaseParams):
        prune_ratio: float = param(
            0.5, "r, share of the rows below the mean that is left out", minimum=0.0, maximum=0.9
        )
        delta: float = param(0.875, "share of the run after which all rows are served", minimum=0.0, maximum=1.0)

    params: Params

    def requires(self) -> Requires:
        return Requires(
            signals=frozenset({"in_run_losses"}), stages=("pt", "sft"), needs_interval=True, row_weights="num_tokens"
        )

    def select(self, pool: Rows, budget: int, ctx: Context) -> Selection:
        budget = min(budget, len(pool))
        if not budget:
            return Selection(rows=pool[:0], reason="no rows")
        rng, total = ctx.rng("infobatch"), ctx.total_sequences / ctx.global_batch
        if ctx.interval.stop_step > self.params.delta * total:
            return Selection(rows=rng.permutation(pool)[:budget], reason=f"{budget} of all {len(pool)} rows, weight 1")
        losses = ctx.signals(InRun(), pool)[:, 0].astype(np.float64)
        known = np.isfinite(losses)
        mean = losses[known].mean() if known.any() else -np.inf
        well = np.flatnonzero(known & (losses < mean))
        least = max(min(len(well), 1), len(well) + budget - len(pool))
        kept = rng.permutation(well)[: max(whole_part(1.0 - self.params.prune_ratio, len(well)), least)]
        weights = np.ones(len(pool))
        weights[kept] = len(well) / max(len(kept), 1)
        places = rng.permutation(np.setdiff1d(np.arange(len(pool)), np.setdiff1d(well, kept)))[:budget]
        reason = (
            f"{len(kept)} of {len(well)} rows below the mean loss {mean:.4g} kept, weight {len(well) / len(kept):.4g}; "
            if len(well)
            else ""
        )
        unseen = f"{len(pool) - int(known.sum())} rows were never served"
        return Selection(rows=pool[places], weights=weights[places], reason=reason + unseen)
