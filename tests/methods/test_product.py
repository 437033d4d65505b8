"""Products of weighters against slow loops, and what cannot be multiplied."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from dataflex.config.build import method_block
from dataflex.errors import CheckpointError, ComponentError, ConfigError
from dataflex.method import RunFacts
from dataflex.registry import names
from dataflex.testing import example_batch, example_context
from dataflex.weighters.product import Factor, Product

LOSSES, TOKENS = [1.0, 2.5, 2.0, 0.5, 3.0], [3, 1, 4, 0, 2]
WEIGHTS = np.array([0.5, 2.0, 1.0, 3.0, 0.0])
ONES = {"sample_weight": np.ones(64)}


def product(*factors):
    return Product(Product.Params(of=factors))


def batch_with(columns=None, **options):
    batch = example_batch(LOSSES, TOKENS, **options)
    return dataclasses.replace(batch, columns={"sample_weight": WEIGHTS} if columns is None else columns)


def slow_share(excess, valid, share):
    """The positions of the ceil(share n) largest, the first among equals."""
    ranked = sorted(valid, key=lambda place: -excess[place])
    return set(ranked[: int(np.ceil(share * len(valid) - 1e-9))])


def test_ratios_multiply_under_a_weighted_mean():
    """Rows by a column, and of their tokens those that a reference finds easier: sum c m l / sum c m is left to do."""
    batch = batch_with()
    weighter = product(Factor.of("column"), Factor.of("slm", reference="r", keep=0.6))
    assert weighter.normalizer == "weight_sum"
    excess = (batch.loss_BT - batch.reference_BT).numpy()
    valid = [tuple(place) for place in batch.mask_BT.nonzero().tolist()]
    kept = slow_share(excess, valid, 0.6)
    wanted = [[WEIGHTS[i] * ((i, j) in kept) for j in range(4)] for i in range(5)]
    assert weighter.weigh(batch).tolist() == wanted


def test_shares_of_a_micro_batch_keep_their_sum():
    batch = batch_with()
    weighter = product(Factor.of("loss", warmup_steps=0, strategy="softmax_loss"), Factor.of("column"))
    assert weighter.normalizer == "num_sequences"
    h = [2 * (loss - 2.0) / 2.0 if n else None for loss, n in zip(LOSSES, TOKENS, strict=True)]  # losses 1 to 3
    raised = [0.0 if x is None else np.exp(x) * w for x, w in zip(h, WEIGHTS, strict=True)]
    np.testing.assert_allclose(weighter.weigh(batch), np.array(raised) / sum(raised), rtol=1e-6)


def test_ratios_do_not_change_the_size_of_the_step():
    """Under ``count`` a column's weights are first made 1 in the mean over tokens."""
    batch = batch_with()
    weighter = product(Factor.of("focal", gamma=1.0), Factor.of("column"))
    assert weighter.normalizer == "num_tokens"
    mean = sum(w * n for w, n in zip(WEIGHTS, TOKENS, strict=True)) / sum(TOKENS)
    wanted = [
        [(1 - np.exp(-loss)) * w / mean if j < n else 0.0 for j in range(4)]
        for loss, w, n in zip(LOSSES, WEIGHTS, TOKENS, strict=True)
    ]
    np.testing.assert_allclose(weighter.weigh(batch), wanted, rtol=1e-6)


@pytest.mark.parametrize("name", [name for name in names("weighter") if name not in ("none", "product")])
def test_a_factor_of_ones_changes_nothing(name):
    params = (
        {"reference": "r"}
        if name in ("slm", "rho", "ss_token", "pear")
        else {"warmup_steps": 0}
        if name == "loss"
        else {}
    )
    alone, both = Factor.of(name, **params).build(), product(Factor.of("column"), Factor.of(name, **params))
    rows = np.arange(5, dtype=np.int64)
    for weighter in (alone, both):
        ctx = example_context(columns=ONES, total_sequences=0)
        if weighter.due(0):
            weighter.prepare(ctx, rows)
    batch = batch_with(ONES)
    static = alone.static_weights(rows, ONES)
    wanted = alone.weigh(batch) if static is None else torch.from_numpy(static)
    got = both.static_weights(rows, ONES)
    if got is not None:
        np.testing.assert_allclose(got, wanted, rtol=1e-6)
    found = both.weigh(batch)
    assert found.shape == wanted.shape
    wanted = wanted.masked_fill(~batch.mask_BT if wanted.dim() > 1 else batch.tokens_B == 0, 0.0)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("step", [0, 4, 5])
def test_factors_have_warmups_of_their_own(step):
    weighter = product(Factor.of("column"), Factor.of("focal", warmup_steps=5))
    assert weighter.warmup(100) == 0
    assert weighter.static_weights(np.arange(5), {"sample_weight": WEIGHTS}) is None
    batch = batch_with(step=step)
    column = WEIGHTS / (np.array(WEIGHTS) @ TOKENS / sum(TOKENS))
    if step < 5:
        wanted = np.where(np.array(TOKENS) > 0, column, 0.0)
    else:
        wanted = column[:, None] * (1 - np.exp(-np.array(LOSSES)))[:, None] ** 2 * batch.mask_BT.numpy()
    np.testing.assert_allclose(weighter.weigh(batch), wanted, rtol=1e-6)


def test_a_warmup_of_shares_is_the_mean_of_the_sequences():
    weighter = product(Factor.of("column"), Factor.of("loss", warmup_steps=5))
    kept = np.where(np.array(TOKENS) > 0, WEIGHTS, 0.0)
    np.testing.assert_allclose(weighter.weigh(batch_with()), kept / kept.sum(), rtol=1e-6)
    (problem,) = weighter.check(RunFacts(total_steps=5))
    assert problem.key == "of[1].warmup_steps"
    assert problem.text.startswith("5 steps of plain loss take up the whole run of 5 steps")


def test_states_go_to_their_factors():
    factors = (Factor.of("adapt"), Factor.of("column"), Factor.of("joint_update_aware", pooling="position"))
    weighter, other = product(*factors[:2]), product(*factors[:2])
    weighter.prepare(example_context(columns=ONES), np.arange(5))
    state = weighter.state_dict()
    assert list(state) == ["0-adapt"]
    other.load_state_dict(state)
    batch = batch_with()
    assert torch.equal(other.weigh(batch), weighter.weigh(batch))
    with pytest.raises(CheckpointError, match="was given 2-adapt"):
        other.load_state_dict({"2-adapt": {}})


def test_a_factor_of_another_shape_is_named(monkeypatch):
    weighter = product(Factor.of("column"), Factor.of("focal"))
    monkeypatch.setattr(weighter.factors[1], "weigh", lambda batch: batch.loss_BT[:, :2])
    with pytest.raises(ComponentError, match=r"'focal' returned weights of shape \(5, 2\)"):
        weighter.weigh(batch_with())


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (["column"], r"dynamic\.weighter\.of: takes at least two weighters"),
        (["column", "focul"], r"of\[1\]: unknown factor 'focul'; did you mean 'focal'"),
        (["column", "product"], r"of\[1\]: unknown factor 'product'"),
        ([{"name": "loss"}, "focal"], "loss divides the loss by sequences, .* weights of tokens that focal gives"),
        (
            [{"name": "slm", "reference": "a"}, {"name": "token", "function": "excess", "reference": "b"}],
            "one reference model, but slm and token name different ones",
        ),
        (
            [{"name": "adapt", "targets": "t"}, {"name": "joint_update_aware", "targets": ["t"], "layer": 1}],
            "adapt and joint_update_aware embed sequences differently",
        ),
        ([{"name": "adapt", "targets": ["t"]}, {"name": "meta", "targets": ["u"]}], "share their targets"),
        (["column", "adapt"], "product needs a target"),
    ],
)
def test_what_cannot_be_multiplied(block, message):
    problems = []
    assert method_block("weighter", block, "dynamic.weighter", problems) is None
    with pytest.raises(ConfigError, match=message):
        raise ConfigError(problems)


def test_a_list_is_a_product():
    problems = []
    config = method_block("weighter", ["column", {"name": "adapt", "targets": "t"}], "dynamic.weighter", problems)
    assert problems == []
    assert (config.name, config.targets) == ("product", ("t",))
    assert [factor.name for factor in config.params.of] == ["column", "adapt"]
    assert config.requires.targets
    assert config.requires.columns == ("sample_weight",)
