"""Gradient scores and norms of the service against one row at a time, in every way they can be asked for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dataflex.signals.identity import state_identity
from dataflex.signals.kinds import GradientNorms, GradientScores
from dataflex.signals.losses import row_losses
from dataflex.signals.model_access import Corpus
from dataflex.signals.runner import SignalCache
from dataflex.signals.specs import GradientSpec
from dataflex.signals.store import ArrayStore
from tests.signals.gradients.small import build, flat, oracle, ragged
from tests.signals.tiny import again, asking


class Rows:
    """Rows of a ragged batch, one by one and without their padding."""

    def __init__(self, lengths, seed, unlabelled=()):
        batch = ragged(lengths, seed=seed, unlabelled=unlabelled)
        self.rows = [
            {"input_ids": batch["input_ids"][i, :n].tolist(), "labels": batch["labels"][i, :n].tolist()}
            for i, n in enumerate(lengths)
        ]
        self.lengths = np.array(lengths, dtype=np.int64)

    def __getitems__(self, ids):
        return [self.rows[i] for i in ids]


def collate(features):
    width = max(len(f["input_ids"]) for f in features)
    pad = [width - len(f["input_ids"]) for f in features]
    return {
        "input_ids": torch.tensor([f["input_ids"] + [3] * n for f, n in zip(features, pad, strict=True)]),
        "attention_mask": torch.tensor([[1] * (width - n) + [0] * n for n in pad]),
        "labels": torch.tensor([f["labels"] + [-100] * n for f, n in zip(features, pad, strict=True)]),
    }


def train_a_little(model, rows):
    """Three AdamW steps with dropout off, so that there are moments."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    model.eval()
    for start in range(3):
        batch = collate(rows.__getitems__([start, start + 1]))
        row_losses(model, batch).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return optimizer


@pytest.fixture(scope="module", params=["llama", "lora"])
def setting(request):
    model = build(request.param)
    pool = Rows([5, 9, 4, 12, 7, 6, 10], seed=1, unlabelled=(4,))
    near, far = Rows([6, 8, 5], seed=2), Rows([9, 7], seed=3)
    optimizer = train_a_little(model, pool)

    def corpus(rows, name):
        return Corpus(dataset=rows, lengths=rows.lengths, identity=name)

    targets = {"near": corpus(near, "near"), "far": corpus(far, "far")}
    service = asking(
        model, corpus(pool, "pool"), targets, collate=collate, token_budget=24, optimizer=lambda: optimizer
    )
    gradients = {
        name: flat(oracle(model, collate(rows.rows))).double().numpy()
        for name, rows in (("pool", pool), ("near", near), ("far", far))
    }
    return service, gradients, moments(model, optimizer)


def moments(model, optimizer):
    parameters = [p for p in model.parameters() if p.requires_grad]
    first = torch.cat([optimizer.state[p]["exp_avg"].flatten() for p in parameters]).double().numpy()
    second = torch.cat([optimizer.state[p]["exp_avg_sq"].flatten() for p in parameters]).double().numpy()
    return first, second


def direction(g, m, v, preset, momentum):
    """Adam's fourth step in float64, as the paper writes it and as its code does it."""
    first = (0.9 * m if momentum else 0.0) + 0.1 * g
    second = 0.999 * v + 0.001 * g * g
    if preset == "paper_repo":
        return first / np.sqrt(second + 1e-8)
    return (first / (1 - 0.9**4)) / (np.sqrt(second / (1 - 0.999**4)) + 1e-8)


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def expected_scores(gradients, state, spec):
    rows = gradients["pool"]
    if spec.precondition in {"true_adam", "paper_repo"}:
        rows = np.stack([direction(g, *state, spec.precondition, spec.include_momentum) for g in rows])
    elif spec.precondition == "sign":
        rows = np.sign(rows)
    columns = []
    for name in ("near", "far"):
        target = gradients[name]
        if not spec.normalize:
            columns.append(rows @ target.mean(axis=0))
        elif spec.mean_of_cosines:
            columns.append((unit(rows) @ unit(target).T).mean(axis=1))
        else:
            columns.append(unit(rows) @ unit(target.mean(axis=0)))
    scores = np.stack(columns, axis=1)
    scores[4] = np.nan  # no labels
    return scores


SPECS = {
    "true_adam": GradientSpec(),
    "paper_repo": GradientSpec(precondition="paper_repo"),
    "no momentum": GradientSpec(include_momentum=False),
    "sgd": GradientSpec(precondition="none"),
    "cosine of mean": GradientSpec(precondition="none", mean_of_cosines=False),
    "dot": GradientSpec(precondition="none", normalize=False),
    "sign": GradientSpec(precondition="sign"),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("name", SPECS)
def test_scores_equal_one_row_at_a_time(setting, name):
    service, gradients, state = setting
    service.begin(list(SPECS).index(name))
    found = service(GradientScores(**vars(SPECS[name]), targets=("near", "far")), np.arange(7))
    wanted = expected_scores(gradients, state, SPECS[name])
    scale = np.nanmax(np.abs(wanted))
    # Signs of gradients that vanish but for rounding are arbitrary.
    np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=(0.05 if name == "sign" else 2e-5) * scale)


def test_a_row_that_is_the_target_scores_one(setting):
    service, _, _ = setting
    twin = again(service, train=service.access.targets["near"], targets={"self": service.access.targets["near"]})
    spec = GradientSpec(precondition="none", mean_of_cosines=False)
    for row in range(3):
        alone = Corpus(dataset=Rows.__new__(Rows), lengths=twin.access.train.lengths[row : row + 1])
        alone.dataset.rows = [twin.access.train.dataset.rows[row]]
        twin.access = replace(twin.access, targets={"self": alone})
        twin.begin(100 + row)
        assert twin(GradientScores(**vars(spec), targets=("self",)), np.array([row]))[0, 0] == pytest.approx(
            1.0, abs=1e-5
        )


def test_norms(setting):
    service, gradients, _ = setting
    service.begin(50)
    wanted = np.linalg.norm(gradients["pool"], axis=1)
    wanted[4] = np.nan
    found = service(GradientNorms(precondition="none"), np.arange(7))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.mark.slow
def test_sketched_scores_come_near_the_exact_ones(setting):
    service, _, _ = setting
    service.begin(60)
    rows = np.array([0, 1, 2, 3, 5, 6])
    exact = service(GradientScores(targets=("near",)), rows)[:, 0]
    seeds = [
        service(GradientScores(sketch_size=1024, sketch_seed=seed, targets=("near",)), rows)[:, 0] for seed in range(8)
    ]
    assert np.abs(np.mean(seeds, axis=0) - exact).max() < 4 / np.sqrt(1024 * 8)
    assert np.abs(seeds[0] - seeds[1]).max() > 0


def test_parts_of_the_parameters(setting):
    service, _, _ = setting
    service.begin(70)
    rows = np.array([0, 1, 2])
    whole = service(GradientNorms(precondition="none"), rows)
    part = service(GradientNorms(precondition="none", last_blocks=1), rows)
    named = service(GradientNorms(precondition="none", parameters=r"layers\.1\."), rows)
    assert (part < whole).all()
    np.testing.assert_allclose(part, named, rtol=1e-6)


def test_stored_scores_depend_on_the_moments(setting, tmp_path):
    service, _, _ = setting
    rows = np.array([0, 1, 2])
    model = service.access.model
    twin = again(
        service,
        SignalCache(store=ArrayStore(tmp_path), model_identity=lambda: state_identity(model.named_parameters())),
    )
    twin.begin(1)
    first = twin(GradientScores(targets=("near",)), rows)
    twin.begin(2)
    assert np.array_equal(twin(GradientScores(targets=("near",)), rows), first)
    assert len(twin.cache.store.entries()) == 1
    state = next(iter(service.access.optimizer().state.values()))
    state["exp_avg"].mul_(2.0)
    try:
        twin.begin(3)
        changed = twin(GradientScores(targets=("near",)), rows)
        assert len(twin.cache.store.entries()) == 2
        assert not np.array_equal(changed, first)
    finally:
        state["exp_avg"].div_(2.0)
