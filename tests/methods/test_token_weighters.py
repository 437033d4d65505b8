"""slm, rho, focal and token against slow transcriptions and the specification's numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dataflex.config.build import method_block
from dataflex.errors import ComponentError
from dataflex.method import BatchView
from dataflex.weighters.loss import Rho, SelectiveLanguageModelling, largest
from dataflex.weighters.token import Focal, TokenWeighter, clip_quantile
from tests.rounding import printed


def token_batch(loss, reference=None, mask=None, entropy=None, sequence=None, rows=None):
    """One rank's micro-batch from token losses [R, T]."""
    loss_BT = torch.tensor(loss, dtype=torch.float32)
    mask_BT = torch.ones_like(loss_BT, dtype=torch.bool) if mask is None else torch.tensor(mask, dtype=torch.bool)
    loss_BT = loss_BT * mask_BT
    tokens = mask_BT.sum(dim=1)
    means = loss_BT.sum(dim=1) / tokens.clamp(min=1)
    index = None if sequence is None else torch.tensor(sequence)
    if index is not None:
        count = int(index.max()) + 1
        tokens = torch.zeros(count, dtype=torch.int64).index_add(0, index.flatten(), mask_BT.long().flatten())
        means = torch.zeros(count).index_add(0, index.flatten(), loss_BT.flatten()) / tokens
    return BatchView(
        rows_B=np.arange(len(means)) if rows is None else np.array(rows),
        domains_B=np.zeros(len(means), dtype=np.int64),
        loss_B=means,
        tokens_B=tokens,
        loss_BT=loss_BT,
        mask_BT=mask_BT,
        loss_M=means,
        tokens_M=tokens,
        local=slice(0, len(means)),
        step=0,
        total_steps=10,
        sequence_BT=index,
        reference_BT=None if reference is None else torch.tensor(reference, dtype=torch.float32) * mask_BT,
        entropy_BT=None if entropy is None else torch.tensor(entropy, dtype=torch.float32) * mask_BT,
    )


def slm(**params):
    return SelectiveLanguageModelling(SelectiveLanguageModelling.Params(reference="r", **params))


def slow_kept(excess, mask, share):
    """The ceil(share n) supervised positions of largest excess, the first among equals."""
    places = [(i, j) for i, row in enumerate(mask) for j, valid in enumerate(row) if valid]
    ranked = sorted(places, key=lambda place: -excess[place[0]][place[1]])
    count = max(1, math.ceil(round(share * len(places), 6)))
    return {place for place in ranked[:count]}


# ---------------------------------------------------------------- slm


@pytest.mark.parametrize("threshold", ["global", "local"])
def test_slm_keeps_the_tokens_of_the_specification(threshold):
    """With e = (.5, -.2, 1, .1, .3), 60 % of 5, and the mean of the kept losses."""
    loss = [[2.0, 1.0, 3.0, 0.5, 1.5]]
    excess = [[0.5, -0.2, 1.0, 0.1, 0.3]]
    reference = [[a - b for a, b in zip(loss[0], excess[0], strict=True)]]
    batch = token_batch(loss, reference)
    kept = slm(keep=0.6, threshold=threshold).weigh(batch)
    assert kept.tolist() == [[1.0, 0.0, 1.0, 0.0, 1.0]]
    assert ((kept * batch.loss_BT).sum() / kept.sum()).item() == pytest.approx(2.166667, abs=printed(6, 8, 3.0))


@given(
    seed=st.integers(0, 10_000),
    share=st.sampled_from([0.01, 0.3, 0.6, 0.7, 1.0]),
    ties=st.booleans(),
    threshold=st.sampled_from(["global", "local"]),
)
def test_slm_against_sorting(seed, share, ties, threshold):
    rng = np.random.default_rng(seed)
    rows, width = int(rng.integers(1, 4)), int(rng.integers(1, 8))
    mask = rng.random((rows, width)) < 0.7
    loss, reference = rng.uniform(0, 4, (2, rows, width)).astype(np.float32)
    if ties:
        loss, reference = loss.round(), reference.round()
    kept = slm(keep=share, threshold=threshold).weigh(token_batch(loss, reference, mask))
    wanted = slow_kept(loss - reference, mask, share) if mask.any() else set()
    assert {tuple(place) for place in kept.nonzero().tolist()} == wanted
    assert kept.dtype == torch.float32


def test_slm_keeps_all_at_one_hundred_per_cent_and_nothing_where_nothing_is_supervised():
    mask = [[True, False, True], [False, False, False]]
    batch = token_batch(np.ones((2, 3)), np.zeros((2, 3)), mask)
    assert slm(keep=1.0).weigh(batch).bool().tolist() == mask
    nothing = token_batch(np.ones((1, 2)), np.zeros((1, 2)), [[False, False]])
    assert slm().weigh(nothing).sum() == 0


def test_slm_without_a_reference_is_refused():
    with pytest.raises(ValueError, match="reference: is empty; without a reference model there is no excess loss"):
        SelectiveLanguageModelling.Params(reference=" ")


def test_a_share_of_several_tokens_is_rounded_as_written():
    for count in range(1, 200):
        values = torch.arange(count, dtype=torch.float32)
        assert int(largest(values, torch.ones(count, dtype=torch.bool), 0.6).sum()) == -(-count * 6 // 10)


# ---------------------------------------------------------------- rho


def rho(**params):
    return Rho(Rho.Params(reference="r", **params))


def test_rho_keeps_the_sequences_of_the_specification():
    """l - ir = (1, .2, .9, -.3), two of four."""
    loss = np.array([2.0, 1.0, 3.0, 0.5])
    batch = token_batch(np.repeat(loss[:, None], 3, 1), np.repeat((loss - [1, 0.2, 0.9, -0.3])[:, None], 3, 1))
    assert rho(keep=0.5).weigh(batch).tolist() == [0.5, 0.0, 0.5, 0.0]
    assert rho().weigh(batch).tolist() == [1.0, 0.0, 0.0, 0.0]  # a tenth, rounded up


def test_rho_takes_means_over_documents_and_leaves_out_rows_without_labels():
    loss, reference = [[1.0, 1.0, 4.0, 4.0]], [[0.0, 0.5, 3.9, 3.9]]
    batch = token_batch(loss, reference, sequence=[[0, 0, 1, 1]], rows=[7, 7])
    assert rho(keep=0.5).weigh(batch).tolist() == [1.0, 0.0]
    empty = token_batch(np.ones((2, 2)), np.zeros((2, 2)), [[False, False], [True, True]])
    assert rho(keep=1.0).weigh(empty).tolist() == [0.0, 1.0]


# ---------------------------------------------------------------- focal and token


def from_probabilities(*p, **more):
    return token_batch([[-math.log(x) for x in p]], **more)


def test_dft_and_focal_are_those_of_the_specification():
    """Weight times cross-entropy at p = .9, .5, .1."""
    batch = from_probabilities(0.9, 0.5, 0.1)
    dft = TokenWeighter(TokenWeighter.Params()).weigh(batch) * batch.loss_BT
    np.testing.assert_allclose(dft[0], [0.094824, 0.346574, 0.230259], rtol=0, atol=printed(6, 8))
    by_name = TokenWeighter(TokenWeighter.Params(function="focal")).weigh(batch)
    weighter = Focal(Focal.Params())
    focal = weighter.weigh(batch) * batch.loss_BT
    np.testing.assert_allclose(focal[0], [0.001054, 0.173287, 1.865094], rtol=0, atol=printed(6, 8, 2.0))
    assert torch.equal(weighter.weigh(batch), by_name)
    assert (weighter.normalizer, TokenWeighter(TokenWeighter.Params()).normalizer) == ("num_tokens", "num_tokens")
    assert Focal(Focal.Params(gamma=0.0)).weigh(batch).tolist() == [[1.0, 1.0, 1.0]]


def test_focal_does_not_cancel_near_one():
    batch = token_batch([[1e-6, 1e-8]])
    weights = Focal(Focal.Params(gamma=1.0)).weigh(batch)[0].double().tolist()
    assert weights == pytest.approx([1e-6, 1e-8], rel=1e-5)


def test_entropy_and_excess():
    batch = token_batch([[1.0, 2.0]], [[1.0, 0.5]], entropy=[[3.0, 1.5]])
    weighter = TokenWeighter(TokenWeighter.Params(function="entropy", power=2.0))
    assert weighter.requires().entropy
    assert weighter.weigh(batch)[0].tolist() == [1.0, 0.25]
    weighter = TokenWeighter(TokenWeighter.Params(function="excess", reference="r"))
    needs = weighter.requires()
    assert (needs.reference.folder, needs.entropy) == ("r", False)
    assert weighter.weigh(batch)[0].tolist() == pytest.approx([0.5, 1 / (1 + math.exp(-1.5))])


@given(st.lists(st.floats(0, 20, width=32), min_size=1, max_size=30), st.floats(0.05, 1.0))
def test_clip_quantile_is_numpys(losses, q):
    edge = np.quantile(np.float32(losses).astype(np.float64), q)
    got = clip_quantile(-torch.tensor(losses, dtype=torch.float64), quantile=q)
    for weight, loss in zip(got.tolist(), losses, strict=True):
        if abs(loss - edge) > 1e-9:
            assert weight == float(loss <= edge)


def test_weights_are_zero_where_nothing_is_supervised():
    mask = [[True, False], [False, True]]
    batch = token_batch([[1.0, 9.0], [9.0, 2.0]], mask=mask, entropy=[[1.0, 1.0], [1.0, 1.0]])
    for name in ("dft", "focal", "entropy", "clip_quantile"):
        weights = TokenWeighter(TokenWeighter.Params(function=name, quantile=1.0)).weigh(batch)
        assert (weights > 0).tolist() == mask, name


OWN = """
def halves(logp, entropy):
    return (logp > -1.5).to(logp.dtype) / 2 + 0 * entropy


def wrong(logp):
    return 1.0


def strange(tokens):
    return tokens
"""


def test_a_function_of_ones_own(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    weighter = TokenWeighter(TokenWeighter.Params(function="own.py:halves"))
    batch = token_batch([[1.0, 2.0, 9.0]], mask=[[True, True, False]], entropy=[[0.0, 0.0, 0.0]])
    assert weighter.weigh(batch).tolist() == [[0.5, 0.0, 0.0]]
    with pytest.raises(ComponentError, match=r"own.py:wrong returned float, expected a tensor of shape \(2,\)"):
        TokenWeighter(TokenWeighter.Params(function="own.py:wrong")).weigh(batch)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"function": "dtf"}, "unknown 'dtf'; did you mean 'dft'"),
        (
            {"function": "own.py:strange"},
            "takes tokens, but a function of tokens takes any of logp, entropy, reference",
        ),
        ({"function": "own.py:nothing"}, "own.py has no function 'nothing'"),
        ({"function": "other.py:f"}, "no such file: other.py"),
        ({"function": "no.such.module:f"}, "no.such.module cannot be imported: ModuleNotFoundError"),
        ({"function": "excess"}, "missing; excess compares with a reference model"),
        ({"function": "dft", "reference": "r"}, "dft does not look at it; remove the key"),
    ],
)
def test_bad_functions_are_told_before_anything_loads(tmp_path, params, message):
    (tmp_path / "own.py").write_text(OWN)
    problems = []
    assert method_block("weighter", {"name": "token", **params}, "dynamic.weighter", problems) is None
    assert len(problems) == 1
    assert message in problems[0]
    assert problems[0].startswith("dynamic.weighter.")
