"""adapt and joint_update_aware against slow transcriptions and the specification's numbers."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflex.errors import ComponentError, DataError
from dataflex.signals.kinds import Embedding
from dataflex.testing import FakeSignals, example_batch, example_context
from dataflex.weighters.likeness import Adapt, JointUpdateAware, fixed_point
from tests.rounding import printed


def prepared(weighter, **options):
    ctx = example_context(**options)
    weighter.prepare(ctx, np.arange(4))
    return weighter


def with_vectors(vectors, tokens=None):
    vectors = torch.tensor(vectors, dtype=torch.float32)
    return dataclasses.replace(example_batch([1.0] * len(vectors), tokens), embeddings_BH=vectors)


class Vectors(FakeSignals):
    """Targets with given embeddings."""

    def __init__(self, **by_target):
        self.by_target = {name: np.array(rows, dtype=np.float32) for name, rows in by_target.items()}
        super().__init__([1.0], values={Embedding: lambda _, rows, target: self.by_target[target][rows]})

    def num_rows(self, target=None):
        return len(self.by_target[target])


# ---------------------------------------------------------------- adapt


@pytest.mark.parametrize(
    ("s", "tau", "expected"), [(0.0, 1.0, 0.5), (0.5, 1.0, 0.622459), (0.5, 0.1, 0.993307), (0.1, 1.0, 0.524979)]
)
def test_sigmoids_of_the_specification(s, tau, expected):
    weighter = prepared(Adapt(Adapt.Params(tau=tau)), signals=Vectors(target=[[1.0, 0.0]]))
    batch = with_vectors([[s, math.sqrt(1 - s * s)]])
    assert weighter.weigh(batch).item() == pytest.approx(expected, abs=printed(6, 8))
    assert weighter.normalizer == "num_tokens"


@given(st.integers(0, 1000))
@settings(max_examples=30)
def test_weights_are_means_of_cosines_with_every_anchor(seed):
    rng = np.random.default_rng(seed)

    def unit(n):
        x = rng.normal(size=(n, 5))
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    one, two, rows = unit(3), unit(2), unit(4)
    weighter = prepared(Adapt(Adapt.Params(tau=0.3)), signals=Vectors(a=one, b=two), targets=("a", "b"))
    anchors = np.concatenate([one, two])
    wanted = [1 / (1 + math.exp(-np.mean([row @ anchor for anchor in anchors]) / 0.3)) for row in rows]
    np.testing.assert_allclose(weighter.weigh(with_vectors(rows)), wanted, rtol=1e-5)


@pytest.mark.slow
def test_the_mean_of_rescaled_weights_is_one_and_rows_without_labels_do_not_count():
    signals = Vectors(target=[[1.0, 0.0]])
    batch = with_vectors([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], [3, 5, 0])
    plain = prepared(Adapt(Adapt.Params()), signals=signals).weigh(batch)
    assert plain[2] == 0
    rescaled = prepared(Adapt(Adapt.Params(rescale="mean1")), signals=signals).weigh(batch)
    torch.testing.assert_close(rescaled, plain / plain[:2].mean())
    clipped = prepared(Adapt(Adapt.Params(clip=0.6)), signals=signals).weigh(batch)
    assert clipped.tolist() == pytest.approx([0.6, 0.5, 0.0])


def test_anchors_are_renewed_every_so_many_steps_and_saved():
    weighter = Adapt(Adapt.Params(refresh_steps=10))
    assert weighter.due(3)
    prepared(weighter)
    assert [step for step in range(25) if weighter.due(step)] == [0, 10, 20]
    other = Adapt(Adapt.Params(refresh_steps=10))
    other.load_state_dict(weighter.state_dict())
    assert not other.due(3)
    batch = example_batch([1.0, 2.0])
    assert torch.equal(other.weigh(batch), weighter.weigh(batch))


def test_anchors_without_an_embedding_are_refused():
    with pytest.raises(DataError, match="adapt: target 'target' has 2 rows, none of which has an embedding"):
        prepared(Adapt(Adapt.Params()), signals=FakeSignals([1.0], targets={"target": [math.nan, math.nan]}))


class Texts(FakeSignals):
    rows = ("the cat sat", "sum of numbers", "a cat and a sum", "")
    targets = ("sum of two numbers", "numbers")

    def __init__(self):
        super().__init__([1.0] * 4)

    def num_rows(self, target=None):
        return 4 if target is None else 2

    def texts(self, rows, *, target=None, part="all"):
        assert part == "all"
        return [(self.rows if target is None else self.targets)[row] for row in rows]


def slow_bm25(documents, query, k1=1.5, b=0.75, epsilon=0.25):
    words = sorted({word for document in documents for word in document})
    n = len(documents)
    df = {word: sum(word in document for document in documents) for word in words}
    idf = {word: math.log(n - df[word] + 0.5) - math.log(df[word] + 0.5) for word in words}
    mean_idf = sum(idf.values()) / len(idf)
    idf = {word: value if value >= 0 else epsilon * mean_idf for word, value in idf.items()}
    mean = sum(map(len, documents)) / n
    scores = []
    for document in documents:
        total = 0.0
        for word in query:
            tf = document.count(word)
            if tf:
                total += idf[word] * tf * (k1 + 1) / (tf + k1 * (1 - b + b * len(document) / mean))
        scores.append(total)
    return scores


def test_words_are_compared_once():
    weighter = Adapt(Adapt.Params(similarity="bm25", tau=2.0))
    assert weighter.requires().embedding is None
    prepared(weighter, sizes={"only": 4}, signals=Texts())
    documents = [text.split() for text in Texts.rows]
    per_anchor = [slow_bm25(documents, text.split()) for text in Texts.targets]
    wanted = [1 / (1 + math.exp(-np.mean(scores) / 2)) for scores in zip(*per_anchor, strict=True)]
    np.testing.assert_allclose(weighter.weigh(example_batch([1.0] * 4)), wanted, rtol=1e-5)
    assert not weighter.due(7)
    assert weighter.state_dict() == {}


# ---------------------------------------------------------------- joint


def test_fixed_points_of_the_specification():
    """With beta = .1, tau = .05."""
    blocks = np.array([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]])
    got = fixed_point(np.zeros(3), blocks, beta=0.1, tau=0.05)
    np.testing.assert_allclose(got, [0.293104, 0.293104, 0.413791], atol=1e-6)
    np.testing.assert_allclose(
        fixed_point(np.array([0.1, 0.0]), np.eye(2), beta=0.0, tau=0.05), [0.880797, 0.119203], atol=1e-6
    )
    np.testing.assert_allclose(fixed_point(np.zeros(4), np.eye(4), beta=1.0, tau=0.05), [0.25] * 4)


@given(
    seed=st.integers(0, 10_000),
    size=st.integers(1, 12),
    beta=st.sampled_from([0.0, 0.1, 1.0, 5.0]),
    tau=st.sampled_from([0.05, 1.0]),
)
@settings(max_examples=60, deadline=None)
def test_the_fixed_point_holds_and_is_the_maximum(seed, size, beta, tau):
    """Residual below 1e-6 also where the undamped iteration oscillates, and no other weights do better."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(size, 3))
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    s, gram = z @ np.array([0.6, 0.8, 0.0]), z @ z.T
    w = fixed_point(s, gram, beta=beta, tau=tau)
    aim = (s - beta * gram @ w) / tau
    softmax = np.exp(aim - aim.max()) / np.exp(aim - aim.max()).sum()
    assert np.abs(softmax - w).max() < 1e-6

    def objective(x):
        return s @ x - beta / 2 * x @ gram @ x - tau * (x * np.log(np.maximum(x, 1e-300))).sum()

    for other in rng.dirichlet(np.ones(size), size=20):
        assert objective(other) <= objective(w) + 1e-9


@pytest.mark.slow
def test_numbers_that_are_not_finite_do_not_hang():
    with pytest.raises(ComponentError, match="weights do not settle"):
        fixed_point(np.array([np.nan, 0.0]), np.eye(2), beta=0.1, tau=0.05)


def test_modes_and_rows_without_labels():
    vectors = [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]
    batch = with_vectors(vectors, [2, 2, 2, 0])
    signals = Vectors(target=[[0.0, 2.0], [0.0, 4.0]])  # the mean's length does not matter

    def weigh(mode):
        weighter = JointUpdateAware(JointUpdateAware.Params(mode=mode))
        return prepared(weighter, signals=signals).weigh(batch).tolist()

    assert weigh("uniform") == pytest.approx([1 / 3] * 3 + [0.0])
    assert weigh("diverse_only") == pytest.approx([0.293104, 0.293104, 0.413791, 0.0], abs=printed(6, 16))
    raised = [1.0, 1.0, math.exp(20)]
    assert weigh("align_only") == pytest.approx([x / sum(raised) for x in raised] + [0.0])
    full = weigh("full")
    assert sum(full) == pytest.approx(1.0)
    assert weigh("diverse_only")[2] < full[2] < weigh("align_only")[2]
    empty = with_vectors([[1.0, 0.0]], [0])
    assert prepared(JointUpdateAware(JointUpdateAware.Params()), signals=signals).weigh(empty).tolist() == [0.0]
