"""Trainers whose collator joins the rows of a micro-batch into one sequence: without padding, and packed."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import DataCollatorWithFlattening

from dataflex.errors import ConfigError, UnsupportedError
from dataflex.signals.kinds import TokenLoss
from dataflex.signals.texts import token_rows
from tests.huggingface.test_wrap import BLOCKS, Kind, door, loads, losses, served, texts, tokenized

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.slow

FREE = {"padding_free": True, "max_length": None}
PACKED = {"packing": True, "max_length": 48}
SMOOTH = {"adam_epsilon": 0.1}  # so that rounding stays small
FORMS = {"free": FREE, "packed": PACKED}


@pytest.fixture(scope="module")
def kind(tiny_model):
    return Kind(tiny_model)


def same_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True))


def flattening(kind, out, block=None, **changes):
    """Return a plain Trainer with the collator of transformers that joins rows."""
    settings = {"collator": DataCollatorWithFlattening(), "remove_unused_columns": True, **changes}
    return kind.make("Trainer", out, block, **settings)


@pytest.mark.parametrize("form", FORMS)
def test_a_neutral_block_gives_the_stock_run(kind, tmp_path, form):
    order = {"train_sampling_strategy": "sequential", **FORMS[form]}
    stock = kind.make("SFTTrainer", tmp_path / "stock", **order)
    stock.train()
    for name, block, settings in (("all", {"selector": "all"}, order), ("record", {"record": True}, order)):
        ours = kind.make("SFTTrainer", tmp_path / name, block, **settings)
        ours.train()
        assert losses(ours) == losses(stock)
        assert same_weights(ours, stock)
    rest = kind.make("SFTTrainer", tmp_path / "all", {"selector": "all"}, **order)
    rest.train(resume_from_checkpoint=str(tmp_path / "all" / "checkpoint-4"))
    assert losses(rest) == losses(stock)
    assert same_weights(rest, stock)


def test_the_collator_of_transformers_gives_the_stock_run(kind, tmp_path):
    order = {"train_sampling_strategy": "sequential"}
    stock = flattening(kind, tmp_path / "stock", **order)
    stock.train()
    for name, block in (("all", {"selector": "all"}), ("record", {"record": True})):
        ours = flattening(kind, tmp_path / name, block, domains="source", **order)
        ours.train()
        assert losses(ours) == losses(stock)
        assert same_weights(ours, stock)
    padded = kind.make("Trainer", tmp_path / "padded", {"record": True}, domains="source", **order)
    padded.train()
    for free, whole in zip(told(ours), told(padded), strict=True):
        assert free == pytest.approx(whole, rel=1e-5)
    assert {"dataflex/loss/a", "dataflex/loss/b", "dataflex/loss/c"} <= told(ours)[0].keys()


def told(trainer):
    """Our numbers in the log, but for seconds and passes."""
    names = ("loss", "dataflex/loss/", "dataflex/weight_", "dataflex/share/")
    return [
        {name: value for name, value in entry.items() if name.startswith(names)}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


METHODS = {
    **BLOCKS,
    "weights by loss": {"weighter": {"name": "loss", "warmup_steps": 0}},
    "a reference": {"weighter": {"name": "slm", "reference": "MODEL", "warmup_steps": 0}},
    "a reference beside each batch": {
        "weighter": {"name": "rho", "reference": "MODEL", "reference_cache": False, "warmup_steps": 0}
    },
    "embeddings": {"weighter": {"name": "adapt", "targets": ["goal"], "warmup_steps": 0}},
    "weights before the step": {"weighter": {"name": "meta", "targets": ["goal"], "warmup_steps": 0}},
    "weights of domains": {"mixer": {"name": "doremi", "reference": "MODEL"}, "interval_steps": 1},
    "a budget": {**BLOCKS["less"], "signals": {"budget": 2.0}},
    "candidates": {
        "selector": {"name": "greats", "targets": ["goal"]},
        **{"candidate_batches": 2, "interval_steps": 1},
    },
}


@pytest.mark.parametrize("method", METHODS)
def test_methods_do_what_they_do_with_padding(kind, tmp_path, method):
    """Losses, weights, losses by domain, chosen rows and credits are those of the padded run, to rounding."""
    block = {part: with_model(kind, given) for part, given in METHODS[method].items()}
    found = []
    for free in (False, True):
        settings = {"padding_free": free, "max_length": None, "pad_to_multiple_of": 16, **SMOOTH}
        given = door(kind, "SFTTrainer", block)
        found.append(kind.make("SFTTrainer", tmp_path / str(free), **given, **settings))
        found[-1].train()
    padded, free = found
    assert served(tmp_path / "True").tolist() == served(tmp_path / "False").tolist()
    for one, other in zip(told(free), told(padded), strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    for one, other in zip(free.model.parameters(), padded.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    credits = [each.dataflex.controller.ledger for each in found]
    if credits[0] is not None:
        scale = np.abs(credits[0].credits).max()
        np.testing.assert_allclose(credits[1].credits, credits[0].credits, rtol=1e-3, atol=1e-4 * scale)


def with_model(kind, given):
    if not isinstance(given, dict):
        return given
    return {key: str(kind.folder) if value == "MODEL" else value for key, value in given.items()}


@pytest.mark.parametrize("method", ["less", "focal", "ledger", "a budget"])
@pytest.mark.parametrize("form", FORMS)
def test_methods_go_on_from_a_checkpoint(kind, tmp_path, form, method):
    given = door(kind, "SFTTrainer", METHODS[method]) | {"domains": None, "rows": texts(96)}
    whole = kind.make("SFTTrainer", tmp_path, **given, **FORMS[form])
    whole.train()
    rest = kind.make("SFTTrainer", tmp_path, **given, **FORMS[form])
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert losses(rest) == losses(whole)
    assert same_weights(rest, whole)


# ---------------------------------------------------------------- packs


def documents(trainer, row):
    """Tokens and labels of each document of a pack."""
    pack = trainer.train_dataset[row]
    ends = np.cumsum([0, *pack["seq_lengths"]])
    return [(pack["input_ids"][start:stop], pack["labels"][start:stop]) for start, stop in pairwise(ends)]


@pytest.mark.skipif(not loads("DPOTrainer"), reason="an older TRL has masks in place of labels; see make test-trl")
def test_the_score_of_a_pack_is_that_of_its_documents_alone(kind, tmp_path):
    trainer = kind.make("SFTTrainer", tmp_path, BLOCKS["loss"], rows=texts(96), **PACKED)
    trainer.train()
    scores = trainer.dataflex.controller.signals(TokenLoss(), np.arange(6))
    trainer.model.eval()
    for row in range(6):
        losses_D, tokens = [], 0
        assert len(documents(trainer, row)) > 1
        for ids, labels in documents(trainer, row):
            with torch.no_grad():
                logits = trainer.model(input_ids=torch.tensor([ids])).logits[0, :-1]
            targets = torch.tensor(labels[1:])
            losses_D.append(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
            tokens += int((targets != -100).sum())
        assert scores[row] == pytest.approx(float(sum(losses_D)) / tokens, rel=1e-5)
    for row, (_, _, numbers) in enumerate(token_rows(trainer.train_dataset, np.arange(6))):
        assert np.bincount(numbers)[1:].tolist() == trainer.train_dataset[row]["seq_lengths"]


def packs_of_two(rows):
    """Rows of one domain after the other, and the same as packs of two of them."""
    rows = [row for name in "abc" for row in rows if row["source"] == name]
    pairs = list(zip(rows[::2], rows[1::2], strict=True))
    packs = [
        {
            **{name: one[name] + other[name] for name in ("input_ids", "labels")},
            "seq_lengths": [len(one["input_ids"]), len(other["input_ids"])],
            "source": one["source"],
        }
        for one, other in pairs
    ]
    return rows, packs


@pytest.mark.parametrize("method", ["weights by loss", "focal", "a reference", "embeddings"])
@pytest.mark.parametrize("size", [1, 2])
def test_documents_of_packs_weigh_as_rows_do(kind, tmp_path, method, size):
    """A pack's documents have the weights and losses that they have as rows of the same micro-batch."""
    given = door(kind, "SFTTrainer", {part: with_model(kind, each) for part, each in METHODS[method].items()})
    rows, packs = packs_of_two([*tokenized(kind.tokenizer, texts(24)).remove_columns(["text", "quality"])])
    found = []
    for name, data, micro in (("rows", rows, 2 * size), ("packs", packs, size)):
        settings = {
            **{"padding_free": name == "packs", "max_length": None, "per_device_train_batch_size": micro},
            **{"dataset_kwargs": {"skip_prepare_dataset": True}, "train_sampling_strategy": "sequential", **SMOOTH},
        }
        goal = tokenized(kind.tokenizer, texts(6, seed=9)).select_columns(["input_ids", "labels"])
        given["targets"] = {"goal": goal}
        args = {"max_steps": 3, "rows": data, **given, **settings}
        found.append(kind.make("SFTTrainer", tmp_path / name, **args))
        found[-1].train()
    of_rows, of_packs = found
    for one, other in zip(told(of_packs), told(of_rows), strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    weights = of_packs.dataflex._loss.row_weights
    assert weights.state_dict()["counts"].tolist() == [2] * len(weights)


def test_proportions_of_documents_count_those_of_packs(kind, tmp_path):
    _, packs = packs_of_two([*tokenized(kind.tokenizer, texts(24)).remove_columns(["text", "quality"])])
    first, second = packs[-1]["seq_lengths"]
    packs[-1]["seq_lengths"] = [1, first - 1, second]
    settings = {"padding_free": True, "max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
    block = {"mixer": "uniform", "unit": "documents"}
    trainer = kind.make("SFTTrainer", tmp_path, block, domains="source", rows=packs, **settings)
    assert trainer.dataflex_setup.rows.domains.sizes("documents").tolist() == [8, 8, 9]


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("collator", "why"),
    [
        (DataCollatorWithFlattening(return_position_ids=False), "see one another, since no position_ids begin anew"),
        (DataCollatorWithFlattening(separator_id=5), "the last token of a row predicts the next row"),
    ],
)
def test_rows_that_are_not_told_apart_are_refused(kind, tmp_path, collator, why):
    trainer = flattening(kind, tmp_path, {"selector": "all"}, collator=collator)
    with pytest.raises(UnsupportedError, match=why):
        trainer.train()


@pytest.mark.skipif(not loads("RewardTrainer"), reason="see make test-trl")
def test_joined_rows_of_other_stages_are_refused(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(trl.RewardTrainer, "padding_free", True, raising=False)
    with pytest.raises(ConfigError, match="padding_free: which tokens of a batch are of which row is not known"):
        kind.make("RewardTrainer", tmp_path, {"selector": "all"})
