"""Trees: order unseen mixtures of a linear truth, propose the best domain, never look at what they are judged on."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from dataflex.errors import ConfigError, DataError
from dataflex.mixing import fit as fitting
from dataflex.mixing.fit import fit_losses, read_fit, spearman, write_fit
from dataflex.mixing.propose import propose
from dataflex.mixing.runs import Table
from dataflex.mixing.swarm import sample_swarm, settings_of


@pytest.fixture(autouse=True)
def _fewer_draws(monkeypatch):
    monkeypatch.setattr("dataflex.mixing.propose._DRAWS", 20_000)


BETA = np.array([0.5, -0.2, 0.1, -1.0, 0.3])
SIZES = np.array([3.0, 2.0, 2.0, 2.0, 1.0])


@pytest.fixture(scope="module")
def linear():
    """512 runs whose loss is a linear function of the mixture, and 256 unseen mixtures."""
    mixtures = sample_swarm(SIZES, settings_of("regmix", 768, 0))
    return mixtures[:512], 3 + mixtures[:512] @ BETA, mixtures[512:]


@pytest.fixture(scope="module")
def fit(linear):
    mixtures, losses, _ = linear
    runs = tuple(f"run-{i:04d}" for i in range(512))
    names = ("a", "b", "c", "d", "e")
    return fit_losses(
        "lightgbm",
        Table(runs=runs, columns=names, values=mixtures),
        Table(runs=runs, columns=("goal",), values=losses[:, None]),
        folds=3,
        provenance={},
    )


@pytest.mark.slow
def test_unseen_mixtures_are_ordered(fit, linear):
    _, _, unseen = linear
    assert spearman(fit.predict(unseen)[:, 0], unseen @ BETA) > 0.95
    assert fit.quality["goal"].spearman > 0.95


@pytest.mark.slow
def test_the_proposal_puts_its_mass_on_the_best_domain(fit):
    shares, details = propose(fit, SIZES)
    assert shares.argmax() == BETA.argmin()
    assert shares[BETA.argmin()] > 0.8
    assert shares.sum() == pytest.approx(1, abs=1e-12)
    assert details["averaged"] == 128
    assert details["predicted"]["goal"] < details["predicted_natural"]["goal"]
    np.testing.assert_array_equal(shares, propose(fit, SIZES)[0])


@pytest.mark.slow
def test_the_proposal_keeps_to_caps(fit):
    caps = np.array([1.0, 1.0, 1.0, 0.4, 1.0])
    shares, _ = propose(fit, SIZES, caps_K=caps)
    assert shares[3] <= 0.4
    assert shares[[1, 3]].sum() > 0.6  # the second best domain is next
    with pytest.raises(ConfigError, match="drawn mixtures keep to them, and 128 are averaged"):
        propose(fit, SIZES, caps_K=np.array([0.2, 0.2, 0.2, 0.2, 0.2001]))


@pytest.mark.slow
def test_trees_are_written_and_read_back(fit, linear, tmp_path):
    write_fit(tmp_path, fit)
    assert [path.name for path in (tmp_path / "trees").iterdir()] == ["task-000.txt"]
    back = read_fit(tmp_path)
    np.testing.assert_array_equal(back.predict(linear[2]), fit.predict(linear[2]))
    (tmp_path / "trees" / "task-000.txt").unlink()
    with pytest.raises(DataError, match="is damaged"):
        read_fit(tmp_path)


def test_the_number_of_rounds_does_not_depend_on_runs_that_were_held_out(linear, monkeypatch):
    """Every loss that LightGBM is given is one of the fitted runs'."""
    mixtures, losses, _ = linear
    given = []
    package = fitting.lightgbm()
    original = package.Dataset

    def watched(data, label=None, **options):
        given.append(np.asarray(label))
        return original(data, label=label, **options)

    monkeypatch.setattr(package, "Dataset", watched)
    booster = fitting.fit_trees(mixtures[:100], losses[:100])
    assert len(given) == 2
    assert all(np.array_equal(labels, losses[:100]) for labels in given)
    assert 0 < booster.num_trees() <= 1000


def test_too_few_runs_are_refused(linear):
    mixtures, losses, _ = linear
    with pytest.raises(DataError, match="49 runs are too few for trees with 20 runs in a leaf"):
        fitting.fit_trees(mixtures[:49], losses[:49])
    assert fitting.fit_trees(mixtures[:50], losses[:50]).num_trees() > 0


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    with pytest.raises(ConfigError, match=r"pip install 'dataflex-llm\[lightgbm\]'"):
        fitting.lightgbm()
