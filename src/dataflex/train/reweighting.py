"""The training loss where a method acts on it: weights of sequences, tokens and domains, and what it tells mixers.

Knows the weighter, the mixer, the columns and the rows of each micro-batch; the arithmetic is
``train.weighting``'s, and ``train.domain_weights`` says how much domains count. Weights multiply before one
normalization. What mixers observe are the plain losses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from dataflex import comm
from dataflex.errors import ComponentError, UnsupportedError
from dataflex.method import Mixer, Normalizer, Requires, Rows, State, Weighter
from dataflex.plan.domains import SUMS, Domains, DomainStats
from dataflex.plan.plan import DataPlan
from dataflex.sequences import Sequences
from dataflex.signals.packing import document_ids
from dataflex.train import weighting
from dataflex.train.answers import check_static_weights
from dataflex.train.domain_sums import DomainSums
from dataflex.train.domain_weights import DomainWeights, counted_tokens
from dataflex.train.embedded import embedded
from dataflex.train.noise_watch import NoiseWatch
from dataflex.train.weight_stats import RowWeights, WeightStats
from dataflex.train.weighting import TokenLosses

__all__ = ["References", "Reweighter"]

_LOGGED_DOMAINS = 32


class References(Protocol):
    """Token losses of a reference model for the rows in training."""

    def cover(self, rows: Rows, *, last: bool = False) -> None:
        """Get ready for these rows, the last ones or not (collective)."""
        ...

    def of(self, batch: dict[str, Any], rows: Rows, mask_BT: torch.Tensor) -> torch.Tensor:
        """Return fp32 [R, T], 0 where ``mask_BT`` is False."""
        ...

    def state_dict(self) -> State:
        """Everything that a resumed run needs."""
        ...

    def load_state_dict(self, state: State) -> None:
        """Take back what ``state_dict`` gave."""
        ...


class Reweighter:
    """Turns token losses of micro-batches into the weighted loss and adds them up by domain.

    Args:
        weighter: The method, or None for equal weights.
        mixer: A mixer that observes or weighs domains in the loss, or None.
        columns: Raw columns by name, each [N].
        domains: Domains of the training rows.
        over_ranks: Whether the Trainer counts tokens over all ranks and multiplies by their number
            (``average_tokens_across_devices``).
        world: Number of ranks.
        packed: Whether rows hold several documents, which are then the sequences.
        reference: Losses of the reference model, where a method needs them.
    """

    def __init__(
        self,
        weighter: Weighter | None,
        mixer: Mixer | None,
        *,
        columns: Mapping[str, NDArray[Any]],
        domains: Domains,
        over_ranks: bool,
        world: int,
        packed: bool = False,
        reference: References | None = None,
    ) -> None:
        if weighter is not None and mixer is not None and mixer.weighs_loss and mixer.loss_normalizer == "domain":
            raise UnsupportedError(
                f"the {mixer.name} mixer normalizes the loss by domain, which leaves no place for a weighter"
            )
        self.weighter, self.mixer = weighter, mixer
        self._needs = Requires() if weighter is None else weighter.requires()
        self._mixer_compares = mixer is not None and mixer.requires().reference is not None
        self.stats = None if weighter is None else WeightStats(weighter.name)
        self.row_weights = RowWeights() if weighter is not None and comm.rank() == 0 else None
        self._plain: torch.Tensor | None = None
        self.reference = reference
        self._covered: DataPlan | None = None
        self._columns, self._domains = columns, domains
        self._over_ranks, self._world, self._packed = over_ranks, world, packed
        weighs = mixer is not None and mixer.weighs_loss
        self._domain_weights = DomainWeights(mixer, domains, over_ranks=over_ranks) if mixer and weighs else None
        self._acts = False
        self._scale: torch.Tensor | None = None
        self._sums = DomainSums(len(domains.names))
        self._logged = np.zeros((len(SUMS), len(domains.names)))
        # A mixer with a reference looks at what can be learned: the weights of noise do not rise.
        blind = mixer is not None and mixer.observes and not self._mixer_compares and comm.rank() == 0
        self._noise = NoiseWatch(domains.names) if blind else None

    @property
    def observes(self) -> bool:
        """Whether a mixer wants to know what each step made of the domains."""
        return self.mixer is not None and self.mixer.observes

    def compares_from(self, total_steps: int) -> int:
        """Return the first optimizer step whose losses are compared with the reference's."""
        if self._mixer_compares:
            return 0
        return 0 if self.weighter is None else self.weighter.burn_in(total_steps)

    def cover(self, plan: DataPlan, total_steps: int) -> None:
        """Tell the reference the rows of a new plan that are compared with it (collective)."""
        if self.reference is None or plan is self._covered:
            return
        first = max(self.compares_from(total_steps) - plan.interval.start_step, 0)
        rows = plan.rows[first * plan.global_batch :]
        # A short step of several ranks is evened out by rows from elsewhere.
        filled = plan.fill[: plan.global_batch if self._world > 1 and (rows < 0).any() else 0]
        self.reference.cover(np.concatenate([rows, filled]), last=plan.interval.stop_step >= total_steps)
        self._covered = plan

    @property
    def embedding(self) -> Any:
        """How the training forward's hidden states are pooled, or None."""
        return self._needs.embedding

    def begin_step(
        self,
        batches: list[Any],
        rows: list[Rows],
        num_items: Any,
        device: torch.device,
        *,
        step: int,
        total_steps: int,
    ) -> None:
        """Find what is known of the step's weights before its forward passes (collective).

        Args:
            batches: Collated micro-batches of this rank, with ``labels``.
            rows: Row ids of each micro-batch.
            num_items: Supervised tokens of the step, as the Trainer counts them.
            device: Where collectives work.
            step: Optimizer step, counted from 0.
            total_steps: Optimizer steps of the run.
        """
        self._acts = self.weighter is not None and self.weighter.active(step, total_steps)
        self._scale = None
        domain_weights = self._domain_weights
        if domain_weights is not None:
            domain_weights.begin_step(batches, rows, num_items, device, self._normalizer)
        if self._normalizer != "token":
            return
        total = torch.zeros((), dtype=torch.float64)
        for batch, ids in zip(batches, rows, strict=True):
            weights = self._known(ids)
            if weights is None:
                return
            if domain_weights is not None:
                weights = weights * domain_weights.of(ids)
            total += (torch.from_numpy(weights) * counted_tokens(batch["labels"])).sum()
        if self._over_ranks:
            total = comm.gather_sum(total.to(device))
        items = torch.as_tensor(num_items, dtype=torch.float64, device=total.device)
        self._scale = torch.where(total > 0, items / total, torch.zeros_like(total))

    @property
    def _normalizer(self) -> Normalizer:
        """The step's denominator: the acting weighter's, else the mixer's, else that of the stock loss."""
        if self._acts:
            assert self.weighter is not None
            return self.weighter.normalizer
        return "token" if self._domain_weights is not None and not self._domain_weights.by_domain_means else "count"

    def check_known(self, rows: Rows) -> None:
        """Look at the weights that are known from the rows alone, so that a bad one does not wait for its row's step.

        Raises:
            ComponentError: A weight that is negative or not finite.
            DataError: As the weighter tells it.
        """
        known = None if self.weighter is None else self.weighter.static_weights(rows, self._columns)
        if self.weighter is None or known is None:
            return
        bad = rows[~(np.isfinite(known) & (known >= 0))]
        if len(bad):
            raise ComponentError(
                f"weighter {self.weighter.name!r} returned negative or non-finite weights, first of row {bad[0]:,}"
            )

    def _known(self, rows: Rows) -> NDArray[np.float64] | None:
        """Return weights that are known from the rows alone; ones where no weighter acts."""
        if self.weighter is None or not self._acts:
            return np.ones(len(rows))
        return check_static_weights(self.weighter, rows, self._columns)

    def loss(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        rows: Rows,
        *,
        batch: dict[str, Any],
        hidden: torch.Tensor | None = None,
        num_items: Any,
        num_micro_batches: int,
        step: int,
        total_steps: int,
    ) -> torch.Tensor:
        """Return the weighted loss of one micro-batch of the step begun (collective where weights depend on losses).

        Args:
            logits: [R, T, V].
            labels: [R, T].
            rows: Row ids [R].
            batch: The collated micro-batch.
            hidden: Hidden states [R, T, D] of the layer that ``embedding`` names.
            num_items: Supervised tokens of the optimizer step, as the Trainer counts them.
            num_micro_batches: Micro-batches of the step.
            step: Optimizer step, counted from 0.
            total_steps: Optimizer steps of the run.
        """
        weighter = self.weighter if self._acts else None
        losses = weighting.token_losses(logits, labels, entropy=weighter is not None and self._needs.entropy)
        domains_R = self._domains.domain_of[rows].astype(np.int64)
        compares = step >= self.compares_from(total_steps)
        reference = self.reference.of(batch, rows, losses.mask_BT) if self.reference and compares else None
        if self.observes:
            self._sums.add(losses.loss_BT.detach(), losses.mask_BT, domains_R, reference)
        if self.weighter is not None:
            plain = torch.stack([losses.plain_sum.double(), losses.mask_BT.sum().double()])
            self._plain = plain if self._plain is None else self._plain + plain
        weights, sequences, equal = self._weights(
            weighter,
            losses,
            batch,
            rows,
            hidden=hidden,
            reference_BT=reference,
            step=step,
            total_steps=total_steps,
            num_micro_batches=num_micro_batches,
        )
        if self._domain_weights is not None:
            weights = self._domain_weights.times(weights, sequences, self._normalizer)
        scale = self._scale
        if scale is None and self._normalizer == "token":
            scale = weighting.micro_batch_scale(losses, weights, sequences)
        if weighter is not None:
            self._note(weights / equal if scale is None else weights * scale.to(weights), losses, sequences)
        return weighting.weighted_loss(
            losses,
            weights,
            sequences=sequences,
            normalizer=self._normalizer,
            num_items=num_items,
            num_micro_batches=num_micro_batches,
            step_scale=scale,
            replicas=1 if self._over_ranks else self._world,
        )

    def _weights(
        self,
        weighter: Weighter | None,
        losses: TokenLosses,
        batch: dict[str, Any],
        rows: Rows,
        *,
        hidden: torch.Tensor | None,
        **view: Any,
    ) -> tuple[torch.Tensor, Sequences, float]:
        """Return the weighter's weights, whose sequences they are of, and what an equal weight is among them."""
        sequences = weighting.row_sequences(rows)
        if weighter is None:
            return losses.loss_BT.new_ones(len(rows), 1), sequences, 1.0
        if (known := self._known(rows)) is not None:
            return weighting.checked(torch.from_numpy(known), weighter, losses, sequences), sequences, 1.0
        if self._packed:
            sequences = weighting.document_sequences(document_ids(batch), losses.mask_BT, rows)
        vectors = None if hidden is None else embedded(hidden, batch, losses.mask_BT, sequences, self.embedding)
        domains_B = self._domains.domain_of[sequences.rows_B].astype(np.int64)
        seen = weighting.view(
            losses, sequences, domains_B=domains_B, embeddings_BH=vectors, columns=self._columns, **view
        )
        equal = 1.0 / max(len(seen.loss_M), 1) if self._normalizer == "sample" else 1.0
        return weighting.checked(weighter.weigh(seen), weighter, losses, sequences), sequences, equal

    def _note(self, relative: torch.Tensor, losses: TokenLosses, sequences: Sequences) -> None:
        """Keep weights for the log and the report, relative to equal ones."""
        by_sequence = relative[:, 0]
        if relative.shape[1] > 1 or len(relative) != len(sequences.rows_B):
            tokens_B = sequences.sums(losses.mask_BT.to(relative.dtype))
            by_sequence = sequences.sums(relative * losses.mask_BT) / tokens_B.clamp(min=1)
        assert self.stats is not None
        self.stats.add(relative, by_sequence)
        if self.row_weights is not None:
            self.row_weights.add(sequences.rows_B, by_sequence)

    def end_step(
        self, *, step: int, total_steps: int, proportions: NDArray[np.float64], learning_rate: float, device: Any
    ) -> None:
        """Tell the mixer what the step made of the domains (collective)."""
        if not self.observes:
            return
        assert self.mixer is not None
        sums = self._sums.take(device)
        self._logged += sums
        if self._noise is not None:
            weights = proportions if self._domain_weights is None else self._domain_weights.given()
            self._noise.step(sums[SUMS.index("loss_sum")], sums[SUMS.index("tokens")], weights)
        self.mixer.observe(
            DomainStats.of(
                sums,
                names=self._domains.names,
                step=step,
                total_steps=total_steps,
                proportions=proportions,
                learning_rate=learning_rate,
            )
        )

    def since_log(self) -> State:
        """Return what ``scalars`` has yet to tell, over all ranks (collective)."""
        return {
            "weights": {} if self.stats is None else self.stats.since_read(),
            "plain": [] if self._plain is None else comm.gather_sum(self._plain).tolist(),
            "domains": self._logged,
        }

    def restore_since_log(self, state: State, device: torch.device) -> None:
        """Take back what ``since_log`` gave: rank 0 holds the sums of all."""
        if self.stats is not None:
            self.stats.restore(state["weights"], device)
        if state["plain"]:
            plain = torch.tensor(state["plain"], dtype=torch.float64, device=device)
            self._plain = plain if comm.rank() == 0 else torch.zeros_like(plain)
        self._logged = np.asarray(state["domains"], dtype=np.float64)

    def scalars(self) -> dict[str, float]:
        """Return numbers for the training log since the last call: weights, and the plain loss of each domain.

        Collective under a weighter.
        """
        scalars = {} if self.stats is None else self.stats.read()
        if self._plain is not None:
            total, count = comm.gather_sum(self._plain).tolist()
            scalars["plain_loss"] = total / max(count, 1.0)
            self._plain = None
        if self.observes:
            tokens, losses = self._logged[SUMS.index("tokens")], self._logged[SUMS.index("loss_sum")]
            for name, count, total in zip(self._domains.names, tokens, losses, strict=True):
                if count > 0:
                    scalars[f"loss/{name}"] = float(total / count)
            self._logged = np.zeros_like(self._logged)
        names = self._domains.names
        if self._domain_weights is not None and len(names) <= _LOGGED_DOMAINS:
            weights = self._domain_weights.given().tolist()
            scalars.update({f"loss_weight/{name}": weight for name, weight in zip(names, weights, strict=True)})
        return scalars
