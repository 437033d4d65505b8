"""The sampler for verl, under a stand-in of its trainer's loop: verl itself needs GPUs, and is not installed here.

The stand-in does what verl 0.5.0 to 0.7.1 do, in their order: torchdata's loader, repeated prompts, answers put into
another order, the loader's state saved before the sampler is told the rewards.
"""

from __future__ import annotations

import copy
import importlib.util
import re
import sys
import types
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from omegaconf import OmegaConf
from torch.utils.data import Sampler
from torchdata.stateful_dataloader import StatefulDataLoader

from dataflex.errors import CheckpointError
from dataflex.record.read import read_events
from tests.docs.pages import EXAMPLES, TEXTS

MODULE = "verl.experimental.dataset.sampler"
STEPS, BATCH, ANSWERS, ROWS = 10, 4, 4, 20


@pytest.fixture
def sampler_class(monkeypatch):
    for name in ("verl", "verl.experimental", "verl.experimental.dataset", MODULE):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[MODULE].AbstractCurriculumSampler = type("AbstractCurriculumSampler", (Sampler,), {})
    spec = importlib.util.spec_from_file_location("verl_sampler", EXAMPLES / "verl_sampler.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.PromptSampler


class Prompts(torch.utils.data.Dataset):
    """Prompts of two files, each numbered from 0."""

    prompt_key = "prompt"

    def __init__(self, indices=range(ROWS // 2)):
        sources = ("a", "b")
        self.dataframe = Dataset.from_list(
            [
                {"prompt": [{"role": "user", "content": f"{i}?"}], "data_source": source, "extra_info": {"index": i}}
                for source in sources
                for i in indices
            ]
        )

    @staticmethod
    def tokenizer(texts):
        return {"input_ids": [[*text.encode()] for text in texts]}

    def __len__(self):
        return len(self.dataframe)

    def __getitem__(self, row):
        return self.dataframe[row]


def made(sampler_class, out, prompts=None):
    shown = re.findall(r"^    \+?data\.(sampler\..+)$", TEXTS["docs/other-loops.md"], re.MULTILINE)
    own = [line.removesuffix(" \\").replace('"', "") for line in shown]
    config = OmegaConf.from_dotlist([*own, f"sampler.total_steps={STEPS}", f"sampler.output_dir={out}"])
    assert (EXAMPLES / Path(config.sampler.class_path).name).is_file()
    assert config.sampler.class_name == sampler_class.__name__
    config.update(train_batch_size=BATCH, shuffle=True, seed=None)
    prompts = prompts or Prompts()
    sampler = sampler_class(data_source=prompts, data_config=config)
    loader = StatefulDataLoader(prompts, BATCH, sampler=sampler, num_workers=0, drop_last=True, collate_fn=list)
    return sampler, loader


def fit(loader, done=0, save=None):
    """Train as verl does; return the prompts of each step and the loader's state at step ``save``."""
    step, served, state, draws = done + 1, [], None, np.random.default_rng(done)
    for _ in range(done // len(loader), STEPS // len(loader) + 1):
        for rows in loader:
            rows = [{**row, "uid": str(uuid.uuid4())} for row in rows]
            served.append([number(row) for row in rows])
            answers = [(row, i) for row in rows for i in range(ANSWERS)]
            answers = [answers[i] for i in draws.permutation(len(answers))]
            if step == save:
                state = copy.deepcopy(loader.state_dict())
            loader.sampler.update(batch=batch_of(answers))
            step += 1
    return served, state


def number(row):
    return row["extra_info"]["index"] + ROWS // 2 * (row["data_source"] == "b")


def batch_of(answers):
    """Return verl's batch of answers: every third prompt is never right, the others every other time."""
    scores = torch.zeros(len(answers), 3)
    scores[:, -1] = torch.tensor([float(number(row) % 3 > 0 and i % 2 > 0) for row, i in answers])
    mask = torch.tensor([[1, 1, i % 2] for _, i in answers])
    told = {key: [row[key] for row, _ in answers] for key in ("uid", "data_source", "extra_info")}
    return types.SimpleNamespace(
        batch={"token_level_scores": scores, "response_mask": mask},
        non_tensor_batch={key: np.array(values, dtype=object) for key, values in told.items()},
    )


@pytest.mark.parametrize("save", [3, 5])  # inside an epoch, and at its end
def test_prompts_follow_their_rewards_and_go_on_from_the_loader_s_state(sampler_class, tmp_path, save):
    sampler, loader = made(sampler_class, tmp_path)
    served, state = fit(loader, save=save)
    counts = np.bincount(np.concatenate(served), minlength=ROWS)
    selector = sampler.session.selector
    assert [len(rows) for rows in served] == [BATCH] * STEPS
    assert (selector.alpha > 1.0).tolist() == ((counts > 0) & (np.arange(ROWS) % 3 > 0)).tolist()
    assert (selector.beta > 1.0).tolist() == (counts > 0).tolist()
    events = read_events(tmp_path / "dataflex")
    rolled = [event for event in events if event["event"] == "rolled_out"]
    assert [event["informative"] for event in rolled] == [sum(row % 3 > 0 for row in rows) for rows in served]
    assert {(event["answers"], event["tokens"], event["truncated"]) for event in rolled} == {(16, 40, 8)}
    assert set(rolled[0]["domains"]) <= {"a", "b"}
    assert events[-1]["event"] == "finished"

    again, loader = made(sampler_class, tmp_path)
    loader.load_state_dict(state)
    assert fit(loader, done=save)[0] == served[save:]
    for name in ("alpha", "beta", "updated"):
        assert getattr(again.session.selector, name).tolist() == getattr(selector, name).tolist()


def test_what_cannot_be_served_is_told(sampler_class, tmp_path):
    with pytest.raises(ValueError, match=r"have the same extra_info\.index"):
        made(sampler_class, tmp_path, Prompts([0, 0]))
    sampler, loader = made(sampler_class, tmp_path)
    rows = [{**row, "uid": "one"} for row in next(iter(loader))]
    with pytest.raises(ValueError, match="are not the answers to the prompts that were served"):
        sampler.update(batch_of([(rows[0], i) for i in range(BATCH * ANSWERS)]))
    state = loader.state_dict()  # and the run ended before the rewards of that step were told
    _, loader = made(sampler_class, tmp_path)
    loader.load_state_dict(state)
    with pytest.raises(CheckpointError, match="checkpoint-1 cannot be resumed from"):
        next(iter(loader))
