"""Embeddings: pooling against a loop, hidden states against transformers' own, one row at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflex.errors import ConfigError, UnsupportedError
from dataflex.signals.embeddings import embed_batch, hidden_states, pool, pool_documents
from dataflex.signals.kinds import Embedding
from dataflex.signals.losses import document_ids
from dataflex.signals.model_access import Corpus
from tests.rounding import layers_apart
from tests.signals import tiny

APART = layers_apart(3, 24)
"""Rounding in a pass of the tiny models, relative to the largest number that comes out."""
CPU = torch.device("cpu")
MODELS = {"llama": tiny.llama, "gemma2": tiny.gemma2, "gpt2": tiny.gpt2, "lora": tiny.lora}
POOLINGS = ["last", "first", "mean", "weighted_mean"]


@pytest.fixture(scope="module")
def models():
    return {name: make().eval() for name, make in MODELS.items()}


def oracle_pool(hidden_TD, kept, spec):
    """Pool the kept tokens of one row in float64, one token at a time."""
    tokens = [h.double() for h, keep in zip(hidden_TD, kept, strict=True) if keep]
    n = len(tokens)
    if n == 0:
        return torch.full((hidden_TD.shape[1],), torch.nan, dtype=torch.float64)
    weights = {
        "last": [0.0] * (n - 1) + [1.0],
        "first": [1.0] + [0.0] * (n - 1),
        "mean": [1 / n] * n,
        "weighted_mean": [2 * t / (n * (n + 1)) for t in range(1, n + 1)],
    }[spec.pooling]
    vector = sum(w * h for w, h in zip(weights, tokens, strict=True))
    return vector / vector.norm() if spec.normalize else vector


def test_the_sheets_toy():
    hidden = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]])
    plain = pool(hidden, None, None, Embedding(normalize=False))
    torch.testing.assert_close(plain, torch.tensor([[2 / 3, 5 / 6]]))
    unit = pool(hidden, None, None, Embedding())
    np.testing.assert_allclose(unit.numpy(), [[0.6247, 0.7809]], atol=5e-5)
    # The same row with padding on the left, whatever the padding holds.
    padded = torch.cat([torch.full((1, 2, 2), torch.nan), hidden], dim=1)
    torch.testing.assert_close(pool(padded, torch.tensor([[0, 0, 1, 1, 1]]), None, Embedding()), unit)
    # bf16 hidden states are added up in fp32.
    many = torch.full((1, 3000, 1), 1.0, dtype=torch.bfloat16)
    assert float(pool(many, None, None, Embedding(normalize=False))) == pytest.approx(1.0, rel=1e-5)
    assert pool(torch.zeros(1, 2, 3), None, None, Embedding()).tolist() == [[0.0, 0.0, 0.0]]


@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    left=st.booleans(),
    pooling=st.sampled_from(POOLINGS),
    completion_only=st.booleans(),
    normalize=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=80, deadline=None)
def test_pool_equals_a_loop(lengths, left, pooling, completion_only, normalize, seed):
    generator = torch.Generator().manual_seed(seed)
    width = max(*lengths, 1)
    spec = Embedding(pooling=pooling, completion_only=completion_only, normalize=normalize)
    hidden = torch.randn(len(lengths), width, 3, generator=generator)
    mask = torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, length in enumerate(lengths):
        mask[row, width - length if left else 0 : width if left else length] = 1
    labels = torch.where(torch.rand(mask.shape, generator=generator) < 0.5, 7, -100)
    kept = (mask == 1) & ((labels != -100) | torch.tensor(not completion_only))
    got = pool(hidden, mask, labels, spec)
    want = torch.stack([oracle_pool(hidden[row], kept[row], spec) for row in range(len(lengths))])
    np.testing.assert_allclose(got.numpy(), want.numpy(), rtol=1e-5, atol=1e-6)


@given(seed=st.integers(0, 1000), pooling=st.sampled_from(POOLINGS), completion_only=st.booleans())
@settings(max_examples=30, deadline=None)
def test_pool_documents_equals_a_loop(seed, pooling, completion_only):
    generator = torch.Generator().manual_seed(seed)
    spec = Embedding(pooling=pooling, completion_only=completion_only)
    hidden = torch.randn(3, 8, 2, generator=generator)
    documents = torch.randint(0, 2, (3, 8), generator=generator).cumsum(dim=1)
    documents = torch.where(torch.arange(8) < torch.tensor([[8], [5], [0]]), documents - documents[:, :1], -1)
    labels = torch.where(torch.rand(3, 8, generator=generator) < 0.6, 7, -100)
    vectors, keys = pool_documents(hidden, documents, labels, spec)
    expected = [(row, d) for row in range(3) for d in sorted(set(documents[row].tolist()) - {-1})]
    assert [tuple(key) for key in keys.tolist()] == expected
    for vector, (row, document) in zip(vectors, expected, strict=True):
        kept = (documents[row] == document) & ((labels[row] != -100) | torch.tensor(not completion_only))
        np.testing.assert_allclose(vector.numpy(), oracle_pool(hidden[row], kept, spec).numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", list(MODELS))
def test_hidden_states_are_those_of_transformers(models, name):
    model = models[name]
    batch = tiny.collate(tiny.make_rows(5).rows)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    seen = []
    head = model.get_output_embeddings() if name != "lora" else model.get_base_model().get_output_embeddings()
    with torch.no_grad():
        states = MODELS[name]().eval()(**inputs, output_hidden_states=True).hidden_states  # leaves hooks: on a twin
        handle = head.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
        for layer in (*range(len(states)), *range(-len(states), 0)):
            torch.testing.assert_close(hidden_states(model, batch, layer), states[layer], rtol=0, atol=0)
        handle.remove()
    assert set(seen) == {1}  # the head saw one position per row
    with pytest.raises(UnsupportedError, match=rf"layer {len(states)}: the model has hidden states 0 to"):
        hidden_states(model, batch, len(states))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "lora", "gemma2"])
@pytest.mark.parametrize("completion_only", [False, True])
@pytest.mark.parametrize("side", [tiny.collate, tiny.collate_left])
def test_rows_equal_one_row_at_a_time(models, name, completion_only, side):
    model, rows = models[name], tiny.make_rows(15)
    ids = np.array([3, 0, 14, 3, 6, 11, 4])
    for layer, pooling in ((-1, "weighted_mean"), (1, "mean"), (-1, "last")):
        spec = Embedding(layer=layer, pooling=pooling, completion_only=completion_only)
        train = Corpus(dataset=rows, lengths=rows.lengths)
        got = tiny.asking(model, train, collate=side, token_budget=30)(spec, ids)
        for vector, row in zip(got, ids, strict=True):
            alone = tiny.collate([rows.rows[row]])
            hidden = hidden_states(model, alone, layer)[0]
            kept = (alone["labels"][0] != -100) | torch.tensor(not completion_only)
            np.testing.assert_allclose(vector, oracle_pool(hidden, kept, spec).numpy(), rtol=2e-5, atol=APART)
    assert got.shape == (7, 16)
    assert np.isnan(got[4]).all() == completion_only  # row 6 has no labels


def test_packed_documents_equal_documents_alone(models):
    from llamafactory.data.collator import prepare_4d_attention_mask

    documents = tiny.make_rows(4, seed=8, low=3, high=7).rows
    features = [tiny.packed(documents[:3], 24), tiny.packed(documents[3:], 24)]
    batch = {key: torch.tensor([feature[key] for feature in features]) for key in features[0]}
    batch["attention_mask"] = prepare_4d_attention_mask(batch["attention_mask"], torch.float32)
    spec = Embedding()
    hidden = hidden_states(models["llama"], batch, spec.layer)
    vectors, keys = pool_documents(hidden, document_ids(batch), batch["labels"], spec)
    assert keys.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0]]
    for vector, document in zip(vectors, documents, strict=True):
        alone = embed_batch(models["llama"], tiny.collate([document]), spec)[0]
        torch.testing.assert_close(vector, alone, rtol=0, atol=APART)
    # A packed row as a whole is pooled over its tokens, padding left out.
    whole = embed_batch(models["llama"], batch, Embedding(pooling="last", normalize=False))
    last = embed_batch(models["llama"], tiny.collate([documents[3]]), Embedding(pooling="last", normalize=False))
    torch.testing.assert_close(whole[1], last[0], rtol=0, atol=APART * float(last.abs().max()))


@pytest.mark.parametrize("name", list(MODELS))
def test_a_pass_leaves_no_trace(models, name):
    model, rows = models[name], tiny.make_rows(9)
    train, spec = Corpus(dataset=rows, lengths=rows.lengths), Embedding(layer=1)
    model.train()
    next(model.modules()).eval()
    before = tiny.snapshot(model)
    first = tiny.asking(model, train)(spec, np.arange(9))
    tiny.assert_same(before, tiny.snapshot(model))
    np.testing.assert_array_equal(first, tiny.asking(model, train)(spec, np.arange(9)))
    model.eval()


def test_hooks_are_removed_when_the_model_fails(models):
    model = models["llama"]
    before = tiny.snapshot(model)
    with pytest.raises(IndexError):
        hidden_states(model, {"input_ids": torch.tensor([[tiny.VOCABULARY + 5]])}, 1)
    tiny.assert_same(before, tiny.snapshot(model))


def test_what_cannot_be_asked_for():
    with pytest.raises(ConfigError, match=r"pooling: unknown 'weighted'; did you mean 'weighted_mean'\?"):
        Embedding(pooling="weighted")
    with pytest.raises(ConfigError, match="layer: expected an integer"):
        Embedding(layer="last")
    with pytest.raises(UnsupportedError, match="transformers model"):
        hidden_states(torch.nn.Linear(2, 2), {}, -1)
