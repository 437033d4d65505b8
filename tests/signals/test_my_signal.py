"""A signal of a plugin: values, the store, and how deep the model's forward lies below the selector."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import dataflex
from dataflex.errors import UnsupportedError
from dataflex.registry import import_file
from dataflex.selectors.losses import LossSelector
from dataflex.signals.kinds import Signal, TokenLoss
from dataflex.signals.model_access import Corpus
from dataflex.signals.runner import SignalCache
from dataflex.signals.store import ArrayStore
from dataflex.testing import FakeSignals, contract, example_context, example_values
from tests.signals import tiny

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))
my_signal = pytest.importorskip("my_signal")
sys.path.remove(str(EXAMPLES))

ROWS = np.arange(15)


@pytest.fixture
def rows():
    return tiny.make_rows(15)


def runner(rows, model=None, **options):
    return tiny.asking(model or tiny.llama(), Corpus(dataset=rows, lengths=rows.lengths, identity="pool"), **options)


@torch.no_grad()
def test_values_equal_one_row_at_a_time(rows):
    model = tiny.llama().eval()
    found = runner(rows, model)(my_signal.GuessedTokens(top=2), ROWS)
    for row, value in zip(rows.rows, found, strict=True):
        best = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].topk(2).indices
        hits = [label in best[place - 1] for place, label in enumerate(row["labels"]) if place and label != -100]
        assert value == pytest.approx(np.mean(hits)) if hits else np.isnan(value)


def test_the_store_gives_values_again_without_a_pass(rows, tmp_path, monkeypatch):
    def stored():
        return runner(rows, cache=SignalCache(store=ArrayStore(tmp_path), model_identity=lambda: "model"))

    first = stored()(my_signal.GuessedTokens(), ROWS)
    other = stored()(my_signal.GuessedTokens(top=3), ROWS)
    assert not np.array_equal(first, other, equal_nan=True)
    monkeypatch.setattr(my_signal.GuessedTokens, "open", lambda *_: pytest.fail("a pass was run again"))
    np.testing.assert_array_equal(stored()(my_signal.GuessedTokens(), ROWS), first)


def test_the_store_asks_anew_when_the_file_of_a_signal_was_edited(rows, tmp_path):
    text = (EXAMPLES / "my_signal.py").read_text("utf-8")
    kinds = []
    for number, changed in enumerate((text, text, text.replace("guessed.sum(dim=1) /", "2 * guessed.sum(dim=1) /"))):
        file = tmp_path / f"copy{number}.py"
        file.write_text(changed)
        kinds.append(import_file(file, "plugin").GuessedTokens)
    cache = SignalCache(store=ArrayStore(tmp_path / "store"), model_identity=lambda: "model")
    asking, passes = runner(rows, cache=cache), []
    values = []
    for kind in kinds:
        asking.begin(len(passes))
        values.append(asking(kind(), ROWS))
        passes.append(asking.forward_rows)
    assert passes == [15, 0, 15]
    np.testing.assert_array_equal(values[2], 2 * values[0])


def test_a_signal_of_ones_own_does_not_share_a_name_with_a_built_in_one(rows):
    @dataclass(frozen=True, kw_only=True)
    class Lengths(Signal):
        name = "losses"

        def scorer(self, access):
            return lambda batch: batch["labels"].ne(-100).sum(dim=1)

    asking = runner(rows)
    losses, lengths = asking(TokenLoss(), ROWS), asking(Lengths(), ROWS)
    assert not np.array_equal(losses, lengths, equal_nan=True)
    assert Lengths.code
    assert not TokenLoss.code


def test_values_for_given_logits():
    logits = np.zeros((2, 3, 4))
    logits[0, 0, 1] = logits[0, 1, 2] = 5.0
    found = example_values(my_signal.GuessedTokens(), logits, [[0, 1, 3], [-100, -100, -100]])
    np.testing.assert_array_equal(found, [0.5, np.nan])


def test_a_signal_that_needs_whole_parameters_is_refused_where_they_are_partitioned(rows, monkeypatch):
    model = tiny.llama()
    monkeypatch.setattr(my_signal.GuessedTokens, "whole_parameters", True)
    assert np.isfinite(runner(rows, model)(my_signal.GuessedTokens(), ROWS[:3])).all()
    model.lm_head.weight.ds_shape = (1, 1)  # as DeepSpeed marks them
    with pytest.raises(UnsupportedError, match="guessed tokens need whole parameters"):
        runner(rows, model)(my_signal.GuessedTokens(), ROWS)


def test_its_selector_keeps_rows_that_are_seldom_guessed():
    signals = FakeSignals(np.ones(4), values={my_signal.GuessedTokens: [0.9, np.nan, 0.1, 0.5]})
    selection = my_signal.SeldomGuessed(my_signal.SeldomGuessed.Params()).select(
        np.arange(4), 2, example_context({"a": 4}, signals=signals)
    )
    assert selection.rows.tolist() == [2, 3]
    assert signals.asked == {"logits"}


def test_few_frames_lie_between_a_selector_and_the_model(rows):
    """The way of a question can be read: from ``select`` to the model's forward at most 8 frames of ours."""
    model, depths, ours = tiny.llama(), [], Path(dataflex.__file__).parent

    def count(*_args):
        frame, depth = sys._getframe(), 0
        while frame is not None and frame.f_code is not test_few_frames_lie_between_a_selector_and_the_model.__code__:
            depth += Path(frame.f_code.co_filename).is_relative_to(ours)
            frame = frame.f_back
        depths.append(depth)

    model.register_forward_pre_hook(count)
    selector = LossSelector(LossSelector.Params())
    selector.select(ROWS, 4, example_context({"a": 15}, signals=runner(rows, model), targets=()))
    assert len(depths) > 1
    assert 3 <= max(depths) <= 8


@dataclass(frozen=True, kw_only=True)
class Wide(Signal):
    """Two values a row, or as many as a hidden state has."""

    name = "wide"
    needs = "logits"
    whole: bool = False

    def tail(self, access):
        return (access.model.config.hidden_size,) if self.whole else (2,)


@dataclass(frozen=True, kw_only=True)
class Deep(Wide):
    """As many values as only a model tells."""

    def tail(self, access):
        return (access.model.get_input_embeddings().embedding_dim,)


def test_the_contract_makes_up_the_values_of_ones_own_signal():
    contract(my_signal.SeldomGuessed)
    signals = FakeSignals([1.0, np.nan, 2.0])
    found = signals(Wide(), np.array([2, 1]))
    assert found.shape == (2, 2)
    assert np.isnan(found).tolist() == [[False, False], [True, True]]
    assert signals(Wide(whole=True), np.arange(3)).shape == (3, 4)
    assert signals.asked == {"logits"}
    with pytest.raises(AssertionError, match=r"give values=\{Deep: \.\.\.\}"):
        signals(Deep(), np.arange(3))
    assert FakeSignals(np.ones(3), values={Deep: np.eye(3)})(Deep(), np.arange(3)).shape == (3, 3)
