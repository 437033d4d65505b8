"""mSFT's rule of which domain overfits first, and stages with a planted one: trained, rolled back, killed, taken up."""

from __future__ import annotations

import json
import random
import shutil

import numpy as np
import pytest
import yaml

from dataflex import cli
from dataflex.mixing import msft, runs
from dataflex.mixing.msft import first_to_overfit
from dataflex.record.read import load_plan, read_events
from tests.config.conftest import _plain_environment, config, project
from tests.conftest import sentence
from tests.integration.conftest import base_settings

__all__ = ["_plain_environment", "config", "project"]


# ---------------------------------------------------------------- the rule


def transcribed(accuracies):
    """The authors' loop: e_d is the first maximum of d; the smallest e_d counts, ties by name; the last: no drop."""
    peaks = {}
    for name, series in accuracies.items():
        peak = 0
        for place, value in enumerate(series):
            if value > series[peak]:
                peak = place
        peaks[name] = peak
    for place in range(len(series) - 1):
        for name in sorted(peaks):
            if peaks[name] == place:
                return name, place
    return None


def test_golden_value():
    accuracies = {"a": (0.2, 0.5, 0.4, 0.3), "b": (0.1, 0.2, 0.4, 0.35), "c": (0.3, 0.35, 0.4, 0.5)}
    assert transcribed(accuracies) == ("a", 1)
    assert first_to_overfit({name: [-x for x in series] for name, series in accuracies.items()}) == ("a", 1)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ({"a": [3, 2, 1], "b": [2, 1, 0]}, None),  # nothing is past its best
        ({"b": [1, 2, 3], "a": [1, 2, 3], "c": [0, 5, 6]}, ("a", 0)),  # ties by name
        ({"b": [2, 1, 1], "a": [3, 2, 1]}, ("b", 1)),  # the first of equal ones
        ({"a": [2.0, float("inf"), float("inf")], "b": [3, 2, 1]}, ("a", 0)),  # it diverged
        ({"a": [1.0]}, None),
    ],
)
def test_the_rule_at_its_edges(losses, expected):
    assert first_to_overfit(losses) == expected


def test_the_rule_is_the_authors():
    rng = np.random.default_rng(3)
    for _ in range(300):
        accuracies = {name: rng.integers(0, 4, size=4).tolist() for name in "cab"}
        losses = {name: [1 - x for x in series] for name, series in accuracies.items()}
        assert first_to_overfit(losses) == transcribed(accuracies)


# ---------------------------------------------------------------- what is refused


def test_proportions_of_a_file_are_taken(tmp_path):
    path = tmp_path / "found.json"
    path.write_text(json.dumps({"names": ["a", "b"], "proportions": [0.25, 0.75]}))
    block = {"mixer": {"name": "static", "from": str(path)}}
    assert msft._shares(block, None, None, None, tmp_path) == {"a": 0.25, "b": 0.75}


def test_all_that_stages_cannot_be_made_of_is_told_at_once(project, config, capsys):
    (project / "run.json").write_text(
        json.dumps(config(save_total_limit=2, dynamic={"resume_plan": "ignore"}, max_steps=7, eval_steps=2))
    )

    def refused(*overrides):
        assert cli.main(["mix", "msft", "run.json", "--out", "out", *overrides]) == 2
        return capsys.readouterr().err

    told = refused()
    for key in ("eval_dataset", "eval_steps", "max_steps", "lr_scheduler_type", "save_total_limit", "resume_plan"):
        assert key in told, key
    right = ["save_total_limit=null", "dynamic.resume_plan=strict", "max_steps=8", "lr_scheduler_type=constant"]
    right += ["eval_strategy=steps", "eval_dataset=a,b"]
    assert "in the same order" in refused(*right[:-1], "eval_dataset=a")
    assert "dynamic.mixer: stages serve fixed proportions" in refused(*right, "dynamic.mixer=odm")
    assert "at least two are needed" in refused(*right[:-1], "eval_dataset=a", "dataset=a")
    assert "--stages: must be at least 1" in refused(*right, "--stages", "0")
    assert not (project / "out").exists()


# ---------------------------------------------------------------- stages

RULE, NOISE, BATCH = 120, 2, 4  # rows, rows, and rows of a step


@pytest.fixture
def bench(tiny_model, tmp_path, monkeypatch):
    """Two domains: many rows whose answer is their first word, and two rows of noise."""
    rng = random.Random(5)
    info = {}

    def write(name, count, answer):
        rows = []
        for _ in range(count):
            text = sentence(rng, 3, 6)
            rows.append({"instruction": text, "input": "", "output": answer(text)})
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        info[name] = {"file_name": f"{name}.jsonl"}

    for name, count in (("rule", RULE), ("rule_held", 24)):
        write(name, count, lambda text: " ".join([text.split()[0]] * 4))
    for name, count in (("noise", NOISE), ("noise_held", 24)):
        write(name, count, lambda text: sentence(rng, 4, 6))
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    mapping = base_settings(tiny_model, tmp_path) | {
        "dataset": "rule,noise",
        "eval_dataset": "rule_held,noise_held",
        "max_steps": 16,
        "eval_strategy": "steps",
        "eval_steps": 4,
        "per_device_train_batch_size": BATCH,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "output_dir": "unused",
        "dynamic": {"mixer": {"name": "static", "proportions": {"rule": 0.5, "noise": 0.5}}},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(mapping))
    return Bench(tmp_path, monkeypatch)


class Bench:
    """The command, with training in this process."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.out = folder, folder / "out"
        self.trained = []
        monkeypatch.setattr(runs, "train", self.train)

    def train(self, path, *overrides):
        from dataflex.run import train_here

        self.trained.append((path.stem, *(override.rpartition("/out/")[2] for override in overrides)))
        return train_here([str(path), *overrides])

    def __call__(self, *options):
        self.trained = []
        return cli.main(["mix", "msft", str(self.folder / "run.yaml"), "--out", str(self.out), *options])

    def state(self):
        return json.loads((self.out / "msft.json").read_text())


def served(folder, steps):
    """Rows that a run's steps served; rows of ``rule`` come before those of ``noise``."""
    planned = [event for event in read_events(folder) if event["event"] == "planned"]
    rows = np.concatenate([load_plan(folder, event["interval"]).rows for event in planned])
    return rows[: steps * BATCH]


@pytest.mark.slow
def test_a_planted_domain_is_dropped_where_it_was_best(bench, capsys):
    assert bench("--stages", "2") == 0
    first, second = bench.state()["stages"]
    told = capsys.readouterr().out
    assert first["dropped"] == "noise"
    keep = first["keep"]
    noise = {int(step): losses["noise"] for step, losses in first["losses"].items()}
    assert list(noise) == [4, 8, 12, 16]
    assert keep == min(noise, key=noise.get) < 16
    assert f"noise was best first; back to step {keep}, and on without it" in told
    assert bench.trained == [("stage-1",), ("stage-2", f"stage-1/checkpoint-{keep}")]

    # Stage 2 is the run of stage 1 up to there, and then of the rule alone, whose epoch goes on.
    assert (second["start"], second["end"], second["active"]) == (keep, keep + 16, ["rule"])
    before, after = served(bench.out / "stage-1", keep), served(bench.out / "stage-2", 16)
    assert (before >= RULE).sum() == keep * BATCH // 2
    assert after.max() < RULE
    rule = np.concatenate([before[before < RULE], after])
    assert len(rule) == keep * 2 + 64 == len(set(rule.tolist()))
    assert {event["step"] for event in read_events(bench.out / "stage-2") if event["event"] == "resumed"} == {keep}

    means = {
        (number, int(step)): np.mean(list(losses.values()))
        for number, stage in enumerate((first, second), start=1)
        for step, losses in stage["losses"].items()
    }
    number, step = min(means, key=means.get)
    assert bench.state()["checkpoint"] == str(bench.out / f"stage-{number}" / f"checkpoint-{step}")
    assert (bench.out / f"stage-{number}" / f"checkpoint-{step}" / "model.safetensors").is_file()

    # As a kill in the middle of stage 2 leaves it, and then as one before its first checkpoint does.
    unbroken, folder = bench.state(), bench.out / "stage-2"
    for later in (8, 12, 16):
        shutil.rmtree(folder / f"checkpoint-{keep + later}")
    lines = (folder / "dataflex" / "events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    kept = [event for event in events if event["step"] <= keep + 4 and event["event"] != "finished"]
    (folder / "dataflex" / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in kept))
    assert bench("--stages", "2") == 0
    assert bench.trained == [("stage-2", f"stage-2/checkpoint-{keep + 4}")]
    assert bench.state() == unbroken
    shutil.rmtree(folder)
    assert bench("--stages", "2") == 0
    assert bench.trained == [("stage-2", f"stage-1/checkpoint-{keep}")]
    assert bench.state() == unbroken

    capsys.readouterr()
    assert bench("--stages", "2", "--json") == 0
    assert bench.trained == []
    answer = json.loads(capsys.readouterr().out)
    assert answer["checkpoint"] == unbroken["checkpoint"]
    assert [stage["dropped"] for stage in answer["stages"]] == [stage["dropped"] for stage in unbroken["stages"]]
    assert bench("learning_rate=0.1") == 2
    assert "holds stages of another configuration or other overrides" in capsys.readouterr().err
