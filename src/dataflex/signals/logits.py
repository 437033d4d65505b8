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
from dataflex.signals.losses import chunk_tokens, model_inputs, real_tokens
from dataflex.signals.model_parts import ModelParts, model_parts, narrow_head
from dataflex.signals.specs import LogitSpec
from dataflex.signals.sweep import preserve_state

T = TypeVar("T")
LogitsOf = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(rows [S], positions [S] of the batch) -> logits [S, V] in the model's type."""


class LogitReader:
    """Hands the logits of a batch to a function; use it without gradient, in eval mode, in autocast.

    Collective in its first call: all ranks settle on the same way.

    Args:
        model: The outermost module to call, not the DDP or DeepSpeed engine.

    Raises:
        UnsupportedError: No transformers model inside.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parts: ModelParts = model_parts(model)
        self.through_head: bool | None = None if self._parts.head is not None else False
        """Whether the head is applied to chosen positions; None until the first batch has been seen."""

    @property
    def vocabulary(self) -> int:
        """Number of tokens that the model's configuration knows."""
        return int(self._parts.text_config.vocab_size)

    def __call__(self, batch: dict[str, Any], use: Callable[[LogitsOf, int], T]) -> T:
        """Run the model on a collated batch and return what ``use`` makes of its logits.

        Args:
            batch: On the device.
            use: Given how to get logits, and their width V; may be called twice for the first batch.
        """
        head = None if self.through_head is False else self._parts.head
        if head is None:
            logits = _logits(self._parts.root(**model_inputs(batch), use_cache=False))
            return use(lambda rows, positions: logits[rows, positions], logits.shape[-1])
        found: list[T] = []
        raw: list[torch.Tensor] = []

        def inside(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            """Call ``use`` inside the head's call, whose parameters are whole only then (ZeRO-3)."""
            hidden, *rest = inputs
            last = hidden[:, -1:]
            if self.through_head is None:
                raw.append(head.forward(last, *rest))
            found.append(use(lambda rows, positions: head.forward(hidden[rows, positions], *rest), self.vocabulary))
            return (last, *rest)

        handle = head.register_forward_pre_hook(inside)
        try:
            outputs = self._parts.root(**model_inputs(batch), use_cache=False)
        finally:
            handle.remove()
        if self.through_head is None:
            same = len(raw) == 1 and torch.equal(raw[0].float(), _logits(outputs).float())
            agreed = comm.gather_sum(torch.tensor(int(same), device=batch["labels"].device))
            self.through_head = int(agreed) == comm.world()
        return found[0] if self.through_head else self(batch, use)


def _logits(outputs: Any) -> torch.Tensor:
    return outputs[0] if isinstance(outputs, tuple) else outputs.logits


_IGNORE = -100


@dataclass(frozen=True, kw_only=True)
class BatchTokens:
    """Supervised tokens of one batch, on the device, row by row [S].

    Attributes:
        num_rows: Rows of the batch B.
        row: Row of each token in the batch, ascending.
        position: Position of the predicted token in its row, padding not counted.
        loss: Cross-entropy, fp32.
        el2n: ||softmax(z) - onehot(y)||_2, or None if not asked for.
    """

    num_rows: int
    row: torch.Tensor
    position: torch.Tensor
    loss: torch.Tensor
    el2n: torch.Tensor | None = None

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
    """Turns collated batches into ``BatchTokens``; call it without gradient, in eval mode, in autocast.

    Collective in its first call: all ranks settle on the same way.

    Args:
        model: The outermost module to call, not the DDP or DeepSpeed engine.
        el2n: Also compute EL2N (Deep Learning on a Data Diet, arXiv 2107.07075) per token.

    Raises:
        UnsupportedError: No transformers model inside.
    """

    def __init__(self, model: nn.Module, *, el2n: bool = False) -> None:
        self._reader, self._el2n = LogitReader(model), el2n

    @property
    def through_head(self) -> bool | None:
        """Whether the head is applied in chunks; None until the first batch has been seen."""
        return self._reader.through_head

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any]) -> BatchTokens:
        """Score the supervised tokens of a batch with ``labels`` [B, T]."""
        labels, real = batch["labels"], real_tokens(batch)
        # What follows left padding is predicted from nothing: without padding it would have no loss either.
        supervised = labels[:, 1:].ne(_IGNORE) & real[:, :-1]
        row, before = supervised.nonzero(as_tuple=True)
        targets = labels[row, before + 1]

        def score(logits_of: LogitsOf, width: int) -> dict[str, torch.Tensor]:
            return self._chunks(lambda part: logits_of(row[part], before[part]), targets, width)

        columns = self._reader(batch, score)
        first = real.long().argmax(dim=1)
        return BatchTokens(num_rows=len(labels), row=row, position=before + 1 - first[row], **columns)

    def _chunks(
        self, logits_of: Callable[[slice], torch.Tensor], targets: torch.Tensor, vocabulary: int
    ) -> dict[str, torch.Tensor]:
        size = chunk_tokens(vocabulary, targets.device)
        parts: list[dict[str, torch.Tensor]] = []
        for start in range(0, len(targets), size):
            part = slice(start, start + size)
            parts.append(self._score(logits_of(part).float(), targets[part]))
        if not parts:
            return {name: torch.zeros(0, device=targets.device) for name in ("loss", "el2n")[: 1 + self._el2n]}
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _score(self, logits_SV: torch.Tensor, targets_S: torch.Tensor) -> dict[str, torch.Tensor]:
        loss_S = F.cross_entropy(logits_SV, targets_S, reduction="none")
        if not self._el2n:
            return {"loss": loss_S}
        # 1 - p_y as the sum of the others: sum p^2 - 2 p_y + 1 would cancel for confident predictions.
        others_SV = torch.log_softmax(logits_SV, dim=-1).exp().scatter(1, targets_S[:, None], 0.0)
        return {"loss": loss_S, "el2n": torch.hypot(others_SV.sum(dim=-1), others_SV.norm(dim=-1))}


def nuclear_norm(matrix: torch.Tensor, chunk: int = 8192) -> torch.Tensor:
    """Return the sum of the singular values of a matrix [T, V], float64 scalar; 0 for an empty one.

    Args:
        matrix: Any floating type.
        chunk: Elements of the longer side that are looked at together.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.t()
    gram = torch.zeros(wide.shape[0], wide.shape[0], dtype=torch.float64, device=matrix.device)
    for part in wide.split(chunk, dim=1):
        part = part.double()
        gram.addmm_(part, part.t())
    return torch.linalg.eigvalsh(gram).clamp_min_(0).sqrt_().sum()


class LogitSketch:
    """Two-sided subsampled randomized Fourier transform of matrices of up to ``length`` rows.

    Args:
        length: Most rows of a matrix; the transform over rows has this size.
        rows: Rows that are drawn.
        columns: Columns that are drawn.
        seed: Seed of signs and draws.
    """

    def __init__(self, length: int, rows: int, columns: int, seed: int) -> None:
        self._shape, self._seed, self._length = (rows, columns), seed, length
        signs, drawn = self._draws("positions", length, rows)
        angles = np.outer(drawn, np.arange(length)) % length * (2.0 * math.pi / length)
        self._over_rows = torch.from_numpy(np.cos(angles) * signs * math.sqrt(length / rows)).float()
        self._signs, self._drawn = torch.zeros(0), torch.zeros(0, dtype=torch.int64)

    @property
    def size(self) -> int:
        """Numbers of a sketch."""
        return self._shape[0] * self._shape[1]

    def _draws(self, side: str, size: int, count: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        random = stream(self._seed, f"logit sketch of {side}", size)
        return random.integers(0, 2, size) * 2.0 - 1.0, random.integers(0, size, count)

    def __call__(self, matrix: torch.Tensor, chunk: int = 4096) -> torch.Tensor:
        """Return the sketch of a matrix [T, V], fp32 [rows * columns], T at most ``length``."""
        width, columns = matrix.shape[1], self._shape[1]
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
    """Turns collated batches into nuclear norms and sketches; call it without gradient, in eval mode, in autocast.

    Args:
        reader: Of the model.
        spec: Which positions, and what becomes of them.
        length: Tokens of the longest row.
    """

    def __init__(self, reader: LogitReader, spec: LogitSpec, length: int) -> None:
        self._reader, self._spec = reader, spec
        self._sketch = LogitSketch(length, spec.rows, spec.columns, spec.seed)

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any]) -> torch.Tensor:
        """Return the norm and the sketch of each row of a batch with ``labels``, fp32 [B, 1 + rows * columns].

        NaN for rows without a supervised token.
        """
        labels, real = batch["labels"], real_tokens(batch)
        # As for losses: what follows left padding is predicted from nothing.
        predicts = torch.zeros_like(real)
        predicts[:, :-1] = labels[:, 1:].ne(_IGNORE) & real[:, :-1]
        taken = predicts if self._spec.tokens == "completion" else real
        out = torch.full((len(labels), 1 + self._sketch.size), torch.nan, device=labels.device)

        def use(logits_of: LogitsOf, width: int) -> torch.Tensor:
            chunk = chunk_tokens(width, labels.device)
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
    """Reads the routers of a model.

    Args:
        model: The outermost module to call, not the DDP or DeepSpeed engine.

    Raises:
        UnsupportedError: The model does not say how many experts a token gets, or gives no router logits.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, self._parts = model, model_parts(model)
        self._shape: tuple[int, int] | None = None
        config = self._parts.text_config
        self._top_k = getattr(config, "num_experts_per_tok", None) or getattr(config, "num_experts_per_token", None)
        if not self._top_k:
            raise UnsupportedError(
                f"{type(self._parts.lm).__name__} is no mixture-of-experts model (its configuration has no "
                "num_experts_per_tok), so there are no gates to look at"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """MoE layers and experts.

        Raises:
            UnsupportedError: The model gives no router logits.
        """
        if self._shape is None:
            tokens = torch.zeros(1, 1, dtype=torch.int64, device=next(self._model.parameters()).device)
            with preserve_state(self._model):
                self._model.eval()
                loads = self({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})
            self._shape = (int(loads.shape[1]), int(loads.shape[2]))
        return self._shape

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
