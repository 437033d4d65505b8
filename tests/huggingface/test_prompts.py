"""TRL's trainers whose rows are prompts: what is generated, learned from rewards, dropped, saved and refused."""

from __future__ import annotations

import runpy
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import dataflex
from dataflex.errors import ComponentError, ConfigError, DataError
from dataflex.record.read import read_events
from tests.huggingface.test_wrap import ROOT, loads, losses, served

trl = pytest.importorskip("trl")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not loads("GRPOTrainer"), reason="this TRL is too old; see make test-trl"),
]

SETTINGS = {
    **{"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_generations": 4, "max_steps": 6},
    **{"max_completion_length": 3, "logging_steps": 1, "save_steps": 4, "learning_rate": 1e-3, "seed": 5},
    **{"bf16": False, "report_to": "none", "use_cpu": True},
}
MOPPS = {"selector": "mopps", "interval_steps": 1}


def half(completions, row_id, **_):
    """Every third prompt is never answered, the others every other time, whatever the answers are."""
    return [float(row % 3 > 0 and i % 2 > 0) for i, row in enumerate(row_id)]


def by_words(completions, **_):
    """A reward of the answers themselves."""
    return [float(len(text) % 2) for text in completions]


def make(folder, out, block=None, name="GRPOTrainer", reward=by_words, rows=24, **changes):
    """Return a trainer of prompts, wrapped where there is a block."""
    cls, settings = getattr(trl, name), getattr(trl, name.replace("Trainer", "Config"))
    if block is not None:
        cls = dataflex.wrap(cls, block, domains="source")
    named = [{"prompt": f"once upon {i} day", "source": "abc"[i % 3], "rate": i / 23} for i in range(rows)]
    return cls(
        model=AutoModelForCausalLM.from_pretrained(folder),
        args=settings(str(out), **{**SETTINGS, **changes}),
        train_dataset=Dataset.from_list(named),
        processing_class=AutoTokenizer.from_pretrained(folder),
        reward_funcs=reward,
    )


def rolled_out(folder):
    return [event for event in read_events(folder / "dataflex") if event["event"] == "rolled_out"]


@pytest.mark.parametrize("name", ["GRPOTrainer", "RLOOTrainer"])
def test_a_neutral_block_gives_the_stock_run(tiny_model, tmp_path, name):
    found = {}
    for which, block in (("stock", None), ("ours", {"selector": "all"})):
        # Four micro-batches of one generation are two optimizer steps.
        trainer = make(
            tiny_model, tmp_path / which, block, name, shuffle_dataset=False, steps_per_generation=4, save_strategy="no"
        )
        trainer.train()
        found[which] = (losses(trainer), [p.detach().clone() for p in trainer.model.parameters()])
    assert found["ours"][0] == found["stock"][0]
    assert all(map(torch.equal, found["ours"][1], found["stock"][1]))
    assert served(tmp_path / "ours").tolist() == list(range(12))
    assert [event["answers"] for event in rolled_out(tmp_path / "ours")] == [16] * 3


@pytest.mark.parametrize("each", [1, 2])
def test_prompts_are_chosen_by_rewards_and_go_on_from_a_checkpoint(tiny_model, tmp_path, each):
    """With two steps a generation the checkpoint is inside one, whose answers are generated once more."""
    settings = {"num_iterations": each, "save_steps": 2 + each, "max_steps": 6 * each}
    whole = make(tiny_model, tmp_path / "out", MOPPS, reward=half, **settings)
    whole.train()
    rows, events = served(tmp_path / "out"), rolled_out(tmp_path / "out")
    selector = whole.dataflex.selector
    counts = np.bincount(rows, minlength=24)
    right = counts * 2.0 * (np.arange(24) % 3 > 0)  # with a discount of 1 these would be the sums
    assert (selector.alpha > 1.0).tolist() == (right > 0).tolist()
    assert (selector.beta > 1.0).tolist() == (counts > 0).tolist()
    assert [event["groups"] for event in events] == [2] * 6
    assert [event["step"] for event in events] == [1, 2, 3, 4, 5, 6]
    assert sum(event["informative"] for event in events) == (rows % 3 > 0).sum()
    assert events[-1]["saved_answers"] == pytest.approx(whole.dataflex.controller.rollouts.saved_answers)
    rest = make(tiny_model, tmp_path / "out", MOPPS, reward=half, **settings)
    rest.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{2 + each}"))
    assert served(tmp_path / "out").tolist() == rows.tolist()
    assert rest.dataflex.selector.alpha.tolist() == selector.alpha.tolist()
    for before, after in zip(events, rolled_out(tmp_path / "out"), strict=True):
        own = dict.fromkeys(("time", "spent", "tokens", "truncated"))  # answers may be others, rewards are not
        assert {**before, **own} == {**after, **own}
    if each == 1:
        assert losses(rest) == losses(whole)


def test_dropped_groups_have_no_part_in_the_loss(tiny_model, tmp_path):
    block = {"selector": {"name": "pass_band", "low": 0.6}, "interval_steps": 1}
    trainer = make(tiny_model, tmp_path, block, reward=half, max_steps=2)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    events = rolled_out(tmp_path)
    assert sum(event["informative"] for event in events) > 0  # half of their answers are right, and 0.6 are wanted
    assert [event["dropped"] for event in events] == [2, 2]
    assert all(map(torch.equal, before, trainer.model.parameters()))


def test_domains_follow_their_rewards(tiny_model, tmp_path):
    block = {"mixer": {"name": "sec", "temperature": 0.05}, "interval_steps": 1}
    trainer = make(tiny_model, tmp_path, block, reward=half)
    assert "2 sequences" in trainer.plan()
    trainer.train()
    planned = [event for event in read_events(tmp_path / "dataflex") if event["event"] == "planned"]
    assert planned[-1]["proportions"]["a"] == pytest.approx(0.05)  # its prompts are never answered
    assert {"dataflex/rollouts/saved_answers", "dataflex/nominal/a"} <= set(trainer.state.log_history[-2])


def none_of_one(completions, row_id, **_):
    return [None if row == min(row_id) else 1.0 for row in row_id]


def infinite(completions, **_):
    return [float("-inf"), *[1.0] * (len(completions) - 1)]


def raising(completions, **_):
    raise KeyError("answer")


@pytest.mark.parametrize(
    ("reward", "error", "told"),
    [
        (
            none_of_one,
            DataError,
            r"\(none_of_one\): none of the 4 answers to row \d+ \('once upon \d+ day'\) got a rew",
        ),
        (infinite, DataError, r"\(infinite\): a reward is infinite"),
        (raising, ComponentError, r"a reward function \(raising\) raised KeyError: 'answer'"),
    ],
)
def test_rewards_that_cannot_be_used_are_told_before_the_first_step(tiny_model, tmp_path, reward, error, told):
    trainer = make(tiny_model, tmp_path, MOPPS, reward=reward)
    with pytest.raises(error, match=told):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(
    ("block", "changes", "told"),
    [
        (MOPPS, {"rows": 1}, "train_dataset: 1 prompts, and one generation takes 2"),
        (MOPPS, {"steps_per_generation": 1}, "are no whole optimizer step of 2"),
        ({"selector": "loss", "interval_steps": 1}, {}, "loss does not work under stage rl"),
        ({"weighter": "focal"}, {}, "reweighting needs per-token losses"),
        ({"mixer": "odm", "interval_steps": 1}, {}, "odm does not work under stage rl"),
        ({"record": True}, {}, r"dynamic\.record: a run without a method is not recorded here"),
        ({"selector": {"name": "pass_band", "column": "rat"}, "interval_steps": 1}, {}, "no column 'rat' .* 'rate'"),
    ],
)
def test_what_cannot_be_served_is_refused_when_the_trainer_is_made(tiny_model, tmp_path, block, changes, told):
    with pytest.raises(ConfigError, match=told):
        make(tiny_model, tmp_path, block, **changes)


def test_groups_of_one_are_refused(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="at least 2"):  # by TRL
        make(tiny_model, tmp_path, MOPPS, num_generations=1)
    trainer = make(tiny_model, tmp_path, MOPPS)
    trainer.num_generations = 1
    assert any(told.startswith("num_generations: 1; a group of one") for told in trainer._dataflex_problems())


def two_ranks(folder, out):
    """Yield the settings of runs in which each rank has whole groups, and in which a group spans both ranks."""
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    for size, generations in ((4, 4), (2, 4)):
        settings = {"per_device_train_batch_size": size // world, "num_generations": generations}
        trainer = make(folder, out / str(size), MOPPS, reward=half, gradient_accumulation_steps=2, **settings)
        trainer.train()
        yield served(out / str(size)).tolist(), trainer.dataflex.selector.alpha.tolist()


def test_the_example_trains_and_goes_on(tmp_path, monkeypatch):
    example = ROOT / "examples" / "trl_grpo.py"
    assert len(example.read_text().splitlines()) < 40
    for more in ([], [str(tmp_path / "out" / "checkpoint-3")]):
        monkeypatch.setattr(sys, "argv", [str(example), str(tmp_path / "out"), *more])
        trainer = runpy.run_path(str(example))["trainer"]
    assert trainer.state.global_step == 4
    assert len(rolled_out(tmp_path / "out")) == 4
