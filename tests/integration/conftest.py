"""Runs configurations through the real training path in this process."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass
class Outcome:
    """What a finished run left behind."""

    folder: Path

    @property
    def log(self) -> list[dict[str, Any]]:
        history = json.loads((self.folder / "trainer_state.json").read_text())["log_history"]
        return [entry for entry in history if "loss" in entry]

    def series(self, key: str = "loss") -> list[float]:
        return [entry[key] for entry in self.log]

    @property
    def events(self) -> list[dict[str, Any]]:
        from dataflex.record.read import read_events

        return read_events(self.folder)

    def weights(self, checkpoint: str | None = None) -> dict[str, Any]:
        from safetensors.numpy import load_file

        folder = self.folder / checkpoint if checkpoint else self.folder
        name = "model.safetensors" if (folder / "model.safetensors").exists() else "adapter_model.safetensors"
        return load_file(folder / name)


class Runner:
    """Builds on a base configuration of the tiny model; each run has its own output folder."""

    def __init__(self, base: dict[str, Any], folder: Path) -> None:
        self.base, self.folder = base, folder

    def mapping(self, name: str, **changes: Any) -> dict[str, Any]:
        return {**self.base, "output_dir": str(self.folder / name), **changes}

    def __call__(self, name: str, **changes: Any) -> Outcome:
        from dataflex.run import train_here

        mapping = {key: value for key, value in self.mapping(name, **changes).items() if value is not None}
        config = self.folder / f"{name}.json"
        config.write_text(json.dumps(mapping))
        assert train_here([str(config)]) == 0
        return Outcome(Path(mapping["output_dir"]))


def base_settings(model: Path, data: Path) -> dict[str, Any]:
    """A quick fine-tuning of the tiny model in file order."""
    return {
        "model_name_or_path": str(model),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "dataset_dir": str(data),
        "dataset": "ones",
        "template": "default",
        "cutoff_len": 64,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1.0e-3,
        "lr_scheduler_type": "linear",
        "num_train_epochs": 1.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_shuffling": True,
        "report_to": "none",
        "seed": 7,
        "overwrite_cache": True,
    }


@pytest.fixture
def run(tiny_model, data_dir, tmp_path) -> Runner:
    return Runner(base_settings(tiny_model, data_dir), tmp_path)
