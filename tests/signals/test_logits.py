"""Nuclear norms and sketches of logits, against singular values and a plain Fourier sum, row by row."""

from __future__ import annotations

import cmath
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflex.rng import stream
from dataflex.signals.gradients.precondition import PRESETS, Precondition, adam_direction
from dataflex.signals.kinds import LogitFeatures
from dataflex.signals.logits import LogitScorer, LogitSketch, nuclear_norm
from dataflex.signals.model_access import Corpus
from dataflex.signals.specs import GradientSpec
from tests.signals import tiny
from tests.signals.test_gradient_signals import setting, unit  # noqa: F401  a fixture

MODELS = {"llama": tiny.llama, "gemma2": tiny.gemma2, "cohere": tiny.cohere, "lora": tiny.lora}
ROWS = tiny.make_rows(12, seed=4)


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return MODELS[request.param]()


@torch.no_grad()
def logits_of(model, row, tokens):
    """Logits of one row without padding [positions, V], float64."""
    model.eval()
    logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double()
    if tokens == "all":
        return logits
    return logits[[t - 1 for t in range(1, len(row["labels"])) if row["labels"][t] != -100]]


def predicting(row):
    return any(label != -100 for label in row["labels"][1:])


def score(model, spec, side="right", batch_of=4):
    scorer = LogitScorer(model.eval(), spec, 12)
    rows = ROWS.rows
    parts = [scorer(tiny.collate(rows[i : i + batch_of], side=side)) for i in range(0, len(rows), batch_of)]
    return torch.cat(parts)


def test_worked_examples():
    assert float(nuclear_norm(torch.eye(4))) == pytest.approx(4.0)
    assert float(nuclear_norm(torch.tensor([[3.0, 0.0], [4.0, 0.0]]))) == pytest.approx(5.0)
    assert float(nuclear_norm(torch.zeros(0, 5))) == 0.0


@given(rows=st.integers(1, 40), columns=st.integers(1, 60), rank=st.integers(1, 8), chunk=st.integers(1, 70))
@settings(max_examples=40, deadline=None)
def test_gram_and_singular_values_agree(rows, columns, rank, chunk):
    """Also where a common part is thousands of times larger than the rest, as with logits."""
    generator = torch.Generator().manual_seed(rows * 100 + columns)
    low = torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)
    matrix = (1000.0 * low + torch.randn(rows, columns, generator=generator)).float()
    wanted = float(torch.linalg.svdvals(matrix.double()).sum())
    assert float(nuclear_norm(matrix, chunk)) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("tokens", ["completion", "all"])
def test_norms_are_those_of_single_rows(model, tokens, side):
    """Padding changes nothing, and rows without a supervised token have none."""
    found = score(model, LogitFeatures(tokens=tokens), side)
    for i, row in enumerate(ROWS.rows):
        if not predicting(row):
            assert bool(found[i].isnan().all())
            continue
        wanted = float(torch.linalg.svdvals(logits_of(model, row, tokens)).sum())
        assert float(found[i, 0]) == pytest.approx(wanted, rel=1e-4)
    assert not all(predicting(row) for row in ROWS.rows)


def test_the_norm_per_length_is_blind_to_repetition(model):
    """k copies of the same positions have sqrt(k) times the norm."""
    logits = logits_of(model, ROWS.rows[0], "all").float()
    once, thrice = (float(nuclear_norm(part)) for part in (logits, torch.cat([logits] * 3)))
    assert thrice == pytest.approx(math.sqrt(3) * once, rel=1e-5)
    plain, divided = (score(model, LogitFeatures(per_length=flag)) for flag in (False, True))
    counts = torch.tensor([len(logits_of(model, row, "completion")) for row in ROWS.rows], dtype=torch.float32)
    known = counts > 0
    torch.testing.assert_close(divided[known] * counts[known, None].sqrt(), plain[known], rtol=1e-5, atol=1e-4)


def slow_sketch(matrix, length, rows, columns, seed):
    """The definition, one term at a time."""

    def draws(side, size, count):
        random = stream(seed, f"logit sketch of {side}", size)
        return random.integers(0, 2, size) * 2.0 - 1.0, random.integers(0, size, count)

    width = len(matrix[0])
    signs, places = draws("vocabulary", width, columns)
    picked = [
        [
            math.sqrt(width / columns)
            * sum(
                x * s * cmath.exp(-2j * math.pi * k * v / width)
                for v, (x, s) in enumerate(zip(line, signs, strict=True))
            ).real
            for k in places
        ]
        for line in matrix
    ]
    signs, places = draws("positions", length, rows)
    return [
        math.sqrt(length / rows)
        * sum(line[c] * signs[t] * cmath.exp(-2j * math.pi * k * t / length) for t, line in enumerate(picked)).real
        for k in places
        for c in range(columns)
    ]


@pytest.mark.parametrize(("num", "width", "chunk"), [(7, 31, 3), (12, 30, 4096), (1, 1, 1)])
def test_sketches_are_sampled_fourier_transforms(num, width, chunk):
    matrix = torch.randn(num, width, generator=torch.Generator().manual_seed(num))
    found = LogitSketch(12, 3, 5, seed=9)(matrix, chunk)
    wanted = slow_sketch(matrix.double().tolist(), 12, 3, 5, 9)
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-4, atol=1e-4)


def test_sketches_of_rows_are_those_of_their_logits(model):
    spec = LogitFeatures(rows=4, columns=16, seed=2)
    found = score(model, spec)[:, 1:]
    sketch = LogitSketch(12, 4, 16, seed=2)
    for i, row in enumerate(ROWS.rows):
        if predicting(row):
            wanted = sketch(logits_of(model, row, "completion").float())
            torch.testing.assert_close(found[i], wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


def test_distances_of_sketches_follow_those_of_logits():
    """Unnormalized transforms stretch squared distances by length x width / 4; the draws leave that in the mean."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(16, 64, generator=generator)
    ratios = [
        float(LogitSketch(16, 8, 128, seed=seed)(matrix).square().sum() / matrix.square().sum()) for seed in range(60)
    ]
    assert np.mean(ratios) == pytest.approx(16 * 64 / 4, rel=0.15)


def service_of(model, budget=40):
    return tiny.asking(model, Corpus(dataset=ROWS, lengths=ROWS.lengths), token_budget=budget)


def test_the_service_gives_both_from_one_pass():
    model = tiny.llama().train()
    service, order, spec = service_of(model), np.array([3, 0, 7, 5]), LogitFeatures(rows=2, columns=8)
    seen = []
    handle = model.register_forward_hook(lambda *_: seen.append(1))
    norms = service(spec, order)[:, 0]
    passes = len(seen)
    sketches = service(spec, order)[:, 1:]
    handle.remove()
    assert passes > 0
    assert len(seen) == passes
    assert model.training
    assert (norms.shape, sketches.shape) == ((4,), (4, 16))
    wanted = [float(torch.linalg.svdvals(logits_of(model, ROWS.rows[i], "completion")).sum()) for i in order]
    np.testing.assert_allclose(norms, wanted, rtol=1e-4)


def test_batches_change_nothing():
    spec = LogitFeatures(rows=2, columns=8)
    everyone = np.arange(12)
    one, other = (service_of(tiny.llama(), budget) for budget in (12, 400))
    np.testing.assert_allclose(one(spec, everyone)[:, 1:], other(spec, everyone)[:, 1:], rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------- what greats and opus ask beyond that


def test_adam_scaled_is_the_published_factor():
    """lr-free: (1 - b1) sqrt(1 - b2^t) / (1 - b1^t) g / (sqrt(v) + eps), linear in g."""
    g, v = torch.tensor([[1.0, -2.0]]), torch.tensor([4.0, 0.25])
    spec = PRESETS["adam_scale"]
    found = adam_direction(g, torch.ones(2), v, spec, step=3)
    factor = 0.1 * math.sqrt(1 - 0.999**4) / (1 - 0.9**4)
    torch.testing.assert_close(found, torch.tensor([[factor * 0.5, -factor * 4.0]]))
    torch.testing.assert_close(adam_direction(3 * g, torch.ones(2), v, spec, step=3), 3 * found)
    # A row whose own square does not matter gets the same from Adam itself.
    with_own = adam_direction(1e-3 * g, torch.zeros(2), v, Precondition(include_momentum=False), step=3)
    torch.testing.assert_close(with_own, 1e-3 * found, rtol=1e-3, atol=0)


def test_products_with_adam_scale(setting):  # noqa: F811
    service, gradients, (_, second) = setting
    fresh = tiny.again(service, train=service.access.train, targets=service.access.targets, seed=3)
    order = np.array([5, 0, 2, 6])
    scores, gram = tiny.products(fresh, order, precondition="adam_scale", targets=("near",))
    factor = 0.1 * math.sqrt(1 - 0.999**4) / (1 - 0.9**4)
    rows = gradients["pool"][order] * factor / (np.sqrt(second) + 1e-8)
    np.testing.assert_allclose(scores[:, 0], rows @ gradients["near"].mean(axis=0), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(gram, rows @ rows.T, rtol=1e-3, atol=1e-3 * np.abs(rows @ rows.T).max())


def test_a_target_may_stand_for_some_of_its_rows(setting):  # noqa: F811
    service, gradients, _ = setting
    fresh = tiny.again(service, train=service.access.train, targets=service.access.targets, seed=3)
    spec, order, drawn = GradientSpec(precondition="none"), np.array([5, 0, 2]), {"near": np.array([0, 2])}
    scores, _ = tiny.products(fresh, order, **vars(spec), targets=("near", "far"), target_rows=drawn)
    whole, _ = tiny.products(fresh, order, **vars(spec), targets=("near", "far"))
    aims = np.stack([gradients["near"][[0, 2]].mean(axis=0), gradients["far"].mean(axis=0)])
    wanted = gradients["pool"][order] @ aims.T
    np.testing.assert_allclose(scores, wanted, rtol=2e-4, atol=2e-5 * np.abs(wanted).max())
    assert np.abs(whole[:, 0] - scores[:, 0]).max() > 1e-3 * np.abs(wanted).max()
    np.testing.assert_array_equal(whole[:, 1], scores[:, 1])
