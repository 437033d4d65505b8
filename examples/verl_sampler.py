"""Decides which prompts verl (0.5.0 to 0.7.1) answers: the class of data.sampler, see docs/other-loops.md."""

from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from omegaconf import OmegaConf
from verl.experimental.dataset.sampler import AbstractCurriculumSampler

from dataflex import BatchShape, Loop, RowSpace, Session


class PromptSampler(AbstractCurriculumSampler):
    """Serves the prompts of one step after the other, each decided after the rewards of the step before."""

    def __init__(self, data_source, data_config):
        own, frame = data_config.sampler, data_source.dataframe
        size = data_config.get("gen_batch_size") or data_config.train_batch_size
        self.out, self.step, self.first, self.saves = Path(own.output_dir), 0, True, False
        self.row_of = {key: row for row, key in enumerate(keys(frame))}
        if len(self.row_of) < len(frame):
            raise ValueError("two prompts of one data_source have the same extra_info.index: number them")
        self.each = len(frame) // size  # steps of an epoch
        tokens = data_source.tokenizer([str(chat) for chat in frame[data_source.prompt_key]])["input_ids"]
        rows = RowSpace.of(Dataset.from_dict({"input_ids": tokens}), domains=frame["data_source"])
        shape = {"micro_batch_size": size, "accumulation": 1, "world": 1, "rank": 0, "drop_last": True}
        told = {"total_steps": own.total_steps, "seed": data_config.get("seed") or 1, "output_dir": self.out}
        here = {"model": torch.nn.Identity(), "device": torch.device("cpu")}  # verl's model lies in other processes
        unused = {"optimizer": lambda: None, "learning_rate": lambda: 0.0, "collate": list}
        loop = Loop(shape=BatchShape(**shape, shuffle=data_config.get("shuffle", True)), **told, **here, **unused)
        self.session = Session.open(OmegaConf.to_container(own.dynamic), rows, loop, stage="rl")

    def __len__(self):
        return len(self.row_of)

    def __iter__(self):  # the rest of an epoch
        if self.first:
            self.session.start(self.out / f"checkpoint-{self.step}" if self.step else None)
            self.first = False
        while (found := self.session.rows(self.step)) is not None:
            (self.prompts,), self.step = found, self.step + 1
            yield from self.prompts.tolist()
            if self.step % self.each == 0:
                return

    def update(self, batch):
        """Give the rewards of a step to the methods; verl has put its answers into another order."""
        rows = np.array([self.row_of[key] for key in keys(batch.non_tensor_batch)])
        order = np.lexsort((batch.non_tensor_batch["uid"].astype(str), rows)).reshape(len(self.prompts), -1)
        if not (rows[order].T == np.sort(self.prompts)).all():
            raise ValueError("these are not the answers to the prompts that were served")
        scores, mask = batch.batch["token_level_scores"].double(), batch.batch["response_mask"]
        rewards, lengths = scores.sum(-1).numpy()[order], mask.sum(-1).numpy()[order]
        told = rows[order[:, 0]], rewards, lengths, lengths == mask.shape[1]
        self.session.observe_rollouts(self.session.rollouts(self.step - 1, *told))
        self.session.log(self.step, {})
        if self.saves:  # verl saved before it told the rewards
            with self.session.checkpoint(self.out / f"checkpoint-{self.step}", self.step):
                self.saves = False
        if self.step == self.session.total_steps:
            self.session.finish(self.step, {})

    def state_dict(self):
        """Return the step; the session's state is written with the rewards of the step."""
        self.saves = True
        return {"step": self.step}

    def load_state_dict(self, state):
        """Go on after the step; the session's state is read when the first prompt is asked for."""
        self.step = state["step"]


def keys(rows):
    """Return what each row is known by in verl's batches."""
    return [(source, told["index"]) for source, told in zip(rows["data_source"], rows["extra_info"], strict=True)]
