"""How many more rows a second two ranks score than one, when each has a core: losses and exact LESS scores.

Starts jobs of one and of two gloo ranks in turn, one thread each; each job times its passes between
barriers and rank 0 reports. What the machine itself allows is measured beside it: two jobs of one rank at
the same time, which share nothing. Where that is far from 2, the cores are not two, or not idle.

Usage: python benchmarks/two_ranks.py [--quick] [--rows N] [--rounds N]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve()


def job(rows: int) -> None:
    """Score on this rank; rank 0 prints seconds."""
    import numpy as np
    import torch
    import torch.distributed as dist
    from transformers import AutoTokenizer

    from cheaper_scores import CUTOFF, ROOT, Rows, collate, prepared
    from dataflex.signals.kinds import GradientScores, TokenLoss
    from dataflex.signals.model_access import Corpus, ModelAccess
    from dataflex.signals.runner import SignalRunner

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples/models/base-4m")
    pool = Rows(ROOT / "examples/data/pool.jsonl", tokenizer, rows)
    target = Rows(ROOT / "examples/data/gsm8k_valid.jsonl", tokenizer, 2)
    model, optimizer = prepared(pool, 3)
    runner = SignalRunner(
        access=ModelAccess(
            model=model,
            collate=collate,
            autocast=contextlib.nullcontext,
            device=torch.device("cpu"),
            token_budget=8 * CUTOFF,
            optimizer=lambda: optimizer,
            train=Corpus(dataset=pool, lengths=pool.lengths),
            targets={"target": Corpus(dataset=target, lengths=target.lengths)},
        )
    )
    ids = np.arange(len(pool.rows), dtype=np.int64)
    seconds = {}
    runner(TokenLoss(), ids[:16])
    for step, (name, ask) in enumerate(
        {
            "losses": lambda: runner(TokenLoss(), ids),
            "less": lambda: runner(GradientScores(targets=("target",)), ids),
        }.items()
    ):
        runner.begin(step + 1)
        dist.barrier()
        started = time.perf_counter()
        ask()
        dist.barrier()
        seconds[name] = time.perf_counter() - started
    if dist.get_rank() == 0:
        sys.stdout.write("SECONDS " + json.dumps(seconds) + "\n")
    dist.destroy_process_group()


def together(rows: int) -> dict[str, float]:
    """Run two independent one-rank jobs at once and return the mean of their seconds."""
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: start(1, rows), range(2))
    return {name: (first[name] + second[name]) / 2 for name in first}


def start(ranks: int, rows: int) -> dict[str, float]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", str(ranks)]
    command += ["--master-addr", "127.0.0.1", "--master-port", str(port), str(HERE), "--job", str(rows)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if "SECONDS " in line]
    if done.returncode or not lines:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(lines[-1].split("SECONDS ")[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rows, one round")
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--job", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        job(options.job)
        return 0
    if options.quick:
        options.rows, options.rounds = 120, 1
    taken: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    independent = []
    for _ in range(options.rounds):
        for ranks, found in taken.items():
            found.append(start(ranks, options.rows))
        independent.append(together(options.rows))
    write = sys.stdout.write
    write(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, one thread a rank; base-4m, ")
    write(f"LoRA rank 8, {options.rows} rows, {options.rounds} rounds\n")
    for name in taken[1][0]:
        one, two = (statistics.median(run[name] for run in taken[ranks]) for ranks in (1, 2))
        speeds = f"one rank {options.rows / one:7.1f} rows/s, two {options.rows / two:7.1f}"
        ceiling = 2 * one / statistics.median(run[name] for run in independent)
        write(f"{name:<8} {speeds}, ratio {one / two:.2f}; two independent jobs at once reach {ceiling:.2f}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
