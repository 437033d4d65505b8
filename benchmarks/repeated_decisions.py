"""A small relevant part that is chosen again and again: does LESS keep finding it?

Of the demo's pool 150 short rows, of which 30 (SVAMP, word problems) are of the target's kind; 24 others are the
target, 70 the held-out rows. A fifth of the pool is kept by each decision and served 4 times over before the next
one, so that after a few decisions relevant rows are known by heart. Ten steps on rows of the whole pool come first.

    cosine          as published: directions of Adam's steps, momentum included
    no momentum     the same without the momentum that all rows share (include_momentum: false)
    dot             inner products instead of cosines (normalize: false)
    sqrt            divided by the square root of the row's norm
    floor           divided by the row's norm, or by the pool's median norm where that is larger
    exclude_seen    cosines of the rows that were not served yet

Told are, decision by decision, the precision (share of relevant rows among those kept), the held-out loss after they
were served, and the mean norm of the relevant rows' steps over that of all rows.

Usage: python benchmarks/repeated_decisions.py [--seeds 1] [--methods cosine dot ...] [--decisions 5]
"""

from __future__ import annotations

import argparse
import random
import sys
from dataclasses import replace

import numpy as np

from support.selection_passes import ROOT, collate, read, tokens

METHODS = ["cosine", "no momentum", "dot", "sqrt", "floor", "exclude_seen"]
KIND, RELEVANT, POOL, TARGET, HELD_OUT = "svamp", 30, 150, 24, 70
STEPS, BATCH, LEARNING_RATE, TOKENS = 15, 8, 3e-3, 2048


class Planted:
    """The model, the planted pool, and the passes of one run."""

    def __init__(self, seed: int) -> None:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from dataflex.signals.gradients.engine import GradientEngine
        from dataflex.signals.logits import TokenScorer

        self.torch = torch
        torch.manual_seed(seed)
        folder = str(ROOT / "examples/models/base-4m")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        rows = read("pool")
        random.Random(seed).shuffle(rows)
        size = {id(row): len(row["instruction"] + (row["input"] or "") + row["output"]) for row in rows}
        kind = [row for row in rows if row["source"] == KIND and size[id(row)] < 300]
        others = [row for row in rows if row["source"] != KIND and size[id(row)] < 260][: POOL - RELEVANT]
        self.pool = [tokens(tokenizer, row) for row in kind[:RELEVANT] + others]
        self.target = [tokens(tokenizer, row) for row in kind[RELEVANT : RELEVANT + TARGET]]
        self.held_out = [tokens(tokenizer, row) for row in kind[RELEVANT + TARGET :][:HELD_OUT]]
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
        self.trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trainable, lr=LEARNING_RATE, weight_decay=0)
        self.engine, self.scorer = GradientEngine(self.model), TokenScorer(self.model)

    def loss(self) -> float:
        """Return the held-out loss by token."""
        from dataflex.signals.sweep import bucketed

        self.model.eval()
        total, count = 0.0, 0
        with self.torch.no_grad():
            for places in bucketed(np.array([len(ids) for ids, _ in self.held_out]), TOKENS):
                batch = collate(self.torch, [self.held_out[place] for place in places])
                supervised = (batch["labels"] != -100).sum(dim=1)
                total += float((self.scorer(batch).means() * supervised).sum())
                count += int(supervised.sum())
        return total / count

    def train(self, ids: list[int]) -> None:
        """Take an optimizer step on every eight rows."""
        self.model.train()
        for start in range(0, len(ids), BATCH):
            batch = collate(self.torch, [self.pool[place] for place in ids[start : start + BATCH]])
            self.model(**batch, use_cache=False).loss.backward()
            self.torch.nn.utils.clip_grad_norm_(self.trainable, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def influences(self, momentum: bool) -> tuple[np.ndarray, np.ndarray]:
        """Return inner products of all rows' steps with the target's mean unit gradient, and the steps' norms."""
        from dataflex.signals.gradients.consumers import Dots
        from dataflex.signals.gradients.precondition import PRESETS, moments_of, preconditioner
        from dataflex.signals.gradients.scorers import TargetBuilder
        from dataflex.signals.sweep import bucketed

        torch = self.torch
        self.model.eval()
        kind = replace(PRESETS["true_adam"], include_momentum=momentum)
        direction = preconditioner(kind, moments_of(self.optimizer, self.engine.parameters))
        builder = TargetBuilder(self.engine, ["target"])
        products, norms = np.zeros(POOL), np.zeros(POOL)
        with self.engine.observing():
            for start in range(0, len(self.target), BATCH):
                part = self.target[start : start + BATCH]
                builder.add(collate(torch, part), torch.zeros(len(part), dtype=torch.long))
            dots = Dots(builder.finish(), normalize="none")
            for places in bucketed(np.array([len(ids) for ids, _ in self.pool]), TOKENS):
                batch = collate(torch, [self.pool[place] for place in places])
                found = self.engine.run(batch, [dots], precondition=direction)
                products[places], norms[places] = found["dots"][:, 0].numpy(), found["dots.norms"].numpy()
        return products, norms


def scores(method: str, products: np.ndarray, norms: np.ndarray, served: np.ndarray) -> np.ndarray:
    """Return what a method ranks rows by."""
    if method == "dot":
        return products
    if method == "sqrt":
        return products / np.sqrt(norms)
    if method == "floor":
        return products / np.maximum(norms, np.median(norms))
    return np.where(served > 0, -np.inf, products / norms) if method == "exclude_seen" else products / norms


def run(method: str, seed: int, decisions: int) -> str:
    """Train by one method and return a line about it."""
    planted, rng = Planted(seed), np.random.default_rng(seed)
    planted.train(rng.choice(POOL, 10 * BATCH, replace=False).tolist())
    served = np.zeros(POOL, dtype=np.int64)
    told: list[list[str]] = [[], [], []]
    for _ in range(decisions):
        products, norms = planted.influences(momentum=method != "no momentum")
        kept = np.argsort(-scores(method, products, norms, served), kind="stable")[:RELEVANT]
        copies = -(-STEPS * BATCH // RELEVANT)
        rows = np.concatenate([rng.permutation(kept) for _ in range(copies)])[: STEPS * BATCH]
        np.add.at(served, rows, 1)
        planted.train(rows.tolist())
        told[0].append(f"{(kept < RELEVANT).mean():.2f}")
        told[1].append(f"{planted.loss():.3f}")
        told[2].append(f"{norms[:RELEVANT].mean() / norms.mean():.2f}")
    columns = (f"{name} {' '.join(values)}" for name, values in zip(("precision", "loss", "norms"), told, strict=True))
    return f"{method:<14} seed {seed}  {'  '.join(columns)}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--decisions", type=int, default=5)
    options = parser.parse_args()
    for method in options.methods:
        for seed in options.seeds:
            print(run(method, seed, options.decisions), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
