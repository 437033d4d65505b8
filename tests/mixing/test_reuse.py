"""Proportions carried over to changed domains (Olmix): the arithmetic, its caps, and the swarm over what changed."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dataflex.mixing.options import write_result
from dataflex.mixing.reuse import expanded, kept_shares, most_of_kept
from dataflex.mixing.swarm import read_swarm
from dataflex.plan.proportions import ProportionsFile, read_proportions, write_proportions
from tests.mixing.test_mix_commands import _plain_environment, base, config, project, run

__all__ = ["_plain_environment", "base", "config", "project"]

OLD = {"web": 0.2, "code": 0.2, "books": 0.4, "math": 0.2}


@pytest.fixture
def old(tmp_path):
    content = ProportionsFile(names=tuple(OLD), proportions=tuple(OLD.values()), method="log_linear")
    return write_proportions(tmp_path / "old.json", content)


def test_kept_domains_keep_their_relative_shares():
    kept = kept_shares(OLD, ["web", "code", "books"])
    assert kept == pytest.approx({"web": 0.25, "code": 0.25, "books": 0.5})
    found = expanded({"kept": 0.4, "math": 0.6}, kept)
    assert found == pytest.approx({"web": 0.1, "code": 0.1, "books": 0.2, "math": 0.6})


def test_the_domain_that_repeats_most_caps_what_is_kept():
    kept = {"web": 0.25, "code": 0.25, "books": 0.5}
    sizes = {"web": 10.0, "code": 40.0, "books": 50.0}
    assert [most_of_kept({name: kept[name]}, sizes, 200, 4) for name in kept] == pytest.approx([0.8, 3.2, 2.0])
    assert most_of_kept(kept, sizes, 200, 4) == pytest.approx(0.8)


def test_the_command_writes_a_proportions_file(old, tmp_path, capsys):
    out = tmp_path / "new.json"
    told = run("reuse", old, "--shares", "kept=2,math=3", "--out", out, capsys=capsys)
    assert read_proportions(out).by_name == pytest.approx({"web": 0.1, "code": 0.1, "books": 0.2, "math": 0.6})
    assert "mix all anew" in told
    given = tmp_path / "shares.json"
    write_proportions(given, ProportionsFile(names=("kept", "new"), proportions=(0.5, 0.5), method="log_linear"))
    run("reuse", old, "--shares", given, "--keep", "web,books", "--out", out, capsys=capsys)
    assert read_proportions(out).by_name == pytest.approx({"web": 1 / 6, "books": 1 / 3, "new": 0.5})
    assert "left out only" in run("reuse", old, "--keep", "web,math", "--out", out, capsys=capsys)
    assert read_proportions(out).by_name == pytest.approx({"web": 0.5, "math": 0.5})


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--shares", "math=1"], "--shares: lacks 'kept'"),
        (["--shares", "kept=0,math=0"], "--shares: all are 0"),
        (["--shares", "kept=1,new=1", "--budget", "9", "--natural", "web=1,code=1"], "--natural: new: missing"),
        (["--shares", "kept=1", "--budget", "9", "--natural", "rows"], "--natural: the rows of the data sets are"),
        (["--shares", "kept=1,new=1", "--keep", "wep"], "--keep: wep: no such domain; did you mean 'web'"),
        (["--shares", "kept=1,web=1", "--keep", "web"], "--keep: web is there, and a changed domain"),
        ([], "--shares: missing"),
        (["--keep", "web", "--max-epochs", "2"], "have no effect without --budget"),
        (["--keep", "web", "--budget", "2"], "--natural: missing"),
        (
            ["--shares", "kept=0.9,math=0.1", "--budget", "200", "--natural", "web=10,code=40,books=50,math=90"],
            "--shares: kept has 0.9, and above 0.8 one of its domains",
        ),
        (
            ["--shares", "kept=0.4,math=0.6", "--budget", "200", "--natural", "web=10,code=40,books=50,math=9"],
            "--shares: math would be served for more than 4 epochs",
        ),
    ],
)
def test_what_cannot_be_reused_is_told(old, tmp_path, capsys, options, told):
    found = run("reuse", old, *options, "--out", tmp_path / "new.json", code=2, capsys=capsys)
    assert told in found
    assert not (tmp_path / "new.json").exists()


@pytest.mark.parametrize(
    ("first", "told"), [("kept", "dataflex mix reuse OLD --shares"), ("web", "use it with 'mixer:")]
)
def test_shares_of_what_is_kept_are_carried_over_first(tmp_path, first, told):
    path = tmp_path / "shares.json"
    answer = write_result(path, (first, "new"), np.array([0.4, 0.6]), method="linear", source={}, details={})
    assert told in str(answer)
    assert ("static" in str(answer)) == (first == "web")


def test_a_swarm_over_what_changed(base, tmp_path, capsys):
    """Two domains: ``a`` is kept, ``b`` changed; a third would have its share of what is kept."""
    names = ("a", "gone")
    old = write_proportions(
        tmp_path / "before.json", ProportionsFile(names=names, proportions=(0.3, 0.7), method="log_linear")
    )
    out = tmp_path / "swarm"
    told = run("swarm", base, "--runs", "9", "--out", out, "--reuse", old, capsys=capsys)
    assert "9 mixtures of 2 domains" in told
    assert "advises" not in told  # 3 (changed + 2) runs
    swarm = read_swarm(out)
    assert swarm.names == ("kept", "b")
    assert swarm.kept == {"a": 1.0}
    import yaml

    block = yaml.safe_load(swarm.config("run-0003").read_text())["dynamic"]["mixer"]
    assert block["proportions"] == pytest.approx({"a": swarm.mixtures[2, 0], "b": swarm.mixtures[2, 1]})
    assert "every domain is kept" in run(
        "swarm", base, "--runs", "9", "--out", tmp_path / "x", "--reuse", _both(tmp_path), code=2, capsys=capsys
    )
    strangers = _both(tmp_path)
    strangers.write_text(strangers.read_text().replace('"a", "b"', '"c", "d"'))
    assert "(c, d) is one of the run's (a, b)" in run(
        "swarm", base, "--runs", "9", "--out", tmp_path / "x", "--reuse", strangers, code=2, capsys=capsys
    )
    assert "--changed: has no effect" in run(
        "swarm", base, "--runs", "9", "--out", tmp_path / "x", "--changed", "a", code=2, capsys=capsys
    )


def _both(folder):
    body = {"names": ["a", "b"], "proportions": [0.5, 0.5], "method": "given", "provenance": {}}
    (folder / "both.json").write_text(json.dumps(body))
    return folder / "both.json"
