"""Encoders of raw text: one text at a time, both kinds of model folders, and what is said when one cannot be used."""

from __future__ import annotations

import importlib.util
import json
import random

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, T5Config, T5ForConditionalGeneration

from dataflex.errors import ConfigError
from dataflex.signals.encoders import EncoderError, load_encoder
from dataflex.signals.pooling import pool
from dataflex.signals.specs import EmbeddingSpec
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
def test_texts_equal_one_text_at_a_time(family, pooling, layer, request):
    folder = request.getfixturevalue(family)
    spec = EmbeddingSpec(pooling=pooling, layer=layer, normalize=pooling != "mean")
    encoder = load_encoder(str(folder), spec=spec, token_budget=24)
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
    encoder = load_encoder(str(t5), spec=EmbeddingSpec(pooling="mean"))
    vectors = encoder.encode(["the cat sat", "a mat"])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, rtol=1e-6)
    assert encoder.dimension == 16


def test_length_limit_and_identity(tiny_model, bert):
    short = load_encoder(str(tiny_model), max_length=4)
    long_text = " ".join(WORDS[:20])
    ids = AutoTokenizer.from_pretrained(tiny_model)(long_text)["input_ids"]
    cut = AutoTokenizer.from_pretrained(tiny_model).decode(ids[:4])
    np.testing.assert_allclose(short.encode([long_text]), short.encode([cut]), rtol=1e-6)
    whole = load_encoder(str(tiny_model))
    assert np.abs(whole.encode([long_text]) - short.encode([long_text])).max() > 1e-3
    same = load_encoder(str(tiny_model))
    other = load_encoder(str(tiny_model), spec=EmbeddingSpec(pooling="mean"))
    assert same.identity == whole.identity
    identities = {short.identity, whole.identity, other.identity, load_encoder(str(bert)).identity}
    assert len(identities) == 4
    assert whole.encode([]).shape == (0, whole.dimension)


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
    with pytest.raises(EncoderError, match=r"pip install dataflex\[encoders\]"):
        load_encoder(str(tmp_path))


def test_what_cannot_be_loaded(tmp_path, tiny_model):
    with pytest.raises(EncoderError, match="cannot be loaded as a transformers model"):
        load_encoder(str(tmp_path))
    with pytest.raises(ConfigError, match="completion_only needs labels"):
        load_encoder(str(tiny_model), spec=EmbeddingSpec(completion_only=True))
    with pytest.raises(ConfigError, match="pools by its own rules"):
        load_encoder(str(tiny_model), kind="sentence_transformers", spec=EmbeddingSpec(pooling="mean"))


def test_rows_of_the_service_are_encoded_as_their_text(tiny_model, bert):
    """Through the service: tokens back to text, in length buckets, in the order asked for."""
    import contextlib

    from dataflex.signals.handle import Corpus, ModelHandle
    from dataflex.signals.service import SignalService

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    texts = ["the cat sat on a mat", "red balls", "old dogs ran to see one big tree", "a mat"]

    class Rows:
        def __getitems__(self, ids):
            return [{"input_ids": [1, *tokenizer(texts[i])["input_ids"], 2]} for i in ids]

    lengths = np.array([len(tokenizer(text)["input_ids"]) + 2 for text in texts])
    service = SignalService(
        handle=ModelHandle(
            model=torch.nn.Linear(1, 1),
            collate=lambda features: {},
            autocast=contextlib.nullcontext,
            device=torch.device("cpu"),
            token_budget=12,
            tokenizer=tokenizer,
        ),
        train=Corpus(dataset=Rows(), lengths=lengths),
        targets={"goal": Corpus(dataset=Rows(), lengths=lengths)},
        seed=0,
    )
    spec = EmbeddingSpec(pooling="mean")
    wanted = load_encoder(str(bert), spec=spec).encode([texts[i] for i in (2, 0, 3)])
    got = service.embeddings(np.array([2, 0, 3]), spec, encoder=str(bert))
    np.testing.assert_allclose(got, wanted, rtol=0, atol=APART * np.abs(wanted).max())
    assert service.embeddings(np.array([1]), spec, target="goal", encoder=str(bert)).shape == (1, 16)
    assert len(service.encoders) == 1
    assert service.seconds > 0
