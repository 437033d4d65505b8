"""Records that look like those of real runs, made without one."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from dataflex.plan.domains import Domains
from dataflex.plan.schedule import Interval
from dataflex.record.recorder import RunRecorder

BATCH = 16
FINGERPRINT = "9f86d081884c7d65"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the recorder looks at of a plan."""

    interval: Interval
    rows: np.ndarray

    def digest(self) -> str:
        return hashlib.sha256(self.rows.tobytes()).hexdigest()[:16]


class Spent:
    """A clock that a test sets."""

    def __init__(self, **seconds: float) -> None:
        self.seconds = seconds

    def add(self, **seconds: float) -> None:
        for phase, more in seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + more

    def spent(self) -> dict[str, float]:
        return dict(self.seconds)


def tick(monkeypatch, seconds: float = 1.0, begin: float = 1.7e9) -> None:
    """Make every event ``seconds`` later than the one before it."""
    now = [begin - seconds]

    def clock() -> float:
        now[0] += seconds
        return now[0]

    monkeypatch.setattr("dataflex.record.recorder.time", SimpleNamespace(time=clock))


def started(recorder: RunRecorder, *, dynamic: dict, sources: dict[str, int], schedule: dict) -> None:
    recorder.run_started(
        config={
            "model_name_or_path": "models/base-4m",
            "stage": "sft",
            "finetuning_type": "lora",
            "dataset": ",".join(sources),
            "learning_rate": 1e-4,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "seed": 42,
            "dynamic": dynamic,
        },
        schedule=schedule,
        row_space={"fingerprint": FINGERPRINT, "sources": sources, "domains": sources, "tokens": 1_234_567},
        versions={"dataflex": "0.1.0", "llamafactory": "0.9.5", "transformers": "5.6.0"},
        world=2,
        global_batch=BATCH,
    )


def space_of(sources: dict[str, int]) -> SimpleNamespace:
    """What the recorder looks at of a row space."""
    domains = Domains.from_sizes(list(sources), list(sources.values()))
    size = sum(sources.values())
    lengths = np.arange(size) % 50 + 8
    return SimpleNamespace(
        sources=sources,
        domains=domains,
        lengths=lengths,
        supervised=lengths // 2,
        keys=np.arange(size),
        num_rows=size,
        fingerprint=FINGERPRINT,
        columns={},
        origins=None,
    )


def intervals(total_steps: int, warmup_steps: int, interval_steps: int) -> list[Interval]:
    starts = [0] * bool(warmup_steps) + list(range(warmup_steps, total_steps, interval_steps))
    stops = [*starts[1:], total_steps]
    return [
        Interval(index=at, kind="warmup" if stop <= warmup_steps else "dynamic", start_step=first, stop_step=stop)
        for at, (first, stop) in enumerate(zip(starts, stops, strict=True))
    ]


def simulate(
    directory: Path,
    *,
    sources: dict[str, int],
    dynamic: dict | None = None,
    total_steps: int = 100,
    interval_steps: int = 10,
    warmup_steps: int = 10,
    stop_step: int | None = None,
    resume_step: int | None = None,
    scored: bool = False,
    mixed: bool = False,
    weighted: bool = False,
    logging_steps: int = 1,
    save_steps: int = 20,
) -> None:
    """Record a run from ``resume_step`` (or the start) until ``stop_step`` (killed) or its end.

    What is recorded of a step depends on the step alone, as in a run that resumes exactly.
    """
    clock = Spent(startup=4.0)
    recorder = RunRecorder(directory, resume_step, clock=clock)
    if resume_step is None:
        schedule = {"warmup_steps": warmup_steps, "interval_steps": interval_steps, "total_steps": total_steps}
        started(recorder, dynamic=dynamic or {}, sources=sources, schedule=schedule)
    else:
        recorder.resumed(resume_step, f"out/checkpoint-{resume_step}")
    done = resume_step or 0
    plans = {interval.start_step: interval for interval in intervals(total_steps, warmup_steps, interval_steps)}
    for step in range(done + 1, total_steps + 1):
        if step - 1 in plans:
            clock.add(decide=0.25, **({"signals": 3.2} if scored else {}))
            record_plan(recorder, plans[step - 1], sources, scored=scored, mixed=mixed, total_steps=total_steps)
        if stop_step is not None and step > stop_step:
            return
        rng = np.random.default_rng([1, step])
        if step % logging_steps == 0:
            logs = {"loss": 1.1 + 1.4 * np.exp(-step / total_steps * 3) + rng.normal(0, 0.06), "learning_rate": 1e-4}
            if weighted:
                logs |= {"dataflex/weight_ess": rng.uniform(0.6, 0.9), "dataflex/weight_max": 2 + rng.uniform()}
                logs |= {"dataflex/weight_p05": 0.3, "dataflex/weight_p50": 0.9, "dataflex/weight_p95": 1.8}
                logs |= {"dataflex/plain_loss": logs["loss"] + 0.1}
            clock.add(train=0.8 * logging_steps)
            recorder.stepped(step, logs)
        if step % save_steps == 0:
            loss = 1.3 + np.exp(-step / total_steps * 3) + 0.003 * max(step - 0.7 * total_steps, 0)
            clock.add(evaluate=1.5, checkpoint=0.5)
            recorder.evaluated(step, {"eval_loss": loss, "eval_runtime": 1.5, "eval_samples_per_second": 50.0})
            recorder.checkpointed(step, f"out/checkpoint-{step}", 0.5)
    recorder.finished(total_steps, {"train_loss": 1.6, "train_runtime": 100.0}, {"train": 80.0, "startup": 4.0})


def record_plan(
    recorder: RunRecorder, interval: Interval, sources: dict[str, int], *, scored: bool, mixed: bool, total_steps: int
) -> None:
    rng = np.random.default_rng([0, interval.index])
    names, sizes = list(sources), np.array(list(sources.values()))
    pool, dynamic = int(sizes.sum()), interval.kind == "dynamic"
    scores, proportions = None, sizes / pool
    if mixed and dynamic:
        tilt = np.linspace(-1.5, 1.5, len(names)) * interval.start_step / total_steps
        proportions = proportions**0.6 * np.exp(tilt)
        proportions /= proportions.sum()
    weight = np.repeat(proportions / sizes, sizes)
    if scored and dynamic:
        hardness = np.repeat(np.linspace(1.6, 0.8, len(names)), sizes) + rng.gumbel(0, 0.35, pool)
        scores = hardness * np.exp(-interval.start_step / total_steps * 0.5)
        scores[::50] = np.nan
        weight = np.where(np.isnan(scores), 0, np.exp(2 * np.nan_to_num(scores)))
    count = interval.steps * BATCH
    rows = rng.choice(pool, size=count, replace=count > pool // 2, p=weight / weight.sum())
    domain = np.searchsorted(np.cumsum(sizes), rows, side="right")
    recorder.planned(
        plan=Plan(interval=interval, rows=rows),
        domain_counts={name: int((domain == at).sum()) for at, name in enumerate(names)},
        seconds={"signals": 3.2, "decide": 0.25} if scores is not None else {"signals": 0.0, "decide": 0.25},
        reason="synthetic",
        proportions=dict(zip(names, proportions.tolist(), strict=True)) if mixed else None,
        scores=scores,
        kept=None if scores is None else np.argsort(-np.nan_to_num(scores), kind="stable")[:count],
    )


SELECTION: dict = {
    "dynamic": {"warmup_steps": 10, "interval_steps": 10, "selector": {"name": "loss", "band": 0.5}},
    "sources": {"alpaca_en": 999, "gsm8k": 2400, "code": 1500, "identity": 91},
    "scored": True,
}
MIXTURE: dict = {
    "dynamic": {"mixer": {"name": "staged", "stages": [{"start": 0, "proportions": [0.5, 0.5]}]}, "selector": "all"},
    "sources": {
        f"{at:02d}_{name}": 4000 // (at + 1)
        for at, name in enumerate(
            "web code math books wiki arxiv forum news law patents chat recipes poems a_rather_long_name t m".split()
        )
    },
    "total_steps": 600,
    "interval_steps": 25,
    "warmup_steps": 50,
    "save_steps": 60,
    "mixed": True,
}
WEIGHTING: dict = {
    "dynamic": {"weighter": {"name": "loss", "strategy": "linupper"}},
    "sources": {"\u6570\u5b66": 300, "_code$x$": 700},
    "weighted": True,
    "warmup_steps": 0,
    "interval_steps": 100,
    "logging_steps": 5,
}
