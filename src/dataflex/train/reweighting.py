"""The training loss where a method acts on it: weights of sequences, tokens and domains, and what it tells mixers.

Knows the weighter, the mixer, the columns and the rows of each micro-batch; the arithmetic is
``train.weighting``'s. Weights multiply before one normalisation. What mixers observe are the plain losses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from dataflex.core.domain_stats import SUMS, DomainStats
from dataflex.core.domains import Domains
from dataflex.core.protocols import Mixer, Normaliser, Rows, Weighter
from dataflex.dist import comm
from dataflex.errors import ComponentError, UnsupportedError
from dataflex.signals.packing import document_ids
from dataflex.signals.pooling import pool, pool_documents
from dataflex.train import weighting
from dataflex.train.domain_sums import DomainSums
from dataflex.train.noise_watch import NoiseWatch
from dataflex.train.weight_stats import RowWeights, WeightStats
from dataflex.train.weighting import Sequences, TokenLosses

__all__ = ["References", "Reweighter"]

_LOGGED_DOMAINS = 32


class References(Protocol):
    """Token losses of a reference model for the rows in training."""

    def of(self, batch: dict[str, Any], rows: Rows, mask_BT: torch.Tensor) -> torch.Tensor:
        """Return fp32 [R, T], 0 where ``mask_BT`` is False."""
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
        if weighter is not None and mixer is not None and mixer.weighs_loss and mixer.loss_normaliser == "domain":
            raise UnsupportedError(
                f"the {mixer.name} mixer normalises the loss by domain, which leaves no place for the "
                f"{weighter.name} weighter; use 'normaliser: token' of the mixer, or one of the two methods"
            )
        self.weighter, self.mixer = weighter, mixer
        self.stats = None if weighter is None else WeightStats(weighter.name)
        self.row_weights = RowWeights() if weighter is not None and comm.rank() == 0 else None
        self._plain: torch.Tensor | None = None
        self.reference = reference
        self._columns, self._domains = columns, domains
        self._over_ranks, self._world, self._packed = over_ranks, world, packed
        self._scale: torch.Tensor | None = None
        self._domain_weights: NDArray[np.float64] | None = None
        self._sums = DomainSums(len(domains.names))
        self._logged = np.zeros((len(SUMS), len(domains.names)))
        # A mixer with a reference looks at what can be learned: the weights of noise do not rise.
        blind = mixer is not None and mixer.observes and mixer.reference is None and comm.rank() == 0
        self._noise = NoiseWatch(domains.names) if blind else None

    @property
    def observes(self) -> bool:
        """Whether a mixer wants to know what each step made of the domains."""
        return self.mixer is not None and self.mixer.observes

    @property
    def embedding(self) -> Any:
        """How the training forward's hidden states are pooled, or None."""
        return None if self.weighter is None else self.weighter.embedding

    def begin_step(self, batches: list[Any], rows: list[Rows], num_items: Any, device: torch.device) -> None:
        """Find what is known of the step's weights before its forward passes (collective)."""
        self._scale, self._domain_weights = None, None
        if self.mixer is not None and self.mixer.weighs_loss:
            alpha = self._domain_weights = self._checked(self.mixer)
            if self.mixer.loss_normaliser == "domain":
                self._domain_weights = self._per_token(alpha, batches, rows, num_items, device)
                return
        if self._normaliser != "token":
            return
        total = torch.zeros((), dtype=torch.float64)
        for batch, ids in zip(batches, rows, strict=True):
            weights = self._known(ids)
            if weights is None:
                return
            if self._domain_weights is not None:
                weights = weights * self._domain_weights[self._domains.domain_of[ids]]
            total += (torch.from_numpy(weights) * _supervised(batch["labels"])).sum()
        if self._over_ranks:
            total = comm.gather_sum(total.to(device))
        items = torch.as_tensor(num_items, dtype=torch.float64, device=total.device)
        self._scale = torch.where(total > 0, items / total, torch.zeros_like(total))

    @property
    def _normaliser(self) -> Normaliser:
        if self.weighter is not None:
            return self.weighter.normaliser
        mixer = self.mixer
        return "count" if mixer is not None and mixer.weighs_loss and mixer.loss_normaliser == "domain" else "token"

    def _known(self, rows: Rows) -> NDArray[np.float64] | None:
        """Return the weighter's weights where they are known from the rows alone; ones without a weighter."""
        if self.weighter is None:
            return np.ones(len(rows))
        weights = self.weighter.static_weights(rows, self._columns)
        return None if weights is None else weights.astype(np.float64)

    def _checked(self, mixer: Mixer) -> NDArray[np.float64]:
        alpha = np.asarray(mixer.loss_weights(), dtype=np.float64)
        if alpha.shape != (len(self._domains.names),) or not np.isfinite(alpha).all() or (alpha < 0).any():
            raise ComponentError(f"mixer {mixer.name!r} gave loss weights that are no numbers >= 0 by domain")
        return alpha

    def _per_token(
        self, alpha: NDArray[np.float64], batches: list[Any], rows: list[Rows], num_items: Any, device: torch.device
    ) -> NDArray[np.float64]:
        """Return a_d N / n_d, so that the sum over tokens divided by N is sum_d a_d (mean loss of d) (collective)."""
        counts = torch.zeros(len(alpha), dtype=torch.float64)
        for batch, ids in zip(batches, rows, strict=True):
            tokens = batch["labels"][:, 1:].ne(weighting.IGNORE_INDEX).sum(dim=1).double().cpu()
            counts.index_add_(0, torch.from_numpy(self._domains.domain_of[ids].astype(np.int64)), tokens)
        if self._over_ranks:
            counts = comm.gather_sum(counts.to(device)).cpu()
        tokens_K = counts.numpy()
        return np.divide(alpha * float(num_items), tokens_K, out=np.zeros_like(alpha), where=tokens_K > 0)

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
        """Return the weighted loss of one micro-batch (collective for weights that depend on losses).

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
        weighter = self.weighter
        acts = weighter is not None and weighter.active(step, total_steps)
        losses = weighting.token_losses(logits, labels, entropy=acts and weighter is not None and weighter.entropy)
        domains_R = self._domains.domain_of[rows].astype(np.int64)
        reference = None if self.reference is None else self.reference.of(batch, rows, losses.mask_BT)
        if self.observes:
            self._sums.add(losses.loss_BT.detach(), losses.mask_BT, domains_R, reference)
        sequences = self._sequences(batch, losses, rows) if acts else weighting.row_sequences(rows)
        normaliser, scale = self._normaliser, self._scale
        known = self._known(rows) if acts or weighter is None else None
        seen = None
        if weighter is not None:
            plain = torch.stack([losses.plain_sum.double(), losses.mask_BT.sum().double()])
            self._plain = plain if self._plain is None else self._plain + plain
        if acts and weighter is not None:
            if known is None:
                seen = weighting.view(
                    losses,
                    sequences,
                    domains_B=self._domains.domain_of[sequences.rows_B].astype(np.int64),
                    step=step,
                    total_steps=total_steps,
                    num_micro_batches=num_micro_batches,
                    reference_BT=reference,
                    embeddings_BH=self._embedded(hidden, batch, losses, sequences),
                )
                weights = weighting.checked(weighter.weigh(seen), weighter, losses, sequences)
            else:
                sequences = weighting.row_sequences(rows)
                weights = weighting.checked(torch.from_numpy(known), weighter, losses, sequences)
            self._note(weights, losses, sequences, num_sequences=1 if seen is None else len(seen.loss_M))
        else:
            weights = losses.loss_BT.new_ones(len(rows), 1)
            if weighter is not None:
                normaliser, scale = "count", None
        if self._domain_weights is not None:
            weights = self._times_domains(weights, sequences, normaliser)
            if weighter is not None and not acts:
                normaliser, scale = "token", None
        return weighting.weighted_loss(
            losses,
            weights,
            sequences=sequences,
            normaliser=normaliser,
            num_items=num_items,
            num_micro_batches=num_micro_batches,
            step_scale=scale,
            replicas=1 if self._over_ranks else self._world,
        )

    def _note(self, weights: torch.Tensor, losses: TokenLosses, sequences: Sequences, *, num_sequences: int) -> None:
        """Keep weights for the log and the report, relative to equal ones (1 / sequences under ``sample``)."""
        relative = weights * num_sequences if self._normaliser == "sample" else weights
        by_sequence = relative[:, 0]
        if relative.shape[1] > 1 or len(relative) != len(sequences.rows_B):
            tokens_B = sequences.sums(losses.mask_BT.to(relative.dtype))
            by_sequence = sequences.sums(relative * losses.mask_BT) / tokens_B.clamp(min=1)
        assert self.stats is not None
        self.stats.add(relative, by_sequence)
        if self.row_weights is not None:
            self.row_weights.add(sequences.rows_B, by_sequence)

    def _sequences(self, batch: dict[str, Any], losses: TokenLosses, rows: Rows) -> Sequences:
        if not self._packed:
            return weighting.row_sequences(rows)
        return weighting.document_sequences(document_ids(batch), losses.mask_BT, rows)

    def _embedded(
        self, hidden: torch.Tensor | None, batch: dict[str, Any], losses: TokenLosses, sequences: Sequences
    ) -> torch.Tensor | None:
        if hidden is None:
            return None
        hidden = hidden.detach()
        if sequences.index_BT is None:
            return pool(hidden, batch.get("attention_mask"), batch["labels"], self.embedding).nan_to_num()
        documents = document_ids(batch)
        vectors, keys = pool_documents(hidden, documents, batch["labels"], self.embedding)
        # Keep the documents that are sequences (those with a supervised token), in their order.
        predicted = torch.nn.functional.pad(documents[:, 1:], (0, 1), value=0).clamp(min=0)
        row, column = losses.mask_BT.nonzero(as_tuple=True)
        place = torch.full((len(documents), int(documents.max()) + 1), -1, dtype=torch.int64, device=hidden.device)
        place[row, predicted[row, column]] = sequences.index_BT[row, column]
        where = place[keys[:, 0], keys[:, 1]]
        out = vectors.new_zeros(len(sequences.rows_B), vectors.shape[1])
        out[where[where >= 0]] = vectors[where >= 0]
        return out.nan_to_num()

    def _times_domains(self, weights: torch.Tensor, sequences: Sequences, normaliser: Normaliser) -> torch.Tensor:
        """Multiply by the domains' weights; under ``sample`` the sum over the micro-batch stays as it was."""
        assert self._domain_weights is not None
        if len(weights) == len(sequences.rows_B) and weights.shape[1] == 1:
            rows = sequences.rows_B
            by_row = torch.from_numpy(self._domain_weights[self._domains.domain_of[rows]]).to(weights)[:, None]
        else:
            by_row = torch.from_numpy(self._domain_weights[self._domains.domain_of[sequences.rows_B]]).to(weights)
            by_row = sequences.spread(by_row)
        product = weights * by_row
        if normaliser != "sample":
            return product
        before, after = comm.gather_sum(torch.stack([weights.double().sum(), product.double().sum()])).unbind()
        return product * torch.where(after > 0, before / after, torch.zeros_like(after)).to(product)

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
            weights = self._checked(self.mixer) if self.mixer.weighs_loss else proportions
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

    def scalars(self) -> dict[str, float]:
        """Return numbers for the training log since the last call: weights, and the plain loss of each domain."""
        scalars = {} if self.stats is None else self.stats.read()
        if self._plain is not None:
            total, count = self._plain.tolist()
            scalars["plain_loss"] = total / max(count, 1.0)
            self._plain = None
        if self.observes:
            tokens, losses = self._logged[SUMS.index("tokens")], self._logged[SUMS.index("loss_sum")]
            for name, count, total in zip(self._domains.names, tokens, losses, strict=True):
                if count > 0:
                    scalars[f"loss/{name}"] = float(total / count)
            self._logged = np.zeros_like(self._logged)
        names = self._domains.names
        if self.mixer is not None and self.mixer.weighs_loss and len(names) <= _LOGGED_DOMAINS:
            weights = self._checked(self.mixer).tolist()
            scalars.update({f"loss_weight/{name}": weight for name, weight in zip(names, weights, strict=True)})
        return scalars


def _supervised(labels: torch.Tensor) -> torch.Tensor:
    """Return tokens per row [R] as the stock denominator counts them (a label in the first place included)."""
    return labels.ne(weighting.IGNORE_INDEX).sum(dim=1).double()
