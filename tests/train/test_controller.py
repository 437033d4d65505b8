"""What a run serves, without a Trainer: the same ids on any number of ranks, floors, what a step was drawn under."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dataflex.config.schema import DynamicConfig, MethodConfig
from dataflex.errors import ConfigError
from dataflex.method import Selection
from dataflex.mixers.fixed import Stage
from dataflex.plan.domains import Domains
from dataflex.plan.plan import BatchShape, DataPlan
from dataflex.registry import find
from dataflex.train.controller import Controller
from dataflex.train.row_space import RowSpace

SIZES = {"web": 90, "code": 31, "papers": 7}
STEPS, BATCH = 24, 16


def signals():
    return SimpleNamespace(
        begin=lambda step: None,
        end=lambda: None,
        seconds=0.0,
        access=SimpleNamespace(model=torch.nn.Linear(1, 1), learning_rate=lambda: 0.1),
        state_dict=dict,
        load_state_dict=lambda state: None,
    )


def row_space(sizes=SIZES, lengths=None, fingerprint="f"):
    """Return the rows of domains, each of 5 tokens unless ``lengths`` says otherwise."""
    fives = np.full(sum(sizes.values()), 5)
    return RowSpace(
        dataset=None,
        sources=sizes,
        domains=Domains.from_sizes(list(sizes), list(sizes.values()), lengths=fives if lengths is None else lengths),
        supervised=fives,
        fingerprint=fingerprint,
    )


def built(config, total, batch, space=None, *, micro=2, world=1, rank=0, drop_last=False, shuffle=True, **given):
    """Return the controller of a configuration: ``total`` steps of ``batch`` rows."""
    shape = BatchShape(
        micro_batch_size=micro,
        accumulation=batch // micro // world,
        world=world,
        rank=rank,
        drop_last=drop_last,
        shuffle=shuffle,
    )
    methods = {kind: getattr(config, kind) for kind in ("selector", "mixer", "orderer")}
    given = {"space": space or row_space(), "seed": 3, "signals": signals(), **given}
    methods = {kind: method and method.build() for kind, method in methods.items()}
    return Controller(config=config, schedule=config.schedule(total, 1000), shape=shape, **methods, **given)


def controller(mixer, *, world=1, rank=0, micro=2, interval=6, **block):
    name, params = mixer
    cls = find("mixer", name)
    config = DynamicConfig(
        mixer=MethodConfig(kind="mixer", name=name, params=cls.Params(**params)), interval_steps=interval, **block
    )
    return built(config, STEPS, BATCH, micro=micro, world=world, rank=rank)


def staged():
    mixes = [(6, 3, 1), (1, 8, 1), (0, 5, 5), (3, 3, 4)]
    return "staged", {"stages": tuple(Stage(start_step=6 * i, proportions=mix) for i, mix in enumerate(mixes))}


def test_a_domain_that_its_cap_leaves_less_than_a_micro_batch_is_told(caplog):
    """Of 7 rows no micro-batch of 8 can be made; of 31 three are served."""
    one = controller(("odm", {"variant": "exp3"}), micro=8, max_epochs=1.0, at_cap="redistribute")
    assert "leaves fewer rows of papers than a micro-batch of one domain has (8): never served" in caplog.text
    served = one.space.domains.counts(one.plan_for(0).rows)
    assert served[2] == 0
    caplog.clear()
    controller(staged(), micro=8, max_epochs=1.0, at_cap="redistribute")
    assert not caplog.text


class Ranks:
    """All ranks of a run, each with a controller of its own."""

    def __init__(self, world, micro):
        self.ranks = [controller(staged(), world=world, rank=rank, micro=micro) for rank in range(world)]

    def serve(self, first, stop):
        """Return the ids of steps ``first`` to ``stop - 1``, as the ranks together serve them."""
        ids = []
        for step in range(first, stop):
            shards = [one.plan_for(step).shard(step, one.shape) for one in self.ranks]
            ids += [rows for micro in zip(*shards, strict=True) for rows in micro]
        return np.concatenate(ids)

    def moved_to(self, other):
        """Hand plan and state of rank 0 to every rank of another run, as a checkpoint does."""
        arrays, state = self.ranks[0].plan.to_arrays(), self.ranks[0].state_dict()
        for one in other.ranks:
            one.plan = DataPlan.from_arrays(arrays)
            one.load_state_dict(state)
        return other


def digest(ids):
    return hashlib.sha256(ids.astype(np.int64).tobytes()).hexdigest()


@pytest.mark.parametrize("stop", [1, 6, 9, 17, 19, 23])
def test_the_id_stream_is_the_same_when_two_ranks_become_four(stop):
    """Proportions change three times, and the run is resumed on other ranks before, at or after a change."""
    straight = Ranks(1, 4).serve(0, STEPS)
    two = Ranks(2, 2)
    head = two.serve(0, stop)
    tail = two.moved_to(Ranks(4, 4)).serve(stop, STEPS)
    assert digest(np.concatenate([head, tail])) == digest(straight)
    start = 0
    for size in SIZES.values():
        served = straight[(straight >= start) & (straight < start + size)]
        for first in range(0, len(served), size):
            epoch = served[first : first + size]
            assert len(np.unique(epoch)) == len(epoch)
        start += size


def test_a_decision_takes_effect_at_its_own_step():
    """Nothing is fetched beyond a plan, so that the step of a decision is the first that it serves."""
    one = controller(staged())
    for step in range(STEPS):
        plan = one.plan_for(step)
        assert plan.interval.start_step == step - step % 6
        segment = [s for s in one.sampler.segments if s.start <= step * BATCH][-1]
        assert segment.decided_at_step == plan.interval.start_step
        assert segment.start == plan.interval.start_step * BATCH
        assert len(plan.rows) == 6 * BATCH


def test_a_weighter_has_other_random_numbers_at_each_step():
    one, drawn = controller(staged()), []
    weighter = SimpleNamespace(
        due=lambda step: True,
        prepare=lambda ctx, rows: drawn.append((ctx.interval.start_step, ctx.rng("own").random())),
    )
    for step in range(8):
        one.plan_for(step)
        one.prepare(weighter, step)
    assert [step for step, _ in drawn] == list(range(8))
    assert len({number for _, number in drawn}) == 8


def test_floors_are_held_and_told():
    one = controller(("static", {"proportions": (97, 2, 1)}), min_proportion={"code": 0.25, "papers": 0.125})
    plan = one.plan_for(0)
    assert one.proportions == pytest.approx([0.625, 0.25, 0.125])
    assert one.space.domains.counts(plan.rows).tolist() == [60, 24, 12]
    assert "raised to min_proportion: code, papers" in plan.trace["reason"]
    free = controller(("static", {"proportions": (5, 3, 2)}), min_proportion=0.2)
    assert "raised" not in free.plan_for(0).trace["reason"]
    assert free.proportions.tolist() == [0.5, 0.3, 0.2]


def test_floors_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match=r"min_proportion: the floors sum to 1\.2 \(0\.4 for each of 3 domains\)"):
        controller(("uniform", {}), min_proportion=0.4)
    with pytest.raises(ConfigError, match=r"min_proportion\.cod: no such domain; did you mean 'code'"):
        controller(("uniform", {}), min_proportion={"cod": 0.4})


def test_a_step_is_told_what_it_was_drawn_under():
    """Domains at their cap leave their share to the others, which is what rewards have to be divided by."""
    one = controller(("uniform", {}), max_epochs={"papers": 2.0}, interval=12)
    one.plan_for(0)
    assert one.proportions_at(0) == pytest.approx([1 / 3] * 3)
    # 14 rows of papers last for 42 sequences: the third step still begins with them, the fourth without.
    assert one.proportions_at(2) == pytest.approx([1 / 3] * 3)
    assert one.proportions_at(3).tolist() == [0.5, 0.5, 0.0]
    one.plan_for(12)
    assert one.proportions_at(12).tolist() == [0.5, 0.5, 0.0]


@pytest.mark.parametrize(
    ("kept", "times", "expected"),
    [
        ([10, 13], [0, 0, 0, 0], [10, 13]),  # scores 5, 1, nothing, 4: of mean 10 / 3
        ([10, 13], [9, 0, 0, 0], [13, 10]),  # what is below the mean does not come in
        ([10], [1, 0, 0, 9], [10]),  # 3.3 + 1.7 * .8 is ahead of 3.3 + .7 * .8 ** 9
        ([10], [5, 0, 0, 0], [13]),  # 3.3 + 1.7 * .8 ** 5 is not ahead of 4
        ([11, 10], [9, 0, 0, 0], [11, 10]),  # not the largest: something else decides
    ],
)
def test_within_a_budget_rows_that_lead_take_turns(kept, times, expected):
    repeats = SimpleNamespace(times=lambda rows: np.array(times)[rows - 10])
    pool, scores = np.arange(10, 14), np.array([5.0, 1.0, np.nan, 4.0], dtype=np.float32)
    selection = Selection(rows=np.array(kept), scores=scores)
    self = SimpleNamespace(repeats=repeats)
    assert Controller._in_turns(self, selection, pool).rows.tolist() == expected
    weighed = Selection(rows=np.array(kept), scores=scores, weights=np.ones(len(kept)))
    assert Controller._in_turns(self, weighed, pool) is weighed
