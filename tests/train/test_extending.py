"""Pools that change on resume, through real checkpoint files and a slow oracle; no model."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dataflex.config.split import split
from dataflex.errors import CheckpointError
from dataflex.train import checkpoint as saved
from dataflex.train.checkpoint import Identity
from dataflex.train.extending import extend
from tests.train.test_controller import built, row_space

NAMES = ("web", "code", "papers", "chat")


class SlowPool:
    """What was served, row by row: the oracle. A row is [domain, content, whether its epoch served it]."""

    def __init__(self):
        self.rows, self.away = [], []

    def change(self, rows):
        """Take over another pool; copies of one content pair off, served ones first."""
        old = sorted([row for row in self.rows + self.away], key=lambda row: not row[2])
        new = [[domain, content, False] for domain, content in rows]
        paired = set()
        for same_domain in (True, False):
            for place, row in enumerate(new):
                if place in paired:
                    continue
                for before in old:
                    if before[1] == row[1] and (before[0] == row[0] or not same_domain):
                        row[2] = before[2]
                        old.remove(before)
                        paired.add(place)
                        break
        self.rows, self.away = new, [row for row in old if row[2]]
        for domain in {row[0] for row in new}:
            self._end_epoch(domain)

    def _end_epoch(self, domain):
        mine = [row for row in self.rows if row[0] == domain]
        if all(row[2] for row in mine):
            for row in mine:
                row[2] = False
            self.away = [row for row in self.away if row[0] != domain]

    def serve(self, row):
        """Count a row; return whether it comes too early: its domain has rows that its epoch did not serve."""
        early = self.rows[row][2]
        self.rows[row][2] = True
        self._end_epoch(self.rows[row][0])
        return early


def pool_of(contents):
    """Return the row space of contents by domain."""
    sizes = {name: len(mine) for name, mine in contents.items()}
    keys = np.array([content for mine in contents.values() for content in mine], dtype=np.uint64)
    space = row_space(sizes, fingerprint=repr(contents))
    space.__dict__["keys"] = keys
    return space


class Run:
    """A run in one process, from one checkpoint to the next."""

    def __init__(self, contents, block, *, total=400, micro=2, accumulation=2, world=1, **lf):
        mapping = {"seed": 3, "dataset": ",".join(contents), **lf, "dynamic": {"on_change": "extend", **block}}
        parts = split(mapping, Path())
        self.space, config = pool_of(contents), parts.dynamic
        batch = micro * accumulation * world
        self.controller = built(config, total, batch, self.space, micro=micro, world=world)
        self.shape = self.controller.shape
        self.identity = Identity(config, self.space, parts.lf, shape=self.shape, seed=3)

    def serve(self, first, stop):
        """Return the rows of steps ``first`` to ``stop - 1``, one list a step."""
        steps, batch = [], self.shape.global_batch
        for step in range(first, stop):
            plan = self.controller.plan_for(step)
            at = (step - plan.interval.start_step) * batch
            rows = plan.rows[at : at + batch]
            steps.append(rows[rows >= 0].tolist())
        return steps

    def save(self, folder, step):
        (folder / "dataflex").mkdir(parents=True)
        self.controller.totals.count(self.controller.plan, step)
        state = {"controller": self.controller.state_dict()}
        saved.save(
            folder, self.identity, self.controller.plan, state, step, saved.write_rows(folder.parent, self.space)
        )

    def resume(self, folder, step, *, strict=False):
        found = saved.load(folder, self.identity, extend=not strict)
        if found.changes:
            return extend(self.controller, found, self.identity, step)
        self.controller.plan = found.plan
        self.controller.load_state_dict(found.state["controller"])
        return None


def edited(contents, rng):
    """Return the pool after a random edit: rows appended and dropped, data sets added, removed, renamed, reordered."""
    new = {name: list(mine) for name, mine in contents.items()}
    for name, mine in new.items():
        if rng.random() < 0.5:
            mine += rng.integers(0, 60, size=rng.integers(1, 6)).tolist()
        if rng.random() < 0.5:
            keep = max(1, len(mine) - int(rng.integers(1, 6)))
            new[name] = [mine[i] for i in np.sort(rng.choice(len(mine), keep, replace=False))]
    missing = [name for name in NAMES if name not in new]
    if missing and rng.random() < 0.4:
        new[rng.choice(missing)] = rng.integers(0, 60, size=rng.integers(2, 15)).tolist()
    if len(new) > 2 and rng.random() < 0.3:
        del new[rng.choice(sorted(new))]
    if missing and rng.random() < 0.1 and len(new) > 1:
        name = sorted(new)[0]
        new = {missing[0] if each == name else each: mine for each, mine in new.items()}
    order = rng.permutation(len(new)) if rng.random() < 0.2 else np.arange(len(new))
    return {list(new)[i]: list(new.values())[i] for i in order}


def settings(contents, rng):
    """Return a random block and batch."""
    kind = str(rng.choice(["mixture", "mixture", "mixture", "epochs", "epochs", "select", "both"]))
    shares = dict(zip(contents, rng.integers(1, 9, len(contents)).tolist(), strict=True))
    mixer = {"mixer": {"name": "static", "proportions": shares}}
    block = {
        "mixture": mixer,
        "epochs": {"selector": "all"},
        "select": {"selector": "random", "interval_steps": 3, "repeat": True},
        "both": {**mixer, "selector": "random", "keep_ratio": 1.0, "interval_steps": 2, "repeat": True},
    }[kind]
    if kind in ("mixture", "epochs") and rng.random() < 0.4:
        block = {**block, "orderer": {"name": str(rng.choice(["zigzag", "saw"])), "by": "random"}}
    micro, accumulation, world = rng.integers(1, [4, 3, 3]).tolist()
    return kind, block, {"micro": micro, "accumulation": accumulation, "world": world}


@pytest.mark.parametrize("seed", [*range(10), *(pytest.param(n, marks=pytest.mark.slow) for n in range(10, 40))])
def test_ten_random_changes_against_a_slow_oracle(seed, tmp_path):
    """No row comes again before its domain is exhausted, and counts are within one row from each change on."""
    rng = np.random.default_rng(seed)
    contents = {name: rng.integers(0, 60, size=rng.integers(3, 20)).tolist() for name in NAMES[:2]}
    oracle, step = SlowPool(), 0
    for change in range(11):
        kind, block, shape = settings(contents, rng)
        run = Run(contents, block, **shape)
        changed = not change or run.resume(tmp_path / f"checkpoint-{step}", step) is not None
        mixes = kind in ("mixture", "both")
        labels = [run.space.domains.names[k] if mixes else "all rows" for k in run.space.domains.domain_of]
        if changed:
            oracle.change(list(zip(labels, run.space.keys.tolist(), strict=True)))
        stop = step + int(rng.integers(1, 12))
        served = run.serve(step, stop)
        early = [oracle.serve(row) for rows in served for row in rows]
        assert kind in ("select", "both") or not any(early), (kind, change)
        if kind == "mixture":
            shares = np.array(list(block["mixer"]["proportions"].values()), dtype=float)
            counts = np.cumsum([run.space.domains.counts(np.array(rows)) for rows in served], axis=0)
            wanted = np.cumsum([len(rows) for rows in served])[:, None] * shares / shares.sum()
            blocks = run.controller.sampler.block // run.shape.global_batch
            assert np.abs(counts - wanted)[blocks - 1 :: blocks].max(initial=0.0) <= 1.0 + 1e-9
        step = stop
        run.save(tmp_path / f"checkpoint-{step}", step)
        assert served_copies(oracle.rows) == served_copies(
            zip(labels, run.space.keys.tolist(), run.controller.served.marks.tolist(), strict=True)
        )
        contents = edited(contents, rng) if rng.random() < 0.8 else contents


def served_copies(rows):
    """Count the copies of each content that its domain's epoch has served."""
    return Counter((domain, content) for domain, content, mark in rows if mark)


TWO = {"web": [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], "code": [21, 22, 23, 24, 25, 26, 27, 28]}
EVEN = {"mixer": "uniform", "interval_steps": 2}


def begun(tmp_path, block=EVEN, steps=3, contents=TWO, **more):
    """Return a run of ``steps`` steps of 4 rows, its rows step by step, and its checkpoint."""
    run = Run(contents, block, **more)
    served = run.serve(0, steps)
    run.save(tmp_path / "checkpoint", steps)
    return run, served, tmp_path / "checkpoint"


ORDERED = {"orderer": {"name": "zigzag", "by": "random"}}
BLOCKS = [EVEN, {**EVEN, **ORDERED}, ORDERED, {"selector": "all"}, {"selector": "random", "interval_steps": 2}]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("shape", [{}, {"micro": 1, "world": 2}])
def test_without_a_change_it_is_a_strict_resume(block, shape, tmp_path):
    _, _, folder = begun(tmp_path, block)
    strict, extending = Run(TWO, {**block, "on_change": "strict"}, **shape), Run(TWO, block, **shape)
    strict.resume(folder, 3, strict=True)
    assert extending.resume(folder, 3) is None
    assert strict.serve(3, 20) == extending.serve(3, 20)


def test_the_strict_message_says_that_extend_exists(tmp_path):
    _, _, folder = begun(tmp_path)
    with pytest.raises(CheckpointError, match=r"source 'code': 8 -> 7 rows.*\n.*'dynamic.on_change: extend'"):
        Run({**TWO, "code": TWO["code"][1:]}, EVEN).resume(folder, 3, strict=True)


def test_a_data_set_that_returns_goes_on_where_it_was(tmp_path):
    """Six rows of 'code' are served, it leaves, comes back, and serves the other two before any of the six."""
    run, served, folder = begun(tmp_path)
    code = [row for rows in served for row in rows if row >= 12]
    without = Run({"web": TWO["web"]}, {"selector": "all"})
    without.resume(folder, 3)
    without.serve(3, 4)
    without.save(tmp_path / "again", 4)
    back = Run(TWO, EVEN)
    back.resume(tmp_path / "again", 4)
    first = [row for rows in back.serve(4, 8) for row in rows if row >= 12]
    assert len(code) == 6
    assert set(first[:2]) == set(range(12, 20)) - set(code)
    assert len(first) == 8
    assert len(set(first[2:])) == 6
    assert run.space.num_rows == 20


@pytest.mark.parametrize("cap", [1.0, 1.5])
def test_caps_count_what_was_served_before_the_change(cap, tmp_path):
    """A cap of one epoch serves each row of 'code' once over the whole run, rows that came later included."""
    _, served, folder = begun(tmp_path, {**EVEN, "max_epochs": {"code": 4}})
    more = {**TWO, "code": [*TWO["code"], 29, 30]}
    run = Run(more, {**EVEN, "max_epochs": {"code": cap}})
    run.resume(folder, 3)
    code = Counter(row for rows in [*served, *run.serve(3, 40)] for row in rows if row >= 12)
    assert sum(code.values()) == int(cap * 10)
    assert set(code.values()) <= {1, 2}
    assert len(code) == 10


def test_rows_that_are_all_unknown_are_refused(tmp_path):
    _, _, folder = begun(tmp_path)
    other = {name: [content + 100 for content in mine] for name, mine in TWO.items()}
    run = Run(other, EVEN, template="llama3")
    with pytest.raises(CheckpointError, match=r"none of 20 again \(template changed \(not given -> llama3\)\)"):
        run.resume(folder, 3)


def test_other_tokens_of_some_rows_are_refused(tmp_path):
    _, _, folder = begun(tmp_path)
    shorter = {**TWO, "web": [*TWO["web"][:-1], 99]}
    with pytest.raises(CheckpointError, match=r"does not find 1 of 20 rows again.*cutoff_len changed"):
        Run(shorter, EVEN, cutoff_len=8).resume(folder, 3)
    Run({**TWO, "web": [*TWO["web"], 99]}, EVEN, cutoff_len=8).resume(folder, 3)  # none was cut


def test_another_stage_is_refused(tmp_path):
    _, _, folder = begun(tmp_path)
    with pytest.raises(CheckpointError, match=r"^resume: stage changed \(not given -> pt\)\nThe saved"):
        Run(TWO, EVEN, stage="pt").resume(folder, 3)


def test_a_checkpoint_without_keys_of_rows_is_refused(tmp_path):
    _, _, folder = begun(tmp_path)
    (folder / "dataflex" / "rows.npz").unlink()
    with pytest.raises(CheckpointError, match="cannot know the rows again"):
        Run(TWO, {"selector": "all"}).resume(folder, 3)


def test_methods_keep_their_states_where_their_domains_are_the_same(tmp_path, caplog):
    caplog.set_level("INFO")
    odm = {"mixer": "odm", "interval_steps": 1}
    run, _, _ = begun(tmp_path, odm)
    run.controller.mixer.reward[:] = 7.0
    run.save(tmp_path / "later", 3)
    longer = Run({**TWO, "web": [*TWO["web"], 13]}, odm)
    kept, rows, _ = longer.resume(tmp_path / "later", 3)
    assert "mixer" in kept
    assert longer.controller.mixer.reward.tolist() == [7.0, 7.0]
    assert (rows["kept"], rows["new"], rows["gone"]) == (20, 1, 0)
    assert "begins anew" not in caplog.text
    third = Run({**TWO, "chat": [40, 41]}, odm)
    kept, *_ = third.resume(tmp_path / "later", 3)
    assert kept == set()
    assert "the mixer 'odm' begins anew (other domains)" in caplog.text
    assert third.controller.plan_for(3).rows.size


def test_what_a_selector_has_seen_goes_along(tmp_path):
    """Rows seen before the change are left out, those planned for later steps of its interval are not."""
    block = {"selector": "random", "interval_steps": 4, "exclude_seen": True}
    _, served, folder = begun(tmp_path, block)
    run = Run({**TWO, "code": [*TWO["code"], 29, 30, 31, 32]}, {**block, "interval_steps": 3})
    run.resume(folder, 3)
    rows = [row for step in [*served, *run.serve(3, 6)] for row in step]
    assert len(set(rows)) == len(rows) == 24
    assert run.controller.repeats._times.tolist() == [1] * 24


@pytest.mark.parametrize("block", BLOCKS[:4])
def test_after_a_change_a_strict_resume_is_exact(block, tmp_path):
    _, _, folder = begun(tmp_path, block)
    more = {**TWO, "web": [*TWO["web"][2:], 13, 14, 15]}
    run = Run(more, block)
    run.resume(folder, 3)
    straight = run.serve(3, 30)
    for stop in (4, 5, 8, 9, 14, 21):
        first = Run(more, block)
        first.resume(folder, 3)
        head = first.serve(3, stop)
        first.save(tmp_path / f"at-{stop}", stop)
        again = Run(more, {**block, "on_change": "strict"})
        again.resume(tmp_path / f"at-{stop}", stop, strict=True)
        assert head + again.serve(stop, 30) == straight
