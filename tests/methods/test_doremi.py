"""DoReMi and Group DRO against a slow transcription and the fixed numbers of the papers' arithmetic."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from dataflex.errors import CheckpointError, ConfigError
from dataflex.mixers import loss_weights
from dataflex.mixers.loss_weights import DoReMi, GroupDro
from dataflex.mixing.doremi import _model
from dataflex.plan.domains import SUMS, DomainStats
from dataflex.plan.proportions import exponentiated, logs, read_proportions, softmax, write_proportions
from dataflex.state import load_state, save_state
from dataflex.testing import example_context
from dataflex.train.feedback import DomainSums
from dataflex.train.loss import without_sampling

NAMES = ("a", "b", "c")


def stats(losses, reference=None, *, names=None, step=0):
    """Statistics of one step from token losses by domain (an absent domain has none)."""
    names = NAMES[: len(losses)] if names is None else names
    sums = np.zeros((len(SUMS), len(names)))
    for k, of_domain in enumerate(losses):
        excess = [loss - ref for loss, ref in zip(of_domain, reference[k] if reference else of_domain, strict=True)]
        sums[:, k] = [
            sum(of_domain),
            sum(max(e, 0.0) for e in excess),
            sum(e > 0 for e in excess),
            len(of_domain),
            1.0 * bool(of_domain),
            1.0 * bool(of_domain),
        ]
    return DomainStats.of(
        sums, names=names, step=step, total_steps=100, proportions=np.full(len(names), 1 / len(names))
    )


def doremi(**params):
    return DoReMi(DoReMi.Params(reference="ref", **params))


def scored(*scores, tokens=4):
    """Statistics whose mean clipped excess is given; None is an absent domain."""
    losses = [[] if s is None else [s] * tokens for s in scores]
    return stats(losses, [[0.0] * len(values) for values in losses])


# ---------------------------------------------------------------- fixed numbers


@pytest.mark.parametrize(("c", "want"), [(0.01, (0.665, 0.335)), (1e-3, (0.6665, 0.3335))])
def test_one_update(c, want):
    method = doremi(smoothing=c)
    method.observe(scored(math.log(2), 0.0))
    np.testing.assert_allclose(method.alpha, want, rtol=0, atol=1e-4)
    exact = [(1 - c) * 2 / 3 + c / 2, (1 - c) / 3 + c / 2]
    np.testing.assert_allclose(method.alpha, exact, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("variant", "want"), [("repo", (0.65556, 0.34444)), ("paper", (0.73333, 0.26667)), ("levanter", (0.73333, 0.26667))]
)
def test_the_average_counts_the_first_weights_as_the_variant_has_it(variant, want):
    method = doremi(smoothing=0.0, variant=variant)
    for _ in range(2):
        method.observe(scored(math.log(2), 0.0))
    np.testing.assert_allclose(method.alpha, [0.8, 0.2], rtol=0, atol=1e-14)
    np.testing.assert_allclose(method.mean_alpha, want, rtol=0, atol=5e-6)


@pytest.mark.parametrize(("variant", "want"), [("repo", 0.5), ("paper", 0.5), ("levanter", 1.0)])
def test_excess_is_clipped_token_by_token(variant, want):
    method = doremi(variant=variant)
    method.observe(stats([[2.0, 0.0], [1.0, 1.0]], [[1.0, 1.0], [1.0, 1.0]]))
    assert method.scores.tolist() == [want, 0.0]


def test_weights_are_corrected_for_the_sampling():
    drawn = np.array([0.75, 0.25])
    np.testing.assert_allclose(without_sampling(np.array([0.6, 0.4]), drawn), [1 / 3, 2 / 3], atol=1e-15)
    assert without_sampling(np.array([0.0, 1.0]), np.array([1.0, 0.0])).tolist() == [0.0, 0.0]
    method = doremi(sampling=(3.0, 1.0))
    assert method.mix(example_context({"a": 6, "b": 2})).proportions.tolist() == [0.75, 0.25]
    np.testing.assert_allclose(method.loss_weights(), [0.75, 0.25], atol=1e-15)
    assert method.undoes_sampling
    assert doremi(variant="paper", normalizer="weight_sum").undoes_sampling
    assert not doremi(variant="paper").undoes_sampling


@pytest.mark.parametrize(("variant", "first"), [("repo", 0.75), ("paper", 0.5), ("levanter", 0.5)])
def test_where_the_weights_start(variant, first):
    """In the authors' code at the proportions that are sampled; one update by ln 2 doubles a's odds."""
    method = doremi(sampling=(3.0, 1.0, 0.0), variant=variant, smoothing=0.0)
    method.mix(example_context({"a": 6, "b": 2, "c": 1}))
    np.testing.assert_allclose(method.alpha, [first, 1 - first, 0.0], atol=1e-15)
    method.observe(scored(math.log(2), 0.0, 0.0))
    odds = 2 * first / (1 - first)
    np.testing.assert_allclose(method.alpha, [odds / (1 + odds), 1 / (1 + odds), 0.0], atol=1e-14)
    mean = (first + odds / (1 + odds)) / 2 if variant == "repo" else odds / (1 + odds)
    assert method.mean_alpha[0] == pytest.approx(mean)


@pytest.mark.parametrize(
    ("params", "want"),
    [
        ({}, "weight_sum"),
        ({"variant": "paper"}, "domain"),
        ({"variant": "levanter"}, "domain"),
        ({"variant": "paper", "normalizer": "weight_sum"}, "weight_sum"),
        ({"normalizer": "domain"}, "domain"),
    ],
)
def test_the_normalizer_is_the_variants_unless_chosen(params, want):
    assert doremi(**params).loss_normalizer == want


def test_an_absent_domain_keeps_its_score_or_has_none():
    kept, zero = doremi(initial_score=7.0), doremi(variant="levanter")
    for method in (kept, zero):
        method.observe(scored(0.5, None))
        method.observe(scored(None, 0.25))
    assert kept.scores.tolist() == [0.5, 0.25]  # carried, seen
    assert zero.scores.tolist() == [0.0, 0.25]
    fresh = doremi(initial_score=7.0)
    fresh.observe(scored(0.5, None))
    assert fresh.scores.tolist() == [0.5, 7.0]


def test_a_domain_never_seen_has_the_score_of_a_blind_guess(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 50257}), encoding="utf-8")
    method = DoReMi(DoReMi.Params(reference=str(tmp_path)))
    method.observe(scored(0.5, None))
    assert method.scores.tolist() == [0.5, math.log(50257)]
    with pytest.raises(ConfigError, match=r"dynamic.mixer.initial_score: .* ln\(vocabulary\)"):
        doremi().observe(scored(0.5, None))


def test_the_vocabulary_is_read_alike_wherever_it_is_asked_for(tmp_path):
    """Of a model of several parts, and of an adapter on it."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for folder, name, told in (
        (base, "config.json", {"text_config": {"vocab_size": 50257}}),
        (adapter, "adapter_config.json", {"base_model_name_or_path": str(base)}),
    ):
        folder.mkdir()
        (folder / name).write_text(json.dumps(told), encoding="utf-8")
    for folder in (base, adapter):
        assert loss_weights.vocabulary_size(folder) == _model(folder)["vocabulary"] == 50257
    assert _model(tmp_path)["vocabulary"] is None


def test_group_dro():
    method = GroupDro(GroupDro.Params())
    losses = [[2.0, 2.0], [1.0]]
    method.observe(stats(losses))
    np.testing.assert_allclose(method.alpha, [0.5025, 0.4975], rtol=0, atol=1e-6)
    assert float(method.alpha @ [2.0, 1.0]) == pytest.approx(1.5025, abs=1e-6)
    assert method.loss_normalizer == "domain"


def test_group_dro_adjusts_for_small_domains_and_leaves_absent_ones():
    method = GroupDro(GroupDro.Params(eta=1.0, adjustment=2.0))
    method.mix(example_context({"a": 4, "b": 16}))
    method.observe(stats([[1.0], []]))
    want = np.exp([1.0 + 2.0 / 2.0, 2.0 / 4.0])
    np.testing.assert_allclose(method.alpha, want / want.sum(), atol=1e-14)
    plain = GroupDro(GroupDro.Params(eta=1.0))
    plain.observe(stats([[], []]))
    assert plain.alpha.tolist() == [0.5, 0.5]


# ---------------------------------------------------------------- a slow transcription


def transcription(steps, *, eta, c, num_domains, blind, variant):
    """DoReMi in plain Python: weights after each step, and their mean."""
    alpha = [1.0 / num_domains] * num_domains
    score = [blind] * num_domains
    average, counter = list(alpha), 1
    sums, ways = [0.0] * num_domains, []
    for step in steps:
        for d in range(num_domains):
            excess = [max(loss - ref, 0.0) for loss, ref in step[d]]
            if variant == "levanter":
                above = [e for e in excess if e > 0]
                score[d] = sum(above) / len(above) if above else 0.0
            elif excess:
                score[d] = sum(excess) / len(excess)
        moved = [a * math.exp(eta * s) for a, s in zip(alpha, score, strict=True)]
        alpha = [(1 - c) * m / sum(moved) + c / num_domains for m in moved]
        counter += 1
        average = [(x * (counter - 1) + a) / counter for x, a in zip(average, alpha, strict=True)]
        sums = [x + a for x, a in zip(sums, alpha, strict=True)]
        ways.append(alpha)
    return ways, average if variant == "repo" else [x / len(steps) for x in sums]


@pytest.mark.parametrize("variant", ["repo", "paper", "levanter"])
@pytest.mark.parametrize("seed", range(4))
def test_a_run_equals_the_transcription(variant, seed):
    rng = np.random.default_rng(seed)
    steps = [[[(rng.gamma(2.0), rng.gamma(2.0)) for _ in range(rng.integers(0, 5))] for _ in NAMES] for _ in range(30)]
    method = doremi(variant=variant, eta=0.7, smoothing=0.01, initial_score=None if variant == "levanter" else 3.0)
    ways, average = transcription(steps, eta=0.7, c=0.01, num_domains=3, blind=3.0, variant=variant)
    for step, want in zip(steps, ways, strict=True):
        method.observe(stats([[a for a, _ in d] for d in step], [[b for _, b in d] for d in step]))
        np.testing.assert_allclose(method.alpha, want, rtol=1e-12)
    np.testing.assert_allclose(method.mean_alpha, average, rtol=1e-12)


# ---------------------------------------------------------------- ranks


def micro_batches(rng, count):
    """Token losses, masks, domains and reference losses of micro-batches of 4 rows."""
    for _ in range(count):
        mask = torch.from_numpy(rng.random((4, 7)) < 0.7)
        loss = torch.from_numpy(rng.gamma(2.0, size=(4, 7)).astype(np.float32)) * mask
        reference = torch.from_numpy(rng.gamma(2.0, size=(4, 7)).astype(np.float32)) * mask
        yield loss, mask, rng.integers(0, 3, size=4), reference


def summed(batches):
    sums = DomainSums(3)
    for batch in batches:
        sums.add(*batch)
    return sums.take(torch.device("cpu"))


def test_two_ranks_with_different_domains_are_one_rank_with_all():
    """What ``DomainSums.take`` does over ranks is adding: rank 0 sees domains a and b only, rank 1 only c."""
    rng = np.random.default_rng(3)
    one, two = doremi(initial_score=2.0), doremi(initial_score=2.0)
    for step in range(20):
        batches = list(micro_batches(rng, 6))
        ranks = [
            [(loss[k], mask[k], domains[k], ref[k]) for loss, mask, domains, ref in batches for k in [keep(domains)]]
            for keep in (lambda d: d < 2, lambda d: d == 2)
        ]
        whole = summed(batches)
        parts = summed(ranks[0]) + summed(ranks[1])
        rest = {"names": NAMES, "step": step, "total_steps": 20, "proportions": np.full(3, 1 / 3)}
        one.observe(DomainStats.of(whole, **rest))
        two.observe(DomainStats.of(parts, **rest))
    assert not np.allclose(one.alpha, 1 / 3, atol=0.02)
    np.testing.assert_allclose(one.alpha, two.alpha, rtol=0, atol=1e-12)
    np.testing.assert_allclose(one.mean_alpha, two.mean_alpha, rtol=0, atol=1e-12)


# ---------------------------------------------------------------- never, state, outcome


def test_a_share_of_zero_means_never():
    method = doremi(sampling={"a": 1.0, "b": 0.0, "c": 1.0}, smoothing=0.1)
    method.mix(example_context({"a": 3, "b": 3, "c": 3}))
    for _ in range(5):
        method.observe(scored(0.3, None, 0.1))
    assert method.alpha[1] == 0.0
    assert method.loss_weights()[1] == 0.0
    assert np.isfinite(method.alpha).all()
    assert method.mean_alpha[1] == 0.0


def test_large_scores_do_not_overflow_and_smoothing_brings_a_domain_back():
    method = doremi(eta=1000.0, smoothing=1e-3)
    method.observe(scored(5.0, 0.0))
    np.testing.assert_allclose(method.alpha, [1 - 5e-4, 5e-4], rtol=1e-9)
    method.observe(scored(0.0, 0.02))
    assert method.alpha[1] > 0.99


def test_state_is_exact(tmp_path):
    straight, rng = doremi(initial_score=2.0), np.random.default_rng(5)
    steps = [scored(*(None if rng.random() < 0.3 else rng.random() for _ in NAMES)) for _ in range(40)]
    straight.mix(example_context({"a": 3, "b": 2, "c": 1}))
    for step in steps[:17]:
        straight.observe(step)
    save_state(tmp_path, "state", straight.state_dict())
    resumed = doremi(initial_score=2.0)
    resumed.load_state_dict(load_state(tmp_path, "state"))
    assert resumed.loss_weights().tolist() == straight.loss_weights().tolist()
    for step in steps[17:]:
        straight.observe(step)
        resumed.observe(step)
    assert resumed.alpha.tolist() == straight.alpha.tolist()
    assert resumed.mean_alpha.tolist() == straight.mean_alpha.tolist()
    assert resumed.outcome().details == straight.outcome().details


@pytest.mark.parametrize("names", [("a", "b", "d"), ("b", "a", "c"), ("a", "b")])
def test_a_state_of_other_domains_is_refused(names):
    method = doremi()
    method.observe(scored(0.1, 0.2, 0.3))
    resumed = doremi()
    resumed.load_state_dict(method.state_dict())
    with pytest.raises(CheckpointError, match="the saved weights are of the domains a, b, c"):
        resumed.mix(example_context(dict.fromkeys(names, 4)))


def test_the_outcome_is_a_proportions_file(tmp_path):
    method = doremi(smoothing=0.0)
    assert method.outcome() is None
    method.mix(example_context({"a": 6, "b": 2}, unit="tokens"))
    assert method.outcome() is None
    for _ in range(2):
        method.observe(scored(math.log(2), 0.0))
    read = read_proportions(write_proportions(tmp_path / "doremi.json", method.outcome()))
    assert read.names == ("a", "b")
    np.testing.assert_allclose(read.proportions, [0.65556, 0.34444], atol=5e-6)
    assert read.method == "doremi"
    assert read.details["sizes"] == {"a": 60.0, "b": 20.0}
    assert read.details["vectors_in_mean"] == 3
    assert read.details["trajectory"]["steps"] == [0, 1, 2]
    np.testing.assert_allclose(read.details["trajectory"]["weights"]["a"], [0.5, 2 / 3, 0.8], atol=1e-12)
    assert read.provenance["settings"]["reference"] == "ref"


def test_an_empty_reference_is_refused():
    with pytest.raises(ValueError, match="reference: is empty"):
        DoReMi.Params(reference=" ")


# ---------------------------------------------------------------- the shared arithmetic


def test_a_trajectory_of_any_length_is_thinned_evenly_and_resumes(monkeypatch):
    monkeypatch.setattr(loss_weights, "_MOST_VECTORS", 16)
    whole, part, alphas = doremi(initial_score=2.0), doremi(initial_score=2.0), []
    for step in range(100):
        for method in (whole, part) if step > 50 else (whole,):
            method.observe(scored(math.cos(step), 0.0))
        alphas.append(whole.alpha.tolist())
        if step == 50:
            part.load_state_dict(whole.state_dict())
    told = whole.outcome().details["trajectory"]
    assert told["steps"] == list(range(0, 101, 8))
    assert told["weights"]["a"] == [0.5, *(alphas[step - 1][0] for step in told["steps"][1:])]
    assert part.outcome().details == whole.outcome().details


def test_exponentiated_gradient_with_smoothing_and_with_a_zero():
    p = np.array([0.2, 0.3, 0.5])
    got = softmax(exponentiated(logs(p), np.array([1.0, 0.0, -1.0]), eta=2.0))
    want = p * np.exp([2.0, 0.0, -2.0])
    np.testing.assert_allclose(got, want / want.sum(), rtol=1e-14)
    got = softmax(exponentiated(logs(p), np.array([1.0, 0.0, -1.0]), eta=2.0, smoothing=0.25))
    np.testing.assert_allclose(got, 0.75 * want / want.sum() + 0.25 / 3, rtol=1e-14)
    never = exponentiated(logs(np.array([0.0, 1.0])), np.array([np.nan, 1.0]), eta=1.0, smoothing=0.5)
    assert softmax(never).tolist() == [0.0, 1.0]


def test_a_mean_that_collapsed_says_so_and_what_helps():
    method = doremi(eta=2.0, smoothing=0.01)
    method.observe(scored(0.1, 0.0, 0.0))
    assert "warning" not in method.outcome().details
    for _ in range(30):
        method.observe(scored(4.0, 0.0, 0.0))
    assert method.mean_alpha[0] > 0.8
    told = method.outcome().details["warning"]
    assert f"a has {method.mean_alpha[0]:.1%} of it" in told
    assert "Lower eta (now 2, try 0.2), raise smoothing (now 0.01)" in told
    assert "min_proportion" in told


def test_a_weight_that_jumps_is_no_collapse():
    """Bang-bang: every step's weights sit on one domain, and the mean over the run is even."""
    method = doremi(eta=50.0, variant="paper")
    for step in range(30):
        method.observe(scored(*(1.0 * (step % 3 == k) + 0.5 * (step // 3) for k in range(3))))
        assert method.alpha.max() > 0.9
    assert "warning" not in method.outcome().details


def test_a_first_score_without_effect_is_refused():
    with pytest.raises(ValueError, match=r"initial_score: has no effect under 'variant: levanter'"):
        DoReMi.Params(reference="r", variant="levanter", initial_score=1.0)
