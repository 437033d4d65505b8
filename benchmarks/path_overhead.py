"""What the dynamic path costs per optimizer step over stock LLaMA-Factory, as a ratio within one run.

Stock and dynamic runs alternate on the small model, the same rows in the same order; step times are
process CPU seconds between optimizer steps, logs every tenth step included, medians over all steps. Cases: the stock
run recorded with its losses by domain (``record``; aim: at most 1.01), every row in file order (``all``), a static
mixture, unit weights from a column, and a loss-based weighter.

Usage: python benchmarks/path_overhead.py [--quick] [--steps N] [--rounds N] [--cases NAME ...]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "ERROR")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

ROOT = Path(__file__).resolve().parent.parent
CASES = {
    "record": {"record": True, "domain_column": "source"},
    "all": {"selector": "all"},
    "mixture": {"domain_column": "source", "mixer": "size"},
    "column": {"weighter": "column"},
    "loss weights": {"weighter": {"name": "loss", "warmup_steps": 0}},
}


def watched_run(settings: dict, dynamic: dict | None, folder: Path, watch: Callable[[int], None]) -> None:
    """Train quietly; ``watch`` is called after every optimizer step with the number of those taken."""
    from transformers import Trainer

    from dataflex.run import train_here

    original = Trainer._maybe_log_save_evaluate

    def finished(self, *args, **kwargs):
        watch(self.state.global_step)
        return original(self, *args, **kwargs)

    Trainer._maybe_log_save_evaluate = finished
    mapping = {**settings, "output_dir": str(folder / "out")}
    if dynamic is not None:
        mapping["dynamic"] = dynamic
    config = folder / "run.json"
    config.write_text(json.dumps(mapping))
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            train_here([str(config)])
    finally:
        Trainer._maybe_log_save_evaluate = original


def step_seconds(settings: dict, dynamic: dict | None, folder: Path) -> list[float]:
    """Train and return CPU seconds of each optimizer step after the third."""
    stamps: list[float] = []
    watched_run(settings, dynamic, folder, lambda step: stamps.append(time.process_time()))
    return [later - earlier for earlier, later in itertools.pairwise(stamps[3:])]


def run_settings(folder: Path, steps: int, **changes: object) -> dict:
    """Return a quick run of the small model on the data sets registered in ``folder``."""
    return {
        "model_name_or_path": str(ROOT / "examples/models/base-4m"),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "template": "default",
        "cutoff_len": 128,
        "dataset_dir": str(folder),
        "max_steps": steps,
        "logging_steps": 1000,
        "save_strategy": "no",
        "report_to": "none",
        "overwrite_output_dir": True,
        **changes,
    }


def told(times: dict[str, list[float]], base: str) -> str:
    """Return a table of median seconds and their ratios to those of the case ``base``."""
    first = statistics.median(times[base])
    lines = [f"{'case':<16} {'median s':>9} {'ratio to ' + base:>16}"]
    for case, seconds in times.items():
        median = statistics.median(seconds)
        lines.append(f"{case:<16} {median:>9.4f} {median / first:>16.3f}")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps and one round")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=[*CASES])
    options = parser.parse_args()
    if options.quick:
        options.steps, options.rounds = 12, 1
    import torch

    torch.set_num_threads(1)
    rows = [json.loads(line) for line in (ROOT / "examples/data/pool.jsonl").read_text().splitlines()]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "pool.jsonl").write_text("".join(json.dumps({**row, "sample_weight": 1.0}) + "\n" for row in rows))
        columns = {"prompt": "instruction", "query": "input", "response": "output"}
        info = {"pool": {"file_name": "pool.jsonl", "columns": columns}}
        (folder / "dataset_info.json").write_text(json.dumps(info))
        settings = run_settings(
            folder,
            options.steps,
            dataset="pool",
            packing=False,
            per_device_train_batch_size=4,
            disable_shuffling=True,
            logging_steps=10,
        )
        times: dict[str, list[float]] = {"stock": [], **{case: [] for case in options.cases}}
        for _ in range(options.rounds):
            for case in times:
                times[case] += step_seconds(settings, CASES.get(case), folder)
    write = sys.stdout.write
    write(f"{platform.processor() or platform.machine()}, 1 thread, torch {torch.__version__}; ")
    write(f"base-4m, batch 4 x 128 tokens, {options.rounds} x {options.steps} steps, CPU seconds per step\n")
    write(told(times, "stock"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
