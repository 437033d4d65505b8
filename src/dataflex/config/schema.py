"""The configuration after reading: frozen dataclasses without any parsing.

The fields of ``DynamicConfig`` are the keys of the ``dynamic`` block. Their metadata holds ranges, ``flat`` (the flat
key with the same meaning), ``user=False`` (only the translation of flat keys sets it) and ``resume``: what happens when
a resumed run has another value than its checkpoint (see ``resuming``; the default is that it is refused).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Literal

from dataflex.method import IN_RUN, Method, Orderer, Params, Requires, Selector, param
from dataflex.plan.schedule import Schedule
from dataflex.registry import KINDS, find

_NEXT = "holds from the next decision on"


def decides(cls: type[Method]) -> bool:
    """Whether methods of a class decide which rows are served, and so have a cadence."""
    return cls.kind != "weighter" and getattr(cls, "selects_subset", True)


@dataclass(frozen=True, kw_only=True)
class Cadence:
    """When a method decides, where it does not follow the block."""

    every: int | None = param(
        None, "optimizer steps between two decisions of the method; null: the block's interval_steps", minimum=1
    )
    warmup_steps: int | None = param(
        None, "optimizer steps before its first decision; null: the block's warmup_steps", minimum=0
    )


@dataclass(frozen=True, kw_only=True)
class MethodConfig(Cadence):
    """One method of a run: which, with what parameters, towards which targets, and when it decides."""

    kind: str  # "selector", "mixer", "orderer" or "weighter"
    name: str  # in the registry
    params: Params
    targets: tuple[str, ...] = ()  # names of the target data sets; empty where the method takes none

    @property
    def cls(self) -> type[Method]:
        """The class of the method."""
        return find(self.kind, self.name)

    def build(self) -> Method:
        """Return a new instance of the method."""
        return self.cls(self.params)

    @cached_property
    def requires(self) -> Requires:
        """What the method requires of a run."""
        return self.build().requires()

    @property
    def decides(self) -> bool:
        """Whether it decides which rows are served, and so has a cadence."""
        return decides(self.cls)

    @property
    def cost(self) -> str:
        """What the method costs under its parameters, in words."""
        return self.requires.passes.told or self.cls.card.cost


@dataclass(frozen=True, kw_only=True)
class SignalsConfig:
    """How the passes over the model are made."""

    pool_fraction: float = param(
        1.0, "share of the rows, drawn anew each interval, that is scored", above=0.0, maximum=1.0
    )
    screen_fraction: float = param(
        1.0,
        "share of those rows, the most promising for the targets, that the selector is given",
        above=0.0,
        maximum=1.0,
    )
    screen_by: Literal["embeddings", "pilot"] = param(
        "embeddings", "nearness of embeddings, or scores predicted from those of a twentieth of the rows"
    )
    budget: float | None = param(
        None,
        "most that decisions cost in passes, relative to the training: a few rows are scored, or rows in their own "
        "training steps, and the scores of the others are predicted; null: the selector asks the model about every row",
        above=0.0,
        maximum=1000.0,
    )
    explore: float = param(
        0.2, "share of a plan that is drawn uniformly under a budget", minimum=0.0, maximum=1.0, resume=_NEXT
    )
    explore_by: Literal["uniform", "thompson"] = param(
        "uniform",
        "how a plan explores under a budget: by that share alone, or also by predictions drawn from their posterior",
        resume=_NEXT,
    )
    in_run_rank: int = param(
        8,
        "rank of the directions that rows are compared with in their training steps, for methods that ask for such "
        "scores, where more than adapters is trained; a matrix whose sides are small beside it is exact",
        minimum=1,
    )
    max_age_steps: int = param(0, "oldest answer, in optimizer steps, that is given again", minimum=0, resume=_NEXT)
    store: str | None = param(
        None, "folder that passes write to as they go, to be taken up after a kill", resume="free"
    )
    store_gb: float = param(
        10.0, "size in GB beyond which the oldest stored answers are dropped", above=0.0, maximum=1e9, resume="free"
    )


@dataclass(frozen=True, kw_only=True)
class LedgerConfig:
    """Of which targets' losses there is an account, and how exact it is."""

    targets: tuple[str, ...] = param(help="data sets whose losses are accounted for")
    refresh_steps: int | Literal["auto"] = param(
        2, "optimizer steps between two looks at the targets; auto: as many as need none between them", minimum=1
    )
    unexplained: float = param(
        0.02, "share of a loss's change above which the targets are looked at between two looks", above=0.0, maximum=1.0
    )
    target_rows: int | None = param(
        None, "rows of each target that are looked at, drawn once; null: all of them", minimum=1
    )
    parameters: str | None = param(
        None, "regular expression of names of the parameters that are split by domain; null: all", pattern=True
    )


@dataclass(frozen=True, kw_only=True)
class AverageConfig:
    """Over which steps the model's weights are averaged."""

    last_steps: int = param(help="last optimizer steps of the run over which weights are averaged", minimum=2)
    every: int = param(1, "optimizer steps between two that are averaged, counted back from the last", minimum=1)

    def __post_init__(self) -> None:
        if self.every >= self.last_steps:
            raise ValueError("every: only the last step would be averaged; it must be below last_steps")


@dataclass(frozen=True, kw_only=True)
class DynamicConfig:
    """The ``dynamic`` block, or the flat keys of existing DataFlex in its terms."""

    selector: MethodConfig | None = param(None, "method that chooses rows", flat="component_name")
    mixer: MethodConfig | None = param(None, "method that sets proportions of domains", flat="component_name")
    orderer: MethodConfig | None = param(None, "method that puts the rows that are served in order")
    weighter: MethodConfig | None = param(None, "method that weighs losses", flat="component_name")
    warmup_steps: int = param(0, "optimizer steps before the first decision", minimum=0, flat="warmup_step")
    interval_steps: int | None = param(None, "optimizer steps between two decisions", minimum=1, flat="update_step")
    candidate_batches: int | None = param(
        None, "the selector chooses within this many times the rows of an interval, epoch by epoch", minimum=2
    )
    keep_ratio: float | None = param(
        None,
        "share of the pool (what pool_fraction and screening leave) that the selector keeps",
        above=0.0,
        maximum=1.0,
    )
    exclude_seen: bool = param(False, "whether rows that were served leave the selector's pool until too few are left")
    max_repeats: int | None = param(
        4,
        "a run warns when a tenth of a selector's interval was served more often than this; null: never",
        minimum=1,
        resume="free",
    )
    repeat: bool = param(False, "whether an interval may serve a row again when too few were selected", resume=_NEXT)
    unit: Literal["sequences", "tokens", "documents"] = param("sequences", "what proportions are shares of")
    interleave: Literal["shuffled", "even"] = param(
        "shuffled", "order of domains within the steps that hold a mixer's proportions: drawn, or spread evenly"
    )
    initial_proportions: tuple[float, ...] | dict[str, float] | None = param(
        None, "proportions of the domains during warm-up", minimum=0.0, flat="init_mixture_proportions"
    )
    max_epochs: float | dict[str, float] | None = param(
        None,
        "most epochs over any domain, or over each",
        above=0.0,
        resume="the plan in progress stays as it is, the next decision heeds the new caps",
    )
    at_cap: Literal["error", "redistribute", "stop"] = param(
        "redistribute", "what happens to a domain that reached max_epochs", resume=_NEXT
    )
    min_proportion: float | dict[str, float] | None = param(
        None, "least proportion that the mixer may give any domain, or each", above=0.0, maximum=1.0, resume=_NEXT
    )
    domain_column: str | None = param(None, "data column that names a row's domain; without it, its data set does")
    domain_path: str | None = param(
        None, "end of the path of a row's file, as web/*.jsonl: the text that the first * matches is its domain"
    )
    domain_clusters: int | None = param(
        None, "number of clusters of the rows' embeddings, which are the domains", minimum=2
    )
    domain_encoder: str | None = param(None, "model, by folder or hub id, that embeds rows for domain_clusters")
    eval_by_domain: bool = param(
        False, "whether held-out rows are evaluated domain by domain, and over all of them", resume="free"
    )
    record: bool = param(
        False,
        "alone in the block: a run of LLaMA-Factory's own is recorded, which changes nothing of its training",
        resume="free",
    )
    ledger: LedgerConfig | None = param(None, "account of what each domain and row did to the losses of targets")
    average_weights: AverageConfig | None = param(
        None, "average of the weights over the last steps, saved and evaluated too", resume="the average begins anew"
    )
    signals: SignalsConfig = param(SignalsConfig(), "how the model is asked about rows")
    plugins: tuple[str, ...] = param((), "Python files that define methods", resume="free")
    leakage: Literal["warn", "error", "drop"] = param(
        "warn", "what happens to training rows that are also rows of a target", resume="rows"
    )
    on_bad_shard: Literal["error", "skip"] = param(
        "error",
        "whether a file of a data set of several that is missing or cannot be read ends the run, or is left out",
        resume="rows",
    )
    resume_plan: Literal["strict", "ignore"] = param(
        "strict", "whether a resumed run must find the data of the saved plan", resume="free"
    )
    on_change: Literal["strict", "extend"] = param(
        "strict",
        "whether a resumed run may find other rows, methods and batch sizes, and goes on with them",
        resume="free",
    )
    checkpoint_hash: Literal["size", "full"] = param(
        "size", "how files of a checkpoint above 1 GiB are compared before it is loaded; smaller by hash", resume="free"
    )
    seed: int | None = param(None, "seed of all decisions; without it, the run's seed", minimum=0, flat="params.seed")
    save_on_term: bool = param(
        True, "whether SIGTERM ends training after the step, with a checkpoint, or at once", resume="free"
    )
    freeze_gate: bool = param(False, "whether the gates of a MoE model are not trained", flat="freeze_gate")
    early_stopping_min_delta: float = param(
        0.0, "least gain that counts for early_stopping_steps", minimum=0.0, resume="free"
    )
    cycle_steps: int | None = field(default=None, metadata={"user": False, "flat": "update_times"})
    total_steps: int | None = field(default=None, metadata={"user": False, "resume": "free"})
    flat: bool = field(default=False, compare=False, metadata={"user": False, "resume": "free"})

    @property
    def domains_are_sources(self) -> bool:
        """Whether the data sets are the domains."""
        return self.domain_column is None and self.domain_path is None and self.domain_clusters is None

    @property
    def methods(self) -> tuple[MethodConfig, ...]:
        """The methods asked for, in the order in which they decide."""
        return tuple(method for kind in KINDS if (method := getattr(self, kind)) is not None)

    @property
    def stock(self) -> bool:
        """Whether LLaMA-Factory trains on its own rows, in its own order, and is only recorded."""
        return self.record and not self.methods and self.ledger is None and self.average_weights is None

    @property
    def selects_subset(self) -> bool:
        """Whether a selector leaves rows out."""
        selector = self.selector
        return selector is not None and issubclass(selector.cls, Selector) and selector.cls.selects_subset

    def every(self, method: MethodConfig) -> int | None:
        """Return the optimizer steps between two decisions of a method; None: one holds for the whole run."""
        return self.interval_steps if method.every is None else method.every

    def warmup(self, kind: str) -> int:
        """Return the optimizer steps before the first decision of the method of a kind."""
        own = next((method.warmup_steps for method in self.methods if method.kind == kind and method.decides), None)
        return self.warmup_steps if own is None else own

    def schedule(self, total_steps: int, longest: int | None = None) -> Schedule:
        """Return the intervals of a run.

        Args:
            total_steps: Optimizer steps of the run.
            longest: Steps of an interval where no key gives them; None: one decision holds for the rest of the run.

        Raises:
            ConfigError: The numbers do not fit together.
        """

        def of(every: int | None, warmup: int) -> Schedule:
            return Schedule(
                warmup_steps=warmup,
                interval_steps=every or longest or max(1, total_steps - warmup),
                total_steps=total_steps,
                cycle_steps=self.cycle_steps,
            )

        block = of(self.interval_steps, self.warmup_steps)
        own = {each.kind: of(self.every(each), self.warmup(each.kind)) for each in self.methods if each.decides}
        first = next(iter(own.values()), block)
        return first if all(each == first for each in own.values()) else replace(block, own=own)

    @property
    def paces(self) -> bool:
        """Whether an orderer serves more and more of the rows."""
        orderer = self.orderer
        return orderer is not None and issubclass(orderer.cls, Orderer) and orderer.cls.paced

    @property
    def full_steps(self) -> bool:
        """Whether every optimizer step is a full one, instead of epochs over all rows with a short last step."""
        return self.mixer is not None or self.selects_subset or self.paces

    @property
    def watches(self) -> MethodConfig | None:
        """A method to which training steps tell what they show of rows, within a budget or by the signal ``InRun``."""
        if self.selector is not None and self.signals.budget is not None:
            return self.selector
        return next((method for method in self.methods if method.requires.signals & {*IN_RUN}), None)

    @property
    def requires(self) -> Requires:
        """What all methods together require of a run."""
        return Requires.merged({method.kind: method.requires for method in self.methods})

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of all target data sets, each once, in order of mention."""
        return tuple(dict.fromkeys(target for targets in self.targets_by_key.values() for target in targets))

    @property
    def targets_by_key(self) -> dict[str, tuple[str, ...]]:
        """Target data sets by the path of the key that names them."""
        found: dict[str, tuple[str, ...]] = {}
        for method in self.methods:  # several selectors are asked offline
            key = f"dynamic.{method.kind}.targets"
            found[key] = (*found.get(key, ()), *method.targets)
        return found if self.ledger is None else {**found, "dynamic.ledger.targets": self.ledger.targets}

    @property
    def columns_by_key(self) -> tuple[tuple[str, str], ...]:
        """Path of each key that requires a raw data column, and the column's name."""
        asked = [(f"dynamic.{method.kind}", name) for method in self.methods for name in method.requires.columns]
        return (*([("dynamic.domain_column", self.domain_column)] if self.domain_column else []), *asked)

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the raw data columns that are loaded with the rows, each once."""
        return tuple(dict.fromkeys(name for _, name in self.columns_by_key))


def block_keys() -> list[str]:
    """Return the keys of the ``dynamic`` block, in the order of the schema."""
    return [each.name for each in fields(DynamicConfig) if each.metadata.get("user", True)]


@dataclass(frozen=True, kw_only=True)
class FlatKeys:
    """The flat keys of existing DataFlex, with the defaults that they have there."""

    train_type: str = "static"
    components_cfg_file: str = "configs/components.yaml"
    component_name: str | None = None
    warmup_step: int = param(0, minimum=0)
    update_step: int = param(0, minimum=0)
    update_times: int = 1
    train_step: int = param(0, minimum=0)
    static_mix: bool = False
    mixture_sample_rule: Literal["mixture", "stratified", "uniform"] = "mixture"
    init_mixture_proportions: tuple[float, ...] | None = param(None, minimum=0.0)
    mixer_eval_dataset: str | tuple[str, ...] | None = None
    freeze_gate: bool = False
    early_stopping_min_delta: float = param(0.0, minimum=0.0)


FLAT_KEYS: tuple[str, ...] = tuple(each.name for each in fields(FlatKeys))
