"""CPU seconds of ``dataflex report`` for records of many domains, many intervals, and both.

A record of events alone is made up: each interval serves rows of 200 of the domains, each log has losses of 100.
The imports of the two plotting libraries are not counted.

Usage: python benchmarks/report_scale.py [--domains 40 20000] [--intervals 10 5000]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import bokeh.plotting  # noqa: F401
import matplotlib.figure  # noqa: F401

from dataflex.record.report import report


def record(folder: Path, domains: int, intervals: int) -> Path:
    """Write a record and return the run's folder."""
    names = [f"common/prefix/domain-{at}" for at in range(domains)]
    space = {"domains": dict.fromkeys(names, 1000)}
    events = [{"event": "run_started", "step": 0, "config": {}, "row_space": space}]
    for at in range(intervals):
        served = [names[(37 * at + place) % domains] for place in range(min(200, domains))]
        counts = {name: 1 + place % 3 for place, name in enumerate(served)}
        planned = {"event": "planned", "step": 10 * at, "interval": at, "kind": "dynamic", "start_step": 10 * at}
        events.append({**planned, "stop_step": 10 * at + 10, "rows": sum(counts.values()), "domain_counts": counts})
        losses = {f"dataflex/loss/{name}": 2.0 for name in served[:100]}
        events.append({"event": "stepped", "step": 10 * at + 10, "loss": 2.0, **losses})
    events.append({"event": "finished", "step": 10 * intervals, "metrics": {}})
    (folder / "dataflex").mkdir(parents=True)
    lines = "".join(json.dumps({"time": 1.7e9 + at, **event}) + "\n" for at, event in enumerate(events))
    (folder / "dataflex" / "events.jsonl").write_text(lines, encoding="utf-8")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domains", type=int, nargs="+", default=[40, 20_000])
    parser.add_argument("--intervals", type=int, nargs="+", default=[10, 5000])
    options = parser.parse_args()
    print(f"{'domains':>9} {'intervals':>9} {'CPU s':>7} {'page MB':>8}")
    for domains in options.domains:
        for intervals in options.intervals:
            with TemporaryDirectory() as folder:
                run = record(Path(folder) / "run", domains, intervals)
                began = time.process_time()
                report([run])
                spent = time.process_time() - began
                size = (run / "dataflex" / "report.html").stat().st_size / 1e6
                print(f"{domains:9,} {intervals:9,} {spent:7.1f} {size:8.2f}", flush=True)


if __name__ == "__main__":
    main()
