"""Runs that are killed at a random place and go on, and end as if nothing had happened, bit for bit.

    python -m benchmarks.soak.kills --count 300 --seed 1
    python -m benchmarks.soak.kills --seed 1 --only 37      one job again, with all that it prints

A job is a tiny run on one rank, on two (DDP, ZeRO-3, FSDP2), or moved from two to one and back. It is killed one to
three times: inside a scoring pass, while the record of a decision is written, while a checkpoint is, at a file, a
moment after it, or at any time. On two ranks one dies and the other is told to end as torchrun tells it, or both die.
After each kill the record must be readable; then the run goes on from its newest complete checkpoint. At the end the
whole log, the rows that were served, the table of chosen rows, weights, optimizer and random states are those of a run
that was never killed (a moved one: whose legs begin at the same checkpoints). The exit code is 1 if a job differs,
fails or hangs. Started again with the same --out, the command goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.soak.forks import Forked, Ledger, fork, prepare, tiny

STEPS, SAVE_STEPS, RANKS_BATCH = 8, 2, 2
CASES: dict[str, dict[str, Any]] = {
    "loss": {"selector": "loss", "interval_steps": 3, "warmup_steps": 2},
    "less": {"selector": {"name": "less", "targets": ["goal"]}, "interval_steps": 2, "warmup_steps": 1},
    "odm": {"mixer": "odm", "interval_steps": 1},
    "budget": {
        "selector": {"name": "less", "targets": ["goal"]},
        "interval_steps": 2,
        "signals": {"budget": 2.0},
        "max_repeats": None,
    },
    "all_four": {
        "selector": "grad_norm",
        "keep_ratio": 0.6,
        "mixer": {"name": "dga", "targets": ["goal"], "rows_per_domain": 2},
        "weighter": "focal",
        "orderer": {"name": "sorting", "by": "selector"},
        "interval_steps": 3,
        "signals": {"pool_fraction": 0.7, "max_age_steps": 4},
    },
    "store": {
        "selector": {"name": "rds_plus", "targets": ["goal"]},
        "interval_steps": 2,
        "signals": {"store": "STORE"},
    },
    "rho": {"weighter": {"name": "rho", "reference": "MODEL", "warmup_steps": 1}},
    "ledger": {
        "mixer": {"name": "ledger", "targets": ["goal"]},
        "interval_steps": 2,
        "ledger": {"targets": ["goal"], "refresh_steps": 2, "target_rows": 3},
        "average_weights": {"last_steps": 3},
    },
    "greats": {
        "selector": {"name": "greats", "targets": ["goal"], "target_rows": 2},
        "interval_steps": 1,
        "candidate_batches": 2,
        "weighter": {"name": "loss", "warmup_steps": 1},
    },
}
ENGINES = {
    "one": (8, [*CASES]),
    "ddp": (4, [*CASES]),
    "zero3": (2, ["loss", "less", "odm", "budget"]),
    "fsdp2": (2, ["loss", "less", "odm", "budget"]),
    "moved": (3, ["loss", "odm", "all_four", "greats"]),
}
"""Share of the jobs, and the cases: a reference model, among others, needs whole parameters."""
KINDS = ("pass", "plan", "save", "file", "torn", "time")
_TIMED = ("seconds", "runtime", "per_second", "timestamp")

Chain = tuple[tuple[int, int], ...]
"""Legs of a run: ranks, and the step of the checkpoint at which the leg begins."""


@dataclass(frozen=True)
class Kill:
    """Where a leg is killed: at which rank's how manieth event of a kind."""

    kind: str
    rank: int
    share: float  # of the events that the unbroken run has
    delay: float  # seconds after the event, for 'torn'
    both: bool  # whether all ranks die at once


class Events:
    """Counts what a rank does, and kills it at one of these events."""

    def __init__(self, output: Path, kill: tuple[str, int, float] | None = None) -> None:
        self.counts, self.kill, self.output = Counter[str](), kill, f"{output}/"
        self.began = time.monotonic()

    def arm(self) -> None:
        from dataflex.signals.sweep import Sweep

        real = Sweep.turns

        def turns(sweep: Sweep, *args: Any) -> Iterator[Any]:
            for turn in real(sweep, *args):
                self.note("pass")
                yield turn

        Sweep.turns = turns
        sys.addaudithook(self.audited)
        if self.kill is not None and self.kill[0] == "time":
            signal.setitimer(signal.ITIMER_REAL, self.kill[2])

    def audited(self, event: str, args: tuple[Any, ...]) -> None:
        """Count changes of files below the output folder."""
        if event == "open":
            path, _, flags = args
            if not flags & (os.O_WRONLY | os.O_RDWR):
                return
        elif event in ("os.rename", "os.remove", "os.link", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"):
            path = args[1] if event in ("os.rename", "os.link") else args[0]
        else:
            return
        if not isinstance(path, str | os.PathLike) or not (name := os.fspath(path)).startswith(self.output):
            return
        inside = name[len(self.output) :]
        self.note("save" if inside.startswith("checkpoint-") else "plan" if inside.startswith("dataflex") else "file")
        self.note("torn")

    def note(self, kind: str) -> None:
        self.counts[kind] += 1
        if self.kill is not None and (kind, self.counts[kind]) == self.kill[:2]:
            if kind == "torn":  # SIGALRM ends the process wherever it then is, as SIGKILL would
                signal.setitimer(signal.ITIMER_REAL, self.kill[2])
            else:
                os.kill(os.getpid(), signal.SIGKILL)

    def told(self) -> dict[str, float]:
        return {**self.counts, "time": time.monotonic() - self.began}


def rank_job(config: Path, output: Path, kill: tuple[str, int, float] | None, told: Path) -> int:
    """Train one rank, killed where ``kill`` says, and leave what it counted."""
    from tests.distributed.driver import deepspeed_without_compiling, fsdp_on_cpu

    from dataflex.run import train_here

    os.chdir(output.parent)
    fsdp_on_cpu()
    deepspeed_without_compiling()
    events = Events(output, kill)
    events.arm()
    train_here([str(config)])
    told.write_text(json.dumps(events.told()))
    return 0


class Jobs:
    """Runs jobs of one seed; unbroken runs are made when they are first needed, and kept."""

    def __init__(self, folder: Path, limit: float) -> None:
        self.folder, self.limit = folder, limit
        self.model, self.data = tiny(folder)

    def mapping(self, engine: str, case: str, ranks: int, output: Path) -> dict[str, Any]:
        """The configuration of a leg; ranks and accumulation give the same global batch."""
        from tests.distributed.test_engines import engine_settings
        from tests.integration.conftest import base_settings

        text = json.dumps(CASES[case]).replace("STORE", f"{output}-store").replace("MODEL", str(self.model))
        tuned: dict[str, Any] = {"finetuning_type": "full"}
        if case in ("loss", "less"):
            tuned = {"finetuning_type": "lora", "lora_rank": 4, "lora_dropout": 0.1, "lora_target": "all"}
        if ranks > 1:
            tuned |= engine_settings("ddp" if engine == "moved" else engine, self.folder)
        return {
            **base_settings(self.model, self.data),
            "output_dir": str(output),
            "dataset": "alpha,beta",
            "disable_shuffling": False,
            "max_steps": STEPS,
            "save_strategy": "steps",
            "save_steps": SAVE_STEPS,
            "save_total_limit": None if engine == "moved" else 2,  # legs of twins begin at any checkpoint
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": RANKS_BATCH // ranks,
            "adam_epsilon": 1e-3,
            **tuned,
            "dynamic": json.loads(text),
        }

    def leg(self, mapping: dict[str, Any], ranks: int, kills: dict[int, tuple[str, int, float]], both: bool) -> str:
        """Run one leg; return ``killed``, ``done``, or what went wrong."""
        from tests.distributed.ranks import free_port

        from dataflex.checkpoints import find_resumable

        output = Path(mapping["output_dir"])
        newest = find_resumable(output)[0]
        mapping = mapping | ({"resume_from_checkpoint": True} if newest is not None else {})
        mapping = {key: value for key, value in mapping.items() if value is not None}
        config, log = output.with_name(f"{output.name}.json"), output.with_name(f"{output.name}.log")
        config.write_text(json.dumps(mapping))
        log.unlink(missing_ok=True)
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "ACCELERATE_TORCH_DEVICE": "cpu"}
        world |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        processes = []
        for rank in range(ranks):
            env = world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            told = output.with_name(f"{output.name}.counts{rank}")
            told.unlink(missing_ok=True)
            job = lambda rank=rank, told=told: rank_job(config, output, kills.get(rank), told)  # noqa: E731
            processes.append(fork(job, log, env))
        return self.watch(processes, log, both)

    def watch(self, processes: list[Forked], log: Path, both: bool) -> str:
        """Wait as torchrun's agent does: when a rank fails, the others get SIGTERM, and must end within 30 s."""
        until, failed = time.monotonic() + self.limit, False
        while any(process.poll() is None for process in processes):
            dead = any(process.code for process in processes)
            if dead and not failed:
                failed, until = True, time.monotonic() + 30
                for process in processes:
                    process.kill(signal.SIGKILL if both else signal.SIGTERM)
            if time.monotonic() > until:
                for process in processes:
                    process.kill()
                    process.wait(10)
                which = "a rank whose neighbour was killed" if failed else "a run"
                return f"{which} did not end:\n{log.read_text(errors='replace')[-3000:]}"
            time.sleep(0.005)
        codes = [process.code for process in processes]
        if any(code in (-signal.SIGKILL, -signal.SIGALRM) for code in codes):
            return "killed"
        return f"ended with {codes}:\n{log.read_text(errors='replace')[-3000:]}" if any(codes) else "done"

    def twin(self, engine: str, case: str, chain: Chain) -> Path:
        """Return the folder of the unbroken run of these legs."""
        while len(chain) > 1 and chain[-1][1] == 0:
            chain = chain[-1:]  # begun afresh
        place = self.folder / "twins" / engine / case / "-".join(f"{ranks}at{step}" for ranks, step in chain)
        if place.with_suffix(".ok").exists():
            return place
        for left in place.parent.glob(f"{place.name}*") if place.parent.exists() else ():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        place.parent.mkdir(parents=True, exist_ok=True)
        if len(chain) > 1:
            before, step = self.twin(engine, case, chain[:-1]), chain[-1][1]
            place.mkdir()
            for name in (f"checkpoint-{step}", "dataflex"):
                shutil.copytree(before / name, place / name)
        told = self.leg(self.mapping(engine, case, chain[-1][0], place), chain[-1][0], {}, both=False)
        if told != "done":
            raise RuntimeError(f"the unbroken run {place}: {told}")
        place.with_suffix(".ok").touch()
        return place

    def job(self, seed: int, number: int) -> dict[str, Any]:
        """Run one job: what it was, the kills that hit, and the problem, if any."""
        rng = random.Random(f"{seed}.{number}")
        engine = rng.choices([*ENGINES], [share for share, _ in ENGINES.values()])[0]
        case = rng.choice(ENGINES[engine][1])
        world = [1] if engine == "one" else [2, 1, 2] if engine == "moved" else [2]
        planned = len(world) - 1 if engine == "moved" else rng.choice([1, 1, 2, 3])
        kills = [
            Kill(rng.choice(KINDS), rng.randrange(2), rng.random(), rng.uniform(0, 0.003), rng.random() < 0.3)
            for _ in range(planned)
        ]
        output = self.folder / f"job-{number}"
        result: dict[str, Any] = {"engine": engine, "case": case, "kills": [], "problem": ""}
        try:
            chain = self.killed(engine, case, world, kills, output, result["kills"])
            result["chain"] = chain
            twin = self.twin(engine, case, chain)
            result["problem"] = "\n".join(differences(output, twin))
        except Exception as error:  # noqa: BLE001
            result["problem"] = f"{type(error).__name__}: {error}"
        if not result["problem"]:
            for left in self.folder.glob(f"job-{number}[.-]*"):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            shutil.rmtree(output)
        return result

    def killed(
        self, engine: str, case: str, world: list[int], kills: list[Kill], output: Path, hit: list[str]
    ) -> Chain:
        """Run and kill, again and again, then to the end; return the legs."""
        from dataflex.checkpoints import find_resumable

        for left in self.folder.glob(f"{output.name}*"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        chain: list[tuple[int, int]] = [(world[0], 0)]
        for index, kill in enumerate([*kills, None]):
            ranks = world[index % len(world)]
            newest = find_resumable(output)[0]
            if engine == "moved" and index:
                chain.append((ranks, int(newest.name.rpartition("-")[2]) if newest else 0))
            at: dict[int, tuple[str, int, float]] = {}
            rank = 0
            if kill is not None:
                rank = kill.rank % ranks
                at = {rank: self.place(engine, case, ranks, kill, rank)}
            told = self.leg(self.mapping(engine, case, ranks, output), ranks, at, kill is not None and kill.both)
            if told not in ("killed", "done"):
                raise RuntimeError(f"leg {index}, {kill}: {told}")
            if told == "done":  # the place is before the checkpoint that the leg went on from
                break
            assert kill is not None, "killed by somebody else"
            hit.append(kill.kind)
            readable(output)
        return tuple(chain)

    def place(self, engine: str, case: str, ranks: int, kill: Kill, rank: int) -> tuple[str, int, float]:
        """Return the event of a rank at which it is killed, in numbers of the unbroken run."""
        twin = self.twin(engine, case, ((ranks, 0),))
        counts = json.loads(twin.with_name(f"{twin.name}.counts{rank}").read_text())
        kind = kill.kind if counts.get(kill.kind) else "time"
        if kind == "time":
            return kind, 0, max(0.05, kill.share * counts["time"])
        return kind, 1 + int(kill.share * counts[kind]), kill.delay


def readable(output: Path) -> None:
    """What a kill leaves is read without an error, where a run has begun its record."""
    from dataflex.record.chosen import ROWS, chosen_table
    from dataflex.record.read import read_events

    if not (output / "dataflex" / "events.jsonl").exists():
        return
    steps = [event["step"] for event in read_events(output)]
    assert all(0 <= step <= STEPS for step in steps), steps
    if (output / "dataflex" / ROWS).exists():
        chosen_table(output)


def logged(run: Path) -> list[dict[str, Any]]:
    """The log of a run, without what is a time."""
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return [{k: v for k, v in entry.items() if not any(part in k for part in _TIMED)} for entry in history]


def served(run: Path) -> dict[str, list[Any]]:
    found = {}
    for path in sorted((run / "dataflex" / "plans").glob("*.npz")):
        with np.load(path) as arrays:
            found[path.name] = [(name, arrays[name].dtype.str, arrays[name].tobytes()) for name in sorted(arrays.files)]
    return found


def differences(run: Path, twin: Path) -> Iterator[str]:
    """Yield how a run that went on differs from the one that was never killed."""
    if left := [str(path) for path in (run / "dataflex").rglob(".*")]:
        yield f"unfinished files are left: {left}"
    ids = {json.loads(path.read_text())["run"] for path in run.glob("checkpoint-*/dataflex/manifest.json")}
    ids.add(json.loads((run / "dataflex" / "run.json").read_text())["run"])
    if len(ids) > 1:
        yield f"checkpoints of several runs are left: {ids}"
    ours, theirs = logged(run), logged(twin)
    if len(ours) != len(theirs):
        yield f"{len(ours)} logs, not {len(theirs)}"
    for one, two in zip(ours, theirs, strict=False):
        if changed := sorted(key for key in one.keys() | two.keys() if repr(one.get(key)) != repr(two.get(key))):
            told = ", ".join(f"{key} {one.get(key)} not {two.get(key)}" for key in changed)
            yield f"log of step {two.get('step')}: {told}"
            break
    plans, wanted = served(run), served(twin)
    if changed := sorted(name for name in plans.keys() | wanted.keys() if plans.get(name) != wanted.get(name)):
        yield f"plans differ: {changed}"
    newest = f"checkpoint-{STEPS}"
    found = [*twin.glob("*.safetensors"), *twin.glob(f"{newest}/pytorch_model_fsdp_*/*.distcp")]
    assert found, f"{twin} holds no weights"
    for pattern in ("optimizer*/*.distcp", "optimizer.pt", "rng_state*.pth"):
        found += twin.glob(f"{newest}/{pattern}")
    for name in ["dataflex/chosen.parquet", *sorted(path.relative_to(twin).as_posix() for path in found)]:
        if (run / name).read_bytes() != (twin / name).read_bytes():
            yield f"{name} differs"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line at the top."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=300, help="kills")
    parser.add_argument("--only", type=int, help="number of the one job to run")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no job is begun after these")
    parser.add_argument("--limit", type=float, default=180.0, help="seconds that a run may take")
    parser.add_argument("--out", type=Path, help="folder of results and findings (runs/kills-SEED)")
    options = parser.parse_args(arguments)
    until = time.monotonic() + 60 * options.minutes
    again = options.only is not None
    out = tempfile.mkdtemp() if again else options.out or f"runs/kills-{options.seed}"
    ledger = Ledger(Path(out).resolve(), {"kills": options.seed})
    prepare()
    jobs = Jobs(ledger.folder, options.limit)
    number = options.only if again else 0
    while again or sum(len(each["kills"]) for each in ledger.known.values()) < options.count:
        if time.monotonic() > until:
            break
        if number not in ledger.known:
            found = jobs.job(options.seed, number)
            ledger.add(number, found)
            if again:
                sys.stdout.write(f"{found} in {ledger.folder}\n")
            if found["problem"]:
                command = ["python", "-m", "benchmarks.soak.kills", "--seed", str(options.seed), "--only", str(number)]
                ledger.finding(number, command, f"{found}\n{found['problem']}")
        if again:
            break
        number += 1
    results = [*ledger.known.values()]
    engines = Counter(each["engine"] for each in results for _ in each["kills"])
    kinds = Counter(kind for each in results for kind in each["kills"])
    findings = sum(bool(each["problem"]) for each in results)
    told = "; ".join(", ".join(f"{n} {name}" for name, n in sorted(c.items())) for c in (engines, kinds))
    write = sys.stdout.write
    write(
        f"kills: seed {options.seed}, {len(results)} runs, {sum(kinds.values())} kills ({told}); {findings} findings\n"
    )
    return int(findings > 0)


if __name__ == "__main__":
    sys.exit(main())
