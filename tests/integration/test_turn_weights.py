"""Weights of messages and of tokens from the data follow their tokens, and the loss is the weighted mean.

Every message consists of one word of its own, so that a token tells by itself which message it is of.
"""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from dataflex.errors import ConfigError, DataError
from tests.conftest import WORDS

OF_TURNS = {"weighter": {"name": "column", "level": "turn"}}
NAMES = sorted(set(WORDS))[:8]
GIVEN = [None, 0.25, 3.0, 0.0, None, 2.0, 1.0, None]  # weight of the messages of each word
WEIGHTS = dict(zip(NAMES, (1.0 if weight is None else weight for weight in GIVEN), strict=True))
TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}


def conversation(rng, turns, roles=("user", "assistant")):
    messages = []
    for place in range(2 * turns):
        message = {"role": roles[place % 2], "content": " ".join([NAMES[place]] * rng.randint(2, 6))}
        messages.append(message if GIVEN[place] is None else {**message, "loss_weight": GIVEN[place]})
    return {"messages": messages}


def store(folder, rows, formatting="sharegpt"):
    folder.mkdir(exist_ok=True)
    (folder / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tags = TAGS if formatting == "sharegpt" else {**TAGS, "observation_tag": "tool", "system_tag": "system"}
    entry = {"file_name": "talks.jsonl", "formatting": formatting, "columns": {"messages": "messages"}, "tags": tags}
    (folder / "dataset_info.json").write_text(json.dumps({"talks": entry}))
    return {"dataset": "talks", "dataset_dir": str(folder)}


@pytest.fixture
def seen(monkeypatch):
    """Ids, labels, weights by position and losses of every micro-batch."""
    from dataflex.train import loss as module

    found, original = [], module.Reweighter._weights

    def watch(self, weighter, losses, batch, *rest):
        weights, sequences, equal = original(self, weighter, losses, batch, *rest)
        found.append((batch["input_ids"], batch["labels"], weights, losses.loss_BT.detach()))
        return weights, sequences, equal

    monkeypatch.setattr(module.Reweighter, "_weights", watch)
    return found


def expected(tokenizer, ids, labels):
    """Weight of each label [R][T], from the words alone: the end of an answer weighs as the word before it."""
    words = {index: word for word, index in tokenizer.get_vocab().items()}
    out = np.zeros(ids.shape)
    for r in range(ids.shape[0]):
        last = 1.0
        for t in range(ids.shape[1]):
            last = WEIGHTS.get(words[int(ids[r, t])], last)
            out[r, t] = last if int(labels[r, t]) != -100 else 0.0
    return out


CASES = {
    "plain": {},
    "history masked and cut": {"mask_history": True, "cutoff_len": 20},
    "neatly packed": {"neat_packing": True},
    "openai": {"formatting": "openai"},
    "parts of v1": {"formatting": "openai", "parts": True},
    "several processes": {"preprocessing_num_workers": 2},
}


@pytest.mark.parametrize("case", CASES)
def test_weights_follow_their_tokens(run, tmp_path, seen, tiny_model, case):
    from transformers import AutoTokenizer

    rng = random.Random(3)
    rows = [conversation(rng, 1 + i % 4) for i in range(24)]
    changes = dict(CASES[case])
    if changes.pop("parts", False):
        for message in (each for row in rows for each in row["messages"]):
            first, _, rest = message["content"].partition(" ")
            texts = [first, f" {rest}"] if rest else [first]
            message["content"] = [{"type": "text", "value": text} for text in texts]
    data = store(tmp_path / "data", rows, changes.pop("formatting", "sharegpt"))
    settings = {"max_steps": 3, "learning_rate": 0.0, "gradient_accumulation_steps": 2}
    outcome = run("a", **data, **changes, **settings, dynamic=OF_TURNS)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    told = []
    for ids, labels, weights, losses in seen:
        wanted = expected(tokenizer, ids, labels)
        shifted = np.pad(wanted[:, 1:], ((0, 0), (0, 1)))
        there = np.pad((labels != -100).numpy()[:, 1:], ((0, 0), (0, 1)))
        assert weights.numpy()[there].tolist() == pytest.approx(shifted[there].tolist())
        told.append(((shifted * losses.numpy()).sum(), shifted.sum()))
        assert there.any()
    assert len({float(n) for _, _, w, _ in seen for n in np.unique(w.numpy())}) > 2
    for step, logged in enumerate(outcome.series()):
        sums = told[2 * step : 2 * step + 2]
        assert logged == pytest.approx(sum(s for s, _ in sums) / sum(n for _, n in sums), rel=1e-4)


def test_a_turn_of_weight_0_trains_nothing(run, tmp_path, monkeypatch):
    """Its answer may be any other: parameters after training are the same to the bit."""
    rng = random.Random(5)
    rows = [conversation(rng, 2) for _ in range(12)]
    changed = json.loads(json.dumps(rows))
    for row in changed:  # the answer of weight 0 is the last one: nothing comes after it
        row["messages"][3]["content"] = " ".join(reversed(["the", *row["messages"][3]["content"].split()[1:]]))
    settings = {"dynamic": OF_TURNS, "max_steps": 4}
    one = run("one", **store(tmp_path / "one-data", rows), **settings).weights()
    other = run("other", **store(tmp_path / "other-data", changed), **settings).weights()
    plain = run("plain", **store(tmp_path / "one-data", rows), max_steps=4).weights()
    assert all(np.array_equal(one[name], other[name]) for name in one)
    assert not all(np.array_equal(one[name], plain[name]) for name in one)


@pytest.mark.parametrize("value", [-1.0, "much", float("nan"), True])
def test_a_weight_that_is_none_is_told_with_its_place(run, tmp_path, value):
    from dataflex.config.split import resolve

    rows = [conversation(random.Random(i), 2) for i in range(3)]
    rows[1]["messages"][3]["loss_weight"] = value
    data = store(tmp_path / "data", rows)
    with pytest.raises(ConfigError) as caught:
        resolve(run.mapping("a", **data, dynamic=OF_TURNS), tmp_path)
    assert len(caught.value.problems) == 1
    assert "line 2 of" in caught.value.problems[0]
    assert "message 4, has loss_weight = " in caught.value.problems[0]


def test_a_part_that_is_no_text_is_told_with_its_place(run, tmp_path):
    from dataflex.config.split import resolve

    rows = [conversation(random.Random(1), 2)]
    rows[0]["messages"][2]["content"] = [{"type": "image_url", "value": "a.png"}]
    data = store(tmp_path / "data", rows, "openai")
    with pytest.raises(ConfigError, match=r"message 3, has a part of type 'image_url'; of the parts of"):
        resolve(run.mapping("a", **data, dynamic=OF_TURNS), tmp_path)


def test_data_without_weights_is_told(run, tmp_path):
    from dataflex.config.split import resolve

    data = store(tmp_path / "data", [conversation(random.Random(1), 2)])
    block = {"weighter": {"name": "column", "level": "turn", "column": "weight"}}
    with pytest.raises(ConfigError, match="no message of 'talks' has a 'weight'"):
        resolve(run.mapping("a", **data, dynamic=block), tmp_path)


OF_TOKENS = {"weighter": {"name": "column", "level": "token"}}


def copy_of(run, folder, change):
    """A tokenized copy with a column of weights that ``change`` makes of a row."""
    from datasets import DatasetDict, load_from_disk

    run("make", dataset="ones", tokenized_path=str(folder / "plain"), max_steps=1)
    rows = load_from_disk(str(folder / "plain"))["train"]
    weighed = rows.add_column("loss_weights", [change(place, row) for place, row in enumerate(rows)])
    DatasetDict({"train": weighed}).save_to_disk(str(folder / "weighed"))
    return {"tokenized_path": str(folder / "weighed"), "dataset": "ones"}


def test_tokens_of_a_copy_have_weights_of_their_own(run, tmp_path, seen):
    data = copy_of(run, tmp_path, lambda place, row: [float((place + t) % 3) for t in range(len(row["input_ids"]))])
    seen.clear()
    outcome = run("a", **data, dynamic=OF_TOKENS, max_steps=3, learning_rate=0.0)
    for step, (_, labels, weights, losses) in enumerate(seen):
        total = tokens = 0.0
        for r in range(2):
            for t in range(1, labels.shape[1]):
                weight = float((2 * step + r + t) % 3)
                if int(labels[r, t]) != -100:
                    assert float(weights[r, t - 1]) == weight
                    total, tokens = total + weight * float(losses[r, t - 1]), tokens + weight
        assert outcome.series()[step] == pytest.approx(total / tokens, rel=1e-4)


@pytest.mark.parametrize(("bad", "told"), [(-1.0, "has -1.0 in loss_weights"), (None, "tokens in loss_weights")])
def test_weights_of_tokens_that_cannot_be_used_are_told(run, tmp_path, bad, told):
    def change(place, row):
        weights = [1.0] * len(row["input_ids"])
        return weights if place != 4 else weights[:-1] if bad is None else [*weights[:-1], bad]

    data = copy_of(run, tmp_path, change)
    with pytest.raises(DataError, match=f"row 5 of the tokenized copy has .*{told.split('has ')[-1]}"):
        run("a", **data, dynamic=OF_TOKENS, max_steps=1)
