"""Pairs: log-probabilities of a policy and its reference, and gradients of the loss that LLaMA-Factory trains on."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dataflex.errors import UnsupportedError
from dataflex.signals.kinds import GradientNorms, GradientScores, PreferenceLogps
from dataflex.signals.model_access import Corpus
from dataflex.signals.preferences import Preferences, pair_lengths, pair_loss
from dataflex.signals.runner import SignalCache
from dataflex.signals.specs import PreferenceLoss
from dataflex.signals.store import ArrayStore
from tests.signals import tiny

LOSSES = {
    "sigmoid": PreferenceLoss(beta=0.3),
    "smoothed": PreferenceLoss(beta=0.3, label_smoothing=0.2),
    "with sft": PreferenceLoss(beta=0.3, sft=0.5),
    "hinge": PreferenceLoss(kind="hinge", beta=0.2),
    "ipo": PreferenceLoss(kind="ipo", beta=0.7),
    "orpo": PreferenceLoss(kind="orpo", beta=0.4),
    "simpo": PreferenceLoss(kind="simpo", beta=2.0, gamma=0.5),
}


class Pairs(tiny.Rows):
    """Rows of pairs; the third has a chosen answer without a label."""

    def __init__(self, count, seed=0):
        chosen = [row for row in tiny.make_rows(4 * count, seed=seed, low=4).rows if max(row["labels"]) >= 0]
        rejected = [row for row in tiny.make_rows(4 * count, seed=seed + 1, low=4).rows if max(row["labels"]) >= 0]
        rows = [{"chosen": chosen[i], "rejected": rejected[i]} for i in range(count)]
        if count > 2:
            rows[2]["chosen"] = {**chosen[2], "labels": [-100] * len(chosen[2]["labels"])}
        super().__init__(rows)

    @property
    def lengths(self):
        return np.array([len(row["chosen"]["input_ids"]) for row in self.rows], dtype=np.int64)


def collate(features):
    return tiny.collate([feature[part] for feature in features for part in ("chosen", "rejected")])


def runner_of(model, rows, loss=None, *, reference=None, goal=None, cache=None, identity="one"):
    @contextlib.contextmanager
    def opened():
        with model.disable_adapter() if reference is None else contextlib.nullcontext():
            yield reference or model

    pairs = Preferences(collate=collate, reference=opened, identity=lambda: identity, loss=loss or PreferenceLoss())
    targets = {} if goal is None else {"goal": Corpus(dataset=goal, lengths=goal.lengths, identity="goal")}
    train = Corpus(dataset=rows, lengths=rows.lengths, identity="rows")
    return tiny.asking(model, train, targets, preferences=pairs, cache=cache)


def slow_logps(model, answer):
    """Log-probability of the labelled tokens of one sequence, and their number, in float64."""
    logits = model(input_ids=torch.tensor([answer["input_ids"]])).logits[0].double()
    wanted = [(place - 1, label) for place, label in enumerate(answer["labels"]) if place and label >= 0]
    found = [torch.log_softmax(logits[place], dim=-1)[label] for place, label in wanted]
    return sum(found, torch.zeros((), dtype=torch.float64)), len(found)


@torch.no_grad()
def slow_values(model, rows):
    model.eval()
    each = [[slow_logps(model, row[part]) for part in ("chosen", "rejected")] for row in rows.rows]
    return np.array([[(float(sums), tokens) for sums, tokens in pair] for pair in each])


def test_log_probabilities_of_both_answers(tmp_path):
    """Of the policy with its adapters, and of the reference without; the reference is asked once for each row."""
    model, rows = tiny.lora(), Pairs(9)
    policy = slow_values(model, rows)
    with model.disable_adapter():
        reference = slow_values(model, rows)
    runner, everyone = runner_of(model, rows), np.arange(9)
    before = tiny.snapshot(model)
    found = runner(PreferenceLogps(), everyone)
    some = runner(PreferenceLogps(of="reference"), everyone[::2])
    tiny.assert_same(before, tiny.snapshot(model))
    assert found.shape == (9, 2, 2)
    known = policy[:, :, 1].min(axis=1) > 0
    assert not known.all()
    np.testing.assert_allclose(found[known], policy[known], rtol=1e-5)
    assert np.isnan(found[~known][:, :, 0]).all()
    np.testing.assert_allclose(some[known[::2]], reference[::2][known[::2]], rtol=1e-5)
    assert not np.allclose(policy[known], reference[known], rtol=1e-2)
    paid = runner.forward_rows
    assert paid == 2 * (9 + 5)
    assert np.array_equal(runner(PreferenceLogps(of="reference"), everyone)[::2], some, equal_nan=True)
    assert runner.forward_rows == paid + 2 * 4
    taken = runner_of(model, rows)
    taken.load_state_dict(runner.state_dict())
    assert np.array_equal(taken(PreferenceLogps(of="reference"), everyone[::2]), some, equal_nan=True)
    assert taken.forward_rows == 0


def test_values_of_a_reference_are_stored_by_its_identity(tmp_path):
    model, rows, everyone = tiny.lora(), Pairs(5), np.arange(5)
    cache = SignalCache(store=ArrayStore(tmp_path), model_identity=lambda: "policy")
    first = runner_of(model, rows, cache=cache)
    values = first(PreferenceLogps(of="reference"), everyone)
    again = runner_of(model, rows, cache=replace(cache, _kept={}))
    assert np.array_equal(again(PreferenceLogps(of="reference"), everyone), values, equal_nan=True)
    assert again.forward_rows == 0
    other = runner_of(model, rows, cache=replace(cache, _kept={}), identity="two")
    other(PreferenceLogps(of="reference"), everyone)
    assert other.forward_rows == 10


def test_rows_that_are_no_pairs_are_refused():
    rows = tiny.make_rows(3)
    runner = tiny.asking(tiny.llama(), Corpus(dataset=rows, lengths=rows.lengths))
    with pytest.raises(UnsupportedError, match="under stage dpo only"):
        runner(PreferenceLogps(), np.arange(3))


def test_lengths_are_those_of_the_longer_answer():
    from datasets import Dataset

    lengths = np.array([2, 4])
    given = Dataset.from_dict({"chosen_input_ids": [[1, 2], [1, 2, 3, 4]], "rejected_input_ids": [[1, 2, 3], [1]]})
    assert pair_lengths(given, lengths).tolist() == [6, 8]
    trl = Dataset.from_dict({"prompt_ids": [[1], [1, 2]], "chosen_ids": [[1], [2]], "rejected_ids": [[1, 2], [3]]})
    assert pair_lengths(trl, np.array([1, 1])).tolist() == [6, 6]
    assert pair_lengths(object(), lengths).tolist() == [4, 8]


def their_trainer(loss, reference):
    """LLaMA-Factory's trainer, as far as its loss goes; of TRL's losses it asks for sigmoid alone, here for each."""
    from llamafactory.train.dpo.trainer import CustomDPOTrainer

    trainer = object.__new__(CustomDPOTrainer)
    compares = loss.kind not in ("orpo", "simpo")
    trainer.__dict__.update(
        finetuning_args=SimpleNamespace(use_ref_model=compares),
        accelerator=SimpleNamespace(device=torch.device("cpu"), unwrap_model=lambda model: model),
        **{"beta": loss.beta, "loss_type": loss.kind, "label_smoothing": loss.label_smoothing, "ref_model": reference},
        **{"simpo_gamma": loss.gamma, "ftx_gamma": loss.sft, "bco_gemma": 0.0, "ld_alpha": None},
        **{"reference_free": False, "f_divergence_type": "reverse_kl", "f_divergence_params": None},
    )
    trainer.dpo_loss = functools.partial(CustomDPOTrainer.dpo_loss, trainer, loss_type=loss.kind)
    return trainer


def their_batch(row):
    return tiny.collate([row["chosen"], row["rejected"]])  # one pair: chosen ones first, rejected ones after them


def their_gradient(trainer, model, row):
    """Gradient of the trainer's own loss of one pair, all parameters one after the other, and the loss."""
    loss, _ = trainer.get_batch_loss_metrics(model, their_batch(row))
    named = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(loss, named)
    return torch.cat([gradient.flatten() for gradient in found]), float(loss.detach())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), [(name, "lora") for name in LOSSES] + [("smoothed", "full")])
def test_gradients_are_those_of_the_trainers_own_loss(kind, name):
    """Products with a target's gradient and norms, pair by pair, against autograd of LLaMA-Factory's loss."""
    loss = LOSSES[name]
    model = tiny.lora() if kind == "lora" else tiny.llama(attention_dropout=0.0)
    model.eval()
    other = None if kind == "lora" else tiny.llama(attention_dropout=0.0, initializer_range=0.25).eval()
    trainer = their_trainer(loss, other)
    rows, goal = Pairs(6), Pairs(2, seed=9)
    runner, everyone = runner_of(model, rows, loss, reference=other, goal=goal), np.arange(6)
    options = {"precondition": "none", "normalize": False, "mean_of_cosines": False}
    before = tiny.snapshot(model)
    scores = runner(GradientScores(targets=("goal",), **options), everyone)
    norms = runner(GradientNorms(precondition="none"), everyone)
    tiny.assert_same(before, tiny.snapshot(model))
    aim = torch.stack([their_gradient(trainer, model, row)[0] for row in goal.rows]).mean(dim=0)
    known = [place for place in range(6) if place != 2]
    expected = [their_gradient(trainer, model, rows.rows[place])[0] for place in known]
    assert np.isnan(norms[2])
    assert np.isnan(scores[2]).all()
    found = torch.from_numpy(scores[known, 0])
    wanted = torch.stack([gradient @ aim for gradient in expected])
    size = torch.stack([gradient.norm() for gradient in expected])
    scale = (size * aim.norm()).clamp(min=1e-6)  # a hinge has no gradient beyond its margin
    torch.testing.assert_close(found / scale, wanted / scale, rtol=0, atol=2e-5)
    torch.testing.assert_close(torch.from_numpy(norms[known]), size, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_the_trainers_own(name):
    loss, model, rows = LOSSES[name], tiny.lora().eval(), Pairs(4)
    trainer = their_trainer(loss, None)
    for place in (0, 1, 3):
        values = [torch.tensor(slow_values(model, Pairs(4)))[place : place + 1]]
        with model.disable_adapter():
            values.append(torch.tensor(slow_values(model, rows))[place : place + 1])
        policy, reference = (each[:, :, 0] for each in values)
        found = pair_loss(loss, policy, values[0][:, :, 1], reference if loss.compares else None)
        assert float(found) == pytest.approx(their_gradient(trainer, model, rows.rows[place])[1], rel=1e-5)


def test_the_losses_of_the_specification():
    policy, reference, tokens = torch.tensor([[-20.0, -30.0]]), torch.tensor([[-22.0, -27.0]]), torch.tensor([[10, 20]])
    assert float(pair_loss(PreferenceLoss(beta=0.1), policy, tokens, reference)) == pytest.approx(0.474077, abs=5e-7)
    ipo = pair_loss(PreferenceLoss(kind="ipo", beta=0.1), policy, tokens, reference)
    assert float(ipo) == pytest.approx(21.6225, abs=5e-5)


def test_a_loss_that_couples_pairs_is_refused():
    runner = runner_of(tiny.lora(), Pairs(3), PreferenceLoss(unknown="pref_loss: not known under kto_pair"))
    with pytest.raises(UnsupportedError, match="kto_pair"):
        runner(GradientNorms(precondition="none"), np.arange(3))
