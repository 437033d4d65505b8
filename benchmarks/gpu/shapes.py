"""Models with random weights, rows made of numbers, and the loop that both static and dynamic steps are timed in.

Nothing is fetched, and no trainer is imported: a plain loop around ``dataflex.Session``, as in docs/other-loops.md.
"""

from __future__ import annotations

import contextlib
import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import nn

from dataflex import BatchShape, Loop, RowSpace, Session

IGNORE = -100


@dataclass(frozen=True)
class Shape:
    """A Llama of some size, and the micro-batch that it is measured with."""

    name: str
    hidden: int
    layers: int
    heads: int
    feed_forward: int
    vocabulary: int
    rows: int = 8  # of a micro-batch
    tokens: int = 512  # of the longest row
    lora: int = 0  # rank of adapters on all linear layers; 0: all parameters are trained


FULL = {
    "160m": Shape("160m", 768, 12, 12, 2048, 50304, rows=16),
    "410m": Shape("410m", 1024, 24, 16, 2816, 50304, rows=16),
    "1b": Shape("1b", 2048, 16, 16, 5632, 50304, rows=8),
    "7b-lora": Shape("7b-lora", 4096, 32, 32, 11008, 32000, rows=4, tokens=1024, lora=16),
}
TOY = {
    name: Shape(name, 32 * (1 + n % 2), 2, 4, 64, 512, rows=4, tokens=64, lora=4 * (name == "7b-lora"))
    for n, name in enumerate(FULL)
}


class Adapted(nn.Module):
    """A frozen linear layer with a trained adapter of low rank beside it."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False, device=base.weight.device, dtype=torch.float32)
        self.up = nn.Linear(rank, base.out_features, bias=False, device=base.weight.device, dtype=torch.float32)
        nn.init.normal_(self.up.weight, std=0.01)  # zeros would give the other matrix no gradient

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.base(inputs) + self.up(self.down(inputs.to(self.down.weight.dtype)))


def build(shape: Shape, device: torch.device, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a model with random weights on the device; that of adapters is in bf16 below them on a GPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=2 * shape.tokens,
        use_cache=False,
    )
    torch.manual_seed(0)
    if shape.lora and device.type == "cuda":
        dtype = torch.bfloat16
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    if shape.lora:
        model.requires_grad_(False)
        for module in list(model.model.layers.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear) and not isinstance(module, Adapted):
                    setattr(module, name, Adapted(child, shape.lora))
    return model.train()


class Numbers:
    """Rows of random tokens: each of one of eight domains, which have words of their own, a prompt and an answer."""

    def __init__(self, shape: Shape, count: int, seed: int = 0, domain: int | None = None) -> None:
        rng = np.random.default_rng(seed)
        self.domains = rng.integers(8, size=count) if domain is None else np.full(count, domain)
        part = shape.vocabulary // 8
        self.rows = []
        for of in self.domains:
            length = int(rng.integers(shape.tokens // 2, shape.tokens + 1))
            words = (rng.zipf(1.3, size=length) - 1) % part + of * part
            common = rng.random(length) < rng.random()  # words that rows of all domains have, more or fewer of them
            words[common] = (rng.zipf(1.5, size=int(common.sum())) - 1) % part
            labels = words.copy()
            labels[: length // 4] = IGNORE
            self.rows.append({"input_ids": words.tolist(), "labels": labels.tolist()})

    # What RowSpace.of reads of a datasets.Dataset, which is not needed here.
    column_names = ("input_ids", "labels")

    def select_columns(self, names: list[str]) -> Numbers:
        return self

    def with_format(self, _: str) -> Numbers:
        return self

    def iter(self, batch_size: int) -> Iterator[pa.Table]:
        for first in range(0, len(self.rows), batch_size):
            yield pa.Table.from_pylist(self.rows[first : first + batch_size])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.rows[index]


def pad(features: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Collate rows into one batch, padded on the right."""
    longest = max(len(each["input_ids"]) for each in features)
    batch = {
        "input_ids": torch.zeros(len(features), longest, dtype=torch.int64),
        "labels": torch.full((len(features), longest), IGNORE),
        "attention_mask": torch.zeros(len(features), longest, dtype=torch.int64),
    }
    for row, each in enumerate(features):
        length = len(each["input_ids"])
        batch["input_ids"][row, :length] = torch.tensor(each["input_ids"])
        batch["labels"][row, :length] = torch.tensor(each["labels"])
        batch["attention_mask"][row, :length] = 1
    return batch


@dataclass
class Bench:
    """A model, its optimizer and rows on one device."""

    shape: Shape
    device: torch.device
    bf16: bool = False  # whether passes are in autocast to bf16
    dtype: torch.dtype = torch.float32
    pool: int = 64
    eps: float = 1e-8
    rows: Numbers = field(init=False)
    targets: Numbers = field(init=False)

    def __post_init__(self) -> None:
        self.rows = Numbers(self.shape, self.pool)
        self.targets = Numbers(self.shape, 4, seed=1, domain=3)
        self.model = build(self.shape, self.device, self.dtype)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, eps=self.eps)
        self.folder = tempfile.TemporaryDirectory()

    def autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else contextlib.nullcontext()

    def batch(self, rows: list[int], of: Numbers | None = None) -> dict[str, Any]:
        """Return rows as a batch on the device."""
        return self.on_device(pad([(of or self.rows)[row] for row in rows]))

    def on_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {
            key: value.to(self.device, non_blocking=True) if torch.is_tensor(value) else value
            for key, value in batch.items()
        }

    def logits(self, batch: dict[str, Any]) -> torch.Tensor:
        with self.autocast():
            return self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits

    def own_loss(self, batch: dict[str, Any]) -> torch.Tensor:
        """The loss of a loop without us: mean over the micro-batch's supervised tokens."""
        logits = self.logits(batch)[:, :-1].float().flatten(0, 1)
        return F.cross_entropy(logits, batch["labels"][:, 1:].flatten(), ignore_index=IGNORE)

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def static_step(self, step: int, accumulation: int = 1) -> int:
        """Take a step without us, rows in file order; return its tokens."""
        tokens, size = 0, self.shape.rows
        for micro in range(accumulation):
            first = (step * accumulation + micro) * size
            batch = self.batch([(first + row) % len(self.rows) for row in range(size)])
            tokens += batch["input_ids"].numel()
            (self.own_loss(batch) / accumulation).backward()
        self.update()
        return tokens

    def dynamic_step(self, session: Session, step: int) -> int:
        """Take a step of a session; return its tokens."""
        served, tokens = session.step(step), 0
        for batch in served.batches:
            batch = self.on_device(batch)
            tokens += batch["input_ids"].numel()
            with session.forward():
                logits = self.logits(batch)
            session.loss(batch, logits).backward()
        session.end_step()
        self.update()
        return tokens

    def session(self, block: dict[str, Any], steps: int, accumulation: int = 1) -> Session:
        """Open a session that serves the pool; it is started."""
        domains = [f"d{domain}" for domain in self.rows.domains]
        rows = RowSpace.of(self.rows, domains=domains, targets={"goal": self.targets})
        loop = Loop(
            model=self.model,
            optimizer=lambda: self.optimizer,
            learning_rate=lambda: self.optimizer.param_groups[0]["lr"],
            collate=pad,
            shape=BatchShape(
                micro_batch_size=self.shape.rows,
                accumulation=accumulation,
                world=1,
                rank=0,
                drop_last=True,
                shuffle=True,
            ),
            total_steps=steps,
            seed=1,
            device=self.device,
            output_dir=Path(tempfile.mkdtemp(dir=self.folder.name)),
            autocast=self.autocast,
            score_rows=self.shape.rows,
        )
        session = Session.open(block, rows, loop)
        session.start()
        return session

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, action: Callable[[], Any]) -> float:
        """Return how long an action takes, its work on the device included."""
        self.synchronize()
        began = time.perf_counter()
        action()
        self.synchronize()
        return time.perf_counter() - began

    def close(self) -> None:
        """Free the model and what the sessions wrote."""
        self.folder.cleanup()
        del self.model, self.optimizer
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
