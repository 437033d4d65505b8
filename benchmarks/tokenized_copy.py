"""Seconds of loading data sets that are tokenized at once, by the start that makes a copy, and by the next one.

Seven data sets of instruction rows, a small random model, one optimizer step. Each start is a process of its own; the
seconds are those of the phase ``data`` in its record. Exits with 1 where the rows of the starts differ, or the last one
is not at least five times faster than the plain one.

Usage: python benchmarks/tokenized_copy.py [--rows N] [--model DIR]
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
SETS = [f"set{number}" for number in range(7)]


def make_data(folder: Path, rows: int) -> None:
    """Write the data sets, ``rows`` rows each."""
    from tests.conftest import WORDS

    rng, info = random.Random(0), {}
    for name in SETS:
        with (folder / f"{name}.jsonl").open("w") as file:
            for _ in range(rows):
                asked, said = (" ".join(rng.choices(WORDS, k=rng.randint(20, 120))) for _ in range(2))
                file.write(
                    json.dumps({"instruction": asked, "input": "", "output": said, "sample_weight": rng.random()})
                    + "\n"
                )
        info[name] = {"file_name": f"{name}.jsonl"}
    (folder / "dataset_info.json").write_text(json.dumps(info))


def make_model(folder: Path) -> None:
    """Write the model of the tests."""
    code = (
        "import sys; from pathlib import Path; from types import SimpleNamespace; from tests import conftest\n"
        "make = conftest.tiny_model.__wrapped__\n"
        "make(SimpleNamespace(mktemp=lambda name: Path(sys.argv[1])))"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, cwd=ROOT)


def start(folder: Path, name: str, model: Path, **more: object) -> tuple[float, dict]:
    """Train one step; return the seconds of loading and the row space."""
    settings = {
        **{"model_name_or_path": str(model), "stage": "sft", "do_train": True, "finetuning_type": "full"},
        **{"dataset_dir": str(folder), "dataset": ",".join(SETS), "template": "default", "cutoff_len": 256},
        **{"per_device_train_batch_size": 2, "max_steps": 1, "save_strategy": "no", "report_to": "none"},
        **{"overwrite_cache": True, "output_dir": str(folder / name), "use_cpu": True},
        "dynamic": {"mixer": "uniform", "weighter": "column"},
        **more,
    }
    config = folder / f"{name}.json"
    config.write_text(json.dumps(settings))
    command = [sys.executable, "-m", "dataflex", "train", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        sys.exit(done.stderr)
    events = [json.loads(line) for line in (folder / name / "dataflex" / "events.jsonl").read_text().splitlines()]
    return events[-1]["spent"]["data"], events[0]["row_space"]


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=3000, help="rows of each data set")
    parser.add_argument("--model", type=Path, help="folder of a model; the tests' own by default")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_data(folder, options.rows)
        model = options.model or folder / "model"
        if options.model is None:
            model.mkdir()
            make_model(model)
        copy = {"tokenized_path": str(folder / "copy")}
        starts = {"plain": {}, "first": copy, "second": copy}
        found = {each: start(folder, each, model, **more) for each, more in starts.items()}
        for each, (seconds, _) in found.items():
            print(f"{each:>7}: {seconds:8.2f} s to load {7 * options.rows:,} rows")
        plain, second = found["plain"], found["second"]
        print(f"the second start loads {plain[0] / second[0]:.1f} times faster")
        return int(second[1] != plain[1] or plain[0] < 5 * second[0])


if __name__ == "__main__":
    sys.exit(main())
