"""``python -m benchmarks.gpu`` on a CPU, with toy models."""

from __future__ import annotations

import json

import pytest
import torch
from benchmarks.gpu import checks
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.shapes import TOY as TOYS

from dataflex import Session

TOY = ["--device", "cpu", "--scale", "toy", "--out", "gpu"]


@pytest.mark.slow
def test_every_check_runs_and_is_on_the_page(tmp_path):
    assert main(TOY) == 0
    results = json.loads((tmp_path / "gpu" / "results.json").read_text())
    found = {each["name"]: each for each in results["checks"]}
    assert [*found] == [*checks.CHECKS]
    assert not [each["problem"] for each in found.values() if each["problem"]]
    judged = {"scores_fp32", "scores_bf16", "synchronizations"}
    assert {name for name, each in found.items() if each["passed"]} == judged
    assert results["hardware"]["torch"] == torch.__version__
    text = (tmp_path / "gpu" / "results-gpu.md").read_text()
    for name, each in found.items():
        assert f"## {name.replace('_', ' ')}\n" in text
        assert all(f"| {what} | " in text for what in each["values"])


@pytest.mark.slow
def test_wrong_scores_and_a_wait_in_each_micro_batch_fail(monkeypatch):
    setting, real, loss = checks.Setting(torch.device("cpu"), TOYS, True), checks.like, Session.loss

    def moved(source, device, **settings):
        other = real(source, device, **settings)
        with torch.no_grad():
            next(iter(other.model.parameters())).mul_(1.001)
        return other

    monkeypatch.setattr(checks, "like", moved)
    assert checks.run("scores_fp32", setting)["passed"] is False

    def looking(session, batch, logits):
        found = loss(session, batch, logits)
        found.item()
        return found

    monkeypatch.setattr(Session, "loss", looking)
    found = checks.run("synchronizations", setting)
    assert found["passed"] is False
    assert found["values"]["selection, waits a micro-batch adds"] == 1


def test_a_check_that_fails_or_has_no_time_is_told_and_the_others_go_on(monkeypatch, tmp_path, capsys):
    def broken(_setting):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(
        checks, "CHECKS", {"one": (broken, 1.0, "None."), "two": (lambda _: (None, {"rate": 12345.6}), 1.0, "")}
    )
    assert main([*TOY, "--minutes", "1"]) == 1
    told = capsys.readouterr().out
    assert "one: RuntimeError: out of memory" in told
    assert "two: measured" in told
    assert "| rate | 12,346 |" in (tmp_path / "gpu" / "results-gpu.md").read_text()
    assert main([*TOY, "--minutes", "0", "--only", "two"]) == 0
    assert "two: skipped: 0 s are left, it may need 0" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*TOY, "--only", "three"])
