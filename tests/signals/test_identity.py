"""Stored answers are those of one model under one configuration: whatever changes answers changes the name."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from dataflex.signals.identity import inputs_identity, model_identity, precision, state_identity, tokenizer_identity
from dataflex.signals.runner import SignalCache
from dataflex.signals.store import ArrayStore
from tests.signals.tiny import llama

IDS = torch.arange(3, 15)[None]


def output(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


def lora(**changes):
    torch.manual_seed(5)
    settings = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    return get_peft_model(llama(), LoraConfig(**{**settings, **changes}))


def theta(**changes):
    return llama(rope_parameters={"rope_type": "default", "rope_theta": 10000.0, **changes})


def switched_off():
    model = lora()
    model.base_model.disable_adapter_layers()
    return model


def merged():
    model = lora()
    model.merge_adapter()
    return model


def buffered():
    model = llama()
    model.model.rotary_emb.inv_freq[0] *= 2
    return model


def with_own_forward():
    model = llama()

    def doubled(states):
        return 2 * type(norm).forward(norm, states)

    norm = model.model.norm
    norm.forward = doubled
    return model


SAME_VALUES = {
    "rope_theta": (theta, lambda: theta(rope_theta=500.0)),
    "rope scaling": (theta, lambda: theta(rope_type="linear", factor=4.0)),
    "epsilon": (llama, lambda: llama(rms_norm_eps=0.3)),
    "activation": (llama, lambda: llama(hidden_act="gelu")),
    "lora_alpha": (lora, lambda: lora(lora_alpha=32)),
    "rslora": (lora, lambda: lora(use_rslora=True)),
    "alpha_pattern": (lora, lambda: lora(alpha_pattern={"q_proj": 64})),
    "disabled adapter": (lora, switched_off),
    "buffer": (llama, buffered),
    "patched forward": (llama, with_own_forward),
}


@pytest.mark.parametrize("what", SAME_VALUES)
def test_the_same_parameters_that_act_otherwise_have_another_name(what):
    one, other = (make() for make in SAME_VALUES[what])
    assert state_identity(one.named_parameters()) == state_identity(other.named_parameters()), "the old key saw nothing"
    assert not torch.equal(output(one), output(other)), "the case must change answers"
    assert model_identity(one) != model_identity(other)
    assert model_identity(one) == model_identity(SAME_VALUES[what][0]())


def test_attention_and_what_is_trained_are_part_of_the_name():
    eager, sdpa = llama(attn_implementation="eager"), llama(attn_implementation="sdpa")
    assert model_identity(eager) != model_identity(sdpa)
    frozen = llama()
    frozen.model.embed_tokens.requires_grad_(False)
    assert model_identity(frozen) != model_identity(llama())
    assert model_identity(merged()) != model_identity(lora())


def test_where_a_model_came_from_and_its_mode_are_not(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    loaded.config.use_cache = False
    assert model_identity(loaded.train()) == model_identity(llama().eval())
    named, other = lora(), lora()
    other.peft_config["default"].base_model_name_or_path = "elsewhere"
    other.peft_config["default"].inference_mode = True
    assert model_identity(named) == model_identity(other)
    assert model_identity(copy.deepcopy(model)) == model_identity(model)


def test_scales_of_quantized_parameters_are_part_of_the_name():
    """Packed codes are relative to scales: twice the weights have the same codes."""
    one, twice = llama(), llama()
    for model, scale in ((one, 1.0), (twice, 2.0)):
        weight = model.lm_head.weight
        weight.quant_state = type("QuantState", (), {"absmax": torch.full((3,), scale)})()
    assert model_identity(one) != model_identity(twice)
    for model, scale in ((one, 1.0), (twice, 2.0)):
        del model.lm_head.weight.quant_state
        model.lm_head.weight.SCB = torch.full((3,), scale)
    assert model_identity(one) != model_identity(twice)


def test_precision_batches_and_tokenizer_are_told():
    def autocast():
        return torch.autocast("cpu", torch.bfloat16)

    cpu = torch.device("cpu")
    assert precision(nullcontext, cpu)["autocast"] == "none"
    assert precision(autocast, cpu)["autocast"] == "torch.bfloat16"
    before = torch.get_float32_matmul_precision()
    usual = precision(nullcontext, cpu)
    torch.set_float32_matmul_precision("medium")
    assert precision(nullcontext, cpu) != usual
    torch.set_float32_matmul_precision(before)
    rows = [{"input_ids": [1, 2, 3, 4]} for _ in range(3)]

    def collate(mask):
        return lambda rows: {"input_ids": torch.tensor([row["input_ids"] for row in rows]), "attention_mask": mask}

    packed, apart = collate(torch.ones(1, 4)), collate(torch.tensor([[1, 1, 2, 2]]))
    assert inputs_identity(rows, 3, packed) != inputs_identity(rows, 3, apart)
    assert inputs_identity(rows, 0, packed) == inputs_identity([], 0, apart)

    class Words:
        def __init__(self, *words):
            self.words = words

        def get_vocab(self):
            return {word: number for number, word in enumerate(self.words)}

    assert tokenizer_identity(None) == ""
    assert tokenizer_identity(Words("a", "b")) != tokenizer_identity(Words("b", "a"))


@pytest.mark.parametrize("change", ["model", "autocast"])
def test_a_store_gives_no_other_models_answers(tmp_path, change):
    models = {"now": theta(), "other": theta(rope_theta=500.0)}

    def book(which, cast):
        return SignalCache(
            store=ArrayStore(tmp_path),
            model_identity=lambda: model_identity(models[which]),
            surroundings=lambda _: {"autocast": cast},
        )

    def ask(book, value):
        work = book.work("losses", {}, model="", data="d", corpus="", shape=(2,))
        if not work.complete:
            work.record(np.arange(2), np.full(2, value, dtype=np.float32))
        return work.finish().tolist()

    assert ask(book("now", "none"), 1.0) == [1.0, 1.0]
    assert ask(book("now", "none"), 2.0) == [1.0, 1.0], "found again"
    if change == "model":
        assert ask(book("other", "none"), 3.0) == [3.0, 3.0]
    else:
        assert ask(book("now", "bf16"), 3.0) == [3.0, 3.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool])
def test_the_number_of_threads_changes_no_identity(dtype):
    """Stored passes and indexes are taken up by ranks too, on which torchrun sets other numbers of threads."""
    tensor = torch.randn(300_001, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)
    threads, found = torch.get_num_threads(), set[str]()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.add(state_identity([("weight", tensor)]))
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1
    changed = tensor.clone()
    changed[7] = 1 - changed[7].to(torch.float64)
    assert state_identity([("weight", changed)]) not in found
    assert state_identity([("weight", tensor[::3].contiguous())]) == state_identity([("weight", tensor[::3])])
