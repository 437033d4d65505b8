"""The composable selector: parts against the selectors they make up, what cannot work, configuration."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from dataflex.config.build import method_block, parse_dynamic
from dataflex.config.mappings import as_mapping, as_yaml
from dataflex.errors import CheckpointError, ConfigError, DataError
from dataflex.method import Card, Params, Requires, RunFacts, Selection, Selector
from dataflex.registry import find
from dataflex.select.choose import round_robin, take_turns, top_k
from dataflex.select.rules import Rule
from dataflex.select.scoring import Aggregate, count_votes, together
from dataflex.select.tsds import draw, probabilities
from dataflex.selectors import compose
from dataflex.selectors.compose import Compose, Represent
from dataflex.selectors.influence import Less
from dataflex.selectors.losses import Tacs
from dataflex.selectors.nearest import RdsPlus
from dataflex.signals.kinds import AdaptedLoss, Embedding, ResponseLoss
from dataflex.testing import FakeSignals, decision, example_context
from tests.contract.test_methods import COLUMNS, MINIMAL
from tests.methods.test_embedding_selectors import GivenVectors

RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(60, 4)).astype(np.float32)
TASKS = {"first": RNG.normal(size=(5, 4)), "second": RNG.normal(size=(3, 4)) + 1.0}


def read(block):
    """Return the method that a ``selector:`` block asks for, or its problems."""
    problems = []
    config = method_block("selector", block, "dynamic.selector", problems)
    return config if config is not None else problems


def built(**block):
    config = read({"targets": list(TASKS), **block} if block.pop("aimed", True) else block)
    assert not isinstance(config, list), config
    return config.build()


def context(**options):
    return example_context({"a": 40, "b": 20}, signals=GivenVectors(ROWS, TASKS), targets=tuple(TASKS), **options)


def run(budget=12, ctx=None, pool=None, **block):
    return built(**block).select(np.arange(60) if pool is None else pool, budget, ctx or context())


def by_largest():
    return np.stack([(np.float32(one) @ ROWS.T).max(axis=0) for one in TASKS.values()])


def by_mean():
    return np.stack([(np.float32(one) @ ROWS.T).mean(axis=0) for one in TASKS.values()])


# ---------------------------------------------------------------- parts that a selector is made of


def test_rds_plus_is_one_of_its_combinations():
    """With several targets: their largest similarities, round-robin over targets."""
    own = RdsPlus(RdsPlus.Params()).select(np.arange(60), 12, context())
    composed = run(represent="rds_plus", aggregate="round_robin", rule="top_k")
    assert composed.rows.tolist() == own.rows.tolist()
    np.testing.assert_allclose(composed.scores, own.scores)
    own = RdsPlus(RdsPlus.Params(rule=Rule.of("top_k"))).select(np.arange(60), 12, context())
    assert run(represent="rds_plus", aggregate="max").rows.tolist() == own.rows.tolist()


def test_target_rows_take_turns_whatever_their_target():
    everything = np.concatenate([np.float32(one) for one in TASKS.values()]) @ ROWS.T
    composed = run(represent="rds_plus", rule="round_robin")
    assert composed.rows.tolist() == round_robin(everything, 12).tolist()
    np.testing.assert_allclose(composed.scores, by_largest().max(axis=0), rtol=1e-6)


def test_less_and_tacs_are_representations():
    adapted = {name: 0.5 + RNG.random(60) for name in TASKS}
    signals = FakeSignals(
        1.0 + RNG.random(60),
        values={AdaptedLoss: lambda signal, rows, target: adapted[signal.towards][rows]},
        gradients=ROWS,
        target_rows=TASKS,
    )
    ctx = example_context({"a": 60}, signals=signals, targets=tuple(TASKS))
    for given in ("influence", "less"):
        own = Less(Less.Params(aggregate=Aggregate.of("round_robin"))).select(np.arange(60), 12, ctx)
        assert run(ctx=ctx, represent=given, rule="round_robin").rows.tolist() == own.rows.tolist()
        own = Less(Less.Params(aggregate=Aggregate.of("mean"))).select(np.arange(60), 12, ctx)
        assert run(ctx=ctx, represent=given, aggregate="mean").rows.tolist() == own.rows.tolist()
    own = Tacs(Tacs.Params(floor=0.2)).select(np.arange(60), 12, ctx)
    composed = run(ctx=ctx, represent={"name": "tacs", "floor": 0.2})
    assert composed.rows.tolist() == own.rows.tolist()
    np.testing.assert_allclose(composed.scores, own.scores)


def test_gradients_as_vectors():
    signals = FakeSignals(np.ones(60), gradients=ROWS, target_rows=TASKS)
    ctx = example_context({"a": 60}, signals=signals, targets=tuple(TASKS))
    composed = run(ctx=ctx, represent={"name": "gradient", "dim": 4}, aggregate="max")
    unit = ROWS / np.linalg.norm(ROWS, axis=1, keepdims=True)
    best = np.max(
        [((one / np.linalg.norm(one, axis=1, keepdims=True)) @ unit.T).max(axis=0) for one in TASKS.values()], 0
    )
    assert composed.rows.tolist() == top_k(best, 12).tolist()
    assert {call.signal for call in signals.calls} == {"gradients"}


@pytest.mark.parametrize("name", Represent.known())
def test_every_selector_that_scores_is_a_representation(name):
    given = MINIMAL.get(("selector", name), lambda K: {})(3)
    part = Represent.of(name, **given)
    targeted = part.scorer().gives == "vectors" or part.scorer().requires().targets
    composed = read({"represent": {"name": name, **given}, **({"targets": ["target"]} if targeted else {})})
    assert not isinstance(composed, list), composed
    ctx = example_context(targets=composed.targets, columns=COLUMNS)
    kept = composed.build().select(np.arange(64), 8, ctx)
    assert len(set(kept.rows.tolist())) == 8
    assert kept.scores[kept.rows].tolist() == sorted(kept.scores[~np.isnan(kept.scores)].tolist())[: -8 - 1 : -1]
    assert ctx.signals.asked == composed.requires.signals


# ---------------------------------------------------------------- aggregation


def test_aggregations():
    means, largest = by_mean().astype(np.float64), by_largest()
    expected = {
        "mean": means.mean(axis=0),
        "mean_then_max": means.max(axis=0),
        "max": largest.max(axis=0),
        "z_max": ((means - means.mean(1, keepdims=True)) / means.std(1, keepdims=True)).max(axis=0),
    }
    for name, scores in expected.items():
        composed = run(represent="rds_plus", aggregate=name)
        np.testing.assert_allclose(composed.scores, scores, rtol=1e-4, atol=1e-6)
        assert composed.rows.tolist() == top_k(composed.scores, 12).tolist()
    assert run(represent="rds_plus").rows.tolist() == run(represent="rds_plus", aggregate="mean_then_max").rows.tolist()


def test_votes_of_icons():
    """Of the five rows of the check, the two with two votes; the largest influence would choose others."""
    influence = np.array([[0.9, 0.1, 0.2], [0.8, 0.7, 0.1], [0.1, 0.9, 0.8], [0.2, 0.2, 0.9], [0.3, 0.3, 0.3]])
    votes = together(influence.T, Aggregate.of("votes", vote_percent=40.0))
    assert np.floor(votes).tolist() == [1, 2, 2, 1, 0] == count_votes(influence, 40.0).tolist()
    assert set(top_k(votes, 2).tolist()) == {1, 2}
    composed = run(represent="rds_plus", aggregate={"name": "votes", "vote_percent": 10})
    assert np.floor(composed.scores).max() <= 2


def test_targets_take_turns_with_any_ranking_rule():
    composed = run(represent="rds_plus", aggregate="round_robin", rule={"name": "knn_kde", "sigma": 0.3, "c": 1.0})
    lists = []
    for name, one in TASKS.items():
        p, away = probabilities(
            np.float32(one), ROWS, max_k=5000, kde_k=1000, sigma=0.3, alpha=0.5, c=1.0, search="exact"
        )
        stream = represent_stream(f"selector.compose.{name}")
        lists.append(draw(p, away, 12, np.arange(60), stream, replacement=False))
    assert composed.rows.tolist() == take_turns([one.tolist() for one in lists], 12).tolist()
    assert "round_robin" in composed.reason


def represent_stream(name):
    from dataflex.select.choose import Candidates

    return Candidates.stream(0, name, 0)


# ---------------------------------------------------------------- rows that lack something, and duplicates


def test_rows_without_vectors_or_scores_are_never_kept():
    rows = ROWS.copy()
    rows[::3] = np.nan
    losses = np.where(np.arange(60) % 4 == 1, np.nan, 1.0 + 0.01 * np.arange(60))
    signals = GivenVectors(rows, TASKS)
    signals._losses = losses.astype(np.float32)
    ctx = example_context({"a": 60}, signals=signals, targets=())
    block = {"aimed": False, "represent": "loss", "vectors": "embed", "rule": "deita"}
    composed = run(budget=60, ctx=ctx, **block)
    assert set(composed.rows % 3) == {1, 2}
    assert 1 not in set(composed.rows % 4)
    assert composed.reason.endswith("; 30 rows have nothing to be compared by")
    assert np.isfinite(composed.scores[composed.rows]).all()
    assert np.isnan(composed.scores[::3]).all()
    signals.vectors[None][:] = np.nan
    with pytest.raises(DataError, match="embed: all 60 rows have no embedding"):
        run(ctx=ctx, **block)


def test_near_duplicates_go_first():
    rows = ROWS.copy()
    rows[30:] = rows[:30] * np.float32(1.5)
    ctx = example_context({"a": 60}, signals=GivenVectors(rows, TASKS), targets=tuple(TASKS))
    composed = run(budget=60, ctx=ctx, represent="rds_plus", aggregate="max", near_duplicates=0.9999)
    assert len({row % 30 for row in composed.rows.tolist()}) == len(composed.rows) == 30
    assert "30 near-duplicates were dropped" in composed.reason
    largest = np.max([(np.float32(one) @ rows.T).max(axis=0) for one in TASKS.values()], axis=0)
    assert all(largest[row] >= largest[(row + 30) % 60] for row in composed.rows)


def test_untargeted_diversity_needs_no_targets():
    composed = run(
        aimed=False,
        represent="embed",
        rule="k_center",
        ctx=example_context({"a": 60}, signals=GivenVectors(ROWS, {}), targets=()),
    )
    assert composed.rows[0] == 0
    assert composed.scores is None
    assert len(set(composed.rows.tolist())) == 12


def test_token_budgets_and_domains():
    lengths = 1 + np.arange(60) % 7
    ctx = example_context({"a": 40, "b": 20}, lengths=lengths, signals=GivenVectors(ROWS, TASKS), targets=tuple(TASKS))
    kept = run(ctx=ctx, budget=60, represent="rds_plus", rule={"name": "token_budget", "tokens": 33}).rows
    assert 33 - 7 < lengths[kept].sum() <= 33
    pool = np.arange(59, 9, -1)
    kept = run(ctx=ctx, pool=pool, represent="rds_plus", rule="water_filling").rows
    assert (np.count_nonzero(kept < 40), len(kept)) == (6, 12)


def test_positions_are_those_of_the_pool():
    pool = np.arange(59, 19, -1)
    for rule in ("top_k", "round_robin", "gumbel_top_k", "knn_uniform", "facility_location"):
        kept = run(pool=pool, represent="embed", rule=rule, aimed=rule != "facility_location").rows
        assert set(kept.tolist()) <= set(pool.tolist())
        assert len(kept) == 12
    again = run(pool=pool[::-1].copy(), represent="embed", rule="gumbel_top_k").rows
    assert again.tolist() == run(pool=pool, represent="embed", rule="gumbel_top_k").rows.tolist()


# ---------------------------------------------------------------- needs, costs, state


@pytest.mark.parametrize(
    ("block", "signals", "targets", "cost", "stages"),
    [
        ({"represent": "rds_plus"}, {"embeddings"}, True, (1, 0), ("pt", "sft")),
        ({"represent": "embed", "rule": "k_center"}, {"embeddings"}, False, (1, 0), ("pt", "sft")),
        ({"represent": "loss"}, {"losses"}, False, (1, 0), ("pt", "sft", "dpo", "kto")),
        ({"represent": "less", "vectors": "embed", "rule": "deita"}, {"gradients", "embeddings"}, True, (2, 1), None),
        ({"represent": "longest"}, set(), False, (0, 0), None),
        ({"represent": "gradient", "rule": "facility_location"}, {"gradients"}, False, (1, 1), None),
    ],
)
def test_needs_and_costs_are_those_of_the_parts(block, signals, targets, cost, stages):
    config = read({**block, **({"targets": ["first"]} if targets else {})})
    assert not isinstance(config, list), config
    needs = config.requires
    assert needs.signals == signals
    assert needs.targets is targets
    assert needs.passes.pool == cost
    assert stages is None or needs.stages == stages
    assert needs.needs_interval is bool(signals)
    asked = FakeSignals(1.0 + 0.01 * np.arange(60))
    ctx = example_context({"a": 60}, signals=asked, targets=("first",) if targets else ())
    config.build().select(np.arange(60), 8, ctx)
    assert asked.asked == signals


class Counting(Selector):
    """Scores rows by how often it was asked: a state."""

    name = "counting"
    card = Card(summary="Counts.", paper="baseline", cost="none")

    def __init__(self, params):
        super().__init__(params)
        self.asked = 0

    def select(self, pool, budget, ctx):
        self.asked += 1
        scores = -np.abs(np.arange(len(pool)) - self.asked).astype(float)
        return Selection(rows=pool[:budget], scores=scores, reason="counted")

    def requires(self):
        return Requires(columns=("a_column",))

    def state_dict(self):
        return {"asked": self.asked}

    def load_state_dict(self, state):
        self.asked = state.get("asked", 0)


def test_the_state_of_a_selector_that_is_asked_goes_along(monkeypatch):
    monkeypatch.setattr(compose, "find", lambda kind, name: Counting if name == "counting" else find(kind, name))
    monkeypatch.setattr(compose, "names", lambda kind: ["rds_plus", "counting"])
    params = Compose.Params(represent=Represent("counting", Params()))
    one, ctx = Compose(params), example_context({"a": 60}, targets=())
    assert [one.select(np.arange(60), 1, ctx).rows[0] for _ in range(3)] == [1, 2, 3]
    other = Compose(params)
    other.load_state_dict(one.state_dict())
    assert other.state_dict() == one.state_dict() == {"": {"asked": 3}}
    assert other.select(np.arange(60), 1, ctx).rows[0] == 4
    assert one.requires().columns == ("a_column",)
    with pytest.raises(CheckpointError, match="keeps no state"):
        Compose(Compose.Params()).load_state_dict({"": {"asked": 3}})


# ---------------------------------------------------------------- combinations that cannot work


@pytest.mark.parametrize(
    ("block", "told"),
    [
        ({"represent": "loss", "rule": "k_center"}, "rule: k_center compares rows with each other and needs vectors"),
        ({"represent": "loss", "rule": "round_robin"}, "rule: round_robin lets target rows take turns"),
        ({"represent": "less", "rule": "knn_kde"}, "rule: knn_kde searches for the neighbours of each target row"),
        ({"represent": "loss", "aggregate": "mean"}, "aggregate: loss gives one score a row"),
        ({"represent": "embed", "aggregate": "round_robin", "rule": "deita"}, "and deita does not rank"),
        (
            {"represent": "embed", "aggregate": "round_robin", "rule": {"name": "knn_uniform", "replacement": True}},
            "aggregate: with round_robin rows are taken once",
        ),
        ({"represent": "embed", "aggregate": "mean", "rule": "knn_kde"}, "aggregate: mean has no effect"),
        ({"represent": "embed", "aggregate": "max", "rule": "k_center"}, "aggregate: max has no effect"),
        ({"represent": "less", "aggregate": "max", "rule": "round_robin"}, "lets targets take turns; remove the key"),
        ({"represent": "loss", "vectors": "loss", "rule": "deita"}, "vectors: loss gives no vectors"),
        ({"represent": "loss", "vectors": "embed"}, "vectors: has no effect, since top_k does not compare"),
        ({"represent": "loss", "near_duplicates": 0.9}, "near_duplicates: needs vectors, which loss does not give"),
        ({"represent": "loss", "vectors": "embed", "rule": "facility_location"}, "represent: loss has no effect"),
        ({"represent": "random"}, "represent: the random selector gives no scores"),
        ({"represent": {"name": "delta_loss", "updates": 4}}, "represent: the delta_loss selector gives no scores"),
        ({"represent": "s2l"}, "represent: the s2l selector gives no scores"),
        (
            {"represent": {"name": "selective_dpo", "columns": ["c"]}},
            "represent: the selective_dpo selector gives no scores",
        ),
        ({"represent": {"name": "tsds", "replacement": True}}, "represent.replacement: has no effect"),
        ({"represent": {"name": "coincide", "temperature": 1.0}}, "represent.temperature: has no effect"),
        ({"represent": {"name": "limr", "column": "c", "least": 0.1}}, "represent.least: has no effect"),
        ({"represent": {"name": "dsir", "rule": "top_k"}}, "represent.rule: has no effect"),
        ({"represent": "rds_pls"}, "unknown representation 'rds_pls'; did you mean 'rds_plus'"),
        ({"represent": "embed", "rule": "knn_kd"}, "rule: unknown rule 'knn_kd'; did you mean 'knn_kde'"),
        (
            {"represent": "embed", "rule": {"name": "knn_kde", "sigm": 1}},
            "rule.sigm: unknown key; did you mean 'sigma'",
        ),
        ({"represent": "embed", "rule": {"name": "knn_kde", "alpha": 2}}, "rule.alpha: must be at most 1, found 2"),
        ({"represent": "embed", "rule": {"alpha": 2}}, "rule.name: missing; name one (known: top_k,"),
        ({"represent": "embed", "rule": 3}, "rule: expected text, or a mapping with 'name', found 3"),
        ({"represent": "embed", "aggregate": "meen"}, "aggregate: unknown aggregation 'meen'; did you mean 'mean'"),
        ({"represent": {"name": "embed", "pooling": "max"}}, "represent.pooling: 'max' is not a choice"),
        ({"represent": "embed", "rule": "token_budget"}, "rule.tokens: missing; expected a whole number"),
        ({"represent": "embed", "near_duplicates": 1.5}, "near_duplicates: must be at most 1"),
    ],
)
def test_bad_combinations_are_refused_with_the_reason(block, told):
    problems = read(block)
    assert isinstance(problems, list)
    assert any(problem.startswith("dynamic.selector.") and told in problem for problem in problems), problems


def test_all_problems_are_told_at_once():
    problems = read({"represent": {"name": "embed", "poolin": "max"}, "rule": "nope", "near_duplicates": 7})
    assert len(problems) == 3
    problems = read({"represent": "loss", "aggregate": "mean", "rule": "k_center"})
    assert [problem.split(":")[0] for problem in problems] == ["dynamic.selector.rule", "dynamic.selector.aggregate"]


def test_targets_are_asked_for_where_they_are_needed():
    assert "needs a target" in read({"represent": "embed"})[0]
    assert "takes no targets" in read({"represent": "embed", "rule": "k_center", "targets": ["t"]})[0]


# ---------------------------------------------------------------- what a representation prefers


@pytest.mark.parametrize(
    "represent",
    [
        {"name": "el2n", "keep": "smallest"},
        {"name": "el2n", "keep": "largest"},
        {"name": "grad_norm", "keep": "smallest"},
        {"name": "margin", "source": "external", "column": "sample_weight", "keep": "low"},
        {"name": "margin", "source": "external", "column": "sample_weight", "keep": "band", "band": [0.4, 1.0]},
        {"name": "ifd"},
        {"name": "ifd", "threshold": 0.75},
        {"name": "ifd", "threshold": 0.75, "fill": True},
    ],
    ids=str,
)
def test_it_keeps_the_rows_that_the_representation_prefers(represent):
    """Scores are recorded as they are."""
    alone, composed = read(represent).build(), read({"represent": represent}).build()
    rows, scores = decision(composed, columns=COLUMNS)
    expected = decision(alone, columns=COLUMNS)
    assert (rows, np.round(scores, 6).tolist()) == (expected[0], np.round(expected[1], 6).tolist())
    assert len(rows) > 1


def test_smallest_el2n_is_the_first_rows_of_rising_losses():
    composed = read({"represent": {"name": "el2n", "keep": "smallest"}}).build()
    assert decision(composed)[0][:4] == [0, 1, 2, 3]


def test_a_row_that_is_never_kept_drops_no_near_duplicate():
    """Rows 0 and 1 have the same vector; row 0, whose prompt does not help, is no better than row 1."""
    given, alone = np.array([2.0, 0.5, 0.9, 0.8]), np.ones(4)
    vectors = np.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.6, 0.8]], dtype=np.float32)
    values = {ResponseLoss: lambda signal, rows, target: (given if signal.conditioned else alone)[rows]}
    ctx = example_context({"a": 4}, signals=FakeSignals(np.ones(4), values={**values, Embedding: vectors}), targets=())
    block = {"represent": {"name": "ifd", "prefix_tokens": 0}, "vectors": "embed", "near_duplicates": 0.999}
    selection = read(block).build().select(np.arange(4), 4, ctx)
    assert selection.rows.tolist() == [2, 3, 1]
    np.testing.assert_allclose(selection.scores, [2.0, 0.5, 0.9, 0.8], rtol=1e-6)
    assert "near-duplicates" not in selection.reason


ON_FAILURE = {"nice": {"on_reward_error", "without_signal"}, "margin": {"band"}}  # band: refused unless keep: band


@pytest.mark.parametrize("name", Represent.known())
def test_every_parameter_of_a_representation_is_looked_at_or_refused(name, monkeypatch):
    least = {} if name in compose._OWN else MINIMAL["selector", name](3)
    block = {"represent": {"name": name, **least}}
    targeted = {**block, "targets": ["target"]}
    config = read(targeted)
    composed = (config if not isinstance(config, list) else read(block)).build()
    represent, seen = composed.params.represent, set()
    plain = type(represent.params).__getattribute__

    def noted(params, key):
        if params is represent.params:
            seen.add(key)
        return plain(params, key)

    monkeypatch.setattr(type(represent.params), "__getattribute__", noted)
    decision(composed, columns=COLUMNS)
    monkeypatch.undo()
    idle = {each.name for each in fields(represent.params)} - seen - ON_FAILURE.get(name, set())
    assert idle <= set(represent.idle), sorted(idle)


def test_problems_of_the_parts_are_told_under_their_keys(monkeypatch):
    """A judge whose key is not there is found before the run."""
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    judge = {"url": "http://localhost:1/v1", "model": "m", "api_key_env": "NO_SUCH_KEY"}
    composed = built(represent={"name": "nice", "reward": "judge", "judge": judge})
    (problem,) = composed.check(RunFacts(total_steps=10))
    assert problem.key == "represent.judge.api_key_env"
    assert "'NO_SUCH_KEY' is not set" in problem.text


# ---------------------------------------------------------------- configuration


def test_the_issue_s_configuration_reads_and_writes_back():
    block = {
        "interval_steps": 10,
        "selector": {"represent": "rds_plus", "aggregate": "round_robin", "rule": "knn_kde", "targets": ["t"]},
    }
    dynamic = parse_dynamic(block, Path.cwd())
    params = dynamic.selector.params
    assert (dynamic.selector.name, params.represent.name, params.rule.params.sigma) == ("compose", "rds_plus", 0.75)
    written = as_mapping(dynamic)
    assert parse_dynamic(written, Path.cwd()) == dynamic
    assert "name: compose" in as_yaml(written)
    with_params = {**block, "selector": {**block["selector"], "rule": {"name": "knn_kde", "sigma": 0.2}}}
    assert parse_dynamic(with_params, Path.cwd()).selector.params.rule.params.sigma == 0.2
    assert parse_dynamic({"selector": {"represent": "longest"}}, Path.cwd()).requires.needs_interval is False
    with pytest.raises(ConfigError, match="interval_steps: missing"):
        parse_dynamic({"selector": {"represent": "loss"}}, Path.cwd())
