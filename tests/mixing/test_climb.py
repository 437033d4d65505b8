"""CLIMB's search: which mixtures a round gets, the choice at the end, the rounds on disk, what rounds are good for."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import yaml

from dataflex.errors import ConfigError
from dataflex.mixing import climb
from dataflex.mixing import fit as fitting
from dataflex.mixing.fit import Fit, Quality
from dataflex.mixing.swarm import Swarm, read_swarm, sample_swarm, settings_of
from dataflex.plan.proportions import read_proportions
from dataflex.rng import stream
from tests.config.conftest import _plain_environment, config, project
from tests.mixing.test_mix_commands import base, law, record, run

__all__ = ["_plain_environment", "base", "config", "project"]


@pytest.fixture(autouse=True)
def _less_work(monkeypatch):
    monkeypatch.setattr("dataflex.mixing.fit.RESTARTS", 1)
    monkeypatch.setattr("dataflex.mixing.fit._OFFSETS", np.array([-1.0, 0.5]))
    monkeypatch.setattr("dataflex.mixing.propose._DRAWS", 10_000)


def swarm_of(sizes, runs, seed):
    names = tuple(f"d{k}" for k in range(len(sizes)))
    settings = settings_of("olmix", runs, seed)
    return Swarm(
        folder=None, names=names, sizes=sizes, unit="given", settings=settings, runs=(), mixtures=np.empty((0, 0)),
        held_out=("t",), config_digest="", provenance={},
    )  # fmt: skip


def linear(slopes, error):
    """A fit whose prediction is 2 + exp(slopes . p)."""
    quality = {"t": Quality(spearman=1.0, error=error, spread=1.0)}
    theta = np.array([[math.log(2.0), 0.0, *slopes]])
    return Fit(method="log_linear", names=("d0", "d1", "d2"), tasks=("t",), theta=theta, quality=quality)


# ---------------------------------------------------------------- a round


def test_a_round_is_drawn_from_the_best_that_no_run_has_had():
    """The rule in words: sort by prediction, leave out what was run, keep the first N, draw M without replacement."""
    best = np.array([[x, 1 - x] for x in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)])
    earlier = np.array([[0.8, 0.2], [0.1, 0.9], [0.6, 0.4]])
    left = [[0.9, 0.1], [0.7, 0.3], [0.5, 0.5]]  # N = 3 of those that were not run
    seen = set()
    for seed in range(40):
        found = climb.next_round(best, earlier, 2, 3, 1e-5, seed)
        expected = [left[i] for i in stream(seed, "mixing.climb", 3).choice(3, size=2, replace=False)]
        np.testing.assert_allclose(found, expected)
        seen |= {round(x, 1) for x in found[:, 0]}
    assert seen == {0.9, 0.7, 0.5}


def test_a_round_looks_past_candidates_that_count_as_earlier_runs():
    """Any number of candidates may lie by one run; where too few are left, the round is refused."""
    corner = np.array([[1 - x, x] for x in (0.0, 1e-7, 2e-7, 3e-7, 4e-7)])
    best = np.concatenate([corner, [[0.6, 0.4], [0.5, 0.5]]])
    found = climb.next_round(best, corner[:1], 2, 3, 1e-5, 7)
    assert sorted(found[:, 0]) == [0.5, 0.6]
    with pytest.raises(ConfigError, match=r"--runs: only 2 of 7 distinct candidates had no run, .* has 3"):
        climb.next_round(best, corner[:1], 3, 3, 1e-5, 7)


def test_candidates_are_ranked_by_the_prediction_and_distinct():
    swarm = swarm_of(np.array([5.0, 3.0, 2.0]), 10, 3)
    fit = linear((-1.0, 0.5, 1.0), 0.01)
    free = climb.ranked(fit, swarm, np.ones(3), ["t"])[:200]
    assert free.shape == (200, 3)
    assert len(np.unique(free, axis=0)) == 200
    np.testing.assert_allclose(free[0], [1, 0, 0])  # the corner is drawn often, and there once
    predicted = fit.predict(free)[:, 0]
    assert (np.diff(predicted) >= 0).all()
    assert predicted.max() < np.quantile(fit.predict(sample_swarm(swarm.sizes, settings_of("olmix", 500, 9))), 0.5)
    capped = climb.ranked(fit, swarm, np.array([0.5, 1.0, 1.0]), ["t"])
    assert capped[:, 0].max() <= 0.5


@pytest.mark.parametrize(
    ("error", "measured", "chosen"),
    [(0.05, 2.5, "predicted"), (0.2, 2.5, "measured"), (0.05, 2.3, "measured"), (0.0, 2.3678795, "predicted")],
)
def test_a_proposal_must_be_ahead_by_more_than_the_predictor_errs(error, measured, chosen):
    proposed = np.array([1.0, 0.0, 0.0])  # predicted: 2 + exp(-1) = 2.3678794
    runs = np.array([[0.2, 0.4, 0.4], [0.3, 0.3, 0.4]])
    shares, details = climb.choose(linear((-1.0, 0.5, 1.0), error), proposed, runs, np.array([2.9, measured]), ["t"])
    assert details["chosen"] == chosen
    assert details["predicted"] == pytest.approx(2.3678794)
    np.testing.assert_array_equal(shares, proposed if chosen == "predicted" else runs[1])


def test_without_a_run_within_the_caps_the_proposal_is_taken():
    nothing = climb.choose(linear((0, 0, 1), 1.0), np.array([1.0, 0, 0]), np.empty((0, 3)), np.empty(0), ["t"])
    assert nothing[1]["chosen"] == "predicted"


# ---------------------------------------------------------------- what rounds are good for


class Smooth:
    """A predictor that knows more where there are more runs: kernel ridge regression, with its leave-one-out error."""

    def __init__(self, mixtures, losses):
        self.points, self.mean = np.sqrt(mixtures), losses.mean()
        inverse = np.linalg.inv(self.kernel(self.points) + 1e-3 * np.eye(len(losses)))
        self.weights = inverse @ (losses - self.mean)
        error = float(np.abs(self.weights / np.diag(inverse)).mean())
        self.quality = {"t": Quality(spearman=1.0, error=error, spread=1.0)}

    def kernel(self, points):
        return np.exp(-((points[:, None] - self.points) ** 2).sum(axis=-1) / 0.245)

    def predict(self, mixtures, tasks=()):
        return (self.mean + self.kernel(np.sqrt(mixtures)) @ self.weights)[:, None]


def searched(loss, sizes, rounds, seed, noise):
    """Return the true losses of the predictor's best mixture and of the chosen one after rounds of noisy runs."""
    swarm, free = swarm_of(sizes, rounds[0], seed), np.ones(len(sizes))
    rng = np.random.default_rng(seed)
    mixtures = sample_swarm(sizes, swarm.settings)
    losses = loss(mixtures) + noise * rng.standard_normal(len(mixtures))
    for runs in rounds[1:]:
        best = climb.ranked(Smooth(mixtures, losses), swarm, free, ["t"])
        drawn = climb.next_round(best, mixtures, runs, 200, 1e-5, seed)
        mixtures = np.concatenate([mixtures, drawn])
        losses = np.concatenate([losses, loss(drawn) + noise * rng.standard_normal(runs)])
    fit = Smooth(mixtures, losses)
    mean = climb.ranked(fit, swarm, free, ["t"])[:128].mean(axis=0)
    chosen, _ = climb.choose(fit, mean, mixtures, losses, ["t"])
    return loss(np.stack([mean, chosen]))


def test_rounds_find_a_better_mixture_than_one_round_of_as_many_runs():
    """A loss that falls with a power of each domain's share, lowest inside the simplex."""
    gains = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        weights, sizes = rng.dirichlet(np.full(5, 0.7)), rng.dirichlet(np.full(5, 3.0))

        def loss(mixtures, weights=weights):
            return 1 + 0.5 * (mixtures + 0.02) ** -0.4 @ weights

        rounds, one = (searched(loss, sizes, asked, seed, 0.01) for asked in ((32, 16, 8), (56,)))
        gains.append(one - rounds)
    predicted, chosen = np.array(gains).T
    assert np.mean(predicted > 0) >= 0.9, predicted
    assert np.mean(chosen > 0) >= 0.7, chosen
    assert chosen.mean() > 0.005, chosen


# ---------------------------------------------------------------- the command


def recorded(folder, *, skip=()):
    swarm = read_swarm(folder)
    for name, mixture in zip(swarm.runs, swarm.mixtures, strict=True):
        if name not in skip and not swarm.finished(name):
            record(swarm.output_dir(name), law(mixture))
    return swarm


def test_each_call_goes_on_as_far_as_runs_are_finished(base, project, capsys):
    command = ("climb", base, "--runs", "6,4,2", "--top", 50, "--out", "climb")
    told = run(*command, capsys=capsys)
    assert "round 1 of 3: 6 of the 6 runs so far are not finished" in told
    assert "dataflex train climb/configs/run-0001.yaml" in told
    first = recorded(project / "climb", skip=["run-0003"])
    told = run(*command, capsys=capsys)
    assert "round 1 of 3: 1 of the 6" in told
    assert "  dataflex train climb/configs/run-0003.yaml" in told
    assert len(read_swarm(project / "climb").runs) == 6
    recorded(project / "climb")
    told = run(*command, "--json", capsys=capsys)
    answer = json.loads(told)
    assert answer["round"] == 2
    assert answer["next"] == [f"climb/configs/run-{number:04d}.yaml" for number in range(7, 11)]
    second = read_swarm(project / "climb")
    np.testing.assert_array_equal(second.mixtures[:6], first.mixtures)
    written = yaml.safe_load((project / "climb/configs/run-0007.yaml").read_text())
    assert list(written["dynamic"]["mixer"]["proportions"].values()) == second.mixtures[6].tolist()
    assert run(*command, "--json", capsys=capsys) == told  # nothing is drawn anew
    recorded(project / "climb")
    assert "round 3 of 3: 2 of the 12 runs" in run(*command, capsys=capsys)
    recorded(project / "climb")
    told = run(*command, capsys=capsys)
    assert "best run" in told
    content = read_proportions("climb/proportions.json")
    assert content.method == "climb (log_linear)"
    assert content.details["measured"] == pytest.approx(
        min(np.mean(list(law(mixture).values())) for mixture in read_swarm(project / "climb").mixtures)
    )
    assert run(*command, capsys=capsys) == told
    assert "round 4 of 4: 2 of the 14 runs" in run(*command[:3], "6,4,2,2", *command[4:], capsys=capsys)


def test_runs_of_later_rounds_are_predicted_to_be_better(base, project, capsys):
    command = ("climb", base, "--runs", "12,8", "--top", 300, "--out", "climb", "--tasks", "a")
    run(*command, capsys=capsys)
    recorded(project / "climb")
    run(*command, capsys=capsys)
    swarm = recorded(project / "climb")
    losses = np.array([law(mixture)["a"] for mixture in swarm.mixtures])
    assert losses[12:].max() < np.median(losses[:12])


def test_a_swarm_goes_on_as_a_climb_and_runs_may_be_left_out(base, project, capsys):
    run("swarm", base, "--runs", 6, "--out", "climb", capsys=capsys)
    recorded(project / "climb", skip=["run-0002"])
    command = ("climb", base, "--runs", "6,4", "--top", 50, "--out", "climb")
    assert "round 1 of 2: 1 of the 6" in run(*command, capsys=capsys)
    assert "round 2 of 2: 4 of the 10" in run(*command, "--without", "run-0002", capsys=capsys)
    told = run("swarm", base, "--runs", 12, "--out", "climb", code=2, capsys=capsys)
    assert "other mixtures (of other rounds" in told


def test_caps_hold_in_later_rounds_and_at_the_end(base, project, capsys):
    command = ("climb", base, "--runs", "6,4", "--top", 50, "--out", "climb", "--cap", "a=0.4")
    for _ in range(3):
        run(*command, capsys=capsys)
        swarm = recorded(project / "climb")
    assert swarm.mixtures[:6, 0].max() > 0.4
    assert swarm.mixtures[6:, 0].max() <= 0.4
    assert read_proportions("climb/proportions.json").by_name["a"] <= 0.4
    told = run(*command[:-1], "a=0.2,b=0.2", code=2, capsys=capsys)
    assert "caps: cannot be met" in told


def test_what_cannot_be_searched_is_refused(base, project, capsys):
    def refused(*options):
        return run("climb", base, "--out", "climb", *options, code=2, capsys=capsys)

    assert "--runs: expected the runs of each round such as 64,32,16, found 'many'" in refused("--runs", "many")
    assert "--runs: expected" in refused("--runs", "8,0")
    assert "--top: a round of 8 runs cannot be drawn from the best 4" in refused("--runs", "8,8", "--top", 4)
    assert "eval_dataset: missing" in refused("--runs", "8,8", "eval_dataset=null")
    assert not (project / "climb").exists()


def test_fits_are_those_of_mix_fit(base, project, capsys, monkeypatch):
    command = ("climb", base, "--runs", "6,2", "--top", 50, "--out", "climb")
    run(*command, capsys=capsys)
    recorded(project / "climb")
    run(*command, capsys=capsys)
    theta = json.loads((project / "climb/fit.json").read_text())["theta"]
    (project / "climb/runs/run-0007/dataflex").mkdir(parents=True)  # not finished: left out by mix fit
    run("fit", "climb", capsys=capsys)
    assert json.loads((project / "climb/fit.json").read_text())["theta"] == theta
    assert fitting.read_fit(project / "climb").runs == read_swarm(project / "climb").runs[:6]
