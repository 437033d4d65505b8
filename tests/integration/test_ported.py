"""Classes that users wrote for existing DataFlex, in files of their own: one of each kind trains, and resumes."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from dataflex.record.read import load_plan

CLASSES = '''
import numpy as np
import torch
from dataflex.core.registry import register_mixer, register_reorder, register_selector, register_weighter
from dataflex.train.mixer.base_mixer import Mixer
from dataflex.train.reorder.base_reorder import Reorder
from dataflex.train.selector.base_selector import Selector
from dataflex.train.weighter.base_weighter import Weighter
from dataflex.utils.logging import logger


@register_selector("by_turns")
class ByTurns(Selector):
    """Takes long rows, from where it stopped."""

    def __init__(self, dataset, accelerator, data_collator, cache_dir, least: int = 0):
        super().__init__(dataset, accelerator, data_collator, cache_dir)
        self.least, self.turn = least, 0

    def select(self, model, step_id: int, num_samples: int, **kwargs):
        assert not next(model.parameters()).is_meta and self.accelerator.num_processes >= 1
        rows = [row for row in range(len(self.dataset)) if len(self.dataset[row]["input_ids"]) >= self.least]
        self.turn += 1
        logger.info("step %d, turn %d", step_id, self.turn)
        start = (self.turn - 1) * num_samples
        return [rows[(start + i) % len(rows)] for i in range(num_samples)]


@register_mixer("drawn")
class Drawn(Mixer):
    def mix(self, model, step_id: int, **kwargs) -> np.ndarray:
        shares = np.random.random(len(self.mixture_manager.names))
        return shares / shares.sum()


@register_reorder("backwards")
class Backwards(Reorder):
    def __init__(self, dataset=None, **kwargs):
        super().__init__(**kwargs)
        self.dataset, self.place = dataset, 0

    def next_indices(self, model, step_id: int, num_samples: int, **kwargs):
        first, self.place = self.place, self.place + num_samples
        return [len(self.dataset) - 1 - i % len(self.dataset) for i in range(first, first + num_samples)]


@register_weighter("soft")
class Soft(Weighter):
    def __init__(self, temperature: float = 1.0, **kwargs):
        super().__init__(**kwargs)
        self.temperature = temperature

    def get_weighted_loss(self, losses, *, ctx=None, model=None, inputs=None):
        if not torch.is_tensor(losses) or losses.dim() == 0:
            return losses
        weights = torch.softmax(losses.detach() / self.temperature, dim=0)
        return torch.sum(weights * losses) * (1 + ctx.state.global_step)
'''

COMPONENTS = """
selectors: {mine: {name: by_turns, file: mine.py, params: {cache_dir: x, least: 8}}}
mixers: {mine: {name: drawn, file: mine.py}}
reorders: {mine: {file: mine.py, params: {kind: backwards}}}
weighters: {mine: {name: soft, file: mine.py, params: {temperature: 0.5}}}
"""


@pytest.fixture
def flat(run):
    (run.folder / "mine.py").write_text(CLASSES)
    (run.folder / "components.yaml").write_text(COMPONENTS)
    steps = {"warmup_step": 1, "update_step": 2, "update_times": 3, "num_train_epochs": 1.0, "save_steps": 2}
    return {"components_cfg_file": "components.yaml", "component_name": "mine", "save_strategy": "steps", **steps}


def rows_of(outcome):
    plans = [event for event in outcome.events if event["event"] == "planned"]
    return [load_plan(outcome.folder, event["interval"]).rows.tolist() for event in plans]


CASES = {
    "dynamic_select": {"dataset": "ones"},
    "dynamic_mix": {"dataset": "alpha,beta"},
    "dynamic_reorder": {"dataset": "ones"},
    "dynamic_weight": {"dataset": "alpha", "warmup_step": 0, "train_step": 4, "per_device_train_batch_size": 4},
}


@pytest.mark.parametrize("kind", CASES)
def test_a_class_trains_and_resumes(run, flat, kind, lengths_of):
    settings = {**flat, **CASES[kind], "train_type": kind}
    straight = run("straight", **settings)
    steps = 4 if kind == "dynamic_weight" else 7
    assert len(straight.series()) == steps
    rows = rows_of(straight)
    if kind == "dynamic_select":
        long = [row for row, length in enumerate(lengths_of("ones")) if length >= 8]
        assert [row for part in rows[1:] for row in part] == [long[i % len(long)] for i in range(12)]
    elif kind == "dynamic_reorder":
        assert [row for part in rows for row in part] == [36 - i for i in range(14)]
    elif kind == "dynamic_mix":
        shares = [list(e["proportions"].values()) for e in straight.events if e["event"] == "planned"]
        assert len({tuple(each) for each in shares}) == 4
    folder = run.folder / "resumed"
    for part in ("checkpoint-4" if steps > 4 else "checkpoint-2", "dataflex"):
        shutil.copytree(straight.folder / part, folder / part)
    resumed = run("resumed", **settings, resume_from_checkpoint=str(next(folder.glob("checkpoint-*"))))
    assert resumed.series() == straight.series()
    assert rows_of(resumed) == rows
    ours, theirs = resumed.weights(), straight.weights()
    assert all(np.array_equal(ours[name], value) for name, value in theirs.items())


@pytest.fixture
def lengths_of(run):
    def lengths(name):
        from datasets import load_from_disk

        run("copied", dataset=name, tokenized_path=str(run.folder / "copy"), max_steps=1, train_type=None)
        return [len(row["input_ids"]) for row in load_from_disk(str(run.folder / "copy"))["train"]]

    return lengths


def test_weights_are_the_derivatives_of_the_loss(run, flat):
    """Steps are micro-batches of four rows, nothing is learnt: the loss is theirs of the rows' losses."""
    settings = {**CASES["dynamic_weight"], "learning_rate": 0.0, "dataset": "alpha", "train_step": 3}
    ours = run("ours", **{**flat, **settings}, train_type="dynamic_weight").series()
    alone = {"dataset": "alpha", "learning_rate": 0.0, "per_device_train_batch_size": 1, "max_steps": 12}
    each = np.array(run("alone", **alone).series()).reshape(3, 4)
    weights = np.exp(each / 0.5) / np.exp(each / 0.5).sum(axis=1, keepdims=True)
    assert ours == pytest.approx(((weights * each).sum(axis=1) * [1, 2, 3]).tolist(), rel=1e-4)
