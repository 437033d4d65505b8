"""``python -m benchmarks.vs_peers`` without the peers: what its drivers write, and what is made of it."""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import pytest
import torch
from benchmarks.vs_peers import __main__ as command
from benchmarks.vs_peers import meter, page, systems

DRIVER = """
import json, sys
system, part, rows, targets, number, out = sys.argv[1:]
cpu = {"ours": 2.0, "dattri": 9.0}[system]
spent = {"passes": 1, "cpu": cpu, "peak_mb": 100.0 if system == "dattri" else 120.0, "disk_mb": 0.5}
if int(number):
    spent["fidelity"] = {"spearman": 0.9, "error": 0.1}
if rows != "13":
    json.dump(spent, open(out, "w"))
"""
PAGE = "before\n<!-- peers -->\nold\n<!-- end of peers -->\nafter\n"


@pytest.fixture
def bench(tmp_path, monkeypatch):
    (tmp_path / "influence.py").write_text(DRIVER)
    (tmp_path / "page.md").write_text(PAGE)
    monkeypatch.setattr(command, "HERE", tmp_path)
    monkeypatch.setattr(systems, "HOME", tmp_path / "home")
    monkeypatch.setattr(systems, "python_of", lambda system: sys.executable)
    return lambda *more: command.main(["--only", "dattri", "--page", str(tmp_path / "page.md"), *more])


def test_pairs_are_measured_in_turns_and_go_on_where_they_stopped(bench, tmp_path, capsys):
    assert bench("--repeats", "1") == 0
    assert bench("--repeats", "2") == 0
    assert capsys.readouterr().out.splitlines() == [
        "dattri, repeat 1, ours: 2.00 CPU seconds",
        "dattri, repeat 1, dattri: 9.00 CPU seconds",
        "dattri, repeat 2, dattri: 9.00 CPU seconds",
        "dattri, repeat 2, ours: 2.00 CPU seconds",
    ]
    kept = json.loads((tmp_path / "home/results/dattri.json").read_text())
    assert [sorted(pair) for pair in kept["pairs"]] == [["ours", "peer"]] * 2
    assert ["fidelity" in pair["ours"] for pair in kept["pairs"]] == [True, False]
    assert kept["pairs"][0]["ours"]["run_cpu"] > 0
    assert bench("--repeats", "1", "--rows", "50") == 0  # other rows are another measurement
    assert len(json.loads((tmp_path / "home/results/dattri.json").read_text())["pairs"]) == 1


def test_the_table_judges_goals_and_memory(bench, tmp_path):
    bench("--repeats", "2")
    text = (tmp_path / "page.md").read_text()
    assert text.startswith("before\n<!-- peers -->\n| part ")
    assert "\nMedians of 2 repeats; " in text
    assert text.endswith("<!-- end of peers -->\nafter\n")
    cells = "| `dattri` | 200 + 20 | 9.00 | 2.00 | 4.50 (4.50 to 4.50) | 1, met | 100 / 120 **more** | 0.5 / 0.5 | "
    assert cells + "0.900 / 0.900 |" in text
    other = {"cpu": 1.0, "peak_mb": 1.0, "disk_mb": 0.0}
    pairs = [{"peer": other | {"cpu": cpu, "peak_mb": 2.0}, "ours": other} for cpu in (2, 3, 2)]
    found = {"rows": 1, "targets": 1, "pairs": pairs}
    assert page.row("loss", found)[4:6] == ["2.00 (2.00 to 3.00)", "2.5, **not met**"]
    with pytest.raises(ValueError, match="no marks"):
        page.rendered("a page", {})


def test_a_driver_that_writes_nothing_and_an_unknown_part_end_the_command(bench):
    with pytest.raises(SystemExit, match=r"exit code 0; see .*log"):
        bench("--rows", "13")
    with pytest.raises(SystemExit):
        command.main(["--only", "nothing"])


def test_both_systems_get_the_same_configuration(tmp_path, monkeypatch):
    monkeypatch.setattr(systems, "HOME", tmp_path)
    data = systems.write_rows(30, 4)
    assert len((data / "pool.jsonl").read_text().splitlines()) == 30
    assert len((data / "target.jsonl").read_text().splitlines()) == 4
    from dataflex.config.load import load_mapping
    from dataflex.config.split import resolve

    for part in (*systems.PASSES, *systems.RUNS):
        files = [systems.write_configuration(part, data, tmp_path / who / part) for who in ("ours", "peer")]
        assert files[0].read_text().replace("/ours/", "/peer/") == files[1].read_text()
        assert (resolve(load_mapping(str(files[0]), []), files[0].parent).dynamic is None) == (part == "static")


def test_a_pass_is_measured():
    spent = meter.Meter()
    with spent.measure():
        held, began = np.ones(30_000_000), time.process_time()
        while time.process_time() - began < 0.02:
            pass
    found = spent.result()
    assert found["passes"] == 1
    assert found["cpu"] > 0.01
    assert found["peak_mb"] > held.nbytes / 1e6


def test_the_oracle_is_adam_on_one_row():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1, bias=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for _ in range(2):
        model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    gradient, before = torch.randn(3), model.weight.detach().clone()
    expected = meter.adam(model, optimizer.state, corrected=True)(gradient)
    model.weight.grad = gradient.view_as(model.weight)
    optimizer.step()
    torch.testing.assert_close((before - model.weight.detach()).flatten() / 1e-3, expected, rtol=1e-3, atol=1e-4)
    assert meter.agreement([1, 2, 3.5], [1, 2, 4]) == {"spearman": pytest.approx(1.0), "error": 0.125}
