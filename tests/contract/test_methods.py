"""What every registered method must satisfy, whatever it does."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch

from dataflex.config.build import half_read, method_block
from dataflex.contract import BASES
from dataflex.errors import ComponentError
from dataflex.method import IN_RUN, SIGNALS, STAGES, Card, Mix, Mixer, Requires, Selection, Selector, Weighter
from dataflex.registry import KINDS, find, names
from dataflex.testing import (
    FakeSignals,
    check_answers,
    check_selection,
    check_state,
    contract,
    decision,
    example_context,
    global_random_state_untouched,
)

# The parameters that cannot be left out, for K domains. A new method gets one line here.
MINIMAL = {
    ("selector", "all"): lambda K: {},
    ("selector", "random"): lambda K: {},
    ("selector", "loss"): lambda K: {},
    ("selector", "tacs"): lambda K: {},
    ("selector", "less"): lambda K: {},
    ("selector", "grad_norm"): lambda K: {},
    ("selector", "el2n"): lambda K: {},
    ("selector", "rds_plus"): lambda K: {},
    ("selector", "near"): lambda K: {},
    ("selector", "tsds"): lambda K: {},
    ("selector", "delta_loss"): lambda K: {"updates": 10},
    ("selector", "longest"): lambda K: {},
    ("selector", "random_balanced"): lambda K: {},
    ("selector", "compose"): lambda K: {},
    ("selector", "bm25"): lambda K: {},
    ("selector", "dsir"): lambda K: {},
    ("selector", "embed"): lambda K: {},
    ("selector", "ifd"): lambda K: {},
    ("selector", "s2l"): lambda K: {},
    ("selector", "rho_loss"): lambda K: {"reference": "folder"},
    ("selector", "icons"): lambda K: {},
    ("selector", "cluster_less"): lambda K: {},
    ("selector", "coincide"): lambda K: {},
    ("selector", "zeroth"): lambda K: {},
    ("selector", "nice"): lambda K: {"reward": "exact_match"},
    ("selector", "gist"): lambda K: {},
    ("selector", "greats"): lambda K: {},
    ("selector", "opus"): lambda K: {},
    ("selector", "uds"): lambda K: {},
    ("selector", "infobatch"): lambda K: {},
    ("selector", "pass_band"): lambda K: {},
    ("selector", "pass_schedule"): lambda K: {},
    ("selector", "mopps"): lambda K: {},
    ("selector", "greso"): lambda K: {},
    ("selector", "limr"): lambda K: {"column": "curves"},
    ("mixer", "sec"): lambda K: {},
    ("mixer", "dump_ucb"): lambda K: {},
    ("mixer", "tscl"): lambda K: {},
    ("selector", "margin"): lambda K: {},
    ("selector", "bees"): lambda K: {"column": "sample_weight"},
    ("selector", "selective_dpo"): lambda K: {"columns": ["sample_weight"]},
    ("mixer", "static"): lambda K: {"proportions": [1.0] * K},
    ("mixer", "uniform"): lambda K: {},
    ("mixer", "size"): lambda K: {},
    ("mixer", "temperature"): lambda K: {},
    ("mixer", "unimax"): lambda K: {},
    ("mixer", "staged"): lambda K: {
        "stages": [
            {"start_step": 0, "proportions": [1.0] * K},
            {"start_step": 50, "proportions": [1.0] + [2.0] * (K - 1)},
        ]
    },
    ("mixer", "random"): lambda K: {},
    ("mixer", "odm"): lambda K: {},
    ("mixer", "sheared"): lambda K: {"target_losses": [0.5] * K},
    ("mixer", "velocity"): lambda K: {"target_losses": [0.5] * K},
    ("mixer", "dynamic_moe"): lambda K: {},
    ("mixer", "ado"): lambda K: {},
    ("mixer", "softmax_loss"): lambda K: {},
    ("mixer", "doge"): lambda K: {},
    ("mixer", "dga"): lambda K: {},
    ("mixer", "pike"): lambda K: {},
    ("mixer", "dynamix_sft"): lambda K: {},
    ("mixer", "rnb"): lambda K: {},
    ("mixer", "grape"): lambda K: {},
    ("mixer", "ledger"): lambda K: {},
    ("mixer", "skill_it"): lambda K: {"graph": [[1.0 + (i == j) for j in range(K)] for i in range(K)]},
    ("mixer", "aioli"): lambda K: {},
    ("mixer", "doremi"): lambda K: {"reference": "runs/reference"},
    ("mixer", "group_dro"): lambda K: {},
    ("orderer", "sorting"): lambda K: {"by": "loss"},
    ("orderer", "folding"): lambda K: {"by": "loss"},
    ("orderer", "zigzag"): lambda K: {"by": "length"},
    ("orderer", "segment"): lambda K: {"by": "length"},
    ("orderer", "stair"): lambda K: {"by": "length"},
    ("orderer", "saw"): lambda K: {"by": {"name": "column", "column": "sample_weight"}},
    ("orderer", "shuffle"): lambda K: {},
    ("orderer", "pacing"): lambda K: {"by": "random"},
    ("weighter", "none"): lambda K: {},
    ("weighter", "column"): lambda K: {},
    ("weighter", "loss"): lambda K: {},
    ("weighter", "adapt"): lambda K: {},
    ("weighter", "joint_update_aware"): lambda K: {},
    ("weighter", "slm"): lambda K: {"reference": "runs/reference"},
    ("weighter", "rho"): lambda K: {"reference": "runs/reference"},
    ("weighter", "group"): lambda K: {},
    ("weighter", "focal"): lambda K: {},
    ("weighter", "token"): lambda K: {},
    ("weighter", "ss_token"): lambda K: {"reference": "runs/reference"},
    ("weighter", "pear"): lambda K: {"reference": "runs/reference"},
    ("weighter", "q_tuning"): lambda K: {},
    ("weighter", "meta"): lambda K: {},
    ("weighter", "presence"): lambda K: {},
    ("weighter", "product"): lambda K: {"of": ["column", "group"]},
}
DRAWS = {  # another seed, another answer
    ("selector", "pass_band"),
    ("selector", "pass_schedule"),
    ("selector", "mopps"),
    ("selector", "greso"),
    ("selector", "limr"),
    ("selector", "random"),
    ("selector", "loss"),
    ("selector", "tsds"),
    ("selector", "delta_loss"),
    ("selector", "random_balanced"),
    ("selector", "dsir"),
    ("selector", "s2l"),
    ("selector", "cluster_less"),
    ("selector", "zeroth"),
    ("selector", "nice"),
    ("selector", "opus"),
    ("selector", "infobatch"),
    ("mixer", "random"),
    ("mixer", "doge"),
    ("mixer", "dga"),
    ("mixer", "pike"),
    ("mixer", "dynamix_sft"),
    ("mixer", "rnb"),
    ("mixer", "grape"),
    ("mixer", "aioli"),
    ("orderer", "segment"),
    ("orderer", "shuffle"),
    ("orderer", "pacing"),
}

# Taken while collecting, before any test registers a plugin.
METHODS = [(kind, name) for kind in KINDS for name in names(kind)]
SELECTORS = [name for kind, name in METHODS if kind == "selector"]
MIXERS = [name for kind, name in METHODS if kind == "mixer"]
ORDERERS = [name for kind, name in METHODS if kind == "orderer"]
WEIGHTERS = [name for kind, name in METHODS if kind == "weighter"]
every_method = pytest.mark.parametrize(("kind", "name"), METHODS)
every_selector = pytest.mark.parametrize("name", SELECTORS)
every_mixer = pytest.mark.parametrize("name", MIXERS)
every_orderer = pytest.mark.parametrize("name", ORDERERS)
every_weighter = pytest.mark.parametrize("name", WEIGHTERS)

NUM_ROWS = 64
COLUMNS = {"sample_weight": np.linspace(0.0, 2.0, NUM_ROWS), "curves": np.tile([0.2, 0.5, 0.8], (NUM_ROWS, 1))}


def read(kind, name, params):
    problems = []
    targets = {"targets": ["target"]} if (half_read(find(kind, name), params) or Requires()).targets else {}
    return method_block(kind, {"name": name, **targets, **params}, f"dynamic.{kind}", problems), problems


def build(kind, name, num_domains=3):
    config, problems = read(kind, name, MINIMAL[kind, name](num_domains))
    assert problems == []
    return config.build()


def pool_of(num_rows):
    return np.arange(num_rows, dtype=np.int64)


def decide(method, **options):
    return decision(method, columns=COLUMNS, **options)


# ---------------------------------------------------------------- 1. building


def test_every_registered_method_is_in_the_table():
    assert sorted(MINIMAL) == sorted(METHODS)


@every_method
def test_it_builds_from_its_defaults_or_least_parameters(kind, name):
    method = build(kind, name)
    assert isinstance(method, BASES[kind])
    assert (type(method).kind, type(method).name) == (kind, name)
    if not MINIMAL[kind, name](3) and not method.requires().targets:
        assert method_block(kind, name, f"dynamic.{kind}", []).params == type(method).Params()


@every_method
def test_the_table_holds_only_what_cannot_be_left_out(kind, name):
    params = MINIMAL[kind, name](3)
    for key in params:
        config, problems = read(kind, name, {other: value for other, value in params.items() if other != key})
        assert config is None
        assert problems[0].startswith(f"dynamic.{kind}.{key}: missing")


@every_method
def test_an_unknown_key_is_refused(kind, name):
    config, problems = read(kind, name, {**MINIMAL[kind, name](3), "nonsense": 1})
    assert config is None
    assert len(problems) == 1
    assert problems[0].startswith(f"dynamic.{kind}.nonsense: unknown key")


@every_method
def test_parameters_are_frozen_keyword_only_and_explained(kind, name):
    params = find(kind, name).Params
    assert params.__dataclass_params__.frozen
    for field in dataclasses.fields(params):
        assert field.kw_only, field.name
        assert 0 < len(field.metadata.get("help", "")) <= 140, field.name
    method = build(kind, name)
    with pytest.raises((dataclasses.FrozenInstanceError, AttributeError)):
        method.params.nonsense = 1


# ---------------------------------------------------------------- 2. randomness


@every_method
def test_the_same_seed_gives_the_same_answer(kind, name):
    assert decide(build(kind, name), seed=3) == decide(build(kind, name), seed=3)


@every_method
def test_another_seed_changes_draws_and_nothing_else(kind, name):
    differs = decide(build(kind, name), seed=3) != decide(build(kind, name), seed=4)
    assert differs == ((kind, name) in DRAWS)


@every_method
def test_global_random_streams_are_left_alone(kind, name):
    with global_random_state_untouched():
        decide(build(kind, name))


@pytest.mark.parametrize(
    "move", [lambda: np.random.rand(), lambda: torch.rand(1), lambda: __import__("random").random()]
)
def test_the_guard_of_the_global_streams_can_fail(move):
    with pytest.raises(AssertionError, match="global random state was moved"), global_random_state_untouched():
        move()


# ---------------------------------------------------------------- 3. state


@every_method
def test_state_goes_through_a_checkpoint(kind, name):
    check_state(lambda: build(kind, name), decide)


# ---------------------------------------------------------------- 4. and 5. answers


@every_selector
@pytest.mark.parametrize(
    ("num_pool", "budget"), [(64, 16), (64, 64), (64, 0), (64, 1000), (1, 1), (1, 5), (0, 0), (0, 5)]
)
def test_rows_come_from_the_pool_within_the_budget(name, num_pool, budget):
    selector = build("selector", name)
    pool = np.random.default_rng(0).permutation(NUM_ROWS)[:num_pool].astype(np.int64)
    before = pool.copy()
    selection = selector.select(pool, budget, example_context(columns=COLUMNS))
    check_selection(selector, selection, pool, budget)
    if selector.selects_subset:
        share = 0.5 if name == "selective_dpo" else 1.0  # it leaves the harder half out, whatever is asked for
        assert len(selection.rows) == min(budget, max(int(share * num_pool), min(1, num_pool)))
    assert pool.tolist() == before.tolist()


@every_method
def test_answers_are_right_where_that_is_hard(kind, name):
    check_answers(build(kind, name), absent=(np.nan, np.inf, -np.inf), **COLUMNS)


SIZES = ({"only": 30}, {"web": 40, "code": 20, "math": 4}, {"big": 10_000, "tiny": 1})


@pytest.mark.parametrize("unit", ["sequences", "tokens"])
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        (name, sizes)
        for name in names("mixer")
        for sizes in SIZES
        if len(sizes) >= build("mixer", name, len(sizes)).requires().domains
    ],
)
def test_proportions_are_a_point_of_the_simplex(name, sizes, unit):
    mixer = build("mixer", name, len(sizes))
    targets = tuple(sizes) if mixer.requires().targets else ()
    lengths = 1 + np.arange(sum(sizes.values())) % 7
    ctx = example_context(sizes, unit=unit, lengths=lengths, targets=targets)
    mix = mixer.mix(ctx)
    assert mix.proportions.dtype == np.float64
    assert mix.proportions.shape == (len(sizes),)
    assert (mix.proportions >= 0).all()
    assert abs(mix.proportions.sum() - 1.0) < 1e-12
    assert mix.reason
    assert "\n" not in mix.reason


@pytest.mark.parametrize("name", [one for one in MIXERS if hasattr(find("mixer", one).Params, "initial")])
def test_a_domain_written_as_0_is_never_served(name):
    """At no decision, whatever is explored, smoothed or not known."""
    params = {**MINIMAL["mixer", name](3), "initial": {"web": 0.5, "code": 0.5, "math": 0.0}}
    mixer = read("mixer", name, params)[0].build()
    for index, kind in enumerate(["warmup", "dynamic", "dynamic", "dynamic"]):
        proportions, _ = decision(mixer, sizes=dict.fromkeys(("web", "code", "math"), 21), index=index, kind=kind)
        assert proportions[2] == 0.0, kind
        assert min(proportions[:2]) > 0.0, kind


@every_weighter
def test_columns_asked_for_are_names(name):
    assert all(isinstance(column, str) and column for column in build("weighter", name).requires().columns)


# ---------------------------------------------------------------- 8. and 9. card and needs


@every_method
def test_the_card_is_complete(kind, name):
    cls = find(kind, name)
    card, needs = cls.card, build(kind, name).requires()
    assert card.summary.endswith(".")
    assert card.summary[0].isupper()
    assert len(card.summary) <= 140
    assert card.paper
    assert card.cost
    assert "baseline" in card.paper or "arXiv" in card.paper
    asks = needs.signals - {"texts", "rollouts", *IN_RUN}
    assert (needs.passes.pool[0] > 0) == (kind in ("selector", "orderer") and bool(asks))
    assert set(needs.stages) <= set(STAGES)
    assert needs.stages
    assert needs.signals <= {*SIGNALS}
    assert cls.__doc__
    assert sys.modules[cls.__module__].__doc__


@every_weighter
def test_reweighting_is_offered_for_token_losses_only(name):
    weighter = build("weighter", name)
    assert weighter.neutral or set(weighter.requires().stages) == {"pt", "sft"}


@every_method
def test_signals_asked_for_are_those_declared(kind, name):
    signals = FakeSignals(1.0 + 0.01 * np.arange(NUM_ROWS))
    method = build(kind, name)
    decide(method, signals=signals)
    assert signals.asked == method.requires().signals - {"rollouts"}  # which are observed


class Careless(Selector):
    """Selects what it is given, whatever is asked for."""

    name = "careless"
    card = Card(summary="Selects too much.", paper="baseline", cost="none")
    gives_scores = False

    def select(self, pool, budget, ctx):
        return Selection(rows=pool, reason="everything")


class Restless(Careless):
    """Draws from numpy's global stream."""

    def select(self, pool, budget, ctx):
        return Selection(rows=np.random.permutation(pool)[:budget], reason="drawn")


class Forgetful(Careless):
    """Counts its decisions and does not say so."""

    count = 0

    def select(self, pool, budget, ctx):
        self.count += 1
        return Selection(rows=np.roll(pool, self.count)[:budget], reason="rolled")


class Lopsided(Careless):
    """Gives weights whose denominator it does not state."""

    def select(self, pool, budget, ctx):
        return Selection(rows=pool[:budget], reason="first", weights=np.ones(len(pool[:budget])))


class Negative(Lopsided):
    """Gives weights that are none."""

    def requires(self):
        return Requires(row_weights="weight_sum")

    def select(self, pool, budget, ctx):
        return Selection(rows=pool[:budget], reason="first", weights=-np.ones(len(pool[:budget])))


class Silent(Careless):
    """Says that it gives scores."""

    gives_scores = True

    def select(self, pool, budget, ctx):
        return Selection(rows=pool[:budget], reason="first")


class Unheard(Mixer):
    """Does not say that it observes."""

    name = "unheard"
    card = Card(summary="Learns from what it is never told.", paper="baseline", cost="none")

    def observe(self, stats):
        pass

    def mix(self, ctx):
        return Mix(proportions=np.array([3.0, 1.0, 1.0]), reason="fixed")  # which a run brings to a sum of 1


class Undemanding(Weighter):
    """Uses a tensor that it does not require."""

    name = "undemanding"
    card = Card(summary="Weighs by entropy.", paper="baseline", cost="none")

    def weigh(self, batch):
        return batch.entropy_BT.float()


class Demanding(Undemanding):
    """Requires what it uses."""

    def requires(self):
        return Requires(entropy=True)


class Heard(Unheard):
    """Says that it observes."""

    observes = True


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        (Careless, "64 rows for a budget of 16"),
        (Restless, "two answers|global random state was moved"),
        (Forgetful, "a resumed method decides otherwise"),
        (Lopsided, "state their denominator"),
        (Negative, "negative or non-finite weights"),
        (Silent, "gives_scores is True, found none"),
        (Unheard, "write observes = True"),
        (Undemanding, "NoneType"),
    ],
)
def test_the_contract_for_methods_of_ones_own_can_fail(broken, told):
    with pytest.raises((AssertionError, ComponentError, AttributeError), match=told):
        contract(broken)


@pytest.mark.parametrize("good", [Heard, Demanding, *(find("selector", name) for name in ("random", "loss", "bm25"))])
def test_the_contract_for_methods_of_ones_own_holds_for_good_ones(good):
    contract(good)


def test_the_contract_takes_parameters_as_a_configuration_has_them():
    contract(find("selector", "loss"), {"focus": "medium"})
    contract(find("selector", "rds_plus"), {"rule": {"name": "gumbel_top_k", "temperature": 2}, "aggregate": "mean"})
    with pytest.raises(AssertionError, match=r"loss\.focus: .*'mdium'"):
        contract(find("selector", "loss"), {"focus": "mdium"})


def test_methods_are_imported_without_torch():
    script = (
        "import sys, dataflex.testing\n"
        "from dataflex.registry import KINDS, find, names\n"
        "[find(kind, name) for kind in KINDS for name in names(kind)]\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
