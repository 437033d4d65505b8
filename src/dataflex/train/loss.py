"""The training loss: token losses, weights of sequences, tokens and domains, and an explicit denominator.

Every reweighting passes through ``weighted_loss``; no other module multiplies losses. The denominators
``weight_sum``, ``num_tokens`` and ``num_sequences`` are those of ``method.Weighter``. With unit weights under
``weight_sum`` and ``num_tokens`` the value and the gradient are the stock Trainer's, bit for bit: the gradient of a sum
of unit-weighted token losses is that of ``cross_entropy(reduction="sum")``, and the reported value
is corrected for the order of summation. Mixers observe the plain losses.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from dataflex import comm
from dataflex.errors import ComponentError, UnsupportedError
from dataflex.method import BatchView, DomainWeighter, Mixer, Normalizer, Requires, Rows, State, Weighter
from dataflex.plan.domains import SUMS, Domains, DomainStats, Floats
from dataflex.plan.plan import DataPlan
from dataflex.sequences import Joined, Sequences
from dataflex.signals.embeddings import pool, pool_documents
from dataflex.signals.kinds import Embedding
from dataflex.signals.losses import document_ids, token_cross_entropy
from dataflex.train.feedback import LOGGED_DOMAINS, DomainSums, NoiseWatch, RowWeights, WeightStats, losses_in_graph
from dataflex.train.loader import ROWS, by_rows, documents_of
from dataflex.validate import check_loss_weights, check_static_weights, check_weights

if TYPE_CHECKING:
    from dataflex.train.reference import ReferenceLosses

IGNORE_INDEX = -100

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TokenLosses:
    """Token losses of one micro-batch of R rows."""

    loss_BT: torch.Tensor  # cross-entropy per position [R, T] in fp32, with gradient; 0 where ``mask_BT`` is False
    mask_BT: torch.Tensor  # positions whose next token is supervised
    plain_sum: torch.Tensor  # detached sum, added up in the order of ``cross_entropy(reduction="sum")``
    entropy_BT: torch.Tensor | None = None  # entropy of each prediction in nats; None if not asked for

    def by_rows(self, joined: Joined) -> TokenLosses:
        """Return them by row, given those of rows that were joined into one sequence."""
        return replace(
            self,
            loss_BT=joined.split(self.loss_BT),
            mask_BT=joined.split(self.mask_BT),
            entropy_BT=None if self.entropy_BT is None else joined.split(self.entropy_BT),
        )


def document_sequences(documents_BT: torch.Tensor, mask_BT: torch.Tensor, rows: Rows) -> Sequences:
    """Return the documents with a supervised token as the sequences of a packed micro-batch.

    ``documents_BT`` are those of ``signals.losses.document_ids``. A position predicts the token after it and belongs to
    that token's document.
    """
    predicted = F.pad(documents_BT[:, 1:], (0, 1), value=0).clamp(min=0)
    width = int(predicted.max()) + 1 if predicted.numel() else 1
    keys_BT = torch.arange(len(rows), device=mask_BT.device)[:, None] * width + predicted
    keys, inverse = torch.unique(keys_BT[mask_BT], return_inverse=True)
    index_BT = torch.zeros_like(keys_BT)
    index_BT[mask_BT] = inverse
    return Sequences(rows_B=rows[(keys // width).cpu().numpy()], index_BT=index_BT)


def token_losses(logits: torch.Tensor, labels: torch.Tensor, *, entropy: bool = False) -> TokenLosses:
    """Return next-token losses of ``logits`` [R, T, V] against ``labels`` [R, T] (-100 is ignored)."""
    targets = F.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:].to(logits.device)
    mask_BT = targets.ne(IGNORE_INDEX)
    flat = targets.reshape(-1)
    loss, spread = token_cross_entropy(logits.view(-1, logits.shape[-1]), flat, entropy=entropy)
    # The stock loss adds in the order of this kernel, whatever the number of classes: one class is enough for it.
    picked = torch.where(mask_BT.reshape(-1), 0, IGNORE_INDEX)
    plain = F.nll_loss(-loss.detach()[:, None], picked, ignore_index=IGNORE_INDEX, reduction="sum")
    return TokenLosses(
        loss_BT=loss.view(targets.shape),
        mask_BT=mask_BT,
        plain_sum=plain,
        entropy_BT=None if spread is None else spread.view(targets.shape),
    )


def sample_means(
    loss_BT: torch.Tensor, mask_BT: torch.Tensor, sequences: Sequences
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token-mean losses [B] (0 without supervised tokens) and supervised tokens [B]."""
    tokens_B = sequences.sums(mask_BT.long())
    return sequences.sums(loss_BT) / tokens_B.clamp(min=1), tokens_B


def batch_view(losses: TokenLosses, sequences: Sequences, **rest: Any) -> BatchView:
    """Return what a weighter sees of a micro-batch; gathers losses of sequences over the ranks (collective).

    ``rest`` are the fields of ``BatchView`` that do not follow from the losses.
    """
    loss_BT = losses.loss_BT.detach()
    loss_B, tokens_B = sample_means(loss_BT, losses.mask_BT, sequences)
    # Plans give every rank as many rows in a micro-batch, but packed rows hold any number of documents.
    equal = sequences.index_BT is None
    both, local = comm.gather_rows(torch.stack([loss_B, tokens_B.to(loss_B.dtype)], dim=1), equal=equal)
    return BatchView(
        rows_B=sequences.rows_B,
        loss_B=loss_B,
        tokens_B=tokens_B,
        loss_BT=loss_BT,
        mask_BT=losses.mask_BT,
        loss_M=both[:, 0],
        tokens_M=both[:, 1].to(torch.int64),
        local=local,
        sequence_BT=sequences.index_BT,
        entropy_BT=losses.entropy_BT,
        **rest,
    )


def checked(weights: torch.Tensor, weighter: Weighter, losses: TokenLosses, sequences: Sequences) -> torch.Tensor:
    """Return weights as fp32 [B, 1] by sequence or [R, T] by position, on the device of the losses.

    Wrong shapes raise ComponentError; ``WeightStats`` checks the values.
    """
    count, shape = len(sequences.rows_B), tuple(losses.loss_BT.shape)
    check_weights(weighter, weights, [(count,), shape])
    weights = weights.detach().to(losses.loss_BT.device, torch.float32)
    return weights[:, None] if weights.dim() == 1 else weights


def micro_batch_scale(losses: TokenLosses, weights: torch.Tensor, sequences: Sequences) -> torch.Tensor:
    """Return the float64 factor by which the weights ``checked`` have mean 1 over the tokens of the micro-batch.

    Of all ranks (collective); 0 where all weights are 0.
    """
    if weights.shape[1] == 1:
        weights = sequences.spread(weights[:, 0])
    return comm.ratio_of_sums(losses.mask_BT.sum(), (weights * losses.mask_BT).sum())


def weighted_loss(
    losses: TokenLosses,
    weights: torch.Tensor,
    *,
    sequences: Sequences,
    normalizer: Normalizer,
    num_items: torch.Tensor | float,
    num_micro_batches: int,
    step_scale: torch.Tensor | float | None,
    replicas: int,
) -> torch.Tensor:
    """Return this micro-batch's share of the step's loss, to be summed over micro-batches and ranks.

    A step without a supervised token has loss 0 and no gradient; the stock loss would be NaN.

    Args:
        losses: Token losses of this rank's micro-batch.
        weights: [B, 1] or [R, T], from ``checked``.
        sequences: Sequence of each position.
        normalizer: ``weight_sum``, ``num_tokens`` or ``num_sequences``.
        num_items: Supervised tokens of the whole optimizer step (all ranks and micro-batches).
        num_micro_batches: Micro-batches of this optimizer step.
        step_scale: For ``weight_sum``: factor by which the weights have mean 1, num_items / sum(w * tokens) over
            the step where they are known beforehand, else ``micro_batch_scale``.
        replicas: Number of ranks, unless the caller multiplies by it.
    """
    loss_BT, mask_BT = losses.loss_BT, losses.mask_BT
    if normalizer == "num_sequences":
        loss_B, _ = sample_means(loss_BT, mask_BT, sequences)
        if len(weights) != len(loss_B) or weights.shape[1] != 1:
            raise ComponentError("normalizer 'num_sequences' takes one weight per sequence")
        return (weights[:, 0] * loss_B).sum() * (replicas / num_micro_batches)
    if weights.shape[1] == 1:
        weights = sequences.spread(weights[:, 0])
    if normalizer == "weight_sum":
        assert step_scale is not None
        weights = weights * torch.as_tensor(step_scale).to(weights)
    weighted = (weights * loss_BT).sum()
    # With unit weights the value has the bits of the stock loss, whose kernel adds in another order.
    order = losses.plain_sum - loss_BT.detach().sum()
    mean = (weights * mask_BT).sum() / mask_BT.sum().clamp(min=1)
    weighted = weighted + order * mean
    return weighted / torch.as_tensor(num_items, device=weighted.device).clamp(min=1)


def without_sampling(alpha: Floats, drawn: Floats) -> Floats:
    """Return alpha_d / pi_d divided by its sum [K]: token weights that undo the sampling; 0 where pi_d is 0."""
    ratio = np.divide(alpha, drawn, out=np.zeros_like(alpha), where=drawn > 0)
    return ratio / (ratio.sum() or 1.0)


class DomainWeights:
    """How much the domains count in the loss, according to a mixer that weighs it.

    ``over_ranks``: whether the step's denominator counts tokens over all ranks.
    """

    def __init__(self, mixer: DomainWeighter, domains: Domains, *, over_ranks: bool) -> None:
        self._mixer, self._domains, self._over_ranks = mixer, domains, over_ranks
        self._by_domain: Floats | None = None
        self._drawn: Floats | None = None  # proportions of the step, in the run's unit [K]

    def given(self) -> Floats:
        """Return the mixer's present weights [K], divided by the proportions of the step begun last if it asks so."""
        given = check_loss_weights(self._mixer, len(self._domains.names))
        if self._drawn is None or not self._mixer.undoes_sampling:
            return given
        return without_sampling(given, self._drawn)

    @property
    def by_domain_means(self) -> bool:
        """Whether the loss is the sum over domains of their weights times their mean losses."""
        return self._mixer.loss_normalizer == "domain"

    def begin_step(
        self, batches: list[Any], num_items: Any, device: torch.device, normalizer: Normalizer, drawn: Floats | None
    ) -> None:
        """Take the weights of the coming step from the mixer (collective); see ``Reweighter.begin_step``."""
        self._drawn = drawn
        alpha = self.given()
        if self.by_domain_means:  # a_d N / n_d: the sum over tokens divided by N is sum_d a_d (mean loss of d)
            tokens_K = self._tokens(batches, device, lambda labels: counted_tokens(labels[:, 1:]))
            alpha = np.divide(alpha * float(num_items), tokens_K, out=np.zeros_like(alpha), where=tokens_K > 0)
        elif normalizer == "num_tokens":  # the mixer's weights must not change the size of the step
            weighted = float(alpha @ self._tokens(batches, device, counted_tokens))
            alpha = alpha * (float(num_items) / weighted if weighted > 0 else 0.0)
        self._by_domain = alpha

    def _tokens(
        self, batches: list[Any], device: torch.device, count: Callable[[torch.Tensor], torch.Tensor]
    ) -> Floats:
        """Return the step's tokens of each domain [K] (collective)."""
        counts = torch.zeros(len(self._domains.names), dtype=torch.float64)
        for batch in batches:
            which = torch.from_numpy(self._domains.domain_of[batch[ROWS]].astype(np.int64))
            counts.index_add_(0, which, count(batch["labels"]).cpu())
        if self._over_ranks:
            counts = comm.gather_sum(counts.to(device)).cpu()
        return np.asarray(counts.numpy())

    def of(self, rows: Rows) -> Floats:
        """Return the weights of rows in this step [len(rows)]."""
        assert self._by_domain is not None
        return np.asarray(self._by_domain[self._domains.domain_of[rows]])

    def times(self, weights: torch.Tensor, sequences: Sequences, normalizer: Normalizer) -> torch.Tensor:
        """Multiply weights [B, 1] or [R, T] by the domains' (collective under ``num_sequences``).

        Under ``num_sequences`` the sum over the micro-batch of all ranks stays as it was.
        """
        factor = torch.from_numpy(self.of(sequences.rows_B)).to(weights)
        by_sequence = len(weights) == len(sequences.rows_B) and weights.shape[1] == 1
        product = weights * (factor[:, None] if by_sequence else sequences.spread(factor))
        if normalizer != "num_sequences":
            return product
        return product * comm.ratio_of_sums(weights.double().sum(), product.double().sum()).to(product)


def _of_next(of_tokens_RT: torch.Tensor) -> torch.Tensor:
    """Return what belongs to the token that each position predicts [R, T], given what belongs to the tokens."""
    return F.pad(of_tokens_RT[:, 1:], (0, 1))


def _by_domain(
    loss_RT: torch.Tensor, mask_RT: torch.Tensor, domains_RT: NDArray[np.int64]
) -> tuple[torch.Tensor, torch.Tensor, NDArray[np.int64]]:
    """Return the losses that positions have in predicting the next tokens, each row once for each of its domains.

    ``domains_RT`` are those of the tokens, -1 for none. A loss that is of another domain is 0 and does not count.
    """
    width = loss_RT.shape[1]
    of_next_RT = np.pad(domains_RT[:, 1:], ((0, 0), (0, width)), constant_values=-1)[:, :width]
    there = np.stack([np.broadcast_to(np.arange(len(of_next_RT))[:, None], of_next_RT.shape), of_next_RT])
    rows_P, domains_P = np.unique(there[:, of_next_RT >= 0], axis=1)
    own_PT = torch.from_numpy(of_next_RT[rows_P] == domains_P[:, None]).to(loss_RT.device)
    which = torch.from_numpy(rows_P).to(loss_RT.device)
    return torch.where(own_PT, loss_RT[which], 0.0), mask_RT[which] & own_PT, domains_P


def counted_tokens(labels: torch.Tensor) -> torch.Tensor:
    """Return tokens per row [R] as the stock denominator counts them (a label in the first place included)."""
    return labels.ne(IGNORE_INDEX).sum(dim=1).double()


def embedded(
    hidden_RTD: torch.Tensor, batch: dict[str, Any], mask_RT: torch.Tensor, sequences: Sequences, spec: Embedding
) -> torch.Tensor:
    """Return a pooled vector for each sequence, fp32 [B, D], without gradient; zeros where there is nothing to pool."""
    hidden = hidden_RTD.detach()
    if sequences.index_BT is None:
        return pool(hidden, batch.get("attention_mask"), batch["labels"], spec).nan_to_num()
    documents = document_ids(batch)
    vectors, keys = pool_documents(hidden, documents, batch["labels"], spec)
    # Keep the documents that are sequences, in their order.
    predicted = F.pad(documents[:, 1:], (0, 1), value=0).clamp(min=0)
    row, column = mask_RT.nonzero(as_tuple=True)
    place = torch.full((len(documents), int(documents.max()) + 1), -1, dtype=torch.int64, device=hidden.device)
    place[row, predicted[row, column]] = sequences.index_BT[row, column]
    where = place[keys[:, 0], keys[:, 1]]
    out = vectors.new_zeros(len(sequences.rows_B), vectors.shape[1])
    out[where[where >= 0]] = vectors[where >= 0]
    return out.nan_to_num()


@dataclass(eq=False)
class Reweighter:
    """Turns token losses of micro-batches into the weighted loss and sums them by domain."""

    weighter: Weighter | None  # without one weights are equal
    mixer: Mixer | None  # one that observes or weighs domains in the loss
    _: KW_ONLY
    columns: Mapping[str, NDArray[Any]]  # each [N]
    domains: Domains
    over_ranks: bool  # the loop counts tokens over all ranks and multiplies by their number
    world: int
    packed: bool = False  # rows hold several documents, which are then the sequences
    reference: ReferenceLosses | None = None
    pads_left: bool = False  # where the collator pads rows
    device: torch.device | None = None  # of the losses, until a step says otherwise; None: the CPU

    def __post_init__(self) -> None:
        weighter, mixer, domains = self.weighter, self.mixer, self.domains
        self._domain_weights: DomainWeights | None = None
        if isinstance(mixer, DomainWeighter):
            if weighter is not None and mixer.loss_normalizer == "domain":
                raise UnsupportedError(
                    f"the {mixer.name} mixer normalizes the loss by domain, which leaves no place for a weighter"
                )
            self._domain_weights = DomainWeights(mixer, domains, over_ranks=self.over_ranks)
        self._needs = Requires() if weighter is None else weighter.requires()
        self.watch: Callable[[TokenLosses], None] | None = None  # called with the token losses of each micro-batch
        self._mixer_compares = mixer is not None and mixer.requires().reference is not None
        self.stats = None if weighter is None else WeightStats(weighter.name)
        self.row_weights = None if weighter is None else RowWeights()
        self._covered: DataPlan | None = None
        # of the step begun
        self._index, self._total, self._num_micro = 0, 0, 0
        self._num_items: Any = None
        self._device = self.device or torch.device("cpu")
        self._acts = False
        self._scale: torch.Tensor | None = None
        self._sums = DomainSums(len(domains.names))
        self._logged = np.zeros((len(SUMS), len(domains.names)))  # taken from the sums since the last log
        self._warned = False  # of losses of domains that are not finite
        self.missing = ""  # why there are no losses by domain
        # Mixers without a reference may follow noise: with one, what cannot be learned has no excess loss.
        blind = self.observes and not self._mixer_compares and comm.rank() == 0
        self._noise = NoiseWatch(domains.names) if blind else None

    @property
    def observes(self) -> bool:
        """Whether a mixer is given the losses of the domains after each step."""
        return self.mixer is not None and self.mixer.observes

    def _compares_from(self, total_steps: int) -> int:
        """Return the first optimizer step whose losses are compared with the reference's."""
        return 0 if self._mixer_compares or self.weighter is None else self.weighter.warmup(total_steps)

    def cover(self, plan: DataPlan, total_steps: int) -> None:
        """Tell the reference the rows of a new plan that are compared with it (collective)."""
        if self.reference is None or plan is self._covered:
            return
        first = max(self._compares_from(total_steps) - plan.interval.start_step, 0)
        rows = plan.rows[first * plan.global_batch :]
        # A short step of several ranks is evened out by rows from elsewhere.
        filled = plan.fill[: plan.global_batch if self.world > 1 and (rows < 0).any() else 0]
        self.reference.cover(np.concatenate([rows, filled]), last=plan.interval.stop_step >= total_steps)
        self._covered = plan

    @property
    def embedding(self) -> Any:
        """How the training forward's hidden states are pooled, or None."""
        return self._needs.embedding

    def begin_step(
        self,
        batches: list[Any],
        num_items: Any,
        device: torch.device,
        *,
        index: int,
        total: int,
        drawn: Floats | None = None,
    ) -> None:
        """Begin optimizer step ``index`` of ``total``: find what is known of its weights beforehand (collective).

        ``batches`` are the collated micro-batches of this rank, with ``labels`` and ``ROWS``; ``num_items`` the
        supervised tokens of the step, as the loop counts them; ``drawn`` the proportions in which its rows were drawn,
        in the run's unit [K].
        """
        self._index, self._total, self._num_micro = index, total, len(batches)
        self._num_items, self._device = num_items, device
        self._acts = self.weighter is not None and self.weighter.active(index, total)
        self._scale = None
        domain_weights, batches = self._domain_weights, [by_rows(batch)[0] for batch in batches]
        if domain_weights is not None:
            domain_weights.begin_step(batches, num_items, device, self._normalizer, drawn)
        if self._normalizer != "weight_sum":
            return
        tokens = torch.zeros((), dtype=torch.float64)
        for batch in batches:
            weights = self._known(batch)
            if weights is None:
                return
            if domain_weights is not None:
                of_domains = domain_weights.of(batch[ROWS])
                weights = weights * (of_domains if weights.ndim == 1 else of_domains[:, None])
            labels = batch["labels"]
            counted = counted_tokens(labels) if weights.ndim == 1 else labels.ne(IGNORE_INDEX)
            tokens += (torch.from_numpy(weights).to(counted.device) * counted).sum().cpu()
        if self.over_ranks:
            tokens = comm.gather_sum(tokens.to(device))
        items = torch.as_tensor(num_items, dtype=torch.float64, device=tokens.device)
        self._scale = torch.where(tokens > 0, items / tokens, torch.zeros_like(tokens))

    @property
    def _normalizer(self) -> Normalizer:
        """The step's denominator: the acting weighter's, else the mixer's, else that of the stock loss."""
        if self._acts:
            assert self.weighter is not None
            return self.weighter.normalizer
        by_weight = self._domain_weights is not None and not self._domain_weights.by_domain_means
        return "weight_sum" if by_weight else "num_tokens"

    def check_known(self, rows: Rows) -> None:
        """Check the weights known from the rows alone before training; ComponentError if one is no number >= 0."""
        if self.weighter is None or self._needs.token_weights is not None:  # checked as they were loaded
            return
        known = self.weighter.static_weights(rows, self.columns)
        if known is None:
            return
        bad = rows[~(np.isfinite(known) & (known >= 0))]
        if len(bad):
            raise ComponentError(
                f"weighter {self.weighter.name!r} returned negative or non-finite weights, first of row {bad[0]:,}"
            )

    def _known(self, batch: Mapping[str, Any]) -> NDArray[np.float64] | None:
        """Return weights of rows [R] or tokens [R, T] that are known from the rows alone; ones if no weighter acts."""
        if self.weighter is None or not self._acts:
            return np.ones(len(batch[ROWS]))
        known = check_static_weights(self.weighter, batch[ROWS], self.columns)
        return known if known is None or known.ndim == 1 else self._padded(known, batch["labels"].shape[1])

    def _padded(self, weights_RL: Floats, width: int) -> Floats:
        """Return weights of the rows' own tokens as those of a padded micro-batch [R, width]."""
        more = max(width - weights_RL.shape[1], 0)
        if not self.pads_left:
            return np.pad(weights_RL, ((0, 0), (0, more)))[:, :width]
        raise UnsupportedError("weights of tokens need a tokenizer that pads on the right (padding_side)")

    def loss(self, batch: dict[str, Any], logits: torch.Tensor, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """Return the weighted loss of one micro-batch of the step begun (collective where weights depend on losses).

        ``logits`` are [R, T, V], ``hidden`` the hidden states [R, T, D] of the layer that ``embedding`` names; of rows
        that were joined they are those of the one sequence.
        """
        weighter = self.weighter if self._acts else None
        losses = token_losses(logits, batch["labels"], entropy=weighter is not None and self._needs.entropy)
        apart, joined = by_rows(batch)
        if joined is not None:
            losses, hidden = losses.by_rows(joined), None if hidden is None else joined.split(hidden)
        rows = apart[ROWS]
        if self.watch is not None:
            self.watch(losses)
        compares = self._index >= self._compares_from(self._total)
        reference = None
        if self.reference and compares:
            reference = self.reference.of(batch, rows, losses.mask_BT, joined)
        compared = reference if self.observes else None
        self._sums.add(losses.loss_BT.detach(), losses.mask_BT, self._domains_of(rows), compared)
        weights, sequences, equal = self._weights(weighter, losses, apart, hidden, reference)
        if self._domain_weights is not None:
            weights = self._domain_weights.times(weights, sequences, self._normalizer)
        scale = self._scale
        if scale is None and self._normalizer == "weight_sum":
            scale = micro_batch_scale(losses, weights, sequences)
        if weighter is not None:
            self._note(weights / equal if scale is None else weights * scale.to(weights), losses, sequences)
        return weighted_loss(
            losses,
            weights,
            sequences=sequences,
            normalizer=self._normalizer,
            num_items=self._num_items,
            num_micro_batches=self._num_micro,
            step_scale=scale,
            replicas=1 if self.over_ranks else self.world,
        )

    def _domains_of(self, rows: Rows) -> NDArray[np.int64]:
        return self.domains.domain_of[rows].astype(np.int64)

    def note(self, batch: dict[str, Any], loss: torch.Tensor) -> None:
        """Add the token losses of a micro-batch whose ``loss`` was made elsewhere to those of the domains.

        Where they cannot be told from it, ``missing`` says so, once and for all.
        """
        found = losses_in_graph(loss, batch["labels"])
        if found is None:
            self.missing = "the training loss does not keep token losses (a fused kernel, or a loss of its own)"
            return
        (loss_RT, mask_RT), rows = found, batch[ROWS]
        with torch.no_grad():
            if rows.ndim == 1:
                self._sums.add(loss_RT, mask_RT, self._domains_of(rows))
                return
            documents = documents_of(rows)
            domains_RT = np.where(documents < 0, -1, self._domains_of(documents))
            self._sums.add(*_by_domain(loss_RT, mask_RT, domains_RT))

    def _weights(
        self,
        weighter: Weighter | None,
        losses: TokenLosses,
        batch: dict[str, Any],
        hidden: torch.Tensor | None,
        reference: torch.Tensor | None,
    ) -> tuple[torch.Tensor, Sequences, float]:
        """Return the weighter's weights, the sequences that they are of, and the value of an equal weight."""
        rows = batch[ROWS]
        sequences = Sequences(rows_B=rows)
        if weighter is None:
            return losses.loss_BT.new_ones(len(rows), 1), sequences, 1.0
        if (known := self._known(batch)) is not None:
            found = torch.from_numpy(known)
            return checked(found if known.ndim == 1 else _of_next(found), weighter, losses, sequences), sequences, 1.0
        of_tokens = None
        if self._needs.token_weights is not None:
            given = np.asarray(self.columns[self._needs.token_weights[1]][rows], dtype=np.float64)
            of_tokens = _of_next(torch.from_numpy(self._padded(given, losses.loss_BT.shape[1]))).to(losses.loss_BT)
        if self.packed:
            sequences = document_sequences(document_ids(batch), losses.mask_BT, rows)
        embeddings = None
        if hidden is not None:
            embeddings = embedded(hidden, batch, losses.mask_BT, sequences, self.embedding)
        view = batch_view(
            losses,
            sequences,
            domains_B=self._domains_of(sequences.rows_B),
            step=self._index,
            total_steps=self._total,
            num_micro_batches=self._num_micro,
            reference_BT=reference,
            embeddings_BH=embeddings,
            columns=self.columns,
            token_weights_BT=of_tokens,
        )
        equal = 1.0 / max(len(view.loss_M), 1) if self._normalizer == "num_sequences" else 1.0
        return checked(weighter.weigh(view), weighter, losses, sequences), sequences, equal

    def _note(self, relative: torch.Tensor, losses: TokenLosses, sequences: Sequences) -> None:
        """Add weights to those of the log and the report, relative to equal ones."""
        by_sequence = relative[:, 0]
        if relative.shape[1] > 1 or len(relative) != len(sequences.rows_B):
            tokens_B = sequences.sums(losses.mask_BT.to(relative.dtype))
            by_sequence = sequences.sums(relative * losses.mask_BT) / tokens_B.clamp(min=1)
        assert self.stats is not None
        self.stats.add(relative, by_sequence)
        if self.row_weights is not None:
            self.row_weights.add(sequences.rows_B, by_sequence)

    def end_step(self, proportions: NDArray[np.float64], learning_rate: float) -> None:
        """Give the mixer the losses of the domains in the step (collective).

        ``proportions`` of sequences [K] are those under which the step was drawn.
        """
        assert self.mixer is not None
        sums = self._sums.take(self._device)
        self._logged += sums
        finite = np.isfinite(sums).all(axis=0)
        if not finite.all() and not self._warned:
            self._warned = True
            which = ", ".join(np.array(self.domains.names)[~finite])
            told = "step %d: the loss of %s is not finite; to the mixer these domains are absent in such steps"
            logger.warning(told, self._index, which)
        stats = DomainStats.of(
            sums,
            names=self.domains.names,
            step=self._index,
            total_steps=self._total,
            proportions=proportions,
            learning_rate=learning_rate,
        )
        if self._noise is not None:
            weights = proportions if self._domain_weights is None else self._domain_weights.given()
            self._noise.step(stats.loss_sum, stats.tokens, weights)
        self.mixer.observe(stats)

    def since_log(self) -> State:
        """Return what was summed up since the last ``scalars``, over all ranks (collective)."""
        return {
            "weights": {} if self.stats is None else self.stats.since_read(),
            "taken": self._logged,
            "of_ranks": self._sums.of_ranks(self._device),
        }

    def restore_since_log(self, state: State, device: torch.device) -> None:
        """Take back what ``since_log`` gave."""
        self._device = device
        if self.stats is not None:
            self.stats.restore(state["weights"], device)
        self._logged = np.asarray(state["taken"], dtype=np.float64)
        self._sums.restore(np.asarray(state["of_ranks"]), device)

    def scalars(self) -> dict[str, float]:
        """Return numbers for the training log since the last call: weights, and the plain loss of each domain.

        Those of domains are collective, one reduction whatever the methods.
        """
        scalars = {} if self.stats is None else self.stats.read()
        sums = self._logged if self.observes or self.missing else self._logged + self._sums.take(self._device)
        self._logged = np.zeros_like(self._logged)
        tokens_K, losses_K = sums[SUMS.index("tokens")], sums[SUMS.index("loss_sum")]
        if self.weighter is not None and tokens_K.any():
            scalars["plain_loss"] = float(losses_K.sum() / tokens_K.sum())
        names = self.domains.names
        for k in np.flatnonzero(tokens_K > 0).tolist():
            scalars[f"loss/{names[k]}"] = float(losses_K[k] / tokens_K[k])
        if self._domain_weights is not None and len(names) <= LOGGED_DOMAINS:
            weights = self._domain_weights.given().tolist()
            scalars.update({f"loss_weight/{name}": weight for name, weight in zip(names, weights, strict=True)})
        return scalars


def balance_loss(outputs: Any, config: Any) -> torch.Tensor | None:
    """Return the term for balanced routers that a model of this configuration adds to its own loss, or None."""
    balance: Any = getattr(outputs, "aux_loss", None)
    if not torch.is_tensor(balance):  # 0 without router logits
        return None
    text = config.get_text_config()
    names = ("router_aux_loss_coef", "aux_loss_coef")
    coefficient: float = next((getattr(text, name) for name in names if hasattr(text, name)), 0.0)
    return balance * coefficient
