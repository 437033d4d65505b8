"""A resumable pass over toy rows in a process of its own, slow enough to be killed in the middle.

Usage: python store_worker.py DIRECTORY SECONDS_PER_BATCH [RANK WORLD PORT]
"""

from __future__ import annotations

import os
import sys
import time

import numpy as np
import torch

from dataflex.signals.store import ArrayStore, CacheKey, ResumablePass
from dataflex.signals.sweep import Collector, Sweep

NUM_ROWS, WIDTH = 60, 3
LENGTHS = np.random.default_rng(4).integers(2, 12, NUM_ROWS)
KEY = CacheKey(model="toy@1", data="rows@1", method="embeddings", parameters={"layer": -1}, versions={})


class Features:
    """Rows of different lengths, without transformers, which would take seconds to import."""

    def __getitems__(self, ids):
        return [list(range(row, row + LENGTHS[row])) for row in ids]


def collate(features):
    width = max(map(len, features))
    return {"input_ids": torch.tensor([ids + [0] * (width - len(ids)) for ids in features])}


def score(batch):
    """Depends on the whole batch, as padded arithmetic does in its last bits."""
    tokens = batch["input_ids"].double()
    mixed = tokens.sum(dim=1, keepdim=True) * torch.tensor([[1.0, 0.5, 0.1]]) + tokens.mean() + len(tokens)
    return mixed.sin()


def run(directory, seconds_per_batch=0.0):
    ids = np.arange(NUM_ROWS)[::-1].copy()
    calls = []

    def slow(batch):
        time.sleep(seconds_per_batch)
        calls.append(1)
        return score(batch)

    sweep = Sweep(
        dataset=Features(), rows=ids, lengths=LENGTHS[ids], collate=collate, token_budget=20, device=torch.device("cpu")
    )
    work = ResumablePass(ArrayStore(directory), KEY, shape=(NUM_ROWS, WIDTH), dtype=np.float32)
    collector = Collector(sweep, (), work)
    for turn in sweep.turns(work.done_at_start):
        collector.take(turn, slow(turn.batch))
    return collector.finish(), len(calls)


if __name__ == "__main__":
    if len(sys.argv) > 3:
        rank, world, port = sys.argv[3:6]
        os.environ.update(RANK=rank, WORLD_SIZE=world, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        torch.distributed.init_process_group("gloo")
    run(sys.argv[1], float(sys.argv[2]))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
