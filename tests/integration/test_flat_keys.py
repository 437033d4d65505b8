"""Configurations of existing DataFlex run unchanged."""

from __future__ import annotations

import numpy as np
import pytest

COMPONENTS = """
selectors:
  random:
    name: random
    params: {cache_dir: saves/random, seed: 42, replacement: false}
  loss:
    name: loss
    params: {cache_dir: saves/loss, focus: medium, score_batch_size: 8}
mixers:
  static:
    name: static
    params: {proportions: [0.25, 0.75]}
weighters:
  loss:
    name: loss
    params: {strategy: linupper, delta: 1.0}
"""


@pytest.fixture
def components(run):
    path = run.folder / "components.yaml"
    path.write_text(COMPONENTS)
    return {"components_cfg_file": str(path)}


def planned(outcome):
    return [event for event in outcome.events if event["event"] == "planned"]


def test_selection(run, components):
    outcome = run(
        "out",
        dataset="alpha",
        train_type="dynamic_select",
        component_name="loss",
        warmup_step=2,
        update_step=3,
        update_times=2,
        num_train_epochs=2.0,
        **components,
    )
    assert len(outcome.series()) == 16  # two stages of 2 + 2 * 3 steps
    spans = [(e["kind"], e["start_step"], e["stop_step"]) for e in planned(outcome)]
    assert spans == [
        ("warmup", 0, 2),
        ("dynamic", 2, 5),
        ("dynamic", 5, 8),
        ("warmup", 8, 10),
        ("dynamic", 10, 13),
        ("dynamic", 13, 16),
    ]


def test_mixture(run, components):
    outcome = run(
        "out",
        dataset="alpha,beta",
        train_type="dynamic_mix",
        component_name="static",
        mixture_sample_rule="mixture",
        init_mixture_proportions=[0.5, 0.5],
        warmup_step=4,
        update_step=4,
        update_times=1,
        per_device_train_batch_size=4,
        **components,
    )
    counts = [list(event["domain_counts"].values()) for event in planned(outcome)]
    assert counts == [[8, 8], [4, 12]]


def test_fixed_mixture(run, components):
    outcome = run(
        "out",
        dataset="alpha,beta",
        train_type="dynamic_mix",
        component_name="static",
        static_mix=True,
        init_mixture_proportions=[0.75, 0.25],
        train_step=5,
        per_device_train_batch_size=4,
        **components,
    )
    assert [list(event["domain_counts"].values()) for event in planned(outcome)] == [[15, 5]]


def test_reweighting(run, components):
    settings = {"dataset": "alpha", "per_device_train_batch_size": 4}
    plain = run("plain", **settings, train_step=None, max_steps=6)
    outcome = run(
        "out", **settings, train_type="dynamic_weight", component_name="loss", warmup_step=2, train_step=6, **components
    )
    assert len(outcome.series()) == 6
    assert outcome.series()[:2] == pytest.approx(plain.series()[:2], rel=1e-6)  # the loss of the warm-up is plain
    assert not np.allclose(outcome.series()[3:], plain.series()[3:], rtol=1e-4)


def test_static_is_stock(run, components):
    stock = run("stock", max_steps=3)
    ours = run("ours", max_steps=3, train_type="static", component_name="loss", warmup_step=4, **components)
    assert ours.series() == stock.series()
    assert not (ours.folder / "dataflex").exists()


def test_the_evaluation_sets_of_less_are_one_target(run, components):
    path = run.folder / "components.yaml"
    path.write_text("selectors: {less: {name: less, params: {gradient_type: adam}}}\n")
    outcome = run(
        "out",
        dataset="alpha",
        eval_dataset="goal, held",
        train_type="dynamic_select",
        component_name="less",
        warmup_step=1,
        update_step=2,
        update_times=1,
        num_train_epochs=1.0,
        optim="adamw_torch",
        **components,
    )
    leaks = next(event for event in outcome.events if event["event"] == "run_started")["row_space"]["leaks"]
    assert {name: leak["of"] for name, leak in leaks.items()} == {"goal + held": 12}
    assert "influence on goal + held" in planned(outcome)[-1]["reason"]
