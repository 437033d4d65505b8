"""``dataflex mix msft``: trains in stages, and after each rolls back to where a domain was best and drops it.

mSFT (arXiv 2603.21606), from the authors' code: the domains that are left are trained on and evaluated again and again;
the one that is best first is the one that overfits first. The run goes on from the checkpoint of that evaluation
without it; where that is the last evaluation, from the end with all. The model of the best mean over all domains, of
all evaluations of all stages, is the result.

They look at accuracies, and take up weights alone, with a fresh Adam and a constant learning rate. Here held-out losses
are looked at, and a stage is a resumed run: optimizer, random states and the rows that each domain has served go on
(``on_change: extend``), under a constant rate too.

``stage-N.yaml`` and ``stage-N`` are the configuration and the run of a stage. They and their records are all the state
there is: decisions are made anew from them, so the same command goes on wherever it was stopped.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dataflex.checkpoints import find_resumable
from dataflex.config.args import LlamaFactoryArgs
from dataflex.config.build import method_block
from dataflex.config.load import load_mapping
from dataflex.config.schema import FLAT_KEYS, DynamicConfig
from dataflex.config.split import resolve
from dataflex.errors import ConfigError, DataError
from dataflex.mixing.runs import (
    configuration,
    digest_of_runs,
    finished,
    losses_by_step,
    refuse_another,
    say,
    train_unfinished,
    without_mixer,
    write_configurations,
)
from dataflex.mixing.swarm import natural_of
from dataflex.plan.proportions import read_proportions
from dataflex.printable import Answer, passing_on, plain, redacted
from dataflex.record.text import table
from dataflex.state import write_json

_RECORD = "msft.json"
_FORMAT = 1
_CONSTANT = ("constant", "constant_with_warmup")


def first_to_overfit(losses: Mapping[str, Sequence[float]]) -> tuple[str, int] | None:
    """Return the domain to drop and the evaluation to roll back to, or None where none is past its best.

    ``losses`` are the held-out losses of each domain that is trained on, one per evaluation of a stage. A domain's best
    evaluation is the first of its lowest ones; the earliest best one counts, of several domains the first by name. The
    last evaluation says that nothing is past its best yet.
    """
    best = {name: int(np.argmin(series)) for name, series in losses.items()}  # the first of equal ones
    name = min(best, key=lambda name: (best[name], name))
    return None if best[name] == len(losses[name]) - 1 else (name, best[name])


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A finished stage."""

    number: int  # from 1
    start: int  # optimizer steps before it
    end: int  # optimizer steps after it
    active: tuple[str, ...]  # domains that were trained on
    losses: Mapping[int, Mapping[str, float]]  # held-out losses of all domains, by step
    dropped: str | None  # the domain that is left out from here on
    keep: int  # the step whose checkpoint the next stage goes on from

    @property
    def best(self) -> tuple[float, int]:
        """Lowest mean loss over all domains, and its step."""
        return min((float(np.mean(list(found.values()))), step) for step, found in self.losses.items())


class Msft:
    """All stages of one ``dataflex mix msft``.

    ``mapping`` is the configuration of the run. Its ``max_steps`` are those of a stage, its ``eval_steps`` how often
    domains are evaluated; its mixer says in which proportions they are served while all are left.
    """

    def __init__(self, mapping: Mapping[str, Any], base_dir: Path, folder: Path, natural: str | None) -> None:
        flat = [key for key in mapping if key in FLAT_KEYS]
        if flat:
            raise ConfigError(f"{flat[0]}: flat keys cannot be used here; write a 'dynamic' block, or none")
        lf, dynamic = without_mixer(mapping, base_dir)
        check(lf, dynamic)
        self.folder, self.mapping, self.base_dir, self.plugins = folder, mapping, base_dir, dynamic.plugins
        self.every, self.steps = int(lf.eval_steps), int(lf.max_steps)
        self.block = {key: value for key, value in (mapping.get("dynamic") or {}).items() if key != "mixer"}
        self.shares = _shares(mapping.get("dynamic") or {}, natural, lf, dynamic, base_dir)
        self.served = tuple(name for name, share in self.shares.items() if share > 0)
        self.held_out = {name: name for name in self.shares}  # names of their held-out losses
        if dynamic.domains_are_sources and lf.eval_sets:
            self.held_out = dict(zip(lf.train_sets, lf.eval_sets, strict=True))
        self.config_digest = digest_of_runs(mapping, dynamic.plugins, natural=natural)
        refuse_another(
            folder / _RECORD, self.config_digest, "stages of another configuration or other overrides, data or models"
        )
        self.configure(1, 0, self.served)

    def config(self, number: int) -> Path:
        """Path of a stage's configuration."""
        return self.folder / f"stage-{number}.yaml"

    def output_dir(self, number: int) -> Path:
        """Folder of a stage's run."""
        return self.folder / f"stage-{number}"

    def checkpoint(self, number: int, step: int) -> Path:
        """Folder of a checkpoint of a stage's run."""
        return self.output_dir(number) / f"checkpoint-{step}"

    def configure(self, number: int, start: int, active: Sequence[str]) -> None:
        """Write a stage's configuration; that of the first one is checked."""
        left = {name: share if name in active else 0.0 for name, share in self.shares.items()}
        mixer = {"name": "static", "proportions": left}
        keys = {
            **self.mapping,
            "max_steps": start + self.steps,
            "do_eval": True,
            "save_strategy": "steps",
            "save_steps": self.every,
        }
        block = {**self.block, "on_change": "extend", "eval_by_domain": True, "mixer": mixer}
        config = configuration(keys, self.output_dir(number), f"stage-{number}", block, self.plugins)
        if number == 1:
            resolve(config, self.base_dir)
        write_configurations(self.folder, {self.config(number): config})
        write_json(self.folder / _RECORD, redacted({"format": _FORMAT, "config_digest": self.config_digest}))

    def train(self, number: int, start: Path | None) -> int:
        """Train a stage, from its own newest checkpoint or that of an earlier stage, and return the exit code."""
        newest, _ = find_resumable(self.output_dir(number))
        resumed = newest or start
        overrides = [] if resumed is None else [f"resume_from_checkpoint={resumed}"]
        is_finished = partial(finished, self.output_dir(number), evaluates=True)
        return train_unfinished(f"stage {number}", self.config(number), self.output_dir(number), is_finished, overrides)

    def stages(self, most: int) -> list[Stage] | int:
        """Go through at most ``most`` stages, training those that are not finished; or return an exit code."""
        done: list[Stage] = []
        number, start, active = 1, 0, self.served
        checkpoint: Path | None = None
        while number <= most and active:
            self.configure(number, start, active)
            code = self.train(number, checkpoint)
            if code:
                return code
            done.append(stage := self.decide(number, start, active))
            say(_told(stage))
            checkpoint = self.checkpoint(number, stage.keep)
            active = tuple(name for name in active if name != stage.dropped)
            number, start = number + 1, stage.keep
        return done

    def decide(self, number: int, start: int, active: tuple[str, ...]) -> Stage:
        """Return what a trained stage leads to."""
        end = start + self.steps
        found = losses_by_step(self.output_dir(number))
        expected = range(start + self.every, end + 1, self.every)
        sets = {name: self.held_out[name] for name in self.served}
        missing = [str(step) for step in expected if not set(sets.values()) <= found.get(step, {}).keys()]
        if missing:
            raise DataError(
                f"stage {number}: the record in {self.output_dir(number)} lacks held-out losses of "
                f"{', '.join(sets.values())} at step {', '.join(missing)}"
            )
        losses = {step: {name: _finite(found[step][at]) for name, at in sets.items()} for step in expected}
        verdict = first_to_overfit({name: [losses[step][name] for step in expected] for name in active})
        dropped, place = verdict or (None, len(expected) - 1)
        return Stage(
            number=number, start=start, end=end, active=active, losses=losses, dropped=dropped, keep=expected[place]
        )


def _finite(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def check(lf: LlamaFactoryArgs, dynamic: DynamicConfig) -> None:
    """Raise ``ConfigError``, with all problems, unless stages can be made of a configuration."""
    every = lf.eval_steps if isinstance(lf.eval_steps, int | float) else 0
    whole = every >= 1 and float(every).is_integer()
    rules = (
        (lf.do_train, "do_train: is not on"),
        (bool(lf.eval_dataset) or lf.val_size > 0, "eval_dataset: missing; name the held-out rows of each domain"),
        (
            not lf.eval_sets or not dynamic.domains_are_sources or len(lf.eval_sets) == len(lf.train_sets),
            "eval_dataset: name a held-out set for each set of 'dataset', in the same order",
        ),
        (lf.max_steps > 0, "max_steps: missing; it is the number of steps of a stage"),
        (
            str(lf.eval_strategy) == "steps" and whole,
            "eval_steps: set 'eval_strategy: steps' and a whole number of steps; a quarter of an epoch is usual",
        ),
        (
            not whole or lf.max_steps % every == 0,
            f"max_steps: {lf.max_steps} is not a multiple of 'eval_steps', so that a stage would end unevaluated",
        ),
        (
            str(lf.lr_scheduler_type) in _CONSTANT,
            f"lr_scheduler_type: {lf.lr_scheduler_type} depends on the number of steps, which stages change; set "
            "'constant' or 'constant_with_warmup'",
        ),
        (lf.save_total_limit is None, "save_total_limit: remove it; a stage may go back to any of its checkpoints"),
        (not lf.save_only_model, "save_only_model: remove it; stages go on from checkpoints with their optimizer"),
        (not lf.load_best_model_at_end, "load_best_model_at_end: remove it; the best model is chosen over all stages"),
        (dynamic.resume_plan != "ignore", "dynamic.resume_plan: remove it; stages keep what was served"),
    )
    problems = [told for holds, told in rules if not holds]
    if problems:
        raise ConfigError(problems)


def _shares(
    block: Mapping[str, Any], natural: str | None, lf: LlamaFactoryArgs, dynamic: DynamicConfig, base_dir: Path
) -> dict[str, float]:
    """Return the proportions of all domains: those of a static mixer, or natural ones."""
    problems: list[str] = []
    mixer = block.get("mixer", "size")
    name = mixer.get("name") if isinstance(mixer, Mapping) else mixer
    if name == "static" and isinstance(mixer, Mapping) and {"proportions", "from"} & mixer.keys():
        method_block("mixer", mixer, "dynamic.mixer", problems)
        if problems:
            raise ConfigError(problems)
        given = mixer.get("proportions")
        if given is None:
            given = read_proportions(mixer["from"], "dynamic.mixer.from").by_name
        sizes = {str(domain): float(share) for domain, share in given.items()}
    elif name == "size":
        sizes, _ = natural_of(natural, lf, dynamic, base_dir)
    else:
        raise ConfigError(
            "dynamic.mixer: stages serve fixed proportions; leave the mixer out (by size), or write 'mixer: {name: "
            "static, proportions: {...}}' or '{name: static, from: FILE}'"
        )
    if sum(size > 0 for size in sizes.values()) < 2:
        raise ConfigError("dataset: stages drop domains, so at least two are needed")
    return sizes


def _told(stage: Stage) -> str:
    """Return what a stage led to, with the mean of its losses."""
    rows = [["step", *stage.active, "mean over all"]]
    for step, found in stage.losses.items():
        rows.append(
            [str(step), *(f"{found[name]:.4f}" for name in stage.active), f"{np.mean(list(found.values())):.4f}"]
        )
    led = (
        f"no domain is past its best; on from step {stage.keep} with all"
        if stage.dropped is None
        else f"{stage.dropped} was best first; back to step {stage.keep}, and on without it"
    )
    return "\n".join([f"stage {stage.number}, held-out losses:", *table(rows, ">" * len(rows[0])), f"  {led}"])


def msft_step(options: argparse.Namespace) -> Answer | int:
    """Run the stages that are not done yet and return what to print, or the exit code of a run that failed."""
    if options.stages < 1:
        raise ConfigError(f"--stages: must be at least 1, found {options.stages}")
    mapping = load_mapping(options.config, options.overrides)
    folder = options.out or mapping.get("output_dir")
    if not folder:
        raise ConfigError("--out: missing, and the configuration has no output_dir; name a folder for all stages")
    runs = Msft(mapping, options.config.absolute().parent, Path(folder), options.natural)
    with passing_on(mapping):
        stages = runs.stages(options.stages)
    if isinstance(stages, int):
        return stages
    best = min(stages, key=lambda stage: stage.best)
    loss, step = best.best
    checkpoint = runs.checkpoint(best.number, step)
    values: dict[str, Any] = {
        "stages": [
            {**asdict(stage), "losses": {str(at): dict(x) for at, x in stage.losses.items()}} for stage in stages
        ],
        "checkpoint": str(checkpoint),
        "mean_loss": loss,
    }
    body = {"format": _FORMAT, "config_digest": runs.config_digest, **values}
    write_json(runs.folder / _RECORD, redacted(plain(body)))
    left = [name for name in stages[-1].active if name != stages[-1].dropped]
    lines = [
        f"{len(stages)} stages; left: {', '.join(left) or 'no domain'}",
        f"the best model, by the mean held-out loss of all domains ({loss:.4f}), is {checkpoint}",
    ]
    return Answer("\n".join(lines), {"out": runs.folder, **values})
