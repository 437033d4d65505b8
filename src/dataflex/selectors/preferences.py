"""Pairs of a chosen and a rejected answer, by how clearly the one is better: for stage dpo."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dataflex.errors import DataError
from dataflex.method import Card, Context, Passes, Requires, Rows, Selection, param
from dataflex.method import Params as BaseParams
from dataflex.parts import refuse_idle
from dataflex.plan.proportions import whole_part
from dataflex.rng import uniforms
from dataflex.select.choose import top_k
from dataflex.select.scoring import Found, PoolSelector, ScoringParams, ScoringSelector
from dataflex.signals.kinds import PreferenceLogps

POLICY: Final = "folder or hub id of a model after DPO; null: the model under training"
REFERENCE: Final = "folder or hub id of the model before it; null: the run's reference"
_SPARSE = 30  # rows above the upper bound, as published
_SHARE = 20  # but no more than this part of a pool, so that the bound of a small one stays out of its bulk


def implicit_margins(
    policy: NDArray[np.floating], reference: NDArray[np.floating], beta: float = 1.0, *, normalize: bool = False
) -> NDArray[np.float64]:
    """Return beta [(S(w) - S_ref(w)) - (S(l) - S_ref(l))] of each pair [n], w being chosen and l rejected.

    Both are values of ``PreferenceLogps`` [n, 2, 2]. ``normalize`` divides each answer's difference by its tokens.
    """
    ratios = policy[:, :, 0].astype(np.float64) - reference[:, :, 0].astype(np.float64)
    if normalize:
        ratios = ratios / np.maximum(policy[:, :, 1], 1.0)
    return np.asarray(beta * (ratios[:, 0] - ratios[:, 1]))


def upper_bound(margins: NDArray[np.floating]) -> float:
    """Return M2 of BeeS: where the sparse tail of the largest margins begins.

    It is the smallest margin above which, all the way up, lie fewer than 30 rows, or fewer than (largest - M2), and
    fewer than a twentieth of the rows.
    """
    falling = np.sort(np.asarray(margins, dtype=np.float64))[::-1]
    above = np.searchsorted(-falling, -falling, side="left")  # rows that are larger
    sparse = above < np.minimum(np.maximum(_SPARSE, falling[0] - falling), -(-len(falling) // _SHARE))
    return float(falling[len(sparse) - 1 if sparse.all() else int(np.argmin(sparse)) - 1])


def probabilities(margins: ArrayLike, lower: float, upper: float) -> NDArray[np.float64]:
    """Return (clip(m, lower, upper) - lower) / (upper - lower) [n]."""
    return (np.clip(np.asarray(margins, dtype=np.float64), lower, upper) - lower) / (upper - lower)


def fused(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return p q / (p q + (1 - p) (1 - q)) [n]; 1/2 where one source is sure of what the other rules out."""
    both, neither = first * second, (1.0 - first) * (1.0 - second)
    total = both + neither
    return np.where(total > 0, both / np.where(total > 0, total, 1.0), 0.5)


@dataclass(frozen=True, kw_only=True)
class PairParams(ScoringParams):
    """Where margins come from."""

    column: str | None = param(None, "column of external margins, or of the chosen answer's reward")
    minus_column: str | None = param(None, "column of the rejected answer's reward, which is taken off")
    policy: str | None = param(None, POLICY)
    reference: str | None = param(None, REFERENCE)

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that are read."""
        return tuple(name for name in (self.column, self.minus_column) if name is not None)


class PairSelector(ScoringSelector):
    """Scores pairs by margins: those of a model, and those of a column."""

    lacking = "no margin"
    params: Any
    _lengths: NDArray[np.floating] | None = None

    def _requires(self, *, implicit: bool) -> Requires:
        p = self.params
        if not implicit:
            return Requires(stages=("dpo",), columns=p.columns)
        own = p.policy is None
        passes = Passes(pool=(2.0, 0.0), pool_once=2.0) if own else Passes(pool_once=4.0)
        return Requires(
            stages=("dpo",),
            signals=frozenset({"preference_logps"}),
            columns=p.columns,
            models={"policy": p.policy, "reference": p.reference},
            needs_interval=own,
            whole_parameters=not own or p.reference is not None,  # other models are not partitioned
            passes=passes,
        )

    def refused_values(self, name: str, values: NDArray[Any]) -> tuple[NDArray[np.bool_], str] | None:
        """Refuse what is no finite number."""
        return ~np.isfinite(_numbers(values)), "a margin must be a finite number"

    def implicit(self, pool: Rows, ctx: Context, *, beta: float = 1.0, normalize: bool = False) -> NDArray[np.float64]:
        """Return implicit margins [N]; DataError where the policy still is its reference."""
        p = self.params
        policy = ctx.signals(PreferenceLogps(of=p.policy or "policy"), pool)
        reference = ctx.signals(PreferenceLogps(of=p.reference or "reference"), pool)
        self._lengths = policy[:, :, 1]
        margins = implicit_margins(policy, reference, beta, normalize=normalize)
        finite = margins[np.isfinite(margins)]
        if len(finite) and not finite.any():
            if not np.array_equal(policy[:, :, 0], reference[:, :, 0], equal_nan=True):
                raise DataError(
                    f"{self.name}: every margin is 0: the answers of each pair are equal within 'cutoff_len'"
                )
            raise DataError(
                f"{self.name}: every margin is 0, since the policy is its own reference still. Set "
                "dynamic.warmup_steps above 0, or name the folder of a model that was trained on preferences: policy"
            )
        return margins

    def external(self, pool: Rows, ctx: Context) -> NDArray[np.float64]:
        """Return the margins of the columns [N]."""
        found = [_numbers(ctx.columns[name][pool]) for name in self.params.columns]
        return found[0] if len(found) == 1 else found[0] - found[1]

    def told_lengths(self, kept: NDArray[np.int64], found: Found) -> str:
        """Return how long the answers kept are, where that is known, since margins are sums over tokens."""
        if self._lengths is None or not len(kept):
            return ""
        lengths = self._lengths[found.places]
        chosen, rejected = lengths[kept].mean(axis=0)
        told = f"; {chosen:.0f} tokens chosen and {rejected:.0f} rejected on average"
        apart = lengths[:, 0] - lengths[:, 1]
        if apart.std() > 0 and found.scores.std() > 0:
            told += f", correlation with their difference {np.corrcoef(apart, found.scores)[0, 1]:.2f}"
        return told


def _numbers(values: NDArray[Any]) -> NDArray[np.float64]:
    """Return values of a column as float64; NaN for what is no number."""
    if values.dtype.kind in "iuf":
        return np.asarray(values, dtype=np.float64)
    plain = (value if isinstance(value, int | float) and not isinstance(value, bool) else np.nan for value in values)
    return np.fromiter(plain, dtype=np.float64, count=len(values))


def _column_problem(p: PairParams) -> str:
    if p.minus_column is not None and p.column is None:
        return "minus_column: is taken off a column; name that too"
    return ""


class Margin(PairSelector):
    """Keep the pairs whose margin between chosen and rejected answer is high, low, or within a band.

    The implicit margin is the difference of DPO's own rewards, beta [(S(w) - S_ref(w)) - (S(l) - S_ref(l))], with S the
    log-probability of an answer, summed over its tokens, under the policy and its reference (LoRA: adapters off; else
    the run's reference model). ``policy`` and ``reference`` name the folders of other models, say a small one after and
    before DPO on some thousand random pairs, which costs four forward passes of it a pair, once. The external margin is
    a column, or the difference of two: rewards of a reward model, or ratings.

    At step 0 the policy is its reference and every margin is 0, which is refused: warm up, or name a ``policy``. Sums
    favour long answers (``normalize`` takes means; the reason tells lengths and their correlation). ``keep: high`` is
    the usual one (TOP of arXiv 2502.14560), easy pairs; ``low`` finds flipped labels, harmful to train on and worth a
    look; ``band`` keeps margins inside it, the nearest to its middle first. The reference scores each pair once.
    """

    name = "margin"
    card = Card(
        summary="Keeps the pairs whose chosen answer is better by the most, the least, or a margin within a band.",
        paper="Less is More: Improving LLM Alignment via Preference Data Selection, arXiv 2502.14560 (TOP, MID, BOT)",
        cost="2 F over the pool per interval and 2 F of the reference once (implicit), a pair being two rows",
        note="Stage dpo. Formulas from DPO (arXiv 2305.18290) and the paper's first version; its later ones and its "
        "code were not read.",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(PairParams):
        """Parameters of the margin selector; the band is the paper's MID."""

        source: Literal["implicit", "external"] = param("implicit", "the model's own margins, or those of the column")
        keep: Literal["high", "low", "band"] = param("high", "which pairs are kept")
        band: tuple[float, float] = param((-1.0, 1.0), "least and largest margin under keep: band")
        beta: float = param(1.0, "factor of implicit margins", above=0.0)
        normalize: bool = param(False, "means over an answer's tokens instead of sums")

        def __post_init__(self) -> None:
            if problem := _column_problem(self):
                raise ValueError(problem)
            if self.source == "external" and self.column is None:
                raise ValueError("column: missing; name the column of the external margins")
            if self.source == "implicit" and self.column is not None:
                raise ValueError("column: has no effect on implicit margins; write 'source: external', or remove it")
            idle = {"policy": self.policy is not None, "reference": self.reference is not None}
            idle |= {"beta": self.beta != 1.0, "normalize": self.normalize}
            for key, given in idle.items():
                if given and self.source == "external":
                    raise ValueError(f"{key}: has no effect on external margins; remove it")
            if len(self.band) != 2 or not self.band[0] < self.band[1]:
                raise ValueError(f"band: {list(self.band)} must be two rising numbers")
            if self.keep != "band" and self.band != type(self).band:
                raise ValueError("band: has no effect without 'keep: band'")

    params: Params

    def requires(self) -> Requires:
        return self._requires(implicit=self.params.source == "implicit")

    def score(self, pool: Rows, ctx: Context) -> NDArray[np.float64]:
        """Return margins [N]; NaN where an answer has no supervised token."""
        p = self.params
        if p.source == "external":
            return self.external(pool, ctx)
        return self.implicit(pool, ctx, beta=p.beta, normalize=p.normalize)

    def preference(self, found: Found, ctx: Context) -> NDArray[np.floating]:
        """Return the margins, their negatives, or within the band the closeness to its middle."""
        p = self.params
        if p.keep != "band":
            return found.scores if p.keep == "high" else -found.scores
        low, high = p.band
        inside = (found.scores >= low) & (found.scores <= high)
        return np.where(inside, -np.abs(found.scores - (low + high) / 2.0), np.nan)

    def explain(self, kept: NDArray[np.int64], found: Found, ctx: Context) -> str:
        """Return which end was kept, its mean margin, and the lengths of the answers."""
        p = self.params
        which = f"within {p.band[0]:g} to {p.band[1]:g}" if p.keep == "band" else f"of {p.keep}"
        told = f"{which} {p.source} margin"
        if len(kept):
            told += f", mean {found.scores[kept].mean():.3g} against {found.scores.mean():.3g}"
        return told + self.told_lengths(kept, found)


class Bees(PairSelector):
    """Keep the pairs that an external margin and the model's own together prefer most surely.

    BeeS of "Less is More: Improving LLM Alignment via Preference Data Selection", arXiv 2502.14560. Each margin m
    becomes a probability P(m) = (clip(m, M1, M2) - M1) / (M2 - M1), and the two are fused as P Q / (P Q + (1 - P) (1 -
    Q)); ``fuse: add`` is the sum of the margins instead. The best are kept, a tenth in the paper. Implicit margins are
    without beta, from a small model after and before DPO on 2,000 random pairs in the paper (``policy``,
    ``reference``); see ``margin``.

    M1 is -2 for both. M2 is where the sparse tail of the largest margins begins: fewer than 30 rows above, or fewer
    than (largest - M2), and fewer than a twentieth of the pool. Both are in the units of that reward model, so
    ``quantiles`` may set them instead. A source at P = 1 or 0 overrules the other, and one half stands where the two
    contradict each other so. ``outliers`` drops a share of the rows at each end of each margin first; the paper does so
    and gives no number.
    """

    name = "bees"
    card = Card(
        summary="Keeps the pairs that rewards of a column and the model's own margins together prefer most surely.",
        paper="Less is More: Improving LLM Alignment via Preference Data Selection, arXiv 2502.14560 (BeeS)",
        cost="2 F over the pool per interval and 2 F of the reference once, a pair being two rows",
        note="Stage dpo. Known from the paper's first version (dual margins) and the abstracts of later ones, which "
        "call it Bayesian aggregation; no code was read. The share of outliers is not published, and how the upper "
        "bound is found is our reading.",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(PairParams):
        """Parameters of BeeS."""

        fuse: Literal["bayes", "add"] = param("bayes", "how the two margins come together")
        lower: float = param(-2.0, "M1: margins up to here have probability 0")
        upper: tuple[float, float] | None = param(None, "M2 of external and implicit margins; null: where tails begin")
        quantiles: tuple[float, float] | None = param(
            None, "M1 and M2 as quantiles of each margin instead", minimum=0.0, maximum=1.0
        )
        outliers: float = param(0.0, "share of the rows that is dropped at each end of each margin", minimum=0.0)

        def __post_init__(self) -> None:
            if self.column is None:
                raise ValueError("column: missing; name the column of the external margins")
            if not self.outliers < 0.5:
                raise ValueError(f"outliers: {self.outliers:g} at each end leaves nothing; give less than 0.5")
            bounds = {"lower": self.lower != -2.0, "upper": self.upper is not None}
            for key, given in {**bounds, "quantiles": self.quantiles is not None}.items():
                if given and self.fuse == "add":
                    raise ValueError(f"{key}: margins that are added have no bounds; remove it")
                if given and key in bounds and self.quantiles is not None:
                    raise ValueError(f"{key}: has no effect beside quantiles; remove one of the two")
            if self.upper is not None and not (len(self.upper) == 2 and min(self.upper) > self.lower):
                raise ValueError(f"upper: {list(self.upper)} must be two numbers above lower ({self.lower:g})")
            if self.quantiles is not None and not (len(self.quantiles) == 2 and self.quantiles[0] < self.quantiles[1]):
                raise ValueError(f"quantiles: {list(self.quantiles)} must be two rising numbers")

    params: Params

    def requires(self) -> Requires:
        return self._requires(implicit=True)

    def score(self, pool: Rows, ctx: Context) -> NDArray[np.float64]:
        """Return fused probabilities, or sums of margins [N]; NaN for outliers, and where a margin is missing.

        DataError where all of a kind of margins are on one side of its bounds.
        """
        p, margins = self.params, {"external": self.external(pool, ctx), "implicit": self.implicit(pool, ctx)}
        known = np.isfinite(margins["external"]) & np.isfinite(margins["implicit"])
        if p.outliers:
            ends = {name: np.quantile(one[known], [p.outliers, 1.0 - p.outliers]) for name, one in margins.items()}
            for name, one in margins.items():
                known &= (one >= ends[name][0]) & (one <= ends[name][1])
        kept = {name: one[known] for name, one in margins.items()}
        scores = np.full(len(pool), np.nan)
        if p.fuse == "add":
            scores[known] = kept["external"] + kept["implicit"]
        elif known.any():
            self._told = self._bounds(kept)
            scores[known] = fused(*(probabilities(kept[name], *self._told[name]) for name in ("external", "implicit")))
        return scores

    def _bounds(self, margins: Mapping[str, NDArray[np.float64]]) -> dict[str, tuple[float, float]]:
        """Return M1 and M2 of each margin."""
        p, found = self.params, {}
        for place, (name, one) in enumerate(margins.items()):
            if p.quantiles is not None:
                low, high = (float(each) for each in np.quantile(one, p.quantiles))
            else:
                low, high = p.lower, upper_bound(one) if p.upper is None else p.upper[place]
            if not low < high:
                raise DataError(
                    f"bees: {name} margins run from {one.min():.3g} to {one.max():.3g}, their bounds from {low:.3g} to "
                    f"{high:.3g}: they are in units of their own. Set quantiles ([0.02, 0.98]), or lower and upper"
                )
            found[name] = (low, high)
        return found

    def explain(self, kept: NDArray[np.int64], found: Found, ctx: Context) -> str:
        """Return how margins were fused, and the lengths of the answers."""
        if self.params.fuse == "add":
            return "of largest sum of margins" + self.told_lengths(kept, found)
        bounds = "; ".join(f"{name} {low:.3g} to {high:.3g}" for name, (low, high) in self._told.items())
        return f"most surely preferred ({bounds})" + self.told_lengths(kept, found)


def in_first_half(rows: Rows, seed: int) -> NDArray[np.bool_]:
    """Return which rows are of the first of two halves [n]: a draw by row id, whatever the pool."""
    return uniforms(seed, "selective_dpo.halves", 0, rows) < 0.5


def difficulty(losses_MN: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the mean of each pair's losses over the models that have one [N]; NaN where none has."""
    known = np.isfinite(losses_MN)
    sums = np.where(known, losses_MN, 0.0).sum(axis=0, dtype=np.float64)
    return np.where(known.any(axis=0), sums / np.maximum(known.sum(axis=0), 1), np.nan)


class SelectiveDpo(PoolSelector):
    """Keep the easier half of the pairs and serve them from easy to hard.

    SelectiveDPO of "Principled Data Selection for Alignment: The Hidden Risks of Difficult Examples", arXiv 2502.09650.
    A pair is as difficult as the DPO loss that models have on it which were trained without it. Three steps:

    1. Two runs, each on one of two halves of the pairs in random order: ``half: first``, and ``half: second``.
    2. This run, with the folders of their models as ``first`` and ``second``: each scores the half that it has not
       seen, against the run's reference (or ``reference``). Several of each (seeds, checkpoints) are averaged; the
       paper has three seeds at five evaluations. Scored once, whatever the interval.
    3. The easiest ``keep_share`` of the pairs are served in rising difficulty, equal ones in file order.

    Losses measured elsewhere are named as ``columns``, which are averaged. Only the ranks count: with the paper's beta
    of 0.01 all losses are near ln 2. What is too hard depends on the size of the model, so score anew for another. The
    halves follow from ``split_seed`` and the rows' places in the data, which must be the same in all three runs.
    """

    name = "selective_dpo"
    lacking = "no loss"
    card = Card(
        summary="Keeps the pairs on which models trained without them have a low DPO loss, and serves easy ones first.",
        paper="Principled Data Selection for Alignment: The Hidden Risks of Difficult Examples, arXiv 2502.09650",
        cost="4 F over the pool once for each pair of models, and the two runs on halves before; none with columns",
        note="Stage dpo. From the authors' code; of the paper the abstract was read. Theirs: beta 0.01, learning rate "
        "8e-7, one epoch, cosine, three seeds; duplicates of a prompt are dropped before.",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(BaseParams):
        """Parameters of SelectiveDPO; the share is the paper's (60 % for Gemma-2-9B)."""

        half: Literal["first", "second"] | None = param(None, "train on this half in random order, to score the other")
        first: tuple[str, ...] = param((), "folders or hub ids of models that were trained on the first half")
        second: tuple[str, ...] = param((), "the same of the second half")
        columns: tuple[str, ...] = param((), "columns of losses instead, which are averaged")
        reference: str | None = param(None, REFERENCE)
        keep_share: float = param(0.5, "share of the pairs that is kept, the easiest", above=0.0, maximum=1.0)
        beta: float = param(0.1, "factor of the margin in the loss, that of the runs on halves", above=0.0)
        split_seed: int = param(0, "seed of the halves; the same in all three runs", minimum=0)

        def __post_init__(self) -> None:
            given = [name for name in ("half", "first", "second", "columns") if getattr(self, name)]
            if given in (["half"], ["first", "second"], ["columns"]):
                idle = {"half": ("reference", "keep_share", "beta"), "columns": ("reference", "beta", "split_seed")}
                refuse_idle(self, idle.get(given[0], ()), f"with '{given[0]}'")
                return
            ways = "'half' (a run on a half), 'first' and 'second' (models trained on halves), or 'columns' (losses)"
            if not given:
                raise ValueError(f"columns: missing; give one of these: {ways}")
            raise ValueError(f"{given[0]}: give one of these: {ways}; found {', '.join(given)}")

    params: Params

    def requires(self) -> Requires:
        p = self.params
        if not p.first:
            return Requires(stages=("dpo",), columns=p.columns)
        models = {f"{half}[{i}]": name for half in ("first", "second") for i, name in enumerate(getattr(p, half))}
        return Requires(
            stages=("dpo",),
            signals=frozenset({"preference_logps"}),
            models={**models, "reference": p.reference},
            whole_parameters=True,
            passes=Passes(pool_once=2.0 + len(p.first) + len(p.second)),
        )

    def refused_values(self, name: str, values: NDArray[Any]) -> tuple[NDArray[np.bool_], str] | None:
        """Refuse what is no finite number."""
        return ~np.isfinite(_numbers(values)), "a loss must be a finite number"

    def score(self, pool: Rows, ctx: Context) -> NDArray[np.float64]:
        """Return mean losses [N], or draws within the half and NaN outside; NaN where no model has a loss."""
        p = self.params
        if p.half is not None:
            inside = in_first_half(pool, p.split_seed) == (p.half == "first")
            return np.where(inside, self.uniforms(ctx)("draws", pool), np.nan)
        if p.columns:
            return difficulty(np.stack([_numbers(ctx.columns[name][pool]) for name in p.columns]))
        first = in_first_half(pool, p.split_seed)
        losses = np.full((len(p.first) + len(p.second), len(pool)), np.nan)
        for place, (model, of_first) in enumerate([*((m, True) for m in p.first), *((m, False) for m in p.second)]):
            unseen = np.flatnonzero(first != of_first)
            margins = implicit_margins(
                ctx.signals(PreferenceLogps(of=model), pool[unseen]),
                ctx.signals(PreferenceLogps(of=p.reference or "reference"), pool[unseen]),
                p.beta,
            )
            losses[place, unseen] = np.logaddexp(0.0, -margins)
        return difficulty(losses)

    def kept(self, found: Found, rows: Rows, budget: int, ctx: Context) -> NDArray[np.int64]:
        """Return the easiest rows, easiest first, or the drawn ones of the half."""
        count = len(rows) if self.params.half is not None else whole_part(self.params.keep_share, len(rows))
        return top_k(-found.scores, min(budget, max(1, count)))

    def select(self, pool: Rows, budget: int, ctx: Context) -> Selection:
        """Keep pairs as ``kept`` does; they are served in that order, those of a half in random order."""
        return replace(super().select(pool, budget, ctx), ordered=self.params.half is None)

    def explain(self, kept: NDArray[np.int64], found: Found, ctx: Context) -> str:
        """Return the half, or how hard the rows kept are."""
        if self.params.half is not None:
            return f"of the {self.params.half} half, in random order"
        told = "from easy to hard"
        if len(kept):
            told += f", mean loss {found.scores[kept].mean():.3f} against {found.scores.mean():.3f}"
        return told
