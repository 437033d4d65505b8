"""How much of LESS's exact best tenth an index finds, by the numbers kept of a row.

    python benchmarks/index_overlap.py --pool FOLDER/select_train.jsonl --rows 2750 \\
        --targets FOLDER/select_valid.jsonl FOLDER/mmlu_dev_sft.jsonl

The 4M base model with LoRA rank 8 on all linear layers after some steps of AdamW, Adam's directions of real rows, and
mean unit gradients of the targets. Rows are sketched, projected and rounded by the code of ``dataflex score --index``.
The projection is fitted to the first rows, and the overlap is of the others. ``random`` is a sparse random projection
to that many numbers, unrounded. Files are of alpaca's format, a list or an object a line. CPU seconds are of this
process.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np

from dataflex.rng import stream
from support.selection_passes import ROOT, Bench, collate, tokens

EXAMPLES = ROOT / "examples/data"
SIZES = (256, 512, 1024)
TOKEN_BUDGET = 2048


def best_tenth(exact: np.ndarray, found: np.ndarray) -> float:
    """Return the share of the exact best tenth that is in the other best tenth."""
    count = max(1, len(exact) // 10)
    same = np.intersect1d(np.argsort(-exact, kind="stable")[:count], np.argsort(-found, kind="stable")[:count])
    return len(same) / count


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", type=Path, default=EXAMPLES / "pool.jsonl")
    files = [EXAMPLES / "gsm8k_valid.jsonl", EXAMPLES / "general_valid.jsonl"]
    parser.add_argument("--targets", type=Path, nargs="+", default=files)
    parser.add_argument("--rows", type=int, default=1000, help="rows of the pool, drawn at random")
    parser.add_argument("--target-rows", type=int, default=32, help="first rows of each target")
    parser.add_argument("--fitted", type=int, default=2048, help="rows to fit to; at most three quarters")
    parser.add_argument("--warmup", type=int, default=40, help="steps of AdamW before gradients are taken")
    parser.add_argument("--wide", type=int, default=2**16, help="numbers of a wide sketch")
    parser.add_argument("--plain-coordinates", action="store_true", help="do not weigh coordinates by Adam's moments")
    parser.add_argument("--precondition", choices=("true_adam", "none"), default="true_adam")
    parser.add_argument("--model", default=str(ROOT / "examples/models/base-4m"))
    return parser.parse_args()


@dataclass
class Measured:
    """Exact scores [n, M], wide sketches [n, W] and norms [n] of rows, sketches of targets [M, W], CPU seconds."""

    exact: np.ndarray
    wide: np.ndarray
    norms: np.ndarray
    aims: np.ndarray
    seconds: dict[str, float]


def read(path: Path) -> list[dict]:
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]


def measured(args: argparse.Namespace) -> Measured:
    import torch
    from transformers import AutoTokenizer

    from dataflex.signals.gradients.consumers import Dots, Sketch
    from dataflex.signals.gradients.precondition import PRESETS, moments_of, preconditioner
    from dataflex.signals.gradients.scorers import TargetBuilder, sketch_weights
    from dataflex.signals.sweep import bucketed

    bench, tokenizer = Bench(args.model, 16, args.warmup), AutoTokenizer.from_pretrained(args.model)
    engine, moments = bench.engine, moments_of(bench.optimizer, bench.engine.parameters)
    direction = preconditioner(PRESETS[args.precondition], moments)
    pool = read(args.pool)
    rows = [tokens(tokenizer, pool[row]) for row in stream(0, "rows").permutation(len(pool))[: args.rows]]
    builder = TargetBuilder(engine, args.targets)
    for place, path in enumerate(args.targets):
        target = [tokens(tokenizer, row) for row in read(path)[: args.target_rows]]
        for start in range(0, len(target), 8):
            part = target[start : start + 8]
            builder.add(collate(torch, part), torch.full((len(part),), place))
    vectors = builder.finish()
    weighted = args.precondition != "none" and not args.plain_coordinates
    sketch, dots = Sketch(size=args.wide, weights=sketch_weights(moments) if weighted else None), Dots(vectors)
    wide, norms = np.zeros((len(rows), args.wide), dtype=np.float32), np.zeros(len(rows), dtype=np.float32)
    exact, seconds = np.zeros((len(rows), len(vectors)), dtype=np.float32), {"exact": 0.0, "sketch": 0.0}
    with engine.observing():
        for batch in bucketed(np.array([len(ids) for ids, _ in rows]), TOKEN_BUDGET):
            inputs, began = collate(torch, [rows[row] for row in batch]), time.process_time()
            exact[batch] = engine.run(inputs, [dots], precondition=direction)["dots"].numpy()
            between = time.process_time()
            found = engine.run(inputs, [sketch], precondition=direction)
            seconds["exact"] += between - began
            seconds["sketch"] += time.process_time() - between
            wide[batch], norms[batch] = found["sketch"].numpy(), found["sketch.norms"].numpy()
    return Measured(exact=exact, wide=wide, norms=norms, aims=sketch.of(vectors).numpy(), seconds=seconds)


def folded(sketches: np.ndarray, size: int) -> np.ndarray:
    """Return sketches of fewer numbers; one half holds each coordinate's first place, the other its second."""
    return sketches.reshape(len(sketches), 2, -1, size // 2).sum(axis=2).reshape(len(sketches), -1)


def main() -> int:
    args = options()
    found = measured(args)

    import torch

    from dataflex.signals.gradients.projection import fitted, packed, products, row_type

    count = min(args.fitted, 3 * len(found.exact) // 4)
    others, norms = found.wide[count:], found.norms[count:]
    print(
        f"{args.precondition}, wide sketches of {args.wide:,} numbers, {count:,} rows fitted to, {len(others):,} "
        f"others; an exact pass took {found.seconds['exact']:.0f} CPU s, one with wide sketches "
        f"{found.seconds['sketch']:.0f}"
    )
    print(f"best tenth: {max(1, len(others) // 10)} rows")
    print(f"{'numbers':<24} " + " ".join(f"{path.stem:>16}" for path in args.targets))

    def tell(label: str, scores: np.ndarray) -> None:
        shares = [best_tenth(found.exact[count:, target], scores[:, target]) for target in range(len(args.targets))]
        print(f"{label:<24} " + " ".join(f"{share:>16.3f}" for share in shares), flush=True)

    units = others / norms[:, None]
    tell(f"wide {args.wide}", units @ found.aims.T)
    for size in SIZES:
        if args.wide % size == 0 and size < args.wide:
            tell(f"random {size}", folded(units, size) @ folded(found.aims, size).T)
        if size <= count:
            matrix = fitted(found.wide[:count], size, seed=0)
            parts = torch.from_numpy(others), torch.from_numpy(norms), torch.from_numpy(matrix)
            kept = packed(*parts, row_type(size, "int8"))
            tell(f"index, int8, {size}", products(kept, found.aims @ matrix, normalize=True))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
