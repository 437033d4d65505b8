"""The contracts between methods and the rest: what a selector, mixer and weighter are given and give back.

Nothing here imports torch. Arrays are numpy, except in ``BatchView``, whose tensors are torch's and
only named in type comments. Shape suffixes: ``_N`` rows of the data set, ``_K`` domains, ``_B``
sequences of this rank's micro-batch, ``_M`` sequences of the micro-batch over all ranks,
``_BT`` sequence x token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

    from dataflex.core.domains import Domains
    from dataflex.core.schedule import Interval
    from dataflex.signals.specs import EmbeddingSpec, GradientSpec

__all__ = [
    "STAGES",
    "BatchView",
    "Card",
    "Context",
    "Method",
    "Mix",
    "Mixer",
    "Needs",
    "Normaliser",
    "Params",
    "Rows",
    "Selection",
    "Selector",
    "Signals",
    "State",
    "Weighter",
]

Rows = NDArray[np.int64]
"""Positions in the training row space, 0 <= r < N."""

State = dict[str, Any]
"""JSON values and numpy arrays only; saved without pickle."""

Normaliser = Literal["token", "count", "sample"]

STAGES: tuple[str, ...] = ("pt", "sft", "rm", "dpo", "kto")


@dataclass(frozen=True, kw_only=True)
class Params:
    """Base of the frozen, keyword-only parameter dataclass nested in every method.

    Field metadata: ``help`` (one line with the unit), ``choices``, ``minimum``, ``maximum``,
    ``above`` (exclusive minimum). ``__post_init__`` may raise ``ValueError`` for rules between fields.
    """


@dataclass(frozen=True, kw_only=True)
class Card:
    """What the gallery and ``dataflex methods NAME`` say about a method.

    Attributes:
        summary: One sentence, ends with a full stop.
        paper: Title, venue and arXiv number, or "baseline".
        cost: In forward (F) and backward (B) passes over the pool, per interval or step.
    """

    summary: str
    paper: str
    cost: str
    forward_per_pool_row: float = 0.0
    backward_per_pool_row: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a method asks of its surroundings, checked before a model loads.

    Attributes:
        signals: Subset of {"losses", "embeddings", "gradients", "generate"}.
        targets: Whether ``targets: [data set, ...]`` must be given.
        domains: Least number of domains.
        stages: LLaMA-Factory stages that it works under.
        zero3: Whether it works when parameters are partitioned (DeepSpeed ZeRO-3, FSDP).
    """

    signals: frozenset[str] = frozenset()
    targets: bool = False
    domains: int = 1
    stages: tuple[str, ...] = STAGES
    zero3: bool = True


class Signals(Protocol):
    """What the model makes of the data. Every call is collective: all ranks, same arguments."""

    def losses(self, rows: Rows, *, target: str | None = None) -> NDArray[np.float32]:
        """Token-mean loss of each row [len(rows)]; NaN for rows without supervised tokens.

        Args:
            rows: Row ids of the training set, or of the named target.
            target: Name of a target data set; None means the training set.
        """
        ...

    def adapted_losses(
        self, rows: Rows, *, towards: str, depth_steps: int, learning_rate: float, rank: int, alpha: float
    ) -> NDArray[np.float32]:
        """Losses of training rows under a low-rank probe trained on the target ``towards``."""
        ...

    def el2n(self, rows: Rows, *, target: str | None = None) -> NDArray[np.float32]:
        """EL2N scores of rows, averaged over supervised tokens [len(rows)]; NaN without any."""
        ...

    def embeddings(
        self, rows: Rows, spec: EmbeddingSpec, *, target: str | None = None, encoder: str | None = None
    ) -> NDArray[np.float32]:
        """Vectors of rows [len(rows), D] from the model under training, or from the model ``encoder``."""
        ...

    def gradient_scores(self, rows: Rows, spec: GradientSpec, *, targets: Sequence[str]) -> NDArray[np.float32]:
        """Comparison of each training row's gradient with each target's mean one [len(rows), len(targets)]."""
        ...

    def gradient_norms(self, rows: Rows, spec: GradientSpec, *, target: str | None = None) -> NDArray[np.float32]:
        """Norm of each row's gradient [len(rows)]; NaN for rows without supervised tokens."""
        ...

    def num_rows(self, target: str | None = None) -> int:
        """Return the number of rows of the training set, or of the named target."""
        ...


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a method may look at while deciding. Randomness only through ``rng``."""

    interval: Interval
    seed: int
    domains: Domains
    signals: Signals
    targets: tuple[str, ...] = ()
    columns: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    total_sequences: int = 0
    """Sequences served over the whole run (total steps x global batch)."""
    unit: Literal["sequences", "tokens"] = "sequences"
    """What proportions are proportions of."""
    learning_rate: float = 0.0
    """The optimizer's learning rate at the step of the decision."""

    def rng(self, name: str) -> np.random.Generator:
        """Named, counter-based random stream of this interval; equal on every rank."""
        from dataflex.core.rng import stream

        return stream(self.seed, name, self.interval.index)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What a selector kept.

    Attributes:
        rows: Chosen row ids [n], distinct unless the method repeats on purpose, in order of preference.
        scores: Score of every pool row in pool order [len(pool)], NaN where not scored; or None.
        reason: One line for the record.
    """

    rows: Rows
    scores: NDArray[np.floating] | None = None
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Sampling proportions by domain, float64 [K], >= 0, sum 1; a zero means never."""

    proportions: NDArray[np.float64]
    reason: str = ""


class Method:
    """Common ground of selectors, mixers and weighters.

    A subclass sets ``name``, ``card``, ``needs`` and, where it has parameters, a nested frozen
    dataclass ``Params``. Its constructor takes the built Params only.
    """

    kind: ClassVar[str] = ""
    name: ClassVar[str] = ""
    card: ClassVar[Card]
    needs: ClassVar[Needs] = Needs()
    adaptive: ClassVar[bool] = False
    """True when a decision depends on the model or the step, so that ``interval_steps`` is needed."""

    Params: ClassVar[type[Params]] = Params

    def __init__(self, params: Any) -> None:
        self.params = params

    def columns(self) -> tuple[str, ...]:
        """Names of the raw data columns that must ride along with the rows."""
        return ()

    def state_dict(self) -> State:
        """Everything that a resumed run needs; empty for stateless methods."""
        return {}

    def load_state_dict(self, state: State) -> None:
        """Take back what ``state_dict`` gave."""
        if state:
            raise ValueError(f"{self.name} keeps no state, but was given {sorted(state)}")


class Selector(Method):
    """Chooses which rows are trained on during an interval."""

    kind = "selector"
    narrows: ClassVar[bool] = True
    """False for a selector that keeps the whole pool and leaves epochs as they are."""

    def select(self, pool: Rows, budget: int, ctx: Context) -> Selection:
        """Choose at most ``budget`` rows of ``pool`` (all of it when ``narrows`` is False)."""
        raise NotImplementedError


class Mixer(Method):
    """Sets the proportions in which domains are served during an interval."""

    kind = "mixer"

    def mix(self, ctx: Context) -> Mix:
        """Return proportions in the order of ``ctx.domains.names``."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class BatchView:
    """One micro-batch as a weighter sees it. Tensors are detached, fp32 or int64, on the model's device.

    Attributes:
        rows_B: Row ids of this rank's sequences (numpy).
        loss_B: Token-mean loss per sequence; 0 where ``tokens_B`` is 0.
        tokens_B: Supervised tokens per sequence.
        loss_BT: Loss per token position, 0 where ``mask_BT`` is False.
        mask_BT: Supervised positions.
        loss_M: ``loss_B`` of all ranks, in rank order.
        tokens_M: ``tokens_B`` of all ranks.
        local: Slice of this rank inside ``_M`` arrays.
        step: Optimizer step, counted from 0.
        total_steps: Optimizer steps of the whole run.
    """

    rows_B: Rows
    loss_B: torch.Tensor
    tokens_B: torch.Tensor
    loss_BT: torch.Tensor
    mask_BT: torch.Tensor
    loss_M: torch.Tensor
    tokens_M: torch.Tensor
    local: slice
    step: int
    total_steps: int


class Weighter(Method):
    """Says how much each sequence or token of a micro-batch counts.

    ``normaliser`` fixes the denominator Z of the step's loss sum(w * loss) / Z:

    - ``token``: weighted token mean. Weights known from the rows alone (``static_weights``) use
      Z = sum of w over the whole optimizer step; weights computed in the micro-batch are rescaled
      there to a token mean of one. Equal weights give the plain loss.
    - ``count``: Z = number of supervised tokens of the step; weights change the step size.
    - ``sample``: weights over the sequences of a micro-batch (all ranks) multiply the sequences'
      token-mean losses; the step's loss is the mean over its micro-batches. They sum to one unless the
      method's paper has it otherwise.
    """

    kind = "weighter"
    neutral: ClassVar[bool] = False
    """True for ``none``: the stock loss is left alone."""

    @property
    def normaliser(self) -> Normaliser:
        """Which denominator the weights are meant for."""
        return "token"

    def active(self, step: int, total_steps: int) -> bool:
        """Whether weights act at ``step``; where they do not, the plain token-mean loss is used."""
        return True

    def static_weights(self, rows: Rows, columns: Mapping[str, NDArray[Any]]) -> NDArray[np.float32] | None:
        """Weights [len(rows)] known before the forward pass, or None when they depend on the batch."""
        return None

    def weigh(self, batch: BatchView) -> torch.Tensor:
        """Return weights [B] or [B, T], fp32, detached, finite and >= 0."""
        raise NotImplementedError
