"""Tiny random models and ragged rows for tests of signals."""

from __future__ import annotations

import contextlib
import random
from dataclasses import replace

import numpy as np
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from dataflex.signals.kinds import GradientProducts
from dataflex.signals.model_access import ModelAccess
from dataflex.signals.runner import SignalCache, SignalRunner

VOCABULARY = 31


def llama(**changes):
    torch.manual_seed(3)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "attention_dropout": 0.3,
        "initializer_range": 0.3,
        "eos_token_id": 2,
        "bos_token_id": 1,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))


def gemma2():
    """Caps its logits after the head."""
    torch.manual_seed(4)
    config = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        final_logit_softcapping=2.0,
        initializer_range=0.3,
        attn_implementation="eager",
    )
    return Gemma2ForCausalLM(config)


def cohere():
    """Scales its logits after the head."""
    torch.manual_seed(5)
    config = CohereConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        logit_scale=0.25,
        initializer_range=0.3,
        eos_token_id=2,
        bos_token_id=1,
        pad_token_id=0,
    )
    return CohereForCausalLM(config)


def gpt2():
    torch.manual_seed(6)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=64, eos_token_id=2, bos_token_id=1
    )
    return GPT2LMHeadModel(config)


def lora(model=None, **changes):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(7)
    wrapped = get_peft_model(
        model or llama(), LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_dropout=0.4, **changes)
    )
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return wrapped


class Rows:
    """Features by row id."""

    def __init__(self, rows):
        self.rows = rows

    def __getitems__(self, ids):
        return [dict(self.rows[i]) for i in ids]

    def __len__(self):
        return len(self.rows)

    @property
    def lengths(self):
        return np.array([len(row["input_ids"]) for row in self.rows], dtype=np.int64)


def make_rows(count, seed=0, low=2, high=12):
    """Rows with a masked prompt; every seventh has no label at all, every fifth a label on its first token."""
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        length = rng.randint(low, high)
        ids = [rng.randrange(3, VOCABULARY) for _ in range(length)]
        prompt = length if i % 7 == 6 else 0 if i % 5 == 4 else rng.randint(1, length - 1)
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return Rows(rows)


def collate(features, side="right"):
    width = max(len(feature["input_ids"]) for feature in features)

    def padded(values, fill):
        gap = [fill] * (width - len(values))
        return values + gap if side == "right" else gap + values

    return {
        "input_ids": torch.tensor([padded(f["input_ids"], 0) for f in features]),
        "attention_mask": torch.tensor([padded([1] * len(f["input_ids"]), 0) for f in features]),
        "labels": torch.tensor([padded(f["labels"], -100) for f in features]),
    }


def collate_left(features):
    return collate(features, side="left")


def packed(documents, width):
    """One packed row as LLaMA-Factory's neat_packing makes it, before the collator."""
    ids, labels, mask, positions = [], [], [], []
    for number, row in enumerate(documents, start=1):
        ids += row["input_ids"]
        labels += row["labels"]
        mask += [number] * len(row["input_ids"])
        positions += range(len(row["input_ids"]))
    gap = width - len(ids)
    return {
        "input_ids": ids + [0] * gap,
        "labels": labels + [-100] * gap,
        "attention_mask": mask + [0] * gap,
        "position_ids": positions + [0] * gap,
    }


def snapshot(model):
    """Everything that a pass must leave alone."""
    return (
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.get_rng_state().tolist(),
        [module.training for module in model.modules()],
        [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        [sorted(vars(m)) for m in model.modules()],
        {name: value.clone() for name, value in model.state_dict().items()},
        [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()],
    )


def assert_same(before, after):
    assert before[:6] == after[:6]
    assert all(torch.equal(before[6][name], after[6][name]) for name in before[6])
    for (needs, grad), (needs_after, grad_after) in zip(before[7], after[7], strict=True):
        assert needs == needs_after
        assert (grad is None) == (grad_after is None)
        assert grad is None or torch.equal(grad, grad_after)


def asking(model, train, targets=None, *, seed=0, cache=None, **settings):
    """Return a runner of signals on the CPU; rows are ``Corpus``."""
    settings = {"collate": collate, "autocast": contextlib.nullcontext, "token_budget": 40, **settings}
    access = ModelAccess(
        model=model, train=train, targets=targets or {}, seed=seed, device=torch.device("cpu"), **settings
    )
    return SignalRunner(access=access, cache=cache or SignalCache())


def again(runner, cache=None, **changes):
    """Return a fresh runner with another cache on the same model, or with changes."""
    return SignalRunner(access=replace(runner.access, **changes), cache=cache or SignalCache())


def products(runner, rows, **fields):
    """Return inner products of rows' gradients with those of targets, and with one another."""
    signal = GradientProducts(**fields)
    return signal.split(runner(signal, rows))
