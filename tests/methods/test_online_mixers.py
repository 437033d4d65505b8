"""Mixers that learn during training, against slow transcriptions and fixed numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataflex.errors import CheckpointError, ConfigError, DataError, UnsupportedError
from dataflex.method import Benefit
from dataflex.mixers._lib import held_out_losses
from dataflex.mixers.fixed import RandomShares
from dataflex.mixers.gradient_shares import (
    Dga,
    Doge,
    DynamixSft,
    Grape,
    Pike,
    RegroupBalance,
    balanced,
    between,
    doge_scores,
    domain_gradients,
    grape_update,
    pike_scores,
    tilted,
)
from dataflex.mixers.held_out import (
    Aioli,
    DynamicMoe,
    Sheared,
    SkillIt,
    Velocity,
    distances,
    interactions,
    near_one_hot,
    velocities,
)
from dataflex.mixers.loss_weights import DoReMi, GroupDro
from dataflex.mixers.measured import ByLedger
from dataflex.mixers.online import Ado, Odm, PowerLaw, SoftmaxLoss, exploration, fit_power_law, policy, preference
from dataflex.plan.domains import SUMS, DomainStats
from dataflex.plan.proportions import exponentiated, logs, softmax
from dataflex.signals.kinds import GateLoads, GradientProducts
from dataflex.testing import FakeSignals, example_context, example_stats

TWO = {"a": 8, "b": 8}
HELD = ("a", "b")


def odm(**params):
    return Odm(Odm.Params(**params))


def context(sizes=TWO, **options):
    return example_context(sizes, targets=tuple(sizes), **options)


def warming(ctx):
    return replace(ctx, interval=replace(ctx.interval, kind="warmup"))


def held(*losses):
    """Signals under which target k has the loss ``losses[k]``."""
    return FakeSignals(np.ones(16), targets={name: [loss] for name, loss in zip(HELD, losses, strict=True)})


# ---------------------------------------------------------------- softmax of the losses

THREE = {"a": 8, "b": 8, "c": 8}


def softmax_loss(**params):
    return SoftmaxLoss(SoftmaxLoss.Params(**params))


@pytest.mark.parametrize(
    ("temperature", "expected"), [(1.0, [0.231224, 0.140244, 0.628532]), (0.5, [0.114195, 0.042010, 0.843795])]
)
def test_proportions_are_the_softmax_of_the_losses(temperature, expected):
    mixer = softmax_loss(temperature=temperature)
    assert mixer.mix(context(THREE)).proportions.tolist() == [1 / 3] * 3
    mixer.observe(example_stats([2.0, 1.5, 3.0], names=tuple(THREE)))
    found = mixer.mix(context(THREE))
    assert found.proportions.tolist() == pytest.approx(expected, abs=1e-6)
    assert found.reason.startswith("largest loss 3 (c): ")


def slow_softmax(intervals, temperature, relative):
    """Return the shares after each interval, a list of steps with (loss, tokens) of each domain."""
    num = len(intervals[0][0])
    last, first, shares = [None] * num, [None] * num, []
    for steps in intervals:
        for k in range(num):
            tokens = sum(step[k][1] for step in steps)
            if tokens:
                last[k] = sum(step[k][0] * step[k][1] for step in steps) / tokens
                first[k] = last[k] if first[k] is None else first[k]
        known = [last[k] / first[k] if relative else last[k] for k in range(num) if last[k] is not None]
        scores = []
        for k in range(num):
            if last[k] is None:
                scores.append(sum(known) / len(known))
            else:
                scores.append(last[k] / first[k] if relative else last[k])
        powers = [math.exp(score / temperature) for score in scores]
        shares.append([power / sum(powers) for power in powers])
    return shares


@pytest.mark.parametrize("relative", [False, True])
def test_absent_domains_keep_their_loss_and_unseen_ones_have_the_mean(relative):
    rng = np.random.default_rng(0)

    def drawn(interval, k):  # c is first served in the last intervals, b is absent from the second one
        there = (k != 2 or interval > 2) and (k != 1 or interval != 1)
        return float(rng.uniform(1, 4)), int(rng.integers(0, 9)) * there

    intervals = [[[drawn(i, k) for k in range(3)] for _ in range(3)] for i in range(5)]
    mixer, found = softmax_loss(temperature=0.7, relative=relative), []
    mixer.mix(warming(context(THREE)))
    for steps in intervals:
        for step in steps:
            losses, tokens = zip(*step, strict=True)
            mixer.observe(example_stats(losses, tokens, names=tuple(THREE)))
        found.append(mixer.mix(context(THREE)).proportions.tolist())
    np.testing.assert_allclose(found, slow_softmax(intervals, 0.7, relative), rtol=1e-12)
    assert len({tuple(shares) for shares in found}) == 5


# ---------------------------------------------------------------- ODM


def test_exploration_is_uniform_until_k_ln_k():
    assert exploration(68, 22) == 1 / 22
    assert exploration(69, 22) < 1 / 22
    assert exploration(1, 2) == 0.5
    assert exploration(2, 2) == pytest.approx(0.416277, abs=1e-6)
    assert exploration(100, 2) == pytest.approx(0.0588705, abs=1e-7)
    assert exploration(10**6, 2, floor=0.1) == 0.1


def test_policies_of_paper_and_official_code():
    now = exploration(100, 2)
    assert policy(np.array([1.0, 3.0]), 0.3, now, True).tolist() == pytest.approx([0.279435, 0.720565], abs=1e-6)
    assert policy(np.array([0.4, 0.0]), 0.5, now, False).tolist() == pytest.approx([0.543966, 0.456034], abs=1e-6)


def test_updates_of_each_variant():
    """One arm of two is drawn with loss 2 and proportion 1/2."""
    stats = example_stats([2.0, 0.0], [10, 0], names=HELD, step=0)
    expected = {"paper": 0.4, "official": 0.1 * math.e**2, "exp3": 0.4, "full_information": 0.2}
    for variant, reward in expected.items():
        mixer = odm(variant=variant)
        mixer.mix(context())
        mixer.observe(stats)
        assert mixer.state_dict()["reward"].tolist() == pytest.approx([reward, 0.0]), variant
    assert expected["official"] == pytest.approx(0.738906, abs=1e-6)


def slow_odm(history, variant, a, sizes):
    """Every formula written out, one domain and step at a time."""
    num = len(sizes)
    reward, turn = [0.0] * num, 0
    for step, (losses, tokens, shares) in enumerate(history):
        turn = step + 1 if variant in ("official", "exp3") else turn + 1
        for k in range(num):
            if tokens[k] == 0:
                continue
            value = {
                "paper": losses[k] / shares[k],
                "official": math.exp(losses[k]),
                "full_information": losses[k],
                "exp3": losses[k] / shares[k] / 10,
            }[variant]
            reward[k] = reward[k] + value if variant == "exp3" else a * reward[k] + (1 - a) * value
    eps = min(1 / num, math.sqrt(math.log(num) / (num * turn)))
    before = min(1 / num, math.sqrt(math.log(num) / (num * max(turn - 1, 1))))
    if variant == "official":
        share = [value / sum(reward) for value in reward]
    else:
        powers = [math.exp(before * value) for value in reward]
        share = [value / sum(powers) for value in powers]
    return [(1 - num * eps) * value + eps for value in share]


@pytest.mark.slow
@given(seed=st.integers(0, 1000), variant=st.sampled_from(["paper", "official", "full_information", "exp3"]))
@settings(max_examples=40, deadline=None)
def test_odm_against_a_slow_transcription(seed, variant):
    rng = np.random.default_rng(seed)
    sizes = {"a": 5, "b": 3, "c": 9}
    mixer, history = odm(variant=variant), []
    for step in range(60):
        mixer.mix(context(sizes))
        losses, tokens = rng.uniform(0.5, 4, 3), rng.integers(0, 3, 3) * 10
        tokens[step % 3] = 10
        shares = rng.dirichlet(np.ones(3) * 5)
        history.append((losses, tokens, shares))
        mixer.observe(example_stats(losses, tokens, names=sizes, proportions=shares, step=step))
    got = mixer.mix(context(sizes)).proportions
    assert got.tolist() == pytest.approx(slow_odm(history, variant, 0.9, sizes), rel=1e-9)


def test_exp3_starts_at_the_sizes_and_counts_iterations():
    """As the authors' code: after 99 steps of warm-up the first epsilon is that of step 100, the one before it 1/K."""
    sizes = {"a": 12, "b": 4}
    mixer = odm(variant="exp3")
    for step in range(99):
        mixer.mix(warming(context(sizes)))
        mixer.observe(example_stats([2.0, 0.0], [10, 0], names=HELD, proportions=[0.75, 0.25], step=step))
    assert mixer.mix(context(sizes)).proportions.tolist() == [0.75, 0.25]
    mixer.observe(example_stats([2.0, 0.0], [10, 0], names=HELD, proportions=[0.75, 0.25], step=99))
    reward, now = 2.0 / 0.75 / 10, 0.0588705
    share = math.exp(0.5 * reward) / (math.exp(0.5 * reward) + 1)
    want = (1 - 2 * now) * share + now
    assert mixer.mix(context(sizes)).proportions.tolist() == pytest.approx([want, 1 - want], abs=1e-7)
    resumed = odm(variant="exp3")
    resumed.load_state_dict(mixer.state_dict())
    assert resumed.mix(context(sizes)).proportions.tolist() == mixer.mix(context(sizes)).proportions.tolist()


def test_absent_domains_keep_their_rewards():
    mixer = odm()
    mixer.mix(context())
    mixer.observe(example_stats([2.0, 3.0], names=HELD))
    before = mixer.state_dict()["reward"]
    mixer.observe(example_stats([2.0, 0.0], [10, 0], names=HELD, step=1))
    assert mixer.state_dict()["reward"][1] == before[1]
    assert mixer.state_dict()["reward"][0] != before[0]


def test_a_floor_that_leaves_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"dynamic.mixer.floor: 0.5 for each of 2 domains leaves nothing"):
        odm(floor=0.5).mix(context())
    odm(floor=0.49).mix(context())


def test_only_the_bandits_want_pure_micro_batches():
    assert not odm().requires().pure_micro_batches
    assert odm(variant="paper").requires().pure_micro_batches
    assert odm(variant="official").requires().pure_micro_batches


def test_odm_of_other_domains_is_refused():
    mixer = odm()
    mixer.mix(context())
    other = odm()
    other.load_state_dict(mixer.state_dict())
    with pytest.raises(CheckpointError, match="odm"):
        other.mix(context({"a": 8, "c": 8}))


@pytest.mark.slow
def test_noise_wins_under_a_reward_that_is_the_loss():
    """What the documentation warns of: a domain that cannot be learned has the highest loss for ever."""
    for variant in ("official", "full_information"):
        mixer = odm(variant=variant)
        for step in range(2000):
            mixer.mix(context())
            learned = 4.0 * math.exp(-step / 100)
            mixer.observe(example_stats([learned, 5.0], names=HELD, step=step))
        assert mixer.mix(context()).proportions[1] > 0.5, variant


# ---------------------------------------------------------------- random


@pytest.mark.slow
def test_random_shares_are_dirichlet_around_their_centre():
    ctx = [example_context({"a": 30, "b": 10}, index=i) for i in range(3000)]
    drawn = np.array([RandomShares(RandomShares.Params(around="size")).mix(c).proportions for c in ctx])
    assert drawn.mean(axis=0).tolist() == pytest.approx([0.75, 0.25], abs=0.02)
    # Dirichlet(1.5, 0.5): variance of a share is m (1 - m) / (sum + 1).
    assert drawn[:, 0].var() == pytest.approx(0.75 * 0.25 / 3.0, rel=0.1)


# ---------------------------------------------------------------- Sheared and Velocitune


def test_sheared_golden():
    start = logs(np.array([0.67, 0.33]))
    gaps = np.array([math.log(3), 0.0])
    assert softmax(exponentiated(start, gaps, eta=1.0)).tolist() == pytest.approx([0.858974, 0.141026], abs=1e-6)
    mixer = Sheared(Sheared.Params(target_losses=(1.0, 1.0), initial=(0.67, 0.33), smoothing=1e-4))
    got = mixer.mix(context(signals=held(1.0 + math.log(3), 1.0))).proportions
    assert got.tolist() == pytest.approx([0.858938, 0.141062], abs=1e-6)


def test_sheared_clips_only_when_told():
    for clip, expected in ((False, [2 / 3, 1 / 3]), (True, [0.5, 0.5])):
        params = Sheared.Params(target_losses=(1.0, 1.0), initial="uniform", smoothing=0.0, clip=clip)
        got = Sheared(params).mix(context(signals=held(1.0, 1.0 - math.log(2)))).proportions
        assert got.tolist() == pytest.approx(expected, abs=1e-4)


def test_velocity_golden():
    first, target = np.array([3.0, 2.4]), np.array([2.0, 2.0])
    assert velocities(np.array([2.8, 2.1]), first, target).tolist() == pytest.approx([0.8, 0.25])
    mixer = Velocity(Velocity.Params(target_losses=(2.0, 2.0), initial="uniform"))
    mixer.mix(context(signals=held(3.0, 2.4)))
    assert mixer.first.tolist() == pytest.approx([3.0, 2.4])
    mixer.log_shares = logs(np.array([0.5, 0.5]))
    got = mixer.mix(context(signals=held(2.8, 2.1), index=1)).proportions
    assert got.tolist() == pytest.approx([0.634136, 0.365864], abs=1e-5)


def test_a_domain_that_began_below_its_target_has_no_way_to_go():
    assert velocities(np.array([1.5]), np.array([1.0]), np.array([2.0])).tolist() == [0.0]
    assert velocities(np.array([9.0]), np.array([3.0]), np.array([2.0])).tolist() == [1.0]


def test_one_held_out_set_for_each_domain():
    mixer = Sheared(Sheared.Params(target_losses=(1.0, 1.0)))
    with pytest.raises(ConfigError, match=r"name one data set for each of a, b, in this order \(found 1: goal\)"):
        mixer.mix(example_context(TWO, targets=("goal",)))
    with pytest.raises(ConfigError, match=r"target_losses.c: no such domain"):
        Sheared(Sheared.Params(target_losses={"a": 1.0, "c": 1.0})).mix(context())


def test_held_out_losses_weigh_rows_by_their_tokens():
    class Uneven(FakeSignals):
        def tokens(self, rows, *, target=None, part="all"):
            return [np.zeros(1 + 2 * row, dtype=np.int64) for row in rows]

    signals = Uneven(np.ones(16), targets={"a": [1.0, 3.0, math.nan], "b": [2.0]})
    assert held_out_losses(context(signals=signals)).tolist() == pytest.approx([(1 + 9) / 4, 2.0])
    with pytest.raises(DataError, match="no row of target 'b' has a finite loss: the model has diverged"):
        held_out_losses(context(signals=Uneven(np.ones(16), targets={"a": [1.0], "b": [math.nan]})))


# ---------------------------------------------------------------- dynamic_moe


def test_dynamic_moe_golden():
    loads = np.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    delta = distances(loads, "l2")
    assert delta.tolist() == pytest.approx([0.707107, 0.707107, 0.471405], abs=1e-6)
    moved = exponentiated(logs(np.full(3, 1 / 3)), delta, eta=10.0, smoothing=0.05)
    assert softmax(moved).tolist() == pytest.approx([0.470192, 0.470192, 0.059616], abs=1e-6)


@pytest.mark.parametrize("measure", ["l2", "cosine"])
def test_distances_do_not_depend_on_the_number_of_tokens(measure):
    loads = np.random.default_rng(0).uniform(1, 5, (4, 6))
    scaled = loads * np.array([[1.0], [7.0], [0.1], [100.0]])
    assert np.allclose(distances(loads, measure), distances(scaled, measure), atol=1e-12)
    assert np.allclose(distances(np.ones((3, 5)), measure), 0.0)


def test_dynamic_moe_reads_the_loads_of_the_held_out_sets():
    def loads(_, rows, target):
        share = {"a": [1.0, 0.0], "b": [0.0, 1.0], "c": [0.5, 0.5]}[target]
        return [[[9.0, 1.0], share]] * len(rows)

    signals = FakeSignals(np.ones(12), values={GateLoads: loads})

    sizes = {"a": 4, "b": 4, "c": 4}
    mixer = DynamicMoe(DynamicMoe.Params())
    got = mixer.mix(context(sizes, signals=signals)).proportions
    assert got.tolist() == pytest.approx([0.470192, 0.470192, 0.059616], abs=1e-6)
    both = DynamicMoe(DynamicMoe.Params(layers="all", eta=1.0, smoothing=0.0))
    halves = np.array([0.707107, 0.707107, 0.471405]) / 2  # the first layer's loads are all alike
    got = both.mix(context(sizes, signals=signals)).proportions
    assert got.tolist() == pytest.approx((np.exp(halves) / np.exp(halves).sum()).tolist(), abs=1e-6)


# ---------------------------------------------------------------- gradients


def test_doge_golden():
    vectors = np.array([[1.0, 0.0], [0.0, 2.0]])
    scores = doge_scores(vectors @ vectors.sum(axis=0), np.linalg.norm(vectors, axis=1), 0.1)
    assert scores.tolist() == pytest.approx([0.066667, 0.266666], abs=1e-6)
    moved = exponentiated(logs(np.array([0.5, 0.5])), scores, eta=1 / 0.05)
    assert softmax(moved).tolist() == pytest.approx([0.017986, 0.982014], abs=1e-6)


def test_dga_golden():
    scores = np.array([1.0, 0.0])
    moved = exponentiated(logs(np.array([0.5, 0.5])), scores, eta=math.log(2))
    assert softmax(moved).tolist() == pytest.approx([2 / 3, 1 / 3])


def test_pike_golden():
    scores = pike_scores(np.array([4.0, 1.0]), np.array([8.0, 8.0]), 0.1, 0.2, 16)
    moved = softmax(exponentiated(logs(np.array([0.5, 0.5])), scores, eta=1.0))
    assert moved.tolist() == pytest.approx([0.574443, 0.425557], abs=1e-6)
    assert np.round(16 * moved).tolist() == [9, 7]


def gradients(seed=0, num=16, size=5):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(num, size)) + np.repeat([[2.0], [-1.0]], num // 2, axis=0)


def test_domain_gradients_against_explicit_means():
    vectors = gradients()
    signals = FakeSignals(np.ones(16), gradients=vectors, target_rows={"goal": [np.arange(5.0)]})
    ctx = example_context(TWO, signals=signals, targets=("goal",))
    found = domain_gradients(
        ctx, GradientProducts(targets=ctx.targets, precondition="none", normalize=False), rows_per_domain=8
    )
    means = np.stack([vectors[:8].mean(axis=0), vectors[8:].mean(axis=0)])
    assert np.allclose(found.products, means @ means.T, rtol=1e-5)
    assert np.allclose(found.targets[:, 0], means @ np.arange(5.0), rtol=1e-5)
    spread = [vectors[:8].var(axis=0, ddof=1).sum(), vectors[8:].var(axis=0, ddof=1).sum()]
    assert np.allclose(found.variance, spread, rtol=1e-5)
    expected = np.maximum((means**2).sum(axis=1) - np.array(spread) / 8, 0)
    assert np.allclose(found.squared_norms, expected, rtol=1e-5)


@pytest.mark.parametrize(("labels", "why"), [(3, "the model has diverged"), (0, "none of them has a supervised token")])
def test_a_domain_without_a_gradient_is_told(labels, why):
    class Lost(FakeSignals):
        def tokens(self, rows, *, target=None, part="all"):
            return [np.zeros(labels, dtype=np.int64) for _ in rows]

    vectors = gradients()
    vectors[8:] = math.nan
    ctx = example_context(TWO, signals=Lost(np.ones(16), gradients=vectors), targets=())
    with pytest.raises(DataError, match=f"^no row of domain 'b' that was drawn has a finite loss: {why}"):
        domain_gradients(ctx, GradientProducts(targets=(), precondition="none", normalize=False), rows_per_domain=4)


def test_squared_norms_are_unbiased():
    truth, estimates = np.full(5, 0.3), []
    for seed in range(400):
        vectors = np.random.default_rng(seed).normal(size=(16, 5)) + truth
        ctx = example_context(TWO, signals=FakeSignals(np.ones(16), gradients=vectors), targets=())
        found = domain_gradients(
            ctx, GradientProducts(targets=ctx.targets, precondition="none", normalize=False), rows_per_domain=8
        )
        estimates.append(found.products.diagonal() - found.variance / found.rows)
    assert np.mean(estimates) == pytest.approx(float(truth @ truth), abs=0.06)


def test_gradient_mixers_move_towards_what_their_papers_say():
    vectors = np.concatenate([np.tile([3.0, 0.0], (8, 1)), np.tile([0.0, 1.0], (8, 1))])
    signals = FakeSignals(np.ones(16), gradients=vectors, target_rows={"goal": [[0.0, 1.0]]})
    ctx = example_context(TWO, signals=signals, targets=("goal",))
    dga = Dga(Dga.Params(eta=1.0, memory=0.0, initial="uniform")).mix(ctx).proportions
    assert dga.tolist() == pytest.approx([1 / (1 + math.e), math.e / (1 + math.e)], rel=1e-5)
    pike = Pike(Pike.Params(zeta1=0.1, zeta2=0.0, initial="uniform")).mix(ctx).proportions
    assert pike[0] / pike[1] == pytest.approx(math.exp(0.1 * (9 - 1)), rel=1e-5)


def test_doge_serves_the_mean_of_its_weights():
    signals = FakeSignals(np.ones(16), gradients=gradients())
    steps = [example_context(TWO, signals=signals, targets=(), index=i) for i in range(3)]
    last = Doge(Doge.Params(average=False, initial="uniform"))
    mean = Doge(Doge.Params(initial="uniform"))
    vectors = [last.mix(ctx).proportions for ctx in steps]
    served = [mean.mix(ctx).proportions for ctx in steps]
    assert served[-1].tolist() == pytest.approx(np.mean(vectors, axis=0).tolist())


def test_doge_starts_equal_and_moves_at_most_five_lr_an_update():
    sizes = {"a": 12, "b": 4}
    vectors = np.concatenate([np.tile([9.0, 0.0], (12, 1)), np.tile([0.0, 0.1], (4, 1))])
    signals = FakeSignals(np.ones(16), gradients=vectors)
    for updates in (1, 20):
        mixer = Doge(Doge.Params(average=False, updates=updates))
        ctx = example_context(sizes, signals=signals, targets=(), learning_rate=0.001)
        assert mixer.mix(warming(ctx)).proportions.tolist() == [0.5, 0.5]
        served = mixer.mix(ctx).proportions
        aligned, mean = np.array([81.0, 0.01]), (9.0 + 0.1) / 2
        scores = np.minimum(0.001 * aligned / (mean + 1e-6), 0.005)
        assert scores[0] == 0.005
        assert math.log(served[0] / served[1]) == pytest.approx(updates * (scores[0] - scores[1]) / 0.05, rel=1e-5)


# ---------------------------------------------------------------- Skill-it and Aioli


def test_skill_it_golden():
    """The graph is read by rows; transposed, both domains would be served alike."""
    graph = ((1.0, 0.5), (0.0, 1.0))
    mixer = SkillIt(SkillIt.Params(graph=graph, eta=0.2))
    warm = example_context(TWO, targets=HELD)
    warm = type(warm)(
        **{**warm.__dict__, "interval": type(warm.interval)(index=0, kind="warmup", start_step=0, stop_step=5)}
    )
    assert mixer.mix(warm).proportions.tolist() == pytest.approx([0.524979, 0.475021], abs=1e-6)
    got = mixer.mix(context(signals=held(2.0, 1.0))).proportions
    assert got.tolist() == pytest.approx([0.574443, 0.425557], abs=1e-6)
    turned = SkillIt(SkillIt.Params(graph=((1.0, 0.0), (0.5, 1.0)), eta=0.2))
    assert turned.mix(context(signals=held(2.0, 1.0))).proportions.tolist() == pytest.approx([0.5, 0.5])


def test_skill_it_forgets_what_is_out_of_the_window():
    graph = ((1.0, 0.0), (0.0, 1.0))
    mixer = SkillIt(SkillIt.Params(graph=graph, eta=0.5, window=2))
    for i, losses in enumerate([(9.0, 0.0), (2.0, 1.0), (1.0, 1.5)]):
        got = mixer.mix(context(signals=held(*losses), index=i)).proportions
    expected = math.exp(0.5 * 3.0) / (math.exp(0.5 * 3.0) + math.exp(0.5 * 2.5))
    assert got[0] == pytest.approx(expected)


@pytest.mark.parametrize("graph", [((1.0,), (1.0, 2.0)), ((1.0, math.nan), (0.0, 1.0))])
def test_a_graph_that_is_none_is_refused(graph):
    with pytest.raises(ValueError, match="graph"):
        SkillIt.Params(graph=graph)
    with pytest.raises(ConfigError, match=r"dynamic.mixer.graph: 1 rows for 2 domains \(a, b\)"):
        SkillIt(SkillIt.Params(graph=((1.0,),))).mix(context())


def test_aioli_orientation():
    """The columns of A are added up."""
    matrix = np.array([[0.3, 0.1], [0.0, 0.2]])
    moved = softmax(exponentiated(np.zeros(2), matrix.sum(axis=0), eta=1.0))
    assert moved.tolist() == pytest.approx([0.5, 0.5])
    turned = softmax(exponentiated(np.zeros(2), matrix.sum(axis=1), eta=1.0))
    assert turned.tolist() == pytest.approx([0.549834, 0.450166], abs=1e-6)


def test_interactions_solve_for_the_matrix():
    truth = np.array([[0.3, 0.1], [0.05, 0.2]])
    mixes = np.tile(near_one_hot(2, 0.75), (3, 1))
    assert mixes.sum(axis=1).tolist() == pytest.approx([1.0] * 6)
    found = interactions(mixes, mixes @ truth.T)
    assert np.allclose(found, truth / truth.sum())
    shifted = interactions(mixes, mixes @ (truth - 0.2).T)
    assert shifted.min() == pytest.approx(0.0, abs=1e-12)
    assert shifted.sum() == pytest.approx(1.0)


def test_aioli_probes_then_serves_what_helps():
    """A world in which only training on b lowers losses: a round later b is served more."""
    mixer, levels = Aioli(Aioli.Params(focus=0.75, sweeps=2, hold=2, eta=1.0)), np.array([3.0, 3.0])
    seen = []
    for i in range(6):
        mix = mixer.mix(context(signals=held(*levels), index=i))
        seen.append(mix.proportions.tolist())
        levels = levels - 0.1 * mix.proportions[1]
    assert sorted(seen[:2]) == sorted(seen[2:4]) == [[0.25, 0.75], [0.75, 0.25]], "each domain once a sweep"
    assert seen[4][1] == pytest.approx(1 / (1 + math.exp(-1.0)), abs=1e-4)
    assert seen[5] == seen[4]


def aioli_rounds(params, gain, sizes, rounds, seed=0):
    """Let domain j lower the loss of i by gain[round][i][j] a probe; return the mixer and the domains probed."""
    mixer, probed, losses = Aioli(params), [], np.full(len(sizes), 9.0)
    probes = len(sizes) * params.sweeps
    for turn in range(rounds * (probes + params.hold)):
        targets = {name: [loss] for name, loss in zip(sizes, losses, strict=True)}
        signals = FakeSignals(np.ones(sum(sizes.values())), targets=targets)
        mix = mixer.mix(example_context(sizes, targets=tuple(sizes), signals=signals, index=turn, seed=seed))
        if turn % (probes + params.hold) < probes:
            probed.append(int(mix.proportions.argmax()))
        losses = losses - np.asarray(gain[turn // (probes + params.hold)]) @ mix.proportions
    return mixer, probed


def test_aioli_probes_in_a_new_order_each_sweep():
    sizes = {name: 4 for name in "abcd"}
    gain = [np.diag([0.4, 0.3, 0.2, 0.1])] * 2
    params = Aioli.Params(sweeps=3, hold=1)
    mixer, probed = aioli_rounds(params, gain, sizes, 2)
    sweeps = np.reshape(probed, (6, 4))
    assert (np.sort(sweeps, axis=1) == np.arange(4)).all()
    assert len({tuple(sweep) for sweep in sweeps.tolist()}) > 3
    np.testing.assert_allclose(mixer.matrix, gain[0] / gain[0].sum(), atol=1e-5)
    assert aioli_rounds(params, gain, sizes, 2)[1] == probed, "the same run, the same order"
    assert aioli_rounds(params, gain, sizes, 2, seed=1)[1] != probed


@pytest.mark.parametrize("ema", [0.0, 0.1, 0.75])
def test_aiolis_ema_is_the_weight_of_the_past(ema):
    gain = [np.array([[0.3, 0.1], [0.0, 0.2]]), np.array([[0.1, 0.2], [0.2, 0.1]])]
    mixer, _ = aioli_rounds(Aioli.Params(ema=ema, hold=1, eta=1.0), gain, TWO, 2)
    first, second = (one / one.sum() for one in gain)
    want = (1 - ema) * second + ema * first
    np.testing.assert_allclose(mixer.matrix, want, atol=1e-5)
    np.testing.assert_allclose(softmax(mixer.log_shares), softmax(want.sum(axis=0)), atol=1e-5)


# ---------------------------------------------------------------- ADO


def test_ado_golden():
    law = PowerLaw(e=0.0, a=math.log(2), alpha=0.5)
    assert 1.0 + law.reducible(100) == pytest.approx(1.2)
    assert law.slope(100) == pytest.approx(0.001)
    prior = np.array([0.8, 0.2])
    wanted = preference(np.array([0.001, 0.004]), prior, prior, 0.5, 0.0)
    assert wanted.tolist() == pytest.approx([2 / 3, 1 / 3])
    assert (0.9 * prior + 0.1 * wanted).tolist() == pytest.approx([0.786667, 0.213333], abs=1e-6)


def test_a_power_law_is_found_again():
    samples = np.arange(1, 1201) * 64.0
    truth = PowerLaw(e=0.7, a=2.0, alpha=0.4)
    noise = np.random.default_rng(0).normal(0, 0.01, len(samples))
    losses = math.exp(truth.e) + np.exp(truth.a) * samples**-truth.alpha + noise
    found = fit_power_law(samples[100:], losses[100:])
    assert found is not None
    for n in (20_000.0, 76_800.0, 150_000.0):
        exact = math.exp(truth.e) + truth.reducible(n)
        assert math.exp(found.e) + found.reducible(n) == pytest.approx(exact, abs=0.02)
    assert found.slope(76_800.0) == pytest.approx(truth.slope(76_800.0), rel=0.3)
    assert fit_power_law(samples[:100], losses[:100]) is None


def test_losses_that_are_not_finite_are_filled_in_before_a_fit():
    samples = np.arange(1, 401) * 8.0
    losses = 2.0 + 3.0 * samples**-0.5
    broken = losses.copy()
    broken[[5, 90, 399]], broken[200] = np.nan, np.inf
    found, whole = (fit_power_law(samples, each, skip=100) for each in (broken, losses))
    assert found is not None
    np.testing.assert_allclose(found, whole, rtol=0.1)
    assert fit_power_law(samples, np.full(400, np.nan)) is None


@pytest.mark.parametrize(
    "build",
    [
        *(lambda variant=each: Odm(Odm.Params(variant=variant)) for each in ("full_information", "paper", "exp3")),
        lambda: Odm(Odm.Params(variant="official")),
        lambda: SoftmaxLoss(SoftmaxLoss.Params()),
        lambda: Ado(Ado.Params(start_step=101, ignore_steps=0, fit_steps=10)),
        lambda: GroupDro(GroupDro.Params()),
        lambda: DoReMi(DoReMi.Params(reference="r", initial_score=1.0)),
        lambda: DoReMi(DoReMi.Params(reference="r", variant="levanter")),
    ],
)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("broken", [(0, 60), (0, 1, 2)], ids=["some", "first_steps"])
def test_a_step_without_a_finite_loss_is_one_without_the_domain(build, bad, broken):
    """A loss scaler skips such steps and training goes on; at times no domain has a loss."""
    answers = []
    for absent in (False, True):
        mixer = build()
        ctx = example_context({"web": 4, "code": 4, "math": 4})
        mixer.mix(ctx)
        for step in range(125):
            sums = np.full((len(SUMS), 3), 10.0)
            sums[0], sums[1] = (20.0 + np.arange(3)) / (step + 1) ** 0.1, [1.0, 2.0, 3.0]
            if step in broken:
                which = slice(None) if step == 1 else 1
                sums[:, which] = 0.0 if absent else sums[:, which]
                sums[:2, which] = 0.0 if absent else bad
            stats = DomainStats.of(
                sums,
                names=("web", "code", "math"),
                step=step,
                total_steps=200,
                proportions=np.full(3, 1 / 3),
                learning_rate=1e-3,
            )
            mixer.observe(stats)
        weights = mixer.loss_weights() if hasattr(mixer, "loss_weights") else np.zeros(3)
        answers.append([*mixer.mix(ctx).proportions.tolist(), *weights.tolist()])
    assert np.isfinite(answers).all()
    assert answers[0] == answers[1]


def test_losses_are_smoothed_before_the_first_ones_are_cut_off(monkeypatch):
    """The authors' order: what was cut off has its part in the first smoothed losses that are left."""
    import scipy.signal

    samples = np.arange(1, 401) * 8.0
    losses = 2.0 + 3.0 * samples**-0.5
    losses[90:100] += 5.0
    lengths = []
    smooth = scipy.signal.savgol_filter

    def spied(values, *options):
        lengths.append(len(values))
        return smooth(values, *options)

    monkeypatch.setattr(scipy.signal, "savgol_filter", spied)
    found = fit_power_law(samples, losses, skip=100)
    assert lengths == [400]
    apart = fit_power_law(samples[100:], losses[100:])
    assert found != apart
    assert fit_power_law(samples, losses, skip=300) is None


def test_ados_average_counts_the_steps_done():
    """After t steps (the authors' itr + 1) the newest preference has the weight 1 / t: here t = 4, equal sizes."""
    mixer = Ado(Ado.Params(floor=0.0))
    mixer.mix(context())
    mixer.laws = [PowerLaw(e=0.0, a=1.0, alpha=0.5), PowerLaw(e=0.0, a=-9.0, alpha=0.5)]
    mixer.observe(example_stats([2.0, 2.0], names=HELD, step=3))
    slopes = np.array([law.slope(mixer.samples[-1]) for law in mixer.laws])
    wanted = slopes / slopes.sum()
    np.testing.assert_allclose(mixer.served, 0.9 * 0.5 + 0.1 * wanted, rtol=1e-12)
    np.testing.assert_allclose(mixer.average, 0.75 * 0.5 + 0.25 * wanted, rtol=1e-12)


@pytest.mark.slow
def test_ado_goes_to_the_domain_that_still_falls():
    params = Ado.Params(start_step=160, ignore_steps=20, fit_steps=40)
    mixer, resumed = Ado(params), Ado(params)
    for step in range(240):
        mixer.mix(context(index=step))
        n = (step + 1) * 2.0
        losses = [2.0 + 3.0 * n**-0.4, 2.5]
        if step == 150:
            assert mixer.mix(context()).proportions.tolist() == [0.5, 0.5]
            resumed.load_state_dict(mixer.state_dict())
        stats = example_stats(losses, names=HELD, step=step)
        mixer.observe(stats)
        if step >= 150:
            resumed.mix(context(index=step))
            resumed.observe(stats)
    assert mixer.mix(context()).proportions[0] > 0.54
    assert mixer.mix(context()).proportions.tolist() == resumed.mix(context()).proportions.tolist()


@pytest.mark.parametrize("num_domains", [3, 5, 8])
def test_odm_by_default_stays_near_equal_shares(num_domains):
    """What its card says: within .02 of equal shares for losses within a nat; the published bandits move far."""
    reward = np.linspace(2.0, 3.0, num_domains)
    turns = [*range(1, 300), 1000, 100_000]
    far = [
        np.abs(
            policy(reward, exploration(max(turn - 1, 1), num_domains), exploration(turn, num_domains), False)
            - 1 / num_domains
        ).max()
        for turn in turns
    ]
    assert 0.001 < max(far) < 0.02
    paper = policy(reward * num_domains / 0.2, exploration(100, num_domains), exploration(101, num_domains), False)
    assert np.abs(paper - 1 / num_domains).max() > 2 * max(far)
    assert "near equal shares" in Odm.card.summary


# ---------------------------------------------------------------- ledger


def benefit(changes, tokens):
    return Benefit(targets=("a", "b"), changes_KT=np.array(changes, float), tokens_K=np.array(tokens))


def test_ledger_serves_by_the_average_fall_of_the_losses_per_token():
    mixer = ByLedger(ByLedger.Params(smoothing=0.75, explore=0.2, initial="uniform"))
    ctx = example_context({"web": 30, "code": 20, "math": 10}, targets=("a", "b"))
    assert mixer.mix(replace(ctx, benefit=None)).proportions == pytest.approx([1 / 3] * 3)
    late = example_context({"web": 30, "code": 20, "math": 10}, index=1, start_step=10, stop_step=20)
    first = replace(late, benefit=benefit([[-0.2, -0.4], [0.1, 0.1], [0.0, 0.0]], [100, 50, 0]))
    # web .3 / 100; code did harm; math was not served and counts with the mean of the two, .5 x .003
    assert mixer.mix(first).proportions == pytest.approx([0.8 * 2 / 3 + 0.2 / 3, 0.2 / 3, 0.8 / 3 + 0.2 / 3])
    second = replace(late, benefit=benefit([[-0.1, -0.1], [-0.2, -0.2], [-0.6, -0.6]], [100, 100, 100]))
    falls = np.array([0.75 * 0.003 + 0.25 * 0.001, 0.75 * -0.002 + 0.25 * 0.002, 0.006])
    gains = np.maximum(falls, 0.0)
    assert mixer.mix(second).proportions == pytest.approx(0.8 * gains / gains.sum() + 0.2 / 3)


def test_ledger_serves_equal_shares_while_nothing_helps():
    mixer = ByLedger(ByLedger.Params())
    ctx = example_context({"web": 30, "code": 10}, benefit=benefit([[0.2, 0.1], [0.1, 0.1]], [100, 50]))
    assert mixer.mix(ctx).proportions == pytest.approx([0.5, 0.5])


def test_ledger_does_not_forecast():
    mixer = ByLedger(ByLedger.Params())
    with pytest.raises(UnsupportedError, match="not known before"):
        mixer.mix(example_context(start_step=10, stop_step=20, benefit=None))


# ---------------------------------------------------------------- DynamixSFT, R&B, GRAPE


def test_dynamix_of_the_specification():
    prior, value = np.array([0.7, 0.2, 0.1]), np.array([0.1, 0.5, 0.9])
    assert tilted(prior, value, 4.0, 0.0).tolist() == pytest.approx([0.168925, 0.239054, 0.592021], abs=1e-6)
    assert tilted(prior, value, 4.0, 0.3).tolist() == pytest.approx([0.218247, 0.267338, 0.514415], abs=1e-6)
    before, after = np.array([2.0, 1.0, 3.0]), np.array([1.9, 0.98, 2.7])
    falls = (before - after) / before
    assert falls.tolist() == pytest.approx([0.05, 0.02, 0.1])
    assert between(falls).tolist() == pytest.approx([0.375, 0.0, 1.0])
    assert (0.95 * value + 0.05 * between(falls)).tolist() == pytest.approx([0.113750, 0.475, 0.905])
    assert between(np.ones(3)).tolist() == [0.0] * 3


def planted(losses):
    """Gradients of 24 rows whose domains have the mean norms 1, 2 and 0.5, without noise."""
    gradients = np.repeat([[1.0, 0.0], [0.0, 2.0], [0.5, 0.0]], 8, axis=0)
    return FakeSignals(np.repeat(losses, 8), gradients=gradients)


def test_dynamix_tilts_the_prior_by_relative_falls():
    mixer = DynamixSft(DynamixSft.Params(rows_per_domain=4, memory=0.5))
    signals = planted([2.0, 1.0, 5.0])
    assert mixer.mix(warming(context(THREE, signals=signals))).proportions.tolist() == [1 / 3] * 3
    falls, value = np.array([1.0 / 2, 4.0 / 1, 0.25 / 5]), np.zeros(3)
    for _ in range(3):
        found = mixer.mix(context(THREE, signals=signals)).proportions
        value = 0.5 * value + 0.5 * (falls - falls.min()) / np.ptp(falls)
        powers = np.exp(4.0 * value)
        np.testing.assert_allclose(found, 0.7 * powers / powers.sum() + 0.1, rtol=1e-6)


def test_rnb_of_the_specification():
    products = np.array([[4.0, 1, 0], [1, 2, -1], [0, -1, 3]])
    wanted = np.array([0.5, 0.3, 0.2])
    assert balanced(products, wanted, 1.0).tolist() == pytest.approx([0.495722, 0.282395, 0.221882], abs=1e-6)
    assert balanced(products, wanted, 3.0).tolist() == pytest.approx([0.784598, 0.145046, 0.070356], abs=1e-6)
    assert balanced(np.zeros((3, 3)), wanted, 3.0) is None


def test_rnb_follows_the_evaluation():
    signals = planted([1.0, 1.0, 1.0])
    mixer = RegroupBalance(RegroupBalance.Params(evaluation={"a": 0.0, "b": 0.0, "c": 1.0}, last_blocks=None))
    assert mixer.mix(warming(context(THREE, signals=signals))).proportions.tolist() == [1 / 3] * 3
    aligned = np.array([0.5, 0.0, 0.25])  # products with the gradient of c
    powers = np.exp(3.0 * aligned / np.linalg.norm(aligned))
    found = mixer.mix(context(THREE, signals=signals)).proportions
    np.testing.assert_allclose(found, powers / powers.sum(), rtol=1e-6)
    none = FakeSignals(np.ones(24), gradients=np.zeros((24, 2)))
    with pytest.raises(DataError, match="sum to 0"):
        mixer.mix(context(THREE, signals=none))
    with pytest.raises(ValueError, match="evaluation: 'sizes' is neither"):
        RegroupBalance.Params(evaluation="sizes")


def test_grape_of_the_specification():
    half, even = logs(np.full(2, 0.5)), logs(np.full(3, 1 / 3))
    tasks = exponentiated(half, -np.array([2.0, 0.5]), eta=1.0)
    assert softmax(tasks).tolist() == pytest.approx([0.182426, 0.817574], abs=1e-6)
    products = np.array([[1, 0.2], [0.1, 0.9], [-0.3, 0.4]])
    aligned = products @ softmax(tasks)
    assert aligned.tolist() == pytest.approx([0.345940, 0.754060, 0.272302], abs=1e-6)
    assert softmax(exponentiated(even, aligned, eta=1.0)).tolist() == pytest.approx(
        [0.291291, 0.438098, 0.270612], abs=1e-6
    )
    z, alpha = grape_update(half, even, products, eta=0.7, eta_targets=0.4)
    slow_z = [0.5 * math.exp(-0.4 * sum(products[:, n]) / 3) for n in range(2)]
    slow_z = [value / sum(slow_z) for value in slow_z]
    slow = [math.exp(0.7 * sum(slow_z[n] * products[k, n] for n in range(2))) for k in range(3)]
    assert softmax(z).tolist() == pytest.approx(slow_z)
    assert softmax(alpha).tolist() == pytest.approx([value / sum(slow) for value in slow])


def test_grape_serves_who_helps_the_target_that_improves_least():
    """Domain a helps the first target, b the second one, whose gradient is small: its weight grows."""
    gradients = np.repeat([[1.0, 0.0], [0.0, 1.0], [0.1, 0.1]], 8, axis=0)
    signals = FakeSignals(
        np.ones(24),
        gradients=gradients,
        targets={"x": [1.0], "y": [1.0]},
        target_rows={"x": [[4.0, 0.0]], "y": [[0.0, 1.0]]},
    )
    mixer = Grape(Grape.Params(rows_per_domain=4, eta_targets=1.0, eta=0.5))
    for _ in range(12):
        found = mixer.mix(example_context(THREE, targets=("x", "y"), signals=signals))
    tasks = softmax(mixer.log_tasks)
    assert tasks[1] > 0.8
    assert found.proportions[2] < found.proportions[:2].min()
    assert found.reason.startswith(f"largest weight {tasks[1]:.3g} (y): ")
