"""Runs of 700 intervals whose memory and open files must not grow.

    python -m benchmarks.soak.growth --intervals 700

Each case of ``benchmarks.soak.kills`` runs in a process of its own, with a decision in every step and a checkpoint in
every tenth part. At each decision its resident memory (garbage and free pages apart), open files and threads are noted;
those of the last tenth are compared with those of the second third, when caches are full. The exit code is 1 where
memory grows by more than --kib per interval (the log of a step is 2 or 3), or files or threads grow at all. What the
allocator keeps wanders by a few MB, which over 300 intervals can look like more than that.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.soak.forks import fork, prepare, tiny


def watched(config: Path, samples: Path) -> int:
    """Train, and note memory [KiB], open files and threads at each decision."""
    import psutil

    from dataflex.record.recorder import RunRecorder
    from dataflex.run import train_here
    from dataflex.train import observations

    observations._KEPT_SKETCHES = 256  # what is kept of gradients is full soon
    process, planned, found = psutil.Process(), RunRecorder.planned, []
    libc = ctypes.CDLL(None)
    gc.freeze()  # what is imported is not looked through each time

    def noted(recorder: RunRecorder, *args: Any, **kwargs: Any) -> Any:
        gc.collect()
        if hasattr(libc, "malloc_trim"):  # pages that are free, but kept, are no growth
            libc.malloc_trim(0)
        found.append((process.memory_info().rss / 1024, process.num_fds(), process.num_threads()))
        return planned(recorder, *args, **kwargs)

    RunRecorder.planned = noted
    train_here([str(config)])
    samples.write_text(json.dumps(found))
    return 0


def grown(samples: list[tuple[float, int, int]]) -> tuple[float, float, float]:
    """Return the growth by interval of memory [KiB], and that of files and threads in all, from a third on."""
    n = len(samples)
    early, late = samples[n // 3 : 2 * n // 3], samples[-max(1, n // 10) :]
    apart = n - len(late) / 2 - n / 2
    memory, files, threads = (
        statistics.median(one[i] for one in late) - statistics.median(one[i] for one in early) for i in range(3)
    )
    return memory / apart, files, threads


def main(arguments: list[str] | None = None) -> int:
    """Run the command line at the top."""
    from benchmarks.soak.kills import CASES, Jobs

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--intervals", type=int, default=700)
    parser.add_argument("--cases", nargs="*", choices=[*CASES], default=[*CASES])
    parser.add_argument("--kib", type=float, default=32.0, help="memory that an interval may add, in KiB")
    parser.add_argument("--limit", type=float, default=900.0, help="seconds that a case may take")
    options = parser.parse_args(arguments)
    wrong = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny(folder)
        prepare()
        jobs = Jobs(folder, options.limit)
        for case in options.cases:
            mapping = jobs.mapping("one", case, 1, folder / case)
            length = mapping["dynamic"].get("interval_steps", 1) if "orderer" in mapping["dynamic"] else 1
            steps = options.intervals * length
            mapping |= {"max_steps": steps, "save_steps": max(1, steps // 10)}
            mapping["dynamic"] |= {"interval_steps": length}
            if "keep_ratio" in mapping["dynamic"]:  # a mixture may ask a domain of which no row, or few, were kept
                mapping["dynamic"] |= {"keep_ratio": 0.95, "repeat": True}
            config, samples = folder / f"{case}.json", folder / f"{case}.samples"
            config.write_text(json.dumps({key: value for key, value in mapping.items() if value is not None}))
            log = folder / f"{case}.log"
            code = fork(lambda config=config, samples=samples: watched(config, samples), log).wait(options.limit)
            if code != 0:
                wrong += 1
                sys.stdout.write(f"{case}: ended with {code}:\n{log.read_text(errors='replace')[-2000:]}\n")
                continue
            found = json.loads(samples.read_text())
            memory, files, threads = grown(found)
            bad = memory > options.kib or files > 0 or threads > 0
            wrong += bad
            sys.stdout.write(
                f"{case}: {len(found)} decisions, {found[-1][0] / 1024:.0f} MiB; an interval adds {memory:.1f} KiB; "
                f"{files:+.0f} open files, {threads:+.0f} threads{'  GROWS' if bad else ''}\n"
            )
            sys.stdout.flush()
    sys.stdout.write(f"growth: {len(options.cases)} cases of {options.intervals} intervals; {wrong} findings\n")
    return int(wrong > 0)


if __name__ == "__main__":
    kept = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    if kept != dict(os.environ):  # memory that is never given back would look like growth
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks.soak.growth", *sys.argv[1:]], kept)
    sys.exit(main())
