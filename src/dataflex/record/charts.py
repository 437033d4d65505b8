"""All charts of a report, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dataflex.record import choices, curves
from dataflex.record.chart import Chart, Panel, Series
from dataflex.record.digest import DECIDING
from dataflex.record.recorded import Recorded
from dataflex.record.text import duration, percent


def seconds_chart(runs: Sequence[Recorded]) -> Chart | None:
    """Seconds by phase."""
    phases = [each.run.phase_seconds() for each in runs]
    names = list(dict.fromkeys(name for each in phases for name in each))
    if not names:
        return None
    total = sum(phases[0].values())
    deciding = sum(phases[0].get(phase, 0.0) for phase in DECIDING)
    told = f"Deciding took {percent(deciding / total)} of {duration(total)}" if total else "Seconds by phase"
    series = [
        Series(name="seconds" if len(runs) == 1 else each.title, y=[found.get(name, 0.0) for name in names], colour=at)
        for at, (each, found) in enumerate(zip(runs, phases, strict=True))
    ]
    return Chart(headline=told, kind="bars", x="seconds", names=names, panels=[Panel(series=series)])


CHARTS: dict[str, Callable[[Sequence[Recorded]], Chart | None]] = {
    "loss": curves.loss_chart,
    "heldout": curves.heldout_chart,
    "domain_loss": curves.domain_loss_chart,
    "compared": curves.compared_chart,
    "mixture": curves.mixture_chart,
    "epochs": curves.epochs_chart,
    "composition": curves.composition_chart,
    "scores": choices.scores_chart,
    "histogram": choices.histogram_chart,
    "ranking": choices.ranking_chart,
    "overlap": choices.overlap_chart,
    "coverage": choices.coverage_chart,
    "repeats": choices.repeats_chart,
    "weights": choices.weights_chart,
    "ledger": choices.ledger_chart,
    "signals": choices.signals_chart,
    "seconds": seconds_chart,
}
"""Name -> what makes the chart of the first of the runs, the others beside it; None where the records lack data."""


def charts(runs: Sequence[Recorded]) -> dict[str, Chart]:
    """Make every chart that the records have data for."""
    made = {name: make(runs) for name, make in CHARTS.items()}
    return {name: chart for name, chart in made.items() if chart is not None}
