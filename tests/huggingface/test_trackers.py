"""Names of our numbers in trackers, and what of them the terminal shows."""

from __future__ import annotations

import inspect

import pytest
from transformers.integrations import integration_utils
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from dataflex.console import VERBOSE
from dataflex.huggingface.trackers import shown_apart

LOGS = {
    "loss": 2.0,
    "eval_loss": 1.0,
    "dataflex/interval": 3.0,
    "dataflex/mix/web/en": 0.4,
    "dataflex/nominal/web": 0.5,
}


def test_trackers_see_groups_and_constants_once():
    stock = integration_utils.rewrite_logs
    with shown_apart():
        for _ in range(2):  # two trackers, in one log
            assert integration_utils.rewrite_logs({**LOGS, "epoch": 0.1}) == {
                **{"train/loss": 2.0, "eval/loss": 1.0, "train/epoch": 0.1},
                **{"dataflex/interval": 3.0, "dataflex_mix/web/en": 0.4, "dataflex_nominal/web": 0.5},
            }
        named = [
            integration_utils.rewrite_logs({"dataflex/nominal/web": share, "dataflex/interval": 3.0, "epoch": epoch})
            for epoch, share in ((0.2, 0.5), (0.3, 0.6), (0.4, 0.6))
        ]
    assert [each.get("dataflex_nominal/web") for each in named] == [None, 0.6, 0.6]
    assert [each["dataflex/interval"] for each in named] == [3.0] * 3
    assert integration_utils.rewrite_logs is stock


@pytest.mark.parametrize("callback", [ProgressCallback, PrinterCallback])
def test_the_terminal_shows_no_single_domains_unless_asked(callback, monkeypatch, capsys):
    class State:
        is_world_process_zero = is_local_process_zero = True

    def shown():
        found = callback()
        found.training_bar = type("Bar", (), {"write": staticmethod(print)})
        found.on_log(None, State, None, logs=dict(LOGS))
        return capsys.readouterr().out

    monkeypatch.delenv(VERBOSE, raising=False)
    before = callback.on_log
    with shown_apart():
        assert "dataflex/interval" in (brief := shown())
        assert "dataflex/mix" not in brief
        monkeypatch.setenv(VERBOSE, "1")
        assert "dataflex/mix/web/en" in shown()
    assert callback.on_log is before
    assert list(inspect.signature(before).parameters)[:5] == ["self", "args", "state", "control", "logs"]
