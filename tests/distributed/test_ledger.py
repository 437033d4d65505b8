"""The ledger of two ranks is that of one, and that of a run on two ranks that was stopped."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from tests.distributed.test_engines import engine_settings
from tests.integration.test_ledger import LEDGER, SETTINGS, accounts, rows_of

pytestmark = pytest.mark.gloo

ENGINES = ("zero1", "zero2", "fsdp2")


def same_accounts(two, one):
    """Of two ranks, whatever they shard, and of one: they add up, and to the same."""
    ours, theirs = accounts(two), accounts(one)
    assert ours["tokens"] == theirs["tokens"]
    for name in LEDGER["targets"]:
        of, single = ours["targets"][name], theirs["targets"][name]
        for part in ("domains", "others"):
            np.testing.assert_allclose(list(of[part].values()), list(single[part].values()), rtol=2e-3, atol=2e-5)
        assert of["clipping"] == pytest.approx(single["clipping"], rel=2e-3, abs=2e-5)
        assert of["clipping"] != 0.0
        assert of["unexplained"] == pytest.approx(single["unexplained"], abs=2e-5)
        assert abs(of["unexplained"]) < 0.02 * abs(of["now"] - of["before"])
        assert of["others"]["other"] == pytest.approx(0.0, abs=1e-5)
    rows, single = rows_of(two), rows_of(one)
    assert rows["row"] == single["row"]
    np.testing.assert_allclose(rows["credit_goal"], single["credit_goal"], rtol=2e-3, atol=2e-5)


def test_two_ranks_have_the_accounts_of_one(tmp_path_factory, tiny_model, data_dir, two_ranks):
    from tests.integration.conftest import Outcome, Runner, base_settings

    folder = tmp_path_factory.mktemp("ledgers")
    block = {"mixer": {"name": "ledger", "targets": ["goal"]}, "interval_steps": 3, "ledger": LEDGER}
    runner = Runner({**base_settings(tiny_model, data_dir), **SETTINGS, "dynamic": block}, folder)
    one = runner("one")

    def on_two(name, **changes):
        config = folder / f"{name}.json"
        config.write_text(json.dumps(runner.mapping(name, gradient_accumulation_steps=1, **changes)))
        return config

    saving = {"save_strategy": "steps", "save_steps": 4, "ddp_find_unused_parameters": False}
    between = {"dynamic": {**block, "ledger": {**LEDGER, "refresh_steps": 3, "unexplained": 1e-4}}}
    halved = runner("halved", **between)
    sharded = {f"two-{name}": on_two(f"two-{name}", **engine_settings(name, folder)) for name in ENGINES}
    moved = [on_two(f"{name}-halved", **engine_settings(name, folder), **between) for name in ("zero2", "fsdp2")]
    two_ranks([on_two("two", **saving), *sharded.values(), *moved], timeout=150)
    shutil.copytree(folder / "two" / "checkpoint-4", folder / "again" / "checkpoint-4")
    shutil.copytree(folder / "two" / "dataflex", folder / "again" / "dataflex")
    two_ranks([on_two("again", **saving, resume_from_checkpoint=str(folder / "again" / "checkpoint-4"))])
    errors = [path.read_text() for path in folder.glob("*.error")]
    assert not errors, errors
    two, again = Outcome(folder / "two"), Outcome(folder / "again")
    ours = accounts(two)
    for name in ("two", *sharded):
        same_accounts(Outcome(folder / name), one)
    assert accounts(halved)["looks"] > 12, "parameters were moved to look between"
    for name in ("zero2", "fsdp2"):
        same_accounts(Outcome(folder / f"{name}-halved"), halved)
    assert accounts(again)["targets"] == ours["targets"]
    assert rows_of(again) == rows_of(two)
    assert again.series() == two.series()
