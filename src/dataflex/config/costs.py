"""What a run costs in forward and backward passes of single sequences, before it is run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from dataflex.config.forecast import Forecast
from dataflex.config.schema import LedgerConfig, MethodConfig
from dataflex.errors import UnsupportedError
from dataflex.method import Method, Weighter
from dataflex.plan.schedule import pilot_rows
from dataflex.signals.specs import LEAST_ROWS

_BACKWARD_IN_FORWARDS = 2.0  # a backward pass computes gradients of inputs and of weights
_PILOT_TARGET_PASSES = 2.0  # unit gradients of targets take a pass for the norms and one for the sum


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Forward and backward passes of single sequences over the whole run, and the text that tells them."""

    text: str
    forward: float | None = None
    """None where it is not known."""
    backward: float = 0.0

    @property
    def in_forwards(self) -> float | None:
        """All passes as forward passes."""
        return None if self.forward is None else self.forward + _BACKWARD_IN_FORWARDS * self.backward


def _passes(forward: float, backward: float, form: str = "g") -> str:
    return " + ".join(f"{count:{form}} {unit}" for count, unit in ((forward, "F"), (backward, "B")) if count)


def _cost(rows: float, each: tuple[float, float], why: str, bound: str = "") -> Cost:
    """Return the cost of a number of forward and backward passes of each row."""
    forward, backward = rows * each[0], rows * each[1]
    text = f"{bound}{_passes(forward, backward, ',.0f')}{f' ({why})' if why else ''}"
    return Cost(text=text, forward=forward, backward=backward)


def costs(view: Forecast) -> dict[str, list[Cost]]:
    """Return the passes of training, of screening, and of each method, by label."""
    known = view.sequences is not None
    training = _cost(view.sequences or 0, view.row_passes, "") if known else Cost(text="known after loading")
    screening = _screening(view)
    found = {"training": [training], **({} if screening is None else {"screening": [screening]})}
    for method in view.dynamic.methods:
        parts = (_pool, _once, _targets, _curvature, _served, _reference)
        told = [cost for part in parts if view.steps is not None and (cost := part(method, view)) is not None]
        found[f"{method.kind} {method.name}"] = told or [Cost(text=method.cost, forward=0.0)]
    if view.dynamic.ledger is not None:
        found["ledger"] = [_ledger(view, view.dynamic.ledger)]
    return found


def passes_by_label(view: Forecast) -> dict[str, dict[str, float | None]]:
    """Return the forward and backward passes of training and of each method, None where they are not known."""
    found: dict[str, dict[str, float | None]] = {}
    for label, each in costs(view).items():
        known = all(cost.forward is not None for cost in each)
        forward, backward = sum(cost.forward or 0.0 for cost in each), sum(cost.backward for cost in each)
        found[label] = {"forward": forward if known else None, "backward": backward if known else None}
    return found


def _ledger(view: Forecast, ledger: LedgerConfig) -> Cost:
    """Return the passes over the ledger's targets; the split of the steps' gradients is not a pass."""
    counts, most = [view.targets.get(name) for name in ledger.targets], ledger.target_rows
    every = 1 if ledger.refresh_steps == "auto" else ledger.refresh_steps
    bound = "at most " if ledger.refresh_steps == "auto" else ""
    if view.steps is None or None in counts:
        return Cost(text=f"1 F + 1 B of each target row every {every} steps, and the split of each step's gradient")
    rows = sum(min(count or 0, most or count or 0) for count in counts)
    looks = 1 + -(-view.steps // every)
    told = f"{looks:,} looks x {rows:,} target rows x {_passes(1.0, 1.0)}, and more where much is left unexplained"
    return _cost(looks * rows, (1.0, 1.0), told, bound)


def _screening(view: Forecast) -> Cost | None:
    """Return the passes by which a pool is screened before the selector sees it."""
    options, pool, decisions = view.dynamic.signals, view.pool, view.num_decisions("selector")
    if options.screen_fraction >= 1.0 or not view.dynamic.selects_subset or view.dynamic.candidate_batches is not None:
        return None
    by_embeddings = options.screen_by == "embeddings"
    if pool is None:
        each = "1 F of each row of the pool" if by_embeddings else "1 F + 1 B of a twentieth of it"
        return Cost(text=f"{each} and interval ({options.screen_by})")
    if pool.left >= pool.drawn:
        return None
    rows, told = pool.drawn, "rows x 1 F of embeddings"
    if not by_embeddings:
        rows, told = pilot_rows(pool.drawn), "rows of a pilot x 1 F + 1 B"
    told = f"{decisions:,} intervals x {rows:,} {told}"
    aims = _target_rows(view, view.dynamic.selector.targets if view.dynamic.selector else ())
    over = 0.0 if _shares_targets(view) else 1.0 if by_embeddings else _PILOT_TARGET_PASSES
    extra = decisions * (aims or 0) * over
    if over and aims is None:
        told += "; targets not counted"
    elif extra:
        told += f"; {extra:,.0f} of the targets"
    return _cost(decisions * rows + extra, (1.0, 0.0 if by_embeddings else 1.0), told)


def _shares_targets(view: Forecast) -> bool:
    """Whether the selector compares with the very target vectors that screening has made in this decision."""
    from dataflex.signals.kinds import Embedding
    from dataflex.signals.specs import GradientSpec

    selector = view.dynamic.selector
    assert selector is not None
    params = selector.params

    def alike(spec: object, *names: str) -> bool:
        return all(getattr(params, name, None) == getattr(spec, name) for name in names)

    if view.dynamic.signals.screen_by == "embeddings":
        return selector.name == "rds_plus" and alike(Embedding(), "layer", "completion_only")
    unit_vectors = selector.name in ("less", "icons") and selector.requires.passes.targets == (2.0, 2.0)
    return unit_vectors and alike(GradientSpec(), "parameters", "last_blocks", "bf16")


def _of_rows(method: MethodConfig, view: Forecast, each: tuple[float, float]) -> tuple[float, float]:
    """Return passes (F, B) of a row, of which those for gradients are as many as training takes."""
    times = view.row_passes if "gradients" in method.requires.signals else (1.0, 1.0)
    return each[0] * times[0], each[1] * times[1]


def _pool(method: MethodConfig, view: Forecast) -> Cost | None:
    """Return the passes over the pool in every interval, if there are any."""
    each = _of_rows(method, view, method.requires.passes.over_pool(len(method.targets)))
    budget = view.dynamic.signals.budget
    if not any(each):
        return None
    if budget is not None and method.kind == "selector":
        if "gradients" not in method.requires.signals:
            return Cost(text="no passes, since training steps show losses (dynamic.signals.budget)", forward=0.0)
        passes = None if view.sequences is None else budget * view.sequences
        told = f"at most {budget:g} x the passes of the training (dynamic.signals.budget)"
        if passes is not None:
            of = "of targets first, then of pilots" if method.targets else "of pilots"
            told += f": F + B of about {passes:,.0f} rows, {of}, less what sketches cost"
            least = _least_for_targets(method, view)
            if view.sequences and least > passes:
                told = (
                    f"about {least / view.sequences:.2g} x the passes of the training: {LEAST_ROWS} rows of each "
                    f"target in {view.num_decisions('selector'):,} decisions, more than "
                    f"dynamic.signals.budget ({budget:g}) pays for"
                )
                passes = float(least)
        return Cost(text=told, forward=passes, backward=passes or 0.0)
    if view.rows is None:
        return Cost(text=f"{_passes(*each)} per row of the pool and interval ({method.cost})")
    pool, decisions = view.pool, view.num_decisions(method.kind)
    size = view.rows if pool is None else pool.left
    rows, told = decisions * size, f"{decisions:,} intervals x {size:,} rows"
    if pool is not None and view.dynamic.candidate_batches is not None:
        batches = view.dynamic.candidate_batches * view.batch.global_batch
        assert view.schedule is not None
        decided = view.schedule.of(method.kind).decided()
        rows = sum(min(view.rows, batches * interval.steps) for interval in decided)
        told = told if rows == decisions * size else f"{rows:,} candidates in {decisions:,} intervals"
    bound = "at most " if view.dynamic.exclude_seen or method.kind == "orderer" else ""
    if method.kind == "orderer" and pool is not None:
        first = view.first_decision("selector")
        size = min(size, 0 if first is None else first.steps * view.batch.global_batch)
        rows, told = decisions * size, f"{decisions:,} intervals x {size:,} rows"
    return _cost(rows, each, f"{told} x {_passes(*each)}; {method.cost}", bound)


def _least_for_targets(method: MethodConfig, view: Forecast) -> int:
    """Return the target rows that decisions look at, whatever a budget pays for; 0 where they are not known."""
    return view.num_decisions("selector") * sum(min(view.targets.get(name) or 0, LEAST_ROWS) for name in method.targets)


def _once(method: MethodConfig, view: Forecast) -> Cost | None:
    """Return the passes of models that stay as they are over every row that is ever in the pool."""
    each, pool = method.requires.passes.pool_once, view.pool
    if not each:
        return None
    if pool is None:
        return Cost(text=f"{each:g} F of another model of each row of the pool, once")
    decisions = view.num_decisions(method.kind)
    bound, rows = "", float(min(pool.rows, decisions * pool.left))
    if pool.left < pool.drawn or view.dynamic.exclude_seen:
        bound = "at most "
    elif pool.drawn < pool.rows and view.dynamic.candidate_batches is None:
        bound, rows = "about ", round(pool.rows * (1 - (1 - pool.drawn / pool.rows) ** decisions))
    return Cost(text=f"{bound}{rows * each:,.0f} F of another model, once for each row", forward=rows * each)


def _targets(method: MethodConfig, view: Forecast) -> Cost | None:
    """Return the passes over the method's targets in every decision, if they are known."""
    each = _of_rows(method, view, method.requires.passes.targets)
    rows = _target_rows(view, method.targets)
    if not rows or not any(each) or (view.dynamic.signals.budget is not None and method.kind == "selector"):
        return None
    decisions = view.num_decisions(method.kind)
    told = f"{decisions:,} intervals x {rows:,} target rows x {_passes(*each)}"
    return _cost(decisions * rows, each, told)


def _curvature(method: MethodConfig, view: Forecast) -> Cost | None:
    """Return the passes over a sample of training rows in every decision, if a method goes by the curvature."""
    if method.requires.preconditions.get("precondition") != "ekfac":
        return None
    wanted: int = getattr(method.params, "ekfac_rows", 0)
    decisions, rows = view.num_decisions(method.kind), min(wanted, view.rows or wanted)
    told = f"{decisions:,} intervals x {rows:,} rows of the curvature x {_passes(4.0, 2.0)}"
    return _cost(decisions * rows, (4.0, 2.0), told)


def leaves_targets_out(method: MethodConfig) -> bool:
    """Whether a method looks at its targets with passes that are not counted."""
    needs = method.requires
    asks = not needs.ledger and needs.signals != frozenset({"texts"})
    return bool(method.targets) and needs.passes.targets == (0.0, 0.0) and asks


def _target_rows(view: Forecast, names: Iterable[str]) -> int | None:
    counts = [view.targets.get(name) for name in names]
    return None if None in counts else sum(count or 0 for count in counts)


def _served(method: MethodConfig, view: Forecast) -> Cost | None:
    """Return the passes over the rows trained on beside those of the training itself, if there are any."""
    each = method.requires.passes.served
    if not any(each):
        return None
    rows = _acting(method.build(), view)
    return _cost(rows, each, f"{rows:,} rows x {_passes(*each)}; {method.cost}")


def _reference(method: MethodConfig, view: Forecast) -> Cost | None:
    """Return the passes of a reference model over the rows trained on, each once if they are kept."""
    reference, built = method.requires.reference, method.build()
    if reference is None:
        return None
    if reference.cached and view.rows is None:
        return Cost(text=method.cost)
    rows, bound = _acting(built, view), ""
    if not reference.cached:
        return Cost(text=f"{rows:,} F of the reference, in every step", forward=rows)
    kept = "kept on disk"
    if view.serves_all_again:
        assert view.rows is not None
        rows, kept = view.rows, "over the whole pool, kept on disk"
    else:
        rows, bound = _distinct(built, view, rows)
    return Cost(text=f"{bound}{rows:,} F of the reference, {kept}", forward=rows)


def _distinct(method: Method, view: Forecast, served: int) -> tuple[int, str]:
    """Return the number of different rows served while a method acts, and how sure that is."""
    assert view.rows is not None
    assert view.steps is not None
    dynamic, most = view.dynamic, min(view.rows, served)
    if not dynamic.full_steps:  # less than an epoch, or ``serves_all_again``
        return most, ""
    begins_late = isinstance(method, Weighter) and method.warmup(view.steps) > 0
    known = not dynamic.selects_subset and view.domains is not None and dynamic.unit == "sequences" and not begins_late
    if not known or dynamic.mixer is None or dynamic.mixer.requires.needs_interval:
        return most, "at most "
    assert view.domains is not None
    try:
        each = view.served()
    except UnsupportedError:
        return most, "at most "
    rows = int(np.rint(np.minimum(each, view.domains.num_rows).sum()))
    return rows, "" if np.allclose(each, np.rint(each)) else "about "


def _acting(method: Method, view: Forecast) -> int:
    """Return the number of sequences that are trained on while a method acts."""
    assert view.steps is not None
    assert view.sequences is not None
    if not isinstance(method, Weighter):
        return view.sequences
    return max(view.sequences - min(method.warmup(view.steps), view.steps) * view.batch.global_batch, 0)
