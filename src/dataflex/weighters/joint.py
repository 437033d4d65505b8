"""Joint-update-aware weights: towards the targets, and away from sequences that say the same.

The weighter of that name in existing DataFlex (no paper is known), with its objective over the weights of the
micro-batch of all ranks,

    max over the simplex of  s'w - (beta / 2) w'Sw + tau H(w),      w = softmax((s - beta S w) / tau),

where S holds the inner products of the sequences' vectors and s those with the anchors' mean vector, made
unit. There, five undamped iterations do not reach the fixed point (two equal sequences beside another one get
0.259 each instead of 0.293); here the iteration runs until it holds to 1e-7. Vectors of the rows in training
come out of the training forward; anchors are all rows of the targets.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import ComponentError
from dataflex.method import BatchView, Card, Context, Normalizer, Requires, Rows, State, Weighter, WeighterParams
from dataflex.signals.specs import EmbeddingSpec
from dataflex.weighters.anchors import Anchors

if TYPE_CHECKING:
    import torch

__all__ = ["JointUpdateAware", "fixed_point"]

Floats = NDArray[np.float64]

_RESIDUAL = 1e-7
_MOST = 100_000


def _softmax(values: Floats) -> Floats:
    raised = np.exp(values - values.max())
    return np.asarray(raised / raised.sum())


def fixed_point(alignment: Floats, gram: Floats, *, beta: float, tau: float) -> Floats:
    """Return the weights w = softmax((s - beta S w) / tau), to a residual below 1e-7.

    Each iteration moves the logarithms by the share tau / (tau + beta max |S|). The objective is smooth relative
    to the entropy with constant beta max |S|, so that step always converges (mirror descent: the distance
    shrinks by at least the factor 1 - share), while undamped iterations oscillate.

    Args:
        alignment: s [M].
        gram: S [M, M], symmetric and positive semi-definite.
        beta: How much likeness among sequences counts, >= 0.
        tau: Weight of the entropy, above 0.

    Raises:
        ComponentError: No convergence, as when values are not finite.
    """
    logs = np.zeros(len(alignment))
    share = tau / (tau + beta * float(np.abs(gram).max(initial=0.0)))
    for _ in range(_MOST):
        weights = _softmax(logs)
        aim = (alignment - beta * (gram @ weights)) / tau
        if np.abs(_softmax(aim) - weights).max(initial=0.0) < _RESIDUAL:
            return weights
        logs = (1.0 - share) * logs + share * aim
    raise ComponentError(
        f"joint_update_aware: weights do not settle with beta = {beta} and tau = {tau}; raise tau, or look for "
        "embeddings that are not finite"
    )


class JointUpdateAware(Weighter):
    """Weigh the sequences of a micro-batch together: aligned with the targets, unlike one another."""

    name = "joint_update_aware"
    card = Card(
        summary="Weighs the sequences of a micro-batch towards the targets and away from one another.",
        paper="baseline (existing DataFlex; no paper)",
        cost="1 F over the targets every refresh_steps, one gather of vectors per micro-batch",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(WeighterParams):
        """Parameters; the defaults are those of existing DataFlex, except that the iteration converges."""

        beta: float = field(
            default=0.1, metadata={"help": "how much likeness among the sequences counts", "minimum": 0.0}
        )
        tau: float = field(default=0.05, metadata={"help": "weight of the entropy; small is sharp", "above": 0.0})
        mode: Literal["full", "align_only", "diverse_only", "uniform"] = field(
            default="full", metadata={"help": "both terms, only the targets, only the likeness, or none of the two"}
        )
        pooling: Literal["last", "mean", "weighted_mean", "first"] = field(
            default="last", metadata={"help": "which hidden states make up a sequence's vector"}
        )
        completion_only: bool = field(default=False, metadata={"help": "pool the supervised tokens only"})
        layer: int = field(default=-1, metadata={"help": "layer of the hidden states; -1 is the last, after its norm"})
        normalize: bool = field(default=True, metadata={"help": "whether vectors are divided by their norm"})
        refresh_steps: int = field(
            default=50, metadata={"help": "optimizer steps between two passes over the targets", "minimum": 1}
        )

        @property
        def spec(self) -> EmbeddingSpec:
            """How rows in training and anchors are embedded."""
            return EmbeddingSpec(
                layer=self.layer,
                pooling=self.pooling,
                completion_only=self.completion_only,
                normalize=self.normalize,
            )

    params: Params

    def requires(self) -> Requires:
        """State what the run must have."""
        return Requires(
            signals=frozenset({"embeddings"}), targets=True, stages=("pt", "sft"), embedding=self.params.spec
        )

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        self._anchors = Anchors(self.name, params.spec, params.refresh_steps)

    @property
    def normalizer(self) -> Normalizer:
        """Weights of the micro-batch sum to one and multiply token-mean losses."""
        return "sample"

    def due(self, step: int) -> bool:
        """Whether the anchors are to be embedded anew."""
        return self._anchors.due(step)

    def prepare(self, ctx: Context, rows: Rows) -> None:
        """Embed the anchors."""
        self._anchors.refresh(ctx)

    def weigh(self, batch: BatchView) -> torch.Tensor:
        """Return weights [B] that sum to one over the ranks' sequences with supervised tokens (collective).

        Solved on the CPU in float64, by every rank alike; the micro-batch's Gram matrix is copied there.
        """
        import torch

        from dataflex import comm

        mode, p = self.params.mode, self.params
        alignment_B = self._anchors.products(batch, unit=True)
        assert batch.embeddings_BH is not None
        both, _ = comm.gather_rows(torch.cat([batch.embeddings_BH, alignment_B[:, None]], dim=1).float())
        vectors_MH, alignment_M = both[:, :-1], both[:, -1]
        gram = (vectors_MH @ vectors_MH.T).cpu().double().numpy()
        valid = (batch.tokens_M > 0).cpu().numpy()
        s = alignment_M.cpu().double().numpy() if mode in ("full", "align_only") else np.zeros(len(valid))
        beta = p.beta if mode in ("full", "diverse_only") else 0.0
        weights = np.zeros(len(valid), dtype=np.float32)
        if valid.any():
            weights[valid] = fixed_point(s[valid], gram[np.ix_(valid, valid)], beta=beta, tau=p.tau)
        return torch.from_numpy(weights[batch.local]).to(batch.loss_B.device)

    def state_dict(self) -> State:
        """Return the anchors' mean vector."""
        return self._anchors.state_dict()

    def load_state_dict(self, state: State) -> None:
        """Take back what ``state_dict`` gave."""
        self._anchors.load_state_dict(state)
