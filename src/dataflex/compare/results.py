"""What the runs of a suite came to: metrics and costs, differences between arms, and the verdict on each claim."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dataflex.compare.running import Job, changed, evaluated
from dataflex.compare.statistics import difference, holm
from dataflex.compare.suite import Claim, Suite
from dataflex.errors import DataError, did_you_mean
from dataflex.record.curves import AGGREGATES, at_compute, seconds_at, tokens_at
from dataflex.record.digest import Curve, Run, higher_is_better
from dataflex.record.recorded import recorded

HELD, NOT_HELD, NOT_DECIDED = "held", "not held", "not decided"
_SHOWN = 6  # metrics that are shown where a suite names none


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One finished run."""

    job: Job
    run: Run
    metrics: Mapping[str, float]  # at its end
    curves: Mapping[str, Curve]  # of the Trainer's evaluations, over steps

    @cached_property
    def computes(self) -> Curve:
        """Compute, decisions included, over steps."""
        logged = {e["step"]: e["compute"] for e in self.run.stepped if e.get("compute") is not None}
        return sorted({0: 0.0, **logged, self.run.steps_done: self.compute}.items())

    @property
    def compute(self) -> float:
        """Compute of the whole run."""
        return float((self.run.finished or {}).get("compute") or 0.0)

    @property
    def passes(self) -> Mapping[str, float]:
        """Passes by phase."""
        return (self.run.finished or {}).get("passes") or {}

    @cached_property
    def scales(self) -> dict[str, Curve]:
        """What was spent over steps: tokens, compute and seconds; those that the record has."""
        found = {"tokens": tokens_at(self.run), "compute": self.computes, "seconds": seconds_at(self.run)}
        return {name: curve for name, curve in found.items() if len(curve) > (name == "compute")}

    def over(self, metric: str, scale: str) -> list[tuple[float, float]]:
        """Return a metric's curve over a scale, or over steps."""
        curve = self.curves.get(metric, [])
        if scale == "steps":
            return [(float(step), value) for step, value in curve]
        if scale not in self.scales:
            return []
        xs, ys = zip(*self.scales[scale], strict=True)
        return [(float(np.interp(step, [0, *xs], [0.0, *ys])), value) for step, value in curve]


@dataclass(kw_only=True)
class Results:
    """The runs of a suite that are there, and what is said of them."""

    suite: Suite
    outcomes: dict[tuple[str, int, int], Outcome]  # by arm, number of steps and seed
    missing: list[str] = field(default_factory=list)  # runs that failed or are not there, one line each
    changed: list[str] = field(default_factory=list)  # what changed while the suite ran

    @property
    def metrics(self) -> list[str]:
        """Metrics that tables show."""
        if self.suite.settings.metrics:
            return list(self.suite.settings.metrics)
        known = dict.fromkeys(name for each in self.outcomes.values() for name in each.metrics)
        claims = [claim.metric for claim in self.suite.claims]
        first = [] if claims else [name for name in AGGREGATES if name in known][:1]
        mine = [name for name in known if not name.startswith("eval_") and "/" not in name]
        return [*dict.fromkeys([*first, *claims, *mine])][:_SHOWN]

    def at_end(self, arm: str, metric: str) -> dict[int, float]:
        """Return an arm's values after the suite's steps, by seed."""
        found = {seed: self.outcomes.get((arm, self.suite.steps, seed)) for seed in self.suite.seeds}
        return {seed: each.metrics[metric] for seed, each in found.items() if each and metric in each.metrics}

    def at_compute_of(self, arm: str, other: str, metric: str) -> tuple[dict[int, float], list[str]]:
        """Return the values of ``other`` at the compute of each run of ``arm``, by seed, and why some are missing."""
        values, notes = {}, []
        for seed in self.at_end(arm, metric):
            compute = self.outcomes[arm, self.suite.steps, seed].compute
            points = self._points(other, seed, metric)
            value = at_compute(points, compute)
            if value is not None:
                values[seed] = value
            else:
                most = max((x for x, _ in points), default=0.0)
                notes.append(f"seed {seed}: {other} ends at {most / compute:.2f} of the compute of {arm}")
        return values, notes

    def _points(self, arm: str, seed: int, metric: str) -> list[tuple[float, float]]:
        """Return (compute, value): ends of an arm's runs; under a constant learning rate the longest one's curve."""
        every = [each for (name, _, s), each in sorted(self.outcomes.items()) if (name, s) == (arm, seed)]
        longest = every[-1].over(metric, "compute") if every and self.suite.constant else []
        ends = [(each.compute, each.metrics[metric]) for each in every if metric in each.metrics]
        return longest if longest else ends

    def compared(self, metric: str, at: str) -> list[dict[str, Any]]:
        """Return a line for each arm: its values, and their differences to the baseline, corrected over arms."""
        lines = []
        for arm in self.suite.arms:
            mine = self.at_end(arm, metric)
            line = {"metric": metric, "at": at, "arm": arm, **_spread(list(mine.values())), "p_holm": None}
            if arm != self.suite.baseline:
                line |= self._against(arm, self.suite.baseline, metric, at)
            lines.append(line)
        tests = [line for line in lines if line["arm"] != self.suite.baseline]
        for line, p in zip(tests, holm([line["p"] for line in tests]), strict=True):
            line["p_holm"] = p
        return lines

    def _against(self, arm: str, other: str, metric: str, at: str) -> dict[str, Any]:
        mine, notes = self.at_end(arm, metric), list[str]()
        theirs = self.at_end(other, metric)
        if at == "compute":
            theirs, notes = self.at_compute_of(arm, other, metric)
        seeds = [seed for seed in mine if seed in theirs]
        found = difference([mine[seed] for seed in seeds], [theirs[seed] for seed in seeds])
        pairs = {str(seed): [mine[seed], theirs[seed]] for seed in seeds}
        return {
            "pairs": found.pairs,
            "other": statistics.fmean(theirs[seed] for seed in seeds) if seeds else None,
            "difference": found.mean if seeds else None,
            "low": found.low,
            "high": found.high,
            "p": found.p,
            "values": pairs,
            "note": "; ".join(notes),
        }

    def judged(self) -> list[dict[str, Any]]:
        """Return each claim with its verdict; p-values are corrected over all claims by Holm.

        A claim is held if the mean difference goes its way by more than ``by``, and p is at most ``alpha``; not held if
        it does not go its way by more than ``by``; and not decided where it does, but p is larger or is not there.
        """
        lines = [self._tested(claim) for claim in self.suite.claims]
        for claim, line, p in zip(self.suite.claims, lines, holm([line["p"] for line in lines]), strict=True):
            line["p_holm"] = p
            gain = line["gain"]
            if gain is None or line["pairs"] < 2:
                line["verdict"] = NOT_DECIDED
                line["why"] = line["why"] or "fewer than two pairs of runs"
            elif gain <= 0:
                line["verdict"], line["why"] = NOT_HELD, "the difference does not go the way that is claimed"
                if claim.by < 0:
                    line["why"] = f"it is worse by {-claim.by:g} or more"
                elif line["difference"] and claim.by and gain > -claim.by:
                    line["why"] = f"the difference is not more than {claim.by:g}"
            elif p is not None and p <= claim.alpha:
                line["verdict"] = HELD
            elif p is None:
                line["verdict"], line["why"] = NOT_DECIDED, "the seeds change nothing, so that one pair is known"
            else:
                line["verdict"], line["why"] = NOT_DECIDED, f"p is above {claim.alpha:g}"
        return lines

    def _tested(self, claim: Claim) -> dict[str, Any]:
        other = claim.than or self.suite.baseline
        found = self._against(claim.arm, other, claim.metric, claim.at)
        sign = -1.0 if claim.better == "less" else 1.0
        gains = [sign * (mine - theirs) - claim.by for mine, theirs in found["values"].values()]
        tested = difference(gains, [0.0] * len(gains))
        why = found["note"]
        known = dict.fromkeys(name for each in self.outcomes.values() for name in each.metrics)
        if claim.metric not in known:
            why = f"no run has the metric {claim.metric!r}{did_you_mean(claim.metric, list(known))}"
        told = {key: found[key] for key in ("pairs", "difference", "low", "high")}
        gain = tested.mean if gains else None
        return {**vars(claim), "than": other, **told, "gain": gain, "p": tested.p, "why": why, "verdict": ""}

    def costs(self) -> list[dict[str, Any]]:
        """Return what each arm cost, means over seeds; compute also in that of the baseline."""
        lines = []
        base = [
            each.compute for key, each in self.outcomes.items() if key[:2] == (self.suite.baseline, self.suite.steps)
        ]
        for arm, steps in dict.fromkeys((run.arm, run.steps) for run in self.suite.runs):
            every = [each for key, each in self.outcomes.items() if key[:2] == (arm, steps)]
            if not every:
                continue
            of = {way: _mean(sum(v for k, v in e.passes.items() if k.endswith(way)) for e in every) for way in _WAYS}
            beside = [sum(v for k, v in e.passes.items() if not k.startswith("train/")) for e in every]
            whole = [sum(e.passes.values()) for e in every]
            compute = _mean(each.compute for each in every)
            lines.append(
                {
                    "arm": arm,
                    "steps": steps,
                    "runs": len(every),
                    "tokens": _mean(_last(each.scales.get("tokens")) for each in every),
                    "forward": of["forward"],
                    "backward": of["backward"],
                    "compute": compute,
                    "times": compute / _mean(base) if base and _mean(base) else None,
                    "deciding": sum(beside) / sum(whole) if sum(whole) else None,
                    "seconds": _mean(_last(each.scales.get("seconds")) for each in every),
                }
            )
        return lines

    def unlike(self) -> Iterator[str]:
        """Yield in what arms differ beyond what they say: other rows or tokens, versions, ranks or batch sizes."""
        base = {
            key[2]: each for key, each in self.outcomes.items() if key[:2] == (self.suite.baseline, self.suite.steps)
        }
        for (arm, _, seed), each in self.outcomes.items():
            one = base.get(seed)
            if one is None or each is one:
                continue
            for what, told in _FACTS.items():
                same_data = all(each.job.run.mapping.get(k) == one.job.run.mapping.get(k) for k in _OF_ROWS)
                if told(each.run) == told(one.run) or (what == "rows" and not same_data):
                    continue
                if what == "rows" and each.job.run.mapping.get(_MODEL) != one.job.run.mapping.get(_MODEL):
                    yield (
                        f"{arm} and {self.suite.baseline} make other tokens of the same data, so that losses of one "
                        "token are not comparable; bits_per_byte and shares of right answers are"
                    )
                else:
                    yield f"{arm} and {self.suite.baseline} were trained with other {what}"

    def left_out(self) -> Iterator[str]:
        """Yield how many questions with choices were not counted."""
        for each in self.outcomes.values():
            for found in (evaluated(each.job) or {}).get("choices") or ():
                if out := found["left_out"]:
                    told = f"{out:,} of {out + found['questions']:,} questions of {found['file']} were left out: "
                    yield told + "a choice of theirs reaches cutoff_len, or LLaMA-Factory drops it"


_WAYS = ("forward", "backward")
_MODEL = "model_name_or_path"
_OF_ROWS = ("dataset", "streaming", "mix_strategy", "interleave_probs")
_FACTS: dict[str, Callable[[Run], Any]] = {
    "rows": lambda run: (run.started.get("row_space") or {}).get("fingerprint"),
    "versions": lambda run: run.started.get("versions"),
    "numbers of ranks": lambda run: run.started.get("world"),
    "batch sizes": lambda run: run.started.get("global_batch"),
}


def _mean(values: Any) -> float:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else math.nan


def _last(curve: Curve | None) -> float | None:
    return float(curve[-1][1]) if curve else None


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return {
        "runs": len(values),
        "mean": statistics.fmean(values) if values else None,
        "sd": statistics.stdev(values) if len(values) > 1 else None,
    }


_LESS = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "brier_score", "ter")


def better(metric: str) -> str:
    """Return which values of a metric are better, by its name."""
    name, _, rest = metric.partition("/")
    if name == "task":  # lm-eval's: all but these are shares, or grow with what is right
        return "less" if rest.rpartition("/")[2].startswith(_LESS) else "more"
    if name in ("accuracy", "margin", "exact_match"):
        return "more"
    return "more" if higher_is_better(name) else "less"


def read_results(suite: Suite, jobs: Sequence[Job], failed: Mapping[str, str]) -> Results:
    """Read what the runs of a suite left behind."""
    results = Results(suite=suite, outcomes={}, changed=changed(suite, jobs))
    for job in jobs:
        if str(job.folder) in failed:
            results.missing.append(f"{job.run.title} failed: {failed[str(job.folder)]}")
            if not job.trained:
                continue
        elif not job.trained:
            results.missing.append(f"{job.run.title}: not run ({job.folder})")
            continue
        try:
            found = recorded(job.folder)
        except DataError as error:
            results.missing.append(f"{job.run.title}: {error}")
            continue
        curves = found.run.metrics()
        metrics = {name: float(curve[-1][1]) for name, curve in curves.items() if curve}
        metrics |= evaluation_metrics(evaluated(job) or {})
        key = (job.run.arm, job.run.steps, job.run.seed)
        results.outcomes[key] = Outcome(job=job, run=found.run, metrics=metrics, curves=curves)
    return results


def evaluation_metrics(found: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of what ``dataflex eval`` wrote, by the names that suites use."""
    metrics: dict[str, Any] = {}
    if data := found.get("data"):
        metrics["loss"] = data["micro"]["loss"]
        metrics |= {"macro_loss": data["macro"]["loss"]} if len(data["domains"]) > 1 else {}
        metrics |= {"mix_loss": data["mix"]["loss"]} if "mix" in data else {}
        for kind, part in (("loss", "sets"), ("domain_loss", "domains")):
            metrics |= {f"{kind}/{name}": values["loss"] for name, values in data[part].items()}
    for part, keys in (("choices", ("accuracy", "margin", "bits_per_byte")), ("answers", ("exact_match",))):
        files = found.get(part) or ()
        for at, values in enumerate(files):
            for key in keys if values["questions"] else ():
                if at == 0:
                    metrics[key] = values[key]
                if len(files) > 1:
                    metrics[f"{key}/{Path(values['file']).stem}"] = values[key]
    for each in found.get("tasks") or ():
        metrics |= {f"task/{each['task']}/{name}": value for name, value in each["metrics"].items()}
    return {name: float(value) for name, value in metrics.items() if value is not None}
