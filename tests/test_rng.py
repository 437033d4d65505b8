"""Named streams and counter-based numbers, against SplitMix64 in plain Python integers."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataflex import rng

_MASK = (1 << 64) - 1


def slow_mix(x: int) -> int:
    x ^= x >> 30
    x = x * 0xBF58476D1CE4E5B9 & _MASK
    x ^= x >> 27
    x = x * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)


def slow_key(seed: int, name: str, index: int, counter: int) -> int:
    digest = hashlib.blake2b(f"{seed}:{index}:{name}".encode(), digest_size=16).digest()
    first, second = (int.from_bytes(digest[i : i + 8], "little") for i in (0, 8))
    return slow_mix(slow_mix((counter * 0x9E3779B97F4A7C15 + first) & _MASK) ^ second)


INT64 = st.integers(-(2**63), 2**63 - 1)


@given(st.integers(-5, 10**12), st.text(max_size=8), st.integers(0, 10**6), st.lists(INT64, max_size=20))
def test_keys_equal_the_plain_integer_transcription(seed, name, index, counters):
    found = rng.keys(seed, name, index, np.array(counters, dtype=np.int64))
    assert found.tolist() == [slow_key(seed, name, index, counter) for counter in counters]


def test_keys_over_several_slices_and_shapes():
    counters = np.arange(3 * (1 << 15) + 7)
    found = rng.keys(1, "x", 0, counters)
    assert np.unique(found).size == counters.size
    assert found[-1] == slow_key(1, "x", 0, int(counters[-1]))
    assert (rng.keys(1, "x", 0, counters[:12].reshape(3, 4)) == found[:12].reshape(3, 4)).all()
    assert counters[5] == 5, "the argument is not written to"


def test_streams_are_named():
    draws = {
        (seed, name, index): tuple(rng.stream(seed, name, index).integers(0, 2**62, 4).tolist())
        for seed in (0, 1, 10)
        for name in ("mix", "order", "0:mix")
        for index in (0, 1, 10)
    }
    assert len(set(draws.values())) == len(draws)
    assert tuple(rng.stream(1, "mix", 1).integers(0, 2**62, 4).tolist()) == draws[1, "mix", 1]
    assert isinstance(rng.stream(0, "a").bit_generator, np.random.Philox)


def test_numbers_do_not_change_between_releases():
    # A change here would serve other data to a resumed run.
    assert rng.stream(42, "warmup", 3).integers(0, 1000, 5).tolist() == [436, 190, 843, 493, 416]
    assert rng.uniforms(42, "gumbel", 3, np.array([0, 1, 10**12])).tolist() == [
        0.3196440083616342,
        0.5238975984943183,
        0.8401469951643131,
    ]
    assert rng.permutations(42, "domain:code", 2, 1, 8).tolist() == [[5, 4, 6, 7, 1, 3, 0, 2]]


@given(st.lists(INT64, min_size=1, max_size=30), st.randoms())
def test_uniforms_depend_on_the_id_only(ids, shuffler):
    whole = dict(zip(ids, rng.uniforms(3, "g", 1, np.array(ids, dtype=np.int64)).tolist(), strict=True))
    part = shuffler.sample(ids, k=shuffler.randint(1, len(ids)))
    assert rng.uniforms(3, "g", 1, np.array(part, dtype=np.int64)).tolist() == [whole[i] for i in part]


def test_uniforms_are_open_and_uniform():
    values = rng.uniforms(0, "g", 0, np.arange(200_000))
    assert values.min() > 0.0
    assert values.max() < 1.0
    counts = np.bincount((values * 100).astype(int), minlength=100)
    chi_square = float(((counts - 2000) ** 2 / 2000).sum())
    assert chi_square < 150, "99 degrees of freedom: above 150 once in two thousand"
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.01
    other = rng.uniforms(0, "g", 1, np.arange(200_000))
    assert abs(np.corrcoef(values, other)[0, 1]) < 0.01


@pytest.mark.parametrize("bits", [0, (1 << 64) - 1])
def test_uniforms_stay_open_at_the_extremes(monkeypatch, bits):
    monkeypatch.setattr(rng, "keys", lambda *_: np.array([bits], dtype=np.uint64))
    (value,) = rng.uniforms(0, "g", 0, np.array([0])).tolist()
    assert 0.0 < value < 1.0


@given(st.integers(1, 40), st.integers(0, 5), st.integers(1, 5))
def test_permutations_are_addressable(size, first, num):
    made = rng.permutations(7, "d", first, num, size)
    assert made.shape == (num, size)
    for e, row in enumerate(made.tolist()):
        assert sorted(row) == list(range(size))
        assert row == rng.permutations(7, "d", first + e, 1, size)[0].tolist()


def test_permutations_are_uniform():
    codes = rng.permutations(7, "d", 0, 60_000, 3) @ np.array([9, 3, 1])
    _, counts = np.unique(codes, return_counts=True)
    assert counts.size == 6
    assert float(((counts - 10_000) ** 2 / 10_000).sum()) < 25, "5 degrees of freedom"


def test_global_generators_are_left_alone():
    before = random.getstate(), np.random.get_state()[1].tolist()
    rng.stream(1, "a").random(3)
    rng.uniforms(1, "a", 0, np.arange(3))
    rng.permutations(1, "a", 0, 2, 3)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
