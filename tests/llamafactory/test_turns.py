"""Weights of messages on the tokens that they become: every message is one word, so that labels tell whose they are."""

from __future__ import annotations

import itertools
import random
from types import SimpleNamespace

import pytest

from tests.conftest import WORDS

NAMES = sorted(set(WORDS))[:8]
WEIGHTS = dict(zip(NAMES, [1.0, 0.25, 3.0, 0.0, 1.0, 2.0, 1.0, 1.0], strict=True))
SETTINGS = {
    "plain": {},
    "cut": {"cutoff_len": 36},
    "history masked": {"mask_history": True},
    "history masked, cut": {"mask_history": True, "cutoff_len": 18},
    "on prompts": {"train_on_prompt": True},
    "packed": {"packing": True, "cutoff_len": 60},
    "neatly packed": {"packing": True, "neat_packing": True, "cutoff_len": 60},
    "packed, history masked": {"packing": True, "mask_history": True, "cutoff_len": 60},
}
TEMPLATES = {"default": False, "bailing": True}  # whether the end of an answer is the first label of the next prompt


def arguments(template, **changes):
    usual = {"cutoff_len": 128, "tool_format": None, "default_system": None, "enable_thinking": None, "media_dir": "."}
    switches = dict.fromkeys(("mask_history", "train_on_prompt", "packing", "neat_packing", "preserve_thinking"), False)
    return SimpleNamespace(template=template, **{**usual, **switches, **changes})


def converted(formatting, rows, args):
    from llamafactory.data.converter import DATASET_CONVERTERS
    from llamafactory.data.parser import DatasetAttr

    from dataflex.llamafactory.turns import WeighedConverter

    attr = DatasetAttr("file", dataset_name="x")
    attr.formatting, attr.messages, attr.role_tag, attr.content_tag = formatting, "messages", "role", "content"
    attr.user_tag, attr.assistant_tag, attr.observation_tag = "user", "assistant", "tool"
    attr.function_tag, attr.system_tag = "function", "system"
    convert = WeighedConverter(DATASET_CONVERTERS[formatting](attr, args), "loss_weight")
    found = [convert(row) for row in rows]
    return {key: [row[key] for row in found] for key in found[0]}


def talks(system=False):
    rng, rows = random.Random(0), []
    for place in range(12):
        messages = [{"role": "system", "content": "#", "loss_weight": 9.0}] if system else []
        for k in range(2 * (1 + place % 4)):
            message = {"role": ("user", "assistant")[k % 2], "content": " ".join([NAMES[k]] * rng.randint(2, 6))}
            messages.append(message if k in (0, 7) else {**message, "loss_weight": WEIGHTS[NAMES[k]]})
        rows.append({"messages": messages})
    return rows


@pytest.mark.parametrize(("setting", "template"), [*itertools.product(SETTINGS, TEMPLATES)])
@pytest.mark.parametrize("formatting", ["sharegpt", "openai"])
def test_every_label_weighs_as_its_message(tiny_model, setting, template, formatting):
    from llamafactory.data.processor import PackedSupervisedDatasetProcessor, SupervisedDatasetProcessor
    from llamafactory.data.template import get_template_and_fix_tokenizer
    from transformers import AutoTokenizer

    from dataflex.llamafactory.turns import WEIGHTS as COLUMN
    from dataflex.llamafactory.turns import WeighedProcessor

    if TEMPLATES[template] and "prompts" in setting:
        return  # LLaMA-Factory has no such run
    args, tokenizer = arguments(template, **SETTINGS[setting]), AutoTokenizer.from_pretrained(tiny_model)
    parts = {"template": get_template_and_fix_tokenizer(tokenizer, args), "tokenizer": tokenizer, "processor": None}
    assert parts["template"].efficient_eos == TEMPLATES[template]
    kind = PackedSupervisedDatasetProcessor if args.packing else SupervisedDatasetProcessor
    examples = converted(formatting, talks(system=formatting == "openai"), args)
    found = WeighedProcessor(kind(**parts, data_args=args)).preprocess_dataset(examples)
    weights = found.pop(COLUMN)
    assert found == kind(**parts, data_args=args).preprocess_dataset(examples)
    words, seen = {index: word for word, index in tokenizer.get_vocab().items()}, set()
    for labels, given in zip(found["labels"], weights, strict=True):
        assert len(labels) == len(given)
        last = None
        for label, weight in zip(labels, given, strict=True):
            word = words.get(label)
            if label == -100 or (word not in WEIGHTS and (last is None or "prompts" in setting)):
                continue
            last = WEIGHTS.get(word, last)  # the end of an answer weighs as the answer
            assert weight == last, (word, weight)
            seen.add(weight)
    assert len(seen) >= 2


def test_several_answers_of_tools_weigh_as_the_last_one():
    rows = [{"messages": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}], "loss_weight": 0.5},
        {"role": "tool", "content": "b", "loss_weight": 2.0},
        {"role": "tool", "content": "c", "loss_weight": 3.0},
        {"role": "assistant", "content": "d", "loss_weight": 0.0},
    ]}]  # fmt: skip
    found = converted("openai", rows, arguments("default"))
    messages = found["_prompt"][0] + found["_response"][0]
    assert [message["dataflex_weight"] for message in messages] == [1.0, 0.5, 3.0, 0.0]
    assert messages[1]["content"] == '[{"name": "f"}]'
    assert messages[2]["content"].startswith("b")
