"""Encoders of raw text: one text at a time, both kinds of model folders, and what is said when one cannot be used."""

from __future__ import annotations

import importlib.util
import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, T5Config, T5ForConditionalGeneration

from dataflex.errors import ConfigError
from dataflex.signals import embeddings
from dataflex.signals.embeddings import load_encoder, pool
from dataflex.signals.kinds import Embedding
from dataflex.signals.other_models import LoadError
from tests.conftest import WORDS
from tests.rounding import layers_apart
from tests.signals.tiny import snapshot

APART = layers_apart(3, 24)
"""Rounding in a pass of the tiny models, relative to the largest number that comes out."""
TEXTS = ["the cat sat", "a mat", "", "two red balls near one big tree while three old dogs ran to see", "a mat", "cat"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory, tiny_model):
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(2)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        initializer_range=0.3,
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def t5(tmp_path_factory, tiny_model):
    folder = tmp_path_factory.mktemp("t5")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(2)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("layer", [-1, 1])
@pytest.mark.parametrize("pooling", ["weighted_mean", "mean", "last", "first"])
@pytest.mark.parametrize("family", ["tiny_model", "bert"])
def test_texts_equal_one_text_at_a_time(family, pooling, layer, request, monkeypatch):
    monkeypatch.setattr(embeddings, "_TOKEN_BUDGET", 24)
    folder = request.getfixturevalue(family)
    spec = Embedding(pooling=pooling, layer=layer, normalize=pooling != "mean")
    encoder = load_encoder(str(folder), spec=spec)
    got = encoder.encode(TEXTS)
    assert got.shape == (6, encoder.dimension)
    assert got.dtype == np.float32
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    for vector, text in zip(got, TEXTS, strict=True):
        ids = tokenizer(text)["input_ids"]
        if not ids:
            assert np.isnan(vector).all()
            continue
        with torch.no_grad():
            states = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[layer]
        wanted = pool(states, None, None, spec)[0].numpy()
        np.testing.assert_allclose(vector, wanted, rtol=0, atol=APART * np.abs(wanted).max())
    assert np.array_equal(got, encoder.encode(TEXTS), equal_nan=True)
    turned = encoder.encode(TEXTS[::-1])[::-1]
    np.testing.assert_allclose(turned, got, rtol=0, atol=APART * np.nanmax(np.abs(got)))


def test_the_encoder_of_an_encoder_decoder_model(t5):
    encoder = load_encoder(str(t5), spec=Embedding(pooling="mean"))
    vectors = encoder.encode(["the cat sat", "a mat"])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, rtol=1e-6)
    assert encoder.dimension == 16


def test_length_limit(tiny_model, monkeypatch):
    encoder = load_encoder(str(tiny_model))
    long_text = " ".join(WORDS[:20])
    ids = AutoTokenizer.from_pretrained(tiny_model)(long_text)["input_ids"]
    cut = AutoTokenizer.from_pretrained(tiny_model).decode(ids[:4])
    whole = encoder.encode([long_text])
    monkeypatch.setattr(embeddings, "_MAX_TOKENS", 4)
    short = encoder.encode([long_text])
    np.testing.assert_allclose(short, encoder.encode([cut]), rtol=1e-6)
    assert np.abs(whole - short).max() > 1e-3
    assert encoder.encode([]).shape == (0, encoder.dimension)


def test_loading_and_encoding_leave_random_states_alone(bert):
    probe = torch.nn.Linear(1, 1)
    before = snapshot(probe)
    load_encoder(str(bert)).encode(TEXTS)
    assert before[:3] == snapshot(probe)[:3]
    assert random.getstate() == before[0]


def test_a_missing_optional_package_is_named(tmp_path, monkeypatch):
    (tmp_path / "modules.json").write_text(json.dumps([]))
    original = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "sentence_transformers" else original(name, *rest),
    )
    with pytest.raises(LoadError, match=r"pip install 'dataflex-llm\[encoders\]"):
        load_encoder(str(tmp_path))


def test_what_cannot_be_loaded(tmp_path, tiny_model):
    with pytest.raises(LoadError, match="cannot be loaded as a transformers model"):
        load_encoder(str(tmp_path))
    with pytest.raises(ConfigError, match="completion_only needs labels"):
        load_encoder(str(tiny_model), spec=Embedding(completion_only=True))
    (tmp_path / "modules.json").write_text("[]")
    with pytest.raises(ConfigError, match="pools by its own rules"):
        load_encoder(str(tmp_path), spec=Embedding(pooling="mean"))


def test_rows_of_the_service_are_encoded_as_their_text(tiny_model, bert):
    """Through the service: tokens back to text, in length buckets, in the order asked for."""
    import contextlib

    from dataflex.signals.model_access import Corpus, ModelAccess
    from dataflex.signals.runner import SignalRunner

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    texts = ["the cat sat on a mat", "red balls", "old dogs ran to see one big tree", "a mat"]

    class Rows:
        def __getitems__(self, ids):
            return [{"input_ids": [1, *tokenizer(texts[i])["input_ids"], 2]} for i in ids]

    lengths = np.array([len(tokenizer(text)["input_ids"]) + 2 for text in texts])
    service = SignalRunner(
        access=ModelAccess(
            model=torch.nn.Linear(1, 1),
            collate=lambda features: {},
            autocast=contextlib.nullcontext,
            device=torch.device("cpu"),
            token_budget=12,
            tokenizer=tokenizer,
            train=Corpus(dataset=Rows(), lengths=lengths),
            targets={"goal": Corpus(dataset=Rows(), lengths=lengths)},
        )
    )
    spec = Embedding(pooling="mean")
    wanted = load_encoder(str(bert), spec=spec).encode([texts[i] for i in (2, 0, 3)])
    got = service(replace(spec, encoder=str(bert)), np.array([2, 0, 3]))
    np.testing.assert_allclose(got, wanted, rtol=0, atol=APART * np.abs(wanted).max())
    assert service(replace(spec, encoder=str(bert)), np.array([1]), target="goal").shape == (1, 16)
    assert len(service.access.loaded) == 1
    assert service.seconds > 0
