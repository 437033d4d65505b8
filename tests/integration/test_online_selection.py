"""Online batch selection through real training runs: candidates, what is trained on, resume, refusals."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from dataflex.errors import ConfigError

SETTINGS = {"dataset": "alpha", "max_steps": 8, "save_strategy": "steps", "save_steps": 1, "cutoff_len": 48}
METHODS = {
    "greats": {"name": "greats", "targets": ["goal"], "target_rows": 3},
    "opus": {"name": "opus", "targets": ["goal"]},
    "uds": {"name": "uds", "alpha": 0.01, "queue_size": 5},
}


def block(method, batches=5, **more):
    selector = METHODS.get(method, method) if isinstance(method, str) else method
    return {"warmup_steps": 1, "interval_steps": 1, "candidate_batches": batches, "selector": selector, **more}


def plans(outcome):
    """Rows, pool and scores of every decision."""
    found = []
    for event in outcome.events:
        if event["event"] == "planned" and event["kind"] == "dynamic":
            with np.load(outcome.folder / "dataflex" / event["plan"]) as arrays:
                found.append((arrays["rows"].tolist(), arrays["pool"].tolist(), arrays["scores"]))
    return found


@pytest.mark.parametrize("method", METHODS)
def test_a_step_trains_on_a_part_of_its_candidates(run, method):
    """40 rows, 10 candidates for 2 rows: four steps look at every row once, the next four in another order."""
    outcome = run("run", **{**SETTINGS, "save_strategy": "no", "max_steps": 9}, dynamic=block(method))
    decisions = plans(outcome)
    assert len(decisions) == 8
    for rows, pool, scores in decisions:
        assert (len(rows), len(set(rows)), len(pool)) == (2, 2, 10)
        assert set(rows) <= set(pool)
        assert np.isfinite(scores).all()
        if method == "uds":
            best = [pool[i] for i in np.argsort(-scores, kind="stable")[:2]]
            assert sorted(rows) == sorted(best)
        if method == "greats":
            assert pool[int(np.argmax(scores))] in rows
    for first in (0, 4):
        epoch = [row for _, pool, _ in decisions[first : first + 4] for row in pool]
        assert sorted(epoch) == list(range(40))
    assert [pool for _, pool, _ in decisions[:4]] != [pool for _, pool, _ in decisions[4:]]


def test_the_step_is_that_of_a_batch_of_the_chosen_rows_alone(run, data_dir, tmp_path):
    """The first step equals, bit for bit, that of a stock run whose only rows are the chosen ones."""
    once = {**SETTINGS, "save_strategy": "no", "max_steps": 1, "lr_scheduler_type": "constant"}
    online = run("online", **once, dynamic=block("uds", warmup_steps=0))
    ((rows, pool, _),) = plans(online)
    data = tmp_path / "chosen"
    shutil.copytree(data_dir, data)
    lines = (data_dir / "alpha.jsonl").read_text().splitlines()
    (data / "alpha.jsonl").write_text("".join(lines[row] + "\n" for row in rows))
    stock = run("stock", **{**once, "dataset_dir": str(data)}, dynamic=None)
    assert online.series() == stock.series()
    assert online.series("grad_norm") == stock.series("grad_norm")
    mine, theirs = online.weights(), stock.weights()
    assert all(np.array_equal(mine[name], theirs[name]) for name in theirs)
    assert len(pool) == 10


@pytest.mark.parametrize("method", METHODS)
def test_resume_is_exact(run, method):
    settings = {**SETTINGS, "finetuning_type": "lora", "lora_rank": 4, "lora_dropout": 0.1}
    straight = run("straight", **settings, dynamic=block(method))
    losses = straight.series()
    assert len(set(losses)) > 4
    for step in (1, 3, 6):
        folder = run.folder / f"resumed-{step}"
        shutil.copytree(straight.folder / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        shutil.copytree(straight.folder / "dataflex", folder / "dataflex")
        again = run(folder.name, **settings, dynamic=block(method), resume_from_checkpoint=True)
        assert again.series() == losses, step
        for (rows, pool, scores), (want_rows, want_pool, want_scores) in zip(
            plans(again), plans(straight), strict=True
        ):
            assert (rows, pool) == (want_rows, want_pool)
            np.testing.assert_array_equal(scores, want_scores)


def test_another_number_of_candidates_is_not_resumed(run):
    from dataflex.errors import CheckpointError

    straight = run("straight", **{**SETTINGS, "max_steps": 3}, dynamic=block("loss"))
    assert (straight.folder / "checkpoint-2").is_dir()
    with pytest.raises(CheckpointError, match=r"candidate_batches changed \(5 -> 4\)"):
        run("straight", **SETTINGS, dynamic=block("loss", 4), resume_from_checkpoint=True)


def test_any_selector_may_choose_within_candidates(run):
    """RHO-LOSS as published: the best of a batch five times as large, at every step; intervals may be longer too."""
    selector = {"name": "rho_loss", "reference": str(run.base["model_name_or_path"])}
    settings = {**SETTINGS, "save_strategy": "no", "max_steps": 4}
    for rows, pool, scores in plans(run("rho", **settings, dynamic=block(selector))):
        best = [pool[i] for i in np.argsort(-scores, kind="stable")[:2]]
        assert sorted(rows) == sorted(best)
    two = plans(run("two", **settings, dynamic={**block("loss", 3), "interval_steps": 2}))
    assert [(len(rows), len(pool)) for rows, pool, _ in two] == [(4, 12), (2, 6)]
    assert len({row for _, pool, _ in two for row in pool}) == 18


@pytest.mark.parametrize(
    ("dynamic", "told"),
    [
        ({"interval_steps": 1, "selector": "uds"}, "candidate_batches: missing; the uds selector chooses within"),
        ({"candidate_batches": 2, "selector": "uds"}, "interval_steps: missing.*'interval_steps: 1'"),
        ({"candidate_batches": 2, "selector": "random"}, "candidate_batches: candidates are those of an interval"),
        (block("uds", 1), "candidate_batches: must be at least 2, found 1"),
        (block("uds", 21), r"candidate_batches: 21 x 1 steps x 2 rows are 42 candidates, .* hold 40 rows"),
        (block("all"), "candidate_batches: has no effect with the all selector"),
        ({"candidate_batches": 2, "mixer": "uniform"}, "candidate_batches: has no effect without a selector"),
        (block("uds", exclude_seen=True), "and so does exclude_seen"),
        (block("uds", signals={"pool_fraction": 0.5}), r"and so does signals\.pool_fraction"),
        (block("greats", signals={"screen_fraction": 0.5}), r"and so does signals\.screen_fraction"),
        (block({"name": "less", "targets": ["goal"], "checkpoints": 2}), "set checkpoints to 1, or remove candidate"),
        (block({"represent": "uds"}), "the uds selector gives no scores to choose by"),
    ],
)
def test_what_cannot_work_is_refused_before_a_model_loads(run, dynamic, told):
    with pytest.raises(ConfigError, match=told):
        run("run", **{**SETTINGS, "model_name_or_path": str(run.base["model_name_or_path"])}, dynamic=dynamic)


def test_a_mixer_is_refused_beside_candidates(run):
    dynamic = block("uds", mixer="uniform", keep_ratio=0.5)
    with pytest.raises(ConfigError, match="candidate_batches: does not work with a mixer"):
        run("run", **{**SETTINGS, "dataset": "alpha,beta"}, dynamic=dynamic)


def test_the_plan_counts_candidates(run, capsys):
    from dataflex.cli import main

    config = run.folder / "plan.json"
    config.write_text(json.dumps(run.mapping("plan", **SETTINGS, dynamic=block("uds"))))
    assert main(["plan", str(config)]) == 0
    assert "70 F (7 intervals x 10 rows x 1 F" in " ".join(capsys.readouterr().out.split())
