"""What can be asked about rows: small frozen objects, each of which opens a scorer for the model at hand.

``ctx.signals(TokenLoss(), rows)`` asks; ``signals.runner`` answers. Nothing here imports torch before a scorer is
opened, so methods may import these names freely. A plugin adds a signal by a subclass of ``Signal`` of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import ConfigError
from dataflex.signals.specs import (
    EmbeddingSpec,
    Generation,
    GenerationSpec,
    GradientSpec,
    LogitSpec,
    Part,
    Pooling,
    WeightedResponse,
)

if TYPE_CHECKING:
    import torch

    from dataflex.plan.domains import Rows
    from dataflex.signals.embeddings import TextEncoder
    from dataflex.signals.gradients.scorers import GradientScorers
    from dataflex.signals.model_access import ModelAccess
    from dataflex.signals.sweep import Sweep
    from dataflex.signals.texts import Cut

__all__ = [
    "EL2N",
    "AdaptedLoss",
    "Embedding",
    "GateLoads",
    "Generation",
    "GenerationSpec",
    "GradientNorms",
    "GradientProducts",
    "GradientScores",
    "GradientSketches",
    "GradientSpec",
    "LogitFeatures",
    "Part",
    "PerturbedLoss",
    "Pooling",
    "ResponseGradientScores",
    "ResponseLoss",
    "Scorer",
    "Signal",
    "TokenLoss",
    "WeightedResponse",
]

_KEPT_NUMBERS = 2**28  # mean gradients of more numbers (1 GiB in fp32) are made anew by every call

Scorer = Callable[[dict[str, Any]], "torch.Tensor"]
"""Collated batch on the device -> one value per row [b, *tail], NaN where a row has none."""


@dataclass(frozen=True, kw_only=True)
class Signal:
    """Something that a model makes of each row. The fields of a subclass say how it is made.

    The runner does everything around the scorer: batches by length, ranks, eval mode, no gradients, mixed precision,
    random states, progress, the cache and the store.

    Attributes:
        name: Names it in progress lines, in the cache and in the store.
        needs: The member of ``Requires.signals`` that a method states to ask it.
        forward: Forward passes for each row.
        backward: Backward passes for each row.
        whole_parameters: Whether parameters must not be partitioned over ranks (ZeRO-3, FSDP).
        autocast: Whether the scorer runs in the Trainer's mixed precision.
        joint: Whether values of rows depend on one another: ``together`` is called instead of ``open``.
    """

    name: ClassVar[str]
    needs: ClassVar[str] = "losses"
    forward: ClassVar[float] = 1.0
    backward: ClassVar[float] = 0.0
    whole_parameters: ClassVar[bool] = False
    autocast: ClassVar[bool] = True
    joint: ClassVar[bool] = False

    @property
    def kept(self) -> Literal["step", "run", "never"]:
        """How long values are given again.

        - ``step``: within a decision, up to ``max_age_steps`` longer, and in the store.
        - ``run``: row by row for the whole run; for one number per row of a model that stays as it is.
        - ``never``: they are computed whenever they are asked for.
        """
        return "step"

    def tail(self, access: ModelAccess) -> tuple[int, ...]:
        """Return the shape of one row's value (of one segment's, where rows are cut into segments)."""
        return ()

    def key(self, access: ModelAccess) -> dict[str, Any]:
        """Return, as JSON values, what values depend on besides the model, the rows and how rows become batches."""
        return asdict(self)

    def state(self, access: ModelAccess) -> dict[str, Any]:
        """Return what else of the training they depend on, such as moments; asked with a store only (collective)."""
        return {}

    def model_identity(self, access: ModelAccess) -> str:
        """Return the identity of another model that makes the values; "" for the model under training."""
        return ""

    def for_target(self) -> Signal:
        """Return the signal as it is asked about rows of a target."""
        return self

    def sweep(self, access: ModelAccess, rows: Rows, target: str | None) -> Sweep:
        """Return how rows are fed to the scorer."""
        return access.sweep(rows, target, self.name)

    def open(self, access: ModelAccess) -> AbstractContextManager[Scorer]:
        """Give the scorer for the length of a pass (collective)."""
        raise NotImplementedError

    def together(self, access: ModelAccess, sweep: Sweep) -> NDArray[np.float32]:
        """Return the values of all rows of a ``joint`` signal [n, ...], equal on every rank (collective)."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class TokenLoss(Signal):
    """Token-mean loss of each row [n]; NaN for rows without supervised tokens.

    Attributes:
        model: Folder or hub id of another causal model; None means the model under training. A model with another
            tokenizer reads the rows' text.
        same_tokens: Refuse a model with another tokenizer, whose losses per token cannot be compared.

    Raises:
        ConfigError: ``same_tokens``, and the tokenizers differ.
    """

    name = "losses"
    model: str | None = None
    same_tokens: bool = False

    @property
    def kept(self) -> Literal["step", "run", "never"]:  # noqa: D102
        return "step" if self.model is None else "run"

    def tail(self, access: ModelAccess) -> tuple[int, ...]:  # noqa: D102
        return () if self.model is None else (2,)

    def key(self, access: ModelAccess) -> dict[str, Any]:  # noqa: D102
        return {} if self.model is None else {"cut": self._cut(access, self.model).identity}

    def model_identity(self, access: ModelAccess) -> str:  # noqa: D102
        return "" if self.model is None else access.scorer(self.model).identity

    def _cut(self, access: ModelAccess, model: str) -> Cut:
        from dataflex.signals.texts import Cut

        scorer = access.scorer(model)
        if self.same_tokens and not scorer.same_tokens:
            raise ConfigError(
                f"model {model}: its tokenizer is not that of the run, so its losses per token cannot be compared "
                "with those of the model under training; take a model of the same family"
            )
        # Rows of the same tokens are scored as they are trained on; a text begins as the model has learnt it.
        start = () if scorer.same_tokens else scorer.start
        return Cut(leave_out_first=False, start=start, limit=scorer.limit, translate=scorer.translation)

    def sweep(self, access: ModelAccess, rows: Rows, target: str | None) -> Sweep:  # noqa: D102
        if self.model is None:
            return super().sweep(access, rows, target)
        return access.segments(rows, target, self._cut(access, self.model), self.name)

    def open(self, access: ModelAccess) -> AbstractContextManager[Scorer]:  # noqa: D102
        return _token_means(access, "loss") if self.model is None else _segment_means(access, self.model)


@dataclass(frozen=True, kw_only=True)
class ResponseLoss(Signal):
    """Token-mean loss of each row's responses [n], with or without what comes before them.

    Both ways score the same tokens. Sequences begin with the token that the tokenizer puts there by itself; where
    there is none, a response's first token, which alone follows nothing, is left out both ways. NaN for rows without
    such tokens. A response is a stretch of supervised tokens; a row of several turns has several, each of which is
    alone without the others.

    Attributes:
        conditioned: Whether a response follows what comes before it in its row.
        scorer: Folder or hub id of another causal model; None means the model under training.
        prefix_tokens: Tokens directly before a response that it keeps when alone.
    """

    name = "response losses"
    conditioned: bool
    scorer: str | None = None
    prefix_tokens: int = 0

    @property
    def kept(self) -> Literal["step", "run", "never"]:  # noqa: D102
        return "step" if self.scorer is None else "run"

    def tail(self, access: ModelAccess) -> tuple[int, ...]:  # noqa: D102
        return (2,)

    def key(self, access: ModelAccess) -> dict[str, Any]:  # noqa: D102
        return {"cut": self._cut(access).identity}

    def model_identity(self, access: ModelAccess) -> str:  # noqa: D102
        return "" if self.scorer is None else access.scorer(self.scorer).identity

    def _cut(self, access: ModelAccess) -> Cut:
        from dataflex.signals.other_models import start_tokens
        from dataflex.signals.texts import Cut

        cut = Cut(alone=not self.conditioned, prefix_tokens=self.prefix_tokens)
        if self.scorer is None:
            return replace(cut, start=start_tokens(access.known_tokenizer("losses of responses")))
        scorer = access.scorer(self.scorer)
        return replace(cut, start=scorer.start, limit=scorer.limit, translate=scorer.translation)

    def sweep(self, access: ModelAccess, rows: Rows, target: str | None) -> Sweep:  # noqa: D102
        return access.segments(rows, target, self._cut(access), self.name)

    def open(self, access: ModelAccess) -> AbstractContextManager[Scorer]:  # noqa: D102
        return _segment_means(access, self.scorer)


@dataclass(frozen=True, kw_only=True)
class EL2N(Signal):
    """EL2N averaged over supervised tokens [n] (arXiv 2107.07075, per token); NaN for rows without any."""

    name = "el2n"

    def open(self, access: ModelAccess) -> AbstractContextManager[Scorer]:  # noqa: D102
        return _token_means(access, "el2n")


@dataclass(frozen=True, kw_only=True)
class AdaptedLoss(Signal):
    """Token-mean losses of training rows [n] under a low-rank probe trained on a target (TACS, arXiv 2605.09404).

    Attributes:
        towards: Name of the target.
        depth_steps: Optimizer steps of the probe, each over the whole target.
        learning_rate: Of the probe's AdamW.
        rank: Rank of the probe's matrices.
        alpha: The probe's output is multiplied by alpha / rank.
    """

    name = "adapted losses"
    whole_parameters = True
    towards: str
    depth_steps: int
    learning_rate: float
    rank: int
    alpha: float

    def key(self, access: ModelAccess) -> dict[str, Any]:  # noqa: D102
        return {**asdict(self), "towards": access.data_identity(self.towards), "seed": access.seed}

    @contextmanager
    def open(self, access: ModelAccess) -> Iterator[Scorer]:  # noqa: D102
        from dataflex.signals.moved import trained_probe

        probe = trained_probe(
            access,
            self.towards,
            steps=self.depth_steps,
            learning_rate=self.learning_rate,
            rank=self.rank,
            alpha=self.alpha,
        )
        with probe.attached(), _token_means(access, "loss") as scorer:
            yield scorer


@dataclass(frozen=True, kw_only=True)
class PerturbedLoss(Signal):
    """Token-mean losses of rows [n] with ``epsilon`` times a random direction added to the parameters.

    Runs without mixed precision, since half precision would round the step away.

    Attributes:
        seed: Seed of the directions.
        direction: Number of the direction; the same for training and target rows.
        epsilon: Step, of either sign.
        parameters: Regular expression of the names of trainable parameters that move; None: all.

    Raises:
        UnsupportedError: Parameters that move are not float32, or are partitioned over ranks.
    """

    name = "perturbed losses"
    whole_parameters = True
    autocast = False
    seed: int
    direction: int
    epsilon: float
    parameters: str | None = None

    @property
    def kept(self) -> Literal["step", "run", "never"]:  # noqa: D102
        return "never"

    @contextmanager
    def open(self, access: ModelAccess) -> Iterator[Scorer]:  # noqa: D102
        from functools import partial

        from dataflex.signals.losses import row_losses
        from dataflex.signals.moved import perturbed

        with perturbed(access, self.parameters, seed=self.seed, direction=self.direction, epsilon=self.epsilon):
            yield partial(row_losses, access.model)


@dataclass(frozen=True, kw_only=True)
class Embedding(EmbeddingSpec, Signal):
    """One vector per row [n, D]: pooled hidden states; NaN where there is nothing to pool.

    Attributes:
        encoder: Folder or hub id of another model, which reads the rows' text; None means the model under training.
    """

    name = "embeddings"
    needs = "embeddings"
    encoder: str | None = None

    @property
    def kept(self) -> Literal["step", "run", "never"]:  # noqa: D102
        return "step" if self.encoder is None else "never"

    def tail(self, access: ModelAccess) -> tuple[int, ...]:  # noqa: D102
        from dataflex.signals.embeddings import embedding_size

        return (embedding_size(access.model) if self.encoder is None else self._encoder(access).dimension,)

    def sweep(self, access: ModelAccess, rows: Rows, target: str | None) -> Sweep:  # noqa: D102
        if self.encoder is None:
            return super().sweep(access, rows, target)
        from dataflex.signals.embeddings import text_sweep

        tokenizer = access.known_tokenizer("embeddings by another model")
        return text_sweep(
            access.corpus(target), rows, tokenizer, token_budget=access.token_budget, device=access.device
        )

    @contextmanager
    def open(self, access: ModelAccess) -> Iterator[Scorer]:  # noqa: D102
        from dataflex.signals.embeddings import embed_batch

        if self.encoder is not None:
            yield self._encoder(access).score
        else:
            yield lambda batch: embed_batch(access.model, batch, self)

    def _encoder(self, access: ModelAccess) -> TextEncoder:
        """Return the encoder, loaded once."""
        from dataflex.signals.embeddings import load_encoder

        assert self.encoder is not None
        if self not in access.loaded:
            spec = EmbeddingSpec(**{name: value for name, value in vars(self).items() if name != "encoder"})
            access.loaded[self] = load_encoder(self.encoder, spec=spec, device=access.device)
        encoder: TextEncoder = access.loaded[self]
        return encoder


@dataclass(frozen=True, kw_only=True)
class GateLoads(Signal):
    """Number of tokens of each row that go to each expert [n, layers, experts], padding left out.

    Raises:
        UnsupportedError: The model is no mixture of experts, or hides its router logits.
    """

    name = "gate loads"
    needs = "gates"

    def tail(self, access: ModelAccess) -> tuple[int, ...]:  # noqa: D102
        from dataflex.signals.logits import GateReader

        return GateReader(access.model).shape

    @contextmanager
    def open(self, access: ModelAccess) -> Iterator[Scorer]:  # noqa: D102
        from dataflex.signals.logits import GateReader

        yield GateReader(access.model)


@dataclass(frozen=True, kw_only=True)
class LogitFeatures(LogitSpec, Signal):
    """What a training row's logits span, a matrix of positions x vocabulary (UDS, arXiv 2510.16882).

    The values [n, 1 + rows * columns] are the nuclear norm (sum of the singular values), and a sketch: distances of
    sketches estimate those of the logits, up to a common factor. NaN for rows without supervised tokens.
    """

    name = "logits"
    needs = "logits"

    def tail(self, access: ModelAccess) -> tuple[int, ...]:  # noqa: D102
        return (1 + self.rows * self.columns,)

    def key(self, access: ModelAccess) -> dict[str, Any]:  # noqa: D102
        return {**asdict(self), "length": access.longest}

    @contextmanager
    def open(self, access: ModelAccess) -> Iterator[Scorer]:  # noqa: D102
        from dataflex.signals.logits import LogitReader, LogitScorer

        yield LogitScorer(LogitReader(access.model), self, access.longest)


@dataclass(frozen=True, kw_only=True)
class _GradientSignal(GradientSpec, Signal):
    """What signals about rows' gradients share; rows without supervised tokens get NaN.

    Raises:
        UnsupportedError: The optimizer has no moments to precondition with, or some parameters' gradients cannot be
            told apart by row.
    """

    needs = "gradients"
    backward = 1.0
    autocast = False  # the engine enters it around the losses only

    def state(self, access: ModelAccess) -> dict[str, Any]:
        return {"moments": self._scorers(access).moments_identity()}

    @contextmanager
    def open(self, access: ModelAccess) -> Iterator[Scorer]:
        scorers = self._scorers(access)
        scorer = self._scorer(scorers, access)
        with scorers.engine.observing():
            yield scorer

    def _scorers(self, access: ModelAccess) -> GradientScorers:
        from dataflex.signals.gradients.scorers import GradientScorers

        return GradientScorers(access, self)

    def _scorer(self, scorers: GradientScorers, access: ModelAccess) -> Scorer:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class GradientScores(_GradientSignal):
    """How far a step on each training row goes along each target's mean gradient [n, len(targets)].

    Attributes:
        targets: Names of target data sets.
    """

    name = "gradient scores"
    targets: tuple[str, ...]

    def tail(self, access: ModelAccess) -> tuple[int, ...]:  # noqa: D102
        return (len(self.targets),)

    def key(self, access: ModelAccess) -> dict[str, Any]:  # noqa: D102
        return {**asdict(self), "targets": [access.data_identity(name) for name in self.targets]}

    def _scorer(self, scorers: GradientScorers, access: ModelAccess) -> Scorer:
        aims = [access.data_identity(name) for name in self.targets]
        key = repr((aims, self.parameters, self.last_blocks, self.bf16, scorers.mean_of_cosines))
        vectors = access.for_decision.get(key)
        if vectors is None:
            vectors = scorers.target_vectors([access.target_sweep(name) for name in self.targets])
            if sum(tensor.numel() for tensor in vectors.tensors.values()) <= _KEPT_NUMBERS:
                access.for_decision[key] = vectors
        return scorers.towards(vectors)


@dataclass(frozen=True, kw_only=True)
class GradientNorms(_GradientSignal):
    """Norm of each row's gradient [n] (GraNd, arXiv 2107.07075)."""

    name = "gradient norms"

    def _scorer(self, scorers: GradientScorers, access: ModelAccess) -> Scorer:
        return scorers.norms()


@dataclass(frozen=True, kw_only=True)
class GradientSketches(_GradientSignal):
    """Sparse sketches of rows' gradients, of length one [n, dim], for clustering and coverage.

    Inner products of sketches estimate cosines of the gradients, those of training rows with target rows too: the
    projection follows from the run's seed alone. ``normalize`` and ``sketch_*`` say nothing here.

    Attributes:
        dim: Numbers per row, even.

    Raises:
        ConfigError: ``dim`` is not a positive even number.
    """

    name = "gradient sketches"
    dim: int

    def for_target(self) -> Signal:  # noqa: D102
        return replace(self, precondition="none")

    def tail(self, access: ModelAccess) -> tuple[int, ...]:  # noqa: D102
        return (self.dim,)

    def key(self, access: ModelAccess) -> dict[str, Any]:  # noqa: D102
        return {**asdict(self), "seed": access.seed}

    def _scorer(self, scorers: GradientScorers, access: ModelAccess) -> Scorer:
        return scorers.sketches(dim=self.dim, seed=access.seed)


@dataclass(frozen=True, kw_only=True)
class GradientProducts(_GradientSignal):
    """Inner products of few rows' gradients with each target's mean one and with one another [n, len(targets) + n].

    For choosing within one batch (GREATS, NeurIPS 2024): gradients of all rows are held, about 1 GiB at a time. NaN in
    the rows and columns of rows without supervised tokens. ``split`` takes the two parts apart. ``normalize``,
    ``mean_of_cosines`` and ``sketch_*`` say nothing here.

    Attributes:
        targets: Names of target data sets.
        target_rows: Rows of a target, by name, that its mean is over; all of those that are not named.
    """

    name = "gradient products"
    joint = True
    targets: tuple[str, ...] = ()
    target_rows: Mapping[str, Rows] = field(default_factory=dict)

    def split(self, values: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return scores [n, len(targets)] and the Gram matrix [n, n]."""
        return values[:, : len(self.targets)], values[:, len(self.targets) :]

    def tail(self, access: ModelAccess) -> tuple[int, ...]:  # noqa: D102
        return (len(self.targets),)  # and as many as there are rows

    def key(self, access: ModelAccess) -> dict[str, Any]:  # noqa: D102
        drawn = {name: np.asarray(rows).tolist() for name, rows in self.target_rows.items()}
        own = {key: value for key, value in vars(self).items() if key != "target_rows"}
        return {**own, "targets": [access.data_identity(name) for name in self.targets], "target_rows": drawn}

    def together(self, access: ModelAccess, sweep: Sweep) -> NDArray[np.float32]:  # noqa: D102
        sweeps = [access.target_sweep(name, self.target_rows.get(name)) for name in self.targets]
        return self._scorers(access).products(sweep, sweeps)


@dataclass(frozen=True, kw_only=True)
class ResponseGradientScores(_GradientSignal):
    """How far a step on each training row goes along the gradient of weighted responses [n, len(responses)].

    ``mean_of_cosines`` is over the groups of responses.

    Attributes:
        responses: By task; the vector of a group is the sum of weight times the gradient of
            -log p(response | prompt), that of a task the mean over its groups.

    Raises:
        DataError: A task without responses, or a response without tokens.
    """

    name = "response gradient scores"
    responses: Mapping[str, Sequence[WeightedResponse]]

    def tail(self, access: ModelAccess) -> tuple[int, ...]:  # noqa: D102
        return (len(self.responses),)

    def key(self, access: ModelAccess) -> dict[str, Any]:  # noqa: D102
        from dataflex.signals.gradients.targets import responses_digest

        own = {key: value for key, value in vars(self).items() if key != "responses"}
        return {**own, "responses": {name: responses_digest(given) for name, given in self.responses.items()}}

    def _scorer(self, scorers: GradientScorers, access: ModelAccess) -> Scorer:
        return scorers.towards(scorers.response_vectors(list(self.responses.values())))


@contextmanager
def _token_means(access: ModelAccess, value: Literal["loss", "el2n"]) -> Iterator[Scorer]:
    from dataflex.signals.logits import TokenScorer

    scorer = TokenScorer(access.model, el2n=value == "el2n")
    yield lambda batch: scorer(batch).means(value)


@contextmanager
def _segment_means(access: ModelAccess, model: str | None) -> Iterator[Scorer]:
    """Give the scorer of segments' sums of losses and numbers of tokens [b, 2], by this or another model."""
    from dataflex.signals.logits import TokenScorer

    if model is None:
        scorer = TokenScorer(access.model)
        yield lambda batch: scorer(batch).sums()
    else:
        with access.scorer(model).loaded(access.device) as other:
            theirs = TokenScorer(other)
            yield lambda batch: theirs(batch).sums()
