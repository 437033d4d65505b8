"""Trains and evaluates the runs of a suite, each by the commands that a user would type.

A run's folder is named by a fingerprint of its configuration, of the data, models and other files that it names, and
of the code, so that a run that finished is not repeated, and one of anything else is never taken for it. Evaluations
are named likewise.
"""

from __future__ import annotations

import fcntl
import json
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from dataflex.compare.suite import Evaluation, Run, Suite, trained_model
from dataflex.config.args import data_set_names
from dataflex.config.data import target_data_sets
from dataflex.config.inputs import hash_of, inputs_of
from dataflex.mixing.runs import finished, write_configurations
from dataflex.printable import redacted
from dataflex.record.read import read_ending
from dataflex.state import blake2b, read_json
from dataflex.version import versions

_ROOT = Path(__file__).resolve().parent.parent
_NOT_TRAINING = ("commands", "compare", "mixing", "offline")
_TOLD = 3  # last lines of a log that are told of a failure


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run, where it lies, and the commands that make it."""

    run: Run
    folder: Path  # its output_dir
    config: Path
    log: Path
    evaluation: Path | None  # JSON that the evaluation writes; None: nothing is evaluated beside the training
    options: tuple[str, ...]  # of the evaluation

    @property
    def trained(self) -> bool:
        """Whether the training has finished, and what follows it: the last evaluation, the final model."""
        return finished(self.folder) and bool(read_ending(self.folder))

    @property
    def commands(self) -> list[list[str]]:
        """The commands that are still to be run, without the program."""
        left = [] if self.trained else [["train", str(self.config)]]
        if self.evaluation is not None and not self.evaluation.is_file():
            told = [*trained_model(self.run.mapping, self.folder), "--out", str(self.evaluation)]
            left.append(["eval", str(self.config), *self.options, *told])
        return left

    def line(self, command: Sequence[str]) -> str:
        """Return a command as it is typed."""
        return shlex.join(["dataflex", *command])


def jobs_of(suite: Suite) -> list[Job]:
    """Return the jobs of a suite in the order of its arms, seeds interleaved, and write their configurations."""
    runs = sorted(suite.runs, key=lambda run: suite.seeds.index(run.seed))
    jobs, configs = [], {}
    for run in runs:
        folder, evaluation = _places(suite, run)
        options = suite.evaluation.options() if suite.evaluation is not None else []
        config = folder.with_name(f"{folder.name}.yaml")
        jobs.append(
            Job(
                run=run,
                folder=folder,
                config=config,
                log=folder.with_name(f"{folder.name}.log"),
                evaluation=evaluation,
                options=tuple(options),
            )
        )
        configs[config] = {**run.mapping, "output_dir": str(folder)}
    write_configurations(suite.out, configs)
    return jobs


def _places(suite: Suite, run: Run) -> tuple[Path, Path | None]:
    """Return the folder of a run, and the file of its evaluation; both are named by what they are made of."""
    folder = suite.out / "runs" / f"{run.arm}-{run.steps}steps-seed{run.seed}-{fingerprint(run)}"
    if suite.evaluation is None:
        return folder, None
    return folder, folder.with_name(f"{folder.name}.eval-{_evaluation_key(suite.evaluation, run)}.json")


def fingerprint(run: Run) -> str:
    """Return a hash of all that a run is made of, eight hexadecimal digits."""
    lf, dynamic = run.parts.lf, run.parts.dynamic
    assert dynamic is not None
    inputs = inputs_of(run.mapping, [*lf.train_sets, *lf.eval_sets, *target_data_sets(*dynamic.targets)], lf)
    return _digest([redacted(run.mapping), inputs, _code(_NOT_TRAINING), versions()])


def changed(suite: Suite, jobs: Sequence[Job]) -> list[str]:
    """Return runs that would be made of, or evaluated with, something else now: it changed after they were begun."""
    hash_of.cache_clear()
    _code.cache_clear()
    named = [job.run.title for job in jobs if (job.folder, job.evaluation) != _places(suite, job.run)]
    return [f"data, models, plugins or code changed while the suite ran: {'; '.join(named)}"] if named else []


def _evaluation_key(evaluation: Evaluation, run: Run) -> str:
    """Return a hash of what is evaluated, its data sets and files, and the code."""
    inputs = inputs_of(vars(evaluation), data_set_names(evaluation.data), run.parts.lf)
    return _digest([vars(evaluation), inputs, _code(("commands", "compare", "mixing"))])


def _digest(made: list[Any]) -> str:
    return blake2b(json.dumps(made, sort_keys=True, default=str).encode()).hex()[:8]


@cache
def _code(left_out: tuple[str, ...]) -> str:
    """Return a hash of the package's modules, except those in some rooms and the record's pages."""
    skipped = {*left_out, "record", "preview.py", "cli.py"}
    files = sorted(file for file in _ROOT.rglob("*.py") if file.relative_to(_ROOT).parts[0] not in skipped)
    recorder = _ROOT / "record" / "recorder.py"
    return blake2b(*(file.read_bytes() for file in (*files, recorder))).hex()


def run_all(jobs: Iterable[Job], parallel: int, say: Callable[[str], None]) -> dict[str, str]:
    """Run what is not finished, ``parallel`` jobs at once; return why each failed one did, by its folder.

    A job that fails does not stop the others. Where this process is ended, those that run are ended too. Runs that
    another process of the suite holds come last.
    """
    failed: dict[str, str] = {}
    running: list[subprocess.Popen[bytes]] = []
    over = threading.Event()

    def one(job: Job, wait: bool) -> bool:
        """Return False where another process holds the run and is not waited for."""
        with _alone(job, over, wait=wait) as lock:
            if lock is None:
                return False
            if not job.commands:
                say(f"{job.run.title}: finished before ({job.folder})")
            for command in job.commands:
                if over.is_set():
                    break
                say(f"{job.run.title}: {job.line(command)}")
                if command[0] == "train" and not any(job.folder.glob("checkpoint-*")):
                    shutil.rmtree(job.folder, ignore_errors=True)  # left by a kill, with nothing to go on from
                begins = job.log.stat().st_size if job.log.is_file() else 0
                code = _called(job, command, running, lock)
                if code != 0 and not over.is_set():
                    failed[str(job.folder)] = f"exit code {code}: {_last_lines(job.log, begins)} ({job.log})"
                    say(f"{job.run.title}: FAILED, {failed[str(job.folder)]}")
                    return True
            if not over.is_set() and job.commands:
                failed[str(job.folder)] = f"ended with exit code 0, but is not finished ({job.log})"
        return True

    with ThreadPoolExecutor(parallel) as pool:
        try:
            left = list(jobs)
            for wait in (False, True):
                asked = [(job, pool.submit(one, job, wait)) for job in left]
                left = [job for job, done in asked if not done.result()]
        except BaseException:
            over.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for process in running:
                process.terminate()
            raise
    return failed


def _called(job: Job, command: Sequence[str], running: list[subprocess.Popen[bytes]], lock: int) -> int:
    program = [sys.executable, "-m", "dataflex"]
    with job.log.open("ab") as log:
        process = subprocess.Popen([*program, *command], stdout=log, stderr=log, pass_fds=[lock])
        running.append(process)
        try:
            return process.wait()
        finally:
            running.remove(process)


@contextmanager
def _alone(job: Job, over: threading.Event, *, wait: bool = True) -> Iterator[int | None]:
    """Hold a run's lock while inside; its descriptor is given to the run, which may outlive this process.

    None where another process holds it and is not waited for.
    """
    with job.folder.with_name(f"{job.folder.name}.lock").open("w") as file:
        while not over.is_set():
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not wait:
                    yield None
                    return
                over.wait(1.0)
        yield file.fileno()


def _last_lines(log: Path, begins: int) -> str:
    """Return the last lines of a log from a byte on, our own if there are any."""
    text = log.read_bytes()[begins:].decode("utf-8", "replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith("dataflex:")]
    return " | ".join((ours or lines)[-_TOLD:])


def evaluated(job: Job) -> Mapping[str, Any] | None:
    """Return what the evaluation of a run wrote; None without one."""
    if job.evaluation is None or not job.evaluation.is_file():
        return None
    found: Mapping[str, Any] = read_json(job.evaluation)
    return found
