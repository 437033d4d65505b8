"""The contract between methods and the rest: what a selector, mixer, orderer or weighter is given, and returns.

Nothing here imports torch. Arrays are numpy, except in ``BatchView``. Shape suffixes: ``_N`` rows of the data set,
``_K`` domains, ``_B`` sequences of this rank's micro-batch, ``_M`` sequences of the micro-batch over all ranks,
``_BT`` sequence x token.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from dataflex.errors import CheckpointError
from dataflex.parts import Params, param
from dataflex.plan.domains import Domains, DomainStats, Floats, Rows
from dataflex.plan.proportions import ProportionsFile
from dataflex.plan.rollouts import RolloutStats
from dataflex.plan.schedule import Interval
from dataflex.rng import stream
from dataflex.state import State, is_absent, restored, saved_form

if TYPE_CHECKING:
    import torch

    from dataflex.signals.kinds import Embedding, Signal
    from dataflex.signals.specs import Generation, GenerationSpec, Part

T = TypeVar("T")

Normalizer = Literal["weight_sum", "num_tokens", "num_sequences"]

DomainNormalizer = Literal["weight_sum", "domain"]

STAGES = ("pt", "sft", "rm", "dpo", "kto", "rl")
"""LLaMA-Factory's stages, and ``rl``: TRL's trainers whose rows are prompts, and which generate the answers."""

IN_RUN = ("in_run_losses", "in_run_norms", "in_run_scores", "in_run_embeddings")
"""What training steps show of the rows that they serve; see ``signals.kinds.InRun``."""
SIGNALS = (
    *("losses", "embeddings", "gradients", "logits", "generate", "gates", "preference_logps", "texts", "rollouts"),
    *IN_RUN,
)
"""What a method may ask the model or the rows for; "texts" are tokens and texts, which take no pass, and "rollouts"
the rewards of answers, which ``observe_rollouts`` is given."""


# ---- what a method states about itself


@dataclass(frozen=True, kw_only=True)
class Card:
    """What ``docs/methods.md`` and ``dataflex methods NAME`` say about a method."""

    summary: str  # one sentence that ends with a full stop
    paper: str  # title, venue and arXiv number, or "baseline"
    cost: str  # forward (F) and backward (B) passes over the pool, per interval or step
    note: str = ""  # what to know before use: limits, and where and why a default is not the authors'


@dataclass(frozen=True)
class Reference:
    """A reference model whose token losses are needed in training."""

    folder: str  # folder or hub id
    cached: bool = True  # whether a row is scored once and its losses are kept, instead of in every step


@dataclass(frozen=True)
class ScoreFile:
    """A column of a file that ``dataflex score`` wrote, whose rows must be the training rows."""

    file: str
    column: str

    @property
    def name(self) -> str:
        """Its name in ``Context.columns``."""
        return f"{self.file}: {self.column}"


@dataclass(frozen=True, kw_only=True)
class Passes:
    """Forward and backward passes (F, B) of one row that a method costs; ``dataflex plan`` adds them up."""

    pool: tuple[float, float] = (0.0, 0.0)  # per decision, for each row of the pool
    pool_by_target: tuple[float, float] = (0.0, 0.0)  # per decision, for each row of the pool and target, beside pool
    pool_once: float = 0.0  # F of models that do not change, for each row that is ever in the pool
    targets: tuple[float, float] = (0.0, 0.0)  # per decision, for each row of the targets
    served: tuple[float, float] = (0.0, 0.0)  # for each row trained on, beside the training itself
    told: str = ""  # Card.cost under these parameters; empty where the card's own is right

    def over_pool(self, num_targets: int) -> tuple[float, float]:
        """Return the passes for each row of the pool and decision."""
        return _added(self.pool, self.pool_by_target, num_targets)

    def __add__(self, other: Passes) -> Passes:
        return Passes(
            pool=_added(self.pool, other.pool),
            pool_by_target=_added(self.pool_by_target, other.pool_by_target),
            pool_once=self.pool_once + other.pool_once,
            targets=_added(self.targets, other.targets),
            served=_added(self.served, other.served),
        )


def _added(passes: tuple[float, float], more: tuple[float, float], times: int = 1) -> tuple[float, float]:
    return passes[0] + times * more[0], passes[1] + times * more[1]


@dataclass(frozen=True, kw_only=True)
class Requires:
    """What a method requires of a run, given its parameters; checked before a model loads."""

    signals: frozenset[str] = frozenset()  # some of SIGNALS
    targets: bool = False  # targets: [data set, ...] must be given
    domains: int = 1  # least number of domains
    stages: tuple[str, ...] = STAGES  # stages in which it works
    whole_parameters: bool = False  # each rank must hold all parameters (no DeepSpeed ZeRO-3, no FSDP)
    needs_interval: bool = False  # a decision depends on the model or the step: interval_steps must be given
    within_batch: bool = False  # it selects within a batch of candidates: candidate_batches must be given
    columns: tuple[str, ...] = ()  # columns of the data that are loaded with the rows
    reference: Reference | None = None  # reference model whose token losses are needed in training
    models: Mapping[str, str | None] = field(default_factory=dict)  # parameter -> other model that signals are asked of
    preconditions: Mapping[str, str] = field(default_factory=dict)  # parameter -> use of the optimizer's moments
    by_target: Mapping[str, Mapping[str, float] | None] = field(default_factory=dict)  # parameter -> number per target
    pure_micro_batches: bool = False  # mixers: every micro-batch must hold one domain only
    embedding: Embedding | None = None  # how in_run_embeddings are made, or a weighter's BatchView.embeddings_BH
    entropy: bool = False  # weighters: BatchView.entropy_BT is needed
    token_weights: tuple[Literal["turn", "token"], str] | None = None  # weighters: whose weights, and their name
    row_weights: Literal["num_tokens", "weight_sum"] | None = None  # selectors: denominator of Selection.weights
    ledger: bool = False  # mixers: Context.benefit is needed, which takes a ledger of its targets
    selector_scores: bool = False  # orderers: Context.scores is needed, which takes a selector that gives scores
    score_files: tuple[ScoreFile, ...] = ()  # orderers: files of scores that are read into Context.columns
    budget: bool = False  # selectors: gradient scores, gradient norms or losses of training rows are all it asks for
    passes: Passes = Passes()  # what it costs

    def __post_init__(self) -> None:
        for name, known in (("signals", SIGNALS), ("stages", STAGES)):
            given = getattr(self, name)
            if isinstance(given, str) or not set(given) <= set(known):
                raise ValueError(f"{name}={given!r}: must be some of {', '.join(known)}")
        if isinstance(self.columns, str):
            raise ValueError(f"columns={self.columns!r}: must be a tuple of names")
        if not isinstance(self.reference, Reference | None):
            raise ValueError(f"reference={self.reference!r}: must be a dataflex.Reference, or None")

    @classmethod
    def merged(cls, parts: Mapping[str, Requires]) -> Requires:
        """Return what several methods require together; a key is the parameter that names the method (``of[0]``)."""
        each = list(parts.values())
        references = [one.reference for one in each if one.reference is not None]
        merged: dict[str, Any] = {
            switch.name: any(getattr(one, switch.name) for one in each)
            for switch in fields(cls)
            if switch.default is False
        }
        for name in ("models", "preconditions", "by_target"):
            keyed = ((place, getattr(one, name)) for place, one in parts.items())
            merged[name] = {f"{place}.{key}": value for place, found in keyed for key, value in found.items()}
        return cls(
            **merged,
            signals=frozenset().union(*(one.signals for one in each)),
            domains=max((one.domains for one in each), default=1),
            stages=tuple(stage for stage in STAGES if all(stage in one.stages for one in each)),
            columns=tuple(dict.fromkeys(name for one in each for name in one.columns)),
            reference=Reference(references[0].folder, all(one.cached for one in references)) if references else None,
            score_files=tuple(dict.fromkeys(file for one in each for file in one.score_files)),
            embedding=next((one.embedding for one in each if one.embedding is not None), None),
            token_weights=next((one.token_weights for one in each if one.token_weights is not None), None),
            passes=sum((one.passes for one in each), Passes()),
        )


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What is known of a run; None for what is not known yet."""

    stage: str | None = None  # LLaMA-Factory's stage
    partitioned: str | None = None  # what partitions the parameters over ranks; empty for nothing
    optimizer: str | None = None  # key and value that name an optimizer other than Adam; empty for Adam and AdamW
    num_domains: int | None = None
    num_rows: int | None = None  # training rows
    total_steps: int | None = None  # optimizer steps of the whole run
    packed: bool | None = None  # whether several samples share a row
    copied: bool | None = None  # whether rows come from a tokenized copy: without columns or names of data sets
    columns: Mapping[str, Collection[str]] | None = None  # names of the raw columns of each data set, where known


@dataclass(frozen=True)
class Problem:
    """What a method finds wrong with a run."""

    key: str  # the parameter to change, as it is written in the method's block
    text: str  # what is wrong, and what to write instead


# ---- what a method is given and returns


class Signals(Protocol):
    """Values that the model computes from rows; calls are collective: same arguments, same values on every rank."""

    def __call__(self, signal: Signal, rows: Rows, *, target: str | None = None) -> NDArray[np.float32]:
        """Return the value of ``signal`` for each row [len(rows), ...] of the training set, or of the named target."""

    def tokens(self, rows: Rows, *, target: str | None = None, part: Part = "all") -> list[NDArray[np.int64]]:
        """Return the tokens of each row, of its prompt (no label) or of its completion (supervised); may be empty."""

    def texts(self, rows: Rows, *, target: str | None = None, part: Part = "all") -> list[str]:
        """Return the same as text, without special tokens."""

    def num_rows(self, target: str | None = None) -> int:
        """Return the number of rows of the training set or target."""

    def generate(
        self, prompts: Sequence[Sequence[int]], spec: GenerationSpec, *, ids: Rows | None = None
    ) -> list[Generation]:
        """Sample responses of the model to prompts, given as token ids, prompt by prompt and sample by sample."""

    def on_one_rank(self, what: str, compute: Callable[[], T]) -> T:
        """Run ``compute`` on rank 0 alone and return its value on every rank; ``what`` names it in errors."""


@dataclass(frozen=True, kw_only=True)
class Benefit:
    """What training on each domain did to the targets' losses since the last decision, by the ledger."""

    targets: tuple[str, ...]
    changes_KT: Floats  # change of each target's loss, nats per token; negative: it fell
    tokens_K: NDArray[np.int64]  # tokens of each domain that were trained on


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a method may look at while it decides. Random numbers come from ``rng`` only."""

    interval: Interval
    seed: int
    domains: Domains
    signals: Signals
    targets: tuple[str, ...] = ()
    columns: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    total_sequences: int = 0  # sequences served over the whole run (total steps x global batch)
    global_batch: int = 1  # sequences of one optimizer step
    unit: Literal["sequences", "tokens", "documents"] = "sequences"  # unit in which proportions are measured
    learning_rate: float = 0.0  # of the optimizer at the step of the decision
    benefit: Benefit | None = None  # by the ledger; None without one, and before it has an account
    scores: NDArray[np.floating] | None = None  # orderers: the selector's score of every row [N], NaN where none

    def rng(self, name: str) -> np.random.Generator:
        """Return the counter-based random stream ``name`` of this interval, equal on every rank."""
        return stream(self.seed, name, self.interval.index)


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The rows that a selector chose."""

    rows: Rows  # row ids [n] in order of preference, distinct unless the method repeats on purpose
    scores: NDArray[np.floating] | None = None  # score of every pool row in pool order [len(pool)], NaN where none
    reason: str = ""  # one line for the record
    ordered: bool = False  # whether the rows are in the order in which they are to be served
    weights: NDArray[np.floating] | None = None
    """Weight of each of ``rows`` in the loss [n], >= 0, by the denominator that ``Requires.row_weights`` names; None: 1
    each. They stand as long as the selection does."""
    nearest: tuple[NDArray[np.integer], NDArray[np.integer]] | None = None
    """Of every pool row the target that it is nearest to, as an index into ``Context.targets``, and that target's row
    [len(pool)] each; -1 where there is none. For the record."""


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Sampling proportions of the domains, float64 [K], >= 0, not all 0; they are divided by their sum."""

    proportions: NDArray[np.float64]
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class BatchView:
    """One micro-batch as a weighter sees it. Tensors are detached, fp32 or int64, on the model's device.

    A sequence is a row, or, where rows are packed, a document of a row; ``_B`` counts this rank's
    sequences, ``R`` its rows (R = B without packing).
    """

    rows_B: Rows  # row id of each sequence (numpy)
    domains_B: NDArray[np.int64]  # domain index of each sequence (numpy)
    loss_B: torch.Tensor  # token-mean loss per sequence; 0 where tokens_B is 0
    tokens_B: torch.Tensor  # supervised tokens per sequence
    loss_BT: torch.Tensor  # loss per token position [R, T], 0 where mask_BT is False
    mask_BT: torch.Tensor  # supervised positions [R, T]
    loss_M: torch.Tensor  # loss_B of all ranks, in rank order
    tokens_M: torch.Tensor  # tokens_B of all ranks
    local: slice  # this rank's part of the _M arrays
    step: int  # optimizer step, counted from 0
    total_steps: int  # optimizer steps of the whole run
    num_micro_batches: int = 1  # micro-batches of this optimizer step
    sequence_BT: torch.Tensor | None = None  # index into _B of each position's sequence [R, T]; None without packing
    reference_BT: torch.Tensor | None = None  # token losses of Requires.reference [R, T], 0 where mask_BT is False
    entropy_BT: torch.Tensor | None = None  # entropy of each prediction, nats [R, T]; None unless Requires.entropy
    embeddings_BH: torch.Tensor | None = None  # embedding of each sequence, fp32; None unless Requires.embedding
    columns: Mapping[str, NDArray[Any]] = field(default_factory=dict)  # columns of the training rows, each [N] (numpy)
    token_weights_BT: torch.Tensor | None = None  # of the token that each position predicts, where they are required


# ---- the base classes


class Method:
    """Base of selectors, mixers, orderers and weighters.

    A subclass sets ``name``, ``card`` and, where it has parameters, a nested frozen dataclass ``Params``. Its
    constructor takes the built Params only.
    """

    kind: ClassVar[str] = ""
    name: ClassVar[str] = ""
    card: ClassVar[Card]
    Params: ClassVar[type[Params]] = Params
    saved: ClassVar[tuple[str, ...]] = ()
    """Attributes that a resumed run needs: numbers, texts, tuples of texts, mappings of numbers, arrays, or lists of
    arrays of one shape; None for what is not there yet. Nothing is saved while all are None or empty."""

    def __init__(self, params: Any) -> None:
        self.params = params

    def requires(self) -> Requires:
        """Return what the method requires of a run; may look at ``self.params`` only."""
        return Requires()

    def check(self, run: RunFacts) -> Iterator[Problem]:
        """Yield what only the method knows to be wrong with a run; asked again whenever more of the run is known."""
        return iter(())

    def refused_values(self, name: str, values: NDArray[Any]) -> tuple[NDArray[np.bool_], str] | None:
        """Return which values of the column ``name`` it refuses [N], and in a few words what they must be.

        Asked once, when the data is loaded, with the values of all training rows [N], None for a missing one.
        """
        return None

    def state_dict(self) -> State:
        """Return the attributes that ``saved`` names."""
        state = {name: getattr(self, name) for name in self.saved}
        if all(is_absent(value) for value in state.values()):
            return {}
        return {name: saved_form(value) for name, value in state.items()}

    def load_state_dict(self, state: State) -> None:
        """Restore what ``state_dict`` returned; CheckpointError where it is not a state of this method."""
        if state and state.keys() != set(self.saved):
            kept = ", ".join(self.saved) or "no state"
            raise CheckpointError(f"{self.name} keeps {kept}, but was given {', '.join(sorted(state))}")
        for name, value in state.items():
            setattr(self, name, restored(value, getattr(self, name)))


class Selector(Method):
    """Chooses which rows are trained on during an interval."""

    kind = "selector"
    selects_subset: ClassVar[bool] = True  # False: it keeps the whole pool and leaves epochs as they are

    def select(self, pool: Rows, budget: int, ctx: Context) -> Selection:
        """Choose at most ``budget`` rows of ``pool`` (all of it when ``selects_subset`` is False)."""
        raise NotImplementedError

    @property
    def gives_scores(self) -> bool:
        """Whether its selections have scores, which an orderer may go by."""
        return True

    def observe_rollouts(self, stats: RolloutStats) -> None:
        """Learn from the rewards of one generation, in stage ``rl``; the same numbers on every rank."""

    def keeps(self, stats: RolloutStats) -> NDArray[np.bool_]:
        """Return which groups of a generation are trained on [P], in stage ``rl``; those of equal rewards cannot be."""
        return stats.informative


class Mixer(Method):
    """Sets the proportions in which domains are served during an interval.

    An online mixer sets ``observes`` and learns from ``observe``, which is called after the backward passes
    of every optimizer step, with the same numbers on every rank. It must not look at anything else.
    """

    kind = "mixer"
    observes: ClassVar[bool] = False

    def mix(self, ctx: Context) -> Mix:
        """Return proportions in the order of ``ctx.domains.names``."""
        raise NotImplementedError

    def observe(self, stats: DomainStats) -> None:
        """Learn from one optimizer step; deterministic, on the CPU in float64."""

    def observe_rollouts(self, stats: RolloutStats) -> None:
        """Learn from the rewards of one generation, in stage ``rl``; the same numbers on every rank."""

    def outcome(self) -> ProportionsFile | None:
        """Return the proportions that the run has found so far, for the file ``OUTPUT_DIR/dataflex/<name>.json``."""
        return None


class DomainWeighter(Mixer):
    """Weighs the domains in the loss and leaves the sampling as it is: ``mix`` always returns the same proportions.

    A configuration names it as its ``mixer``.
    """

    observes: ClassVar[bool] = True

    @property
    def loss_normalizer(self) -> DomainNormalizer:
        """The loss that ``loss_weights`` a_d belong to.

        - ``weight_sum``: weighted token mean, sum_d a_d sum(loss of d) / sum_d a_d n_d over the optimizer step.
        - ``domain``: sum_d a_d (mean token loss of d in the optimizer step); an absent domain adds nothing.
        """
        return "weight_sum"

    @property
    def undoes_sampling(self) -> bool:
        """Whether each weight is to be divided by the proportion in which the step's rows were drawn, warm-up included.

        Proportions are in the run's unit; what comes of it is divided by its sum.
        """
        return False

    def loss_weights(self) -> Floats:
        """Return the weights of the domains in the loss of the next optimizer step [K]; asked after its ``mix``."""
        raise NotImplementedError


class Orderer(Method):
    """Puts rows in the order in which they are served: those of a selection, of each domain, or of the whole pool.

    It gives keys, by which rows are ranked, and the rank that is served at each place.
    """

    kind = "orderer"
    paced: ClassVar[bool] = False  # whether an epoch may hold a part of the rows: those of smallest keys

    def sort_keys(self, rows: Rows, ctx: Context) -> NDArray[np.floating]:
        """Return a number for each row [len(rows)]: smaller ones come first, equal ones in file order, NaN last.

        Asked once in a run, unless ``requires`` says that keys change (``needs_interval``, ``selector_scores``).
        """
        return np.zeros(len(rows))

    def ranks(self, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """Return the rank of the row that is served at each place: a permutation of 0 to ``count - 1``."""
        return np.arange(count, dtype=np.int64)

    def available(self, step: int, total_steps: int) -> float:
        """Return the share of the rows, by keys, of an epoch that begins at optimizer step ``step``; if ``paced``."""
        return 1.0

    @property
    def reason(self) -> str:
        """What the record says of the order, in a few words."""
        return f"in the order of {self.name}"


@dataclass(frozen=True, kw_only=True)
class WeighterParams(Params):
    """Base of the parameters of weighters."""

    warmup_steps: int = param(0, "optimizer steps with the plain loss at first", minimum=0)


class Weighter(Method):
    """Sets how much each sequence or token of a micro-batch counts.

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
    neutral: ClassVar[bool] = False  # True for ``none``: the stock loss is left alone
    by_token: bool = False  # True where ``weigh`` returns weights of tokens [R, T]
    Params: ClassVar[type[Params]] = WeighterParams
    normalizer: Normalizer = "weight_sum"  # denominator that the weights are made for

    def requires(self) -> Requires:
        """Require a stage that trains on the losses of tokens."""
        return Requires(stages=("pt", "sft"))

    def warmup(self, total_steps: int) -> int:
        """Return the number of optimizer steps at first that use the plain loss."""
        return getattr(self.params, "warmup_steps", 0)

    def check(self, run: RunFacts) -> Iterator[Problem]:
        """Yield a warm-up that takes the whole run, in which the weights would never act."""
        steps, total = 0 if run.total_steps is None else self.warmup(run.total_steps), run.total_steps or 0
        if 0 < steps >= total:
            told = " (its default)" if getattr(self.params, "warmup_steps", None) is None else ""
            yield Problem(
                "warmup_steps",
                f"{steps} steps of plain loss{told} take up the whole run of {total} steps, so the weights would never "
                f"act; write warmup_steps: {total // 20}",
            )

    def active(self, step: int, total_steps: int) -> bool:
        """Whether weights act at ``step``; where they do not, the plain token-mean loss is used."""
        return step >= self.warmup(total_steps)

    def due(self, step: int) -> bool:
        """Whether ``prepare`` is to be called before optimizer step ``step`` (counted from 0)."""
        return False

    def prepare(self, ctx: Context, rows: Rows) -> None:
        """Ask the signals for what the coming step needs (collective; ``due`` says when).

        ``ctx.interval`` is the one step, its ``index`` the step's, so that ``ctx.rng`` differs from step to step;
        ``ctx.targets`` are the weighter's targets, and ``rows`` the row ids of the whole step, over all ranks and
        micro-batches, in the plan's order.
        """

    def static_weights(self, rows: Rows, columns: Mapping[str, NDArray[Any]]) -> NDArray[np.float32] | None:
        """Return weights [len(rows)] known before the forward pass, or None when they depend on the batch.

        A weighter that requires ``token_weights`` returns those of tokens [len(rows), most tokens of one].
        """
        return None

    def weigh(self, batch: BatchView) -> torch.Tensor:
        """Return weights [B] (by sequence) or [R, T] (by position), fp32, detached, finite and >= 0."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class ReferenceParams(Params):
    """Base of the parameters of a method that does not work without a reference model."""

    reference: str = param(help="folder of the reference model, with the tokenizer of the run")
    reference_cache: bool = param(
        True, "score a row with the reference once, when first served, and keep that; else in every step"
    )

    def __post_init__(self) -> None:
        if not self.reference.strip():
            raise ValueError("reference: is empty; without a reference model there is no excess loss")

    def stated(self) -> Reference:
        """Return the reference model as ``Requires.reference``."""
        return Reference(self.reference, self.reference_cache)
