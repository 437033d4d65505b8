"""Selective language modelling (Rho-1): train on the tokens that the reference finds easier than the model does.

Lin, Gou et al., "Rho-1: Not All Tokens Are What You Need", NeurIPS 2024, arXiv 2404.07965. The excess of a token
is its loss less the reference's, not clipped; of all supervised tokens of the micro-batch the share ``keep`` of
largest excess is trained on, and the loss is the mean over those. The reference was trained on clean data with
the same tokenizer; with the model itself as the reference every excess is 0. The logged loss is that of the kept
tokens; ``dataflex/plain_loss`` is that of all.

The micro-batch is that of all ranks (``threshold: global``), so that their number changes nothing, or each rank's
own, of which one token at least is kept.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from dataflex.method import BatchView, Card, Normalizer, ReferenceParams, Requires, Weighter, WeighterParams
from dataflex.weighters.excess import largest
from dataflex.weighters.sequences import reference_losses

if TYPE_CHECKING:
    import torch

__all__ = ["SelectiveLanguageModelling"]


class SelectiveLanguageModelling(Weighter):
    """Keep the tokens of largest excess loss."""

    name = "slm"
    by_token: ClassVar[bool] = True
    card = Card(
        summary="Trains on the tokens whose loss exceeds a reference model's most, and leaves out the others.",
        paper="Rho-1: Not All Tokens Are What You Need, NeurIPS 2024, arXiv 2404.07965",
        cost="1 F of the reference over each row served, once (cached), or in every step",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(ReferenceParams, WeighterParams):
        """Parameters of SLM."""

        keep: float = field(
            default=0.6,
            metadata={"help": "share of the supervised tokens that is trained on", "above": 0.0, "maximum": 1.0},
        )
        threshold: Literal["global", "local"] = field(
            default="global", metadata={"help": "compare tokens over all ranks, or on each rank alone"}
        )

        def __post_init__(self) -> None:
            if not self.reference.strip():
                raise ValueError("reference: is empty; without a reference model there is no excess loss")

    params: Params

    def requires(self) -> Requires:
        """State what the run must have."""
        return Requires(stages=("pt", "sft"), reference=self.params.stated())

    @property
    def normalizer(self) -> Normalizer:
        """The mean over kept tokens."""
        return "token"

    def weigh(self, batch: BatchView) -> torch.Tensor:
        """Return 1 for kept tokens and 0 for all others [R, T] (collective under ``threshold: global``)."""
        excess = (batch.loss_BT - reference_losses(self.name, batch)).flatten()
        mask = batch.mask_BT.flatten()
        if self.params.threshold == "local":
            kept = largest(excess, mask, self.params.keep)
        else:
            kept = self._kept_everywhere(excess, mask)
        return kept.view(batch.mask_BT.shape).to(batch.loss_BT.dtype)

    def _kept_everywhere(self, excess: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        import torch

        from dataflex import comm

        # An excess of minus infinity stands for a position that is not supervised.
        both, local = comm.gather_rows(torch.where(mask, excess, float("-inf")))
        return largest(both, both > float("-inf"), self.params.keep)[local]
