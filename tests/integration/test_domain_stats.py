"""What online mixers observe: the same for every way of cutting a step up, and harmless to the training."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.integration.test_identity import same

PLUGIN = """
import json
from pathlib import Path

import numpy as np

from dataflex import Card, Mix, Mixer, Requires
from dataflex.method import DomainWeighter

HERE = Path(__file__).parent


class Watch({base}):
    name = "watch"
    card = Card(summary="Writes down what it observes.", paper="baseline", cost="none")
    observes = True
    pure = {pure}
    steps = 0

    def requires(self):
        return Requires(needs_interval=True, pure_micro_batches=self.pure)

    def mix(self, ctx):
        return Mix(proportions=np.array([0.75, 0.25]))

    def loss_weights(self):
        return np.array([0.0, 1.0])

    def observe(self, stats):
        self.steps += 1
        with open(HERE / "seen.jsonl", "a") as file:
            seen = {{key: getattr(stats, key).tolist() for key in (
                "loss_sum", "tokens", "sequences", "micro_batches", "proportions")}}
            file.write(json.dumps({{"step": stats.step, "names": stats.names, **seen}}) + "\\n")

    def state_dict(self):
        return {{"steps": self.steps}}

    def load_state_dict(self, state):
        self.steps = state["steps"]
"""


def watch(tmp_path, name, pure=False, base="Mixer"):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "watch.py").write_text(PLUGIN.format(pure=pure, base=base))
    return folder


def seen(folder):
    return [json.loads(line) for line in (folder / "seen.jsonl").read_text().splitlines()]


def settings(folder=None, **dynamic):
    block = {"mixer": {"name": "static", "proportions": {"alpha": 0.75, "beta": 0.25}}}
    if folder is not None:
        block = {"mixer": "watch", "plugins": [str(folder / "watch.py")]}
    return {"dataset": "alpha,beta", "max_steps": 6, "dynamic": {**block, "interval_steps": 2, **dynamic}}


def test_observing_changes_nothing(run, tmp_path):
    folder = watch(tmp_path, "w")
    static = run("static", **settings(), gradient_accumulation_steps=2)
    watched = run("watched", **settings(folder), gradient_accumulation_steps=2)
    same(static, watched)
    steps = seen(folder)
    assert [entry["step"] for entry in steps] == list(range(6))
    for entry, logged in zip(steps, watched.log, strict=True):
        assert entry["sequences"] == [3.0, 1.0]
        assert entry["proportions"] == [0.75, 0.25]
        # The Trainer's loss is the token mean of the step.
        assert sum(entry["loss_sum"]) / sum(entry["tokens"]) == pytest.approx(logged["loss"], rel=1e-4)
        assert logged["dataflex/loss/alpha"] == pytest.approx(entry["loss_sum"][0] / entry["tokens"][0])


def test_the_sums_do_not_depend_on_micro_batches(run, tmp_path):
    one, other = watch(tmp_path, "a"), watch(tmp_path, "b")
    run("one", **settings(one), per_device_train_batch_size=4)
    run("other", **settings(other), per_device_train_batch_size=1, gradient_accumulation_steps=4)
    for a, b in zip(seen(one), seen(other), strict=True):
        for key in ("loss_sum", "tokens", "sequences"):
            assert np.allclose(a[key], b[key], rtol=1e-4), key
    assert seen(one)[0]["micro_batches"] == [1.0, 1.0]
    assert seen(other)[0]["micro_batches"] == [3.0, 1.0]


def test_domain_pure_micro_batches(run, tmp_path):
    folder = watch(tmp_path, "p", pure=True)
    run("pure", **settings(folder), gradient_accumulation_steps=4)
    for entry in seen(folder):
        assert entry["micro_batches"] == [3.0, 1.0]
        assert entry["sequences"] == [6.0, 2.0]


def test_domain_weights_act_in_the_loss(run, tmp_path):
    """All weight on the second domain: the first one's rows leave no trace."""
    folder = watch(tmp_path, "d", base="DomainWeighter")
    ours = run("weighed", **settings(folder), gradient_accumulation_steps=2)
    for entry, logged in zip(seen(folder), ours.log, strict=True):
        assert entry["loss_sum"][1] / entry["tokens"][1] == pytest.approx(logged["loss"], rel=1e-4)
