"""A small relevant part that is chosen again and again: does a selector keep finding it?

Of the demo's pool 150 short rows, of which 30 (SVAMP, word problems) are of the target's kind; 24 others are the
target, 70 the held-out rows. A fifth of the pool is kept by each decision and served 4 times over before the next
one, so that after a few decisions relevant rows are known by heart. Told are, decision by decision, the precision
(share of relevant rows among those served) and the held-out loss at the end of the interval.

Methods are parameters of ``less`` as in a YAML flow mapping; what follows a bar goes into the dynamic block.

Usage: python benchmarks/repeated_decisions.py [--seeds 1 2] [--decisions 5] [--methods ...] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
METHODS = ["", "normalise: false", "include_momentum: false", " | exclude_seen: true"]
KIND, RELEVANT, POOL, TARGET, HELD_OUT = "svamp", 30, 150, 24, 70
STEPS, BATCH, SHORT = 15, 8, 260


def prepare(folder: Path, seed: int) -> None:
    """Write pool, target, held-out rows and their data set information."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = (ROOT / "examples/data/pool.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if len(row["instruction"] + row["input"] + row["output"]) < SHORT]
    random.Random(seed).shuffle(rows)
    kind = [row for row in rows if row["source"] == KIND]
    others = [row for row in rows if row["source"] != KIND][: POOL - RELEVANT]
    parts = {
        "pool": kind[:RELEVANT] + others,
        "target": kind[RELEVANT : RELEVANT + TARGET],
        "held_out": kind[RELEVANT + TARGET : RELEVANT + TARGET + HELD_OUT],
    }
    columns = {"prompt": "instruction", "query": "input", "response": "output"}
    info = {name: {"file_name": f"{name}.jsonl", "columns": columns} for name in parts}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    for name, part in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")


def run(method: str, seed: int, decisions: int, folder: Path) -> Path:
    """Train once, unless it was done before, and return the run's folder."""
    out = folder / "".join(c if c.isalnum() else "-" for c in f"run-{seed}-{decisions}-{method}")
    if (out / "all_results.json").is_file():
        return out
    steps = STEPS + decisions * STEPS
    params, _, block = method.partition("|")
    settings = {
        "model_name_or_path": str(ROOT / "examples/models/base-4m"),
        "stage": "sft",
        "do_train": True,
        "template": "default",
        "cutoff_len": 224,
        "dataset_dir": str(folder / f"data-{seed}"),
        "dataset": "pool",
        "eval_dataset": "held_out",
        "eval_strategy": "steps",
        "eval_steps": STEPS,
        "output_dir": str(out),
        "overwrite_output_dir": True,
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": BATCH,
        "learning_rate": 3.0e-3,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 5,
        "max_steps": steps,
        "logging_steps": 5,
        "save_strategy": "no",
        "report_to": "none",
        "seed": seed,
        "dynamic": {
            "warmup_steps": STEPS,
            "interval_steps": STEPS,
            "domain_column": "source",
            "keep_ratio": RELEVANT / POOL,
        },
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "run.json").write_text(json.dumps(settings, indent=1))
    selector = ", ".join(filter(None, ["name: less", "targets: [target]", params.strip()]))
    extra = [f"dynamic.{key.strip()}={value.strip()}" for key, _, value in [block.partition(":")] if key.strip()]
    with open(out / "log.txt", "w") as log:
        subprocess.run(
            [sys.executable, "-m", "dataflex", "train", "run.json", f"dynamic.selector={{{selector}}}", *extra],
            check=True,
            cwd=out,
            env={"HF_HUB_OFFLINE": "1", "LLAMAFACTORY_VERBOSITY": "WARN", **os.environ},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    return out


def main() -> int:
    from dataflex.record.read import read_events

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--decisions", type=int, default=5)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--out", type=Path, default=None, help="keep the runs here; finished ones are not repeated")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.out or Path(temporary)).resolve()
        for seed in options.seeds:
            prepare(folder / f"data-{seed}", seed)
        for method in options.methods:
            for seed in options.seeds:
                out = run(method, seed, options.decisions, folder)
                plans = [event for event in read_events(out) if event["event"] == "planned"]
                found = [event["domain_counts"].get(KIND, 0) / event["rows"] for event in plans[1:]]
                history = json.loads((out / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
                losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry and entry["step"] > STEPS]
                told = " ".join(f"{share:.2f}" for share in found), " ".join(f"{loss:.3f}" for loss in losses)
                print(f"{method.strip() or 'default':<28} seed {seed}: precision {told[0]}  loss {told[1]}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
