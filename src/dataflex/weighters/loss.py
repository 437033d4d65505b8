"""Weights from losses of the micro-batch: by their size (LinUpper), or their excess over a reference's (Rho-1, RHO)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from dataflex.errors import ComponentError
from dataflex.method import BatchView, Card, ReferenceParams, Requires, Weighter, WeighterParams, param
from dataflex.method import Params as BaseParams
from dataflex.plan.proportions import NO_MORE
from dataflex.sequences import Sequences

if TYPE_CHECKING:
    import torch

Strategy = Literal["linupper", "quadratic", "extremes", "upper", "softmax_loss"]

_SHAPES: dict[str, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "linupper": lambda h, delta: (h + delta).clamp(max=delta),
    "quadratic": lambda h, delta: 1.0 - (h / delta).square(),
    "extremes": lambda h, delta: h.abs(),
    "upper": lambda h, delta: 0.5 * (h + delta),
    "softmax_loss": lambda h, delta: h,
}

STRATEGIES: tuple[str, ...] = tuple(_SHAPES)

_LEAST_RANGE = 1e-6  # below it the losses differ by rounding only: weigh them alike


def loss_weights(loss_M: torch.Tensor, valid_M: torch.Tensor, strategy: str, delta: float, r: float) -> torch.Tensor:
    """Return fp32 weights [M] that sum to one over the valid sequences and are 0 elsewhere.

    With l_min and l_max over the valid sequences, ``h = delta (2 l - l_max - l_min) / (l_max - l_min)``,
    the strategy's f(h), and ``w = softmax(f / r)``:

    - ``linupper``: min(h + delta, delta): easy sequences count less, hard ones alike.
    - ``quadratic``: 1 - h^2 / delta^2: the middle counts most.
    - ``extremes``: abs(h): both ends count most.
    - ``upper``: (h + delta) / 2: the harder, the more.
    - ``softmax_loss``: h: the same, sharper ("uniform" in the authors' code, which it is not).

    ``loss_M`` are token means in nats, ignored where not valid. Losses that span less than 1e-6 get equal weights. No
    valid sequence: all weights are 0.
    """
    if loss_M.numel() == 0:
        return loss_M.float()
    loss = loss_M.detach().float()
    least = loss.masked_fill(~valid_M, math.inf).amin()
    most = loss.masked_fill(~valid_M, -math.inf).amax()
    spread = most - least
    h = delta * ((loss - least) - (most - loss)) / spread.clamp(min=_LEAST_RANGE)
    f = _SHAPES[strategy](h, delta)
    f = f.masked_fill(spread < _LEAST_RANGE, 0.0).masked_fill(~valid_M, -math.inf)
    w = ((f - f.amax()) / r).exp().masked_fill(~valid_M, 0.0)
    return w / w.sum().clamp(min=1.0)  # the largest term is exp(0), so the sum is 0 or at least 1


def scheduled(step: int, r: float, knots: tuple[tuple[int, float], ...], interpolation: str) -> float:
    """Return r at ``step``: ``r`` at step 0, then through ``knots`` (step, r), constant after the last.

    ``step`` keeps each value until the next knot, ``linear`` and ``exponential`` interpolate r and log r.
    """
    points = ((0, r), *knots)
    start, value = [point for point in points if point[0] <= step][-1]
    after = [point for point in points if point[0] > step]
    if interpolation == "step" or not after:
        return value
    stop, goal = after[0]
    share = (step - start) / (stop - start)
    if interpolation == "linear":
        return value + share * (goal - value)
    return math.exp(math.log(value) + share * (math.log(goal) - math.log(value)))


@dataclass(frozen=True, kw_only=True)
class Softness:
    """One entry of ``r_schedule``."""

    step: int = param(help="optimizer step at which r is reached", minimum=1)
    r: float = param(help="softness of the weights from there on", above=0.0)


class LossWeighter(Weighter):
    """Weigh the sequences of a micro-batch by their own losses.

    The losses of one micro-batch, over all ranks, are mapped to [-delta, delta], shaped by a strategy and
    exponentiated; the weights sum to one. Only the ``microbatch`` scope of the paper's code is built: with gradient
    accumulation each micro-batch is weighed alone, and a micro-batch of one sequence (over all ranks) is not reweighted
    at all.

    Rows with wrong answers have large losses, and ``linupper`` does not drop them: it caps what they count at that of
    any row above the middle of the range. Where a tenth of the rows was random tokens (a Markov chain learnt by a
    bigram table, micro-batches of 10), they weighed 1.9 times the mean under ``linupper``, 2.0 under ``upper``, 3.4
    under ``softmax_loss``, 1.1 under ``extremes`` and 0.83 under ``quadratic``.
    """

    name = "loss"
    normalizer = "num_sequences"
    card = Card(
        summary="Weighs the sequences of each micro-batch by their own losses; linupper plays down the easy ones.",
        paper="Dynamic Loss-Based Sample Reweighting for Improved LLM Pretraining (Sow et al.), ICLR 2025, "
        "arXiv 2502.06733",
        cost="one gather of a number per sequence and micro-batch",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(BaseParams):
        strategy: Strategy = param("linupper", "how the loss becomes a weight")
        delta: float = param(1.0, "half-width of the range that losses are mapped to", above=0.0)
        r: float = param(1.0, "softness of the weights: small is sharp, large is uniform", above=0.0)
        r_schedule: tuple[Softness, ...] = param(
            (), "later values of r: [{step: 2000, r: 0.4}, ...], steps rising from 1"
        )
        r_interpolation: Literal["step", "linear", "exponential"] = param(
            "step", "what happens between the values of r_schedule"
        )
        warmup_steps: int | None = param(
            None,
            "optimizer steps with the plain loss at first; null is the larger of 1000 and 5 % of the run",
            minimum=0,
        )
        length_norm: Literal["none", "paper_hf"] = param(
            "none", "paper_hf: multiply by length over mean length, as the authors' Hugging Face trainer"
        )

        def __post_init__(self) -> None:
            steps = [0, *(knot.step for knot in self.r_schedule)]
            for before, after in pairwise(steps):
                if after <= before:
                    raise ValueError(
                        f"r_schedule: step {after} must come after step {before} (r itself is the value at step 0)"
                    )
            if self.r_schedule and not all(math.isfinite(r) for r in (self.r, *(knot.r for knot in self.r_schedule))):
                raise ValueError("r_schedule: every r, the first one included, must be finite")

    params: Params

    def warmup(self, total_steps: int) -> int:
        """Return ``warmup_steps``; 1000 steps, or a twentieth of a long run, where it is null."""
        given = self.params.warmup_steps
        return max(1000, math.ceil(0.05 * total_steps - NO_MORE)) if given is None else given

    def weigh(self, batch: BatchView) -> torch.Tensor:
        """Return weights [B] of this rank's sequences; over all ranks they sum to one.

        With ``length_norm: paper_hf`` they are multiplied by tokens over the mean tokens of the micro-batch's valid
        sequences. The mean is taken over all ranks (the authors take it on each rank).
        """
        p, valid = self.params, batch.tokens_M > 0
        bad = valid & ~batch.loss_M.isfinite()
        # An accelerator would have to wait for a look; there the weights are not finite either, which the log tells.
        if bad.device.type == "cpu" and bool(bad.any()):
            mine = batch.rows_B[bad[batch.local].numpy()].tolist()
            which = f"rows {', '.join(map(str, mine[:8]))}" if mine else f"{int(bad.sum())} sequences of other ranks"
            raise ComponentError(
                f"loss weighter: the loss of {which} at step {batch.step} is not finite. "
                "The model has diverged or these rows are broken; lower the learning rate or look at the rows."
            )
        r = scheduled(batch.step, p.r, tuple((knot.step, knot.r) for knot in p.r_schedule), p.r_interpolation)
        w = loss_weights(batch.loss_M, valid, p.strategy, p.delta, r)
        if p.length_norm == "paper_hf":
            tokens = batch.tokens_M.float()
            w = w * tokens * valid.sum() / tokens.sum().clamp(min=1.0)
        return w[batch.local]


def largest(values: torch.Tensor, valid: torch.Tensor, share: float) -> torch.Tensor:
    """Return which valid values [n] are among the largest ceil(share x number of valid ones), one at least, bool [n].

    Ties go to the first. Nothing is read from the device.
    """
    order = values.masked_fill(~valid, -math.inf).argsort(descending=True, stable=True)
    # A hair less before rounding up: 0.6 x 5 is 3, whatever the last bit of the product says.
    kept = (valid.sum().double() * share - NO_MORE).ceil().clamp(min=1)
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
    by_token: bool = True
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
