"""Tokens and texts of rows, losses of answers with and without their prompts, and losses by other models."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from itertools import groupby

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dataflex.errors import ConfigError, UnsupportedError
from dataflex.signals import runner
from dataflex.signals.kinds import ResponseLoss, TokenLoss
from dataflex.signals.model_access import Corpus, ModelAccess
from dataflex.signals.other_models import LoadError, Scorer
from dataflex.signals.runner import SignalCache, SignalRunner
from dataflex.signals.store import ArrayStore
from tests.conftest import WORDS
from tests.signals.tiny import Rows, collate, snapshot

IGNORE = -100


def make(tokenizer):
    """Ragged rows: one turn, two turns, no prompt, no answer, an answer of one token, two packed documents."""
    rng = np.random.default_rng(0)
    ids = [tokenizer.get_vocab()[word] for word in WORDS]

    def row(*parts, masks=None):
        tokens, labels = [], []
        for answer, count in parts:
            drawn = [int(ids[i]) for i in rng.integers(0, len(ids), size=count)]
            tokens += drawn
            labels += drawn if answer else [IGNORE] * count
        feature = {"input_ids": tokens, "labels": labels, "attention_mask": [1] * len(tokens)}
        return feature if masks is None else {**feature, "attention_mask": masks}

    return Rows(
        [
            row((False, 4), (True, 6)),
            row((False, 3), (True, 2), (False, 4), (True, 5)),
            row((True, 7)),
            row((False, 5)),
            row((False, 3), (True, 1)),
            row((False, 2), (True, 3), (False, 4), (True, 2), masks=[1] * 5 + [2] * 6),
            row((False, 9), (True, 8)),
        ]
    )


EVERY = np.arange(7, dtype=np.int64)


@pytest.fixture
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def service(tiny_model, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    rows = make(tokenizer)
    corpus = Corpus(dataset=rows, lengths=rows.lengths, identity="rows")
    access = ModelAccess(
        model=model,
        collate=collate,
        autocast=nullcontext,
        device=torch.device("cpu"),
        token_budget=24,
        tokenizer=tokenizer,
        train=corpus,
        targets={"goal": corpus},
    )
    return SignalRunner(access=access)


def another(folder, tokenizer, seed=5, **changes):
    """Save a causal model with this tokenizer."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "initializer_range": 0.5,
    }
    LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def other_tokenizer():
    """Words in another order, and a start token that it adds by itself."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<s>", "<unk>", *sorted(set(WORDS), reverse=True)])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>")


# ---------------------------------------------------------------- transcription


def token_nll(model, context, token):
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([context])).logits[0, -1].double()
    return float(torch.logsumexp(logits, 0) - logits[token])


def oracle(model, feature, *, alone, start=(), prefix=0, limit=None, drop_first=True, turn=lambda ids: ids):
    """Mean over answer tokens, each predicted from its own context."""
    losses, before, document = [], [], None
    tokens = zip(feature["attention_mask"], feature["labels"], feature["input_ids"], strict=True)
    for (number, answer), stretch in groupby(tokens, key=lambda token: (token[0], token[1] != IGNORE)):
        ids = turn([token for _, _, token in stretch])
        if number != document:
            document, before = number, [] if tuple(ids[:1]) == start else list(start)
        context = before
        if alone:
            context = list(start) + (before[len(start) :][-prefix:] if prefix else [])
        for i, token in enumerate(ids if answer else []):
            fits = limit is None or len(before) + i < limit
            left_out = i == 0 and (not context or (drop_first and not start and not prefix))
            if fits and not left_out:
                losses.append(token_nll(model, context + ids[:i], token))
        before = before + ids
    return np.mean(losses) if losses else np.nan


def expected(model, rows, **options):
    model.eval()
    return np.array([oracle(model, feature, **options) for feature in rows.rows])


# ---------------------------------------------------------------- tokens and texts


@pytest.mark.slow
def test_tokens_and_texts(service, tokenizer):
    rows = np.array([1, 3, 1, 2], dtype=np.int64)
    features = [service.access.train.dataset.rows[row] for row in rows]
    for part, kept in (
        ("all", lambda label: True),
        ("prompt", lambda label: label == IGNORE),
        ("completion", lambda label: label != IGNORE),
    ):
        want = [
            [token for token, label in zip(one["input_ids"], one["labels"], strict=True) if kept(label)]
            for one in features
        ]
        got = service.tokens(rows, part=part)
        assert [one.tolist() for one in got] == want
        assert {one.dtype for one in got} == {np.dtype(np.int64)}
        assert service.texts(rows, target="goal", part=part) == [tokenizer.decode(one) for one in want]


def test_what_is_read_of_other_rows(service):
    """Padding is no token, a row without labels is its own completion, a preference row its chosen answer."""
    service.access = replace(
        service.access,
        train=Corpus(
            dataset=Rows(
                [
                    {"input_ids": [5, 6, 3, 3], "labels": [5, 6, -100, -100], "attention_mask": [1, 1, 0, 0]},
                    {"input_ids": [7, 8]},
                    {"chosen_input_ids": [9, 10], "chosen_labels": [-100, 10], "rejected_input_ids": [11]},
                ]
            ),
            lengths=np.array([4, 2, 2]),
        ),
    )
    for part, want in (("all", [[5, 6], [7, 8], [9, 10]]), ("completion", [[5, 6], [7, 8], [10]])):
        assert [one.tolist() for one in service.tokens(EVERY[:3], part=part)] == want


@pytest.mark.slow
def test_a_data_set_of_the_datasets_library(service):
    from datasets import Dataset

    columns = {
        key: [row[key] for row in service.access.train.dataset.rows]
        for key in ("input_ids", "labels", "attention_mask")
    }
    plain, wanted = service.tokens(EVERY, part="completion"), service(ResponseLoss(conditioned=False), EVERY)
    service.cache = SignalCache()
    dataset = Dataset.from_dict({**columns, "images": [None] * 7})
    service.access = replace(service.access, train=Corpus(dataset=dataset, lengths=service.access.train.lengths))
    assert [one.tolist() for one in service.tokens(EVERY, part="completion")] == [one.tolist() for one in plain]
    np.testing.assert_array_equal(service(ResponseLoss(conditioned=False), EVERY), wanted)
    service.access = replace(
        service.access,
        train=Corpus(
            dataset=Dataset.from_dict({**columns, "images": [["a.png"]] * 7}), lengths=service.access.train.lengths
        ),
    )
    with pytest.raises(UnsupportedError, match="the rows hold images"):
        service(ResponseLoss(conditioned=True), EVERY)


# ---------------------------------------------------------------- the model under training


@pytest.mark.parametrize("prefix", [0, 2])
def test_answers_equal_one_token_at_a_time(service, prefix):
    model, rows = service.access.model, service.access.train.dataset
    for alone in (False, True):
        got = service(ResponseLoss(conditioned=not alone, prefix_tokens=prefix), EVERY)
        np.testing.assert_allclose(got, expected(model, rows, alone=alone, prefix=prefix), rtol=2e-5)
        assert np.isnan(got[3])
        assert np.isnan(got[4]) == (prefix == 0)  # its one token follows nothing when alone


def test_a_start_token_that_the_tokenizer_adds(service, tokenizer):
    from tokenizers import processors

    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    service.access.train.dataset.rows[6]["input_ids"][0] = tokenizer.bos_token_id  # it is there already
    start = (tokenizer.bos_token_id,)
    model, rows = service.access.model, service.access.train.dataset
    given, alone = (service(ResponseLoss(conditioned=conditioned), EVERY) for conditioned in (True, False))
    assert np.isfinite(given[4])
    np.testing.assert_allclose(alone, expected(model, rows, alone=True, start=start), rtol=2e-5)
    np.testing.assert_allclose(given[:6], expected(model, rows, alone=False, start=start)[:6], rtol=2e-5)
    np.testing.assert_allclose(given[6], oracle(model, rows.rows[6], alone=False, drop_first=False), rtol=2e-5)


def test_answers_ask_nothing_of_the_run(service):
    service.access.model.train()
    before = snapshot(service.access.model)
    service(ResponseLoss(conditioned=False), EVERY)
    assert snapshot(service.access.model)[:6] == before[:6]


# ---------------------------------------------------------------- other models


def test_losses_by_a_model_with_the_same_tokens(service, tokenizer, tmp_path):
    name = another(tmp_path / "ref", tokenizer)
    model = AutoModelForCausalLM.from_pretrained(name)
    assert Scorer(name, tokenizer).same_tokens
    rows = service.access.train.dataset
    got = service(TokenLoss(model=name, same_tokens=True), EVERY)
    np.testing.assert_allclose(got, expected(model, rows, alone=False, drop_first=False), rtol=2e-5)
    got = service(ResponseLoss(conditioned=False, model=name), EVERY)
    np.testing.assert_allclose(got, expected(model, rows, alone=True), rtol=2e-5)
    again = service(TokenLoss(model=name), EVERY[:3], target="goal")
    np.testing.assert_allclose(again, service(TokenLoss(model=name), EVERY[:3]), rtol=1e-6)
    for parameter in service.access.model.parameters():
        assert parameter.requires_grad


def test_another_tokenizer_reads_the_text(service, tokenizer, tmp_path):
    other = other_tokenizer()
    name = another(tmp_path / "other", other)
    model = AutoModelForCausalLM.from_pretrained(name)
    scorer = Scorer(name, tokenizer)
    assert not scorer.same_tokens
    assert scorer.start == (0,)

    def turn(ids):
        return other(tokenizer.decode(ids), add_special_tokens=False)["input_ids"]

    for got, options in (
        (service(TokenLoss(model=name), EVERY), {"alone": False}),
        (service(ResponseLoss(conditioned=True, model=name), EVERY), {"alone": False}),
        (service(ResponseLoss(conditioned=False, model=name, prefix_tokens=1), EVERY), {"alone": True, "prefix": 1}),
    ):
        want = expected(model, service.access.train.dataset, start=(0,), turn=turn, **options)
        np.testing.assert_allclose(got, want, rtol=2e-5)
    with pytest.raises(ConfigError, match="its tokenizer is not that of the run"):
        service(TokenLoss(model=name, same_tokens=True), EVERY)


def test_what_does_not_fit_into_a_scorer_is_scored_neither_way(service, tokenizer, tmp_path):
    name = another(tmp_path / "short", tokenizer, max_position_embeddings=8)
    model, rows = AutoModelForCausalLM.from_pretrained(name), service.access.train.dataset
    for alone in (False, True):
        got = service(ResponseLoss(conditioned=not alone, model=name), EVERY)
        np.testing.assert_allclose(got, expected(model, rows, alone=alone, limit=8), rtol=2e-5)
    assert np.isnan(got[6])  # its prompt alone fills it


def test_an_adapter_is_read_with_its_base(service, tokenizer, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = another(tmp_path / "base", tokenizer)
    torch.manual_seed(9)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj"]))
    for key, value in adapted.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(value, std=0.5)
    adapted.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    got = service(TokenLoss(model=str(tmp_path / "adapter")), EVERY)
    np.testing.assert_allclose(
        got, expected(adapted, service.access.train.dataset, alone=False, drop_first=False), rtol=2e-5
    )
    assert not np.allclose(got, service(TokenLoss(model=base), EVERY), equal_nan=True)


def test_models_that_are_not_there(service, tokenizer, tmp_path):
    with pytest.raises(LoadError, match="cannot be loaded to score rows"):
        service(TokenLoss(model=str(tmp_path / "none")), EVERY)
    name = another(tmp_path / "bare", tokenizer)
    (tmp_path / "bare" / "model.safetensors").unlink()
    with pytest.raises(LoadError, match="is not a causal language model"):
        service(TokenLoss(model=name), EVERY)
    service.access.loaded.clear()
    object.__setattr__(service.access, "tokenizer", None)
    for ask in (lambda: service.texts(EVERY), lambda: service(TokenLoss(model=name), EVERY)):
        with pytest.raises(UnsupportedError, match="the tokenizer of the model is needed"):
            ask()


def test_a_model_says_what_its_answers_depend_on(tokenizer, tmp_path):
    first, second = (Scorer(another(tmp_path / f"m{seed}", tokenizer, seed=seed), tokenizer) for seed in (1, 2))
    assert first.identity != second.identity
    assert Scorer(first.name, tokenizer).identity == first.identity


# ---------------------------------------------------------------- kept answers


class Loads:
    """Counts how often another model's weights are loaded."""

    def __init__(self, monkeypatch):
        self.count, original = 0, Scorer.loaded

        def loaded(scorer, device):
            self.count += 1
            return original(scorer, device)

        monkeypatch.setattr(Scorer, "loaded", loaded)


def test_a_model_that_stays_as_it_is_answers_once(service, tokenizer, tmp_path, monkeypatch):
    name, loads = another(tmp_path / "ref", tokenizer), Loads(monkeypatch)
    for step in (0, 10, 20):
        service.begin(step)
        kept = service(TokenLoss(model=name), EVERY)
        service(TokenLoss(), EVERY)
    assert loads.count == 1
    state = service.state_dict()
    assert len(state["answers"]) == 1
    service.cache = SignalCache()
    service.load_state_dict(state)
    service.begin(30)
    assert np.array_equal(service(TokenLoss(model=name), EVERY), kept, equal_nan=True)
    assert loads.count == 1
    service.begin(40)
    service.begin(50)  # decisions that did not ask for it
    assert np.array_equal(service(TokenLoss(model=name), EVERY[::-1]), kept[::-1], equal_nan=True)
    assert loads.count == 1


def test_no_row_is_asked_of_another_model_twice(service, tokenizer, tmp_path, monkeypatch):
    """Pools that change from decision to decision, as under ``pool_fraction``."""
    name, scored = another(tmp_path / "ref", tokenizer), []
    original = runner.Collector

    def counting(sweep, *rest):
        scored.append(np.unique(sweep.dataset.rows[sweep.dataset.places]).tolist())
        return original(sweep, *rest)

    monkeypatch.setattr(runner, "Collector", counting)
    whole = [service(ResponseLoss(conditioned=given, model=name), EVERY) for given in (False, True)]
    service.cache = SignalCache()
    scored.clear()
    for step, pool in enumerate(([4, 1], [1, 2, 4, 3], [0, 2])):
        service.begin(10 * step)
        for conditioned in (1, 0):
            found = service(ResponseLoss(conditioned=bool(conditioned), model=name), np.array(pool))
            np.testing.assert_allclose(found, whole[conditioned][pool], rtol=1e-5)
    assert scored == [[1, 4], [1, 4], [2], [2], [0], [0]]


def test_the_store_serves_other_steps_and_runs(service, tokenizer, tmp_path, monkeypatch):
    name = another(tmp_path / "ref", tokenizer)
    loads = Loads(monkeypatch)
    states = iter("abcdefgh")
    for _ in range(2):
        service.cache = SignalCache(store=ArrayStore(tmp_path / "store"), model_identity=lambda: next(states))
        service.begin(0)
        found = service(ResponseLoss(conditioned=False, model=name), EVERY)
        service(ResponseLoss(conditioned=False), EVERY)
    np.testing.assert_allclose(
        found, expected(AutoModelForCausalLM.from_pretrained(name), service.access.train.dataset, alone=True), rtol=2e-5
    )
    assert loads.count == 1
    assert (
        len(ArrayStore(tmp_path / "store").entries()) == 3
    )  # one of the scorer, one for each state of the model under training
