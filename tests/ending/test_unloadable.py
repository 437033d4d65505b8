"""A model that cannot be loaded, and a folder that holds one already: told in a line, with exit code 2, no trace."""

from __future__ import annotations

import json
import shutil

import pytest

from dataflex.cli import main

BLOCK = {"interval_steps": 1, "selector": "loss"}


@pytest.mark.parametrize("dynamic", [None, BLOCK], ids=["stock", "dynamic"])
@pytest.mark.parametrize(
    ("broken", "told"),
    [
        (None, "is no folder here, and cannot be loaded from a hub: "),
        ("config.json", "cannot be loaded: It looks like the config file"),
        ("model.safetensors", "cannot be loaded: "),
    ],
)
def test_training_tells_what_cannot_be_loaded(configure, tiny_model, tmp_path, capsys, dynamic, broken, told):
    model = "gone-model"
    if broken is not None:
        model = str(shutil.copytree(tiny_model, tmp_path / "model"))
        (tmp_path / "model" / broken).write_bytes(b"{")
    assert main(["train", str(configure(dynamic=dynamic, model_name_or_path=model))]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"dataflex: model_name_or_path: {model} {told}")


def test_scoring_tells_what_cannot_be_loaded(configure, tmp_path, capsys):
    run = configure(dynamic=None, model_name_or_path="gone-model")
    assert main(["score", str(run), "--method", "loss", "--out", str(tmp_path / "s.parquet")]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("dataflex: model_name_or_path: gone-model is no folder here")
    assert not (tmp_path / "s.parquet").exists()


@pytest.mark.parametrize("dynamic", [None, BLOCK], ids=["stock", "dynamic"])
def test_a_folder_that_holds_a_finished_model_is_refused(configure, tmp_path, capsys, dynamic):
    run = configure(dynamic=dynamic, max_steps=1)
    assert main(["train", str(run)]) == 0
    capsys.readouterr()
    assert main(["train", str(run)]) == 2
    assert capsys.readouterr().err == (
        f"dataflex: output_dir: {tmp_path / 'run'} holds the model of an earlier run (model.safetensors), and no "
        "checkpoint to go on from; name another folder, or replace it with 'overwrite_output_dir: true'\n"
    )
    assert json.loads(run.read_text())["output_dir"] == str(tmp_path / "run")
    assert main(["train", str(run), "overwrite_output_dir=true"]) == 0
