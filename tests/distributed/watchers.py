"""Selectors for the tests of harmlessness: both serve rows in file order, one of them looks at everything first."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch.distributed as dist

from dataflex import Card, Requires, Selection, Selector
from dataflex.signals.kinds import (
    EL2N,
    Embedding,
    GradientNorms,
    GradientProducts,
    GradientScores,
    GradientSketches,
    InRun,
    TokenLoss,
)
from dataflex.signals.specs import GradientSpec

sys.path.insert(0, str(Path(__file__).parent))
from my_signal import GuessedTokens

CARD = Card(summary="Serves rows in file order.", paper="test", cost="0")


class Blind(Selector):
    name, card = "blind", CARD

    def requires(self):
        return Requires(needs_interval=True)

    def select(self, pool, budget, ctx):
        start = ctx.interval.start_step * 4 % (len(pool) - budget)
        return Selection(rows=pool[start : start + budget])


class Watcher(Blind):
    name = "watcher"

    def requires(self):
        return Requires(
            signals=frozenset({"losses", "logits", "embeddings", "gradients"}), targets=True, needs_interval=True
        )

    def select(self, pool, budget, ctx):
        scores = {"losses": ctx.signals(TokenLoss(), pool).tolist()}
        scores["few"] = ctx.signals(TokenLoss(), pool[:1]).tolist()  # fewer rows than ranks
        scores["target"] = ctx.signals(TokenLoss(), pool[:5], target="goal").tolist()
        scores["el2n"] = ctx.signals(EL2N(), pool).tolist()
        scores["own"] = ctx.signals(GuessedTokens(top=5), pool).tolist()
        scores["embeddings"] = ctx.signals(Embedding(), pool).tolist()
        for precondition in ("none", "true_adam"):
            spec = GradientSpec(precondition=precondition)
            key = f"gradients {precondition}"
            scores[key] = ctx.signals(GradientScores(**vars(spec), targets=("goal",)), pool).tolist()
            scores[f"norms {precondition}"] = ctx.signals(GradientNorms(**vars(spec)), pool[:9]).tolist()
            scores[f"sketches {precondition}"] = ctx.signals(GradientSketches(**vars(spec), dim=32), pool[:9]).tolist()
            signal = GradientProducts(**vars(spec), targets=("goal",))
            products, gram = signal.split(ctx.signals(signal, pool[:9]))
            scores[f"products {precondition}"], scores[f"gram {precondition}"] = products.tolist(), gram.tolist()
        scores["target sketches"] = ctx.signals(
            GradientSketches(**vars(spec), dim=32), pool[:5], target="goal"
        ).tolist()
        parameters = list(ctx.signals.access.model.parameters())
        kinds = {
            "DTensor" if type(p).__name__ == "DTensor" else "ZeRO-3" if hasattr(p, "ds_id") else "whole"
            for p in parameters
        }
        scores["kinds"] = sorted(kinds)
        write(scores, ctx)
        return super().select(pool, budget, ctx)


class Shown(Blind):
    """Asks for all that training steps show of the rows that they serve."""

    name = "shown"

    def requires(self):
        signals = frozenset(f"in_run_{what}" for what in ("losses", "norms", "scores", "embeddings"))
        return Requires(signals=signals, targets=True, needs_interval=True)

    def select(self, pool, budget, ctx):
        scores = {
            what: ctx.signals(InRun(what=what, targets=ctx.targets if what == "scores" else ()), pool).tolist()
            for what in ("losses", "norms", "scores", "embeddings")
        }
        write(scores, ctx)
        return super().select(pool, budget, ctx)


def write(scores, ctx):
    if not dist.is_initialized() or dist.get_rank() == 0:
        Path(__file__).with_name(f"scores-{ctx.interval.index}.json").write_text(json.dumps(scores))
