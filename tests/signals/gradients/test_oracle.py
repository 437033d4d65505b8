"""Every engine path against one row, one backward pass."""

from __future__ import annotations

import functools

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from dataflex.signals.gradients.parameters import choose_parameters
from tests.rounding import sums_apart
from tests.signals.gradients.small import MODELS, Collect, build, differences, engine_of, layers_of, oracle, ragged


@functools.cache
def prepared(name, dtype=torch.float32):
    model = build(name).to(dtype)
    return model, engine_of(model)


batches = {
    "lengths": st.lists(st.integers(2, 11), min_size=1, max_size=4),
    "side": st.sampled_from(["right", "left"]),
    "seed": st.integers(0, 2**16),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=6, deadline=None)
@given(**batches)
def test_equals_one_row_at_a_time(name, lengths, side, seed):
    """In float64, where the order of sums does not matter, every parameter of every row must agree."""
    model, engine = prepared(name, torch.float64)
    batch = ragged(lengths, side=side, seed=seed)
    collect = Collect(engine)
    found = engine.run(batch, [collect])
    expected = oracle(model, batch)
    assert list(engine.shapes) == list(expected[0])
    lines = differences(collect.rows, expected, 1e-5, floor=1e-5)
    assert not lines, "\n".join(lines)
    assert found["losses"].shape == (len(lengths),)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MODELS, "mixtral-grouped"])
@settings(max_examples=3, deadline=None)
@given(**batches)
def test_equals_one_row_at_a_time_in_fp32(name, lengths, side, seed):
    """In fp32 a batch's matrix products round otherwise than a row's: relative to the row's gradient."""
    model, engine = prepared(name)
    batch = ragged(lengths, side=side, seed=seed)
    collect = Collect(engine)
    engine.run(batch, [collect])
    lines = differences(collect.rows, oracle(model, batch), 1e-5, floor=1.0)
    assert not lines, "\n".join(lines)


@pytest.mark.parametrize("name", ["llama", "lora"])
def test_padding_does_not_matter(name):
    model, engine = prepared(name)
    batch = ragged([4, 11, 7])
    collect = Collect(engine)
    engine.run(batch, [collect])
    for i, length in enumerate((4, 11, 7)):
        alone = {key: value[i : i + 1, :length] for key, value in batch.items()}
        lines = differences({n: rows[i : i + 1] for n, rows in collect.rows.items()}, oracle(model, alone), 1e-5)
        assert not lines, "\n".join(lines)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("llama", {"pattern": "norm|lm_head"}),
        ("llama", {"last_blocks": 1}),
        ("lora", {"last_blocks": 1, "pattern": "lora_B"}),
        ("llama-tied", {"pattern": "embed"}),
    ],
)
def test_a_part_of_the_parameters(name, what):
    model = build(name)
    chosen = choose_parameters(model, **what)
    assert 0 < len(chosen) < len(choose_parameters(model))
    engine = engine_of(model, parameters=chosen)
    batch, collect = ragged([5, 9, 3]), Collect(engine)
    engine.run(batch, [collect])
    lines = differences(collect.rows, oracle(model, batch, chosen), 1e-5)
    assert not lines, "\n".join(lines)


def test_frozen_parameters_can_be_asked_for():
    model = build("llama")
    parameters = dict(model.named_parameters())
    batch = ragged([5, 9, 3])
    expected = oracle(model, batch, parameters)
    model.requires_grad_(False)
    engine = engine_of(model, parameters=parameters)
    collect = Collect(engine)
    engine.run(batch, [collect])
    lines = differences(collect.rows, expected, 1e-5)
    assert not lines, "\n".join(lines)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", ["llama", "llama-tied", "lora"])
def test_blocks_of_any_size_give_the_same(name):
    model, _ = prepared(name)
    batch = ragged([5, 9, 3])
    results = []
    for numbers in (1, 100, 2**22):
        engine = engine_of(model, block_numbers=numbers)
        results.append(engine.run(batch, [Collect(engine)])["collect"])
    for result in results[:2]:  # sums over tokens, in another order
        apart = sums_apart(batch["input_ids"].shape[1], float(result.abs().max()))
        torch.testing.assert_close(result, results[2], rtol=0, atol=apart)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "lora"])
def test_a_model_that_trains_with_activation_checkpointing(name, reentrant):
    model = build(name)
    batch = ragged([5, 9, 3])
    expected = oracle(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    engine = engine_of(model)
    collect = Collect(engine)
    engine.run(batch, [collect])
    lines = differences(collect.rows, expected, 1e-5)
    assert not lines, "\n".join(lines)
    assert model.training


def test_bf16_autocast_points_the_same_way():
    model = build("lora")
    batch = ragged([5, 9, 3, 7])
    exact, mixed = engine_of(model), engine_of(model, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    a, b = (engine.run(batch, [Collect(engine)])["collect"] for engine in (exact, mixed))
    assert (torch.nn.functional.cosine_similarity(a, b) > 0.995).all()
    assert not torch.equal(a, b)


def test_bf16_model():
    model = build("llama")
    batch = ragged([5, 9, 3, 7])
    a = engine_of(model).run(batch, [Collect(engine_of(model))])["collect"]
    model.to(torch.bfloat16)
    engine = engine_of(model)
    b = engine.run(batch, [Collect(engine)])["collect"]
    assert b.dtype == torch.float32
    assert (torch.nn.functional.cosine_similarity(a, b) > 0.99).all()
    assert set(layers_of(engine).values()) == {"linear", "embedding", "rms norm"}
