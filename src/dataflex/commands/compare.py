"""``dataflex compare`` and ``audit``: train a suite, or print its commands, and tell what it came to."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from dataflex.compare.running import Job, jobs_of, run_all
from dataflex.compare.suite import Suite, read_suite
from dataflex.console import others_aside, show_log
from dataflex.errors import ConfigError
from dataflex.mixing.runs import say
from dataflex.record.report import require_drawing
from dataflex.record.text import signed
from dataflex.state import replacing, write_json


def compare(suite: Path, overrides: list[str], *, jobs: int, commands: bool) -> int:
    """Train and evaluate what is not finished, and write the results; return 1 if a run failed.

    Args:
        suite: A YAML or JSON file.
        overrides: ``key=value`` texts over its keys.
        jobs: How many runs are trained at once.
        commands: Print the commands that are left instead of running them.
    """
    if jobs < 1:
        raise ConfigError(f"--jobs: expected 1 or more, found {jobs}")
    with TemporaryDirectory(prefix="dataflex-compare-") as work:
        read = read_suite(suite, overrides, work=Path(work))
    found = jobs_of(read)
    if commands:
        for job in found:
            for command in job.commands:
                say(job.line(command))
        return 0
    require_drawing()
    left = sum(bool(job.commands) for job in found)
    say(f"{read.settings.suite}: {len(found)} runs in {read.out}, {left} of them to be done")
    failed = run_all(found, jobs, say)
    _tell(read, found, failed)
    return 1 if failed else 0


def audit(suite: Path, overrides: list[str]) -> int:
    """Train without rows what is not finished, and write what scores of rows predict of it.

    Args:
        suite: A YAML or JSON file.
        overrides: ``key=value`` texts over its keys.
    """
    from dataflex.compare.audit import as_markdown, read_audit

    read = read_audit(suite, overrides)
    from dataflex.compare.removal import run_audit

    show_log()
    # LLaMA-Factory prints an example and logs to the stdout that it finds; here stdout is for what was asked.
    with others_aside():
        found = run_audit(read)
    found["command"] = shlex.join(["dataflex", "audit", str(suite), *overrides])
    write_json(read.out / "results.json", found)
    text = as_markdown(found)
    with replacing(read.out / "results.md") as file:
        file.write(text.encode())
    sys.stdout.write(text)
    return 0


def _tell(suite: Suite, jobs: list[Job], failed: dict[str, str]) -> None:
    from dataflex.compare.pages import DATA, PAGE, TEXT, write_results
    from dataflex.compare.results import read_results

    results = read_results(suite, jobs, failed)
    told = write_results(results, suite.out)
    say("")
    sys.stdout.write((suite.out / TEXT).read_text(encoding="utf-8"))
    for line in told["claims"]:
        gap = "" if line["difference"] is None else f" ({signed(line['difference'])})"
        say(f"{line['verdict']}: {line['claim']}{gap}")
    say(f"Files: {', '.join(str(suite.out / name) for name in (PAGE, TEXT, DATA))}")
