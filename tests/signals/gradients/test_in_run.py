"""Scores from the training step against one row, one backward pass; golden values of the formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from dataflex.plan.domains import Rows
from dataflex.sequences import Joined, Sequences
from dataflex.signals.gradients import in_run
from dataflex.signals.gradients.consumers import TargetVectors
from dataflex.signals.gradients.engine import GradientEngine
from dataflex.signals.gradients.in_run import (
    Directions,
    StepCapture,
    adam_scale,
    capturable,
    checkpointed,
    directions,
    factored,
    generator,
)
from dataflex.signals.gradients.layers import kind_of
from dataflex.signals.gradients.parameters import Unit
from dataflex.signals.gradients.precondition import Moments
from dataflex.train.loss import TokenLosses, document_sequences, token_losses, weighted_loss
from tests.signals.gradients.small import MODELS, build, oracle, ragged


def drawn(shapes, num=2, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return TargetVectors(tensors={name: torch.randn(num, *shape, generator=draw) for name, shape in shapes.items()})


def prepared(model, *, rank=None, sketch=0, moments=None, num=2, held=True):
    engine = GradientEngine(model)
    engine.run(ragged([5, 3]), [])  # formulas are tried in the pass over the target
    capture = StepCapture(capturable(model, engine.units)[0], sketch=sketch, seed=7, held=held)
    capture.aim(directions(drawn(engine.shapes, num), moments, capture.layers, rank=rank, seed=7))
    return engine, capture


def step(model, capture, batch, weights=None, *, scale=1.0, normalizer="num_tokens"):
    """One micro-batch of a training step, weighed and scaled."""
    capture.begin(tuple(batch["input_ids"].shape), torch.device("cpu"))
    logits = model(**{key: batch[key] for key in ("input_ids", "attention_mask")}, use_cache=False).logits
    losses = token_losses(logits, batch["labels"])
    capture.watch(losses.loss_BT, losses.mask_BT)
    rows: Rows = np.arange(len(logits))
    weights = torch.ones(len(logits), 1) if weights is None else torch.tensor(weights)[:, None]
    loss = weighted_loss(
        losses,
        weights,
        sequences=Sequences(rows_B=rows),
        normalizer=normalizer,
        num_items=31.0,
        num_micro_batches=2,
        step_scale=0.7,
        replicas=1,
    )
    (loss * scale).backward()
    return losses


def expected(engine, model, batch, capture):
    """Products of each row's own gradient, from a batch of one, with the directions; and the norms."""
    names = {name for unit in capture.layers for name in unit.parameters.values()}
    aims = {name: vector.double() for name, vector in drawn(engine.shapes).tensors.items() if name in names}
    length = sum(vector.flatten(1).square().sum(1) for vector in aims.values()).sqrt()
    gradients = oracle(model, batch)
    dots = [sum(vector.flatten(1) @ row[name].double().flatten() for name, vector in aims.items()) for row in gradients]
    norms = [sum(row[name].double().square().sum() for name in names).sqrt() for row in gradients]
    return torch.stack(dots) / length, torch.stack(norms)


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_equals_a_batch_of_one(name, held):
    """Where autograd keeps the inputs rows' gradients are formed, else projections of inputs are kept."""
    model = build(name)
    model.eval()
    engine, capture = prepared(model, held=held)
    batch = ragged([9, 4, 6, 2], seed=3)
    step(model, capture, batch, scale=256.0)
    scores, *_ = capture.take()
    capture.end()
    dots, norms = expected(engine, model, batch, capture)
    torch.testing.assert_close(scores.double(), dots.double(), rtol=1e-5, atol=1e-5 * float(norms.max()))


def test_layers_with_the_same_inputs_read_them_once(monkeypatch):
    made = []

    class Noted(in_run._Waiting):
        def __init__(self, **fields):
            super().__init__(**fields)
            made.append(self)

    monkeypatch.setattr(in_run, "_Waiting", Noted)
    model = build("llama").eval()
    _, capture = prepared(model, sketch=2)
    capture.aim(Directions.none(capture.layers))
    for _ in range(2):  # the second time the matrices are together already
        made.clear()
        step(model, capture, ragged([9, 4, 6, 2], seed=3))
        capture.take()
        names = [3, 1, 2, 1]  # q, k and v; o; gate and up; down
        assert [len(each.sides) for each in made] == names * 2
        assert all(each.tokens is None for each in made), "nothing is held"
    assert len(capture._together) == 4
    capture.end()


@pytest.mark.parametrize("normalizer", ["num_tokens", "weight_sum", "num_sequences"])
def test_weights_and_denominators_are_undone_and_weight_zero_says_nothing(normalizer):
    model = build("llama").eval()
    engine, capture = prepared(model)
    batch = ragged([9, 4, 6, 2], seed=3, unlabelled=(2,))
    step(model, capture, batch, [0.5, 0.0, 1.0, 3.0], normalizer=normalizer)
    scores, *_ = capture.take()
    dots, norms = expected(engine, model, batch, capture)
    assert torch.isnan(scores[[1, 2]]).all()
    torch.testing.assert_close(scores[[0, 3]].double(), dots[[0, 3]], rtol=1e-5, atol=1e-5 * float(norms.max()))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["llama", "lora"])
def test_activation_checkpointing_changes_no_score(name, reentrant):
    model, batch = build(name), ragged([9, 4, 6, 2], seed=3)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    engine, capture = prepared(model, held=not checkpointed(model))
    assert not capture._held
    assert all(unit.kind.name == "linear" for unit in capture.layers), "norms would keep their inputs"
    step(model, capture, batch)
    scores, *_ = capture.take()
    capture.end()
    model.gradient_checkpointing_disable()
    model.eval()
    dots, norms = expected(engine, model, batch, capture)
    torch.testing.assert_close(scores.double(), dots, rtol=1e-5, atol=1e-5 * float(norms.max()))


def test_a_module_that_is_called_twice_counts_twice_and_the_training_gradient_is_untouched():
    model = build("llama")
    model.model.layers[1] = model.model.layers[0]
    model.eval()
    engine, capture = prepared(model, sketch=64)
    batch = ragged([9, 4, 6, 2], seed=3)
    step(model, capture, batch)
    scores, norms, _ = capture.take()
    capture.end()
    with_hooks = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    capture._dots = torch.zeros(4, 2)  # begin() without hooks
    capture.begin = lambda *_: None
    step(model, capture, batch)
    assert all(torch.equal(one, parameter.grad) for one, parameter in zip(with_hooks, model.parameters(), strict=True))
    dots, exact = expected(engine, model, batch, capture)
    torch.testing.assert_close(scores.double(), dots, rtol=1e-5, atol=1e-5 * float(exact.max()))
    torch.testing.assert_close(norms.double(), exact, rtol=1e-5, atol=0)  # every side is narrower than 4 x 64


def test_hooks_are_gone_after_training():
    model = build("lora").eval()
    _, capture = prepared(model)
    step(model, capture, ragged([5, 4]))
    capture.end()
    assert not any(module._forward_hooks for module in model.modules())
    step_without = model(**{key: ragged([5, 4])[key] for key in ("input_ids", "attention_mask")}).logits
    step_without.sum().backward()


def packed(documents):
    """Rows of documents (lengths) that do not see one another, as ``neat_packing`` makes them."""
    batch = ragged([sum(lengths) for lengths in documents], seed=3)
    own, positions = torch.full_like(batch["input_ids"], -1), torch.zeros_like(batch["input_ids"])
    for i, lengths in enumerate(documents):
        start = 0
        for number, length in enumerate(lengths):
            part = slice(start, start + length)
            own[i, part], positions[i, part], start = number, torch.arange(length), start + length
            batch["labels"][i, part] = batch["input_ids"][i, part]
            batch["labels"][i, start - length : start - length + 1 + length // 3] = -100
    seen = (own[:, :, None] == own[:, None, :]).tril() & (own >= 0)[:, None, :]
    seen |= torch.eye(own.shape[1], dtype=torch.bool)  # padding sees itself
    batch["attention_mask"] = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[:, None]
    return {**batch, "position_ids": positions}, own


@pytest.mark.parametrize("name", ["llama", "lora", "qwen2"])
@pytest.mark.parametrize("weighed", [False, True])
def test_packed_rows_have_the_scores_of_the_mean_over_their_tokens(name, weighed):
    """However much each document counts; a document's gradient is that of a batch of its own."""
    model = build(name).eval()
    engine, capture = prepared(model, sketch=64)
    batch, own = packed([[4, 7, 3], [6, 5], [8]])
    capture.begin(tuple(own.shape), torch.device("cpu"))
    logits = model(**{key: batch[key] for key in ("input_ids", "attention_mask", "position_ids")}).logits
    losses = token_losses(logits, batch["labels"])
    capture.watch(losses.loss_BT, losses.mask_BT, own if weighed else None)
    rows: Rows = np.arange(3)
    sequences = document_sequences(own, losses.mask_BT, rows) if weighed else Sequences(rows_B=rows)
    weights = torch.tensor([0.5, 2.0, 3.0, 0.25, 1.0, 0.0]) if weighed else torch.tensor([0.5, 2.0, 3.0])
    kind = {"normalizer": "num_tokens", "num_micro_batches": 2, "step_scale": 0.7, "replicas": 1}
    weighted_loss(losses, weights[:, None], sequences=sequences, num_items=31.0, **kind).backward()
    scores, norms, _ = capture.take()
    capture.end()
    known = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    alone = [(row, torch.nonzero(own[row] == number).flatten()) for row, number in known]
    names = {name for unit in capture.layers for name in unit.parameters.values()}
    aims = {name: vector.double() for name, vector in drawn(engine.shapes).tensors.items() if name in names}
    length = sum(vector.flatten(1).square().sum(1) for vector in aims.values()).sqrt()
    gradients, counts = [], []
    for row, where in alone:
        one = {key: batch[key][row : row + 1, where] for key in ("input_ids", "labels")}
        gradients.append(oracle(model, {**one, "attention_mask": torch.ones_like(one["labels"])})[0])
        counts.append(int((one["labels"][:, 1:] != -100).sum()))
    for row, parts in ((0, [0, 1, 2]), (1, [3, 4])):
        total = sum(counts[part] for part in parts)
        mean = {name: sum(gradients[part][name].double() * counts[part] for part in parts) / total for name in names}
        dots = sum(vector.flatten(1) @ mean[name].flatten() for name, vector in aims.items()) / length
        norm = torch.sqrt(sum(vector.square().sum() for vector in mean.values()))
        torch.testing.assert_close(scores[row].double(), dots, rtol=1e-5, atol=1e-5 * float(norm))
        torch.testing.assert_close(norms[row].double(), norm, rtol=1e-4, atol=0)
    assert bool(torch.isnan(scores[2]).all()) == weighed, "the only document of the row has weight 0"


def test_full_rank_is_exact_and_energy_is_told():
    model = build("llama").eval()
    engine, capture = prepared(model)
    batch = ragged([9, 4, 6, 2], seed=3)
    step(model, capture, batch)
    whole, *_ = capture.take()
    for rank, close in ((16, True), (2, False)):
        # rank x (m + n) must be below m x n for a factorization: the widest matrices are 16 x 24.
        aims = directions(drawn(engine.shapes), None, capture.layers, rank=rank, seed=7)
        capture.aim(aims)
        step(model, capture, batch)
        scores, *_ = capture.take()
        assert torch.allclose(scores, whole, rtol=1e-4, atol=1e-6) == close
        assert (aims.captured < 0.9999).all() != close
    assert (aims.captured > 0.2).all()
    assert torch.equal(aims.coverage < 1, torch.tensor([True, True])), "embedding and head are left out"


def test_golden_linear_and_low_rank():
    """Two rows by hand: scores (0, 2.125); rank 1 keeps .8 and gives (2.5, .95)."""
    layer = nn.Linear(2, 2, bias=False)
    V = torch.tensor([[0.5, -1.0], [2.0, 0.25]])
    a = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[1.0, -1.0], [0.5, 1.0]]])
    g = torch.tensor([[[1.0, 1.0], [1.0, -1.0]], [[0.2, 0.4], [-1.0, 0.3]]])

    capture = captured(layer, V)
    capture.begin((2, 2), torch.device("cpu"))
    layer(a.requires_grad_()).backward(g)
    torch.testing.assert_close(capture.take(weights_B=torch.ones(2)).scores, torch.tensor([[0.0], [2.125]]))
    U, W, kept = factored(V, 1, draw=generator(0))
    assert kept == pytest.approx(0.8, abs=1e-6)
    low = torch.stack([sum((g[i, t] @ U) @ (W.T @ a[i, t]) for t in range(2)) for i in range(2)])
    torch.testing.assert_close(low.detach(), torch.tensor([2.5, 0.95]))
    assert float(U.norm()) == pytest.approx(float(W.norm()), rel=1e-5)


def one_direction(V):
    ones = torch.ones(1)
    return Directions(parts={"w": V[None]}, lengths=ones, coverage=ones, captured=ones)


def captured(layer, V, **options):
    unit = Unit(name="layer", module=layer, kind=kind_of(layer), parameters={"weight": "w"})
    capture = StepCapture([unit], **options)
    capture.aim(Directions.none([unit]) if V is None else one_direction(V))
    return capture


@pytest.mark.parametrize(
    ("num_items", "replicas", "scale", "seen"),
    [
        ((6, 6), 1, 1.0, (0.1, 0.05, 0.2)),
        ((6, 6), 2, 1024.0, (204.8, 102.4, 409.6)),
        ((2 * 4, 2 * 2), 1, 1.0, (0.075, 0.0375, 0.3)),  # means over micro-batches, of which there are two
    ],
)
def test_golden_denominators(num_items, replicas, scale, seen):
    """Three rows of 1, 3 and 2 tokens in two micro-batches; their means are .6, .1 and .6 whatever the loss counts."""
    layer = nn.Linear(1, 1, bias=False)
    capture = captured(layer, torch.ones(1, 1))
    dots, scores = [], []
    for rows, items in zip(([[0.6], [0.2, -0.4, 0.5]], [[1.0, 0.2]]), num_items, strict=True):
        width = max(map(len, rows))
        mask = torch.tensor([[t < len(row) for t in range(width)] for row in rows])
        a = torch.tensor([[*row, *[9.0] * (width - len(row))] for row in rows])[..., None].requires_grad_()
        capture.begin((len(rows), width), torch.device("cpu"))
        loss_BT = layer(a)[..., 0] * mask  # its gradient by the weight is what the token's product is to be
        losses = TokenLosses(loss_BT=loss_BT, mask_BT=mask, plain_sum=loss_BT.detach().sum())
        capture.watch(losses.loss_BT, losses.mask_BT)
        kind = {"normalizer": "num_tokens", "num_micro_batches": 2, "step_scale": None, "replicas": 1}
        sequences = Sequences(rows_B=np.arange(len(rows)))
        loss = weighted_loss(losses, torch.ones(len(rows), 1), sequences=sequences, num_items=float(items), **kind)
        (loss * replicas * scale).backward()
        dots += capture._dots.flatten().tolist()
        scores += capture.take().scores.flatten().tolist()
    assert dots == pytest.approx(seen, rel=1e-6)
    assert scores == pytest.approx((0.6, 0.1, 0.6), rel=1e-6)


def test_golden_documents():
    """Row 1 of the golden linear layer as two rows that lie in one sequence: 1 and 1.125."""
    layer = nn.Linear(2, 2, bias=False)
    capture = captured(layer, torch.tensor([[0.5, -1.0], [2.0, 0.25]]))
    there = torch.ones(2, 1, dtype=torch.bool)
    joined = Joined(rows_R=np.arange(2), index_RT=torch.tensor([[0], [1]]), there_RT=there)
    capture.begin((1, 2), torch.device("cpu"), joined)
    a = torch.tensor([[[1.0, -1.0], [0.5, 1.0]]], requires_grad=True)
    layer(a).backward(torch.tensor([[[0.2, 0.4], [-1.0, 0.3]]]))
    torch.testing.assert_close(capture.take(weights_B=torch.ones(2)).scores, torch.tensor([[1.0], [1.125]]))


def test_golden_adapter():
    """Output gradients of A hold the scale of 2 already: -6.95 and -.65, not twice that."""
    first, second = nn.Linear(2, 1, bias=False), nn.Linear(1, 2, bias=False)
    first.weight.data, second.weight.data = torch.tensor([[0.3, -0.2]]), torch.tensor([[0.5], [-1.0]])
    V = {"A": torch.tensor([[[0.1, 0.4]]]), "B": torch.tensor([[[1.0], [0.5]]])}
    layers = [
        Unit(name=name, module=layer, kind=kind_of(layer), parameters={"weight": name})
        for name, layer in (("A", first), ("B", second))
    ]
    x, base, goal = torch.tensor([[[1.0, 2.0], [0.0, -1.0]]]), torch.tensor([[1.0, 0.0], [0.5, 1.0]]), torch.eye(2)
    for names, score in ((("A",), -6.95), (("B",), -0.65), (("A", "B"), -7.6)):
        capture, ones = StepCapture([each for each in layers if each.name in names], sketch=1), torch.ones(1)
        capture.aim(Directions(parts={name: V[name] for name in names}, lengths=ones, coverage=ones, captured=ones))
        capture.begin((1, 2), torch.device("cpu"))
        y = x @ base.T + 2 * second(first(x))
        ((y - goal).square().sum() / 2).backward()
        scores, norms, _ = capture.take(weights_B=torch.ones(1))
        capture.end()
        assert float(scores) == pytest.approx(score, abs=1e-5)
    assert float(norms) == pytest.approx(16.985582, abs=1e-5)


def sketched_square(monkeypatch, inputs, outputs):
    """Squared norm of G = [[1, 2], [1, -2]] by draws [2, k] of either side; zeros make the layer wide enough."""
    size, width = len(inputs[0]), 4 * len(inputs[0]) + 1
    draws = iter([torch.tensor(inputs), torch.tensor(outputs)])
    monkeypatch.setattr(torch, "randn", lambda *_, **__: nn.functional.pad(next(draws), (0, 0, 0, width - 2)))
    with torch.no_grad():
        layer = nn.Linear(width, width, bias=False)
    capture = captured(layer, None, sketch=size)
    monkeypatch.undo()
    capture.begin((1, 2), torch.device("cpu"))
    a, g = torch.zeros(2, 1, 2, width)
    a[0, :, :2], g[0, :, :2] = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    layer(a.requires_grad_()).backward(g)
    return float(capture.take(weights_B=torch.ones(1)).norms) ** 2


def test_golden_sketch(monkeypatch):
    """Draws that are orthogonal give the norm of 10 itself, one number per side 4, and 10 on the mean."""
    turned = sketched_square(monkeypatch, [[1.0, 1.0], [-1.0, 1.0]], [[1.0, -1.0], [1.0, 1.0]])
    assert turned == pytest.approx(10, rel=1e-6)
    assert sketched_square(monkeypatch, [[1.0], [-1.0]], [[1.0], [1.0]]) == pytest.approx(4, rel=1e-6)
    signs = [(i, o) for i in (1.0, -1.0) for o in (1.0, -1.0)]
    squares = [sketched_square(monkeypatch, [[1.0], [i]], [[1.0], [o]]) for i, o in signs]
    assert np.mean(squares) == pytest.approx(10, rel=1e-6)


def test_golden_adam_scale():
    """A coordinate that no gradient has reached counts nothing."""
    moments = Moments(
        first=torch.zeros(3), second=torch.tensor([4e-8, 1e-8, 0.0]), step=10, betas=(0.9, 0.999), eps=1e-8
    )
    V = torch.tensor([1e-3, -2e-3, 5e-4]) * adam_scale(moments)
    torch.testing.assert_close(V, torch.tensor([0.498874, -1.995487, 0.0]), rtol=1e-5, atol=0)


def test_sketched_norms_are_near_the_norms_on_the_mean():
    """A sketch of 8 x 8 numbers has a relative error of .75 at most for one matrix (rank 1), averaged over layers."""
    model = build("llama").eval()
    engine, capture = prepared(model, sketch=2)
    batch = ragged([9, 4, 6, 2], seed=3)
    found = []
    aims = directions(drawn(engine.shapes), None, capture.layers, rank=None, seed=7)
    for seed in range(40):
        capture._seed = seed
        capture.aim(aims)
        step(model, capture, batch)
        found.append(capture.take()[1].square())
    _, norms = expected(engine, model, batch, capture)
    torch.testing.assert_close(torch.stack(found).mean(0).sqrt().double(), norms, rtol=0.1, atol=0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "lora", "qwen3"])
def test_products_of_sketches_are_near_the_products_and_exact_where_sides_are_narrow(name):
    model = build(name).eval()
    batch = ragged([9, 4, 6, 2], seed=3)
    found = {}
    for sketch in (64, 2):
        engine, capture = prepared(model, sketch=sketch)
        capture.aim(Directions.none(capture.layers))
        step(model, capture, batch, scale=256.0)
        taken = capture.take()
        capture.end()
        assert taken.sketches.shape == (4, capture.size)
        names = {name for unit in capture.layers for name in unit.parameters.values()}
        aims = {name: vector for name, vector in drawn(engine.shapes).tensors.items() if name in names}
        found[sketch] = taken.sketches @ capture.sketch_of(aims).T
    dots, norms = expected(engine, model, batch, capture)
    length = torch.sqrt(sum(vector.flatten(1).double().square().sum(1) for vector in aims.values()))
    # 64 numbers are no fewer than a quarter of any side: nothing is drawn.
    torch.testing.assert_close(found[64].double() / length, dots, rtol=1e-4, atol=1e-5 * float(norms.max()))
    error = (found[2].double() / length - dots) / norms[:, None]
    assert float(error.abs().max()) < 1.0, "off by chance, in units of the gradient's length"
    assert float(error.abs().max()) > 1e-3
