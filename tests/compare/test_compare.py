"""A suite of the tiny model: trained, interrupted and continued, judged; and what is refused."""

from __future__ import annotations

import json
import shutil
import threading
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import yaml

from dataflex.cli import main
from dataflex.compare import running
from dataflex.compare.suite import _constant, patched, read_suite, trained_model
from dataflex.errors import ConfigError
from tests.integration.conftest import base_settings

ARMS = {
    "plain": {},
    "slow": {"learning_rate": 1.0e-9},
    "again": {"dynamic": {"record": True}},
    "loss": {"dynamic": {"interval_steps": 2, "selector": "loss"}},
}
CLAIM = {"metric": "eval_loss", "better": "less", "alpha": 0.4}


def test_commands_are_processes_with_a_log_and_a_lock(tmp_path):
    """A command's exit code and last words are told; a run that another suite holds is waited for."""
    folder = tmp_path / "run"
    job = running.Job(run=None, folder=folder, config=tmp_path / "c", log=tmp_path / "log", evaluation=None, options=())
    job.log.write_text("dataflex: an earlier failure\n")
    begins, held, over = job.log.stat().st_size, threading.Event(), threading.Event()
    seen = []

    def other():
        with running._alone(job, over):
            seen.append(held.is_set())

    with running._alone(job, over) as lock:
        with running._alone(job, over, wait=False) as busy:
            assert busy is None
        thread = threading.Thread(target=other)
        thread.start()
        code = running._called(job, ["plan", "nothing.yaml"], [], lock)
        held.set()
    thread.join()
    assert seen == [True]
    assert code == 2
    told = running._last_lines(job.log, begins)
    assert told.startswith("dataflex: ")
    assert "nothing.yaml" in told
    assert "earlier" not in told


@pytest.fixture
def suite(tiny_model, data_dir, tmp_path, monkeypatch):
    """Write a suite file; commands run in this process, and are listed in ``suite.called``."""

    def write(**changes):
        base = base_settings(tiny_model, data_dir) | {
            "eval_dataset": "goal",
            "learning_rate": 1.0e-2,
            "disable_shuffling": False,
        }
        del base["num_train_epochs"], base["seed"]
        base["lr_scheduler_type"] = "constant"
        content = {"suite": "small", "base": base, "arms": {"plain": {}, "slow": ARMS["slow"]}, "seeds": 2, "steps": 3}
        content["out"] = "out"
        path = tmp_path / "suite.yaml"
        path.write_text(yaml.safe_dump({**content, **changes}, sort_keys=False))
        return str(path)

    def called(job, command, *_):
        write.called.append((command[0], job.run.arm, job.run.seed))
        return write.instead(job, command) if write.instead else main(command)

    write.called, write.instead = [], None
    monkeypatch.setattr(running, "_called", called)
    monkeypatch.setattr(running, "ThreadPoolExecutor", InOrder)
    return write


class InOrder:
    """Runs what is submitted at once."""

    def __init__(self, _):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *given):
        done = Future()
        done.set_result(function(*given))
        return done

    def shutdown(self, **_):
        pass


def results():
    return json.loads(Path("out/results.json").read_text())


@pytest.mark.slow
def test_a_suite_is_trained_interrupted_continued_and_judged(suite, capsys):
    questions = [{"question": "one two", "choices": [each, "five"], "answer": 0} for each in ("three", "one " * 900)]
    Path("q.jsonl").write_text("".join(json.dumps(each) + "\n" for each in questions))
    claims = [
        {"claim": "slow is worse", **CLAIM, "arm": "slow", "better": "more"},
        {"claim": "slow is better", **CLAIM, "arm": "slow"},
        {"claim": "the same arm is better", **CLAIM, "arm": "again"},
        {"claim": "slow is worse at equal compute", **CLAIM, "arm": "slow", "better": "more", "at": "compute"},
        {"claim": "slow is worse by far", **CLAIM, "arm": "slow", "better": "more", "by": 9.0},
    ]
    path = suite(arms=ARMS, protocol=claims, evaluate={"choices": "q.jsonl"}, baseline_steps=[24])

    def killed(job, command):
        if len(suite.called) == 5:
            Path(job.folder, "dataflex").mkdir(parents=True)
            raise KeyboardInterrupt
        return main(command)

    suite.instead = killed
    assert main(["compare", path]) == 1
    assert [call[0] for call in suite.called] == ["train", "eval", "train", "eval", "train"]
    suite.instead = None
    assert main(["compare", path]) == 0
    printed = capsys.readouterr().out
    assert len([call for call in suite.called if call[0] == "train"]) == 5 * 2 + 1
    assert main(["compare", path, "--jobs", "2"]) == 0
    assert len([call for call in suite.called if call[0] == "train"]) == 5 * 2 + 1

    found = results()
    assert [line["verdict"] for line in found["claims"]] == ["held", "not held", "not held", "held", "not held"]
    assert found["missing"] == []
    assert any("again and plain are the same configuration" in note for note in found["notes"])
    assert sum(note.startswith("1 of 2 questions of q.jsonl were left out") for note in found["notes"]) == 1
    by_run = {(each["arm"], each["steps"], each["seed"]): each for each in found["runs"]}
    losses = {key: each["metrics"]["eval_loss"] for key, each in by_run.items()}
    lines = {(line["metric"], line["at"], line["arm"]): line for line in found["compared"]}
    gaps = [losses["slow", 3, seed] - losses["plain", 3, seed] for seed in (1, 2)]
    assert lines["eval_loss", "steps", "slow"]["difference"] == pytest.approx(np.mean(gaps), rel=1e-12)
    assert lines["eval_loss", "steps", "again"]["p"] == 1.0
    assert lines["accuracy", "steps", "slow"]["runs"] == 2

    # The loss selector's passes over the pool are in its compute; plain is taken from its longer run's curve there.
    cost = {(line["arm"], line["steps"]): line for line in found["costs"]}
    assert cost["plain", 24]["compute"] > cost["loss", 3]["compute"] > cost["plain", 3]["compute"]
    assert cost["plain", 3]["deciding"] == 0.0
    for seed in (1, 2):
        ends = lines["eval_loss", "compute", "loss"]["values"][str(seed)]
        curve = [losses["plain", steps, seed] for steps in (3, 24)]
        assert ends[0] == losses["loss", 3, seed]
        assert min(curve) - 0.5 <= ends[1] <= max(curve) + 0.5
        assert by_run["loss", 3, seed]["passes"].keys() >= {"decide/forward", "train/backward"}
    for each in found["runs"]:
        assert Path(each["folder"], "dataflex/events.jsonl").is_file()
        assert each["command"].startswith("dataflex train out/runs/")
    page = Path("out/report.html").read_text()
    assert "NOT HELD" in page
    assert "NOT HELD" in printed
    assert {path.name for path in Path("out").glob("*.png")} == {"curves_0.png"}


@pytest.mark.slow
def test_a_failed_arm_does_not_lose_the_others(suite, capsys):
    path = suite(protocol=[{"claim": "slow is worse", **CLAIM, "arm": "slow", "better": "more"}])

    def fails(job, command):
        job.log.write_text("something\ndataflex: out of memory\n")
        return 1 if job.run.arm == "slow" and job.run.seed == 2 else main(command)

    suite.instead = fails
    assert main(["compare", path]) == 1
    found = results()
    (line,) = found["claims"]
    assert (line["verdict"], line["pairs"], line["why"]) == ("not decided", 1, "fewer than two pairs of runs")
    assert "slow, 3 steps, seed 2 failed: exit code 1: dataflex: out of memory" in found["missing"][0]
    assert "failed" in Path("out/results.md").read_text()
    assert "at the same compute" in Path("out/results.md").read_text()
    suite.instead = None
    assert main(["compare", path, "--commands"]) == 0
    told = capsys.readouterr().out.splitlines()[-1]
    assert told.startswith("dataflex train out/runs/slow-3steps-seed2-")


def test_all_mistakes_at_once(suite, tmp_path):
    path = suite(
        step=4,
        arms={
            "plain": {},
            "a": {"dynamic": {"selector": "los"}},
            "b": {"template": "llama3", "seed": 3, "dataset": "onse"},
        },
        baseline="plan",
        protocol=[
            {"claim": "c", "metric": "eval_los", "better": "fewer", "arm": "aa"},
            {"claim": "c", "metric": "accuracy", "better": "more", "arm": "a", "alfa": 0.1},
        ],
        seeds=[1, 1],
        evaluate={"data": "gaol"},
    )
    with pytest.raises(ConfigError) as caught:
        read_suite(Path(path), work=tmp_path)
    told = str(caught.value)
    for each in (
        "step: unknown key; did you mean 'steps'?",
        "baseline: no arm 'plan'; did you mean 'plain'?",
        "protocol[0].arm: no arm 'aa'; did you mean 'a'?",
        "protocol[0].better: ",
        "protocol[0].metric: unknown 'eval_los'; did you mean 'eval_loss'?",
        "protocol[1].alfa: unknown key; did you mean 'alpha'?",
        "protocol[1].metric: accuracy needs evaluate.choices",
        "seeds: one is named twice",
        "arms.b.template: decides what is measured",
        "arms.b.seed: set by the suite",
        "arms.a: dynamic.selector: unknown selector 'los'; did you mean 'loss'?",
        "arms.b: dataset: 'onse' is not defined",
    ):
        assert each in told, told


def test_evaluations_are_checked_too(suite, tmp_path):
    with pytest.raises(ConfigError, match=r"evaluate.data: 'gaol' is not defined.*did you mean 'goal'"):
        read_suite(Path(suite(evaluate={"data": "gaol"})), work=tmp_path)


def test_losses_by_set_need_sets_that_are_evaluated_apart(suite, tmp_path, tiny_model, data_dir):
    """Several held-out sets are one for the Trainer unless it is told otherwise: no claim may wait for their macro."""
    base = base_settings(tiny_model, data_dir) | {"eval_dataset": "goal,ones"}
    del base["num_train_epochs"], base["seed"]
    claims = [{"claim": "c", "arm": "slow", "metric": "eval_macro_loss", "better": "less"}]
    with pytest.raises(ConfigError, match="eval_macro_loss needs eval_on_each_dataset: true in the base"):
        read_suite(Path(suite(base=base, protocol=claims)), work=tmp_path)
    assert read_suite(Path(suite(base={**base, "eval_on_each_dataset": True}, protocol=claims)), work=tmp_path).claims


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"suite": None}, "suite: missing"),
        ({"suite": ""}, "suite: the name is empty, or dots alone"),
        ({"base": "nothing.yaml"}, "nothing.yaml: no such file"),
        ({"steps": 0}, "steps: must be at least 1, found 0"),
        ({"protocol": [{"claim": "c", "arm": "slow", "better": "less"}]}, "protocol[0].metric: missing"),
    ],
    ids=["no name", "an empty one", "no base", "no steps", "no metric"],
)
def test_a_mistake_is_told_once(suite, tmp_path, change, told):
    """Nothing is told of what follows from it."""
    with pytest.raises(ConfigError) as caught:
        read_suite(Path(suite(**change)), work=tmp_path)
    (problem,) = caught.value.problems
    assert told in problem


def test_draws_of_an_arms_own_are_others_for_each_seed(suite, tmp_path):
    """Else the runs of an arm would be one and the same, and its differences no more independent than one is."""

    def draws(**arms):
        read = read_suite(Path(suite(arms=arms, seeds=3)), work=tmp_path)
        assert not read.notes or "data_seed" in read.notes[0]
        return [(run.mapping["dynamic"].get("seed"), run.mapping.get("data_seed")) for run in read.runs]

    block = {"interval_steps": 2, "selector": "random"}
    arms = {name: {"dynamic": {**block, "seed": seed}} for name, seed in (("a", 1), ("b", 2))}
    found = [seed for seed, _ in draws(**arms)]
    assert len(set(found)) == 6
    assert found == [seed for seed, _ in draws(**arms)]
    assert len({seed for _, seed in draws(a={"data_seed": 1}, b={"data_seed": 2})}) == 6
    assert draws(a={}, b={"dynamic": block}) == [(None, None)] * 6


def test_a_loss_of_an_arms_own_is_stated(suite, tmp_path):
    arms = {"plain": {}, "smooth": {"label_smoothing_factor": 0.1}}
    told = read_suite(Path(suite(arms=arms)), work=tmp_path).notes
    assert told[1].startswith("the Trainer's eval_loss of smooth is another one than the base's (label_smoothing_fac")


def test_patches_reach_into_blocks():
    base = {"a": 1, "dynamic": {"selector": "loss", "every": 2}}
    patch = {"dynamic.selector.focus": "high", "dynamic.every": None, "b.c": 2}
    assert patched(base, patch) == {"a": 1, "b": {"c": 2}, "dynamic": {"selector": {"name": "loss", "focus": "high"}}}
    assert base == {"a": 1, "dynamic": {"selector": "loss", "every": 2}}


def test_a_run_is_known_by_its_configuration_and_data(suite, tmp_path, data_dir):
    path = suite()

    def prints():
        running.hash_of.cache_clear()
        return [running.fingerprint(run) for run in read_suite(Path(path), work=tmp_path).runs]

    before = prints()
    assert len(set(before)) == 4
    assert prints() == before
    path = suite(steps=4)
    assert not set(prints()) & set(before)


@pytest.fixture
def copies(tiny_model, data_dir, tmp_path):
    """Copies of data and models of the test's own, which it changes."""
    for source, name in ((data_dir, "data"), (tiny_model, "model"), (tiny_model, "reference")):
        shutil.copytree(source, tmp_path / name)
    return tmp_path


def _truncated(copies):
    file = copies / "data/held.jsonl"
    file.write_text(file.read_text().splitlines()[0] + "\n")


def _columns_swapped(copies):
    file = copies / "data/dataset_info.json"
    info = json.loads(file.read_text())
    info["ones"]["columns"] = {"prompt": "output", "response": "instruction"}
    file.write_text(json.dumps(info))


def _other_weights(name):
    def change(copies):
        with (copies / name / "model.safetensors").open("r+b") as file:
            file.seek(-1, 2)
            last = file.read(1)[0]
            file.seek(-1, 2)
            file.write(bytes([last ^ 1]))

    return change


def _other_module(copies):
    (copies / "plug/rule.py").write_text("WORDS = 3\n")


@pytest.mark.parametrize(
    ("change", "runs", "evaluations"),
    [
        (_truncated, {"plain": False, "rho": False}, True),
        (_columns_swapped, {"plain": True, "rho": True}, False),
        (_other_weights("model"), {"plain": True, "rho": True}, False),
        (_other_weights("reference"), {"plain": False, "rho": True}, False),
        (_other_module, {"plain": True, "rho": True}, False),
    ],
    ids=["evaluation data", "columns", "model", "reference", "plugin's package"],
)
def test_runs_and_evaluations_of_other_inputs_are_others(copies, suite, change, runs, evaluations):
    """What is named anew: the runs' folders by arm, and the key of the evaluation."""
    (copies / "plug").mkdir()
    (copies / "plug/rule.py").write_text("WORDS = 2\n")
    (copies / "plug/__init__.py").write_text(
        "import dataflex\n\n\nclass Mine(dataflex.Orderer):\n    name = 'mine'\n"
        "    card = dataflex.Card(summary='The order of the rows.', paper='none', cost='none')\n\n"
        "    def sort_keys(self, rows, ctx):\n        return rows.indices\n"
    )
    base = base_settings(copies / "model", copies / "data") | {"eval_dataset": "goal", "lr_scheduler_type": "constant"}
    plugins = [str(copies / "plug/__init__.py")]
    del base["num_train_epochs"], base["seed"]
    selector = {"name": "rho_loss", "reference": str(copies / "reference")}
    arms = {"plain": {"dynamic": {"record": True}}, "rho": {"dynamic": {"interval_steps": 2, "selector": selector}}}
    for patch in arms.values():
        patch["dynamic"]["plugins"] = plugins
    path = suite(base=base, arms=arms, seeds=1, evaluate={"data": "held"})
    read = read_suite(Path(path), work=copies)
    jobs = running.jobs_of(read)
    assert running.changed(read, jobs) == []
    change(copies)
    (told,) = running.changed(read, jobs)
    places = {job.run.arm: running._places(read, job.run) for job in jobs}
    for job in jobs:
        folder, evaluation = places[job.run.arm]
        assert (folder != job.folder) == runs[job.run.arm]
        assert (evaluation.name.rpartition(".eval-")[2] != job.evaluation.name.rpartition(".eval-")[2]) == evaluations
        assert (job.run.title in told) == (runs[job.run.arm] or evaluations)


@pytest.mark.parametrize(
    "patch",
    [
        {"max_samples": 3},
        {"stage": "pt"},
        {"enable_thinking": False},
        {"tool_format": "qwen"},
        {"tokenized_path": "copy"},
        {"val_size": 0.5},
        {"bf16_full_eval": True},
    ],
)
def test_arms_that_change_what_is_measured_are_refused(suite, tmp_path, patch):
    (key,) = patch
    with pytest.raises(ConfigError, match=f"arms.other.{key}: decides what is measured, which must be equal"):
        read_suite(Path(suite(arms={"plain": {}, "other": patch})), work=tmp_path)


def test_an_arm_has_other_data_only_where_none_of_it_is_held_out(suite, tmp_path, tiny_model, data_dir):
    arms = {"plain": {}, "other": {"dataset": "alpha"}}
    assert read_suite(Path(suite(arms=arms)), work=tmp_path).runs
    base = base_settings(tiny_model, data_dir) | {"val_size": 0.2}
    del base["num_train_epochs"], base["seed"]
    with pytest.raises(ConfigError, match=r"arms.other.dataset: decides what is measured, since the base's val_size"):
        read_suite(Path(suite(base=base, arms=arms)), work=tmp_path)


@pytest.mark.parametrize(
    ("schedule", "constant"),
    [
        ({"lr_scheduler_type": "constant"}, True),
        ({"lr_scheduler_type": "constant_with_warmup"}, True),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2}, True),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_ratio": 0.1}, False),
        ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0.1}, False),
        ({"lr_scheduler_type": "linear"}, False),
    ],
)
def test_a_learning_rate_that_depends_on_the_number_of_steps_is_not_constant(schedule, constant):
    assert _constant(schedule) == constant


RUN = {"model_name_or_path": "base", "template": "default"}


@pytest.mark.parametrize(
    ("run", "told"),
    [
        ({"finetuning_type": "full"}, ["model_name_or_path=out"]),
        ({"finetuning_type": "freeze"}, ["model_name_or_path=out", "finetuning_type=full", "use_llama_pro=false"]),
        ({}, ["adapter_name_or_path=out"]),
        ({"finetuning_type": "oft"}, ["adapter_name_or_path=out"]),
        ({"adapter_name_or_path": "a"}, ["adapter_name_or_path=out"]),
        ({"adapter_name_or_path": "a,b"}, ["adapter_name_or_path=a,out"]),
        (
            {"adapter_name_or_path": "a", "create_new_adapter": True},
            ["adapter_name_or_path=a,out", "create_new_adapter=false"],
        ),
    ],
)
def test_the_model_that_is_evaluated_is_the_one_that_was_trained(run, told):
    assert trained_model({**RUN, **run}, Path("out")) == told


def test_evaluations_are_checked_as_they_will_be_asked(suite, tmp_path, tiny_model, data_dir):
    """A run with freeze leaves a model; none of its keys are of adapters."""
    base = base_settings(tiny_model, data_dir) | {"finetuning_type": "freeze", "eval_dataset": "goal"}
    del base["num_train_epochs"], base["seed"]
    read = read_suite(Path(suite(base=base, evaluate={"data": "goal"})), work=tmp_path)
    job = running.jobs_of(read)[0]
    (_, command) = job.commands
    assert f"model_name_or_path={job.folder}" in command
    assert "finetuning_type=full" in command
