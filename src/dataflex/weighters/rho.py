"""RHO-LOSS as weights: of a micro-batch, train on the sequences whose loss exceeds the reference's most.

Mindermann et al., "Prioritized Training on Points that are Learnable, Worth Learning, and Not Yet Learnt", ICML
2022, arXiv 2206.07137. The reducible loss of a sequence is its token-mean loss less the irreducible one, that of a
model trained on held-out data; the n of largest reducible loss get the weight 1 / n, all others 0. In the
paper n is a tenth of a large batch and only those n are trained on. Here every sequence of the micro-batch goes
through forward and backward, so it costs a plain step: the micro-batch (of all ranks) should be large.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dataflex.method import BatchView, Card, Normalizer, ReferenceParams, Requires, Weighter, WeighterParams
from dataflex.weighters.excess import largest
from dataflex.weighters.sequences import reference_losses, sequence_means

if TYPE_CHECKING:
    import torch

__all__ = ["Rho"]


class Rho(Weighter):
    """Keep the sequences of largest reducible loss."""

    name = "rho"
    card = Card(
        summary="Trains on the sequences of each micro-batch whose loss exceeds a reference model's most.",
        paper="Prioritized Training on Points that are Learnable, Worth Learning, and Not Yet Learnt, ICML 2022, "
        "arXiv 2206.07137",
        cost="1 F of the reference over each row served, once (cached), or in every step",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(ReferenceParams, WeighterParams):
        """Parameters of RHO-LOSS."""

        keep: float = field(
            default=0.1,
            metadata={
                "help": "share of the micro-batch's sequences that is trained on, rounded up",
                "above": 0.0,
                "maximum": 1.0,
            },
        )

        def __post_init__(self) -> None:
            if not self.reference.strip():
                raise ValueError("reference: is empty; without a reference model there is no reducible loss")

    params: Params

    def requires(self) -> Requires:
        """State what the run must have."""
        return Requires(stages=("pt", "sft"), reference=self.params.stated())

    @property
    def normalizer(self) -> Normalizer:
        """Weights of the micro-batch sum to one and multiply token-mean losses."""
        return "sample"

    def weigh(self, batch: BatchView) -> torch.Tensor:
        """Return 1 / n for the n sequences kept over all ranks, else 0 [B] (collective)."""
        from dataflex import comm

        irreducible_B = sequence_means(reference_losses(self.name, batch), batch)
        irreducible_M, _ = comm.gather_rows(irreducible_B, equal=batch.sequence_BT is None)
        kept_M = largest(batch.loss_M - irreducible_M, batch.tokens_M > 0, self.params.keep)
        weights_M = kept_M / kept_M.sum().clamp(min=1)
        return weights_M[batch.local].to(batch.loss_B.dtype)
