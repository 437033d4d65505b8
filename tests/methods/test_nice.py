"""NICE: the policy gradient of a two-action policy by enumeration, the baseline, and what becomes of bad rewards."""

from __future__ import annotations

import itertools
import logging

import numpy as np
import pytest

from dataflex.config.build import method_block
from dataflex.errors import ConfigError, DataError
from dataflex.rewards.base import RewardError, graded
from dataflex.select.rules import Rule
from dataflex.select.scoring import Aggregate
from dataflex.selectors.nice import Nice, advantages
from dataflex.signals.kinds import ResponseGradientScores
from dataflex.signals.specs import Generation
from dataflex.testing import FakeSignals, example_context

PROMPT, REFERENCE = [5, 6], [9]


class Policy(FakeSignals):
    """One prompt for each target; a policy of one token, softmax(theta) over the tokens 0 and 1."""

    def __init__(self, actions, theta=(0.0, 0.0), gradients=((-1.0, 1.0), (1.0, -1.0), (1.0, 1.0))):
        super().__init__(np.ones(len(gradients)), gradients=gradients)
        self.actions = actions
        self.p = np.exp(theta) / np.exp(theta).sum()

    def num_rows(self, target=None):
        return 1

    def tokens(self, rows, *, target=None, part="all"):
        super().tokens(np.zeros(0, dtype=np.int64), target=target, part=part)
        return [np.array({"all": PROMPT + REFERENCE, "prompt": PROMPT, "completion": REFERENCE}[part])] * len(rows)

    def generate(self, prompts, spec, *, ids=None):
        super().generate(prompts, spec, ids=ids)
        assert spec.num_samples == len(self.actions)
        return [
            Generation(prompt=i, sample=s, token_ids=(action,), text=str(action), finished=True)
            for i in range(len(prompts))
            for s, action in enumerate(self.actions)
        ]

    def response_gradient(self, response):
        (action,) = response.response
        assert tuple(response.prompt) == tuple(PROMPT)
        return self.p - np.eye(2)[action]  # of -log p

    def feature(self):
        """The target's vector that the method asked for; zero if it did not ask."""
        asked = [call.options["responses"] for call in self.calls if "responses" in call.options]
        if not asked:
            return np.zeros(2)
        (answers,) = asked
        return sum(one.weight * self.response_gradient(one) for one in answers["target"])


class Table:
    """Rewards by the answer's text."""

    def __init__(self, values, offset=0.0):
        self.values, self.offset = values, offset

    def __call__(self, candidates):
        assert all(one.reference for one in candidates)
        return graded([value if isinstance(value, str) else value + self.offset for value in self._of(candidates)])

    def _of(self, candidates):
        return [self.values[one.answer] for one in candidates]


def nice(reward, **params):
    method = Nice(Nice.Params(reward="exact_match", **params))
    method._reward = reward
    return method


def ask(actions, values, *, offset=0.0, theta=(0.0, 0.0), budget=1, targets=("target",), pool=(0, 1, 2), **params):
    signals = Policy(actions, theta)
    ctx = example_context({"all": 3}, signals=signals, targets=targets)
    method = nice(Table(values, offset), samples=len(actions), **params)
    return method.select(np.array(pool, dtype=np.int64), budget, ctx), signals


def expectation(count, values, offset, theta=(0.0, 0.0), **params):
    """The feature, over all sequences of ``count`` actions with their probabilities."""
    total, seen = np.zeros(2), []
    for actions in itertools.product((0, 1), repeat=count):
        _, signals = ask(list(actions), values, offset=offset, theta=theta, **params)
        seen.append(signals.feature())
        total += np.prod(signals.p[list(actions)]) * seen[-1]
    return total, np.array(seen)


REWARDS = {"0": 1.0, "1": 0.0}


@pytest.mark.parametrize("baseline", ["leave_one_out", "none"])
def test_enumerating_both_actions_gives_the_exact_gradient(baseline):
    """theta = 0, r = (1, 0): the gradient of E[r] is (.25, -.25), so the feature is its negative."""
    found, _ = expectation(3, REWARDS, 0.0, baseline=baseline)
    np.testing.assert_allclose(found, [-0.25, 0.25], atol=1e-12)


@pytest.mark.parametrize("baseline", ["leave_one_out", "none"])
def test_it_is_exact_for_any_policy_and_rewards(baseline):
    theta, values = (0.3, -1.1), {"0": -2.0, "1": 0.5}
    p = np.exp(theta) / np.exp(theta).sum()
    found, _ = expectation(4, values, 0.0, theta=theta, baseline=baseline)
    exact = p[0] * p[1] * (-2.0 - 0.5) * np.array([1.0, -1.0])
    np.testing.assert_allclose(found, -exact, atol=1e-12)


def test_a_constant_changes_no_expectation_and_with_a_baseline_no_estimate():
    plain, each = expectation(3, REWARDS, 0.0)
    moved, each_moved = expectation(3, REWARDS, 7.0)
    np.testing.assert_allclose(each, each_moved, atol=1e-12)
    np.testing.assert_allclose(plain, moved, atol=1e-12)
    without, single = expectation(3, REWARDS, 0.0, baseline="none")
    without_moved, single_moved = expectation(3, REWARDS, 7.0, baseline="none")
    np.testing.assert_allclose(without, without_moved, atol=1e-12)
    assert np.abs(single - single_moved).max() > 1.0


def test_rows_that_raise_the_reward_are_kept():
    """A step on row r lowers theta along its gradient; row 0's gradient (-1, 1) makes the rewarded action likelier."""
    chosen, _ = ask([0, 1, 1, 0], REWARDS, budget=2)
    assert chosen.rows.tolist() == [0, 2]
    np.testing.assert_allclose(chosen.scores, [1.0, -1.0, 0.0], atol=1e-6)
    assert "mean reward: target 0.5" in chosen.reason
    swapped, _ = ask([0, 1, 1, 0], {"0": 0.0, "1": 1.0}, budget=1)
    assert swapped.rows.tolist() == [1]


# ---------------------------------------------------------------- advantages


def test_the_baseline_is_the_mean_of_the_others():
    rewards = [0.5, 2.0, -1.0, 0.0]
    wanted = [r - sum(rewards[:i] + rewards[i + 1 :]) / 3 for i, r in enumerate(rewards)]
    found = advantages(np.array(rewards), baseline="leave_one_out", standardize=False)
    np.testing.assert_allclose(found, wanted)
    scaled = advantages(np.array(rewards), baseline="leave_one_out", standardize=True)
    np.testing.assert_allclose(scaled, np.array(wanted) / (np.std(rewards) + 1e-6))
    with_gap = advantages(np.array([0.5, np.nan, 2.0, -1.0, 0.0]), baseline="leave_one_out", standardize=False)
    assert np.isnan(with_gap[1])
    np.testing.assert_allclose(np.delete(with_gap, 1), wanted)


def test_equal_rewards_are_exactly_nothing():
    for reward in (0.0, 0.1, 1 / 3, -1e9):
        for count in (1, 2, 3, 7):
            assert not advantages(np.full(count, reward), baseline="leave_one_out", standardize=True).any()
    assert advantages(np.array([0.3]), baseline="none", standardize=False).tolist() == [0.3]
    assert np.isnan(advantages(np.array([np.nan]), baseline="leave_one_out", standardize=False)).all()


def test_token_means_divide_by_the_answers_length():
    method = nice(Table(REWARDS), token_reduction="mean", samples=2)
    made = [
        Generation(prompt=0, sample=sample, token_ids=tokens, text="", finished=True)
        for sample, tokens in enumerate([(7, 8, 9, 2), (7, 2)])
    ]
    given = [[1]], made, np.array([1.0, 0.0])
    assert [one.weight for one in method._weighted(*given)] == [1.0 / 2 / 4, -1.0 / 2 / 2]
    summed = nice(Table(REWARDS), samples=2)._weighted(*given)
    assert [one.weight for one in summed] == [0.5, -0.5]
    assert [tuple(one.response) for one in summed] == [(7, 8, 9, 2), (7, 2)]


# ---------------------------------------------------------------- bad rewards


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_task_of_equal_rewards_is_left_out_with_a_warning(value, caplog):
    class Two(Policy):
        def tokens(self, rows, *, target=None, part="all"):
            self.current = target
            return super().tokens(rows, target=target, part=part)

        def generate(self, prompts, spec, *, ids=None):
            made = super().generate(prompts, spec, ids=ids)
            if self.current == "flat":
                made = [Generation(prompt=0, sample=g.sample, token_ids=(1,), text="flat", finished=True) for g in made]
            return made

    signals = Two([0, 1, 1, 0])
    ctx = example_context({"all": 3}, signals=signals, targets=("flat", "good"))
    with caplog.at_level(logging.WARNING):
        chosen = nice(Table({**REWARDS, "flat": value}), samples=4).select(np.arange(3), 1, ctx)
    assert chosen.rows.tolist() == [0]
    assert "without a signal: flat" in chosen.reason
    (asked,) = [call.options["responses"] for call in signals.calls if "responses" in call.options]
    assert list(asked) == ["good"]
    assert [record.getMessage()[:72] for record in caplog.records] == [
        "nice: all responses to each prompt of target flat have the same reward ("
    ]


def test_without_any_signal_rows_are_drawn_with_a_warning_or_it_is_an_error(caplog):
    with caplog.at_level(logging.WARNING):
        chosen, signals = ask([0, 1], {"0": 0.0, "1": 0.0}, budget=2)
    assert len(set(chosen.rows.tolist())) == 2
    for pool in ([2, 1, 0], [1, 0, 2], [0, 2, 1]):  # keyed by row, whatever the order of the pool
        turned, _ = ask([0, 1], {"0": 0.0, "1": 0.0}, budget=2, pool=pool)
        assert turned.rows.tolist() == chosen.rows.tolist()
    assert chosen.scores is None
    assert "drawn uniformly" in chosen.reason
    assert "rows are drawn uniformly until the next decision" in caplog.text
    assert not [call for call in signals.calls if call.signal == "gradients"]
    with pytest.raises(DataError, match="without_signal: random"):
        ask([0, 1], {"0": 0.0, "1": 0.0}, without_signal="error")


def test_without_signal_holds_inside_compose_too():
    def composed(**params):
        block = {"represent": {"name": "nice", "reward": "exact_match", "samples": 2, **params}, "targets": ["target"]}
        method = method_block("selector", block, "dynamic.selector", []).build()
        method._scorer._reward = Table({"0": 0.0, "1": 0.0})
        signals = Policy([0, 1])
        return method.select(np.arange(3), 2, example_context({"all": 3}, signals=signals, targets=("target",)))

    alone, _ = ask([0, 1], {"0": 0.0, "1": 0.0}, budget=2)
    assert composed().rows.tolist() == alone.rows.tolist()
    assert composed().scores is None
    with pytest.raises(DataError, match="set without_signal: random"):
        composed(without_signal="error")


class OfTarget(Policy):
    """The answers to the prompt of the first target are always graded alike: it is silent."""

    def texts(self, rows, *, target=None, part="all"):
        return [f"{target} {part}"] * len(rows)


@pytest.mark.parametrize(("silent", "place"), [("a", 1), ("b", 0)])
def test_the_record_names_the_target_that_spoke(silent, place):
    def reward(candidates):
        return graded([0.5 if one.prompt.startswith(silent) else REWARDS[one.answer] for one in candidates])

    for rule in ("top_k", "gumbel_top_k"):
        aggregate = Aggregate.of("round_robin")
        method = nice(reward, samples=2, aggregate=aggregate, rule=Rule.of(rule))
        ctx = example_context({"all": 3}, signals=OfTarget([0, 1]), targets=("a", "b"))
        selection = method.select(np.arange(3), 2, ctx)
        assert selection.nearest[0].tolist() == [place] * 3
        spoke = ("b", "a")[place == 0]
        draws = method.uniforms(ctx, spoke)("gumbel", np.arange(3))
        found = selection.scores if rule == "top_k" else gumbel(selection.scores, draws)
        assert selection.rows.tolist() == np.argsort(-found, kind="stable")[:2].tolist()


def gumbel(scores, uniforms):
    return scores - np.log(-np.log(uniforms))


def test_answers_that_cannot_be_graded_are_left_out_of_mean_and_baseline(caplog):
    with caplog.at_level(logging.WARNING):
        _, signals = ask([0, 1, 2, 0], {**REWARDS, "2": "it fell over"})
    (answers,) = [call.options["responses"]["target"] for call in signals.calls if "responses" in call.options]
    gains = advantages(np.array([1.0, 0.0, 1.0]), baseline="leave_one_out", standardize=False) / 3
    np.testing.assert_allclose([one.weight for one in answers], gains)
    assert [tuple(one.response) for one in answers] == [(0,), (1,), (0,)]
    assert "1 of 4 responses to target target could not be graded and are left out: it fell over" in caplog.text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_rewards_that_are_not_finite_are_none(value):
    _, signals = ask([0, 1, 2], {**REWARDS, "2": value})
    (answers,) = [call.options["responses"]["target"] for call in signals.calls if "responses" in call.options]
    assert [tuple(one.response) for one in answers] == [(0,), (1,)]


def test_it_ends_when_nothing_can_be_graded_or_when_asked_to():
    with pytest.raises(
        RewardError, match=r"none of 2 responses to target 'target' could be graded: broken \(2 times\)"
    ):
        ask([0, 1], {"0": "broken", "1": "broken"})
    with pytest.raises(RewardError, match=r"1 of 2 responses .* broken; set on_reward_error: drop"):
        ask([0, 1], {"0": "broken", "1": 1.0}, on_reward_error="raise")


# ---------------------------------------------------------------- targets, prompts, sampling


def test_tasks_are_brought_together_by_name():
    gradients = [[1.0, 0.0], [0.0, 1.0], [0.8, 0.7]]

    def two(signal, rows, _):
        assert list(signal.responses) == ["a", "b"]
        return np.asarray(gradients)[rows]

    for aggregate, best, wanted in (("max", 0, [1.0, 1.0, 0.8]), ("mean", 2, [0.5, 0.5, 0.75])):
        ctx = example_context(
            {"all": 3}, signals=FakeSignals(np.ones(3), values={ResponseGradientScores: two}), targets=("a", "b")
        )
        chosen = Nice(Nice.Params(reward="exact_match", aggregate=Aggregate.of(aggregate))).select(np.arange(3), 1, ctx)
        np.testing.assert_allclose(chosen.scores, wanted, rtol=1e-6)
        assert chosen.rows.tolist() == [best]


def test_prompts_are_drawn_anew_and_tasks_and_intervals_have_their_own_samples():
    signals = FakeSignals(np.ones(4), targets={"a": np.arange(1, 21) / 10, "b": np.arange(1, 21) / 10})
    for index in (0, 1):
        ctx = example_context({"all": 4}, signals=signals, targets=("a", "b"), index=index)
        Nice(Nice.Params(reward="f1", max_prompts=5, samples=4)).select(np.arange(4), 1, ctx)
    asked = [call for call in signals.calls if call.signal == "generate"]
    assert len({call.options["spec"].seed for call in asked}) == 4
    assert len({tuple(call.rows.tolist()) for call in asked}) == 4
    assert all(len(call.rows) == 5 for call in asked)
    (spec,) = {
        (call.options["spec"].temperature, call.options["spec"].top_p, call.options["spec"].top_k) for call in asked
    }
    assert spec == (1.0, 1.0, 0)


def test_parameters_reach_generation_and_gradients():
    signals = FakeSignals(np.ones(3))
    ctx = example_context({"all": 3}, signals=signals, targets=("goal",), seed=9)
    Nice(
        Nice.Params(
            reward="f1",
            samples=7,
            max_new_tokens=11,
            temperature=0.5,
            top_p=0.9,
            top_k=3,
            precondition="paper_repo",
            sketch_size=64,
            parameters="lora_B",
            last_blocks=2,
            bf16=True,
        )
    ).select(np.arange(3), 1, ctx)
    (made,) = [call.options["spec"] for call in signals.calls if call.signal == "generate"]
    assert (made.num_samples, made.max_new_tokens, made.temperature, made.top_p, made.top_k) == (7, 11, 0.5, 0.9, 3)
    (spec,) = [call.asked for call in signals.calls if call.signal == "gradients"]
    assert (spec.precondition, spec.sketch_size, spec.sketch_seed) == ("paper_repo", 64, 9)
    assert (spec.parameters, spec.last_blocks, spec.bf16, spec.normalize, spec.mean_of_cosines) == (
        "lora_B",
        2,
        True,
        True,
        True,
    )


def test_rows_that_are_no_prompt_with_an_answer_are_left_out(caplog):
    class Turns(FakeSignals):
        def tokens(self, rows, *, target=None, part="all"):
            super().tokens(rows, target=target, part=part)
            known = [
                {"all": [1, 2, 3], "prompt": [1, 2], "completion": [3]},
                {"all": [1, 7, 2, 8], "prompt": [1, 2], "completion": [7, 8]},  # two turns
                {"all": [1, 2], "prompt": [], "completion": [1, 2]},  # no prompt
                {"all": [1, 2], "prompt": [1, 2], "completion": []},  # cut off
            ]
            return [np.array(known[row if self.some else 1][part], dtype=np.int64) for row in rows.tolist()]

    signals = Turns(np.ones(3), targets={"goal": np.ones(4)})
    signals.some = True
    ctx = example_context({"all": 3}, signals=signals, targets=("goal",))
    with caplog.at_level(logging.WARNING):
        Nice(Nice.Params(reward="f1")).select(np.arange(3), 1, ctx)
    (asked,) = [call.rows.tolist() for call in signals.calls if call.signal == "generate"]
    assert asked == [0]
    assert "3 of 4 rows of target goal are no prompt with one response" in caplog.text
    signals.some = False
    with pytest.raises(DataError, match="mask_history: true"):
        Nice(Nice.Params(reward="f1")).select(np.arange(3), 1, ctx)


# ---------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("block", "problem"),
    [
        ({}, "dynamic.selector.reward: missing"),
        ({"reward": "exact_mach"}, "reward: unknown 'exact_mach'; did you mean 'exact_match'"),
        ({"reward": "no/such.py:score"}, "dynamic.selector.reward: no such file: no/such.py"),
        ({"reward": "no_such_module:score"}, "reward: no module named 'no_such_module'"),
        ({"reward": "os:not a name"}, "is not written as module:function"),
        ({"reward": "command"}, "dynamic.selector.command: missing; 'reward: command' needs it"),
        ({"reward": "judge"}, "dynamic.selector.judge: missing; 'reward: judge' needs it"),
        ({"reward": "f1", "command": "x"}, "dynamic.selector.command: has no effect with 'reward: f1'"),
        ({"reward": "judge", "judge": {"url": "http://x"}}, "dynamic.selector.judge.model: missing"),
        ({"reward": "judge", "judge": {"url": "x", "model": "m"}}, "dynamic.selector.judge.url: must be an http"),
        (
            {"reward": "judge", "judge": {"url": "http://x", "model": "m", "instruction": "Grade {reference}"}},
            "judge.instruction: does not hold {answer}",
        ),
        (
            {"reward": "judge", "judge": {"url": "http://x", "model": "m", "instruction": "{answer} {x}"}},
            "judge.instruction: cannot be filled in (KeyError: 'x')",
        ),
        ({"reward": "f1", "samples": 1}, "samples: the baseline leave_one_out needs at least 2"),
        ({"reward": "f1", "temperature": 0}, "temperature: must be above 0"),
    ],
)
def test_mistakes_are_told(block, problem):
    problems = []
    assert method_block("selector", {"name": "nice", "targets": ["a"], **block}, "dynamic.selector", problems) is None
    assert problem in problems[0]


def test_a_function_that_is_not_there_is_told_when_the_run_begins(tmp_path):
    (tmp_path / "mine.py").write_text("def score(prompt, answer, reference):\n    return 1.0\n")
    params = Nice.Params(reward=f"{tmp_path}/mine.py:scored")
    with pytest.raises(ConfigError, match="has no function 'scored'"):
        Nice(params)
