"""ssToken, PEAR and Q-Tuning against slow transcriptions and the specification's numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dataflex.weighters.answers import Pear, QTuning, SsToken, kept_samples, token_scores
from tests.methods.test_token_weighters import token_batch


def ss_token(**params):
    return SsToken(SsToken.Params(reference="r", **params))


def pear(**params):
    return Pear(Pear.Params(reference="r", **params))


def q_tuning(**params):
    return QTuning(QTuning.Params(**params))


def drawn(seed):
    """Losses, those of a reference, entropies, masks and documents of packed rows [3, 8]."""
    rng = np.random.default_rng(seed)
    mask = rng.random((3, 8)) < 0.7
    mask[:, [0, 5]] = True  # both documents of each row have a token
    sequence = np.where(mask, np.array([[0] * 4 + [1] * 4]) + 2 * np.arange(3)[:, None], 0)
    return *(rng.gamma(2.0, size=(3, 8)) for _ in range(3)), mask, sequence


def documents(mask, sequence):
    """The supervised positions of each sequence, in order."""
    found = {}
    for i, j in zip(*np.nonzero(mask), strict=True):
        found.setdefault(int(sequence[i][j]), []).append((int(i), int(j)))
    return found


def test_ss_token_keeps_the_tokens_of_the_specification():
    batch = token_batch([[1.0, 1.0, 1.0, 0.6]], [[2.0, 1.0, 3.0, 0.5]])
    assert ss_token(keep=0.6).weigh(batch).tolist() == [[1.0, 1.0, 1.0, 0.0]]
    assert ss_token(keep=0.5).weigh(batch).tolist() == [[1.0, 0.0, 1.0, 0.0]]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_ss_token_against_a_slow_transcription(seed, packed):
    loss, reference, _, mask, sequence = drawn(seed)
    sequence = sequence if packed else np.broadcast_to(np.arange(3)[:, None], (3, 8))
    batch = token_batch(loss, reference, mask, sequence=sequence if packed else None)
    for keep in (0.01, 0.4, 0.6, 1.0):
        expected = np.zeros((3, 8))
        for places in documents(mask, sequence).values():
            ranked = sorted(places, key=lambda place: loss[place] - reference[place])
            for place in ranked[: max(1, math.ceil(round(keep * len(places), 6)))]:
                expected[place] = 1.0
        assert ss_token(keep=keep).weigh(batch).tolist() == expected.tolist()


def test_pear_of_the_specification():
    batch = token_batch([[1.0, 1.0, 1.0]], [[1.5, 0.8, 1.1]])
    weights = pear().weigh(batch)[0].tolist()
    assert weights == pytest.approx([1.018162, 1.104066, 1.0], abs=1e-6)
    assert pear(level="sequence").weigh(batch).tolist() == pytest.approx([1.377128], abs=1e-6)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_pear_against_a_slow_transcription(seed, packed):
    loss, reference, _, mask, sequence = drawn(seed)
    sequence = sequence if packed else np.broadcast_to(np.arange(3)[:, None], (3, 8))
    batch = token_batch(loss, reference, mask, sequence=sequence if packed else None)
    expected, whole = np.zeros((3, 8)), {}
    for number, places in documents(mask, sequence).items():
        change = [min(max(reference[place] - loss[place], -3.0), 2.0) for place in places]
        whole[number] = math.exp(min(max(sum(change), -10), 5))
        for t, place in enumerate(places):
            exponent = (len(places) - 1 - t) * math.log(0.9) + sum(change[t + 1 :])
            expected[place] = math.exp(min(max(exponent, -10), 5))
    wide = {"gamma": 0.9, "least": -3.0, "most": 2.0}
    np.testing.assert_allclose(pear(**wide).weigh(batch).numpy(), expected, rtol=1e-5)
    of_sequences = pear(**wide, level="sequence").weigh(batch).tolist()
    assert of_sequences == pytest.approx([whole[number] for number in sorted(whole)], rel=1e-5)


PPL = np.array([9.0, 8, 7, 6, 5, 4, 3, 2])
ENTROPY = np.array([0.2, 1.8, 0.4, 1.0, 1.2, 0.6, 2.0, 1.6])


@pytest.mark.parametrize(
    ("share", "alpha", "errors", "calm", "filled"),
    [(0.5, 0.250264, [0, 2], [6, 7], []), (0.25, 0.124893, [0], [], [6])],
)
def test_samples_of_the_specification(share, alpha, errors, calm, filled):
    found, at = kept_samples(PPL, ENTROPY, share)
    assert at == pytest.approx(alpha, abs=1e-6)
    assert [np.flatnonzero(each).tolist() for each in found] == [errors, calm, filled]


def test_tokens_of_the_specification():
    loss, mask = torch.tensor([[2.0, 8.0, 9.0, 1.0, 3.0]]).log(), torch.ones(1, 5, dtype=torch.bool)
    score = token_scores(loss, mask, torch.zeros(1, 5, dtype=torch.int64), 0.5)
    assert score[0].tolist() == pytest.approx([5.0, 9.5, 9.0, 6.5, 2.0])


@pytest.mark.parametrize("keep", ["low", "high"])
def test_q_tuning_keeps_errors_in_part_and_others_whole(keep):
    """Rows 0 and 2 are confident errors, 6 and 7 calibrate; each has five tokens around its perplexity."""
    around = np.array([2.0, 8.0, 9.0, 1.0, 3.0])
    around = np.log(around) - np.log(around).mean()
    loss = np.log(PPL)[:, None] + around
    mask = np.ones((8, 5), dtype=bool)
    batch = token_batch(loss, mask=mask, entropy=np.repeat(ENTROPY[:, None], 5, axis=1))
    weights = q_tuning(keep_samples=0.5, keep_tokens=0.6, keep=keep).weigh(batch).numpy()
    part = {"low": [1, 0, 0, 1, 1], "high": [0, 1, 1, 1, 0]}[keep]
    expected = np.zeros((8, 5))
    expected[[0, 2]], expected[[6, 7]] = part, 1.0
    assert weights.tolist() == expected.tolist()


def test_q_tuning_keeps_a_row_at_least_and_none_without_tokens():
    batch = token_batch([[1.0, 2.0], [0.5, 0.5]], mask=[[True, True], [False, False]], entropy=[[1.0, 1.0], [0.0, 0.0]])
    assert q_tuning(keep_samples=0.01, keep_tokens=1.0).weigh(batch).tolist() == [[1.0, 1.0], [0.0, 0.0]]
    empty = token_batch([[1.0, 2.0]], mask=[[False, False]], entropy=[[0.0, 0.0]])
    assert q_tuning().weigh(empty).tolist() == [[0.0, 0.0]]
