"""Token losses, EL2N, entropy: against one row at a time in float64; packed rows against their documents."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflex.signals import token_losses as module
from dataflex.signals.cross_entropy import chunk_tokens
from dataflex.signals.losses import row_losses
from dataflex.signals.packing import document_ids
from dataflex.signals.row_signals import token_losses
from dataflex.signals.sweep import Sweep
from dataflex.signals.token_losses import TokenScorer
from tests.rounding import printed
from tests.signals import tiny

CPU = torch.device("cpu")
MODELS = {"llama": tiny.llama, "gemma2": tiny.gemma2, "cohere": tiny.cohere, "gpt2": tiny.gpt2, "lora": tiny.lora}
THROUGH_HEAD = {"llama": True, "gemma2": False, "cohere": False, "gpt2": True, "lora": True}


@pytest.fixture(scope="module")
def models():
    return {name: make() for name, make in MODELS.items()}


def sweep_of(rows, ids=None, *, budget=40, collate=tiny.collate):
    ids = np.arange(len(rows)) if ids is None else np.asarray(ids, dtype=np.int64)
    return Sweep(dataset=rows, rows=ids, lengths=rows.lengths[ids], collate=collate, token_budget=budget, device=CPU)


@torch.no_grad()
def oracle(model, row):
    """(position, loss, EL2N, entropy) of each supervised token of one row without padding, in float64."""
    model.eval()
    logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double()
    found = []
    for position in range(1, len(row["labels"])):
        label = row["labels"][position]
        if label == -100:
            continue
        p = torch.softmax(logits[position - 1], dim=0)
        hot = torch.zeros_like(p)
        hot[label] = 1.0
        entropy = -sum(float(x) * math.log(float(x)) for x in p)
        found.append((position, -math.log(float(p[label])), float((p - hot).norm()), entropy))
    return found


@pytest.mark.parametrize("name", list(MODELS))
def test_tokens_equal_one_row_at_a_time(models, name):
    rows = tiny.make_rows(21)
    ids = [4, 0, 20, 4, 17, 6, 13, 2, 9]
    got = token_losses(models[name], sweep_of(rows, ids), el2n=True, entropy=True)
    want = [oracle(models[name], rows.rows[i]) for i in ids]
    assert np.diff(got.offsets).tolist() == [len(tokens) for tokens in want]
    flat = np.array([token for tokens in want for token in tokens])
    np.testing.assert_array_equal(got.position, flat[:, 0])
    for column, values in ((1, got.loss), (2, got.el2n), (3, got.entropy)):
        np.testing.assert_allclose(values, flat[:, column], rtol=1e-5, atol=1e-6)
    for column, what in ((1, "loss"), (2, "el2n"), (3, "entropy")):
        means = [np.mean([token[column] for token in tokens]) if tokens else np.nan for tokens in want]
        np.testing.assert_allclose(got.means(what), means, rtol=1e-5)
    assert np.isnan(got.means()[[5, 6]]).all()  # rows 6 and 13 have no labels
    assert (got.document == 0).all()


@pytest.mark.parametrize("name", list(MODELS))
def test_logits_that_are_changed_after_the_head_are_noticed(models, name):
    scorer = TokenScorer(models[name].eval())
    batch = tiny.collate(tiny.make_rows(5).rows)
    tokens = scorer(batch)
    assert scorer.through_head is THROUGH_HEAD[name]
    with torch.no_grad():
        np.testing.assert_allclose(tokens.means(), row_losses(models[name], batch), rtol=1e-5)
    again = scorer(batch)  # past the first batch, without the comparison
    assert torch.equal(tokens.loss, again.loss)


@pytest.mark.slow
@given(
    lengths=st.lists(st.integers(1, 14), min_size=1, max_size=7),
    budget=st.integers(5, 80),
    left=st.booleans(),
    seed=st.integers(0, 100),
)
@settings(max_examples=25, deadline=None)
def test_padding_and_batches_change_nothing(models, lengths, budget, left, seed):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length in lengths:
        ids = torch.randint(3, tiny.VOCABULARY, (length,), generator=generator).tolist()
        masked = torch.rand(length, generator=generator) < 0.4
        made.append({"input_ids": ids, "labels": [-100 if m else t for t, m in zip(ids, masked, strict=True)]})
    rows = tiny.Rows(made)
    got = token_losses(
        models["llama"], sweep_of(rows, budget=budget, collate=tiny.collate_left if left else tiny.collate)
    )
    want = [oracle(models["llama"], row) for row in made]
    assert np.diff(got.offsets).tolist() == [len(tokens) for tokens in want]
    assert got.position.tolist() == [token[0] for tokens in want for token in tokens]
    np.testing.assert_allclose(got.loss, [token[1] for tokens in want for token in tokens], rtol=1e-5, atol=1e-6)


def test_the_head_never_sees_more_than_a_chunk(models, monkeypatch):
    model = models["llama"]
    batch = tiny.collate(tiny.make_rows(12, seed=2).rows)
    whole = TokenScorer(model.eval(), el2n=True)(batch)
    assert chunk_tokens(4096, CPU) == 512
    assert chunk_tokens(152_000, CPU) == 256
    assert chunk_tokens(32_000, torch.device("meta")) == 1048
    monkeypatch.setattr(module, "chunk_tokens", lambda vocabulary, device: 5)
    seen = []
    original = model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda x: seen.append(x.shape[:-1].numel()) or original(x))
    parts = TokenScorer(model, el2n=True)(batch)
    assert max(seen) == len(batch["labels"])  # the model's own call: one position per row
    assert sorted(seen)[-3] == 5
    torch.testing.assert_close(parts.loss, whole.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(parts.el2n, whole.el2n, rtol=1e-6, atol=1e-6)


def packed_batch(form):
    """Five documents in two packed rows, in each form that LLaMA-Factory's collators give."""
    from llamafactory.data.collator import prepare_4d_attention_mask

    documents = tiny.make_rows(5, seed=8, low=3, high=7).rows
    documents[1]["labels"] = list(documents[1]["input_ids"])  # supervised from its first token on
    groups = [documents[:3], documents[3:]]
    features = [tiny.packed(group, 24) for group in groups]
    batch = {key: torch.tensor([feature[key] for feature in features]) for key in features[0]}
    if form == "block_diagonal":
        batch["attention_mask"] = prepare_4d_attention_mask(batch["attention_mask"], torch.float32)
    elif form == "plain":
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    elif form == "flash":
        kept = batch["attention_mask"][0] != 0
        batch = {key: value[:1, kept] for key, value in batch.items()}
        batch["attention_mask"] = None
        groups = groups[:1]
    return batch, groups


@pytest.mark.parametrize("form", ["numbered", "block_diagonal", "plain", "flash"])
def test_documents_are_told_apart(form):
    batch, groups = packed_batch(form)
    ids = document_ids(batch)
    for row, group in enumerate(groups):
        expected = [number for number, document in enumerate(group) for _ in document["input_ids"]]
        assert ids[row, : len(expected)].tolist() == expected
        rest = ids[row, len(expected) :].tolist()
        assert all(value == -1 for value in rest) or form == "plain"


@pytest.mark.parametrize("form", ["block_diagonal", "flash"])
def test_documents_have_the_losses_that_they_have_alone(models, form):
    batch, groups = packed_batch(form)
    model = models["llama"]
    sweep = Sweep(
        dataset=tiny.Rows([{}] * len(groups)),
        rows=np.arange(len(groups)),
        lengths=np.full(len(groups), 24),
        collate=lambda features: batch,
        token_budget=10_000,
        device=CPU,
    )
    got = token_losses(model, sweep)
    keys, losses, tokens = got.documents()
    want = {}
    for row, group in enumerate(groups):
        for number, document in enumerate(group):
            alone = [token[1] for token in oracle(model, document)]
            if alone:
                want[(row, number)] = (np.mean(alone), len(alone))
    assert [tuple(key) for key in keys.tolist()] == list(want)
    np.testing.assert_allclose(losses, [value for value, _ in want.values()], rtol=1e-5)
    assert tokens.tolist() == [count for _, count in want.values()]
    # The first token of a later document is predicted from the document before.
    crossing = sum(document["labels"][0] != -100 for group in groups for document in group[1:])
    assert int((got.document == -1).sum()) == crossing > 0
    with torch.no_grad():  # rows count every token that training counts
        np.testing.assert_allclose(got.means(), row_losses(model, batch), rtol=1e-5)


def test_el2n_of_the_sheet_and_of_confident_predictions(models):
    scorer = TokenScorer(models["llama"], el2n=True, entropy=True)
    p = torch.tensor([[0.7, 0.2, 0.1]])
    out = scorer._score(p.log(), torch.tensor([0]))
    assert float(out["el2n"]) == pytest.approx(0.374166, abs=printed(6, 8))
    assert float(out["entropy"]) == pytest.approx(-sum(x * math.log(x) for x in (0.7, 0.2, 0.1)), rel=1e-6)
    sure = torch.tensor([[0.0, -18.0, -19.0, -float("inf")]])
    exact = torch.softmax(sure.double(), dim=1)[0] - torch.tensor([1.0, 0.0, 0.0, 0.0]).double()
    out = scorer._score(sure, torch.tensor([0]))
    assert float(out["el2n"]) == pytest.approx(float(exact.norm()), rel=1e-4)  # 1 - p in fp32 would be 0
    assert torch.isfinite(out["entropy"]).all()


def test_value_head_wrapper(models):
    from trl import AutoModelForCausalLMWithValueHead

    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny.llama()).eval()
    rows = tiny.make_rows(4)
    got = token_losses(model, sweep_of(rows))
    want = [token[1] for row in rows.rows for token in oracle(model.pretrained_model, row)]
    np.testing.assert_allclose(got.loss, want, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2", "lora"])
def test_a_pass_leaves_no_trace(models, name):
    model = models[name]
    rows = tiny.make_rows(9)
    model.train()
    next(model.modules()).eval()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = tiny.snapshot(model)
    first = token_losses(model, sweep_of(rows), el2n=True)
    tiny.assert_same(before, tiny.snapshot(model))
    second = token_losses(model, sweep_of(rows), el2n=True)
    assert np.array_equal(first.loss, second.loss)  # no dropout, although the model was training
    model.zero_grad(set_to_none=True)


def test_no_rows(models):
    got = token_losses(models["llama"], sweep_of(tiny.make_rows(3), []), el2n=True)
    assert got.offsets.tolist() == [0]
    assert got.means("el2n").shape == (0,)
    keys, losses, tokens = got.documents()
    assert keys.shape == (0, 2)
    assert len(losses) == len(tokens) == 0
