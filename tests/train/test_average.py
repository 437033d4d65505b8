"""The average of the last weights: against a plain mean, over a checkpoint, and put into the model for a while."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dataflex.config.schema import AverageConfig
from dataflex.state import load_state, save_state
from dataflex.train.average import WeightAverage

TOTAL = 13


def model_at(step: int, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(step)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1)).to(dtype)
    model[1].bias.requires_grad = False
    return model


def follow(model: torch.nn.Module, average: WeightAverage, first: int, last: int) -> None:
    for step in range(first, last + 1):
        with torch.no_grad():
            for own, other in zip(model.parameters(), model_at(step, own_type(model)).parameters(), strict=True):
                own.copy_(other)
        average.take(step)
        average.take(step)  # asked twice at the end of an epoch


def own_type(model: torch.nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def mean_of(steps: list[int], dtype: torch.dtype = torch.float32) -> list[np.ndarray]:
    each = [[p.detach().double().numpy() for p in model_at(step, dtype).parameters()] for step in steps]
    return [np.mean(values, axis=0) for values in zip(*each, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("last_steps", "every", "steps"),
    [(2, 1, [12, 13]), (5, 1, [9, 10, 11, 12, 13]), (6, 2, [9, 11, 13]), (7, 3, [7, 10, 13]), (13, 6, [1, 7, 13])],
)
def test_it_is_the_plain_mean_of_the_steps_counted_back_from_the_last(last_steps, every, steps, dtype):
    model = model_at(0, dtype)
    average = WeightAverage(model, AverageConfig(last_steps=last_steps, every=every), TOTAL)
    follow(model, average, 1, TOTAL)
    assert average.count == len(steps)
    final = [p.detach().clone() for p in model.parameters()]
    with average.in_place():
        for got, wanted in zip(list(model.parameters())[:3], mean_of(steps, dtype)[:3], strict=True):
            np.testing.assert_allclose(
                got.detach().double().numpy(), wanted, rtol=0.0, atol=1e-7 if dtype == torch.float32 else 4e-3
            )
        assert torch.equal(model[1].bias, final[3])  # not trained, so not averaged
    assert all(torch.equal(got, before) for got, before in zip(model.parameters(), final, strict=True))


def test_the_model_gets_its_weights_back_when_something_fails():
    model = model_at(0)
    average = WeightAverage(model, AverageConfig(last_steps=2), TOTAL)
    follow(model, average, 1, TOTAL)
    final = model[0].weight.detach().clone()

    def save():
        with average.in_place():
            assert not torch.equal(model[0].weight, final)
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        save()
    assert torch.equal(model[0].weight, final)


@pytest.mark.parametrize("stop", [4, 8, 10, 12])
def test_a_checkpoint_goes_on_bit_for_bit(stop, tmp_path):
    options = AverageConfig(last_steps=6, every=2)
    straight, model = model_at(0), model_at(0)
    one, two = WeightAverage(straight, options, TOTAL), WeightAverage(model, options, TOTAL)
    follow(straight, one, 1, TOTAL)
    follow(model, two, 1, stop)
    save_state(tmp_path, "average", two.state_dict())
    again = model_at(stop)
    resumed = WeightAverage(again, options, TOTAL)
    resumed.load_state_dict(load_state(tmp_path, "average"))
    follow(again, resumed, stop + 1, TOTAL)
    with one.in_place(), resumed.in_place():
        assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), again.parameters(), strict=True))
    assert bool(two.state_dict()) == (stop > 8)


def test_other_last_steps_begin_anew():
    model = model_at(0)
    average = WeightAverage(model, AverageConfig(last_steps=6), TOTAL)
    follow(model, average, 1, TOTAL)
    longer = WeightAverage(model, AverageConfig(last_steps=6), TOTAL + 20)
    longer.load_state_dict(average.state_dict())
    assert longer.count == 0
