"""The representations that are no selectors of their own: embeddings, gradient sketches, influences, losses."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dataflex.method import Context, Params, Rows
from dataflex.signals.specs import EmbeddingSpec, GradientSpec, Pooling

__all__ = [
    "Embed",
    "Gradient",
    "Influence",
    "Loss",
    "RdsPlusVectors",
    "embed",
    "gradient",
    "influence",
    "loss",
    "rds_plus",
]

Precondition = Literal["true_adam", "paper_repo", "sign", "none"]


@dataclass(frozen=True, kw_only=True)
class RdsPlusVectors(Params):
    """Last hidden states, weighted by position (RDS+)."""

    encoder: str | None = field(
        default=None,
        metadata={"help": "folder or hub id of another model; null: the model under training", "model": True},
    )
    layer: int = field(default=-1, metadata={"help": "layer of the hidden states; -1 is the last, after its norm"})
    completion_only: bool = field(
        default=False, metadata={"help": "average the supervised tokens only, not the prompt's"}
    )

    def __post_init__(self) -> None:
        if self.completion_only and self.encoder is not None:
            raise ValueError("completion_only: an encoder reads plain text without labels; leave one of them out")


@dataclass(frozen=True, kw_only=True)
class Embed(RdsPlusVectors):
    """Hidden states pooled over tokens, or the vectors of a text encoder."""

    pooling: Pooling = field(
        default="mean",
        metadata={"help": "how tokens become a vector; a sentence-transformers folder has its own way"},
    )


@dataclass(frozen=True, kw_only=True)
class _Gradients(Params):
    precondition: Precondition = field(
        default="true_adam", metadata={"help": "what turns training gradients into directions"}
    )
    include_momentum: bool = field(default=True, metadata={"help": "keep Adam's momentum term"})
    parameters: str | None = field(
        default=None, metadata={"help": "regular expression of parameter names; null: all trainable ones"}
    )
    last_blocks: int | None = field(
        default=None, metadata={"help": "use only the last so many blocks of the model", "minimum": 1}
    )
    bf16: bool = field(default=False, metadata={"help": "run the passes in bfloat16"})


@dataclass(frozen=True, kw_only=True)
class Gradient(_Gradients):
    """Sketched gradients of length one, as LESS compares; target rows' stay plain."""

    dim: int = field(default=4096, metadata={"help": "numbers per row, even", "minimum": 2})

    def __post_init__(self) -> None:
        if self.dim % 2:
            raise ValueError(f"dim: must be even, found {self.dim}")


@dataclass(frozen=True, kw_only=True)
class Influence(_Gradients):
    """Exact cosines of rows' gradients with each target's mean one (LESS)."""

    target_gradient: Literal["mean_of_cosines", "cosine_of_mean"] = field(
        default="mean_of_cosines", metadata={"help": "mean over a task as in the code of LESS or in its text"}
    )


@dataclass(frozen=True, kw_only=True)
class Loss(Params):
    """Token-mean loss."""

    prefer: Literal["high", "low"] = field(default="high", metadata={"help": "which losses are preferred"})


def rds_plus(rows: Rows, target: str | None, ctx: Context, p: RdsPlusVectors) -> NDArray[np.float32]:
    """Return vectors of length one [n, D]."""
    spec = EmbeddingSpec(layer=p.layer, completion_only=p.completion_only)
    return ctx.signals.embeddings(rows, spec, target=target, encoder=p.encoder)


def embed(rows: Rows, target: str | None, ctx: Context, p: Embed) -> NDArray[np.float32]:
    """Return vectors of length one [n, D]."""
    if p.encoder is not None and (Path(p.encoder) / "modules.json").is_file():
        spec = EmbeddingSpec()  # the model has its own pooling
    else:
        spec = EmbeddingSpec(layer=p.layer, pooling=p.pooling, completion_only=p.completion_only)
    return ctx.signals.embeddings(rows, spec, target=target, encoder=p.encoder)


def _gradient_spec(p: _Gradients, ctx: Context, mean_of_cosines: bool = True) -> GradientSpec:
    return GradientSpec(
        precondition=p.precondition,
        include_momentum=p.include_momentum,
        mean_of_cosines=mean_of_cosines,
        parameters=p.parameters,
        last_blocks=p.last_blocks,
        sketch_seed=ctx.seed,
        bf16=p.bf16,
    )


def gradient(rows: Rows, target: str | None, ctx: Context, p: Gradient) -> NDArray[np.float32]:
    """Return sketches of length one [n, dim]."""
    return ctx.signals.gradient_sketches(rows, _gradient_spec(p, ctx), dim=p.dim, target=target)


def influence(rows: Rows, ctx: Context, p: Influence) -> NDArray[np.float32]:
    """Return influences by target [T, n]."""
    spec = _gradient_spec(p, ctx, p.target_gradient == "mean_of_cosines")
    return np.asarray(ctx.signals.gradient_scores(rows, spec, targets=ctx.targets).T)


def loss(rows: Rows, ctx: Context, p: Loss) -> NDArray[np.float32]:
    """Return losses, negative where low ones are preferred [n]."""
    found = ctx.signals.losses(rows)
    return found if p.prefer == "high" else -found
