"""What looking at rows in their training step costs: a step with hooks against a plain one, as a ratio within one run.

Plain steps and steps with hooks alternate on the small model, 8 rows of 224 tokens; times are process CPU seconds, and
ratios are those of medians and of the fastest steps. Hooks leave sketches (as under ``dynamic.signals.budget``) or
products with one direction (as for ``InRun(what="scores")``; with LoRA whole, with all parameters of rank 8). Memory is
what the hooks hold of the inputs after a forward pass, relative to what autograd holds.

Usage: python benchmarks/in_run.py [--steps N] [--threads N]
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from dataflex.signals.gradients.consumers import TargetVectors
from dataflex.signals.gradients.engine import GradientEngine
from dataflex.signals.gradients.in_run import Directions, StepCapture, capturable, directions
from dataflex.train.loss import token_losses

MODEL = Path(__file__).resolve().parent.parent / "examples" / "models" / "base-4m"
ROWS, TOKENS = 8, 224


def batch_of(vocabulary: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, vocabulary, (ROWS, TOKENS))
    labels = ids.clone()
    labels[:, : TOKENS // 3] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def held_bytes(run: Callable[[], object]) -> int:
    """Return the bytes that autograd holds after ``run``."""
    seen: dict[int, int] = {}

    def pack(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(seen.values())


def measured(kind: str, how: str, steps: int) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    if kind == "lora":
        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    engine = GradientEngine(model)
    batch = batch_of(model.config.vocab_size)
    layers, _ = capturable(model, engine.units)
    capture = StepCapture(layers, sketch=16 if how == "sketches" else 0)
    draw = TargetVectors(tensors={name: torch.randn(1, *shape) for name, shape in engine.shapes.items()})
    aims = directions(draw, None, layers, rank=None if kind == "lora" else 8, seed=0)
    capture.aim(Directions.none(layers) if how == "sketches" else aims)

    def forward(hooked: bool) -> torch.Tensor:
        if hooked:
            capture.begin((ROWS, TOKENS), torch.device("cpu"))
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        losses = token_losses(logits, batch["labels"])
        if hooked:
            capture.watch(losses.loss_BT, losses.mask_BT)
        return losses.loss_BT.sum() / losses.mask_BT.sum()

    times: dict[bool, list[float]] = {False: [], True: []}
    for number in range(2 * steps + 4):
        hooked = number % 2 == 1
        started = time.process_time()
        forward(hooked).backward()
        if hooked:
            capture.take()
            capture.end()
        optimizer.step()
        optimizer.zero_grad()
        if number >= 4:
            times[hooked].append(time.process_time() - started)
    plain, beside = (statistics.median(times[hooked]) for hooked in (False, True))
    held = held_bytes(lambda: forward(False))
    # Inputs as they are, or where rows' gradients are formed of them, are those that autograd holds.
    matrices = capture._matrices.values()
    sides = [each.inputs for each in matrices if each.vectors is None or (each.widened and how == "sketches")]
    kept = ROWS * TOKENS * 4 * sum(side.columns for side in sides if side.projection is not None)
    print(
        f"{kind:<5} {how:<9} {len(layers)} layers: plain {plain:.3f} s, with hooks {beside:.3f} s, ratio "
        f"{beside / plain:.3f} (of the fastest steps {min(times[True]) / min(times[False]):.3f}); memory "
        f"{1 + kept / held:.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="steps of each kind")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {args.threads} threads")
    for kind in ("lora", "full"):
        for how in ("sketches", "direction"):
            measured(kind, how, args.steps)


if __name__ == "__main__":
    main()
