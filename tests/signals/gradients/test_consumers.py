"""Dot products, norms, products within a batch, weighted sums: formed and factored, against the collected rows."""

from __future__ import annotations

import copy
import functools
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from dataflex.errors import DataError
from dataflex.signals.gradients.consumers import (
    Block,
    Consumer,
    Dots,
    Norms,
    Segment,
    TargetVectors,
    WeightedSums,
    inner_products,
    total,
)
from dataflex.signals.gradients.factors import Factors, formed, ghost_dots, ghost_norms, weighted_sum
from dataflex.signals.gradients.precondition import Preconditioner
from dataflex.signals.gradients.scorers import TargetBuilder
from tests.signals.gradients.small import Collect, build, engine_of, flat, oracle, ragged


@functools.cache
def prepared(name):
    model = build(name)
    batch = ragged([5, 9, 3, 7])
    return model, engine_of(model), batch, flat(oracle(model, batch))


def vectors(engine, num, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return TargetVectors(
        tensors={name: torch.randn(num, *shape, generator=generator) for name, shape in engine.shapes.items()}
    )


def whole(targets):
    return torch.cat([targets.flat(name) for name in targets.tensors], dim=1)


class Forced:
    """Makes a consumer say that one form is free."""

    def __init__(self, ghost: bool) -> None:
        self.ghost = ghost

    def __call__(self, consumer: Consumer) -> Consumer:
        factored = consumer.ghost_cost
        consumer.dense_cost = lambda shape: math.inf if self.ghost else 0.0
        consumer.ghost_cost = lambda shape: min(factored(shape), 0.0) if self.ghost else math.inf
        return consumer


NAMES = ["llama", "llama-tied", "gpt2", "lora"]


def close(found, expected, scale, limit=2e-5):
    assert found.shape == expected.shape
    assert ((found - expected).abs() <= limit * scale).all(), (found, expected)


@pytest.mark.parametrize("ghost", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_every_consumer_in_both_forms(name, ghost):
    _, engine, batch, rows = prepared(name)
    targets, force = vectors(engine, 3), Forced(ghost)
    sums = WeightedSums(TargetVectors.zeros(2, engine.shapes, "cpu"))
    sums.weights = torch.tensor([[0.5, 0.0, 2.0, -1.0], [0.0, 0.0, 1.0, 0.0]])
    consumers = [force(c) for c in (Dots(targets, normalize="none"), Norms(), sums)]
    found = engine.run(batch, consumers)
    norms, lengths = rows.norm(dim=1), whole(targets).norm(dim=1)
    close(found["norms"], norms, norms)
    close(found["dots"], rows @ whole(targets).t(), norms[:, None] * lengths)
    close(found["dots.norms"], norms, norms)
    close(whole(sums.vectors), sums.weights @ rows, norms.max())
    close(found["sums"], sums.weights.t(), 1.0)


@pytest.mark.parametrize("name", NAMES)
def test_the_engine_may_choose_the_form(name):
    _, engine, batch, rows = prepared(name)
    norms = rows.norm(dim=1)
    close(engine.run(batch, [Norms()])["norms"], norms, norms)


def test_norms_of_wide_layers_are_never_formed(monkeypatch):
    from dataflex.signals.gradients import engine as engine_module

    _, engine, batch, _ = prepared("llama")
    factored = []
    monkeypatch.setattr(
        engine_module, "formed", lambda uses, a, b: factored.append(isinstance(uses[0], Factors)) or formed(uses, a, b)
    )
    short = {key: value[:, :2] for key, value in batch.items()}
    short["labels"] = short["input_ids"]
    engine.run(short, [Norms()])
    assert factored
    assert not any(factored)


def test_normalizing():
    _, engine, batch, rows = prepared("lora")
    targets = vectors(engine, 3)
    dots = rows @ whole(targets).t()
    by_row = dots / rows.norm(dim=1, keepdim=True)
    close(engine.run(batch, [Dots(targets)])["dots"], by_row, whole(targets).norm(dim=1))
    cosines = by_row / whole(targets).norm(dim=1)
    close(engine.run(batch, [Dots(targets, normalize="both")])["dots"], cosines, 1.0)


@settings(max_examples=25, deadline=None)
@given(
    b=st.integers(1, 4),
    t=st.integers(1, 5),
    m=st.integers(1, 6),
    n=st.integers(1, 6),
    uses=st.lists(st.booleans(), min_size=1, max_size=3),
    seed=st.integers(0, 2**16),
)
def test_factored_products_equal_formed_ones(b, t, m, n, uses, seed):
    generator = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randn, generator=generator)
    factors = [
        Factors(
            left=torch.randint(0, m, (b, t), generator=generator) if one_hot else draw(b, t, m), right=draw(b, t, n)
        )
        for one_hot in uses
    ]
    slow = torch.zeros(b, m, n, dtype=torch.float64)
    for piece in factors:
        for i in range(b):
            for j in range(t):
                left = torch.nn.functional.one_hot(piece.left[i, j], m) if piece.one_hot else piece.left[i, j]
                slow[i] += torch.outer(left.double(), piece.right[i, j].double())
    exact = slow.flatten(1)
    size = exact.norm(dim=1).clamp_min(1.0)
    parts = [formed(list(factors), start, start + 1) for start in range(m)]
    close(torch.cat(parts, dim=1).double(), exact, size[:, None])
    close(ghost_norms(factors).double(), (exact**2).sum(dim=1), size**2, 1e-4)
    targets = draw(2, m, n)
    close(ghost_dots(factors, targets).double(), exact @ targets.flatten(1).double().t(), size[:, None] * 10, 1e-4)
    weights = draw(b)
    weights[0] = 0.0
    expected = (weights.double() @ exact).view(m, n)
    close(weighted_sum(factors, weights, torch.Size((m, n))).double(), expected, size.sum(), 1e-4)


def test_ghost_identity_of_the_sheet():
    x, d = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]]), torch.tensor([[[1.0, 1.0], [1.0, -1.0]]])
    x2, d2 = torch.tensor([[[1.0, 1.0]]]), torch.tensor([[[2.0, 1.0]]])
    other = formed([Factors(left=d2, right=x2)], 0, 2).view(1, 2, 2)
    assert ghost_dots([Factors(left=d, right=x)], other)[0, 0] == 5.0


def test_rows_without_labels_are_nan_and_disturb_nobody():
    _, engine, _, rows = prepared("lora")
    targets = vectors(engine, 2)
    sums = WeightedSums(TargetVectors.zeros(1, engine.shapes, "cpu"))
    sums.weights = torch.ones(1, 4)
    masked = ragged([5, 9, 3, 7], unlabelled=(1,))
    found = engine.run(masked, [Dots(targets), Norms(), sums])
    kept = torch.tensor([0, 2, 3])
    for key in ("losses", "dots", "norms", "dots.norms"):
        assert found[key][1].isnan().all()
    norms = rows.norm(dim=1)
    close(found["norms"][kept], norms[kept], norms[kept])
    close(whole(sums.vectors)[0], rows[kept].sum(dim=0), norms.max())
    assert found["sums"][kept].eq(1).all()


def test_a_batch_without_any_label():
    _, engine, _, _ = prepared("lora")
    found = engine.run(ragged([4, 6], unlabelled=(0, 1)), [Norms()])
    assert found["losses"].isnan().all()
    assert found["norms"].isnan().all()


def test_target_means_by_task():
    _, engine, batch, rows = prepared("lora")
    tasks = torch.tensor([1, 0, 1, -1])
    plain = TargetBuilder(engine, ["a", "b"], normalize_rows=False)
    plain.add(batch, tasks)
    expected = torch.stack([rows[1], rows[[0, 2]].mean(dim=0)])
    close(whole(plain.finish()), expected, rows.norm(dim=1).max())
    unit = rows / rows.norm(dim=1, keepdim=True)
    normed = TargetBuilder(engine, ["a", "b"])
    normed.add({key: value[:2] for key, value in batch.items()}, tasks[:2])
    normed.add({key: value[2:] for key, value in batch.items()}, tasks[2:])
    found = normed.finish()
    close(whole(found), torch.stack([unit[1], unit[[0, 2]].mean(dim=0)]), 1.0)
    # A product of unit vectors with that mean is the mean of the cosines.
    scores = engine.run(batch, [Dots(found)])["dots"]
    close(scores[:, 1], (unit @ unit[[0, 2]].t()).mean(dim=1), 1.0)
    assert scores[1, 0] == pytest.approx(1.0, abs=1e-5)


def test_mean_of_cosines_is_not_the_cosine_with_the_mean():
    """Numbers of the sheet: train (1,0), (.8,.6); validation (1,0), (0,10)."""
    train, valid = torch.tensor([[1.0, 0.0], [0.8, 0.6]]), torch.tensor([[1.0, 0.0], [0.0, 10.0]])
    unit = valid / valid.norm(dim=1, keepdim=True)

    def scores(rows, normalize):
        dots = Dots(TargetVectors(tensors={"w": rows.mean(dim=0, keepdim=True)}), normalize=normalize)
        dots.begin(torch.ones(2, dtype=torch.bool))
        dots.add(Block(segments=(Segment("w", 0, 2),), values=train))
        return [round(x, 4) for x in dots.finish()[""].flatten().tolist()]

    assert scores(unit, "row") == [0.5, 0.7]
    assert scores(valid, "both") == [0.0995, 0.6766]


def test_targets_are_added_up_over_ranks(monkeypatch):
    _, engine, batch, rows = prepared("lora")
    builder = TargetBuilder(engine, ["a"], normalize_rows=False)
    builder.add({key: value[:2] for key, value in batch.items()}, torch.zeros(2, dtype=torch.int64))
    other = TargetBuilder(engine, ["a"], normalize_rows=False)
    other.add({key: value[2:] for key, value in batch.items()}, torch.zeros(2, dtype=torch.int64))
    parts = iter([torch.stack([other._counts, other._labelled]), *other._sums.vectors.tensors.values()])
    monkeypatch.setattr("dataflex.comm.gather_sum", lambda tensor: tensor + next(parts))
    found = builder.finish()
    close(whole(found), rows.mean(dim=0, keepdim=True), rows.norm(dim=1).max())


@pytest.mark.parametrize("labelled", [True, False])
def test_a_target_without_a_loss_is_told_apart_from_a_model_that_diverged(labelled):
    model, _, batch, _ = prepared("lora")
    model = copy.deepcopy(model)
    builder = TargetBuilder(engine_of(model), ["fine", "lost"])
    builder.add(batch, torch.zeros(4, dtype=torch.int64))
    if labelled:
        for parameter in model.parameters():
            parameter.data.fill_(torch.nan)
    else:
        batch = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    builder.add(batch, torch.ones(4, dtype=torch.int64))
    why = "the model has diverged, lower the learning_rate$" if labelled else "none of them has a supervised token"
    with pytest.raises(DataError, match=f"^no row of target 'lost' has a finite loss: {why}"):
        builder.finish()


def test_a_batch_that_is_started_again_counts_once():
    model, _, batch, rows = prepared("lora")
    sums = WeightedSums(TargetVectors.zeros(1, engine_of(model).shapes, "cpu"))
    sums.weights = torch.ones(1, 4)
    engine = engine_of(model)
    sums.begin(torch.ones(4, dtype=torch.bool))
    sums._batch = {name: torch.ones(1, shape.numel()) for name, shape in engine.shapes.items()}
    engine.run(batch, [sums])
    close(whole(sums.vectors)[0], rows.sum(dim=0), rows.norm(dim=1).max())


def test_consumers_take_directions():
    _, engine, batch, _ = prepared("lora")
    plain = engine.run(batch, [Collect(engine)])["collect"]
    signed = Preconditioner(elements=lambda _segments, gradient: gradient.sign_())
    signs = engine.run(batch, [Collect(engine)], precondition=signed)["collect"]
    assert torch.equal(signs, plain.sign())


def test_long_inner_products_keep_their_digits():
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(2, 1_000_000, generator=generator)
    exact = a.double() @ a.double().t()
    assert ((total(inner_products(a, a)) - exact).abs() <= 1e-6 * exact).all()
