"""What a selection pass costs, as ratios to plain passes over the same batches within one run.

The 4M base model with LoRA rank 8 on all linear layers, real rows in length-bucketed batches. The
LESS pass makes exact Adam-preconditioned scores against 8 target vectors; its yardstick is a plain
batched forward + backward of the same batches. Passes take turns on every batch; a ratio is of the
time for all rows, each batch with its median over the repeats, in CPU seconds of this process (wall
clock beside it), so that what else runs on the machine counts as little as possible. Memory is the
peak of what torch allocates during a pass, from the profiler's record of every allocation, on top of
what was there before; resident memory says more about the allocator than about the pass.

    python benchmarks/selection_cost.py [--quick] [--check] [--model DIR]

--check ends with 1 if a goal is missed. Goals: LESS fp32 <= 1.10, LESS bf16 <= 0.85 (only where this
processor multiplies bf16 matrices faster than fp32 ones), losses <= 1.05 of a plain forward, extra
memory of a pass <= that of a training step.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

ROOT = Path(__file__).resolve().parent.parent
RANK, TARGETS, MAX_TOKENS, TOKEN_BUDGET, DENSE = 8, 8, 256, 2048, 4096
GOALS = {"less fp32": 1.10, "less bf16": 0.85, "losses": 1.05}

Pair = tuple[float, float]


class Bench:
    """The model, its batches, and one function per pass."""

    def __init__(self, folder: str, num_rows: int, warmup_steps: int = 4) -> None:
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from dataflex.signals.gradients import GradientEngine, choose_parameters
        from dataflex.signals.losses import row_losses
        from dataflex.signals.passes import bucketed

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
        self.engine = GradientEngine(self.model, loss=self.loss)
        self.engine_bf16 = GradientEngine(self.model, loss=self.loss, autocast=bf16)
        self.half = choose_parameters(self.model, last_blocks=max(base.config.num_hidden_layers // 2, 1))
        self.engine_half = GradientEngine(self.model, loss=self.loss, parameters=self.half)

    def prepare(self) -> None:
        """Make the 8 target vectors and take the optimizer's moments."""
        from dataflex.signals.gradients import PRESETS, Dots, Sketch, TargetBuilder, moments_of, preconditioner

        torch = self.torch
        moments = moments_of(self.optimizer, self.engine.parameters)
        self.direction = preconditioner(PRESETS["true_adam"], moments)
        builder = TargetBuilder(self.engine, num_tasks=TARGETS)
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
            return self.loss(batch)

    def _less(self, engine: Any, batch: Any) -> Any:
        return engine.run(batch, [self.dots], precondition=self.direction)["dots"]

    def less(self, batch: Any) -> Any:
        return self._less(self.engine, batch)

    def less_bf16(self, batch: Any) -> Any:
        return self._less(self.engine_bf16, batch)

    def less_half(self, batch: Any) -> Any:
        return self._less(self.engine_half, batch)

    def sketched(self, batch: Any) -> Any:
        return self.engine.run(batch, [self.sketch], precondition=self.direction)["sketch"]

    def norms(self, batch: Any) -> Any:
        from dataflex.signals.gradients import Norms

        return self.engine.run(batch, [Norms()])["norms"]

    def loop(self, batch: Any) -> Any:
        """One row at a time, without padding: gradients by autograd, Adam, dot products."""
        from dataflex.signals.gradients import Segment, oracle_row_gradients

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
        from dataflex.signals.gradients import Consumer

        torch = self.torch

        class Dense(Consumer):
            name, raw = "dense", False

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


def alternate(
    bench: Bench, passes: list[str], batches: list[Any], repeats: int, scores: dict[str, dict[int, Any]] | None = None
) -> dict[str, list[list[Pair]]]:
    """Return (CPU, wall) seconds by pass and batch, the passes taking turns on every batch; fill in ``scores``."""
    seconds: dict[str, list[list[Pair]]] = {name: [[] for _ in batches] for name in passes}
    with bench.engine.observing(), bench.engine_bf16.observing(), bench.engine_half.observing():
        for repeat in range(repeats):
            for index, batch in enumerate(batches):
                for name in passes if repeat % 2 == 0 else passes[::-1]:
                    cpu, wall = time.process_time(), time.perf_counter()
                    found = getattr(bench, name)(batch)
                    seconds[name][index].append((time.process_time() - cpu, time.perf_counter() - wall))
                    if scores is not None:
                        scores.setdefault(name, {})[index] = found
    return seconds


def ratio(seconds: dict[str, list[list[Pair]]], name: str, to: str) -> Pair:
    """Ratio of the time for all batches, each batch with its median over the repeats: (CPU, wall)."""
    found = []
    for clock in (0, 1):
        totals = [
            sum(statistics.median(one[clock] for one in batch) for batch in seconds[which]) for which in (name, to)
        ]
        found.append(totals[0] / totals[1])
    return found[0], found[1]


def overlap(exact: Any, other: Any) -> float:
    """Share of the exact top tenth that the other scores have in their top tenth."""
    count = max(len(exact) // 10, 1)
    tops = [set(scores.argsort(descending=True, stable=True)[:count].tolist()) for scores in (exact, other)]
    return len(tops[0] & tops[1]) / count


def matrix_speeds(torch: Any) -> Pair:
    """Return fp32 and bf16 billions of multiply-adds a second of a matrix product of the model's size."""
    rates = []
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(2048, 256).to(dtype), torch.randn(512, 256).to(dtype)
        best = min(_timed(lambda a=a, b=b: a @ b.t()) for _ in range(20))
        rates.append(2048 * 256 * 512 / best / 1e9)
    return rates[0], rates[1]


def _timed(run: Any) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


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


def header(bench: Bench, args: argparse.Namespace, rates: Pair) -> str:
    import peft
    import transformers

    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    processor = names[0].partition(":")[2].strip() if names else platform.processor()
    numel = sum(shape.numel() for shape in bench.engine.shapes.values())
    return "\n".join(
        [
            f"processor {processor}, {os.cpu_count()} cores, {bench.torch.get_num_threads()} threads; "
            f"matrix products fp32 {rates[0]:.0f}, bf16 {rates[1]:.0f} G multiply-adds/s",
            f"python {platform.python_version()}, torch {bench.torch.__version__}, transformers "
            f"{transformers.__version__}, peft {peft.__version__}",
            f"model {args.model}, LoRA rank {RANK} on all linear layers ({numel:,} parameters), {TARGETS} targets, "
            f"{len(bench.rows)} rows of up to {MAX_TOKENS} tokens in {len(bench.batches)} batches of up to "
            f"{TOKEN_BUDGET} tokens, {args.repeats} repeats",
        ]
    )


LABELS = {
    "less fp32": ("less", "plain"),
    "less bf16": ("less_bf16", "plain"),
    "less bf16, to plain bf16": ("less_bf16", "plain_bf16"),
    "less fp32, last half of the blocks": ("less_half", "plain"),
    "gradient norms": ("norms", "plain"),
    "sparse sketch to 8192": ("sketched", "plain"),
    "losses": ("losses", "forward_with_loss"),
    "losses, to a forward without loss": ("losses", "forward"),
}


def times(bench: Bench, args: argparse.Namespace, rates: Pair) -> tuple[list[str], dict[str, dict[int, Any]]]:
    """Print the ratios; return the goals that were missed, and the scores."""
    missed: list[str] = []
    scores: dict[str, dict[int, Any]] = {}
    everything = ["forward", "forward_with_loss", "losses", "plain", "less", "less_bf16", "plain_bf16", "less_half"]
    alternate(bench, [*everything, "norms", "sketched"], bench.batches[-1:], 1)  # warm up
    passes = ["plain", "less", "less_bf16", "plain_bf16", "less_half", "norms", "sketched"]
    seconds = alternate(bench, passes, bench.batches, args.repeats, scores)
    seconds |= alternate(bench, ["forward", "forward_with_loss", "losses"], bench.batches, 2 * args.repeats)
    for label, (name, to) in LABELS.items():
        cpu, wall = ratio(seconds, name, to)
        goal = GOALS.get(label)
        text = f"  {label:<38} {cpu:6.3f} x {to:<18} (wall {wall:.3f})"
        if label == "less bf16" and rates[1] <= rates[0]:
            text += f"  goal {goal} does not apply: bf16 products are {rates[1] / rates[0]:.2f} x as fast as fp32 here"
        elif goal is not None:
            text += f"  goal {goal:.2f} {'met' if cpu <= goal else 'MISSED'}"
            missed += [label] if cpu > goal else []
        print(text, flush=True)
    slow = alternate(bench, ["less", "loop", "dense"], bench.batches[len(bench.batches) // 2 :][:1], 1)
    for label, name in (("one row at a time", "loop"), (f"dense projection to {DENSE}", "dense")):
        print(f"  {label:<38} {ratio(slow, name, 'less')[0]:6.2f} x less (exact, fp32)", flush=True)
    return missed, scores


def agreement(torch: Any, scores: dict[str, dict[int, Any]]) -> None:
    exact, mixed, half = (
        torch.cat([part for _, part in sorted(scores[name].items())]) for name in ("less", "less_bf16", "less_half")
    )
    for label, other in (("bf16", mixed), ("last half of the blocks", half)):
        kept = torch.isfinite(exact[:, 0])
        a, b = exact[kept].max(dim=1).values, other[kept].max(dim=1).values
        correlation = float(torch.corrcoef(torch.stack([a, b]))[0, 1])
        print(f"  {label:<38} scores correlate {correlation:.4f}, top tenth overlaps {overlap(a, b):.2f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rows and repeats, under a minute")
    parser.add_argument("--check", action="store_true", help="end with 1 if a goal is missed")
    parser.add_argument("--model", default=str(ROOT / "examples/models/base-4m"), help="folder of a causal model")
    parser.add_argument("--rows", type=int, default=0, help="rows of the pool")
    parser.add_argument("--repeats", type=int, default=0, help="passes over the rows")
    args = parser.parse_args()
    args.repeats = args.repeats or (2 if args.quick else 5)
    bench = Bench(args.model, args.rows or (16 if args.quick else 160))
    bench.prepare()
    rates = matrix_speeds(bench.torch)
    print(header(bench, args, rates))
    print("cost, as ratios of CPU seconds:", flush=True)
    missed, scores = times(bench, args, rates)
    print("cheaper scores against exact ones:", flush=True)
    agreement(bench.torch, scores)
    print("extra peak memory of the largest batch:", flush=True)
    growth = {name: memory(bench, name) for name in ("training_step", "less", "losses")}
    for name, megabytes in growth.items():
        print(f"  {name:<38} {megabytes:6.0f} MB, {megabytes / growth['training_step']:.2f} x a training step")
        missed += [f"memory of {name}"] if megabytes > 1.01 * growth["training_step"] else []
    print("goals missed: " + (", ".join(missed) or "none"))
    return 1 if args.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
