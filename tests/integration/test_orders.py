"""Orders and averaged weights in real runs: bit for bit over a resume; files of scores order their own rows."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from dataflex.record.read import load_plan

SETTINGS = {
    "finetuning_type": "lora",
    "lora_rank": 4,
    "max_steps": 12,
    "num_train_epochs": None,
    "lr_scheduler_type": "constant",
    "gradient_accumulation_steps": 2,
    "save_strategy": "steps",
    "save_steps": 1,
    "eval_dataset": "beta",
    "do_eval": True,
    "dynamic": {
        "warmup_steps": 2,
        "interval_steps": 3,
        "orderer": {"name": "saw", "by": "loss", "jitter": 3},
        "average_weights": {"last_steps": 6, "every": 2},
    },
}


def served(outcome):
    rows = [
        load_plan(outcome.folder, event["interval"]).rows for event in outcome.events if event["event"] == "planned"
    ]
    return np.concatenate(rows).tolist()


def test_an_order_and_an_average_resume_bit_for_bit(run):
    straight = run("straight", **SETTINGS)
    assert len(set(served(straight)[:37])) == 37  # 'ones' has 37 rows: none comes back in the first epoch
    averaged = straight.weights("averaged")
    each = [straight.weights(f"checkpoint-{step}") for step in (8, 10, 12)]
    for name, value in averaged.items():
        np.testing.assert_allclose(value, np.mean([weights[name] for weights in each], axis=0), rtol=1e-5, atol=1e-7)
    assert any(not np.array_equal(averaged[name], value) for name, value in straight.weights().items())
    results = json.loads((straight.folder / "all_results.json").read_text())
    assert results["eval_averaged_loss"] != results["eval_loss"]
    assert np.isfinite(results["eval_averaged_loss"])
    for step in (1, 4, 9, 11):
        folder = run.folder / f"resumed-{step}"
        shutil.copytree(straight.folder / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        shutil.copytree(straight.folder / "dataflex", folder / "dataflex")
        resumed = run(folder.name, **SETTINGS, resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        assert resumed.series() == straight.series(), step
        assert served(resumed) == served(straight), step
        ours = resumed.weights("averaged")
        assert all(np.array_equal(ours[name], value) for name, value in averaged.items()), step


def test_scores_of_these_rows_order_them_and_others_are_refused(run):
    """The longest rows first, by what 'dataflex score' wrote; with another cutoff_len the rows are other ones."""
    from dataflex.cli import main
    from dataflex.errors import DataError
    from dataflex.score_table import read_scores

    file = run.folder / "scores.parquet"
    config = run.folder / "scored.json"
    config.write_text(json.dumps(run.mapping("never")))
    assert main(["score", str(config), "--method", "longest", "--out", str(file)]) == 0
    by = {"name": "scores", "file": str(file), "column": "longest"}
    block = {"orderer": {"name": "sorting", "by": by, "descending": True}}
    lengths = read_scores(file).tokens
    rows = served(run("ordered", dynamic=block))
    assert rows[:37] == sorted(range(37), key=lambda row: (-lengths[row], row))
    with pytest.raises(
        DataError, match=r"scores in .*: they are of 37 rows of ones .*not of those that are trained on"
    ):
        run("other", cutoff_len=16, dynamic=block)
