"""The recipes of examples/scale are planned without a model, a device or the network; numbers are a hand's."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dataflex.cli import main
from dataflex.plan.proportions import ProportionsFile, write_proportions
from tests.docs.pages import EXAMPLES, TEXTS

SCALE = EXAMPLES / "scale"
RECIPES = sorted(path.stem for path in SCALE.glob("*.yaml"))
QUESTIONS = '"Which is even, and ""small""?",1,2,3,5,B\n'
LAUNCH = ("FORCE_TORCHRUN", "NPROC_PER_NODE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "USE_RAY")
DOMAINS = ("commoncrawl", "c4", "github", "book", "arxiv", "wikipedia", "stackexchange")


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """A folder with the recipes, MMLU's questions, and what earlier steps of DoReMi leave."""
    shutil.copytree(SCALE, tmp_path / "examples" / "scale")
    tables = tmp_path / "mmlu"
    tables.mkdir()
    (tables / "abstract_algebra_dev.csv").write_text(QUESTIONS)
    script = [sys.executable, "examples/scale/mmlu_targets.py", "mmlu"]
    subprocess.run(script, cwd=tmp_path, check=True, stdout=subprocess.PIPE)
    shutil.copytree(SCALE / "models" / "Qwen2.5-0.5B", tmp_path / "runs" / "scale" / "doremi_1_reference")
    found = ProportionsFile(names=DOMAINS, proportions=(1 / 7,) * 7, method="doremi", details={}, provenance={})
    write_proportions(tmp_path / "runs" / "scale" / "doremi_2_proxy" / "dataflex" / "doremi.json", found)
    monkeypatch.chdir(tmp_path)
    for name in LAUNCH:
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def command_of(name):
    """Environment and words of the command in a recipe's head."""
    head = re.findall(r"^#   (.*)$", (SCALE / f"{name}.yaml").read_text(encoding="utf-8"), re.MULTILINE)
    words = shlex.split(" ".join(line.strip().rstrip("\\") for line in head))
    environment = dict(word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word))
    return environment, words[len(environment) :]


def planned(name, monkeypatch, capsys, *more):
    environment, words = command_of(name)
    assert words == ["dataflex", "train", f"examples/scale/{name}.yaml"]
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    model = yaml.safe_load((SCALE / f"{name}.yaml").read_text())["model_name_or_path"].partition("/")[2]
    code = main(["plan", words[2], "use_cpu=true", f"model_name_or_path=examples/scale/models/{model}", *more])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


WANTED = {
    # ranks, sequences a step, tokens, and the bytes of parameters, gradients and optimizer on a rank
    "mistral_7b_less": (8, 64, 1560 * 64 * 2048, (7_241_732_096 + 109_051_904) * 2 / 8, 109_051_904 * 2 / 8),
    "llama_3b_less": (8, 64, 1560 * 64 * 2048, (3_212_749_824 + 73_400_320) * 2, 73_400_320 * 2 / 8),
    "qwen_6b_odm": (8, 256, 11444 * 256 * 2048, 1_543_714_304 * 4 / 8, 1_543_714_304 * 4 / 8),
    "qwen_30b_odm": (16, 512, 28610 * 512 * 2048, 1_543_714_304 * 4 / 16, 1_543_714_304 * 4 / 16),
    "doremi_1_reference": (8, 256, 4000 * 256 * 2048, 494_032_768 * 2, 494_032_768 * 2 / 8),
    "doremi_2_proxy": (8, 256, 4000 * 256 * 2048, 494_032_768 * 2, 494_032_768 * 2 / 8),
    "doremi_3_final_6b": (8, 256, 11444 * 256 * 2048, 1_543_714_304 * 4 / 8, 1_543_714_304 * 4 / 8),
    "doremi_3_final_30b": (16, 512, 28610 * 512 * 2048, 1_543_714_304 * 4 / 16, 1_543_714_304 * 4 / 16),
}


def test_every_recipe_is_looked_at():
    assert set(WANTED) == set(RECIPES)
    assert {f"examples/scale/{name}.yaml" for name in RECIPES} <= set(
        re.findall(r"examples/scale/\w+\.yaml", TEXTS["docs/scale.md"])
    )


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_planned_without_a_model(name, reader, monkeypatch, capsys):
    ranks, batch, tokens, parameters, gradients = WANTED[name]
    told = json.loads(planned(name, monkeypatch, capsys, "--tokens-per-second", "100000", "--json"))
    assert (told["world"], told["global_batch"], told["tokens"]) == (ranks, batch, tokens)
    assert told["config"]["output_dir"] == f"runs/scale/{name}"
    found = told["memory_per_rank"]
    assert (found["parameters"], found["gradients"]) == (parameters, gradients)
    assert found["total"] == sum(each for key, each in found.items() if key != "total")
    assert min(found["optimizer"], found["activations"]) > 0
    assert told["hours"]["training"] == pytest.approx(tokens / 100_000 / 3600)
    assert told["passes"]["training"] == {"forward": tokens / 2048, "backward": tokens / 2048}


def test_what_is_printed(reader, monkeypatch, capsys):
    text = planned("mistral_7b_less", monkeypatch, capsys, "--tokens-per-second", "20000")
    size = text[text.index("\nSize") :].splitlines()[2:]
    assert size[0] == "  tokens               at most 204,472,320 (sequences x cutoff_len)"
    # signals: the target's gradient and both moments of 109,051,904 parameters in fp32
    # activations: 4,096 tokens x (2 x 4,096 x 32 layers + 200,704 of one whole layer + 10 x 32,000 of the logits)
    assert size[1] == (
        "  memory per rank      about 6.09 GiB: parameters 1.71, gradients 0.03, optimizer 0.15, activations 2.99, "
        "signals 1.22"
    )
    assert size[2] == "  hours                at most 2.8 of training, of methods 5.7, at the tokens per second given"
    assert "hours" not in planned("mistral_7b_less", monkeypatch, capsys)


def test_without_its_config_the_memory_of_a_model_is_left_out(reader, monkeypatch, capsys):
    text = planned("qwen_6b_odm", monkeypatch, capsys, "model_name_or_path=Qwen/Qwen2.5-1.5B")
    assert "memory per rank" not in text
    assert "  tokens               at most 5,999,951,872" in text


def test_the_questions_of_mmlu_are_rows(reader):
    rows = [json.loads(line) for line in (reader / "examples/scale/mmlu_dev.jsonl").read_text().splitlines()]
    text = "The following is a multiple choice question (with answer) about abstract algebra.\n\n"
    assert rows == [
        {"instruction": text + 'Which is even, and "small"?\nA. 1\nB. 2\nC. 3\nD. 5\nAnswer:', "output": "B"}
    ]
    empty = [sys.executable, "examples/scale/mmlu_targets.py", "examples"]
    failed = subprocess.run(empty, cwd=reader, capture_output=True, text=True, check=False)
    assert (failed.returncode, failed.stderr) == (1, "no tables SUBJECT_dev.csv in examples\n")


@pytest.mark.parametrize("given", ["0", "-1", "nan", "inf", "fast"])
def test_tokens_per_second_are_a_number_above_zero(given, reader, capsys):
    assert main(["plan", "examples/scale/qwen_6b_odm.yaml", "--tokens-per-second", given]) == 2
    assert "--tokens-per-second" in capsys.readouterr().err


def test_hub_addresses_are_those_of_the_data():
    infos = [json.loads((SCALE / f"slimpajama_{size}" / "dataset_info.json").read_text()) for size in ("6b", "30b")]
    for info, split in zip(infos, ("train[:1%]", "train[:5%]"), strict=True):
        assert tuple(info) == DOMAINS
        assert {entry["split"] for entry in info.values()} == {split}
        assert len({entry["folder"] for entry in info.values()}) == 7


def test_the_folder_is_small():
    assert sum(path.stat().st_size for path in Path(SCALE).rglob("*.json")) < 20_000
