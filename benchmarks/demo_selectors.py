"""Selectors on a pool of the demo's: held-out loss on the target after as many steps as the static run.

The settings are those of examples/demo_dynamic.yaml and examples/demo_static.yaml (32 target rows of GSM8K, 8 rows a
step). Told are the loss on the held-out questions by seed, the share of each kind of rows below among those served
after the warm-up (for "static": in the pool), and the most often that a row was served in an interval.

Pools:
  demo        The first 1,000 rows of examples/data/pool.jsonl. Kind: rows of the target's source (19 %).
  word_order  The 450 GSM8K rows of that file and 500 rows of other sources. Half of the former are as they were
              ("right"), the others have the words of each line of the answer shuffled ("shuffled"). The first word of a
              line stays, and so do line breaks: a shuffled answer has the words that it had before and, where tokens
              begin at spaces, the tokens. Both kinds have the source "gsm8k", so that no domain tells them either.

A method is "static", or a selector with parameters as in a YAML flow mapping, such as "less, normalize: false"; keys of
the dynamic block for this method alone come behind a bar, such as "less | signals.budget=0.1".

Usage: python benchmarks/demo_selectors.py [--pool demo|word_order] [--pool-seed 1] [--seeds 1 2 3] [--steps 70]
                                           [--eval-every 70] [--methods ...] [--block ...] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "examples/data"
METHODS = ["static", "bm25", "dsir, smoothing: 0", "dsir", "less"]
SOURCE = "gsm8k"
OTHERS = 500


@dataclass(frozen=True)
class Pool:
    """What is trained on.

    Attributes:
        folder: With the pool and dataset_info.json.
        kinds: Kind of each row, in the order of the file.
        shown: Kinds whose shares are told.
        digest: Of the rows.
    """

    folder: Path
    kinds: list[str]
    shown: tuple[str, ...]
    digest: str

    def shares(self, counts: Counter[str]) -> str:
        """Return the share of each kind that is shown, formatted."""
        return " ".join(f"{counts[kind] / max(counts.total(), 1):>8.1%}" for kind in self.shown)


def demo() -> Pool:
    """Return the pool of the demo as it lies in the repository."""
    data = (DATA / "pool.jsonl").read_bytes()
    kinds = [json.loads(line)["source"] for line in data.decode().splitlines()[:1000]]  # max_samples of the YAMLs
    return Pool(DATA, kinds, (SOURCE,), hashlib.sha256(data).hexdigest())


def shuffled(answer: str, rng: random.Random) -> str:
    """Shuffle the words of each line but the first, whitespace staying where it is; the order changes if it can."""
    lines = []
    for line in answer.split("\n"):
        first, *words = line.split() or [""]
        before = list(words)
        while len(set(words)) > 1 and words == before:
            rng.shuffle(words)
        following = iter([first, *words])
        lines.append(re.sub(r"\S+", lambda _, following=following: next(following), line))
    return "\n".join(lines)


def word_order(folder: Path, seed: int) -> Pool:
    """Write the pool whose relevant rows are told by the order of their words, and its dataset_info.json."""
    rng = random.Random(f"word_order {seed}")
    rows = [json.loads(line) for line in (DATA / "pool.jsonl").read_text(encoding="utf-8").splitlines()]
    relevant = [row for row in rows if row["source"] == SOURCE]
    # noise_gsm8k has right words in the right order and yet wrong answers: neither kind.
    others = [row for row in rows if not row["source"].endswith(SOURCE)]
    rng.shuffle(relevant)
    relevant.sort(key=lambda row: shuffled(row["output"], rng) != row["output"])  # those of few words are right ones
    half = len(relevant) // 2
    pool = [("right", row) for row in relevant[:half]]
    pool += [("shuffled", {**row, "output": shuffled(row["output"], rng)}) for row in relevant[half:]]
    pool += [("other", row) for row in rng.sample(others, OTHERS)]
    rng.shuffle(pool)
    text = "".join(json.dumps(row) + "\n" for _, row in pool)
    digest = hashlib.sha256(text.encode()).hexdigest()
    folder = folder / f"pool-{digest[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pool.jsonl").write_text(text, encoding="utf-8")
    info = json.loads((DATA / "dataset_info.json").read_text(encoding="utf-8"))
    for name, entry in info.items():
        if name != "pool":
            entry["file_name"] = str(DATA / entry["file_name"])
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=2), encoding="utf-8")
    return Pool(folder, [kind for kind, _ in pool], ("right", "shuffled"), digest)


def run(method: str, seed: int, pool: Pool, options: argparse.Namespace, folder: Path) -> Path:
    """Train once, unless it was done before, and return the run's folder."""
    selector, _, block = method.partition("|")
    static = selector.strip() == "static"
    settings = [
        f"seed={seed}",
        f"max_steps={options.steps}",
        "eval_on_start=false",
        "eval_strategy=steps",
        f"eval_steps={options.eval_every}",
    ]
    if not static:
        settings.append(f"dynamic.selector={{name: {selector.strip()}, targets: [gsm8k_valid]}}")
        settings += [f"dynamic.{option}" for option in [*options.block, *block.split()]]
    base = ROOT / f"examples/demo_{'static' if static else 'dynamic'}.yaml"
    told = json.dumps([base.read_text(encoding="utf-8"), pool.digest, settings])
    out = folder / hashlib.sha256(told.encode()).hexdigest()[:12]
    if (out / "all_results.json").is_file():
        return out
    out.mkdir(parents=True, exist_ok=True)
    places = [f"dataset_dir={pool.folder}", f"output_dir={out}"]
    with open(out.with_suffix(".log"), "w") as log:
        subprocess.run(
            [sys.executable, "-m", "dataflex", "train", str(base), *settings, *places],
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


def served(out: Path, pool: Pool) -> tuple[Counter[str], int]:
    """Count kinds of rows served after the warm-up; return them and the most that a row was served in an interval."""
    import numpy as np

    from dataflex.record.read import read_events, record_dir

    counts: Counter[str] = Counter()
    most = 0
    for event in read_events(out):
        if event["event"] == "planned" and event["kind"] == "dynamic":
            with np.load(record_dir(out) / event["plan"]) as plan:
                rows = plan["rows"]
            counts.update(pool.kinds[row] for row in rows)
            most = max(most, int(np.unique(rows, return_counts=True)[1].max()))
    return counts, most


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", choices=["demo", "word_order"], default="demo")
    parser.add_argument("--pool-seed", type=int, default=1, help="draws the pool word_order")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=70)
    parser.add_argument("--eval-every", type=int, default=70)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--block", nargs="*", default=[], help="more of the dynamic block of all, as key=value")
    parser.add_argument("--out", type=Path, default=None, help="keep the runs here; finished ones are not repeated")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.out or Path(temporary)).resolve()
        pool = demo() if options.pool == "demo" else word_order(folder, options.pool_seed)
        names = " ".join(f"{kind:>8}" for kind in pool.shown)
        print(f"{'method':<34} {names} {'repeats':>8}  held-out loss every {options.eval_every} steps, by seed")
        for method in options.methods:
            for seed in options.seeds:
                out = run(method, seed, pool, options, folder)
                counts, most = (Counter(pool.kinds), 1) if method == "static" else served(out, pool)
                curve = " ".join(f"{loss:.3f}" for loss in losses(out))
                print(f"{method:<34} {pool.shares(counts)} {most:>8}  {seed}: {curve}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
