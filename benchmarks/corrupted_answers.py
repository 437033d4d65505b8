"""Do weighters help where a share of the answers is wrong? Clean held-out loss after equal steps, by method.

A pool of instruction data in which 30 % of the rows have the answer of another row of the same source. Each method
trains the small model on it for the same number of steps, on the same rows in the same order, and the loss on clean
held-out rows is compared with that of plain training, seed by seed. Targets (adapt, joint, meta) and the data of the
reference model (slm, rho, excess) are clean rows that are neither in the pool nor held out; the reference is the small
model fine-tuned on them for as many steps unless told otherwise.

Usage: python benchmarks/corrupted_answers.py [--data FILE.jsonl] [--steps N] [--seeds N] [--share X] [--methods ...]
                                              [--reference-steps N]

FILE.jsonl has ``instruction``, ``input``, ``output``, ``source``; rows whose source begins with "noise" are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "ERROR")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples/models/base-4m"
TARGET_ROWS = 32


def methods(reference: Path, steps: int) -> dict[str, Any]:
    """Weighter blocks by name."""
    model = {"reference": str(reference)}
    loss = {"name": "loss", "warmup_steps": steps // 20}
    return {
        "plain": "none",
        "sequence means": {**loss, "r": 1e9},  # equal weights: what the loss family does by its denominator alone
        "linupper": {**loss, "strategy": "linupper"},
        "quadratic": {**loss, "strategy": "quadratic"},
        "extremes": {**loss, "strategy": "extremes"},
        "upper": {**loss, "strategy": "upper"},
        "softmax_loss": {**loss, "strategy": "softmax_loss"},
        "adapt": {"name": "adapt", "targets": ["goal"], "rescale": "mean1", "tau": 0.1},
        "joint": {"name": "joint_update_aware", "targets": ["goal"]},
        "slm": {"name": "slm", **model, "keep": 0.7},
        "slm 0.9": {"name": "slm", **model, "keep": 0.9},
        "rho": {"name": "rho", **model, "keep": 0.5},
        "excess": {"name": "token", "function": "excess", **model, "normalizer": "weight_sum"},
        "group": {"name": "group", "strategy": "class_balanced"},
        "focal": {"name": "focal", "normalizer": "weight_sum"},
        "dft": {"name": "token", "normalizer": "weight_sum"},
        "clip_quantile": {"name": "token", "function": "clip_quantile", "quantile": 0.9, "normalizer": "weight_sum"},
        "meta": {"name": "meta", "targets": ["goal"]},
        "presence": {"name": "presence"},
    }


def corrupt(rows: list[dict[str, Any]], share: float, rng: random.Random) -> int:
    """Rotate the answers of a share of the rows within each source; returns how many differ now."""
    by_source: dict[str, list[int]] = {}
    for place in rng.sample(range(len(rows)), round(share * len(rows))):
        by_source.setdefault(rows[place]["source"], []).append(place)
    changed = 0
    for places in by_source.values():
        answers = [rows[place]["output"] for place in places]
        for place, answer in zip(places, answers[1:] + answers[:1], strict=True):
            changed += answer != rows[place]["output"]
            rows[place] = {**rows[place], "output": answer}
    return changed


def prepare(folder: Path, data: Path, share: float) -> str:
    """Write pool, held, clean and goal; returns a sentence about them."""
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if not row["source"].startswith("noise")]
    rng = random.Random(0)
    rng.shuffle(rows)
    size = len(rows) // 5
    held, clean, pool = rows[:size], rows[size : 2 * size], rows[2 * size :]
    changed = corrupt(pool, share, rng)
    info = {}
    columns = {"prompt": "instruction", "query": "input", "response": "output"}
    for name, part in (("pool", pool), ("held", held), ("clean", clean), ("goal", clean[:TARGET_ROWS])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
        info[name] = {"file_name": f"{name}.jsonl", "columns": columns}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return (
        f"pool of {len(pool)} rows, {changed / len(pool):.1%} of which have a wrong answer; {len(held)} clean rows "
        f"held out, {len(clean)} for the reference, {min(TARGET_ROWS, len(clean))} of these as targets"
    )


def train(folder: Path, output: Path, **changes: Any) -> tuple[float, float]:
    """Train quietly; returns the last held-out loss (NaN without evaluation) and CPU seconds."""
    from dataflex.run import train_here

    settings = {
        "model_name_or_path": str(MODEL),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "template": "default",
        "cutoff_len": 192,
        "dataset_dir": str(folder),
        "dataset": "pool",
        "output_dir": str(output),
        "overwrite_output_dir": True,
        "per_device_eval_batch_size": 8,
        "learning_rate": 1.0e-3,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.05,
        "logging_steps": 10,
        "report_to": "none",
        "save_only_model": True,
        "disable_tqdm": True,
        **changes,
    }
    config = folder / "run.json"
    config.write_text(json.dumps(settings))
    started = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train_here([str(config)])
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    return losses[-1] if losses else float("nan"), time.process_time() - started


def line(name: str, losses: list[float], plain: list[float], seconds: float) -> str:
    """One row of the table."""
    gains = [a - b for a, b in zip(losses, plain, strict=True)]
    spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
    better = sum(gain < 0 for gain in gains)
    told = f"{name:<15} {statistics.mean(losses):>8.4f} {spread:>8.4f} {statistics.mean(gains):>+9.4f}"
    return f"{told} {f'{better} of {len(gains)}' if name != 'plain' else '-':>10} {seconds:>8.0f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "examples/data/pool.jsonl", help="instruction data")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of every run")
    parser.add_argument(
        "--reference-steps", type=int, default=None, help="those of the reference; as many if not given"
    )
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--batch", type=int, default=8, help="rows per step")
    parser.add_argument("--share", type=float, default=0.3, help="share of wrong answers")
    parser.add_argument("--methods", nargs="*", choices=list(methods(MODEL, 20)), default=None, help="which methods")
    parser.add_argument("--quick", action="store_true", help="a few steps of three methods with one seed")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.seeds, options.methods = 12, 1, options.methods or ["plain", "quadratic", "slm"]
    import torch

    torch.set_num_threads(1)
    write = sys.stdout.write
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        told = prepare(folder, options.data, options.share)
        write(f"{platform.processor() or platform.machine()}, 1 thread, torch {torch.__version__}; base-4m; {told}; ")
        write(f"{options.seeds} x {options.steps} steps of {options.batch} rows\n")
        sizes = {"per_device_train_batch_size": options.batch, "max_steps": options.steps}
        reference = folder / "reference"
        steps = options.reference_steps or options.steps
        train(folder, reference, dataset="clean", save_strategy="no", **{**sizes, "max_steps": steps})
        evaluation = {"do_eval": True, "eval_strategy": "steps", "eval_steps": options.steps, "eval_dataset": "held"}
        blocks = methods(reference, options.steps)
        names = ["plain", *(name for name in options.methods or blocks if name != "plain")]
        write(f"{'method':<15} {'held-out':>8} {'sd':>8} {'to plain':>9} {'better':>10} {'CPU s':>8}\n")
        plain: list[float] = []
        for name in names:
            runs = [
                train(
                    folder,
                    folder / "out",
                    seed=seed,
                    save_strategy="no",
                    dynamic={"weighter": blocks[name], "domain_column": "source"},
                    **sizes,
                    **evaluation,
                )
                for seed in range(1, options.seeds + 1)
            ]
            losses = [loss for loss, _ in runs]
            plain = losses if name == "plain" else plain
            write(line(name, losses, plain, statistics.mean(seconds for _, seconds in runs)) + "\n")
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
