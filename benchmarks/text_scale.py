"""Time and peak memory of the text methods at scale: ten million short rows through dsir.

    python benchmarks/text_scale.py                                # 10,000,000 rows, dsir, at most 4 GB
    python benchmarks/text_scale.py --rows 1000000 --methods dsir,bm25 --check

Rows are 5 to 24 words of a vocabulary of 50,000 whose frequencies fall as 1 / rank, and lie in an Arrow file that is
mapped into memory, as LLaMA-Factory's tables are; mapped pages count as memory too. A hundred rows of them are the
target. Texts are read as they stand: what decoding tokens costs besides is told by ``--decode``, which encodes a
sample with the tokenizer of the repository's model and times ``row_texts``. Every method is a process of its own, so
that its peak of memory (ru_maxrss) is its own. ``--check`` fails where that is above 4 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa

from core_decisions import processor
from dataflex.registry import find
from dataflex.rng import stream
from dataflex.signals.texts import row_texts
from dataflex.testing import FakeSignals, example_context

MOST_GB = 4.0
WORDS = 50_000
TARGET_ROWS = 100
_BLOCK = 100_000
_TOKENIZER = Path(__file__).parent.parent / "examples/models/base-4m"


def make(path: Path, num_rows: int) -> None:
    """Write rows of random words, one column ``text``."""
    words = np.array([f"{chr(97 + i % 26)}{i:x}" for i in range(WORDS)], dtype=object)
    shares = 1 / np.arange(1, WORDS + 1)
    edges = np.cumsum(shares / shares.sum())
    schema = pa.schema({"text": pa.string()})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as out:
        for start in range(0, num_rows, _BLOCK):
            rng = stream(0, "rows", start)
            lengths = rng.integers(5, 25, size=min(_BLOCK, num_rows - start))
            drawn = words[np.searchsorted(edges, rng.random(lengths.sum())).clip(max=WORDS - 1)]
            bounds = np.concatenate([[0], np.cumsum(lengths)])
            texts = [" ".join(drawn[a:b]) for a, b in pairwise(bounds)]
            out.write_batch(pa.record_batch({"text": texts}, schema=schema))


class Mapped(FakeSignals):
    """Answers questions for texts from a mapped file; its first rows are the target's too."""

    def __init__(self, path: Path) -> None:
        super().__init__(np.ones(1), targets={"target": np.ones(TARGET_ROWS)})
        self.texts_of = pa.ipc.open_file(pa.memory_map(str(path))).read_all().column("text")

    def texts(self, rows, *, target=None, part="all"):
        start, stop = int(rows[0]), int(rows[-1]) + 1
        assert stop - start == len(rows), "the whole pool is asked for in order"
        return self.texts_of.slice(start, len(rows)).to_pylist()


def memory() -> float:
    """Return the process's largest memory so far in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def run_case(method: str, path: Path, share: float) -> None:
    """Run one method in this process and print what it took as JSON."""
    signals = Mapped(path)
    cls = find("selector", method)
    started, busy = time.perf_counter(), time.process_time()
    num_rows = len(signals.texts_of)
    ctx = example_context({"all": num_rows}, signals=signals)
    kept = cls(cls.Params()).select(np.arange(num_rows, dtype=np.int64), round(share * num_rows), ctx)
    seconds, cpu = time.perf_counter() - started, time.process_time() - busy
    print(json.dumps({"seconds": seconds, "cpu": cpu, "gb": memory(), "kept": len(kept.rows)}))


def decoding(path: Path, num_rows: int) -> float:
    """Return the microseconds of CPU that decoding a row of tokens costs, as ``row_texts`` does it."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(_TOKENIZER)
    texts = pa.ipc.open_file(pa.memory_map(str(path))).read_all().column("text").slice(0, num_rows).to_pylist()
    ids = tokenizer(texts)["input_ids"]
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids, "attention_mask": [[1] * len(row) for row in ids]})
    busy = time.process_time()
    row_texts(rows, np.arange(len(rows)), tokenizer)
    return (time.process_time() - busy) / len(rows) * 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--share", type=float, default=0.1, help="share of the rows that is selected")
    parser.add_argument("--methods", default="dsir")
    parser.add_argument("--folder", type=Path, help="where the rows are made and kept; default: a temporary one")
    parser.add_argument("--decode", action="store_true", help="time the decoding of 20,000 rows too")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        run_case(given.case, given.folder / f"{given.rows}.arrow", given.share)
        return 0
    print(
        f"{processor()}, {os.cpu_count()} cores; numpy {np.__version__}, Python {platform.python_version()}; "
        f"rows of 5 to 24 words, {TARGET_ROWS} target rows"
    )
    large = []
    with tempfile.TemporaryDirectory() as made:
        folder = given.folder or Path(made)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{given.rows}.arrow"
        if not path.is_file():
            make(path, given.rows)
        print(f"{'method':<8} {'rows':>12} {'kept':>11} {'seconds':>9} {'cpu s':>8} {'us/row':>7} {'peak GB':>8}")
        for method in given.methods.split(","):
            command = [sys.executable, __file__, *sys.argv[1:], "--folder", str(folder), "--case", method]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                print(done.stderr)
                return 1
            found = json.loads(done.stdout)
            each = found["cpu"] / given.rows * 1e6
            told = f"{found['seconds']:>9.1f} {found['cpu']:>8.1f} {each:>7.1f} {found['gb']:>8.2f}"
            print(f"{method:<8} {given.rows:>12,} {found['kept']:>11,} {told}", flush=True)
            if found["gb"] > MOST_GB:
                large.append(method)
        if given.decode:
            print(f"decoding tokens: {decoding(path, min(given.rows, 20_000)):.1f} us of CPU a row")
    if large:
        print(f"more than {MOST_GB:g} GB: {', '.join(large)}")
    return 1 if given.check and large else 0


if __name__ == "__main__":
    raise SystemExit(main())
