"""Scores towards weighted answers against gradients taken one answer at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dataflex.errors import ComponentError, DataError, DataFlexError
from dataflex.signals.gradients.scorers import responses_digest
from dataflex.signals.identity import state_identity
from dataflex.signals.kinds import ResponseGradientScores
from dataflex.signals.losses import row_losses
from dataflex.signals.model_access import Corpus
from dataflex.signals.runner import SignalCache
from dataflex.signals.specs import GradientSpec, WeightedResponse
from dataflex.signals.store import ArrayStore
from tests.signals.tiny import asking, assert_same, collate, llama, lora, make_rows, snapshot

GOOD = [
    WeightedResponse(prompt=[5, 6, 7], response=[8, 2], weight=0.5, group=0),
    WeightedResponse(prompt=[5, 6, 7], response=[9, 10, 11, 12, 2], weight=-0.5, group=0),
    WeightedResponse(prompt=[4], response=[2], weight=2.0, group=7),
    WeightedResponse(prompt=[5, 6, 7], response=[13], weight=0.25, group=0),
]
OTHER = [WeightedResponse(prompt=[3, 3], response=[20, 21, 2], weight=-1.0, group=0)]


def service(model, budget=24, **options):
    rows = make_rows(8)
    train = Corpus(dataset=rows, lengths=rows.lengths, identity="pool")
    return asking(model, train, token_budget=budget, **options), rows


def flat_gradient(model, loss):
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return (
        torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, found, strict=True)])
        .double()
        .numpy()
    )


def answer_gradient(model, one):
    """Of -log p(answer | prompt), summed over tokens, from the log-probabilities themselves."""
    ids = torch.tensor([[*one.prompt, *one.response]])
    log_p = torch.log_softmax(model(input_ids=ids).logits[0].float(), dim=-1)
    start = len(one.prompt)
    total = -sum(log_p[start + i - 1, token] for i, token in enumerate(one.response))
    return flat_gradient(model, total)


def unit(x):
    return x / np.linalg.norm(x)


def expected(model, rows, tasks, normalize, over_groups):
    model.eval()
    columns = []
    for answers in tasks:
        groups = {}
        for one in answers:
            groups[one.group] = groups.get(one.group, 0) + one.weight * answer_gradient(model, one)
        vectors = [unit(g) if over_groups and normalize else g for g in groups.values()]
        columns.append(np.mean(vectors, axis=0))
        if normalize and not over_groups:
            columns[-1] = unit(columns[-1])
    scores = []
    for row in range(len(rows)):
        loss = row_losses(model, collate(rows.__getitems__([row])))[0]
        if not torch.isfinite(loss):
            scores.append([np.nan] * len(tasks))
            continue
        gradient = flat_gradient(model, loss)
        scores.append([(unit(gradient) if normalize else gradient) @ column for column in columns])
    return np.array(scores)


@pytest.mark.slow
@pytest.mark.parametrize("make", [llama, lora])
@pytest.mark.parametrize(("normalize", "over_groups"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("budget", [6, 1000])
def test_scores_are_those_of_single_answers_added_up(make, normalize, over_groups, budget):
    model = make()
    signals, rows = service(model, budget)
    spec = GradientSpec(precondition="none", normalize=normalize, mean_of_cosines=over_groups)
    before = snapshot(model)
    found = signals(ResponseGradientScores(**vars(spec), responses={"good": GOOD, "other": OTHER}), np.arange(8))
    assert_same(before, snapshot(model))
    wanted = expected(model, rows, [GOOD, OTHER], normalize, over_groups)
    assert np.isnan(wanted).any()
    np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=2e-5 * np.nanmax(np.abs(wanted)))


def test_sketches_come_close():
    model = llama()
    signals, rows = service(model)
    spec = GradientSpec(precondition="none", sketch_size=4096)
    found = signals(ResponseGradientScores(**vars(spec), responses={"good": GOOD}), np.arange(8))
    assert np.nanmax(np.abs(found - expected(model, rows, [GOOD], True, True))) < 4 / 64


def test_a_step_along_the_best_row_raises_the_weighted_log_probability():
    """The sign convention: descending on a row of positive score lowers sum of weight x -log p."""
    model = llama()
    signals, rows = service(model)
    spec = GradientSpec(precondition="none", normalize=False, mean_of_cosines=False)
    scores = signals(ResponseGradientScores(**vars(spec), responses={"good": GOOD}), np.arange(8))[:, 0]
    best = int(np.nanargmax(np.abs(scores)))
    model.eval()

    def objective():
        with torch.no_grad():
            total = {0: 0.0, 7: 0.0}
            for one in GOOD:
                ids = torch.tensor([[*one.prompt, *one.response]])
                log_p = torch.log_softmax(model(input_ids=ids).logits[0].double(), dim=-1)
                start = len(one.prompt)
                total[one.group] -= one.weight * sum(float(log_p[start + i - 1, t]) for i, t in enumerate(one.response))
            return np.mean(list(total.values()))

    start = objective()
    loss = row_losses(model, collate(rows.__getitems__([best])))[0]
    parameters = [p for p in model.parameters() if p.requires_grad]
    rate = 1e-4
    with torch.no_grad():
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter -= rate * gradient
    assert objective() - start == pytest.approx(-rate * scores[best], rel=0.05)


def test_answers_are_kept_by_all_that_they_say(tmp_path):
    model = llama()
    book = SignalCache(store=ArrayStore(tmp_path), model_identity=lambda: state_identity(model.named_parameters()))
    signals, _ = service(model, cache=book)
    spec = GradientSpec(precondition="none")
    first = signals(ResponseGradientScores(**vars(spec), responses={"good": GOOD}), np.arange(8))
    heavier = [WeightedResponse(prompt=GOOD[0].prompt, response=GOOD[0].response, weight=0.75, group=0), *GOOD[1:]]
    assert responses_digest(GOOD) != responses_digest(heavier)
    assert not np.array_equal(
        first, signals(ResponseGradientScores(**vars(spec), responses={"good": heavier}), np.arange(8)), equal_nan=True
    )
    again, _ = service(model, cache=SignalCache(store=ArrayStore(tmp_path), model_identity=book.model_identity))
    np.testing.assert_array_equal(
        first, again(ResponseGradientScores(**vars(spec), responses={"good": GOOD}), np.arange(8))
    )


def test_tasks_without_answers_and_answers_without_tokens_are_refused():
    signals, _ = service(llama())
    spec = GradientSpec(precondition="none")
    with pytest.raises(DataError, match="task 1 has none"):
        signals(ResponseGradientScores(**vars(spec), responses={"good": GOOD, "none": []}), np.arange(8))
    empty = [WeightedResponse(prompt=[], response=[2], weight=1.0, group=3)]
    with pytest.raises(DataError, match="group 3 has no prompt"):
        signals(ResponseGradientScores(**vars(spec), responses={"empty": empty}), np.arange(8))


# ---------------------------------------------------------------- one rank for all


def test_on_one_rank_gives_the_value_and_its_own_error():
    signals, _ = service(llama())
    assert signals.on_one_rank("sum", lambda: 1 + 1) == 2

    def fails():
        raise DataError("no data")

    with pytest.raises(DataError, match="no data"):
        signals.on_one_rank("reading", fails)


@pytest.mark.parametrize(
    ("error", "told"), [(DataError("no data"), "no data"), (KeyError("x"), "grading failed on rank 0")]
)
def test_other_ranks_are_told(monkeypatch, error, told):
    """Both sides of the exchange, one after the other."""
    from dataflex import comm

    signals, _ = service(llama())
    sent = []
    monkeypatch.setattr(comm, "broadcast_object", lambda value: sent.append(value) or value)

    def fails():
        raise error

    with pytest.raises(type(error)):
        signals.on_one_rank("grading", fails)
    monkeypatch.setattr(comm, "rank", lambda: 1)
    monkeypatch.setattr(comm, "broadcast_object", lambda _value: sent[0])
    with pytest.raises(ComponentError, match=told):
        signals.on_one_rank("grading", lambda: pytest.fail("another rank computes too"))
    monkeypatch.setattr(comm, "broadcast_object", lambda _value: ("", 5))
    assert signals.on_one_rank("grading", lambda: 6) == 5
    assert issubclass(ComponentError, DataFlexError)
