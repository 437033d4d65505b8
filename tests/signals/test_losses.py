"""Per-sample losses against a row-by-row transcription, and passes that leave everything as it was."""

from __future__ import annotations

import random
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from dataflex.signals.identity import state_identity
from dataflex.signals.kinds import AdaptedLoss, Embedding, TokenLoss
from dataflex.signals.losses import token_mean_losses
from dataflex.signals.model_access import Corpus, ModelAccess
from dataflex.signals.runner import SignalCache, SignalRunner
from dataflex.signals.store import ArrayStore
from dataflex.signals.sweep import Sweep, bucketed, preserve_state, row_pass
from tests.signals import tiny


def oracle_loss(logits_TV, labels_T) -> float:
    """Token-mean cross-entropy of one row in float64, one token at a time."""
    logits, total, count = logits_TV.double(), 0.0, 0
    for position in range(len(labels_T) - 1):
        label = int(labels_T[position + 1])
        if label == -100:
            continue
        row = logits[position]
        total += float(torch.log(torch.exp(row - row.max()).sum()) + row.max() - row[label])
        count += 1
    return total / count if count else float("nan")


@given(
    batch=st.integers(1, 4),
    width=st.integers(2, 9),
    vocabulary=st.integers(2, 11),
    seed=st.integers(0, 10_000),
    masked=st.floats(0.0, 1.0),
)
@settings(max_examples=60, deadline=None)
def test_token_mean_losses(batch, width, vocabulary, seed, masked):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, width, vocabulary, generator=generator) * 3
    labels = torch.randint(0, vocabulary, (batch, width), generator=generator)
    labels[torch.rand(batch, width, generator=generator) < masked] = -100
    got = token_mean_losses(logits, labels).double().numpy()
    want = np.array([oracle_loss(logits[i], labels[i]) for i in range(batch)])
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6)
    assert np.array_equal(np.isnan(got), np.isnan(want))


@given(lengths=st.lists(st.integers(1, 50), max_size=40), budget=st.integers(1, 200))
def test_bucketed_batches_cover_every_row_once_within_the_budget(lengths, budget):
    array = np.array(lengths, dtype=np.int64)
    batches = bucketed(array, budget)
    assert sorted(np.concatenate(batches).tolist() if batches else []) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * array[batch].max() <= budget
    longest = [array[batch].max() for batch in batches]
    assert longest == sorted(longest, reverse=True)


class Rows:
    def __init__(self, rows):
        self.rows = rows

    def __getitems__(self, ids):
        return [dict(self.rows[i]) for i in ids]


def collate(features):
    width = max(len(feature["input_ids"]) for feature in features)

    def padded(key, value):
        return torch.tensor([f[key] + [value] * (width - len(f[key])) for f in features])

    mask = torch.tensor([[1] * len(f["input_ids"]) + [0] * (width - len(f["input_ids"])) for f in features])
    return {"input_ids": padded("input_ids", 0), "attention_mask": mask, "labels": padded("labels", -100)}


@pytest.fixture(scope="module")
def service():
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=23,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        attention_dropout=0.3,
    )
    model = LlamaForCausalLM(config)
    rng = random.Random(0)

    def row():
        length = rng.randint(3, 12)
        ids = [rng.randrange(23) for _ in range(length)]
        prompt = rng.randint(1, length)
        return {"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]}

    def corpus(count):
        rows = [row() for _ in range(count)]
        return Corpus(dataset=Rows(rows), lengths=np.array([len(r["input_ids"]) for r in rows]))

    import contextlib

    access = ModelAccess(
        model=model,
        collate=collate,
        autocast=contextlib.nullcontext,
        device=torch.device("cpu"),
        token_budget=40,
        train=corpus(30),
        targets={"goal": corpus(6)},
        seed=5,
    )
    return SignalRunner(access=access)


def one_row_losses(service, corpus, rows):
    model, out = service.access.model, []
    model.eval()
    for row in rows:
        features = corpus.dataset.__getitems__([int(row)])
        batch = collate(features)
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"]).logits[0]
        out.append(oracle_loss(logits, batch["labels"][0]))
    return np.array(out)


def test_losses_equal_one_row_at_a_time(service):
    rows = np.array([4, 0, 29, 4, 17, 8, 3, 2, 1], dtype=np.int64)
    want = one_row_losses(service, service.access.train, rows)
    np.testing.assert_allclose(service(TokenLoss(), rows), want, rtol=1e-5)
    target = np.arange(6)
    want = one_row_losses(service, service.access.targets["goal"], target)
    np.testing.assert_allclose(service(TokenLoss(), target, target="goal"), want, rtol=1e-5)


class Counted:
    """Counts the passes that a service makes."""

    def __init__(self, service):
        self.passes, self._service, self._original = 0, service, service._compute

    def __enter__(self):
        def sweep(*args):
            self.passes += 1
            return self._original(*args)

        self._service._compute = sweep
        return self

    def __exit__(self, *_):
        self._service._compute = self._original


def test_answers_are_shared_within_a_step(service):
    with Counted(service) as counted:
        service.begin(100)
        rows = np.arange(5)
        first = service(TokenLoss(), rows)
        first[:] = -1.0  # a caller may do as it likes with its copy
        assert not (service(TokenLoss(), rows) == -1.0).any()
        service(TokenLoss(), np.arange(6))
        service(TokenLoss(), rows, target="goal")
        assert counted.passes == 3
        service.begin(101)
        service(TokenLoss(), rows)
        assert counted.passes == 4


def test_older_answers_are_given_again_up_to_their_age(service):
    service.cache.max_age_steps = 10
    rows = np.arange(7)
    with Counted(service) as counted:
        service.begin(200)
        first = service(TokenLoss(), rows)
        service.begin(210)
        assert np.array_equal(service(TokenLoss(), rows), first, equal_nan=True)
        state = service.state_dict()
        service.begin(211)
        service(TokenLoss(), rows)
        assert counted.passes == 2
        service.load_state_dict(state)  # as a run resumed at step 210 does
        service.begin(210)
        assert np.array_equal(service(TokenLoss(), rows), first, equal_nan=True)
        assert counted.passes == 2
    service.cache.max_age_steps = 0
    assert service.state_dict() == {"answers": {}}


def test_stored_answers_belong_to_one_state_of_the_model(service, tmp_path):
    rows, spec = np.arange(9), Embedding()
    service.begin(300)
    losses, vectors = service(TokenLoss(), rows), service(spec, rows)
    service.cache = SignalCache(
        store=ArrayStore(tmp_path), model_identity=lambda: state_identity(service.access.model.named_parameters())
    )
    service.begin(301)
    assert np.array_equal(service(TokenLoss(), rows), losses, equal_nan=True)
    assert np.array_equal(service(spec, rows), vectors, equal_nan=True)
    assert len(service.cache.store.entries()) == 2
    service.begin(302)  # another step, the same weights: found again
    service(TokenLoss(), rows)
    assert len(service.cache.store.entries()) == 2
    weight = service.access.model.lm_head.weight
    with torch.no_grad():
        weight[0, 0] += 1.0
    service.begin(303)
    changed = service(TokenLoss(), rows)
    assert len(service.cache.store.entries()) == 3
    assert not np.array_equal(changed, losses, equal_nan=True)
    with torch.no_grad():
        weight[0, 0] -= 1.0
    service.cache = SignalCache()


def test_a_pass_touches_nothing(service):
    model = service.access.model
    model.train()
    model.model.layers[0].eval()  # a mixed mode must come back as it was
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    states = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    service.begin(7)
    service(TokenLoss(), np.arange(10))
    service(AdaptedLoss(towards="goal", depth_steps=2, learning_rate=0.01, rank=1, alpha=4.0), np.arange(10))
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(torch.equal(parameter.grad, torch.ones_like(parameter)) for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    model.zero_grad(set_to_none=True)


def test_preserved_restores_after_an_error(service):
    model = service.access.model
    model.train()

    def fails():
        with preserve_state(model):
            model.eval()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert model.training


def test_an_untrained_probe_changes_nothing_and_training_lowers_the_target_loss(service):
    rows = np.arange(12)
    service.begin(11)
    plain = service(TokenLoss(), rows)
    same = service(AdaptedLoss(towards="goal", depth_steps=0, learning_rate=0.1, rank=2, alpha=4.0), rows)
    np.testing.assert_array_equal(plain, same)
    # The target scored as if it were the pool: its losses must fall.
    twin = tiny.again(service, train=service.access.targets["goal"], targets=service.access.targets, seed=5)
    before = np.nanmean(twin(TokenLoss(), np.arange(6)))
    after = np.nanmean(
        twin(AdaptedLoss(towards="goal", depth_steps=20, learning_rate=0.05, rank=2, alpha=4.0), np.arange(6))
    )
    assert after < before - 0.05


def test_a_sweep_scores_repeated_rows_and_reports_progress(monkeypatch):
    dataset = Rows([{"input_ids": [1] * n, "labels": [1] * n} for n in (3, 5, 2)])
    seen = []

    @contextmanager
    def noted(what, total, done):
        yield lambda count: seen.append((what, count, total))

    monkeypatch.setattr("dataflex.signals.sweep.progress", noted)

    def sweep(rows, lengths):
        return Sweep(
            dataset=dataset,
            rows=np.array(rows, dtype=np.int64),
            lengths=np.array(lengths, dtype=np.int64),
            collate=collate,
            token_budget=6,
            device=torch.device("cpu"),
            what="a test",
        )

    def tokens(batch):
        return batch["attention_mask"].sum(dim=1).float()

    assert row_pass(sweep([2, 0, 1, 0], [2, 3, 5, 3]), tokens, ()).tolist() == [2.0, 3.0, 5.0, 3.0]
    assert seen[-1] == ("a test", 4, 4)
    assert row_pass(sweep([], []), tokens, ()).shape == (0,)
