"""What targeted selectors pick: the share of the target's own source, and of rows with wrong answers.

A pool of known sources, of which one is the target's. The model is warmed up on it for some steps (LoRA); then
each method scores the pool by ``dataflex score`` from that checkpoint and a tenth of the rows is kept. Told are
precision (share of the kept rows that are of the target's source), that against the source's share of the pool,
the share of kept rows with the target's questions and wrong answers, and CPU seconds of the command less those
of a method that asks the model nothing.

The pool and the target are JSON lines with ``instruction``, ``input``, ``output``; the pool has ``source``.

Usage: python benchmarks/selection_quality.py --pool FILE --target FILE [--rows N] [--methods A,B] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples/models/base-4m"
METHODS = {
    "random": [],
    "less": [],
    "icons": [],
    "cluster_less": ["cluster_less.clusters=100"],
    "tacs": [],
    "rds_plus": [],
    "embed": [f"embed.encoder={MODEL}"],
    "near": [f"near.encoder={MODEL}"],
    "tsds": [f"tsds.encoder={MODEL}"],
    "bm25": [],
    "dsir": [],
}
SOURCE, NOISE = "gsm8k", "noise_gsm8k"


def dataflex(*arguments: str, folder: Path) -> float:
    """Run a command, keeping what it prints, and return its CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "LLAMAFACTORY_VERBOSITY": "WARN"}
    with open(folder / "log.txt", "a") as log:
        subprocess.run(
            [sys.executable, "-m", "dataflex", *arguments],
            check=True,
            env=environment,
            cwd=folder,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def prepare(folder: Path, options: argparse.Namespace) -> list[dict]:
    """Write pool, target and configuration; return the pool's rows."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in options.pool.read_text(encoding="utf-8").splitlines()]
    random.Random(0).shuffle(rows)
    rows = rows[: options.rows]
    (folder / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "target.jsonl").write_text(options.target.read_text(encoding="utf-8"), encoding="utf-8")
    columns = {"prompt": "instruction", "query": "input", "response": "output"}
    info = {name: {"file_name": f"{name}.jsonl", "columns": columns} for name in ("pool", "target")}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    settings = {
        "model_name_or_path": str(MODEL),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": 8,
        "lora_target": "all",
        "template": "default",
        "cutoff_len": 256,
        "dataset_dir": str(folder),
        "dataset": "pool",
        "output_dir": str(folder / "warm"),
        "overwrite_output_dir": True,
        "per_device_train_batch_size": 8,
        "learning_rate": 1.0e-3,
        "lr_scheduler_type": "constant",
        "max_steps": options.warmup,
        "save_steps": options.warmup,
        "logging_steps": 10,
        "report_to": "none",
        "seed": 1,
        "dynamic": {"selector": "all"},
    }
    (folder / "run.json").write_text(json.dumps(settings, indent=1))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", type=Path, required=True)
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=10**9, help="rows of the pool, drawn")
    parser.add_argument("--warmup", type=int, default=40, help="optimizer steps before scoring")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument(
        "--out", type=Path, default=None, help="keep everything here; finished methods are not repeated"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.out or Path(temporary)).resolve()
        rows = prepare(folder, options)
        checkpoint = folder / "warm" / f"checkpoint-{options.warmup}"
        if not checkpoint.is_dir():
            dataflex("train", "run.json", folder=folder)
        budget = len(rows) // 10
        sources = [row["source"] for row in rows]
        share = {name: sources.count(name) / len(rows) for name in (SOURCE, NOISE)}
        write = sys.stdout.write
        write(f"{platform.processor() or platform.machine()}; {len(rows):,} rows, {budget} kept; of the pool ")
        write(f"{share[SOURCE]:.1%} are {SOURCE}, {share[NOISE]:.1%} {NOISE}, ")
        noisy = sum(source.startswith("noise_") for source in sources) / len(rows)
        write(f"{noisy:.1%} have wrong answers at all\n")
        write(f"{'method':<14}{SOURCE:>8}{'times':>8}{NOISE:>14}{'wrong':>8}{'CPU s':>8}\n")
        idle = None
        for method in options.methods.split(","):
            told = folder / f"{method}.json"
            if not told.is_file():
                table = folder / f"{method}.parquet"
                seconds = dataflex(
                    "score",
                    "run.json",
                    "--method",
                    method,
                    "--targets",
                    "target",
                    "--budget",
                    str(budget),
                    "--out",
                    str(table),
                    f"resume_from_checkpoint={checkpoint}",
                    *METHODS[method],
                    folder=folder,
                )
                told.write_text(json.dumps({"seconds": seconds}))
            idle, found = report(folder, method, sources, share, idle, json.loads(told.read_text())["seconds"])
            write(found)
            sys.stdout.flush()
    return 0


def report(
    folder: Path, method: str, sources: list[str], share: dict[str, float], idle: float | None, seconds: float
) -> tuple[float, str]:
    """Return the CPU seconds of the first method and one line about this one."""
    import pyarrow.parquet as pq

    table = pq.read_table(folder / f"{method}.parquet")
    ranks, positions = table.column(f"{method}.rank").to_pylist(), table.column("position").to_pylist()
    kept = [sources[position] for rank, position in zip(ranks, positions, strict=True) if rank is not None]
    idle = seconds if idle is None else idle
    precision, noise = (kept.count(name) / len(kept) for name in (SOURCE, NOISE))
    wrong = sum(source.startswith("noise_") for source in kept) / len(kept)
    cells = f"{precision:>8.1%}{precision / share[SOURCE]:>7.2f}x{noise:>14.1%}{wrong:>8.1%}{seconds - idle:>8.0f}"
    return idle, f"{method:<14}{cells}\n"


if __name__ == "__main__":
    sys.exit(main())
