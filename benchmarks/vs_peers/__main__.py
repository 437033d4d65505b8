"""Measures DataFlex beside other systems: the same rows, model and modules, one thread, CPU seconds.

    python -m benchmarks.vs_peers                                    everything, about two hours
    python -m benchmarks.vs_peers --only loss less_1024 --repeats 3
    python -m benchmarks.vs_peers --only less_4096 --rows 32 --targets 16

Every system runs in an environment of its own under runs/vs_peers, which is made here (pip fetches the packages). Parts
are passes and whole runs beside PyPI's dataflex, and rows scored beside libraries of influence functions. Systems take
turns; ratios are of neighbouring runs. What was measured stays in runs/vs_peers/results, and the same command goes on
with what is missing; --again forgets it. The table in docs/results.md is rendered from there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.vs_peers import systems
from benchmarks.vs_peers.page import PAGE, rendered

HERE = Path(__file__).resolve().parent


def run(system: str, driver: str, arguments: list[str], out: Path) -> dict[str, Any]:
    """Run a driver in a system's environment; return what it wrote, with CPU seconds and memory of the whole process.

    The driver is given the system, ``arguments``, and the file that it has to write. SystemExit where it does not.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    out.unlink(missing_ok=True)
    command = [str(systems.python_of(system)), str(HERE / driver), system, *arguments, str(out)]
    with out.with_suffix(".log").open("wb") as log:
        process = subprocess.Popen(command, env=systems.environment(system), stdout=log, stderr=log, cwd=out.parent)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or not out.is_file():
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}; see {log.name}")
    whole = {"run_cpu": usage.ru_utime + usage.ru_stime, "run_peak_mb": usage.ru_maxrss * 1024 / 1e6}
    return json.loads(out.read_text(encoding="utf-8")) | whole


def measure(part: str, system: str, options: argparse.Namespace, first: bool) -> dict[str, Any]:
    """Run one system once; rows are compared with autograd in its first run."""
    folder = systems.HOME / "runs" / part / system
    shutil.rmtree(folder, ignore_errors=True)
    number = str(options.oracle if first else 0)
    if part not in systems.PASSES and part not in systems.RUNS:
        arguments = [part, str(options.rows), str(options.targets), number]
        return run(system, "influence.py", arguments, folder / "out.json")
    data = systems.write_rows(options.rows, options.targets)
    config = systems.write_configuration(part, data, folder)
    found = run(system, "training.py", [str(config), number], folder / "out.json")
    if part in systems.RUNS:
        files = [file for file in folder.rglob("*") if file.is_file() and file.suffix != ".log"]
        disk = sum(file.stat().st_size for file in files) / 1e6
        found |= {"cpu": found["run_cpu"], "peak_mb": found["run_peak_mb"], "disk_mb": disk}
    return found


def machine() -> dict[str, str]:
    """Return what the numbers were measured on."""
    import torch
    import transformers

    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"processor": (names or [platform.machine()])[0], "python": platform.python_version(), **versions}


def _kept(part: str) -> Path:
    return systems.HOME / "results" / f"{part}.json"


def compare(part: str, options: argparse.Namespace) -> None:
    """Measure what is missing of a part, ours and the other system in turns, and keep every run."""
    pair, kept = ("ours", systems.PARTS[part]), _kept(part)
    size = {"rows": options.rows, "targets": options.targets}
    found: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    if options.again or {key: found.get(key) for key in size} != size:
        found = size | {"machine": machine(), "pairs": []}
    for index in range(options.repeats):
        if index == len(found["pairs"]):
            found["pairs"].append({})
        for system in pair if index % 2 == 0 else pair[::-1]:
            who = "ours" if system == "ours" else "peer"
            if who in found["pairs"][index]:
                continue
            turn = found["pairs"][index][who] = measure(part, system, options, index == 0)
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            sys.stdout.write(f"{part}, repeat {index + 1}, {system}: {turn['cpu']:.2f} CPU seconds\n")
            sys.stdout.flush()


def main(arguments: list[str] | None = None) -> int:
    """Run the command line at the top."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help=f"of {', '.join(systems.PARTS)}")
    parser.add_argument("--rows", type=int, default=200, help="rows of the pool")
    parser.add_argument("--targets", type=int, default=20, help="rows of the target, at most 32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--oracle", type=int, default=30, help="rows that are scored anew by autograd")
    parser.add_argument("--again", action="store_true", help="forget what was measured of these parts")
    parser.add_argument("--page", type=Path, default=PAGE, help="page with the marks that the table goes between")
    options = parser.parse_args(arguments)
    if unknown := sorted({*(options.only or ())} - {*systems.PARTS}):
        parser.error(f"no part is named {', '.join(unknown)}; there are {', '.join(systems.PARTS)}")
    for part in options.only or systems.PARTS:
        compare(part, options)
    kept = {part: _kept(part) for part in systems.PARTS}
    results = {part: json.loads(file.read_text(encoding="utf-8")) for part, file in kept.items() if file.is_file()}
    options.page.write_text(rendered(options.page.read_text(encoding="utf-8"), results), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
