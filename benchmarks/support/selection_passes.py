"""The model, rows and passes that selection_cost.py measures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
RANK, TARGETS, MAX_TOKENS, TOKEN_BUDGET, DENSE = 8, 8, 256, 2048, 4096


class Bench:
    """The model, its batches, and one function per pass."""

    def __init__(self, folder: str, num_rows: int, warmup_steps: int = 4) -> None:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from dataflex.signals.embeddings import embed_batch
        from dataflex.signals.gradients.engine import GradientEngine
        from dataflex.signals.kinds import Embedding
        from dataflex.signals.logits import TokenScorer
        from dataflex.signals.losses import row_losses
        from dataflex.signals.sweep import bucketed

        torch.manual_seed(0)
        self.torch = torch
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        pool = [tokens(tokenizer, row) for row in read("pool")]
        step = max(len(pool) // num_rows, 1)
        self.rows = pool[::step][:num_rows]
        lengths = [len(ids) for ids, _ in self.rows]
        import numpy as np

        self.batches = [
            collate(torch, [self.rows[i] for i in batch]) for batch in bucketed(np.array(lengths), TOKEN_BUDGET)
        ]
        self.targets = [tokens(tokenizer, row) for row in read("gsm8k_valid")][: 4 * TARGETS]
        self.loss = lambda batch: row_losses(self.model, batch)
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, lr=1e-3)
        for step in range(warmup_steps):
            self.training_step(collate(torch, pool[8 * step : 8 * step + 8]))
        self.model.eval()
        bf16 = lambda: torch.autocast("cpu", torch.bfloat16)  # noqa: E731
        self.bf16 = bf16
        self.scorer, spec = TokenScorer(self.model), Embedding()
        self.embed = lambda batch: embed_batch(self.model, batch, spec)
        self.engine = GradientEngine(self.model)
        self.engine_bf16 = GradientEngine(self.model, autocast=bf16)

    def prepare(self) -> None:
        """Make the 8 target vectors and take the optimizer's moments."""
        from dataflex.signals.gradients.consumers import Dots, Sketch
        from dataflex.signals.gradients.precondition import PRESETS, moments_of, preconditioner
        from dataflex.signals.gradients.scorers import TargetBuilder

        torch = self.torch
        moments = moments_of(self.optimizer, self.engine.parameters)
        self.direction = preconditioner(PRESETS["true_adam"], moments)
        builder = TargetBuilder(self.engine, [str(target) for target in range(TARGETS)])
        for start in range(0, len(self.targets), 8):
            part = self.targets[start : start + 8]
            builder.add(collate(torch, part), (torch.arange(len(part)) + start) % TARGETS)
        self.vectors = builder.finish()
        self.dots, self.sketch = Dots(self.vectors), Sketch(size=8192)

    # -- passes: batch -> scores or None ------------------------------------------------------------

    def forward(self, batch: Any) -> None:
        with self.torch.no_grad():
            self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)

    def forward_with_loss(self, batch: Any) -> None:
        with self.torch.no_grad():
            self.model(**batch, use_cache=False)

    def plain(self, batch: Any) -> None:
        self.loss(batch).nansum().backward()
        for parameter in self.model.parameters():
            parameter.grad = None

    def plain_bf16(self, batch: Any) -> None:
        with self.bf16():
            loss = self.loss(batch).nansum()
        loss.backward()
        for parameter in self.model.parameters():
            parameter.grad = None

    def losses(self, batch: Any) -> Any:
        with self.torch.no_grad():
            return self.scorer(batch).means()

    def embeddings(self, batch: Any) -> Any:
        with self.torch.no_grad():
            return self.embed(batch)

    def _less(self, engine: Any, batch: Any) -> Any:
        return engine.run(batch, [self.dots], precondition=self.direction)["dots"]

    def less(self, batch: Any) -> Any:
        return self._less(self.engine, batch)

    def less_bf16(self, batch: Any) -> Any:
        return self._less(self.engine_bf16, batch)

    def sketched(self, batch: Any) -> Any:
        return self.engine.run(batch, [self.sketch], precondition=self.direction)["sketch"]

    def norms(self, batch: Any) -> Any:
        from dataflex.signals.gradients.consumers import Norms

        return self.engine.run(batch, [Norms()])["norms"]

    def loop(self, batch: Any) -> Any:
        """One row at a time, without padding: gradients by autograd, Adam, dot products."""
        from dataflex.signals.gradients.consumers import Segment
        from dataflex.testing import oracle_row_gradients

        scores = []
        for i, length in enumerate(batch["attention_mask"].sum(dim=1).tolist()):
            row = {key: value[i : i + 1, :length] for key, value in batch.items()}
            gradients = oracle_row_gradients(self.loss, row, 0, self.engine.parameters)
            total, square = 0.0, 0.0
            for name, gradient in gradients.items():
                way = self.direction((Segment(name, 0, gradient.numel()),), gradient.view(1, -1))
                total = total + way @ self.vectors.flat(name).t()
                square = square + way.square().sum()
            scores.append(total / square.sqrt())
        return self.torch.cat(scores)

    def dense(self, batch: Any) -> Any:
        """Project the preconditioned gradients by a +-1 matrix to 4096 numbers, made anew in blocks."""
        from dataflex.signals.gradients.consumers import Consumer

        torch = self.torch

        class Dense(Consumer):
            name = "dense"

            def begin(self, finite: Any) -> None:
                self.sums = torch.zeros(len(finite), DENSE)
                self.generator = torch.Generator().manual_seed(0)

            def dense_cost(self, shape: Any) -> float:
                return 0.0

            def add(self, block: Any) -> None:
                for part in block.values.split(4096, dim=1):
                    signs = torch.randint(0, 2, (part.shape[1], DENSE), generator=self.generator, dtype=torch.int8)
                    self.sums += part @ signs.float().mul_(2).sub_(1)

            def finish(self) -> Any:
                return {"": self.sums}

        return self.engine.run(batch, [Dense()], precondition=self.direction)["dense"]

    def training_step(self, batch: Any) -> None:
        self.loss(batch).nansum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def read(name: str) -> list[dict]:
    lines = (ROOT / "examples/data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def tokens(tokenizer: Any, row: dict) -> tuple[list[int], int]:
    """Return a row's token ids and the length of its prompt."""
    prompt = tokenizer(f"{row['instruction']}\n{row.get('input') or ''}\n")["input_ids"][: MAX_TOKENS // 2]
    answer = tokenizer(row["output"], add_special_tokens=False)["input_ids"]
    return (prompt + answer + [tokenizer.eos_token_id])[:MAX_TOKENS], len(prompt)


def collate(torch: Any, rows: list[tuple[list[int], int]]) -> dict[str, Any]:
    longest = max(len(ids) for ids, _ in rows)
    batch = {
        "input_ids": torch.full((len(rows), longest), 2),
        "attention_mask": torch.zeros(len(rows), longest, dtype=torch.int64),
        "labels": torch.full((len(rows), longest), -100),
    }
    for i, (ids, prompt) in enumerate(rows):
        batch["input_ids"][i, : len(ids)] = torch.tensor(ids)
        batch["attention_mask"][i, : len(ids)] = 1
        batch["labels"][i, prompt : len(ids)] = torch.tensor(ids[prompt:])
    return batch


def memory(bench: Bench, name: str) -> float:
    """Return the peak of what torch has allocated at once during one pass over the largest batch, in MB."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        getattr(bench, name)(bench.batches[0])
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak / 2**20
