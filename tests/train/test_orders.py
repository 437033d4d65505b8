"""What a run serves under an orderer, without a Trainer: selections, mixtures, the pool; on ranks, over checkpoints."""

from __future__ import annotations

import numpy as np
import pytest

from dataflex.config.schema import DynamicConfig, MethodConfig
from dataflex.method import Selection, Selector
from dataflex.orderers.patterns import By
from dataflex.plan.domains import Domains
from dataflex.plan.plan import DataPlan
from dataflex.registry import find
from dataflex.rng import stream
from dataflex.testing import FakeSignals
from tests.train.test_controller import built, row_space

SIZES = {"web": 60, "code": 21, "papers": 7}
ROWS = sum(SIZES.values())
STEPS, BATCH = 24, 8
LENGTHS = stream(0, "lengths").permutation(np.arange(ROWS) // 2 + 3)


class Signals(FakeSignals):
    """Losses that are others at every step."""

    def __init__(self):
        super().__init__(np.zeros(ROWS))
        self.seconds, self.asked_rows = 0.0, []
        self.access = type("Access", (), {"model": None, "learning_rate": staticmethod(lambda: 0.1)})()

    def begin(self, step):
        self._losses = losses_at(step).astype(np.float32)

    def __call__(self, signal, rows, *, target=None):
        self.asked_rows.append(rows)
        return self._losses[rows]

    def end(self):
        pass

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def losses_at(step):
    return np.round(stream(step, "losses").random(ROWS) * 50)


def method(kind, name, every=None, warmup_steps=None, **params):
    params = find(kind, name).Params(**params)
    return MethodConfig(kind=kind, name=name, params=params, every=every, warmup_steps=warmup_steps)


def orderer(name="sorting", by="length", **params):
    return method("orderer", name, by=By.of(by), **params) if by else method("orderer", name)


def controller(monkeypatch, order=None, *, mixer=None, selector=None, world=1, rank=0, micro=2, total=STEPS, **block):
    import dataflex.train.controller as module

    monkeypatch.setattr(module, "preserve_state", lambda model: __import__("contextlib").nullcontext())
    given = {key: block.pop(key) for key in ("drop_last", "shuffle", "seed") if key in block}
    config = DynamicConfig(orderer=order, mixer=mixer, selector=selector, **block)
    space = row_space(SIZES, LENGTHS)
    return built(config, total, BATCH, space, micro=micro, world=world, rank=rank, signals=Signals(), **given)


def served(one, first=0, stop=STEPS):
    """Return the rows of each step, global batch by global batch, as this rank's shards have them."""
    return [np.concatenate(one.plan_for(step).shard(step, one.shape)).tolist() for step in range(first, stop)]


def flat(steps):
    return [row for step in steps for row in step]


def by_length(rows):
    return sorted(rows, key=lambda row: (LENGTHS[row], row))


# ---------------------------------------------------------------- the whole pool


@pytest.mark.parametrize("interval", [None, 1, 5, 11])
def test_the_pool_is_served_in_order_epoch_by_epoch(monkeypatch, interval):
    """88 rows are 11 steps: epoch 2 has the same order again, wherever the intervals end."""
    found = flat(served(controller(monkeypatch, orderer(), interval_steps=interval)))
    assert found[:88] == by_length(range(ROWS))
    assert found[88:176] == found[:88]
    assert found[176:] == found[:16]


def test_descending_keeps_equal_rows_in_file_order(monkeypatch):
    found = flat(served(controller(monkeypatch, orderer(descending=True)), 0, 11))
    assert found == sorted(range(ROWS), key=lambda row: (-LENGTHS[row], row))


def test_an_epoch_ends_with_a_short_step_and_is_filled_up_over_ranks(monkeypatch):
    """The last step of an epoch over 86 rows has 6; two ranks need 8, the first rows of the epoch."""
    monkeypatch.setitem(SIZES, "web", 58)
    monkeypatch.setattr(__import__(__name__, fromlist=["x"]), "ROWS", 86)
    monkeypatch.setattr(__import__(__name__, fromlist=["x"]), "LENGTHS", LENGTHS[:86])
    order = by_length(range(86))
    one = controller(monkeypatch, orderer(), micro=2)
    steps = served(one, 0, 12)
    assert [len(step) for step in steps] == [8] * 10 + [6, 8]
    assert flat(steps[:11]) == order
    assert steps[11] == order[:8]
    ranks = [controller(monkeypatch, orderer(), micro=2, world=2, rank=rank) for rank in range(2)]
    last = [each.plan_for(10).shard(10, each.shape) for each in ranks]
    assert sorted(np.concatenate([np.concatenate(part) for part in last]).tolist()) == sorted(order[80:] + order[:2])


def test_rows_are_scored_anew_and_none_comes_back_in_its_epoch(monkeypatch):
    one = controller(monkeypatch, orderer(by="loss"), interval_steps=3)
    found = served(one)
    left = set(range(ROWS))
    for first in range(0, 9, 3):
        losses = losses_at(first)
        wanted = sorted(left, key=lambda row: (losses[row], row))[: 3 * BATCH]
        assert flat(found[first : first + 3]) == wanted
        left -= set(wanted)
    assert flat(found[9:11]) == sorted(left, key=lambda row: (losses_at(9)[row], row))
    assert [len(rows) for rows in one.signals.asked_rows[:5]] == [88, 64, 40, 88, 80]  # those left, or all if it ends
    assert sorted(flat(found[11:22])) == list(range(ROWS))


def test_warm_up_is_random_and_its_rows_are_of_the_epoch(monkeypatch):
    for by in ("length", "loss"):
        one = controller(monkeypatch, orderer(by=by), warmup_steps=4, interval_steps=100)
        found = served(one, 0, 11)
        keys = LENGTHS if by == "length" else losses_at(4)
        warm = flat(found[:4])
        assert warm != sorted(warm, key=lambda row: (keys[row], row))
        rest = set(range(ROWS)) - set(warm)
        assert flat(found[4:]) == sorted(rest, key=lambda row: (keys[row], row))
        assert one.plan_for(4).trace["reason"] == f"order: sorting of {by}, smallest first"


def test_a_pace_fills_every_step_with_the_easiest_rows(monkeypatch):
    one = controller(monkeypatch, orderer("pacing", start=0.25, full_at=0.5))
    steps = served(one)
    assert {len(step) for step in steps} == {BATCH}
    order = by_length(range(ROWS))
    assert sorted(flat(steps)[:22]) == sorted(order[:22])
    at, sizes = 0, []
    while at + 22 < STEPS * BATCH:
        step = at // BATCH
        size = int(min(1.0, 0.25 + 0.75 * step / 12) * ROWS)
        part = flat(steps)[at : at + size]
        assert set(part) <= set(order[:size])
        assert len(set(part)) == len(part)
        at, sizes = at + size, [*sizes, size]
    assert sizes[0] == 22
    assert sizes[-1] == ROWS
    control = flat(served(controller(monkeypatch, orderer("pacing", by="random", start=0.25, full_at=0.5))))
    assert len(set(control[:22])) == 22
    assert set(control[:22]) != set(order[:22])


# ---------------------------------------------------------------- selections


class Given(Selector):
    """Selects what a test says."""

    name = "given"
    rows: tuple[int, ...] = ()
    ordered = False

    def select(self, pool, budget, ctx):
        scores = np.full(len(pool), np.nan)
        rows = np.array(self.rows[:budget], dtype=np.int64)
        scores[np.searchsorted(pool, rows)] = -LENGTHS[rows]
        return Selection(rows=rows, scores=scores, reason="given", ordered=self.ordered)


def selecting(monkeypatch, rows, order=None, ordered=False, **block):
    one = controller(monkeypatch, order, selector=method("selector", "longest"), interval_steps=6, **block)
    one.selector = Given(None)
    one.selector.rows, one.selector.ordered = tuple(rows), ordered
    return one


KEPT = stream(4, "kept").permutation(ROWS)[:48].tolist()


def test_a_selection_is_served_in_order(monkeypatch):
    """Global batch t of the interval holds rows t B to (t + 1) B - 1 of the order, over accumulation and ranks."""
    for by, wanted in (("length", by_length(KEPT)), ("selector", sorted(KEPT, key=lambda row: (-LENGTHS[row], row)))):
        one = selecting(monkeypatch, KEPT, orderer(by=by))
        steps = served(one, 0, 6)
        assert flat(steps) == wanted
        assert steps == [wanted[t * BATCH : (t + 1) * BATCH] for t in range(6)]
        assert one.plan_for(0).trace["reason"] == f"given; order: sorting of {by}, smallest first"
        ranks = [selecting(monkeypatch, KEPT, orderer(by=by), world=2, rank=rank) for rank in range(2)]
        for t in range(6):
            shards = [each.plan_for(t).shard(t, each.shape) for each in ranks]
            dealt = [row for micro in zip(*shards, strict=True) for part in micro for row in part.tolist()]
            assert dealt == steps[t]


def test_without_an_orderer_a_selection_is_shuffled_or_as_given(monkeypatch):
    shuffled = flat(served(selecting(monkeypatch, KEPT), 0, 6))
    assert shuffled != KEPT
    assert sorted(shuffled) == sorted(KEPT)
    assert flat(served(selecting(monkeypatch, KEPT, ordered=True), 0, 6)) == KEPT
    assert flat(served(selecting(monkeypatch, KEPT, orderer(), ordered=True), 0, 6)) == by_length(KEPT)


def test_rows_that_repeat_are_served_in_copies(monkeypatch):
    found = flat(served(selecting(monkeypatch, KEPT[:20], orderer(), repeat=True), 0, 6))
    assert found[:20] == found[20:40] == by_length(KEPT[:20])
    assert found[40:] == by_length(found[40:])
    assert len(set(found[40:])) == 8
    assert found[40:] != found[:8]  # drawn, not the smallest


def test_a_selection_without_scores_is_told(monkeypatch):
    one = selecting(monkeypatch, KEPT, orderer(by="selector"))
    one.selector.select = lambda pool, budget, ctx: Selection(rows=np.array(KEPT), reason="given")
    assert sorted(flat(served(one, 0, 6))) == sorted(KEPT)
    assert one.plan_for(0).trace["reason"] == "given; order: random, without scores"


# ---------------------------------------------------------------- mixtures


UNIFORM = method("mixer", "uniform")


def of_domain(rows, name):
    start = sum(list(SIZES.values())[: list(SIZES).index(name)])
    return [row for row in rows if start <= row < start + SIZES[name]]


@pytest.mark.parametrize("interval", [None, 5])
def test_each_domain_of_a_mixture_is_read_in_order(monkeypatch, interval):
    found = served(controller(monkeypatch, orderer(), mixer=UNIFORM, interval_steps=interval))
    plain = served(controller(monkeypatch, mixer=UNIFORM, interval_steps=interval))
    domain_of = Domains.from_sizes(list(SIZES), list(SIZES.values())).domain_of
    assert domain_of[flat(found)].tolist() == domain_of[flat(plain)].tolist()  # interleaved by the mixer as before
    for name, size in SIZES.items():
        rows = of_domain(flat(found), name)
        start = sum(list(SIZES.values())[: list(SIZES).index(name)])
        order = by_length(range(start, start + size))
        assert rows == (order * 12)[: len(rows)]


def test_domains_are_scored_anew(monkeypatch):
    one = controller(monkeypatch, orderer(by="loss"), mixer=UNIFORM, interval_steps=4)
    steps = served(one, 0, 12)
    web, first = (of_domain(flat(part), "web") for part in (steps, steps[:4]))
    assert first == sorted(range(60), key=lambda row: (losses_at(0)[row], row))[: len(first)]
    left = set(range(60)) - set(first)
    wanted = sorted(left, key=lambda row: (losses_at(4)[row], row))
    assert web[len(first) : len(first) + 8] == wanted[:8]
    assert len(set(web)) == len(web)


def test_quotas_over_a_selection_are_arranged_by_domain(monkeypatch):
    kept = list(range(0, 60, 2)) + list(range(60, 81)) + list(range(81, 88))
    block = {"mixer": UNIFORM, "keep_ratio": 0.9, "repeat": True}
    found = flat(served(selecting(monkeypatch, kept, orderer(), **block), 0, 6))
    plain = flat(served(selecting(monkeypatch, kept, **block), 0, 6))
    assert sorted(found) == sorted(plain)  # the orderer changes no quota and no row
    web, papers = of_domain(found, "web"), of_domain(found, "papers")
    assert web == by_length(web)
    assert papers[:7] == papers[7:14] == by_length(range(81, 88))
    assert papers[14:] == by_length(papers[14:])


# ---------------------------------------------------------------- cadences


def test_what_is_left_of_a_selection_is_ordered_anew(monkeypatch):
    """The selector decides every 6 steps, the orderer every 2: no row twice, each stretch by the losses of its step."""
    one = selecting(monkeypatch, KEPT, orderer(by="loss", every=2))
    found, left = served(one, 0, 12), set(KEPT)
    for first in range(0, 6, 2):
        wanted = sorted(left, key=lambda row: (losses_at(first)[row], row))[: 2 * BATCH]
        assert flat(found[first : first + 2]) == wanted
        left -= set(wanted)
    assert not left
    assert sorted(flat(found[6:])) == sorted(KEPT)
    assert one.plan_for(10).trace["reason"] == "the selection stands; order: sorting of loss, smallest first"


def test_a_sweep_goes_on_where_the_orderer_decides_again(monkeypatch):
    once, often = (
        flat(served(selecting(monkeypatch, KEPT, orderer("zigzag", by="length", every=every)), 0, 6))
        for every in (None, 2)
    )
    assert once == often
    assert once != by_length(KEPT)


def test_keys_stand_until_the_orderer_decides_again(monkeypatch):
    one = controller(monkeypatch, orderer(by="loss", every=8), mixer=method("mixer", "uniform", every=2))
    web = of_domain(flat(served(one, 0, 8)), "web")
    assert web == sorted(range(60), key=lambda row: (losses_at(0)[row], row))[: len(web)]
    assert len(one.signals.asked_rows) == 1


# ---------------------------------------------------------------- checkpoints


CASES = {
    "pool": (orderer("zigzag", jitter=3), {}),
    "pool by loss": (orderer("saw", by="loss"), {"interval_steps": 5, "warmup_steps": 3}),
    "segments": (orderer("segment"), {"interval_steps": 7}),
    "pace": (orderer("pacing"), {"interval_steps": 5}),
    "pace by loss": (orderer("pacing", by="loss"), {"interval_steps": 4}),
    "shuffle": (orderer("shuffle", by=None), {}),
    "mixture": (orderer("folding"), {"mixer": UNIFORM, "interval_steps": 5}),
    "mixture by loss": (orderer("folding", by="loss"), {"mixer": UNIFORM, "interval_steps": 5, "warmup_steps": 2}),
    "mixture and pace": (orderer("pacing"), {"mixer": UNIFORM, "interval_steps": 5}),
    "selection": (orderer("stair", by="selector"), {"selector": method("selector", "longest"), "interval_steps": 5}),
    "selection by loss": (orderer("saw", by="loss"), {"selector": method("selector", "random"), "interval_steps": 5}),
    "selection in parts": (
        orderer("zigzag", by="loss", every=3, jitter=2),
        {"selector": method("selector", "random", every=10, warmup_steps=2)},
    ),
    "standing keys": (
        orderer("saw", by="loss", every=9, warmup_steps=4),
        {"mixer": method("mixer", "uniform", every=2), "warmup_steps": 1},
    ),
    "quotas": (
        orderer("saw", by="loss", every=6),
        {
            "selector": method("selector", "random", every=12),
            "mixer": method("mixer", "uniform", every=4),
            "keep_ratio": 0.8,
            "repeat": True,
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_serves_the_same_on_other_ranks(monkeypatch, case):
    order, block = CASES[case]

    def dealt(ranks, first, stop):
        steps = []
        for step in range(first, stop):
            shards = [each.plan_for(step).shard(step, each.shape) for each in ranks]
            steps.append([row for micro in zip(*shards, strict=True) for part in micro for row in part.tolist()])
        return steps

    straight = served(controller(monkeypatch, order, **block))
    assert straight != served(controller(monkeypatch, order, **{**block, "seed": 4})) or case == "selection"
    for stop in range(1, STEPS, 2):
        before = controller(monkeypatch, order, **block)
        head = served(before, 0, stop)
        arrays, state = before.plan.to_arrays(), before.state_dict()
        after = [controller(monkeypatch, order, world=2, rank=rank, **block) for rank in range(2)]
        for one in after:
            one.plan = DataPlan.from_arrays(arrays)
            one.load_state_dict(state)
        assert head + dealt(after, stop, STEPS) == straight, stop


@pytest.mark.parametrize("case", ["pool", "segments", "pace", "mixture"])
def test_a_longer_run_goes_on_with_the_order(monkeypatch, case):
    order, block = CASES[case]
    block = {key: value for key, value in block.items() if key != "interval_steps"}
    if order.name == "pacing":
        order = orderer("pacing", full_at=10.0)
    straight = served(controller(monkeypatch, order, **block))
    short = controller(monkeypatch, order, total=7, **block)
    head = served(short, 0, 7)
    longer = controller(monkeypatch, order, **block)
    longer.plan = short.plan
    longer.load_state_dict(short.state_dict())
    assert head + served(longer, 7, STEPS) == straight


@pytest.mark.parametrize(("end", "stop"), [(15, 15), (18, 12)])
def test_a_decision_that_the_end_of_a_shorter_run_cut_does_not_stand(monkeypatch, end, stop):
    """What was laid out of a selection ends there, although the orderer decides again before the selector does."""
    chosen = {"selector": method("selector", "longest", every=10), "keep_ratio": 0.5}
    short = controller(monkeypatch, orderer(every=5), total=end, **chosen)
    head = served(short, 0, stop)
    longer = controller(monkeypatch, orderer(every=5), **chosen)
    longer.plan = short.plan
    longer.load_state_dict(short.state_dict())
    found = head + served(longer, stop, STEPS)
    assert [len(step) for step in found] == [BATCH] * STEPS
    longest = sorted(range(ROWS), key=lambda row: (-LENGTHS[row], row))[: 5 * BATCH]
    assert sorted(flat(found[15:20])) == sorted(longest)


def test_keys_that_were_asked_for_the_rest_of_a_shorter_run_are_asked_for_anew(monkeypatch):
    block = {"mixer": method("mixer", "uniform", every=2)}
    short = controller(monkeypatch, orderer(by="loss", every=8), total=6, **block)
    web = of_domain(flat(served(short, 0, 6)), "web")
    longer = controller(monkeypatch, orderer(by="loss", every=8), **block)
    longer.plan = short.plan
    longer.load_state_dict(short.state_dict())
    rest = of_domain(flat(served(longer, 6, 8)), "web")
    left = set(range(60)) - set(web)
    assert rest == sorted(left, key=lambda row: (losses_at(6)[row], row))[: len(rest)]
