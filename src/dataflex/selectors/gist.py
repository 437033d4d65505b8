"""GIST: rows whose gradients point along a target's, inside the subspace that the targets' gradients span."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import DataError
from dataflex.method import Card, Context, Passes, Requires, Rows, param
from dataflex.plan.domains import Floats
from dataflex.select.scoring import Found, ScoringParams, ScoringSelector
from dataflex.selectors._lib import GRADIENTS, TOKEN_LOSSES, even
from dataflex.signals.kinds import GradientNorms, GradientSketches
from dataflex.signals.specs import GradientOptions

_AT_ONCE = 8192  # rows
_LEAST = 1e-6  # share of the largest singular value below which a direction is noise


def subspace(targets: Sequence[Floats], components: int) -> tuple[Floats, Floats]:
    """Return a basis of the main directions of all targets' rows [D, K], and each target's mean gradient in it [T, K].

    With all rows as G [M, D] and G G' = U S^2 U', the basis is G' U S^-1 of the ``components`` largest singular values.
    """
    gradients_MD = np.concatenate(targets)
    squares, vectors = np.linalg.eigh(gradients_MD @ gradients_MD.T)
    singular = np.sqrt(np.maximum(squares[::-1][:components], 0.0))
    kept = singular > _LEAST * singular[0]
    basis_DK = gradients_MD.T @ (vectors[:, ::-1][:, :components][:, kept] / singular[kept])
    return basis_DK, np.stack([rows.mean(axis=0) @ basis_DK for rows in targets])


def cosines(rows_ND: NDArray[np.floating], basis_DK: Floats, means_TK: Floats, *, full: bool = False) -> Floats:
    """Return cosines of rows with each target's mean gradient in the subspace [T, N]; 0 for a row without a part in it.

    With ``full`` the row's length is that of its whole gradient.
    """
    rows_NK = rows_ND @ basis_DK
    lengths = np.linalg.norm(rows_ND if full else rows_NK, axis=1)
    products = means_TK @ rows_NK.T / np.maximum(np.linalg.norm(means_TK, axis=1), 1e-300)[:, None]
    return np.asarray(products / np.where(lengths == 0, 1.0, lengths), dtype=np.float64)


class Gist(ScoringSelector):
    """Keep the rows whose gradients are most like a target's inside the subspace that the targets' gradients span.

    Main directions of the gradients of all targets' rows make a subspace; rows are compared there with the mean
    gradient of each target, by cosines. A row nearly orthogonal to the subspace has a large cosine in it all the same:
    ``denominator: full`` divides by the length of its whole gradient. Gradients are plain, of the model as it is.

    Inner products of rows with target rows are all it takes; here they are those of sketches (``sketch_size`` numbers a
    row), exact up to about 1 / sqrt(sketch_size), so that no basis of the parameters' size is held.
    """

    name = "gist"
    lacking = "no supervised token"
    card = Card(
        summary="Keeps the rows whose gradients are like a target's within the subspace of the targets' gradients.",
        paper="GIST: Targeted Data Selection for Instruction Tuning via Coupled Optimization Geometry, ICML 2026, "
        "arXiv 2602.18584",
        cost="1 F + 1 B over the pool and 2 (F + B) over the targets per interval",
        note="Sketches stand for gradients: the authors project on a basis of the subspace, of components times the "
        "parameters' size. They select once, from one checkpoint of LoRA.",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(GradientOptions, ScoringParams):
        components: int = param(150, "most directions of the subspace", minimum=1)
        denominator: Literal["subspace", "full"] = param(
            "subspace", "what a row's product is divided by: its length there, as published, or of its whole gradient"
        )
        sketch_size: int = param(4096, "numbers that stand for a row's gradient, even", minimum=2)

        def __post_init__(self) -> None:
            even("sketch_size", self.sketch_size)

    params: Params

    def requires(self) -> Requires:
        return replace(GRADIENTS, stages=TOKEN_LOSSES.stages, passes=Passes(pool=(1.0, 1.0), targets=(2.0, 2.0)))

    def score(self, pool: Rows, ctx: Context) -> NDArray[np.float64]:
        """Return cosines by target [T, N]; DataError where a target has no row with a gradient."""
        p = self.params
        options = p.options(precondition="none", include_momentum=False, normalize=False)
        sketches, norms = GradientSketches(dim=p.sketch_size, **options), GradientNorms(**options)
        targets = []
        for name in ctx.targets:
            rows = np.arange(ctx.signals.num_rows(name), dtype=np.int64)
            found = ctx.signals(sketches, rows, target=name).astype(np.float64)
            found = found * ctx.signals(norms, rows, target=name).astype(np.float64)[:, None]
            targets.append(found[np.isfinite(found).all(axis=1)])
            if not targets[-1].any():
                raise DataError(f"gist: target {name!r} has {len(rows):,} rows, none of which has a gradient")
        basis, means = subspace(targets, p.components)
        of_pool, scores = ctx.signals(sketches, pool), np.empty((len(targets), len(pool)))
        for start in range(0, len(pool), _AT_ONCE):  # NaN where a row has no sketch
            part = slice(start, start + _AT_ONCE)
            scores[:, part] = cosines(of_pool[part], basis, means, full=p.denominator == "full")
        return scores

    def explain(self, kept: NDArray[np.int64], found: Found, ctx: Context) -> str:
        """Return the targets."""
        return f"most like {', '.join(ctx.targets)} in the subspace of their gradients"
