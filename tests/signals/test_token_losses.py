"""Token losses and EL2N: against one row at a time in float64; packed rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflex.signals import logits as module
from dataflex.signals.kinds import EL2N
from dataflex.signals.logits import TokenScorer
from dataflex.signals.losses import chunk_tokens, document_ids, row_losses
from dataflex.signals.model_access import Corpus
from dataflex.signals.sweep import Sweep
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


def token_values(model, sweep, *, el2n=False):
    """(position, loss, and EL2N if asked for) of each supervised token, by row of the sweep."""
    found = [[] for _ in sweep.rows]
    scorer = TokenScorer(model.eval(), el2n=el2n)
    for turn in sweep.turns():
        tokens = scorer(turn.batch)
        columns = [tokens.row, tokens.position, tokens.loss, *[tokens.el2n] * el2n]
        for row, *values in zip(*(column.tolist() for column in columns), strict=True):
            found[turn.positions[row]].append(tuple(values))
    return found


def flat(rows):
    return [token for row in rows for token in row]


@torch.no_grad()
def oracle(model, row):
    """(position, loss, EL2N) of each supervised token of one row without padding, in float64."""
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
        found.append((position, -math.log(float(p[label])), float((p - hot).norm())))
    return found


@pytest.mark.parametrize("name", list(MODELS))
def test_tokens_equal_one_row_at_a_time(models, name):
    rows = tiny.make_rows(21)
    ids = [4, 0, 20, 4, 17, 6, 13, 2, 9]
    sweep = sweep_of(rows, ids)
    got = token_values(models[name], sweep, el2n=True)
    want = [oracle(models[name], rows.rows[i]) for i in ids]
    assert [len(tokens) for tokens in got] == [len(tokens) for tokens in want]
    np.testing.assert_allclose(flat(got), flat(want), rtol=1e-5, atol=1e-6)
    for column, what in ((1, "loss"), (2, "el2n")):
        means = [np.mean([token[column] for token in tokens]) if tokens else np.nan for tokens in want]
        scorer = TokenScorer(models[name], el2n=True)
        for turn in sweep.turns():
            np.testing.assert_allclose(scorer(turn.batch).means(what), np.array(means)[turn.positions], rtol=1e-5)
    assert not got[5]
    assert not got[6]  # rows 6 and 13 have no labels


@pytest.mark.parametrize("name", list(MODELS))
def test_logits_that_are_changed_after_the_head_are_noticed(models, name):
    scorer = TokenScorer(models[name].eval())
    batch = tiny.collate(tiny.make_rows(5).rows)
    tokens = scorer(batch)
    assert scorer.reader.through_head is THROUGH_HEAD[name]
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
    got = token_values(
        models["llama"], sweep_of(rows, budget=budget, collate=tiny.collate_left if left else tiny.collate)
    )
    want = [[token[:2] for token in oracle(models["llama"], row)] for row in made]
    assert [[token[0] for token in row] for row in got] == [[token[0] for token in row] for row in want]
    np.testing.assert_allclose([x for _, x in flat(got)], [x for _, x in flat(want)], rtol=1e-5, atol=1e-6)


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
def test_packed_rows_count_every_token_that_training_counts(models, form):
    batch, _ = packed_batch(form)
    with torch.no_grad():
        means = TokenScorer(models["llama"].eval())(batch).means()
        np.testing.assert_allclose(means, row_losses(models["llama"], batch), rtol=1e-5)


def test_el2n_of_the_sheet_and_of_confident_predictions(models):
    scorer = TokenScorer(models["llama"], el2n=True)
    p = torch.tensor([[0.7, 0.2, 0.1]])
    out = scorer._score(p.log(), torch.tensor([0]))
    assert float(out["el2n"]) == pytest.approx(0.374166, abs=printed(6, 8))
    sure = torch.tensor([[0.0, -18.0, -19.0, -float("inf")]])
    exact = torch.softmax(sure.double(), dim=1)[0] - torch.tensor([1.0, 0.0, 0.0, 0.0]).double()
    out = scorer._score(sure, torch.tensor([0]))
    assert float(out["el2n"]) == pytest.approx(float(exact.norm()), rel=1e-4)  # 1 - p in fp32 would be 0


def test_value_head_wrapper(models):
    import llamafactory.extras.packages  # noqa: F401 (as for tests.huggingface)
    from trl import AutoModelForCausalLMWithValueHead

    model = AutoModelForCausalLMWithValueHead.from_pretrained(tiny.llama()).eval()
    rows = tiny.make_rows(4)
    got = [token[1] for token in flat(token_values(model, sweep_of(rows)))]
    want = [token[1] for row in rows.rows for token in oracle(model.pretrained_model, row)]
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2", "lora"])
def test_a_pass_leaves_no_trace(models, name):
    model = models[name]
    rows = tiny.make_rows(9)
    model.train()
    next(model.modules()).eval()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = tiny.snapshot(model)
    train = Corpus(dataset=rows, lengths=rows.lengths)
    first = tiny.asking(model, train)(EL2N(), np.arange(9))
    tiny.assert_same(before, tiny.snapshot(model))
    second = tiny.asking(model, train)(EL2N(), np.arange(9))
    np.testing.assert_array_equal(first, second)  # no dropout, although the model was training
    model.zero_grad(set_to_none=True)


def test_no_rows(models):
    rows = tiny.make_rows(3)
    runner = tiny.asking(models["llama"], Corpus(dataset=rows, lengths=rows.lengths))
    assert runner(EL2N(), np.zeros(0, dtype=np.int64)).shape == (0,)
