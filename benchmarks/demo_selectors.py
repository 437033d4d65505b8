"""Selectors on the demo's pool: held-out loss on the target after as many steps as the static run.

The settings are those of examples/demo_dynamic.yaml and examples/demo_static.yaml (1,000 rows of many sources, of which
19 % are the target's, 32 target rows, 8 rows a step). Told are the loss on the held-out questions, by seed and on
average, the share of rows of the target's source among those served after the warm-up, and the most often that one of
them was served in an interval.

A method is "static", or a selector with parameters as in a YAML flow mapping, such as "less, normalize: false".

Usage: python benchmarks/demo_selectors.py [--seeds 1 2 3] [--steps 70] [--eval-every 70] [--methods ...] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
METHODS = ["static", "bm25", "dsir, smoothing: 0", "dsir", "less"]
SOURCE = "gsm8k"


def run(method: str, seed: int, options: argparse.Namespace, folder: Path) -> Path:
    """Train once, unless it was done before, and return the run's folder."""
    key = hashlib.sha256(f"{method} {seed} {options.steps} {options.eval_every}".encode()).hexdigest()[:12]
    out = folder / key
    if (out / "all_results.json").is_file():
        return out
    static = method == "static"
    base = "static" if static else "dynamic"
    extra = [] if static else [f"dynamic.selector={{name: {method}, targets: [gsm8k_valid]}}"]
    extra += [f"dynamic.{option}" for option in options.block if not static]
    settings = [
        f"seed={seed}",
        f"output_dir={out}",
        f"max_steps={options.steps}",
        "eval_strategy=steps",
        f"eval_steps={options.eval_every}",
    ]
    out.mkdir(parents=True, exist_ok=True)
    with open(out.with_suffix(".log"), "w") as log:
        subprocess.run(
            [sys.executable, "-m", "dataflex", "train", f"examples/demo_{base}.yaml", *settings, *extra],
            check=True,
            cwd=ROOT,
            env={"HF_HUB_OFFLINE": "1", "LLAMAFACTORY_VERBOSITY": "WARN", **os.environ},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    return out


def losses(out: Path) -> list[float]:
    """Return the held-out losses of a run, without that before training."""
    history = json.loads((out / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [entry["eval_loss"] for entry in history if "eval_loss" in entry and entry["step"] > 0]


def served(out: Path) -> tuple[float, int]:
    """Return the share of the target's source after the warm-up, and the most that a row was served in an interval."""
    import numpy as np

    from dataflex.record.read import read_events, record_dir

    sources: Counter[str] = Counter()
    most = 0
    for event in read_events(out):
        if event["event"] == "planned" and event["kind"] == "dynamic":
            sources.update(event["domain_counts"])
            with np.load(record_dir(out) / event["plan"]) as plan:
                most = max(most, int(np.unique(plan["rows"], return_counts=True)[1].max()))
    return sources[SOURCE] / max(sum(sources.values()), 1), most


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=70)
    parser.add_argument("--eval-every", type=int, default=70)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--block", nargs="*", default=[], help="more of the dynamic block, as key=value")
    parser.add_argument("--out", type=Path, default=None, help="keep the runs here; finished ones are not repeated")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.out or Path(temporary)).resolve()
        print(f"{'method':<34} {SOURCE:>7} {'repeats':>8}  held-out loss every {options.eval_every} steps, by seed")
        for method in options.methods:
            for seed in options.seeds:
                out = run(method, seed, options, folder)
                share, most = (0.0, 0) if method == "static" else served(out)
                curve = " ".join(f"{loss:.3f}" for loss in losses(out))
                print(f"{method:<34} {share:>7.1%} {most:>8}  {seed}: {curve}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
