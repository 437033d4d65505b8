"""What training steps show of the rows that they serve, against what the model says of the same rows by itself."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

SETTINGS = {
    "dataset": "alpha,beta,gamma",
    "max_steps": 16,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "disable_shuffling": False,
    "learning_rate": 0.0,
}
PLUGIN = """
import numpy as np

from dataflex import Card, Requires, ScoringSelector
from dataflex.signals.kinds import Embedding, GradientNorms, GradientScores, InRun, TokenLoss


class Unlearnt(ScoringSelector):
    \"\"\"Rows of the largest loss in the step that served them, then those that were never served.\"\"\"

    name = "unlearnt"
    card = Card(summary="Keeps rows whose step had a large loss.", paper="baseline", cost="none")
    pooled = Embedding(pooling="mean", layer=1)

    def requires(self):
        asked = frozenset({"in_run_losses", "in_run_norms", "in_run_scores", "in_run_embeddings"})
        return Requires(
            signals=asked | {"losses", "gradients", "embeddings"}, targets=True, needs_interval=True,
            stages=("pt", "sft"), embedding=self.pooled,
        )

    def score(self, pool, ctx):
        aims = {"targets": ctx.targets, "normalize": False}
        asked = {
            "losses": InRun(what="losses"), "norms": InRun(what="norms"), "scores": InRun(what="scores", **aims),
            "cosines": InRun(what="scores", targets=ctx.targets, normalize=True),
            "embeddings": InRun(what="embeddings", embedding=self.pooled),
        }
        exact = {
            "exact_losses": TokenLoss(), "exact_embeddings": self.pooled,
            "exact_norms": GradientNorms(parameters="proj", precondition="none"),
            "exact_scores": GradientScores(parameters="proj", precondition="none", mean_of_cosines=False, **aims),
        }
        found = {name: ctx.signals(signal, pool) for name, signal in {**asked, **exact}.items()}
        np.savez(f"SEEN.{ctx.interval.index}.npz", **found)
        return np.nan_to_num(found["losses"][:, 0], nan=-1.0)
"""


@pytest.fixture
def asking(run, tmp_path):
    """Run with a method that asks everything; return its outcome and what it saw at each decision."""
    file, seen = tmp_path / "unlearnt.py", tmp_path / "seen"
    file.write_text(PLUGIN.replace("SEEN", str(seen)))

    def started(name, *, weighter=None, signals=None, **changes):
        block = {
            "plugins": [str(file)],
            "selector": {"name": "unlearnt", "targets": ["goal", "held"]},
            "warmup_steps": 8,
            "interval_steps": 4,
            **({"weighter": weighter} if weighter else {}),
            **({"signals": signals} if signals else {}),
        }
        outcome = run(name, **{**SETTINGS, **changes}, dynamic=block)
        return outcome, [dict(np.load(f"{seen}.{index}.npz")) for index in (1, 2)]

    return started


LORA = {"finetuning_type": "lora"}
PACKED = {**LORA, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
CASES = {
    "full": ({}, {"signals": {"in_run_rank": 64}}),
    "lora": (LORA, {}),
    "accumulated": ({**LORA, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}, {}),
    "packed": ({**PACKED, "neat_packing": True}, {}),
    "plainly-packed": ({**PACKED, "packing": True}, {}),
    "weighed": (LORA, {"weighter": "focal"}),
    "packed-weighed": ({**PACKED, "neat_packing": True}, {"weighter": {"name": "loss", "warmup_steps": 0}}),
}


@pytest.mark.parametrize("case", CASES)
def test_steps_show_what_the_model_says_by_itself(asking, monkeypatch, case):
    """Parameters do not move at a learning rate of 0, and directions are the targets' plain gradients.

    Activation checkpointing is on, so that all parameters are those of projections.
    """
    from dataflex.record.read import load_plan
    from dataflex.signals.gradients import in_run

    monkeypatch.setattr(in_run, "adam_scale", lambda moments: in_run.torch.ones_like(moments.second))
    settings, block = CASES[case]
    outcome, decisions = asking(case, **settings, **block)
    for index, seen in enumerate(decisions, start=1):
        served = np.unique(np.concatenate([load_plan(outcome.folder, before).rows for before in range(index)]))
        served = served[np.isfinite(seen["losses"][served, 0])]
        assert len(served) >= 8
        others = np.setdiff1d(np.arange(len(seen["losses"])), served)
        for name in ("losses", "norms", "scores", "embeddings"):
            assert np.isfinite(seen[name][served]).all(), name
            assert np.isnan(seen[name][others]).all(), name
            assert np.array_equal(seen[name][served, -1], seen["losses"][served, -1]), "the step"
        assert seen["losses"][served, -1].max() == (7, 11)[index - 1]
        np.testing.assert_allclose(seen["losses"][served, 0], seen["exact_losses"][served], rtol=1e-5)
        np.testing.assert_allclose(seen["embeddings"][served, :-1], seen["exact_embeddings"][served], atol=1e-5)
        if case == "weighed":
            continue  # weights of tokens cannot be undone
        scores, exact = seen["scores"][served, :-1], seen["exact_scores"][served]
        size = np.abs(exact).max(axis=0)
        length = (scores * exact).sum(axis=0) / (scores**2).sum(axis=0)
        np.testing.assert_allclose(scores * length / size, exact / size, atol=1e-5)
        np.testing.assert_allclose(seen["norms"][served, 0], seen["exact_norms"][served], rtol=0.1)
        np.testing.assert_allclose(seen["cosines"][served, :-1], scores / seen["norms"][served, :1], rtol=1e-5)


def test_a_resumed_run_is_shown_the_same(asking, run, tmp_path):
    saving = {**LORA, "learning_rate": 3e-3, "save_strategy": "steps", "save_steps": 1}
    straight, expected = asking("straight", **saving)
    for step in (3, 10):
        folder = tmp_path / f"resumed-{step}"
        shutil.copytree(straight.folder / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        shutil.copytree(straight.folder / "dataflex", folder / "dataflex")
        resumed, found = asking(folder.name, **saving, resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        assert resumed.series() == straight.series()
        for index in (1, 2):  # from step 10 on, the first is still the straight run's
            for name, values in expected[index - 1].items():
                assert np.array_equal(found[index - 1][name], values, equal_nan=True), (step, index, name)
