"""``dataflex mix doremi`` from the configuration to the final model; killed and taken up; one step at a time."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from dataflex import cli
from dataflex.config.load import load_mapping
from dataflex.errors import ConfigError
from dataflex.mixers.loss_weights import DoReMi
from dataflex.mixing import doremi, runs
from dataflex.plan import proportions
from dataflex.plan.proportions import read_proportions
from dataflex.record.read import read_events

BASE = {
    "dataset": "alpha,beta,gamma",
    "max_steps": 4,
    "learning_rate": 5e-3,
    "save_strategy": "steps",
    "save_steps": 1,
    "dynamic": {"unit": "tokens", "mixer": {"name": "doremi", "eta": 5.0}},
}
SMALL = {"max_steps": 5}


class Bench:
    """A configuration on disk, and the command run with training in this process."""

    def __init__(self, run, monkeypatch):
        self.folder = run.folder
        self.out = run.folder / "out"
        self.config = self.folder / "run.yaml"
        self.config.write_text(yaml.safe_dump(run.mapping("unused", **BASE)), encoding="utf-8")
        (self.folder / "small.yaml").write_text(yaml.safe_dump(SMALL), encoding="utf-8")
        self.trained: list[str] = []
        monkeypatch.setattr(runs, "train", self.train)

    def train(self, config: Path) -> int:
        from dataflex.run import train_here

        self.trained.append(config.relative_to(self.out).as_posix())
        try:
            return train_here([str(config)])
        except InterruptedError:
            return 1

    def __call__(self, *options: str) -> int:
        self.trained = []
        small = ["--small", str(self.folder / "small.yaml")]
        return cli.main(["mix", "doremi", str(self.config), *small, "--out", str(self.out), *options])

    def found(self, number: int):
        return read_proportions(self.out / f"round-{number}" / "proportions.json")


@pytest.fixture
def bench(run, monkeypatch):
    return Bench(run, monkeypatch)


def served(folder: Path) -> dict[str, float]:
    (planned,) = [event for event in read_events(folder) if event["event"] == "planned"]
    return planned["proportions"]


@pytest.mark.parametrize(
    "keys",
    [
        ["max_epochs=4", "at_cap=stop"],
        ["orderer.name=saw", "orderer.by=loss", "interval_steps=2"],
        ["orderer.name=sorting", "orderer.by=length"],
        ["selector.name=random", "keep_ratio=0.5", "interval_steps=2", "signals.pool_fraction=0.5", "max_repeats=3"],
    ],
)
def test_small_runs_are_without_what_decides_in_the_final_one(bench, keys):
    assert bench("--write", *[f"dynamic.{key}" for key in keys]) == 0
    blocks = [yaml.safe_load(path.read_text())["dynamic"] for path in sorted(bench.out.glob("**/*.yaml"))]
    final, *small = blocks
    wanted = {key.split(".")[0].split("=")[0] for key in keys}
    assert wanted <= final.keys()
    assert all(not wanted & block.keys() for block in small)
    assert len(small) == 2


def test_two_rounds_from_the_configuration_to_the_final_model(bench, capsys):
    assert bench("--rounds", "2") == 0
    told = capsys.readouterr().out
    assert bench.trained == [
        "round-1/reference.yaml",
        "round-1/proxy.yaml",
        "round-2/reference.yaml",
        "round-2/proxy.yaml",
        "final.yaml",
    ]
    first, second = bench.found(1), bench.found(2)
    sizes = first.details["sizes"]
    natural = {name: size / sum(sizes.values()) for name, size in sizes.items()}
    assert first.details["reference_proportions"] == pytest.approx(natural, abs=1e-15)
    assert served(bench.out / "round-1" / "reference") == pytest.approx(natural, abs=1e-12)
    assert second.details["reference_proportions"] == first.by_name
    assert served(bench.out / "round-2" / "reference") == pytest.approx(first.by_name, abs=1e-12)
    change = max(abs(second.by_name[name] - share) for name, share in first.by_name.items())
    assert second.details["largest_change"] == pytest.approx(change, abs=1e-15)
    assert f"largest change {change:.2g}" in told
    lines = [line.split() for line in told.splitlines()]
    for found in (first, second):
        for name, share in found.by_name.items():
            assert [name, f"{share:.4f}", f"{found.details['reference_proportions'][name]:.4f}"] in lines

    assert read_proportions(bench.out / "proportions.json").by_name == second.by_name
    assert served(bench.out / "final") == pytest.approx(second.by_name, abs=1e-12)
    assert (bench.out / "final" / "model.safetensors").is_file()
    small, final = (load_mapping(bench.out / name) for name in ("round-1/proxy.yaml", "final.yaml"))
    assert (small["max_steps"], final["max_steps"]) == (5, 4)
    assert small["dynamic"]["mixer"]["eta"] == 5.0

    source = first.provenance
    assert source["settings"]["rounds"] == 2
    assert source["reference"]["folder"] == str(bench.out / "round-1" / "reference")
    assert source["reference"]["parameters"] > 1000
    assert source["reference"]["tokenizer"] == source["proxy"]["tokenizer"]
    assert source["config_digest"]

    before = {path: path.read_bytes() for path in bench.out.rglob("proportions.json")}
    assert bench("--rounds", "2") == 0
    assert bench.trained == []
    assert {path: path.read_bytes() for path in before} == before


def test_a_mean_that_collapsed_is_told_before_the_final_run_and_after_it(bench, capsys, monkeypatch):
    monkeypatch.setattr(proportions, "COLLAPSED_ABOVE", 0.34)
    assert bench() == 0
    told = capsys.readouterr().out
    warning = bench.found(1).details["warning"]
    assert "has collapsed" in warning
    assert told.count(f"warning: {warning}") == 2
    assert told.index("warning: ") < told.index("final: training") < told.rindex("warning: ")
    assert cli.main(["report", str(bench.out / "round-1" / "proxy")]) == 0
    told = capsys.readouterr().out
    assert "Proportions found by doremi" in told
    assert " ".join(warning.split()) in " ".join(told.split())


def test_a_killed_proxy_goes_on_and_finds_the_same(bench, monkeypatch, capsys):
    assert bench("--step", "reference") == 0
    original = DoReMi.observe

    def dying(self, stats):
        if stats.step == 3:
            raise InterruptedError
        original(self, stats)

    monkeypatch.setattr(DoReMi, "observe", dying)
    assert bench() == 1
    assert bench.trained == ["round-1/proxy.yaml"]
    assert "ended with exit code 1" in capsys.readouterr().out
    assert not (bench.out / "proportions.json").exists()
    steps = []
    monkeypatch.setattr(DoReMi, "observe", lambda self, stats: steps.append(stats.step) or original(self, stats))
    assert bench() == 0
    assert steps == [3, 4]
    assert bench.trained == ["round-1/proxy.yaml", "final.yaml"]
    killed = bench.found(1)

    bench.out = bench.folder / "straight"
    assert bench() == 0
    assert bench.found(1).by_name == killed.by_name
    assert bench.found(1).details == killed.details


def test_steps_alone_ask_for_what_they_need(bench, capsys):
    assert bench("--step", "proxy") == 2
    assert "--step proxy: the reference of round 1" in capsys.readouterr().err
    assert bench("--step", "proportions") == 2
    assert "--step proportions: the proxy of round 1" in capsys.readouterr().err
    assert bench("--step", "final") == 2
    assert "proportions.json is not there yet" in capsys.readouterr().err
    assert bench("--rounds", "2", "--step", "reference", "--round", "2") == 2
    assert "round 1 has not found its proportions yet" in capsys.readouterr().err
    for step in ("reference", "proxy", "proportions", "final"):
        assert bench("--step", step) == 0
        assert bench.trained == (
            [] if step == "proportions" else [f"{'' if step == 'final' else 'round-1/'}{step}.yaml"]
        )


def test_rounds_end_when_the_proportions_settle(bench, monkeypatch):
    monkeypatch.setattr(doremi, "CHANGE", 1.0)
    assert bench("--rounds", "3") == 0
    assert bench.trained == ["round-1/reference.yaml", "round-1/proxy.yaml", "final.yaml"]
    assert bench.found(1).details["settled"] is True


def test_a_reference_that_is_there_is_taken(bench, tiny_model):
    assert bench("--reference", str(tiny_model), "--reference-mix", "uniform") == 0
    assert bench.trained == ["round-1/proxy.yaml", "final.yaml"]
    found = bench.found(1)
    assert found.provenance["reference"]["folder"] == str(tiny_model)
    assert found.details["reference_proportions"] == dict.fromkeys(("alpha", "beta", "gamma"), 1 / 3)


def test_configurations_are_only_written_when_asked(bench, capsys):
    assert bench("--rounds", "2", "--write") == 0
    assert bench.trained == []
    told = capsys.readouterr().out.splitlines()
    written = [line.removeprefix("dataflex train ") for line in told if line.startswith("dataflex train ")]
    assert [Path(path).relative_to(bench.out).as_posix() for path in written] == [
        "round-1/reference.yaml",
        "round-1/proxy.yaml",
        "round-2/reference.yaml",
        "round-2/proxy.yaml",
        "final.yaml",
    ]
    assert all(Path(path).is_file() for path in written)


def test_a_final_model_of_other_proportions_is_not_taken_for_this_one(bench, capsys):
    assert bench() == 0
    assert bench("--rounds", "2") == 2
    assert "final was trained with other proportions than those of round 2; move it away" in capsys.readouterr().err
    (bench.out / "final").rename(bench.out / "of-round-1")
    assert bench("--rounds", "2") == 0
    assert bench.trained == ["final.yaml"]


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"dynamic": {"mixer": "size"}}, [], "dynamic.mixer: this command finds the proportions of the final run"),
        (
            {"dynamic": {"mixer": {"name": "doremi", "etta": 1}}},
            [],
            "dynamic.mixer.etta: unknown key; did you mean 'eta'",
        ),
        ({"train_type": "dynamic_mix"}, [], "train_type: flat keys cannot be used here"),
        ({}, ["--reference", "nowhere"], "proxy.yaml: dynamic.mixer.reference: no such folder: nowhere"),
        ({}, ["--reference-mix", "nowhere.json"], "reference.yaml: dynamic.mixer"),
        ({}, ["--rounds", "0"], "--rounds: must be at least 1"),
        ({}, ["--round", "1"], "--round: has no effect without --step"),
        ({}, ["--step", "proxy", "--round", "2"], "--round: must be from 1 to 1"),
        ({"dataset": "alpha"}, [], "doremi needs at least two domains"),
        ({"do_train": False}, [], "do_train: is not on"),
        ({"stage": "dpo"}, [], "doremi does not work under stage dpo"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(bench, run, capsys, change, options, message):
    bench.config.write_text(yaml.safe_dump({**run.mapping("unused", **BASE), **change}), encoding="utf-8")
    assert bench(*options) == 2
    assert message in capsys.readouterr().err
    assert not bench.out.exists()


def test_a_folder_of_another_configuration_is_refused(bench, capsys):
    assert bench("--write") == 0
    assert bench("--write", "learning_rate=0.1") == 2
    assert "holds runs of another configuration" in capsys.readouterr().err
    assert bench("--write", "--rounds", "3") == 0


def test_training_happens_in_a_process_of_its_own(monkeypatch):
    started = []
    monkeypatch.setattr("dataflex.mixing.runs.run_child", lambda args, **_: started.append(args) or 3)
    assert runs.train(Path("x.yaml")) == 3
    assert started == [[sys.executable, "-m", "dataflex", "train", "x.yaml"]]


def test_the_size_of_a_model_is_read_from_its_files(tiny_model):
    from safetensors.numpy import load_file

    told = doremi._model(tiny_model)
    assert told["parameters"] == sum(array.size for array in load_file(tiny_model / "model.safetensors").values())
    assert told["vocabulary"] == json.loads((tiny_model / "config.json").read_text())["vocab_size"]
    assert np.isscalar(told["parameters"])


def test_of_an_adapter_the_base_model_is_told(tiny_model, tmp_path):
    from safetensors.numpy import save_file

    save_file({"lora_A": np.zeros((2, 3), dtype=np.float32)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tiny_model)}))
    whole, told = doremi._model(tiny_model), doremi._model(tmp_path)
    assert told["folder"] == str(tmp_path)
    assert told["base"] == str(tiny_model)
    assert [told[key] for key in ("parameters", "vocabulary")] == [whole[key] for key in ("parameters", "vocabulary")]


def test_the_settings_of_the_mixer_are_checked_as_its_own():
    from dataflex.mixing.doremi import _proxy_params

    assert _proxy_params({"mixer": {"name": "doremi", "reference": "r", "variant": "paper"}}) == (
        {"variant": "paper"},
        "r",
    )
    with pytest.raises(ConfigError, match=r"dynamic\.mixer\.variant: 'papr' is not a choice; did you mean 'paper'"):
        _proxy_params({"mixer": {"name": "doremi", "variant": "papr"}})
