"""What online mixers cost per optimizer step over a static mixture, as ratios within one run.

Packed rows of equal length, so that every step costs alike whatever is served; cases alternate. Step times
are process CPU seconds between optimizer steps, medians over all steps. ``doremi`` reads the losses of its
reference from the cache that is made before the first step; here the reference is the start model itself.
Aims: odm at most 1.02, doremi at most 1.05.

Usage: python benchmarks/mixer_overhead.py [--quick] [--steps N] [--rounds N]
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from pathlib import Path

from path_overhead import ROOT, run_settings, step_seconds, told

MODEL = ROOT / "examples/models/base-4m"
CASES = {
    "static": {"mixer": {"name": "static", "proportions": [0.5, 0.5]}},
    "odm, each step": {"mixer": "odm", "interval_steps": 1},
    "odm, 10 steps": {"mixer": "odm", "interval_steps": 10},
    "doremi, cached": {"mixer": {"name": "doremi", "reference": str(MODEL)}},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps and one round")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args()
    if options.quick:
        options.steps, options.rounds = 12, 1
    import torch

    torch.set_num_threads(1)
    rows = [json.loads(line) for line in (ROOT / "examples/data/pool.jsonl").read_text().splitlines()]
    half = len(rows) // 2
    info = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, part in (("one", rows[:half]), ("two", rows[half:])):
            texts = [{"text": f"{row['instruction']} {row['input']} {row['output']}"} for row in part]
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
            info[name] = {"file_name": f"{name}.jsonl", "columns": {"prompt": "text"}}
        (folder / "dataset_info.json").write_text(json.dumps(info))
        settings = run_settings(
            folder, options.steps, stage="pt", dataset="one,two", packing=True, per_device_train_batch_size=8
        )
        times: dict[str, list[float]] = {case: [] for case in CASES}
        for _ in range(options.rounds):
            for case, dynamic in CASES.items():
                times[case] += step_seconds(settings, dynamic, folder)
    write = sys.stdout.write
    write(f"{platform.processor() or platform.machine()}, 1 thread, torch {torch.__version__}; base-4m, ")
    write(f"batch 8 x 128 tokens, {options.rounds} x {options.steps} steps, CPU seconds per step\n")
    write(told(times, "static"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
