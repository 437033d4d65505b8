"""What can be asked about rows: small frozen objects, each of which opens a scorer for the model at hand.

``ctx.signals(TokenLoss(), rows)`` asks; ``signals.runner`` answers. Nothing here imports torch before a scorer is
opened, so methods may import these names freely. A plugin adds a signal by a subclass of ``Signal`` of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import ConfigError, UnsupportedError
from dataflex.signals.specs import EmbeddingSpec, GradientSpec, LogitSpec, Perturbation, Probe, WeightedResponse
from dataflex.state import blake2b

if TYPE_CHECKING:
    import torch

    from dataflex.plan.domains import Rows
    from dataflex.signals.embeddings import TextEncoder
    from dataflex.signals.gradients.consumers import TargetVectors
    from dataflex.signals.gradients.scorers import GradientScorers
    from dataflex.signals.logits import GateReader
    from dataflex.signals.model_access import ModelAccess
    from dataflex.signals.sweep import Sweep
    from dataflex.signals.texts import Cut

_KEPT_NUMBERS = 2**28  # mean gradients of more numbers (1 GiB in fp32) are made anew by every call

Kept = Literal["step", "run", "never"]
Scorer = Callable[[dict[str, Any]], "torch.Tensor"]
"""Collated batch on the device -> one value per row [b, *tail], NaN where a row has none."""


@dataclass(frozen=True, kw_only=True)
class Signal:
    """A value that a model gives each row. The fields of a subclass say how it is computed.

    The runner does everything around the scorer: batches by length, ranks, eval mode, no gradients, mixed precision,
    random states, progress, the cache and the store.
    """

    name: ClassVar[str]  # in progress lines, in the cache and in the store
    needs: ClassVar[str] = "losses"  # the member of ``Requires.signals`` that a method states to ask it
    forward: ClassVar[float] = 1.0  # number of forward passes for each row
    backward: ClassVar[float] = 0.0  # number of backward passes for each row
    whole_parameters: ClassVar[bool] = False  # parameters must not be partitioned over ranks (ZeRO-3, FSDP)
    autocast: ClassVar[bool] = True  # the scorer runs in the Trainer's mixed precision
    joint: ClassVar[bool] = False  # values of rows depend on one another: ``together`` is called instead of ``open``
    run_shape: ClassVar[tuple[int, ...]] = ()  # shape of a row's value where it is kept for the run
    code: ClassVar[str] = ""  # names the code of a signal from outside this package: part of its key

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.__module__.partition(".")[0] != "dataflex":
            # Read as the class is made, so that it is the text that runs.
            file = getattr(sys.modules.get(cls.__module__), "__file__", None)
            text = Path(file).read_bytes() if file else cls.__module__.encode()
            cls.code = blake2b(f"{cls.code} {cls.__qualname__} ".encode(), text).hex()

    @property
    def kept(self) -> Kept:
        """How long values are given again.

        ``step``: in this decision, up to ``max_age_steps`` longer, and from the store; ``run``: row by row for the
        whole run, for few numbers per row of a model that does not change; ``never``.
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

    @contextmanager
    def open(self, access: ModelAccess) -> Iterator[Scorer]:
        """Give the scorer for the length of a pass (collective)."""
        yield self.scorer(access)

    def scorer(self, access: ModelAccess) -> Scorer:
        """Return the scorer, where nothing has to be undone after the pass (collective)."""
        raise NotImplementedError

    def together(self, access: ModelAccess, sweep: Sweep) -> NDArray[np.float32]:
        """Return the values of all rows of a ``joint`` signal [n, ...], equal on every rank (collective)."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class _SegmentLoss(Signal):
    """What mean losses of segments share: sums of losses and numbers of tokens [P, 2] become the rows' means [n]."""

    model: str | None = None

    @property
    def kept(self) -> Kept:
        return "step" if self.model is None else "run"

    def tail(self, access: ModelAccess) -> tuple[int, ...]:
        return (2,)

    def key(self, access: ModelAccess) -> dict[str, Any]:
        return {"cut": self._cut(access).identity}

    def model_identity(self, access: ModelAccess) -> str:
        return "" if self.model is None else access.scorer(self.model).identity

    def _cut(self, access: ModelAccess) -> Cut:
        raise NotImplementedError

    def sweep(self, access: ModelAccess, rows: Rows, target: str | None) -> Sweep:
        from dataflex.signals.texts import segment_sweep

        return segment_sweep(super().sweep(access, rows, target), self._cut(access))

    @contextmanager
    def open(self, access: ModelAccess) -> Iterator[Scorer]:
        from dataflex.signals.logits import TokenScorer

        model = nullcontext(access.model) if self.model is None else access.scorer(self.model).loaded(access.device)
        with model as module:
            scorer = TokenScorer(module)
            yield lambda batch: scorer(batch).sums()


@dataclass(frozen=True, kw_only=True)
class TokenLoss(_SegmentLoss):
    """Token-mean loss of each row [n]; NaN for rows without supervised tokens.

    ``model`` is the folder or hub id of another causal model, or None for the model under training. A model with
    another tokenizer reads the rows' text.

    Raises:
        ConfigError: ``same_tokens``, and the tokenizers differ.
    """

    name = "losses"
    same_tokens: bool = False  # refuse a model with another tokenizer, whose losses per token cannot be compared

    def tail(self, access: ModelAccess) -> tuple[int, ...]:
        return () if self.model is None else super().tail(access)

    def key(self, access: ModelAccess) -> dict[str, Any]:
        return {} if self.model is None else super().key(access)

    def _cut(self, access: ModelAccess) -> Cut:
        from dataflex.signals.texts import Cut

        assert self.model is not None
        scorer = access.scorer(self.model)
        if self.same_tokens and not scorer.same_tokens:
            raise ConfigError(
                f"model {self.model}: its tokenizer is not that of the run, so its losses per token cannot be compared "
                "with those of the model under training; take a model of the same family"
            )
        # Rows of the same tokens are scored as they are trained on; a text begins as the model has learnt it.
        start = () if scorer.same_tokens else scorer.start
        return Cut(leave_out_first=False, start=start, limit=scorer.limit, translate=scorer.translation)

    def sweep(self, access: ModelAccess, rows: Rows, target: str | None) -> Sweep:
        return Signal.sweep(self, access, rows, target) if self.model is None else super().sweep(access, rows, target)

    @contextmanager
    def open(self, access: ModelAccess) -> Iterator[Scorer]:
        with super().open(access) if self.model is not None else nullcontext(_token_means(access)) as scorer:
            yield scorer


@dataclass(frozen=True, kw_only=True)
class ResponseLoss(_SegmentLoss):
    """Token-mean loss of each row's responses [n], with or without what comes before them; ``model`` as in TokenLoss.

    Both ways score the same tokens. Sequences begin with the token that the tokenizer puts there by itself; where
    there is none, a response's first token, which alone follows nothing, is left out both ways. NaN for rows without
    such tokens. A response is a stretch of supervised tokens; a row of several turns has several, each of which is
    alone without the others.
    """

    name = "response losses"
    conditioned: bool  # whether a response follows what comes before it in its row
    prefix_tokens: int = 0  # number of tokens directly before a response that it keeps when alone

    def _cut(self, access: ModelAccess) -> Cut:
        from dataflex.signals.other_models import start_tokens
        from dataflex.signals.texts import Cut

        cut = Cut(alone=not self.conditioned, prefix_tokens=self.prefix_tokens)
        if self.model is None:
            return replace(cut, start=start_tokens(access.known_tokenizer("losses of responses")))
        scorer = access.scorer(self.model)
        return replace(cut, start=scorer.start, limit=scorer.limit, translate=scorer.translation)


@dataclass(frozen=True, kw_only=True)
class PreferenceLogps(Signal):
    """Log-probabilities of both answers of each pair [n, 2, 2]: of (chosen, rejected), (sum over tokens, tokens).

    ``of`` is the policy (the model under training), its reference (LoRA: adapters off; else the reference model of the
    run), or by folder or hub id another causal model of the same tokenizer. NaN where an answer has no supervised
    token. Both answers are scored in one batch, in eval mode. Rows must be those of stage dpo.

    Raises:
        ConfigError: The other model has another tokenizer, or too short a context.
    """

    name = "log-probabilities of pairs"
    needs = "preference_logps"
    forward = 2.0
    run_shape = (2, 2)
    of: Literal["policy", "reference"] | str = "policy"

    @property
    def kept(self) -> Kept:
        return "step" if self.of == "policy" else "run"

    def tail(self, access: ModelAccess) -> tuple[int, ...]:
        return (2, 2)

    def model_identity(self, access: ModelAccess) -> str:
        if self.of == "policy":
            return ""
        if self.of == "reference":
            assert access.preferences is not None
            return access.once("identity of the reference", access.preferences.identity)
        return access.scorer(self.of).identity

    def sweep(self, access: ModelAccess, rows: Rows, target: str | None) -> Sweep:
        return access.pairs(rows, target, self.name)

    @contextmanager
    def open(self, access: ModelAccess) -> Iterator[Scorer]:
        import torch

        from dataflex.signals.logits import TokenScorer

        with self._model(access) as model:
            scorer = TokenScorer(model)

            def score(batch: dict[str, Any]) -> torch.Tensor:
                losses, tokens = scorer(batch).sums().view(-1, 2, 2).unbind(dim=2)
                known = tokens.gt(0).all(dim=1, keepdim=True)
                return torch.stack([torch.where(known, -losses, torch.nan), tokens], dim=2)

            yield score

    def _model(self, access: ModelAccess) -> AbstractContextManager[torch.nn.Module]:
        if self.of == "policy":
            return nullcontext(access.model)
        if self.of == "reference":
            assert access.preferences is not None
            return access.preferences.reference()
        other, longest = access.scorer(self.of), access.longest_pair
        if not other.same_tokens:
            raise ConfigError(
                f"model {self.of}: its tokenizer is not that of the run, so it cannot score the same pairs; take a "
                "model of the same family"
            )
        if other.limit is not None and other.limit < longest:
            raise ConfigError(f"model {self.of}: pairs have up to {longest:,} tokens, and its context {other.limit:,}")
        return other.loaded(access.device)


@dataclass(frozen=True, kw_only=True)
class EL2N(Signal):
    """EL2N averaged over supervised tokens [n] (arXiv 2107.07075, per token); NaN for rows without any."""

    name = "el2n"

    def scorer(self, access: ModelAccess) -> Scorer:
        return _token_means(access, "el2n")


@dataclass(frozen=True, kw_only=True)
class AdaptedLoss(Probe, Signal):
    """Token-mean losses of training rows [n] under a low-rank probe trained on a target (TACS, arXiv 2605.09404)."""

    name = "adapted losses"
    whole_parameters = True

    def key(self, access: ModelAccess) -> dict[str, Any]:
        return {**asdict(self), "towards": access.data_identity(self.towards), "seed": access.seed}

    @contextmanager
    def open(self, access: ModelAccess) -> Iterator[Scorer]:
        from dataflex.signals.moved import probed

        with probed(access, self):
            yield _token_means(access)


@dataclass(frozen=True, kw_only=True)
class PerturbedLoss(Perturbation, Signal):
    """Token-mean losses of rows [n] with ``epsilon`` times a random direction added to the parameters.

    Runs without mixed precision, since half precision would round the step away.

    Raises:
        UnsupportedError: Parameters that move are not float32, or are partitioned over ranks.
    """

    name = "perturbed losses"
    whole_parameters = True
    autocast = False

    @property
    def kept(self) -> Kept:
        return "never"

    @contextmanager
    def open(self, access: ModelAccess) -> Iterator[Scorer]:
        from functools import partial

        from dataflex.signals.losses import row_losses
        from dataflex.signals.moved import perturbed

        with perturbed(access, self):
            yield partial(row_losses, access.model)


@dataclass(frozen=True, kw_only=True)
class Embedding(EmbeddingSpec, Signal):
    """One vector per row [n, D]: pooled hidden states; NaN where there is nothing to pool."""

    name = "embeddings"
    needs = "embeddings"

    @property
    def kept(self) -> Kept:
        return "step" if self.encoder is None else "never"

    def tail(self, access: ModelAccess) -> tuple[int, ...]:
        from dataflex.signals.model_parts import model_parts

        own = self.encoder is None
        return (model_parts(access.model).text_config.hidden_size if own else self._encoder(access).dimension,)

    def sweep(self, access: ModelAccess, rows: Rows, target: str | None) -> Sweep:
        if self.encoder is None:
            return super().sweep(access, rows, target)
        from dataflex.signals.embeddings import text_sweep

        tokenizer, corpus = access.known_tokenizer("embeddings by another model"), access.corpus(target)
        return text_sweep(corpus, rows, tokenizer, token_budget=access.token_budget, device=access.device)

    def scorer(self, access: ModelAccess) -> Scorer:
        from dataflex.signals.embeddings import embed_batch

        if self.encoder is not None:
            return self._encoder(access).score
        return lambda batch: embed_batch(access.model, batch, self)

    def _encoder(self, access: ModelAccess) -> TextEncoder:
        from dataflex.signals.embeddings import load_encoder

        return access.once(self, lambda: load_encoder(str(self.encoder), spec=self, device=access.device))


@dataclass(frozen=True, kw_only=True)
class GateLoads(Signal):
    """Number of tokens of each row that go to each expert [n, layers, experts], padding left out.

    Raises:
        UnsupportedError: The model is no mixture of experts, or hides its router logits.
    """

    name = "gate loads"
    needs = "gates"

    def tail(self, access: ModelAccess) -> tuple[int, ...]:
        return self.scorer(access).shape

    def scorer(self, access: ModelAccess) -> GateReader:
        from dataflex.signals.logits import GateReader

        return GateReader(access.model)


@dataclass(frozen=True, kw_only=True)
class LogitFeatures(LogitSpec, Signal):
    """What a training row's logits span, a matrix of positions x vocabulary (UDS, arXiv 2510.16882).

    The values [n, 1 + rows * columns] are the nuclear norm (sum of the singular values), and a sketch: distances of
    sketches estimate those of the logits, up to a common factor. NaN for rows without supervised tokens.
    """

    name = "logits"
    needs = "logits"

    def tail(self, access: ModelAccess) -> tuple[int, ...]:
        return (1 + self.rows * self.columns,)

    def key(self, access: ModelAccess) -> dict[str, Any]:
        return {**asdict(self), "length": access.longest}

    def scorer(self, access: ModelAccess) -> Scorer:
        from dataflex.signals.logits import LogitScorer

        return LogitScorer(access.model, self, access.longest)


@dataclass(frozen=True, kw_only=True)
class InRun(Signal):
    """What training steps showed of the rows that they served: values and the step [n, K + 1], without a pass.

    They are those of the model in that step, its dropout included. NaN where a row was not served, or so long ago that
    it was forgotten. K is 1, or the number of targets, or the size of an embedding. A packed row counts as a whole.

    Attributes:
        what: ``losses``: a row's mean loss; ``norms``: the norm of its gradient, estimated from a sketch; ``scores``:
            the product of its gradient with a direction of length 1 for each target, which is the target's gradient at
            the last decision before that step, in Adam's scale; ``embeddings``: pooled hidden states.
        targets: Names of target data sets, for ``scores``: some of the method's own.
        normalize: Whether ``scores`` are divided by ``norms``, which the method states that it asks as well.
        embedding: How hidden states are pooled; None: as ``EmbeddingSpec()`` says.
    """

    name = "values of training steps"
    forward = 0.0
    what: Literal["losses", "norms", "scores", "embeddings"] = "losses"
    targets: tuple[str, ...] = ()
    normalize: bool = False
    embedding: EmbeddingSpec | None = None

    @property
    def needs(self) -> str:  # type: ignore[override]
        """The member of ``Requires.signals``: ``in_run_`` and ``what``."""
        return f"in_run_{self.what}"

    @property
    def kept(self) -> Kept:
        return "never"

    def tail(self, access: ModelAccess) -> tuple[int, ...]:
        from dataflex.signals.model_parts import model_parts

        own = model_parts(access.model).text_config.hidden_size if self.what == "embeddings" else 1
        return (max(len(self.targets), own) + 1,)

    def scorer(self, access: ModelAccess) -> Scorer:
        raise UnsupportedError(
            f"{self.needs}: only training steps show them; state it in the method's Requires(signals=...)"
        )


@dataclass(frozen=True, kw_only=True)
class _GradientSignal(GradientSpec, Signal):
    """What signals about rows' gradients share; rows without supervised tokens get NaN.

    They are gradients of the token-mean loss, under stage dpo of the loss that the run trains on, pair by pair.

    Raises:
        UnsupportedError: The optimizer has no moments to precondition with, or some parameters' gradients cannot be
            told apart by row.
    """

    needs = "gradients"
    backward = 1.0
    autocast = False  # the engine enters it around the losses only

    def state(self, access: ModelAccess) -> dict[str, Any]:
        found: dict[str, Any] = {"moments": self._scorers(access).moments_identity()}
        if (pairs := access.preferences) is not None:
            compared = access.once("identity of the reference", pairs.identity) if pairs.loss.compares else ""
            found |= {"loss": asdict(pairs.loss), "reference": compared}
        return found

    def sweep(self, access: ModelAccess, rows: Rows, target: str | None) -> Sweep:
        return access.trained(rows, target, self.name)

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
    """How far a step on each training row goes along each target's mean gradient [n, len(targets)]."""

    name = "gradient scores"
    targets: tuple[str, ...]  # names of target data sets

    def tail(self, access: ModelAccess) -> tuple[int, ...]:
        return (len(self.targets),)

    def key(self, access: ModelAccess) -> dict[str, Any]:
        return {**asdict(self), "targets": [access.data_identity(name) for name in self.targets]}

    def vectors(self, scorers: GradientScorers, access: ModelAccess) -> TargetVectors:
        """Return the targets' mean gradients, made once in a decision (collective)."""
        from dataflex.signals.gradients.scorers import target_vectors

        aims = [access.data_identity(name) for name in self.targets]
        key = repr((aims, self.parameters, self.last_blocks, self.bf16, scorers.mean_of_cosines))
        vectors: TargetVectors | None = access.for_decision.get(key)
        if vectors is None:
            sweeps = {name: access.target_sweep(name) for name in self.targets}
            vectors = target_vectors(scorers.engine, sweeps, normalize_rows=scorers.mean_of_cosines)
            if sum(tensor.numel() for tensor in vectors.tensors.values()) <= _KEPT_NUMBERS:
                access.for_decision[key] = vectors
        return vectors

    def _scorer(self, scorers: GradientScorers, access: ModelAccess) -> Scorer:
        return scorers.towards(self.vectors(scorers, access))


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
    projection follows from the run's seed alone. ``normalize`` and ``sketch_*`` have no effect here.

    Raises:
        ConfigError: ``dim`` is not a positive even number.
    """

    name = "gradient sketches"
    dim: int

    def for_target(self) -> Signal:
        return replace(self, precondition="none")

    def tail(self, access: ModelAccess) -> tuple[int, ...]:
        return (self.dim,)

    def key(self, access: ModelAccess) -> dict[str, Any]:
        return {**asdict(self), "seed": access.seed}

    def _scorer(self, scorers: GradientScorers, access: ModelAccess) -> Scorer:
        return scorers.sketches(dim=self.dim, seed=access.seed)


@dataclass(frozen=True, kw_only=True)
class GradientProducts(_GradientSignal):
    """Inner products of few rows' gradients with each target's mean one and with one another [n, len(targets) + n].

    For choosing within one batch (GREATS, NeurIPS 2024): gradients of all rows are held, about 1 GiB at a time. NaN in
    the rows and columns of rows without supervised tokens. ``split`` takes the two parts apart. ``normalize``,
    ``mean_of_cosines`` and ``sketch_*`` have no effect here.
    """

    name = "gradient products"
    joint = True
    targets: tuple[str, ...] = ()  # names of target data sets
    target_rows: Mapping[str, Rows] = field(default_factory=dict)  # rows that a target's mean is over, if not over all

    def split(self, values: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return scores [n, len(targets)] and the Gram matrix [n, n]."""
        return values[:, : len(self.targets)], values[:, len(self.targets) :]

    def tail(self, access: ModelAccess) -> tuple[int, ...]:
        return (len(self.targets),)  # and one for each row

    def key(self, access: ModelAccess) -> dict[str, Any]:
        drawn = {name: np.asarray(rows).tolist() for name, rows in self.target_rows.items()}
        return {**vars(self), "targets": [access.data_identity(name) for name in self.targets], "target_rows": drawn}

    def together(self, access: ModelAccess, sweep: Sweep) -> NDArray[np.float32]:
        from dataflex.signals.gradients.scorers import row_products, target_vectors

        scorers = self._scorers(access)
        sweeps = {name: access.target_sweep(name, self.target_rows.get(name)) for name in self.targets}
        aims = target_vectors(scorers.engine, sweeps, normalize_rows=False) if sweeps else None
        return row_products(scorers.engine, sweep, aims, scorers.precondition())


@dataclass(frozen=True, kw_only=True)
class ResponseGradientScores(_GradientSignal):
    """How far a step on each training row goes along the gradient of weighted responses [n, len(responses)].

    The vector of a group is the sum of weight times the gradient of -log p(response | prompt), that of a task the mean
    over its groups. ``mean_of_cosines`` is over the groups.

    Raises:
        DataError: A task without responses, or a response without tokens.
    """

    name = "response gradient scores"
    responses: Mapping[str, Sequence[WeightedResponse]]  # by task

    def tail(self, access: ModelAccess) -> tuple[int, ...]:
        return (len(self.responses),)

    def key(self, access: ModelAccess) -> dict[str, Any]:
        from dataflex.signals.gradients.scorers import responses_digest

        return {**vars(self), "responses": {name: responses_digest(given) for name, given in self.responses.items()}}

    def _scorer(self, scorers: GradientScorers, access: ModelAccess) -> Scorer:
        from dataflex.signals.gradients.scorers import policy_vectors

        tasks = list(self.responses.values())
        return scorers.towards(policy_vectors(scorers.engine, access, tasks, normalize_groups=scorers.mean_of_cosines))


def _token_means(access: ModelAccess, value: Literal["loss", "el2n"] = "loss") -> Scorer:
    from dataflex.signals.logits import TokenScorer

    scorer = TokenScorer(access.model, el2n=value == "el2n")
    return lambda batch: scorer(batch).means(value)
