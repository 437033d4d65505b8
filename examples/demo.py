"""The demo: a small model trained on selected rows, on rows selected within a budget, and on the whole pool.

Runs ``dataflex train`` on demo_dynamic.yaml, on the same with a budget and on demo_static.yaml, then ``dataflex
report``, each as its own process. It ends with what each run cost and came to on the same task, what was selected,
where the report lies and how long it took.
'make demo' installs what it needs and starts it; by hand: python examples/demo.py
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from pathlib import Path
from typing import Any

from dataflex.record.read import read_events

ROOT = Path(__file__).resolve().parents[1]
RUNS = {name: Path("runs/demo") / name for name in ("static", "dynamic", "budget")}
BUDGET = 0.1  # passes that decisions may cost, relative to those of training
REPORT = RUNS["dynamic"] / "dataflex" / "report"
COMMAND = [sys.executable, "-m", "dataflex"]
MOST_SOURCES, MOST_UNSEEN, WIDTH = 6, 20, 110

# Everything lies in the repository, so no hub is asked; the rest keeps two threads on two cores from waiting in
# turns, and memory that each step frees and asks for again from going back to the system in between.
QUIET_AND_QUICK = {
    "HF_HUB_OFFLINE": "1",
    "LLAMAFACTORY_VERBOSITY": "WARN",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
}


def say(text: str = "") -> None:
    """Print one line at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def heading(text: str) -> None:
    """Print the name of a stage so that it stands out between progress bars."""
    say(f"\n{text}\n{'-' * len(text)}")


def shortened(line: str) -> str | None:
    """Return what is worth seeing of a line that a training prints; its bars and messages come another way."""
    found = re.search(r"\{'(loss|eval_loss)': '?([\d.]+)", line)
    return None if found is None else {"loss": "training loss", "eval_loss": "held-out loss"}[found[1]] + f" {found[2]}"


def cpu_seconds() -> float:
    """Return the CPU seconds of all commands that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def dataflex(*arguments: str) -> tuple[float, float]:
    """Run one command from the root, in sight; return its seconds and CPU seconds, or end with its exit code."""
    say(f"$ dataflex {' '.join(arguments)}")
    started, before = time.monotonic(), cpu_seconds()
    training = arguments[0] == "train"
    unseen: deque[str] = deque(maxlen=MOST_UNSEEN)
    with subprocess.Popen(
        [*COMMAND, *arguments],
        cwd=ROOT,
        env={**QUIET_AND_QUICK, **os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE if training else None,
        text=True,
        errors="replace",
    ) as process:
        for line in process.stdout or ():
            unseen.append(line.rstrip())
            told = shortened(line)
            if told is not None:
                say(f"\r{told:<{WIDTH}}")  # over the progress bar, which draws itself again below
        code = process.wait()
    if code != 0:
        say("\n".join(["", *unseen]))
        say(f"demo: 'dataflex {' '.join(arguments)}' ended with exit code {code}; its messages are above")
        sys.exit(code if code > 0 else 128 - code)
    return time.monotonic() - started, cpu_seconds() - before


def held_out(run: Path) -> tuple[float, float]:
    """Return the loss on the evaluation set before the first step and after the last one."""
    history = json.loads((ROOT / run / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    first = next(float(entry["eval_loss"]) for entry in history if "eval_loss" in entry)
    last = json.loads((ROOT / run / "all_results.json").read_text(encoding="utf-8"))["eval_loss"]
    return first, float(last)


def selected(events: list[dict[str, Any]]) -> list[tuple[str, int, float, float]]:
    """Return source, rows served after the warm-up, their share, and the source's share of the pool; most first."""
    pool: dict[str, int] = events[0]["row_space"]["domains"]
    served: Counter[str] = Counter()
    for event in events:
        if event["event"] == "planned" and event["kind"] == "dynamic":
            served.update(event["domain_counts"])
    rows, size = sum(served.values()), sum(pool.values())
    return [(name, count, count / rows, pool[name] / size) for name, count in served.most_common()]


def tell(seconds: dict[str, float], cpu: dict[str, float]) -> None:
    """Print what came out, from the seconds of each command and the CPU seconds of each training."""
    events = read_events(ROOT / RUNS["dynamic"])
    config = events[0]["config"]
    before, _ = held_out(RUNS["static"])
    heading("Result")
    say(f"Held-out loss on {config['eval_dataset']} (nats per token), before training {before:.4f}")
    say(f"  {'trained on':<44} {'steps':>5} {'CPU s':>6} {'times static':>13} {'held-out loss':>14}")
    selector = config["dynamic"]["selector"]["name"]
    labels = {
        "static": "rows of the whole pool (static)",
        "dynamic": f"rows selected by {selector} (dynamic)",
        "budget": f"rows selected by {selector}, budget {BUDGET:g} (budget)",
    }
    for name, label in labels.items():
        _, loss = held_out(RUNS[name])
        ratio = cpu[name] / cpu["static"]
        say(f"  {label:<44} {config['max_steps']:>5} {cpu[name]:>6.0f} {ratio:>13.2f} {loss:>14.4f}")
    say("\nWhat was selected")
    say(f"  {'source':<20} {'rows':>5} {'share':>7} {'share of pool':>14}")
    sources = selected(events)
    for name, rows, share, of_pool in sources[:MOST_SOURCES]:
        say(f"  {name:<20} {rows:>5} {share:>7.1%} {of_pool:>14.1%}")
    if len(sources) > MOST_SOURCES:
        rest = [sum(column) for column in list(zip(*sources[MOST_SOURCES:], strict=True))[1:]]
        say(f"  {'all others':<20} {rest[0]:>5} {rest[1]:>7.1%} {rest[2]:>14.1%}")
    say(f"\nReport  {ROOT / REPORT}")
    say(f"Time    {', '.join(f'{name} {spent:.0f} s' for name, spent in seconds.items())}")


def main() -> int:
    """Run everything; the exit code is that of the first command that fails."""
    started = time.monotonic()
    seconds, cpu = {}, {}
    dynamic = "examples/demo_dynamic.yaml"
    heading("1 of 4  Training on rows selected for the target task")
    seconds["dynamic run"], cpu["dynamic"] = dataflex("train", dynamic)
    heading("2 of 4  The same within a budget: a few rows are scored, the others predicted")
    output = f"output_dir={RUNS['budget']}"
    seconds["budget run"], cpu["budget"] = dataflex("train", dynamic, f"dynamic.signals.budget={BUDGET}", output)
    heading("3 of 4  Training on the whole pool for the same number of steps")
    seconds["static run"], cpu["static"] = dataflex("train", "examples/demo_static.yaml")
    heading("4 of 4  Report of the dynamic run")
    seconds["report"], _ = dataflex("report", str(RUNS["dynamic"]), "--out", str(REPORT))
    seconds["total"] = time.monotonic() - started
    tell(seconds, cpu)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        say("\ndemo: interrupted")
        sys.exit(128 + signal.SIGINT)
