"""Generation: greedy against transformers, sampling against a transcription, and no trace on the model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from dataflex.errors import ComponentError, ConfigError, DataError, UnsupportedError
from dataflex.rng import uniforms
from dataflex.signals.generate import Generator, pick_tokens
from dataflex.signals.model_access import Corpus
from dataflex.signals.specs import GenerationSpec
from tests.signals import tiny

CPU = torch.device("cpu")
MODELS = {"llama": tiny.llama, "gpt2": tiny.gpt2, "cohere": tiny.cohere, "lora": tiny.lora}
PROMPTS = [[5, 9, 4], [7], [11, 3, 8, 21, 6, 30], [4, 4], [9, 9, 12]]


class Decoder:
    """Stands in for a tokenizer."""

    eos_token_id = 2

    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return " ".join(str(token) for token in ids if token != self.eos_token_id)


@pytest.fixture(scope="module")
def models():
    return {name: make() for name, make in MODELS.items()}


def generator_of(model, budget=60):
    rows = Corpus(dataset=[], lengths=np.zeros(0, dtype=np.int64))
    return Generator(tiny.asking(model, rows, token_budget=budget, tokenizer=Decoder()).access)


def oracle(model, prompt, spec, draw):
    """One sample, the whole sequence anew for each token, the distribution summed up one token at a time."""
    model.eval()
    ids = list(prompt)
    for step in range(spec.max_new_tokens):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1:]
        if spec.temperature == 0.0:
            token = int(logits.argmax())
        else:
            scores = logits / spec.temperature
            order = list(range(scores.shape[1]))
            if spec.top_k:
                scores = TopKLogitsWarper(spec.top_k)(None, scores)
            if spec.top_p < 1.0:
                scores = TopPLogitsWarper(spec.top_p)(None, scores)
            if spec.top_k or spec.top_p < 1.0:
                order = scores[0].argsort(descending=True).tolist()
            p = torch.softmax(scores.double(), dim=-1)[0]
            goal = float(uniforms(spec.seed, "generate", step, np.array([draw]))[0])
            total = 0.0
            for token in order:
                total += float(p[token])
                if total > goal:
                    break
        ids.append(token)
        if token == Decoder.eos_token_id:
            break
    return tuple(ids[len(prompt) :])


@pytest.mark.parametrize("name", list(MODELS))
def test_greedy_equals_transformers_one_prompt_at_a_time(models, name):
    model = models[name]
    got = generator_of(model).sample(PROMPTS, GenerationSpec(max_new_tokens=9, temperature=0.0))
    assert [one.prompt for one in got] == list(range(5))
    twin = MODELS[name]().eval()
    for one, prompt in zip(got, PROMPTS, strict=True):
        config = GenerationConfig(do_sample=False, max_new_tokens=9, eos_token_id=2, pad_token_id=0)
        inputs = torch.tensor([prompt])
        want = twin.generate(input_ids=inputs, attention_mask=torch.ones_like(inputs), generation_config=config)
        assert one.token_ids == tuple(want[0, len(prompt) :].tolist())
        assert one.finished == (one.token_ids[-1] == 2)
        assert one.text == " ".join(str(token) for token in one.token_ids if token != 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2", "lora"])
@pytest.mark.parametrize("changes", [{}, {"top_k": 5}, {"top_p": 0.7}, {"top_k": 12, "top_p": 0.8, "temperature": 0.6}])
def test_samples_equal_one_at_a_time(models, name, changes):
    spec = GenerationSpec(max_new_tokens=6, num_samples=3, seed=11, **{"temperature": 1.5, **changes})
    ids = np.array([40, 7, 100, 3, 8])
    got = generator_of(models[name]).sample(PROMPTS, spec, ids=ids)
    assert [(one.prompt, one.sample) for one in got] == [(p, s) for p in range(5) for s in range(3)]
    for one in got:
        draw = int(ids[one.prompt]) * 2**20 + one.sample
        assert one.token_ids == oracle(models[name], PROMPTS[one.prompt], spec, draw)
    assert len({one.token_ids for one in got}) > 5


def test_draws_depend_on_seed_prompt_and_sample_only(models):
    spec = GenerationSpec(max_new_tokens=5, num_samples=2, seed=3)
    whole = generator_of(models["llama"], budget=1000).sample(PROMPTS, spec)
    torch.manual_seed(99)
    small = generator_of(models["llama"], budget=1).sample(PROMPTS, spec)
    assert whole == small
    part = generator_of(models["llama"]).sample(PROMPTS[2:4], spec, ids=np.array([2, 3]))
    assert [one.token_ids for one in part] == [one.token_ids for one in whole[4:8]]
    more = generator_of(models["llama"]).sample(PROMPTS, GenerationSpec(max_new_tokens=8, num_samples=3, seed=3))
    for one in whole:
        longer = next(other for other in more if (other.prompt, other.sample) == (one.prompt, one.sample))
        assert longer.token_ids[: len(one.token_ids)] == one.token_ids
    other_seed = generator_of(models["llama"]).sample(PROMPTS, GenerationSpec(max_new_tokens=5, num_samples=2, seed=4))
    assert [one.token_ids for one in other_seed] != [one.token_ids for one in whole]
    assert generator_of(models["llama"]).sample([], spec) == []


@given(
    seed=st.integers(0, 1000),
    top_k=st.integers(0, 9),
    top_p=st.floats(0.05, 1.0),
    temperature=st.floats(0.3, 3.0),
    rounded=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_pick_tokens_never_leaves_the_kept_set(seed, top_k, top_p, temperature, rounded):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, 8, generator=generator) * 3
    logits[:, 3] = -torch.inf
    if rounded:
        logits = logits.round()  # ties
    spec = GenerationSpec(top_k=top_k, top_p=top_p, temperature=temperature)
    scores = logits / temperature
    for row in range(4):
        order = sorted(range(8), key=lambda token: -float(scores[row, token]))[: top_k or 8]
        p = torch.softmax(scores[row, order].double(), dim=0)
        kept = [place for place in range(len(order)) if float(p[:place].sum()) < top_p + 1e-9 and float(p[place]) > 0]
        allowed = {float(scores[row, order[place]]) for place in kept}
        for u in (1e-300, 0.2, 0.5, 0.9, 1 - 2**-53):
            picked = int(pick_tokens(logits, torch.full((4,), u, dtype=torch.float64), spec)[row])
            assert float(scores[row, picked]) in allowed  # by value, as ties may be broken either way


def test_frequencies_follow_the_distribution():
    p = torch.tensor([0.5, 0.2, 0.2, 0.1])
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    logits = p.log().expand(1000, 4)
    counts = torch.bincount(pick_tokens(logits, u, GenerationSpec()), minlength=4)
    assert counts.tolist() == [500, 200, 200, 100]
    hot = torch.bincount(pick_tokens(logits, u, GenerationSpec(temperature=0.5)), minlength=4).double() / 1000
    np.testing.assert_allclose(hot, (p**2 / (p**2).sum()).numpy(), atol=2e-3)
    nucleus = torch.bincount(pick_tokens(logits, u, GenerationSpec(top_p=0.6)), minlength=4)
    assert nucleus[0] == 714  # 0.5 / 0.7
    assert sorted(nucleus[1:3].tolist()) == [0, 286]


@pytest.mark.parametrize("name", ["llama", "lora"])
def test_sampling_leaves_no_trace(models, name):
    model = models[name]
    model.config.use_cache = False  # as LLaMA-Factory sets it for training
    model.train()
    next(model.modules()).eval()
    before = tiny.snapshot(model)
    spec = GenerationSpec(max_new_tokens=4, num_samples=2)
    first = generator_of(model).sample(PROMPTS, spec)
    tiny.assert_same(before, tiny.snapshot(model))
    assert model.config.use_cache is False
    assert first == generator_of(model).sample(PROMPTS, spec)  # no dropout, although the model was training
    model.eval()


def test_what_cannot_be_sampled(models):
    with pytest.raises(ConfigError) as error:
        GenerationSpec(max_new_tokens=0, temperature=-1.0, top_p=0.0, top_k=-1, num_samples=0)
    assert len(error.value.problems) == 5
    with pytest.raises(DataError, match=r"prompts \[1\] have no tokens"):
        generator_of(models["llama"]).sample([[3], []], GenerationSpec())
    with pytest.raises(UnsupportedError, match="causal language model"):
        generator_of(models["llama"].model)
    broken = tiny.llama()
    torch.nn.init.constant_(broken.lm_head.weight, torch.nan)
    with pytest.raises(ComponentError, match="not finite"):
        generator_of(broken).sample([[3]], GenerationSpec(max_new_tokens=2))
