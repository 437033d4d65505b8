"""Whether the ledger tells a helpful domain from a harmless and a harmful one, and what it costs.

The planted pool has three domains of 100 rows: ``helpful`` are questions of GSM8K with their answers, ``harmful`` are
other questions of GSM8K with the first words of unrelated answers, ``harmless`` are instructions of other kinds. The
target are GSM8K rows that are not in the pool. The 4M model is trained on them with LoRA (or all parameters), AdamW, 8
rows a step; each domain alone is trained on as well, which is what the signs are compared with. Costs are process CPU
seconds of steps with and without a ledger, which alternate in one process.

Usage: python benchmarks/ledger.py [--seeds 1 2 3 4 5] [--steps N] [--cost-steps N] [--tuning lora full]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from dataflex.plan.plan import BatchShape
from dataflex.record.read import read_events
from dataflex.train.row_space import RowSpace
from dataflex.train.session import Loop, Session

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
MODEL = EXAMPLES / "models" / "base-4m"
DOMAINS = ("helpful", "harmless", "harmful")
ROWS, TOKENS, BATCH = 100, 224, 8


def texts(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (EXAMPLES / "data" / f"{name}.jsonl").read_text("utf-8").splitlines()]


def tokenized(pairs: list[tuple[str, str]], tokenizer) -> Dataset:
    made = []
    for question, answer in pairs:
        prompt = tokenizer(f"{question}\n")["input_ids"]
        tokens = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        ids, labels = prompt + tokens, [-100] * len(prompt) + tokens
        made.append({"input_ids": ids[:TOKENS], "labels": labels[:TOKENS]})
    return Dataset.from_list(made)


def asked(row: dict[str, str]) -> tuple[str, str]:
    """Return a row's question and answer."""
    return f"{row['instruction']} {row['input']}".strip(), row["output"]


def planted(seed: int) -> dict[str, list[tuple[str, str]]]:
    """Return questions and answers of each domain."""
    draw, pool = random.Random(seed), texts("pool")
    draw.shuffle(pool)
    own = [row for row in pool if row["source"] == "gsm8k"]
    others = [row for row in pool if row["source"] in ("alpaca_libre", "self_instruct_seed", "self_instruct_user")]
    right, unlike, unused = (
        [asked(row) for row in rows] for rows in (own[:ROWS], others[:ROWS], others[ROWS : 2 * ROWS])
    )
    wrong = [
        (asked(row)[0], " ".join(answer.split()[:40]))
        for row, (_, answer) in zip(own[ROWS : 2 * ROWS], unused, strict=True)
    ]
    return {"helpful": right, "harmless": unlike, "harmful": wrong}


def pad(features):
    ids, labels = ([torch.tensor(row[name]) for row in features] for name in ("input_ids", "labels"))
    lengths = torch.tensor([len(row) for row in ids])
    ids = pad_sequence(ids, batch_first=True)
    return {
        "input_ids": ids,
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
        "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long(),
    }


class Training:
    """One run, step by step."""

    def __init__(self, pool, tokenizer, tuning: str, block, folder: Path, *, steps: int, seed: int, rate=1e-3) -> None:
        torch.manual_seed(seed)
        self.model = AutoModelForCausalLM.from_pretrained(MODEL)
        if tuning == "lora":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.model = get_peft_model(self.model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
        self.model.train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
        target = [asked(row) for row in texts("gsm8k_valid")[:24]]
        rows = RowSpace.of(
            tokenized([pair for pairs in pool.values() for pair in pairs], tokenizer),
            domains=[name for name, pairs in pool.items() for _ in pairs],
            targets={"gsm8k": tokenized(target, tokenizer)},
        )
        shape = BatchShape(micro_batch_size=BATCH, accumulation=1, world=1, rank=0, drop_last=True, shuffle=True)
        loop = Loop(
            model=self.model,
            optimizer=lambda: self.optimizer,
            learning_rate=lambda: rate,
            collate=pad,
            shape=shape,
            total_steps=steps,
            seed=seed,
            device=torch.device("cpu"),
            output_dir=folder,
            tokenizer=tokenizer,
        )
        self.folder, self.steps = folder, steps
        self.session = Session.open(block, rows, loop)
        self.session.start()

    def step(self, index: int) -> tuple[float, float]:
        """Train one step and return the CPU seconds of what comes before it, looks included, and of the step."""
        began = time.process_time()
        step = self.session.step(index)
        between = time.process_time()
        for batch in step.batches:
            with self.session.forward():
                logits = self.model(
                    input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
                ).logits
            self.session.loss(batch, logits).backward()
        self.session.end_step()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return between - began, time.process_time() - between

    def finish(self) -> dict:
        """End the run and return what its ledger says of the target."""
        self.session.finish(self.steps, {})
        self.session.close()
        told = [event for event in read_events(self.folder) if event["event"] == "credited"]
        return {**told[-1], **told[-1]["targets"]["gsm8k"]} if told else {}


def told_apart(seed: int, tuning: str, tokenizer, steps: int, folder: Path) -> bool:
    """Train on the planted pool, and on each domain alone; print what both say; return whether the signs are right."""
    pool, ledger = planted(seed), {"targets": ["gsm8k"], "refresh_steps": 2}
    training = Training(pool, tokenizer, tuning, {"ledger": ledger}, folder / "all", steps=steps, seed=seed)
    for index in range(steps):
        training.step(index)
    of = training.finish()
    alone = {}
    for name in DOMAINS:
        only = {**ledger, "refresh_steps": steps}
        one = Training({name: pool[name]}, tokenizer, tuning, {"ledger": only}, folder / name, steps=10, seed=seed)
        for index in range(10):
            one.step(index)
        found = one.finish()
        alone[name] = found["now"] - found["before"]
    rates = {name: 1e6 * of["domains"][name] / of["tokens"][name] for name in DOMAINS}
    right = rates["helpful"] < 0 < rates["harmful"] and rates["helpful"] < rates["harmless"] < rates["harmful"]
    measured = of["now"] - of["before"]
    told = ", ".join(f"{name} {of['domains'][name]:+.4f} ({rates[name]:+.2f})" for name in DOMAINS)
    apart = ", ".join(f"{name} {change:+.4f}" for name, change in alone.items())
    print(
        f"{tuning} seed {seed}: {told}; measured {measured:+.4f}, unexplained {of['unexplained']:+.4f} "
        f"({abs(of['unexplained'] / measured):.1%}), rows' credits {of['rows']:+.3f}; alone, 10 steps: {apart}; "
        f"{'right' if right else 'WRONG'}",
        flush=True,
    )
    return right


def cost(tuning: str, tokenizer, steps: int, folder: Path) -> None:
    """Print what a step and a look cost, relative to a plain step."""
    pool, every = planted(0), 4
    blocks = {"plain": {"weighter": "none"}, "split": {"ledger": {"targets": ["gsm8k"], "refresh_steps": every}}}
    runs = {
        name: Training(pool, tokenizer, tuning, block, folder / name, steps=steps, seed=0)
        for name, block in blocks.items()
    }
    before = {name: [] for name in runs}
    times = {name: [] for name in runs}
    for index in range(steps):
        for name, run in runs.items():
            looked, took = run.step(index)
            if index >= 2:
                times[name].append(took)
                before[name].append(looked)
    plain, split = (statistics.median(times[name]) for name in ("plain", "split"))
    looks = statistics.median(sorted(before["split"])[-len(before["split"]) // every :])
    print(
        f"{tuning}: plain step {plain:.3f} s, with the split {split:.3f} s, ratio {split / plain:.3f} (of the fastest "
        f"{min(times['split']) / min(times['plain']):.3f}); a look at 24 rows {looks:.3f} s, {looks / plain:.2f} steps",
        flush=True,
    )
    for run in runs.values():
        run.finish()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3, 4, 5], help="draws of the pool")
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps on the planted pool")
    parser.add_argument("--cost-steps", type=int, default=18, help="steps of each kind whose cost is compared")
    parser.add_argument("--tuning", nargs="*", default=["lora"], choices=["lora", "full"], help="what is trained")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {args.threads} threads")
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    with tempfile.TemporaryDirectory() as folder:
        for tuning in args.tuning:
            right = sum(
                told_apart(seed, tuning, tokenizer, args.steps, Path(folder) / f"{tuning}-{seed}")
                for seed in args.seeds
            )
            if args.seeds:
                print(f"{tuning}: told apart in {right} of {len(args.seeds)} seeds")
            if args.cost_steps:
                cost(tuning, tokenizer, args.cost_steps, Path(folder) / f"{tuning}-cost")


if __name__ == "__main__":
    main()
