"""Cheaper than exact: what scores towards a target cost by other ways, and how often they choose the same rows.

Exact LESS scores (LoRA on all linear layers, Adam, fp32) of a pool towards a target are compared with scoring in
bfloat16, with gradients of the last blocks only, with sparse sketches, with the forward-mode derivative along the
target (scaled by Adam's second moment, without norms), and with screens that leave a share of the pool to exact
gradients: by embeddings, or by a pilot. Costs are ratios to a plain batched forward and backward pass over the same
rows, in CPU seconds within one run. The target's own gradients, a cost that does not grow with the pool, are part of
every way; the second number leaves them out. Overlap is the share of the exact choice of the best tenth that the other
way chooses too.

Usage: python benchmarks/cheaper_scores.py [--quick] [--pool FILE] [--target FILE] [--rows N] [--target-rows N]
                                           [--rounds N] [--ways PATTERN]
FILEs are JSON lines with "instruction", "input", "output" (examples/data by default).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch

from dataflex.select.choose import top_k
from dataflex.signals.gradients.engine import GradientEngine
from dataflex.signals.gradients.precondition import moments_of
from dataflex.signals.gradients.scorers import TargetBuilder
from dataflex.signals.kinds import Embedding, GradientScores, TokenLoss
from dataflex.signals.losses import row_losses
from dataflex.signals.model_access import Corpus, ModelAccess
from dataflex.signals.runner import SignalRunner
from dataflex.signals.specs import GradientSpec
from dataflex.signals.sweep import bucketed
from dataflex.train.screening import piloted, screened

ROOT = Path(__file__).resolve().parent.parent
CUTOFF = 224


class Rows:
    """Tokenized rows: prompt masked, answer supervised."""

    def __init__(self, file: Path, tokenizer, count: int | None) -> None:
        lines = file.read_text(encoding="utf-8").splitlines()[:count]
        self.rows = []
        for row in map(json.loads, lines):
            prompt = "\n".join(filter(None, ["Human: " + row["instruction"], row.get("input", "")])) + "\nAssistant:"
            question, answer = tokenizer(prompt)["input_ids"], tokenizer(row["output"])["input_ids"]
            ids = (question + answer + [tokenizer.eos_token_id])[:CUTOFF]
            labels = ([-100] * len(question) + ids[len(question) :])[: len(ids)]
            self.rows.append({"input_ids": ids, "labels": labels})
        self.lengths = np.array([len(row["input_ids"]) for row in self.rows], dtype=np.int64)
        self.source = [json.loads(line).get("source", "") for line in lines]

    def __getitems__(self, ids):
        return [self.rows[i] for i in ids]


def collate(features):
    width = max(len(f["input_ids"]) for f in features)
    return {
        "input_ids": torch.tensor([f["input_ids"] + [2] * (width - len(f["input_ids"])) for f in features]),
        "attention_mask": torch.tensor(
            [[1] * len(f["input_ids"]) + [0] * (width - len(f["input_ids"])) for f in features]
        ),
        "labels": torch.tensor([f["labels"] + [-100] * (width - len(f["labels"])) for f in features]),
    }


def prepared(pool: Rows, steps: int):
    """LoRA model and optimizer after a short warm-up on random rows, so that there are moments."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(ROOT / "examples/models/base-4m", dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    order = np.random.default_rng(0).permutation(len(pool.rows))
    for step in range(steps):
        batch = collate(pool.__getitems__(order[(np.arange(8) + 8 * step) % len(order)].tolist()))
        row_losses(model, batch).nanmean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model.eval(), optimizer


def plain_pass(model, pool: Rows, budget: int) -> None:
    for positions in bucketed(pool.lengths, budget):
        loss = row_losses(model, collate(pool.__getitems__(positions.tolist()))).nansum()
        torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])


def plain_forward(model, pool: Rows, budget: int) -> None:
    with torch.no_grad():
        for positions in bucketed(pool.lengths, budget):
            batch = collate(pool.__getitems__(positions.tolist()))
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)


def derivatives(model, optimizer, pool: Rows, target: Rows, budget: int) -> np.ndarray:
    """Return the derivative of each row's loss along the mean target gradient over sqrt(v) + eps, by forward mode."""
    engine = GradientEngine(model)
    builder = TargetBuilder(engine, ["target"])
    with engine.observing():
        for positions in bucketed(target.lengths, budget):
            builder.add(
                collate(target.__getitems__(positions.tolist())), torch.zeros(len(positions), dtype=torch.int64)
            )
        direction = builder.finish().one(0)
        for name, moments in moments_of(optimizer, engine.parameters).items():
            corrected = (moments.second / (1 - moments.betas[1] ** moments.step)).sqrt() + moments.eps
            direction[name] = direction[name] / corrected.view_as(direction[name])
        out = np.zeros(len(pool.rows))
        for positions in bucketed(pool.lengths, budget):
            out[positions] = engine.jvp(collate(pool.__getitems__(positions.tolist())), direction).numpy()
    return out


def tell(options, pool: Rows, target: Rows, base, forward, taken, found) -> None:
    """Print the table."""
    tenth = max(1, len(pool.rows) // 10)
    wanted = set(top_k(found["exact, fp32"], tenth).tolist())
    write = sys.stdout.write
    write(f"{platform.processor() or platform.machine()}, 1 thread, torch {torch.__version__}; base-4m, LoRA rank 8, ")
    write(f"{len(pool.rows)} rows of up to {CUTOFF} tokens, {len(target.rows)} target rows, {options.rounds} rounds\n")
    for name in list(forward)[1:]:
        ratio = statistics.median(forward[name]) / statistics.median(forward["plain"])
        write(f"a pass for {name} costs {ratio:.2f} of a plain length-bucketed forward pass\n")
    write(
        f"{'way':<26}{'cost / (F + B)':>15}{'less target':>13}{'overlap of the best tenth':>27}{'target source':>15}\n"
    )
    plain = statistics.median(base)
    alone = statistics.median(taken["the target alone"]) / plain
    for way, seconds in taken.items():
        chosen = top_k(found[way], tenth).tolist()
        overlap = len(wanted & set(chosen)) / tenth
        right = sum(pool.source[i] == "gsm8k" for i in chosen) / tenth
        cost = statistics.median(seconds) / plain
        write(f"{way:<26}{cost:>15.2f}{cost - alone:>13.2f}{overlap:>27.1%}{right:>15.1%}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="120 rows, one round")
    parser.add_argument("--pool", type=Path, default=ROOT / "examples/data/pool.jsonl")
    parser.add_argument("--target", type=Path, default=ROOT / "examples/data/gsm8k_valid.jsonl")
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--target-rows", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", default="", help="regular expression of the ways to measure beside the exact one")
    options = parser.parse_args()
    if options.quick:
        options.rows, options.rounds = 120, 1
    torch.set_num_threads(1)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples/models/base-4m")
    pool, target = Rows(options.pool, tokenizer, options.rows), Rows(options.target, tokenizer, options.target_rows)
    model, optimizer = prepared(pool, 4 if options.quick else 20)
    budget = 8 * CUTOFF
    runner = SignalRunner(
        access=ModelAccess(
            model=model,
            collate=collate,
            autocast=contextlib.nullcontext,
            device=torch.device("cpu"),
            token_budget=budget,
            optimizer=lambda: optimizer,
            train=Corpus(dataset=pool, lengths=pool.lengths, identity="pool"),
            targets={"target": Corpus(dataset=target, lengths=target.lengths, identity="target")},
        )
    )
    everything = np.arange(len(pool.rows), dtype=np.int64)

    def scores(spec: GradientSpec, rows=everything) -> np.ndarray:
        out = np.full(len(everything), -np.inf)
        out[rows] = runner(GradientScores(**vars(spec), targets=("target",)), rows)[:, 0]
        return out

    def screen(share: float) -> np.ndarray:
        return scores(GradientSpec(), screened(everything, share, runner, ("target",)))

    def pilot(share: float) -> np.ndarray:
        kept = piloted(everything, round(share * len(everything)), runner, ("target",), seed=0, interval=0)
        return scores(GradientSpec(), kept)

    ways = {
        "exact, fp32": lambda: scores(GradientSpec()),
        "the target alone": lambda: scores(GradientSpec(), everything[:1]),
        "exact, bf16": lambda: scores(GradientSpec(bf16=True)),
        "last 3 of 6 blocks": lambda: scores(GradientSpec(last_blocks=3)),
        "last 2 of 6 blocks": lambda: scores(GradientSpec(last_blocks=2)),
        "last block": lambda: scores(GradientSpec(last_blocks=1)),
        "last 2 blocks, bf16": lambda: scores(GradientSpec(last_blocks=2, bf16=True)),
        "sketch of 8192": lambda: scores(GradientSpec(sketch_size=8192)),
        "screen to 50 %, exact": lambda: screen(0.5),
        "screen to 30 %, exact": lambda: screen(0.3),
        "screen to 20 %, exact": lambda: screen(0.2),
        "pilot, 40 % exact": lambda: pilot(0.4),
        "pilot, 30 % exact": lambda: pilot(0.3),
        "pilot, 20 % exact": lambda: pilot(0.2),
        "derivative, forward mode": lambda: derivatives(model, optimizer, pool, target, budget),
        "embeddings only": lambda: runner(Embedding(), everything).dot(
            runner(Embedding(), np.arange(len(target.rows)), target="target").mean(axis=0)
        ),
    }
    always = ("exact, fp32", "the target alone")
    ways = {way: ask for way, ask in ways.items() if way in always or re.search(options.ways, way)}
    forward_only = {
        "losses": lambda: runner(TokenLoss(), everything),
        "embeddings": lambda: runner(Embedding(), everything),
    }
    forward: dict[str, list[float]] = {"plain": [], **{name: [] for name in forward_only}}
    step, base, taken, found = 0, [], {way: [] for way in ways}, {}
    for _ in range(options.rounds):
        started = time.process_time()
        plain_pass(model, pool, budget)
        base.append(time.process_time() - started)
        for name in forward:
            step += 1
            runner.begin(step)
            started = time.process_time()
            forward_only.get(name, lambda: plain_forward(model, pool, budget))()
            forward[name].append(time.process_time() - started)
        for way, ask in ways.items():
            step += 1
            runner.begin(step)
            started = time.process_time()
            found[way] = np.nan_to_num(ask(), nan=-np.inf)
            taken[way].append(time.process_time() - started)
    tell(options, pool, target, base, forward, taken, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
