"""Malformed configurations: each is refused before anything is loaded, with a line that says what to write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dataflex.config.split import resolve
from dataflex.errors import ConfigError

Config = Callable[..., dict[str, Any]]

# Changes to the configuration (see conftest), and what one line of the message must hold.
CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown key": (
        {"dynamic": {"selector": "random", "interval_step": 5}},
        ["dynamic.interval_step: unknown key; did you mean 'interval_steps'? (dynamic accepts: selector, mixer"],
    ),
    "unknown parameter": (
        {"dynamic": {"selector": {"name": "loss", "focs": "high"}, "interval_steps": 5}},
        ["dynamic.selector.focs: unknown key; did you mean 'focus'? (loss selector accepts: every, "],
    ),
    "parameter of a method without any": (
        {"dynamic": {"selector": {"name": "all", "k": 3}}},
        ["dynamic.selector.k: unknown key (all selector takes no parameters)"],
    ),
    "unknown selector": (
        {"dynamic": {"selector": "los", "interval_steps": 5}},
        ["dynamic.selector: unknown selector 'los'; did you mean 'loss'? (known: all, random, random_balanced"],
    ),
    "unknown mixer": (
        {"dynamic": {"mixer": "unimx"}},
        ["dynamic.mixer: unknown mixer 'unimx'; did you mean 'unimax'?"],
    ),
    "unknown weighter": (
        {"dynamic": {"weighter": "colum"}},
        ["dynamic.weighter: unknown weighter 'colum'; did you mean 'column'?"],
    ),
    "method without a name": (
        {"dynamic": {"selector": {"focus": "high"}, "interval_steps": 5}},
        ["dynamic.selector.name: missing; name a selector (known: all, random"],
    ),
    "method as a list": (
        {"dynamic": {"selector": ["random"]}},
        ["dynamic.selector: expected the name of a selector or a mapping with 'name', found [\"random\"]"],
    ),
    "method name as a number": (
        {"dynamic": {"selector": {"name": 3}}},
        ["dynamic.selector.name: expected text, found 3"],
    ),
    "no method": ({"dynamic": {}}, ["dynamic: names no method (selector, mixer, orderer or weighter)"]),
    "block as text": (
        {"dynamic": "loss"},
        ["dynamic: expected a mapping with a selector, mixer, orderer or weighter, found 'loss'"],
    ),
    "text for a count": (
        {"dynamic": {"selector": "random", "interval_steps": "often"}},
        ["dynamic.interval_steps: expected a whole number, found 'often'"],
    ),
    "number in quotes": (
        {"dynamic": {"selector": "random", "interval_steps": "10"}},
        ["dynamic.interval_steps: expected a whole number, found the text '10'; write it without quotes"],
    ),
    "truth value for a count": (
        {"dynamic": {"selector": "random", "warmup_steps": True}},
        ["dynamic.warmup_steps: expected a whole number, found true"],
    ),
    "fraction for a count": (
        {"dynamic": {"selector": "random", "interval_steps": 2.5}},
        ["dynamic.interval_steps: expected a whole number, found 2.5"],
    ),
    "count for a truth value": (
        {"dynamic": {"selector": "random", "repeat": 1}},
        ["dynamic.repeat: expected true or false, found 1"],
    ),
    "number for text": (
        {"dynamic": {"selector": "random", "domain_column": 7}},
        ["dynamic.domain_column: expected text, found 7; write it in quotes"],
    ),
    "interval of no steps": (
        {"dynamic": {"selector": "random", "interval_steps": 0}},
        ["dynamic.interval_steps: must be at least 1, found 0"],
    ),
    "negative warm-up": (
        {"dynamic": {"selector": "random", "warmup_steps": -1}},
        ["dynamic.warmup_steps: must be at least 0, found -1"],
    ),
    "nothing kept": (
        {"dynamic": {"selector": "random", "mixer": "uniform", "keep_ratio": 0}},
        ["dynamic.keep_ratio: must be above 0, found 0"],
    ),
    "more than all kept": (
        {"dynamic": {"selector": "random", "mixer": "uniform", "keep_ratio": 1.5}},
        ["dynamic.keep_ratio: must be at most 1, found 1.5"],
    ),
    "NaN": (
        {"dynamic": {"selector": "random", "mixer": "uniform", "keep_ratio": float("nan")}},
        ["dynamic.keep_ratio: expected a number, found .nan"],
    ),
    "not a choice": (
        {"dynamic": {"selector": {"name": "loss", "focus": "hihg"}, "interval_steps": 5}},
        ["dynamic.selector.focus: 'hihg' is not a choice; did you mean 'high'? (choices: high, medium, low)"],
    ),
    "unit not a choice": (
        {"dynamic": {"mixer": "uniform", "unit": "token"}},
        ["dynamic.unit: 'token' is not a choice; did you mean 'tokens'? (choices: sequences, tokens, documents)"],
    ),
    "list of the wrong length": (
        {"dynamic": {"selector": {"name": "loss", "quantiles": [0.1, 0.2, 0.3]}, "interval_steps": 5}},
        ["dynamic.selector.quantiles: expected 2 values, found 3"],
    ),
    "rule inside a method": (
        {"dynamic": {"selector": {"name": "loss", "quantiles": [0.9, 0.1]}, "interval_steps": 5}},
        ["dynamic.selector.quantiles:"],
    ),
    "adaptive without interval": (
        {"dynamic": {"selector": "loss"}},
        ["dynamic.interval_steps: missing; the loss selector decides from the model as it is"],
    ),
    "selector and mixer without ratio": (
        {"dynamic": {"selector": "random", "mixer": "uniform", "interval_steps": 5}},
        ["dynamic.keep_ratio: missing; beside a mixer, the random selector narrows the pool"],
    ),
    "ratio without selector": (
        {"dynamic": {"mixer": "uniform", "keep_ratio": 0.5}},
        ["dynamic.keep_ratio: has no effect without a selector"],
    ),
    "initial proportions without mixer": (
        {"dynamic": {"selector": "random", "initial_proportions": [1, 1]}},
        ["dynamic.initial_proportions: has no effect without a mixer"],
    ),
    "initial proportions without warm-up": (
        {"dynamic": {"mixer": "uniform", "initial_proportions": [1, 1]}},
        ["dynamic.initial_proportions: hold during warm-up, and warmup_steps is 0"],
    ),
    "budget of a selector that cannot be read": (
        {"dynamic": {"selector": "less", "interval_steps": 5, "signals": {"budget": 0.5}}},
        ["dynamic.selector: less needs a target"],
    ),
    "directions of a weighter that cannot be read": (
        {"dynamic": {"weighter": {"name": "loss", "foo": 1}, "selector": "random", "signals": {"in_run_rank": 4}}},
        ["dynamic.weighter.foo: unknown key"],
    ),
    "what happens at caps that cannot be read": (
        {"dynamic": {"mixer": "uniform", "max_epochs": "x", "at_cap": "stop"}},
        ["dynamic.max_epochs: expected a number"],
    ),
    "encoder of clusters that cannot be read": (
        {"dynamic": {"mixer": "uniform", "domain_clusters": "x", "domain_encoder": "model"}},
        ["dynamic.domain_clusters: expected a whole number"],
    ),
    "clusters of an encoder that cannot be read": (
        {"dynamic": {"mixer": "uniform", "domain_clusters": 3, "domain_encoder": 5}},
        ["dynamic.domain_encoder: expected text"],
    ),
    "targets of a ledger that cannot be read": (
        {"dynamic": {"mixer": {"name": "ledger", "targets": ["a"]}, "interval_steps": 5, "ledger": {"targets": 5}}},
        ["dynamic.ledger.targets: expected the names of data sets, found 5"],
    ),
    "leakage beside a ledger that cannot be read": (
        {"dynamic": {"leakage": "error", "mixer": "uniform", "ledger": {"targets": ["a"], "refresh_steps": "x"}}},
        ["dynamic.ledger.refresh_steps: expected a whole number"],
    ),
    "caps without mixer": (
        {"dynamic": {"selector": "random", "max_epochs": 3}},
        ["dynamic.max_epochs: has no effect without a mixer"],
    ),
    "documents of packed rows without a data set each": (
        {
            "packing": True,
            "dynamic": {"mixer": "uniform", "unit": "documents", "domain_clusters": 2, "domain_encoder": "model"},
        },
        ["dynamic.unit: rows hold several documents under packing, which are counted by data set only"],
    ),
    "floors without mixer": (
        {"dynamic": {"selector": "random", "min_proportion": 0.1}},
        ["dynamic.min_proportion: has no effect without a mixer"],
    ),
    "floor of zero": (
        {"dynamic": {"mixer": "uniform", "min_proportion": 0}},
        ["dynamic.min_proportion: must be above 0, found 0"],
    ),
    "floors that are no proportions": (
        {"dynamic": {"mixer": "uniform", "min_proportion": {"a": 1.5}}},
        ["dynamic.min_proportion.a: must be at most 1, found 1.5"],
    ),
    "floors above one": (
        {"dynamic": {"mixer": "uniform", "min_proportion": 0.6}},
        ["dynamic.min_proportion: the floors sum to 1.2 (0.6 for each of 2 domains), and proportions to 1"],
    ),
    "floors by name above one": (
        {"dynamic": {"mixer": "uniform", "min_proportion": {"a": 0.8, "b": 0.3}}},
        ["dynamic.min_proportion: the floors sum to 1.1, and proportions to 1"],
    ),
    "floor of an unknown domain": (
        {"dynamic": {"mixer": "uniform", "min_proportion": {"aa": 0.2}}},
        ["dynamic.min_proportion.aa: no such domain; did you mean 'a'? (domains: a, b)"],
    ),
    "floor of a domain that is never served": (
        {"dynamic": {"mixer": {"name": "static", "proportions": {"a": 0, "b": 1}}, "min_proportion": 0.1}},
        ["dynamic.min_proportion: dynamic.mixer.proportions says 0 for a, which means never"],
    ),
    "floors of weights in the loss": (
        {"dynamic": {"mixer": "group_dro", "min_proportion": 0.1}},
        ["dynamic.min_proportion: the group_dro mixer serves the domains as its 'sampling' says"],
    ),
    "a weighter beside a loss by domain": (
        {"dynamic": {"mixer": "group_dro", "weighter": "focal"}},
        [
            "dynamic.weighter: the group_dro mixer's loss is a weighted sum of domains' mean losses, which leaves no "
            "place for the focal weighter; use one of the two methods"
        ],
    ),
    "a weighter beside a loss by domain that can be by token": (
        {"dynamic": {"mixer": {"name": "doremi", "reference": "r", "variant": "paper"}, "weighter": "focal"}},
        ["place for the focal weighter; set its 'normalizer: weight_sum', or use one of the two methods"],
    ),
    "target missing": (
        {"dynamic": {"selector": "tacs", "interval_steps": 5}},
        ["dynamic.selector: tacs needs a target: add 'targets: [<data set>]' (it keeps the rows whose loss falls most"],
    ),
    "target not defined": (
        {"dynamic": {"selector": {"name": "tacs", "targets": ["tt"]}, "interval_steps": 5}},
        ["dynamic.selector.targets: 'tt' is not defined in data/dataset_info.json; did you mean 't'?"],
    ),
    "target file missing": (
        {"dynamic": {"selector": {"name": "tacs", "targets": "gone"}, "interval_steps": 5}},
        ["dynamic.selector.targets: the file of 'gone' is missing: data/gone.jsonl"],
    ),
    "target without rows": (
        {"dynamic": {"selector": {"name": "tacs", "targets": ["empty"]}, "interval_steps": 5}},
        ["dynamic.selector.targets: 'empty' has no rows (data/empty.jsonl)"],
    ),
    "target not wanted": (
        {"dynamic": {"selector": {"name": "random", "targets": ["t"]}}},
        ["dynamic.selector.targets: the random selector takes no targets"],
    ),
    "target of the wrong type": (
        {"dynamic": {"selector": {"name": "tacs", "targets": [1]}, "interval_steps": 5}},
        ["dynamic.selector.targets: expected the names of data sets, found [1]"],
    ),
    "plugin missing": (
        {"dynamic": {"selector": "random", "plugins": ["mine.py"]}},
        ["dynamic.plugins: no such file: mine.py"],
    ),
    "proportions of the wrong length": (
        {"dynamic": {"mixer": {"name": "static", "proportions": [0.2, 0.3, 0.5]}}},
        ["dynamic.mixer.proportions: 3 numbers for 2 domains; give one for each of a, b"],
    ),
    "negative proportion": (
        {"dynamic": {"mixer": {"name": "static", "proportions": [1.5, -0.5]}}},
        ["dynamic.mixer.proportions", "-0.5"],
    ),
    "NaN proportion": (
        {"dynamic": {"mixer": {"name": "static", "proportions": [0.5, float("nan")]}}},
        ["dynamic.mixer.proportions[1]: expected a number, found .nan"],
    ),
    "proportions of nothing": (
        {"dynamic": {"mixer": {"name": "static", "proportions": [0, 0]}}},
        ["dynamic.mixer.proportions: all are 0"],
    ),
    "proportions missing": ({"dynamic": {"mixer": "static"}}, ["dynamic.mixer.proportions: missing"]),
    "proportions for an unknown domain": (
        {"dynamic": {"mixer": {"name": "static", "proportions": {"a": 1, "b": 1, "c": 2}}}},
        ["dynamic.mixer.proportions.c: no such domain", "(domains: a, b)"],
    ),
    "domain left out": (
        {"dynamic": {"mixer": {"name": "static", "proportions": {"a": 1}}}},
        ["dynamic.mixer.proportions.b: missing; every domain needs a number"],
    ),
    "initial proportions of the wrong length": (
        {"dynamic": {"mixer": "uniform", "warmup_steps": 3, "initial_proportions": [1]}},
        ["dynamic.initial_proportions: 1 numbers for 2 domains"],
    ),
    "infinite initial proportion": (
        {"dynamic": {"mixer": "uniform", "warmup_steps": 3, "initial_proportions": [1, float("inf")]}},
        ["dynamic.initial_proportions", "must be a finite number"],
    ),
    "cap of an unknown domain": (
        {"dynamic": {"mixer": "uniform", "max_epochs": {"aa": 2}}},
        ["dynamic.max_epochs.aa: no such domain; did you mean 'a'? (domains: a, b)"],
    ),
    "cap of zero": (
        {"dynamic": {"mixer": "uniform", "max_epochs": {"a": 0}}},
        ["dynamic.max_epochs.a: must be above 0, found 0"],
    ),
    "stage of a nested list": (
        {
            "dynamic": {
                "mixer": {"name": "staged", "stages": [{"start_step": 0, "proportions": [1, 1], "proportion": []}]}
            }
        },
        ["dynamic.mixer.stages[0].proportion: unknown key; did you mean 'proportions'?"],
    ),
    "one domain": (
        {"dataset": "a", "dynamic": {"mixer": "uniform"}},
        ["dynamic.mixer: uniform needs at least two domains, found 1; list several data sets"],
    ),
    "more epochs than allowed": (
        {"num_train_epochs": 9, "dynamic": {"mixer": {"name": "unimax", "max_epochs": 1}}},
        ["dynamic.mixer: unimax: the run serves 1,350 sequences"],
    ),
    "both kinds of keys": (
        {"train_type": "dynamic_select"},
        ["dynamic: given together with flat keys of existing DataFlex (train_type)"],
    ),
    "misspelt block": (
        {"dynamic": None, "dynamc": {"selector": "random"}},
        ["dynamc: unknown key; did you mean 'dynamic'?"],
    ),
    "stage ppo": ({"stage": "ppo"}, ["stage: ppo is not supported: the policy writes its own training batches"]),
    "unknown stage": ({"stage": "stf"}, ["stage: 'stf' is not one of the 6 choices; did you mean 'sft'?"]),
    "weighter under dpo": (
        {"stage": "dpo", "dynamic": {"weighter": {"name": "loss", "warmup_steps": 0}}},
        ["dynamic.weighter: reweighting needs per-token losses of a causal LM, and stage dpo"],
    ),
    "method under the wrong stage": (
        {"stage": "rm", "dynamic": {"selector": {"name": "tacs", "targets": ["t"]}, "interval_steps": 5}},
        ["dynamic.selector: tacs does not work under stage rm (works under: pt, sft)"],
    ),
    "method with partitioned parameters": (
        {
            "deepspeed": {"zero_optimization": {"stage": 3}},
            "dynamic": {"selector": {"name": "tacs", "targets": ["t"]}, "interval_steps": 5},
        },
        ["dynamic.selector: tacs does not work with partitioned parameters (DeepSpeed ZeRO-3)"],
    ),
    "an optimizer without moments": (
        {"optim": "adafactor", "dynamic": {"selector": {"name": "less", "targets": ["t"]}, "interval_steps": 5}},
        ["dynamic.selector.precondition: true_adam needs Adam's moments for each element"],
    ),
    "streaming": (
        {"streaming": True, "tokenized_path": "there", "max_steps": 4},
        ["streaming: rows that are tokenized when served make no tokenized copy (tokenized_path)"],
    ),
    "grouped by length": (
        {"group_by_length": True},
        ["group_by_length: the plan decides the order of rows, so batches cannot be grouped by length"],
    ),
    "grouped by length, new spelling": (
        {"train_sampling_strategy": "group_by_length"},
        ["train_sampling_strategy: the plan decides the order of rows"],
    ),
    "batch size found by trying": ({"auto_find_batch_size": True}, ["auto_find_batch_size: a plan is made for one"]),
    "unsloth": ({"use_unsloth": True}, ["use_unsloth: it replaces the training loop"]),
    "megatron": ({"use_mca": True}, ["use_mca: Megatron has its own training loop"]),
    "data skip": ({"ignore_data_skip": True}, ["ignore_data_skip: a resumed run continues the saved plan"]),
    "interleaved data sets": (
        {"mix_strategy": "interleave_under"},
        ["mix_strategy: interleave_under is not supported"],
    ),
    "sequence parallel": ({"sequence_parallel_size": 2}, ["sequence_parallel_size: one row would be spread over"]),
    "context parallel": ({"parallelism_config": {"cp_size": 2}}, ["parallelism_config: one row would be spread over"]),
    "loss of its own": (
        {"use_dft_loss": True, "dynamic": {"weighter": {"name": "loss", "warmup_steps": 0}}},
        ["use_dft_loss: it computes a loss of its own, and so does the loss weighter"],
    ),
    "smoothed loss": (
        {"label_smoothing_factor": 0.1, "dynamic": {"weighter": {"name": "loss", "warmup_steps": 0}}},
        ["label_smoothing_factor: smoothing replaces the loss that the loss weighter looks at"],
    ),
    "fused loss": (
        {"enable_liger_kernel": True, "dynamic": {"weighter": {"name": "loss", "warmup_steps": 0}}},
        ["enable_liger_kernel: its fused loss gives no loss per token"],
    ),
    "weights that never act": (
        {"dynamic": {"weighter": {"name": "loss", "warmup_steps": 1000}}},
        ["dynamic.weighter.warmup_steps: 1000"],
    ),
    "packed column": (
        {"packing": True, "dynamic": {"weighter": "column"}},
        ["packing: rows hold several samples, so the column 'sample_weight' has no single value in a row"],
    ),
    "packed by default": (
        {"stage": "pt", "dynamic": {"selector": "random", "domain_column": "source"}},
        ["packing: rows hold several samples (pre-training packs unless told otherwise), so the column 'source'"],
    ),
    "nothing trained": (
        {"do_train": False},
        ["do_train: is not on, so nothing is trained and 'dynamic' has no effect"],
    ),
    "data set not defined": (
        {"dataset": "a,empti"},
        ["dataset: 'empti' is not defined in data/dataset_info.json; did you mean 'empty'?"],
    ),
    "data set twice": ({"dataset": "a,b,a"}, ["dataset: names a twice"]),
    "data set missing": ({"dataset": None}, ["dataset: missing; name one or more data sets"]),
    "data file missing": ({"dataset": "a,gone"}, ["dataset: the file of 'gone' is missing: data/gone.jsonl"]),
    "data file of another kind": ({"dataset": "odd"}, ["dataset: 'odd' cannot be read from data/odd.xyz"]),
    "data set without a file": ({"dataset": "nothing"}, ["dataset: 'nothing' in data/dataset_info.json has neither"]),
    "data set without rows": ({"dataset": "a,empty"}, ["dataset: 'empty' has no rows (data/empty.jsonl)"]),
    "evaluation set not defined": ({"eval_dataset": "tt"}, ["eval_dataset: 'tt' is not defined", "did you mean 't'?"]),
    "two sources of validation": (
        {"eval_dataset": "t", "val_size": 0.1},
        ["val_size: cannot be given together with eval_dataset"],
    ),
    "data folder missing": ({"dataset_dir": "dada"}, ["dataset_dir: no such file: dada/dataset_info.json"]),
    "model missing": ({"model_name_or_path": None}, ["model_name_or_path: missing"]),
    "model folder missing": ({"model_name_or_path": "./modl"}, ["model_name_or_path: no such folder: ./modl"]),
    "deepspeed file missing": ({"deepspeed": "ds.json"}, ["deepspeed: no such file: ds.json"]),
    "muon under FSDP2": (
        {"use_muon": True, "fsdp": "full_shard auto_wrap", "fsdp_config": {"fsdp_version": 2}},
        ["use_muon: LLaMA-Factory's Muon loses its state"],
    ),
    "output missing": ({"output_dir": None}, ["output_dir: missing; checkpoints, plans and the record"]),
    "output is a file": ({"output_dir": "data/a.jsonl/out"}, ["output_dir:", "a.jsonl is a file, not a folder"]),
    "checkpoint missing": (
        {"resume_from_checkpoint": "out/checkpoint-7"},
        ["resume_from_checkpoint: no such folder: out/checkpoint-7"],
    ),
    "no checkpoint to resume": (
        {"resume_from_checkpoint": True},
        ["resume_from_checkpoint: out holds no checkpoint-<step> folder; remove the key to start afresh"],
    ),
    "more rows than there are": (
        {"dynamic": {"selector": "random", "interval_steps": 100}},
        ["interval of 100 steps wants 200 rows, and the data sets hold 150. Lower interval_steps to 75 or less"],
    ),
    "more rows than there are in one interval for all": (
        {"dynamic": {"selector": "random"}},
        ["interval of 225 steps wants 450 rows, and the data sets hold 150. Set interval_steps to 75 or less"],
    ),
    "domain too small for a narrowed pool": (
        {
            "dynamic": {
                "selector": "random",
                "mixer": {"name": "static", "proportions": [1, 9]},
                "keep_ratio": 0.9,
                "interval_steps": 40,
            }
        },
        ["dynamic.mixer: 40 steps want 72 rows of domain 'b', and at most 50 of it are left by the selector"],
    ),
    "caps beside a selector": (
        {
            "dynamic": {
                "selector": "random",
                "mixer": "uniform",
                "keep_ratio": 0.9,
                "interval_steps": 5,
                "max_epochs": 2,
            }
        },
        ["dynamic.max_epochs: has no effect beside the random selector"],
    ),
    "more rows than max_samples leaves": (
        {"max_samples": 20, "max_steps": 100, "dynamic": {"selector": "random", "interval_steps": 100}},
        ["interval of 100 steps wants 200 rows, and the data sets hold 40. Lower interval_steps to 20 or less"],
    ),
}


@pytest.mark.parametrize("case", list(CASES))
def test_refused_with_reason(case: str, config: Config, project: Path) -> None:
    changes, parts = CASES[case]
    with pytest.raises(ConfigError) as caught:
        resolve(config(**changes), project)
    lines = caught.value.problems
    assert any(all(part in line for part in parts) for line in lines), lines
    assert len(lines) == 1, f"one mistake, told more than once: {lines}"


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 60


def test_the_unchanged_configuration_is_in_order(config: Config, project: Path) -> None:
    assert resolve(config(), project).dynamic is not None


def test_all_problems_are_told_at_once(config: Config, project: Path) -> None:
    broken = config(
        dataset="a,c",
        group_by_length=True,
        output_dir=None,
        dynamic={
            "selector": {"name": "loss", "focs": "high", "focus_weight": "5", "temperature": 0},
            "mixer": "unifrom",
            "interval_steps": 0,
            "keep_ratio": 2,
            "warmup": 3,
        },
    )
    with pytest.raises(ConfigError) as caught:
        resolve(broken, project)
    beginnings = [
        "dynamic.warmup: unknown key",
        "dynamic.interval_steps: must be at least 1",
        "dynamic.keep_ratio: must be at most 1",
        "dynamic.selector.focs: unknown key",
        "dynamic.selector.focus_weight: expected a number",
        "dynamic.selector.temperature: must be above 0",
        "dynamic.mixer: unknown mixer 'unifrom'; did you mean 'uniform'?",
        "group_by_length:",
        "output_dir: missing",
        "dataset: 'c' is not defined",
    ]
    lines = caught.value.problems
    assert len(lines) == len(beginnings), lines
    for beginning in beginnings:
        assert any(line.startswith(beginning) for line in lines), (beginning, lines)


def test_read_only_output_folder(config: Config, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    (project / "locked").mkdir()
    allowed = os.access
    # The tests may run as root, for whom every folder is writable.
    monkeypatch.setattr(os, "access", lambda path, mode: "locked" not in str(path) and allowed(path, mode))
    with pytest.raises(ConfigError, match=r"output_dir: .*locked cannot be written to"):
        resolve(config(output_dir="locked/run/1"), project)


def test_environment_that_cannot_be_honoured(config: Config, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USE_MCA", "1")
    with pytest.raises(ConfigError, match=r"USE_MCA \(environment\): Megatron"):
        resolve(config(), project)


def test_the_data_folder_beside_the_configuration_is_pointed_out(
    config: Config, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "elsewhere").mkdir()
    monkeypatch.chdir(project / "elsewhere")
    with pytest.raises(ConfigError, match=f"write 'dataset_dir: {project}/data'"):
        resolve(config(model_name_or_path="some/model"), project)


def test_more_processes_want_more_rows(config: Config, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mapping = config(dynamic={"selector": "random", "interval_steps": 30}, max_steps=30)
    assert resolve(mapping, project).dynamic is not None
    monkeypatch.setenv("FORCE_TORCHRUN", "1")
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    monkeypatch.setenv("NNODES", "2")
    with pytest.raises(ConfigError, match="interval of 30 steps wants 240 rows, and the data sets hold 150"):
        resolve(mapping, project)
