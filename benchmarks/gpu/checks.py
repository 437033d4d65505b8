"""The checks: each takes the run's ``Setting``, and says whether it passed (None: only measured) and what it found."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from benchmarks.gpu.shapes import IGNORE, Bench, Shape
from torch.profiler import ProfilerActivity, profile

from dataflex import Session
from dataflex.signals.gradients.consumers import Dots
from dataflex.signals.gradients.engine import GradientEngine
from dataflex.signals.gradients.precondition import PRESETS, moments_of, preconditioner
from dataflex.signals.gradients.scorers import TargetBuilder
from dataflex.signals.kinds import Embedding, GradientNorms, GradientScores, TokenLoss
from dataflex.signals.losses import token_cross_entropy

Values = dict[str, Any]
SYNCS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "aten::_local_scalar_dense")
"""What the profiler calls the places at which the processor waits for the device; the last one also on a CPU."""


@dataclass(frozen=True)
class Setting:
    """The device, the models' shapes, and how much is measured."""

    device: torch.device
    shapes: dict[str, Shape]
    toy: bool

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    def judged(self, good: bool) -> bool | None:
        """Return whether a goal of time or memory is met; toy models say nothing about it."""
        return None if self.toy else good

    def bench(self, name: str, **settings: Any) -> Bench:
        return Bench(self.shapes[name], self.device, **settings)


@contextmanager
def exact_products() -> Iterator[None]:
    """Multiply fp32 matrices in fp32, not in tf32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


SIGNALS = {
    "losses": TokenLoss(),
    "gradient norms": GradientNorms(),
    "LESS scores": GradientScores(targets=("goal",)),
    "embeddings": Embedding(),
}


def scored(bench: Bench, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Return the signals of rows, through a session."""
    session = bench.session({"selector": {"name": "less", "targets": ["goal"]}, "interval_steps": 1}, 1)
    runner = session.controller.signals
    runner.begin(1)
    found = {name: np.asarray(runner(signal, rows), dtype=np.float64) for name, signal in SIGNALS.items()}
    session.close()
    return found


def taught(bench: Bench, steps: int = 3) -> Bench:
    for step in range(steps):
        bench.static_step(step)
    return bench


def like(source: Bench, device: torch.device, **settings: Any) -> Bench:
    """Return a bench of the same weights and moments elsewhere."""
    other = Bench(source.shape, device, pool=source.pool, eps=source.eps, **settings)
    other.model.load_state_dict(source.model.state_dict())
    other.optimizer.load_state_dict(source.optimizer.state_dict())
    return other


def scores_fp32(setting: Setting) -> tuple[bool, Values]:
    """Scores on the device against those on a CPU in float64, all of them of the same weights and moments."""
    with exact_products():
        ours = taught(setting.bench("160m", pool=16, eps=1e-6))
        rows = np.arange(16)
        found = scored(ours, rows)
        reference = like(ours, torch.device("cpu"), dtype=torch.float64)
        wanted = scored(reference, rows)
    ours.close()
    values = {name: float(np.abs(found[name] - wanted[name]).max() / np.abs(wanted[name]).max()) for name in SIGNALS}
    return max(values.values()) <= 1e-4, {f"{name}, largest relative difference": v for name, v in values.items()}


def ranks(values: np.ndarray) -> np.ndarray:
    return values.argsort(kind="stable").argsort(kind="stable").astype(np.float64)


def scores_bf16(setting: Setting) -> tuple[bool, Values]:
    """Order of the rows by scores in bf16 against that in fp32, on the device."""
    count = 32 if setting.toy else 256
    with exact_products():
        exact = taught(setting.bench("160m", pool=count, eps=1e-6))
        wanted = scored(exact, np.arange(count))
        rough = like(exact, setting.device, bf16=True)
        found = scored(rough, np.arange(count))
    values = {}
    for name in ("losses", "gradient norms", "LESS scores"):
        both = ranks(found[name].ravel()), ranks(wanted[name].ravel())
        values[f"{name}, Spearman"] = float(np.corrcoef(*both)[0, 1])
        apart = float(np.abs(found[name] - wanted[name]).max() / np.abs(wanted[name]).max())
        values[f"{name}, largest relative difference"] = apart
    exact.close()
    rough.close()
    least = min(value for name, value in values.items() if "Spearman" in name)
    return least >= 0.999 and max(values.values()) > 1e-5, {**values, "rows": count}  # not in fp32 by mistake


def turns(bench: Bench, actions: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Return the median seconds of actions that take turns, after one turn that does not count."""
    found: dict[str, list[float]] = {name: [] for name in actions}
    for repeat in range(repeats + 1):
        for name in actions if repeat % 2 else reversed(actions):
            taken = bench.seconds(actions[name])
            if repeat:
                found[name].append(taken)
    return {name: statistics.median(each) for name, each in found.items()}


class Less:
    """The pass that LESS makes over a batch, and a plain forward and backward pass over the same."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.engine = GradientEngine(bench.model, autocast=bench.autocast)
        self.direction = preconditioner(PRESETS["true_adam"], moments_of(bench.optimizer, self.engine.parameters))
        builder = TargetBuilder(self.engine, ["target"])
        builder.add(bench.batch([0, 1, 2, 3], bench.targets), torch.zeros(4, dtype=torch.int64))
        self.dots = Dots(builder.finish())
        self.batch = bench.batch([*range(bench.shape.rows)])

    def score(self) -> torch.Tensor:
        return self.engine.run(self.batch, [self.dots], precondition=self.direction)["dots"]

    def plain(self) -> None:
        self.bench.own_loss(self.batch).backward()
        self.bench.optimizer.zero_grad(set_to_none=True)


def less_cost(setting: Setting) -> tuple[bool | None, Values]:
    """Seconds of an exact LESS pass over those of the model's own forward and backward pass, in bf16."""
    values, repeats = {}, 2 if setting.toy else 7
    for name in ("160m", "410m", "1b"):
        bench = taught(setting.bench(name, bf16=True), 2)
        less = Less(bench)
        with less.engine.observing():
            taken = turns(bench, {"less": less.score, "plain": less.plain}, repeats)
        values[f"{name}, LESS over forward and backward"] = taken["less"] / taken["plain"]
        del less
        bench.close()
    return setting.judged(max(values.values()) <= 1.10), values


BLOCKS = {
    "selection": {"selector": "random", "interval_steps": 1000},
    "mixture and weights": {"mixer": "odm", "weighter": "focal", "interval_steps": 1000},
    "in-run LESS": {
        "selector": {"name": "less", "targets": ["goal"]},
        "signals": {"budget": 2.0},
        "max_repeats": None,
        "interval_steps": 1000,
    },
}


def seconds_per_token(bench: Bench, session: Session | None, steps: int) -> float:
    """Return the median seconds of a step over its tokens, of the static loop or of a session's, after two steps."""
    found = []
    for step in range(steps + 2):
        tokens = 0

        def take(step: int = step) -> None:
            nonlocal tokens
            tokens = bench.static_step(step) if session is None else bench.dynamic_step(session, step)

        taken = bench.seconds(take)
        if step >= 2:  # the first decides, and warms up
            found.append(taken / tokens)
    return statistics.median(found)


def paced(setting: Setting, name: str, blocks: tuple[str, ...], steps: int) -> tuple[float, dict[str, float]]:
    """Return tokens a second of the static loop, measured before and after the others, and how much longer they take.

    Each has the model for itself: a session that listens to training steps has hooks on it.
    """
    bench = setting.bench(name, bf16=True)
    static, found = [seconds_per_token(bench, None, steps)], {}
    for block in blocks:
        session = bench.session(BLOCKS[block], steps + 2)
        found[block] = seconds_per_token(bench, session, steps)
        session.close()
        del session
    static.append(seconds_per_token(bench, None, steps))
    bench.close()
    median = statistics.mean(static)
    return 1 / median, {block: seconds / median for block, seconds in found.items()}


def step_time(setting: Setting) -> tuple[bool | None, Values]:
    """A dynamic step over a static one, by token, without what decisions take."""
    steps, values = 3 if setting.toy else 40, {}
    for name in ("160m", "410m"):
        _, ratios = paced(setting, name, (*BLOCKS,), steps)
        values |= {f"{name}, {block} over static": ratio for block, ratio in ratios.items()}
    limits = {"selection": 1.02, "mixture and weights": 1.05, "in-run LESS": 1.30}
    good = all(ratio <= limits[name.split(", ")[1].removesuffix(" over static")] for name, ratio in values.items())
    return setting.judged(good), values


def throughput(setting: Setting) -> tuple[None, Values]:
    """Tokens a second, padding included, of a static and of a dynamic loop."""
    values: Values = {}
    for name in setting.shapes:
        rate, ratios = paced(setting, name, ("selection",), 1 if setting.toy else 12)
        values[f"{name}, static, tokens a second"] = rate
        values[f"{name}, selection, tokens a second"] = rate / ratios["selection"]
    return None, values


def waits(bench: Bench, block: str | None, accumulation: int, steps: int) -> int:
    """Return how often the processor waits for the device in some steps, by the profiler's record."""
    session = bench.session(BLOCKS[block], steps + 1, accumulation) if block else None

    def take(step: int) -> None:
        if session is None:
            bench.static_step(step, accumulation)
        else:
            bench.dynamic_step(session, step)

    take(0)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if bench.device.type == "cuda" else [])]
    with profile(activities=activities) as record:
        for step in range(1, steps + 1):
            take(step)
        bench.synchronize()
    if session is not None:
        session.close()
    return sum(event.name() in SYNCS for event in record.profiler.kineto_results.events())


def synchronizations(setting: Setting) -> tuple[bool, Values]:
    """Waits that a micro-batch adds: those of four in a step less those of two, less the same of the static loop."""
    bench, steps, values = setting.bench("160m", bf16=True), 2, {}
    try:
        static = [waits(bench, None, accumulation, steps) for accumulation in (2, 4)]
        for block in BLOCKS:
            found = [waits(bench, block, accumulation, steps) for accumulation in (2, 4)]
            values[f"{block}, waits a micro-batch adds"] = (found[1] - found[0] - static[1] + static[0]) / 2 / steps
        values["static, waits of a micro-batch"] = (static[1] - static[0]) / 2 / steps
    finally:
        bench.close()
    # On a CPU, where nothing waits, weights are looked at in each micro-batch.
    told = [values[f"{block}, waits a micro-batch adds"] for block in BLOCKS if setting.gpu or "weights" not in block]
    return max(told) <= 0, values


def held(bench: Bench) -> float:
    """Return the MiB that are allocated on a GPU; 0 on a CPU."""
    return torch.cuda.memory_allocated() / 2**20 if bench.device.type == "cuda" else 0.0


def peak(bench: Bench, action: Callable[[], Any]) -> float:
    """Return the largest memory in MiB that was held at once during an action, above what was held before."""
    if bench.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        action()
    now = most = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most / 2**20


def loss_kernels(setting: Setting) -> tuple[bool | None, Values]:
    """The chunked loss against torch's and, if it is installed, Liger's: time, memory, and the same gradient."""
    bench = setting.bench("160m")
    tokens = 256 if setting.toy else 8192
    dtype = torch.float32 if setting.device.type == "cpu" else torch.bfloat16
    generator = torch.Generator(setting.device).manual_seed(0)
    logits = torch.randn(
        tokens, bench.shape.vocabulary, device=setting.device, dtype=dtype, generator=generator, requires_grad=True
    )
    labels = torch.randint(bench.shape.vocabulary, (tokens,), device=setting.device, generator=generator)
    labels[::4] = IGNORE
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "ours": lambda: token_cross_entropy(logits, labels)[0].sum(),
        "torch": lambda: F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="sum"),
    }
    try:
        from liger_kernel.transformers.functional import liger_cross_entropy

        # Liger writes the gradient over its input, so it is given a copy.
        liger = lambda: liger_cross_entropy(logits.clone(), labels, reduction="sum")  # noqa: E731
        liger().backward()
        ways["Liger"], absent = liger, ""
    except Exception as error:  # noqa: BLE001
        absent = "not installed" if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"

    def both(way: Callable[[], torch.Tensor]) -> torch.Tensor:
        logits.grad = None
        loss = way()
        loss.backward()
        return loss.detach()

    values: Values = {"tokens": tokens, "vocabulary": bench.shape.vocabulary}
    taken = turns(bench, {name: lambda way=way: both(way) for name, way in ways.items()}, 2 if setting.toy else 20)
    both(ways["torch"])
    wanted = logits.grad.float()
    for name, way in ways.items():
        values[f"{name}, ms"] = 1e3 * taken[name]
        logits.grad = None
        values[f"{name}, peak MiB"] = peak(bench, lambda way=way: both(way))
        values[f"{name}, relative difference of the gradient"] = float(
            (logits.grad.float() - wanted).norm() / wanted.norm()
        )
    if absent:
        values["Liger"] = absent
    bench.close()
    return setting.judged(values["ours, peak MiB"] <= values["torch, peak MiB"]), values


def less_memory(setting: Setting) -> tuple[bool | None, Values]:
    """Peak memory of a LESS pass over a micro-batch of the 7B model with adapters, and of a training step on it."""
    bench = taught(setting.bench("7b-lora", bf16=True, pool=16), 2)
    training = peak(bench, lambda: bench.static_step(0))
    before = held(bench)
    less = Less(bench)
    own = held(bench) - before  # the target's vector, which scoring needs beside what its passes take
    with less.engine.observing():
        less.score()
        scoring = own + peak(bench, less.score)
    parameters = sum(p.numel() for p in bench.model.parameters())
    del less
    bench.close()
    values = {
        "training step, peak MiB above the model": training,
        "LESS pass, peak MiB above the model": scoring,
        "parameters": parameters,
    }
    return setting.judged(scoring <= training), values


CHECKS: dict[str, tuple[Callable[[Setting], tuple[bool | None, Values]], float, str]] = {
    "scores_fp32": (scores_fp32, 60, "Largest relative difference at most 1e-4."),
    "scores_bf16": (scores_bf16, 40, "Spearman at least 0.999."),
    "synchronizations": (synchronizations, 40, "A micro-batch adds none."),
    "less_memory": (less_memory, 60, "LESS needs at most what a training step needs."),
    "less_cost": (less_cost, 80, "At most 1.10."),
    "step_time": (step_time, 100, "At most 1.02 for selection, 1.05 for mixture and weights, 1.30 for in-run LESS."),
    "loss_kernels": (loss_kernels, 20, "No more memory than torch's."),
    "throughput": (throughput, 90, ""),
}
"""By name: the check, the seconds that it may need at full scale on a large GPU, and the goal."""


def run(name: str, setting: Setting) -> dict[str, Any]:
    """Run one check; one that fails is told, and the others go on."""
    check, _, goal = CHECKS[name]
    began = time.perf_counter()
    try:
        passed, values = check(setting)
        problem = ""
    except Exception as error:  # noqa: BLE001
        passed, values, problem = False, {}, f"{type(error).__name__}: {error}"
    gc.collect()  # models lie in cycles
    if setting.gpu:
        torch.cuda.empty_cache()
    return {
        "name": name,
        "what": (check.__doc__ or "").strip(),
        "goal": goal,
        "passed": passed,
        "seconds": round(time.perf_counter() - began, 2),
        "values": values,
        "problem": problem,
    }
