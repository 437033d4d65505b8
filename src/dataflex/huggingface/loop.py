"""What a session needs to know of a Hugging Face Trainer, what that takes for its loader, and how SIGTERM ends one.

Upstream names relied upon, each asserted by ``tests/upstream``: ``_get_num_items_in_batch``,
``compute_loss_context_manager``, ``get_{tp,cp,sp}_size``, ``transformers.TrainerCallback`` and its ``on_train_begin``,
``on_step_end`` and ``on_epoch_end``; of trainers for preferences ``ref_model`` and ``beta``, LLaMA-Factory's
``finetuning_args``, TRL's arguments of the loss and its adapter ``ref``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Sampler
from transformers import TrainerCallback

from dataflex import comm
from dataflex.ending import TermWish
from dataflex.errors import UnsupportedError
from dataflex.plan.plan import BatchShape
from dataflex.signals.identity import frozen_identity, model_identity
from dataflex.signals.preferences import Preferences
from dataflex.signals.specs import PreferenceLoss, losses_unknown
from dataflex.signals.sweep import preserve_state
from dataflex.train.session import Loop, Setup


@contextmanager
def replaced(*changes: tuple[Any, str, Any]) -> Iterator[None]:
    """Set attributes of modules, given as (module, name, value), while inside."""
    before = [(module, name, getattr(module, name)) for module, name, _ in changes]
    for module, name, value in changes:
        setattr(module, name, value)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


@contextmanager
def moments_by_name(trainer: Any) -> Iterator[None]:
    """Have a Trainer load sharded states of FSDP2 into an optimizer that has them, while inside (collective there).

    accelerate loads what the optimizer holds already, by its own numbers of parameters. A new one holds nothing, so
    its moments would stay zero, without a word; and the files name parameters.
    """
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is None or plugin.fsdp_version != 2 or "FULL" in str(plugin.state_dict_type):
        yield
        return
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    named = get_optimizer_state_dict(trainer.model, trainer.optimizer)
    with replaced((trainer.optimizer, "state_dict", lambda: named)):
        yield


def loop_of(trainer: Any, setup: Setup, total_steps: int) -> Loop:
    """Return what a session needs to know of a Trainer, from its arguments, model, data and collator."""
    args = trainer.args
    sharding = sharding_of(trainer)
    return Loop(
        model=trainer.model,
        optimizer=lambda: trainer.optimizer,
        learning_rate=lambda: float(trainer._get_learning_rate()),
        collate=trainer.data_collator,
        shape=BatchShape(
            micro_batch_size=args.train_batch_size,
            accumulation=args.gradient_accumulation_steps,
            world=args.world_size,
            rank=args.process_index,
            drop_last=args.dataloader_drop_last,
            shuffle=setup.shuffle,
        ),
        total_steps=total_steps,
        seed=args.seed,
        device=args.device,
        output_dir=Path(args.output_dir),
        dataset=trainer.train_dataset,
        score_collate=setup.score_collator(trainer.data_collator),
        joined=setup.joined,
        preferences=_preferences(trainer, setup),
        tokenizer=trainer.processing_class,
        autocast=trainer.compute_loss_context_manager,
        score_rows=args.per_device_eval_batch_size,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        prefetch_factor=args.dataloader_prefetch_factor,
        sharding=sharding,
        release=lambda: trainer.model_wrapped.empty_partition_cache() if sharding == "zero3" else None,
        parallel={"tensor": trainer.get_tp_size(), "context": trainer.get_cp_size(), "sequence": trainer.get_sp_size()},
        devices=args.n_gpu,
        writes=args.should_save,
        counts_over_ranks=args.average_tokens_across_devices,
        averages=False,  # the Trainer multiplies by the ranks itself where it counts over them
        count_items=lambda batches: trainer._get_num_items_in_batch(batches, args.device),
    )


def _preferences(trainer: Any, setup: Setup) -> Preferences | None:
    """Return what stage dpo has beside the rows."""
    if setup.pair_collator is None:
        return None

    def identity() -> str:
        given = getattr(trainer, "ref_model", None)
        return frozen_identity(trainer.model) if given is None else model_identity(given)

    return Preferences(
        collate=setup.pair_collator(trainer.data_collator),
        reference=_reference(trainer),
        identity=identity,
        loss=preference_loss(trainer),
    )


def _reference(trainer: Any) -> Callable[[], AbstractContextManager[torch.nn.Module]]:
    """Return what opens the reference of a trainer for preferences: its own model, or the adapters' base."""

    @contextmanager
    def opened() -> Iterator[torch.nn.Module]:
        given = getattr(trainer, "ref_model", None)
        if given is not None:
            model = trainer.accelerator.unwrap_model(given)
            with preserve_state(model):
                yield model.eval()
            return
        model = trainer.model
        if not hasattr(model, "disable_adapter"):
            raise UnsupportedError(f"{type(trainer).__name__} has neither a reference model nor adapters to switch off")
        if "ref" in model.peft_config:  # TRL's copy of an adapter that is trained on
            active = model.active_adapter
            model.set_adapter("ref")
            try:
                yield model
            finally:
                model.set_adapter(active)
            return
        with model.disable_adapter():
            yield model

    return opened


def preference_loss(trainer: Any) -> PreferenceLoss:
    """Return the loss of a trainer for preferences, by LLaMA-Factory's attributes or TRL's.

    TRL smooths labels under its ``robust`` loss alone, LLaMA-Factory under ``sigmoid``.
    """
    beta = float(trainer.beta)
    own = getattr(trainer, "finetuning_args", None)
    if own is not None:
        found = {"pref_loss": own.pref_loss, "pref_bco_weight": own.pref_bco_weight, "ld_alpha": own.ld_alpha}
        smoothing, sft = float(own.dpo_label_smoothing), float(own.pref_ftx)
        gamma, kind = float(own.simpo_gamma), own.pref_loss
    else:
        args = trainer.args
        kinds = args.loss_type if isinstance(args.loss_type, list) else [args.loss_type]
        kind, smoothing, sft, gamma = kinds[0] if len(kinds) == 1 else ", ".join(kinds), 0.0, 0.0, 0.0
        names = ("ld_alpha", "f_divergence_type", "use_weighting", "loss_weights", "reference_free")
        found = {"loss_type": kind, **{name: getattr(args, name, None) for name in names}}
    unknown = next(losses_unknown(found), "")
    if unknown:
        return PreferenceLoss(unknown=unknown)
    return PreferenceLoss(kind=kind, beta=beta, label_smoothing=smoothing, gamma=gamma, sft=sft)


def sharding_of(trainer: Any) -> Literal["none", "zero", "zero3", "fsdp", "fsdp2"]:
    """Return what shards a Trainer's states over ranks."""
    if trainer.is_fsdp_enabled:
        return "fsdp2" if trainer.accelerator.state.is_fsdp2 else "fsdp"
    if not trainer.is_deepspeed_enabled:
        return "none"
    return "zero3" if trainer.accelerator.state.deepspeed_plugin.zero_stage == 3 else "zero"


class _NoBatches(Sampler[list[int]]):
    """``length`` micro-batches by its length, none by iteration."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[list[int]]:
        return iter([])


class EpochShell(DataLoader[int]):
    """What the Trainer takes for its training loader: right lengths, no batches.

    The Trainer counts epochs, steps and examples by it and opens it once per epoch, which draws one
    number from the global random stream, as its own loader would.
    """

    def __init__(self, num_rows: int, num_micro_batches: int) -> None:
        super().__init__(range(num_rows), batch_sampler=_NoBatches(num_micro_batches))


class StopOnTerm(TrainerCallback):
    """Stops training after SIGTERM to any rank, after the same step on every rank.

    Ranks exchange a flag after every step and read that of the step before: no rank waits for the answer, all have the
    same one, and a rank that got the signal late or not at all stops with the others.

    Args:
        device: Device of the flags that ranks exchange.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._wish, self._noted = device, TermWish(), ExitStack()
        self._agreed = False
        self._sent: Any = None  # this rank's flag of the last step, and its exchange

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Note SIGTERM from here on, where there is something to save."""
        told = "[dataflex] SIGTERM: ending after the step in progress, with a checkpoint"
        self._noted.enter_context(self._wish.noted(told if comm.rank() == 0 else ""))

    def over(self) -> None:
        """Give SIGTERM back to its earlier handler."""
        self._noted.close()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop after this step if all ranks know of the signal (collective)."""
        before, self._sent = self._sent, self._send()
        self._agreed = self._agreed or self._read(before)
        if self._agreed:
            control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Skip what is due at the end of an epoch: the run stops in the middle of one."""
        if self._agreed:
            control.should_log = control.should_evaluate = control.should_save = False

    def settle(self) -> bool:
        """Return whether the run was stopped, the same on every rank (collective)."""
        self._agreed = self._read(self._sent) or self._read(self._send()) or self._agreed
        self._sent = None
        return self._agreed

    def _send(self) -> Any:
        flag = torch.tensor(int(self._wish.asked), device=self._device)
        return flag, dist.all_reduce(flag, op=dist.ReduceOp.MAX, async_op=True) if comm.world() > 1 else None

    def _read(self, sent: Any) -> bool:
        if comm.world() == 1:
            return self._wish.asked
        if sent is None:
            return False
        flag, work = sent
        work.wait()
        return bool(flag)
