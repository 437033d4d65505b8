"""Every key of the block: told where it would change nothing, or why it always changes something."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dataflex.config.split import resolve
from dataflex.errors import ConfigError
from tests.config.keys import user_keys

Config = Callable[..., dict[str, Any]]

WEIGHTER = {"weighter": "focal"}
RANDOM = {"selector": "random", "interval_steps": 5}
# Key: changes to a configuration in which it would have no effect, and what is told.
REFUSED: dict[str, dict[str, Any]] = {
    "warmup_steps": {"dynamic": {"selector": {"name": "random", "every": 5, "warmup_steps": 2}, "warmup_steps": 3}},
    "candidate_batches": {"dynamic": {"mixer": "uniform", "candidate_batches": 2}},
    "keep_ratio": {"dynamic": {"selector": "all", "keep_ratio": 0.5}},
    "exclude_seen": {"dynamic": {"selector": "all", "exclude_seen": True}},
    "repeat": {"dynamic": {"selector": "all", "repeat": True}},
    "max_repeats": {"dynamic": {"selector": "all", "max_repeats": 9}},
    "unit": {"dynamic": {**RANDOM, "unit": "tokens"}},
    "interleave": {"dynamic": {**RANDOM, "mixer": "uniform", "keep_ratio": 0.9, "interleave": "even"}},
    "initial_proportions": {"dynamic": {"mixer": "uniform", "initial_proportions": [1, 1]}},
    "max_epochs": {"dynamic": {**RANDOM, "max_epochs": 2}},
    "at_cap": {"dynamic": {"mixer": "uniform", "at_cap": "stop"}},
    "min_proportion": {"dynamic": {**RANDOM, "min_proportion": 0.1}},
    "domain_encoder": {"dynamic": {"mixer": "uniform", "domain_encoder": "model"}},
    "eval_by_domain": {"dynamic": {**RANDOM, "eval_by_domain": True}},
    "signals.pool_fraction": {"dynamic": {**WEIGHTER, "signals": {"pool_fraction": 0.5}}},
    "signals.screen_fraction": {"dynamic": {**WEIGHTER, "signals": {"screen_fraction": 0.5}}},
    "signals.screen_by": {"dynamic": {**RANDOM, "signals": {"screen_by": "pilot"}}},
    "signals.budget": {"dynamic": {**RANDOM, "signals": {"budget": 0.5}}},
    "signals.explore": {"dynamic": {**RANDOM, "signals": {"explore": 0.5}}},
    "signals.explore_by": {"dynamic": {**RANDOM, "signals": {"explore_by": "thompson"}}},
    "signals.in_run_rank": {"dynamic": {**RANDOM, "signals": {"in_run_rank": 4}}},
    "signals.store_gb": {"dynamic": {**RANDOM, "signals": {"store_gb": 1.0}}},
    "leakage": {"dynamic": {**RANDOM, "leakage": "drop"}},
    "on_change": {"dynamic": {**RANDOM, "on_change": "extend", "resume_plan": "ignore"}},
    "on_bad_shard": {"dynamic": {**RANDOM, "on_bad_shard": "skip"}},
    "record": {"dynamic": {**RANDOM, "record": True}},
}
NOTED: dict[str, dict[str, Any]] = {
    "interval_steps": {"dynamic": {**WEIGHTER, "interval_steps": 5}},
    "signals.max_age_steps": {"dynamic": {**RANDOM, "signals": {"max_age_steps": 5}}},
    "signals.store": {"dynamic": {**RANDOM, "signals": {"store": "kept"}}},
    "early_stopping_min_delta": {"dynamic": {**RANDOM, "early_stopping_min_delta": 0.1}},
}
ALWAYS = {
    "selector": "a method",
    "mixer": "a method",
    "orderer": "a method",
    "weighter": "a method",
    "domain_column": "the record counts rows and tokens by domain",
    "domain_path": "as domain_column",
    "domain_clusters": "as domain_column",
    "signals": "a mapping of the keys below it",
    "ledger": "an account in the record",
    "ledger.targets": "what is accounted for",
    "ledger.refresh_steps": "how often the targets are looked at",
    "ledger.unexplained": "how often they are looked at in between",
    "ledger.target_rows": "how many of their rows are",
    "ledger.parameters": "which parameters are split by domain",
    "average_weights": "another model is saved",
    "average_weights.last_steps": "of which weights",
    "average_weights.every": "of how many of them",
    "plugins": "the files are loaded, and told when they cannot be",
    "save_on_term": "says what SIGTERM does",
    "checkpoint_hash": "says how checkpoints are verified",
    "resume_plan": "says what a resumed run does",
    "seed": "every run draws something, if only the order of its rows",
    "freeze_gate": "a model without gates is refused",
}
OF_LLAMA_FACTORY: dict[str, dict[str, Any]] = {
    "data_seed": {"data_seed": 3},
    "dataloader_persistent_workers": {"dataloader_persistent_workers": True},
    "accelerator_config.split_batches": {"accelerator_config": {"split_batches": True}},
    "dataloader_drop_last": {"dataloader_drop_last": True},
    "dynamic.warmup_steps": {"dynamic": {"mixer": "uniform", "warmup_steps": 3}},
    "dynamic.unit": {"dynamic": {"mixer": "uniform", "unit": "documents"}},
    "dynamic.leakage": {
        "packing": True,
        "dynamic": {"selector": {"name": "bm25", "targets": ["t"]}, "interval_steps": 5, "leakage": "drop"},
    },
    "dynamic.eval_by_domain": {"val_size": 0.2, "dynamic": {**RANDOM, "eval_by_domain": True}},
    "dynamic.interval_steps": {"dynamic": {"mixer": "uniform", "interval_steps": 5}},
}


def test_every_key_has_an_entry() -> None:
    assert sorted([*REFUSED, *NOTED, *ALWAYS]) == sorted(user_keys())


@pytest.mark.parametrize("key", REFUSED)
def test_a_key_without_effect_is_refused(key: str, config: Config, project: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(config(**REFUSED[key]), project)
    assert any(problem.startswith(f"dynamic.{key}: ") for problem in caught.value.problems), caught.value.problems


@pytest.mark.parametrize(
    ("key", "value"),
    [("interval_steps", 3), ("seed", 1), ("freeze_gate", True), ("resume_plan", "ignore"), ("warmup_steps", 2),
     ("signals.store", "kept"), ("signals.max_age_steps", 2), ("keep_ratio", 0.5), ("unit", "tokens")],
)  # fmt: skip
def test_a_recorded_stock_run_decides_nothing(key: str, value: Any, config: Config, project: Path) -> None:
    block, _, name = key.rpartition(".")
    given = {name: value} if not block else {block: {name: value}}
    with pytest.raises(ConfigError) as caught:
        resolve(config(dynamic={"record": True, **given}), project)
    assert [problem for problem in caught.value.problems if problem.startswith(f"dynamic.{key}: ")]


@pytest.mark.parametrize("key", NOTED)
def test_a_key_without_effect_is_noted(key: str, config: Config, project: Path) -> None:
    found = resolve(config(**NOTED[key]), project).notes
    assert any(note.startswith(f"dynamic.{key}: no effect") for note in found), found


@pytest.mark.parametrize("key", OF_LLAMA_FACTORY)
def test_what_depends_on_both_is_noted(key: str, config: Config, project: Path) -> None:
    found = resolve(config(**OF_LLAMA_FACTORY[key]), project).notes
    assert any(note.startswith(f"{key}: no effect") for note in found), found


def test_a_plain_run_has_nothing_to_tell(config: Config, project: Path) -> None:
    assert resolve(config(disable_shuffling=True), project).notes == ()


def test_an_evaluation_set_that_is_trained_on_is_told(config: Config, project: Path) -> None:
    found = resolve(config(eval_dataset="t,a", eval_strategy="steps", dynamic=RANDOM), project).notes
    assert list(found) == ["eval_dataset: 'a' is also trained on; its loss is not one of held-out rows"]


@pytest.mark.parametrize(
    ("target", "told"), [("a", "'a' is also trained on; what"), ("same", "its file is that of 'a'")]
)
def test_a_target_that_is_trained_on_is_told(target: str, told: str, config: Config, project: Path) -> None:
    import json

    info = json.loads((project / "data/dataset_info.json").read_text())
    info["same"] = {"file_name": "./a.jsonl"}
    (project / "data/dataset_info.json").write_text(json.dumps(info))
    block = {"selector": {"name": "bm25", "targets": ["t", target]}, "interval_steps": 5}
    found = resolve(config(dynamic=block), project).notes
    assert len(found) == 1
    assert found[0].startswith("dynamic.selector.targets: ")
    assert told in found[0]
    assert "leave the training set" in resolve(config(dynamic={**block, "leakage": "drop"}), project).notes[0]
    with pytest.raises(ConfigError, match=r"dynamic.selector.targets: .*trained on, and dynamic.leakage is 'error'"):
        resolve(config(dynamic={**block, "leakage": "error"}), project)
