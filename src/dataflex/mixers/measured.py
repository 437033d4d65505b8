"""Mixers that serve domains by what training on them was measured to do."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import UnsupportedError
from dataflex.method import Card, Context, Mix, Requires, param
from dataflex.mixers._lib import NOTHING, ONLINE, ExponentiatedMixer, InitialParams, even, mix_of
from dataflex.plan.domains import Floats
from dataflex.plan.proportions import normalized


class ByLedger(ExponentiatedMixer):
    """Serve domains in proportion to what a token of them took off the targets' losses."""

    name = "ledger"
    saved = ("names", "benefit", "known")
    card = Card(
        summary="Serves domains in proportion to how far a token of them was measured to lower the targets' losses.",
        paper="baseline",
        cost="F + B over the targets every refresh_steps of the ledger, and the split of each step's gradient",
        note="The ledger of the run says what training on each domain did: it is on, with the mixer's targets, where "
        "the block has none. A domain that only did harm keeps its share of 'explore'.",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(InitialParams):
        smoothing: float = param(0.5, "weight of the past in the average benefit", minimum=0.0, maximum=1.0)
        explore: float = param(0.1, "share of equal proportions mixed in", minimum=0.0, maximum=1.0)

    params: Params
    benefit = NOTHING
    """Average fall of the targets' losses per token of each domain [K]."""
    known = NOTHING
    """1 for domains that were trained on, else 0 [K]."""

    def requires(self) -> Requires:
        return replace(ONLINE, targets=True, ledger=True)

    def mix(self, ctx: Context) -> Mix:
        """Return (1 - e) max(b, 0) / sum max(b, 0) + e / K, b the average benefit per token, e ``explore``.

        K counts the domains that ``initial`` serves, which alone are served. Domains that were never trained on count
        with the mean of the others. Without a benefit above 0 the proportions are equal; before there is any account,
        those of ``initial``.
        """
        names = ctx.domains.names
        if self.meet(names):
            self.benefit, self.known = np.zeros(len(names)), np.zeros(len(names))
        first = self._initial(ctx)
        if ctx.interval.kind == "warmup" or (ctx.benefit is None and ctx.interval.start_step == 0):
            return mix_of(names, first, "before there is an account")
        if ctx.benefit is None:
            raise UnsupportedError("the ledger mixer looks at what training did, which is not known before it")
        self._learn(-ctx.benefit.changes_KT.mean(axis=1), ctx.benefit.tokens_K)
        known = self.known > 0
        gains = np.where(known, np.maximum(self.benefit, 0.0), 0.0)
        gains[~known] = gains[known].mean() if known.any() else 0.0
        gains[first == 0] = 0.0
        equal = even(first)
        shares = normalized(gains) if gains.sum() > 0 else equal
        told = ", ".join(f"{name} {1e6 * gain:.3g}" for name, gain in zip(names, self.benefit, strict=True))
        explore = self.params.explore
        return mix_of(names, (1 - explore) * shares + explore * equal, f"fall of the loss per million tokens {told}")

    def _learn(self, fall_K: Floats, tokens_K: NDArray[np.int64]) -> None:
        served = tokens_K > 0
        new = np.divide(fall_K, tokens_K, out=np.zeros_like(self.benefit), where=served)
        past = np.where(self.known > 0, self.params.smoothing, 0.0)
        self.benefit = np.where(served, past * self.benefit + (1 - past) * new, self.benefit)
        self.known = np.maximum(self.known, served)
