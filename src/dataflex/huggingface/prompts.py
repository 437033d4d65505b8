"""Which prompts TRL's ``GRPOTrainer`` and ``RLOOTrainer`` generate answers to.

Rows are prompts, and a step of the session is one generation: the prompts of all ranks, each given to the trainer
``num_generations`` times. TRL's loader reads ahead, so its batches are not looked at: prompts are decided when a step
asks for them, after the rewards of the generation before. Rewards are seen where TRL has gathered them over ranks.
Upstream names relied upon: ``_calculate_rewards``, ``_generate_and_score_completions`` and its ``advantages``,
``reward_weights``, ``reward_func_names``, ``num_generations``, ``num_iterations``, ``shuffle_dataset``, ``_step``,
``eos_token_ids``; of the arguments ``steps_per_generation`` and ``generation_batch_size``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from dataflex import comm
from dataflex.errors import ComponentError, DataError, DataFlexError
from dataflex.huggingface.evaluation import EvaluationMixin
from dataflex.huggingface.loop import EpochShell, loop_of
from dataflex.huggingface.trainer import TrainerMixin
from dataflex.method import Rows
from dataflex.plan.plan import BatchShape
from dataflex.plan.rollouts import RolloutStats
from dataflex.record.text import middle
from dataflex.train.row_space import RowSpace
from dataflex.train.session import Loop, Setup

ROW = "row_id"
"""Column of a prompt's row id, which reward functions are given too."""


class PromptMixin(TrainerMixin):
    """Prompts decided during training, for a trainer of TRL that generates answers."""

    _dataflex_prompts: tuple[int, Rows] = (-1, np.zeros(0, dtype=np.int64))  # generation, and its prompts
    _dataflex_dropped: Any = None  # which groups of the generation are left out of the loss [P], if any

    def _dataflex_loop(self, total_steps: int) -> Loop:
        return prompt_loop(self, self.dataflex_setup, total_steps)

    def _dataflex_index(self, step: int) -> int:
        """Return the generation that optimizer step ``step`` trains on."""
        return step // steps_of(self)

    def get_train_dataloader(self) -> Any:
        """Return a loader of the right length and no batches."""
        if self.dataflex_setup.config.total_steps is not None:
            self.args.max_steps = self.dataflex_setup.config.total_steps
        space, shape = self.dataflex_setup.rows, self._dataflex_loop(1).shape
        steps = space.num_rows // shape.global_batch * steps_of(self)
        return EpochShell(space.num_rows, steps * self.args.gradient_accumulation_steps)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        values = super()._init_training_state(*args, **kwargs)
        self._step = self.state.global_step * self.args.gradient_accumulation_steps  # TRL does not save it
        return values

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """Serve this rank's prompts of the generation that the next optimizer step trains on."""
        if self._dataflex_ended_early():
            return [], None
        each, index = steps_of(self), self._dataflex_index(self.state.global_step)
        found = self.dataflex.rows(index)
        self.state.max_steps = min(self.state.max_steps, self.dataflex.total_steps * each)
        if found is None:
            self.control.should_training_stop = True
            return [], None
        (rows,) = found
        self._dataflex_prompts, self._dataflex_left = (index, rows), num_batches
        kept = {row: {**self.train_dataset[row], ROW: row} for row in set(rows.tolist())}
        batch = [dict(kept[row]) for row in self._dataflex_own(np.repeat(rows, self.num_generations)).tolist()]
        return [batch] * num_batches, None

    def _dataflex_own(self, values: Any) -> Any:
        """Return this rank's part of what there is for every answer."""
        size = len(values) // self.args.world_size
        return values[self.args.process_index * size : (self.args.process_index + 1) * size]

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Return the trainer's own loss, in training and in evaluation."""
        return super(EvaluationMixin, self).compute_loss(*args, **kwargs)

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids: Any) -> Any:
        """Return the rewards of all ranks' answers [P G, functions], and let the methods see them."""
        try:
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids)
        except DataFlexError:
            raise
        except Exception as error:
            names = ", ".join(self.reward_func_names)
            told = f"a reward function ({names}) raised {type(error).__name__}: {error}"
            raise ComponentError(f"{told}; it must return a number for each answer, or None") from error
        if self.model.training:
            self._dataflex_observe(inputs, completion_ids, rewards)
        return rewards

    def _dataflex_observe(self, inputs: Any, completion_ids: Any, rewards: Any) -> None:
        """Give the groups' rewards to the methods (collective)."""
        ends = set(getattr(self, "eos_token_ids", None) or [self.processing_class.eos_token_id])
        cut = [bool(ids) and ids[-1] not in ends and len(ids) >= self.max_completion_length for ids in completion_ids]
        told = [[row[ROW], len(ids), int(was)] for row, ids, was in zip(inputs, completion_ids, cut, strict=True)]
        gathered, _ = comm.gather_rows(torch.tensor(told, device=rewards.device), equal=True)
        ids, lengths, truncated = gathered.cpu().numpy().reshape(-1, self.num_generations, 3).transpose(2, 0, 1)
        index, rows = self._dataflex_prompts
        if not np.array_equal(ids, np.repeat(rows[:, None], self.num_generations, axis=1)):
            raise ComponentError("the rewards are not those of the prompts that were served: answers were reordered")
        each = rewards.double() * self.reward_weights.to(rewards.device).double()
        total = each.nansum(dim=1).masked_fill(rewards.isnan().all(dim=1), torch.nan)
        stats = self.dataflex.rollouts(index, rows, total.cpu().numpy().reshape(ids.shape), lengths, truncated)
        if np.isinf(stats.rewards_PG).any():
            names = ", ".join(self.reward_func_names)
            raise DataError(f"reward functions ({names}): a reward is infinite, and so are advantages; return a number")
        if index == 0 and not stats.scored_PG.any(axis=1).all():
            self._dataflex_refuse_unscored(stats)
        kept = self.dataflex.observe_rollouts(stats)
        dropped = stats.informative & ~kept
        self._dataflex_dropped = dropped if dropped.any() else None

    def _dataflex_refuse_unscored(self, stats: RolloutStats) -> None:
        row = int(stats.rows[~stats.scored_PG.any(axis=1)][0])
        prompt = middle(str(self.train_dataset[row].get("prompt")), 60)
        raise DataError(
            f"reward functions ({', '.join(self.reward_func_names)}): none of the {self.num_generations} answers to "
            f"row {row} ({prompt!r}) got a reward, only None or NaN; return a number, or remove the prompt"
        )

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        """Generate and score as stock; groups that a selector drops get advantages of 0."""
        self._dataflex_dropped = None
        found = super()._generate_and_score_completions(inputs)
        if self._dataflex_dropped is not None:
            dropped = self._dataflex_own(np.repeat(self._dataflex_dropped, self.num_generations))
            found["advantages"][torch.from_numpy(dropped).to(found["advantages"].device)] = 0.0
        return found


def steps_of(trainer: Any) -> int:
    """Return the optimizer steps that are trained on one generation."""
    args = trainer.args
    return args.steps_per_generation * trainer.num_iterations // args.gradient_accumulation_steps


def prompt_loop(trainer: Any, setup: Setup, total_steps: int) -> Loop:
    """Return what a session needs to know of a trainer of prompts, whose steps are generations."""
    args = trainer.args
    shape = BatchShape(
        micro_batch_size=args.generation_batch_size // trainer.num_generations,
        accumulation=1,
        world=1,
        rank=0,
        drop_last=True,
        shuffle=trainer.shuffle_dataset,
    )
    total = -(-total_steps // steps_of(trainer))
    # The data set is that of the measured prompts, which has their tokens.
    return replace(loop_of(trainer, setup, total), shape=shape, dataset=None, num_workers=0, every_row=True)


def prompt_problems(trainer: Any, config: Any) -> Iterator[str]:
    """Yield what of a trainer of prompts cannot be served."""
    args, rows = trainer.args, trainer.train_dataset
    micro, accumulation = args.steps_per_generation * trainer.num_iterations, args.gradient_accumulation_steps
    if trainer.num_generations < 2:
        yield f"num_generations: {trainer.num_generations}; a group of one answer has no advantage, give 2 or more"
    elif args.generation_batch_size % trainer.num_generations:
        yield (
            f"num_generations: {trainer.num_generations} does not divide generation_batch_size "
            f"({args.generation_batch_size})"
        )
    elif isinstance(rows, Dataset) and len(rows) * trainer.num_generations < args.generation_batch_size:
        wanted = args.generation_batch_size // trainer.num_generations
        yield f"train_dataset: {len(rows)} prompts, and one generation takes {wanted}; lower generation_batch_size"
    if micro % accumulation:
        yield (
            f"steps_per_generation: {args.steps_per_generation} x num_iterations {trainer.num_iterations} micro-batches"
            f" are no whole optimizer step of {accumulation} (gradient_accumulation_steps); make them a multiple"
        )
    elif config.average_weights is not None and micro != accumulation:
        yield "dynamic.average_weights: one generation must be one optimizer step; remove it"
    if config.stock:
        yield "dynamic.record: a run without a method is not recorded here; write 'selector: all'"
    if isinstance(rows, Dataset) and ROW in rows.column_names:
        yield f"train_dataset: its column {ROW!r} is the name of ours; rename it"
    if isinstance(rows, Dataset) and "prompt" not in rows.column_names:
        yield f"train_dataset: has no column 'prompt' (found: {', '.join(rows.column_names)})"


def prompt_space(trainer: Any, rows: Dataset, **given: Any) -> RowSpace:
    """Return the row space of prompts: their tokens as the trainer's tokenizer makes them, all of which count."""
    processing = trainer.processing_class
    tokenizer = getattr(processing, "tokenizer", processing)

    def text(prompt: Any) -> str:
        if isinstance(prompt, str):
            return prompt
        return str(processing.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True))

    def tokens(batch: dict[str, Any]) -> dict[str, Any]:
        found = tokenizer([text(prompt) for prompt in batch["prompt"]], add_special_tokens=False)["input_ids"]
        return {"input_ids": [ids or [0] for ids in found]}

    made = rows.select_columns(["prompt"]).map(tokens, batched=True, remove_columns=["prompt"], keep_in_memory=True)
    return RowSpace.of(made, **given)
