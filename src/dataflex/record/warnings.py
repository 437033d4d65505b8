"""What a record says that its reader should not miss."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from scipy.stats import rankdata, spearmanr

from dataflex.record.choices import signal_quality, times_served
from dataflex.record.curves import held_out, over_time
from dataflex.record.digest import Run
from dataflex.record.order import floats
from dataflex.record.recorded import Recorded
from dataflex.record.text import middle, number, percent
from dataflex.version import __version__

_COLLAPSED = 0.95
_FEW_EFFECTIVE = 0.1
_MANY_EPOCHS = 4.0
_REPEATS, _MEMORIZED = 2.0, 0.7  # times over; training loss relative to the held-out one
_WEAK = 0.1
_BY_LENGTH, _BY_LENGTH_PAIRS = 0.6, 0.85
_ALIKE = 0.01
_FEW, _RANKED = 20, 50_000
_NAMED = 5
_TOLD_APART = 0.03  # standard error of a change of the loss, relative to it, that is small enough to judge by
_REPEATED = re.compile(r"[0-9]+% of the rows were served more than [0-9]+ times by now, up to [0-9]+")


def warnings(runs: Sequence[Recorded]) -> list[str]:
    """Return the warnings of all runs, one sentence each."""
    found = []
    for view in runs:
        for look in LOOKS:
            found += [f"{view.title}: {told}" if len(runs) > 1 else told for told in look(view)]
    return found


def _version(view: Recorded) -> Iterator[str]:
    versions = view.run.started.get("versions")
    written = versions.get("dataflex") if isinstance(versions, Mapping) else None
    if isinstance(written, str) and _parts(written) > _parts(__version__):
        yield f"The record is of dataflex {written}; this is {__version__}, and what is new there is not shown."


def _parts(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"[0-9]{1,9}", version.partition("+")[0])[:3]]


def _leaks(view: Recorded) -> Iterator[str]:
    leaks = (view.run.started.get("row_space") or {}).get("leaks")
    for name, leak in leaks.items() if isinstance(leaks, dict) else ():
        rows, of = (leak.get("target_rows"), leak.get("of")) if isinstance(leak, dict) else (None, None)
        if isinstance(rows, int) and rows > 0:
            yield f"Leak: {rows} of the {of} rows of the target {middle(name, 40)} also lie in the training pool."


def _shards(view: Recorded) -> Iterator[str]:
    bad = (view.run.started.get("row_space") or {}).get("bad_shards")
    for name, lines in bad.items() if isinstance(bad, dict) else ():
        if isinstance(lines, list) and lines:
            told = f"the first: {middle(str(lines[0]), 200)}"
            yield f"{len(lines):,} shards of {middle(name, 40)} were left out ({told})."


def _labels(view: Recorded) -> Iterator[str]:
    rows = (view.run.started.get("row_space") or {}).get("rows_without_labels")
    if isinstance(rows, int) and rows > 0:
        yield f"{rows:,} rows of the pool have no label that is trained on; serving them teaches nothing."


def _losses(view: Recorded) -> Iterator[str]:
    run = view.run
    broken = [event for event in run.stepped if "loss" in event.get("nonfinite", ())]
    if broken:
        told = f"{len(broken)} of {len(run.stepped)} logs, first at step {broken[0]['step']}"
        yield f"The training loss was not finite in {told}."
    key = held_out([run])
    curve = run.metrics()[key] if key else []
    if len(curve) > 2:
        step, best = min(curve, key=lambda point: point[1])
        if curve[-1][1] > 1.01 * best > 0 and step < curve[-1][0]:
            last = number(curve[-1][1])
            yield f"Held-out loss ({key}) rose after step {step}: {number(best)} there, {last} at the end."


def _mixture(view: Recorded) -> Iterator[str]:
    run = view.run
    pool = sum(run.pool.values())
    dynamic = [
        event
        for event in run.planned
        if event["kind"] == "dynamic" and sum((event.get("domain_counts") or {}).values())
    ]
    if dynamic and pool and len(run.pool) > 1:
        counts = dynamic[-1]["domain_counts"]
        name = max(counts, key=lambda name: counts[name])
        share, natural = counts[name] / sum(counts.values()), run.pool.get(name, 0) / pool
        if share > _COLLAPSED and natural < share / 1.2:
            told = f"{percent(share, 0)} of the last interval ({percent(natural, 0)} of the pool)"
            yield f"The mixture has collapsed: {middle(name, 40)} is {told}."
    if view.found is not None and view.found.details["warning"]:
        yield str(view.found.details["warning"])


def _caps(view: Recorded) -> Iterator[str]:
    run = view.run
    stopped = [event for event in run.planned if "at its cap: " in str(event.get("reason"))]
    if stopped:
        told = str(stopped[-1]["reason"]).partition("at its cap: ")[2][:200]
        yield f"Training ended at step {stopped[-1]['stop_step']}, at a cap: {told}."
    epochs = {name: rows / run.pool[name] for name, rows in run.served.items() if run.pool.get(name)}
    caps = run.caps
    full = [name for name, times in epochs.items() if times >= caps.get(name, np.inf) - 0.01]
    for cap in sorted({caps[name] for name in full}):
        yield f"{_named([name for name in full if caps[name] == cap])} reached the cap of {cap:g} epochs."
    if many := [name for name, times in epochs.items() if times > _MANY_EPOCHS and name not in caps]:
        most = max(many, key=lambda name: epochs[name])
        told = f"{_named(many)}: served more than {_MANY_EPOCHS:g} times over"
        yield f"{told}, {middle(most, 40)} {epochs[most]:.1f} times; repeats teach less each time."


def _named(names: Sequence[str]) -> str:
    told = ", ".join(middle(name, 40) for name in names[:_NAMED])
    return f"{told} and {len(names) - _NAMED} more domains" if len(names) > _NAMED else told


def _repeats(view: Recorded) -> Iterator[str]:
    told = [found.group() for event in view.run.planned if (found := _REPEATED.search(str(event.get("reason"))[:4000]))]
    if told:
        yield f"Repeats: {told[-1]} (at most, over the run: {max(told, key=_first)})."
    times = times_served(view)
    again = [each for each in view.run.planned if "every row is in the pool again" in str(each.get("reason"))]
    if again:
        at = f"at step {again[0]['start_step']} too few rows were left that had not been served"
        yield f"The pool is exhausted: {at}, and every row may be chosen again."
    elif times is not None and view.run.methods.get("selector") and len(view.run.planned) > 1 and (times > 0).all():
        yield "The pool is exhausted: every row has been served, so that selection only orders and repeats."


def _duplicates(view: Recorded) -> Iterator[str]:
    """Tell rows that are the same as an earlier one, where they are many in the pool or in what was served."""
    if view.rows is None or not view.rows.num_rows:
        return
    alike = view.rows.column("same_as").is_valid().to_numpy()
    times = floats(view.rows, "times_served")
    of_pool, of_served = float(alike.mean()), float(times[alike].sum() / max(float(times.sum()), 1.0))
    if of_pool >= _ALIKE or of_served >= _ALIKE:
        told = (
            f"Duplicates: {int(alike.sum()):,} of {len(alike):,} rows ({percent(of_pool)}) have the tokens and labels "
        )
        told += "of an earlier row"
        yield f"{told}; they are {percent(of_served)} of what was served." if of_served > 0 else f"{told}."


def _memorized(view: Recorded) -> Iterator[str]:
    """Tell repeated rows whose training loss falls away from a held-out loss that rises."""
    run = view.run
    metrics, times = run.metrics(), times_served(view)
    key, losses = held_out([run]), run.by_domain("loss")
    served = None if times is None or not (times > 0).any() else times[times > 0]
    looked_at = [] if key is None or served is None else [("What was served", served.mean(), run.logged("loss"), key)]
    for name, rows in run.served.items():
        own = next((each for end in ("token_loss", "loss") if (each := f"eval_{name}_{end}") in metrics), None)
        if own is not None and run.pool.get(name):
            looked_at.append((middle(name, 40), rows / run.pool[name], losses.get(name, []), own))
    for what, epochs, train, held in looked_at:
        curve, last = [value for _, value in metrics[held]], [value for _, value in train[-5:]]
        if epochs < _REPEATS or len(curve) < 3 or not last:
            continue
        least, mean = min(curve), sum(last) / len(last)
        if curve[-1] > 1.01 * least > 0 and mean < _MEMORIZED * curve[-1]:
            told = (
                f"Memorized repeats: {what} was served {epochs:.1f} times over; its training loss is {number(mean, 3)}"
            )
            yield f"{told}, the held-out loss ({middle(held, 40)}) {number(curve[-1], 3)}, up from {number(least, 3)}."


def _first(text: str) -> int:
    return int(text.partition("%")[0])


def _lengths(view: Recorded) -> Iterator[str]:
    """Tell scores, or a choice without any, that the length of rows tells."""
    if view.rows is None:
        return
    scores, tokens = floats(view.rows, "score"), floats(view.rows, "tokens")
    known = np.flatnonzero(np.isfinite(scores))[:_RANKED]
    if len(known) >= _FEW and np.ptp(scores[known]) > 0 and np.ptp(tokens[known]) > 0:
        alike = float(spearmanr(scores[known], tokens[known]).statistic)
        if abs(alike) > _BY_LENGTH:
            side = "longer" if alike > 0 else "shorter"
            yield f"Scores are told by length: {side} rows have higher ones (rank correlation with tokens {alike:.2f})."
            return
    chosen = floats(view.rows, "chosen")
    kept, left = tokens[chosen == 1][:_RANKED], tokens[chosen == 0][:_RANKED]
    if min(len(kept), len(left)) >= _FEW:
        ranks = rankdata(np.concatenate([kept, left]))[: len(kept)]
        longer = float((ranks.mean() - (len(kept) + 1) / 2) / len(left))  # of all pairs, ties as halves
        if not 1 - _BY_LENGTH_PAIRS < longer < _BY_LENGTH_PAIRS:
            side, share = ("longer", longer) if longer > 0.5 else ("shorter", 1 - longer)
            yield f"Rows are chosen by length: of a kept row and another one the {side} is kept in {percent(share, 0)}."


def _weights(view: Recorded) -> Iterator[str]:
    ess = view.run.weight_curve("ess")
    low = [step for step, value in ess if value < _FEW_EFFECTIVE]
    if low:
        told = f"{len(low)} of {len(ess)} logs, first at step {low[0]}"
        yield f"Weights collapsed: fewer than {percent(_FEW_EFFECTIVE, 0)} of the sequences were effective in {told}."


def _signals(view: Recorded) -> Iterator[str]:
    curve = signal_quality(view.run).get("correlation", [])
    weak = [step for step, value in curve if value < _WEAK]
    if weak:
        told = f"(rank correlation below {_WEAK:g}), first at step {weak[0]}"
        yield f"In {len(weak)} of {len(curve)} decisions the predicted scores hardly ranked the rows {told}."


def _idle_domains(view: Recorded) -> Iterator[str]:
    """Tell domains whose share rises while their loss does not fall."""
    run = view.run
    names = [name for name in run.served if any(f"dataflex/loss/{name}" in event for event in run.stepped[-3:])]
    rest = [name for name in {**run.pool, **run.served} if name not in set(names)]
    _, _, counts, _ = over_time(run, [*((name, [name]) for name in names), ("rest", rest)], 3)
    if len(counts) < 3:
        return
    shares = counts / counts.sum(1, keepdims=True)
    losses = run.by_domain("loss")
    for at, name in enumerate(names):
        curve = [value for _, value in losses.get(name, [])]
        third = len(curve) // 3
        if third < 2 or shares[-1, at] < 1.2 * shares[0, at] or shares[-1, at] < 0.02:
            continue
        ends = np.array(curve[:third]), np.array(curve[-third:])
        first, last = (float(end.mean()) for end in ends)
        error = float(np.sqrt(sum(end.var() / third for end in ends)))
        if last > 0.99 * first and error < _TOLD_APART * first:
            yield (
                f"{middle(name, 40)} does not learn while its share rises: share {percent(shares[0, at], 0)} -> "
                f"{percent(shares[-1, at], 0)}, training loss {number(first, 3)} -> {number(last, 3)}."
            )


def _unfinished(view: Recorded) -> Iterator[str]:
    run: Run = view.run
    if run.finished is None and run.planned:
        of = f" of {run.total_steps}" if run.total_steps else ""
        yield f"The run had not finished when this was written: step {run.steps_done}{of}."


LOOKS: tuple[Callable[[Recorded], Iterator[str]], ...] = (
    _version,
    _unfinished,
    _leaks,
    _shards,
    _labels,
    _losses,
    _mixture,
    _caps,
    _repeats,
    _duplicates,
    _memorized,
    _lengths,
    _weights,
    _signals,
    _idle_domains,
)
"""What is looked for, in the order of the page."""
