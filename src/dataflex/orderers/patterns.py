"""Orders of rows by a quantity: sorted, folded in layers, sorted with folded windows, in shuffled parts, shuffled.

Patterns are those of Data Efficacy (DELT, arXiv 2506.21545) and of Demystifying Data Organization for Enhanced LLM
Training (ACL 2026, arXiv 2605.30334). Each says which rank is served at each place. Only ``segment``, ``shuffle`` and a
jitter draw, from the run's own streams, so that their draws are not the authors'. An order gains little where the
learning rate decays towards the end: the rows that come last then move the model least (arXiv 2511.18903).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import DataError
from dataflex.method import Card, Context, Orderer, Passes, Requires, Rows, ScoreFile, param
from dataflex.method import Params as BaseParams
from dataflex.parts import Part
from dataflex.rng import uniforms
from dataflex.signals.kinds import TokenLoss

_DELT = "Data Efficacy (DELT), arXiv 2506.21545"
_ORGANIZATION = "Demystifying Data Organization for Enhanced LLM Training, ACL 2026, arXiv 2605.30334"
_COST = "none; 1 F per row that is ordered and interval where it is ordered by the loss"
BY = (
    "what rows are ordered by: length (in tokens), loss (of the model at the decision), selector (its scores), random, "
    "column, or scores (a file)"
)


@dataclass(frozen=True, kw_only=True)
class ByColumn(BaseParams):
    """A raw data column of numbers."""

    column: str = param(help="name of the column, of numbers")


@dataclass(frozen=True, kw_only=True)
class ByScores(BaseParams):
    """Scores that ``dataflex score`` wrote for these very rows."""

    file: str = param(help="file that 'dataflex score' wrote, of the rows that are trained on")
    column: str = param(help="column of that file")


@dataclass(frozen=True)
class By(Part):
    """What rows are ranked by, with its parameters."""

    what = "quantity to order by"
    table: ClassVar = {
        **dict.fromkeys(("length", "loss", "selector", "random"), BaseParams),
        "column": ByColumn,
        "scores": ByScores,
    }

    @property
    def requires(self) -> Requires:
        """What it requires of a run."""
        p: Any = self.params
        match self.name:
            case "loss":
                passes = Passes(pool=(1.0, 0.0), told="1 F per row that is ordered and interval")
                return Requires(signals=frozenset({"losses"}), needs_interval=True, passes=passes)
            case "selector":
                return Requires(selector_scores=True)
            case "column":
                return Requires(columns=(p.column,))
            case "scores":
                return Requires(score_files=(ScoreFile(p.file, p.column),))
        return Requires()

    def values(self, rows: Rows, ctx: Context) -> NDArray[Any]:
        """Return the value of each row [len(rows)]; NaN where it has none."""
        p: Any = self.params
        match self.name:
            case "loss":
                return ctx.signals(TokenLoss(), rows)
            case "selector":
                assert ctx.scores is not None
                return ctx.scores[rows]
            case "column":
                return numbers(ctx.columns[p.column][rows])
            case "scores":
                return ctx.columns[ScoreFile(p.file, p.column).name][rows]
            case "random":
                return uniforms(ctx.seed, "orderer.random", 0, rows)
        if ctx.domains.lengths is None:
            raise DataError("by length: the data set does not give the token count of every row")
        return ctx.domains.lengths[rows]


def numbers(values: NDArray[Any]) -> NDArray[np.float64]:
    """Return values of a column as float64; NaN for what is no number."""
    if values.dtype.kind in "iuf":
        return values.astype(np.float64)
    kept = [value if isinstance(value, int | float) and not isinstance(value, bool) else np.nan for value in values]
    return np.array(kept, dtype=np.float64)


@dataclass(frozen=True, kw_only=True)
class OrderParams(BaseParams):
    """What every orderer by a quantity takes."""

    by: By = param(help=BY)
    descending: bool = param(False, "whether the largest value is ranked first; equal ones keep the order of the files")


class RankedOrderer(Orderer):
    """Ranks rows by a quantity that its parameters name."""

    Params: ClassVar[type[BaseParams]] = OrderParams
    params: Any

    def requires(self) -> Requires:
        """Require what the quantity does."""
        by: By | None = self.params.by
        return Requires() if by is None else by.requires

    def refused_values(self, name: str, values: NDArray[Any]) -> tuple[NDArray[np.bool_], str]:
        """Return which values cannot be ordered by: missing, text, or not finite."""
        return ~np.isfinite(numbers(values)), "a column to order by must hold finite numbers"

    def sort_keys(self, rows: Rows, ctx: Context) -> NDArray[np.float64]:
        values = np.asarray(self.params.by.values(rows, ctx), dtype=np.float64)
        return -values if self.params.descending else values

    @property
    def reason(self) -> str:
        """The pattern, what rows are ranked by, and which end comes first."""
        by, p = self.params.by, self.params.by.params
        told = {"column": "column {0.column}", "scores": "{0.column} of {0.file}"}.get(by.name, by.name).format(p)
        return f"order: {self.name} of {told}, {'largest' if self.params.descending else 'smallest'} first"


@dataclass(frozen=True, kw_only=True)
class PatternParams(OrderParams):
    """What every pattern takes."""

    jitter: int = param(0, "rows of the windows within which the order is shuffled; 0: it is not", minimum=0)

    def __post_init__(self) -> None:
        if self.jitter == 1:
            raise ValueError("jitter: a window of one row shuffles nothing; give 2 or more, or 0")


@dataclass(frozen=True, kw_only=True)
class SweepParams(PatternParams):
    """What the patterns of several sweeps take."""

    layers: int = param(5, "number of sweeps", minimum=2)


def jittered(ranks: NDArray[np.int64], window: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return ranks shuffled within consecutive windows of ``window`` places; the last window may be short."""
    places = np.arange(len(ranks))
    return ranks[np.lexsort((rng.random(len(ranks)), places // window))]


def folding(count: int, layers: int) -> NDArray[np.int64]:
    """Return every ``layers``-th rank from 0 on, then from 1 on, and so on: s[0::L] s[1::L] ... (DELT)."""
    ranks = np.arange(count, dtype=np.int64)
    return np.concatenate([ranks[first::layers] for first in range(layers)])


def zigzag(count: int, layers: int) -> NDArray[np.int64]:
    """Return ``folding`` with every second layer reversed."""
    ranks = np.arange(count, dtype=np.int64)
    return np.concatenate([ranks[first::layers][:: -1 if first % 2 else 1] for first in range(layers)])


def segment(count: int, shares: tuple[float, float], tails: tuple[str, str], rng: np.random.Generator) -> Rows:
    """Return a tail of the ranks, the middle, and another tail, each shuffled.

    ``shares`` are those of the first and the last part; ``tails`` says which end of the ranks each is of, ``low`` or
    ``high``. Of the same end, its ranks are dealt out to both at random.
    """
    first, last = (round(share * count) for share in shares)
    last = min(last, count - first)
    ranks = np.arange(count, dtype=np.int64)
    low = sum(size for size, tail in zip((first, last), tails, strict=True) if tail == "low")
    high = count - sum(size for size, tail in zip((first, last), tails, strict=True) if tail == "high")
    ends = {"low": rng.permutation(ranks[:low]), "high": rng.permutation(ranks[high:])}
    front = ends[tails[0]][:first]
    back = ends[tails[1]][first:] if tails[0] == tails[1] else ends[tails[1]]
    return np.concatenate([front, rng.permutation(ranks[low:high]), back])


def windowed(count: int, sections: int, layers: int, ratio: float, fold: Any) -> NDArray[np.int64]:
    """Return sorted ranks, but around the borders of ``sections`` equal parts in the order of ``fold(count, layers)``.

    Window j reaches r = round(ratio * count) places to both sides of round(count * j / sections), and begins where the
    one before it ends if they overlap.
    """
    ranks = np.arange(count, dtype=np.int64)
    reach, done = round(ratio * count), 0
    for border in (round(count * number / sections) for number in range(1, sections)):
        start, stop = max(border - reach, done), min(border + reach, count)
        if start < stop:
            ranks[start:stop] = start + fold(stop - start, layers)
            done = stop
    return ranks


class _Pattern(RankedOrderer):
    """Serves ranks in an order of its own, ``pattern``, jittered."""

    Params: ClassVar[type[BaseParams]] = PatternParams

    def pattern(self, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Return the rank at each place."""
        raise NotImplementedError

    def ranks(self, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
        found, window = self.pattern(count, rng), self.params.jitter
        return jittered(found, window, rng) if window else found


class Sorting(_Pattern):
    """Serve rows by their values, the smallest first, or with ``descending`` the largest: a plain curriculum.

    ``jitter: w`` shuffles within consecutive windows of w rows, which keeps neighbours in value from following each
    other too closely.
    """

    name = "sorting"
    card = Card(
        summary="Serves rows from the smallest to the largest value, or the other way round.",
        paper=f"baseline (curriculum); {_DELT}",
        cost=_COST,
    )

    def pattern(self, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
        return np.arange(count, dtype=np.int64)


class Folding(_Pattern):
    """Go through the values several times, from smallest to largest: every L-th row from the first, then the second on.

    Each of the ``layers`` sweeps sees the whole range of values, so that no stretch of the training is of easy or of
    hard rows alone.
    """

    name = "folding"
    card = Card(summary="Sweeps over the range of values several times.", paper=_DELT, cost=_COST)

    Params: ClassVar[type[BaseParams]] = SweepParams

    def pattern(self, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
        return folding(count, self.params.layers)


class Zigzag(_Pattern):
    """Sweep over the values as ``folding`` does, up and down in turns, so that no sweep begins with a jump."""

    name = "zigzag"
    card = Card(summary="Sweeps over the range of values up and down.", paper=_DELT, cost=_COST)

    Params: ClassVar[type[BaseParams]] = SweepParams

    def pattern(self, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
        return zigzag(count, self.params.layers)


class Segment(_Pattern):
    """Serve rows of one end first, those of the other last, and all others between, each part shuffled.

    The shuffles are drawn from the run's own streams, anew in each epoch or interval.
    """

    name = "segment"
    card = Card(
        summary="Serves rows of small values first and of large ones last, each part shuffled.", paper=_DELT, cost=_COST
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(PatternParams):
        front_percent: float = param(10.0, "share of the rows that come first, percent", minimum=0.0, maximum=100.0)
        back_percent: float = param(10.0, "share of the rows that come last, percent", minimum=0.0, maximum=100.0)
        front: Literal["low", "high"] = param("low", "which end of the values comes first")
        back: Literal["low", "high"] = param("high", "which end of the values comes last")

        def __post_init__(self) -> None:
            PatternParams.__post_init__(self)
            if not 0.0 < self.front_percent + self.back_percent <= 100.0:
                raise ValueError("front_percent: the first and the last part must be above 0 and at most 100 together")

    def pattern(self, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
        p = self.params
        return segment(count, (p.front_percent / 100, p.back_percent / 100), (p.front, p.back), rng)


@dataclass(frozen=True, kw_only=True)
class WindowParams(PatternParams):
    """What the patterns with folded windows take. A subclass has the defaults."""

    sections: int = param(2, "parts of the sorted rows, around whose borders they are folded", minimum=2)
    layers: int = param(3, "number of sweeps within a window", minimum=2)
    ratio: float = param(0.225, "reach of a window to each side, as a share of all rows", above=0.0, maximum=0.5)

    def __post_init__(self) -> None:
        super().__post_init__()
        most = 1.0 / self.sections if self.sections == 2 else 0.5 / self.sections
        if self.ratio > most:
            raise ValueError(f"ratio: windows of {self.sections} sections overlap beyond {most:.4g}; lower it")


class Stair(_Pattern):
    """Serve rows by their values, but folded around the borders of sections, so that levels change in steps (STR)."""

    name = "stair"
    card = Card(
        summary="Serves rows sorted, but folded around the borders of sections.", paper=_ORGANIZATION, cost=_COST
    )
    Params: ClassVar[type[BaseParams]] = WindowParams

    def pattern(self, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
        p = self.params
        return windowed(count, p.sections, p.layers, p.ratio, folding)


class Saw(_Pattern):
    """Serve rows by their values, but up and down around the borders of sections (SAW)."""

    name = "saw"
    card = Card(
        summary="Serves rows sorted, but in zigzag around the borders of sections.", paper=_ORGANIZATION, cost=_COST
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(WindowParams):
        sections: int = param(3, "parts of the sorted rows, around whose borders they go up and down", minimum=2)
        layers: int = param(2, "number of sweeps within a window", minimum=2)
        ratio: float = param(0.075, "reach of a window to each side, as a share of all rows", above=0.0, maximum=0.5)

    def pattern(self, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
        p = self.params
        return windowed(count, p.sections, p.layers, p.ratio, zigzag)


class Shuffle(Orderer):
    """Serve rows in random order, drawn anew in each epoch or interval: what every other order is compared with."""

    name = "shuffle"
    card = Card(summary="Serves rows in random order.", paper="baseline", cost="none")

    def ranks(self, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
        return rng.permutation(count)

    @property
    def reason(self) -> str:
        """That it is random."""
        return "order: shuffle"
