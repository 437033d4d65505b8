"""What is read off a model's logits, or its routers: token losses, EL2N, nuclear norms, sketches, expert loads."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dataflex import comm
from dataflex.errors import UnsupportedError
from dataflex.rng import stream
from dataflex.signals.losses import IGNORE, chunk_tokens, model_inputs, real_tokens
from dataflex.signals.model_parts import attached, logits_in, model_parts, narrow_head
from dataflex.signals.specs import LogitSpec
from dataflex.signals.sweep import preserve_state

T = TypeVar("T")
LogitsOf = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(rows [S], positions [S] of the batch) -> logits [S, V] in the model's type."""


class LogitReader:
    """Hands the logits of a batch to a function; use it without gradient, in eval mode, in autocast.

    The model is the outermost module to call. Collective in its first call: all ranks agree on the same way.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parts = model_parts(model)
        self.through_head: bool | None = None if self._parts.head is not None else False
        """Whether the head is applied to chosen positions; None until the first batch has been seen."""

    def __call__(self, batch: dict[str, Any], use: Callable[[LogitsOf, int], T]) -> T:
        """Run the model on a collated batch on the device and return what ``use`` makes of its logits.

        ``use`` is given a function that gives logits, and their width V; it may be called twice for the first batch.
        """
        head = None if self.through_head is False else self._parts.head
        if head is None:
            logits = logits_in(self._parts.root(**model_inputs(batch), use_cache=False))
            return use(lambda rows, positions: logits[rows, positions], logits.shape[-1])
        vocabulary = int(self._parts.text_config.vocab_size)
        found: list[T] = []
        raw: list[torch.Tensor] = []

        def inside(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            """Call ``use`` inside the head's call, whose parameters are whole only then (ZeRO-3)."""
            hidden, *rest = inputs
            last = hidden[:, -1:]
            if self.through_head is None:
                raw.append(head.forward(last, *rest))
            found.append(use(lambda rows, positions: head.forward(hidden[rows, positions], *rest), vocabulary))
            return (last, *rest)

        with attached(head.register_forward_pre_hook(inside)):
            outputs = self._parts.root(**model_inputs(batch), use_cache=False)
        if self.through_head is None:
            same = len(raw) == 1 and torch.equal(raw[0].float(), logits_in(outputs).float())
            self.through_head = all(comm.gather_objects(same))
        return found[0] if self.through_head else self(batch, use)


def _predicting(batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which positions predict a supervised token, bool [B, T - 1], and which hold a token [B, T].

    What follows left padding is predicted from nothing: without padding it would have no loss either.
    """
    real = real_tokens(batch)
    return batch["labels"][:, 1:].ne(IGNORE) & real[:, :-1], real


@dataclass(frozen=True, kw_only=True)
class BatchTokens:
    """Supervised tokens of one batch, on the device, row by row [S]."""

    num_rows: int  # rows of the batch B
    row: torch.Tensor  # row of each token in the batch, ascending
    position: torch.Tensor  # position of the predicted token in its row, padding not counted
    loss: torch.Tensor  # cross-entropy, fp32
    el2n: torch.Tensor | None = None  # ||softmax(z) - onehot(y)||_2 (arXiv 2107.07075), if asked for

    def means(self, what: str = "loss") -> torch.Tensor:
        """Return the mean of ``loss`` or ``el2n`` over each row's tokens [B]; NaN without any."""
        values = getattr(self, what)
        sums = values.new_zeros(self.num_rows).index_add_(0, self.row, values)
        return sums / torch.bincount(self.row, minlength=self.num_rows)

    def sums(self) -> torch.Tensor:
        """Return the sum of each row's losses and its number of tokens, fp32 [B, 2]."""
        sums = self.loss.new_zeros(self.num_rows).index_add_(0, self.row, self.loss)
        return torch.stack([sums, torch.bincount(self.row, minlength=self.num_rows).float()], dim=1)


class TokenScorer:
    """Turns collated batches into ``BatchTokens``, with or without ``el2n``; used like ``LogitReader``."""

    def __init__(self, model: nn.Module, *, el2n: bool = False) -> None:
        self.reader, self._el2n = LogitReader(model), el2n

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any]) -> BatchTokens:
        """Score the supervised tokens of a batch with ``labels`` [B, T]."""
        labels, (predicts, real) = batch["labels"], _predicting(batch)
        row, before = predicts.nonzero(as_tuple=True)
        targets = labels[row, before + 1]

        def score(logits_of: LogitsOf, width: int) -> dict[str, torch.Tensor]:
            size = chunk_tokens(width, targets.device)
            parts = [
                self._score(logits_of(rows, places).float(), wanted)
                for rows, places, wanted in zip(row.split(size), before.split(size), targets.split(size), strict=True)
                if len(wanted)
            ]
            none = [torch.zeros(0, device=targets.device)]
            names = ("loss", "el2n") if self._el2n else ("loss",)
            return {name: torch.cat(none + [part[name] for part in parts]) for name in names}

        columns = self.reader(batch, score)
        first = real.long().argmax(dim=1)
        return BatchTokens(num_rows=len(labels), row=row, position=before + 1 - first[row], **columns)

    def _score(self, logits_SV: torch.Tensor, targets_S: torch.Tensor) -> dict[str, torch.Tensor]:
        loss_S = F.cross_entropy(logits_SV, targets_S, reduction="none")
        if not self._el2n:
            return {"loss": loss_S}
        # 1 - p_y as the sum of the others: sum p^2 - 2 p_y + 1 would cancel for confident predictions.
        others_SV = torch.log_softmax(logits_SV, dim=-1).exp().scatter(1, targets_S[:, None], 0.0)
        return {"loss": loss_S, "el2n": torch.hypot(others_SV.sum(dim=-1), others_SV.norm(dim=-1))}


def nuclear_norm(matrix: torch.Tensor, chunk: int = 8192) -> torch.Tensor:
    """Return the sum of the singular values of a matrix [T, V], float64 scalar; 0 for an empty one.

    ``chunk`` elements of the longer side are multiplied together.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.t()
    gram = torch.zeros(wide.shape[0], wide.shape[0], dtype=torch.float64, device=matrix.device)
    for part in wide.split(chunk, dim=1):
        part = part.double()
        gram.addmm_(part, part.t())
    return torch.linalg.eigvalsh(gram).clamp_min_(0).sqrt_().sum()


class LogitSketch:
    """Two-sided subsampled randomized Fourier transform of matrices of up to ``length`` rows.

    ``rows`` rows and ``columns`` columns of the transform are drawn; ``seed`` is that of signs and draws.
    """

    def __init__(self, length: int, rows: int, columns: int, seed: int) -> None:
        self._columns, self._seed = columns, seed
        signs, drawn = self._draws("positions", length, rows)
        angles = np.outer(drawn, np.arange(length)) % length * (2.0 * math.pi / length)
        self._over_rows = torch.from_numpy(np.cos(angles) * signs * math.sqrt(length / rows)).float()
        self._signs, self._drawn = torch.zeros(0), torch.zeros(0, dtype=torch.int64)

    def _draws(self, side: str, size: int, count: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        random = stream(self._seed, f"logit sketch of {side}", size)
        return random.integers(0, 2, size) * 2.0 - 1.0, random.integers(0, size, count)

    def __call__(self, matrix: torch.Tensor, chunk: int = 4096) -> torch.Tensor:
        """Return the sketch of a matrix [T, V], fp32 [rows * columns], T at most ``length``."""
        width, columns = matrix.shape[1], self._columns
        if len(self._signs) != width:
            signs, drawn = self._draws("vocabulary", width, columns)
            # The real part of a real vector's transform is the same at k and V - k: half of it is enough.
            folded = np.minimum(drawn, width - drawn)
            self._signs = torch.from_numpy(signs).float().to(matrix.device)
            self._drawn = torch.from_numpy(folded).to(matrix.device)
        self._over_rows = self._over_rows.to(matrix.device)
        parts = [
            torch.fft.rfft(part.float() * self._signs, dim=1).real.index_select(1, self._drawn)
            for part in matrix.split(chunk)
        ]
        picked = torch.cat(parts) * math.sqrt(width / columns)
        return (self._over_rows[:, : len(matrix)] @ picked).flatten()


class LogitScorer:
    """Turns collated batches into nuclear norms and sketches; used like ``LogitReader``.

    ``length`` is the number of tokens of the longest row.
    """

    def __init__(self, model: nn.Module, spec: LogitSpec, length: int) -> None:
        self._reader, self._spec = LogitReader(model), spec
        self._sketch = LogitSketch(length, spec.rows, spec.columns, spec.seed)

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any]) -> torch.Tensor:
        """Return norm and sketch of each row, fp32 [B, 1 + rows * columns]; NaN without a supervised token."""
        predicts, real = _predicting(batch)
        predicts = F.pad(predicts, (0, 1))
        taken = predicts if self._spec.tokens == "completion" else real
        out = torch.full((len(real), 1 + self._spec.rows * self._spec.columns), torch.nan, device=real.device)

        def use(logits_of: LogitsOf, width: int) -> torch.Tensor:
            chunk = chunk_tokens(width, real.device)
            for row in predicts.any(dim=1).nonzero().flatten().tolist():
                positions = taken[row].nonzero().flatten()
                logits = torch.cat([logits_of(torch.full_like(part, row), part) for part in positions.split(chunk)])
                out[row, 0] = nuclear_norm(logits)
                out[row, 1:] = self._sketch(logits, chunk)
                if self._spec.per_length:  # both are linear in the logits
                    out[row] /= math.sqrt(len(positions))
            return out

        return self._reader(batch, use)


class GateReader:
    """Reads the routers of a model, ``shape`` being the number of MoE layers and of experts; see ``GateLoads``."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._parts = model, model_parts(model)
        config = self._parts.text_config
        self._top_k = getattr(config, "num_experts_per_tok", None) or getattr(config, "num_experts_per_token", None)
        if not self._top_k:
            raise UnsupportedError(
                f"{type(self._parts.lm).__name__} is no mixture-of-experts model (its configuration has no "
                "num_experts_per_tok), so there are no gates to look at"
            )
        tokens = torch.zeros(1, 1, dtype=torch.int64, device=next(model.parameters()).device)
        with preserve_state(model):
            model.eval()
            _, layers, experts = self({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}).shape
        self.shape = (layers, experts)

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any]) -> torch.Tensor:
        """Return the loads of each row and layer, fp32 [B, L, E]."""
        with narrow_head(self._parts):
            outputs = self._model(**model_inputs(batch), use_cache=False, output_router_logits=True)
        layers = getattr(outputs, "router_logits", None)
        if not layers:
            raise UnsupportedError(f"{type(self._parts.lm).__name__} gives no router logits (output_router_logits)")
        real = real_tokens(batch)
        rows, width = real.shape
        loads = []
        for logits in layers:
            chosen = logits.float().topk(self._top_k, dim=-1).indices
            hits = torch.zeros_like(logits, dtype=torch.float32).scatter_(-1, chosen, 1.0)
            loads.append((hits.view(rows, width, -1) * real[:, :, None]).sum(dim=1))
        return torch.stack(loads, dim=1)
