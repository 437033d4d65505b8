"""The sparse sketch is linear, unbiased, the same whatever the pieces, and agrees with a dense projection."""

from __future__ import annotations

import itertools
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from dataflex.errors import ConfigError
from dataflex.signals.gradients.consumers import Block, Segment, Sketch
from tests.signals.gradients.small import Collect, build, engine_of, ragged


def sketched(values, *, size=64, nonzeros=2, seed=0, cuts=(), name="w"):
    sketch = Sketch(size=size, nonzeros=nonzeros, seed=seed)
    sketch.begin(torch.ones(len(values), dtype=torch.bool))
    edges = [0, *sorted(cuts), values.shape[1]]
    for start, stop in itertools.pairwise(edges):
        sketch.add(Block(segments=(Segment(name, start, stop),), values=values[:, start:stop]))
    return sketch.finish()


def rademacher(values, size, seed):
    """The dense reference: entries +-1 / sqrt(size)."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randint(0, 2, (values.shape[1], size), generator=generator).float() * 2 - 1
    return values @ matrix / math.sqrt(size)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 300),
    cuts=st.lists(st.integers(0, 300), max_size=3),
    nonzeros=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 2**31),
)
def test_linear_and_the_same_in_pieces(n, cuts, nonzeros, seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, n, generator=generator), torch.randn(2, n, generator=generator)
    options = {"nonzeros": nonzeros, "seed": seed}
    whole = sketched(a, **options)
    pieces = sketched(a, cuts=[min(cut, n) for cut in cuts], **options)
    assert torch.allclose(whole[""], pieces[""], atol=1e-5)
    assert torch.allclose(whole[".norms"], a.norm(dim=1), rtol=1e-5)
    both = sketched(a + 2 * b, **options)[""]
    assert torch.allclose(both, whole[""] + 2 * sketched(b, **options)[""], atol=1e-4)


def test_unbiased_over_200_seeds():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(500, generator=generator)
    u = torch.stack([a, 0.6 * a + 0.8 * torch.randn(500, generator=generator)])
    size = 64
    for nonzeros in (1, 2, 4):
        products = []
        for seed in range(200):
            s = sketched(u, size=size, nonzeros=nonzeros, seed=seed)[""]
            products.append(s @ s.t())
        exact = u @ u.t()
        error = torch.stack(products).mean(dim=0) - exact
        norms = u.norm(dim=1)
        spread = ((norms[:, None] ** 2 * norms**2 + exact**2) / size).sqrt() / math.sqrt(200)
        assert (error.abs() < 4 * spread).all(), (nonzeros, error, spread)
        assert torch.stack(products).var(dim=0)[0, 1] > 0


def test_cosines_within_the_bound_of_a_dense_projection():
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(6, 2000, generator=generator)
    values[3:] += values[:3]
    unit = lambda x: x / x.norm(dim=1, keepdim=True)  # noqa: E731
    exact = unit(values) @ unit(values).t()
    size = 1024
    for found in (sketched(values, size=size)[""], rademacher(values, size, 0)):
        assert ((unit(found) @ unit(found).t()) - exact).abs().max() < 4 / math.sqrt(size)


def test_matrix_depends_on_seed_and_name_only():
    column = torch.zeros(1, 50)
    column[0, 17] = 1.0
    first = sketched(column, nonzeros=2)[""]
    assert torch.equal(first, sketched(column.repeat(3, 1), cuts=[10, 20])[""][2:])
    assert (first != 0).sum() == 2
    assert first.abs().sum() == pytest.approx(2 / math.sqrt(2))
    assert not torch.equal(first, sketched(column, seed=1)[""])
    assert not torch.equal(first, sketched(column, name="v")[""])


def test_hash_is_pinned():
    """Stored sketches stay readable only while these numbers do."""
    buckets, signs = Sketch(seed=7).buckets_and_signs(Segment("layer.weight", 100, 104), "cpu")
    assert buckets.tolist() == [[3145, 62, 3569, 3613], [4483, 4741, 7013, 5833]]
    assert signs.tolist() == [[-1.0, -1.0, -1.0, -1.0], [-1.0, 1.0, 1.0, -1.0]]


def test_buckets_are_even_and_in_their_own_half():
    buckets, signs = Sketch(size=64).buckets_and_signs(Segment("w", 0, 64_000), "cpu")
    assert buckets[0].max() < 32 <= buckets[1].min()
    for half in buckets:
        counts = torch.bincount(half - half.min(), minlength=32).double()
        assert (counts - 2000).abs().max() < 5 * math.sqrt(2000)
    assert abs(float(signs.mean())) < 5 / math.sqrt(signs.numel())
    assert abs(float((signs[0] * signs[1]).mean())) < 5 / math.sqrt(64_000)


@pytest.mark.parametrize(("size", "nonzeros"), [(10, 4), (0, 1), (4, 0), (1, 2)])
def test_bad_sizes(size, nonzeros):
    with pytest.raises(ConfigError, match="sketch size"):
        Sketch(size=size, nonzeros=nonzeros)


def test_sketch_of_a_models_gradients():
    model = build("llama")
    batch = ragged([5, 9, 3])
    results = []
    for numbers in (50, 2**22):
        engine = engine_of(model, block_numbers=numbers)
        collect, sketch = Collect(engine), Sketch(size=512)
        found = engine.run(batch, [collect, sketch])
        results.append(found["sketch"])
    assert torch.allclose(results[0], results[1], atol=1e-5)
    assert found["sketch"].shape == (3, 512)
    exact = found["collect"]
    assert torch.allclose(found["sketch.norms"], exact.norm(dim=1), rtol=1e-5)
    by_hand = sum(sketched(rows, size=512, name=name)[""] for name, rows in collect.rows.items())
    assert torch.allclose(found["sketch"], by_hand, atol=1e-5)
