"""The README's configuration and its commands, in its order, as a reader types them: trained on fewer, shorter rows."""

from __future__ import annotations

import json

import pytest
import yaml

from dataflex.cli import main
from dataflex.record.read import read_events
from tests.docs.pages import ROOT
from tests.docs.test_commands_run import SHOWN, readme_configuration

SHORTER = {"max_samples": 64, "cutoff_len": 32, "per_device_train_batch_size": 1, "report_to": "none"}


@pytest.mark.slow
def test_the_readme_as_typed(tmp_path, capsys):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**yaml.safe_load(readme_configuration()), **SHORTER}))
    (tmp_path / "my").mkdir()
    for name, source in (("pool", "pool"), ("goal", "gsm8k_valid")):
        lines = (ROOT / f"examples/data/{source}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (tmp_path / f"my/{name}.jsonl").write_text("".join(lines[:20]), encoding="utf-8")
    typed = [
        words[1:]
        for page, environment, words in SHOWN
        if page == "README.md" and words[0] == "dataflex" and not environment
    ]
    assert [words[0] for words in typed].count("train") == 4
    for words in typed:
        assert main(words) == 0, (words, capsys.readouterr().err)
    assert yaml.safe_load((tmp_path / "my/towards.yaml").read_text())["dataset"] == "pool"
    checkpoints = {path.name for path in (tmp_path / "runs/mine").glob("checkpoint-*")}
    assert checkpoints == {"checkpoint-20", "checkpoint-40", "checkpoint-60"}
    events = read_events(tmp_path / "runs/mine")
    # Resumed at the end, where nothing is left to do, and then at step 40, after which the record goes on.
    assert [event["checkpoint"] for event in events if event["event"] == "resumed"] == ["runs/mine/checkpoint-40"]
    assert events[-1]["event"] == "finished"
    assert events[-1]["step"] == 60
    assert json.loads((tmp_path / "runs/other/trainer_state.json").read_text())["global_step"] == 60
    assert len([event for event in read_events(tmp_path / "runs/other") if event["event"] == "planned"]) == 6
