"""The contracts between methods and the rest: what a selector, mixer and weighter are given and give back.

Nothing here imports torch. Arrays are numpy, except in ``BatchView``, whose tensors are torch's and
only named in type comments. Shape suffixes: ``_N`` rows of the data set, ``_K`` domains, ``_B``
sequences of this rank's micro-batch, ``_M`` sequences of the micro-batch over all ranks,
``_BT`` sequence x token.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import CheckpointError
from dataflex.plan.domains import Domains, DomainStats, Floats, Rows
from dataflex.plan.proportions import ProportionsFile
from dataflex.plan.schedule import Interval
from dataflex.state import State, restored, saved_form

if TYPE_CHECKING:
    import torch

    from dataflex.signals.kinds import Embedding, Generation, GenerationSpec, Part, Signal

__all__ = [
    "STAGES",
    "BatchView",
    "Card",
    "Context",
    "DomainNormalizer",
    "DomainWeighter",
    "Method",
    "Mix",
    "Mixer",
    "Normalizer",
    "Params",
    "Passes",
    "Problem",
    "ProportionsFile",
    "Reference",
    "ReferenceParams",
    "Requires",
    "Rows",
    "RunFacts",
    "Selection",
    "Selector",
    "Signals",
    "State",
    "Weighter",
    "WeighterParams",
    "param",
]

T = TypeVar("T")

Normalizer = Literal["weight_sum", "num_tokens", "num_sequences"]

DomainNormalizer = Literal["weight_sum", "domain"]

STAGES: tuple[str, ...] = ("pt", "sft", "rm", "dpo", "kto")


@dataclass(frozen=True, kw_only=True)
class Params:
    """Base of the frozen, keyword-only parameter dataclass nested in every method.

    Field metadata: ``help`` (one line with the unit), ``choices``, ``minimum``, ``maximum``,
    ``above`` (exclusive minimum). ``__post_init__`` may raise ``ValueError`` for rules between fields.
    """

    def __post_init__(self) -> None:
        """Check rules between fields."""


def param(default: Any = MISSING, help: str = "", **limits: Any) -> Any:
    """Return a parameter: a dataclass field with one line of help, with the unit, and what limits its values.

    Args:
        default: Its default; left out: the parameter must be given.
        help: One line.
        limits: ``choices``, ``minimum``, ``maximum``, ``above`` (exclusive minimum), ``pattern`` (a regular
            expression), and marks such as ``model``.
    """
    return field(default=default, metadata={"help": help, **limits})


@dataclass(frozen=True, kw_only=True)
class Card:
    """What the gallery and ``dataflex methods NAME`` say about a method.

    Attributes:
        summary: One sentence, ends with a full stop.
        paper: Title, venue and arXiv number, or "baseline".
        cost: In forward (F) and backward (B) passes over the pool, per interval or step.
        note: What to know before use: where a default is not the authors', and why; where it wears out. Sentences.
    """

    summary: str
    paper: str
    cost: str
    note: str = ""


@dataclass(frozen=True)
class Reference:
    """A reference model whose token losses are needed in training.

    Attributes:
        folder: Its folder or hub id.
        cached: Whether a row is scored once and its losses are kept, instead of in every step.
    """

    folder: str
    cached: bool = True


@dataclass(frozen=True, kw_only=True)
class Passes:
    """Forward and backward passes (F, B) of one row that a method costs; ``dataflex plan`` multiplies and adds them.

    Attributes:
        pool: For each row of the pool and decision.
        pool_by_target: For each row of the pool, decision and target, beside ``pool``.
        pool_once: F of models that do not change, for each row that is ever in the pool.
        targets: For each row of the method's targets and decision; (0, 0) where they are not counted.
        served: For each row trained on, beside the training itself.
        told: ``Card.cost`` under these parameters; empty where the card's own is right.
    """

    pool: tuple[float, float] = (0.0, 0.0)
    pool_by_target: tuple[float, float] = (0.0, 0.0)
    pool_once: float = 0.0
    targets: tuple[float, float] = (0.0, 0.0)
    served: tuple[float, float] = (0.0, 0.0)
    told: str = ""

    def over_pool(self, num_targets: int) -> tuple[float, float]:
        """Return the passes for each row of the pool and decision."""
        return _times(self.pool, self.pool_by_target, num_targets)

    def __add__(self, other: Passes) -> Passes:
        """Return the passes of both."""
        both: dict[str, Any] = {
            name: _times(getattr(self, name), getattr(other, name))
            for name in ("pool", "pool_by_target", "targets", "served")
        }
        return Passes(**both, pool_once=self.pool_once + other.pool_once)


def _times(passes: tuple[float, float], more: tuple[float, float], times: int = 1) -> tuple[float, float]:
    return passes[0] + times * more[0], passes[1] + times * more[1]


@dataclass(frozen=True, kw_only=True)
class Requires:
    """What a method requires of a run under its parameters; everything is checked before a model loads.

    Attributes:
        signals: Subset of {"losses", "embeddings", "gradients", "logits", "generate", "gates", "texts"}; "texts"
            stands for tokens and texts as the rows were tokenized, which take no pass.
        targets: Whether ``targets: [data set, ...]`` must be given.
        domains: Least number of domains.
        stages: LLaMA-Factory stages that it works under.
        whole_parameters: Whether each rank must hold all parameters (no DeepSpeed ZeRO-3, no FSDP).
        needs_interval: Whether a decision depends on the model or the step, so that ``interval_steps`` must be given.
        within_batch: Whether it selects within a batch of candidates (``candidate_batches``).
        columns: Raw data columns that must ride along with the rows.
        reference: Reference model whose token losses are needed in training.
        models: Parameter -> folder or hub id of another model that signals are asked of; None for none.
        preconditions: Parameter -> what turns its gradients into directions; some want the optimizer's moments.
        by_target: Parameter -> its numbers by target, one for each; None where they are not given.
        pure_micro_batches: Whether every micro-batch must hold one domain only (for mixers).
        embedding: How sequences are embedded from the training forward, ``BatchView.embeddings_BH`` (for weighters).
        entropy: Whether ``BatchView.entropy_BT`` is needed (for weighters).
        passes: What it costs.
    """

    signals: frozenset[str] = frozenset()
    targets: bool = False
    domains: int = 1
    stages: tuple[str, ...] = STAGES
    whole_parameters: bool = False
    needs_interval: bool = False
    within_batch: bool = False
    columns: tuple[str, ...] = ()
    reference: Reference | None = None
    models: Mapping[str, str | None] = field(default_factory=dict)
    preconditions: Mapping[str, str] = field(default_factory=dict)
    by_target: Mapping[str, Mapping[str, float] | None] = field(default_factory=dict)
    pure_micro_batches: bool = False
    embedding: Embedding | None = None
    entropy: bool = False
    passes: Passes = Passes()

    @classmethod
    def merged(cls, parts: Mapping[str, Requires]) -> Requires:
        """Return what several methods require together.

        Args:
            parts: What each requires, by the parameter that names it (``of[0]``), which is put before theirs.
        """
        each = list(parts.values())
        references = [one.reference for one in each if one.reference is not None]
        merged: dict[str, Any] = {
            "signals": frozenset().union(*(one.signals for one in each)),
            "domains": max((one.domains for one in each), default=1),
            "stages": tuple(stage for stage in STAGES if all(stage in one.stages for one in each)),
            "columns": _distinct(name for one in each for name in one.columns),
            "embedding": next((one.embedding for one in each if one.embedding is not None), None),
            "passes": sum((one.passes for one in each), Passes()),
        }
        if references:
            merged["reference"] = Reference(references[0].folder, all(one.cached for one in references))
        for name in ("models", "preconditions", "by_target"):
            keyed = (
                (f"{place}.{key}", value) for place, one in parts.items() for key, value in getattr(one, name).items()
            )
            merged[name] = dict(keyed)
        for switch in (known.name for known in fields(cls) if known.default is False):
            merged[switch] = any(getattr(one, switch) for one in each)
        return cls(**merged)


def _distinct(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What is known of a run; None for what is not known yet.

    Attributes:
        stage: LLaMA-Factory's stage.
        partitioned: What partitions the parameters over ranks; empty for nothing.
        optimizer: Key and value that name an optimizer without Adam's moments; empty for one that has them.
        num_domains: Number of domains.
        num_rows: Number of training rows.
        total_steps: Number of optimizer steps of the whole run.
        packed: Whether several samples share a row.
        copied: Whether rows come from a tokenized copy, which keeps neither columns nor names of data sets.
        columns: Names of the raw columns of each data set, where they are known.
    """

    stage: str | None = None
    partitioned: str | None = None
    optimizer: str | None = None
    num_domains: int | None = None
    num_rows: int | None = None
    total_steps: int | None = None
    packed: bool | None = None
    copied: bool | None = None
    columns: Mapping[str, Collection[str]] | None = None


@dataclass(frozen=True)
class Problem:
    """What a method finds wrong with a run.

    Attributes:
        key: The parameter that is to be changed, as it is written in the method's block.
        text: What is wrong, and what to write instead.
    """

    key: str
    text: str


class Signals(Protocol):
    """What the model makes of the data. Every call is collective: all ranks, same arguments."""

    def __call__(self, signal: Signal, rows: Rows, *, target: str | None = None) -> NDArray[np.float32]:
        """Return the signal's value of each row [len(rows), ...], equal on every rank.

        Args:
            signal: What is asked, see ``signals.kinds``.
            rows: Row ids of the training set, or of the named target.
            target: Name of a target data set; None means the training set.
        """
        ...

    def tokens(self, rows: Rows, *, target: str | None = None, part: Part = "all") -> list[NDArray[np.int64]]:
        """Tokens of each row, of its prompt (no label) or of its completion (supervised); may be empty."""
        ...

    def texts(self, rows: Rows, *, target: str | None = None, part: Part = "all") -> list[str]:
        """Text of each row, of its prompt or of its completion, without special tokens; may be empty."""
        ...

    def num_rows(self, target: str | None = None) -> int:
        """Return the number of rows of the training set, or of the named target."""
        ...

    def generate(
        self, prompts: Sequence[Sequence[int]], spec: GenerationSpec, *, ids: Rows | None = None
    ) -> list[Generation]:
        """Sample responses of the model to prompts, given as token ids, prompt by prompt and sample by sample."""
        ...

    def on_one_rank(self, what: str, compute: Callable[[], T]) -> T:
        """Run ``compute`` on rank 0 alone and return its value on every rank; ``what`` names it in errors."""
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
    global_batch: int = 1
    """Sequences of one optimizer step."""
    unit: Literal["sequences", "tokens", "documents"] = "sequences"
    """What proportions are proportions of."""
    learning_rate: float = 0.0
    """The optimizer's learning rate at the step of the decision."""

    def rng(self, name: str) -> np.random.Generator:
        """Named, counter-based random stream of this interval; equal on every rank."""
        from dataflex.rng import stream

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

    A subclass sets ``name``, ``card`` and, where it has parameters, a nested frozen dataclass ``Params``. Its
    constructor takes the built Params only.
    """

    kind: ClassVar[str] = ""
    name: ClassVar[str] = ""
    card: ClassVar[Card]

    Params: ClassVar[type[Params]] = Params

    def __init__(self, params: Any) -> None:
        self.params = params

    def requires(self) -> Requires:
        """State what the method requires of a run; may look at ``self.params`` only."""
        return Requires()

    def check(self, run: RunFacts) -> Iterator[Problem]:
        """Yield what only the method knows to be wrong with a run; asked again whenever more of the run is known."""
        return iter(())

    def refused_values(self, name: str, values: NDArray[Any]) -> tuple[NDArray[np.bool_], str] | None:
        """Say which values of one of its ``columns`` it cannot use; asked once, when the data is loaded.

        Args:
            name: The column.
            values: Its values over the training rows [N]; a missing one is None.

        Returns:
            Which are refused [N], and in a few words what they must be; None where anything will do.
        """
        return None

    saved: ClassVar[tuple[str, ...]] = ()
    """Attributes that a resumed run needs: numbers, texts, tuples of texts, mappings of numbers, arrays, lists of
    arrays of one shape, or objects with ``state_dict``. Nothing is saved while the first is None, 0 or empty."""

    def state_dict(self) -> State:
        """Return the attributes that ``saved`` names."""
        first = getattr(self, self.saved[0]) if self.saved else None
        if first is None or not (len(first) if hasattr(first, "__len__") else first):
            return {}
        return {name: saved_form(getattr(self, name)) for name in self.saved}

    def load_state_dict(self, state: State) -> None:
        """Take back what ``state_dict`` gave.

        Raises:
            CheckpointError: The state is not one of this method.
        """
        if state and state.keys() != set(self.saved):
            kept = ", ".join(self.saved) or "no state"
            raise CheckpointError(f"{self.name} keeps {kept}, but was given {', '.join(sorted(state))}")
        for name, value in state.items():
            setattr(self, name, restored(value, getattr(self, name)))


class Selector(Method):
    """Chooses which rows are trained on during an interval."""

    kind = "selector"
    selects_subset: ClassVar[bool] = True
    """False for a selector that keeps the whole pool and leaves epochs as they are."""

    def select(self, pool: Rows, budget: int, ctx: Context) -> Selection:
        """Choose at most ``budget`` rows of ``pool`` (all of it when ``selects_subset`` is False)."""
        raise NotImplementedError


class Mixer(Method):
    """Sets the proportions in which domains are served during an interval.

    An online mixer sets ``observes`` and learns from ``observe``, which is called after the backward passes
    of every optimizer step, with the same numbers on every rank. It must not look at anything else.
    """

    kind = "mixer"
    observes: ClassVar[bool] = False
    """Whether ``observe`` is to be called."""

    def observe(self, stats: DomainStats) -> None:
        """Learn from one optimizer step; deterministic, on the CPU in float64."""

    def outcome(self) -> ProportionsFile | None:
        """Return the proportions that the run has found so far, or None.

        They are written to ``OUTPUT_DIR/dataflex/<name>.json`` at checkpoints and at the end, for
        ``mixer: {name: static, from: FILE}`` of another run.
        """
        return None

    def mix(self, ctx: Context) -> Mix:
        """Return proportions in the order of ``ctx.domains.names``."""
        raise NotImplementedError


class DomainWeighter(Mixer):
    """Weighs the domains in the loss and leaves the sampling as it is: ``mix`` always gives the same proportions.

    A configuration names it as its ``mixer``, since it says in which proportions domains are served, and which
    proportions its weights come to.
    """

    observes: ClassVar[bool] = True

    @property
    def loss_normalizer(self) -> DomainNormalizer:
        """What ``loss_weights`` are weights of.

        - ``weight_sum``: weighted token mean, sum_d a_d sum(loss of d) / sum_d a_d n_d over the optimizer step.
        - ``domain``: sum_d a_d (mean token loss of d in the optimizer step); an absent domain adds nothing.
        """
        return "weight_sum"

    def loss_weights(self) -> Floats:
        """Return the weights of the domains in the loss of the next optimizer step [K]; asked after its ``mix``."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class BatchView:
    """One micro-batch as a weighter sees it. Tensors are detached, fp32 or int64, on the model's device.

    A sequence is a row, or, where rows are packed, a document of a row; ``_B`` counts this rank's
    sequences, ``R`` its rows (R = B without packing).

    Attributes:
        rows_B: Row id of each sequence (numpy).
        domains_B: Domain index of each sequence (numpy).
        loss_B: Token-mean loss per sequence; 0 where ``tokens_B`` is 0.
        tokens_B: Supervised tokens per sequence.
        loss_BT: Loss per token position [R, T], 0 where ``mask_BT`` is False.
        mask_BT: Supervised positions [R, T].
        loss_M: ``loss_B`` of all ranks, in rank order.
        tokens_M: ``tokens_B`` of all ranks.
        local: Slice of this rank inside ``_M`` arrays.
        step: Optimizer step, counted from 0.
        total_steps: Optimizer steps of the whole run.
        num_micro_batches: Micro-batches of this optimizer step.
        sequence_BT: Index into ``_B`` of the sequence of each position [R, T]; None without packing.
        reference_BT: Token losses of the reference model [R, T], 0 where ``mask_BT`` is False; None unless
            ``Requires.reference`` names one.
        entropy_BT: Entropy of each prediction, nats [R, T], 0 where ``mask_BT`` is False; None unless
            ``Requires.entropy``.
        embeddings_BH: Embedding of each sequence from the training forward [B, H], fp32; None unless
            ``Requires.embedding``.
        columns: Raw columns that ride along with the rows, by name, each [N] (numpy).
    """

    rows_B: Rows
    domains_B: NDArray[np.int64]
    loss_B: torch.Tensor
    tokens_B: torch.Tensor
    loss_BT: torch.Tensor
    mask_BT: torch.Tensor
    loss_M: torch.Tensor
    tokens_M: torch.Tensor
    local: slice
    step: int
    total_steps: int
    num_micro_batches: int = 1
    sequence_BT: torch.Tensor | None = None
    reference_BT: torch.Tensor | None = None
    entropy_BT: torch.Tensor | None = None
    embeddings_BH: torch.Tensor | None = None
    columns: Mapping[str, NDArray[Any]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class WeighterParams(Params):
    """Base of the parameters of weighters."""

    burn_in_steps: int = field(
        default=0, metadata={"help": "optimizer steps with the plain loss at first", "minimum": 0}
    )


class Weighter(Method):
    """Says how much each sequence or token of a micro-batch counts.

    ``normalizer`` fixes the denominator Z of the step's loss sum(w * loss) / Z:

    - ``weight_sum``: weighted token mean. Weights known from the rows alone (``static_weights``) use
      Z = sum of w over the whole optimizer step; weights computed in the micro-batch are rescaled
      there to a token mean of one. Equal weights give the plain loss.
    - ``num_tokens``: Z = number of supervised tokens of the step; weights change the step size.
    - ``num_sequences``: weights over the sequences of a micro-batch (all ranks) multiply the sequences'
      token-mean losses; the step's loss is the mean over its micro-batches. They sum to one unless the
      method's paper has it otherwise.
    """

    kind = "weighter"
    neutral: ClassVar[bool] = False
    """True for ``none``: the stock loss is left alone."""
    by_token: ClassVar[bool] = False
    """True where ``weigh`` gives weights of tokens [R, T]."""

    Params: ClassVar[type[Params]] = WeighterParams

    normalizer: Normalizer = "weight_sum"
    """Which denominator the weights are meant for."""

    def default_burn_in(self, total_steps: int) -> int:
        """Return the steps of plain loss where ``burn_in_steps`` is null or no parameter of the weighter."""
        return 0

    def burn_in(self, total_steps: int) -> int:
        """Return how many optimizer steps use the plain loss at first."""
        given: int | None = getattr(self.params, "burn_in_steps", None)
        return self.default_burn_in(total_steps) if given is None else given

    def requires(self) -> Requires:
        """State nothing but the stages that train on the losses of tokens."""
        return Requires() if self.neutral else Requires(stages=("pt", "sft"))

    def check(self, run: RunFacts) -> Iterator[Problem]:
        """Yield a burn-in that takes up the whole run, in which the weights would never act."""
        steps, total = 0 if run.total_steps is None else self.burn_in(run.total_steps), run.total_steps or 0
        if 0 < steps >= total:
            told = " (its default)" if getattr(self.params, "burn_in_steps", None) is None else ""
            yield Problem(
                "burn_in_steps",
                f"{steps} steps of plain loss{told} take up the whole run of {total} steps, so the weights would never "
                f"act; write burn_in_steps: {total // 20}",
            )

    def active(self, step: int, total_steps: int) -> bool:
        """Whether weights act at ``step``; where they do not, the plain token-mean loss is used."""
        return step >= self.burn_in(total_steps)

    def due(self, step: int) -> bool:
        """Whether ``prepare`` is to be called before optimizer step ``step`` (counted from 0)."""
        return False

    def prepare(self, ctx: Context, rows: Rows) -> None:
        """Ask the signals what is needed for the coming step (collective; ``due`` says when).

        Args:
            ctx: As for a decision; ``ctx.interval`` is the one step, ``ctx.targets`` the weighter's targets.
            rows: Row ids of the whole optimizer step, over all ranks and micro-batches, in the plan's order.
        """

    def static_weights(self, rows: Rows, columns: Mapping[str, NDArray[Any]]) -> NDArray[np.float32] | None:
        """Weights [len(rows)] known before the forward pass, or None when they depend on the batch."""
        return None

    def weigh(self, batch: BatchView) -> torch.Tensor:
        """Return weights [B] (by sequence) or [R, T] (by position), fp32, detached, finite and >= 0."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class ReferenceParams(Params):
    """Base of the parameters of a method that does not work without a reference model."""

    reference: str = field(metadata={"help": "folder of the reference model, with the tokenizer of the run"})
    reference_cache: bool = field(
        default=True,
        metadata={"help": "score a row with the reference once, when first served, and keep that; else in every step"},
    )

    def __post_init__(self) -> None:
        if not self.reference.strip():
            raise ValueError("reference: is empty; without a reference model there is no excess loss")

    def stated(self) -> Reference:
        """Return the reference model as ``Requires.reference``."""
        return Reference(self.reference, self.reference_cache)
