"""What a training loop talks to: it opens a session, asks for the batches and losses of each step, and ends it.

A session imports no Trainer: ``Loop`` tells it about the loop. ``huggingface.trainer`` is the adapter
for the Hugging Face Trainer, ``examples/plain_loop.py`` a loop of one's own. All ranks make the same calls.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from dataflex import checkpoints, comm
from dataflex.clock import OTHER, PhaseClock
from dataflex.config.build import parse_dynamic
from dataflex.config.costs import passes_by_label
from dataflex.config.forecast import Forecast, row_passes
from dataflex.config.mappings import as_mapping
from dataflex.config.needs import FSDP2, ZERO3, elsewhere, unmet
from dataflex.config.schema import DynamicConfig
from dataflex.errors import CheckpointError, ConfigError, DataError, UnsupportedError, did_you_mean
from dataflex.method import DomainWeighter, Mixer, Rows, RunFacts, Weighter
from dataflex.plan.plan import BatchShape
from dataflex.plan.proportions import write_proportions
from dataflex.plan.rollouts import RolloutAccount, RolloutStats
from dataflex.record.read import recorded_run, thinned
from dataflex.record.recorder import NullRecorder, RunRecorder
from dataflex.registry import KINDS
from dataflex.score_table import read_scores, score_column
from dataflex.signals.identity import model_identity, surroundings
from dataflex.signals.model_access import Corpus, ModelAccess
from dataflex.signals.model_parts import capture_hidden, is_partitioned, model_parts
from dataflex.signals.passes import PassCounter, compute
from dataflex.signals.preferences import Preferences
from dataflex.signals.runner import SignalCache, SignalRunner
from dataflex.signals.store import ArrayStore
from dataflex.signals.sweep import preserve_state
from dataflex.train import checkpoint as saved
from dataflex.train.average import WeightAverage
from dataflex.train.checkpoint import Identity
from dataflex.train.controller import Controller
from dataflex.train.extending import extend
from dataflex.train.feedback import LOGGED_DOMAINS, SAMPLES, describe_rows
from dataflex.train.loader import ROWS, PlanFeed
from dataflex.train.loss import Reweighter, counted_tokens
from dataflex.train.row_space import RowSpace
from dataflex.validate import check_state
from dataflex.version import versions
from dataflex.weighters.product import OfSelection, Product

logger = logging.getLogger(__name__)

_PLAN_IDS = 2**20  # planned at once when no method asks for shorter intervals
_LEDGERS = 64
"""Decisions at all of which the ledger is recorded; at later ones less and less often."""
_TRAINING = ("train", "signals", "decide", "evaluate", "checkpoint")  # phases that the closing event always names


Collate = Callable[[list[dict[str, Any]]], Any]


@dataclass(kw_only=True)
class Setup:
    """Description of a run, completed while it is built up."""

    config: DynamicConfig  # the dynamic block
    resolved: dict[str, Any]  # JSON form of the whole configuration, for the record
    stage: str  # stage of training: ``pt``, ``sft``, ``rm``, ``dpo``, ``kto`` or ``rl``
    packed: bool = False  # whether several samples share a row
    joined: bool = False  # whether the training collator joins its rows into one sequence
    shuffle: bool = True  # whether rows are shuffled, for adapters that make the batch shape
    space: RowSpace | None = None  # the row space, once the data is loaded
    score_collator: Callable[[Any], Any] = lambda collator: collator  # makes a training collator one for scoring
    pair_collator: Callable[[Any], Any] | None = None  # makes it one for pairs of answers, chosen and rejected in turn
    clock: PhaseClock = field(default_factory=PhaseClock)  # seconds of the run by phase
    recorder: RunRecorder = field(default_factory=NullRecorder)  # the record, once it is open; on rank 0 only
    measure: Callable[[], RowSpace] | None = None  # makes the row space when it is first asked for

    @property
    def rows(self) -> RowSpace:
        """The row space, which must have been loaded, or is measured now."""
        if self.space is None and self.measure is not None:
            self.space = self.measure()
        assert self.space is not None, "the session was opened before the data was loaded"
        return self.space


@dataclass(frozen=True, kw_only=True)
class Loop:
    """What a session has to know of the loop that it serves."""

    model: torch.nn.Module  # the model without wrappers (DDP, an engine)
    optimizer: Callable[[], Any]  # gives the optimizer, which may be made later than the session
    learning_rate: Callable[[], float]  # gives the learning rate of the step in progress
    collate: Collate  # turns features into a training batch, a mapping with ``labels``
    shape: BatchShape  # micro-batches, accumulation and ranks of one optimizer step
    total_steps: int  # optimizer steps of the run
    seed: int  # seed of all decisions unless the block has one
    device: torch.device  # device of the model
    output_dir: Path  # folder of the record and of the run's files
    dataset: Any = None  # features by row id; None: those of the row space
    score_collate: Collate | None = None  # for scoring passes: ``input_ids``, ``attention_mask`` and ``labels``
    joined: bool = False
    """Whether ``collate`` joins rows into one sequence [1, L]; ``score_collate`` pads, or is given single packs."""
    preferences: Preferences | None = None  # stage dpo: the pairs, the reference model and the loss
    tokenizer: Any = None  # turns tokens into text, for methods that read text
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext  # mixed-precision context of a forward pass
    score_rows: int = 8  # rows of a forward pass, if they are as long as the longest; gradients: of a micro-batch
    num_workers: int = 0  # processes that collate
    pin_memory: bool = False  # whether batches are put into pinned memory
    prefetch_factor: int | None = None  # batches that each process makes ahead
    sharding: Literal["none", "zero", "zero3", "fsdp", "fsdp2"] = "none"  # of the parameters; ``zero`` is below ZeRO-3
    release: Callable[[], None] = lambda: None  # frees parameters that a scoring pass left gathered
    parallel: Mapping[str, int] = field(default_factory=dict)  # sizes of other parallelism than over data, by name
    devices: int = 1  # devices that this process trains on
    every_row: bool = False  # whether each rank is given all rows of a step, and the loop shares them out
    writes: bool | None = None  # whether this rank writes checkpoints; None: rank 0 does
    counts_over_ranks: bool = True  # whether a step's loss is divided by the tokens of all ranks, else of each rank
    averages: bool = True
    """Whether the loop averages gradients over ranks, as DDP does: the session then multiplies losses by the ranks."""
    count_items: Callable[[list[Any]], Any] | None = None  # counts a step's tokens; None: labels other than -100


@dataclass(frozen=True, kw_only=True)
class Step:
    """The micro-batches of this rank for one optimizer step."""

    index: int  # optimizer step, counted from 0
    batches: list[Any]  # collated micro-batches; each holds its row ids under ``loader.ROWS``
    num_items: Any  # supervised tokens of the step


class Session:
    """One training run, as its loop sees it: ``prepare`` and ``start`` once, then step by step, ``finish`` at the end.

    Raises:
        ConfigError: A method does not work under the stage.
    """

    def __init__(self, setup: Setup) -> None:
        config = setup.config
        if problems := [*unmet(config, RunFacts(stage=setup.stage))]:
            raise ConfigError(problems)
        self.setup, self.config, self.clock = setup, config, setup.clock
        self._build()
        self.weighs = self.weighter is not None or self._told_mixer is not None or config.watches is not None
        """Whether the training loss must come from ``loss``: it is weighed, or its rows or domains are observed."""
        self.tells_losses = setup.stage in ("pt", "sft")
        """Whether training has token losses, which are logged by domain."""
        self.recorder: RunRecorder = NullRecorder()
        self.total_steps = 0
        self.average: WeightAverage | None = None
        """Average of the last weights, where the block asks for one."""
        self.since_log: dict[str, Any] | None = None
        """Sums since the last log, from the checkpoint that the run resumed."""
        self.began = False  # once it is prepared
        self.loop: Loop
        self.controller: Controller
        self.feed: PlanFeed | None = None
        self._loss: Reweighter
        self._step: Step | None = None
        self._micro = 0  # micro-batches of the step that went forward
        self._logged = 0  # step of the last log
        self._hidden: list[torch.Tensor] = []
        self._run = ""
        self._unsealed: tuple[Path, float] | None = None
        self._extended: dict[str, Any] = {}  # what changed on purpose at the resume
        self._moved: tuple[str, Rows] | None = None  # the pool before, and the row there of each row
        self._passes: PassCounter
        self._rows: Path | None = None  # file of what rows are known by, for checkpoints

    def _build(self) -> None:
        """Make the methods, as they are before a training."""
        chosen = [getattr(self.config, kind) for kind in KINDS]
        built: list[Any] = [None if method is None else method.build() for method in chosen]
        self.selector, self.mixer, self.orderer, weighter = built
        self.weighter = self._with_row_weights(None if weighter is None or weighter.neutral else weighter)
        told = self.mixer is not None and (self.mixer.observes or isinstance(self.mixer, DomainWeighter))
        self._told_mixer: Mixer | None = self.mixer if told else None

    def _with_row_weights(self, weighter: Weighter | None) -> Weighter | None:
        """Return the weighter, times the weights that the selector gives rows where it does."""
        normalizer = None if self.selector is None else self.selector.requires().row_weights
        if normalizer is None:
            return weighter
        ours = OfSelection(normalizer, lambda rows: self.controller.weights_of(rows))
        return ours if weighter is None else Product.joined(weighter, ours)

    @classmethod
    def open(
        cls,
        block: Mapping[str, Any],
        rows: RowSpace,
        loop: Loop,
        *,
        stage: str = "sft",
        packed: bool = False,
        base_dir: Path | str = ".",
    ) -> Session:
        """Return a session for a loop of one's own; ``start`` comes next.

        Args:
            block: The ``dynamic`` block: a selector, mixer, orderer or weighter, and when they decide.
            rows: The training rows, see ``RowSpace.of``.
            loop: The loop.
            stage: Stage of training; weighters need the language-model losses of ``pt`` or ``sft``.
            packed: Whether several samples share a row.
            base_dir: Folder in which the plugins of the block are looked up.

        Raises:
            ConfigError: All problems of the block, or what does not go together with the stage.
            UnsupportedError: A kind of parallelism or a batch shape that cannot be served.
        """
        config = parse_dynamic(block, Path(base_dir))
        resolved = {"dynamic": as_mapping(config), "stage": stage, "seed": loop.seed}
        problems = [*elsewhere(config)]
        if config.domain_column is not None:
            problems.append("dynamic.domain_column: rows bring their domains: give them to RowSpace.of")
        if problems:
            raise ConfigError(problems)
        session = cls(Setup(config=config, resolved=resolved, stage=stage, packed=packed, space=rows))
        session.prepare(loop)
        return session

    # -- before training ------------------------------------------------------------------------

    def micro_batches_per_epoch(self, shape: BatchShape) -> int:
        """Return the micro-batches of a rank per epoch, as the stock Trainer counts them."""
        num_rows = self.setup.rows.num_rows
        if self.config.full_steps:
            return shape.steps_per_epoch(num_rows) * shape.accumulation
        return shape.micro_batches_per_epoch(num_rows)

    def prepare(self, loop: Loop) -> None:
        """Check the loop and build controller, loader and loss (collective); a second training begins anew.

        Raises:
            UnsupportedError: A kind of parallelism or a batch shape that cannot be served.
            ConfigError: The block asks for what these rows and steps do not give.
        """
        setup, config, shape = self.setup, self.config, loop.shape
        if self.began:
            self._build()
            self.since_log, self._step, self._extended, self._moved, self._unsealed = None, None, {}, None, None
        setup.space = space = with_scores(setup.rows, config)
        lacking = [
            f"{key}: there is no target {name!r}{did_you_mean(name, [*space.targets])}"
            for key, names in config.targets_by_key.items()
            for name in names
            if name not in space.targets
        ]
        if lacking:
            raise ConfigError(lacking)
        columns = {"rows": {*space.columns, config.domain_column or ""}}
        facts = RunFacts(num_domains=len(space.domains.names), total_steps=loop.total_steps, columns=columns)
        if not config.stock:
            refuse_unsupported(loop, config, facts)
        if config.freeze_gate:
            freeze_gates(loop.model)
        self.loop, self.total_steps = loop, loop.total_steps
        self._writes = comm.rank() == 0 if loop.writes is None else loop.writes
        given: dict[str, Any] = dict(space.columns)
        if space.token_weights is not None and config.requires.token_weights is not None:
            given[config.requires.token_weights[1]] = space.token_weights
        self._loss = Reweighter(
            self.weighter,
            self._told_mixer,
            columns=given,
            domains=space.domains,
            over_ranks=loop.counts_over_ranks,
            world=shape.world,
            packed=setup.packed,
            device=loop.device,
            pads_left=getattr(loop.tokenizer, "padding_side", "right") == "left",
        )
        if not self.tells_losses:
            self._loss.missing = f"rows of stage {setup.stage} have no token losses"
        seed = loop.seed if config.seed is None else config.seed
        self.controller = Controller(
            config=config,
            space=space,
            schedule=config.schedule(loop.total_steps, max(1, _PLAN_IDS // shape.global_batch)),
            shape=shape,
            seed=seed,
            signals=signal_runner(setup, loop, seed),
            selector=self.selector,
            mixer=self.mixer,
            orderer=self.orderer,
            clock=setup.clock,
            rollouts=RolloutAccount(space.num_rows) if setup.stage == "rl" else None,
            weighs_documents=setup.packed and self.weighter is not None,
        )
        self._loss.check_known(space.all_rows())
        if (in_run := self.controller.in_run) is not None:
            self._loss.watch = in_run.watch
        self._passes = PassCounter(loop.model, lambda: setup.clock.now, loop.device)
        self._identity = Identity(config, space, setup.resolved, shape=shape, seed=seed)
        if config.average_weights is not None:
            self.average = WeightAverage(loop.model, config.average_weights, loop.total_steps)
        self.began = True
        if config.stock:
            return
        self.feed = PlanFeed(
            _dataset(setup, loop),
            loop.collate,
            shape,
            num_workers=loop.num_workers,
            pin_memory=loop.pin_memory and torch.cuda.is_available(),
            prefetch_factor=loop.prefetch_factor,
            joined=loop.joined,
        )
        if self.weighs:
            self._loss.reference = _open_reference(setup, loop, self.controller.signals.access)

    def start(self, checkpoint: Path | str | None = None, step: int | None = None) -> int:
        """Begin, or load the plan and the states of a checkpoint; open the record (collective).

        Args:
            checkpoint: Folder that ``checkpoint`` wrote, or None.
            step: Optimizer steps done; None: those of the checkpoint.

        Returns:
            The optimizer step to go on with.

        Raises:
            CheckpointError: The checkpoint is not whole, or of another run.
        """
        comm.agree("resume_from_checkpoint", str(checkpoint))
        folder = None if checkpoint is None else Path(checkpoint)
        if folder is not None and step is None:
            broken = checkpoints.manifest_reason(folder)
            if broken is not None:
                raise CheckpointError(f"resume: {folder} cannot be resumed from: {broken}")
            step = saved.step_of(folder)
        step = step or 0
        if folder is not None and self.config.resume_plan == "ignore":
            self.controller.decided = saved.decisions(folder)
        elif folder is not None:
            self._load(folder, step)
        self._open_record(folder, step)
        self.clock.switch("train")
        return step

    def _load(self, folder: Path, step: int) -> None:
        if self.config.stock and not self._identity.same_rows(folder):
            logger.warning("%s holds no record of these rows: what is counted by domain begins anew", folder)
            return
        identity = None if self.config.stock else self._identity
        found = saved.load(folder, identity, extend=self.config.on_change == "extend")
        state, kept = found.state, {"weighter", "rows", "sums"}
        if found.changes:
            kept, rows, row_of = extend(self.controller, found, self._identity, step)
            self._extended = {"changes": found.changes, "rows": rows}
            if "rows" not in kept:
                self._moved = found.described["space"]["fingerprint"], row_of
        else:
            self.controller.plan = found.plan
            self.controller.load_state_dict(state["controller"])
        loss = self._loss
        if loss.weighter is not None and "weighter" in kept:
            loss.weighter.load_state_dict(state["weighter"])
            if loss.row_weights is not None and "rows" in kept:
                loss.row_weights.load_state_dict(state["row_weights"])
        if loss.reference is not None and "rows" in kept:
            loss.reference.load_state_dict(state["reference"])
        self.clock.before = {key: float(value) for key, value in state["seconds"].items()}
        self._passes.before = {key: float(value) for key, value in state.get("passes", {}).items()}
        if self.average is not None:
            self.average.load_state_dict(state.get("average", {}))
        self.since_log = state["since_log"]
        if "sums" in kept and self.since_log["reweighter"]:
            loss.restore_since_log(self.since_log["reweighter"], self.loop.device)

    def _open_record(self, resumed: Path | None, step: int) -> None:
        """Open the record under the run's id, which is that of the checkpoint or new, and equal on all ranks."""
        output_dir, controller = self.loop.output_dir, self.controller
        found = ("", False)
        if comm.rank() == 0:
            checkpoints.claim(output_dir)
            run = None if resumed is None else checkpoints.run_of(resumed)
            recorded = recorded_run(output_dir / checkpoints.FOLDER)
            same = resumed is not None and recorded is not None and recorded in ("", run)
            found = (checkpoints.begin_run(output_dir, run), same)
        self._run, continues = comm.broadcast_object(found)
        if comm.rank() == 0:
            self.recorder = self.setup.recorder = RunRecorder(
                output_dir / checkpoints.FOLDER,
                step if continues else None,
                plan_in_progress=None if controller.plan is None else controller.plan.interval.index,
                clock=self.clock,
            )
        controller.recorder = self.recorder
        self.recorder.run_started(  # a resumed run may have more steps, or other caps
            config=self.setup.resolved,
            schedule=asdict(controller.schedule),
            row_space=controller.space.describe(),
            versions=versions(),
            world=comm.world() if self.loop.every_row else controller.shape.world,
            global_batch=controller.shape.global_batch,
            run=self._run,
            forecast=passes_by_label(_forecast(self.setup, self.loop)),
        )
        self._logged = step
        if resumed is not None:
            self.recorder.resumed(step=step, checkpoint=str(resumed), **self._extended)
        self.recorder.rows_known(controller.space, self._moved)

    # -- during training ------------------------------------------------------------------------

    def step(self, index: int) -> Step | None:
        """Return the micro-batches of optimizer step ``index``, deciding a plan if one is due (collective).

        None after the last step, or where the data ran out (``at_cap: stop``).
        """
        ledger, decides = self.controller.ledger, self.controller.decides_at(index)
        if ledger is not None and index < self.total_steps:
            ledger.before(index, decides=decides and self.mixer is not None and self.mixer.requires().ledger)
            before = self.controller.plan
            if decides and before is not None and thinned(before.interval.index + 1, _LEDGERS):
                self._write_ledger(index)
        plan = self._plan(index)
        if plan is None:
            return None
        assert self.feed is not None
        loop, loss = self.loop, self._loss
        if loss.reference is not None:
            with self.clock.phase("reference"):
                loss.cover(plan, self.total_steps)
        batches = self.feed.step(plan, index)
        if loop.count_items is not None:
            num_items = loop.count_items(batches)
        else:
            num_items = torch.stack([counted_tokens(batch["labels"]).sum() for batch in batches]).sum()
            if loop.counts_over_ranks:
                num_items = comm.gather_sum(num_items.to(loop.device))
        if loss.weighter is not None and loss.weighter.active(index, self.total_steps):
            self.controller.prepare(loss.weighter, index)
        if self.weighs or loop.count_items is None:
            drawn = self.controller.drawn_at(index)
            loss.begin_step(batches, num_items, loop.device, index=index, total=self.total_steps, drawn=drawn)
        self._step, self._micro = Step(index=index, batches=batches, num_items=num_items), 0
        return self._step

    def serve(self, index: int, batches: list[Any]) -> None:
        """Note the micro-batches of optimizer step ``index``, which a stock run serves; they hold their rows' ids."""
        for batch in batches:
            self.controller.totals.note(batch[ROWS])
        self._step, self._micro = Step(index=index, batches=batches, num_items=None), 0

    def rows(self, index: int) -> list[Rows] | None:
        """Return the row ids of this rank's micro-batches of a step, for loops that make batches by themselves."""
        plan = self._plan(index)
        return None if plan is None else plan.shard(index, self.loop.shape)

    def _plan(self, index: int) -> Any:
        controller = self.controller
        if index < self.total_steps:
            plan = controller.plan_for(index)
            if controller.ends_at is not None:
                self.total_steps = min(self.total_steps, controller.ends_at)
        return plan if index < self.total_steps else None

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Enter this around the forward pass of a micro-batch; it keeps hidden states that a weighter asks for."""
        step = self._step
        if step is not None and self._micro < len(step.batches):
            for listener in self.controller.listeners:
                listener.take(step.index)
                listener.begin(step.batches[self._micro], self.loop.device)
            self._micro += 1
        spec = self._loss.embedding
        if spec is None:
            yield
            return
        with capture_hidden(model_parts(self.loop.model), spec.layer) as self._hidden:
            yield

    def loss(self, batch: dict[str, Any], logits: torch.Tensor) -> torch.Tensor:
        """Return the loss of one micro-batch of the step, ready for ``backward`` (collective where it is weighed).

        Summed over micro-batches it is the loss of the step.

        Args:
            batch: The collated micro-batch as it was served, on the device of the logits.
            logits: [R, T, V].
        """
        hidden, self._hidden = (self._hidden[-1] if self._hidden else None), []
        loss = self._loss.loss(batch, logits, hidden)
        return loss * self.loop.shape.world if self.loop.averages else loss

    def note(self, batch: dict[str, Any], loss: torch.Tensor) -> None:
        """Note the losses of the domains in a micro-batch whose ``loss`` the loop made itself, before ``backward``."""
        if self.tells_losses:
            self._loss.note(batch, loss)

    def end_step(self) -> None:
        """Give the mixer the losses of the domains in the step, before the learning rate changes (collective)."""
        if self._step is not None:
            for listener in self.controller.listeners:
                listener.take(self._step.index)
                listener.end_step()
        if self._loss.observes:
            assert self._step is not None
            proportions = self.controller.proportions_at(self._step.index)
            self._loss.end_step(proportions, float(self.loop.learning_rate()))

    def rollouts(self, index: int, rows: Rows, rewards_PG: Any, lengths_PG: Any, truncated_PG: Any) -> RolloutStats:
        """Return the rewards of generation ``index``: those of the answers to each of the prompts ``rows`` [P]."""
        space = self.setup.rows
        return RolloutStats(
            rows=rows,
            rewards_PG=np.asarray(rewards_PG, dtype=np.float64),
            lengths_PG=np.asarray(lengths_PG, dtype=np.int64),
            truncated_PG=np.asarray(truncated_PG, dtype=np.bool_),
            domains_P=space.domains.domain_of[rows].astype(np.int64),
            names=space.domains.names,
            num_rows=space.num_rows,
            step=index,
        )

    def observe_rollouts(self, stats: RolloutStats) -> NDArray[np.bool_]:
        """Give the rewards of a generation, equal on every rank, to the methods, and record them.

        A generation that a resumed run made once more, since it began inside it, was observed before.

        Returns:
            The groups that are trained on [P].
        """
        account = self.controller.rollouts
        assert account is not None, "only stage rl has rewards"
        with self.clock.phase("decide"), preserve_state(self.loop.model):
            new = stats.step >= account.next_step
            for method in (self.selector, self.mixer):
                if new and method is not None:
                    method.observe_rollouts(stats)
            kept = stats.informative if self.selector is None else self.selector.keeps(stats)
            if new:
                account.take(stats, kept)
        self.recorder.rolled_out(stats.step + 1, account.line)
        return kept

    def updated(self, step: int) -> None:
        """Tell that the optimizer has made its ``step``-th update, for an average of the weights."""
        if self.average is not None:
            self.average.take(step)

    def scalars(self, step: int) -> dict[str, float]:
        """Return our numbers after ``step`` optimizer steps and start their sums again (collective)."""
        if self.config.stock:
            self._passes_so_far()
        return self._numbers(step)

    def _numbers(self, step: int) -> dict[str, float]:
        of_losses = self._loss.scalars()
        known = {name.partition("/")[2] for name in of_losses if name.startswith("loss/")}
        found = {**self.controller.scalars(step, known), **of_losses}
        return {f"dataflex/{name}": value for name, value in found.items()}

    def log(
        self, step: int, logs: Mapping[str, float], show: Callable[[dict[str, float]], None] = lambda _: None
    ) -> dict[str, float]:
        """Record a loop's numbers after ``step`` optimizer steps together with ours (collective).

        ``show`` is called with what belongs into the log, which is returned: without the numbers of single domains
        where these are very many.
        """
        costs, ours = self._costs(), self._numbers(step)
        many = len(self.setup.rows.domains.names) > LOGGED_DOMAINS
        found = {**logs, **{name: value for name, value in ours.items() if not many or name.count("/") == 1}}
        show(found)
        self._logged = step
        told = {"no_loss_by_domain": self._loss.missing} if self._loss.missing else {}
        self.recorder.stepped(step, {**found, **ours, **told, **costs})
        return found

    def _costs(self) -> dict[str, Any]:
        """Return the passes so far by phase, and all of them in forward passes of one token (collective)."""
        passes = self._passes_so_far()
        return {"passes": passes, "compute": compute(passes, self._passes.backward_cost)}

    def _passes_so_far(self) -> dict[str, float]:
        """Return the passes so far by phase, and add up the rows that ranks of a stock run noted (collective)."""
        passes, noted = self._passes.totals(self.controller.totals.noted)
        self.controller.totals.settle(noted)
        return passes

    # -- checkpoints -----------------------------------------------------------------------------

    @contextmanager
    def checkpoint(self, folder: Path | str, step: int) -> Iterator[None]:
        """Write a checkpoint after ``step`` optimizer steps: the loop's files inside, ours after them (collective).

        It counts once the block has ended; killed before, the folder holds a broken one, which ``start`` refuses.
        """
        with self.clock.phase("checkpoint"):
            self.begin_checkpoint(Path(folder))
            yield
            self.save(Path(folder), step)
        self.seal_checkpoint(step)

    def begin_checkpoint(self, folder: Path) -> None:
        """Empty the folder before any rank writes into it (collective)."""
        self._unsealed = (folder, self.clock.spent().get("checkpoint", 0.0))
        if self._writes:
            checkpoints.begin(folder)
        comm.barrier()

    def save(self, folder: Path, step: int, since_log: Mapping[str, Any] | None = None) -> None:
        """Write plan and states after ``step`` optimizer steps into a checkpoint's folder (collective).

        ``since_log`` is what the loop summed up since its last log.
        """
        loss = self._loss
        for listener in self.controller.listeners:
            listener.gather()
        if loss.row_weights is not None:
            loss.row_weights.gather()
        if self.controller.plan is not None:
            self.controller.totals.count(self.controller.plan, step)
        summed = {**(since_log or {}), "reweighter": loss.since_log()}
        passes = self._passes_so_far()
        if self._writes:
            state = {
                "controller": self.controller.state_dict(),
                "weighter": check_state(loss.weighter) if loss.weighter else {},
                "row_weights": loss.row_weights.state_dict() if loss.row_weights is not None else {},
                "reference": loss.reference.state_dict() if loss.reference is not None else {},
                "seconds": self.clock.totals(),
                "passes": passes,
                "since_log": summed,
                "average": self.average.state_dict() if self.average is not None else {},
            }
            if self._rows is None:
                self._rows = saved.write_rows(self.loop.output_dir / checkpoints.FOLDER, self.setup.rows)
            saved.save(folder, self._identity, self.controller.plan, state, step, self._rows)
            self._write_outcome()
            self._write_weights(step)
            self._write_ledger(step, rows=True)
        comm.barrier()  # trainer_state.json tells other tools that a checkpoint is complete: every rank is done by then

    def restore_since_log(self) -> Mapping[str, Any] | None:
        """Return the loop's sums since the last log, as it gave them to ``save``, once; ours are taken back already."""
        found, self.since_log = self.since_log, None
        return found

    def seal_checkpoint(self, step: int, rotate: Callable[[Path], None] | None = None) -> bool:
        """Seal the checkpoint that was begun, so that it counts, and then remove older ones by ``rotate`` (collective).

        Return whether there was one.
        """
        if self._unsealed is None:
            return False
        (folder, before), self._unsealed = self._unsealed, None
        with self.clock.phase("checkpoint"):
            comm.barrier()  # every rank has written its part
            if self._writes:
                checkpoints.seal(folder, run=self._run, every_hash=self.config.checkpoint_hash == "full")
                if rotate is not None:
                    rotate(folder)
        self.recorder.checkpointed(step, folder.name, self.clock.spent()["checkpoint"] - before)
        return True

    # -- the end ---------------------------------------------------------------------------------

    def finish(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the end of training after ``step`` optimizer steps, with its metrics (collective)."""
        self.settle(step)
        if step > self._logged:
            self.log(step, {})  # what was served since the loop's last log
        if self._loss.row_weights is not None:
            self._loss.row_weights.gather()
        seconds = {**dict.fromkeys(_TRAINING, 0.0), **self.clock.totals()}
        self.recorder.finished(step, dict(metrics), seconds, self._costs())
        if comm.rank() == 0:
            self._write_outcome(ended=True)
            self._write_weights(step)
        self.recorder.refresh(now=True)
        self.clock.switch(OTHER)

    def settle(self, step: int) -> None:
        """Close the ledger after ``step`` optimizer steps, while the model is as they left it (collective)."""
        if self.controller.ledger is not None and self.controller.ledger.settle(step):
            self._write_ledger(step, rows=True)

    def close(self) -> None:
        """End the processes that collate, and stop listening; nothing is served afterwards."""
        with suppress(DataError):  # what ended the run is told first
            self.recorder.refresh(now=True)
        if self.began:
            self._passes.close()
            if self.feed is not None:
                self.feed.close()
            for listener in self.controller.listeners:
                listener.end_step()
            if self.controller.ledger is not None:
                self.controller.ledger.close()

    def _write_outcome(self, *, ended: bool = False) -> None:
        """Write the proportions that a mixer has found so far, if it gives any; at the end log its warning."""
        found = None if self.mixer is None else self.mixer.outcome()
        if found is not None:
            write_proportions(self.loop.output_dir / checkpoints.FOLDER / f"{self.mixer.name}.json", found)
            if ended and "warning" in found.details:
                logger.warning("%s: %s", self.mixer.name, found.details["warning"])

    def _write_ledger(self, step: int, *, rows: bool = False) -> None:
        """Record what the ledger says after ``step`` optimizer steps, and with ``rows`` the credit of each row."""
        ledger = self.controller.ledger
        if comm.rank() == 0 and ledger is not None and (told := ledger.described()):
            self.recorder.credited(step, told, ledger.table() if rows else None)

    def _write_weights(self, step: int) -> None:
        """Write the rows of largest and smallest weight so far, with their text, if any were weighed."""
        weighed = self._loss.row_weights
        if weighed is None or not len(weighed):
            return
        dataset, domains = _dataset(self.setup, self.loop), self.setup.rows.domains
        most, least = (describe_rows(rows, dataset, self.loop.tokenizer, domains) for rows in weighed.extremes(SAMPLES))
        self.recorder.weighed(
            step, most=most, least=least, rows=len(weighed), table=weighed.table(self.setup.rows.fingerprint)
        )


def _dataset(setup: Setup, loop: Loop) -> Any:
    return setup.rows.dataset if loop.dataset is None else loop.dataset


def signal_runner(setup: Setup, loop: Loop, seed: int) -> SignalRunner:
    """Return the runner of signals about the loop's model and the set-up's rows."""
    space, options = setup.rows, setup.config.signals
    longest = max(
        int(corpus.max(initial=1)) for corpus in (space.lengths, *(t.lengths for t in space.targets.values()))
    )
    access = ModelAccess(
        model=loop.model,
        collate=loop.score_collate or loop.collate,
        autocast=loop.autocast,
        device=loop.device,
        token_budget=max(loop.shape.micro_batch_size, loop.score_rows) * longest,
        gradient_tokens=loop.shape.micro_batch_size * longest,  # the memory for which training needs too
        one_by_one=loop.joined and setup.packed,
        train=Corpus(dataset=_dataset(setup, loop), lengths=space.lengths, identity=space.fingerprint),
        targets=space.targets,
        seed=seed,
        tokenizer=loop.tokenizer,
        optimizer=loop.optimizer,
        learning_rate=loop.learning_rate,
        backend="zero" if loop.sharding in ("zero", "zero3") else "plain",
        release=loop.release,
        preferences=loop.preferences,
    )

    @cache
    def around(name: str) -> dict[str, Any]:
        corpus, pairs = access.corpus(name or None), access.preferences
        collate = access.collate if pairs is None else pairs.collate
        return surroundings(
            corpus.dataset, len(corpus.lengths), collate, access.tokenizer, access.autocast, access.device
        )

    kept = SignalCache(
        max_age_steps=options.max_age_steps,
        store=None if options.store is None else ArrayStore(options.store),
        store_bytes=int(options.store_gb * 1e9),
        model_identity=lambda: model_identity(loop.model),
        surroundings=around,
    )
    return SignalRunner(access=replace(access, work=kept.work if kept.store is not None else None), cache=kept)


def _forecast(setup: Setup, loop: Loop) -> Forecast:
    """Return what is known of the run now that its rows are."""
    space = setup.rows
    return Forecast(
        dynamic=setup.config,
        batch=loop.shape,
        counts=dict(zip(space.domains.names, space.domains.num_rows.tolist(), strict=True)),
        packs=False,
        rows=space.num_rows,
        steps=loop.total_steps,
        targets={name: len(target.lengths) for name, target in space.targets.items()},
        row_passes=row_passes(setup.stage, compares=loop.preferences is None or loop.preferences.loss.compares),
    )


def _open_reference(setup: Setup, loop: Loop, access: ModelAccess) -> Any:
    """Return the reference model's token losses, or None when no method asks for them (collective)."""
    reference = setup.config.requires.reference
    if reference is None:
        return None
    from dataflex.train.reference import ReferenceLosses

    store, whole = loop.output_dir / checkpoints.FOLDER / "reference", _forecast(setup, loop).serves_all_again
    with setup.clock.phase("reference"):
        return ReferenceLosses(reference.folder, access, store=store, cached=reference.cached, whole=whole)


def refuse_unsupported(loop: Loop, config: DynamicConfig, facts: RunFacts) -> None:
    """Raise UnsupportedError for parallelism or ranks that plans cannot serve.

    ConfigError where a method requires more than ``facts``, and whole parameters of the loop, give.
    """
    partitioned = {"zero3": ZERO3, "fsdp": "FSDP", "fsdp2": FSDP2}.get(loop.sharding, "")
    if lacking := [*unmet(config, replace(facts, partitioned=partitioned))]:
        raise ConfigError(lacking)
    if not partitioned and is_partitioned(loop.model):
        raise UnsupportedError(
            f"the model's parameters are partitioned over ranks: name by what, Loop(sharding=...), "
            f"one of zero3, fsdp and fsdp2 (found {loop.sharding})"
        )
    if loop.joined and loop.score_collate is None:
        raise UnsupportedError("Loop(joined=True): give it a score_collate that pads rows, or takes single packs")
    for what, size in loop.parallel.items():
        if size > 1:
            raise UnsupportedError(f"{what} parallelism of size {size}: only data-parallel ranks are supported")
    if loop.devices > 1:
        raise UnsupportedError("several devices in one process (DataParallel): start one process per device")
    if not loop.every_row and (loop.shape.rank, loop.shape.world) != (comm.rank(), comm.world()):
        raise UnsupportedError(
            f"the batch shape is that of rank {loop.shape.rank} of {loop.shape.world}, and torch.distributed has "
            f"rank {comm.rank()} of {comm.world()}: every rank must be a data-parallel one"
        )


def with_scores(space: RowSpace, config: DynamicConfig) -> RowSpace:
    """Return the row space with the columns of the score files that methods ask for; DataError if not of its rows."""
    found = {
        wanted.name: score_column(read_scores(Path(wanted.file).expanduser()), wanted, space.fingerprint)
        for wanted in config.requires.score_files
    }
    return replace(space, columns={**space.columns, **found}) if found else space


def freeze_gates(model: torch.nn.Module) -> None:
    """Freeze the routers of a mixture-of-experts model; UnsupportedError if it has none."""
    routers = [p for name, p in model.named_parameters() if {"gate", "router"} & set(name.split("."))]
    if not routers:
        raise UnsupportedError("freeze_gate: the model has no router (a module named 'gate' or 'router')")
    for parameter in routers:
        parameter.requires_grad = False
