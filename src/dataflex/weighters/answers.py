"""Weights of an answer's tokens: against the model before training (ssToken), or its author (PEAR); Q-Tuning."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dataflex.method import BatchView, Card, ReferenceParams, Requires, Weighter, WeighterParams, param
from dataflex.plan.domains import Floats
from dataflex.plan.proportions import NO_MORE
from dataflex.sequences import Sequences

if TYPE_CHECKING:
    import torch

_MOST_NATS = 80.0  # losses beyond it are no larger as perplexities, which must stay finite in fp32


def sequence_of(batch: BatchView) -> torch.Tensor:
    """Return the index into ``_B`` of each position's sequence [R, T]."""
    import torch

    if batch.sequence_BT is not None:
        return batch.sequence_BT
    rows, width = batch.mask_BT.shape
    return torch.arange(rows, device=batch.mask_BT.device)[:, None].expand(rows, width)


def best_of_each(
    values_BT: torch.Tensor, mask_BT: torch.Tensor, sequence_BT: torch.Tensor, kept_B: torch.Tensor
) -> torch.Tensor:
    """Return which supervised positions are among the ``kept_B`` largest of their sequence, bool [R, T].

    Ties go to the first. Nothing is read from the device.
    """
    import torch

    if not len(kept_B):
        return torch.zeros_like(mask_BT)
    which = sequence_BT.flatten()
    order = values_BT.masked_fill(~mask_BT, -math.inf).flatten().argsort(descending=True, stable=True)
    order = order[which[order].argsort(stable=True)]
    counts = torch.zeros_like(kept_B).index_add(0, which, torch.ones_like(which))
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    place = place - (counts.cumsum(0) - counts)[which]
    return (place < kept_B[which]).view(mask_BT.shape) & mask_BT


def share_of(tokens_B: torch.Tensor, share: float) -> torch.Tensor:
    """Return ceil(share x tokens) of each sequence, int64 [B]."""
    return (tokens_B.double() * share - NO_MORE).ceil().clamp(min=0).long()


class SsToken(Weighter):
    """Train on the tokens of each answer that the model has got better at since it was the reference.

    A token's gain is the reference's loss less the model's, and of each sequence the ceil(keep x tokens) of largest
    gain are trained on; the loss is the mean over those. The reference is the model before training. It is ``slm`` with
    the sign reversed and sequence by sequence.

    The paper mixes the gain, scaled to 0 to 1 in each sequence, with the attention that a token pays to the prompt in
    the last layer (gamma .5). Attention is not given to weighters (fused kernels do not make it), so this is gamma = 1,
    where the scaling changes no order.
    """

    name = "ss_token"
    by_token: bool = True
    card = Card(
        summary="Trains on the tokens of each answer whose loss fell most since the model before training.",
        paper="ssToken, ICLR 2026, arXiv 2510.18250",
        cost="1 F of the reference over each row served, once (cached), or in every step",
        note="gamma = 1: without the paper's attention to the prompt. At first every gain is about 0; warmup_steps "
        "stands for the authors' beginning with attention alone.",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(ReferenceParams, WeighterParams):
        keep: float = param(
            0.6, "share of each sequence's supervised tokens that is trained on", above=0.0, maximum=1.0
        )

    params: Params

    def requires(self) -> Requires:
        return Requires(stages=("pt", "sft"), reference=self.params.stated())

    def weigh(self, batch: BatchView) -> torch.Tensor:
        """Return 1 for kept tokens and 0 for all others [R, T]."""
        assert batch.reference_BT is not None
        gain, kept = batch.reference_BT - batch.loss_BT, share_of(batch.tokens_B, self.params.keep)
        return best_of_each(gain, batch.mask_BT, sequence_of(batch), kept).to(batch.loss_BT.dtype)


def later_sums(values_BT: torch.Tensor, mask_BT: torch.Tensor, sequence_BT: torch.Tensor, num: int) -> torch.Tensor:
    """Return the sum of the values at later supervised positions of the same sequence, float64 [R, T]."""
    import torch

    sums = values_BT.double().masked_fill(~mask_BT, 0.0).cumsum(dim=1)
    if not sums.numel():
        return sums
    places = torch.arange(mask_BT.numel(), device=mask_BT.device).masked_fill(~mask_BT.flatten(), -1)
    last_B = places.new_full((max(num, 1),), -1).scatter_reduce(0, sequence_BT.flatten(), places, "amax")
    return sums.flatten()[last_B.clamp(min=0)][sequence_BT] - sums


class Pear(Weighter):
    """Weigh each token by how likely the model makes what follows it, against the model that wrote the data.

    With d_t = ln p(y_t) - ln q(y_t), p the model and q the author (the reference), clipped to ``least`` and ``most``,
    and n_t supervised tokens after t: G_t = gamma ^ n_t exp(sum of d over those), ln G within -10 and 5; or for
    ``level: sequence`` exp(sum of all d). The loss is sum_t G_t l_t divided by the number of tokens. Data that people
    wrote has no such author.
    """

    name = "pear"
    normalizer = "num_tokens"
    card = Card(
        summary="Weighs each token by how much likelier the model makes its continuation than the data's author did.",
        paper="PEAR, ICML 2026, arXiv 2602.01058",
        cost="1 F of the reference over each row served, once (cached), or in every step",
        note="From a reader's notes on the paper: there is no code of the authors, and we did not read the text. Its "
        "form by blocks of tokens is not offered.",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(ReferenceParams, WeighterParams):
        level: Literal["token", "sequence"] = param("token", "whether tokens have weights of their own, or sequences")
        gamma: float = param(0.999, "discount of each later token, for tokens", above=0.0, maximum=1.0)
        least: float = param(-0.08, "least difference of log-probabilities, nats", maximum=0.0)
        most: float = param(0.3, "largest difference of log-probabilities, nats", minimum=0.0)

    params: Params

    def __init__(self, params: Params) -> None:
        super().__init__(params)
        self.by_token = params.level == "token"

    def requires(self) -> Requires:
        return Requires(stages=("pt", "sft"), reference=self.params.stated())

    def weigh(self, batch: BatchView) -> torch.Tensor:
        """Return weights [R, T], 0 where nothing is supervised, or [B]."""
        assert batch.reference_BT is not None
        p, mask = self.params, batch.mask_BT
        change = (batch.reference_BT - batch.loss_BT).clamp(p.least, p.most).masked_fill(~mask, 0.0)
        if p.level == "sequence":
            total = Sequences(rows_B=batch.rows_B, index_BT=batch.sequence_BT).sums(change.double())
            return total.clamp(-10.0, 5.0).exp().to(batch.loss_B.dtype)
        of, num = sequence_of(batch), len(batch.rows_B)
        after = later_sums(mask.double(), mask, of, num)
        weights = (math.log(p.gamma) * after + later_sums(change, mask, of, num)).clamp(-10.0, 5.0).exp()
        return weights.to(batch.loss_BT.dtype).masked_fill(~mask, 0.0)


class Kept(NamedTuple):
    """What Q-Tuning keeps of a batch, bool [M] each."""

    errors: NDArray[np.bool_]  # confident errors: large perplexity, small entropy
    calibration: NDArray[np.bool_]  # small perplexity, large entropy
    filled: NDArray[np.bool_]  # of the rest, to make up the number


def quadrants(ppl_M: Floats, entropy_M: Floats, alpha: float) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return the confident errors and the calibration samples [M], beyond the quantiles alpha and 1 - alpha."""

    def quantile(values: Floats, share: float) -> float:  # the least value with that share at or below it
        return float(np.sort(values)[max(math.ceil(share * len(values) - NO_MORE), 1) - 1])

    errors = (ppl_M >= quantile(ppl_M, 1 - alpha)) & (entropy_M <= quantile(entropy_M, alpha))
    calm = (ppl_M <= quantile(ppl_M, alpha)) & (entropy_M >= quantile(entropy_M, 1 - alpha))
    return errors, calm & ~errors


def kept_samples(ppl_M: Floats, entropy_M: Floats, share: float, bisections: int = 10) -> tuple[Kept, float]:
    """Return which of M >= 1 samples are kept, and the alpha in [0, .49] that was found by bisection."""
    low, high, alpha = 0.0, 0.49, 0.0
    for _ in range(bisections):
        alpha = (low + high) / 2
        errors, calm = quadrants(ppl_M, entropy_M, alpha)
        low, high = (alpha, high) if (errors | calm).mean() < share else (low, alpha)
    errors, calm = quadrants(ppl_M, entropy_M, alpha)

    def scaled(values: Floats) -> Floats:
        return np.asarray((values - values.min()) / max(float(np.ptp(values)), 1e-12))

    apart = np.where(errors | calm, -np.inf, np.abs(scaled(ppl_M) - scaled(entropy_M)))
    more = max(math.ceil(share * len(ppl_M) - NO_MORE) - int((errors | calm).sum()), 0)
    filled = np.zeros(len(ppl_M), dtype=np.bool_)
    filled[np.argsort(-apart, kind="stable")[:more]] = True
    return Kept(errors, calm, filled), alpha


class QTuning(Weighter):
    """Train on the samples of each micro-batch that are confident errors or calibrate, and on part of the former.

    A sample's perplexity and mean entropy place it in the micro-batch of all ranks. Kept are those of large perplexity
    and small entropy, and of small perplexity and large entropy, beyond quantiles that a bisection finds for the share
    ``keep_samples``; where they are fewer, samples whose scaled perplexity and entropy differ most fill up. Of
    confident errors the share ``keep_tokens`` of tokens is trained on, those of lowest (1 - mix) PPL_i + mix (PPL_i-1 +
    PPL_i+1), where a missing neighbour counts 0. The loss is the mean over the tokens that are kept.

    Weights of 0 save no compute. Use micro-batches of 8 samples or more, over all ranks.
    """

    name = "q_tuning"
    by_token: bool = True
    card = Card(
        summary="Trains on samples whose perplexity and entropy disagree, and on the surer part of their tokens.",
        paper="Q-Tuning, arXiv 2509.23873",
        cost="entropies of the training step, and one small gather per micro-batch",
        note="The paper contradicts itself: its text and figure remove tokens of high perplexity (keep: low), its "
        "pseudocode keeps them (keep: high). Samples that fill up are kept whole, which it does not tell.",
    )

    @dataclass(frozen=True, kw_only=True)
    class Params(WeighterParams):
        keep_samples: float = param(0.5, "share of the micro-batch's samples that is kept", above=0.0, maximum=1.0)
        keep_tokens: float = param(0.7, "share of the tokens of confident errors that is kept", above=0.0, maximum=1.0)
        mix: float = param(0.5, "weight of the neighbours' perplexities", minimum=0.0, maximum=1.0)
        keep: Literal["low", "high"] = param("low", "which tokens are kept: of low score (text) or high (pseudocode)")

    params: Params

    def requires(self) -> Requires:
        return Requires(stages=("pt", "sft"), entropy=True)

    def weigh(self, batch: BatchView) -> torch.Tensor:
        """Return 1 for kept tokens and 0 for all others [R, T] (collective)."""
        import torch

        from dataflex import comm

        assert batch.entropy_BT is not None
        sequences = Sequences(rows_B=batch.rows_B, index_BT=batch.sequence_BT)
        entropy_B = sequences.sums(batch.entropy_BT) / batch.tokens_B.clamp(min=1)
        entropy_M, _ = comm.gather_rows(entropy_B, equal=batch.sequence_BT is None)
        there = (batch.tokens_M > 0).cpu().numpy()
        errors, kept = np.zeros(len(there), dtype=np.bool_), np.zeros(len(there), dtype=np.bool_)
        if there.any():
            ppl = np.exp(batch.loss_M.double().clamp(max=_MOST_NATS).cpu().numpy()[there])
            found, _ = kept_samples(ppl, entropy_M.double().cpu().numpy()[there], self.params.keep_samples)
            errors[there], kept[there] = found.errors, found.errors | found.calibration | found.filled
        device, mask, of = batch.loss_BT.device, batch.mask_BT, sequence_of(batch)
        errors_B, kept_B = (torch.from_numpy(each[batch.local]).to(device) for each in (errors, kept))
        counts = torch.where(errors_B, share_of(batch.tokens_B, self.params.keep_tokens), batch.tokens_B)
        score = token_scores(batch.loss_BT, mask, of, self.params.mix)
        chosen = best_of_each(-score if self.params.keep == "low" else score, mask, of, counts * kept_B)
        return chosen.to(batch.loss_BT.dtype)


def token_scores(loss_BT: torch.Tensor, mask_BT: torch.Tensor, sequence_BT: torch.Tensor, mix: float) -> torch.Tensor:
    """Return (1 - mix) PPL_i + mix (PPL_i-1 + PPL_i+1) of supervised tokens [R, T]; a missing neighbour counts 0."""
    import torch.nn.functional as F

    ppl = loss_BT.clamp(max=_MOST_NATS).exp().masked_fill(~mask_BT, 0.0)
    same = sequence_BT[:, 1:] == sequence_BT[:, :-1]
    before = F.pad(ppl[:, :-1] * same, (1, 0))
    after = F.pad(ppl[:, 1:] * same, (0, 1))
    return (1.0 - mix) * ppl + mix * (before + after)
