"""``dataflex mix`` from the command line, on records that are written here instead of by training."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from dataflex.cli import main
from dataflex.config.inputs import hash_of
from dataflex.config.load import load_mapping
from dataflex.config.split import resolve
from dataflex.mixing import fit as fit_module
from dataflex.mixing.fit import predict
from dataflex.mixing.runs import losses_of_run, read_table
from dataflex.mixing.swarm import read_swarm
from dataflex.plan.proportions import read_proportions
from tests.config.conftest import _plain_environment, add_column, config, project
from tests.docs.pages import EXAMPLES

__all__ = ["_plain_environment", "config", "project"]

SLOPES = {"a": (-1.0, 0.6), "b": (0.5, -0.3)}


@pytest.fixture(autouse=True)
def _few_restarts(monkeypatch):
    monkeypatch.setattr("dataflex.mixing.fit.RESTARTS", 2)


@pytest.fixture
def base(project, config):
    mapping = config(eval_dataset="a,b", overwrite_output_dir=True, dynamic={"mixer": "uniform"})
    (project / "run.json").write_text(json.dumps(mapping))
    return project / "run.json"


def run(*arguments, code=0, capsys=None):
    assert main(["mix", *map(str, arguments)]) == code
    captured = capsys.readouterr()
    return captured.out if code == 0 else captured.err


def record(folder, losses, *, ended=True):
    """Write the record of a run that trained and evaluated."""
    (folder / "dataflex").mkdir(parents=True, exist_ok=True)
    events = [{"event": "run_started", "step": 0, "time": 0.0, "row_space": {"domains": {"a": 100, "b": 50}}}]
    if ended:
        events.append({"event": "finished", "step": 5, "time": 1.0, "metrics": {}})
        for name, loss in losses.items():
            events.append({"event": "evaluated", "step": 5, "time": 2.0, "metrics": {f"eval_{name}_loss": loss}})
    (folder / "dataflex" / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def law(mixture):
    return {name: 2 + math.exp(np.dot(slopes, mixture)) for name, slopes in SLOPES.items()}


def recorded(folder):
    swarm = read_swarm(folder)
    for name, mixture in zip(swarm.runs, swarm.mixtures, strict=True):
        record(swarm.output_dir(name), law(mixture))
    return swarm


# ---------------------------------------------------------------- swarm


def test_a_swarm_is_complete_configurations(base, project, capsys):
    told = run("swarm", base, "--runs", 9, "--out", "swarm", "learning_rate=0.5", capsys=capsys)
    assert "9 mixtures of 2 domains in swarm" in told
    assert "9 of them are not run yet: dataflex train swarm/configs/run-0001.yaml" in told
    ratios = (project / "swarm" / "ratios.csv").read_text().splitlines()
    assert ratios[0] == "run,a,b"
    assert len(ratios) == 10
    for line in ratios[1:]:
        name, *shares = line.split(",")
        path = project / "swarm" / "configs" / f"{name}.yaml"
        mapping = yaml.safe_load(path.read_text())
        assert mapping["dynamic"]["mixer"] == {
            "name": "static",
            "proportions": dict(zip(("a", "b"), map(float, shares), strict=True)),
        }
        assert mapping["output_dir"] == f"swarm/runs/{name}"
        assert mapping["learning_rate"] == 0.5
        assert (mapping["do_eval"], mapping["eval_on_each_dataset"]) == (True, True)
        assert "overwrite_output_dir" not in mapping
        assert resolve(load_mapping(path), path.parent).dynamic.mixer.name == "static"


def test_natural_sizes_are_rows_bytes_given_or_from_a_run(base, project, capsys):
    def natural(*options):
        run("swarm", base, "--runs", 4, "--out", "s", *options, capsys=capsys)
        swarm = read_swarm(project / "s")
        (project / "s" / "swarm.json").unlink()
        return swarm.unit, dict(zip(swarm.names, swarm.sizes.tolist(), strict=True))

    assert natural() == ("rows", {"a": 100, "b": 50})
    sizes = {name: (project / "data" / file).stat().st_size for name, file in (("a", "a.jsonl"), ("b", "b.json"))}
    assert natural("--natural", "bytes") == ("bytes", sizes)
    assert natural("stage=pt") == ("bytes", sizes)  # packed rows are not rows of the files
    heads = {"a": sum(map(len, (project / "data" / "a.jsonl").read_bytes().splitlines(keepends=True)[:10]))}
    unit, limited = natural("stage=pt", "max_samples=10")
    assert (unit, limited["a"]) == ("bytes", heads["a"])
    assert limited["b"] == round(sizes["b"] * 10 / 50)  # a list in one line: its share
    assert natural("max_samples=70") == ("rows", {"a": 70, "b": 50})
    assert natural("--natural", "b=3,a=1") == ("given", {"a": 1, "b": 3})
    record(project / "old", {})
    assert natural("--natural", "old") == ("rows", {"a": 100, "b": 50})


def test_the_same_command_takes_a_swarm_up_and_more_runs_extend_it(base, project, capsys):
    run("swarm", base, "--runs", 4, "--out", "swarm", capsys=capsys)
    before = read_swarm(project / "swarm").mixtures
    run("swarm", base, "--runs", 4, "--out", "swarm", capsys=capsys)
    run("swarm", base, "--runs", 7, "--out", "swarm", capsys=capsys)
    after = read_swarm(project / "swarm").mixtures
    np.testing.assert_array_equal(after[:4], before)
    assert len(after) == 7
    told = run("swarm", base, "--runs", 4, "--out", "swarm", code=2, capsys=capsys)
    assert "holds a swarm with 7 runs, more than the 4 asked for" in told
    told = run("swarm", base, "--runs", 7, "--seed", 1, "--out", "swarm", "seed=3", code=2, capsys=capsys)
    assert "another configuration (or other overrides, data or models), other settings of the draws" in told


def test_a_swarm_of_other_data_is_not_extended(base, project, capsys):
    """The same number of rows under the same names, and another text in one."""
    run("swarm", base, "--runs", 4, "--out", "swarm", capsys=capsys)
    file = project / "data/a.jsonl"
    file.write_text(file.read_text().replace("question 3", "question x", 1))
    hash_of.cache_clear()
    told = run("swarm", base, "--runs", 5, "--out", "swarm", code=2, capsys=capsys)
    assert "holds a swarm with another configuration (or other overrides, data or models); name another folder" in told


def test_a_selector_and_plugins_are_kept(base, project, config, capsys):
    shutil.copy(EXAMPLES / "my_selector.py", project / "mine.py")
    mapping = config(dynamic={"selector": "random", "interval_steps": 5, "keep_ratio": 0.5, "warmup_steps": 2})
    mapping["dynamic"]["plugins"] = ["mine.py"]
    (project / "sub").mkdir()
    (project / "sub" / "run.json").write_text(json.dumps(mapping))
    told = run("swarm", project / "sub" / "run.json", "--runs", 3, "--out", "swarm", capsys=capsys)
    assert "note: the configuration has no 'eval_dataset'" in told
    assert "Olmix advises at least 3 (domains + 1) = 9" in told
    dynamic = yaml.safe_load((project / "swarm/configs/run-0002.yaml").read_text())["dynamic"]
    assert dynamic["plugins"] == [str(project / "mine.py")]
    assert dynamic["warmup_steps"] == 2
    assert dynamic["selector"] == "random"


def test_names_of_domains_survive_yaml_and_csv(project, config, capsys):
    names = ["no", "1", "a: b", 'with "quotes"', "\u00dcn\u00ef"]
    add_column(project, "source", "no")
    rows = map(json.loads, (project / "data/a.jsonl").read_text().splitlines())
    named = [json.dumps({**row, "source": names[place % 5]}) for place, row in enumerate(rows)]
    (project / "data/a.jsonl").write_text("\n".join(named))
    (project / "run.json").write_text(json.dumps(config(dynamic={"mixer": "uniform", "domain_column": "source"})))
    natural = {"names": names, "proportions": [0.2] * 5}
    (project / "natural.json").write_text(json.dumps(natural))
    run("swarm", "run.json", "--runs", 9, "--out", "swarm", "--natural", "natural.json", capsys=capsys)
    for run_name, mixture in zip(
        read_swarm(project / "swarm").runs, read_swarm(project / "swarm").mixtures, strict=True
    ):
        mapping = load_mapping(project / "swarm" / "configs" / f"{run_name}.yaml")
        assert mapping["dynamic"]["mixer"]["proportions"] == dict(zip(names, mixture.tolist(), strict=True))
    ratios = read_table(project / "swarm" / "ratios.csv", shares=True)
    assert list(ratios.columns) == names
    np.testing.assert_array_equal(ratios.values, read_swarm(project / "swarm").mixtures)


@pytest.mark.parametrize(
    ("options", "changes", "told"),
    [
        (["--natural", "webb=1,b=2"], {}, "--natural: webb: no such domain"),
        (["--natural", "nothing"], {}, "--natural: 'nothing' is neither 'rows' nor 'bytes'"),
        (["--natural", "a=x,b=1"], {}, "--natural: 'a=x' is not name=number"),
        (
            ["--natural", "a=1,b=1,t=0.000001"],
            {"dataset": "a,b,t"},
            "--runs: in none of the 5 mixtures is there any of t (natural share 5e-07)",
        ),
        (["--natural", "a=1000000,b=1"], {}, "--runs: only 1 of 5 distinct mixtures"),
        (["--strengths", "1,2"], {}, "--strengths: expected LEAST,MOST,COUNT"),
        (["--max-ratio", "0.5"], {}, "--max-ratio: a cap of 0.5 times"),
        ([], {"dataset": "a,c"}, "dataset: 'c' is not defined"),
        ([], {"dataset": "a"}, "--natural: sizes must be finite numbers"),
        ([], {"dataset": "a,hub"}, "--natural: the rows of hub are not quick to count"),
        ([], {"dynamic": {"mixer": "uniform", "domain_column": "source"}}, "--natural: domains come from the rows"),
        ([], {"dynamic": {"mixer": "uniform", "intervall_steps": 3}}, "dynamic.intervall_steps: unknown key"),
        (
            [],
            {"dynamic": {"mixer": "uniform", "warmup_steps": 2, "initial_proportions": [1, 1]}},
            "dynamic.initial_proportions: a run of a swarm keeps one mixture",
        ),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(project, config, capsys, options, changes, told):
    (project / "run.json").write_text(json.dumps(config(**{"dynamic": {"mixer": "uniform"}, **changes})))
    error = run("swarm", "run.json", "--runs", 5, "--out", "swarm", *options, code=2, capsys=capsys)
    assert told in error
    assert not (project / "swarm").exists()


def test_runs_are_run_once_and_a_failure_stops_until_the_next_time(base, project, capsys, monkeypatch):
    trained = []

    def train(command, out):
        assert out is (sys.stderr if trained[2:] else None)
        assert command[:4] == [sys.executable, "-m", "dataflex", "train"]
        name = command[4].split("/")[-1].removesuffix(".yaml")
        trained.append(name)
        if trained.count(name) == 1 and name == "run-0002":
            record(project / "swarm/runs" / name, {}, ended=False)
            return -9
        record(project / "swarm/runs" / name, {"a": 1.0, "b": 2.0})
        return 0

    monkeypatch.setattr("dataflex.mixing.runs.run_child", train)
    command = ["mix", "swarm", str(base), "--runs", "3", "--out", "swarm", "--run"]
    assert main(command) == 1
    assert "run-0002: ended with exit code -9" in capsys.readouterr().out
    assert trained == ["run-0001", "run-0002"]
    trained.append("json")
    assert main([*command, "--json"]) == 0
    told = capsys.readouterr()
    assert "run-0001: finished before" in told.err
    values = json.loads(told.out)
    assert [run["finished"] for run in values["runs"]] == [True] * 3
    assert trained == ["run-0001", "run-0002", "json", "run-0002", "run-0003"]
    assert main(command) == 0
    assert "all runs are finished; next: dataflex mix fit swarm" in capsys.readouterr().out


# ---------------------------------------------------------------- fit and propose


@pytest.mark.slow
def test_from_records_to_a_mixture_that_static_takes(base, project, capsys):
    run("swarm", base, "--runs", 9, "--out", "swarm", capsys=capsys)
    recorded(project / "swarm")
    told = run("fit", "swarm", capsys=capsys)
    assert "log_linear on 9 runs; quality by leave-one-out" in told
    assert "note:" not in told
    values = json.loads(run("fit", "swarm", "--json", capsys=capsys))
    assert (values["method"], len(values["runs"]), set(values["quality"])) == ("log_linear", 9, {"a", "b"})
    assert set(values["quality"]["a"]) == {"spearman", "error", "spread"}
    Path("mixture.json").write_text("notes of somebody's own")
    told = run("propose", "swarm", "--kl", 0.2, "--out", "mixture.json", code=2, capsys=capsys)
    assert "--out: mixture.json is there and holds no proportions" in told
    assert Path("mixture.json").read_text() == "notes of somebody's own"
    Path("mixture.json").unlink()
    told = run("propose", "swarm", "--kl", 0.2, "--out", "mixture.json", capsys=capsys)
    assert "use it with 'mixer: {name: static, from: mixture.json}'" in told
    assert "note: no --budget (in rows)" in told
    content = read_proportions("mixture.json")
    assert content.method == "log_linear"
    values = json.loads(run("propose", "swarm", "--kl", 0.2, "--out", "mixture.json", "--json", capsys=capsys))
    assert (values["out"], values["proportions"]) == ("mixture.json", content.by_name)
    assert "no --budget (in rows)" in values["notes"][0]
    grid = np.linspace(0.0005, 0.9995, 20_000)
    losses = [np.mean(list(law((x, 1 - x)).values())) for x in grid]
    divergence = grid * np.log(grid / (2 / 3)) + (1 - grid) * np.log((1 - grid) / (1 / 3))
    assert content.by_name["a"] == pytest.approx(grid[np.argmin(losses + 0.2 * divergence)], abs=2e-3)
    assert content.details["predicted"]["a"] == pytest.approx(law(content.proportions)["a"], abs=1e-3)
    assert content.provenance["config_digest"] == read_swarm(project / "swarm").config_digest
    assert content.provenance["fit"]["command"] == "dataflex mix fit"
    mapping = json.loads(base.read_text())
    mapping["dynamic"] = {"mixer": {"name": "static", "from": "mixture.json"}}
    assert resolve(mapping, project).dynamic.mixer.name == "static"


def unlawful(project):
    """Nine runs; the losses of ``wild`` follow no law, those of ``flat`` do not depend on the mixture."""
    mixtures = np.random.default_rng(0).dirichlet(np.ones(2), size=9)
    (project / "own").mkdir()
    lines = [f"r{i},{x!r},{1 - x!r}" for i, x in enumerate(mixtures[:, 0].tolist())]
    (project / "own" / "ratios.csv").write_text("\n".join(["run,web,code", *lines]) + "\n")
    lines = [f"r{i},{law(mixture)['a']!r},{i},3.0" for i, mixture in enumerate(mixtures)]
    (project / "m.csv").write_text("\n".join(["run,goal,wild,flat", *lines]) + "\n")


@pytest.mark.slow
def test_a_task_whose_fit_says_nothing_is_told_and_left_out(project, capsys, monkeypatch):
    unlawful(project)
    original = fit_module.out_of_fold

    def blown(fit, mixtures, losses, folds):  # a fold whose fit goes astray where it was not fitted
        predicted = original(fit, mixtures, losses, folds)
        if losses[1] == 1.0:
            predicted[0] = 1e138
        return predicted

    monkeypatch.setattr(fit_module, "out_of_fold", blown)
    told = run("fit", "own", "--metrics", "m.csv", capsys=capsys)
    assert "wild: the fit says nothing about runs that it has not seen: it is off by 1.11e+137 nats" in told
    assert "'mix propose' leaves wild out" in told
    assert "goal:" not in told
    assert "flat:" not in told
    told = run("propose", "own", "--natural", "web=1,code=1", "--kl", 0.2, capsys=capsys)
    assert "note: left out, as unseen runs are not predicted at all (see 'mix fit'): wild" in told
    content = read_proportions("own/proportions.json")
    assert content.details["left_out"] == ["wild"]
    assert sorted(content.details["predicted"]) == ["flat", "goal"]
    run("propose", "own", "--natural", "web=1,code=1", "--kl", 0.2, "--tasks", "goal,flat", capsys=capsys)
    assert read_proportions("own/proportions.json").by_name == content.by_name
    told = run("propose", "own", "--natural", "web=1,code=1", "--tasks", "goal,wild", code=2, capsys=capsys)
    assert "--tasks: wild: its fit is off by 1.11e+137 nats on runs that it has not seen" in told
    run("fit", "own", "--metrics", "m.csv", "--tasks", "wild", capsys=capsys)
    told = run("propose", "own", "--natural", "web=1,code=1", code=2, capsys=capsys)
    assert "no fit predicts a run that it has not seen (wild), so nothing can be proposed" in told


def test_a_law_is_bounded_where_it_was_not_fitted():
    found = predict(np.array([0.0, 0.0, 700.0, 0.0]), np.array([[1.0, 0.0], [0.0, 1.0]]))
    np.testing.assert_allclose(found, [1 + math.exp(30), 2.0])


@pytest.mark.slow
def test_a_proposal_of_one_domain_alone_is_warned_about(base, project, capsys):
    run("swarm", base, "--runs", 9, "--out", "swarm", capsys=capsys)
    recorded(project / "swarm")
    run("fit", "swarm", "--tasks", "a", capsys=capsys)
    told = run("propose", "swarm", "--kl", 0, capsys=capsys)
    assert "warning: a has 100.0% of the proportions, and the others are hardly served" in told
    assert "warning:" not in run("propose", "swarm", "--kl", 0, "--cap", "a=0.6", capsys=capsys)


@pytest.mark.slow
def test_caps_of_a_proposal(base, project, capsys):
    run("swarm", base, "--runs", 9, "--out", "swarm", capsys=capsys)
    recorded(project / "swarm")
    run("fit", "swarm", "--tasks", "a", capsys=capsys)
    run("propose", "swarm", "--kl", 0, capsys=capsys)
    assert read_proportions("swarm/proportions.json").by_name == {"a": 1.0, "b": 0.0}
    told = run("propose", "swarm", "--kl", 0, "--budget", 500, "--max-epochs", 4, capsys=capsys)
    assert read_proportions("swarm/proportions.json").by_name["a"] == pytest.approx(0.8)  # 4 x 100 / 500
    assert "at its cap" in told
    run("propose", "swarm", "--kl", 0, "--cap", "a=0.6", capsys=capsys)
    assert read_proportions("swarm/proportions.json").by_name["a"] == pytest.approx(0.6)
    told = run("propose", "swarm", "--budget", 1000, code=2, capsys=capsys)
    assert "caps: cannot be met: the largest shares that they allow sum to 0.6" in told
    for options, message in (
        (["--cap", "aa=0.5"], "--cap: aa: no such domain; did you mean 'a'?"),
        (["--max-epochs", 2], "--max-epochs: has no effect without --budget"),
        (["--budget", -1], "--budget and --max-epochs: must be above 0"),
        (["--tasks", "b"], "--tasks: b: was not fitted"),
        (["--natural", "a=1"], "--natural: b: missing"),
    ):
        assert message in run("propose", "swarm", *options, code=2, capsys=capsys)


@pytest.mark.slow
def test_losses_of_ones_own_without_a_swarm(project, capsys):
    rng = np.random.default_rng(0)
    mixtures = rng.dirichlet(np.ones(2), size=9)
    (project / "own").mkdir()
    lines = [f"r{i},{x!r},{1 - x!r}" for i, x in enumerate(mixtures[:, 0].tolist())]
    (project / "own" / "ratios.csv").write_text("\n".join(["run,web,code", *lines]) + "\n")
    values = [law(mixture)["a"] for mixture in mixtures]
    lines = [f"r{i},{value!r}" for i, value in enumerate(values)]
    (project / "m.csv").write_text("\n".join(["run,goal", *lines]) + "\n")
    assert "--metrics: missing" in run("fit", "own", code=2, capsys=capsys)
    assert "mixing_law on 9 runs" in run("fit", "own", "--method", "mixing_law", "--metrics", "m.csv", capsys=capsys)
    assert "--natural: missing" in run("propose", "own", code=2, capsys=capsys)
    run("propose", "own", "--natural", "web=1,code=1", "--kl", 5, capsys=capsys)
    assert 0.5 < read_proportions("own/proportions.json").by_name["web"] < 0.6

    (project / "m.csv").write_text("\n".join(["run,goal", *lines[:3], "r3,nan", "r4,", *lines[5:]]) + "\n")
    told = run("fit", "own", "--metrics", "m.csv", code=2, capsys=capsys)
    assert "run r3, goal: nan is not a finite number" in told
    assert "run r4, goal: nothing is not a finite number" in told
    told = run("fit", "own", "--metrics", "m.csv", "--without", "r3,r4", capsys=capsys)
    assert "on 7 runs" in told
    assert "note: 7 runs for 2 domains" in told
    assert "did you mean" in run("fit", "own", "--metrics", "m.csv", "--without", "r33", code=2, capsys=capsys)
    (project / "m.csv").write_text("\n".join(["run,goal", *lines, "r99,1.0"]) + "\n")
    assert "run r99: has losses, but no mixture" in run("fit", "own", "--metrics", "m.csv", code=2, capsys=capsys)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("run,web,code\nr0,0.5,0.6\n", "run r0: proportions must be at least 0 and sum to 1, the sum is 1.1"),
        ("run,web,code\nr0,1.5,-0.5\n", "run r0: proportions must be at least 0"),
        ("run,web,code\nr0,0.5\n", "run r0: 1 numbers for 2 columns"),
        ("run,web,code\nr0,0.5,0.5\nr0,0.4,0.6\n", "run r0 is there twice"),
        ("web,code\n0.5,0.5\n", "the first line must be 'run'"),
        ("run,web,code\n", "holds no run"),
        ("run,web,\nr0,0.5,0.5\n", "column 3 has no name"),
        ("run,web,code\n,0.5,0.5\n", "a line without the name of a run: ,0.5,0.5"),
        (None, "DIR: own holds no ratios.csv"),
    ],
)
def test_bad_mixtures_are_told(project, capsys, text, told):
    (project / "own").mkdir()
    if text is not None:
        (project / "own" / "ratios.csv").write_text(text)
    (project / "m.csv").write_text("run,goal\nr0,1\n")
    assert told in run("fit", "own", "--metrics", "m.csv", code=2, capsys=capsys)


@pytest.mark.slow
def test_unfinished_and_broken_runs(base, project, capsys):
    run("swarm", base, "--runs", 9, "--out", "swarm", capsys=capsys)
    told = run("fit", "swarm", code=2, capsys=capsys)
    assert "no run has a held-out loss yet" in told
    swarm = recorded(project / "swarm")
    record(swarm.output_dir("run-0003"), {}, ended=False)
    told = run("fit", "swarm", capsys=capsys)
    assert "note: 1 of 9 runs are not finished and were left out (run-0003)" in told
    record(swarm.output_dir("run-0004"), {"a": None, "b": 2.0})
    told = run("fit", "swarm", code=2, capsys=capsys)
    assert "run run-0004: the held-out loss of a is not finite; leave it out with --without run-0004" in told
    record(swarm.output_dir("run-0004"), {"a": 1.0})  # killed between two evaluations
    assert "2 of 9 runs are not finished" in run("fit", "swarm", capsys=capsys)
    record(swarm.output_dir("run-0004"), {"a": 1.0, "b": 2.0, "c": 1.0})
    assert "run run-0001: has no held-out loss of c" in run("fit", "swarm", code=2, capsys=capsys)
    assert "log_linear on 7 runs" in run("fit", "swarm", "--without", "run-0004", capsys=capsys)
    assert "--folds: must be 0" in run("fit", "swarm", "--folds", 1, code=2, capsys=capsys)
    assert "log_linear on 8 runs" in run("fit", "swarm", "--tasks", "a,b", capsys=capsys)
    told = run("fit", "swarm", "--tasks", "c", "--without", "run-0004", code=2, capsys=capsys)
    assert "--tasks: c: no run has a held-out loss of it" in told


def test_losses_by_token_are_preferred_and_averages_are_no_set(tmp_path):
    def losses(*metrics):
        events = [{"event": "evaluated", "step": 1, "time": 0.0, "metrics": each} for each in metrics]
        (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
        return losses_of_run(tmp_path)

    web = {"eval_web_loss": 2.0, "eval_web_token_loss": 2.5, "eval_web_perplexity": 12.2}
    totals = {"eval_loss": 2.4, "eval_micro_loss": 2.4, "eval_macro_loss": 2.2}
    assert losses(web, {"eval_code_loss": 1.0}, totals) == {"web": 2.5, "code": 1.0}
    assert losses({"eval_web_loss": 3.0}, web) == {"web": 2.5}
    assert losses({"eval_loss": 3.0}) == {"eval": 3.0}
    assert losses({"eval_loss": 3.0, "eval_token_loss": 3.1}) == {"eval": 3.1}
    assert losses({"eval_token_loss": 2.0, "eval_token_token_loss": 2.2}) == {"token": 2.2}


# ---------------------------------------------------------------- mixmin and chameleon on saved numbers


def test_mixmin_from_a_matrix(project, capsys):
    rng = np.random.default_rng(0)
    lines = ["web,code,length"]
    lines += [f"{-rng.uniform(5, 9)},{-rng.uniform(4, 9)},4" for _ in range(50)]
    (project / "m.csv").write_text("\n".join(lines) + "\n")
    told = run("mixmin", "--matrix", "m.csv", "--out", "mix.json", capsys=capsys)
    assert "nats per token on held-out pieces:" in told
    content = read_proportions("mix.json")
    assert content.names == ("web", "code")
    assert content.by_name["code"] > 0.5
    values = json.loads(run("mixmin", "--matrix", "m.csv", "--out", "mix.json", "--json", capsys=capsys))
    assert set(values) == {"out", "method", "proportions", "details"}
    assert values["proportions"] == content.by_name
    assert content.details["fitted"]["mixmin"] <= content.details["fitted"]["equal"]
    assert list(content.provenance["inputs"]) == ["m.csv"]
    assert "give one of the two" in run("mixmin", "--out", "x.json", code=2, capsys=capsys)
    assert "--target: missing" in run("mixmin", "--models", "a=x,b=y", "--out", "x.json", code=2, capsys=capsys)
    told = run("mixmin", "--models", "a=x", "--target", "m.csv", "--out", "x.json", code=2, capsys=capsys)
    assert "must end in .jsonl, .json or .txt" in told or "needs at least two domains" in told


def test_chameleon_from_embeddings(project, capsys):
    means = {"web": np.array([1.0, 0.0]), "code": np.array([0.0, 4.0]), "math": np.array([0.2, 3.0])}
    np.savez(project / "e.npz", **means)
    run("chameleon", "--embeddings", "e.npz", "--out", "pre.json", capsys=capsys)
    run("chameleon", "--embeddings", "e.npz", "--purpose", "finetuning", "--out", "fine.json", capsys=capsys)
    pre, fine = read_proportions("pre.json"), read_proportions("fine.json")
    assert pre.method == "chameleon (pretraining)"
    assert fine.by_name["web"] == max(fine.proportions)
    assert pre.by_name["web"] == min(pre.proportions)
    assert pre.details["scores"] == fine.details["scores"]
    assert "give one of the two" in run("chameleon", "--out", "x.json", code=2, capsys=capsys)
    assert "--domains: missing" in run("chameleon", "--model", "m", "--out", "x.json", code=2, capsys=capsys)


@pytest.fixture
def numbers(project):
    """A matrix, embeddings, and files that hold neither."""
    logs = -np.random.default_rng(0).uniform(5, 9, size=(20, 2))
    np.savez(project / "m.npz", names=["web", "code"], log_likelihoods=logs, lengths=np.full(20, 4.0))
    np.savez(project / "scalar.npz", names="web", log_likelihoods=logs, lengths=np.full(20, 4.0))
    np.savez(project / "losses.npz", names=["web", "code"], log_likelihoods=-logs, lengths=np.full(20, 4.0))
    np.savez(project / "e.npz", web=np.array([1.0, 0.0]), code=np.array([0.0, 4.0]))
    (project / "empty.npz").write_bytes(b"")
    (project / "folder").mkdir()
    return project


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("mixmin --matrix empty.npz --out x.json", "empty.npz: cannot be read: No data left in file"),
        ("chameleon --embeddings empty.npz --out x.json", "empty.npz: cannot be read: No data left in file"),
        ("mixmin --matrix none.npz --out x.json", "none.npz: cannot be read: No such file or directory\n"),
        ("mixmin --matrix scalar.npz --out x.json", "scalar.npz: 1 names, but log-likelihoods of shape [20, 2]"),
        ("mixmin --matrix losses.npz --out x.json", "some are above 0, so that they are none; are they losses?"),
        ("mixmin --matrix m.npz --out x.json --rate nan", "argument --rate: invalid number value: 'nan'"),
        ("chameleon --embeddings e.npz --out x.json --ridge inf", "argument --ridge: invalid number value: 'inf'"),
        ("mixmin --matrix none.npz --out m.npz/x.json", "--out: {here}/m.npz is a file, not a folder"),
        ("mixmin --matrix none.npz --out folder", "--out: folder is there and holds no proportions"),
        ("chameleon --embeddings none.npz --out e.npz/x.json", "--out: {here}/e.npz is a file, not a folder"),
        ("mixmin --matrix m.npz --out x.json --most-texts 9", "--most-texts: has no effect with --matrix"),
        ("mixmin --matrix m.npz --out x.json --save-matrix y.npz", "--save-matrix: has no effect with --matrix"),
        ("chameleon --embeddings e.npz --out x.json --column q", "--column: has no effect with --embeddings"),
        ("mixmin --models a=x,b=y --target t.txt --save-matrix y --out x.json", "--save-matrix: y: must end in .npz"),
        ("chameleon --model x --domains a=b,c=d --out x.json", "--model: no such folder: x"),
        (
            "mixmin --models a=folder,b=y --target t.txt --out x.json",
            "--models: folder holds no model: none of config.json",
        ),
        ("mixmin --matrx m.npz --out x.json", "did you mean '--matrix'?"),
        ("mixnim --matrix m.npz --out x.json", "invalid choice: 'mixnim'"),
        ("chameleon --embeddings e.npz --purpose finetune --out x.json", "did you mean 'finetuning'?"),
    ],
)
def test_mistakes_are_told_before_anything_is_computed(numbers, capsys, command, told):
    (numbers / "t.txt").write_text("a text\n")
    (numbers / "b").write_text("a text\n")
    assert told.format(here=numbers) in run(*command.split(), code=2, capsys=capsys)
    assert not (numbers / "x.json").exists()


# ---------------------------------------------------------------- help


def test_help_explains_each_step_with_an_example(capsys):
    assert main(["mix", "--help"]) == 0
    whole = capsys.readouterr().out
    assert main(["mix"]) == 0
    assert capsys.readouterr().out.strip() == whole.strip()
    for step in ("swarm", "fit", "propose", "mixmin", "chameleon"):
        assert f"  dataflex mix {step} " in whole
        assert main(["mix", step, "--help"]) == 0
        assert f"example:\n  dataflex mix {step} " in capsys.readouterr().out
    assert main(["mix", "swrm"]) == 2
    assert "swarm" in capsys.readouterr().err


def test_light_commands_load_nothing_heavy(project, base):
    code = (
        "import sys\nfrom dataflex.cli import main\n"
        "main(['--help'])\nmain(['mix', '--help'])\nmain(['mix', 'swarm', '--help'])\n"
        f"assert main(['mix', 'swarm', {str(base)!r}, '--runs', '4', '--out', 'light']) == 0\n"
        "heavy = {'torch', 'scipy', 'llamafactory', 'transformers', 'lightgbm', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
