"""A run with a budget: rows scored in their own training step, the rest predicted, and the training left as it is."""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest

LESS = {"name": "less", "targets": ["goal"]}
SETTINGS = {
    "dataset": "alpha,beta,gamma",
    "max_steps": 24,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "disable_shuffling": False,
    "learning_rate": 3e-3,
}


def block(selector=LESS, budget=0.5, **changes):
    return {
        "warmup_steps": 8,
        "interval_steps": 4,
        "selector": selector,
        "signals": {"budget": budget, **changes.pop("signals", {})},
        **changes,
    }


def decisions(outcome):
    return [event for event in outcome.events if event["event"] == "planned" and event["kind"] == "dynamic"]


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("selector", [LESS, "grad_norm", "loss", {"name": "icons", "targets": ["goal", "held"]}])
def test_scores_come_from_the_steps(run, monkeypatch, selector, tuning):
    from dataflex.train.in_run import InRun

    seen = []
    scores = InRun._scores
    monkeypatch.setattr(InRun, "_scores", lambda self, known, *rest: seen.append(known) or scores(self, known, *rest))
    outcome = run("budgeted", **SETTINGS, finetuning_type=tuning, dynamic=block(selector))
    told = decisions(outcome)
    assert len(told) == 4
    assert all("drawn uniformly" in event["reason"] for event in told)
    assert len(np.unique(seen[-1].rows[~seen[-1].pilots])) > 30, "rows of training steps were observed"
    assert seen[-1].pilots.any() == (selector != "loss")
    assert np.isfinite(seen[-1].values).all()
    assert np.isfinite(seen[-1].sketches).all()


@pytest.mark.parametrize(
    ("selector", "enough", "heard"),
    [(LESS, 1, range(8)), (LESS, 1000, range(20)), ("grad_norm", 1, range(24)), ("loss", 1, range(24))],
)
def test_steps_are_listened_to_while_what_they_show_is_of_use(run, monkeypatch, selector, enough, heard):
    """Decisions are at steps 8, 12, 16 and 20; none follows the last."""
    from dataflex.train import in_run
    from dataflex.train.in_run import InRun

    taken = []
    take = InRun.take
    monkeypatch.setattr(
        InRun, "take", lambda self, step: taken.extend([step] * (self._losses is not None)) or take(self, step)
    )
    monkeypatch.setattr(in_run, "_ENOUGH", enough)
    run("heard", **SETTINGS, dynamic=block(selector))
    assert sorted(set(taken)) == list(heard)


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_target_rows_leave_sketches_in_the_pass_of_their_gradients(run, monkeypatch, tuning):
    """Sketches are linear: their mean over the rows is the sketch of the mean gradient."""
    from dataflex.signals.gradients.in_run import StepCapture
    from dataflex.train.in_run import InRun

    sketched, noted = [], []
    monkeypatch.setattr(StepCapture, "sketch_of", noting(StepCapture.sketch_of, sketched))
    note = InRun._note_goals
    monkeypatch.setattr(
        InRun, "_note_goals", lambda self, found, *rest: noted.append(list(found)) or note(self, found, *rest)
    )
    run("budgeted", **{**SETTINGS, "max_steps": 14}, finetuning_type=tuning, dynamic=block(budget=2.0))
    plain = sketched[1::2]  # scaled, plain, scaled, ...
    assert len(plain) == len(noted) == 2
    for mean, found in zip(plain, noted, strict=True):
        rows = np.concatenate([sketches for _, sketches in found])
        assert len(rows) == 5, "all rows of the target"
        np.testing.assert_allclose(rows.mean(axis=0), mean[0].numpy(), rtol=1e-3, atol=1e-5 * np.abs(rows).max())


def test_the_parameters_that_a_selector_names_are_looked_at(run, monkeypatch):
    from dataflex.train import in_run

    found = []
    capturable = in_run.capturable
    monkeypatch.setattr(in_run, "capturable", noting(capturable, found))
    chosen = {**LESS, "parameters": "lora_B"}
    run("budgeted", **{**SETTINGS, "max_steps": 14}, finetuning_type="lora", dynamic=block(chosen))
    names = [name for unit in found[0][0] for name in unit.parameters.values()]
    assert names
    assert all("lora_B" in name for name in names)


def test_listening_changes_nothing(run, monkeypatch):
    from dataflex.train.in_run import InRun

    monkeypatch.setattr(InRun, "chosen", lambda self, wanted, interval: 0)
    monkeypatch.setattr(InRun, "_unseen_first", lambda self, rows, name, interval: rows)
    with_scores = run("scored", **SETTINGS, dynamic=block())
    monkeypatch.setattr(InRun, "begin", lambda self, batch, device: None)
    without = run("deaf", **SETTINGS, dynamic=block())
    assert with_scores.series() == without.series()
    ours, theirs = with_scores.weights(), without.weights()
    assert all(np.array_equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("name", ["greats", "opus"])
def test_candidates_are_picked_by_predicted_products(run, monkeypatch, name):
    """No pass is made over candidates: what is known of them was seen in training steps, and of others predicted."""
    from dataflex.record.read import load_plan
    from dataflex.signals.kinds import GradientProducts
    from dataflex.train import in_run

    def asked(self, access, sweep):
        raise AssertionError("a pass over candidates")

    monkeypatch.setattr(GradientProducts, "together", asked)
    monkeypatch.setattr(in_run, "rank_correlation", lambda a, b: (0.5, 1.0))  # so that predictions choose
    selector = {"name": name, "targets": ["goal", "held"]}
    settings = {**SETTINGS, "max_steps": 16, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    outcome = run("picked", **settings, dynamic=block(selector, candidate_batches=2))
    told = decisions(outcome)
    assert len(told) == 2
    assert "6 of 16 rows by joint influence on goal, held" in told[0]["reason"], told
    assert "2 rows drawn uniformly" in told[0]["reason"]
    assert "8 of 16 rows by joint influence" in told[1]["reason"]
    for event in told:
        rows = load_plan(outcome.folder, event["interval"]).rows
        assert len(np.unique(rows)) == 8, "candidates, each once"


@pytest.mark.parametrize("selector", [LESS, "grad_norm"])
def test_a_resumed_run_is_as_if_never_stopped(run, monkeypatch, selector):
    from dataflex.record.read import load_plan
    from dataflex.train import in_run

    monkeypatch.setattr(in_run, "rank_correlation", lambda a, b: (0.5, 1.0))  # so that predictions choose
    saving = {**SETTINGS, "save_strategy": "steps", "save_steps": 1}
    straight = run("straight", **saving, dynamic=block(selector))
    told = [event["reason"] for event in decisions(straight)]
    for number, reason in enumerate(told[:-1], start=1):  # four fifths of 32 rows are 25.6, and add up over decisions
        chosen = round(25.6 * number) - round(25.6 * (number - 1))
        assert f"{chosen} of 64 rows" in reason, told
        assert f"{32 - chosen} rows drawn" in reason, told
    assert "32 of 64 rows" in told[-1], "no decision follows the last, so it explores nothing"
    for step in (2, 3, 10, 14, 20):
        folder = run.folder / f"resumed-{step}"
        shutil.copytree(straight.folder / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        shutil.copytree(straight.folder / "dataflex", folder / "dataflex")
        resumed = run(
            folder.name, **saving, dynamic=block(selector), resume_from_checkpoint=str(folder / f"checkpoint-{step}")
        )
        assert resumed.series() == straight.series(), step
        for ours, theirs in zip(decisions(resumed), decisions(straight), strict=True):
            assert ours["reason"] == theirs["reason"], "numbers of this decision alone, in one order"
            rows = [
                load_plan(one.folder, event["interval"]).rows for one, event in ((resumed, ours), (straight, theirs))
            ]
            assert np.array_equal(*rows), step


def noting(call, values):
    """Keep what a method returns."""

    def noted(*args):
        values.append(call(*args))
        return values[-1]

    return noted


def test_what_is_spent_is_within_the_budget(run, monkeypatch):
    from dataflex.train.in_run import InRun

    found = {"_aim": [], "_pilots": [], "_price": []}
    for name, values in found.items():
        monkeypatch.setattr(InRun, name, noting(getattr(InRun, name), values))
    outcome = run("budgeted", **SETTINGS, dynamic=block(budget=0.7))
    assert len(found["_aim"]) == len(found["_pilots"]) == 4
    assert 0 < sum(found["_aim"]) < sum(found["_aim"]) + sum(found["_pilots"])
    trained = sum(tokens * both for tokens, both in found["_price"])
    assert sum(found["_aim"]) + sum(found["_pilots"]) <= 0.7 * trained
    spent = [float(re.search(r"spent ([\d.e-]+)", event["reason"])[1]) for event in decisions(outcome)]
    assert 0 < spent[0] < spent[-1] <= 0.7


def test_predictions_wait_until_they_are_better_than_chance(run, monkeypatch):
    from dataflex.train import in_run

    monkeypatch.setattr(in_run, "rank_correlation", lambda a, b: (-0.1, 0.3))
    told = decisions(run("budgeted", **SETTINGS, dynamic=block()))
    assert all("32 rows drawn uniformly" in event["reason"] for event in told), told
    assert all("trust 0," in event["reason"] or "trust 0" in event["reason"] for event in told)


def test_thompson_sampling_draws_the_predictions_that_choose(run, monkeypatch):
    from dataflex.record.read import load_plan
    from dataflex.train import in_run

    monkeypatch.setattr(in_run, "rank_correlation", lambda a, b: (0.5, 1.0))
    drawn = []
    fitted = in_run.fitted
    monkeypatch.setattr(
        in_run,
        "fitted",
        lambda *args, perturbed: drawn.append(perturbed is not None) or fitted(*args, perturbed=perturbed),
    )
    plans = {}
    for name, how in (("mean", "uniform"), ("drawn", "thompson"), ("again", "thompson")):
        drawn.clear()
        outcome = run(name, **SETTINGS, dynamic=block(signals={"explore_by": how}))
        plans[name] = [load_plan(outcome.folder, event["interval"]).rows for event in decisions(outcome)]
        assert sum(drawn) == (3 if how == "thompson" else 0), "once in every decision that another follows"
        assert not drawn[-1]
    assert not np.array_equal(plans["mean"][0], plans["drawn"][0])
    assert all(np.array_equal(*pair) for pair in zip(plans["drawn"], plans["again"], strict=True))
