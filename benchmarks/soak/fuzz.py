"""Random configurations, half of them mutated: ``plan`` gives no traceback, and what it accepts trains for 3 steps.

    python -m benchmarks.soak.fuzz --count 500 --seed 1
    python -m benchmarks.soak.fuzz --seed 1 --only 37       one configuration again, with all that it prints

Each configuration is planned and trained in a process of its own, of the tests' tiny model. A finding is a traceback, a
process that dies or does not end, or a run that is refused after ``plan`` accepted it. What only tokenizing or scoring
tells, such as a domain of which a selector keeps too few rows, or how many packed rows there are, is "refused
later" and no finding. Findings are written to --out with the command that shows them again, and the exit code is 1.
Started again with the same --out, the command goes on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.soak.forks import Ledger, fork, prepare, tiny

_LATER = r"refused while training: (interval \d+|dataloader_drop_last|.* packing leaves no row|unimax: )"


def tried(mapping: dict[str, Any], folder: Path, *, trains: bool) -> None:
    """Plan a configuration, train it if that was accepted, and leave what happened in ``result.json``."""
    from tests.random_configurations import accepted, trained

    os.chdir(folder)  # a relative path of a configuration leads into its own folder

    result = {"what": "refused", "problem": ""}
    try:
        if accepted(mapping, folder):
            result["what"] = "accepted"
            if trains:
                result["problem"] = trained(folder)
                result["what"] = "accepted" if result["problem"] else "trained"
            if re.match(_LATER, result["problem"]):
                result = {"what": "refused later", "problem": ""}
    except Exception:  # noqa: BLE001
        result["problem"] = traceback.format_exc()
    (folder / "result.json").write_text(json.dumps(result))


def one(mapping: dict[str, Any], folder: Path, *, trains: bool, limit: float) -> dict[str, str]:
    """Return what became of a configuration (``refused``, ``accepted`` or ``trained``) and the problem, if any."""
    log, result = folder / "log.txt", folder / "result.json"
    code = fork(lambda: tried(mapping, folder, trains=trains), log).wait(limit)
    if code is not None and result.exists():
        return json.loads(result.read_text())
    how = f"did not end within {limit:.0f} s" if code is None else f"ended with {code}"
    return {"what": "died", "problem": f"the process {how}:\n{log.read_text(errors='replace')[-4000:]}"}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line at the top."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=500, help="configurations")
    parser.add_argument("--only", type=int, help="number of the one configuration to try")
    parser.add_argument("--plan-only", action="store_true", help="train nothing")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no configuration is begun after these")
    parser.add_argument("--limit", type=float, default=180.0, help="seconds that one may take")
    parser.add_argument("--out", type=Path, help="folder of results and findings (runs/fuzz-SEED)")
    options = parser.parse_args(arguments)
    from tests.random_configurations import configurations

    until = time.monotonic() + 60 * options.minutes
    again = options.only is not None
    out = tempfile.mkdtemp() if again else options.out or f"runs/fuzz-{options.seed}"
    ledger = Ledger(Path(out).resolve(), {"fuzz": options.seed, "plan_only": options.plan_only})
    model, data = tiny(ledger.folder)
    prepare()
    stop = options.only + 1 if again else options.count
    for number, mapping in enumerate(configurations(options.seed, stop, model, data)):
        if number in ledger.known or (again and number != options.only):
            continue
        if time.monotonic() > until:
            break
        with tempfile.TemporaryDirectory() as name:
            found = one(mapping, Path(name), trains=not options.plan_only, limit=options.limit)
            if again:
                told = "".join(
                    path.read_text(errors="replace")
                    for part in ("plan.txt", "log.txt")
                    if (path := Path(name, part)).exists()
                )
                sys.stdout.write(f"{json.dumps(mapping, indent=1)}\n{told}\n{found['what']}\n")
        ledger.add(number, found)
        if found["problem"]:
            command = ["python", "-m", "benchmarks.soak.fuzz", "--seed", str(options.seed), "--only", str(number)]
            ledger.finding(number, command, f"{json.dumps(mapping)}\n{found['problem']}")
    results = list(itertools.islice(ledger.known.values(), stop))
    counts = Counter(each["what"] for each in results)
    findings = sum(bool(each["problem"]) for each in results)
    told = ", ".join(
        f"{counts[what]} {what}" for what in ("refused", "refused later", "accepted", "trained", "died") if counts[what]
    )
    sys.stdout.write(f"fuzz: seed {options.seed}, {len(results)} configurations: {told}; {findings} findings\n")
    return int(findings > 0)


if __name__ == "__main__":
    sys.exit(main())
