"""A run whose decisions go through the curvature: measured anew for each, kept beside the signals, resumed."""

from __future__ import annotations

import shutil

from tests.integration.test_muon import decisions

SETTINGS = {"dataset": "alpha,beta", "max_steps": 6, "save_strategy": "steps", "save_steps": 2}


def test_decisions_are_resumed_and_the_factors_come_from_the_store(run, monkeypatch):
    from dataflex.signals.gradients import ekfac

    measured = []
    fitted = ekfac._fitted
    monkeypatch.setattr(ekfac, "_fitted", lambda *given: measured.append(1) or fitted(*given))
    selector = {"name": "less", "targets": ["goal"], "precondition": "ekfac", "ekfac_rows": 12, "normalize": False}
    block = {"warmup_steps": 2, "interval_steps": 2, "selector": selector}
    straight = run("straight", **SETTINGS, dynamic=block)
    assert len(measured) == 2
    folder, store = run.folder / "resumed", str(run.folder / "store")
    shutil.copytree(straight.folder / "checkpoint-4", folder / "checkpoint-4")
    shutil.copytree(straight.folder / "dataflex", folder / "dataflex")
    again = run("resumed", **SETTINGS, dynamic={**block, "signals": {"store": store}}, resume_from_checkpoint=True)
    assert again.series() == straight.series()
    assert decisions(again) == decisions(straight) != []
    assert len(measured) == 3
    assert len(list((run.folder / "store").glob("ekfac-*"))) == 1
    plain = {**selector, "precondition": "none"}
    del plain["ekfac_rows"]
    assert decisions(run("plain", **SETTINGS, dynamic={**block, "selector": plain})) != decisions(straight)
