"""Every example is valid as it lies there, and every dynamic one runs: on the tiny model, on the examples' own data."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import yaml

from dataflex.config.load import load_mapping
from dataflex.config.split import Split, resolve
from dataflex.core.registry import KINDS, find, names
from dataflex.record.read import read_events

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
MOST_BYTES = 20_000_000

COMPONENT_FILES = {"legacy_components.yaml"}
STOCK = {"demo_static.yaml"}
FILES = sorted(path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.rglob("*.yaml"))
CONFIGS = [name for name in FILES if name not in COMPONENT_FILES]
DYNAMIC = [name for name in CONFIGS if name not in STOCK]

OURS = ("dataflex.selectors.", "dataflex.mixers.", "dataflex.weighters.")
REGISTERED = {(kind, name) for kind in KINDS for name in names(kind) if find(kind, name).__module__.startswith(OURS)}

# What makes a run of the demo as short as the others; every other example is run with its own schedule.
SHORT = {
    "demo_dynamic.yaml": [
        "max_steps=3",
        "eval_on_start=false",
        "eval_dataset=gsm8k_valid",
        "dynamic.warmup_steps=1",
        "dynamic.interval_steps=2",
        "dynamic.selector.depth_steps=1",
    ]
}


@lru_cache
def parsed(name: str) -> Split:
    """Read an example strictly, as from the repository's root."""
    return resolve(load_mapping(EXAMPLES / name), EXAMPLES, check_stock=True)


@pytest.fixture
def _at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.usefixtures("_at_the_root")
@pytest.mark.parametrize("name", CONFIGS)
def test_an_example_is_valid_as_it_lies_there(name):
    parts = parsed(name)
    assert (parts.dynamic is None) == (name in STOCK)
    assert parts.lf["output_dir"].startswith("runs/")


@pytest.mark.usefixtures("_at_the_root")
def test_every_registered_method_has_an_example():
    shown = set()
    for name in DYNAMIC:
        shown |= {(method.kind, method.name) for method in parsed(name).dynamic.methods}
    assert shown - REGISTERED == {("selector", "near_quantile")}
    assert REGISTERED - shown == set()
    assert len(shown) == len(REGISTERED) + 1


@pytest.mark.usefixtures("_at_the_root")
def test_runs_do_not_share_an_output_folder():
    folders = [parsed(name).lf["output_dir"] for name in CONFIGS]
    assert len(set(folders)) == len(CONFIGS)


def test_every_example_is_listed_once():
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert [name for name in FILES if listed.count(f"[{name}]({name})") != 1] == []


def test_components_files_hold_nothing_but_components():
    for name in COMPONENT_FILES:
        assert set(yaml.safe_load((EXAMPLES / name).read_text(encoding="utf-8"))) == {f"{kind}s" for kind in KINDS}


def test_the_demo_compares_like_with_like():
    dynamic, static = (load_mapping(EXAMPLES / f"demo_{kind}.yaml") for kind in ("dynamic", "static"))
    differ = {key for key in {*dynamic, *static} if dynamic.get(key) != static.get(key)}
    assert differ == {"dynamic", "output_dir"}
    assert dynamic["eval_dataset"] not in dynamic["dynamic"]["selector"]["targets"]


def test_targets_and_held_out_rows_are_not_trained_on():
    def rows(name):
        lines = (EXAMPLES / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        return {json.loads(line)["instruction"] for line in lines}

    pool, valid, test = rows("pool"), rows("gsm8k_valid"), rows("gsm8k_test")
    assert len(valid) > 0
    assert not pool & valid
    assert not pool & test
    assert not valid & test
    assert rows("weighted") <= pool


def test_everything_is_small_enough_to_lie_in_the_repository():
    assert sum(path.stat().st_size for path in EXAMPLES.rglob("*") if path.is_file()) < MOST_BYTES


@pytest.mark.parametrize("name", DYNAMIC)
def test_an_example_runs(name, tiny_model, tmp_path, monkeypatch):
    from dataflex.run import train_here

    monkeypatch.setenv("LLAMAFACTORY_VERBOSITY", "WARN")
    settings = [
        f"model_name_or_path={tiny_model}",
        f"dataset_dir={EXAMPLES / 'data'}",
        f"output_dir={tmp_path / 'run'}",
        "max_samples=100",
        "cutoff_len=48",
        "per_device_train_batch_size=2",
        "disable_tqdm=true",
        *SHORT.get(name, []),
    ]
    assert train_here([str(EXAMPLES / name), *settings]) == 0
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses
    assert np.isfinite(losses).all()
    events = read_events(tmp_path / "run")
    assert [event["event"] for event in events][-1] in ("finished", "evaluated")
    undocumented = _undocumented(events, (ROOT / "docs" / "report.md").read_text(encoding="utf-8"))
    assert undocumented == set()


def _undocumented(events, page):
    """Return the events and fields that docs/report.md does not name."""
    words = {event["event"] for event in events}
    for event in events:
        words |= {key.split("/")[0] + "/" if "/" in key else key for key in event}
    return {word for word in words if f"`{word}" not in page}
