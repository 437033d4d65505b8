"""The 34 presets and 22 example configurations of existing DataFlex, one by one: taken, or refused with the way out.

What the examples say of models, rates and output has no bearing here and is left out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dataflex.commands.plan import plan
from dataflex.config.mappings import as_mapping
from dataflex.config.split import resolve
from dataflex.errors import ConfigError

SETS = ["alpaca_en_demo", "alpaca_zh_demo", "wiki_demo", "c4_demo", "mmlu_eval"]
SETS += [name + end for name in ("code", "math", "sharegpt", "orca") for end in ("", "_eval")]


@pytest.fixture
def sets(project: Path) -> Path:
    """Add the data sets that the examples name, a model of 16 layers and a DeepSpeed configuration."""
    file = project / "data" / "dataset_info.json"
    rows = [{"text": f"t {i}", "instruction": f"q {i}", "output": f"a {i}", "score": i / 7} for i in range(1200)]
    (project / "data" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"prompt": "instruction", "response": "output"}
    info = {name: {"file_name": "rows.jsonl", "columns": columns} for name in SETS}
    file.write_text(json.dumps({**json.loads(file.read_text()), **info}))
    (project / "model" / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 16}')
    (project / "ds_z3_config.json").write_text('{"zero_optimization": {"stage": 3}}')
    return project


BASE: dict[str, Any] = {
    "model_name_or_path": "./model",
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "lora",
    "dataset": "alpaca_en_demo",
    "output_dir": "out",
    "per_device_train_batch_size": 1,
    "num_train_epochs": 1.0,
}
TWO = {"dataset": "alpaca_en_demo,alpaca_zh_demo"}


def outcome(folder: Path, mapping: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Return the methods of the block that it amounts to, by kind, and the notes or what is refused."""
    file = folder / "config.json"
    file.write_text(json.dumps({**BASE, **mapping}), encoding="utf-8")
    try:
        parts = resolve({**BASE, **mapping}, folder)
        printed = plan(file)
    except ConfigError as error:
        return {}, "\n".join(error.problems)
    assert parts.dynamic is not None
    block = as_mapping(parts.dynamic)
    methods = {kind: block[kind] for kind in ("selector", "mixer", "orderer", "weighter") if block[kind]}
    assert all(f"name: {each['name'] if isinstance(each, dict) else each}" in printed for each in methods.values())
    assert all(note in printed for note in parts.notes)
    return {**methods, **{key: block[key] for key in ("keep_ratio", "warmup_steps", "interval_steps")}}, "\n".join(
        parts.notes
    )


STATIC: dict[str, Any] = {"kind": "static", "apply_at": "raw", "polarity": "higher_later", "seed": 42}
STATIC |= {"score_source": "precomputed", "score_params": {"score_field": "score"}}
LOSSES = {"score_source": "model_loss", "score_params": {"batch_size": 8, "max_samples": 20000}}
SAW = {"pattern": "saw", "pattern_params": {"num_sections": 3, "folding_ratio": 0.075, "layers": 2}}
DYNAMIC = {"kind": "dynamic", "polarity": "higher_later", "seed": 42, "reorder_every": 1, "consume_once": True}
EXACT = {"cache_dir": "c", "gradient_type": "adam", "proj_dim": 4096, "seed": 123, "save_interval": 16}
FILTER = {"family": "selector", "component": "loss", "mode": "filter", "keep_ratio": 0.5, "warmup_step": 10}
WEIGHTS = {"family": "weighter", "component": "loss", "warmup_step": 10}
ODM = {"family": "mixer", "component": "odm", "every": 50}
CUSTOM = "copy the class to a file of its own and name that beside 'name': 'file: my_"

# Section -> name -> parameters there, those of the method here that are looked at, and what is told.
PRESETS: dict[str, dict[str, tuple[dict[str, Any], dict[str, Any], str]]] = {
    "selectors": {
        "nice": (
            {**EXACT, "reward_model_backend": "local_vllm", "reward_backend_params": {}, "mc_samples": 4},
            {},
            "ask it through an OpenAI-compatible server (reward_model_backend: api)",
        ),
        "less": (EXACT, {"name": "less", "precondition": "true_adam"}, "gradients are compared as they are here"),
        "icons": (
            {**EXACT, "task_boundaries": None},
            {"name": "icons", "vote_percent": 20.0},
            "gradients are compared",
        ),
        "cluster_less": (
            {
                **EXACT,
                "cluster_size": 64,
                "samples_per_cluster": 4,
                "clustering_method": "kmeans",
                "embedding_layer": -1,
            }
            | {"clustering_batch_size": 8, "clustering_max_iter": 10, "representative_strategy": "random"}
            | {"embedding_model_name_or_path": None, "embedding_model_dtype": "auto"},
            {"name": "cluster_less", "sketch_size": 4096, "representatives": 4, "pick": "random"},
            "clustering_max_iter: no effect here",
        ),
        "coincide": (
            {"cache_dir": "c", "seed": 42, "embedding_layers": None, "num_clusters": 10000, "temperature": 1.0}
            | {"clustering_batch_size": 8, "clustering_num_workers": 4, "clustering_device": "auto"}
            | {"clustering_max_iter": 10, "assignment_chunk_size": 4096, "density_chunk_size": 2048}
            | {"embedding_model_name_or_path": None, "embedding_model_dtype": "auto", "single_member_density": 1.0},
            {"name": "coincide", "clusters": 10000, "layers": [1, 5, 8, 12, 16]},
            "of text alone; rows are clustered in every decision",
        ),
        "loss": (
            {"cache_dir": "c", "focus": "medium", "score_batch_size": 8},
            {"name": "loss", "focus": "medium"},
            "score_batch_size: no effect here",
        ),
        "delta_loss": (
            {"cache_dir": "c", "window_size": 0.2, "score_batch_size": 8},
            {"name": "delta_loss", "updates": 1, "window_size": 0.2},
            "cache_dir: no effect here",
        ),
        "tsds": (
            {"cache_dir": "c", "probs_path": "./probs.npy"},
            {"name": "tsds", "targets": ["mmlu_eval"]},
            "the same kind of rows is found here from the targets",
        ),
        "near": (
            {"cache_dir": "c", "indices_path": "./indices.npy"},
            {"name": "near", "targets": ["mmlu_eval"]},
            "the same kind of rows is found here from the targets",
        ),
        "random": (
            {"cache_dir": "c", "seed": 42, "replacement": False},
            {"name": "random", "replacement": False},
            "becomes the seed of all decisions",
        ),
        "custom": ({"cache_dir": "c"}, {}, f"{CUSTOM}selector.py'"),
    },
    "mixers": {
        "random": ({"seed": 42}, {"name": "static"}, "proportions drawn once from its seed, as there"),
        "doremi": (
            {"reference_model_path": "/path/to/checkpoint-xxx", "reweight_eta": 0.1, "reweight_eps": 0.01},
            {},
            "no such folder: /path/to/checkpoint-xxx (the reference model is trained before this run)",
        ),
        "static": ({"proportions": [0.5, 0.5]}, {"name": "static", "proportions": [0.5, 0.5]}, "decide once for all"),
        "odm": (
            {"alpha": 0.9, "warmup_steps": 2000, "reward_scale": 15.0, "min_exploration_rate": 0.03}
            | {"initial_proportions": [0.5, 0.5]},
            {"name": "odm", "smoothing": 0.9, "floor": 0.03},
            "warmup_step is the only warm-up",
        ),
        "dynamic_moe": (
            {"eta": 10.0, "c": 0.05, "collect_steps": 5, "eval_samples": 1000, "eval_batch_size": 32},
            {},
            "flat keys take it from mixer_eval_dataset: name a data set there",
        ),
    },
    "weighters": {
        "loss": ({"strategy": "linupper", "delta": 1.0}, {"name": "loss", "warmup_steps": 1}, ""),
        "adapt": (
            {"tau": 1.0, "refresh_interval": 50, "anchor_batch_size": 8, "clip": None},
            {"name": "adapt", "refresh_steps": 50},
            "the learning rate may have to be raised",
        ),
        "joint_update_aware": (
            {"beta": 0.1, "tau": 0.05, "fixed_point_iters": 5, "damping": 1.0, "target_update_step": 50}
            | {"target_batch_size": 1, "target_num_batches": 1, "embed_normalize": True, "pooling": "last_token"}
            | {"embed_layer": -1, "objective_mode": "full"},
            {"name": "joint_update_aware", "refresh_steps": 50, "pooling": "last", "mode": "full"},
            "the weights are those of the exact fixed point",
        ),
        "custom": ({"strategy": "uniform"}, {}, f"{CUSTOM}weighter.py'"),
    },
    "reorders": {
        "sorting": (
            {**STATIC, "pattern": "sorting", "ascending": True, "window_size": 0},
            {"name": "sorting", "by": {"name": "column", "column": "score"}, "descending": False},
            "no effect where the order is known beforehand",
        ),
        "shuffle": ({**STATIC, "pattern": "shuffle"}, {"name": "shuffle"}, "seed of all decisions"),
        "segment": (
            {**STATIC, "pattern": "segment"}
            | {"pattern_params": {"x_pct": 10, "y_pct": 10, "front_is_high": False, "back_is_high": True}},
            {"name": "segment", "front_percent": 10.0, "front": "low", "back": "high"},
            "",
        ),
        "folding": (
            {**STATIC, "pattern": "folding", "pattern_params": {"layers": 3}},
            {"name": "folding", "layers": 3},
            "",
        ),
        "zigzag": (
            {**STATIC, "pattern": "zigzag", "pattern_params": {"layers": 3}},
            {"name": "zigzag", "layers": 3},
            "",
        ),
        "stair": (
            {**STATIC, "pattern": "stair"}
            | {"pattern_params": {"num_sections": 2, "folding_ratio": 0.225, "layers": 3}},
            {"name": "stair", "sections": 2, "layers": 3, "ratio": 0.225},
            "",
        ),
        "saw": ({**STATIC, **SAW}, {"name": "saw", "sections": 3, "layers": 2, "ratio": 0.075}, ""),
        "dynamic_saw": (
            {**DYNAMIC, **SAW, **LOSSES},
            {"name": "saw", "by": "loss", "sections": 3},
            "every row that is left is scored",
        ),
        "dynamic_folding": (
            {**DYNAMIC, **LOSSES, "pattern": "folding", "pattern_params": {"layers": 3}},
            {"name": "folding", "by": "loss", "layers": 3},
            "every row that is left is scored",
        ),
        "reuse_selector_scores": (
            {**DYNAMIC, **SAW, "score_source": "cached_selection", "score_params": {"cache_path": "step_10.json"}},
            {},
            "let the selector decide in this run, and write 'dynamic: {selector: {name: loss}, orderer:",
        ),
    },
    "pipelines": {
        "hierarchical": (
            {
                "stages": [
                    {**FILTER, "every": 200},
                    ODM,
                    {"family": "reorder", "component": "dynamic_saw", "every": 50},
                    WEIGHTS,
                ]
            },
            {"selector": ("loss", 200), "mixer": ("odm", 50), "orderer": ("saw", 50), "weighter": ("loss", None)},
            "rows of each domain are put in order, until it decides anew",
        ),
        "select_then_reorder": (
            {"stages": [{**FILTER, "every": 100}, {"family": "reorder", "component": "dynamic_saw", "every": 20}]},
            {"selector": ("loss", 100), "orderer": ("saw", 20)},
            "what it keeps is served in order, until it decides anew",
        ),
        "mix_then_weight": ({"stages": [ODM, WEIGHTS]}, {"mixer": ("odm", 50), "weighter": ("loss", None)}, ""),
        "select_only": (
            {"stages": [{**FILTER, "mode": "draw", "every": 1}]},
            {"selector": ("loss", 2)},
            "boundaries are 2 steps apart, so it decides every 2 steps, as there",
        ),
    },
}
TYPES = {"selectors": "select", "mixers": "mix", "weighters": "weight", "reorders": "reorder", "pipelines": "lego"}


@pytest.mark.parametrize(("section", "name"), [(section, name) for section in PRESETS for name in PRESETS[section]])
def test_presets(sets: Path, section: str, name: str) -> None:
    content = {
        of: {each: {"name": each, "params": params} for each, (params, _, _) in entries.items()}
        for of, entries in PRESETS.items()
    }
    (sets / "components.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    keys = {"train_type": f"dynamic_{TYPES[section]}", "components_cfg_file": "components.yaml", "component_name": name}
    keys |= {"warmup_step": 1, "update_step": 2, "update_times": 2, "eval_dataset": "mmlu_eval"}
    if section == "pipelines":
        keys |= {**TWO, "update_times": 150}
    elif section == "mixers":
        keys |= {**TWO, "init_mixture_proportions": [0.5, 0.5]}
    _, wanted, told = PRESETS[section][name]
    found, said = outcome(sets, keys)
    assert told in said
    if section == "pipelines":
        named = {kind: (found[kind]["name"], found[kind].get("every")) for kind in wanted}
        assert named == wanted
        assert found["keep_ratio"] == (0.5 if told.startswith(("rows of", "what it")) else None)
    else:
        kind = {"reorders": "orderer"}.get(section, section.removesuffix("s"))
        given = found.get(kind, {})
        given = given if isinstance(given, dict) else {"name": given}
        assert {key: given.get(key) for key in wanted} == wanted
        assert bool(found) == bool(wanted), said


def test_all_presets_are_there() -> None:
    assert sum(map(len, PRESETS.values())) == 34


SELECT = {"train_type": "dynamic_select", "warmup_step": 10, "update_step": 10, "update_times": 2}
JUDGED = {"eval_dataset": "alpaca_zh_demo", "eval_strategy": "steps", "eval_steps": 10, "per_device_eval_batch_size": 1}
BEST = {**JUDGED, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
BEST |= {"save_steps": 100, "early_stopping_steps": 3, "early_stopping_min_delta": 0.01}
WEIGH = {"train_type": "dynamic_weight", "warmup_step": 100, "train_step": 500, "gradient_accumulation_steps": 16}
MIX = {"train_type": "dynamic_mix", "warmup_step": 100, "update_step": 200, "update_times": 3}
PT = {"stage": "pt", "dataset": "wiki_demo,c4_demo", "eval_dataset": "c4_demo", "mixture_sample_rule": "mixture"}
PT |= {"init_mixture_proportions": [0.5, 0.5]}
FULL = {"finetuning_type": "full", "deepspeed": "ds_z3_config.json", "flash_attn": "fa2"}
SCRATCH = {**PT, **FULL, "train_from_scratch": True, "save_only_model": True}
TEST_MIX = {
    **TWO,
    "train_type": "dynamic_mix",
    "init_mixture_proportions": [0.7, 0.3],
    "mixture_sample_rule": "mixture",
}
MOE = {
    **FULL,
    "dataset": "code,math,sharegpt,orca",
    "mixer_eval_dataset": "code_eval,math_eval,sharegpt_eval,orca_eval",
}
MOE |= {"train_type": "dynamic_mix", "static_mix": False, "warmup_step": 60, "update_step": 100, "update_times": -1}
MOE |= {"train_step": 2000, "max_steps": 2000, "freeze_gate": True, "num_train_epochs": 3.0}

# Example -> its keys with a bearing on the data, its component, the method that it amounts to, and what is told.
EXAMPLES: dict[str, tuple[dict[str, Any], str | None, dict[str, Any], str]] = {
    "test/test_mix": (
        {**TEST_MIX, "warmup_step": 4, "update_step": 3, "update_times": 2},
        "random",
        {"mixer": "static"},
        "proportions drawn once from its seed",
    ),
    "test/test_select": (
        {**SELECT, "warmup_step": 4, "update_step": 3, "update_times": 4, "gradient_accumulation_steps": 16},
        "delta_loss",
        {"selector": "delta_loss"},
        "",
    ),
    "test/test_static_mix": ({**TEST_MIX, "static_mix": True, "train_step": 3}, None, {"mixer": "static"}, ""),
    "test/test_weight": ({**WEIGH, "warmup_step": 1, "train_step": 3}, "custom", {}, f"{CUSTOM}weighter.py'"),
    "train_full/mixers/doremi_step1": (
        {**MIX, **SCRATCH, "static_mix": True},
        "static",
        {"mixer": "static"},
        "has no say, the mixture is fixed",
    ),
    "train_full/mixers/doremi_step2": ({**MIX, **SCRATCH}, "doremi", {}, "train a reference model (its step 1)"),
    "train_full/mixers/doremi_step3": (
        {**MIX, **SCRATCH, "static_mix": True, "init_mixture_proportions": [0.3, 0.7]},
        "static",
        {"mixer": "static"},
        "has no say, the mixture is fixed",
    ),
    "train_full/mixers/dynamic_moe": (MOE, "dynamic_moe", {"mixer": "dynamic_moe"}, ""),
    "train_full/mixers/odm": (
        {**SCRATCH, "train_type": "dynamic_mix", "warmup_step": 10, "update_step": 10, "update_times": -1}
        | {"train_step": 1000, "num_train_epochs": 0.5},
        "odm",
        {"mixer": "odm"},
        "",
    ),
    "train_lora/mixers/doremi_step2": ({**MIX, **PT}, "doremi", {}, "train a reference model (its step 1)"),
    "train_lora/mixers/random": ({**MIX, **TWO, "eval_dataset": "mmlu_eval"}, "random", {"mixer": "static"}, ""),
    "train_lora/selectors/custom": (SELECT, "custom", {}, f"{CUSTOM}selector.py'"),
    "train_lora/selectors/delta_loss": (SELECT, "delta_loss", {"selector": "delta_loss"}, ""),
    "train_lora/selectors/less": ({**SELECT, "eval_dataset": "alpaca_zh_demo"}, "less", {"selector": "less"}, ""),
    "train_lora/selectors/loss": ({**SELECT, **BEST}, "loss", {"selector": "loss"}, ""),
    "train_lora/selectors/near": ({**SELECT, **JUDGED}, "near", {"selector": "near"}, ""),
    "train_lora/selectors/nice": ({**SELECT, **BEST}, "nice", {}, "OpenAI-compatible server"),
    "train_lora/selectors/random": (SELECT, "random", {"selector": "random"}, ""),
    "train_lora/selectors/tsds": (
        {**SELECT, "eval_dataset": "alpaca_zh_demo", "ddp_timeout": False},
        "tsds",
        {},  # without that slip it is taken, as near is
        "ddp_timeout: expected a whole number, found false",
    ),
    "train_lora/weighters/adapt": ({**WEIGH, "eval_dataset": "alpaca_zh_demo"}, "adapt", {"weighter": "adapt"}, ""),
    "train_lora/weighters/custom": (WEIGH, "custom", {}, f"{CUSTOM}weighter.py'"),
    "train_lora/weighters/loss": (WEIGH, "loss", {"weighter": "loss"}, ""),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples(sets: Path, name: str) -> None:
    keys, component, wanted, told = EXAMPLES[name]
    file = {"components_cfg_file": "src/dataflex/configs/components.yaml", "component_name": component}
    found, said = outcome(sets, {**keys, **(file if component else {})})
    assert told in said
    assert {kind: found[kind]["name"] if isinstance(found[kind], dict) else found[kind] for kind in wanted} == wanted
    assert bool(found) == bool(wanted), said


def test_all_examples_are_there() -> None:
    assert len(EXAMPLES) == 22
