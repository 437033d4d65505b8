"""Token losses of a reference model: aligned with the training loss, stored, resumed, refused."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from dataflex.errors import CheckpointError, ConfigError, DataError
from dataflex.signals.model_access import Corpus, ModelAccess
from dataflex.signals.store import ArrayStore
from dataflex.train import reference as module
from dataflex.train.loss import token_losses
from dataflex.train.reference import ReferenceLosses
from tests.signals import tiny

CPU = torch.device("cpu")


class Words:
    """A tokenizer as far as a reference looks at it."""

    def __init__(self, folder: Path, size: int = tiny.VOCABULARY) -> None:
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast

        words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)


@pytest.fixture(scope="module")
def model():
    return tiny.llama().eval()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("reference")
    model.save_pretrained(path)
    Words(path)
    return path


def tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def opened(folder, rows, store, *, fingerprint="rows", cached=True, whole=False, **changes):
    access = ModelAccess(
        model=torch.nn.Identity(),
        autocast=nullcontext,
        device=CPU,
        token_budget=40,
        train=Corpus(dataset=rows, lengths=rows.lengths, identity=fingerprint),
        **{"collate": tiny.collate, "tokenizer": changes.get("tokenizer") or tokenizer(folder), **changes},
    )
    return ReferenceLosses(folder, access, store=store, cached=cached, whole=whole)


def begun(folder, rows, store, covered=None, **changes):
    losses = opened(folder, rows, store, **changes)
    losses.cover(np.arange(len(rows)) if covered is None else covered)
    return losses


def kept(losses, ids):
    return np.concatenate([losses.kept(row) for row in ids])


def counted(monkeypatch):
    """Rows that the reference scores, pass by pass."""
    scored, original = [], module._scored

    def scoring(sweep, turn, *rest):
        if turn.mine:
            scored.extend(sweep.rows[turn.positions].tolist())
        return original(sweep, turn, *rest)

    monkeypatch.setattr(module, "_scored", scoring)
    return scored


@torch.no_grad()
def wanted(model, batch):
    """The training loss of the reference itself on the batch."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return token_losses(logits, batch["labels"])


def batch_of(rows, ids, collate=tiny.collate):
    return collate(rows.__getitems__(ids))


IDS = np.array([4, 0, 13, 6, 2, 4], dtype=np.int64)


@pytest.mark.parametrize("cache", [True, False])
def test_losses_are_aligned_with_the_training_loss(model, folder, tmp_path, cache):
    rows = tiny.make_rows(21)
    losses = begun(folder, rows, tmp_path, cached=cache)
    batch = batch_of(rows, IDS.tolist())
    want = wanted(model, batch)
    got = losses.of(batch, IDS, want.mask_BT)
    assert got.dtype == torch.float32
    assert not got.requires_grad
    assert bool((got[~want.mask_BT] == 0).all())
    torch.testing.assert_close(got, want.loss_BT, atol=0.005 if cache else 1e-5, rtol=0)


def test_left_padding_is_not_counted(model, folder, tmp_path):
    rows = tiny.make_rows(21)
    right = batch_of(rows, IDS.tolist())
    left = batch_of(rows, IDS.tolist(), tiny.collate_left)
    mask = wanted(model, right).mask_BT
    losses = begun(folder, rows, tmp_path)
    here = losses.of(right, IDS, mask)
    labels = torch.nn.functional.pad(left["labels"], (0, 1), value=-100)[:, 1:]
    real = left["attention_mask"].bool()
    there = losses.of(left, IDS, labels.ne(-100) & real)
    for row in range(len(IDS)):
        assert here[row][here[row] != 0].tolist() == there[row][there[row] != 0].tolist()


def test_labels_that_only_the_collator_makes_are_scored(model, folder, tmp_path):
    rows = tiny.Rows([{"input_ids": [3 + i, 5, 0, 7, 8]} for i in range(6)])

    def collate(features):
        return tiny.collate(
            [{**f, "labels": [-100 if token == 0 else token for token in f["input_ids"]]} for f in features]
        )

    losses = begun(folder, rows, tmp_path, collate=collate)
    ids = np.array([5, 1])
    batch = collate(rows.__getitems__(ids.tolist()))
    want = wanted(model, batch)
    torch.testing.assert_close(losses.of(batch, ids, want.mask_BT), want.loss_BT, atol=0.005, rtol=0)


def test_packed_rows_are_read_as_in_training(model, folder, tmp_path):
    documents = tiny.make_rows(8, low=4, high=9).rows
    rows = tiny.Rows([tiny.packed(documents[:3], 32), tiny.packed(documents[3:5], 32)])

    def collate(features):
        return {key: torch.tensor([f[key] for f in features]) for key in features[0]}

    for packed_apart in (True, False):

        def made(features, apart=packed_apart):
            batch = collate(features)
            mask = batch["attention_mask"]
            if not apart:
                return {**batch, "attention_mask": mask.ne(0).long()}
            same = mask[:, None, :] == mask[:, :, None]
            causal = torch.ones(32, 32).tril().bool()
            return {**batch, "attention_mask": (same & causal & mask.ne(0)[:, None, :])[:, None]}

        losses = begun(folder, rows, tmp_path, collate=made)
        batch = made(rows.__getitems__([1, 0]))
        with torch.no_grad():
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            want = token_losses(model(**inputs).logits, batch["labels"])
        got = losses.of(batch, np.array([1, 0]), want.mask_BT)
        torch.testing.assert_close(got, want.loss_BT, atol=0.005, rtol=0)
    assert len(ArrayStore(tmp_path).entries()) == 2  # the same tokens, seen otherwise, are another array


def test_the_store_is_half_precision_and_taken_by_a_later_run(folder, tmp_path, monkeypatch):
    rows = tiny.make_rows(90)
    first = begun(folder, rows, tmp_path)
    assert first._scorer is None  # the model is let go
    (entry,) = ArrayStore(tmp_path).entries()
    array = np.load(tmp_path / entry.name / "array.npy", mmap_mode="r")
    assert array.dtype == np.float16
    assert len(array) == rows.lengths.sum()

    scored = counted(monkeypatch)
    second = begun(folder, rows, tmp_path)
    assert len(scored) == 64  # rows compared, none computed
    batch = batch_of(rows, IDS.tolist())
    mask = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:].ne(-100)
    assert torch.equal(first.of(batch, IDS, mask), second.of(batch, IDS, mask))


def test_an_interrupted_pass_goes_on(folder, tmp_path, monkeypatch):
    rows = tiny.make_rows(40)
    original, calls = module._scored, []

    def dying(sweep, turn, *rest):
        calls.append(len(turn.positions))
        if len(calls) == 6:
            raise KeyboardInterrupt
        return original(sweep, turn, *rest)

    monkeypatch.setattr(module, "_scored", dying)
    with pytest.raises(KeyboardInterrupt):
        begun(folder, rows, tmp_path / "a")
    done = sum(calls[:5])
    again = []
    monkeypatch.setattr(
        module, "_scored", lambda sweep, turn, *rest: again.append(len(turn.positions)) or original(sweep, turn, *rest)
    )
    resumed = begun(folder, rows, tmp_path / "a")
    assert sum(again) == 40 - done + 40  # what was left, and the comparison of all 40
    straight = begun(folder, rows, tmp_path / "b")
    assert np.array_equal(kept(resumed, range(40)), kept(straight, range(40)), equal_nan=True)


def test_stored_losses_that_are_not_the_models_are_refused(folder, tmp_path):
    rows = tiny.make_rows(30)
    begun(folder, rows, tmp_path)
    (entry,) = ArrayStore(tmp_path).entries()
    path = tmp_path / entry.name / "array.npy"
    array = np.load(path)
    array[rows.lengths[:4].sum() : rows.lengths[:5].sum()] += 0.5
    np.save(path, array)
    with pytest.raises(CheckpointError, match=r"row 4 differs by 0.5 nats per token \(0.02 are allowed\)"):
        begun(folder, rows, tmp_path)


def test_rounding_to_half_precision_is_within_the_tolerance(folder, tmp_path):
    rows = tiny.make_rows(30)
    losses = begun(folder, rows, tmp_path)
    sweep = losses._access.sweep(np.arange(30), None, "comparison")
    worst, _ = losses._largest_difference(sweep, losses._arrays[0])
    assert 0 < worst < module.TOLERANCE / 4


@pytest.mark.parametrize("change", ["weights", "data", "tokenizer"])
def test_other_weights_data_or_tokens_are_another_array(folder, tmp_path, change):
    rows = tiny.make_rows(12)
    begun(folder, rows, tmp_path / "store")
    other, changes = tmp_path / "other", {}
    shutil.copytree(folder, other)
    if change == "weights":
        moved = tiny.llama()
        with torch.no_grad():
            moved.lm_head.weight.mul_(1.5)
        moved.save_pretrained(other)
    elif change == "data":
        changes["fingerprint"] = "other rows"
    else:
        Words(other, tiny.VOCABULARY - 1)
        changes["tokenizer"] = tokenizer(other)
    begun(other, rows, tmp_path / "store", **changes)
    assert len(ArrayStore(tmp_path / "store").entries()) == 2


def test_another_tokenizer_is_refused_before_anything_is_computed(folder, tmp_path):
    Words(tmp_path / "other", tiny.VOCABULARY - 3)
    with pytest.raises(
        ConfigError, match=r"the tokenizer of .* is not that of the run: 31 tokens against 28, 3 differ"
    ):
        opened(folder, tiny.make_rows(5), tmp_path / "store", tokenizer=tokenizer(tmp_path / "other"))
    assert not (tmp_path / "store").exists()


def test_a_folder_that_is_not_there_or_empty_is_refused(folder, tmp_path):
    kept = tokenizer(folder)
    with pytest.raises(ConfigError, match="reference: no such folder: nowhere"):
        opened("nowhere", tiny.make_rows(5), tmp_path, tokenizer=kept)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no model"):
        opened(tmp_path / "empty", tiny.make_rows(5), tmp_path, tokenizer=kept)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match="no tokenizer that can be loaded"):
        opened(bare, tiny.make_rows(5), tmp_path, tokenizer=kept)


def test_an_adapter_folder_is_read_on_its_base(folder, tmp_path):
    wrapped = tiny.lora(tiny.llama())
    wrapped.peft_config["default"].base_model_name_or_path = str(folder)
    wrapped.save_pretrained(tmp_path / "adapter")
    Words(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    rows = tiny.make_rows(9)
    losses = begun(tmp_path / "adapter", rows, tmp_path / "store")
    batch = batch_of(rows, IDS.clip(max=8).tolist())
    want = wanted(wrapped.eval(), batch)
    got = losses.of(batch, IDS.clip(max=8), want.mask_BT)
    torch.testing.assert_close(got, want.loss_BT, atol=0.005, rtol=0)
    plain = wanted(tiny.llama().eval(), batch)
    assert not torch.allclose(want.loss_BT, plain.loss_BT, atol=0.05)


def test_a_position_without_a_reference_loss_is_told(folder, tmp_path):
    rows = tiny.make_rows(21)
    losses = begun(folder, rows, tmp_path)
    batch = batch_of(rows, [6, 0])  # row 6 has no label at all
    with pytest.raises(DataError, match="has no reference loss"):
        losses.of(batch, np.array([6, 0]), torch.ones_like(batch["labels"], dtype=torch.bool))


def test_a_reference_with_fewer_tokens_than_the_tokenizer_is_refused(tmp_path):
    tiny.llama(vocab_size=20).save_pretrained(tmp_path / "small")
    Words(tmp_path / "small")
    with pytest.raises(ConfigError, match="knows 20 tokens, and the tokenizer has ids up to 30"):
        opened(tmp_path / "small", tiny.make_rows(5), tmp_path / "store")


@pytest.mark.parametrize("cache", [True, False])
def test_random_states_are_left_alone(folder, tmp_path, cache):
    rows = tiny.make_rows(9)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    losses = begun(folder, rows, tmp_path, cached=cache)
    batch = batch_of(rows, [0, 1])
    mask = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:].ne(-100)
    losses.of(batch, np.array([0, 1]), mask)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()


# ---------------------------------------------------------------- rows are scored when they are first asked for


PLANS = [np.array([3, 9, 3, 17, -1]), np.array([9, 2, 30, 31]), np.array([3, 2]), np.array([8, 17, 39])]


def test_each_row_is_scored_once_when_it_is_first_asked_for(model, folder, tmp_path, monkeypatch):
    rows, scored = tiny.make_rows(40), counted(monkeypatch)
    losses = begun(folder, rows, tmp_path, covered=np.zeros(0, dtype=np.int64))
    assert not scored
    for plan, new in zip(PLANS, ([3, 9, 17], [2, 30, 31], [], [8, 39]), strict=True):
        losses.cover(plan)
        assert sorted(scored) == new
        scored.clear()
        ids = plan[plan >= 0]
        batch = batch_of(rows, ids.tolist())
        want = wanted(model, batch)
        torch.testing.assert_close(losses.of(batch, ids, want.mask_BT), want.loss_BT, atol=0.005, rtol=0)
    assert losses.model is not None
    losses.cover(PLANS[0], last=True)  # stored by this very run: taken without a look at the model
    assert not scored
    assert losses.model is None


def test_a_row_that_was_not_asked_for_is_told(folder, tmp_path):
    rows = tiny.make_rows(21)
    losses = begun(folder, rows, tmp_path, covered=np.array([0, 4]))
    batch = batch_of(rows, [0, 5])
    mask = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:].ne(-100)
    with pytest.raises(DataError, match="has no reference loss"):
        losses.of(batch, np.array([0, 5]), mask)


def test_the_whole_pool_is_scored_where_it_is_asked_for(folder, tmp_path, monkeypatch):
    rows, scored = tiny.make_rows(40), counted(monkeypatch)
    losses = begun(folder, rows, tmp_path, covered=PLANS[0], whole=True)
    assert sorted(scored) == list(range(40))
    assert losses.model is None
    losses.cover(PLANS[1])
    assert len(scored) == 40


@pytest.mark.parametrize("store", ["same", "lost", "used by another run"])
def test_a_resumed_run_is_given_the_same_numbers(folder, tmp_path, monkeypatch, store):
    """Whatever lies in the store: the passes are those of the checkpoint."""
    rows = tiny.make_rows(40)
    straight = begun(folder, rows, tmp_path / "a", covered=PLANS[0])
    states = []
    for plan in PLANS[1:]:
        states.append(straight.state_dict())
        straight.cover(plan)
    at = tmp_path / ("a" if store == "same" else "b")
    if store == "used by another run":
        begun(folder, rows, at)  # all rows in one pass
        begun(folder, rows, at, covered=np.array([2, 3, 9, 17, 8, 39]))
    resumed = opened(folder, rows, at)
    resumed.load_state_dict(states[1])  # taken while the second plan was served
    scored = counted(monkeypatch)
    for number, (plan, new) in enumerate(zip(PLANS[1:], ([2, 3, 9, 17, 30, 31], [], [8, 39]), strict=True)):
        resumed.cover(plan)
        assert sorted(scored) == (new if store != "same" else sorted(set(new)) if number != 2 else [8, 39])
        scored.clear()
    ids = PLANS[3].tolist()
    assert np.array_equal(kept(resumed, ids), kept(straight, ids), equal_nan=True)
    assert np.array_equal(resumed.pass_of, straight.pass_of)


def test_a_pass_that_was_killed_goes_on_with_the_same_batches(folder, tmp_path, monkeypatch):
    rows, ids = tiny.make_rows(40), np.arange(0, 40, 2)
    straight = begun(folder, rows, tmp_path / "a", covered=ids)
    original, calls = module._scored, []

    def dying(sweep, turn, *rest):
        calls.extend(turn.positions)
        if len(calls) > 8:
            raise KeyboardInterrupt
        return original(sweep, turn, *rest)

    monkeypatch.setattr(module, "_scored", dying)
    with pytest.raises(KeyboardInterrupt):
        begun(folder, rows, tmp_path / "b", covered=ids)
    monkeypatch.setattr(module, "_scored", original)
    again = begun(folder, rows, tmp_path / "b", covered=ids)
    assert np.array_equal(kept(again, ids), kept(straight, ids), equal_nan=True)
