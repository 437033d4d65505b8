"""Statistics of steps: losses by domain for mixers and the log, warnings about noise, and weights of sequences."""

from __future__ import annotations

import io
import logging
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from dataflex import comm
from dataflex.errors import ComponentError
from dataflex.method import Rows, State
from dataflex.plan.domains import SUMS, Domains, Floats
from dataflex.signals.texts import row_texts

logger = logging.getLogger(__name__)

LOGGED_DOMAINS = 32
"""Most domains whose numbers go into the log; the record has those of any number."""
SAMPLES = 10  # rows of largest and of smallest weight in the record
_CHARACTERS = 400
_UPDATES = 5
_DEVIATIONS = 3.0
_QUANTILES = {"p05": 0.05, "p50": 0.5, "p95": 0.95}
_PENDING = 64
_GRAPH_NODES = 64  # the loss is a few operations behind what the loop is given


def losses_in_graph(loss: torch.Tensor, labels_RT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return the token losses that a loss was made of, fp32 [R, T] without gradient, and which count, bool [R, T].

    Nothing is computed anew: the node of ``nll_loss`` in the graph of ``loss`` keeps log-probabilities and targets for
    the backward pass. None where not exactly one such node has the labels, shifted, as its targets: a fused kernel,
    label smoothing, a compiled model, or a loss of one's own.
    """
    pending, seen, found = [loss.grad_fn], 0, []
    while pending and seen < _GRAPH_NODES:
        node, seen = pending.pop(0), seen + 1
        if node is None:
            continue
        if node.name() == "NllLossBackward0":
            found += [] if (losses := _of_labels(node, labels_RT)) is None else [losses]
        else:
            pending += [before for before, _ in node.next_functions]
    return found[0] if len(found) == 1 else None


def _of_labels(node: Any, labels_RT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return the losses of a node of ``nll_loss`` as ``losses_in_graph`` does; None if its targets are other ones."""
    log_p_NV, targets_N = node._saved_self.detach(), node._saved_target
    rows, width = labels_RT.shape
    if log_p_NV.dim() != 2 or len(targets_N) not in (rows * width, rows * (width - 1)):
        return None
    counts_N = targets_N.ne(node._saved_ignore_index)
    targets_RT = torch.where(counts_N, targets_N, -100).view(rows, -1)
    next_RT = F.pad(labels_RT[:, 1:], (0, 1), value=-100).to(targets_RT)
    if not torch.equal(targets_RT, next_RT[:, : targets_RT.shape[1]]):
        return None
    loss_N = -log_p_NV.gather(1, torch.where(counts_N, targets_N, 0)[:, None]).squeeze(1).float()
    return torch.where(counts_N, loss_N, 0.0).view(targets_RT.shape), counts_N.view(targets_RT.shape)


class DomainSums:
    """Sums over the micro-batches since the last ``take`` for each of ``num_domains`` domains."""

    def __init__(self, num_domains: int) -> None:
        self._num_domains = num_domains
        self._sums: torch.Tensor | None = None

    def add(
        self,
        loss_RT: torch.Tensor,
        mask_RT: torch.Tensor,
        domains_R: NDArray[np.int64],
        reference_RT: torch.Tensor | None = None,
    ) -> None:
        """Add one micro-batch of this rank: token losses and those of the reference, 0 where ``mask_RT`` is False."""
        loss = loss_RT.double()
        tokens = mask_RT.sum(dim=1).double()
        columns = [loss.sum(dim=1)]
        if reference_RT is None:
            columns += [torch.zeros_like(tokens)] * 2
        else:
            excess = (loss - reference_RT.double()).clamp(min=0.0)
            columns += [excess.sum(dim=1), excess.gt(0.0).sum(dim=1).double()]
        columns += [tokens, tokens.gt(0).double()]
        which = torch.from_numpy(domains_R).to(loss.device)
        sums = loss.new_zeros(len(SUMS), self._num_domains)
        sums[:-1].index_add_(1, which, torch.stack(columns))
        sums[-1] = sums[SUMS.index("tokens")].gt(0).double()
        self._sums = sums if self._sums is None else self._sums + sums

    def take(self, device: torch.device) -> NDArray[np.float64]:
        """Return the sums over all ranks [len(SUMS), K] and start again at 0 (collective)."""
        sums, self._sums = self._sums, None
        if sums is None:
            sums = torch.zeros(len(SUMS), self._num_domains, dtype=torch.float64, device=device)
        return comm.gather_sum(sums).cpu().numpy()

    def of_ranks(self, device: torch.device) -> NDArray[np.float64]:
        """Return the sums of each rank [ranks, len(SUMS), K] without starting again (collective)."""
        sums = torch.zeros(len(SUMS), self._num_domains, dtype=torch.float64, device=device)
        sums = sums if self._sums is None else self._sums
        return comm.gather_rows(sums[None], equal=True)[0].cpu().numpy()

    def restore(self, of_ranks: NDArray[np.float64], device: torch.device) -> None:
        """Take back what ``of_ranks`` gave: each rank its own, rank 0 all where their number has changed."""
        rank, same = comm.rank(), len(of_ranks) == comm.world()
        mine = of_ranks[rank] if same else of_ranks.sum(axis=0) * float(rank == 0)
        self._sums = torch.tensor(mine, dtype=torch.float64, device=device)


def outlying(loss_K: Floats) -> NDArray[np.bool_]:
    """Return which losses are above median + 3 MAD, the median absolute deviation [K]; NaN is never."""
    known = loss_K[np.isfinite(loss_K)]
    if not known.size:
        return np.zeros(loss_K.shape, dtype=np.bool_)
    middle = np.median(known)
    deviation = np.median(np.abs(known - middle))
    return np.asarray(loss_K > middle + _DEVIATIONS * deviation)


class NoiseWatch:
    """Warns once of each domain [K] that is outlying at five updates in a row that raise its weight.

    Kept in memory only: a resumed run counts from 0.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names
        self._weights: Floats | None = None
        self._rises = np.zeros(len(names), dtype=np.int64)
        self._told = np.zeros(len(names), dtype=np.bool_)
        self._loss, self._tokens = np.zeros(len(names)), np.zeros(len(names))

    def step(self, loss_sum: Floats, tokens: Floats, weights: Floats) -> list[str]:
        """Add one optimizer step and return the domains for which a warning was logged.

        ``loss_sum`` and ``tokens`` are sums by domain [K]; ``weights`` the domains' proportions, or weights in the loss
        [K].
        """
        before, self._weights = self._weights, weights.copy()
        found: list[str] = []
        if before is not None and not np.array_equal(before, weights):  # an update, made from the steps before
            mean = np.divide(self._loss, self._tokens, out=np.full(len(weights), np.nan), where=self._tokens > 0)
            self._rises = np.where(outlying(mean) & (weights > before), self._rises + 1, 0)
            new = (self._rises >= _UPDATES) & ~self._told
            self._told |= new
            for k in np.flatnonzero(new).tolist():
                found.append(self._names[k])
                logger.warning(
                    "domain %r: its loss of %.3g nats per token is far above the other domains' (more than the median "
                    "and %g median absolute deviations) and its weight rose %d times in a row, to %.3g. If it is noise "
                    "(logs, encoded data), the mixer should not follow it: leave it out, cap it (max_epochs), or use a "
                    "mixer with a reference or target losses",
                    self._names[k],
                    mean[k],
                    _DEVIATIONS,
                    _UPDATES,
                    weights[k],
                )
            self._loss, self._tokens = np.zeros(len(weights)), np.zeros(len(weights))
        self._loss, self._tokens = self._loss + loss_sum, self._tokens + tokens
        return found


class WeightStats:
    """Effective sample size, quantiles and the largest weight since the last ``read``, over all ranks.

    ESS = (sum w)^2 / sum w^2 over the sequences. ``name`` is the weighter's, for messages.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._sequences: list[torch.Tensor] = []
        self._range: torch.Tensor | None = None

    def add(self, weights: torch.Tensor, by_sequence: torch.Tensor) -> None:
        """Add the weights of one micro-batch: [B, 1] by sequence, or [R, T] by position.

        ``by_sequence`` is the mean weight of each sequence [B]. A negative or infinite weight raises ComponentError
        here on a CPU, and at the next ``read`` on an accelerator, where looking at a value would make the device wait.
        """
        w = weights.detach()
        span = torch.stack([w.min(), -w.max()]) if w.numel() else w.new_zeros(2)
        self._range = span if self._range is None else torch.minimum(self._range, span)
        self._sequences.append(by_sequence.detach().float())
        if len(self._sequences) > _PENDING:
            self._sequences = [torch.cat(self._sequences)]
        if w.device.type == "cpu":
            self._check()

    def _check(self) -> float:
        assert self._range is not None
        smallest, largest = float(self._range[0]), -float(self._range[1])
        if not (math.isfinite(largest) and smallest >= 0.0):
            raise ComponentError(f"weighter {self._name!r} returned negative or non-finite weights")
        return largest

    def _gathered(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return range and weights of the sequences over all ranks (collective)."""
        assert self._range is not None
        span = comm.gather_rows(self._range[None], equal=True)[0].amin(dim=0)
        return span, comm.gather_rows(torch.cat(self._sequences))[0]

    def read(self) -> dict[str, float]:
        """Return ``weight_ess`` (share of the sequences, 0 to 1), quantiles and ``weight_max``, and start again.

        Collective. Raises ComponentError as ``add`` does.
        """
        if self._range is None:
            return {}
        self._range, sequences = self._gathered()
        largest = self._check()
        w = sequences.double().cpu().numpy()
        self._sequences, self._range = [], None
        if not len(w):
            return {}
        squares = float(np.square(w).sum())
        told = {"weight_ess": float(w.sum()) ** 2 / squares / len(w) if squares > 0 else 0.0}
        told |= {f"weight_{name}": float(np.quantile(w, share)) for name, share in _QUANTILES.items()}
        return {**told, "weight_max": largest}

    def since_read(self) -> State:
        """Return what was added on all ranks since the last ``read`` (collective); empty if nothing was."""
        if self._range is None:
            return {}
        span, weights = self._gathered()
        return {"range": span.double().cpu().numpy(), "weights": weights.cpu().numpy()}

    def restore(self, state: State, device: torch.device) -> None:
        """Take back what ``since_read`` gave: rank 0 holds all of it."""
        if state:
            weights = state["weights"] if comm.rank() == 0 else state["weights"][:0]
            self._range = torch.tensor(state["range"], device=device, dtype=torch.float64)
            self._sequences = [torch.tensor(weights, device=device)]


class RowWeights:
    """Mean weight of each row that this rank weighed so far, on rank 0 of each row up to the last ``gather``."""

    def __init__(self) -> None:
        self._rows = np.zeros(0, dtype=np.int64)
        self._sums = np.zeros(0, dtype=np.float64)
        self._counts = np.zeros(0, dtype=np.int64)
        self._pending: list[tuple[Rows, torch.Tensor]] = []

    def add(self, rows_B: Rows, weights_B: torch.Tensor) -> None:
        """Add the weights of one micro-batch's sequences."""
        self._pending.append((rows_B, weights_B.detach()))
        if len(self._pending) >= _PENDING:
            self._settle()

    def _settle(self) -> None:
        """Merge what is pending into the sorted table."""
        if not self._pending:
            return
        rows = np.concatenate([self._rows, *(rows for rows, _ in self._pending)])
        new = torch.cat([weights for _, weights in self._pending]).double().cpu().numpy()
        sums = np.concatenate([self._sums, new])
        counts = np.concatenate([self._counts, np.ones(len(new), dtype=np.int64)])
        self._pending = []
        self._merge(rows, sums, counts)

    def gather(self) -> None:
        """Bring together on rank 0 what the ranks have weighed (collective)."""
        self._settle()
        if comm.world() == 1:
            return
        parts = comm.gather_objects((self._rows, self._sums, self._counts))
        rows, sums, counts = (np.concatenate(each) for each in zip(*parts, strict=True))
        self._merge(rows[: len(rows) if comm.rank() == 0 else 0], sums, counts)

    def _merge(self, rows: Rows, sums: Floats, counts: NDArray[np.int64]) -> None:
        self._rows, place = np.unique(rows, return_inverse=True)
        size, stop = len(self._rows), len(rows)
        self._sums = np.asarray(np.bincount(place, weights=sums[:stop], minlength=size), dtype=np.float64)
        self._counts = np.bincount(place, weights=counts[:stop], minlength=size).astype(np.int64)

    def table(self, fingerprint: str) -> bytes:
        """Return the rows that were weighed, as a Parquet file: row, weight (its mean) and times_weighed.

        ``fingerprint`` of the row space goes into its metadata.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._settle()
        means = self._sums / np.maximum(self._counts, 1)
        file = io.BytesIO()
        columns = pa.table({"row": self._rows, "weight": means, "times_weighed": self._counts})
        pq.write_table(columns.replace_schema_metadata({"fingerprint": fingerprint}), file)
        return file.getvalue()

    def extremes(self, most: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Return up to ``most`` rows of the largest mean weight, and as many of the smallest, ties by row id.

        Each as ``row``, ``weight`` (its mean) and ``times`` (the number of its sequences that were weighed).
        """
        self._settle()
        means = self._sums / np.maximum(self._counts, 1)
        most = min(most, len(means) // 2) if len(means) > 1 else len(means)

        def first(keys: Floats) -> list[dict[str, Any]]:
            places = np.argsort(keys, kind="stable")[:most]
            return [
                {"row": int(self._rows[i]), "weight": float(means[i]), "times": int(self._counts[i])} for i in places
            ]

        return first(-means), first(means)

    def __len__(self) -> int:
        self._settle()
        return len(self._rows)

    def state_dict(self) -> State:
        """Return the table."""
        self._settle()
        return {"rows": self._rows, "sums": self._sums, "counts": self._counts}

    def load_state_dict(self, state: State) -> None:
        """Take back what ``state_dict`` gave on rank 0; the other ranks begin with nothing."""
        self._pending = []
        if state and comm.rank() == 0:
            self._rows, self._sums, self._counts = state["rows"], state["sums"], state["counts"]


def describe_rows(
    weighed: list[dict[str, Any]], dataset: Any, tokenizer: Any, domains: Domains
) -> list[dict[str, Any]]:
    """Return rows of ``RowWeights.extremes`` with the ``domain`` and the shortened ``text`` of each.

    Without a tokenizer texts are empty.
    """
    rows = np.array([item["row"] for item in weighed], dtype=np.int64)
    prompts, answers = (
        row_texts(dataset, rows, tokenizer, part) if len(rows) and tokenizer is not None else [""] * len(rows)
        for part in ("prompt", "completion")
    )
    described = []
    for item, prompt, answer in zip(weighed, prompts, answers, strict=True):
        half = _CHARACTERS // 2 if prompt else 0  # a long prompt must not hide the answer, which is weighed
        text = f"{_cut(prompt, half)} => {_cut(answer, half)}" if prompt else _cut(answer, _CHARACTERS)
        described.append({**item, "domain": domains.names[int(domains.domain_of[item["row"]])], "text": text})
    return described


def _cut(text: str, characters: int) -> str:
    words = " ".join(text.split())
    return words if len(words) <= characters else words[: characters - 3] + "..."
