"""An optimizer's update, split by domain: golden values of a quadratic, and all kinds of optimizers that are split."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dataflex.errors import UnsupportedError
from dataflex.signals.gradients.consumers import TargetVectors
from dataflex.train.updates import Updates

CURVATURE = torch.tensor([[2.0, 0.5], [0.5, 1.0]])
CENTRE = torch.tensor([1.0, -1.0])
ROWS = torch.tensor([[2.0, 0.0], [0.0, -2.0], [-1.0, 1.0]])
DECAY, BEFORE, CLIPPING = 3, 4, 5


class Quadratic:
    """Training on rows with the loss half |theta - row|^2 towards a target of quadratic loss; domains are the rows."""

    def __init__(self, start, make, clip=None):
        self.theta = torch.nn.Parameter(torch.tensor(start))
        self.optimizer, self.clip = make([self.theta]), clip
        self.updates = Updates({"theta": self.theta}, 3)

    def loss(self):
        off = self.theta.detach() - CENTRE
        return float(off @ CURVATURE @ off / 2)

    def gradient(self):
        return CURVATURE @ (self.theta.detach() - CENTRE)

    def step(self, rows):
        self.updates.begin()
        shares = (self.theta.detach() - ROWS[list(rows)]) / len(rows)
        self.theta.grad = shares.sum(dim=0)
        self.updates.shares.tensors["theta"].index_add_(0, torch.tensor(rows), shares)
        if self.updates.is_open:
            self.updates.summed()
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_([self.theta], self.clip)
        self.optimizer.step()

    def products(self, vector):
        return (self.updates.moved.tensors["theta"] @ vector).tolist()


def sgd(**options):
    return lambda parameters: torch.optim.SGD(parameters, lr=0.1, **options)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=0.05, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)


@pytest.mark.parametrize(
    ("clip", "credits", "measured"), [(None, (-0.15, 0.1), -0.045), (0.2, (-0.042426, 0.028284), -0.013742)]
)
def test_golden_step_of_sgd(clip, credits, measured):
    run = Quadratic([0.0, 0.0], sgd(), clip)
    run.updates.open(run.optimizer, afresh=True)
    before, start = run.loss(), run.gradient()
    run.step((0, 2))
    first = run.products(start)
    np.testing.assert_allclose([first[0], first[2]], credits, atol=1e-6)
    assert first[1] == first[DECAY] == first[BEFORE] == 0.0
    taken_off = 0.0 if clip is None else sum(credits) * (1 - 2**0.5 / 2 / 0.2)
    assert first[CLIPPING] == pytest.approx(taken_off, abs=1e-5)
    middle = (start + run.gradient()) / 2
    if clip is None:
        np.testing.assert_allclose(run.theta.detach(), (0.05, 0.05), atol=1e-6)
        np.testing.assert_allclose(middle, (-1.4375, 0.5375), atol=1e-6)
        np.testing.assert_allclose(run.products(middle)[:3], (-0.14375, 0.0, 0.09875), atol=1e-6)
    assert sum(run.products(middle)[:3]) == pytest.approx(measured, abs=1e-6)
    assert run.loss() - before == pytest.approx(measured, abs=1e-6)


def test_golden_steps_of_sgd():
    run = Quadratic([0.0, 0.0], sgd())
    run.updates.open(run.optimizer, afresh=True)
    before, start, fresh = run.loss(), run.gradient(), np.zeros(3)
    for rows in ((0, 2), (1, 2), (0, 1)):
        vectors = TargetVectors(tensors={"theta": run.gradient()[None]})
        direction = run.updates.directions(vectors).tensors["theta"][0]
        shares = (run.theta.detach() - ROWS[list(rows)]) / 2
        np.add.at(fresh, list(rows), -(shares @ direction).numpy())
        run.step(rows)
    np.testing.assert_allclose(run.products(start)[:3], (-0.30025, -0.09775, 0.2025), atol=1e-6)
    assert fresh.sum() == pytest.approx(-0.20701, abs=1e-6)
    middle = (start + run.gradient()) / 2
    assert sum(run.products(middle)[:3]) == pytest.approx(-0.185910, abs=1e-6)
    assert run.loss() - before == pytest.approx(-0.185910, abs=1e-6)
    np.testing.assert_allclose(run.theta.detach(), (0.0955, -0.1045), atol=1e-6)


def test_golden_steps_of_adamw():
    run = Quadratic([0.5, 0.5], adamw)
    for rows in ((0, 1), (0, 2)):
        run.step(rows)
    np.testing.assert_allclose(run.theta.detach(), (0.574661, 0.413009), atol=2e-6)
    run.updates.open(run.optimizer, afresh=True)
    before, start, credits = run.loss(), run.gradient(), np.zeros(3)
    vectors = TargetVectors(tensors={"theta": start[None]})
    direction = run.updates.directions(vectors).tensors["theta"][0] / 0.05
    np.testing.assert_allclose(direction, (-0.406961, 1.133844), atol=2e-6)
    for rows in ((1, 2), (0, 1), (0, 2)):
        shares = (run.theta.detach() - ROWS[list(rows)]) / 2
        np.add.at(credits, list(rows), -0.05 * (shares @ direction).numpy())
        run.step(rows)
    np.testing.assert_allclose(credits, (-0.049418, -0.124196, 0.067409), atol=2e-6)
    first = run.products(start)
    assert first[DECAY] == pytest.approx(-0.005485, abs=2e-6)
    assert sum(first[:3]) + first[BEFORE] == pytest.approx(-0.043495 - 0.084020 - 0.005158, abs=3e-6)
    assert sum(first[:CLIPPING]) == pytest.approx(-0.138159, abs=2e-6)
    assert first[BEFORE] != 0.0
    middle = (start + run.gradient()) / 2
    assert sum(run.products(middle)[:CLIPPING]) == pytest.approx(-0.127482, abs=2e-6)
    np.testing.assert_allclose(run.theta.detach(), (0.537991, 0.293505), atol=2e-6)
    assert run.loss() - before == pytest.approx(-0.127482, abs=2e-6)


def two_groups(kind, **options):
    def make(parameters):
        extra = [torch.nn.Parameter(torch.ones(2))]
        return kind([{"params": extra, "lr": 9.0}, {"params": parameters, **options}], lr=0.05)

    return make


OPTIMIZERS = {
    "sgd": sgd(),
    "momentum": sgd(momentum=0.9, dampening=0.3, weight_decay=0.2),
    "nesterov": sgd(momentum=0.9, nesterov=True, weight_decay=0.2),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.05, weight_decay=0.3),
    "adamw": adamw,
    "group": two_groups(torch.optim.AdamW, lr=0.02, weight_decay=0.5, betas=(0.8, 0.9)),
}


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_lines_add_up_to_the_movement(name, clip):
    run = Quadratic([0.5, 0.5], OPTIMIZERS[name], clip)
    run.step((0, 1))  # so that there is something in the moments
    start, momentum = run.theta.detach().clone(), "momentum" in name or name == "nesterov" or "adam" in name
    run.updates.open(run.optimizer, afresh=True)
    for rows in ((1, 2), (0, 1), (0, 0), (2, 1)):
        run.step(rows)
    moved = run.updates.moved.tensors["theta"]
    torch.testing.assert_close(moved[:CLIPPING].sum(dim=0), run.theta.detach() - start, rtol=1e-5, atol=1e-6)
    assert bool(moved[BEFORE].any()) == (momentum or name == "group")
    assert bool(moved[DECAY].any()) == (name != "sgd")
    assert bool(moved[CLIPPING].any()) == (clip is not None)


def test_a_parameter_without_a_gradient_stays():
    run = Quadratic([0.5, 0.5], adamw)
    run.updates.open(run.optimizer, afresh=True)
    run.step((0, 1))
    moved = run.updates.moved.tensors["theta"].clone()
    run.optimizer.zero_grad()
    run.optimizer.step()
    assert torch.equal(run.updates.moved.tensors["theta"], moved)


def test_a_step_that_is_undone_counts_nothing():
    run = Quadratic([0.5, 0.5], adamw)
    factors = []
    run.updates.taken = factors.append
    run.updates.open(run.optimizer, afresh=True)
    run.theta.grad = torch.tensor([float("inf"), 0.0])
    for hook in run.optimizer._optimizer_step_pre_hooks.values():  # fused optimizers skip the update inside
        hook(run.optimizer, (), {})
    assert not factors
    assert not run.updates.moved.tensors["theta"].any()


def test_parameters_that_hooks_saw_a_part_of_do_not_count_in_the_factor():
    parameters = {name: torch.nn.Parameter(torch.ones(2)) for name in ("a", "b", "unseen", "half")}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
    updates, factors = Updates(parameters, 1), []
    updates.taken = factors.append
    updates.open(optimizer, afresh=True)
    for name, parameter in parameters.items():
        parameter.grad = torch.tensor([3.0, 4.0])
        updates.shares.tensors[name][0] = parameter.grad * {"unseen": 0.0, "half": 1.0}.get(name, 2.0)
    optimizer.step()
    assert factors == [0.5]


def test_other_optimizers_are_refused():
    theta = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(UnsupportedError, match="Adagrad"):
        Updates({"theta": theta}, 1).open(torch.optim.Adagrad([theta]), afresh=True)


def test_the_state_is_whole():
    runs = [Quadratic([0.5, 0.5], adamw) for _ in range(2)]
    for run in runs:
        run.updates.open(run.optimizer, afresh=True)
        run.step((0, 1))
    state = runs[0].updates.state_dict()
    again = Updates({"theta": runs[0].theta}, 3)
    runs[0].updates.close()
    again.load_state_dict(state)
    again.open(runs[0].optimizer, afresh=False)
    runs[0].updates = again
    for run in runs:
        run.step((1, 2))
    assert torch.equal(*(run.updates.moved.tensors["theta"] for run in runs))
