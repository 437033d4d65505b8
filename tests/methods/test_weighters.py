"""Weighters against oracles, the sheets' numbers and their edge cases."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dataflex.errors import ComponentError
from dataflex.method import RunFacts
from dataflex.testing import example_batch
from dataflex.weighters.loss import STRATEGIES, LossWeighter, Softness, loss_weights, scheduled
from dataflex.weighters.rows import Column, NoWeights
from tests.methods.oracles import oracle_loss_weights
from tests.rounding import printed

losses_and_tokens = st.lists(st.tuples(st.floats(0, 20, width=32), st.integers(0, 50)), min_size=1, max_size=16).map(
    lambda pairs: tuple(list(column) for column in zip(*pairs, strict=True))
)


def weights(losses, tokens=None, strategy="linupper", delta=1.0, r=1.0):
    valid = torch.tensor([1] * len(losses) if tokens is None else tokens) > 0
    return loss_weights(torch.tensor(losses, dtype=torch.float32), valid, strategy, delta, r)


def loss_weighter(**params):
    return LossWeighter(LossWeighter.Params(**{"warmup_steps": 0, **params}))


# ---------------------------------------------------------------- none


def test_none_is_ones():
    weighter = NoWeights(NoWeights.Params())
    assert weighter.neutral
    assert weighter.static_weights(np.arange(3), {}).tolist() == [1.0, 1.0, 1.0]


# ---------------------------------------------------------------- column


def column(values, rows, name="sample_weight", **params):
    return Column(Column.Params(**params)).static_weights(np.array(rows, dtype=np.int64), {name: np.array(values)})


def test_column_reads_the_weights_of_the_rows_asked_for():
    got = column([0.5, 2.0, 0.0, 7.0], [3, 0, 2])
    assert got.dtype == np.float32
    assert got.tolist() == [7.0, 0.5, 0.0]
    assert column([1, 2, 3], [2, 2]).tolist() == [3.0, 3.0]
    assert column([True, False], [0, 1]).tolist() == [1.0, 0.0]
    assert column(np.array([1, 0.5], dtype=object), [0, 1]).tolist() == [1.0, 0.5]


def test_column_asks_for_its_column_to_ride_along():
    assert Column(Column.Params(column="w")).requires().columns == ("w",)
    assert Column(Column.Params(normalizer="num_tokens")).normalizer == "num_tokens"


@pytest.mark.parametrize(
    ("values", "bad"),
    [
        ([1.0, 0.0, 2.5], [False, False, False]),
        ([1.0, -0.25, 1.0], [False, True, False]),
        ([1.0, 1.0, math.nan], [False, False, True]),
        ([math.inf, 1.0, -1.0], [True, False, True]),
        ([1e300, 1.0, 1.0], [True, False, False]),
        (np.array([1.0, None, 1.0], dtype=object), [False, True, False]),
        (np.array([1.0, 2.0, "heavy"], dtype=object), [False, False, True]),
        (["1.0", "2.0", "3.0"], [True, True, True]),
    ],
)
def test_column_refuses_what_is_no_weight(values, bad):
    refused, wanted = Column(Column.Params()).refused_values("sample_weight", np.array(values))
    assert refused.tolist() == bad
    assert wanted == "weights must be finite numbers, 0 or more"


# ---------------------------------------------------------------- loss: the formula


@pytest.mark.parametrize(
    ("strategy", "r", "expected"),
    [
        ("linupper", 1.0, (0.155362, 0.422319, 0.422319)),
        ("linupper", 0.4, (0.039424, 0.480288, 0.480288)),
        ("linupper", 100.0, (0.331115, 0.334443, 0.334443)),
        ("quadratic", 1.0, (0.211942, 0.576117, 0.211942)),
        ("extremes", 1.0, (0.422319, 0.155362, 0.422319)),
        ("upper", 1.0, (0.186324, 0.307196, 0.506480)),
        ("softmax_loss", 1.0, (0.090031, 0.244728, 0.665241)),
    ],
)
def test_numbers_of_the_sheet(strategy, r, expected):
    np.testing.assert_allclose(weights([1.0, 2.0, 3.0], strategy=strategy, r=r), expected, rtol=0, atol=printed(6, 8))


def test_losses_of_the_sheet():
    loss = torch.tensor([1.0, 2.0, 3.0])
    assert (weights([1.0, 2.0, 3.0]) * loss).sum().item() == pytest.approx(2.266956, abs=printed(6, 8, 3.0))
    batch = example_batch([1.0, 2.0, 3.0], [10, 20, 10])
    scaled = loss_weighter(length_norm="paper_hf").weigh(batch)
    assert (scaled * loss).sum().item() == pytest.approx(2.333695, abs=printed(6, 8, 3.0))


@given(losses_and_tokens, st.sampled_from(STRATEGIES), st.floats(0.25, 4.0), st.floats(0.2, 200.0))
def test_formula_equals_the_oracle(batch, strategy, delta, r):
    losses, tokens = batch
    got = weights(losses, tokens, strategy, delta, r).tolist()
    spread = max(losses) - min(losses)
    if spread > 1e-5 or spread == 0:  # in between, the short cut is a matter of rounding
        np.testing.assert_allclose(got, oracle_loss_weights(losses, tokens, strategy, delta, r), rtol=2e-4, atol=1e-6)


@given(losses_and_tokens, st.sampled_from(STRATEGIES))
def test_weights_sum_to_one_over_the_valid_sequences_only(batch, strategy):
    losses, tokens = batch
    got = weights(losses, tokens, strategy)
    assert got.dtype == torch.float32
    assert (got >= 0).all()
    assert got[torch.tensor(tokens) == 0].sum() == 0
    assert got.sum().item() == pytest.approx(1.0 if any(tokens) else 0.0, abs=1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_equal_losses_weigh_alike(strategy):
    assert weights([2.5] * 4, strategy=strategy).tolist() == [0.25] * 4
    # A range of rounding noise: the published formula would make weights of it.
    assert weights([2.5, 2.5 + 5e-7, 2.5], strategy=strategy).tolist() == pytest.approx([1 / 3] * 3)
    assert weights([3.0], strategy=strategy).tolist() == [1.0]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_weights_follow_a_permutation_and_ignore_shift_and_scale(strategy):
    losses = [1.0, 2.5, 0.5, 4.0, 3.0]
    order = [3, 0, 4, 1, 2]
    got = weights(losses, strategy=strategy)
    torch.testing.assert_close(weights([losses[i] for i in order], strategy=strategy), got[order])
    torch.testing.assert_close(weights([8.0 * loss + 16.0 for loss in losses], strategy=strategy), got)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_row_without_tokens_changes_nothing_even_if_its_loss_is_nan(strategy):
    got = weights([1.0, math.nan, 2.0, 3.0], [4, 0, 4, 4], strategy)
    assert got[1] == 0
    torch.testing.assert_close(got[[0, 2, 3]], weights([1.0, 2.0, 3.0], strategy=strategy))
    assert weights([math.nan, 0.0], [0, 0], strategy).tolist() == [0.0, 0.0]


def test_infinite_r_is_uniform():
    assert weights([1.0, 2.0, 9.0, 9.0], [1, 1, 1, 0], r=math.inf).tolist() == pytest.approx([1 / 3] * 3 + [0.0])


def test_losses_in_bf16_are_weighed_in_fp32_in_the_same_order():
    losses = torch.linspace(1.0, 3.0, 9).bfloat16()
    got = loss_weights(losses, torch.ones(9, dtype=torch.bool), "softmax_loss", 1.0, 1.0)
    assert got.dtype == torch.float32
    assert got.argsort().tolist() == list(range(9))
    expected = oracle_loss_weights(losses.double().tolist(), [1] * 9, "softmax_loss")
    np.testing.assert_allclose(got, expected, atol=1e-3)


def test_no_gradient_flows_through_the_weights():
    losses = torch.tensor([1.0, 2.0], requires_grad=True)
    assert not loss_weights(losses, torch.ones(2, dtype=torch.bool), "linupper", 1.0, 1.0).requires_grad


# ---------------------------------------------------------------- loss: the weighter


@pytest.mark.parametrize("length_norm", ["none", "paper_hf"])
def test_ranks_see_slices_of_the_single_process_weights(length_norm):
    losses, tokens = [1.0, 2.0, 3.0, 0.0, 2.5, 5.0], [3, 9, 4, 0, 7, 1]
    weighter = loss_weighter(length_norm=length_norm)
    alone = weighter.weigh(example_batch(losses, tokens))
    ranks = [weighter.weigh(example_batch(losses, tokens, rank=rank, world=2)) for rank in range(2)]
    torch.testing.assert_close(torch.cat(ranks), alone, rtol=0, atol=0)


def test_length_norm_is_nothing_for_equal_lengths():
    batch = example_batch([1.0, 2.0, 3.0, 0.0], [5, 5, 5, 0])
    torch.testing.assert_close(loss_weighter(length_norm="paper_hf").weigh(batch), loss_weighter().weigh(batch))


def test_a_loss_that_is_not_finite_is_an_error_on_every_rank():
    for rank, which in enumerate((r"rows 1", r"1 sequences of other ranks")):
        batch = example_batch([1.0, math.nan, 2.0, 3.0], rank=rank, world=2, step=7)
        with pytest.raises(ComponentError, match=f"the loss of {which} at step 7 is not finite"):
            loss_weighter().weigh(batch)


def test_the_warmup_keeps_the_plain_loss_at_first():
    weighter = loss_weighter(warmup_steps=3)
    assert [weighter.active(step, 10) for step in (0, 2, 3, 9)] == [False, False, True, True]
    assert loss_weighter().active(0, 10)


def test_the_warmup_by_default_is_1000_steps_or_a_twentieth_of_the_run():
    weighter = loss_weighter(warmup_steps=None)
    assert [weighter.warmup(total) for total in (1001, 20_000, 100_000)] == [1000, 1000, 5000]


@pytest.mark.parametrize("steps", [None, 1000])
def test_a_warmup_over_the_whole_run_is_refused(steps):
    (problem,) = loss_weighter(warmup_steps=steps).check(RunFacts(total_steps=600))
    assert problem.key == "warmup_steps"
    assert re.match(r"1000 steps of plain loss.* of 600 steps, .*write warmup_steps: 30", problem.text)
    assert not list(loss_weighter(warmup_steps=steps).check(RunFacts(total_steps=60_000)))


def test_r_follows_its_schedule():
    knots = ((100, 10.0), (200, 1.0))
    assert [scheduled(s, 100.0, knots, "step") for s in (0, 99, 100, 199, 200, 999)] == [100, 100, 10, 10, 1, 1]
    assert [scheduled(s, 100.0, knots, "linear") for s in (0, 50, 100, 150, 999)] == [100, 55, 10, 5.5, 1]
    got = [scheduled(s, 100.0, knots, "exponential") for s in (0, 50, 100, 150, 999)]
    assert got == pytest.approx([100, 10**1.5, 10, 10**0.5, 1])
    assert scheduled(5, 0.4, (), "exponential") == 0.4


def test_the_weighter_uses_the_r_of_the_step():
    weighter = loss_weighter(r=100.0, r_schedule=(Softness(step=10, r=0.4),))
    losses = [1.0, 2.0, 3.0]
    np.testing.assert_allclose(weighter.weigh(example_batch(losses, step=9)), weights(losses, r=100.0))
    np.testing.assert_allclose(weighter.weigh(example_batch(losses, step=10)), weights(losses, r=0.4))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"r_schedule": ((0, 1.0),)}, "r_schedule: step 0 must come after step 0"),
        ({"r_schedule": ((10, 1.0), (10, 2.0))}, "r_schedule: step 10 must come after step 10"),
        ({"r_schedule": ((10, math.inf),)}, "r_schedule: every r, the first one included, must be finite"),
        ({"r_schedule": ((10, 1.0),), "r": math.inf}, "r_schedule: every r, the first one included, must be finite"),
    ],
)
def test_a_broken_schedule_is_refused(params, message):
    knots = tuple(Softness(step=step, r=r) for step, r in params["r_schedule"])
    with pytest.raises(ValueError, match=message):
        LossWeighter.Params(**{**params, "r_schedule": knots})
