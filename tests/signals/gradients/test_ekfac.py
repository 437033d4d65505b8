"""EK-FAC against a transcription in float64 and the dense formula, and what it stores."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from dataflex.errors import UnsupportedError
from dataflex.rng import uniforms
from dataflex.signals.gradients.consumers import TargetVectors
from dataflex.signals.gradients.ekfac import Curvature, curvature
from dataflex.signals.gradients.scorers import GradientScorers
from dataflex.signals.model_access import Corpus, ModelAccess
from dataflex.signals.runner import SignalCache
from dataflex.signals.specs import GradientSpec
from dataflex.signals.store import ArrayStore
from tests.signals.gradients.small import build, engine_of

VOCAB = 7


class Tiny(PreTrainedModel):
    """Two linear layers between a fixed embedding and the logits."""

    def __init__(self):
        super().__init__(PretrainedConfig())
        torch.manual_seed(3)
        self.embedding = nn.Embedding(VOCAB, 5).requires_grad_(False)
        self.first, self.second = nn.Linear(5, 4, bias=False), nn.Linear(4, VOCAB)

    def get_output_embeddings(self):
        return None

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        return SimpleNamespace(logits=self.second(torch.tanh(self.first(self.embedding(input_ids)))))


def rows_of(count, seed=0):
    draw = np.random.default_rng(seed)
    rows = [draw.integers(0, VOCAB, size=size).tolist() for size in draw.integers(3, 7, size=count)]
    return [{"input_ids": row, "labels": [-100, *row[1:]]} for row in rows]


def collate(features):
    width = max(len(row["input_ids"]) for row in features)
    padded = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        name: torch.tensor([[*row.get(name, [1] * len(row["input_ids"])), *[fill] * width][:width] for row in features])
        for name, fill in padded.items()
    }


def access_to(model, rows, **more):
    class Rows(list):
        def __getitems__(self, which):
            return [self[i] for i in which]

    lengths = np.array([len(row["input_ids"]) for row in rows])
    return ModelAccess(
        model=model.eval(), collate=collate, autocast=nullcontext, device=torch.device("cpu"), token_budget=14,
        train=Corpus(dataset=Rows(rows), lengths=lengths), seed=11, **more,
    )  # fmt: skip


def transcribed(model, rows):
    """Bases and diagonals in float64, one row and one token after the other."""
    model = model.double()
    names = {name: p for name, p in model.named_parameters() if p.requires_grad}
    A = {name: 0.0 for name in ("first.weight", "second.weight")}
    S, gradients = dict(A), []
    for number, row in enumerate(rows):
        ids = torch.tensor([row["input_ids"]])
        a1 = model.embedding(ids)
        z1 = model.first(a1)
        a2 = torch.tanh(z1)
        z2 = model.second(a2)
        loss, places = 0.0, range(ids.shape[1] - 1)
        for place in places:
            u = uniforms(11, "ekfac labels", 0, np.array([number * 2**32 + place]))[0]
            p = z2[0, place].softmax(-1).detach()
            label = int((p.cumsum(0) < u).sum())
            loss = loss - z2[0, place].log_softmax(-1)[label]
        loss = loss / len(places) ** 0.5
        found = torch.autograd.grad(loss, [z1, z2, *names.values()])
        for name, inputs, left in (("first.weight", a1, found[0]), ("second.weight", a2, found[1])):
            for place in places:  # the last position has no label: its gradients are zero
                A[name] = A[name] + torch.outer(inputs[0, place], inputs[0, place]).detach()
                S[name] = S[name] + torch.outer(left[0, place], left[0, place])
        gradients.append(dict(zip(names, found[2:], strict=True)))
    out = {}
    for name in A:
        U, V = torch.linalg.eigh(S[name])[1], torch.linalg.eigh(A[name])[1]
        out[name] = U, V, sum((U.T @ each[name] @ V) ** 2 for each in gradients) / len(rows)
    out["second.bias"] = sum(each["second.bias"] ** 2 for each in gradients) / len(rows)
    return out


def drawn(shapes):
    draw = torch.Generator().manual_seed(5)
    return TargetVectors(tensors={name: torch.randn(2, *shape, generator=draw) for name, shape in shapes.items()})


def test_equals_the_dense_formula_in_float64():
    model, rows = Tiny(), rows_of(9)
    access = access_to(model, rows)
    engine = engine_of(model)
    targets = drawn(engine.shapes)
    found = curvature(access, engine, 50).inverse(targets, 0.1)
    expected = transcribed(model, rows)
    for name in ("first.weight", "second.weight"):
        U, V, D = expected[name]
        basis = torch.kron(U, V)  # row-major vec: vec(U X V') = (U kron V) vec(X)
        F = basis @ torch.diag(D.flatten()) @ basis.T + 0.1 * D.mean() * torch.eye(D.numel(), dtype=torch.float64)
        for k in range(2):
            wanted = torch.linalg.solve(F, targets.tensors[name][k].double().flatten())
            assert (found.tensors[name][k].flatten() - wanted).norm() < 1e-3 * wanted.norm(), name
    D = expected["second.bias"]
    torch.testing.assert_close(
        found.tensors["second.bias"].double(),
        targets.tensors["second.bias"] / (D + 0.1 * D.mean()),
        rtol=1e-3,
        atol=0.0,
    )


def test_of_identity_factors_it_is_the_gradient_up_to_scale():
    targets = drawn({"w": torch.Size((3, 4)), "b": torch.Size((4,))})
    bases = {"w": {0: torch.eye(3), 1: torch.eye(4)}, "b": {}}
    flat = Curvature(bases=bases, diagonal={"w": torch.full((3, 4), 2.0), "b": torch.full((4,), 2.0)})
    for name, vector in flat.inverse(targets, 0.25).tensors.items():
        torch.testing.assert_close(vector, targets.tensors[name] / 2.5)
    none = Curvature(bases={"w": {}, "b": {}}, diagonal={"w": torch.zeros(3, 4), "b": torch.zeros(4)})
    assert none.inverse(targets, 0.1).tensors["w"].abs().sum() == 0


@pytest.mark.parametrize("normalize", [False, True])
def test_scores_are_products_of_rows_with_the_turned_target(normalize):
    model, rows = build("lora"), [{"input_ids": r, "labels": r} for r in ([1, 2, 5, 4], [7, 3, 9], [6, 6, 8, 2, 1])]
    spec = GradientSpec(precondition="ekfac", normalize=normalize)
    scorers = GradientScorers(access_to(model, rows), spec)
    targets, batch = drawn(scorers.engine.shapes), collate(rows)
    found = scorers.towards(targets)(batch)
    plain = GradientScorers(access_to(model, rows), GradientSpec(precondition="none", normalize=normalize))
    turned = curvature(access_to(model, rows), plain.engine, 256).inverse(targets, 0.1)
    torch.testing.assert_close(found, plain.towards(turned)(batch), rtol=1e-3, atol=1e-5 * float(found.abs().max()))
    assert (found - plain.towards(targets)(batch)).abs().max() > 1e-2 * found.abs().max()


def test_factors_are_stored_once_for_a_model(tmp_path, monkeypatch):
    from dataflex.signals.gradients import ekfac

    model, names = Tiny(), iter(["one", "one", "another"])
    cache = SignalCache(store=ArrayStore(tmp_path), model_identity=lambda: next(names))
    access, times, fitted = access_to(model, rows_of(5), work=cache.work), [], ekfac._fitted

    def counted(*given):
        times.append(1)
        return fitted(*given)

    monkeypatch.setattr(ekfac, "_fitted", counted)
    engine, found = engine_of(model), []
    targets = drawn(engine.shapes)
    for step, seen in enumerate((1, 1, 2)):
        cache.begin(step)
        found.append(curvature(access, engine, 4).inverse(targets, 0.1))
        assert len(times) == seen
    for name, vector in found[0].tensors.items():
        assert torch.equal(vector, found[1].tensors[name])
        assert torch.equal(vector, found[2].tensors[name])


def test_what_is_refused():
    model = Tiny()
    unlabelled = [{**row, "labels": [-100] * len(row["labels"])} for row in rows_of(3)]
    with pytest.raises(UnsupportedError, match="no row of the sample has a supervised token"):
        curvature(access_to(model, unlabelled), engine_of(model), 3)
    pairs = replace(access_to(model, rows_of(2)), preferences=SimpleNamespace())
    with pytest.raises(UnsupportedError, match="pairs of answers"):
        curvature(pairs, engine_of(model), 2)
