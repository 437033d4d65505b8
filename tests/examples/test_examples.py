"""Every example is valid as it lies there, and every dynamic one runs: on the tiny model, on the examples' own data."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import yaml

from dataflex.commands.methods import requirements
from dataflex.config.load import load_mapping
from dataflex.config.split import Split, resolve
from dataflex.record.read import read_events
from dataflex.registry import KINDS, find, names
from tests.golden import trajectories

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
MOST_BYTES = 20_000_000

COMPONENT_FILES = {"legacy_components.yaml"}
DATA_FILES = {"v1/data.yaml", "v1/targets.yaml"}
STOCK = {"demo_static.yaml"}
FILES = sorted(path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.rglob("*.yaml"))
NOT_CONFIGS = COMPONENT_FILES | DATA_FILES
CONFIGS = [name for name in FILES if name not in NOT_CONFIGS and not name.startswith("scale/")]  # test_scale
DYNAMIC = [name for name in CONFIGS if name not in STOCK and not name.startswith("v1/")]

OURS = ("dataflex.selectors.", "dataflex.mixers.", "dataflex.orderers.", "dataflex.weighters.")
REGISTERED = {(kind, name) for kind in KINDS for name in names(kind) if find(kind, name).__module__.startswith(OURS)}

# What makes a run of the demo as short as the others, and finds a folder from any working directory; every other
# example is run as it is.
SHORT = {
    "mix_doremi.yaml": ["dynamic.mixer.reference={model}"],
    "select_near.yaml": [f"dynamic.selector.encoder={EXAMPLES / 'models' / 'base-4m'}"],
    "select_embed.yaml": [f"dynamic.selector.encoder={EXAMPLES / 'models' / 'base-4m'}"],
    "select_ifd.yaml": [f"dynamic.selector.scorer={EXAMPLES / 'models' / 'base-4m'}"],
    "select_rho_loss.yaml": ["dynamic.selector.reference={model}"],  # the tokenizer must be that of the run
    "weight_product.yaml": ["dynamic.weighter=[column, {name: slm, reference: {model}, warmup_steps: 2}]"],
    "weight_pear.yaml": ["dynamic.weighter.reference={model}"],
    "weight_ss_token.yaml": ["dynamic.weighter.reference={model}"],
    "weight_slm.yaml": ["dynamic.weighter.reference={model}"],
    "weight_rho.yaml": ["dynamic.weighter.reference={model}"],
    "demo_dynamic.yaml": [
        "max_steps=3",
        "eval_on_start=false",
        "eval_dataset=gsm8k_valid",
        "dynamic.warmup_steps=1",
        "dynamic.interval_steps=2",
    ],
}


@lru_cache
def parsed(name: str) -> Split:
    """Read an example strictly, as from the repository's root."""
    return resolve(load_mapping(EXAMPLES / name), EXAMPLES, check_stock=True)


def tiny(model, output_dir):
    """Return the overrides that make an example run on the tiny model, from any working directory."""
    return [
        f"model_name_or_path={model}",
        f"dataset_dir={EXAMPLES / 'data'}",
        f"output_dir={output_dir}",
        "max_samples=100",
        "cutoff_len=48",
        "per_device_train_batch_size=2",
        "logging_steps=1",
        "disable_tqdm=true",
    ]


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
    plugins = {("selector", "near_quantile"), ("weighter", "huber")}
    assert shown - REGISTERED == plugins
    learners = {(kind, name) for kind, name in REGISTERED if "rollouts" in requirements(find(kind, name)).signals}
    assert ("mixer", "sec") in learners  # from the rewards of prompts: examples/trl_grpo.py
    assert REGISTERED - shown <= learners
    assert shown - plugins <= REGISTERED


@pytest.mark.usefixtures("_at_the_root")
def test_runs_do_not_share_an_output_folder():
    folders = [parsed(name).lf["output_dir"] for name in CONFIGS]
    assert len(set(folders)) == len(CONFIGS)


def test_every_example_is_listed_once():
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert [name for name in FILES if listed.count(f"[{name}]({name})") != 1] == []


def test_components_files_hold_nothing_but_components():
    for name in COMPONENT_FILES:
        sections = set(yaml.safe_load((EXAMPLES / name).read_text(encoding="utf-8")))
        assert sections == {f"{kind}s" for kind in KINDS if kind != "orderer"}


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
    assert rows("weighted") | rows("prompts") <= pool


def test_everything_is_small_enough_to_lie_in_the_repository():
    files = [path for path in EXAMPLES.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < MOST_BYTES


@pytest.mark.trains
@pytest.mark.parametrize("name", DYNAMIC)
def test_an_example_runs(name, tiny_model, tiny_moe, tmp_path):
    from dataflex.run import train_here

    model = tiny_moe if "moe" in name else tiny_model
    own = [setting.replace("{model}", str(model)) for setting in SHORT.get(name, [])]
    settings = [*tiny(model, tmp_path / "run"), *own]
    assert train_here([str(EXAMPLES / name), *settings]) == 0
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses
    assert np.isfinite(losses).all()
    events = read_events(tmp_path / "run")
    assert [event["event"] for event in events][-1] in ("finished", "evaluated")
    undocumented = _undocumented(events, (ROOT / "docs" / "report.md").read_text(encoding="utf-8"))
    assert undocumented == set()
    trajectories.check(name, tmp_path / "run")


@pytest.mark.trains
@pytest.mark.usefixtures("_at_the_root")
@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith("v1/")])
def test_an_example_of_v1_runs(name, tiny_tied, tmp_path):
    from dataflex.run import train_here

    settings = [f"model={tiny_tied}", f"output_dir={tmp_path / 'run'}", "cutoff_len=48"]
    assert train_here([str(EXAMPLES / name), *settings]) == 0
    events = read_events(tmp_path / "run")
    assert [event["event"] for event in events][-1] == "finished"
    assert _undocumented(events, (ROOT / "docs" / "report.md").read_text(encoding="utf-8")) == set()


def _undocumented(events, page):
    """Return the events and fields that docs/report.md does not name."""
    words = {event["event"] for event in events}
    for event in events:
        words |= {key.split("/")[0] + "/" if "/" in key else key for key in event}
    return {word for word in words if f"`{word}" not in page}


# ---------------------------------------------------------------- the demo


@pytest.fixture
def demo(monkeypatch):
    spec = importlib.util.spec_from_file_location("dataflex_demo", EXAMPLES / "demo.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "dataflex_demo", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.trains
def test_the_demo_tells_what_came_out(demo, tiny_model, tmp_path, monkeypatch, capsys):
    """Its commands run here, on the tiny model; what it reads and prints at the end is its own."""
    from dataflex.cli import main
    from dataflex.run import train_here

    def short(*arguments):
        if arguments[0] == "report":
            assert main(list(arguments)) == 0
            return 2.0, 1.0
        name = Path(arguments[1]).name
        folder = next((Path(word.partition("=")[2]) for word in arguments if word.startswith("output_dir=")), None)
        # The demo's budget pays for no target row in two steps.
        budget = ["dynamic.signals.budget=0.5" for word in arguments if word.startswith("dynamic.signals.budget=")]
        output = folder or Path(parsed(name).lf["output_dir"])
        settings = [*tiny(tiny_model, output), *SHORT["demo_dynamic.yaml"][:3], *budget]
        settings += SHORT["demo_dynamic.yaml"][3:] if name == "demo_dynamic.yaml" else []
        assert train_here([str(EXAMPLES / name), *settings, "eval_on_start=true"]) == 0
        return 60.0, 90.0 if budget else 50.0

    monkeypatch.chdir(ROOT)
    parsed("demo_dynamic.yaml"), parsed("demo_static.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    monkeypatch.setattr(demo, "dataflex", short)
    assert demo.main() == 0
    told = capsys.readouterr().out
    result = told[told.index("\nResult\n") :]
    for kind, cost in (("static", "50 +1.00"), ("dynamic", "50 +1.00"), ("budget", "90 +1.80")):
        final = json.loads((tmp_path / "runs" / "demo" / kind / "all_results.json").read_text())["eval_loss"]
        assert re.search(rf"\({kind}\) +\d+ +{cost} +{final:.4f}\n", result)
    before = float(re.search(r"before training +([\d.]+)\n", result).group(1))
    history = json.loads((tmp_path / "runs/demo/static/trainer_state.json").read_text())["log_history"]
    assert before == pytest.approx(history[0]["eval_loss"], abs=1e-4)  # both runs start from the same model
    rows = [int(number) for number in re.findall(r"^  \w[\w ]+? +(\d+) +[\d.]+% +[\d.]+%$", result, re.MULTILINE)]
    assert sum(rows) == 2 * 2  # two steps of two rows after the warm-up
    assert f"Report  {tmp_path / 'runs/demo/dynamic/dataflex/report'}\n" in result
    assert (tmp_path / "runs/demo/dynamic/dataflex/report/summary.txt").is_file()
    assert "Time    dynamic run 60 s, budget run 60 s, static run 60 s, report 2 s, total" in result


@pytest.mark.parametrize(
    ("end", "code", "exit_code"), [("sys.exit(2)", 2, 2), ("sys.exit(1)", 1, 1), ("os.kill(os.getpid(), 9)", -9, 137)]
)
def test_the_demo_ends_with_the_exit_code_of_a_run_that_fails(demo, monkeypatch, capsys, end, code, exit_code):
    script = f"import os, sys; print('first'); print(os.getcwd(), os.environ['HF_HUB_OFFLINE'], *sys.argv[1:]); {end}"
    monkeypatch.setattr(demo, "COMMAND", [sys.executable, "-c", script])
    with pytest.raises(SystemExit) as ended:
        demo.main()
    assert ended.value.code == exit_code
    told = capsys.readouterr().out.splitlines()
    assert told[-3:] == [
        "first",
        f"{ROOT} 1 train examples/demo_dynamic.yaml",
        f"demo: 'dataflex train examples/demo_dynamic.yaml' ended with exit code {code}; its messages are above",
    ]


def test_the_demo_shows_losses_and_leaves_the_rest_to_the_record(demo, monkeypatch, capsys):
    script = (
        "print('input_ids:'); print({'loss': '2.5', 'dataflex/mix/a': '0.1'}); print({'eval_loss': 3.61, 'epoch': 0})"
    )
    monkeypatch.setattr(demo, "COMMAND", [sys.executable, "-c", script])
    seconds, cpu = demo.dataflex("train", "x.yaml")
    assert 0 < seconds < 30
    assert cpu > 0
    told = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert [line for line in told if line] == ["$ dataflex train x.yaml", "training loss 2.5", "held-out loss 3.61"]
