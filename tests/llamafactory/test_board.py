"""LLaMA-Factory's web UI starts our runs; driven by what its Start button calls."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from dataflex.llamafactory.board import our_command
from dataflex.record.read import read_events

pytestmark = pytest.mark.slow


@pytest.fixture
def button(monkeypatch):
    """What a click on Start calls: settings of the Train tab in, what the page shows out."""
    gradio = pytest.importorskip("gradio")
    from llamafactory.webui import interface

    monkeypatch.setattr(gradio, "Warning", lambda *args: None)
    monkeypatch.setattr(gradio, "Info", lambda *args: None)
    made = []

    class Engine(interface.Engine):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(interface, "Engine", Engine)
    interface.create_ui()
    manager = made[0].manager

    def click(**settings):
        data = {element: getattr(element, "value", None) for element in manager.get_elem_list()}
        data.update({manager.get_elem_by_id(name.replace("__", ".")): value for name, value in settings.items()})
        shown = {}
        for update in made[0].runner.run_train(data):
            shown.update({manager.get_id_by_elem(element): value for element, value in update.items()})
        return shown

    return click


def test_a_run_of_the_web_ui_is_ours(button, tiny_model, data_dir):
    more = {"optim": "adamw_torch", "max_steps": 4, "dynamic": {"selector": "loss", "interval_steps": 2}}
    settings = {
        "top__lang": "en",
        "top__model_name": "Custom",
        "top__model_path": str(tiny_model),
        "top__template": "default",
        "train__dataset_dir": str(data_dir),
        "train__dataset": ["alpha"],
        "train__compute_type": "fp32",
        "train__output_dir": "first",
        "train__logging_steps": 1,
        "train__save_steps": 4,
        "train__extra_args": json.dumps(more),
        "train__report_to": "none",
    }
    with our_command():
        shown = button(**settings)
    out = next(Path("saves").rglob("trainer_log.jsonl")).parent
    assert "Finished" in shown["train.output_box"], shown["train.output_box"]
    assert "train.loss_viewer" in shown
    assert [event["event"] for event in read_events(out / "dataflex")][-1] == "finished"
    assert len((out / "trainer_log.jsonl").read_text().splitlines()) >= 4
    assert "dataflex" in (out / "running_log.txt").read_text()


def test_other_commands_are_llamafactorys():
    before = os.environ["PATH"]
    with our_command() as folder:
        assert shutil.which("llamafactory-cli") == str(folder / "llamafactory-cli")
        told = subprocess.run(["llamafactory-cli", "version"], capture_output=True, text=True, check=True).stdout
    assert "Welcome to LLaMA Factory" in told
    assert os.environ["PATH"] == before
    assert not folder.exists()
