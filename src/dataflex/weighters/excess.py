"""Training on the tokens or sequences whose loss exceeds that of a reference most: Rho-1 and RHO-LOSS."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from dataflex.method import BatchView, Card, ReferenceParams, Requires, Weighter, WeighterParams, param
from dataflex.sequences import Sequences

if TYPE_CHECKING:
    import torch


def largest(values: torch.Tensor, valid: torch.Tensor, share: float) -> torch.Tensor:
    """Return which valid values [n] are among the largest ceil(share x number of valid ones), one at least, bool [n].

    Ties go to the first. Nothing is read from the device.
    """
    order = values.masked_fill(~valid, -math.inf).argsort(descending=True, stable=True)
    # A hair less before rounding up: 0.6 x 5 is 3, whatever the last bit of the product says.
    kept = (valid.sum().double() * share - 1e-9).ceil().clamp(min=1)
    place = order.new_empty(len(order))
    place[order] = order.new_ones(len(order)).cumsum(0) - 1
    return (place < kept) & valid


class SelectiveLanguageModelling(Weighter):
    """Train on the tokens that the reference finds easier than the model does (Rho-1).

    The excess of a token is its loss less the reference's, not clipped; of all supervised tokens of the micro-batch the
    share ``keep`` of largest excess is trained on, and the loss is the mean over those. The reference was trained on
    clean data with the same tokenizer; with the model itself as the reference every excess is 0. The logged loss is
    that of the kept tokens; ``dataflex/plain_loss`` is that of all.

    The micro-batch is that of all ranks (``threshold: global``), so that their number changes nothing, or each rank's
    own, of which one token at least is kept.
    """

    name = "slm"
    by_token: ClassVar[bool] = True
    card = Card(
        summary="Trains on the tokens whose loss exceeds a reference model's most, and leaves out the others.",
        paper="Rho-1: Not All Tokens Are What You Need, NeurIPS 2024, arXiv 2404.07965",
        cost="1 F of the reference over each row served, once (cached), or in every step",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(ReferenceParams, WeighterParams):
        keep: float = param(0.6, "share of the supervised tokens that is trained on", above=0.0, maximum=1.0)
        threshold: Literal["global", "local"] = param("global", "compare tokens over all ranks, or on each rank alone")

    params: Params

    def requires(self) -> Requires:
        return Requires(stages=("pt", "sft"), reference=self.params.stated())

    def weigh(self, batch: BatchView) -> torch.Tensor:
        """Return 1 for kept tokens and 0 for all others [R, T] (collective under ``threshold: global``)."""
        assert batch.reference_BT is not None
        excess, mask = (batch.loss_BT - batch.reference_BT).flatten(), batch.mask_BT.flatten()
        if self.params.threshold == "local":
            kept = largest(excess, mask, self.params.keep)
        else:
            from dataflex import comm

            # An excess of minus infinity stands for a position that is not supervised.
            both, local = comm.gather_rows(excess.masked_fill(~mask, float("-inf")))
            kept = largest(both, both > float("-inf"), self.params.keep)[local]
        return kept.view(batch.mask_BT.shape).to(batch.loss_BT.dtype)


class Rho(Weighter):
    """Of a micro-batch, train on the sequences whose loss exceeds the reference's most (RHO-LOSS as weights).

    The reducible loss of a sequence is its token-mean loss less the irreducible one, that of a model trained on
    held-out data; the n of largest reducible loss get the weight 1 / n, all others 0. In the paper n is a tenth of a
    large batch and only those n are trained on. Here every sequence of the micro-batch goes through forward and
    backward, so it costs a plain step: the micro-batch (of all ranks) should be large.
    """

    name = "rho"
    normalizer = "num_sequences"  # weights of the micro-batch sum to one
    card = Card(
        summary="Trains on the sequences of each micro-batch whose loss exceeds a reference model's most.",
        paper="Prioritized Training on Points that are Learnable, Worth Learning, and Not Yet Learnt, ICML 2022, "
        "arXiv 2206.07137",
        cost="1 F of the reference over each row served, once (cached), or in every step",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(ReferenceParams, WeighterParams):
        keep: float = param(
            0.1, "share of the micro-batch's sequences that is trained on, rounded up", above=0.0, maximum=1.0
        )

    params: Params

    def requires(self) -> Requires:
        return Requires(stages=("pt", "sft"), reference=self.params.stated())

    def weigh(self, batch: BatchView) -> torch.Tensor:
        """Return 1 / n for the n sequences kept over all ranks, else 0 [B] (collective)."""
        from dataflex import comm

        assert batch.reference_BT is not None
        sums_B = Sequences(rows_B=batch.rows_B, index_BT=batch.sequence_BT).sums(batch.reference_BT)
        irreducible_M, _ = comm.gather_rows(sums_B / batch.tokens_B.clamp(min=1), equal=batch.sequence_BT is None)
        kept_M = largest(batch.loss_M - irreducible_M, batch.tokens_M > 0, self.params.keep)
        weights_M = kept_M / kept_M.sum().clamp(min=1)
        return weights_M[batch.local].to(batch.loss_B.dtype)
