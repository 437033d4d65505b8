"""The warning of a mixer that runs after noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dataflex.mixers.loss_weights import DoReMi, GroupDro
from dataflex.plan.domains import Domains
from dataflex.testing import example_context
from dataflex.train.feedback import NoiseWatch, outlying
from dataflex.train.loss import Reweighter

NAMES = ("web", "code", "noise", "books")


def test_outlying_by_hand():
    # median 2.5, deviations 0.5, 1.5, 0.5, 7.5: their median is 1
    assert outlying(np.array([2.0, 1.0, 3.0, 10.0])).tolist() == [False, False, False, True]
    assert outlying(np.array([2.0, 1.0, 3.0, 5.6])).tolist() == [False, False, False, True]
    assert not outlying(np.array([2.0, 1.0, 3.0, 5.4])).any()
    assert not outlying(np.array([2.0, 2.2, 2.4, 2.6])).any()
    assert outlying(np.array([2.0, np.nan, 2.1, 9.0])).tolist() == [False, False, False, True]
    assert not outlying(np.full(3, np.nan)).any()


def watched(losses, shares, *, repeat=1):
    """Return the steps at which something was told, and what."""
    watch, told = NoiseWatch(NAMES), {}
    for at, share in enumerate(shares):
        rest = (1.0 - share) / 3
        for part in range(repeat):
            found = watch.step(10 * np.array(losses(at)), np.full(4, 10.0), np.array([rest, rest, share, rest]))
            if found:
                told[at * repeat + part] = found
    return told


def noisy(at):
    return [2.0, 2.1, 9.0, 2.2]


def rising(count):
    return [0.25 + 0.02 * at for at in range(count)]


@pytest.mark.parametrize("repeat", [1, 4])
def test_five_rises_in_a_row_are_told_once(repeat, caplog):
    assert watched(noisy, rising(12), repeat=repeat) == {5 * repeat: ["noise"]}
    assert [record.args[0] for record in caplog.records] == ["noise"]
    assert "domain 'noise': its loss of 9 nats per token" in caplog.text


def test_what_is_no_reason_to_warn():
    assert not watched(noisy, rising(5))  # four rises
    assert not watched(noisy, [0.25, 0.3, 0.35, 0.4, 0.45, 0.44, 0.5, 0.55, 0.6, 0.65])  # a fall between
    assert not watched(lambda at: [2.0, 2.1, 2.3, 2.2], rising(12))  # nothing stands out
    assert not watched(lambda at: [2.0, 2.1, 9.0 if at % 4 else 2.1, 2.2], rising(12))  # it did learn at times
    assert not watched(noisy, [0.25] * 12)


def test_an_absent_domain_is_not_far_off():
    watch = NoiseWatch(NAMES)
    for at, share in enumerate(rising(8)):
        rest = (1.0 - share) / 3
        tokens = np.array([10.0, 10.0, 0.0, 10.0])
        assert not watch.step(tokens * np.array([2.0, 2.1, 0.0, 2.2]), tokens, np.array([rest, rest, share, rest])), at


def test_a_reference_is_no_loss_chaser():
    domains = Domains.from_sizes(NAMES, [3] * 4)
    options = {"columns": {}, "domains": domains, "over_ranks": True, "world": 1}
    assert Reweighter(None, GroupDro(GroupDro.Params()), **options)._noise is not None
    assert Reweighter(None, DoReMi(DoReMi.Params(reference="r")), **options)._noise is None


def test_a_loss_that_is_not_finite_is_told_once_and_the_mixer_goes_on(caplog):
    domains = Domains.from_sizes(NAMES, [3] * 4)
    mixer = GroupDro(GroupDro.Params())
    mixer.mix(example_context(dict.fromkeys(NAMES, 3)))
    reweighter = Reweighter(None, mixer, columns={}, domains=domains, over_ranks=True, world=1)
    for loss in (np.nan, np.inf, 2.0):
        losses = torch.tensor([[1.0, 1.0], [loss, 1.0], [1.0, 2.0], [1.0, 1.0]])
        reweighter._sums.add(losses, torch.ones(4, 2, dtype=torch.bool), np.arange(4))
        reweighter.end_step(np.full(4, 0.25), learning_rate=1e-3)
    assert [record.args for record in caplog.records] == [(0, "code")]
    assert np.isfinite(mixer.loss_weights()).all()
